"""A Behind publishes a version of the weights in a thread, while the learner trains on.

Checkpoints are written so, too (checkpoint.py). Both have their tensors from copies in the host's memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class HostCopies:
    """HostCopies are copies of tensors in the host's memory, on a GPU in pinned memory, and are reused."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._gpus: set[torch.device] = set()

    def copy(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy of the tensor, which is complete after `wait`.

        Args:
            name: the copy that had this name is overwritten.
            tensor: of the same shape each time.
            dtype: what a floating-point tensor is converted to, where it is.
        """
        tensor = tensor.detach()
        dtype = dtype if tensor.is_floating_point() else tensor.dtype
        if tensor.is_cuda:
            self._gpus.add(tensor.device)
        if name not in self._copies:
            self._copies[name] = torch.empty(tensor.shape, dtype=dtype, pin_memory=tensor.is_cuda)
        return self._copies[name].copy_(tensor.to(dtype), non_blocking=True)

    def wait(self) -> None:
        """Wait until the copies are complete."""
        for gpu in self._gpus:
            torch.cuda.current_stream(gpu).synchronize()


class Behind:
    """A Behind copies the weights to the host and lets a thread send them, one version at a time.

    The learner waits only until its weights are gathered, converted and copied. The copies are in the host's
    memory, on a GPU in pinned memory, and are reused.

    Args:
        dtype: what floating-point weights are converted to, where they are.
        is_sender: whether this is learner rank 0, which copies and sends. The others only gather.
    """

    def __init__(self, dtype: torch.dtype, is_sender: bool) -> None:
        self._dtype, self._is_sender = dtype, is_sender
        self._copies = HostCopies()
        self.sending: Future[None] | None = None
        """The end of the last publication that was begun; None: it was waited for."""
        self.measured: dict[str, float] = {}
        """The metrics of the last publication that has ended."""

    def start(
        self,
        named_tensors: Iterable[tuple[str, Tensor]],
        send: Callable[[list[tuple[str, Tensor]]], None],
        copied: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the weights and let a thread call `send` with the copies; every rank calls this.

        The weights may change as soon as this returns. A publication that is still under way is waited for.

        Args:
            named_tensors: the weights, gathered one tensor at a time.
            send: sends them.
            copied: called between the two, where they are sent.

        Raises:
            Exception: what the publication before this one failed with.
        """
        self.finish()
        if not self._is_sender:
            for _ in named_tensors:  # of sharded weights each is whole on every rank: none is kept
                pass
            return
        taken = [(name, self._copies.copy(name, tensor, self._dtype)) for name, tensor in named_tensors]
        event = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        copied()

        def work() -> None:
            if event is not None:
                event.synchronize()
            send(taken)

        self.sending = in_thread(work)

    def finish(self) -> None:
        """Wait until what is being published is published, and raise the error that this failed with."""
        sending, self.sending = self.sending, None
        if sending is not None:
            sending.result()


def beside(ask: Callable[[], Result], *works: Future[Any] | None) -> Result:
    """Return ask(), unless a thread's work fails before that answers: its error is raised then.

    The answer may depend on the work: groups are sampled with the weights that are sent.

    Args:
        ask: waits for an answer.
        works: what threads do meanwhile.
    """
    pending = {work for work in works if work is not None}
    if not pending:
        return ask()
    asked = in_thread(ask)
    while not asked.done():
        done, _ = wait({asked, *pending}, return_when=FIRST_COMPLETED)
        for work in done & pending:
            work.result()
        pending -= done
    return asked.result()


def in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Return the future of work(), which runs in a thread that no process waits for when it ends."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # carried to who waits for the future
            future.set_exception(error)

    threading.Thread(target=run, name="learner_behind", daemon=True).start()
    return future

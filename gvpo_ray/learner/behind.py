"""A Behind publishes a version of the weights in a thread, while the learner trains on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


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
        self._copies: dict[str, Tensor] = {}
        self._sending: Future[None] | None = None
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
        taken = [(name, self._copy(name, tensor.detach())) for name, tensor in named_tensors]
        event = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        copied()

        def work() -> None:
            if event is not None:
                event.synchronize()
            send(taken)

        self._sending = _in_thread(work)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        if name not in self._copies:
            self._copies[name] = torch.empty(tensor.shape, dtype=dtype, pin_memory=tensor.is_cuda)
        return self._copies[name].copy_(tensor.to(dtype), non_blocking=True)

    def beside(self, ask: Callable[[], Result]) -> Result:
        """Return ask(), unless a publication fails before that answers: its error is raised then.

        The answer may depend on the publication: groups are sampled with the weights that it sends.
        """
        if self._sending is None:
            return ask()
        asked = _in_thread(ask)
        both: list[Future[Any]] = [asked, self._sending]
        wait(both, return_when=FIRST_COMPLETED)
        if self._sending.done():
            self.finish()
        return asked.result()

    def finish(self) -> None:
        """Wait until what is being published is published, and raise the error that this failed with."""
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.result()


def _in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Return the future of work(), which runs in a thread that no process waits for when it ends."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # carried to who waits for the future
            future.set_exception(error)

    threading.Thread(target=run, name="learner_behind", daemon=True).start()
    return future

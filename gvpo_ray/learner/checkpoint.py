"""A Checkpoint writes and reads the folder from which training resumes as if it had not ended.

It is a Hugging Face model, in the model's dtype, with its tokenizer, and beside that `state.json` (step,
updates, beta), `optimizer/` with the float32 weights, AdamW's moments and the random state, and where there
are such `adapter/` and `reference/`. In `optimizer/` each rank has a file with its part (parts.py); another
number of ranks, and another backend, read them too. checkpoints.py finds and removes the checkpoints of a
run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

from gvpo_ray.config.base import ConfigError
from gvpo_ray.files import part_of, writing
from gvpo_ray.learner.adapter import adapter_name, trained_parameters
from gvpo_ray.learner.backends.base import ranks
from gvpo_ray.learner.behind import HostCopies, in_thread
from gvpo_ray.learner.checkpoints import finish_checkpoint
from gvpo_ray.learner.parts import HostPlanner, PartWriter
from gvpo_ray.learner.reference_model import ReferenceModel
from gvpo_ray.learner.whole_weights import WholeWeights

# torch says so at each checkpoint of one process, which needs no group
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

WRITE_END = timedelta(hours=6)
"""Time that a rank waits for the others to have written their parts. One that dies is noticed at once."""

READ_BYTES = 1 << 30
"""Bytes of whole parameters whose training state is read at a time."""


class Checkpoint:
    """A Checkpoint has access to all that is saved of a policy; its methods are for every rank.

    Args:
        weights: the policy's.
        reference: the policy's.
        rank: rank 0 writes the model.
        device: this rank's.
        dtype: the type that the model is written in.
    """

    def __init__(
        self,
        weights: WholeWeights,
        reference: ReferenceModel,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._weights, self._reference, self._rank = weights, reference, rank
        self._device, self._dtype = device, dtype
        self._module, self._backend, self._adapter = weights.module, weights.backend, weights.adapter
        self._copies = HostCopies()
        self.writing: Future[None] | None = None
        """The end of the last checkpoint that was begun, in a thread; None: it was waited for."""

    @functools.cached_property
    def _group(self) -> dist.ProcessGroup | None:
        """The ranks as a group of their own, for threads: their messages must not mix with training's."""
        if not dist.is_initialized():
            return None
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=WRITE_END)
        return group

    # --- writing --------------------------------------------------------------------------------------------

    def begin(
        self,
        folder: Path,
        tokenizer: Any,
        state: dict[str, Any],
        written: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy all that a checkpoint holds to the host, and let a thread write it.

        Training may go on as soon as this returns. A checkpoint that is still being written is waited for. It
        is written under another name and then renamed, so that under its name there is a complete checkpoint
        or none, whenever the process is killed.

        Args:
            folder: the checkpoint.
            tokenizer: the model's.
            state: numbers that `read` returns again.
            written: called on rank 0, by the thread, once the checkpoint is on the disk.

        Raises:
            Exception: what the checkpoint before this one failed with.
        """
        self.finish()
        part = part_of(folder)
        if self._rank == 0:
            with writing(folder):
                shutil.rmtree(part, ignore_errors=True)
                # In a folder of its own, because vLLM reads every *.safetensors beside config.json.
                (part / "optimizer").mkdir(parents=True)
        if self._group is not None:
            dist.barrier(self._group)  # no rank writes before what an earlier process left is removed
        model = self._gathered("model", self._weights.of_model(), self._dtype)
        adapter = {} if self._adapter is None else self._gathered("adapter", self._weights.of_adapter())
        reference: dict[str, Tensor] = {}
        if self._reference.is_copy:
            with self._reference.computes():
                named = self._weights.of_model() if self._adapter is None else self._weights.of_adapter()
                reference = self._gathered("reference", named)
        tensors, copies = self._parts()
        self._copies.wait()

        def complete(files: list[str]) -> None:
            for name in files:
                if not (part / "optimizer" / name).is_file():
                    raise ConfigError(
                        f"run_dir: rank 0 does not see {name}, which another learner worker has written to "
                        f"{part / 'optimizer'}: it must be on a file system that all nodes share"
                    )
            self._write_model(part, model, self._dtype)
            if self._adapter is not None:
                self._write_adapter(part / "adapter", adapter)
            if reference and self._adapter is None:
                self._write_model(part / "reference", reference, self._backend.dtype)
            elif reference:
                self._write_adapter(part / "reference", reference)
            tokenizer.save_pretrained(part)
            (part / "state.json").write_text(json.dumps({**state, "files": files}), encoding="utf-8")
            finish_checkpoint(part, folder)
            written()

        def write() -> None:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a new thread would be on the first GPU
            with writing(folder), _first_cause():
                state_dict_saver.save(
                    tensors,
                    storage_writer=PartWriter(part / "optimizer", complete),
                    planner=HostPlanner(copies),
                    process_group=self._group,
                )

        self.writing = in_thread(write)

    def finish(self) -> None:
        """Wait until what is being written is on the disk, and raise the error that this failed with."""
        last, self.writing = self.writing, None
        if last is not None:
            last.result()

    def _gathered(
        self, what: str, named: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return copies of whole tensors on rank 0, without tied ones; {} on other ranks."""
        model = self._module.model
        tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else ()
        copies = {}
        for name, tensor in named:  # of sharded weights each is whole on every rank
            if self._rank == 0 and name not in tied:
                copies[name] = self._copies.copy(f"{what} {name}", tensor, dtype or tensor.dtype)
        return copies

    def _parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what this rank has of the training state, for torch's plan, and copies of it.

        Of tensors that are not sharded, each rank takes some whole ones.
        """
        rank, size = ranks()
        tensors: dict[str, Any] = {}
        copies: dict[str, Tensor] = {}
        for i, (name, parameter) in enumerate(trained_parameters(self._module.model)):
            for key, value in self._backend.get_state(parameter).items():
                is_sharded = isinstance(value, DTensor)
                if is_sharded or i % size == rank:
                    own = value.to_local() if isinstance(value, DTensor) else value
                    name_of_state = f"{key}.{name}"
                    copies[name_of_state] = self._copies.copy(name_of_state, own, own.dtype)
                    tensors[name_of_state] = value if is_sharded else copies[name_of_state]
        if rank == 0:
            tensors["torch_rng"] = copies["torch_rng"] = torch.get_rng_state()
        return tensors, copies

    def _write_model(self, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        model = self._module.model
        model.save_pretrained(folder, state_dict=weights)
        config = copy.deepcopy(model.config)  # it has the type of the learner's parameters
        for one in (config, *(getattr(config, key) for key in config.sub_configs)):
            one.dtype = dtype
        config.save_pretrained(folder)

    def _write_adapter(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write an adapter in peft's format."""
        folder.mkdir()
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(
            json.dumps(self._adapter, indent=2, default=list), encoding="utf-8"
        )

    # --- reading --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, folder: Path) -> dict[str, Any]:
        """Restore optimizer, float32 weights, reference model and random state; return the state of `begin`.

        The model itself, and its adapter, are read when the policy is made. Checkpoints of 0.2 and older have
        float32 weights there, and here only where the backend has them beside the model.

        Args:
            folder: the checkpoint.
        """
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        path = str(folder / "optimizer")
        saved = HuggingFaceStorageReader(path).read_metadata().state_dict_metadata

        def load(tensors: dict[str, Any]) -> dict[str, Any]:
            reader = HuggingFaceStorageReader(path)
            with _first_cause():
                state_dict_loader.load(tensors, storage_reader=reader, process_group=self._group)
            return tensors

        if state["num_updates"]:
            self._backend.init_state(state["num_updates"])
        for some in _by_size(list(trained_parameters(self._module.model))):
            states = {name: self._backend.get_state(parameter) for name, parameter in some}
            load(
                {
                    f"{key}.{name}": value
                    for name, values in states.items()
                    for key, value in values.items()
                    if key != "master" or f"{key}.{name}" in saved
                }
            )
            for name, parameter in some:
                self._backend.set_state(parameter, states[name])
        if (folder / "reference").is_dir():
            if self._adapter is None:
                self._reference.load(folder / "reference")
            else:
                values = load_file(folder / "reference" / "adapter_model.safetensors")
                names = [name for name, _ in trained_parameters(self._module.model)]
                self._reference.fill({name: values[adapter_name(name)] for name in names})
            self._reference.is_copy, self._reference.version = True, state["reference_version"]
        size: Any = saved["torch_rng"]
        torch.set_rng_state(load({"torch_rng": torch.empty(size.size, dtype=torch.uint8)})["torch_rng"])
        return state


def _by_size(named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Split named parameters into lists of at least one, of at most READ_BYTES of float32."""
    some: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        of_this = 4 * int(getattr(parameter, "ds_numel", parameter.numel()))
        if some and size + of_this > READ_BYTES:
            yield some
            some, size = [], 0
        some.append((name, parameter))
        size += of_this
    if some:
        yield some


@contextlib.contextmanager
def _first_cause() -> Iterator[None]:
    """Raise what a rank failed with, in place of torch's list of it, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None

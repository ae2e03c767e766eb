"""Weight transfer moves each version of the weights from the learner to the engines; both ends are here.

`objects` (default): learner rank 0 puts the weights into Ray's object store as safetensors shards; each
engine actor pulls them (Ray copies an object once per node), lays them into shared memory, and vLLM's core, a
process of its own that knows nothing of Ray, maps them from there. An engine that joins late pulls the newest
version like any other. No GPU is needed.

`nccl`: vLLM's own broadcast from learner rank 0 into a fixed fleet of GPU engines.

Both transports run vLLM's weight-transfer lifecycle: pause(keep) → start_weight_update → update_weights →
finish_weight_update(version) → resume.

Where a LoRA adapter is trained (model.lora), only the adapter is transferred, over `objects`, and vLLM's
workers merge it into the base model that they read from model.path. vLLM's own LoRA support would swap
faster, but it decodes at a third of the speed on a CPU, supports fewer models, and silently ignores tensors
that do not fit.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors

from gvpo_ray.config.base import GvpoError
from gvpo_ray.files import is_locked, lock
from gvpo_ray.weights.lora import merged

SHARD_BYTES = 512 * 2**20
"""The largest shard, in bytes, which bounds the memory of either end beside the weights themselves.

A larger tensor is a shard of its own.
"""

SHM = Path("/dev/shm")
"""Where shared memory is a file system."""

PREFIX, LOCK = "gvpo_weights_", "lock"
"""Names of the folders in shared memory, and of the file in each that its living engine has locked."""

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class WeightMismatch(GvpoError, RuntimeError):
    """An engine's log-probs differ from the learner's, so it does not run the weights that were trained.

    The message names the token with the largest difference.
    """


# --- the learner's end --------------------------------------------------------------------------------------


def shards(named_tensors: NamedTensors, dtype: torch.dtype, max_bytes: int = SHARD_BYTES) -> Iterator[bytes]:
    """Serialise weights into safetensors shards of at most `max_bytes`.

    Tensors that share storage (tied embeddings) are sent under each of their names: engines/vllm_engine.py
    says why.

    Args:
        named_tensors: names and tensors on any device.
        dtype: what floating-point tensors are converted to; others keep theirs.
        max_bytes: a tensor that is larger is a shard of its own.
    """
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        tensor = (
            tensor.detach()
            .to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            .contiguous()
        )
        if shard and size + tensor.nbytes > max_bytes:
            yield to_safetensors(shard)
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield to_safetensors(shard)


class ObjectPublisher:
    """The `objects` transport puts each version of the weights into Ray's object store.

    Ray frees a version when the buffer has a newer one and no engine still reads it.

    Args:
        put: stores an array and returns a reference to it (`ray.put`).
        dtype: the floating-point type that is transferred.
        is_sender: whether this process is learner rank 0.
    """

    def __init__(self, put: Callable[[np.ndarray], Any], dtype: torch.dtype, is_sender: bool) -> None:
        self._put, self._dtype, self._is_sender = put, dtype, is_sender

    def publish(self, version: int, named_tensors: NamedTensors) -> dict[str, Any] | None:
        """Store the weights of `version`; every rank calls this, since gathering shards is a collective.

        Returns:
            `shards`, references to the stored arrays, and `bytes`, their size together; None on ranks other
            than 0.
        """
        if not self._is_sender:
            for _ in named_tensors:
                pass
            return None
        refs, size = [], 0
        for data in shards(named_tensors, self._dtype):
            refs.append(self._put(np.frombuffer(data, dtype=np.uint8)))
            size += len(data)
        return {"shards": refs, "bytes": size}


class NcclPublisher:
    """The `nccl` transport broadcasts each version of the weights from learner rank 0, with vLLM's code.

    The engines are fixed when the first version is sent: a later engine cannot join.

    Args:
        call: (method name, one argument tuple per engine) -> None; runs that method of `Engine` on all
            engines at once and waits.
        num_engines: how many engines receive.
        tensor_parallel_size: processes of each engine.
        rank: this learner worker's.
        address: the host at which learner rank 0 listens.
        port: the port at which learner rank 0 listens.
    """

    def __init__(
        self,
        call: Callable[[str, list[tuple[Any, ...]]], None],
        num_engines: int,
        tensor_parallel_size: int,
        rank: int,
        address: str,
        port: int,
    ) -> None:
        self._num_engines, self._call, self._rank, self._tp = num_engines, call, rank, tensor_parallel_size
        self._address, self._port = address, port
        self._trainer: Any = None
        self._current: NamedTensors = ()
        self._version = 0

    # The next four methods are vLLM's VLLMWeightSyncClient, fanned out to all engines.
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let each engine's processes join the broadcast, at ranks after the learner's."""
        self._call(
            "init_transfer",
            [({**init_info, "rank_offset": 1 + i * self._tp},) for i in range(self._num_engines)],
        )

    def start_weight_update(self) -> None:
        """Prepare all engines for new weights."""
        self._call("begin_update", [()] * self._num_engines)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Let all engines receive the tensors that `update_info` describes."""
        self._call("receive", [(update_info,)] * self._num_engines)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let all engines run the new weights, under the version that `publish` was given."""
        self._call("finish_update", [(self._version,)] * self._num_engines)

    def publish(self, version: int, named_tensors: NamedTensors) -> dict[str, Any] | None:
        """Broadcast the weights of `version` and wait until all engines run them; every rank calls this.

        The first call iterates over `named_tensors` twice, because vLLM asks for the shapes first.

        Returns:
            `shards`, empty, and `bytes`, what was broadcast; None on ranks other than 0.
        """
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self._version, self._current = version, named_tensors
        if self._trainer is None:
            publisher = self

            class Source(WeightSource):
                """A Source yields the tensors of the current version; their shapes are read once."""

                _metadata: list[ParamMeta] | None = None

                def metadata(self) -> list[ParamMeta]:
                    """Return name, dtype and shape of each tensor, which are the same in each version."""
                    if self._metadata is None:
                        self._metadata = [
                            ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in publisher._current
                        ]
                    return self._metadata

                def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                    return iter(publisher._current)

            world_size = 1 + self._num_engines * self._tp
            info = NCCLTrainerInitInfo(
                rank=self._rank, master_address=self._address, master_port=self._port, world_size=world_size
            )
            client: Any = self  # its methods are those of vLLM's client, fanned out to all engines
            self._trainer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=Source())
        self._trainer.send_weights()
        if self._rank != 0:
            return None
        return {
            "shards": [],
            "bytes": sum(math.prod(m.shape) * m.dtype.itemsize for m in self._trainer.source.metadata()),
        }


# --- the engine's end ---------------------------------------------------------------------------------------


class SharedMemory:
    """A SharedMemory holds safetensors files that vLLM's processes of this node can map, until it is left.

    The files are in /dev/shm, or in the temporary folder where that is missing, not writable or full.

    Args:
        arrays: the bytes of each file.

    Raises:
        OSError: there is no room in the temporary folder either.
    """

    def __init__(self, arrays: list[np.ndarray]) -> None:
        need = sum(array.nbytes for array in arrays)
        for parent in (SHM, Path(tempfile.gettempdir())):
            _remove_abandoned(parent)
        try:
            if shutil.disk_usage(SHM).free <= 2 * need:
                raise OSError(errno.ENOSPC, "too little room", str(SHM))
            self._write(arrays, SHM)
        except OSError:  # full, perhaps because another engine of this node was faster
            self._write(arrays, None)

    def _write(self, arrays: list[np.ndarray], parent: Path | None) -> None:
        """Write the files into a new folder in `parent` (None: the temporary folder), or leave nothing."""
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self.paths = [str(self._folder / f"{i}.safetensors") for i in range(len(arrays))]
        try:
            self._lock = lock(self._folder / LOCK)
            for path, array in zip(self.paths, arrays, strict=True):
                array.tofile(path)
        except OSError:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders in `parent` of engines that were killed while they took new weights."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or another engine removes it at this moment
            if (folder / LOCK).exists() and not is_locked(folder / LOCK):
                shutil.rmtree(folder)


def merge(
    base: NamedTensors,
    adapter: dict[str, torch.Tensor],
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> NamedTensors:
    """Yield the base model's tensors, with `scale` · B A added to the layers that the adapter changes.

    Args:
        base: names and tensors of the base model.
        adapter: A and B of each layer, under the names of peft's files.
        scale: alpha / rank.
        dtype: the type that merged weights are rounded to.
        device: where merging takes place.

    Raises:
        ValueError: the adapter does not fit the model; the message names a layer. A wrong shape raises when
            its layer is reached, a layer that the model lacks at the end.
    """
    left = dict(adapter)
    for name, weight in base:
        layer, _, kind = name.rpartition(".")
        names = [f"base_model.model.{layer}.lora_{matrix}.weight" for matrix in "AB"]
        found = [left.pop(name) for name in names if name in left] if kind == "weight" else []
        if found:
            shapes = {name: list(adapter[name].shape) for name in names if name in adapter}
            if len(found) < 2:
                raise ValueError(f"the adapter has {names[0]} or {names[1]} alone: {shapes}")
            a, b = found
            if (
                a.ndim != 2
                or b.ndim != 2
                or a.shape[0] != b.shape[1]
                or [b.shape[0], a.shape[1]] != list(weight.shape)
            ):
                raise ValueError(
                    f"the adapter does not fit the model: {name} is {list(weight.shape)}, but {shapes}"
                )
            # Merged in float32 and rounded once, as the checkpoint's merge does.
            weight = merged(weight.to(device), a.to(device), b.to(device), scale).to(dtype)
        yield name, weight
    if left:
        raise ValueError(
            f"the adapter does not fit the model, which has no layer for {', '.join(sorted(left)[:3])} "
            f"({len(left)} in all)"
        )


def die_with_parent() -> None:
    """Let the kernel kill this vLLM process when its parent, the engine's actor, dies.

    It is a vLLM plugin (pyproject's vllm.general_plugins), called in each of vLLM's processes as it starts.
    vLLM's core notices a dead parent while it runs, but not while it starts, and would hold its memory for
    minutes.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if not parent.is_alive():  # it died before the call
            os._exit(1)

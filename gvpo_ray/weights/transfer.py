"""Weight transfer moves each version of the weights from the learner to the engines; both ends are here.

`objects` (default): learner rank 0 puts the weights into Ray's object store, first as safetensors shards and
then as what each version changes (deltas.py). The engines of a node share one copy of the newest version, in
shared memory (node_copy.py): the first that wants a version fetches what is missing (Ray copies an object
once per node), and vLLM's core, a process of its own that knows nothing of Ray, maps the copy. An engine that
joins late fetches the whole. No GPU is needed.

vLLM's own transports, from GPU to GPU and into a fixed fleet, are in direct.py.

All run vLLM's weight-transfer lifecycle: pause(keep) → start_weight_update → update_weights →
finish_weight_update(version) → resume.

Where a LoRA adapter is trained (model.lora), only the adapter is transferred, over `objects`, and vLLM's
workers merge it into the base model that they read from model.path. vLLM's own LoRA support would swap
faster, but it decodes at a third of the speed on a CPU, supports fewer models, and silently ignores tensors
that do not fit.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from gvpo_ray.errors import GvpoError
from gvpo_ray.weights.deltas import Bytes, Delta, join_deltas, take_changes
from gvpo_ray.weights.lora import merged

SHARD_BYTES = 512 * 2**20
"""The largest shard, in bytes, which bounds the memory of either end beside the weights themselves.

A larger tensor is a shard of its own.
"""

MAX_THREADS = 4
"""Threads that compare weights with those of the version before."""

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class WeightMismatch(GvpoError, RuntimeError):
    """An engine's log-probs differ from the learner's, so it does not run the weights that were trained.

    The message names the token with the largest difference.
    """


# --- the learner's end --------------------------------------------------------------------------------------


def shards(named_tensors: NamedTensors, dtype: torch.dtype, max_bytes: int = SHARD_BYTES) -> Iterator[Bytes]:
    """Write weights into safetensors shards of at most `max_bytes`, each of which is copied once.

    Tensors that share storage (tied embeddings) are sent under each of their names: engines/vllm_engine.py
    says why.

    Args:
        named_tensors: names and tensors on any device, which are held until their shard is full.
        dtype: what floating-point tensors are converted to, where they are; others keep theirs.
        max_bytes: a tensor that is larger is a shard of its own.
    """
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        tensor = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype)
        if shard and size + tensor.nbytes > max_bytes:
            yield _to_safetensors(shard)
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield _to_safetensors(shard)


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the types of tensors."""


def _to_safetensors(tensors: dict[str, torch.Tensor]) -> Bytes:
    """Return a safetensors file; the library's own function would copy it twice more."""
    header: dict[str, Any] = {}
    places: list[tuple[int, int, torch.Tensor]] = []
    begin = 0
    # words of eight bytes first, as safetensors orders them: each tensor is aligned to its words
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        end = begin + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        places.append((begin, end, tensor))
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = np.empty(8 + len(text) + begin, np.uint8)
    data[: 8 + len(text)] = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    for begin, end, tensor in places:
        place = torch.from_numpy(data[8 + len(text) :][begin:end])
        place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return data


class ObjectPublisher:
    """The `objects` transport puts each version of the weights into Ray's object store, as a chain.

    A chain is one whole version, and for each version after it the delta (deltas.py) to the one before. So an
    engine that has an older version of the chain fetches what it lacks, and one that joins late, or has lost
    its weights, fetches the whole and all deltas. When a chain's deltas are half as large as the whole, a new
    chain begins with the next version; so it does where most words change, as in float32.

    Learner rank 0 holds a copy of the newest version in the host's memory to compare with. A restarted
    learner has none: it begins a new chain.

    Ray frees a chain when a new one has begun, the buffer has it, and no engine still reads the old one.

    Args:
        put: stores arrays and returns a reference to them (`ray.put`).
        dtype: the floating-point type that is transferred.
        is_sender: whether this process is learner rank 0.
        frees_memory: whether the engines' turn on this GPU begins after each version: PyTorch then keeps no
            memory that it does not use.
    """

    def __init__(
        self, put: Callable[[Any], Any], dtype: torch.dtype, is_sender: bool, frees_memory: bool = False
    ) -> None:
        self._put, self._dtype, self._is_sender = put, dtype, is_sender
        self._frees_memory = frees_memory
        self._name, self._num_chains = uuid.uuid4().hex, 0
        self._copy: list[Bytes] = []
        """The newest version, as safetensors shards."""
        self._places: dict[str, tuple[int, int, int]] = {}
        """Name of a tensor -> its shard, and its first byte and the end of it there."""
        self._words: list[np.dtype[Any]] = []
        """How large the words of each shard are: 8 bits where a tensor has an odd number of bytes."""
        self._whole: list[Any] = []
        self._deltas: list[Any] = []
        self._num_delta_bytes = 0
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._threads = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))

    def publish(self, version: int, named_tensors: NamedTensors) -> dict[str, Any] | None:
        """Store the weights of `version`; every rank calls this, since gathering shards is a collective.

        Args:
            version: of the weights.
            named_tensors: the same names, in the same shapes, each time.

        Returns:
            `chain`, its name; `shards` and `deltas`, references to its parts; `size`, the bytes of the whole;
            `bytes`, what this version added to the store; and, but for the first version, `changed`, the
            share of the words that this version changed. None on ranks other than 0.

        Raises:
            ValueError: these are not the tensors of the version before.
        """
        published = self._publish(named_tensors)
        if self._frees_memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return published

    def _publish(self, named_tensors: NamedTensors) -> dict[str, Any] | None:
        if not self._is_sender:
            for _ in named_tensors:
                pass
            return None
        if not self._copy:
            for data in shards(named_tensors, self._dtype):
                self._copy.append(data)
            for i, layout in enumerate(map(_layout, self._copy)):
                self._places |= {name: (i, *place) for name, place in layout.items()}
                is_even = all(end % 2 == 0 for place in layout.values() for end in place)
                self._words.append(np.dtype(np.uint16 if is_even else np.uint8))
            return self._new_chain({})
        delta, share = self._update(named_tensors)
        changed = {"changed": share}
        size = sum(part.nbytes for part in delta or [])
        if delta is None or 2 * (self._num_delta_bytes + size) > self._num_bytes:
            return self._new_chain(changed)
        self._num_delta_bytes += size
        self._deltas.append(self._put(delta))
        return self._chain(size) | changed

    @property
    def _num_bytes(self) -> int:
        return sum(data.nbytes for data in self._copy)

    def _chain(self, size: int) -> dict[str, Any]:
        name = f"{self._name}-{self._num_chains}"
        parts = {"shards": [*self._whole], "deltas": [*self._deltas]}
        return {"chain": name, **parts, "size": self._num_bytes, "bytes": size}

    def _new_chain(self, changed: dict[str, float]) -> dict[str, Any]:
        self._num_chains += 1
        self._whole = [self._put(data) for data in self._copy]
        self._deltas, self._num_delta_bytes = [], 0
        return self._chain(self._num_bytes) | changed

    def _update(self, named_tensors: NamedTensors) -> tuple[list[Delta] | None, float]:
        """Bring the copy up to date; return the delta of each shard and the share of the words that changed.

        None in place of the deltas: they would be larger than half of the whole.
        """
        found: list[list[tuple[int, Delta]]] = [[] for _ in self._copy]
        left, most = dict(self._places), self._num_bytes // 2
        num_words = num_changed = size = 0
        for name, tensor in named_tensors:
            shard, begin, end = left.pop(name, (0, 0, -1))
            new, word = self._staged(tensor), self._words[shard]
            if end - begin != len(new):
                raise ValueError(f"the tensor {name} ({len(new)} bytes) was not one of the version before")
            at = begin // word.itemsize
            delta = take_changes(self._copy[shard][begin:end], new, word, at, self._threads)
            num_words += len(new) // word.itemsize
            num_changed += len(delta.words)
            size += delta.places.nbytes + delta.words.nbytes
            if size <= most:
                found[shard].append((at, delta))
        if left:
            raise ValueError(f"the tensor {next(iter(left))} of the version before is missing")
        share = num_changed / max(1, num_words)
        if size > most:
            return None, share
        return [
            join_deltas(sorted(parts, key=lambda part: part[0]), word, data.nbytes)
            for parts, word, data in zip(found, self._words, self._copy, strict=True)
        ], share

    def _staged(self, tensor: torch.Tensor) -> Bytes:
        """Return a tensor's bytes in the type that is transferred, in host memory that the next call reuses.

        The type is changed where the tensor is: a GPU then copies half of the bytes, to pinned memory. What
        is in host memory already is not copied.
        """
        tensor = tensor.detach()
        tensor = tensor.to(self._dtype if tensor.is_floating_point() else tensor.dtype)
        if tensor.is_cpu and tensor.is_contiguous():
            return tensor.view(-1).view(torch.uint8).numpy()
        if self._staging.nbytes < tensor.nbytes:
            self._staging = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=tensor.is_cuda)
        staged = self._staging[: tensor.nbytes]
        staged.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return staged.numpy()


def _layout(shard: Bytes) -> dict[str, tuple[int, int]]:
    """Return the tensors of a safetensors shard: name -> its first byte and the end of it in the shard."""
    begin = 8 + int.from_bytes(shard[:8].tobytes(), "little")
    header = json.loads(shard[8:begin].tobytes())
    return {
        name: (begin + entry["data_offsets"][0], begin + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


# --- the engine's end ---------------------------------------------------------------------------------------


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

"""`gvpo-ray bench traffic` counts what the learner's workers send each other in a step, by layout.

They are the calls that a step makes in float32, on CPUs as on GPUs; in bfloat16 gathered weights have half
the bytes. How long they take is not measured. What a worker sends in a call is that of a ring:

    all-reduce        2 (n - 1) / n of the tensor       all-gather     n - 1 times its own part
    reduce-scatter    (n - 1) / n of the tensor         all-to-all     (n - 1) / n of the tensor
    broadcast         (n - 1) / n of the tensor

The model is small and has random weights; the step is the second one, as the first one builds DDP's buckets.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from gvpo_ray.bench.gpu.models import Shape, make_rows
from gvpo_ray.bench.gpu.steps import settings
from gvpo_ray.bench.learner import make_model
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import train_step

SHAPE = Shape("qwen2", 4, 2, 64, 4, 704, vocab=8192)
ROWS = [(64, [64] * 8)] * 8
"""Tokens of the prompt and of each completion of a step's groups."""

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "ddp": {},
        "fsdp": {"backend": "fsdp"},
        "deepspeed, ZeRO 1": {"backend": "deepspeed", "zero_stage": 1},
        "deepspeed, ZeRO 2": {"backend": "deepspeed", "zero_stage": 2},
        "deepspeed, ZeRO 3": {"backend": "deepspeed", "zero_stage": 3},
        "native, tensor parallel 2": {"backend": "native", "tensor_parallel_size": 2},
        "ddp, context parallel 2": {"context_parallel_size": 2},
    },
    4: {
        "ddp": {},
        "fsdp": {"backend": "fsdp"},
        "native, tensor parallel 2 x FSDP 2": {"backend": "native", "tensor_parallel_size": 2},
        "fsdp, context parallel 2": {"backend": "fsdp", "context_parallel_size": 2},
    },
}
"""Keys of the learner's section, by number of workers."""

SENT: dict[str, tuple[str, Callable[[int], float]]] = {
    "allreduce": ("all-reduce", lambda n: 2 * (n - 1) / n),
    "allgather": ("all-gather", lambda n: n - 1),
    "reducescatter": ("reduce-scatter", lambda n: (n - 1) / n),
    "alltoall": ("all-to-all", lambda n: (n - 1) / n),
    "broadcast": ("broadcast", lambda n: (n - 1) / n),
}
"""Kinds of calls by the beginning of their names in torch, and the share of its input that a worker sends."""

SILENT = ("wait_tensor", "barrier", "_wrap_tensor_autograd")
"""Calls that send no tensor."""


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Traffic counts the collective calls of this process while it is entered, also of a backward pass.

    Attributes:
        messages: number of calls by kind.
        sent: bytes that this process sends in them, by kind.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.messages, self.sent = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a call of torch.distributed; those on parts of a DTensor come by themselves.

        Raises:
            NotImplementedError: the call is of a kind that is not known here.
        """
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented
        namespace, _, name = getattr(func, "_schema", func).name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name not in SILENT:
            plain = name.replace("_", "")
            found = [entry for begin, entry in SENT.items() if plain.startswith(begin)]
            if not found:
                raise NotImplementedError(f"bench traffic: {namespace}::{name}")
            ((kind, share),) = found
            # c10d's gathering and scattering calls have what they write before what they read
            writes_first = namespace == "c10d" and kind not in ("all-reduce", "broadcast")
            read = [one for one in tree_leaves(args[writes_first]) if isinstance(one, torch.Tensor)]
            self.messages[kind] += 1
            size = sum(one.numel() * one.element_size() for one in read)
            self.sent[kind] += round(share(_size_of_group(args)) * size)
        return func(*args, **(kwargs or {}))


def _size_of_group(args: Any) -> int:
    """Return the number of processes of the group that is among a call's arguments."""
    for one in reversed(args):
        if isinstance(one, torch.ScriptObject):
            try:
                return int(dist.ProcessGroup.unbox(one).size())
            except RuntimeError:  # another object, such as the kind of a reduction
                continue
        if isinstance(one, str):
            resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
            return int(resolve(one).size())
    raise NotImplementedError("bench traffic: a call without a group")


def measure(
    folder: str, layout: dict[str, Any], lengths: Sequence[tuple[int, Sequence[int]]] = ROWS
) -> Traffic:
    """Return what this rank sends in a step of four passes, which its data-parallel ranks share.

    Every rank of the process group.

    Args:
        folder: of the model.
        layout: keys of the learner's section.
        lengths: of the step's groups, all of the same size: tokens of the prompt and of each completion.
    """
    rows = make_rows(lengths, SHAPE.vocab, version=None)
    tokens = sum(prompt + sum(completions) for prompt, completions in lengths)
    given = settings(folder, micro_batch_tokens=tokens // 4, **layout)
    policy = Policy(ModelConfig(path=folder, dtype="float32"), given.learner, folder, "cpu")
    train_step(policy, rows, given)
    traffic = Traffic()
    with traffic:
        train_step(policy, rows, given)
    return traffic


def _on_rank(rank: int, world_size: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous-{world_size}"
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, of names that libraries call
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    found = {}
    for name, layout in LAYOUTS[world_size].items():
        traffic = measure(folder, {**layout, "num_workers": world_size})
        found[name] = (dict(traffic.messages), dict(traffic.sent))
    if rank == 0:
        torch.save(found, f"{folder}/traffic-{world_size}.pt")
    dist.destroy_process_group()


def main() -> None:
    """Run the benchmark and print its table, of the first worker."""
    console = Console(highlight=False)
    table = Table(title="bench traffic: messages and MiB that a worker sends in a step", title_justify="left")
    kinds = [kind for kind, _ in SENT.values()]
    for heading in ("workers", "layout", *kinds, "in all"):
        table.add_column(heading, justify="left" if heading == "layout" else "right")
    with tempfile.TemporaryDirectory(prefix="gvpo_traffic_") as folder:
        make_model(Path(folder), SHAPE)
        for world_size in LAYOUTS:
            spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]  # without types
            spawn(_on_rank, args=(world_size, folder), nprocs=world_size)
            for name, (messages, sent) in torch.load(Path(folder) / f"traffic-{world_size}.pt").items():
                cells = [
                    f"{messages[kind]:,} · {sent[kind] / 2**20:,.2f}" if messages.get(kind) else "–"
                    for kind in kinds
                ]
                whole = f"{sum(messages.values()):,} · {sum(sent.values()) / 2**20:,.2f}"
                table.add_row(str(world_size), name, *cells, whole)
        num = sum(one.numel() for one in _weights(folder))
    console.width = max(console.width, 150)
    console.print(table)
    console.print(f"{num:,} parameters, {4 * num / 2**20:,.1f} MiB; the groups of a step have 8 x 576 tokens")


def _weights(folder: str) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(Path(folder) / "model.safetensors").values())

"""`gvpo-ray bench weights` measures the way of new weights from the learner's memory into an engine's.

The weights are random ones in the sizes of Qwen2.5 1.5B, in bfloat16: rounded from master weights in float32.
Between two versions each master weight is moved by one real step of AdamW. The step is the first of an
optimizer, which moves each weight by the whole learning rate: later ones move it less and change fewer words.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from gvpo_ray.bench.gpu.models import QWEN_15B, Shape
from gvpo_ray.weights.deltas import take_changes
from gvpo_ray.weights.node_copy import NodeCopy
from gvpo_ray.weights.transfer import MAX_THREADS, ObjectPublisher

WORD = np.dtype(np.uint16)


def main(share: float = 1.0, learning_rate: float = 1e-6, shape: Shape = QWEN_15B) -> dict[str, float]:
    """Run the benchmark, print a table, and return its numbers by stage.

    Args:
        share: of the model's layers and vocabulary. The whole takes some 13 GB of memory, 3 of them in
            /dev/shm.
        learning_rate: of the steps of AdamW.
        shape: sizes of the model.
    """
    layers, vocab = (max(1, round(share * number)) for number in (shape.layers, shape.vocab))
    shape = dataclasses.replace(shape, layers=layers, vocab=vocab)
    weights = {name: master.bfloat16() for name, master in _masters(shape)}
    gib = sum(tensor.nbytes for tensor in weights.values()) / 2**30
    stored: list[Any] = []

    def put(part: Any) -> int:
        """Copy what is published, as Ray's object store does."""
        stored.append(part.copy() if isinstance(part, np.ndarray) else part)
        return len(stored) - 1

    publisher = ObjectPublisher(put, torch.bfloat16, is_sender=True)
    engine, console = NodeCopy(), Console(highlight=False)
    threads = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
    rows: list[tuple[str, float]] = []

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = work()
        rows.append((name, time.perf_counter() - begin))
        return result

    def fetch(refs: Any) -> list[Any]:
        return [stored[ref] for ref in refs]

    def publish(version: int) -> dict[str, Any]:
        return publisher.publish(version, weights.items()) or {}

    def read(paths: list[str]) -> None:
        """Copy all tensors from the node's copy to where an engine has its own, as a reload does."""
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    weights[name].copy_(file.get_tensor(name))

    def compare() -> None:
        for tensor in weights.values():
            data = tensor.view(-1).view(torch.uint8).numpy()
            take_changes(data, data, WORD, 0, threads)

    largest = max(weights.values(), key=torch.Tensor.numel)
    target = torch.empty_like(largest)
    repeats = max(1, round(gib * 2**30 / largest.nbytes))

    def memcpy() -> None:
        for _ in range(repeats):
            target.copy_(largest)

    try:
        memcpy()
        timed("memcpy", memcpy)
        rows[0] = ("memcpy", rows[0][1] * gib * 2**30 / (repeats * largest.nbytes))
        whole = timed("learner: first version, whole", lambda: publish(0))
        timed("  comparison alone, nothing changed", compare)
        _, reading = timed("node: writes the whole", lambda: engine.take(whole, fetch))
        reading.close()
        _step(weights, shape, learning_rate)
        delta = timed("learner: next version, delta", lambda: publish(1))
        paths, reading = timed("node: applies the delta", lambda: engine.take(delta, fetch))
        timed("engine, paused: reads the node's copy", lambda: read(paths))
        reading.close()
    finally:
        engine.close()
    table = Table(title=f"bench weights: {gib:.2f} GiB in bfloat16", title_justify="left")
    for heading in ("stage", "s", "GiB/s of the model", "of memcpy"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for name, seconds in rows:
        speed = gib / seconds
        table.add_row(name, f"{seconds:.2f}", f"{speed:.2f}", f"{rows[0][1] / seconds:.2f}")
    console.print(table)
    changed, sent = delta["changed"], delta["bytes"] / whole["size"]
    pause = rows[-1][1] / gib
    console.print(
        f"one step of AdamW at a learning rate of {learning_rate:g} leaves {100 * (1 - changed):.2f} % of "
        f"the words as they are; the delta has {100 * sent:.2f} % of the whole's bytes\n"
        f"pause: {pause:.2f} s per GiB of the model, {pause / changed:.1f} s per GiB that changed, because "
        "vLLM's reload reads all of it"
    )
    return {name.strip(): gib / seconds for name, seconds in rows} | {
        "changed": changed,
        "sent": sent,
        "pause_s_per_gib": pause,
    }


def _masters(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield random master weights by name, the same ones each time.

    A tied head comes under its own name too, as the learner sends it.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shape.config())  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, torch.randn(parameter.shape, generator=generator).mul_(0.02)


def _step(weights: dict[str, torch.Tensor], shape: Shape, learning_rate: float) -> None:
    """Move all weights by one step of AdamW, with random gradients."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in _masters(shape):
        master = torch.nn.Parameter(tensor)
        master.grad = torch.randn(tensor.shape, generator=generator)
        torch.optim.AdamW([master], lr=learning_rate).step()
        weights[name].copy_(master.detach())

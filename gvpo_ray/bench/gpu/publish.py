"""This section measures the stages of a weight transfer, from the learner's device to an engine's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from gvpo_ray.bench.gpu.models import QWEN_15B, TOY, build, cast
from gvpo_ray.bench.gpu.report import Box, Report, now
from gvpo_ray.weights.transfer import ObjectPublisher


def run(report: Report, device: torch.device, toy: bool, box: Box) -> None:
    """Publish weights as the learner does, then measure each stage in seconds per GiB.

    The stages are copies to the host, with and without pinned memory, files in shared memory, and reading
    these back to the device.
    """
    model = build((TOY if toy else QWEN_15B).config(), device, torch.float32)
    shards: list[np.ndarray] = []

    def put(data: np.ndarray) -> int:
        shards.append(data.copy())
        return len(shards)

    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        cast(model, dtype)
        if not box.has(8):
            return
        with report.attempt("publish", name):
            shards.clear()
            publisher = ObjectPublisher(put, torch.bfloat16, is_sender=True)
            begin = now(device)
            size = (publisher.publish(1, list(model.named_parameters())) or {})["bytes"]
            seconds = now(device) - begin
            report.add(
                "publish",
                f"{name} parameters",
                seconds=seconds,
                gib=size / 2**30,
                s_per_gib=seconds / (size / 2**30),
            )
    with report.attempt("publish", "stages"):
        _stages(report, model, device, shards)


def _stages(report: Report, model: torch.nn.Module, device: torch.device, shards: list[np.ndarray]) -> None:
    tensors = [p.detach() for p in model.parameters()]
    gib = sum(t.nbytes for t in tensors) / 2**30

    def add(name: str, work: Callable[[], Any]) -> None:
        work()
        begin = now(device)
        work()
        report.add("publish", name, s_per_gib=(now(device) - begin) / gib)

    add("device to host, tensor by tensor", lambda: [t.cpu() for t in tensors])
    if device.type == "cuda":
        largest = max(t.numel() for t in tensors)
        pinned = [torch.empty(largest, dtype=torch.bfloat16).pin_memory() for _ in range(2)]
        target = [torch.empty(t.numel(), dtype=torch.bfloat16) for t in tensors]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

        def through_pinned() -> None:
            events: list[Any] = [None, None]
            for i, tensor in enumerate(tensors):
                if i >= 2:
                    events[i % 2].synchronize()
                    target[i - 2].copy_(pinned[i % 2][: target[i - 2].numel()])
                with torch.cuda.stream(stream):
                    pinned[i % 2][: tensor.numel()].copy_(
                        tensor.flatten().to(torch.bfloat16), non_blocking=True
                    )
                    events[i % 2] = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    events[i % 2].record()
            for i in range(max(0, len(tensors) - 2), len(tensors)):
                events[i % 2].synchronize()
                target[i].copy_(pinned[i % 2][: target[i].numel()])

        add("device to host, two pinned buffers", through_pinned)
        whole = [torch.empty(t.shape, dtype=torch.bfloat16).pin_memory() for t in tensors]
        add(
            "device to host, all pinned",
            lambda: [w.copy_(t, non_blocking=True) for w, t in zip(whole, tensors, strict=True)],
        )
        del whole, target
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="gvpo_gpu_", dir=parent) as folder:
        files = [Path(folder) / f"{i}.safetensors" for i in range(len(shards))]

        def write() -> None:
            for data, file in zip(shards, files, strict=True):
                data.tofile(file)

        add("into shared memory", write)
        add("shared memory to the device", lambda: [tensor.to(device) for tensor in _read(files)])


def _read(files: list[Path]) -> Iterator[torch.Tensor]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                yield opened.get_tensor(name)

"""This section measures the machine: versions, FLOP/s of a large matrix product, and the speed of copies."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import time
from typing import Any

import torch

from gvpo_ray.bench.gpu.report import Box, Report, now

HEAVY = ("ray", "vllm", "deepspeed")
"""Packages that the check does without; those that are not installed are reported as absent."""


def run(report: Report, device: torch.device, toy: bool, box: Box) -> None:
    """Measure the machine; the share of peak in other sections is relative to its matrix product."""
    on_gpu = device.type == "cuda"
    absent = [name for name in HEAVY if importlib.util.find_spec(name) is None]
    report.add(
        "probe",
        "versions",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=importlib.metadata.version("transformers"),
        device=torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        memory_gib=torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else 0.0,
        absent=absent,
    )
    size = 8192 if not toy else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    report.add("probe", f"matrix product {size}", tflops=2 * size**3 / _best(lambda: a @ b, device) / 1e12)
    amount = 2**31 if not toy else 2**22
    source = torch.empty(amount, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    report.add(
        "probe",
        "copy on the device",
        gib_per_s=2 * amount / 2**30 / _best(lambda: target.copy_(source), device),
    )
    host = torch.ones(amount, dtype=torch.uint8)
    places = {
        "pageable": host,
        **({"pinned": torch.ones(amount, dtype=torch.uint8).pin_memory()} if on_gpu else {}),
    }
    for name, memory in places.items():
        down = _best(lambda memory=memory: memory.copy_(source), device, 3)
        up = _best(lambda memory=memory: target.copy_(memory), device, 3)
        report.add(
            "probe", f"{name} copies", down_gib_per_s=amount / 2**30 / down, up_gib_per_s=amount / 2**30 / up
        )
    other = torch.empty_like(host)
    report.add(
        "probe", "memcpy of the host", gib_per_s=amount / 2**30 / _best(lambda: other.copy_(host), device, 3)
    )


def _best(work: Any, device: torch.device, repeats: int = 8) -> float:
    """Return the seconds of the fastest of a few repeats, after one that warms up."""
    work()
    best = float("inf")
    for _ in range(repeats):
        begin = now(device)
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best

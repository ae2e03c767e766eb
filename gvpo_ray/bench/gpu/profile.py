"""This section profiles one pass on the device: time by kind of kernel, the longest kernels, and a trace."""

from __future__ import annotations

import dataclasses
import gzip
import shutil
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from gvpo_ray.bench.gpu.models import QWEN_7B, QWEN_15B, TOY, build, make_rows
from gvpo_ray.bench.gpu.report import Box, Report
from gvpo_ray.learner import packing
from gvpo_ray.learner.logprobs import CompletionLogprobs

KINDS = {
    "flex": ("flex", "sdpa_dense", "triton_tem"),
    "gemm": ("gemm", "cutlass", "nvjet", "sm90_xmma", "cublas", "mkl"),
    "softmax of the head": ("softmax", "logsumexp", "LogSumExp", "gather", "scatter"),
    "reductions": ("reduce",),
    "copies and casts": ("copy", "Memcpy", "cat"),
    "elementwise": ("elementwise", "triton_poi"),
}
"""Parts of kernel names by kind; the first kind with a match counts."""


def run(report: Report, device: torch.device, toy: bool, box: Box) -> None:
    """Profile a forward and backward pass of 1.5B and of 7B (4 layers) sizes; write gzipped traces."""
    sizes = {
        "1.5B": (QWEN_15B, [(512, [512] * 8)] * 3),
        "7B 4 layers": (dataclasses.replace(QWEN_7B, layers=4), [(1024, [2048] * 8)]),
    }
    if toy:
        sizes = {"toy": (TOY, [(8, [8] * 4)])}
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    for name, (shape, groups) in sizes.items():
        if not box.has(12):
            return
        torch._dynamo.reset()
        with report.attempt("profile", name):
            model: Any = build(shape.config(), device, torch.float32)
            model.set_attn_implementation(packing.NAME)
            module = CompletionLogprobs(model)
            module.checkpoint_activations()
            inputs, _ = packing.pack(make_rows(groups, shape.vocab), device, device.type == "cuda")

            def once(module: Any = module, inputs: Any = inputs) -> None:
                with torch.autocast(device.type, torch.bfloat16):
                    out = module(**inputs)
                out.double().mean().backward()

            once()
            with torch.profiler.profile(activities=activities) as profile:
                once()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            _add(report, name, profile, device)
            trace = report.folder / f"trace-{name.replace(' ', '-')}.json"
            profile.export_chrome_trace(str(trace))
            with open(trace, "rb") as plain, gzip.open(f"{trace}.gz", "wb") as packed:
                shutil.copyfileobj(plain, packed)
            trace.unlink()
            del model, module


def _add(report: Report, name: str, profile: Any, device: torch.device) -> None:
    on_gpu = device.type == "cuda"
    rows = []
    for event in profile.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        is_kernel = not on_gpu or str(event.device_type).endswith("CUDA")
        if own > 0 and is_kernel:
            rows.append((own / 1000, event.count, event.key))
    rows.sort(reverse=True)
    total = sum(row[0] for row in rows)
    kinds = dict.fromkeys([*KINDS, "other"], 0.0)
    for milliseconds, _, key in rows:
        kind = next((kind for kind, words in KINDS.items() if any(word in key for word in words)), "other")
        kinds[kind] += milliseconds
    report.add(
        "profile",
        f"{name}, kinds",
        total_ms=total,
        **{kind: round(ms / total, 4) for kind, ms in kinds.items()},
    )
    report.add(
        "profile", f"{name}, kernels", top=[[round(ms, 2), count, key[:90]] for ms, count, key in rows[:25]]
    )

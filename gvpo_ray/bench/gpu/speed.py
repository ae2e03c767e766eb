"""This section measures how fast the learner is: whole steps at sizes of Qwen2.5, and single passes."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gvpo_ray.bench.gpu.models import (
    QWEN_05B,
    QWEN_7B,
    QWEN_15B,
    TOY,
    BuiltPolicy,
    Shape,
    build,
    cast,
    make_folder,
    make_rows,
)
from gvpo_ray.bench.gpu.report import Box, Report, now
from gvpo_ray.bench.gpu.steps import of_version, settings
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.learner import head, packing
from gvpo_ray.learner.logprobs import CompletionLogprobs
from gvpo_ray.learner.step import train_step

CELLS = [(512, 512, 8, 3), (512, 512, 16, 2), (1024, 2048, 8, 1), (1024, 2048, 16, 1)]
"""Tokens of the prompt and of each completion, completions per group, and groups.

The group of 16 completions of 2,048 tokens is larger than BUDGET, and takes several passes.
"""

BUDGET = 24_576
"""Tokens of one forward pass."""


def run(report: Report, device: torch.device, toy: bool, box: Box) -> None:
    """Measure whole steps (forward, loss, backward, clipping, AdamW), packed and padded.

    Of the 7B model 2 and 4 layers are measured, and a step of all 28 is extrapolated from them.
    """
    sizes: dict[str, tuple[Shape, list[tuple[int, int, int, int]]]] = {
        "1.5B": (QWEN_15B, CELLS),
        "7B, 4 of 28 layers": (dataclasses.replace(QWEN_7B, layers=4), [CELLS[0], CELLS[2]]),
        "7B, 2 of 28 layers": (dataclasses.replace(QWEN_7B, layers=2), [CELLS[0], CELLS[2]]),
        "0.5B": (QWEN_05B, CELLS[:1]),
    }
    if toy:
        sizes = {"toy": (TOY, [(8, 8, 4, 2), (8, 16, 8, 1)])}
    seconds: dict[tuple[str, int, int], float] = {}
    peak = report.peak
    for name, (shape, cells) in sizes.items():
        if not box.has(15):
            report.add("speed", name, skipped="no time left")
            continue
        torch._dynamo.reset()  # Dynamo's limit of entries counts per run, and each size here stands for a run
        with report.attempt("speed", name), tempfile.TemporaryDirectory(prefix="gvpo_gpu_") as folder:
            make_folder(Path(folder), shape.config())
            given = settings(
                folder, gradient_checkpointing=True, micro_batch_tokens=BUDGET if not toy else 128
            )
            model = ModelConfig(path=folder, dtype="bfloat16")
            begin = now(device)
            policy = BuiltPolicy(model, given.learner, folder, device)
            flex = getattr(policy, "_flex", False)
            report.add("speed", f"{name}, loaded", packs=policy.packs, flex=flex, seconds=now(device) - begin)
            for cell in cells:
                result: dict[str, float] = {}
                for way in ("packed", "padded") if cell[2] == 8 or toy else ("packed",):
                    if box.has(8):
                        with report.attempt("speed", f"{name}, {cell}, {way}"):
                            result[way] = _step(report, name, policy, shape, cell, way, given, device, peak)
                if "packed" in result:
                    seconds[name, cell[1], cell[2]] = result["packed"]
                if len(result) == 2:
                    ratio = result["padded"] / result["packed"]
                    rule = {"rule": "speed", "ok": ratio >= 1.5} if cell[:3] == (512, 512, 8) else {}
                    report.add("speed", f"{name}, {cell}, packed over padded", times_as_fast=ratio, **rule)
            del policy
        if device.type == "cuda":
            torch.cuda.empty_cache()
    _extrapolate(report, seconds, peak)


def _step(
    report: Report,
    name: str,
    policy: Any,
    shape: Shape,
    cell: tuple[int, int, int, int],
    way: str,
    given: Any,
    device: torch.device,
    peak: float,
) -> float:
    """Measure a step, and return its seconds: the median of three, after one that warms up.

    A padded step has the same chunked head, checkpointing and loss as a packed one.
    """
    prompt, completion, k, num = cell
    rows = make_rows([(prompt, [completion] * k)] * num, shape.vocab)
    model, packs = policy._module.model, policy.packs
    if way == "padded":
        policy.packs = False
        model.set_attn_implementation("sdpa")
    try:
        times = []
        packing_s = 0.0
        for i in range(4):
            if device.type == "cuda" and i == 1:
                torch.cuda.reset_peak_memory_stats()
            begin = now(device)
            train_step(policy, of_version(rows, policy.step), given)
            times.append(now(device) - begin)
        if way == "packed":
            begin = now(device)
            packing.pack(rows[:1], device, getattr(policy, "_flex", False))
            packing_s = now(device) - begin
    finally:
        if way == "padded":
            policy.packs = packs
            model.set_attn_implementation(packing.NAME)
    median = statistics.median(times[1:])
    useful = num * shape.flops(prompt, completion, k) / median
    report.add(
        "speed",
        f"{name}, {cell}, {way}",
        tokens_per_s=num * (prompt + k * completion) / median,
        mfu=useful / peak,
        step_s=median,
        slowest_s=max(times[1:]),
        first_s=times[0],
        pack_ms=1000 * packing_s,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
        **({"rule": "mfu", "ok": useful / peak >= 0.25} if way == "packed" and name == "1.5B" else {}),
    )
    return median


def _extrapolate(report: Report, seconds: dict[tuple[str, int, int], float], peak: float) -> None:
    """Extrapolate a step with 28 layers linearly from steps with two and with four layers."""
    for prompt, completion, k, num in CELLS:
        pair = [seconds.get((f"7B, {layers} of 28 layers", completion, k)) for layers in (2, 4)]
        if pair[0] is not None and pair[1] is not None:
            layer = (pair[1] - pair[0]) / 2
            whole = pair[0] + 26 * layer
            useful = num * QWEN_7B.flops(prompt, completion, k) / whole
            name = f"7B from 2 and 4 layers, {(prompt, completion, k, num)}"
            report.add(
                "speed",
                name,
                step_s=whole,
                layer_ms=1000 * layer,
                mfu=useful / peak,
                rule="mfu",
                ok=useful / peak >= 0.35,
            )


# --- one choice at a time ---


def choices(report: Report, device: torch.device, toy: bool, box: Box) -> None:
    """Measure a forward and backward pass with one choice changed at a time.

    The choices are attention, chunk size of the head, checkpointing and precision. On a GPU, if a minute is
    left, compiled layers are measured too.
    """
    sizes = {
        "1.5B, 512/512": (QWEN_15B, [(512, [512] * 8)] * 3),
        "7B 4 layers, 1024/2048": (dataclasses.replace(QWEN_7B, layers=4), [(1024, [2048] * 8)]),
    }
    if toy:
        sizes = {"toy": (TOY, [(8, [8] * 4)])}
    on_gpu = device.type == "cuda"
    for size, (shape, groups) in sizes.items():
        if not box.has(10):
            continue
        torch._dynamo.reset()
        with report.attempt("choices", size):
            model = build(shape.config(), device, torch.float32)
            rows = make_rows(groups, shape.vocab)

            def measure(
                name: str,
                autocast: bool = True,
                flex: bool = on_gpu,
                checkpoints: bool = True,
                size: str = size,
                model: Any = model,
                rows: Any = rows,
            ) -> None:
                if box.has(5):
                    with report.attempt("choices", f"{size}, {name}"):
                        seconds, first, memory = _pass(model, rows, device, autocast, flex, checkpoints)
                        report.add(
                            "choices", f"{size}, {name}", pass_s=seconds, first_s=first, peak_gib=memory
                        )

            measure("as it is")
            measure("padded blocks", flex=False)
            with mock.patch.dict(head.ELEMENTS, {device.type: head.ELEMENTS[device.type] // 4}):
                measure("a quarter of the head's chunk")
            measure("no checkpointing", checkpoints=False)
            cast(model, torch.bfloat16)
            measure("bf16 parameters", autocast=False)
            if on_gpu and box.has(60):  # inductor takes a minute; its code for a CPU says nothing of a GPU
                for layer in model.base_model.layers:
                    layer.compile(dynamic=True)
                measure("bf16 parameters, layers compiled", autocast=False)
            del model
        if on_gpu:
            torch.cuda.empty_cache()


def _pass(
    model: Any, rows: Any, device: torch.device, autocast: bool, flex: bool, checkpoints: bool
) -> tuple[float, float, float]:
    """Return the median seconds of three passes, those of the first pass before them, and peak memory in GiB.

    The peak counts beyond what was allocated before the last pass.
    """
    model.set_attn_implementation(packing.NAME)
    module = CompletionLogprobs(model)
    module.checkpoint_activations(checkpoints)
    inputs, _ = packing.pack(rows, device, flex)
    times = []
    for i in range(4):
        if device.type == "cuda" and i == 1:
            torch.cuda.reset_peak_memory_stats()
        model.zero_grad()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        begin = now(device)
        # as a step does, which makes the block mask anew for each pass
        inputs["layout"] = packing.pack(rows, device, flex)[0]["layout"]
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            out = module(**inputs)
        out.double().mean().backward()
        times.append(now(device) - begin)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else 0.0
    model.zero_grad()
    return statistics.median(times[1:]), times[0], peak

"""This section checks that packed passes compute what padded ones do, and how often attention is compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gvpo_ray.bench.gpu.models import Shape, build, cast, make_rows
from gvpo_ray.bench.gpu.report import Box, Report, now
from gvpo_ray.learner import packing
from gvpo_ray.learner.logprobs import CompletionLogprobs, padded_inputs

WINDOW = {"sliding_window": 256}
SHAPES = {
    "1.5B heads (12, 2, 128)": Shape("qwen2", 12, 2, 128, 2, 2048, vocab=4096),
    "0.5B heads (14, 2, 64)": Shape("qwen2", 14, 2, 64, 2, 2048, vocab=4096),
    "7B heads (28, 4, 128)": Shape("qwen2", 28, 4, 128, 2, 4096, vocab=4096),
    "Mistral, window 256": Shape("mistral", 8, 2, 128, 2, 2048, vocab=4096, extra=WINDOW),
    "Gemma 3, heads of 256, 5:1 sliding": Shape(
        "gemma3_text", 4, 1, 256, 6, 2048, vocab=4096, extra={**WINDOW, "query_pre_attn_scalar": 256}
    ),
    "32B heads (40, 8, 128)": Shape("qwen2", 40, 8, 128, 2, 4096, vocab=4096),
    "Llama heads (32, 8, 128)": Shape("llama", 32, 8, 128, 2, 4096, vocab=4096),
}
TOY_SHAPES = {
    "toy": Shape("qwen2", 4, 2, 16, 2, 64, vocab=256),
    "toy, sliding": Shape("mistral", 4, 2, 16, 2, 64, vocab=256, extra={"sliding_window": 16}),
}

Rows = list[dict[str, Any]]


def run(report: Report, device: torch.device, toy: bool, box: Box) -> None:
    """Compare log-probs and gradients of each way of a pass with those of a padded pass in float64."""
    groups = (
        [(30, [9, 20, 4]), (12, [7, 1])] if toy else [(300, [61, 700, 128, 333]), (129, [450, 20, 256, 1])]
    )
    for name, shape in (TOY_SHAPES if toy else SHAPES).items():
        if not box.has(12):
            report.add("semantics", name, skipped="no time left")
            continue
        with report.attempt("semantics", name):
            torch._dynamo.reset()
            model = build(shape.config(), device, torch.float64)
            rows = make_rows(groups, shape.vocab)
            module = CompletionLogprobs(model)
            model.set_attn_implementation("sdpa")
            want, gradient = _outputs(module, *padded_inputs(rows, device))
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            for way, (dtype, autocast, flex) in _ways(device).items():
                if not box.has(6):
                    break
                torch._dynamo.reset()
                with report.attempt("semantics", f"{name}, {way}"):
                    _compare(
                        report, f"{name}, {way}", module, dtype, rows, weights, want, gradient, autocast, flex
                    )


def _ways(device: torch.device) -> dict[str, tuple[torch.dtype, bool, bool | None]]:
    """Return (dtype of the parameters, autocast, FlexAttention) of each way; FlexAttention None: padded."""
    on_gpu = device.type == "cuda"
    full, half = torch.float32, torch.bfloat16
    flex = {
        "flex, bf16": (half, False, True),
        "flex, autocast": (full, True, True),
        "flex, float32": (full, False, True),
    }
    return {
        **(flex if on_gpu else {}),
        "blocks, float32": (full, False, False),
        "blocks, autocast": (full, True, False),
        "padded, autocast": (full, True, None),
    }


def _compare(
    report: Report,
    name: str,
    module: CompletionLogprobs,
    dtype: torch.dtype,
    rows: Rows,
    weights: dict[str, Tensor],
    want: Tensor,
    want_gradient: Tensor,
    autocast: bool,
    flex: bool | None,
) -> None:
    model: Any = cast(module.model, dtype)
    model.load_state_dict(weights)  # in the model's dtype
    device = want.device
    begin = now(device)
    context = torch.autocast(device.type, torch.bfloat16, enabled=autocast)
    model.set_attn_implementation("sdpa" if flex is None else packing.NAME)
    with context:
        inputs, lengths = padded_inputs(rows, device) if flex is None else packing.pack(rows, device, flex)
        got, gradient = _outputs(module, inputs, lengths)
    seconds = now(device) - begin
    error = (got - want).abs()
    relative = float((gradient - want_gradient).norm() / want_gradient.norm())
    is_full = dtype == torch.float32 and not autocast
    report.add(
        "semantics",
        name,
        max_error=float(error.max()),
        rms_error=float(error.square().mean().sqrt()),
        gradient_error=relative,
        first_seconds=seconds,
        rule="semantics",
        ok=bool(float(error.max()) < 1e-4 if is_full else relative < 0.03),
    )


def _outputs(module: nn.Module, inputs: dict[str, Any], lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Return token log-probs, and the gradient of a fixed random combination of them, both in float64."""
    module.zero_grad()
    out = module(**inputs)
    weights = torch.randn(len(out), generator=torch.Generator().manual_seed(1)).to(out.device, torch.float64)
    (out.double() * weights).sum().backward()
    gradients = [p.grad.double().flatten() for p in module.parameters() if p.grad is not None]
    return out.detach().double(), torch.cat(gradients)


# --- how often attention is compiled ---


def recompiles(report: Report, device: torch.device, toy: bool, box: Box) -> None:
    """Run 40 ragged passes, and count the compiled versions of FlexAttention and of its block masks."""
    if device.type != "cuda":
        report.add("recompiles", "skipped", why="FlexAttention has no backward pass on this device")
        return
    heard = _Heard()
    logging.getLogger("torch").addHandler(heard)
    for name in ("1.5B heads (12, 2, 128)", "Gemma 3, heads of 256, 5:1 sliding"):
        with report.attempt("recompiles", name):
            if box.has(20):
                heard.lines.clear()
                torch._dynamo.reset()
                _forty(report, name, SHAPES[name], device, box, heard)
    logging.getLogger("torch").removeHandler(heard)


class _Heard(logging.Handler):
    """A _Heard collects the warnings that torch logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().strip().replace("\n", " ")[:300])


def _forty(report: Report, name: str, shape: Shape, device: torch.device, box: Box, heard: _Heard) -> None:
    model = build(shape.config(), device, torch.bfloat16)
    model.set_attn_implementation(packing.NAME)
    module = CompletionLogprobs(model)
    kinds: list[list[tuple[int, list[int]]]] = [
        [(4, [3, 1, 5])],
        [(1, [1])],
        [(10, [11, 12])],
        [(64, [65, 129])],
        [(100, [300, 77, 30, 100]), (20, [10, 200])],
        [(300, [900, 40])],
        [(40, [60, 70, 30]), (50, [61, 77]), (7, [640])],
        [(257, [1024])],
    ]
    seconds, done, largest = [], 0, 0
    for i in range(40):
        if not box.has(2):
            break
        rows = make_rows(
            [(p + i, [c + (i if c > 1 else 0) for c in cs]) for p, cs in kinds[i % 8]], shape.vocab, seed=i
        )
        has_gradient, checkpointed = i % 3 != 0, i % 2 == 1
        module.checkpoint_activations(checkpointed)
        inputs, _ = packing.pack(rows, device, True)
        largest = max(largest, inputs["input_ids"].shape[1])
        begin = now(device)
        with torch.set_grad_enabled(has_gradient):
            out = module(**inputs)
        if has_gradient:
            out.double().sum().backward()
        seconds.append(now(device) - begin)
        done += 1
    usual = sorted(seconds)[len(seconds) // 2]
    compiled = [s for s in seconds if s > 20 * usual or s > 1.0]
    entries = _entries()
    report.add(
        "recompiles",
        name,
        passes=done,
        longest=largest,
        **entries,
        compile_seconds=sum(compiled),
        slow_passes=len(compiled),
        median_pass_s=usual,
        warnings=heard.lines[:6],
        rule="entries",
        ok=max(entries.values()) <= 6 and not heard.lines,
    )


def _entries() -> dict[str, int]:
    """Return the number of Dynamo's cache entries of both functions that FlexAttention compiles."""
    import torch.nn.attention.flex_attention as flex
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    functions: dict[str, Callable[..., Any]] = {
        "attention": flex.flex_attention,
        "mask": flex.create_block_mask,
    }
    return {
        f"{name}_entries": len(_debug_get_cache_entry_list(function.__code__))
        for name, function in functions.items()
    }

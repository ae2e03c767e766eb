"""This section measures how far bfloat16 log-probs lie from float32 ones with the same weights.

The differences per completion are the noise floor of the log-ratio D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gvpo_ray.bench.gpu.models import QWEN_15B, TOY, build, cast, make_rows
from gvpo_ray.bench.gpu.report import Box, Report
from gvpo_ray.learner import packing
from gvpo_ray.learner.head import linear_logprobs


def run(report: Report, device: torch.device, toy: bool, box: Box) -> None:
    """Compare passes in bfloat16 with a pass in float32: under autocast, and with bfloat16 parameters.

    Each is measured with the learner's head, whose logits are float32, and with a plain head ("bf16 head"),
    whose logits are bfloat16. Under autocast the residual stream is float32.
    """
    shape = TOY if toy else QWEN_15B

    for length in (16, 32) if toy else (512, 2048):
        if not box.has(10):
            return
        torch._dynamo.reset()
        with report.attempt("numerics", str(length)):
            model = build(shape.config(), device, torch.float32)
            model.set_attn_implementation(packing.NAME)
            rows = make_rows([(64, [length] * 4)], shape.vocab)
            inputs, lengths = packing.pack(rows, device, device.type == "cuda")
            want = _logprobs(model, inputs, autocast=False)
            autocast = _logprobs(model, inputs, autocast=True)
            autocast_head = _logprobs(model, inputs, autocast=True, float_head=False)
            cast(model, torch.bfloat16)
            half = _logprobs(model, inputs, autocast=False)
            half_head = _logprobs(model, inputs, autocast=False, float_head=False)
            for name, difference in {
                "autocast less float32": autocast - want,
                "autocast, bf16 head, less float32": autocast_head - want,
                "bf16 less float32": half - want,
                "bf16, bf16 head, less float32": half_head - want,
                "bf16 less autocast": half - autocast,
                "bf16, bf16 head, less autocast": half_head - autocast,
            }.items():
                _add(report, f"{length} tokens, {name}", difference, lengths)


@torch.no_grad()
def _logprobs(model: Any, inputs: dict[str, Any], autocast: bool, float_head: bool = True) -> Tensor:
    inputs = dict(inputs)
    rows, positions, targets = (inputs.pop(name) for name in ("rows", "positions", "targets"))
    if inputs["layout"].block_masks is not None:
        inputs["layout"].block_masks.clear()
    with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=autocast):
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[rows, positions]
        head = model.get_output_embeddings()
        if float_head:
            return linear_logprobs(hidden, head.weight, targets).double()
        chunks = zip(torch.split(hidden, 1024), torch.split(targets, 1024), strict=True)
        return torch.cat(
            [torch.log_softmax(head(h).float(), -1).gather(1, t[:, None])[:, 0] for h, t in chunks]
        ).double()


def _add(report: Report, name: str, difference: Tensor, lengths: list[int]) -> None:
    sums = torch.stack([part.sum() for part in torch.split(difference, lengths)])
    report.add(
        "numerics",
        name,
        rms_per_token=difference.square().mean().sqrt(),
        mean_per_token=difference.mean(),
        largest=difference.abs().max(),
        rms_per_completion=sums.square().mean().sqrt(),
    )

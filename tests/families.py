"""`python tests/families.py FAMILY …` prints, for a random small model of each family, the largest difference
of log-probs between vLLM on this CPU and the learner, in nats per token.

Docs/reference/families.md says which of its figures are of this command. It is no test: each family starts
a vLLM.
"""

from __future__ import annotations

import asyncio
import copy
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny
import torch
from test_families import EXPERTS, SIZES, TRAINED, VISION
from transformers import AutoConfig, AutoModelForCausalLM

from gvpo_ray import groups
from gvpo_ray.config.engines import PoolConfig, SamplingConfig
from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.engines.vllm_engine import Engine
from gvpo_ray.learner.loop import probe_logprobs
from gvpo_ray.learner.policy import Policy
from gvpo_ray.weights.transfer import ObjectPublisher

WINDOW = 16
PROMPT_IDS = [2 + 7 * i % (tiny.VOCAB_SIZE - 2) for i in range(30)]


OF_FLOAT32 = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32}
OF_BFLOAT16 = {
    **{"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 64},
    **{"num_hidden_layers": 8, "initializer_range": 0.08},
    **{"num_experts": 16, "num_local_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128},
}
"""With heads of 32 vLLM's core dies on a CPU in bfloat16; and what rounding does shows in some depth."""


def config_of(family: str, dtype: str) -> Any:
    """A config of the family's, with sizes that vLLM runs on a CPU."""
    usual = AutoConfig.for_model(family)
    text = usual.get_text_config()
    own = EXPERTS | (OF_FLOAT32 if dtype == "float32" else OF_BFLOAT16)
    own |= {"num_key_value_heads": 1, "sliding_window": WINDOW}
    sizes = SIZES | {key: value for key, value in own.items() if key in SIZES or hasattr(text, key)}
    if text is usual:
        return AutoConfig.for_model(family, **sizes)
    return AutoConfig.for_model(
        family, text_config={**sizes, "model_type": text.model_type}, vision_config=VISION
    )


async def measured(folder: Path, family: str, dtype: str) -> tuple[str, dict[str, float]]:
    """How the learner computes it, and the differences: the largest, and of the root mean square."""
    tiny.make_model(folder)  # for its tokenizer
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config_of(family, dtype))
    for parameter in made.parameters():  # biases would be 0 and norms 1: nobody would see that they are lost
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    made.save_pretrained(folder)
    model = ModelConfig(path=str(folder), max_length=128, dtype=dtype)
    policy = Policy(model, LearnerConfig(backend="ddp"), folder)
    pool = PoolConfig(kv_cache_gib=1, num_threads=1, parity_tolerance=1e9)
    engine = Engine(model, pool, "objects", seed=0)
    await engine.start()
    try:
        publisher = ObjectPublisher(copy.deepcopy, getattr(torch, dtype), is_sender=True)
        published = publisher.publish(1, policy.named_tensors())
        assert published is not None
        probe = await engine.update(1, published, probe_logprobs(policy, []))
        prompt = groups.table(
            [{"group_id": 0, "prompt": "", "answer": "", "dataset": "d", "prompt_ids": PROMPT_IDS}]
        )
        table, _ = await engine.generate(prompt, SamplingConfig(num_completions=16, max_tokens=90), 0, 7)
        (row,) = groups.rows(table)
    finally:
        await engine.close()
    figures = {"tokens": float(sum(map(len, row["completion_ids"]))), "probe": probe["parity_max"]}
    for how, one in (("", row), (" without replay", {**row, "routed_experts": None})):
        if how and "routed_experts" not in row:
            continue
        theirs = torch.cat([torch.tensor(values) for values in row["sampling_logprobs"]])
        difference = (theirs - torch.cat(policy.token_logprobs([one]))).abs()
        figures[f"engine and learner{how}"] = float(difference.max())
        figures[f"rms{how}"] = float(difference.square().mean().sqrt())
    return "packed" if policy.packs else "padded", figures


if __name__ == "__main__":  # with --bfloat16: of deeper models, in that type
    dtype = "bfloat16" if "--bfloat16" in sys.argv else "float32"
    for family in [name for name in sys.argv[1:] if not name.startswith("--")] or TRAINED:
        before = dict(os.environ)  # an engine sets those of its own process
        with tempfile.TemporaryDirectory() as folder:
            try:
                how, figures = asyncio.run(measured(Path(folder), family, dtype))
                print(family, how, *(f"{name} {value:.2g}" for name, value in figures.items()), flush=True)
            except Exception as error:  # the other families are measured all the same
                print(family, f"{type(error).__name__}: {error}", flush=True)
        os.environ.clear()
        os.environ.update(before)

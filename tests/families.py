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
from test_families import DENSE, SIZES, VISION
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


def config_of(family: str) -> Any:
    """A config of the family's, with heads of 32, which vLLM runs on a CPU."""
    usual = AutoConfig.for_model(family)
    text = usual.get_text_config()
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1}
    for key, value in (("head_dim", 32), ("sliding_window", WINDOW)):
        if hasattr(text, key):
            sizes[key] = value
    if text is usual:
        return AutoConfig.for_model(family, **sizes)
    return AutoConfig.for_model(
        family, text_config={**sizes, "model_type": text.model_type}, vision_config=VISION
    )


async def measured(folder: Path, family: str) -> tuple[str, dict[str, float]]:
    """How the learner computes it, and the largest differences."""
    tiny.make_model(folder)  # for its tokenizer
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config_of(family))
    for parameter in made.parameters():  # biases would be 0 and norms 1: nobody would see that they are lost
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    made.save_pretrained(folder)
    model = ModelConfig(path=str(folder), max_length=128)
    policy = Policy(model, LearnerConfig(backend="ddp"), folder)
    pool = PoolConfig(kv_cache_gib=1, num_threads=1, parity_tolerance=1e9)
    engine = Engine(model, pool, "objects", seed=0)
    await engine.start()
    try:
        publisher = ObjectPublisher(copy.deepcopy, torch.float32, is_sender=True)
        published = publisher.publish(1, policy.named_tensors())
        assert published is not None
        probe = await engine.update(1, published, probe_logprobs(policy, []))
        prompt = groups.table(
            [{"group_id": 0, "prompt": "", "answer": "", "dataset": "d", "prompt_ids": PROMPT_IDS}]
        )
        table, _ = await engine.generate(prompt, SamplingConfig(num_completions=4, max_tokens=40), 0, 7)
        (row,) = groups.rows(table)
    finally:
        await engine.close()
    ours = policy.token_logprobs([row])
    worst = max(
        float((torch.tensor(theirs) - own).abs().max())
        for theirs, own in zip(row["sampling_logprobs"], ours, strict=True)
    )
    figures = {
        "tokens": float(sum(map(len, ours))),
        "engine and learner": worst,
        "probe": probe["parity_max"],
    }
    return "packed" if policy.packs else "padded", figures


if __name__ == "__main__":
    for family in sys.argv[1:] or DENSE:
        before = dict(os.environ)  # an engine sets those of its own process
        with tempfile.TemporaryDirectory() as folder:
            try:
                how, figures = asyncio.run(measured(Path(folder), family))
                print(family, how, *(f"{name} {value:.2g}" for name, value in figures.items()), flush=True)
            except Exception as error:  # the other families are measured all the same
                print(family, f"{type(error).__name__}: {error}", flush=True)
        os.environ.clear()
        os.environ.update(before)

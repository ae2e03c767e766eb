"""`python tests/evenness.py` prints what the auxiliary loss of a mixture of experts does, in some minutes.

A random Qwen 3 mixture learns to write the digits of a number in order, with and without it. It is no test;
docs/reference/families.md has its figures.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import learners
import tiny
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from gvpo_ray.config.loss import SftLoss
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.groups import Part
from gvpo_ray.learner.balance import balance_of
from gvpo_ray.learner.microbatches import Plan
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import train_step
from gvpo_ray.learner.warm_start import GROUP

NUM_STEPS, BATCH, EXPERTS, CHOSEN = 300, 64, 8, 2
COEFFICIENTS = (None, 0.001, 0.01, 0.1)


def rows_of(rng: random.Random, num: int) -> list[dict[str, Any]]:
    """Groups of one: a number of twelve digits, and its digits in order."""
    rows = []
    for i in range(num):
        digits = [rng.randrange(10) for _ in range(12)]
        ids = {
            "prompt_ids": [2 + d for d in digits] + [20],
            "completion_ids": [[2 + d for d in sorted(digits)] + [1]],
        }
        rows.append({**GROUP, **ids, "group_id": i})
    return rows


def make(folder: Path, seed: int, coefficient: float) -> None:
    tiny.make_model(folder)  # for its tokenizer
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=64,
        moe_intermediate_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        router_aux_loss_coef=coefficient,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def trained(folder: Path, seed: int, coefficient: float | None) -> tuple[float, float]:
    """Return nats per token of new numbers, and experts per token by the auxiliary loss (CHOSEN: even)."""
    make(folder, seed, coefficient or 0.001)
    given = learners.settings(folder, num_steps=NUM_STEPS, learning_rate=2e-3, schedule="linear")
    settings = dataclasses.replace(given, loss=SftLoss())
    model = ModelConfig(path=str(folder), router_aux_loss=coefficient is not None)
    policy = Policy(model, settings.learner, folder)
    rng = random.Random(seed)
    for _ in range(NUM_STEPS):
        train_step(policy, rows_of(rng, BATCH), settings)
    policy.save(folder / "trained")
    end = Policy(model.model_copy(update={"router_aux_loss": True}), settings.learner, folder / "trained")
    rows = rows_of(random.Random(1_000 + seed), 256)
    plan = Plan(rows, [[Part(i, range(1)) for i in range(len(rows))]], [])
    balance = balance_of(end, plan)
    assert balance is not None
    nats = 0.0
    with torch.no_grad():
        for of_pass in plan.passes:
            laid_out = end.lay_out(of_pass, loads=True)
            nats -= float(end.forward(laid_out).sum())
            balance.share(laid_out[0]["load"])
    num_tokens = sum(len(row["completion_ids"][0]) for row in rows)
    return nats / num_tokens, balance.value(end)


if __name__ == "__main__":
    for coefficient in COEFFICIENTS:
        for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
            with tempfile.TemporaryDirectory() as folder:
                nats, experts = trained(Path(folder), seed, coefficient)
            print(
                json.dumps({"coefficient": coefficient, "seed": seed, "nats": nats, "experts": experts}),
                flush=True,
            )

"""The runs of `gvpo-ray bench family` train and sample a small policy in one process, without Ray."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo_ray.config.learner import CheckpointConfig, LearnerConfig
from gvpo_ray.config.loss import LossOptions
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.data import tasks
from gvpo_ray.groups import Row
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import Settings, train_step
from gvpo_ray.verifiers.rewards import in_place

MAX_TOKENS = 16
"""Of a completion."""


@dataclass
class Trained:
    """A Trained is a policy with what is needed to sample from it."""

    policy: Policy
    settings: Settings
    tokenizer: Any
    mirror: Any
    """The same model for transformers' `generate`; `sample` gives it the policy's weights."""

    def step(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Train one step on these groups."""
        return train_step(self.policy, [dict(row) for row in rows], self.settings)

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], greedy: bool = False) -> tuple[list[list[int]], list[str]]:
        """Return the tokens, with the end of sequence, and the text of one completion for each prompt."""
        self.mirror.load_state_dict(dict(self.policy.named_tensors()))
        end = self.tokenizer.eos_token_id
        batch = self.tokenizer([f"{prompt}\n" for prompt in prompts], return_tensors="pt", padding=True)
        how: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
        whole = self.mirror.generate(**batch, max_new_tokens=MAX_TOKENS, pad_token_id=end, **how)
        found = []
        for ids in whole[:, batch.input_ids.shape[1] :].tolist():
            found.append(ids[: ids.index(end) + 1] if end in ids else ids)
        return found, self.tokenizer.batch_decode(found, skip_special_tokens=True)

    def measured(self, problems: Sequence[tasks.Problem]) -> dict[str, float]:
        """Return reward and pass@1 at temperature 1, and pass@1 of greedy decoding."""
        prompts, answers = [one.prompt for one in problems], [one.answer for one in problems]
        rewards, greedy = (
            in_place([], self.sample(prompts, greedy)[1], answer=answers) for greedy in (False, True)
        )
        return {
            "reward": statistics.mean(rewards),
            "pass@1": statistics.mean(reward == 1 for reward in rewards),
            "greedy": statistics.mean(reward == 1 for reward in greedy),
        }


def load(path: Path, loss: LossOptions, rate: float, num_steps: int, num_mini_batches: int = 1) -> Trained:
    """Return a policy before its first step."""
    learner = LearnerConfig(
        backend="ddp",
        learning_rate=rate,
        schedule="linear",
        warmup_steps=num_steps // 20,
        adam_betas=(0.9, 0.99),
        num_mini_batches=num_mini_batches,
        micro_batch_tokens=16384,
    )
    policy = Policy(ModelConfig(path=str(path)), learner, path)
    if loss.has_reference_model:
        policy.reference.load(str(path))
    settings = Settings(
        run_dir="",
        num_steps=num_steps,
        last_step=num_steps,
        loss=loss,  # type: ignore[arg-type]
        learner=learner,
        checkpoint=CheckpointConfig(),
        model_path=str(path),
        parity_every=0,
    )
    mirror: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    return Trained(policy, settings, tokenizer, mirror.eval())


def group(
    i: int, tokenizer: Any, prompt: str, completions: Sequence[tuple[list[int], str]], **more: Any
) -> Row:
    """Return a group of completions that no policy of the run sampled."""
    num = len(completions)
    return {
        "group_id": i,
        "prompt": prompt,
        "prompt_ids": tokenizer(f"{prompt}\n").input_ids,
        "completions": [text for _, text in completions],
        "completion_ids": [ids for ids, _ in completions],
        "finish_reasons": ["stop"] * num,
        "sources": ["offline:bench"] * num,
        "version_min": [None] * num,
        "version_max": [None] * num,
        "sampling_logprobs": [None] * num,
        "rewards": [1.0] * num,
        "reward_reasons": [None] * num,
        **more,
    }


def encoded(tokenizer: Any, text: str) -> tuple[list[int], str]:
    """Return a completion's tokens, with the end of sequence, and its text."""
    return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id], text


def epochs(rows: Sequence[Row], size: int, num_steps: int, seed: int) -> Iterator[list[Row]]:
    """Yield batches of rows, in a new order in each epoch."""
    rng = random.Random(seed)
    order: list[int] = []
    for _ in range(num_steps):
        if len(order) < size:
            order = rng.sample(range(len(rows)), len(rows))
        batch, order = order[:size], order[size:]
        yield [rows[i] for i in batch]

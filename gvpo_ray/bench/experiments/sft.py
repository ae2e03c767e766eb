"""`gvpo-ray bench learner` also compares SFT here: the learner's steps, and TRL's SFTTrainer with packing.

Both imitate the same rows of ragged lengths, with the loss on completions alone, in about as many tokens per
update: ours as groups of one in passes of so many tokens, TRL's packed end to end (best fit, decreasing) into
sequences that each hold a quarter. A token counts once, and padding never.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from gvpo_ray.bench.gpu.models import make_rows
from gvpo_ray.bench.gpu.steps import settings
from gvpo_ray.config.loss import SftLoss
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.groups import Row
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import train_step

PARTS = 4
"""Sequences of one of TRL's updates."""
WARM, MEASURED = 2, 8
"""Updates before the measurement, and in it."""


def ragged_rows(num_updates: int, tokens: int, vocab: int) -> list[list[Row]]:
    """Return each update's groups of one: prompts and completions of a 128th to an eighth of its tokens."""
    rng = random.Random(0)
    batches: list[list[Row]] = []
    for update in range(num_updates):
        sizes: list[tuple[int, list[int]]] = []
        while (left := tokens - sum(prompt + size for prompt, (size,) in sizes)) > tokens // 64:
            prompt, size = (rng.randint(tokens // 128, tokens // 8) for _ in range(2))
            short = min(1.0, left / (prompt + size))
            sizes.append((max(1, int(prompt * short)), [max(1, int(size * short))]))
        batches.append([*make_rows(sizes, vocab, seed=update, version=None)])
    return batches


def num_tokens(rows: Sequence[Row]) -> int:
    """Return the tokens of prompts and completions."""
    return sum(len(row["prompt_ids"]) + len(row["completion_ids"][0]) for row in rows)


def ours(folder: str, batches: Sequence[Sequence[Row]], tokens: int) -> tuple[float]:
    """Return the seconds per token of the learner's updates."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = settings(folder, learning_rate=1e-6, micro_batch_tokens=tokens)
    given.loss = SftLoss()
    model = ModelConfig(path=folder, dtype="bfloat16" if device == "cuda" else "float32")
    policy = Policy(model, given.learner, folder, device)
    for batch in batches[:WARM]:
        train_step(policy, [dict(row) for row in batch], given)
    began = time.perf_counter()
    for batch in batches[WARM:]:
        train_step(policy, [dict(row) for row in batch], given)
    return ((time.perf_counter() - began) / sum(map(num_tokens, batches[WARM:])),)


class Clock(TrainerCallback):
    """A Clock keeps the time at the end of each update."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        """Keep the time."""
        self.times.append(time.perf_counter())


def trl(folder: str, batches: Sequence[Sequence[Row]], tokens: int) -> tuple[float]:
    """Return the seconds per token of the updates of TRL's SFTTrainer, with packing."""
    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [row for batch in batches for row in batch]
    data = {
        "input_ids": [row["prompt_ids"] + row["completion_ids"][0] for row in rows],
        "completion_mask": [
            [0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"][0]) for row in rows
        ],
    }
    on_gpu, clock = torch.cuda.is_available(), Clock()
    with tempfile.TemporaryDirectory() as out:
        options = SFTConfig(
            output_dir=out,
            packing=True,
            max_length=tokens // PARTS,
            per_device_train_batch_size=PARTS,
            num_train_epochs=1,
            learning_rate=1e-6,
            gradient_checkpointing=on_gpu,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_drop_last=True,
            model_init_kwargs={"dtype": "float32"},
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.eos_token
        trainer = SFTTrainer(
            folder,
            options,
            train_dataset=Dataset.from_dict(data),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        packed = [len(row["input_ids"]) for row in trainer.train_dataset]
        trainer.train()
    per_update = sum(packed) / len(packed) * PARTS
    return ((clock.times[-1] - clock.times[WARM - 1]) / (per_update * (len(clock.times) - WARM)),)

"""Metric names, how they are computed from groups, and metrics.jsonl. Every number a run reports is named here or in losses/.

    reward/mean, reward/std          over the verifiable completions of the step's batch
    groups/size_mean                 completions with a reward, per group
    groups/untrainable               groups with fewer than two of them (counted, not trained on)
    completions/unverifiable         share of completions without a reward
    completions/length_mean          tokens
    completions/truncated            share that reached max_tokens
    staleness/mean, staleness/max    steps between the oldest weights that wrote a completion and the step's start
    tokens/trained                   completion tokens of the trained groups
    loss, gvpo/*, policy/*           losses/gvpo.py, over all mini-batches of the step
    grad_norm                        before clipping, mean over the step's updates
    learning_rate, updates           of the step; optimizer updates since the run began
    time/step                        seconds from the learner's asking for the batch to its weights being published
    time/wait_for_groups             of these, seconds the learner had no batch
    time/train, time/publish         of these, passes and updates; gathering and publishing weights
    weights/bytes                    of one version
    eval/<name>/pass@1               mean reward over the held-out prompts' completions; with stderr, length_mean, truncated beside it
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 0.0 of nothing."""
    return math.fsum(values) / len(values) if values else 0.0


def batch_metrics(rows: Sequence[Row], version: int) -> dict[str, float]:
    """What a batch of groups says by itself, before it is trained on by weights of `version`."""
    rewards = [reward for row in rows for reward in row["rewards"] if reward is not None]
    total = sum(len(row["rewards"]) for row in rows)
    sizes = [sum(reward is not None for reward in row["rewards"]) for row in rows]
    ages = [version - oldest for row in rows for oldest in row["version_min"] if oldest is not None]
    average = mean(rewards)
    return {
        "reward/mean": average,
        "reward/std": math.sqrt(mean([(reward - average) ** 2 for reward in rewards])),
        "groups/size_mean": mean(sizes),
        "groups/untrainable": float(sum(size < 2 for size in sizes)),
        "completions/unverifiable": 1 - len(rewards) / max(1, total),
        "completions/length_mean": mean([len(ids) for row in rows for ids in row["completion_ids"]]),
        "completions/truncated": mean([reason == "length" for row in rows for reason in row["finish_reasons"]]),
        "staleness/mean": mean(ages),
        "staleness/max": float(max(ages, default=0)),
    }


def evaluation_metrics(name: str, rows: Sequence[Row]) -> dict[str, float]:
    """pass@1 of one held-out set: the mean over prompts of the mean reward of a prompt's completions; unverifiable ones count as wrong.

    The standard error is over prompts.
    """
    per_prompt = [mean([reward or 0.0 for reward in row["rewards"]]) for row in rows]
    average = mean(per_prompt)
    variance = math.fsum((value - average) ** 2 for value in per_prompt) / max(1, len(per_prompt) - 1)
    return {
        f"eval/{name}/pass@1": average,
        f"eval/{name}/stderr": math.sqrt(variance / max(1, len(per_prompt))),
        f"eval/{name}/num_prompts": float(len(per_prompt)),
        f"eval/{name}/length_mean": mean([len(ids) for row in rows for ids in row["completion_ids"]]),
        f"eval/{name}/truncated": mean([reason == "length" for row in rows for reason in row["finish_reasons"]]),
    }


class MetricsLog:
    """metrics.jsonl: one JSON object per line, with `step`. Lines after the checkpoint that a run resumes from are written anew."""

    def __init__(self, path: str | Path, resume_step: int) -> None:
        self.path = Path(path)
        self.lines: list[dict[str, Any]] = []
        if self.path.exists():
            for text in self.path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue  # the last line of a killed run
                if line.get("step", 0) <= resume_step:
                    self.lines.append(line)
            part = self.path.with_suffix(".jsonl.part")
            part.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
            part.replace(self.path)

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        line = {"step": step, **metrics}
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def last(self, name: str, default: Any = None) -> Any:
        """The newest value of a metric."""
        return next((line[name] for line in reversed(self.lines) if name in line), default)

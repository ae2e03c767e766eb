"""Groups as engines get them and completions as they return them, for the tests of every kind of engine."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import tiny

from gvpo_ray import groups
from gvpo_ray.config.engines import SamplingConfig

PROMPT_IDS = [2 + (7 * i) % (tiny.VOCAB_SIZE - 2) for i in range(24)]


def prompt(group_id: int = 0) -> pa.Table:
    return groups.table(
        [{"group_id": group_id, "prompt": "1 + 1?", "answer": "2", "dataset": "d", "prompt_ids": PROMPT_IDS}]
    )


def part(
    *completions: list[int], reason: str = "stop", source: str = "policy", version: int | None = 0
) -> pa.Table:
    """A row of completions, as they are kept outside an engine."""
    m = len(completions)
    logprobs = [None if version is None else [-1.0] * len(ids) for ids in completions]
    return groups.with_columns(
        prompt(),
        completions=[["kept"] * m],
        completion_ids=[completions],
        finish_reasons=[[reason] * m],
        sources=[[source] * m],
        version_min=[[version] * m],
        version_max=[[version] * m],
        sampling_logprobs=[logprobs],
    )


def row_of(table: pa.Table) -> dict[str, Any]:
    (row,) = groups.rows(groups.validate(table, groups.PROMPT_COLUMNS + groups.COMPLETION_COLUMNS))
    return row


def sampling(num_completions: int = 4, max_tokens: int = 20) -> SamplingConfig:
    return SamplingConfig(num_completions=num_completions, max_tokens=max_tokens)

"""Two finished evaluations are compared here, prompt by prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from gvpo_ray.config.base import ConfigError
from gvpo_ray.observe.metrics import bootstrap_interval, mean


def compare(a: str, b: str, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Compare two evaluations by the paired differences of their prompts.

    A difference is b's share of correct samples of a prompt less a's. Per set, the mean over the shared
    prompts has a 95 % bootstrap interval.

    Args:
        a: folder of the first evaluation, or its eval.json.
        b: folder of the second one.
        seed: seed of the bootstrap.

    Returns:
        By set: num_prompts (shared), unmatched, a, b, difference {"value", "low", "high"}, and notes: what
            else differs, as text.

    Raises:
        ConfigError: a finished evaluation is missing, or the two have no prompt in common.
    """
    (how_one, one), (how_two, two) = _finished(a), _finished(b)
    result: dict[str, dict[str, Any]] = {}
    for name in one:
        shared = [key for key in one[name] if key in two.get(name, {})]
        if not shared:
            continue
        before, after = ([shares[name][key] for key in shared] for shares in (one, two))
        differences = [y - x for x, y in zip(before, after, strict=True)]
        low, high = bootstrap_interval(differences, seed=seed)
        ways = [(how_one.get(name, {}).get(key), how_two.get(name, {}).get(key)) for key in HOW]
        result[name] = {
            "num_prompts": len(shared),
            "unmatched": len(one[name]) + len(two[name]) - 2 * len(shared),
            "a": mean(before),
            "b": mean(after),
            "difference": {"value": mean(differences), "low": low, "high": high},
            "notes": [
                f"{key} is {x} in A, {y} in B" for key, (x, y) in zip(HOW, ways, strict=True) if x != y
            ],
        }
    if not result:
        raise ConfigError(f"compare: {a} and {b} have no prompt in common")
    for name in sorted({*one, *two} - {*result}):
        result[name] = {
            "num_prompts": 0,
            "unmatched": len(one.get(name, {})) + len(two.get(name, {})),
            "notes": ["no prompt in common"],
        }
    return result


HOW = ("num_samples", "temperature", "max_tokens")
"""Keys of a set in eval.json that should be equal in both evaluations."""


def _finished(
    place: str,
) -> tuple[Mapping[str, Mapping[str, Any]], dict[str, dict[tuple[str, str, int], float]]]:
    """Read a finished evaluation: the sets of its eval.json, and the share of correct samples per prompt.

    The shares are by set, then by (prompt, answer, number among equal prompts of the set).
    """
    path = Path(place).parent if Path(place).name == "eval.json" else Path(place)
    file = path / "generations.parquet"
    if not (path / "eval.json").is_file() or not file.is_file():
        raise ConfigError(f"compare: no finished evaluation in {place} (eval.json, generations.parquet)")
    try:
        sets = json.loads((path / "eval.json").read_text(encoding="utf-8")).get("sets", {})
        rows = pq.read_table(
            file, columns=["dataset", "prompt_id", "prompt", "answer", "sample", "correct"]
        ).to_pylist()
    except (ValueError, AttributeError, OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"compare: the evaluation in {place} cannot be read: {' '.join(str(error).split())}"
        ) from error
    samples: dict[str, dict[tuple[str, str, int], dict[int, bool]]] = {}
    numbers: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        alike = numbers.setdefault((row["dataset"], row["prompt"], row["answer"]), [])
        if row["prompt_id"] not in alike:
            alike.append(row["prompt_id"])
        key = row["prompt"], row["answer"], alike.index(row["prompt_id"])
        of_prompt = samples.setdefault(row["dataset"], {}).setdefault(key, {})
        of_prompt[row["sample"]] = row["correct"] or of_prompt.get(row["sample"], False)  # of its branches
    return sets, {
        name: {key: mean([*values.values()]) for key, values in prompts.items()}
        for name, prompts in samples.items()
    }


def comparison_table(result: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return compare's result as a table for the console, with one row per set."""
    table = Table("set")
    for column in ("prompts", "A", "B", "B - A, 95 % interval"):
        table.add_column(column, justify="right")
    for name, values in result.items():
        cells = [
            f"{values['num_prompts']}"
            + (f" ({values['unmatched']} without a partner)" if values["unmatched"] else "")
        ]
        if values["num_prompts"]:
            difference = values["difference"]
            interval = (
                f"{100 * difference['value']:+.2f} % [{100 * difference['low']:+.2f}, "
                f"{100 * difference['high']:+.2f}]"
            )
            cells += [f"{100 * values['a']:.2f} %", f"{100 * values['b']:.2f} %", interval]
        table.add_row(name, *cells)
    return table

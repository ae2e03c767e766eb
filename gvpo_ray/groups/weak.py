"""Weak negatives are completions of other prompts, which are scored under this one (EPA)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from gvpo_ray.groups.table import MASK_COLUMNS, PER_COMPLETION_COLUMNS, Row

WEAK = "weak:"
"""How the source of a weak negative begins; the group that it comes from follows."""


def with_weak_negatives(rows: Sequence[Row], num: int, seed: int, max_length: int) -> list[dict[str, Any]]:
    """Return the groups with up to `num` weak negatives each, behind their own completions.

    Which they are depends on the seed and the ids of the groups alone, not on their order. A group gives at
    most one to another, never one to a group of the same prompt, and never a completion that the other has
    itself. They have no versions and no log-probs, and the lowest reward of their group, which EPA does not
    read.

    Args:
        rows: all groups of an update, as `batching.trainable` leaves them.
        num: most weak negatives of a group.
        seed: of the run.
        max_length: most tokens of the prompt and a weak negative.
    """
    return [_with_weak(row, rows, num, seed, max_length) for row in rows]


def _with_weak(row: Row, rows: Sequence[Row], num: int, seed: int, max_length: int) -> dict[str, Any]:
    ids = row["group_id"]
    donors: list[tuple[Row, int]] = []
    others = [other for other in rows if other["prompt"] != row["prompt"]]
    texts, tokens = [*row["completions"]], [*row["completion_ids"]]
    for other in sorted(others, key=lambda other: _draw(seed, ids, other["group_id"])):
        if len(donors) == num or other["prompt_ids"] == row["prompt_ids"]:
            continue
        order = sorted(range(len(other["completions"])), key=lambda i: _draw(seed, ids, other["group_id"], i))
        for i in order:
            own = other["completion_ids"][i]
            fits = len(row["prompt_ids"]) + len(own) <= max_length
            if fits and own not in tokens and other["completions"][i] not in texts:
                donors.append((other, i))
                texts.append(other["completions"][i])
                tokens.append(own)
                break
    if not donors:
        return dict(row)
    from_donor = {"completions", "completion_ids", "finish_reasons", *MASK_COLUMNS}
    result = dict(row)
    for name in PER_COMPLETION_COLUMNS:
        values = row.get(name)
        masks = name in MASK_COLUMNS and any(other.get(name) for other, _ in donors)
        if values is None and not masks:
            continue
        values = [None] * len(row["completions"]) if values is None else values
        if name in from_donor:
            new = [other[name][i] if other.get(name) else None for other, i in donors]
        elif name == "sources":
            new = [f"{WEAK}{other['group_id']}" for other, _ in donors]
        else:
            new = [min(row["rewards"]) if name == "rewards" else None] * len(donors)
        result[name] = [*values, *new]
    return result


def _draw(*numbers: int) -> bytes:
    """Return a number that looks random and depends on these alone."""
    return hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()

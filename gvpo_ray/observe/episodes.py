"""The metrics of episodes say how many turns and tool calls they have, and how they end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gvpo_ray.groups import Row


def episodes_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what the engines have noted of each episode of some groups (the column `episodes`).

    An agent's episode may be several completions, its branches, and counts once.
    """
    found = (json.loads(entry) for row in rows for entry in row.get("episodes") or () if entry)
    return [entry for entry in found if not entry.get("branch")]


def tries_of(row: Row) -> list[list[int]]:
    """Return the indices of a group's completions by try, in the order of their first ones.

    A completion is a try of its own. The branches of an agent's episode are one try: they are parts of the
    same attempt, and have one reward.
    """
    entries = row.get("episodes") or [None] * len(row["rewards"])
    found: dict[Any, list[int]] = {}
    for i, entry in enumerate(entries):
        found.setdefault(json.loads(entry)["name"] if entry else i, []).append(i)
    return list(found.values())


def episode_metrics(prefix: str, rows: Sequence[Row]) -> dict[str, float]:
    """Compute the metrics of episodes; none where the completions are no episodes.

    Args:
        prefix: of their names, "episodes" or "eval/<set>".
        rows: the groups.
    """
    found = episodes_of(rows)
    if not found:
        return {}

    def share(end: str) -> float:
        return [one["end"] for one in found].count(end) / len(found)

    return {
        f"{prefix}/turns_mean": sum(one["turns"] for one in found) / len(found),
        f"{prefix}/tool_calls_mean": sum(one["tool_calls"] for one in found) / len(found),
        f"{prefix}/tool_errors": float(sum(one["tool_errors"] for one in found)),
        f"{prefix}/tool_hung": float(sum(one.get("tool_hung", 0) for one in found)),
        f"{prefix}/tool_refused": float(sum(one.get("tool_refused", 0) for one in found)),
        f"{prefix}/max_turns": share("max_turns"),
        f"{prefix}/no_room": share("length"),
        f"{prefix}/renderer": share("renderer"),
        f"{prefix}/lost": share("lost"),
        f"{prefix}/broken": share("broken"),
    }

"""What a rank and a forward pass get: groups without their unverifiable completions, dealt to ranks, and cut
by tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_ray.groups.table import PER_COMPLETION_COLUMNS


def num_tokens(row: Mapping[str, Any]) -> int:
    """Tokens that the group costs the learner: its prompt once and its completions."""
    return len(row["prompt_ids"]) + sum(len(ids) for ids in row["completion_ids"])


def trainable_completions(row: Mapping[str, Any]) -> list[int]:
    """Which of a group's completions have a reward, and a token."""
    return [i for i, reward in enumerate(row["rewards"]) if reward is not None and row["completion_ids"][i]]


def trainable(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row without its unverifiable completions (reward null); None when fewer than two are left.

    A group of one carries no signal: its only weight, R - mean R, is zero.
    """
    keep = trainable_completions(row)
    if len(keep) < 2:
        return None
    kept = only(row, keep)
    if row.get("reward_parts") is not None:
        kept["reward_parts"] = {
            name: [part[i] for i in keep] for name, part in dict(row["reward_parts"]).items()
        }
    return kept


def only(row: Mapping[str, Any], completions: Sequence[int]) -> dict[str, Any]:
    """The row with these of its completions; reward_parts, which passes do not look at, as they are."""
    names = [name for name in PER_COMPLETION_COLUMNS if row.get(name) is not None]
    return {**row, **{name: [row[name][i] for i in completions] for name in names}}


def split_by_tokens(groups: Sequence[Mapping[str, Any]], num_parts: int) -> list[list[int]]:
    """Deal whole groups to `num_parts` ranks so that their token counts are near equal (longest first to the
    emptiest).

    Deterministic; every part keeps arrival order. Returns the indices per part; a part may be empty.
    """
    loads = [0] * num_parts
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for i in sorted(range(len(groups)), key=lambda i: (-num_tokens(groups[i]), i)):
        part = min(range(num_parts), key=lambda p: (loads[p], p))
        loads[part] += num_tokens(groups[i])
        parts[part].append(i)
    return [sorted(part) for part in parts]


def micro_batches(
    groups: Sequence[Mapping[str, Any]], max_tokens: int, packed: bool = True
) -> list[list[int]]:
    """Cut groups, in order, into runs of at most `max_tokens` tokens; a larger group is a run of its own.

    packed: a prompt counts once and nothing is padded; else every completion counts with its prompt, as long
    as the run's longest.
    """
    batches: list[list[int]] = []
    count = width = 0
    for i, row in enumerate(groups):
        if packed:
            if batches and count + num_tokens(row) <= max_tokens:
                batches[-1].append(i)
                count += num_tokens(row)
            else:
                batches.append([i])
                count = num_tokens(row)
            continue
        m = len(row["completion_ids"])
        longest = len(row["prompt_ids"]) + max(map(len, row["completion_ids"]))
        if batches and max(width, longest) * (count + m) <= max_tokens:
            batches[-1].append(i)
            count, width = count + m, max(width, longest)
        else:
            batches.append([i])
            count, width = m, longest
    return batches


def split_group(row: Mapping[str, Any], max_tokens: int, packed: bool = True) -> list[dict[str, Any]]:
    """Cut one group into parts of at most `max_tokens` tokens, each with the prompt and some of the
    completions (one at least).
    """
    prompt, lengths = len(row["prompt_ids"]), [len(ids) for ids in row["completion_ids"]]
    parts: list[list[int]] = []
    for i in range(len(lengths)):
        if parts:
            sizes = [lengths[j] for j in (*parts[-1], i)]
            if (prompt + sum(sizes) if packed else (prompt + max(sizes)) * len(sizes)) <= max_tokens:
                parts[-1].append(i)
                continue
        parts.append([i])
    return [only(row, part) for part in parts]

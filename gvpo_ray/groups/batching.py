"""Groups are prepared for training here: dealt to ranks, and cut into forward passes by their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_ray.groups.table import PER_COMPLETION_COLUMNS


def num_tokens(row: Mapping[str, Any]) -> int:
    """Return the tokens that a group costs the learner: its prompt once, and its completions."""
    return len(row["prompt_ids"]) + sum(len(ids) for ids in row["completion_ids"])


def untrained_completions(row: Mapping[str, Any]) -> list[int]:
    """Return the indices of a group's completions that have tokens, of which none is trained."""
    masks = row.get("trained_tokens") or ()
    return [i for i, mask in enumerate(masks) if mask and not any(mask)]


def trainable_completions(row: Mapping[str, Any]) -> list[int]:
    """Return the indices of a group's completions that have a reward and at least one trained token."""
    untrained = untrained_completions(row)
    has_tokens = [i for i, ids in enumerate(row["completion_ids"]) if ids and i not in untrained]
    return [i for i in has_tokens if row["rewards"][i] is not None]


def trainable(row: Mapping[str, Any], least: int = 2) -> dict[str, Any] | None:
    """Return the row without the completions that are not trained on; None if fewer than `least` are left.

    Left out are those that are unverifiable (reward null) and those without a trained token.

    Where completions are compared, a group of one carries no signal: its only weight, R - mean R, is zero.
    """
    keep = trainable_completions(row)
    if len(keep) < least:
        return None
    result = only(row, keep)
    if parts := row.get("reward_parts"):
        result["reward_parts"] = {name: [part[i] for i in keep] for name, part in dict(parts).items()}
    return result


def only(row: Mapping[str, Any], completions: Sequence[int]) -> dict[str, Any]:
    """Return the row with only these of its completions.

    `reward_parts` is left as it is, because forward passes do not read it.
    """
    names = [name for name in PER_COMPLETION_COLUMNS if row.get(name) is not None]
    return {**row, **{name: [row[name][i] for i in completions] for name in names}}


def split_by_tokens(groups: Sequence[Mapping[str, Any]], num_parts: int) -> list[list[int]]:
    """Deal whole groups to `num_parts` ranks with nearly equal token counts; return the indices per rank.

    The longest group goes first, to the rank with the fewest tokens. The result is deterministic and every
    rank keeps arrival order. A rank may get no group.
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
    """Cut groups, in order, into runs of at most `max_tokens` tokens; return the indices per run.

    A group that is larger is a run of its own.

    Args:
        groups: rows of the group table.
        max_tokens: most tokens of a run.
        packed: count a prompt once per group and no padding; otherwise every completion counts with its
            prompt, padded to the longest of the run.
    """
    batches: list[list[int]] = []
    count = width = 0  # of the run so far: its tokens, or its completions and the longest sequence
    for i, row in enumerate(groups):
        own = num_tokens(row) if packed else len(row["completion_ids"])
        longest = 1 if packed else len(row["prompt_ids"]) + max(map(len, row["completion_ids"]))
        if batches and max(width, longest) * (count + own) <= max_tokens:
            batches[-1].append(i)
            count, width = count + own, max(width, longest)
        else:
            batches.append([i])
            count, width = own, longest
    return batches


def split_group(row: Mapping[str, Any], max_tokens: int, packed: bool = True) -> list[dict[str, Any]]:
    """Cut a group into parts of at most `max_tokens` tokens, each with the prompt and some completions.

    A part has at least one completion, even if it is larger. `packed` counts tokens as in micro_batches.
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

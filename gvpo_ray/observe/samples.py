"""A person reads sampled groups before a training: what the model saw, wrote and got for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gvpo_ray.groups import Row
from gvpo_ray.observe.metrics import is_correct
from gvpo_ray.observe.report.conversation import Turn, share_trained, turns_of

HEAD, TAIL = 1500, 500
"""Characters that are shown of the beginning and of the end of a longer text; the answer is at its end."""


def sample_lines(rows: Sequence[Row], decode: Callable[[list[int]], str], max_tokens: int) -> Iterator[str]:
    """Yield the prompts of scored groups as the model sees them, their completions, and a summary.

    What the environment wrote in a completion stands behind a colon, and what the policy wrote behind a bar.

    Args:
        rows: groups with rewards.
        decode: turns token ids into text with special tokens.
        max_tokens: longest completion, in tokens.
    """
    for i, row in enumerate(rows, start=1):
        yield from prompt_lines(f"prompt {i} of {len(rows)}", row, decode)
        for j, tokens in enumerate(row["completion_ids"]):
            parts = {name: values[j] for name, values in (row.get("reward_parts") or {}).items()}
            end = "cut off" if row["finish_reasons"][j] == "length" else "ended"
            said = [f"  completion {j + 1}: reward {_number(row['rewards'][j])}"]
            said += [f"{name} {_number(value)}" for name, value in parts.items()] if len(parts) > 1 else []
            mask = (row.get("trained_tokens") or [None] * (j + 1))[j]
            remarks = [share_trained(mask), row["reward_reasons"][j]]
            said += [f"{end} after {len(tokens)} tokens", *filter(None, remarks)]
            if episodes := row.get("episodes"):
                one = json.loads(episodes[j])
                counts = f"{one['turns']} turns, {one['tool_calls']} tool calls, {one['tool_errors']} failed"
                said.append(f"{counts}, end: {one['end']}")
            yield " · ".join(said)
            for turn in turns_of(tokens, mask, decode) or [Turn("trained", decode(tokens), "")]:
                yield _block(turn.text, "    : " if turn.kind == "read" else "    | ")
    yield summary(rows, max_tokens)


def prompt_lines(name: str, row: Row, decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Yield a prompt as the model sees it, below a line with its name, length and gold answer."""
    ids = row["prompt_ids"]
    yield f"{name}, {len(ids)} tokens, answer {row['answer']!r}:"
    yield _block(decode(ids))


def summary(rows: Sequence[Row], max_tokens: int) -> str:
    """Return one line: mean reward, counts of completions by what became of them, and groups without signal.

    A reward above 0 is the first reward function's, as in `pass@k`; it may be a part of a point.
    A group whose rewards are all equal, or that has fewer than two, trains nothing.
    """
    rewards = [reward for row in rows for reward in row["rewards"]]
    known = [reward for reward in rewards if reward is not None]
    num, num_above = len(rewards), sum(sum(is_correct(row)) for row in rows)
    num_cut = sum(reason == "length" for row in rows for reason in row["finish_reasons"])
    num_equal = sum(len({reward for reward in row["rewards"] if reward is not None}) < 2 for row in rows)
    mean = f"reward {sum(known) / len(known):.3g} on average" if known else "no completion has a reward"
    return (
        f"in all: {len(rows)} prompts, {num} completions · {mean} · {num_above} above 0 · "
        f"{num - len(known)} unverifiable · {num_cut} cut off at sampling.max_tokens ({max_tokens}): "
        f"{num_cut / max(1, num):.0%} · {num_equal} groups with equal rewards, from which nothing is learned"
    )


def _number(value: Any) -> str:
    return "null" if value is None else f"{value:.4g}"


def _block(text: str, margin: str = "  | ") -> str:
    """Set a text apart by a margin at each line, and leave out the middle of a long one."""
    left_out = len(text) - HEAD - TAIL
    if left_out > 0:
        text = f"{text[:HEAD]} … ({left_out:,} characters) … {text[-TAIL:]}"
    return "\n".join(margin + line for line in text.split("\n"))

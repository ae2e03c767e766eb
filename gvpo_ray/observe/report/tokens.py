"""The tokens of a few trained completions are coloured: why did a completion get less likely?

The numbers are those that the learner kept (observe/token_examples.py); the tokenizer turns ids into text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gvpo_ray.observe.report.conversation import Decode, decoder_of
from gvpo_ray.observe.report.figures import shown
from gvpo_ray.observe.report.reading import Run
from gvpo_ray.observe.token_examples import MAX_FIRST, TokenExample, example_files, read_examples

MAX_STEPS = 3
"""Number of steps of a run whose completions are shown."""
MAX_TOKENS = 6144
"""Number of tokens on a page, beyond which a run's older steps are left out."""
MAX_CHARACTERS = 2000
"""Length to which a prompt and an answer are cut."""
LEVELS = (0.05, 0.2, 0.7, 2.0)
"""Log-ratios in nats from which a token has the 1st to the 4th depth of colour; 0.7 is twice as likely."""
PART = "\u25ab"
"""Stands for a token without text of its own: a part of a character, which a later token completes."""


@dataclass(frozen=True)
class Token:
    """A Token is a token of a completion, as the page shows it."""

    text: str
    kind: str
    """CSS classes: s, r and p (log-ratio to the sampler and to the reference, push), each with m (below 0) or
    p (above 0) and its depth from 1 to 4; or "read"."""
    numbers: str
    """What is known of it, in words."""


@dataclass(frozen=True)
class Coloured:
    """A Coloured is one completion with its tokens in colours, and what explains them."""

    title: str
    why: list[str]
    prompt: str
    answer: str
    first: list[Token]
    left_out: int
    """Number of tokens between `first` and `last` that are not shown."""
    last: list[Token]


def coloured_of(run: Run, num_runs: int) -> list[tuple[int, list[Coloured]]]:
    """Return the steps with their completions, the newest first; spread over the run where there are many.

    Args:
        run: one of those of the page.
        num_runs: the number of these, which share the page's tokens.
    """
    files = example_files(run.path)[::-1]
    num = min(MAX_STEPS, len(files))
    picked = [files[i * (len(files) - 1) // max(1, num - 1)] for i in range(num)]
    decode = decoder_of(run) if picked else None
    found: list[tuple[int, list[Coloured]]] = []
    num_tokens = 0
    for step, file in picked:
        examples = read_examples(file) or []
        num_tokens += sum(len(one.ids) for one in examples)
        if found and num_tokens > MAX_TOKENS // num_runs:
            break
        largest = max((abs(push) for one in examples for push in one.push if push), default=0.0)
        if examples:
            found.append((step, [_coloured(one, largest, decode) for one in examples]))
    return found


def _coloured(one: TokenExample, largest_push: float, decode: Decode | None) -> Coloured:
    tokens = [_token(one, i, text, largest_push) for i, text in enumerate(token_texts(one.ids, decode))]
    left_out = one.num_tokens - len(tokens)
    num_first = MAX_FIRST if left_out else len(tokens)
    return Coloured(
        f"{', '.join(one.kinds)}: group {one.group_id}, completion {one.completion + 1}",
        _why(one),
        _cut(one.prompt),
        _cut(one.answer),
        tokens[:num_first],
        left_out,
        tokens[num_first:],
    )


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} … ({len(text):,} characters)"


def _why(one: TokenExample) -> list[str]:
    """Say in a few phrases what the step knew of a completion and does to it."""
    oldest, newest = one.version_min, one.version_max
    if one.sampler_ratio is None:
        since = f"sampled by {one.source}, whose log-probs are not known"
    else:
        by = f"version {oldest}" if oldest == newest else f"versions {oldest} to {newest}"
        importance = math.exp(min(one.sampler_ratio, 700.0))
        since = f"{_nats(one.sampler_ratio)} since {by} sampled it: importance π/μ {shown(importance)}"
    pushes = [push for push in one.push if push is not None]
    push = sum(pushes) / max(1, len(pushes))
    does = "pushes it down" if push < 0 else "pushes it up" if push > 0 else "leaves it where it is"
    mean = _nats(one.group_reference_ratio)
    return [
        since,
        f"log-ratio to the reference {_nats(one.reference_ratio)} (mean of its group {mean})",
        f"reward {shown(one.reward)} (mean of its group {shown(one.group_reward)})",
        f"the update {does}: {_signed(push)} per token",
    ]


def _token(one: TokenExample, i: int, text: str, largest_push: float) -> Token:
    text = text.replace("\n", "↵\n")
    policy, push = one.policy[i], one.push[i]
    if policy is None or push is None:
        return Token(text, "read", "the environment wrote it: read, not trained")
    kinds, numbers = [], [f"π {_probability(policy)}"]
    for sign, name, values in (("s", "μ", one.sampler), ("r", "ref", one.reference)):
        other = None if values is None else values[i]
        if other is not None:
            numbers.append(f"{name} {_probability(other)}: {_signed(policy - other)}")
            depth = sum(abs(policy - other) >= level for level in LEVELS)
            kinds += [f"{sign}{'m' if policy < other else 'p'}{depth}"] if depth else []
    if push:
        kinds.append(f"p{'m' if push < 0 else 'p'}{max(1, math.ceil(4 * abs(push) / largest_push))}")
    numbers.append(f"push {_signed(push)}")
    return Token(text, " ".join(kinds), " · ".join(numbers))


def _probability(logprob: float) -> str:
    return f"{math.exp(min(0.0, logprob)):.3g}"


def _nats(value: float | None) -> str:
    return "not finite" if value is None else f"{value:+.3g} nats".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def token_texts(ids: Sequence[int], decode: Decode | None) -> Iterator[str]:
    """Yield the text of each token such that together they are the text of all.

    A token may be a part of a character, and its text may depend on the tokens before it: so it is what the
    text grows by.

    Args:
        ids: the tokens.
        decode: the run's tokenizer; None: there is none, and the ids are shown.
    """
    if decode is None:
        yield from (f"[{token}]" for token in ids)
        return
    start = read = 0
    for end in range(1, len(ids) + 1):
        before, now = decode(list(ids[start:read])), decode(list(ids[start:end]))
        if end < len(ids) and now.endswith("\ufffd"):
            yield PART
        else:
            yield now[len(before) :] or PART
            start, read = read, end

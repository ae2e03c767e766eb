"""Reward functions: the built-in ones, and how any of them is named to the process that loads it.

    def reward(prompts, completions, **columns) -> list[float | None]

One number per completion, None where it cannot tell. Built in: math, exact_match, numeric, format, length. In
the child that runs them (sandbox/process.py) a function sees lists of one; a trusted one (in the verifier
itself, as HTTP calls are) whole groups.
"""

from __future__ import annotations

import base64
import itertools
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from gvpo_ray.config.verifiers import RewardConfig
from gvpo_ray.groups import NO_ANSWER
from gvpo_ray.sandbox.functions import RewardFunction, Score
from gvpo_ray.verifiers.math.extract import extract
from gvpo_ray.verifiers.math.numbers import quantity
from gvpo_ray.verifiers.math.reward import math_reward

Rewards = Mapping[str, RewardFunction]
"""Reward functions passed as callables, by the name they have in verifiers.rewards."""


def exact_match(
    prompts: list[str], completions: list[str], *, answer: list[str], ignore_case: bool = True, **_: Any
) -> list[Score]:
    """1 if the completion's answer (or, where it marks none, all of it) is the gold answer letter by letter,
    else 0.

    Spaces around and between words, compatibility forms (full-width digits) and a final full stop do not
    count.
    """

    def plain(text: str) -> str:
        text = " ".join(unicodedata.normalize("NFKC", text).split()).rstrip(".")
        return text.casefold() if ignore_case else text

    return [
        float(plain(gold) in (plain(extract(completion).text or ""), plain(completion)))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def numeric(
    prompts: list[str],
    completions: list[str],
    *,
    answer: list[str],
    relative_tolerance: float = 1e-4,
    absolute_tolerance: float = 1e-9,
    require_unit: bool = False,
    **_: Any,
) -> list[Score]:
    """1 if the number in the completion's answer is within a tolerance of the gold number, and their units
    agree, else 0.

    |x - gold| <= max(relative_tolerance |gold|, absolute_tolerance). Units (what follows the number) are
    compared as text, and only where both have one; `require_unit` refuses an answer without the gold's unit.
    Nothing is converted.
    """
    return [
        _numeric_score(
            extract(completion).text or "", gold, relative_tolerance, absolute_tolerance, require_unit
        )
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _numeric_score(
    text: str, gold: str, relative_tolerance: float, absolute_tolerance: float, require_unit: bool
) -> Score:
    wanted, found = quantity(gold), quantity(text)
    if wanted is None or not math.isfinite(wanted[0]):
        return None, f"numeric: the gold answer {gold[:100]!r} has no number"
    if found is None:
        return 0.0, f"numeric: {NO_ANSWER}"
    if wanted[1] != found[1] and wanted[1] and (found[1] or require_unit):
        return 0.0
    return float(abs(found[0] - wanted[0]) <= max(relative_tolerance * abs(wanted[0]), absolute_tolerance))


def format_reward(
    prompts: list[str], completions: list[str], *, boxed: bool = True, think: bool = False, **_: Any
) -> list[Score]:
    """1 if the completion has the form that is asked for, else 0.

    Args:
        boxed: exactly one \\boxed{...}, closed and not empty, outside of the thoughts.
        think: begins with one <think>...</think>, with something in it and after it.
    """

    def good(text: str) -> bool:
        thoughts, closing, rest = text.rpartition("</think>")
        if think and not (
            closing
            and text.count("<think>") == text.count("</think>") == 1
            and thoughts.lstrip().startswith("<think>")
            and thoughts.partition("<think>")[2].strip()
            and rest.strip()
        ):
            return False
        final = rest if closing else text
        return not boxed or (
            final.count("\\boxed") == 1 and _closed_box(final[final.index("\\boxed") + len("\\boxed") :])
        )

    return [float(good(completion)) for completion in completions]


def _closed_box(text: str) -> bool:
    """Whether a text starts with {...}, its braces balanced and something in them."""
    if not text.startswith("{"):
        return False
    depths = itertools.accumulate({"{": 1, "}": -1}.get(letter, 0) for letter in text)
    end = next((i for i, depth in enumerate(depths) if depth == 0), -1)
    return end > 0 and bool(text[1:end].strip())


def length_reward(
    prompts: list[str],
    completions: list[str],
    *,
    completion_ids: Sequence[Sequence[int]] | None = None,
    free: int = 0,
    limit: int = 1024,
    **_: Any,
) -> list[Score]:
    """0 up to `free` tokens, then falling in a line to -1 at `limit` tokens and beyond (DAPO, arXiv
    2503.14476, equation 13).

    Words are counted where the token ids are not known (`gvpo-ray verify`).
    """
    if not 0 <= free < limit:
        raise ValueError(f"length: free ({free}) must be at least 0 and below limit ({limit})")
    sizes = (
        [len(ids) for ids in completion_ids]
        if completion_ids is not None
        else [len(text.split()) for text in completions]
    )
    return [-min(1.0, max(0.0, (size - free) / (limit - free))) for size in sizes]


def in_place(prompts: list[str], completions: list[str], *, answer: list[str], **_: Any) -> list[float]:
    """Reward of `sort`: the share of the characters that are in their place, of those of the longer of both
    texts.
    """
    found = [extract(completion).text or "" for completion in completions]
    return [
        sum(x == y for x, y in zip(text, gold, strict=False)) / max(len(text), len(gold))
        for text, gold in zip(found, answer, strict=True)
    ]


BUILT_IN: dict[str, RewardFunction] = {
    "math": math_reward,
    "exact_match": exact_match,
    "numeric": numeric,
    "format": format_reward,
    "length": length_reward,
}


def source_of(name: str, config: RewardConfig, function: RewardFunction | None) -> dict[str, Any]:
    """A reward function as JSON, for the process that loads it: by its place, or a callable by its pickle."""
    if function is not None:
        where = {"pickle": base64.b64encode(cloudpickle.dumps(function)).decode()}
    else:
        function = BUILT_IN.get(config.function or name)
        where = {
            "place": f"{function.__module__}:{function.__name__}"
            if function is not None
            else config.function or name
        }
    # Our own take any column (**_), so that a misspelt argument would be one; users' may mean it.
    return {**where, "arguments": config.arguments, "is_strict": function in BUILT_IN.values()}

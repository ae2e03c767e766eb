"""The built-in reward functions are listed here, and the description from which a process loads any one.

    def reward(prompts, completions, **columns) -> list[float | None]

A reward function returns one number per completion, or None for a completion that it cannot verify. Built in
are math, exact_match, numeric, format and length, and code (code.py). In the sandbox (sandbox/process.py) a
function is called with one completion at a time; a trusted function, which runs in the verifier's own
process, with a group's.
"""

from __future__ import annotations

import base64
import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from gvpo_ray.config.verifiers import RewardConfig
from gvpo_ray.groups import NO_ANSWER
from gvpo_ray.sandbox.functions import RewardFunction, Score
from gvpo_ray.verifiers.math.compare import quantity
from gvpo_ray.verifiers.math.evaluated import is_copied
from gvpo_ray.verifiers.math.extract import extract
from gvpo_ray.verifiers.math.numbers import unit_words
from gvpo_ray.verifiers.math.reward import math_reward

Rewards = Mapping[str, RewardFunction]
"""Name in verifiers.rewards -> reward function, for functions that are passed as callables."""


def exact_match(
    prompts: list[str], completions: list[str], *, answer: list[str], ignore_case: bool = True, **_: Any
) -> list[Score]:
    """Score 1 if the completion's answer, or the whole completion, is the gold answer letter by letter.

    The score is 0 otherwise. The number of spaces, Unicode compatibility forms (full-width digits) and a
    final full stop make no difference, nor does case with `ignore_case`. An empty gold answer gives None.
    """

    def plain(text: str) -> str:
        text = " ".join(unicodedata.normalize("NFKC", text).split()).rstrip(".")
        return text.casefold() if ignore_case else text

    return [
        float(plain(gold) in (plain(extract(completion).text or ""), plain(completion)))
        if plain(gold)
        else (None, "exact_match: there is no gold answer")
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
    """Score 1 if the answer's number is within a tolerance of the gold number and their units agree, else 0.

    The tolerance is |x - gold| <= max(relative_tolerance |gold|, absolute_tolerance). The answer must be the
    number: an expression, several numbers or "5 or more" score 0. Units, the words behind the number, are
    compared as text and never converted. An answer without a unit agrees with any unit, unless `require_unit`
    is set. A percent sign may be left out, or be meant as a hundredth. A gold answer without a number gives
    None.
    """
    return [
        _numeric_score(
            prompt, extract(completion).text or "", gold, relative_tolerance, absolute_tolerance, require_unit
        )
        for prompt, completion, gold in zip(prompts, completions, answer, strict=True)
    ]


def _numeric_score(
    prompt: str,
    text: str,
    gold: str,
    relative_tolerance: float,
    absolute_tolerance: float,
    require_unit: bool,
) -> Score:
    wanted, found = quantity(gold), quantity(text)
    if wanted is None:
        return None, f"numeric: the gold answer {gold[:100]!r} has no number"
    if found is None:
        return 0.0, f"numeric: {NO_ANSWER}"
    (gold_value, number), (value, other) = wanted, found
    units, others = unit_words(gold_value.unit), unit_words(value.unit)
    if units != others and units and (others or require_unit):
        return 0.0
    if is_copied(gold_value.text, value.text.lstrip("+ "), prompt):
        return 0.0  # 48/2 is no answer to "48 divided by 2"
    tolerance = max(Fraction(relative_tolerance) * abs(number), Fraction(absolute_tolerance))
    if abs(other - number) <= tolerance:
        return 1.0
    if gold_value.is_percent == value.is_percent:
        return 0.0
    other = 100 * other if gold_value.is_percent else other / 100  # 0.5 is 50 %
    return float(abs(other - number) <= tolerance)


def format_reward(
    prompts: list[str], completions: list[str], *, boxed: bool = True, think: bool = False, **_: Any
) -> list[Score]:
    r"""Score 1 if the completion has the required form, else 0.

    With `boxed` the completion must have exactly one \boxed{...} outside of the thoughts, closed and not
    empty. With `think` it must begin with its only <think>...</think>, with text inside and behind it; the
    opening tag may be missing, because many chat templates end with it.
    """

    def good(text: str) -> bool:
        thoughts, closing, rest = text.rpartition("</think>")
        inside = thoughts.lstrip().removeprefix("<think>")
        if think and not (
            closing and inside.strip() and rest.strip() and not re.search("</?think>", inside + rest)
        ):
            return False
        final = rest if closing else text
        return not boxed or (
            final.count("\\boxed") == 1 and _closed_box(final[final.index("\\boxed") + len("\\boxed") :])
        )

    return [float(good(completion)) for completion in completions]


def _closed_box(text: str) -> bool:
    """Return whether a text starts with {...}, with balanced braces and some text inside."""
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
    """Score 0 up to `free` tokens, falling linearly to -1 at `limit` tokens, and -1 beyond.

    This is the length penalty of DAPO (arXiv 2503.14476, equation 13). If the token ids are not known, as in
    `gvpo-ray verify`, words are counted instead.

    Raises:
        ValueError: `free` is negative, or not below `limit`.
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
    """Score the share of characters that are in their place: the reward of the task `sort`.

    The share is of the length of the longer text, the answer or the gold answer.
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

CODE = "code"
"""Name of the built-in reward that runs programs, code.CodeReward; it has a sandbox of its own."""


def source_of(name: str, config: RewardConfig, function: RewardFunction | None) -> dict[str, Any]:
    """Describe a reward function as JSON, for sandbox.functions.load in the process that runs it.

    Args:
        name: its name in verifiers.rewards.
        config: its section.
        function: the callable itself, which travels as a pickle; None: config.function or a built-in function
            named `name`, which travels as `module:function`.
    """
    if function is not None:
        where = {"pickle": base64.b64encode(cloudpickle.dumps(function)).decode()}
    else:
        function = BUILT_IN.get(config.function or name)
        where = {
            "place": f"{function.__module__}:{function.__name__}"
            if function is not None
            else config.function or name
        }
    # Built-in functions take any column (**_) and would take a misspelt argument for one, so they are
    # strict. A user's function may take **arguments on purpose.
    return {**where, "arguments": config.arguments, "is_strict": function in BUILT_IN.values()}

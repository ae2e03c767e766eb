"""The built-in reward `math` is 1 for an answer that equals the gold answer mathematically."""

from __future__ import annotations

import functools
import logging
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gvpo_ray.sandbox.functions import Score
from gvpo_ray.verifiers.math.grade import grade

_STATUS = Path("/proc/self/status")

_peak_seen = 0
"""Peak address space after the last check, in bytes; what a check adds to it is the check's own."""

WARM_UP = [
    ("The answer is $\\frac{1}{2}$.", "0.5"),
    ("I do not know.", "Monday"),
    ("\\boxed{(x + 1)^2}", "x^2 + 2x + 1"),
    ("\\boxed{\\sqrt{8} + \\sqrt[3]{2}}", "3\\pi"),
    ("\\boxed{[0, 1) \\cup (2, \\infty)}", "(-\\infty, -1]"),
    (
        "\\boxed{\\begin{pmatrix} 1 & a \\\\ 0 & -1 \\end{pmatrix}}",
        "\\begin{pmatrix} 1 & b \\\\ 0 & -1 \\end{pmatrix}",
    ),
    ("\\boxed{\\sin 2x + \\log_2 x}", "2\\sin x \\cos x + e^{-x}"),
    ("\\boxed{\\{1, 2\\}}", "x \\geq \\frac{a}{b}"),
    ("\\boxed{\\binom{n}{2} + 2!}", "\\frac{n(n - 1)}{2} + |x|"),
]
"""Pairs of completion and gold answer that are graded before the first check. They fill the parser's tables
and sympy's caches, which takes a second, once for all children."""


def math_reward(
    prompts: list[str],
    completions: list[str],
    *,
    answer: list[str],
    finish_reasons: Sequence[str | None] | None = None,
    **_: Any,
) -> list[Score]:
    """Score 1 for an answer that equals the gold answer mathematically (math/grade.py), else 0.

    A completion without an answer scores 0, and so does one whose answer is still to be evaluated, such as
    an expression of the prompt whose value is the gold answer. A gold answer that cannot be understood gives
    None, unless the completion's answer is the same text.

    Raises:
        MemoryError: a check came near the process's memory limit, so its verdict cannot be trusted.
    """
    reasons = finish_reasons or [None] * len(completions)
    return [_score(*row) for row in zip(prompts, completions, answer, reasons, strict=True)]


def _warm_up() -> None:
    """Grade WARM_UP, and note the peak memory so far, above which a check's own memory counts."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
    for completion, gold in WARM_UP:
        grade(completion, gold)
    _memory_when_loaded()


math_reward.warm_up = _warm_up  # type: ignore[attr-defined]


def _score(prompt: str, completion: str, gold: str, finish_reason: str | None) -> Score:
    """Score one completion; raise MemoryError if a negative verdict may come from a lack of memory."""
    global _peak_seen
    limit, loaded = resource.getrlimit(resource.RLIMIT_AS)[0], _memory_when_loaded()
    result = grade(completion, gold, truncated=finish_reason == "length", prompt=prompt)
    if result.needed_no_parser:
        return float(bool(result.correct))
    peak_before, peak = _peak_seen, 0 if limit == resource.RLIM_INFINITY else _peak_memory()
    _peak_seen = max(peak_before, peak)
    if result.correct:
        return 1.0
    # sympy and math-verify swallow MemoryError and say "not equal": a check that came near the limit has no
    # verdict. Three quarters, because one large request fails long before the last page is used.
    if peak > peak_before and peak > loaded + 0.75 * (limit - loaded):
        raise MemoryError
    score = None if result.correct is None else 0.0
    return score if result.reason is None else (score, f"math: {result.reason}")


@functools.cache
def _memory_when_loaded() -> int:
    """Return the peak address space before the first check, in bytes; forked children inherit the value."""
    return _peak_memory()


def _peak_memory() -> int:
    """Return this process's peak address space, in bytes; 0 if the system does not say."""
    if not _STATUS.exists():
        return 0
    return int(_STATUS.read_text(encoding="utf-8").partition("VmPeak:")[2].split()[0]) * 1024

"""Mathematical answers are graded in three steps: extraction -> normalisation -> comparison.

`grade` finds the answer in a completion, and brings it and the gold answer into one spelling. It takes both
apart as far as their text shows structure (lists, tuples, sets, intervals, matrices, equations, units). The
leaves are compared as text and by plain arithmetic, and only then by math-verify's parser and sympy. The
parser is a LaTeX grammar; neither it nor this package evaluates Python.

Completions are untrusted. Work on text is linear in the completion's length. Texts that no answer looks like
(too long, too deep, towers of exponents) are refused before sympy sees them. The caller has to limit time and
memory: nothing here sets a signal, and MemoryError comes through.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass

from gvpo_ray.groups import NO_ANSWER
from gvpo_ray.verifiers.math.compare import Kind, equal_answers, is_copied_answer, kind_of, num_elements
from gvpo_ray.verifiers.math.extract import CODE, MAX_CHARS, extract
from gvpo_ray.verifiers.math.normalise import normalise
from gvpo_ray.verifiers.math.numbers import as_amounts, as_number, read_value
from gvpo_ray.verifiers.math.structure import right_side
from gvpo_ray.verifiers.math.symbolic import parse
from gvpo_ray.verifiers.math.words import is_words

_INTEGER = re.compile(r"-?[0-9]{1,300}")


@dataclass(frozen=True)
class Grade:
    """A Grade is the grader's result for one completion."""

    correct: bool | None
    """None: there is no gold answer, or it cannot be understood and the texts differ."""
    reason: str | None
    """Why `correct` is None, or NO_ANSWER; None otherwise."""
    answer: str | None
    """The text that was taken for the completion's answer; None if there is none."""
    needed_no_parser: bool = False
    """Whether both answers are integers, so that neither the parser nor sympy has been asked."""


def grade(completion: str, gold: str, *, truncated: bool = False, prompt: str = "") -> Grade:
    r"""Grade a completion: does its answer equal the gold answer?

    Args:
        completion: a response, or a bare answer.
        gold: the right answer, bare or marked in a solution.
        truncated: whether the completion was cut at the token limit, so that only a complete \boxed{...} is
            an answer.
        prompt: the question; an expression copied from it is no answer where gold is its value.

    Raises:
        MemoryError: sympy ran out of memory. Its other errors mean "not equal".
    """
    wanted = _gold_text(gold)
    if not wanted:
        return Grade(None, "there is no gold answer", None)
    found = extract(completion, truncated=truncated)
    text = (found.text or "").strip()
    if not text:
        return Grade(False, NO_ANSWER, None)
    if _INTEGER.fullmatch(text) and _INTEGER.fullmatch(
        wanted
    ):  # most checks; the rest takes 20 times as long
        return Grade(int(text) == int(wanted), None, text, needed_no_parser=True)
    if len(text) > MAX_CHARS or any(
        unicodedata.category(sign)[0] == "C" and not sign.isspace() for sign in text
    ):
        # control characters, surrogates, marks of the writing direction
        return Grade(False, None, text[:MAX_CHARS])
    if CODE.search(text):
        return Grade(normalise(text) == wanted, None, text)
    answers = [text]
    if found.sentence and is_words(wanted):
        answers.append(found.sentence[:MAX_CHARS])
    if (num := num_elements(wanted)) > 1:  # each may have a box of its own
        answers.append((extract(completion, truncated=truncated, num_boxes=num).text or "")[:MAX_CHARS])
    if any(equal_answers(wanted, normalise(answer)) for answer in dict.fromkeys(answers)):
        is_copy = prompt and is_copied_answer(wanted, normalise(text), prompt)
        return Grade(not is_copy, None, text)
    if not _understood(wanted):
        return Grade(None, f"the gold answer {gold[:100]!r} cannot be understood", text)
    return Grade(False, None, text)


@functools.lru_cache(maxsize=256)
def _gold_text(gold: str) -> str:
    """Return the normalised gold answer; of a solution, the part that is marked as its answer."""
    text = extract(gold).text or gold
    return normalise(text) if len(text) <= MAX_CHARS else ""


def _understood(gold: str) -> bool:
    """Return whether a normalised gold answer is understood well enough to call other answers wrong."""
    if kind_of(gold) not in (Kind.EQUATION, Kind.VALUE, Kind.INEQUALITY):
        return True
    value = right_side(gold)
    text = read_value(value).text
    is_read = as_number(text) is not None or as_amounts(value) is not None
    return is_read or is_words(value) or parse(text) is not None

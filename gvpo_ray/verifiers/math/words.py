"""Comparison of answers in words: numerals, letters of options, names and statements."""

from __future__ import annotations

import re

from gvpo_ray.verifiers.math.extract import FUNCTIONS
from gvpo_ray.verifiers.math.numbers import value_and_unit

NUMERALS = {
    word: str(i)
    for i, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
_STOP_WORDS = frozenset(
    [
        "the",
        "a",
        "an",
        "is",
        "are",
        "it",
        "be",
        "will",
        "of",
        "that",
        "this",
        "so",
        "answer",
        "therefore",
        "thus",
    ]
)
_OPTION = re.compile(
    r"(?:(?i:option|choice)\s+)?(?:\\text\{)?\s*\(?\s*([A-Ja-j])\s*(?:\)\s*\}?(?:\s.*)?|\}?|\}?\s*[.:)]\s+\S.*)",
    re.DOTALL,
)


def as_option(text: str) -> str | None:
    r"""Return the letter of a multiple-choice answer (B, (B), \text{B}, "B. blue", "option B"), or None."""
    match = _OPTION.fullmatch(text)
    if match is None or (match[1].islower() and "(" not in text and len(text) > 1):
        return None
    if len(text) > 1 and re.match(r"\(?\s*[A-J]\s*\)?\s*[-+*/^=,(]", text):
        return None  # a product, a tuple
    return match[1].upper()


def _plain_words(text: str) -> str:
    r"""Return a text without LaTeX commands, but with the content of \text{}."""
    return re.sub(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", " ", re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text))


def is_words(text: str) -> bool:
    """Return whether an answer is language, without a number or formula."""
    value = value_and_unit(text)[0]
    plain = _plain_words(value)
    words = [word.lower() for word in re.findall(r"[^\W\d_]{2,}", plain)]
    language = any(
        (len(word) >= 4 and word not in FUNCTIONS) or word in ("yes", "no", "odd", "all", "red")
        for word in words
    )
    return language and not re.search(r"[=<>^|]|\d|\\(?:frac|sqrt|pi|leq|geq|in)(?![a-z])", plain + value)


def same_words(gold: str, pred: str) -> bool:
    """Return whether two answers in words mean the same.

    They do if they have the same words (in a list in any order), if the answer begins with a gold yes, no,
    true or false, or if it is the beginning, at most a third, of a gold sentence.
    """
    wanted, found = (
        [word for word in words if word not in _STOP_WORDS] or words
        for words in (
            re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*|\d+", _plain_words(text).casefold())
            for text in (gold, pred)
        )
    )
    if not found or wanted == found:
        return bool(found)
    several = re.search(r",|\b(?:and|or)\b", gold)
    if several and sorted(set(wanted) - {"and"}) == sorted(set(found) - {"and"}):
        return True
    if len(wanted) == 1 and wanted[0] in ("yes", "no", "true", "false"):
        return bool(found[0] == wanted[0])
    return not several and len(wanted) >= 3 * len(found) and wanted[: len(found)] == found

"""Answers in words are compared here: letters of options, truth, names and statements."""

from __future__ import annotations

import re

from gvpo_ray.verifiers.math.extract import FUNCTIONS
from gvpo_ray.verifiers.math.numbers import read_value

_STOP_WORDS = frozenset(
    "the a an is are it be will of that this so answer therefore thus".split()  # noqa: SIM905
)
_OPTION = re.compile(
    r"(?:(?i:option|choice)\s+)?(?:\\text\{)?\s*\(?\s*([A-Ja-j])\s*"
    r"(?:\)\s*\}?(?:\s.*)?|\}?|\}?\s*[.:)]\s+\S.*)",
    re.DOTALL,
)
_OPTION_LABEL = re.compile(r"\(\s*([A-Ja-j])\s*\)|(?<![\w\\(])([A-J])(?=\s*\}?[).:])")
_HEDGE = re.compile(
    r"^\W*(?:or|and|/|&)(?![a-z])|(?:\b(?:or|and|maybe|perhaps|possibly)\b|[/&,])[^.]*?(?<![\w\\])[A-J](?!\w)"
)
"""What behind the letter of an option names another one, or leaves it open."""
_CONDITION = re.compile(
    r"\b(?:but|unless|when|only|except|sometimes|maybe|perhaps|possibly|depends|depending)\b"
    r"|^\W*(?:yes|no|true|false)\W+(?:if|for|in)\b"
)
"""What makes a verdict hold in part only."""
_REASON = re.compile(r"[,;.]?\s+(?:because|since|as|due to)\b.*", re.DOTALL)
_TRUTH = {"yes": True, "no": False, "true": True, "false": False, "t": True, "f": False}


def as_option(text: str) -> tuple[str, str] | None:
    r"""Read a multiple-choice answer (B, (B), \text{B}, "B. blue", "option B"): its letter and its content.

    Return None for other texts, and for one that names several options.
    """
    text = _REASON.sub("", text)
    match = _OPTION.fullmatch(text)
    if match is None or (match[1].islower() and "(" not in text and len(text) > 1):
        return None
    if len(text) > 1 and re.match(r"\(?\s*[A-J]\s*\)?\s*[-+*/^=,(]", text):
        return None  # a product, a tuple
    labels = {(a or b).upper() for a, b in _OPTION_LABEL.findall(text)}
    content = re.sub(r"^\s*\}?[).:\s]*\}?", "", text[match.end(1) :])
    is_open = labels - {match[1].upper()} or _HEDGE.search(text[match.end(1) :].lstrip(")} "))
    return None if is_open else (match[1].upper(), content)


def _plain_words(text: str) -> str:
    r"""Return a text without LaTeX commands, but with the content of \text{}."""
    return re.sub(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", " ", re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text))


def is_words(text: str) -> bool:
    """Return whether an answer is language, without a number or formula."""
    value = read_value(text).text
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
    true or false and says neither its contrary nor a condition, or if it is the beginning of a gold sentence,
    at most a third of it.
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
    if len(wanted) == 1 and wanted[0] in _TRUTH:
        verdict = _REASON.sub("", _plain_words(pred).casefold())
        contrary = "|".join(
            word for word in _TRUTH if len(word) > 1 and _TRUTH[word] is not _TRUTH[wanted[0]]
        )
        is_hedge = _CONDITION.search(verdict) or re.search(
            rf"(?:\b(?:or|and)\b|[/,;.])\s*(?:{contrary})\b|\b(?:{contrary})\W*$", verdict
        )
        return found[0] in (wanted[0], wanted[0][0]) and not is_hedge
    return not several and len(wanted) >= 3 * len(found) and wanted[: len(found)] == found

"""Comparison of answers in words: letters of options, truth, names and statements."""

from __future__ import annotations

import re

from gvpo_ray.verifiers.math.extract import FUNCTIONS
from gvpo_ray.verifiers.math.numbers import read_value

_STOP_WORDS = frozenset(
    "the a an is are it be will of that this so answer therefore thus".split()  # noqa: SIM905
)
_OPTION = re.compile(
    r"(?:(?i:option|choice)\s+)?(?:\\text\{)?\s*\(?\s*([A-Ja-j])\s*(?:\)\s*\}?(?:\s.*)?|\}?|\}?\s*[.:)]\s+\S.*)",
    re.DOTALL,
)
_OPTION_LABEL = re.compile(r"\(\s*([A-Ja-j])\s*\)|(?<![\w\\(])([A-J])(?=\s*\}?[).:])")
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
    return None if labels - {match[1].upper()} else (match[1].upper(), content)


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
    true or false and does not go on with its contrary, or if it is the beginning, at most a third, of a gold
    sentence.
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
        verdict, rest = found[0], [word for word in found[1:3] if word not in ("or", "and")]
        is_contrary = bool(rest) and _TRUTH.get(rest[0]) is (not _TRUTH[wanted[0]])
        return verdict in (wanted[0], wanted[0][0]) and not is_contrary
    return not several and len(wanted) >= 3 * len(found) and wanted[: len(found)] == found

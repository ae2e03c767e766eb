"""Whether an answer is evaluated: a value, not the expression that the question asks to evaluate.

An expression that the prompt contains has the right value without any work. So where the gold answer is a
value, an answer may have no more left to compute than the gold answer has.
"""

from __future__ import annotations

import re

_FRACTION = re.compile(r"\\frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}")
_PLAIN_FRACTION = re.compile(r"\d[\d.]*\s*/\s*\d[\d.]*")
_NUMERAL = r"\{?\s*\d[\d.]*\s*\}?"
_NOTATION = re.compile(
    rf"-?\s*(?:\(?\s*-?\d[\d.]*\s*/\s*\d[\d.]*\s*\)?|\\sqrt\s*(?:\[\s*\d\s*\])?\s*{_NUMERAL}|{_NUMERAL}\s*\^\s*{_NUMERAL})"
)
"""One fraction, root or power of numerals, which is a way to write a number."""
_COMMAND = re.compile(r"\\([a-zA-Z]+)|!|\\?\||(?<![a-zA-Z\\])(gcd|lcm|mod|max|min|exp)(?![a-zA-Z])")
_HARMLESS = frozenset(
    "frac sqrt cdot times pi left right text circ infty div pm mp phi theta alpha beta gamma lambda omega "  # noqa: SIM905
    "mu sigma".split()
)
_FAMILIES = {
    name: family
    for family, names in {
        "trigonometry": "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh",
        "logarithm": "log ln lg exp",
        "rounding": "lfloor rfloor lceil rceil",
        "count": "binom dbinom tbinom choose",
    }.items()
    for name in names.split()
}
_DERIVATIVE = re.compile(r"\\frac\s*\{\s*(?:d|\\partial)\s*\}\s*\{\s*(?:d|\\partial)\s*[a-z]\s*\}")
_BIG = frozenset(["int", "iint", "oint", "sum", "prod", "lim", "derivative"])
"""Operators that an answer has only where the gold answer has them, even if it holds names."""
_SUM = re.compile(r"(?<=[\w)}\]!])\s*(?:[+-]|\\pm(?![a-z]))")
_PRODUCT = re.compile(r"\d\s*\}?\s*(?:\\cdot|\\times|\*|/)\s*\{?\s*\d|\)\s*\(|\d\s*\(\s*-?\d|\)\s*\d")


def is_notation(text: str) -> bool:
    """Return whether a text is one fraction, root or power of numerals."""
    return _NOTATION.fullmatch(_FRACTION.sub(r"\1/\2", text)) is not None


def functions_in(text: str) -> set[str]:
    """Return the families of functions and operators that a text has, beside roots, fractions and powers."""
    names = {match[1] or match[2] or match[0].strip("\\") for match in _COMMAND.finditer(text)}
    names |= {"derivative"} if _DERIVATIVE.search(text) else set()
    return {_FAMILIES.get(name, name) for name in names} - _HARMLESS


def operations_in(text: str) -> int:
    """Count the operations of a value, without its factors and fractions: sums, roots, powers, products."""
    text = _PLAIN_FRACTION.sub("1", _FRACTION.sub("1", text.replace(r"^\circ", "")))
    num_functions = sum(1 for match in _COMMAND.finditer(text) if (match[1] or "function") not in _HARMLESS)
    return (
        len(_SUM.findall(text))
        + text.count(r"\sqrt")
        + text.count("^")
        + len(_PRODUCT.findall(text))
        + num_functions
    )


def is_exact_form(text: str) -> bool:
    r"""Return whether a text is a sum of roots and multiples of \pi in which nothing is left to compute."""
    plain = _PLAIN_FRACTION.sub("1", _FRACTION.sub("1", text))
    return not functions_in(text) and "^" not in plain and not _PRODUCT.search(plain)


def has_more_operators(gold: str, pred: str) -> bool:
    """Return whether an answer has operators such as an integral that the gold answer lacks."""
    return bool((functions_in(pred) - functions_in(gold)) & _BIG)


def has_more_to_compute(gold: str, expanded: str, pred: str) -> bool:
    """Return whether an answer has more left to compute than the gold answer, a value.

    Args:
        gold: LaTeX of the gold answer.
        expanded: LaTeX of the gold answer, multiplied out.
        pred: LaTeX of the answer.
    """
    return bool(functions_in(pred) - functions_in(gold)) or operations_in(pred) > max(
        operations_in(gold), operations_in(expanded)
    )


def is_copied(gold: str, pred: str, prompt: str) -> bool:
    """Return whether an answer that equals the gold answer by value only is taken over from the prompt.

    It is if the prompt contains it and it is not written with the gold answer's numerals, as 0.4 or 84/210
    for 2/5. One fraction, root or power whose operands the prompt gives is also no answer for an integer.
    Integers are answers wherever they stand. All texts are normalised.
    """
    numerals, wanted = (sorted(re.findall(r"\d+(?:\.\d+)?|\.\d+", text)) for text in (pred, gold))
    if numerals == wanted or re.fullmatch(r"-?\d+", pred):
        return False
    if is_notation(pred) and "." not in gold and not re.search(r"[/^]|\\(?:frac|sqrt)", gold):
        given = set(re.findall(r"\d+(?:\.\d+)?", prompt))
        return set(numerals) <= given
    plain, place = (
        re.sub(r"[{}*]|\\(?:cdot|times)|(?<!\w)\s+|\s+(?!\w)", "", _FRACTION.sub(r"\1/\2", text))
        for text in (pred, prompt)
    )
    before = r"(?<![\w.])" if re.match(r"[\w.]", plain) else ""
    after = r"(?!\w|\.\d)" if re.search(r"\w$", plain) else ""
    return re.search(before + re.escape(plain) + after, place) is not None

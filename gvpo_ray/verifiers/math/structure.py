"""An answer has a structure: tokens, brackets, lists, intervals, relations and signs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from gvpo_ray.verifiers.math.extract import MAX_CHARS
from gvpo_ray.verifiers.math.normalise import trim

MAX_DEPTH = 40
"""Depth of brackets above which a text is not parsed, because the LaTeX parser recurses."""


_TOKEN = re.compile(
    r"\\[{}]|\\(?:begin|end)\{\w+\*?\}|\\[a-zA-Z]+|\\.|(?:and|or)(?![a-z])|[A-Za-z]+|.", re.DOTALL
)
_OPENING = frozenset(["(", "[", "{", r"\{", r"\langle", r"\lceil", r"\lfloor"])
_CLOSING = frozenset([")", "]", "}", r"\}", r"\rangle", r"\rceil", r"\rfloor"])
RELATION = re.compile(r"(<|>|\\leq(?![a-z])|\\geq(?![a-z]))")
_FLIP = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}
_NAME = r"(?:[A-Za-z]|\\[a-z]+(?![a-z]))(?:_\{?[\w+-]{1,6}\}?)?'*"
_PLUS_MINUS = re.compile(r"\\pm(?![a-z])")
_LABEL = re.compile(r"^(?:\\text\{)?\s*[A-Za-z]{3,}[A-Za-z ]*\d*\s*\}?\s*:\s*(?=\S)")
_DOMAIN = r"(?:\\text\{\s*)?[a-z]\s*\}?\s*\\in\s*\\mathbb\s*\{?[ZNQR]\}?"
QUALIFIER = re.compile(
    rf",?\s*(?:\\text\{{)?\s*\b(?:for "
    rf"(?:all|any|every|each|some)|where|with)\b.*$|(?<=\S),?\s*\\forall\b.*$|,\s*{_DOMAIN}.*$",
    re.DOTALL,
)


def _tokens(text: str) -> list[tuple[str, int]]:
    """Split a text into pairs (token, number of brackets around it)."""
    depth, found = 0, []
    for match in _TOKEN.finditer(text):
        token = match[0]
        depth -= token in _CLOSING or token.startswith("\\end")
        found.append((token, depth))
        depth += token in _OPENING or token.startswith("\\begin")
    return found


def too_large(text: str) -> bool:
    """Return whether a text is too long, too nested or holds too long a number to be compared."""
    return (
        len(text) > MAX_CHARS
        or max((depth for _, depth in _tokens(text)), default=0) > MAX_DEPTH
        or bool(re.search(r"\d{400}", text))
    )


def _split(text: str, separators: Sequence[str]) -> list[str]:
    """Split a text at the separators that are outside of all brackets; leave empty parts out."""
    parts = [""]
    for token, depth in _tokens(text):
        if depth == 0 and token in separators:
            parts.append("")
        else:
            parts[-1] += token
    return [part for part in map(trim, parts) if part]


def items_of(text: str) -> list[str]:
    r"""Split an answer into the items that it lists; an answer that is no list is one item.

    Lists are texts such as "1, 2 and 3", "x < 1 or x > 2", "1 \pm 2" or a union. Their order means nothing.
    """
    text = _as_union(_without_rounding(text))
    groups = _split(text, (";",) if ";" in text else ("and", "or"))
    sizes = {len(_split(part, (",",))) for part in groups}
    if len(groups) > 1 and len(sizes) == 1 and sizes != {1} and all("=" in part for part in groups):
        return [f"({part})" for part in groups]  # "p = 5, q = 2; p = 7, q = 2"
    parts = _split(text, (",", ";", "and", "or", r"\cup"))
    items = [
        trim(_LABEL.sub("", QUALIFIER.sub("", part)))
        for part in parts
        if not re.fullmatch(_DOMAIN + r"(?:_\S+)?", part)
    ]
    return [sign for part in [item for item in items if item] or [text] for sign in both_signs(part)]


def _as_union(text: str) -> str:
    r"""Write "x > 1 and x < 2" as an interval and "x \neq 2" as a union of two; leave other texts alone."""
    if match := re.fullmatch(rf"{_NAME}\s*\\neq\s*([^,;=<>\\ ]+|\\frac\{{[^{{}}]*\}}\{{[^{{}}]*\}})", text):
        return rf"(-\infty,{match[1]})\cup({match[1]},\infty)"
    sides = [
        RELATION.split(side) for side in _split(re.sub(r"\\(?:land|wedge)(?![a-z])", " and ", text), ("and",))
    ]
    if len(sides) != 2 or any(len(side) != 3 for side in sides):
        return text
    bounds = [  # (relation, bound) of the name
        (_FLIP[relation], trim(left), trim(right))
        if re.fullmatch(_NAME, trim(right))
        else (relation, trim(right), trim(left))
        for left, relation, right in sides
    ]
    (first, low, name), (second, high, other) = sorted(bounds, key=lambda bound: bound[0] in ("<", r"\leq"))
    if name != other or first not in (">", r"\geq") or second not in ("<", r"\leq"):
        return text
    return f"{'(' if first == '>' else '['}{low},{high}{')' if second == '<' else ']'}"


def _without_rounding(text: str) -> str:
    r"""Return the exact value of "\frac{1}{3} \approx 0.33", and the rounded one of "x \approx 11"."""
    exact, *rounded = [trim(part) for part in re.split(r"\\(?:approx|simeq)(?![a-z])", text)]
    return rounded[0] if rounded and (not exact or re.fullmatch(_NAME, exact)) else exact or text


def both_signs(text: str) -> list[str]:
    """Return the answers that a text with up to three plus-minus signs stands for, else the text alone."""
    count = len(_PLUS_MINUS.findall(text))
    if not 0 < count <= 3:
        return [text]
    if r"\mp" in text:
        return [_PLUS_MINUS.sub(a, text).replace(r"\mp", b) for a, b in ("+-", "-+")]
    pieces = _PLUS_MINUS.split(text)
    answers = (
        "".join(itertools.chain(*zip(pieces, (*signs, ""), strict=True)))
        for signs in itertools.product("+-", repeat=count)
    )
    return [re.sub(r"(^|[(,=])\s*\+\s*", r"\1", answer) for answer in answers]


def bracketed(text: str) -> tuple[str, list[str], str] | None:
    """Take a tuple, interval, set, vector or matrix apart: (opening, elements, closing), or None for others.

    A vector is read as a tuple. A matrix has the opening "matrix", and its elements are tuples, one per row.
    """
    if text.count("\\begin") == 1 and (
        match := re.fullmatch(r"\\begin\{[pbB]?matrix\}(.*)\\end\{[pbB]?matrix\}", text, re.DOTALL)
    ):
        rows = [
            [trim(entry) for entry in row.split("&")]
            for row in re.split(r"\\\\(?:\[\w+\])?", match[1])
            if row.strip()
        ]
        # a vector, which may also be written as a tuple
        if len(rows) == 1 or all(len(row) == 1 for row in rows):
            return "(", [entry for row in rows for entry in row], ")"
        return "matrix", ["(" + ",".join(row) + ")" for row in rows], ""
    tokens = _tokens(text)
    if len(tokens) < 3 or any(depth == 0 for _, depth in tokens[1:-1]):
        return None  # "(1)(2)"
    first, last = tokens[0][0], tokens[-1][0]
    opening = {"(": "(", "[": "[", r"\{": r"\{", "{": r"\{", r"\langle": "("}.get(first)
    closing = {")": ")", "]": "]", r"\}": r"\}", "}": r"\}", r"\rangle": ")"}.get(last)
    return (
        (opening, _split(text[len(first) : -len(last)], (",", ";")), closing) if opening and closing else None
    )


def as_interval(text: str) -> str:
    """Rewrite an inequality in one name, or a set given by one, as an interval; leave other texts alone."""
    if match := re.fullmatch(
        rf"\\?\{{\s*{_NAME}\s*(?:\\in\s*\\mathbb\s*\{{?R\}}?)?\s*[|:]\s*(.*?)\\?\}}", text
    ):
        text = trim(match[1])
    text = re.sub(rf"^{_NAME}\s*\\in(?![a-z])\s*", "", text)
    if text == r"\mathbb{R}":
        return r"(-\infty,\infty)"
    parts = [part.strip() for part in RELATION.split(text)]
    if len(parts) == 5 and re.fullmatch(_NAME, parts[2]):
        left, first, _, second, right = parts
        if first in (">", r"\geq"):
            left, first, second, right = right, _FLIP[second], _FLIP[first], left
        if first in ("<", r"\leq") and second in ("<", r"\leq"):
            return f"{'(' if first == '<' else '['}{left},{right}{')' if second == '<' else ']'}"
    if len(parts) == 3:
        left, relation, right = parts
        if re.fullmatch(_NAME, right) and not re.fullmatch(_NAME, left):
            left, relation, right = right, _FLIP[relation], left
        if re.fullmatch(_NAME, left) and right and "=" not in right:
            bound = {
                "<": "(-\\infty,{})",
                r"\leq": "(-\\infty,{}]",
                ">": "({},\\infty)",
                r"\geq": "[{},\\infty)",
            }[relation]
            return bound.format(right)
    return text


def right_side(text: str) -> str:
    """Return the last side of an equation that gives a value, such as "x = 3" or "f(2) = 1 + 2 = 3".

    Any other text is returned unchanged: relations, and equations of two sides whose left side is a sum with
    names, such as "x + y = 3".
    """
    sides = _split(re.sub(r":=|\\equiv(?![a-z])(?!.*mod)", "=", text), ("=",))
    if len(sides) < 2 or RELATION.search(text) or r"\neq" in text:
        return text
    is_sum = any(depth == 0 and token in "+-" for token, depth in _tokens(sides[0])[1:])
    has_names = re.search(r"(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])", re.sub(r"\\[a-zA-Z]+", " ", sides[0]))
    return text if is_sum and has_names and len(sides) == 2 else sides[-1]

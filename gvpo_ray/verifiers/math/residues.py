r"""Residue classes: integers that are given by their remainder.

"n = 4k + 2 where k is an integer", "n \equiv 2 \pmod 4" and "integers congruent to 2 modulo 4" say the
same. So do "odd" and "n \equiv 1 \pmod 2".
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

MAX_MODULUS = 10_000
"""Largest modulus of a class, and largest common one of two."""


class Residues(NamedTuple):
    """The integers that an answer names by their remainder."""

    modulus: int
    least: dict[int, int | None]
    """Remainder -> the least integer that has it, None where the answer says of none that it is the least."""
    is_stated: bool
    """Whether the answer says it by a congruence or in words, not by a formula such as 4k + 2."""
    has_condition: bool
    """Whether a formula's parameter is introduced as an integer."""


_INTEGERS = r"-?\d+(?:\s*(?:,\s*(?:and|or)?|and|or)\s*(?:[A-Za-z]\s*\\equiv\s*)?-?\d+)*"
_WORDED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:pmod|bmod|mod)(?![a-z])|\(\s*mod(?=[\s\d])|\bmodulo\b|\bmod\b", " mod "),
        (r"\bcongruent to\b|=\s*(?=-?\d+[\s(]* mod )", r" \\equiv "),
        (r"\b(?:divisible by|(?:an? )?multiples? of)\s*(\d+)", r" \\equiv 0 mod \1 "),
        (
            r"\b(?:(?:leav|giv|hav)(?:es?|ing)|has|with)?\s*(?:an? |the )?remainders?\s*(?:of |is )?"
            rf"({_INTEGERS})\s*(?:when|upon|on|if|after)?\s*(?:(?:it is|they are) )?"
            r"(?:divided|dividing|division)\s*by\s*(\d+)",
            r" \\equiv \1 mod \2 ",
        ),
        (r"\beven\b", r" \\equiv 0 mod 2 "),
        (r"\bodd\b", r" \\equiv 1 mod 2 "),
        (r"\\not\s*(?=\\equiv)", " not "),
    )
]
_CLAUSE = re.compile(
    rf"(?P<said>[^\d\\]*)(?:\\equiv)?\s*(?P<integers>{_INTEGERS})[\s,()]*mod\s*(?P<modulus>\d+)"
    r"(?![\d(]*[A-Za-z])"  # 4k
)
_VOCABULARY = frozenset(
    "all any every each the those a an n x m k p is are be integer integers number "  # noqa: SIM905 - data
    "numbers value values of that which such for whole natural positive nonnegative non-negative only "
    "exactly precisely must and or not".split()
)
"""Words that may stand around a class. What else is said could narrow it or deny it."""
_FORMULA = re.compile(
    r"(?:(?P<name>[A-Za-z])\s*=)?\s*"
    r"(?:(?P<factor>\d+)\s*\*?\s*(?P<of>[a-z])\s*(?:(?P<sign>[-+])\s*(?P<rest>\d+))?"
    r"|(?P<first>\d+)\s*\+\s*(?P<times>\d+)\s*\*?\s*(?P<parameter>[a-z]))"
)
_CONDITION = re.compile(
    r"\s*(?:,|\b(?:where|with|for some)\b)\s*(?:(?:some|an?|any)\s+)?"
    r"(?:(?P<before>positive|non-?negative)\s+)?(?P<kind>integers?\s+)?(?P<name>[a-z])\s*"
    r"(?:\\in\s*\\mathbb\s*\{?\s*(?P<set>[NZ])\s*\}?\s*(?P<mark>_\s*\{?\s*0\s*\}?|\^\s*\{?\s*\+\s*\}?)?"
    r"|(?:is|are)\s+(?:an?|any)\s+(?P<after>(?:positive |non-?negative )?integer))?\s*"
)


@functools.lru_cache(maxsize=512)
def residues_of(text: str) -> Residues | None:
    """Read the residue classes of a normalised answer; None for any other text."""
    if not re.search(r"\d\s*\*?\s*[a-z]|mod|congruent|remainder|divisible|multiple|\bodd\b|\beven\b", text):
        return None
    text = " ".join(re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).split())
    return _formulas(text) or _stated(re.sub(r"(?<!\\)[{}]", " ", text))


def _stated(text: str) -> Residues | None:
    for pattern, replacement in _WORDED:
        text = pattern.sub(replacement, text)
    clauses, end = list(_CLAUSE.finditer(text)), 0
    found: list[tuple[int, set[int]]] = []
    words: set[str] = set()
    for clause in clauses:
        if clause.start() != end:
            return None
        modulus, end = int(clause["modulus"]), clause.end()
        said = re.findall(r"[^\s,()]+", clause["said"])
        words |= {*said}
        if not 2 <= modulus <= MAX_MODULUS or (found and said[:1] != ["or"] and modulus != found[0][0]):
            return None  # "1 mod 2 and 2 mod 3" are both
        residues = {int(n) % modulus for n in re.findall(r"-?\d+", clause["integers"])}
        found.append((modulus, {*range(modulus)} - residues if "not" in said else residues))
    behind = re.findall(r"[^\s,()]+", text[end:])
    words |= {*behind}
    if (
        not found
        or not {word.lower() for word in words} <= _VOCABULARY
        or {"or", "not"} & {*behind}
        or len({word for word in words if len(word) == 1 and word not in "aA"}) > 1  # nk is another number
        or ("not" in words and len(found) > 1)
    ):
        return None
    start = 1 if "positive" in words else 0 if words & {"nonnegative", "non-negative"} else None
    size = math.lcm(*(modulus for modulus, _ in found))
    if size > MAX_MODULUS:
        return None
    members = {n for modulus, residues in found for n in range(size) if n % modulus in residues}
    least = {n: None if start is None else (n if n >= start else n + size) for n in members}
    return Residues(size, least, is_stated=True, has_condition=True)


def _formulas(text: str) -> Residues | None:
    r"""Read formulas with one parameter, such as "n = 4k + 2 or n = 4k + 3, k \in \mathbb{Z}"."""
    condition = _CONDITION.search(text)
    if condition and (
        condition.end() != len(text)
        or not (condition["kind"] or condition["set"] or "integer" in (condition["after"] or ""))
    ):
        return None
    formulas = [
        _FORMULA.fullmatch(part.strip())
        for part in re.split(r",|;|\bor\b|\band\b", text[: condition.start()] if condition else text)
    ]
    found = [match for match in formulas if match]
    parameters = {match["of"] or match["parameter"] for match in found}
    names = {match["name"] for match in found if match["name"]}
    if len(found) != len(formulas) or len(parameters) != 1 or len(names) > 1 or names & parameters:
        return None
    if condition and condition["name"] not in parameters:
        return None
    said = (
        " ".join(filter(None, (condition[name] for name in ("before", "after", "mark")))) if condition else ""
    )
    start = 1 if re.search(r"positive|\+", said) else 0 if re.search(r"negative|0", said) else None
    pairs = [
        (int(m["factor"] or m["times"]), int(m["first"] or (m["sign"] or "") + (m["rest"] or "0")))
        for m in found
    ]
    if not all(2 <= factor <= MAX_MODULUS for factor, _ in pairs):
        return None
    size = math.lcm(*(factor for factor, _ in pairs))
    if size > MAX_MODULUS:
        return None
    least: dict[int, int | None] = {}
    for factor, rest in pairs:
        for k in range(size // factor):
            number = factor * ((start or 0) + k) + rest
            before = least.get(number % size, number)
            least[number % size] = None if start is None or before is None else min(number, before)
    return Residues(size, least, is_stated=False, has_condition=condition is not None)


def same_residues(gold: str, pred: str) -> bool:
    """Return whether two normalised answers name the same integers by their remainders.

    One of them must say so by a congruence or in words: two formulas are compared as formulas. A gold formula
    names integers only where its parameter is introduced as one: "2n" may be how many there are.
    """
    wanted, found = residues_of(gold), residues_of(pred)
    if wanted is None or found is None or not wanted.has_condition:
        return False
    size = math.lcm(wanted.modulus, found.modulus)
    if size > MAX_MODULUS or not (wanted.is_stated or found.is_stated):
        return False
    left, right = (_with_modulus(size, one) for one in (wanted, found))
    return left.keys() == right.keys() and all(
        None in (left[n], right[n]) or left[n] == right[n] for n in left
    )


def _with_modulus(size: int, residues: Residues) -> dict[int, int | None]:
    """Return the least integer of each remainder, by a multiple of the classes' modulus."""
    return {
        ((n if first is None else first) + k * residues.modulus) % size: (
            None if first is None else first + k * residues.modulus
        )
        for n, first in residues.least.items()
        for k in range(size // residues.modulus)
    }

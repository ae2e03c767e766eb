"""Numbers and units are read from text and compared here."""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

_PLAIN = re.compile(
    r"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)(?:\s*(?=\\frac\s*\{\s*\d)|\s+(?=\d+\s*/)))?"
    r"(?:\\frac\s*\{\s*(?P<minus>-?)(?P<top>\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}"
    r"|(?P<number>\d*\.?\d+|\d+\.)(?:\s*/\s*(?P<over>\d+))?"
    r"(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:[{(]\s*(?P<ten>[-+]?\d{1,3})\s*[})]|(?P<power>\d{1,3}))"
    r"|[eE](?P<e>[-+]?\d{1,3}))?)"
)
_DECIMAL = re.compile(r"-?\d*\.(\d+)")
_RATIO = re.compile(r"{0}\s*:\s*{0}".format(r"(\\frac\{[^{}]*\}\{[^{}]*\}|\(?[-\d./ ]+\)?|\([^():]*\))"))
BASE = re.compile(r"([\dA-Fa-f]+)\s*_\s*\{?\s*(?:\\text\{)?\s*(\d{1,2}|two|three|eight|ten)\s*\}*")
_SHORT_UNITS = (
    "km cm mm kg mg ml mL ft lbs? oz hrs? mph kph min sec ms pm am sq in m g s L Hz Pa mol eV kW kV kJ kN "
    "kPa MPa GHz MHz kHz kWh mA mV [dD]ays? yd mi hour".replace(" ", "|")
)
_UNIT = re.compile(
    rf"(?<=[\d}}%)\w\s/])\s*(?:\\text\{{([^{{}}]*)\}}|(?<=[\d}}\s])((?:(?:{_SHORT_UNITS})"
    rf"(?:\s*(?:/|\\cdot|\*)\s*(?:{_SHORT_UNITS}))*|[A-Za-z]{{4,}}(?: [A-Za-z]{{2,}})*)(?![A-Za-z])))"
    r"\s*(?:\^\s*\{?\s*(-?\d)\s*\}?)?\s*\.?$"
)
_NO_NAME = frozenset(["unit", "of", "the", "per", "square", "sq", "cubic"])
_NO_UNIT = frozenset(
    "or but nor not no never is are was were be plus minus times over by divided "  # noqa: SIM905 - data
    "multiplied squared cubed factorial mod modulo to than then maybe perhaps possibly if unless except if "
    "least most".split()
)
"""Words that state something else about a number than what it counts. Nouns are an open class, these a closed
one, and a text with one of them is no unit: "5 or more", "10 minus three", "5 squared"."""
_SAME_UNIT = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm",
    "foot": "ft", "feet": "ft", "inch": "in", "inche": "in", "pound": "lb", "hour": "hr", "h": "hr",
    "minute": "min", "second": "sec",
    "s": "sec", "kilogram": "kg", "gram": "g", "liter": "l", "litre": "l", "mile": "mi", "ounce": "oz",
}  # fmt: skip


_MEASURES: dict[str, dict[str, int | str]] = {
    "time": {"week": 604800, "day": 86400, "hr": 3600, "min": 60, "sec": 1},
    "months": {"year": 12, "month": 1},
    "metres": {"km": 1000, "m": 1, "cm": "1/100", "mm": "1/1000"},
    "inches": {"mi": 63360, "yard": 36, "yd": 36, "ft": 12, "in": 1},
    "grams": {"kg": 1000, "g": 1, "mg": "1/1000"},
    "ounces": {"lb": 16, "oz": 1},
    "litres": {"l": 1, "ml": "1/1000"},
    "cups": {"gallon": 16, "quart": 4, "pint": 2, "cup": 1},
    "money": {"dollar": 100, "cent": 1},
}
_SIZES = {
    unit: (of_kind, Fraction(size)) for of_kind, sizes in _MEASURES.items() for unit, size in sizes.items()
}
"""Unit, as unit_words spells it -> what it measures, and its size among the units of that."""
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]{1,11})\.?(?:\s*(?:,?\s*and\b|,)\s*|\s+|$)")


def as_number(text: str) -> Fraction | None:
    r"""Return the exact value of a plain number, or None for any other text.

    Plain numbers are 12, -0.5, 1/2, \frac{1}{2}, 2 1/2, 2 \times 10^{-3} and the like.
    """
    text = re.sub(r"^([-+]?)\s*10\s*\^", r"\g<1>1*10^", text)  # a power of ten is a numeral
    match = _PLAIN.fullmatch(text) if len(text) <= 400 else None
    if (
        match is None
        or (match["sign"] and match["minus"])
        or (match["whole"] and not (match["top"] or match["over"]))
    ):
        return None
    denominator = int(match["bottom"] or match["over"] or 1)
    if denominator == 0:
        return None
    value = Fraction(match["minus"] + match["top"] if match["top"] else match["number"]) / denominator + int(
        match["whole"] or 0
    )
    value *= Fraction(10) ** int(match["ten"] or match["power"] or match["e"] or 0)
    return -value if match["sign"] == "-" else value


_BELOW_100 = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve "  # noqa: SIM905 - data
        "thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
    )
}
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_BELOW_100 |= {
    f"{tens} {one}".removesuffix(" zero"): 10 * value + digit
    for value, tens in enumerate(_TENS, 2)
    for one, digit in list(_BELOW_100.items())[:10]
}
SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
"""Words behind a number that multiply it."""
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4} | {
    word: value
    for value, word in enumerate(["fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"], 4)
}
_WORDED = re.compile(r"(-?\s*)([A-Za-z]+(?:[ -][A-Za-z]+)*)")
_PART = re.compile(rf"(?:(?P<whole>.+) and )?(?P<top>.+) (?P<part>{'|'.join(_PARTS)})s?")


def in_digits(text: str) -> str:
    """Write the number in words with which a text begins in digits: "twenty-one apples" is "21 apples"."""
    match = _WORDED.fullmatch(text)
    if match is None:
        return text
    words = re.split(r"[ -]", match[2])
    for end in range(min(len(words), 12), 0, -1):
        value = _number_in_words(" ".join(words[:end]).lower())
        if value is not None:
            return " ".join([match[1].strip() + str(value), *words[end:]])
    return text


def _number_in_words(text: str) -> Fraction | None:
    """Return the value of a number in words, such as "two hundred and five" or "two and a half"."""
    if text == "half":
        return Fraction(1, 2)
    if match := _PART.fullmatch(text):
        whole = _number_in_words(match["whole"]) if match["whole"] else Fraction(0)
        top = Fraction(1) if match["top"] == "a" else _number_in_words(match["top"])
        return None if whole is None or top is None else whole + top / _PARTS[match["part"]]
    total = Fraction(0)
    for scale in ("trillion", "billion", "million", "thousand", "hundred"):
        head, found, rest = text.partition(f" {scale}")
        if found:
            count = 1 if head == "a" else _number_in_words(head)
            if not count or (rest and not rest.startswith(" ")):
                return None
            total, text = total + count * SCALES[scale], rest.strip().removeprefix("and ")
    return total + Fraction(_BELOW_100[text]) if text in _BELOW_100 else total if total and not text else None


def is_close(gold: Fraction, pred: Fraction, gold_text: str, pred_text: str) -> bool:
    """Return whether two numbers are equal, given how they are written.

    Exact values must be equal. If one is written as a decimal and gold is no integer, they may differ by a
    relative 1e-4, the usual tolerance of evaluations. A gold decimal of three digits or more also equals an
    exact value, no integer, that rounds or truncates to it.
    """
    difference = abs(gold - pred)
    # sympy's values have 30 digits
    if difference <= max(abs(gold), abs(pred)) / 10**12 or difference < Fraction(1, 10**25):
        return True
    gold_decimal, pred_decimal = _DECIMAL.fullmatch(gold_text), _DECIMAL.fullmatch(pred_text)
    if gold.denominator == 1 or not (gold_decimal or pred_decimal):
        return False
    if difference <= abs(gold) / 10**4:
        return True
    rounded = (
        gold_decimal
        and not pred_decimal
        and pred.denominator != 1
        and len(gold_text.replace(".", "").lstrip("-0")) >= 3
    )
    return bool(rounded and gold_decimal and difference < Fraction(1, 10 ** len(gold_decimal[1])))


class Value(NamedTuple):
    """A Value is a normalised answer that is one number or expression, taken apart."""

    text: str
    """The number or expression, without unit, percent sign and sign of degrees."""
    unit: str
    """The words of the unit; "" if there are none."""
    is_percent: bool
    in_degrees: bool


@functools.lru_cache(maxsize=512)
def read_value(text: str) -> Value:
    """Split a normalised answer into number and unit; "12 million people" is 12000000 people."""
    unit, number = "", in_digits(text)
    while (match := _UNIT.search(number)) and match.start() > 0:
        rest, words = number[: match.start()].rstrip("/ "), (match[1] or match[2] or "").split()
        is_known = not match[2] or len(match[2]) >= 4 or as_number(rest) is not None  # 3n + 2m
        if not is_known or is_stated(words):
            break
        while words and words[0].lower() in SCALES and (value := as_number(rest)) is not None:
            rest = str(value * SCALES[words.pop(0).lower()])
        unit = " ".join([*words, *([match[3]] if match[3] else []), unit]).strip()
        number = rest
    number = re.sub(r"(?<=\w)_\s*\{?\s*\\text\{([^{}]*)\}\s*\}?", r"_{\1}", number).strip()
    percent, degrees = number.endswith("%"), r"\circ" in number
    number = re.sub(r"\^\\circ\s*[CF]?|\^\s*$", "", number.rstrip("% ")).strip()
    if ratio := _RATIO.fullmatch(number):
        number = "/".join(part if part.isdigit() else f"({part})" for part in ratio.groups())
    return Value(number, unit, percent, degrees)


def is_stated(words: list[str]) -> bool:
    """Return whether words behind a number change what it says, so that they are no unit."""
    plain = [re.sub(r"^\W+|\W+$", "", word).lower() for word in words]
    return any(word in _NO_UNIT or word[:1].isdigit() or in_digits(word) != word for word in plain)


def unit_words(unit: str) -> frozenset[str]:
    """Return the words of a unit, in one spelling and in the singular."""
    words = (w.removesuffix("s") if len(w) > 2 else w for w in re.findall(r"[^\W\d_]+|\d", unit))
    return frozenset(_SAME_UNIT.get(word.lower(), word) for word in words) - _NO_NAME


def same_unit(gold: str, pred: str) -> bool:
    """Return whether two units agree: they share a word, or one is missing.

    A missing unit is implied by the question. Nothing is converted.
    """
    words, others = ({w.lower() for w in unit_words(unit) if not w.isdigit()} for unit in (gold, pred))
    return not words or not others or bool(words & others)


class Amounts(NamedTuple):
    """Amounts is a quantity that is given in one or several amounts with units."""

    kind: str
    """What is measured; a foot and a metre are of two kinds, as nothing exact is said about both."""
    total: Fraction
    """How much, in the smallest unit of its kind."""
    num: int
    """Number of amounts."""


@functools.lru_cache(maxsize=512)
def as_amounts(text: str) -> Amounts | None:
    """Read amounts that make one quantity: "3 hours and 20 minutes" is 12000 seconds, in 2 amounts.

    Their units differ, and each amount is less than one of the next larger unit. Other texts are None.
    """
    rest = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip()
    found: list[tuple[Fraction, Fraction, str]] = []  # size of the unit, amount, kind
    while rest:
        match = _AMOUNT.match(rest)
        unit = next(iter(unit_words(match[2])), "").lower() if match else ""
        if match is None or unit not in _SIZES:
            return None
        kind, size = _SIZES[unit]
        found.append((size, Fraction(match[1]) * size, kind))
        rest = rest[match.end() :]
    found.sort(reverse=True)
    fits = all(
        max(size, amount) < above[0] and kind == above[2] for above, (size, amount, kind) in pairwise(found)
    )
    total = sum((amount for _, amount, _ in found), Fraction(0))
    return Amounts(found[0][2], total, len(found)) if found and fits else None

"""Numbers and units: reading them from text, and comparing them."""

from __future__ import annotations

import functools
import math
import re
from fractions import Fraction

MAX_QUANTITY_CHARS = 1000
"""Length in characters to which a text is cut before a quantity is read from it, because the regular
expressions take quadratic time at worst."""

_PLAIN = re.compile(
    r"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)(?:\s*(?=\\frac\s*\{\s*\d)|\s+(?=\d+\s*/)))?"
    r"(?:\\frac\s*\{\s*(?P<minus>-?)(?P<top>\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}|(?P<number>\d*\.?\d+|\d+\.)(?:\s*/\s*(?P<over>\d+))?"
    r"(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:[{(]\s*(?P<ten>[-+]?\d{1,3})\s*[})]|(?P<power>\d{1,3}))|[eE](?P<e>[-+]?\d{1,3}))?)"
)
_DECIMAL = re.compile(r"-?\d*\.(\d+)")
_RATIO = re.compile(r"{0}\s*:\s*{0}".format(r"(\\frac\{[^{}]*\}\{[^{}]*\}|\(?[-\d./ ]+\)?|\([^():]*\))"))
BASE = re.compile(r"([\dA-Fa-f]+)\s*_\s*\{?\s*(?:\\text\{)?\s*(\d{1,2}|two|three|eight|ten)\s*\}*")
_SHORT_UNITS = (
    "km cm mm kg mg ml mL ft lbs? oz hrs? mph kph min sec ms pm am sq in m g s L [dD]ays? yd mi hour".replace(
        " ", "|"
    )
)
_UNIT = re.compile(
    rf"(?<=[\d}}%)\w\s])\s*(?:\\text\{{([^{{}}]*)\}}|(?<=[\d}}\s])((?:{_SHORT_UNITS}|[A-Za-z]{{4,}}(?: "
    rf"[A-Za-z]{{2,}})*)\b))"
    r"\s*(?:\^\s*\{?\s*(\d)\s*\}?)?\s*\.?$"
)
_SAME_UNIT = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm",
    "foot": "ft", "feet": "ft", "inch": "in", "inche": "in", "pound": "lb", "hour": "hr", "h": "hr",
    "minute": "min", "second": "sec",
    "s": "sec", "kilogram": "kg", "gram": "g", "liter": "l", "litre": "l", "mile": "mi", "ounce": "oz",
}  # fmt: skip


def as_number(text: str) -> Fraction | None:
    r"""Return the exact value of a plain number, or None for any other text.

    Plain numbers are 12, -0.5, 1/2, \frac{1}{2}, 2 1/2, 2 \times 10^{-3} and the like.
    """
    match = _PLAIN.fullmatch(text) if len(text) <= 400 else None
    if match is None or (match["whole"] and not (match["top"] or match["over"])):
        return None
    denominator = int(match["bottom"] or match["over"] or 1)
    if denominator == 0:
        return None
    value = Fraction(match["minus"] + match["top"] if match["top"] else match["number"]) / denominator + int(
        match["whole"] or 0
    )
    value *= Fraction(10) ** int(match["ten"] or match["power"] or match["e"] or 0)
    return -value if match["sign"] == "-" else value


_QUANTITY = re.compile(
    r"(?P<sign>[-+\u2212]?)\s*(?:\\[dt]?frac\s*\{(?P<top>\d{1,30})\}\s*\{(?P<bottom>\d{1,30})\}"
    r"|(?P<whole>\d{1,3}(?:(?:,|\{,\})\d{3}){1,20}(?!\d)|\d{0,60})(?P<decimals>\.\d{1,60})?)"
    r"(?:\s*/\s*(?P<over>\d{1,30}))?(?:[eE](?P<e>[-+]?\d{1,3})|\s*(?:\\times|\\cdot|\*|x|×)\s*10\s*\^\s*\{?(?P<ten>[-+]?\d{1,3})\}?)?"
)


_BEFORE_NUMBER = re.compile(r"[\s$£€\\({~≈]*(?:\\?[A-Za-z]\w{0,20}\s*(?:=|≈|\\approx|is|:))?[\s$£€\\({~≈]*")
"""What may stand before a quantity's number: currency, brackets and a name. So exp(2) is not read as 2."""
_A_UNIT = re.compile(r"[A-Za-z°%µΩ][A-Za-z°%µΩ\d/^·-]{0,40}")
"""What may stand behind a quantity's number: a unit. So 2**3 is not read as 2."""


def quantity(text: str) -> tuple[float, str] | None:
    r"""Read (number, unit) from a text such as "$1,250.50", "3/4 cup" or "2.5 \times 10^3 \text{ m}".

    None means that the text is no quantity. While as_number reads exact values from normalised LaTeX, this
    function reads floats from prose, with currency, thousands separators and a unit.
    """
    text = text[:MAX_QUANTITY_CHARS]
    match = next((m for m in _QUANTITY.finditer(text) if m["top"] or m["whole"] or m["decimals"]), None)
    if match is None or not _BEFORE_NUMBER.fullmatch(text[: match.start()]):
        return None
    if match["top"]:
        value = int(match["top"]) / int(match["bottom"]) if int(match["bottom"]) else math.nan
    else:
        value = float(re.sub(r"[,{}]", "", match["whole"] or "0") + (match["decimals"] or ""))
    if match["over"]:
        value = value / int(match["over"]) if int(match["over"]) else math.nan
    value *= 10.0 ** int(match["e"] or match["ten"] or 0)
    unit = re.sub(
        r"\\(?:text|mathrm|mbox|textbf)\b|\\[ ,;!]|[\\{}$~\s]|\^?circ\b|[.,;]$", "", text[match.end() :]
    )
    if unit and not _A_UNIT.fullmatch(unit):
        return None
    unit = unit[:-1] if len(unit) > 3 and unit.endswith("s") else unit  # metres and metre
    return (-value if match["sign"] in ("-", "\u2212") else value), unit


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


@functools.lru_cache(maxsize=512)
def value_and_unit(text: str) -> tuple[str, str, bool, bool]:
    """Split a normalised answer into (value, unit, whether it is a percentage, whether it is in degrees)."""
    unit = ""
    while (match := _UNIT.search(text)) and match.start() > 0:
        if match[2] and len(match[2]) < 4 and as_number(text[: match.start()].strip()) is None:
            break  # 3n + 2m
        unit = f"{match[1] or match[2]} {unit}"
        text = text[: match.start()].strip()
    text = re.sub(r"(?<=\w)_\s*\{?\s*\\text\{([^{}]*)\}\s*\}?", r"_{\1}", text).strip()
    percent, degrees = text.endswith("%"), r"\circ" in text
    text = re.sub(r"\^\\circ\s*[CF]?|\^\s*$", "", text.rstrip("% ")).strip()
    return _RATIO.sub(r"(\1)/(\2)", text) if _RATIO.fullmatch(text) else text, unit.strip(), percent, degrees


def same_unit(gold: str, pred: str) -> bool:
    """Return whether two units agree: they share a word, or one is missing.

    A missing unit is implied by the question. Nothing is converted.
    """
    words, others = (
        {
            _SAME_UNIT.get(word, word)
            for word in (
                w.removesuffix("s") if len(w) > 2 else w for w in re.findall(r"[a-z]+", unit.lower())
            )
        }
        - {"unit", "of", "the", "per", "square", "sq", "cubic"}
        for unit in (gold, pred)
    )
    return not words or not others or bool(words & others)

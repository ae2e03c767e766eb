"""Two normalised answers are compared as the gold answer's kind decides, with one comparer per kind."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from fractions import Fraction

from gvpo_ray.verifiers.math.evaluated import is_copied, is_exact_form, is_notation, is_unevaluated
from gvpo_ray.verifiers.math.extract import MAX_CHARS, MAX_ITEMS
from gvpo_ray.verifiers.math.normalise import normalise, trim
from gvpo_ray.verifiers.math.numbers import (
    BASE,
    Value,
    as_amounts,
    as_number,
    in_digits,
    is_close,
    is_stated,
    read_value,
    same_unit,
)
from gvpo_ray.verifiers.math.structure import (
    QUALIFIER,
    RELATION,
    as_interval,
    both_signs,
    bracketed,
    items_of,
    right_side,
    too_large,
)
from gvpo_ray.verifiers.math.symbolic import equal_equations, is_irrational, sympy_equal, tree_of
from gvpo_ray.verifiers.math.words import as_option, is_words, same_words

MAX_NESTING = 6
"""Depth of lists and brackets below which only equal texts are equal."""


_SET_OPERATOR = re.compile(r"(\\(?:setminus|cup|cap)(?![a-z]))")
_NAMES = re.compile(r"(?<![A-Za-z\\])[a-zA-Z](?![A-Za-z])")


class Kind(enum.Enum):
    """A Kind says what a gold answer is."""

    CHOICE = "the letter of an option"
    WORDS = "language, without a number or formula"
    LIST = "several items in any order: a list, or a union"
    SET = "a set of elements"
    ORDERED = "a tuple, a vector, an interval, an inequality in one name, or a matrix"
    REGION = "an intersection or a difference of sets"
    INEQUALITY = "another inequality"
    EQUATION = "an equation, or a name with its value"
    VALUE = "a number, with its unit, or an expression"


def kind_of(gold: str) -> Kind:
    """Return the kind of a normalised gold answer."""
    if as_number(read_value(gold).text) is not None or as_amounts(gold) is not None:
        return Kind.VALUE
    if re.search(r"[A-J]", gold) and as_option(gold) is not None:
        return Kind.CHOICE
    if is_words(gold):
        return Kind.WORDS
    items = items_of(gold)
    if len(items) > 1:
        return Kind.LIST
    if _SET_OPERATOR.search(items[0]):
        return Kind.REGION
    text = as_interval(unqualified(items[0]))
    if RELATION.search(text):
        return Kind.INEQUALITY
    inside = bracketed(text)
    if inside is not None and (len(inside[1]) != 1 or inside[0] in ("[", "matrix")):
        return Kind.SET if inside[0] == r"\{" else Kind.ORDERED
    if inside is not None:
        return kind_of(inside[1][0])  # (5), {5}
    return Kind.EQUATION if "=" in text or right_side(text) != text else Kind.VALUE


def num_elements(gold: str) -> int:
    """Return how many elements a normalised list, set or tuple has; 1 for other answers."""
    return len(_elements(gold))


def _elements(text: str) -> list[str]:
    items = items_of(text)
    inside = bracketed(items[0]) if len(items) == 1 else None
    return items if inside is None else list(inside[1])


def equal_answers(gold: str, pred: str, nesting: int = 0) -> bool:
    """Return whether two normalised answers are the same mathematics, or the same words.

    Args:
        gold: the gold answer, normalised.
        pred: the answer to compare, normalised.
        nesting: depth of the recursion into lists and brackets.
    """
    if gold == pred or _letters(gold) == _letters(pred):
        return True
    if not pred or nesting > MAX_NESTING or too_large(pred) or too_large(gold):
        return False
    amounts, others = as_amounts(gold), as_amounts(right_side(pred))
    if amounts and others and max(amounts.num, others.num) > 1:
        return amounts[:2] == others[:2]
    kind = kind_of(gold)
    if ":" in gold:  # 3 to 4 is 3:4
        pred = re.sub(r"(?<=\d)\s*(?:\\text\{\s*to\s*\}|\bto\b)\s*(?=\d)", ":", pred)
    if kind not in (Kind.CHOICE, Kind.WORDS):
        pred = _with_gold_parameter(gold, _without_option(gold, pred))
    return _COMPARERS[kind](gold, pred, nesting + 1)


def _without_option(gold: str, pred: str) -> str:
    """Return an answer without the letter of its option: 12 for "(C) 12"."""
    option = re.fullmatch(r"(?:\\text\{)?\s*\([A-J]\)\s*\}?\s*(.+)", pred)
    return trim(option[1]) if option and not gold.startswith("(") else pred


def is_copied_answer(gold: str, pred: str, prompt: str) -> bool:
    """Return whether an answer that equals the gold answer is taken over from the prompt (math/evaluated.py).

    Gold answers are values, alone, of a name or as elements, and solved inequalities. What the answer has
    around its value makes no difference: a name, brackets, a unit, the letter of an option. The answers are
    normalised, the prompt is not.
    """
    kind = kind_of(gold)
    if kind is Kind.ORDERED and RELATION.search(as_interval(unqualified(pred))):
        return is_copied(gold, pred, prompt)  # x + 1 > 0 for x > -1
    if kind in (Kind.LIST, Kind.SET, Kind.ORDERED):  # (48/2, 3) for (24, 3)
        golds = _elements(gold)
        others = [element for element in _elements(pred) if element not in golds]
        return any(
            equal_answers(of_gold, element) and is_copied_answer(of_gold, element, prompt)
            for element in others
            for of_gold in golds
            if kind_of(of_gold) is Kind.VALUE
        )
    if kind is not Kind.VALUE and not _is_solution(gold):
        return False
    wanted = read_value(right_side(_single(gold) or gold)).text
    values = [plain_value(item) for item in items_of(in_digits(_without_option(gold, pred)))]
    is_worked_out = "=" in pred and all(value and as_number(value.text) is not None for value in values)
    return (
        not is_worked_out and is_copied(gold, pred, prompt)
    ) or any(  # 48/2 = 24 begins as the prompt does
        value is not None and is_copied(wanted, trim(value.text.rpartition("=")[2]).lstrip("+ "), prompt)
        for value in values
    )


def unqualified(text: str) -> str:
    """Return a text without a condition behind it, such as "for all x > 0"."""
    return trim(QUALIFIER.sub("", text)) or text


def _with_gold_parameter(gold: str, pred: str) -> str:
    r"""Rename the parameter of an answer such as "3t + 1 for some integer t" to the gold answer's.

    A parameter is bound by a condition, or counts periods, as in \pi + 2k\pi. Other names are the question's.
    """
    names, others = ({*_NAMES.findall(right_side(unqualified(text)))} for text in (gold, pred))
    if len(names - others) != 1 or len(others - names) != 1:
        return pred
    (name,), (other,) = names - others, others - names
    is_bound = any(
        re.search(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z])", condition[0])
        for letter, text in ((name, gold), (other, pred))
        if (condition := QUALIFIER.search(text))
    )
    counts_periods = {name, other} <= set("jklmnt") and re.search(r"\\(?:pi|circ)(?![a-z])", gold)
    if not (is_bound or counts_periods):
        return pred
    return re.sub(rf"(?<![A-Za-z\\]){other}(?![A-Za-z])", name, pred)


def _letters(text: str) -> str:
    r"""Return a text without spaces, needless braces and \text{}; digits with a space between stay apart."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    return re.sub(r"([_^])\{\s*(\w)\s*\}|(?<!\d)\s+|\s+(?!\d)", r"\1\2", text)


def _single(text: str) -> str | None:
    """Return an answer that is one item, without brackets around it and conditions behind it; else None."""
    items = items_of(text)
    if len(items) != 1:
        return None
    text = as_interval(unqualified(items[0]))
    inside = bracketed(text)
    while inside is not None and len(inside[1]) == 1 and inside[0] not in ("[", "matrix"):
        text = inside[1][0]
        inside = bracketed(text)
    return text


def _equal_choices(gold: str, pred: str, _: int) -> bool:
    wanted, found = as_option(gold), as_option(pred)
    if wanted is not None and found is not None:
        return wanted[0] == found[0]
    return wanted is not None and bool(wanted[1]) and equal_answers(wanted[1], pred)  # 12 for "(C) 12"


def _equal_words(gold: str, pred: str, _: int) -> bool:
    return same_words(gold, pred)


def _equal_lists(gold: str, pred: str, nesting: int) -> bool:
    """Return whether a list has a gold list's items; a set or tuple may stand for it."""
    golds, preds = items_of(gold), items_of(pred)
    if len(preds) == 1:
        if (number := _decimal_comma(gold)) is not None:
            return equal_answers(number, pred, nesting)
        opening, elements, _ = bracketed(right_side(preds[0])) or ("", [], "")
        if opening == "(":  # (1, 2) for x = 1, y = 2
            return _equal_in_order(golds, elements, nesting)
        if opening == r"\{":
            preds = _signed(elements)
    if len(preds) > 1 and _match(golds, preds, nesting):
        return True
    return _equal_regions(gold, pred)


def _equal_sets(gold: str, pred: str, nesting: int) -> bool:
    """Return whether an answer has a gold set's elements; a list may stand for the set."""
    elements = (bracketed(_single(gold) or gold) or ("", [], ""))[1]
    items = items_of(pred)
    if len(items) == 1:
        inside = bracketed(right_side(_single(pred) or pred))
        if inside is None or inside[0] != r"\{":
            return _equal_regions(gold, pred)
        items = inside[1]
    return _match(_signed(elements), _signed(items), nesting)


def _equal_ordered(gold: str, pred: str, nesting: int) -> bool:
    """Return whether two tuples, vectors, matrices or intervals are equal.

    A list may stand for a tuple (x = 1, y = 2), and an inequality for an interval.
    """
    text, items = _single(gold) or gold, items_of(pred)
    opening, elements, closing = bracketed(text) or ("", [], "")
    if len(items) > 1:
        if opening == "(" and closing == ")" and r"\cup" not in pred:
            return _equal_in_order(elements, items, nesting)
        return _equal_regions(gold, pred)
    found = right_side(_single(pred) or pred)
    inside = bracketed(found)
    if inside is not None:
        is_alike = (opening, closing) == (inside[0], inside[2]) or len(elements) == len(inside[1]) == 1
        return is_alike and _equal_in_order(elements, inside[1], nesting)
    if RELATION.search(items[0]):
        return sympy_equal(unqualified(items_of(gold)[0]), unqualified(items[0]))
    return _equal_regions(gold, pred)


def _equal_regions(gold: str, pred: str) -> bool:
    """Return whether two unions, intersections or differences of sets and intervals are equal."""
    if not any(_SET_OPERATOR.search(text) for text in (gold, pred)):
        return False
    left, right = (
        "".join(
            as_interval(trim(part)) if i % 2 == 0 else part
            for i, part in enumerate(_SET_OPERATOR.split(text))
        )
        for text in (gold, pred)
    )
    return sympy_equal(left, right)


def _equal_in_order(golds: list[str], preds: list[str], nesting: int) -> bool:
    return len(golds) == len(preds) and all(
        equal_answers(a, b, nesting) for a, b in zip(golds, preds, strict=True)
    )


def _equal_inequalities(gold: str, pred: str, _: int) -> bool:
    return sympy_equal(unqualified(gold), unqualified(pred))


def _equal_equations(gold: str, pred: str, nesting: int) -> bool:
    """Return whether two equations are equal, or an answer is what a gold equation gives as a value."""
    found = _single(pred)
    if found is None:
        value = right_side(_single(gold) or gold)
        return bracketed(value) is not None and equal_answers(value, pred, nesting)
    wanted = _single(gold) or gold
    value, found_value = right_side(wanted), right_side(found)
    argument, other = (re.match(r"[A-Za-z]\s*\(\s*([a-z])\s*\)\s*=", text) for text in (wanted, found))
    if argument and other:  # f(z) = z is f(x) = x
        found_value = re.sub(rf"(?<![a-zA-Z\\]){other[1]}(?![a-zA-Z])", argument[1], found_value)
    if (value, found_value) != (wanted, found) and equal_answers(value, found_value, nesting):
        return True
    if _is_solution(wanted):
        # 68 = x for x = 68, and neither 2x = 136 nor x = 23 + 45, which are still to be solved or computed
        flipped = re.fullmatch(r"(.+?)=\s*\\?[A-Za-z]\w*", found)
        return flipped is not None and equal_answers(value, trim(flipped[1]), nesting)
    return equal_equations(wanted, found)


def _is_solution(gold: str) -> bool:
    """Return whether a gold equation says that one name has a value without names."""
    solution = re.fullmatch(r"\\?[A-Za-z]\w*\s*=([^=]+)", gold)
    return solution is not None and not _NAMES.search(read_value(trim(solution[1])).text)


def _equal_values(gold: str, pred: str, nesting: int) -> bool:
    """Return whether an answer is one number or expression, equal to a gold one; units are included.

    A percent sign may be left out (35 for 35%) or be meant as a hundredth (0.35 for 35%).
    """
    wanted, items = read_value(_single(gold) or gold), items_of(in_digits(pred))
    if len(items) > 1:
        number = _decimal_comma(pred)
        if number is not None and "." in gold:
            return equal_answers(gold, number, nesting)
        return all(equal_answers(gold, item, nesting) for item in items)  # 1/2 or 0.5
    found = plain_value(items[0])
    if found is None or not same_unit(wanted.unit, found.unit):
        return False
    base, other_base = BASE.fullmatch(wanted.text), BASE.fullmatch(found.text)
    if base or other_base:  # 1011_2; one of both may leave the base out
        return (base[1] if base else wanted.text) == (other_base[1] if other_base else found.text) and not (
            base and other_base and base[2] != other_base[2]
        )
    if as_number(wanted.text) is not None and as_number(found.text) is not None:
        return equal_numbers(wanted, found)
    is_number = as_number(wanted.text) is not None
    if not _stands_for_number(wanted, found) if is_number else is_unevaluated(wanted.text, found.text):
        return False
    if sympy_equal(wanted.text, found.text, wanted.in_degrees, found.in_degrees):
        return True
    if wanted.is_percent == found.is_percent:
        return False
    left, right = (value.text if value.is_percent else f"100({value.text})" for value in (wanted, found))
    return sympy_equal(left, right)


def plain_value(text: str) -> Value | None:
    """Read an answer that is one value, such as "x = 5 km"; None for lists, tuples and the like."""
    single = _single(in_digits(text))
    if single is None or RELATION.search(single) or bracketed(right_side(single)) is not None:
        return None
    return read_value(right_side(single))


def quantity(text: str) -> tuple[Value, Fraction] | None:
    r"""Read a number and its unit from an answer such as "$1,250.50", "x = 3/4 cup" or "2.5 \\times 10^3 m".

    None means that the text is no quantity: no number, a number that it says something else about, several
    numbers, or an expression. A unit that is set apart by a space may be any sign: "5 V".
    """
    normal = normalise(text) if len(text) <= MAX_CHARS else ""
    value = plain_value(normal) if normal and not too_large(normal) else None
    if value is None:
        return None
    apart = re.fullmatch(r"(.*\d)\s+([A-Za-z\u00b5\u03bc\u03a9][\w/^.-]{0,20})", value.text)
    if apart and not is_stated([apart[2]]):
        value = value._replace(text=apart[1], unit=apart[2])
    number = as_number(value.text)
    return None if number is None else (value, number)


def equal_numbers(wanted: Value, found: Value) -> bool:
    """Return whether two plain numbers are equal; the side without a percent sign counts as exact."""
    number, other = as_number(wanted.text), as_number(found.text)
    if number is None or other is None:
        return False
    if is_close(number, other, wanted.text, found.text):
        return True
    if wanted.is_percent == found.is_percent:
        return False
    if wanted.is_percent:  # 41/125 and 0.328 alike are 32.8 %
        return is_close(number, 100 * other, wanted.text, "")
    # 5% is 0.05, but a question for a fraction is not answered by a percentage.
    is_decimal = not re.search(r"/|\\frac", wanted.text)
    return found.is_percent and is_decimal and is_close(100 * number, other, "", found.text)


def _stands_for_number(gold: Value, pred: Value) -> bool:
    r"""Return whether an expression may stand for a gold number without being evaluated.

    It may if it is one root or power of numerals, an exact form with roots or \pi for a rounded decimal, or
    an angle in radians for degrees.
    """
    tree = None if (_NAMES.search(pred.text) or RELATION.search(pred.text)) else tree_of(pred.text)
    return tree is not None and (
        is_notation(tree)
        or (
            ("." in gold.text or gold.is_percent or gold.in_degrees)
            and is_exact_form(tree)
            and is_irrational(pred.text)
        )
    )


def _signed(items: list[str]) -> list[str]:
    return [sign for item in items for sign in both_signs(item)]


def _decimal_comma(text: str) -> str | None:
    """Return a number with a decimal comma with a point, or None for other texts and for lists of digits."""
    match = re.fullmatch(r"(-?(?:\d+(?=,\d\d)|0|\d{2,})),(\d{1,2}|\d{4,})", text)
    return f"{match[1]}.{match[2]}" if match else None


def _match(golds: list[str], preds: list[str], nesting: int) -> bool:
    """Return whether each element has its counterpart, in any order.

    Elements are matched by name if all have names (a = 1, b = 2).
    """
    if len(golds) != len(preds):  # an element may be repeated
        golds, preds = list(dict.fromkeys(golds)), list(dict.fromkeys(preds))
    if len(golds) != len(preds) or len(golds) > MAX_ITEMS:
        return False
    by_name, rest_by_name = (
        {_letters(item.partition("=")[0]): item for item in items if item.count("=") == 1}
        for items in (golds, preds)
    )
    if len(by_name) == len(golds) and by_name.keys() == rest_by_name.keys():
        return all(equal_answers(by_name[name], rest_by_name[name], nesting) for name in by_name)
    rest = list(preds)
    for wanted in golds:
        index = next((i for i, found in enumerate(rest) if _letters(wanted) == _letters(found)), None)
        if index is None:
            index = next((i for i, found in enumerate(rest) if equal_answers(wanted, found, nesting)), None)
        if index is None:
            return False
        del rest[index]
    return True


_COMPARERS: dict[Kind, Callable[[str, str, int], bool]] = {
    Kind.CHOICE: _equal_choices,
    Kind.WORDS: _equal_words,
    Kind.LIST: _equal_lists,
    Kind.SET: _equal_sets,
    Kind.ORDERED: _equal_ordered,
    Kind.REGION: lambda gold, pred, _: _equal_regions(gold, pred),
    Kind.INEQUALITY: _equal_inequalities,
    Kind.EQUATION: _equal_equations,
    Kind.VALUE: _equal_values,
}

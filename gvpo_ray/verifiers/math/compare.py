"""Comparison of two normalised answers: lists and structure first, then words and numbers, and sympy last."""

from __future__ import annotations

import re

from gvpo_ray.verifiers.math.extract import MAX_ITEMS
from gvpo_ray.verifiers.math.normalise import trim
from gvpo_ray.verifiers.math.numbers import BASE, as_number, is_close, same_unit, value_and_unit
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
from gvpo_ray.verifiers.math.symbolic import equal_equations, sympy_equal
from gvpo_ray.verifiers.math.words import NUMERALS, as_option, is_words, same_words


def equal_answers(gold: str, pred: str, nesting: int = 0) -> bool:
    """Return whether two normalised answers are the same mathematics, or the same words.

    Args:
        gold: the gold answer, normalised.
        pred: the answer to compare, normalised.
        nesting: depth of the recursion into lists and brackets; beyond 6 only equal texts are equal.
    """
    if gold == pred or _letters(gold) == _letters(pred):
        return True
    if not pred or nesting > 6:
        return False
    number, other = as_number(gold), as_number(NUMERALS.get(pred.lower(), pred))
    if number is not None and other is not None:
        return is_close(number, other, gold, pred)
    if too_large(pred) or too_large(gold):
        return False
    if re.search(r"[A-J]", gold) and (letter := as_option(gold)) is not None:
        return as_option(pred) == letter
    if is_words(gold):
        return same_words(gold, pred)
    option = re.fullmatch(r"(?:\\text\{)?\s*\([A-J]\)\s*\}?\s*(.+)", pred)
    if option and not gold.startswith("("):
        pred = trim(option[1])  # "(C) 12"
    golds, preds = items_of(gold), items_of(pred)
    if len(golds) == len(preds) == 1:
        return _equal_items(golds[0], preds[0], nesting)
    return _equal_lists(golds, preds, nesting) or (r"\setminus" in gold + pred and sympy_equal(gold, pred))


def _letters(text: str) -> str:
    r"""Return a text without spaces, needless braces and \text{}."""
    return re.sub(r"([_^])\{\s*(\w)\s*\}|\s+", r"\1\2", re.sub(r"\\text\{([^{}]*)\}", r"\1", text))


def _equal_lists(golds: list[str], preds: list[str], nesting: int) -> bool:
    """Return whether two answers are equal of which at least one lists several items."""
    if max(len(golds), len(preds)) > MAX_ITEMS:
        return False
    if min(len(golds), len(preds)) > 1:
        return _match(golds, preds, nesting)
    one, many = (golds[0], preds) if len(golds) == 1 else (preds[0], golds)
    decimal = re.fullmatch(r"(-?\d+),(\d{1,2}|\d{4,})", ",".join(many))
    if decimal and ("." in one or many is preds):  # a decimal comma
        number = f"{decimal[1]}.{decimal[2]}"
        return (
            equal_answers(one, number, nesting + 1)
            if many is preds
            else equal_answers(number, one, nesting + 1)
        )
    opening, elements, _ = bracketed(right_side(one)) or ("", [], "")
    if opening == "(":  # x = 1, y = 2 for (1, 2)
        return len(elements) == len(many) and all(
            equal_answers(a, b, nesting + 1)
            for a, b in (
                zip(elements, many, strict=True) if many is preds else zip(many, elements, strict=True)
            )
        )
    if opening != r"\{":
        return False
    elements = [sign for element in elements for sign in both_signs(element)]
    return _match(elements, many, nesting) if many is preds else _match(many, elements, nesting)


def _match(golds: list[str], preds: list[str], nesting: int) -> bool:
    """Return whether each element has its counterpart, in any order.

    Elements are matched by name if all have names (a = 1, b = 2).
    """
    if len(golds) != len(preds):  # an element may be repeated
        golds, preds = list(dict.fromkeys(golds)), list(dict.fromkeys(preds))
    if len(golds) != len(preds):
        return False
    by_name, rest_by_name = (
        {_letters(item.partition("=")[0]): item for item in items if item.count("=") == 1}
        for items in (golds, preds)
    )
    if len(by_name) == len(golds) and by_name.keys() == rest_by_name.keys():
        return all(_equal_items(by_name[name], rest_by_name[name], nesting + 1) for name in by_name)
    rest = list(preds)
    for wanted in golds:
        index = next((i for i, found in enumerate(rest) if _letters(wanted) == _letters(found)), None)
        if index is None:
            index = next(
                (i for i, found in enumerate(rest) if _equal_items(wanted, found, nesting + 1)), None
            )
        if index is None:
            return False
        del rest[index]
    return True


def _equal_items(gold: str, pred: str, nesting: int) -> bool:
    """Return whether two answers are equal of which neither lists several items."""
    gold, pred = (trim(QUALIFIER.sub("", text)) or text for text in (gold, pred))
    relations, (gold, pred) = (gold, pred), (as_interval(gold), as_interval(pred))
    if (RELATION.search(gold) or RELATION.search(pred)) and sympy_equal(*relations):
        return True
    gold_value, pred_value = right_side(gold), right_side(pred)
    if gold_value != gold or pred_value != pred:
        argument, other = (re.match(r"[A-Za-z]\s*\(\s*([a-z])\s*\)\s*=", text) for text in (gold, pred))
        if argument and other:  # f(z) = z is f(x) = x
            pred_value = re.sub(rf"(?<![a-zA-Z\\]){other[1]}(?![a-zA-Z])", argument[1], pred_value)
        return equal_answers(gold_value, pred_value, nesting + 1) or equal_equations(gold, pred)
    inside, other_inside = bracketed(gold), bracketed(pred)
    if inside and other_inside:
        elements, other_elements = inside[1], other_inside[1]
        if (inside[0], inside[2]) != (other_inside[0], other_inside[2]) and not len(elements) == len(
            other_elements
        ) == 1:
            return False
        if inside[0] == r"\{":
            return _match(
                [s for e in elements for s in both_signs(e)],
                [s for e in other_elements for s in both_signs(e)],
                nesting,
            )
        return len(elements) == len(other_elements) and all(
            equal_answers(a, b, nesting + 1) for a, b in zip(elements, other_elements, strict=True)
        )
    if inside and len(inside[1]) == 1 and inside[0] != "[":  # (5), {5}
        return equal_answers(inside[1][0], pred, nesting + 1)
    if other_inside and len(other_inside[1]) == 1 and other_inside[0] != "[":
        return equal_answers(gold, other_inside[1][0], nesting + 1)
    return _equal_values(gold, pred) or equal_equations(gold, pred)


def _equal_values(gold: str, pred: str) -> bool:
    """Return whether two numbers or expressions are equal, units included.

    A percent sign may be left out (35 for 35%) or be meant as a hundredth (0.35 for 35%).
    """
    gold, gold_unit, gold_percent, gold_degrees = value_and_unit(gold)
    pred, pred_unit, pred_percent, pred_degrees = value_and_unit(pred)
    if not same_unit(gold_unit, pred_unit):
        return False
    base, other_base = BASE.fullmatch(gold), BASE.fullmatch(pred)
    if base or other_base:  # 1011_2; one of both may leave the base out
        return (base[1] if base else gold) == (other_base[1] if other_base else pred) and not (
            base and other_base and base[2] != other_base[2]
        )
    number, other = as_number(gold), as_number(pred)
    if number is not None and other is not None and gold_degrees == pred_degrees:
        if is_close(number, other, gold, pred):
            return True
        # The side without a percent sign counts as exact: 41/125 and 0.328 alike are 32.8 %.
        return gold_percent != pred_percent and (
            is_close(number, 100 * other, gold, "")
            if gold_percent
            else is_close(100 * number, other, "", pred)
        )
    if sympy_equal(gold, pred, gold_degrees, pred_degrees):
        return True
    return gold_percent != pred_percent and sympy_equal(
        gold if gold_percent else f"100({gold})", pred if pred_percent else f"100({pred})"
    )

"""Expressions and equations are compared symbolically, with sympy."""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import Any

from gvpo_ray.verifiers.math.numbers import is_close
from gvpo_ray.verifiers.math.structure import too_large

_EXPLOSIVE = re.compile(
    r"\d\^-?[\w.\\]+\^-?[\w.\\]+\^|\^-?\d{6}|\^\d+\^\d{3}|\d{3}\^\d{5}"  # towers of exponents
    r"|!\W{0,3}!|\d{5}!|\d\^[\d.]+!|\d!\^"  # factorials of factorials
)
_UNREADABLE = re.compile(r"['\"]|__|\d\s+\d|(?<![A-Za-z\\{])(?:[A-Za-z]{4,}|[A-Za-z]{2,} [A-Za-z]{2,})")
"""Texts that the LaTeX grammar misreads: it drops quotes (f' is not f), adds numbers that stand side by side,
and multiplies the letters of words."""
_INDEXED = {"e": r"\varepsilon ", "E": r"\Xi ", "i": r"\iota ", "I": r"\Lambda "}
"""Names for constants that have an index: e_1 is a name, and the grammar takes no index on a constant."""
_POINTS = (
    "0.7390851332151607",
    "1.3247179572447460",
    "2.6220575542921198",
    "-0.5671432904097838",
    "-1.7632228343518968",
)


Tree = str | tuple[Any, ...]
"""A syntax tree: a name or numeral, or (operator, operand, ...), such as ("+", "x", ("/", "1", "2"))."""


def _as_latex(text: str) -> str | None:
    """Return a text as the LaTeX grammar wants it; None if it is no mathematics, or too costly."""
    from latex2sympy2_extended import NormalizationConfig, normalize_latex

    if (
        not text
        or too_large(text)
        or _UNREADABLE.search(text)
        or _EXPLOSIVE.search(re.sub(r"[\s{}()\[\]]", "", text))
    ):
        return None
    # 10(26) and (10)(26) are products; the grammar would add them like a mixed number.
    text = re.sub(r"(?<![\w.^_}\\])(\d[\d.]*)\s*\(", r"\1 \\cdot (", text)
    text = re.sub(r"\)\s*(?=[\d(])", r") \\cdot ", text)
    text = re.sub(r"(?<![A-Za-z\\])[eEiI](?=_)", lambda m: _INDEXED[m[0]], text)
    config = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    return str(normalize_latex(text, config))


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Any:
    """Parse LaTeX into a sympy object; None if it is no mathematics, or would cost more than any answer."""
    from latex2sympy2_extended import latex2sympy
    from math_verify.grader import should_treat_as_complex

    try:
        if (latex := _as_latex(text)) is None:
            return None
        return latex2sympy(
            latex,
            is_real=not should_treat_as_complex(latex),
            convert_degrees=False,
            normalization_config=None,
        )
    except MemoryError:
        raise
    except Exception:  # the parser and sympy raise anything on untrusted text
        return None


@functools.lru_cache(maxsize=256)
def tree_of(text: str) -> Tree | None:
    """Parse LaTeX into the tree that it is written as; None if the grammar of `parse` cannot read it.

    sympy's objects would not do, because some values are computed as they are made: 84/210, and -(-5).
    """
    from antlr4 import CommonTokenStream, InputStream
    from latex2sympy2_extended.antlr_parser import PSLexer, PSParser

    try:
        if (latex := _as_latex(text)) is None:
            return None
        lexer = PSLexer(InputStream(latex))
        parser = PSParser(CommonTokenStream(lexer))
        for part in (lexer, parser):
            part.removeErrorListeners()  # they print
        found = _tree(parser.math())
        return None if parser.getNumberOfSyntaxErrors() else found
    except MemoryError:
        raise
    except Exception:  # as above
        return None


def _tree(node: Any) -> Tree:
    """Return the tree of a node of the grammar, without its brackets."""
    children = [child for child in getattr(node, "children", None) or () if child.getText() != "<EOF>"]
    kind = type(node).__name__.removesuffix("Context").removesuffix("_nofunc")
    rules = [child for child in children if hasattr(child, "children")]
    first = children[0].getText() if children else ""
    if kind == "Func" and node.FUNC_SQRT():
        return "root", _tree(node.root) if node.root else "2", _tree(node.base)
    if kind == "Func" and not node.EXP_E():
        name = first.lstrip("\\").strip()
        return name, *(_tree(rule) for rule in rules if rule is not children[0])
    if kind == "Frac":
        is_derivative = re.match(r"(?:d|\\partial)\s*\\?[a-z]+$", rules[1].getText())
        return ("derivative" if is_derivative else "/"), *map(_tree, rules)
    if kind in ("Atom_expr", "Func") and (power := node.supexpr()):
        return "^", "".join(child.getText() for child in children if child is not power), _tree(power)
    if kind in ("Atom_expr", "Number_subexpr") or not rules:
        return str(node.getText())
    if len(children) == 1:
        return _tree(children[0])
    sign = {r"\cdot": "*", r"\times": "*", r"\div": "/", ":": "/"}.get(
        text := children[1].getText().strip(), text
    )
    operands = [_tree(rule) for rule in rules]
    if kind == "Exp" and sign == "^":
        base, power = operands[:2]
        is_root = power[0] == "/" and power[1] == "1"
        return ("root", power[2], base) if is_root else ("^", base, power)
    if kind in ("Additive", "Mp") and sign in "+-*/":
        if sign == "/":
            return "/", *operands
        left, right = operands[0], ("-", operands[1]) if sign == "-" else operands[1]
        head = "*" if sign == "*" else "+"
        return head, *(part for side in (left, right) for part in (side[1:] if side[0] == head else (side,)))
    if kind == "Unary" and first in ("+", "-"):
        return operands[0] if first == "+" else ("-", operands[0])
    if kind == "Unary":
        return "*", *operands
    if kind == "Postfix":
        return (sign if sign == "!" else "postfix"), operands[0]
    if len(operands) == 1 and not kind.endswith("_group"):
        return operands[0]
    return ("*", *operands) if kind == "Unary" else (kind.lower(), *operands)


def sympy_equal(gold: str, pred: str, gold_degrees: bool = False, pred_degrees: bool = False) -> bool:
    """Return whether two expressions, relations, matrices or sets are equal; False if one is unreadable.

    Args:
        gold: LaTeX of the gold answer.
        pred: LaTeX of the answer to compare.
        gold_degrees: whether gold is in degrees; pred is then converted from radians if it has pi.
        pred_degrees: the same for pred.

    Raises:
        MemoryError: sympy ran out of memory. Its other errors mean "not equal".
    """
    left, right = parse(gold), parse(pred)
    if left is None or right is None:
        return False
    import math_verify.grader
    from sympy import Expr, pi

    math_verify.grader.TIMEOUT_WARNING_SHOWN = True  # it has no time limit on purpose: the sandbox has one
    try:
        if all(getattr(side, "is_Equality", False) for side in (left, right)):
            differences = [side.lhs - side.rhs for side in (left, right)]
            if (same := _same_up_to_a_factor(*differences)) is not None:
                return same
        if any(not isinstance(side, Expr) or getattr(side, "is_Matrix", False) for side in (left, right)):
            return bool(math_verify.verify(left, right, timeout_seconds=None))
        if gold_degrees and not pred_degrees and right.has(pi):  # radians
            left = left * pi / 180
        elif pred_degrees and not gold_degrees and left.has(pi):
            right = right * pi / 180
        return _same_expression(left, right, gold, pred)
    except MemoryError:
        raise
    except Exception:  # as above
        return False


def is_irrational(text: str) -> bool:
    """Return whether an expression is a number, and surely no fraction."""
    return getattr(parse(text), "is_rational", None) is False


def equal_equations(gold: str, pred: str) -> bool:
    """Return whether two equations are equal, or a gold equation and its solution are.

    The solution is an expression for the one name that it lacks: -x^2 - 1 for y + 1 = -x^2.

    Raises:
        MemoryError: sympy ran out of memory. Its other errors mean "not equal".
    """
    if "=" not in gold:
        return False
    if "=" in pred:
        return sympy_equal(gold, pred)
    relation, value = parse(gold), parse(pred)
    if value is None or not getattr(relation, "is_Equality", False):
        return False
    try:
        names = relation.free_symbols - value.free_symbols
        difference = relation.lhs - relation.rhs
        if len(names) != 1 or not value.free_symbols:
            return False
        name = names.pop()
        if name in difference.diff(name).free_symbols:  # x^2 = 4 has more than one solution
            return False
        return _same_expression(difference.subs(name, value), value - value, "", "")
    except MemoryError:
        raise
    except Exception:  # as above
        return False


def _same_up_to_a_factor(gold: Any, pred: Any) -> bool | None:
    """Return whether two equations differ by a constant factor only, such as 2y - 4x - 2 and y - 2x - 1.

    The arguments are the expressions that the equations set to zero. None means that sympy has to decide, as
    for (x - 1)^2 and x - 1. Equations that are no polynomials then count as different, because sympy would
    take minutes to solve them.
    """
    from sympy import Float

    symbols = sorted(gold.free_symbols, key=str)
    if set(symbols) != pred.free_symbols or not symbols:
        return None
    ratios = []
    for shift in range(len(_POINTS)):
        values = {
            symbol: Float(_POINTS[(i * 2 + shift) % len(_POINTS)], 30) + i for i, symbol in enumerate(symbols)
        }
        a, b = (side.subs(values).evalf(30) for side in (gold, pred))
        if a.is_number and b.is_number and a.is_finite and b.is_finite and a != 0 and b != 0:
            ratios.append(a / b)
    if len(ratios) >= 2 and all(abs(ratio - ratios[0]) <= 1e-12 * abs(ratios[0]) for ratio in ratios):
        return True
    return None if gold.is_polynomial(*symbols) and pred.is_polynomial(*symbols) else False


def _same_expression(gold: Any, pred: Any, gold_text: str, pred_text: str) -> bool:
    """Return whether two expressions have the same value at several points.

    Simplifying their difference would be slower and find less.
    """
    from sympy import Float, I

    only_gold, only_pred = gold.free_symbols - pred.free_symbols, pred.free_symbols - gold.free_symbols
    if len(only_gold) == len(only_pred) == 1:
        name, other = only_gold.pop(), only_pred.pop()
        if str(name).lower() == str(other).lower():
            pred = pred.subs(other, name)
    if not gold.free_symbols and gold.is_real is False:
        pred = pred.subs({name: I for name in pred.free_symbols if str(name) == "i"})
    symbols = sorted(gold.free_symbols | pred.free_symbols, key=str)
    if not symbols:
        a, b = gold.evalf(30), pred.evalf(30)
        if not (a.is_real and b.is_real):
            return bool(abs(a - b) < 1e-12 * (1 + abs(a)))
        # too large or too small for a fraction
        if not all(value == 0 or 1e-300 < abs(value) < 1e300 for value in (a, b)):
            return bool(gold == pred)
        return is_close(Fraction(str(a)), Fraction(str(b)), gold_text, pred_text)
    num_agreed = 0
    for shift in range(len(_POINTS)):
        values = {
            symbol: Float(_POINTS[(i * 2 + shift) % len(_POINTS)], 30) + i for i, symbol in enumerate(symbols)
        }
        a, b = (side.subs(values).evalf(30) for side in (gold, pred))
        if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
            continue  # such as a logarithm of a negative number
        if abs(a - b) > 1e-12 * max(abs(a), abs(b), 1e-12):
            return False
        num_agreed += 1
    return num_agreed >= 2

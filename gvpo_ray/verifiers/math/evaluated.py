"""An answer has to be evaluated: a value, and not the expression that the question asks to evaluate.

An expression that the prompt contains has the right value without any work. So where the gold answer is a
value, an answer may have no more left to compute than the gold answer has. What is left is counted on the
syntax tree (math/symbolic.py), which keeps every sign, bracket and numeral as the answer has it. Where the
prompt gives the gold answer's polynomial in its other form (written out, or in factors), the question is
about the form, and an answer must have the gold answer's.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

from gvpo_ray.verifiers.math.extract import MATH
from gvpo_ray.verifiers.math.normalise import normalise
from gvpo_ray.verifiers.math.numbers import as_number
from gvpo_ray.verifiers.math.symbolic import Tree, tree_of

_NUMERAL = re.compile(r"\d+\.?\d*|\.\d+")
_NAMES = re.compile(r"(?<![A-Za-z\\])[a-zA-Z](?![A-Za-z])")
_ARITHMETIC = frozenset(["+", "-", "*", "/", "^", "root"])
_CONSTANTS = frozenset([r"\pi", "e", "i"])
_FAMILIES = {
    name: family
    for family, names in {
        "trigonometry": "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh",
        "logarithm": "log ln lg",
        "rounding": "floor_group ceil_group",
    }.items()
    for name in names.split()
}
_BIG = frozenset(["int", "iint", "oint", "sum", "prod", "lim", "derivative"])
"""Operators that an answer has only where the gold answer has them, even if they are taken of names."""
_MAX_RADICAND = 10**9
"""Radicand above which no square factor is looked for."""


class _Product(NamedTuple):
    """A _Product is a term taken apart into its factors."""

    num_signs: int
    num_fractions_below: int
    """Fractions in a denominator."""
    above: list[Tree]
    """Factors of the numerator; the 1 of 1/x is left out."""
    below: list[Tree]
    """Factors of the denominator."""


def _product(tree: Tree) -> _Product:
    head, *operands = tree if not isinstance(tree, str) else ("",)
    if head == "-":
        inner = _product(operands[0])
        return inner._replace(num_signs=inner.num_signs + 1)
    if head == "*":
        parts = [_product(operand) for operand in operands]
        return _Product(
            sum(part.num_signs for part in parts),
            sum(part.num_fractions_below for part in parts),
            [factor for part in parts for factor in part.above],
            [factor for part in parts for factor in part.below],
        )
    if head == "/":
        top, bottom = map(_product, operands)
        return _Product(
            top.num_signs + bottom.num_signs,
            top.num_fractions_below + bottom.num_fractions_below + bool(bottom.below),
            [*([] if top.above == ["1"] else top.above), *bottom.below],
            [*top.below, *bottom.above],
        )
    return _Product(0, 0, [tree], [])


def _leaves(tree: Tree) -> list[str]:
    return [tree] if isinstance(tree, str) else [leaf for part in tree[1:] for leaf in _leaves(part)]


def _is_numeral(tree: Tree) -> bool:
    return isinstance(tree, str) and _NUMERAL.fullmatch(tree) is not None


def _is_zero(tree: Tree) -> bool:
    return _is_numeral(tree) and Fraction(str(tree)) == 0


def _is_rational(tree: Tree) -> bool:
    """Return whether a tree has numerals and the four operations and powers alone."""
    return _is_numeral(tree) or (
        not isinstance(tree, str)
        and tree[0] in _ARITHMETIC - {"root"}
        and all(map(_is_rational, tree[1:]))
        and (tree[0] != "^" or tree[2][0] != "/")  # 2^{2/3} is a root
    )


def _is_constant(tree: Tree) -> bool:
    return all(_is_numeral(leaf) or leaf in _CONSTANTS for leaf in _leaves(tree))


def _radicand(tree: Tree) -> Tree:
    """Return a root without what can be taken out of it; 1 if nothing is left, as of sqrt(9/4)."""
    assert not isinstance(tree, str)
    index, inside = tree[1:]
    top, bottom = (inside[1], inside[2]) if inside[0] == "/" and len(inside) == 3 else (inside, "1")
    if not (_is_numeral(top) and _is_numeral(bottom) and re.fullmatch("[2-9]", str(index))):
        return tree
    value, k = Fraction(top) / (Fraction(bottom) or 1), int(index)
    n = value.numerator * value.denominator ** (k - 1)
    if n > _MAX_RADICAND:
        return tree
    factor = 2
    while factor**k <= n:
        while n % factor**k == 0:
            n //= factor**k
        factor += 1
    return "1" if n == 1 else ("root", index, str(n))


def _base(tree: Tree) -> Tree:
    """Return the base of a power with an exponent in numerals; any other tree is its own base."""
    return tree[1] if tree[0] == "^" and len(tree) == 3 and _is_rational(tree[2]) else tree


def _names_of(term: Tree) -> str:
    """Return what a term has beside its rational factor: equal for terms that can be added up."""
    _, _, above, below = _product(term)
    rests = (
        sorted(
            str(form(_radicand(factor) if factor[0] == "root" else factor))
            for factor in factors
            if not _is_rational(factor)
        )
        for factors in (above, below)
    )
    return str([[text for text in rest if text != "1"] for rest in rests])


def left_to_compute(tree: Tree) -> int:
    """Count what is left to compute in a value.

    These count: numbers or like terms that can be added; numbers or roots that can be multiplied; a factor 1,
    a term 0, a second sign, a fraction below a fraction; what can be cancelled; powers of numbers; roots that
    are rational; and without names also products and powers of sums. A fraction that can be reduced does not
    count, nor does a root that can be drawn in part.
    """
    if isinstance(tree, str):
        return 0
    head, *parts = tree
    own = 0
    if head == "+":
        names = [_names_of(term) for term in parts]
        own = len(names) - len(set(names)) + sum(any(map(_is_zero, _product(term).above)) for term in parts)
    elif head in ("-", "*", "/"):
        signs, fractions, above, below = _product(tree)
        own = max(0, signs - 1) + fractions + below.count("1") + (above.count("1") if len(above) > 1 else 0)
        for factors in (above, below):
            roots = [f[1] for f in factors if f[0] == "root" and _is_rational(f[2])]
            sums = [f for f in factors if f[0] == "+" and not isinstance(f, str) and _is_constant(f)]
            own += max(0, sum(map(_is_rational, factors)) - 1)
            own += len(roots) - len(set(roots)) + max(0, len(sums) - 1)
        own += len({str(_base(f)) for f in above} & {str(_base(f)) for f in below})
        parts = [*above, *below]
    elif head == "^":
        base, exponent = parts
        is_whole = re.fullmatch(r"\d+", str(exponent[1] if exponent[0] == "-" else exponent)) is not None
        is_number = _is_rational(base) or base == "i" or (base[0] == "+" and _is_constant(base))
        own = exponent in ("0", "1") or (is_number and is_whole)
    elif head == "root":
        own = parts[0] in ("0", "1") or _radicand(tree) == "1"
    return own + sum(map(left_to_compute, parts))


def _depth_of_roots(tree: Tree) -> int:
    if isinstance(tree, str):
        return 0
    return int(tree[0] == "root") + max(map(_depth_of_roots, tree[1:]), default=0)


def _functions(tree: Tree) -> set[str]:
    """Return the families of the functions that are taken of constants, and of the operators in _BIG."""
    if isinstance(tree, str):
        return set()
    head = tree[0].lstrip("\\")
    is_open = head not in _ARITHMETIC and (head in _BIG or _is_constant(tree))
    return set().union({_FAMILIES.get(head, head)} if is_open else (), *map(_functions, tree[1:]))


def is_notation(tree: Tree) -> bool:
    """Return whether a tree is one fraction, root or power of numerals, which is a way to write a number."""
    if tree[0] == "-":
        tree = tree[1]
    if isinstance(tree, str) or tree[0] not in ("/", "^", "root"):
        return False
    *first, last = tree[1:]
    return all(map(_is_numeral, [*first, last[1] if tree[0] == "^" and last[0] == "-" else last]))


def is_exact_form(tree: Tree) -> bool:
    r"""Return whether a tree is a sum of roots and multiples of \pi in which nothing is left to compute."""
    return not _functions(tree) and left_to_compute(tree) == 0


def is_unevaluated(gold: str, pred: str) -> bool:
    """Return whether an answer has more left to compute than the gold answer, both LaTeX of a value."""
    wanted, found = tree_of(gold) or "", tree_of(pred)
    return (
        found is None
        or bool(_functions(found) - _functions(wanted))
        or left_to_compute(found) > left_to_compute(wanted)
        or (_is_constant(found) and _depth_of_roots(found) > _depth_of_roots(wanted))
    )


def form(tree: Tree) -> Tree:
    """Return a tree in which terms and factors have one order and equal factors are a power."""
    if isinstance(tree, str):
        return str(Fraction(tree)) if _is_numeral(tree) else tree
    if tree[0] == "+":
        return ("+", *sorted(map(form, tree[1:]), key=str))
    if tree[0] not in ("-", "*", "/"):
        return (tree[0], *map(form, tree[1:]))
    signs, _, *sides = _product(tree)
    above, below = (sorted(map(form, side), key=str) for side in sides)
    return ("*", str(signs % 2), _powers(above), _powers(below))


def _powers(factors: list[Tree]) -> Tree:
    return ("", *(("^", f, str(n)) if (n := factors.count(f)) > 1 else f for f in dict.fromkeys(factors)))


@functools.lru_cache(maxsize=64)
def _expressions_in(prompt: str) -> dict[Tree, Tree]:
    """Return all expressions that the mathematics of a prompt contains, by their forms."""

    def expressions(tree: Tree) -> list[Tree]:
        return [tree, *([] if isinstance(tree, str) else (e for part in tree[1:] for e in expressions(part)))]

    texts = (normalise(match[0]) for match in MATH.finditer(prompt))
    trees = (tree for text in texts if (tree := tree_of(text)) is not None)
    return {form(expression): expression for tree in trees for expression in expressions(tree)}


# --- the form of a polynomial -------------------------------------------------------------------------------


def _is_whole(tree: Tree) -> bool:
    return isinstance(tree, str) and re.fullmatch(r"\d{1,2}", tree) is not None


def _is_polynomial(tree: Tree) -> bool:
    if isinstance(tree, str) or _is_constant(tree):
        return True
    if tree[0] in ("+", "-", "*"):
        return all(map(_is_polynomial, tree[1:]))
    if tree[0] in ("/", "^"):
        return _is_polynomial(tree[1]) and (_is_constant if tree[0] == "/" else _is_whole)(tree[2])
    return False


def _factors(tree: Tree) -> list[Tree]:
    """Return the factors with names of a polynomial as it is written, each as often as it occurs.

    A polynomial that is written in another way, such as with a root or as a fraction of two, has none.
    """
    _, _, above, below = _product(tree)
    if not _is_polynomial(tree) or not all(map(_is_constant, below)):
        return []
    factors: list[Tree] = []
    for factor in (factor for factor in above if not _is_constant(factor)):
        base, times = (factor[1], int(factor[2])) if factor[0] == "^" else (factor, 1)
        factors += times * (_factors(base) if base[0] in ("-", "*", "/", "^") else [base])
    return factors


def _is_in_factors(tree: Tree) -> bool:
    """Return whether a polynomial is a product in which a sum with names is a factor."""
    factors = _factors(tree)
    _, _, above, below = _product(tree)
    is_product = len(factors) > 1 or len(above) + len(below) > 1
    return is_product and any(factor[0] == "+" for factor in factors)


def _is_written_out(tree: Tree) -> bool:
    """Return whether a polynomial is a sum of products of numbers, names and powers of names."""
    return tree[0] == "+" and all(
        _is_polynomial(term) and all(isinstance(factor, str) for factor in _factors(term))
        for term in tree[1:]
    )


def _value(tree: Tree, at: Mapping[str, Fraction]) -> Fraction | None:
    """Return the value of a polynomial with rational coefficients; None for other expressions."""
    if isinstance(tree, str):
        return Fraction(tree) if _is_numeral(tree) else at.get(tree)
    head, *parts = tree
    values = [value for part in parts if (value := _value(part, at)) is not None]
    if len(values) < len(parts) or (head == "^" and not _is_whole(parts[1])):
        return None
    first, last = values[0], values[-1]
    if head in ("+", "*"):
        return functools.reduce(operator.add if head == "+" else operator.mul, values)
    if head == "/":
        return first / last if last else None
    if head == "-":
        return -first
    return Fraction(first ** int(last)) if head == "^" else None


def _is_same_polynomial(one: Tree, other: Tree) -> bool:
    names = sorted({leaf for leaf in _leaves(one) if not _is_numeral(leaf)})
    if names != sorted({leaf for leaf in _leaves(other) if not _is_numeral(leaf)}):
        return False
    points = (
        {name: Fraction(7 * k + 3 * i + 2, 3 * k + 5) for i, name in enumerate(names)} for k in range(4)
    )
    values = [(_value(one, at), _value(other, at)) for at in points]
    return all(a is not None and a == b for a, b in values)


def _lacks_form(gold: Tree, pred: Tree, prompt: str) -> bool:
    """Return whether the question asks for the gold answer's form, and an answer of its value has another.

    It asks for factors where the prompt has the polynomial written out, with nothing left to compute: an
    answer must be a product, too, of no fewer factors. It asks to write out where the prompt has factors: an
    answer must be a sum, but for a common factor that is a number.
    """
    if _is_in_factors(gold):
        is_other = _is_written_out
        has_form = _is_in_factors(pred) and len(_factors(pred)) >= len(_factors(gold))
    elif _is_written_out(gold):
        is_other = _is_in_factors
        (inner, *more) = _factors(pred) or ["1"]
        has_form = not more and _is_written_out(inner)
    else:
        return False
    return not has_form and any(
        is_other(expression) and left_to_compute(expression) == 0 and _is_same_polynomial(expression, gold)
        for expression in _expressions_in(prompt).values()
    )


_FRACTION = re.compile(
    r"\\frac\s*\{\s*-?(\d{1,300})\s*\}\s*\{\s*(\d{1,300})\s*\}"
    r"|(?<![\d./^])(\d{1,300})\s*/\s*(\d{1,300})(?![\d.])"
)
_POWER = re.compile(r"(?<![\d.])(\d{1,6})\s*\^\s*(?:\{\s*(\d{1,2})\s*\}|(\d))")


def _unevaluated(text: str) -> list[Fraction]:
    """Return the values of the fractions of a text that can be reduced, and of its powers of integers."""
    pairs = (tuple(map(int, filter(None, groups))) for groups in _FRACTION.findall(text))
    fractions = [Fraction(*pair) for pair in pairs if (pair[1] and math.gcd(*pair) > 1) or pair[1] == 1]
    return fractions + [Fraction(int(base) ** int(two or one)) for base, two, one in _POWER.findall(text)]


def is_copied(gold: str, pred: str, prompt: str) -> bool:
    """Return whether an answer that equals the gold answer by value only is taken over from the prompt.

    It is if the prompt contains it, whatever the order of its terms, and it is not written as the gold answer
    is: 0.4 or 84/210 for 2/5. Nor is one fraction, root or power whose numerals the prompt gives an answer,
    nor 168/420, which extends the prompt's fraction, nor 4^5 where the prompt has 2^10, nor a polynomial in
    another form than the question asks for. Integers are answers wherever they stand.

    Args:
        gold: the gold answer, normalised.
        pred: the answer, normalised.
        prompt: the question.
    """
    numerals, wanted = (sorted(re.findall(r"\d+(?:\.\d+)?|\.\d+", text)) for text in (pred, gold))
    if re.fullmatch(r"[-+]?\d+", pred) or (numerals == wanted and not _NAMES.search(gold)):
        return False
    tree = None if as_number(pred) is not None else tree_of(pred)
    if tree is not None and form(tree) == form(tree_of(gold) or ""):
        return False
    question = normalise(prompt)
    is_alone = re.search(r"[/^]|\\frac", pred) if tree is None else is_notation(tree)
    if is_alone and as_number(gold) is not None and "." not in gold:
        values = {*_unevaluated(question)} & {*_unevaluated(pred)}
        return {*numerals} <= {*re.findall(r"\d+(?:\.\d+)?", question)} or as_number(
            gold.lstrip("-+")
        ) in values
    plain, place = (
        re.sub(
            r"[{}()*]|\\(?:cdot|times)|(?<!\w)\s+|\s+(?!\w)",
            "",
            re.sub(r"\\frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}", r"\1/\2", text),
        )
        for text in (pred, question)
    )
    before = r"(?<![\w.])" if re.match(r"[\w.]", plain) else ""
    after = r"(?!\w|\.\d)" if re.search(r"\w$", plain) else ""
    return re.search(before + re.escape(plain) + after, place) is not None or (
        tree is not None
        and not isinstance(tree, str)
        and (form(tree) in _expressions_in(prompt) or _lacks_form(tree_of(gold) or "1", tree, prompt))
    )

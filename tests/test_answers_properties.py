"""Properties of grading: a value is right however it is written, and no other value or expression is."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gvpo_ray.verifiers.math.grade import grade
from gvpo_ray.verifiers.rewards import numeric

settings.register_profile("grading", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("grading")

WHOLE = st.integers(-9999, 9999)
COUNT = st.integers(2, 30)
FRACTION = st.builds(Fraction, st.integers(-99, 99), st.integers(2, 40)).filter(lambda f: f.denominator > 1)
NAME = st.sampled_from("abcpqrxyzuvw")
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "  # noqa: SIM905
    "seventeen eighteen nineteen".split()
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905


def is_right(answer: str, gold: str, **where: Any) -> bool:
    return grade(f"So it is $\\boxed{{{answer}}}$.", gold, **where).correct is True


def in_words(n: int) -> str:
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + ("" if n % 10 == 0 else f"-{ONES[n % 10]}")
    for size, word in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= size:
            return f"{in_words(n // size)} {word}" + ("" if n % size == 0 else f" {in_words(n % size)}")
    raise AssertionError


@st.composite
def whole_forms(draw: st.DrawFn) -> tuple[int, str]:
    """An integer, and a way to write it."""
    n = draw(WHOLE)
    k = draw(st.integers(1, 9))
    forms = [
        f"{n}", f"{n:,}", f"{n:,}".replace(",", "{,}"), f"{n}.0", f"{n:,}.00", f"({n})", f"x = {n}",
        f"x \\approx {n}", f"{n}\\text{{ apples}}", f"{n} km",
        f"{n:,}.00\\text{{ m}}^2", f"{n}^{{th}}", f"{n}^\\circ", f"\\${n}", f"({'ABCDE'[k % 5]}) {n}",
        f"\\frac{{{n * k}}}{{{k}}}", f"{n + k} - {k} = {n}", f"\\text{{minus }} {-n}" if n < 0 else f"+{n}",
        f"\\text{{negative {in_words(-n)}}}" if n < 0 else f"\\text{{{in_words(n)}}}",
        f"{n} \\text{{ or }} {n}",
    ]  # fmt: skip
    return n, draw(st.sampled_from(forms))


@given(whole_forms(), WHOLE)
def test_an_integer_is_right_however_it_is_written_and_another_one_wrong(
    form: tuple[int, str], other: int
) -> None:
    n, text = form
    assert is_right(text, str(n))
    assert n == other or not is_right(text, str(other))


@given(FRACTION, COUNT, st.integers(1, 40))
def test_a_fraction_is_right_however_it_is_written_and_another_one_wrong(
    f: Fraction, k: int, shift: int
) -> None:
    n, d = f.numerator, f.denominator
    whole, rest = divmod(abs(n), d)
    sign = "-" if n < 0 else ""
    forms = [
        f"{n}/{d}",
        f"\\frac{{{n}}}{{{d}}}",
        f"\\dfrac{{{k * n}}}{{{k * d}}}",
        f"{sign}\\tfrac{{{abs(n)}}}{{{d}}}",
    ]
    if whole:
        forms += [f"{sign}{whole}\\frac{{{rest}}}{{{d}}}", f"{sign}{whole} {rest}/{d}"]
        concatenated = Fraction(int(f"{whole}{rest}"), d)
        if concatenated != abs(f):  # 1 1/10 is 11/10
            assert not is_right(f"{sign}{whole} {rest}/{d}", f"{sign}{concatenated}")
            assert not is_right(f"{sign}{whole}{rest}/{d}", f"{sign}{whole} {rest}/{d}")
    for gold in (f"{n}/{d}", f"\\frac{{{n}}}{{{d}}}", *forms[4:]):
        for text in forms:
            assert is_right(text, gold), (text, gold)
            assert not is_right(text, f"\\frac{{{n + shift}}}{{{d}}}"), (text, gold)
    assert numeric(
        ["p"] * len(forms), [f"\\boxed{{{text}}}" for text in forms], answer=[forms[0]] * len(forms)
    ) == [1.0] * len(forms)


@st.composite
def expressions(draw: st.DrawFn, depth: int = 2) -> tuple[str, Fraction]:
    """An arithmetic expression with an operator, and its value."""

    def operand() -> tuple[str, Fraction]:
        if depth > 1 and draw(st.booleans()):
            text, value = draw(expressions(depth - 1))
            return f"({text})", value
        n = draw(st.integers(1, 60))
        return (f"{n}", Fraction(n)) if draw(st.booleans()) else (f"{n / 10:.1f}", Fraction(n, 10))

    kind = draw(
        st.sampled_from(["+", "-", "*", "/", "power", "binomial", "factorial", "root", "sum", "gcd", "mod"])
    )
    a, b = draw(st.integers(2, 12)), draw(st.integers(2, 6))
    if kind == "power":
        return f"{a}^{{{b}}}", Fraction(a**b)
    if kind == "binomial":
        return f"\\binom{{{a + b}}}{{{b}}}", Fraction(math.comb(a + b, b))
    if kind == "factorial":
        return f"\\frac{{{a + b}!}}{{{a}!{b}!}}", Fraction(math.comb(a + b, b))
    if kind == "root":
        return f"\\sqrt{{{(a * b) ** 2}}}", Fraction(a * b)
    if kind == "sum":
        return f"\\sum_{{k=1}}^{{{a}}} k", Fraction(a * (a + 1), 2)
    if kind == "gcd":
        return f"\\gcd({a * b}, {b})", Fraction(b)
    if kind == "mod":
        return f"{a * b + 1} \\bmod {b}", Fraction(1)
    (left, x), (right, y) = operand(), operand()
    if kind == "/":
        assume(y != 0)
        return (f"\\frac{{{left}}}{{{right}}}" if a % 2 else f"{left} / {right}"), x / y
    sign = {"+": "+", "-": "-", "*": ("\\cdot", "\\times", "*")[b % 3]}[kind]
    return f"{left} {sign} {right}", {"+": x + y, "-": x - y, "*": x * y}[kind]


@settings(max_examples=150)
@given(expressions(), st.sampled_from(["What is ${}$?", "Evaluate {}.", "${}=$"]))
def test_an_expression_of_the_prompt_earns_nothing_where_its_value_is_the_gold_answer(
    expression: tuple[str, Fraction], prompt: str
) -> None:
    text, value = expression
    gold = str(value) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    assume(text.replace(" ", "") not in (gold, str(value)))  # an irreducible fraction is its own value
    where = {"prompt": prompt.format(text)}
    assert not is_right(text, gold, **where)
    assert is_right(gold, gold, **where)
    assert numeric([where["prompt"]], [f"\\boxed{{{text}}}"], answer=[gold])[0] != 1.0
    if len(text.split()) > 1 and "/" not in text:  # not a fraction, a root or a power alone
        assert not is_right(text, gold)


@given(st.integers(2, 9), st.sampled_from([2, 3, 5, 6, 7, 10, 11]), st.integers(2, 9))
def test_a_root_is_right_in_its_usual_forms_and_wrong_where_something_is_left_to_compute(
    a: int, b: int, c: int
) -> None:
    gold = f"{a}\\sqrt{{{b}}}"
    for text in (
        f"\\sqrt{{{a * a * b}}}",
        f"{a} \\cdot \\sqrt{{{b}}}",
        f"\\frac{{{a * b}}}{{\\sqrt{{{b}}}}}",
    ):
        assert is_right(text, gold), text
        assert not is_right(text, f"{a + c}\\sqrt{{{b}}}"), text
    for text in (
        f"{a + c}\\sqrt{{{b}}} - {c}\\sqrt{{{b}}}",
        f"\\sqrt{{{a * a * b - c} + {c}}}",
        f"\\sqrt{{{a}^2 \\cdot {b}}}",
        f"\\sqrt{{{b}}} \\int_0^{{{a}}} 1 dx",
    ):
        assert not is_right(text, gold), text
    assert is_right(f"{c} + {gold}", f"{gold}+{c}")
    assert not is_right(f"\\sqrt{{{a * a * b}}}", gold, prompt=f"Simplify $\\sqrt{{{a * a * b}}}$.")


ELEMENTS = st.lists(st.integers(-50, 50), min_size=2, max_size=4, unique=True)


@given(ELEMENTS, st.data())
def test_a_set_or_list_has_no_order_and_a_tuple_has_one(numbers: list[int], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(numbers))
    other = [numbers[0] + 100, *numbers[1:]]
    as_set = "\\{" + ", ".join(map(str, numbers)) + "\\}"
    as_list, as_tuple = ", ".join(map(str, numbers)), "(" + ", ".join(map(str, numbers)) + ")"

    def forms(items: list[int]) -> list[str]:
        texts = list(map(str, items))
        return [
            ", ".join(texts), ",".join(texts), "\\{" + ",".join(texts) + "\\}", " \\text{ and } ".join(texts),
            ", ".join(texts[:-1]) + " or " + texts[-1], ", ".join(f"x={text}" for text in texts),
        ]  # fmt: skip

    for gold in (as_set, as_list):
        for form in forms(shuffled):
            assert is_right(form, gold), (form, gold)
        for items in (other, numbers[1:], [*numbers, 77]):
            for form in forms(items)[:5]:
                assert not is_right(form, gold), (form, gold)
        boxes = ". Then ".join(f"the case gives $\\boxed{{{number}}}$" for number in shuffled)
        assert grade(f"First {boxes}.", gold).correct is True
    assert is_right(as_tuple, as_tuple)
    assert is_right(as_list, as_tuple)
    assert (shuffled == numbers) == is_right(", ".join(map(str, shuffled)), as_tuple)
    assert not is_right(as_set, as_tuple)
    assert not any(is_right(form, str(numbers[0])) for form in forms(numbers))
    assert not any(
        is_right(form, f"{abs(numbers[0])}.{abs(numbers[1])}") for form in forms(numbers) if ", " in form
    )


@given(st.integers(-20, 20), st.integers(1, 20), st.booleans(), st.booleans())
def test_an_interval_is_an_inequality_and_its_ends_count(
    low: int, size: int, left: bool, right: bool
) -> None:
    high = low + size
    gold = f"{'[' if left else '('}{low}, {high}{']' if right else ')'}"
    signs = ("\\le" if left else "<"), ("\\leq" if right else "<")
    wrong = "<" if left else "\\le"
    assert is_right(f"{low} {signs[0]} x {signs[1]} {high}", gold)
    assert is_right(f"x \\in {gold}", gold)
    assert is_right(f"\\{{x \\mid {low} {signs[0]} x {signs[1]} {high}\\}}", gold)
    assert is_right(f"{low} {signs[0]} x \\text{{ and }} x {signs[1]} {high}", gold)
    assert not is_right(f"{low} {signs[0]} x \\text{{ or }} x {signs[1]} {high}", gold)
    assert not is_right(f"{low} {signs[0]} x \\text{{ and }} y {signs[1]} {high}", gold)
    assert is_right(f"x \\neq {low}", f"(-\\infty, {low}) \\cup ({low}, \\infty)")
    assert not is_right(f"x \\neq {high}", f"(-\\infty, {low}) \\cup ({low}, \\infty)")
    assert not is_right(f"{low} {wrong} x {signs[1]} {high}", gold)
    assert not is_right(f"{low} {signs[0]} x {signs[1]} {high + 1}", gold)


@given(NAME, NAME, st.integers(-9, 9), st.integers(-9, 9))
def test_an_expression_is_right_in_another_form_and_wrong_with_another_name(
    x: str, y: str, a: int, b: int
) -> None:
    gold = f"{x}^2 + ({a + b}){x} + ({a * b})"
    for text in (f"({x} + ({a}))({x} + ({b}))", f"({a * b}) + ({a + b}){x} + {x}^2"):
        assert is_right(text, gold), text
        assert not is_right(f"{text} + 1", gold), text
        assert x == y or not is_right(text.replace(x, y), gold), text
    assert x == y or not is_right(x, y)


@pytest.mark.parametrize("period", ["\\pi", "360^\\circ"])
@given(st.sampled_from("kmn"), st.sampled_from("kmn"))
def test_the_name_of_an_integer_parameter_is_free(period: str, k: str, n: str) -> None:
    assert is_right(f"45 + {n}{period}", f"45 + {k}{period}")
    assert is_right(f"3{n} + 1 \\text{{ for any integer }} {n}", f"3{k} + 1")


@given(st.permutations("ABCDE"))
def test_a_choice_is_one_letter(letters: list[str]) -> None:
    a, b, c = letters[:3]
    for text in (
        a,
        f"({a})",
        f"\\text{{({a})}}",
        f"{a}. blue",
        f"\\textbf{{({a})}}\\ 12",
        f"{a} because ({b}) is too large",
    ):
        assert is_right(text, a), text
        assert is_right(text, f"({a})"), text
        assert not is_right(text, b), text
    for text in (
        f"{a} or {b}",
        f"({a}) or ({b})",
        f"{a}: 3; {b}: 4",
        f"({a}) 3, ({b}) 4, ({c}) 5",
        f"{a}/{b}",
        f"{a}{b}",
        f"({a}) or {b}",
        f"({a}), maybe {b}",
    ):
        assert not any(is_right(text, letter) for letter in (a, b)), text
        assert grade(text, a).correct is not True


STATEMENTS = (
    "or more", "or less", "plus two", "times three", "squared", "factorial", "thousand", "million", "dozen",
    "hundred people", "but maybe six", "is wrong", "minus three", "to 7", "(or 6)", "7",
)  # fmt: skip


@given(st.integers(1, 99), st.sampled_from(STATEMENTS))
def test_what_is_said_about_a_number_is_no_unit(n: int, statement: str) -> None:
    for text in (f"{n} {statement}", f"{n} \\text{{ {statement}}}"):
        assert not is_right(text, str(n)), text
        score = numeric(["p"], [f"\\boxed{{{text}}}"], answer=[str(n)])[0]
        assert (score[0] if isinstance(score, tuple) else score) == 0.0, text


@given(st.sampled_from([("yes", "no"), ("True", "False"), ("no", "yes"), ("false", "true")]))
def test_a_truth_is_not_two(pair: tuple[str, str]) -> None:
    gold, other = pair
    for text in (gold, gold.upper(), f"{gold}, because it holds", f"\\text{{{gold}}}"):
        assert is_right(text, gold) and not is_right(text, other)
    for text in (
        f"{gold} or {other}",
        f"{gold}/{other}",
        f"{gold} and {other}",
        f"{gold}, {other}",
        f"not {gold}",
        f"{gold} for n even, but {other} for odd",
        f"{gold}, unless n is odd",
        f"{gold} if n is even",
    ):
        assert not is_right(text, gold), text


NOISE = (
    "-(-{})", "{} + 0", "1({})", r"\frac{{{}}}{{1}}", "({})^1", "{} + 3 - 3", r"2 \cdot \frac{{{}}}{{2}}",
)  # fmt: skip
"""What may be written around an expression without changing its value."""


@settings(max_examples=12)
@given(st.integers(2, 9), st.integers(2, 9), st.sampled_from(NOISE))
def test_noise_around_an_expression_earns_nothing_with_and_without_a_prompt(
    a: int, b: int, noise: str
) -> None:
    for gold, copied in (
        (str(Fraction(a, a * b + 1)), f"{a * b}/{b * (a * b + 1)}"),
        (f"{a}\\sqrt{{2}}", f"\\sqrt{{{2 * a * a}}}"),
        (f"x^2 + {a + b}x + {a * b}", f"(x+{a})(x+{b})"),
        (f"{a * b}\\pi", f"{a}\\pi \\cdot {b}"),
    ):
        text = noise.format(copied)
        assert not is_right(text, gold), text
        assert not is_right(text, gold, prompt=f"Simplify ${copied}$."), text
        assert is_right(gold, gold, prompt=f"Simplify ${copied}$.")


@settings(max_examples=8)
@given(NAME, st.integers(2, 9), st.integers(10, 99))
def test_a_copy_with_its_terms_in_another_order_is_a_copy(x: str, a: int, b: int) -> None:
    prompt, gold = f"Expand $({x} + {a})({x} - {b})$.", f"{x}^2 - {b - a}{x} - {a * b}"
    for text in (f"({x} - {b})({x} + {a})", f"({a} + {x})(-{b} + {x})", f"[({x}+{a})]({x}-{b})"):
        assert is_right(text, gold, prompt="Think."), text
        assert not is_right(text, gold, prompt=prompt), text
    assert is_right(f"-{a * b} + {x}^2 - {b - a}{x}", gold, prompt=prompt)


ALL = (r"\mathbb{R}", r"\mathbb R", r"(-\infty, \infty)", r"x \in \mathbb{R}", r"\text{all real numbers}")
NONE = (r"\emptyset", r"\varnothing", r"\{\}", r"\text{no solution}", "There are no real solutions", "\u2205")


@given(st.sampled_from([(ALL, NONE), (NONE, ALL)]), st.data())
def test_the_real_numbers_and_the_empty_set_have_many_names(
    sides: tuple[tuple[str, ...], tuple[str, ...]], data: st.DataObject
) -> None:
    same, other = sides
    gold = data.draw(st.sampled_from(same))
    for text in same:
        assert is_right(text, gold), (text, gold)
    for text in (*other, "0", r"(0, \infty)", r"\{0\}"):
        assert not is_right(text, gold), (text, gold)


@given(st.integers(1, 20), st.integers(1, 20))
def test_a_ratio_may_be_written_with_to_where_gold_is_a_ratio(a: int, b: int) -> None:
    for text in (f"{a} to {b}", f"{a} \\text{{ to }} {b}", f"{a}:{b}"):
        assert is_right(text, f"{a}:{b}"), text
        assert a == b or not is_right(text, f"{b}:{a}"), text
    assert not is_right(f"{a} to {b}", str(a))


def test_a_factor_that_is_a_power_of_a_number_is_no_trouble():
    gold, question = r"2^{3/2}(x+1)^2", r"Factor $2^{3/2}x^2 + 2 \cdot 2^{3/2}x + 2^{3/2}$."
    assert is_right(gold, gold, prompt=question) and is_right(r"2^{3/2}(1 + x)^2", gold, prompt=question)
    assert not is_right("(x+1)^2", gold, prompt=question)


FACTORED = st.tuples(
    NAME, st.lists(st.integers(-7, 7).filter(bool), min_size=2, max_size=2), st.integers(1, 4)
)
"""A name, roots without their signs, and a number: 3(x + 2)(x - 5)."""


def _sum(*terms: tuple[int, str]) -> str:
    """Write a sum of numbers with what stands behind each, as people do: 2x^2 - x + 3."""
    text = ""
    for number, rest in terms:
        if number:
            size = "" if abs(number) == 1 and rest else str(abs(number))
            sign = ("-" if number < 0 else "") if not text else " - " if number < 0 else " + "
            text += f"{sign}{size}{rest}"
    return text


DISGUISES = (
    "|{}|",
    r"\sqrt{{({})^2}}",
    "({})",
    "y = {}",
    r"\frac{{({}){x}}}{{{x}}}",
    "-(-({}))",
    r"{} \text{{ }}",
)
"""What may be written around a polynomial without putting it into factors."""


@settings(max_examples=6)
@given(FACTORED, st.sampled_from(DISGUISES), st.sampled_from(["Factor ${}$.", "Write ${}$ as a product."]))
def test_a_polynomial_of_the_prompt_is_no_answer_where_gold_is_its_factors(
    polynomial: tuple[str, list[int], int], disguise: str, question: str
) -> None:
    x, (p, q), number = polynomial
    a, b, c = number, number * (p + q), number * p * q
    question = question.format(_sum((a, f"{x}^2"), (b, x), (c, "")))
    one, other = _sum((1, x), (p, "")), _sum((1, x), (q, ""))
    gold = f"{number if number > 1 else ''}({one})({other})"
    copies = [_sum((a, square), (b, x), (c, "")) for square in (f"{x}^2", f"{x} \\cdot {x}")]
    nested = _sum((1, f"{x}({_sum((a, x), (b, ''))})"), (c, ""))
    for text in (*copies, disguise.format(copies[1], x=x), nested):
        assert not is_right(text, gold, prompt=question), text
    assert is_right(copies[1], gold, prompt="Think.")
    for text in (
        gold,
        gold.replace(f"({one})({other})", f"({other})({one})"),
        f"({_sum((number, x), (number * p, ''))})({other})",
        f"{number if number > 1 else ''}({_sum((-1, x), (-p, ''))})({_sum((-1, x), (-q, ''))})",
    ):
        assert is_right(text, gold, prompt=question), text
    assert not is_right(f"({one})({_sum((number, x), (number * q + 1, ''))})", gold, prompt=question)


@settings(max_examples=6)
@given(FACTORED)
def test_factors_of_the_prompt_are_no_answer_where_gold_is_written_out(
    polynomial: tuple[str, list[int], int],
) -> None:
    x, (p, q), number = polynomial
    assume(p + q)
    one, other = _sum((number, x), (number * p, "")), _sum((1, x), (q, ""))
    a, b, c = number, number * (p + q), number * p * q
    gold, question = _sum((a, f"{x}^2"), (b, x), (c, "")), f"Expand $({one})({other})$."
    nested = _sum((1, f"{x}({_sum((a, x), (b, ''))})"), (c, ""))
    for text in (nested, f"|({one})({other})|", f"({other})({one})"):
        assert not is_right(text, gold, prompt=question), text
    for text in (
        gold,
        _sum((c, ""), (b, x), (a, f"{x}^2")),
        _sum((b, x), (a, f"{x} \\cdot {x}"), (c, "")),
    ):
        assert is_right(text, gold, prompt=question), text


TIME = (("hours", "hour", "h", "hr", "hrs"), ("minutes", "minute", "min", "mins"))
LENGTH = (("feet", "foot", "ft"), ("inches", "inch", "in"))


@given(st.sampled_from([(TIME, 60), (LENGTH, 12)]), st.integers(1, 40), st.data())
def test_a_quantity_in_two_units_is_one_quantity(
    units: tuple[tuple[tuple[str, ...], tuple[str, ...]], int], whole: int, data: st.DataObject
) -> None:
    (large, small), size = units
    part = data.draw(st.integers(1, size - 1))
    join = data.draw(st.sampled_from([" ", ", ", " and ", ", and "]))
    one, other = data.draw(st.sampled_from(large)), data.draw(st.sampled_from(small))
    golds = (f"{whole * size + part} {small[0]}", f"{whole} {large[0]} {part} {small[0]}")
    for gold in golds:
        for text in (
            f"{whole} {one}{join}{part} {other}",
            f"{whole}\\text{{ {one}{join}}}{part}\\text{{ {other}}}",
            f"{whole * size + part} {other}",
        ):
            assert is_right(text, gold), (text, gold)
        for text in (
            f"{whole + 1} {one}{join}{part} {other}",
            f"{whole} {one}{join}{size - part} {other}" if 2 * part != size else f"{whole} {one}",
            f"{whole} {one}",
            f"{part} {other}",
            f"{whole} {other}{join}{part} {other}",
            f"{whole} {'metres' if large is LENGTH[0] else 'days'}{join}{part} {other}",
        ):
            assert not is_right(text, gold), (text, gold)
    assert not is_right(f"{whole} {one}{join}{part} {other}", str(whole * size + part))


def test_two_lengths_of_one_unit_are_a_list():
    for text in ("5 cm and 3 cm", "3 cm, 5 cm"):
        assert is_right(text, "5 cm, 3 cm")
    assert not is_right("8 cm", "5 cm, 3 cm")


# --- with the prompt's expression beside it ----------------------------------------------------------------


@settings(max_examples=15)
@given(factor=st.integers(2, 60), value=st.integers(2, 60), power=st.integers(2, 4))
def test_the_prompts_expression_with_its_value_behind_it_is_an_answer(
    factor: int, value: int, power: int
) -> None:
    for expression, gold in (
        (f"{factor * value}/{factor}", value),
        (f"{value}^{power}", value**power),
        (f"{factor} + {value}", factor + value),
        (f"1^{{({factor}^{{{10**8 + value}}})}}", 1),  # too large for the parser
    ):
        prompt = f"What is ${expression}$?"
        assert is_right(f"{expression} = {gold}", str(gold), prompt=prompt)
        assert not is_right(expression, str(gold), prompt=prompt)
        assert not is_right(f"{gold} = {expression}", str(gold), prompt=prompt)
        assert not is_right(f"{expression} = {gold + 1}", str(gold), prompt=prompt)


@settings(max_examples=5)
@given(bottom=st.integers(2, 30), value=st.integers(2, 60), by=st.integers(2, 20))
def test_the_prompts_fraction_or_power_in_another_form_is_not_evaluated(
    bottom: int, value: int, by: int
) -> None:
    top = value * bottom
    prompt, gold, wrong = f"What is ${top}/{bottom}$?", str(value), f"{top * by}/{bottom * by}"
    for answer in (wrong, f"x = {wrong}", f"{top}/{bottom} = {wrong}"):
        assert not is_right(answer, gold, prompt=prompt)
    assert is_right(wrong, gold, prompt="How many are there?")  # where the value had to be found
    prompt, gold, wrong = f"Compute ${value}^{{4}}$.", str(value**4), f"{value**2}^2"
    assert not is_right(wrong, gold, prompt=prompt)
    assert is_right(wrong, gold, prompt="How many are there?")
    share = Fraction(bottom, bottom + value)
    gold = f"\\frac{{{share.numerator}}}{{{share.denominator}}}"
    prompt = f"Simplify $\\frac{{{bottom * by}}}{{{(bottom + value) * by}}}$."
    assert is_right(f"{share.numerator}/{share.denominator}", gold, prompt=prompt)
    assert not is_right(f"{bottom * by * 7}/{(bottom + value) * by * 7}", gold, prompt=prompt)

"""Grading: one table by principle, a sample of other projects' cases, and input that must be refused."""

import json
from pathlib import Path

import pytest

from gvpo_ray.groups import NO_ANSWER
from gvpo_ray.verifiers.math.extract import extract
from gvpo_ray.verifiers.math.grade import grade
from gvpo_ray.verifiers.math.reward import math_reward

PRINCIPLES = {
    "percent as the gold implies": (
        [(r"35\%", "35"), ("35", r"35\%"), (r"35\%", "0.35"), (r"12.5\%", r"\frac{1}{8}"),
         ("28", "28 percent")],
        [(r"35\%", r"36\%"), (r"35\%", "3.5"), (r"35\%", "0.035")],
    ),
    "units may be missing, not different": (
        [(r"12\text{ cm}", "12"), ("12", "12 apples"), (r"10\text{ cm}^2", r"10\ \text{cm}^2"),
         ("4 hours", "4 hrs"), ("120", "120 km")],
        [(r"12\text{ cm}", r"12\text{ m}"), (r"5\text{ cents}", r"5\text{ dollars}"), ("3n", "3n + 2m"),
         ("100", r"10\text{ units}")],
    ),
    "money and separators of thousands": (
        [(r"\$36", "36"), ("36", "$36.00"), ("1234", "1,234"), (r"1{,}234", "1234"), (r"11,\! 111", "11111"),
         ("2.74", "2,74")],
        [("1234", "1,235"), ("12", "1,2"), ("1,2", "12")],
    ),
    "decimals stand for what they round": (
        [("0.333333", "1/3"), ("3.14", r"\frac{22}{7}"), (r"41.4\%", r"\sqrt{2}-1"), ("5.0", "5"),
         ("0.0625", r"\frac{1}{16}")],
        [(r"\frac{1}{3}", "0.33"), ("5", "5.001"), ("3.15", "3.14159"), ("123456", "123457"),
         ("2.23", "2.232"), (r"\pi", "3.14")],
    ),
    "mixed numbers and fractions": (
        [("3.5", r"3\frac{1}{2}"), ("2.5", "2 1/2"), (r"\frac12", "1/2"), ("3/2", r"\dfrac{6}{4}"),
         ("0.5", "\u00bd"), ("0.75", r"3:4")],
        [(r"\frac{1}{2}", "12"), (r"\frac{3}{2}", "32"), ("3/4", "4/3")],
    ),
    "products without a sign": (
        [("2xy", "2 y x"), ("1000(26)", "26000"), ("(2)(3)", "6"), ("x^2+3x+2", "(x+1)(x+2)"),
         (r"6\pi", r"6 \pi")],
        [("26000", "1026"), ("5", "(2)(3)"), ("x^2+3x+2", "(x+1)(x+3)")],
    ),
    "equivalent expressions": (
        [(r"2\sqrt{3}", r"\sqrt{12}"), (r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt{2}}"),
         (r"\sin^2 x", r"1-\cos^2 x"), (r"\binom{5}{2}", "10"),
         ("e^{2x}", "e^x e^x"), (r"\frac{a+b}{c}", r"\frac{a}{c}+\frac{b}{c}"), (r"\ln 2", r"\log 2"),
         (r"\lambda k", r"k \lambda"), (r"\frac\pi 2", r"0.5\pi"),
         (r"\frac{1}{3}E_1+E_2", r"E_{2} + E_{1}/3"), ("x^2", "x\u00b2")],
        [(r"2\sqrt{3}", r"\sqrt{11}"), ("|x|", "x"), ("x", r"\sqrt{x^2}"), ("x+1", "x+2"), ("2^{10}", "210"),
         ("-3", "3"), ("f'(x)", "f(x)")],
    ),
    "equations": (
        [("5", "x = 5"), ("x=5", "5"), ("f(x)=2x", "f(x) = 2 x"), ("f(z)=z", "f(x)=x"), ("y=2x+1", "2x+1"),
         ("y=2x+1", "y-2x=1"),
         ("y + 1 = -x^2", "-x^2-1"), ("x = 5 + 5 = 10", "10"), ("2x+3y=6", "4x+6y=12")],
        [("x=5", "x=6"), ("f(x)=2x", "f(x)=x"), ("y=2x+1", "y=2x-1"), ("x^2=4", "2"), ("5x-7y+4=0", "x+y=0")],
    ),
    "intervals and inequalities": (
        [("[0,1)", r"0 \leq x < 1"), ("x > 3", r"(3, \infty)"),
         (r"(-\infty,-1)\cup(1,\infty)", r"x<-1 \text{ or } x>1"),
         (r"x \in [0,1]", "[0, 1]"), (r"\{x \mid -2<x<3\}", "(-2,3)"), ("x < 1", "-x > -1")],
        [("[0,1)", "[0,1]"), ("x>3", r"x \ge 3"), ("x>3", "x<3"),
         (r"(-\infty,-1)\cup(1,\infty)", r"(-\infty,-1)")],
    ),
    "sets, lists and tuples": (
        [(r"\{1,2,3\}", r"\{3,2,1\}"), (r"\{1,2,3\}", "1, 2, 3"), ("1,2", r"2 \text{ and } 1"),
         (r"x=1 \text{ or } x=2", "1, 2"),
         ("(1,2)", "x=1, y=2"), ("(1,2)", "(x,y)=(1,2)"), (r"1\pm\sqrt2", r"1-\sqrt2, 1+\sqrt2"),
         ("(0,1),(1,0)", r"(1,0) \text{ and } (0,1)"),
         ("7, 14", "Ann: 14, Bob: 7"), (r"\{3,5\}", "5, 3"), (r"\{-3,5\}", "-3, 5"),
         (r"\{3, 5\}", r"3\text{ and }5"),
         ("(3,5)", "3, 5"), (r"\{-3,3\}", r"\pm 3"), (r"x=\pm 3", "x=3 or x=-3"), (r"\{3,5\}", "x=5, x=3")],
        [("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2)", r"\{1,2\}"), ("1,2,3", "1,2"), ("7", "6 or 7"),
         (r"\pm 3", "3"), ("3", r"\pm 3"),
         ("x=1,y=2", "x=2,y=1")],
    ),
    "vectors and matrices": (
        [(r"\begin{pmatrix}1\\2\end{pmatrix}", "(1, 2)"), (r"\begin{pmatrix} 1/5 \\ 2 "
                                                           r"\end{pmatrix}", r"\begin{bmatrix} 0.2 \\ 2 "
                                                                             r"\end{bmatrix}"),
         (r"\begin{pmatrix}6&8\end{pmatrix}", r"\begin{bmatrix}6 & 8\end{bmatrix}")],
        [(r"\begin{pmatrix}6&8\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix} + "
                                              r"\begin{pmatrix}5&6\end{pmatrix}"),
         (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}")],
    ),
    "degrees": (
        [(r"90^\circ", "90"), ("90", r"90^{\circ}"), (r"90^\circ", r"\frac{\pi}{2}"), ("60", "60 degrees")],
        [(r"90^\circ", "91"), (r"60^\circ", r"\frac{\pi}{6}")],
    ),
    "bases": ([("1011_2", "1011"), ("1011_2", "1011_{2}")], [("1011_2", "1011_3"), ("1011_2", "1101_2")]),
    "multiple choice": (
        [("B", "(B)"), ("B", r"\text{B}"), ("(B)", "b"), ("B", "B. blue"),
         ("B", r"\textbf{(B)}\ 12"), ("12", "(C) 12"), ("(C) 12", "12"), ("D", "D, because A is too large"),
         ("C", "The answer is (C).")],
        [("B", "C"), ("B", "(C) B"), ("A", "(A) or (B)"), ("A", "A or B"), ("A", "A: 3; B: 4"),
         ("A", "(A) 3, (B) 4, (C) 5"), ("A", "A+1"), ("a", "A+1")],
    ),
    "a value has to be evaluated": (
        [("23 + 45", "68"), (r"2^{10}", "1024"), ("15", "x = 7 + 8 = 15"),
         (r"2\sqrt6-2\sqrt3", r"-2\sqrt{3} + 2\sqrt{6}"),
         ("14", r"\frac{84}{6}"), ("2.45", r"\sqrt{6}")],
        [("68", "23 + 45"), ("4368", r"\dbinom{16}{5}"), ("2002", r"\frac{14!}{5!9!}"), ("2.18", "2.5-0.32"),
         (r"\frac{1}{3}", r"\int_0^1 x^2 dx"), ("5050", r"\sum_{i=1}^{100} i"),
         ("680", "(17+10)^2-(17-10)^2"),
         ("60", r"\sqrt[3]{30^3+40^3+50^3}"), ("26000", "1000(26)"), ("6", "(2)(3)"), ("120", "5!"),
         ("15", "x = 7 + 8"),
         (r"2 \sqrt{6} - 2 \sqrt{3}", r"\tan \frac{\pi}{24} + \tan \frac{7 \pi}{24}"),
         (r"\sqrt{13}", r"\sqrt{4+9}"),
         ("0.2", r"\sqrt{\sqrt[3]{0.000064}}"), ("5050", r"\frac{100 \cdot 101}{2}"), ("7", "-(3 - 10)"),
         (r"\frac{x^3}{3}", r"\int_0^x t^2 dt"), ("(3, 4)", "(1 + 2, 4)"), (r"\{2, 3\}", r"\{1 + 1, 3\}")],
    ),
    "numbers in words and behind signs": (
        [("11", "eleven"), ("-5", "minus 5"), ("-5", "negative five"), ("1/2", "half"),
         ("12,000,000", "12 million"),
         ("36", "3 dozen"), ("24 eggs", "two dozen eggs"), (r"\frac{5}{2}", "two and a half"), ("12", "12th"),
         ("12", r"12^\text{th}"), ("1000.99", "1,000.99 m\u00b2"), ("11", r"x \approx 11"),
         ("0.05", "5 percent"),
         (r"\sqrt{-1}", "i"), ("0.5", r"\frac{1}{2} \text{ or } 0.5"), ("12.34", "12,34")],
        [("5", "negative 5"), ("12", "12 thousand"), ("12", r"12 \text{million}"), ("3", "3 dozen"),
         ("3", "third"),
         ("12", "one two"), ("123", "1 2 3"), ("1.2", "1, 2"), ("1.2", "1,2"), ("3.14", "3 or 14"),
         ("3.14", "3; 14"),
         (r"\frac{1}{2}", r"50\%"), ("1 1/2", "11/2"), ("23/4", "2 3/4"), ("3", "[3]"), ("3", "3x"),
         ("5", "5 or more")],
    ),
    "names": (
        [(r"\frac{\pi}{2} + k\pi", r"\frac{\pi}{2} + n\pi"),
         ("(k, l) = (3x, 5x)", r"(3t, 5t) \text{ for some integer } t")],
        [("x", "n"), ("m", "t"), ("2x+1", "2n+1"), ("(3x, 5x)", "(3t, 5t)")],
    ),
    "words": (
        [(r"\text{Evelyn}", "Evelyn"), ("Yes", "yes, because 4 is even"),
         (r"\text{Alice and Bob}", "Bob and Alice"),
         ("Tuesday", r"\textbf{tuesday}."),
         ("Petya will receive the last token.", "Petya"), ("2", "two"),
         (r"\text{infinitely many}", r"\infty")],
        [("Evelyn", "Carla"), ("yes", "no"), ("yes", "yes or no"), ("yes", "yes/no"),
         ("True", "True or False"),
         ("odd", "odd or even"), ("Alice and Bob", "Alice"), ("Alice", "Alice and Bob"),
         (r"\text{infinitely many}", "3")],
    ),
}  # fmt: skip
RIGHT = [(name, gold, answer) for name, (right, _) in PRINCIPLES.items() for gold, answer in right]
WRONG = [(name, gold, answer) for name, (_, wrong) in PRINCIPLES.items() for gold, answer in wrong]
RESPONSE = "First $x = 17$ is tried, and fails.\n\nSo the final answer is $\\boxed{%s}$."


@pytest.mark.parametrize(("principle", "gold", "answer"), RIGHT)
def test_a_right_answer_is_correct_bare_and_in_a_box(principle, gold, answer):
    assert grade(answer, gold).correct is True
    if not answer.startswith("The answer"):
        assert grade(RESPONSE % answer, gold).correct is True


@pytest.mark.parametrize(("principle", "gold", "answer"), WRONG)
def test_a_wrong_answer_is_incorrect_bare_and_in_a_box(principle, gold, answer):
    assert not grade(answer, gold).correct
    assert not grade(RESPONSE % answer, gold).correct


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"So \boxed{3}, no: \boxed{4}", "4"),
        (r"The roots are $\boxed{1}$ and $\boxed{2}$.", "1 , 2"),
        (r"\boxed{3} \boxed{3}", "3"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"so $a = -\boxed{256}$", "-256"),
        (r"-\boxed{5}", "-5"),
        (r"about $\boxed{28}\%$", "28%"),
        (r"<think>\boxed{3}, or is it</think> It is \boxed{4}.", "4"),
        (r"It is $\boxed{4}$. Wait, \boxed{", "4"),
        (r"In total $\boxed{255}$ of interest. The final answer is $10455$. I hope it is correct.", "10455"),
        ("3 + 4 = <<3+4=7>>7\n#### 7", "7"),
        ("He has 7.\nA: 7", "7"),
        ("The answer is $80.", "$80"),
        ("**Final answer:** 12", "12"),
        ("Final Answer: The final answer is $12$ and $13$. I hope it is correct.", "12 , 13"),
        ("A pen costs $8. The total is $21 - $20 = $1 more than expected.", "$1"),
        ("Therefore $x \\geq 5$ is the solution.", "x \\geq 5"),
        (r"\frac{3}{4}", r"\frac{3}{4}"),
    ],
)
def test_the_answer_is_what_a_completion_ends_with(completion, answer):
    assert extract(completion).text == answer


@pytest.mark.parametrize(
    "completion",
    ["", " \n\t ", "\\boxed{42",
     "so \\boxed{\\frac{1}{2}", "<think> it is \\boxed{42}", "<think>\\boxed{42}</think>",
     "The answer is", "the answer is $\\frac{42}{1",
     "We count the ways one by one. " * 20 + "So it took 42 -",
     "We count the ways. " * 20 + "\n\\[ x = 42 \\cdot"],
)  # fmt: skip
def test_a_completion_without_an_answer_is_incorrect_and_says_so(completion):
    result = grade(completion, "42")
    assert (result.correct, result.reason, result.answer) == (False, NO_ANSWER, None)


def test_answers_in_several_boxes_make_one_answer_where_gold_has_several():
    text = r"The first root is $\boxed{2}$. By symmetry we see that the other one has to be $\boxed{3}$."
    for gold in ("2, 3", r"\{3, 2\}", "(2, 3)"):
        assert grade(text, gold).correct is True
    assert grade(text, "3").correct is True
    for gold in ("2", "2, 4", "1, 2, 3", "(3, 2)"):
        assert grade(text, gold).correct is False


def test_an_equation_that_is_still_to_be_solved_is_no_solution():
    for answer in ("2x = 10", "10 - x = 5", "x + 3 = 8", "x = 2 + 3", "2 + 3 = x"):
        assert grade(rf"\boxed{{{answer}}}", "x = 5").correct is False, answer
    for answer in ("x = 5", "5 = x", "5", "x = 2 + 3 = 5"):
        assert grade(rf"\boxed{{{answer}}}", "x = 5").correct is True, answer
    assert grade(r"\boxed{2x - y = -1}", "y = 2x + 1").correct is True


def test_a_derivative_that_is_still_to_be_taken_is_no_answer():
    assert grade(r"\boxed{\frac{d}{dx}(x^3 + x)}", "3x^2 + 1").correct is False
    assert grade(r"\boxed{\frac{d}{t}}", r"\frac{d}{t}").correct is True


def test_what_is_copied_from_the_prompt_is_no_answer_unless_gold_is_written_so():
    for prompt, copied, gold in (
        (r"Simplify $\frac{84}{144}.$", r"\frac{84}{144}", r"\frac{7}{12}"),
        (r"Simplify $\sqrt{180}$", r"\sqrt{180}", r"6\sqrt5"),
        ("What is 48 divided by 2?", "48/2", "24"),
        ("Write $0.4$ as a common fraction.", "0.4", r"\frac{2}{5}"),
        (r"Expand $(x+1)(x+2)$.", "(x+1)(x+2)", "x^2+3x+2"),
        ("Compute $2^5$.", "2^5", "32"),
        ("Factor $x^2+2x+1$.", "x^2+2x+1", "(x+1)^2"),
    ):
        for around in (
            "{}", "x = {}", "({})", "{} = {}", r"{}\text{{ apples}}", "{} or {}", "(A) {}", r"\{{{}\}}",
        ):  # fmt: skip
            text = around.format(*[copied] * around.count("{}"))
            assert grade(rf"\boxed{{{text}}}", gold, prompt=prompt).correct is False, text
        assert grade(rf"\boxed{{{copied}}}", gold, prompt="Think.").correct is True
        assert grade(rf"\boxed{{{gold}}}", gold, prompt=prompt + " " + gold).correct is True
    for prompt, copied, gold in (
        ("What is 48/2?", "x = 48/2", "x = 24"),
        ("Solve $x + 1 > 0$.", "x + 1 > 0", "x > -1"),
    ):
        assert grade(rf"\boxed{{{copied}}}", gold, prompt=prompt).correct is False
        assert grade(rf"\boxed{{{copied}}}", gold, prompt="Think.").correct is True
    assert grade(r"\boxed{\frac12}", "1/2", prompt="Is it 1/2 or 1/3?").correct is True
    assert grade(r"\boxed{36}", "36.00", prompt="Ann has 36 dollars.").correct is True
    assert math_reward(["Compute $2^5$."], [r"\boxed{2^5}"], answer=["32"]) == [0.0]


def test_of_a_truncated_completion_only_a_complete_box_counts():
    assert grade("The answer is 42", "42").correct
    assert grade("The answer is 42", "42", truncated=True).reason == NO_ANSWER
    assert grade("so \\boxed{42}, and to check, 4", "42", truncated=True).correct


@pytest.mark.parametrize("gold", ["", "  ", "$ $"])
def test_without_a_gold_answer_nothing_can_be_verified(gold):
    assert grade("\\boxed{42}", gold).correct is None


def test_a_gold_answer_that_cannot_be_understood_verifies_only_its_own_text():
    gold = r"60^\textcirc 42'"
    assert grade("\\boxed{4}", gold).correct is None
    assert "cannot be understood" in grade("\\boxed{4}", gold).reason
    assert grade(gold, gold).correct is True


@pytest.mark.components
def test_other_projects_cases_are_graded_as_they_expect() -> None:
    """The 118 slow ones are left to `gvpo-ray verify tests/data/grader_cases.jsonl`: 572 of all 596 agree."""
    lines = (Path(__file__).parent / "data" / "grader_cases.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if not row["is_slow"]]
    verdicts = [
        (
            bool(grade(row["prediction"], row["gold"], prompt=row["prompt"]).correct),
            # Two projects take these for 5 and for 4; here the model has to evaluate them.
            row["expected"] and row["prediction"] not in ("3+2", r"The answer is $\sqrt{16}$"),
        )
        for row in rows
    ]
    assert (len(lines), len(rows)) == (596, 478)
    assert sum(verdict == expected for verdict, expected in verdicts) >= 459
    # two lists in another order, an answer in bare words, a fraction that is not in lowest terms, spaces
    assert sum(verdict and not expected for verdict, expected in verdicts) <= 6


HOSTILE = {
    "a tower of exponents": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "a tower in Python": "9**9**9**9",
    "factorials of factorials": r"\boxed{((((9!)!)!)!)!}",
    "a large factorial": r"\boxed{99999999!}",
    "a large power": r"\boxed{10^{999999999}}",
    "a large exponent": r"\boxed{1e999999999}",
    "a million digits": "\\boxed{" + "9" * 10**6 + "}",
    "a million bare digits": "9" * 10**6,
    "open brackets": "(" * 10**6,
    "nested braces": "\\boxed{" + "{" * 500_000 + "}" * 500_000 + "}",
    "nested fractions": "\\boxed{" + r"\frac{1}{" * 60 + "2" + "}" * 60 + "}",
    "open boxes": r"\boxed{" * 100_000,
    "empty boxes": r"\boxed{}" * 100_000,
    "dollars": "$" * 10**6,
    "markers": "answer: " * 100_000,
    "spaces": "answer" + " " * 10**6,
    "lines": "a\n" * 500_000,
    "thoughts": "<think>" * 100_000,
    "signs": "\\boxed{" + "-" * 900 + "}",
    "subscripts": "\\boxed{" + "x_" * 400 + "}",
    "elements": "\\boxed{" + "4," * 400 + "5}",
    "NUL": "\\boxed{4\x00}",
    "a surrogate": "\\boxed{4\ud800}",
    "the other direction": "\u202e4\u202c",
    "zero width": "\\boxed{\u200b4}",
}


@pytest.mark.components
@pytest.mark.parametrize("gold", ["4", "x^2+1", "(1,2)", r"\text{Evelyn}"])
@pytest.mark.parametrize("completion", HOSTILE.values(), ids=HOSTILE)
def test_what_no_answer_looks_like_is_refused(completion, gold):
    assert grade(completion, gold).correct is False


@pytest.mark.parametrize(
    "code",
    ["__import__('pathlib').Path({!r}).touch()",
     "exec(\"open({!r}, 'w')\")", "open({!r}, 'w')", "f\"{{open({!r}, 'w')}}\"", "eval(\"open({!r}, 'w')\")",
     "().__class__.__bases__[0].__subclasses__() or open({!r}, "
     "'w')", "(lambda: open({!r}, 'w'))()", "[open({!r}, 'w') for _ in [1]]"],
)  # fmt: skip
@pytest.mark.parametrize("form", ["{}", "\\boxed{{{}}}", "The answer is {}", "${}$", "{} = 1"])
def test_python_is_never_evaluated(code, form, tmp_path):
    text = form.format(code.format(str(tmp_path / "evaluated")))
    for gold in ("1", "x+1", "(1,2)", "Evelyn"):
        assert not grade(text, gold).correct
    grade("1", text)  # nor in a gold answer
    assert not list(tmp_path.iterdir())


def test_memory_errors_come_through(monkeypatch):
    import latex2sympy2_extended

    def out_of_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(latex2sympy2_extended, "latex2sympy", out_of_memory)
    with pytest.raises(MemoryError):
        grade(r"\boxed{\sqrt{1729}+q}", r"q+\sqrt{1729}")


def test_equal_text_and_plain_numbers_need_no_sympy(monkeypatch):
    for place in ("symbolic.parse", "symbolic.tree_of", "grade.parse", "evaluated.tree_of"):
        monkeypatch.setattr(f"gvpo_ray.verifiers.math.{place}", None)
    assert grade(r"\boxed{68}", "68").needed_no_parser
    assert grade(r"\boxed{-068}", "-68", prompt="What is -23 - 45?").correct
    assert grade(r"\boxed{67}", "68").correct is False
    assert grade(r"\boxed{\frac{2}{4}}", "0.5").correct
    assert grade("10^{-3}", "0.001").correct
    assert grade(r"\boxed{x + 1}", "x+1").correct
    assert grade("The answer is 1,234.", "1235").correct is False


@pytest.mark.parametrize(
    ("gold", "copied", "own"),
    [
        ("(24,3)", "(48/2,3)", "(24,3)"),
        (r"\{3,24\}", r"\{48/2,3\}", "24, 3"),
        ("3, 24", "48/2 and 3", "24 and 3"),
    ],
)
def test_an_element_that_is_copied_from_the_prompt_earns_nothing(gold: str, copied: str, own: str) -> None:
    prompt = "Give 48/2 and 3."
    assert not grade(f"\\boxed{{{copied}}}", gold, prompt=prompt).correct
    assert grade(f"\\boxed{{{own}}}", gold, prompt=prompt).correct

"""Grading of mathematical answers: extraction -> normalisation -> comparison.

`grade` finds the answer in a completion, brings it and the gold answer into one spelling, takes both apart as far as their text
shows it (lists, tuples, sets, intervals, matrices, equations, units), and asks math-verify's parser and sympy about the leaves
that equal text and plain arithmetic leave open. The parser is a LaTeX grammar: it evaluates no Python, and nothing here does.

Completions are untrusted. Text work is linear in the completion; what no answer looks like (too long, too deep, towers of
exponents) is refused before sympy sees it. Whatever still explodes is up to the caller's limits: nothing here sets a signal,
and MemoryError comes through.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

NO_ANSWER = "no answer found in the completion"

MAX_CHARS = 1000
"""No answer is longer."""

TAIL_CHARS = 2000
"""Where an answer is looked for that no box marks."""

MAX_DEPTH = 40
"""Nested brackets: the LaTeX parser recurses."""

MAX_ITEMS = 64
"""Elements of a list: each may be compared with each."""

SHORT_CHARS = 300
"""A shorter response without any mark is a statement, which may lack its full stop; a longer one has to be finished."""


@dataclass(frozen=True)
class Grade:
    """What the grader says of one completion."""

    correct: bool | None
    """None: cannot be verified, since there is no gold answer, or it cannot be understood and the texts differ."""
    reason: str | None
    """Why `correct` is None, or NO_ANSWER; None otherwise."""
    answer: str | None
    """The text that was taken for the answer."""


@dataclass(frozen=True)
class Extraction:
    """The answer in a completion, as text."""

    text: str | None
    """None: there is none."""
    sentence: str | None = None
    """The statement that `text` is from, where no box marks it: the answer if the gold answer is words."""


def grade(completion: str, gold: str, *, truncated: bool = False) -> Grade:
    """Whether a completion's answer equals the gold answer.

    Args:
        completion: a response, or a bare answer.
        gold: the right answer, bare or marked in a solution.
        truncated: the completion was cut at the token limit, so only a complete \\boxed{...} is an answer.

    Raises:
        MemoryError: sympy needed more than there is. Its other errors mean "not equal".
    """
    wanted = _gold_text(gold)
    if not wanted:
        return Grade(None, "there is no gold answer", None)
    found = extract(completion, truncated=truncated)
    text = (found.text or "").strip()
    if not text:
        return Grade(False, NO_ANSWER, None)
    if len(text) > MAX_CHARS or any(unicodedata.category(sign)[0] == "C" and not sign.isspace() for sign in text):
        return Grade(False, None, text[:MAX_CHARS])  # control characters, surrogates, signs that turn the direction
    if _CODE.search(text):
        return Grade(normalise(text) == wanted, None, text)
    if _equal(wanted, normalise(text)) or (found.sentence and _is_words(wanted) and _equal(wanted, normalise(found.sentence[:MAX_CHARS]))):
        return Grade(True, None, text)
    if not _understood(wanted):
        return Grade(None, f"the gold answer {gold[:100]!r} cannot be understood", text)
    return Grade(False, None, text)


@functools.lru_cache(maxsize=256)
def _gold_text(gold: str) -> str:
    """A gold answer, normalised; the part that is marked as the answer if it is a solution."""
    text = extract(gold).text or gold
    return normalise(text) if len(text) <= MAX_CHARS else ""


# --- extraction ---------------------------------------------------------------------------------------------------------

_TURN = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|end|user)\|>|</s>")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_UNBRACED_BOX = re.compile(r"\\boxed\s+(\d+(?:\.\d+)?|[^\s${}\\.]+)")
_BEFORE_BOX = re.compile(r"(?:=|\$|\bis|\\\(|\\\[)\s*-\s*$")
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;.&}]|\\[()\[\],;! ]|\\\\|\\q?quad|\\text\s*\{|\b(?:and|or)\b|[A-Za-z](?:_\{?\w{1,3}\}?)?(?:\(\w\))?\s*=){0,40}"
)
_PERCENT = re.compile(r"[\s$]*(?:\\?%|percent\b|pct\b)")
_MARKER = re.compile(
    r"####|^[ \t]*A(?:nswer)?[ \t]*:|\u7b54\u6848[\u662f\u4e3a:\uff1a]+"
    r"|\b(?:final\s+answer|answer|option|choice|solution)\b(?:[^\n.:=$]{0,60}?(?:\bis\b|\bare\b|:|=)|\*\*:?)\s*:?",
    re.IGNORECASE | re.MULTILINE,
)
_NO_STATEMENT = re.compile(r"(?:also |indeed |not )?(?:correct|incorrect|wrong|right|provided|given|as follows|clear|valid)\b", re.IGNORECASE)
_MATH = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)"
    # Money is no mathematics: "$8. The total is $21", "$21 - $20".
    r"|(?<!\\)\$((?!\d[^$]*(?:\s[A-Za-z]{2,}\s[^$]*|[-+*/=]\s*)\$)(?:[^$\\]|\\.)+)\$(?!\d)",
    re.DOTALL,
)
_UNFINISHED_MATH = re.compile(r"\$(?!\s?\d)|\\(?:\[|\(|begin|end|frac|cdot|times|\\)")
_CONNECTOR = re.compile(r"\s*(?:,|;|,?\s*\b(?:and|or)\b)\s*")
_CODE = re.compile(r"__[a-z]+__|\w\(\s*[bfr]?[\"']|(?<!\\)\b(?:lambda|import|exec|eval)\b\s*[\w(:]|(?<![\w\\])[a-z_]\w*\.[a-z_]\w*\(")
_LABELS = re.compile(r"[A-Za-z]+ ?\d*:")
_SENTENCE_END = re.compile(r"\.(?=\s+[A-Z\"*\[]|\s*$|\*\*)|\n\s*\n|\n(?=\s*(?:\*\*|#|[A-Z][a-z]+\b))")
_NUMBER_IN_TEXT = re.compile(
    r"(?<![\w.^{])[-\u2212]?(?:\$|\\\$)?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\s*(?:\\?%|percent|pct)|(?=st\b|nd\b|rd\b|th\b)|(?![\w^]))|(?<!\w)-?\.\d+"
)


def extract(completion: str, *, truncated: bool = False) -> Extraction:
    """The answer in a completion: the last boxes, else what follows the last "answer is", "####" or "A:", else the conclusion.

    Of several answers the last one counts, also where a base model goes on with another question: such a completion does not
    end with its answer. Only what follows the last </think> is looked at. A box that is never closed is no answer.
    """
    text = completion.rpartition("</think>")[2].partition("<think>")[0]
    text = next((part for part in _TURN.split(text) if part.strip()), "").strip()
    boxed = _boxes(text)
    if boxed is not None:
        final = -1 if truncated else text.lower().rfind("final answer is", max(text.rfind("\\boxed"), text.rfind("\\fbox")))
        stated = _statement(text[final:].partition("is")[2][:TAIL_CHARS].lstrip(": ")) if final >= 0 else None
        return Extraction(stated or boxed)
    if truncated or not text or _BOX.search(text):
        return Extraction(None)
    tail = text[-TAIL_CHARS:]
    for marker in reversed(list(_MARKER.finditer(tail))):
        rest = tail[marker.end() :].strip().removeprefix("**").strip()
        if not _NO_STATEMENT.match(rest):  # "that answer is correct"
            return Extraction(_statement(rest), rest.partition("\n\n")[0])
    if _is_bare(text):
        return Extraction(text)
    if len(text) > SHORT_CHARS and text[-1] not in ".!?)]}$*\"'>`":
        return Extraction(None)
    return _conclusion(tail)


def _boxes(text: str) -> str | None:
    """Content of the last box, with those before it that belong to the same statement ("\\boxed{1} and \\boxed{2}")."""
    contents: list[str] = []
    begin = next_begin = len(text)
    for _ in range(MAX_ITEMS):
        begin = max(text.rfind("\\boxed", 0, begin), text.rfind("\\fbox", 0, begin))
        if begin < 0:
            break
        brace, plain = _BOX.match(text, begin), _UNBRACED_BOX.match(text, begin)
        if brace is None and plain and not contents:
            contents, next_begin = [plain[1]], begin
        close = _closing(text, brace.end()) if brace else -1
        if brace is None or close < 0:
            continue
        content = text[brace.end() + 1 : close]
        # A sign may stand before the box, a percent sign behind it.
        content = ("-" if _BEFORE_BOX.search(text[max(0, begin - 12) : begin]) else "") + content + ("%" if _PERCENT.match(text, close + 1) else "")
        if not contents or close > next_begin:  # the first, or one around those so far
            contents = [content]
        elif not _BETWEEN_BOXES.fullmatch(text, close + 1, next_begin):
            break
        elif content.strip() != contents[0].strip():
            contents.insert(0, content)
        next_begin = begin
    return " , ".join(contents) if contents else None


def _closing(text: str, opening: int) -> int:
    """Index of the brace that closes the one at `opening`; -1 if there is none within an answer's length."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening, opening + MAX_CHARS + 2):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return match.start()
    return -1


def _statement(rest: str) -> str | None:
    """The answer at the begin of what follows a marker."""
    rest = re.sub(r"^(?:\\?[\"'`*]|\s)+", "", rest)
    if math := _MATH.match(rest):
        parts, end = [_inner(math)], math.end()
        percent = _PERCENT.match(rest, end)
        while (connector := _CONNECTOR.match(rest, end)) and (math := _MATH.match(rest, connector.end())):
            parts.append(_inner(math))
            end = math.end()
        return " , ".join(parts) + ("%" if percent else "")
    statement = _SENTENCE_END.split(rest, maxsplit=1)[0].strip().strip("*").strip()
    if not statement or re.match(r"\$(?!\s?\d[\d,.]*(?:\s|$))|\\[(\[]", statement):
        return None  # mathematics that never ends; "$80" is money
    return statement if _is_bare(statement) else _conclusion(statement).text


def _conclusion(text: str) -> Extraction:
    """The answer in a response that marks none: the last mathematics or number of its last statement."""
    last = [part for part in re.split(r"\n\s*\n", text) if part.strip()][-1].strip()
    if len(text) > SHORT_CHARS and _UNFINISHED_MATH.search(_MATH.sub(" ", last).replace("\\$", "")):
        return Extraction(None)
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", last)[-1]
    if _CODE.search(sentence):
        return Extraction(None)  # no number in a program is an answer
    maths = list(_MATH.finditer(sentence))
    left, _, right = sentence[maths[-1].end() if maths else 0 :].rpartition("=")  # "36 - 24 = 12 of 30 are left"
    if numbers := _NUMBER_IN_TEXT.findall(right):
        return Extraction(numbers[0] if left else numbers[-1], sentence)
    if maths := maths or list(_MATH.finditer(last)) or list(_MATH.finditer(text)):
        return Extraction(_inner(maths[-1]), sentence)
    return Extraction(None if len(text) > SHORT_CHARS else sentence, sentence)


def _inner(math: re.Match[str]) -> str:
    return next(group for group in math.groups() if group is not None)


def _is_bare(text: str) -> bool:
    """Whether a text is an answer and nothing else: one line without prose around numbers or mathematics."""
    if len(text) > 2 * SHORT_CHARS or len(_MATH.findall(text)) > 8 or ("\n" in text and "\\begin" not in text):
        return False
    outside = re.sub(r"\\(?:text|mbox|textbf|textit|mathrm|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|</?su[bp]>", " ", _MATH.sub(" 1 ", text))
    if len(_LABELS.findall(outside)) > 1:
        outside = _LABELS.sub(" ", outside)  # "Ann: 3, Bob: 4"
    prose = [word for word in re.findall(r"[^\W\d_]{2,}", outside) if word.lower() not in ("and", "or", *_FUNCTIONS)]
    return not prose or not re.search(r"\d|\$|\\\(|=", text) or (not _MATH.search(text) and len(prose) <= 2 and not text.endswith(".."))


# --- normalisation ------------------------------------------------------------------------------------------------------

_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc log ln exp sqrt lim max min gcd lcm det mod arcsin arccos arctan sinh cosh tanh frac pi deg dim arg".split()  # noqa: SIM905
)
_UNICODE = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u00f7": "/",
    "\u2215": "/", "\u2044": "/", "\u221e": r"\infty ", "\u03c0": r"\pi ", "\u2264": r"\leq ", "\u2265": r"\geq ", "\u2260": r"\neq ",
    "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2248": r"\approx ", "\u00b1": r"\pm ", "\u00b0": r"^\circ ",
    "\u2200": r"\forall ", "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}", "\u03b8": r"\theta ", "\u03b1": r"\alpha ", "\u03b2": r"\beta ",
    "\u03bb": r"\lambda ", "\u2205": r"\emptyset ", "\u2032": "'", "\u2019": "'", "\u3001": ",", "\uff0c": ",", "\u3002": ".",
    "\u20ac": "", "\u00a3": "", "\u00a5": "", "\u20b9": "",
}  # fmt: skip
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    # Signs and marks that are no mathematics.
    ("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b\u207f]+", lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}"),
    ("[\u2460-\u2473]", lambda m: unicodedata.normalize("NFKC", m[0]) + ","),  # circled numbers are a list
    ("[\u00bc-\u00be\u2150-\u215e]", lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("\u2044"))),
    ("\u221a\\s*(\\d+|[a-z]|(?=\\())", lambda m: rf"\sqrt{{{m[1]}}}" if m[1] else r"\sqrt"),
    (r"<(sup|sub)>(.*?)</\1>", lambda m: ("^" if m[1] == "sup" else "_") + "{" + m[2] + "}"),
    (r"^\s*\*\*|\*\*\s*$", ""),  # bold
    (r"\*\*", "^"),
    (r",\s*\\!\s*|\{,\}(?=\d{3})", ""),  # the typesetter's thousands separator
    (r"\\\$|\$|\\[()](?![A-Za-z])|\\\[(?!\d+(?:pt|em|ex))|\\\](?!\w)", " "),  # money and delimiters
    (r"\\(?:left|right|[bB]ig{1,2}[lrm]?)(?![a-zA-Z])\.?|\\(?:displaystyle|limits|rm|it|bf|q?quad|thinspace)(?![a-zA-Z])", " "),
    (r"(?<!\\)\\[!,;:> ]|\\hspace\{[^{}]*\}|~", " "),
    # Synonyms.
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\frac\s*([A-Za-z\d]|\\[a-z]+)\s*(?=[\\{A-Za-z\d])", r"\\frac{\1}"),
    (r"\\frac\s*(\{(?:[^{}]|\{[^{}]*\})*\})\s*([A-Za-z\d]|\\[a-z]+)", r"\\frac\1{\2}"),
    (r"\\(?:le|leqq|leqslant)(?![a-z])|<=", r"\\leq "),
    (r"\\(?:ge|geqq|geqslant)(?![a-z])|>=", r"\\geq "),
    (r"\\ne(?![a-z])|!=", r"\\neq "),
    (r"\\lt(?![a-z])", "<"),
    (r"\\gt(?![a-z])", ">"),
    (r"\\lbrace(?![a-z])", r"\\{"),
    (r"\\rbrace(?![a-z])", r"\\}"),
    (r"\\(?:mid|vert|middle\|)(?![a-z])", "|"),
    (r"\\cupdot(?![a-z])", r"\\cup "),
    # Words. What stays in \text{} is a unit or language.
    (r"\\(?:text(?:bf|it|rm|sf|normal|tt)?|mbox|mathrm|mathbf|mathit|boldsymbol|operatorname|emph)(?![a-z])\s*", r"\\text"),
    (r"\\text\{\s*(?:,?\s*(and|or)|,)\s*,?\s*\}", r" \1 "),
    (r"\\text\{([^{}]*?)\b(and|or)\b([^{}]*)\}(?=\s*[-\d])", r"\\text{\1} \2 \\text{\3}"),
    (r"\\text\{\s*\}", " "),
    (r"^\s*\\text\{([^{}]*)\}\s*$", r"\1"),
    (r"\\text([A-Za-z0-9])", r"\1"),
    (r"(?<=\d)\s*\^?\s*(?:\\text)?\{\s*(?:st|nd|rd|th)\s*\}|(?<=\d)(?:st|nd|rd|th)\b", ""),
    (r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree(?![a-z])|\\text\{\s*degrees?\s*\}|(?<=\d)\s*degrees?\b", r"^\\circ "),
    (r"(?i)\\?%|\\text\{\s*(?:percent(?:age)?|pct)\s*\}|\b(?:percent(?:age)?|pct)\b", "%"),
    (r"\binfinitely many\b|(?<![a-zA-Z\\])(?:infinity|oo)\b|\+\s*\\infty", r"\\infty "),
    (r"(?<![a-zA-Z\\])(sqrt|pi|sin|cos|tan|ln|log)(?![a-zA-Z])", r"\\\1"),
    (r"\\ln(?![a-z])", r"\\log"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\{\s+", "{"),
    (r"^\s*Eq\((.*),([^,]*)\)\s*$", r"\1 = \2"),  # sympy's way to write an equation
    (r"(?i)^\s*(?:\\text\{\s*)?(?:the answer is|it is|answer|ans|only|so|thus|therefore|is)\b\s*[:=]?\s*\}?\s*(?=\S)", ""),
    (r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,)\]}])", lambda m: m[0].replace(",", "")),
    (r"^\s*-?\d{1,3}(?: \d{3})+(?:\.\d+)?\s*$", lambda m: m[0].replace(" ", "")),
)]  # fmt: skip
_DOUBLY_ESCAPED = re.compile(r"\\\\(?=(?:[dt]?frac|sqrt|left|right|text|pi|circ|cup|infty)\b)")


@functools.lru_cache(maxsize=512)
def normalise(text: str) -> str:
    """One spelling for the many that mean the same: delimiters, spaces, synonyms, separators and Unicode signs are gone."""
    for _ in range(3):  # boxes in boxes
        match = _BOX.search(text)
        close = _closing(text, match.end()) if match else -1
        if match is None or close < 0:
            break
        text = text[: match.start()] + text[match.end() + 1 : close] + text[close + 1 :]
    text = re.sub(r"\\+(?:boxed|fbox)\s*\{?", "", text)
    if "matrix" not in text:  # where \\ is the end of a row
        text = _DOUBLY_ESCAPED.sub(r"\\", text)
    for i, (pattern, replacement) in enumerate(_REWRITES):
        text = pattern.sub(replacement, text)
        if i == 3:  # NFKC would write a square as a digit
            text = unicodedata.normalize("NFKC", text)
            text = "".join(_UNICODE.get(sign, sign) for sign in text)
    return _trim(" ".join(text.replace("{,}", ",").split()))


def _trim(text: str) -> str:
    """Without punctuation around it."""
    previous = None
    while text != previous:
        previous = text
        text = text.strip().strip("*`").rstrip(".,;:" if re.search(r"[\w)}]!$", text) else ".,;:!").lstrip(",;:").strip()
        text = text.removesuffix("\\").removeprefix("=").strip()
        if len(text) > 1 and text[0] in "\"'" and text[-1] == text[0]:
            text = text[1:-1]
    return text


# --- comparison: structure ----------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\\[{}]|\\(?:begin|end)\{\w+\*?\}|\\[a-zA-Z]+|\\.|[A-Za-z]+|.", re.DOTALL)
_OPENING = frozenset(["(", "[", "{", r"\{", r"\langle", r"\lceil", r"\lfloor"])
_CLOSING = frozenset([")", "]", "}", r"\}", r"\rangle", r"\rceil", r"\rfloor"])
_NAME = r"(?:[A-Za-z]|\\[a-z]+(?![a-z]))(?:_\{?[\w+-]{1,6}\}?)?'*"
_AND_OR = re.compile(r"(?<![a-zA-Z\\])(?:and|or)(?![a-z])")
_PLUS_MINUS = re.compile(r"\\pm(?![a-z])")
_LABEL = re.compile(r"^(?:\\text\{)?\s*[A-Za-z]{3,}[A-Za-z ]*\d*\s*\}?\s*:\s*(?=\S)")
_DOMAIN = r"(?:\\text\{\s*)?[a-z]\s*\}?\s*\\in\s*\\mathbb\s*\{?[ZNQR]\}?"
_QUALIFIER = re.compile(
    rf",?\s*(?:\\text\{{)?\s*\b(?:for (?:all|any|every|each|some)|where|with)\b.*$|(?<=\S),?\s*\\forall\b.*$|,\s*{_DOMAIN}.*$", re.DOTALL
)


def _equal(gold: str, pred: str, nesting: int = 0) -> bool:
    """Whether two normalised answers are the same mathematics, or the same words."""
    if gold == pred or _letters(gold) == _letters(pred):
        return True
    if not pred or nesting > 6:
        return False
    number, other = _number(gold), _number(_NUMERALS.get(pred.lower(), pred))
    if number is not None and other is not None:
        return _close(number, other, gold, pred)
    if _too_large(pred) or _too_large(gold):
        return False
    if re.search(r"[A-J]", gold) and (letter := _option(gold)) is not None:
        return _option(pred) == letter
    if _is_words(gold):
        return _same_words(gold, pred)
    option = re.fullmatch(r"(?:\\text\{)?\s*\([A-J]\)\s*\}?\s*(.+)", pred)
    if option and not gold.startswith("("):
        pred = _trim(option[1])  # "(C) 12"
    golds, preds = _items(gold), _items(pred)
    if len(golds) == len(preds) == 1:
        return _equal_items(golds[0], preds[0], nesting)
    return _equal_lists(golds, preds, nesting) or (r"\setminus" in gold + pred and _sympy_equal(gold, pred))


def _letters(text: str) -> str:
    """What is left of a text without spaces, needless braces and the marks of words."""
    return re.sub(r"([_^])\{\s*(\w)\s*\}|\s+", r"\1\2", re.sub(r"\\text\{([^{}]*)\}", r"\1", text))


def _tokens(text: str) -> list[tuple[str, int]]:
    """(token, depth of brackets around it)."""
    depth, found = 0, []
    for match in _TOKEN.finditer(text):
        token = match[0]
        depth -= token in _CLOSING or token.startswith("\\end")
        found.append((token, depth))
        depth += token in _OPENING or token.startswith("\\begin")
    return found


def _too_large(text: str) -> bool:
    """Whether no answer is as long or as nested as this text."""
    return len(text) > MAX_CHARS or max((depth for _, depth in _tokens(text)), default=0) > MAX_DEPTH or bool(re.search(r"\d{400}", text))


def _split(text: str, separators: Sequence[str]) -> list[str]:
    """Parts of a text between separators outside of all brackets, empty ones left out."""
    parts = [""]
    for token, depth in _tokens(text):
        if depth == 0 and token in separators:
            parts.append("")
        else:
            parts[-1] += token
    return [part for part in map(_trim, parts) if part]


def _items(text: str) -> list[str]:
    """What an answer lists, without order: "1, 2 and 3", "x < 1 or x > 2", "1 \\pm 2", a union; one item if it is no list."""
    text = _trim(re.split(r"\\approx|\\simeq", text)[0]) or text  # "\\frac{1}{3} \\approx 0.33"
    groups = _split(text if ";" in text else _AND_OR.sub(";", text), (";",))
    sizes = {len(_split(part, (",",))) for part in groups}
    if len(groups) > 1 and len(sizes) == 1 and sizes != {1} and all("=" in part for part in groups):
        return [f"({part})" for part in groups]  # "p = 5, q = 2; p = 7, q = 2"
    parts = _split(_AND_OR.sub(" , ", text), (",", ";", "\\cup"))
    kept = [_trim(_LABEL.sub("", _QUALIFIER.sub("", part))) for part in parts if not re.fullmatch(_DOMAIN + r"(?:_\S+)?", part)]
    return [sign for part in [part for part in kept if part] or [text] for sign in _signs(part)]


def _signs(text: str) -> list[str]:
    """The answers that plus-minus signs stand for."""
    count = len(_PLUS_MINUS.findall(text))
    if not 0 < count <= 3:
        return [text]
    if r"\mp" in text:
        return [_PLUS_MINUS.sub(a, text).replace(r"\mp", b) for a, b in ("+-", "-+")]
    pieces = _PLUS_MINUS.split(text)
    answers = ("".join(itertools.chain(*zip(pieces, (*signs, ""), strict=True))) for signs in itertools.product("+-", repeat=count))
    return [re.sub(r"(^|[(,=])\s*\+\s*", r"\1", answer) for answer in answers]


def _equal_lists(golds: list[str], preds: list[str], nesting: int) -> bool:
    """Compare where at least one side lists several answers."""
    if max(len(golds), len(preds)) > MAX_ITEMS:
        return False
    if min(len(golds), len(preds)) > 1:
        return _match(golds, preds, nesting)
    one, many = (golds[0], preds) if len(golds) == 1 else (preds[0], golds)
    decimal = re.fullmatch(r"(-?\d+),(\d{1,2}|\d{4,})", ",".join(many))
    if decimal and ("." in one or many is preds):  # a decimal comma
        number = f"{decimal[1]}.{decimal[2]}"
        return _equal(one, number, nesting + 1) if many is preds else _equal(number, one, nesting + 1)
    opening, elements, _ = _bracketed(_right_side(one)) or ("", [], "")
    if opening == "(":  # x = 1, y = 2 for (1, 2)
        return len(elements) == len(many) and all(
            _equal(a, b, nesting + 1) for a, b in (zip(elements, many, strict=True) if many is preds else zip(many, elements, strict=True))
        )
    if opening != r"\{":
        return False
    elements = [sign for element in elements for sign in _signs(element)]
    return _match(elements, many, nesting) if many is preds else _match(many, elements, nesting)


def _match(golds: list[str], preds: list[str], nesting: int) -> bool:
    """Whether each element has its counterpart, in any order; by name if all have names (a = 1, b = 2)."""
    if len(golds) != len(preds):  # said twice
        golds, preds = list(dict.fromkeys(golds)), list(dict.fromkeys(preds))
    if len(golds) != len(preds):
        return False
    by_name, rest_by_name = ({_letters(item.partition("=")[0]): item for item in items if item.count("=") == 1} for items in (golds, preds))
    if len(by_name) == len(golds) and by_name.keys() == rest_by_name.keys():
        return all(_equal_items(by_name[name], rest_by_name[name], nesting + 1) for name in by_name)
    rest = list(preds)
    for wanted in golds:
        index = next((i for i, found in enumerate(rest) if _letters(wanted) == _letters(found)), None)
        if index is None:
            index = next((i for i, found in enumerate(rest) if _equal_items(wanted, found, nesting + 1)), None)
        if index is None:
            return False
        del rest[index]
    return True


def _equal_items(gold: str, pred: str, nesting: int) -> bool:
    """Compare two answers of which neither lists several."""
    gold, pred = (_trim(_QUALIFIER.sub("", text)) or text for text in (gold, pred))
    relations, (gold, pred) = (gold, pred), (_interval(gold), _interval(pred))
    if (_RELATION.search(gold) or _RELATION.search(pred)) and _sympy_equal(*relations):
        return True
    gold_value, pred_value = _right_side(gold), _right_side(pred)
    if gold_value != gold or pred_value != pred:
        argument, other = (re.match(r"[A-Za-z]\s*\(\s*([a-z])\s*\)\s*=", text) for text in (gold, pred))
        if argument and other:  # f(z) = z is f(x) = x
            pred_value = re.sub(rf"(?<![a-zA-Z\\]){other[1]}(?![a-zA-Z])", argument[1], pred_value)
        return _equal(gold_value, pred_value, nesting + 1) or _equal_equations(gold, pred)
    inside, other_inside = _bracketed(gold), _bracketed(pred)
    if inside and other_inside:
        elements, other_elements = inside[1], other_inside[1]
        if (inside[0], inside[2]) != (other_inside[0], other_inside[2]) and not len(elements) == len(other_elements) == 1:
            return False
        if inside[0] == r"\{":
            return _match([s for e in elements for s in _signs(e)], [s for e in other_elements for s in _signs(e)], nesting)
        return len(elements) == len(other_elements) and all(_equal(a, b, nesting + 1) for a, b in zip(elements, other_elements, strict=True))
    if inside and len(inside[1]) == 1 and inside[0] != "[":  # (5), {5}
        return _equal(inside[1][0], pred, nesting + 1)
    if other_inside and len(other_inside[1]) == 1 and other_inside[0] != "[":
        return _equal(gold, other_inside[1][0], nesting + 1)
    return _equal_values(gold, pred) or _equal_equations(gold, pred)


def _bracketed(text: str) -> tuple[str, list[str], str] | None:
    """(opening, elements, closing) of a tuple, interval, set, vector or matrix; None if the text is none of them."""
    if text.count("\\begin") == 1 and (match := re.fullmatch(r"\\begin\{[pbB]?matrix\}(.*)\\end\{[pbB]?matrix\}", text, re.DOTALL)):
        rows = [[_trim(entry) for entry in row.split("&")] for row in re.split(r"\\\\(?:\[\w+\])?", match[1]) if row.strip()]
        if len(rows) == 1 or all(len(row) == 1 for row in rows):  # a vector, which may also be written as a tuple
            return "(", [entry for row in rows for entry in row], ")"
        return "matrix", ["(" + ",".join(row) + ")" for row in rows], ""
    tokens = _tokens(text)
    if len(tokens) < 3 or any(depth == 0 for _, depth in tokens[1:-1]):
        return None  # "(1)(2)"
    first, last = tokens[0][0], tokens[-1][0]
    opening = {"(": "(", "[": "[", r"\{": r"\{", "{": r"\{", r"\langle": "("}.get(first)
    closing = {")": ")", "]": "]", r"\}": r"\}", "}": r"\}", r"\rangle": ")"}.get(last)
    return (opening, _split(text[len(first) : -len(last)], (",", ";")), closing) if opening and closing else None


_RELATION = re.compile(r"(<|>|\\leq(?![a-z])|\\geq(?![a-z]))")
_FLIP = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}


def _interval(text: str) -> str:
    """Inequalities in one name, and sets given by them, as intervals; any other text as it is."""
    if match := re.fullmatch(rf"\\?\{{\s*{_NAME}\s*(?:\\in\s*\\mathbb\s*\{{?R\}}?)?\s*[|:]\s*(.*?)\\?\}}", text):
        text = _trim(match[1])
    text = re.sub(rf"^{_NAME}\s*\\in(?![a-z])\s*", "", text)
    parts = [part.strip() for part in _RELATION.split(text)]
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
            bound = {"<": "(-\\infty,{})", r"\leq": "(-\\infty,{}]", ">": "({},\\infty)", r"\geq": "[{},\\infty)"}[relation]
            return bound.format(right)
    return text


def _right_side(text: str) -> str:
    """What an equation gives: its last side, if what stands before is a name or the value of something; else the equation."""
    sides = _split(re.sub(r":=|\\equiv(?![a-z])(?!.*mod)", "=", text), ("=",))
    if len(sides) < 2 or _RELATION.search(text) or r"\neq" in text:
        return text
    is_sum = any(depth == 0 and token in "+-" for token, depth in _tokens(sides[0])[1:])
    has_names = re.search(r"(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])", re.sub(r"\\[a-zA-Z]+", " ", sides[0]))
    return text if is_sum and has_names and len(sides) == 2 else sides[-1]


# --- comparison: words --------------------------------------------------------------------------------------------------

_NUMERALS = {word: str(i) for i, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])}
_STOP_WORDS = frozenset(["the", "a", "an", "is", "are", "it", "be", "will", "of", "that", "this", "so", "answer", "therefore", "thus"])
_OPTION = re.compile(
    r"(?:(?i:option|choice)\s+)?(?:\\text\{)?\s*\(?\s*([A-Ja-j])\s*(?:\)\s*\}?(?:\s.*)?|\}?|\}?\s*[.:)]\s+\S.*)", re.DOTALL
)


def _option(text: str) -> str | None:
    """The letter of a multiple-choice answer: B, (B), \\text{B}, "B. blue", "option B"."""
    match = _OPTION.fullmatch(text)
    if match is None or (match[1].islower() and "(" not in text and len(text) > 1):
        return None
    if len(text) > 1 and re.match(r"\(?\s*[A-J]\s*\)?\s*[-+*/^=,(]", text):
        return None  # a product, a tuple
    return match[1].upper()


def _plain_words(text: str) -> str:
    return re.sub(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", " ", re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text))


def _is_words(text: str) -> bool:
    """Whether an answer is language: no number or formula carries it."""
    value = _parts(text)[0]
    plain = _plain_words(value)
    words = [word.lower() for word in re.findall(r"[^\W\d_]{2,}", plain)]
    language = any((len(word) >= 4 and word not in _FUNCTIONS) or word in ("yes", "no", "odd", "all", "red") for word in words)
    return language and not re.search(r"[=<>^|]|\d|\\(?:frac|sqrt|pi|leq|geq|in)(?![a-z])", plain + value)


def _same_words(gold: str, pred: str) -> bool:
    """The same words, the order of a list aside; yes or no with an explanation; the subject for a gold sentence about it."""
    wanted, found = ([word for word in words if word not in _STOP_WORDS] or words for words in (
        re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*|\d+", _plain_words(text).casefold()) for text in (gold, pred)
    ))  # fmt: skip
    if not found or wanted == found:
        return bool(found)
    several = re.search(r",|\b(?:and|or)\b", gold)
    if several and sorted(set(wanted) - {"and"}) == sorted(set(found) - {"and"}):
        return True
    if len(wanted) == 1 and wanted[0] in ("yes", "no", "true", "false"):
        return found[0] == wanted[0]
    return not several and len(wanted) >= 3 * len(found) and wanted[: len(found)] == found


# --- comparison: values -------------------------------------------------------------------------------------------------

_PLAIN = re.compile(
    r"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)(?:\s*(?=\\frac\s*\{\s*\d)|\s+(?=\d+\s*/)))?"
    r"(?:\\frac\s*\{\s*(?P<minus>-?)(?P<top>\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}|(?P<number>\d*\.?\d+|\d+\.)(?:\s*/\s*(?P<over>\d+))?"
    r"(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:[{(]\s*(?P<ten>[-+]?\d{1,3})\s*[})]|(?P<power>\d{1,3}))|[eE](?P<e>[-+]?\d{1,3}))?)"
)
_DECIMAL = re.compile(r"-?\d*\.(\d+)")
_RATIO = re.compile(r"{0}\s*:\s*{0}".format(r"(\\frac\{[^{}]*\}\{[^{}]*\}|\(?[-\d./ ]+\)?|\([^():]*\))"))
_BASE = re.compile(r"([\dA-Fa-f]+)\s*_\s*\{?\s*(?:\\text\{)?\s*(\d{1,2}|two|three|eight|ten)\s*\}*")
_SHORT_UNITS = "km cm mm kg mg ml mL ft lbs? oz hrs? mph kph min sec ms pm am sq in m g s L [dD]ays? yd mi hour".replace(" ", "|")
_UNIT = re.compile(
    rf"(?<=[\d}}%)\w\s])\s*(?:\\text\{{([^{{}}]*)\}}|(?<=[\d}}\s])((?:{_SHORT_UNITS}|[A-Za-z]{{4,}}(?: [A-Za-z]{{2,}})*)\b))"
    r"\s*(?:\^\s*\{?\s*(\d)\s*\}?)?\s*\.?$"
)
_SAME_UNIT = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km", "millimeter": "mm",
    "foot": "ft", "feet": "ft", "inch": "in", "inche": "in", "pound": "lb", "hour": "hr", "h": "hr", "minute": "min", "second": "sec",
    "s": "sec", "kilogram": "kg", "gram": "g", "liter": "l", "litre": "l", "mile": "mi", "ounce": "oz",
}  # fmt: skip


def _number(text: str) -> Fraction | None:
    """The value of a plain number: 12, -0.5, 1/2, \\frac{1}{2}, 2 1/2, 2 \\times 10^{-3}."""
    match = _PLAIN.fullmatch(text) if len(text) <= 400 else None
    if match is None or (match["whole"] and not (match["top"] or match["over"])):
        return None
    denominator = int(match["bottom"] or match["over"] or 1)
    if denominator == 0:
        return None
    value = Fraction(match["minus"] + match["top"] if match["top"] else match["number"]) / denominator + int(match["whole"] or 0)
    value *= Fraction(10) ** int(match["ten"] or match["power"] or match["e"] or 0)
    return -value if match["sign"] == "-" else value


def _close(gold: Fraction, pred: Fraction, gold_text: str, pred_text: str) -> bool:
    """Whether two numbers are equal, given how they are written.

    Exact values must be equal. A decimal stands for what it rounds: within 1e-4 of a gold value that is no integer (the usual
    evaluations' tolerance), and an exact value equals the gold decimal (of three digits or more) that it rounds or truncates to.
    """
    difference = abs(gold - pred)
    if difference <= max(abs(gold), abs(pred)) / 10**12 or difference < Fraction(1, 10**25):  # sympy's values have 30 digits
        return True
    gold_decimal, pred_decimal = _DECIMAL.fullmatch(gold_text), _DECIMAL.fullmatch(pred_text)
    if gold.denominator == 1 or not (gold_decimal or pred_decimal):
        return False
    if difference <= abs(gold) / 10**4:
        return True
    rounded = gold_decimal and not pred_decimal and pred.denominator != 1 and len(gold_text.replace(".", "").lstrip("-0")) >= 3
    return bool(rounded and gold_decimal and difference < Fraction(1, 10 ** len(gold_decimal[1])))


@functools.lru_cache(maxsize=512)
def _parts(text: str) -> tuple[str, str, bool, bool]:
    """(value, unit, is a percentage, is in degrees)."""
    unit = ""
    while (match := _UNIT.search(text)) and match.start() > 0:
        if match[2] and len(match[2]) < 4 and _number(text[: match.start()].strip()) is None:
            break  # 3n + 2m
        unit = f"{match[1] or match[2]} {unit}"
        text = text[: match.start()].strip()
    text = re.sub(r"(?<=\w)_\s*\{?\s*\\text\{([^{}]*)\}\s*\}?", r"_{\1}", text).strip()
    percent, degrees = text.endswith("%"), r"\circ" in text
    text = re.sub(r"\^\\circ\s*[CF]?|\^\s*$", "", text.rstrip("% ")).strip()
    return _RATIO.sub(r"(\1)/(\2)", text) if _RATIO.fullmatch(text) else text, unit.strip(), percent, degrees


def _same_unit(gold: str, pred: str) -> bool:
    """Units that share a word, or of which only one is given: what is asked for implies the other. Nothing is converted."""
    words, others = (
        {_SAME_UNIT.get(word, word) for word in (w.removesuffix("s") if len(w) > 2 else w for w in re.findall(r"[a-z]+", unit.lower()))}
        - {"unit", "of", "the", "per", "square", "sq", "cubic"}
        for unit in (gold, pred)
    )
    return not words or not others or bool(words & others)


def _equal_values(gold: str, pred: str) -> bool:
    """Compare two numbers or expressions. A percent sign may be missing (35% for 35), or meant (35% for 0.35)."""
    gold, gold_unit, gold_percent, gold_degrees = _parts(gold)
    pred, pred_unit, pred_percent, pred_degrees = _parts(pred)
    if not _same_unit(gold_unit, pred_unit):
        return False
    base, other_base = _BASE.fullmatch(gold), _BASE.fullmatch(pred)
    if base or other_base:  # 1011_2, of which only one may say the base
        return (base[1] if base else gold) == (other_base[1] if other_base else pred) and not (base and other_base and base[2] != other_base[2])
    number, other = _number(gold), _number(pred)
    if number is not None and other is not None and gold_degrees == pred_degrees:
        if _close(number, other, gold, pred):
            return True
        # As an exact value: 41/125 and 0.328 alike are 32.8 %.
        return gold_percent != pred_percent and (_close(number, 100 * other, gold, "") if gold_percent else _close(100 * number, other, "", pred))
    if _sympy_equal(gold, pred, gold_degrees, pred_degrees):
        return True
    return gold_percent != pred_percent and _sympy_equal(gold if gold_percent else f"100({gold})", pred if pred_percent else f"100({pred})")


# --- comparison: sympy --------------------------------------------------------------------------------------------------

_EXPLOSIVE = re.compile(
    r"\d\^-?[\w.\\]+\^-?[\w.\\]+\^|\^-?\d{6}|\^\d+\^\d{3}|\d{3}\^\d{5}"  # towers of exponents
    r"|!\W{0,3}!|\d{5}!|\d\^[\d.]+!|\d!\^"  # factorials of factorials
)
_UNREADABLE = re.compile(r"['\"]|__|\d\s+\d|(?<![A-Za-z\\{])(?:[A-Za-z]{4,}|[A-Za-z]{2,} [A-Za-z]{2,})")
"""The grammar drops quotes (f' is not f), adds numbers that stand side by side, and multiplies the letters of words."""
_INDEXED = {"e": r"\varepsilon ", "E": r"\Xi ", "i": r"\iota ", "I": r"\Lambda "}
"""With an index these are names, no constants; the grammar takes no index on a constant."""
_POINTS = ("0.7390851332151607", "1.3247179572447460", "2.6220575542921198", "-0.5671432904097838", "-1.7632228343518968")


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> Any:
    """A sympy object; None if the text is no LaTeX mathematics, or costs more than any answer would."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    if not text or _too_large(text) or _UNREADABLE.search(text) or _EXPLOSIVE.search(re.sub(r"[\s{}()\[\]]", "", text)):
        return None
    # 10(26) and (10)(26), which the grammar adds like a mixed number.
    text = re.sub(r"(?<![\w.^_}\\])(\d[\d.]*)\s*\(", r"\1 \\cdot (", text)
    text = re.sub(r"\)\s*(?=[\d(])", r") \\cdot ", text)
    text = re.sub(r"(?<![A-Za-z\\])[eEiI](?=_)", lambda m: _INDEXED[m[0]], text)
    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False)
    try:
        latex = normalize_latex(text, config)
        return latex2sympy(latex, is_real=not should_treat_as_complex(latex), convert_degrees=False, normalization_config=None)
    except MemoryError:
        raise
    except Exception:  # the parser and sympy raise anything on untrusted text
        return None


def _understood(gold: str) -> bool:
    """Whether a gold answer can be told from a wrong one."""
    items = _items(gold)
    if len(items) > 1 or _number(gold) is not None or _option(gold) or _is_words(_right_side(items[0])):
        return True
    return _bracketed(_interval(items[0])) is not None or _parse(_parts(_right_side(items[0]))[0]) is not None


def _sympy_equal(gold: str, pred: str, gold_degrees: bool = False, pred_degrees: bool = False) -> bool:
    """Equality of two expressions, relations, matrices or sets."""
    left, right = _parse(gold), _parse(pred)
    if left is None or right is None:
        return False
    import math_verify.grader
    from sympy import Expr, pi

    math_verify.grader.TIMEOUT_WARNING_SHOWN = True  # there is none on purpose
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


def _equal_equations(gold: str, pred: str) -> bool:
    """Two equations, or an equation and what it says of its one name that the other lacks: -x^2 - 1 for y + 1 = -x^2."""
    if "=" not in gold:
        return False
    if "=" in pred:
        return _sympy_equal(gold, pred)
    relation, value = _parse(gold), _parse(pred)
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
    """Whether two equations, as what they set to zero, are one but for a factor: 2y - 4x - 2 and y - 2x - 1.

    None: sympy has to look, as at (x - 1)^2 and x - 1. It would solve equations that are no polynomials for minutes: those differ.
    """
    from sympy import Float

    symbols = sorted(gold.free_symbols, key=str)
    if set(symbols) != pred.free_symbols or not symbols:
        return None
    ratios = []
    for shift in range(len(_POINTS)):
        values = {symbol: Float(_POINTS[(i * 2 + shift) % len(_POINTS)], 30) + i for i, symbol in enumerate(symbols)}
        a, b = (side.subs(values).evalf(30) for side in (gold, pred))
        if a.is_number and b.is_number and a.is_finite and b.is_finite and a != 0 and b != 0:
            ratios.append(a / b)
    if len(ratios) >= 2 and all(abs(ratio - ratios[0]) <= 1e-12 * abs(ratios[0]) for ratio in ratios):
        return True
    return None if gold.is_polynomial(*symbols) and pred.is_polynomial(*symbols) else False


def _same_expression(gold: Any, pred: Any, gold_text: str, pred_text: str) -> bool:
    """Compare by value: expressions that agree at several points are one (simplifying them is slow, and finds less)."""
    from sympy import Float

    only_gold, only_pred = gold.free_symbols - pred.free_symbols, pred.free_symbols - gold.free_symbols
    if len(only_gold) == len(only_pred) == 1:
        name, other = only_gold.pop(), only_pred.pop()
        if str(name).lower() == str(other).lower() or str(other) in set("jklmnt"):  # the name of an integer parameter is free
            pred = pred.subs(other, name)
    symbols = sorted(gold.free_symbols | pred.free_symbols, key=str)
    if not symbols:
        a, b = gold.evalf(30), pred.evalf(30)
        if not (a.is_real and b.is_real):
            return bool(abs(a - b) < 1e-12 * (1 + abs(a)))
        if not all(value == 0 or 1e-300 < abs(value) < 1e300 for value in (a, b)):  # too many digits for a fraction
            return bool(gold == pred)
        return _close(Fraction(str(a)), Fraction(str(b)), gold_text, pred_text)
    num_agreed = 0
    for shift in range(len(_POINTS)):
        values = {symbol: Float(_POINTS[(i * 2 + shift) % len(_POINTS)], 30) + i for i, symbol in enumerate(symbols)}
        a, b = (side.subs(values).evalf(30) for side in (gold, pred))
        if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
            continue  # a logarithm of a negative number
        if abs(a - b) > 1e-12 * max(abs(a), abs(b), 1e-12):
            return False
        num_agreed += 1
    return num_agreed >= 2

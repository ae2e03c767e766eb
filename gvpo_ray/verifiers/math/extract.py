"""Extraction finds the answer in a completion."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_CHARS = 1000
"""Length in characters above which a text is not taken for an answer."""

TAIL_CHARS = 2000
"""Length in characters of the end of a completion in which an answer without a box is looked for."""

MAX_ITEMS = 64
"""Largest number of elements of a list, since each may have to be compared with each."""

SHORT_CHARS = 300
"""Length in characters up to which a response without any mark is a statement, which may lack its full stop.
A longer response without a final sign counts as unfinished and has no answer."""


@dataclass(frozen=True)
class Extraction:
    """An Extraction is the answer in a completion, as text."""

    text: str | None
    """The answer; None: the completion has none."""
    sentence: str | None = None
    """The statement that holds `text`, if no box marks it: the answer if the gold answer is words."""


_TURN = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|end|user)\|>|</s>")
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_UNBRACED_BOX = re.compile(r"\\boxed\s+(\d+(?:\.\d+)?|[^\s${}\\.]+)")
_BEFORE_BOX = re.compile(r"(?:^|=|\$|\bis|\\\(|\\\[)\s*-\s*$")
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;.&}]|\\[()\[\],;! "
    r"]|\\\\|\\q?quad|\\text\s*\{|\b(?:and|or)\b|[A-Za-z](?:_\{?\w{1,3}\}?)?(?:\(\w\))?\s*=){0,40}"
)
_PERCENT = re.compile(r"[\s$]*(?:\\?%|percent\b|pct\b)")
_MARKER = re.compile(
    r"####|^[ \t]*A(?:nswer)?[ \t]*:|\u7b54\u6848[\u662f\u4e3a:\uff1a]+"
    r"|\b(?:final\s+answer|answer|option|choice|solution)\b"
    r"(?:[^\n.:=$]{0,60}?(?:\bis\b|\bare\b|:|=)|\*\*:?)\s*:?",
    re.IGNORECASE | re.MULTILINE,
)
_NO_STATEMENT = re.compile(
    r"(?:also |indeed |not )?(?:correct|incorrect|wrong|right|provided|given|as follows|clear|valid)\b",
    re.IGNORECASE,
)
MATH = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)"
    # Money is no mathematics: "$8. The total is $21", "$21 - $20".
    r"|(?<!\\)\$((?!\d[^$]*(?:\s[A-Za-z]{2,}\s[^$]*|[-+*/=]\s*)\$)(?:[^$\\]|\\.)+)\$(?!\d)",
    re.DOTALL,
)
_UNFINISHED_MATH = re.compile(r"\$(?!\s?\d)|\\(?:\[|\(|begin|end|frac|cdot|times|\\)")
_CONNECTOR = re.compile(r"\s*(?:,|;|,?\s*\b(?:and|or)\b)\s*")
CODE = re.compile(
    r"__[a-z]+__|\w\(\s*[bfr]?[\"']|(?<!\\)\b(?:lambda|import|exec|eval)\b\s*[\w(:]"
    r"|(?<![\w\\])[a-z_]\w*\.[a-z_]\w*\("
)
_LABELS = re.compile(r"[A-Za-z]+ ?\d*:")
_SENTENCE_END = re.compile(r"\.(?=\s+[A-Z\"*\[]|\s*$|\*\*)|\n\s*\n|\n(?=\s*(?:\*\*|#|[A-Z][a-z]+\b))")
_NUMBER_IN_TEXT = re.compile(
    r"(?<![\w.^{])[-\u2212]?(?:\$|\\\$)?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
    r"(?:\s*(?:\\?%|percent|pct)|(?=st\b|nd\b|rd\b|th\b)|(?![\w^]))|(?<!\w)-?\.\d+"
)


def extract(completion: str, *, truncated: bool = False, num_boxes: int = 1) -> Extraction:
    """Find the answer in a completion.

    The answer is the content of the last boxes; else what follows the last "answer is", "####" or "A:"; else
    the conclusion. Of several answers the last one counts, also if a base model goes on with another
    question, because such a completion does not end with its answer. Only the text behind the last </think>
    is read. A box that is never closed is no answer.

    Args:
        completion: a response, or a bare answer.
        truncated: whether it was cut at the token limit, so that only a box counts.
        num_boxes: how many boxes, wherever they stand, make one answer.
    """
    text = completion.rpartition("</think>")[2].partition("<think>")[0]
    text = next((part for part in _TURN.split(text) if part.strip()), "").strip()
    boxed = _boxes(text, num_boxes)
    if boxed is not None:
        final = (
            -1
            if truncated
            else text.lower().rfind("final answer is", max(text.rfind("\\boxed"), text.rfind("\\fbox")))
        )
        stated = _statement(text[final:].partition("is")[2][:TAIL_CHARS].lstrip(": ")) if final >= 0 else None
        return Extraction(stated or boxed)
    if truncated or not text or BOX.search(text):
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


def _boxes(text: str, num_boxes: int) -> str | None:
    r"""Return the content of the last boxes, `num_boxes` different ones, or None if there is no box.

    Boxes before them that belong to the same statement ("\boxed{1} and \boxed{2}") are joined by commas.
    """
    contents: list[str] = []
    begin = next_begin = len(text)
    for _ in range(MAX_ITEMS):
        begin = max(text.rfind("\\boxed", 0, begin), text.rfind("\\fbox", 0, begin))
        if begin < 0:
            break
        brace, plain = BOX.match(text, begin), _UNBRACED_BOX.match(text, begin)
        if brace is None and plain and not contents:
            contents, next_begin = [plain[1]], begin
        close = closing_brace(text, brace.end()) if brace else -1
        if brace is None or close < 0:
            continue
        content = text[brace.end() + 1 : close]
        # A sign may stand before the box, a percent sign behind it.
        content = (
            ("-" if _BEFORE_BOX.search(text[max(0, begin - 12) : begin]) else "")
            + content
            + ("%" if _PERCENT.match(text, close + 1) else "")
        )
        if not contents or close > next_begin:  # the first box, or one around those so far
            contents = [content]
        elif len(contents) >= num_boxes and not _BETWEEN_BOXES.fullmatch(text, close + 1, next_begin):
            break
        elif content.strip() != contents[0].strip():
            contents.insert(0, content)
        next_begin = begin
    return " , ".join(contents) if contents else None


def closing_brace(text: str, opening: int) -> int:
    """Return the index of the brace that closes the one at `opening`; -1 if none does within MAX_CHARS."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening, opening + MAX_CHARS + 2):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return match.start()
    return -1


def _statement(rest: str) -> str | None:
    """Return the answer at the beginning of the text that follows a marker, or None."""
    rest = re.sub(r"^(?:\\?[\"'`*]|\s)+", "", rest)
    if math := MATH.match(rest):
        parts, end = [_inner(math)], math.end()
        percent = _PERCENT.match(rest, end)
        while (connector := _CONNECTOR.match(rest, end)) and (math := MATH.match(rest, connector.end())):
            parts.append(_inner(math))
            end = math.end()
        return " , ".join(parts) + ("%" if percent else "")
    statement = _SENTENCE_END.split(rest, maxsplit=1)[0].strip().strip("*").strip()
    if not statement or re.match(r"\$(?!\s?\d[\d,.]*(?:\s|$))|\\[(\[]", statement):
        return None  # mathematics without its closing delimiter; "$80" is money
    return statement if _is_bare(statement) else _conclusion(statement).text


def _conclusion(text: str) -> Extraction:
    """Find the answer in a response without a mark: the last mathematics or number of its last statement."""
    last = [part for part in re.split(r"\n\s*\n", text) if part.strip()][-1].strip()
    if len(text) > SHORT_CHARS and _UNFINISHED_MATH.search(MATH.sub(" ", last).replace("\\$", "")):
        return Extraction(None)
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", last)[-1]
    if CODE.search(sentence):
        return Extraction(None)  # no number in a program is an answer
    maths = list(MATH.finditer(sentence))
    # Of "36 - 24 = 12 of 30 are left" the answer is 12.
    left, _, right = sentence[maths[-1].end() if maths else 0 :].rpartition("=")
    if numbers := _NUMBER_IN_TEXT.findall(right):
        return Extraction(numbers[0] if left else numbers[-1], sentence)
    if maths := maths or list(MATH.finditer(last)) or list(MATH.finditer(text)):
        return Extraction(_inner(maths[-1]), sentence)
    return Extraction(None if len(text) > SHORT_CHARS else sentence, sentence)


def _inner(math: re.Match[str]) -> str:
    """Return the content of a match of MATH, without its delimiters."""
    return next(group for group in math.groups() if group is not None)


def _is_bare(text: str) -> bool:
    """Return whether a text is a bare answer: one line without prose around numbers or mathematics."""
    if len(text) > 2 * SHORT_CHARS or len(MATH.findall(text)) > 8 or ("\n" in text and "\\begin" not in text):
        return False
    outside = re.sub(
        r"\\(?:text|mbox|textbf|textit|mathrm|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|</?su[bp]>",
        " ",
        MATH.sub(" 1 ", text),
    )
    if len(_LABELS.findall(outside)) > 1:
        outside = _LABELS.sub(" ", outside)  # "Ann: 3, Bob: 4"
    prose = [
        word for word in re.findall(r"[^\W\d_]{2,}", outside) if word.lower() not in ("and", "or", *FUNCTIONS)
    ]
    return (
        not prose
        or not re.search(r"\d|\$|\\\(|=", text)
        or (not MATH.search(text) and len(prose) <= 2 and not text.endswith(".."))
    )


FUNCTIONS = frozenset(
    "sin cos tan cot sec csc log ln exp sqrt lim max min gcd lcm det mod arcsin "  # noqa: SIM905 - data
    "arccos arctan sinh cosh tanh frac pi deg dim arg".split()
)
"""Names in mathematics that look like words."""

"""Normalisation gives answers that mean the same one spelling."""

from __future__ import annotations

import functools
import re
import unicodedata

from gvpo_ray.verifiers.math.extract import BOX, closing_brace

_UNICODE = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ", "\u00f7": "/",
    "\u2215": "/", "\u2044": "/", "\u221e": r"\infty ", "\u03c0": r"\pi ", "\u2264": r"\leq ",
    "\u2265": r"\geq ", "\u2260": r"\neq ",
    "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2248": r"\approx ", "\u00b1": r"\pm ",
    "\u00b0": r"^\circ ",
    "\u2200": r"\forall ", "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}", "\u03b8": r"\theta ",
    "\u03b1": r"\alpha ", "\u03b2": r"\beta ",
    "\u03bb": r"\lambda ", "\u2205": r"\emptyset ", "\u2032": "'", "\u2019": "'", "\u3001": ",",
    "\uff0c": ",", "\u3002": ".",
    "\u20ac": "", "\u00a3": "", "\u00a5": "", "\u20b9": "",
}  # fmt: skip
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    # Signs and marks that are no mathematics.
    ("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b\u207f]+",
    lambda m: "^{" + unicodedata.normalize("NFKC", m[0]) + "}"),
    ("[\u2460-\u2473]", lambda m: unicodedata.normalize("NFKC", m[0]) + ","),  # circled numbers are a list
    ("[\u00bc-\u00be\u2150-\u215e]",
    lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("\u2044"))),
    ("\u221a\\s*(\\d+|[a-z]|(?=\\())", lambda m: rf"\sqrt{{{m[1]}}}" if m[1] else r"\sqrt"),
    (r"<(sup|sub)>(.*?)</\1>", lambda m: ("^" if m[1] == "sup" else "_") + "{" + m[2] + "}"),
    (r"^\s*\*\*|\*\*\s*$", ""),  # bold
    (r"\*\*", "^"),
    (r",\s*\\!\s*|\s*\{\s*,\s*\}\s*(?=\d{3})", ""),  # the typesetter's thousands separator
    (r"\\\$|\$|\\[()](?![A-Za-z])|\\\[(?!\d+(?:pt|em|ex))|\\\](?!\w)", " "),  # money and delimiters
    (r"\\(?:left|right|[bB]ig{1,2}[lrm]?)(?![a-zA-Z])\.?"
     r"|\\(?:displaystyle|limits|rm|it|bf|q?quad|thinspace)(?![a-zA-Z])", " "),
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
    (r"(?<=\\\})\s*-\s*(?=\\\{)|\\backslash(?![a-z])", r" \\setminus "),
    (r"\\text(?=circ|degree)", r"\\"),
    # Words. After this only units and language are in \text{}.
    (r"\\(?:text(?:bf|it|rm|sf|normal|tt)?|mbox|mathrm|mathbf|mathit|boldsymbol|operatorname|emph)"
     r"(?![a-z])\s*", r"\\text"),
    (r"\\text\{\s*(?:,?\s*(and|or)|,)\s*,?\s*\}", r" \1 "),
    (r"\\text\{([^{}]*?)\b(and|or)\b([^{}]*)\}(?=\s*[-\d])", r"\\text{\1} \2 \\text{\3}"),
    (r"\\text\{\s*\}", " "),
    (r"^\s*\\text\{([^{}]*)\}\s*$", r"\1"),
    (r"\\text([A-Za-z0-9])", r"\1"),
    (r"(?<=\d)\s*\^?\s*(?:\\text)?\{\s*(?:st|nd|rd|th)\s*\}|(?<=\d)(?:st|nd|rd|th)\b", ""),
    (r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree(?![a-z])|\\text\{\s*degrees?\s*\}|(?<=\d)\s*degrees?\b",
    r"^\\circ "),
    (r"(?i)\\?%|\\text\{\s*(?:percent(?:age)?|pct)\s*\}|\b(?:percent(?:age)?|pct)\b", "%"),
    (r"\binfinitely many\b|(?<![a-zA-Z\\])(?:infinity|oo)\b|\+\s*\\infty", r"\\infty "),
    (r"(?<![a-zA-Z\\])(sqrt|pi|sin|cos|tan|ln|log)(?![a-zA-Z])", r"\\\1"),
    (r"\\ln(?![a-z])", r"\\log"),
    (r"(?i)^\s*(?:\\text\{)?\s*(?:minus|negative)\s*\}?\s*(?=\S)", "-"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\(?:mathbb\s*\{?\s*R\s*\}?|R(?![a-zA-Z]))|^\s*(?i:all|any|every) reals?(?: numbers?)?\s*$",
     r"\\mathbb{R}"),
    (r"\\varnothing(?![a-z])|^\s*\\?\{\s*\\?\}\s*$"
     r"|^\s*(?i:(?:there (?:is|are) )?no (?:real )?solutions?|(?:the )?empty set)\s*\.?\s*$",
     r"\\emptyset"),
    (r"\{\s+", "{"),
    (r"^\s*Eq\((.*),([^,]*)\)\s*$", r"\1 = \2"),  # sympy's way to write an equation
    (r"(?i)^\s*(?:\\text\{\s*)?(?:the answer is|it "
     r"is|answer|ans|only|so|thus|therefore|is)\b\s*[:=]?\s*\}?\s*(?=\S)", ""),
    (r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,)\]}])", lambda m: m[0].replace(",", "")),
    (r"^\s*-?\d{1,3}(?: \d{3})+(?:\.\d+)?\s*$", lambda m: m[0].replace(" ", "")),
)]  # fmt: skip
_LOST_BACKSLASH = re.compile(
    r"\t(?=ext|imes|heta|an\b|frac)|\f(?=rac)|\x08(?=oxed|inom|egin|eta\b)|\r(?=ight|angle|ho\b)|\v(?=ec)"
)
"""Control characters that were the first two letters of a command: \\t of \\text, read as an escape."""
_DOUBLY_ESCAPED = re.compile(r"\\\\(?=(?:[dt]?frac|sqrt|left|right|text|pi|circ|cup|infty)\b)")


@functools.lru_cache(maxsize=512)
def normalise(text: str) -> str:
    """Bring an answer into one spelling.

    Delimiters, needless spaces, synonyms, thousands separators and Unicode signs are removed or replaced.
    """
    for _ in range(3):  # boxes may be nested
        match = BOX.search(text)
        close = closing_brace(text, match.end()) if match else -1
        if match is None or close < 0:
            break
        text = text[: match.start()] + text[match.end() + 1 : close] + text[close + 1 :]
    text = re.sub(r"\\+(?:boxed|fbox)\s*\{?", "", text)
    text = _LOST_BACKSLASH.sub(lambda m: "\\" + "tfbrv"["\t\f\b\r\v".index(m[0])], text)
    if "matrix" not in text:  # where \\ is the end of a row
        text = _DOUBLY_ESCAPED.sub(r"\\", text)
    for i, (pattern, replacement) in enumerate(_REWRITES):
        text = pattern.sub(replacement, text)
        if i == 3:  # NFKC would write a square as a digit
            text = unicodedata.normalize("NFKC", text)
            text = "".join(_UNICODE.get(sign, sign) for sign in text)
    return trim(" ".join(text.replace("{,}", ",").split()))


def trim(text: str) -> str:
    """Remove punctuation, quotes and spaces around a text."""
    previous = None
    while text != previous:
        previous = text
        text = (
            text.strip()
            .strip("*`")
            .rstrip(".,;:" if re.search(r"[\w)}]!$", text) else ".,;:!")
            .lstrip(",;:")
            .strip()
        )
        text = text.removesuffix("\\").removeprefix("=").strip()
        if len(text) > 1 and text[0] in "\"'" and text[-1] == text[0]:
            text = text[1:-1]
    return text

"""Reward functions: the built-in ones, how a user's are found, and how what one returns is read.

    def reward(prompts, completions, **columns) -> list[float | None]

One number per completion, None where it cannot tell. Built in: math, exact_match, numeric, format, length. In the child that
runs them (sandbox.py) a function sees lists of one; a trusted one (in the verifier itself, as HTTP calls are) whole groups.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import importlib
import importlib.util
import inspect
import itertools
import math
import numbers
import re
import resource
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from gvpo_ray.config.run import ConfigError, RewardConfig
from gvpo_ray.verifiers.math import compare as answers

Score = float | None | tuple[float | None, str]
"""Of one completion: the reward, None for "cannot be verified", or either with a remark for `reward_reasons`."""

RewardFunction = Callable[..., Any]
"""`reward(prompts, completions, **columns) -> one Score per completion`, or a coroutine function; columns are lists of that length."""

Rewards = Mapping[str, RewardFunction]
"""Reward functions passed as callables, by the name they have in verifiers.rewards."""

MAX_ANSWER_CHARS = 1000
"""No answer is longer; regular expressions below are quadratic at worst."""


_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Part:
    """What one reward function says of one completion."""

    value: float | None
    reason: str | None = None
    is_fault: bool = False
    """The function did not do its work: it raised, or returned what is no reward."""


# --- built in -----------------------------------------------------------------------------------------------------------


def math_reward(
    prompts: list[str], completions: list[str], *, answer: list[str], finish_reasons: Sequence[str | None] | None = None, **_: Any
) -> list[Score]:
    """1 if the completion's answer equals the gold answer mathematically (answers.py over math-verify), else 0.

    A completion without an answer is wrong; a gold answer that nobody can read is no ground for either.
    """
    reasons = finish_reasons or [None] * len(completions)
    return [_math_score(*row) for row in zip(completions, answer, reasons, strict=True)]


def _math_score(completion: str, gold: str, finish_reason: str | None) -> Score:
    peak_before = _peak_memory()
    grade = answers.grade(completion, gold, truncated=finish_reason == "length")
    if grade.correct:
        return 1.0
    # sympy and math-verify swallow MemoryError and say "not equal": a check that came near the limit has no verdict.
    # Three quarters, because one large request fails long before the last page is used.
    limit, loaded = resource.getrlimit(resource.RLIMIT_AS)[0], _memory_when_loaded
    if limit != resource.RLIM_INFINITY and (peak := _peak_memory()) > peak_before and peak > loaded + 0.75 * (limit - loaded):
        raise MemoryError
    score = None if grade.correct is None else 0.0
    return score if grade.reason is None else (score, f"math: {grade.reason}")


_memory_when_loaded = 0
"""Address space before the first check: the limit is set above it."""


def _peak_memory() -> int:
    """Most address space that this process ever had, in bytes; 0 where the system does not say."""
    if not _STATUS.exists():
        return 0
    return int(_STATUS.read_text().partition("VmPeak:")[2].split()[0]) * 1024


def exact_match(prompts: list[str], completions: list[str], *, answer: list[str], ignore_case: bool = True, **_: Any) -> list[Score]:
    """1 if the completion's answer (or, where it marks none, all of it) is the gold answer letter by letter, else 0.

    Spaces around and between words, compatibility forms (full-width digits) and a final full stop do not count.
    """

    def plain(text: str) -> str:
        text = " ".join(unicodedata.normalize("NFKC", text).split()).rstrip(".")
        return text.casefold() if ignore_case else text

    return [
        float(plain(gold) in (plain(answers.extract(completion).text or ""), plain(completion)))
        for completion, gold in zip(completions, answer, strict=True)
    ]


_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212]?)\s*(?:\\[dt]?frac\s*\{(?P<top>\d{1,30})\}\s*\{(?P<bottom>\d{1,30})\}"
    r"|(?P<whole>\d{1,3}(?:(?:,|\{,\})\d{3}){1,20}(?!\d)|\d{0,60})(?P<decimals>\.\d{1,60})?)"
    r"(?:\s*/\s*(?P<over>\d{1,30}))?(?:[eE](?P<e>[-+]?\d{1,3})|\s*(?:\\times|\\cdot|\*|x|×)\s*10\s*\^\s*\{?(?P<ten>[-+]?\d{1,3})\}?)?"
)


_BEFORE_NUMBER = re.compile(r"[\s$£€\\({~≈]*(?:\\?[A-Za-z]\w{0,20}\s*(?:=|≈|\\approx|is|:))?[\s$£€\\({~≈]*")
"""Of a quantity nothing stands before its number but money, brackets and a name: exp(2) is not 2."""
_A_UNIT = re.compile(r"[A-Za-z°%µΩ][A-Za-z°%µΩ\d/^·-]{0,40}")
"""And nothing behind it but a unit: 2**3 is not 2."""


def _quantity(text: str) -> tuple[float, str] | None:
    """(number, unit) of a text such as "$1,250.50", "3/4 cup" or "2.5 \\times 10^3 \\text{ m}"; None: no number."""
    text = text[:MAX_ANSWER_CHARS]
    match = next((m for m in _NUMBER.finditer(text) if m["top"] or m["whole"] or m["decimals"]), None)
    if match is None or not _BEFORE_NUMBER.fullmatch(text[: match.start()]):
        return None
    if match["top"]:
        value = int(match["top"]) / int(match["bottom"]) if int(match["bottom"]) else math.nan
    else:
        value = float(re.sub(r"[,{}]", "", match["whole"] or "0") + (match["decimals"] or ""))
    if match["over"]:
        value = value / int(match["over"]) if int(match["over"]) else math.nan
    value *= 10.0 ** int(match["e"] or match["ten"] or 0)
    unit = re.sub(r"\\(?:text|mathrm|mbox|textbf)\b|\\[ ,;!]|[\\{}$~\s]|\^?circ\b|[.,;]$", "", text[match.end() :])
    if unit and not _A_UNIT.fullmatch(unit):
        return None
    unit = unit[:-1] if len(unit) > 3 and unit.endswith("s") else unit  # metres and metre
    return (-value if match["sign"] in ("-", "\u2212") else value), unit


def numeric(
    prompts: list[str],
    completions: list[str],
    *,
    answer: list[str],
    relative_tolerance: float = 1e-4,
    absolute_tolerance: float = 1e-9,
    require_unit: bool = False,
    **_: Any,
) -> list[Score]:
    """1 if the number in the completion's answer is within a tolerance of the gold number, and their units agree, else 0.

    |x - gold| <= max(relative_tolerance |gold|, absolute_tolerance). Units (what follows the number) are compared as text, and
    only where both have one; `require_unit` refuses an answer without the gold's unit. Nothing is converted.
    """
    return [
        _numeric_score(answers.extract(completion).text or "", gold, relative_tolerance, absolute_tolerance, require_unit)
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _numeric_score(text: str, gold: str, relative_tolerance: float, absolute_tolerance: float, require_unit: bool) -> Score:
    wanted, found = _quantity(gold), _quantity(text)
    if wanted is None or not math.isfinite(wanted[0]):
        return None, f"numeric: the gold answer {gold[:100]!r} has no number"
    if found is None:
        return 0.0, f"numeric: {answers.NO_ANSWER}"
    if wanted[1] != found[1] and wanted[1] and (found[1] or require_unit):
        return 0.0
    return float(abs(found[0] - wanted[0]) <= max(relative_tolerance * abs(wanted[0]), absolute_tolerance))


def format_reward(prompts: list[str], completions: list[str], *, boxed: bool = True, think: bool = False, **_: Any) -> list[Score]:
    """1 if the completion has the form that is asked for, else 0.

    Args:
        boxed: exactly one \\boxed{...}, closed and not empty, outside of the thoughts.
        think: begins with one <think>...</think>, with something in it and after it.
    """

    def good(text: str) -> bool:
        thoughts, closing, rest = text.rpartition("</think>")
        if think and not (closing and text.count("<think>") == text.count("</think>") == 1 and thoughts.lstrip().startswith("<think>")
                          and thoughts.partition("<think>")[2].strip() and rest.strip()):  # fmt: skip
            return False
        final = rest if closing else text
        return not boxed or (final.count("\\boxed") == 1 and _closed_box(final[final.index("\\boxed") + len("\\boxed") :]))

    return [float(good(completion)) for completion in completions]


def _closed_box(text: str) -> bool:
    """Whether a text starts with {...}, its braces balanced and something in them."""
    if not text.startswith("{"):
        return False
    depths = itertools.accumulate({"{": 1, "}": -1}.get(letter, 0) for letter in text)
    end = next((i for i, depth in enumerate(depths) if depth == 0), -1)
    return end > 0 and bool(text[1:end].strip())


def length_reward(
    prompts: list[str],
    completions: list[str],
    *,
    completion_ids: Sequence[Sequence[int]] | None = None,
    free: int = 0,
    limit: int = 1024,
    **_: Any,
) -> list[Score]:
    """0 up to `free` tokens, then falling in a line to -1 at `limit` tokens and beyond (DAPO, arXiv 2503.14476, equation 13).

    Words are counted where the token ids are not known (`gvpo-ray verify`).
    """
    if not 0 <= free < limit:
        raise ValueError(f"length: free ({free}) must be at least 0 and below limit ({limit})")
    sizes = [len(ids) for ids in completion_ids] if completion_ids is not None else [len(text.split()) for text in completions]
    return [-min(1.0, max(0.0, (size - free) / (limit - free))) for size in sizes]


WARM_UP = [
    ("The answer is $\\frac{1}{2}$.", "0.5"),
    ("I do not know.", "Monday"),
    ("\\boxed{(x + 1)^2}", "x^2 + 2x + 1"),
    ("\\boxed{\\sqrt{8} + \\sqrt[3]{2}}", "3\\pi"),
    ("\\boxed{[0, 1) \\cup (2, \\infty)}", "(-\\infty, -1]"),
    ("\\boxed{\\begin{pmatrix} 1 & a \\\\ 0 & -1 \\end{pmatrix}}", "\\begin{pmatrix} 1 & b \\\\ 0 & -1 \\end{pmatrix}"),
    ("\\boxed{\\sin 2x + \\log_2 x}", "2\\sin x \\cos x + e^{-x}"),
    ("\\boxed{\\{1, 2\\}}", "x \\geq \\frac{a}{b}"),
    ("\\boxed{\\binom{n}{2} + 2!}", "\\frac{n(n - 1)}{2} + |x|"),
]
"""Graded before the first check: the parser's tables and sympy's caches fill up for a second, once for all children."""

BUILT_IN: dict[str, RewardFunction] = {
    "math": math_reward,
    "exact_match": exact_match,
    "numeric": numeric,
    "format": format_reward,
    "length": length_reward,
}


# --- over HTTP ----------------------------------------------------------------------------------------------------------


class HttpReward:
    """A reward function served over HTTP; called in the verifier, since the children have no network.

    POST {"prompts": [...], "completions": [...], "columns": {"answer": [...], ...}} -> {"rewards": [number or null, ...]}, at most
    `batch_size` completions in one request. Connection errors and the statuses 429 and 5xx are tried again, each time after
    twice as long (from half a second).
    """

    def __init__(self, config: RewardConfig) -> None:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        assert config.url is not None
        self._url, self._timeout_s, self._batch_size, self._arguments = config.url, config.timeout_s, config.batch_size, config.arguments
        retry = Retry(config.num_retries, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), allowed_methods=None)
        self._session = requests.Session()
        self._session.mount("http://", HTTPAdapter(max_retries=retry))
        self._session.mount("https://", HTTPAdapter(max_retries=retry))

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        rewards: list[Any] = []
        for begin in range(0, len(completions), self._batch_size):
            part = slice(begin, begin + self._batch_size)
            body = {
                "prompts": prompts[part],
                "completions": completions[part],
                "columns": {name: values[part] for name, values in columns.items()},
                **self._arguments,
            }
            response = self._session.post(self._url, json=body, timeout=self._timeout_s)
            response.raise_for_status()
            answer = response.json()
            found = answer.get("rewards") if isinstance(answer, dict) else answer
            if not isinstance(found, list) or len(found) != len(completions[part]):
                raise ValueError(f"{self._url} answered {str(answer)[:200]}, not {len(completions[part])} rewards")
            rewards += found
        return rewards


# --- any of them --------------------------------------------------------------------------------------------------------


def call(
    name: str,
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: Mapping[str, Any],
    catch: type[BaseException] = Exception,
) -> list[Part]:
    """One Part per completion, whatever the function does short of ending the process.

    Args:
        catch: BaseException where nothing but this call runs: completions make SystemExit, and math-verify's TimeoutException.

    Raises:
        MemoryError: comes through, because what the function left behind still fills the memory.
    """
    try:
        returned = function(prompts=prompts, completions=completions, **columns)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_await(returned))
    except MemoryError:
        raise
    except catch as error:  # untrusted output is scored here
        return [Part(None, f"{name} raised {describe(error)}", is_fault=True)] * len(completions)
    returned = returned.tolist() if hasattr(returned, "tolist") else returned  # numpy, torch
    if not isinstance(returned, (list, tuple)):
        return [Part(None, f"{name} returned {_shown(returned)}, not a list of rewards", is_fault=True)] * len(completions)
    if len(returned) != len(completions):
        count = f"{len(completions)} completion{'s' * (len(completions) > 1)}"
        return [Part(None, f"{name} returned {len(returned)} rewards for {count}", is_fault=True)] * len(completions)
    return [_part(name, score) for score in returned]


async def _await(awaitable: Any) -> Any:
    return await awaitable


def _part(name: str, score: Any) -> Part:
    score, remark = score if isinstance(score, tuple) and len(score) == 2 else (score, None)
    remark = None if remark is None else str(remark)[:500]
    if score is None:
        return Part(None, remark or f"{name} gave no reward (None)")
    if not isinstance(score, numbers.Real):
        return Part(None, f"{name} returned {_shown(score)}, not a number", is_fault=True)
    if not fits_float32(float(score)):
        return Part(None, f"{name} returned {float(score)}, not a finite float32", is_fault=True)
    return Part(float(score), remark)


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"


def fits_float32(value: float) -> bool:
    return math.isfinite(value) and abs(value) <= 3.4028234e38


def describe(error: BaseException) -> str:
    """One line for an error that somebody else's code raised."""
    if isinstance(error, ConfigError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def source_of(name: str, config: RewardConfig, function: RewardFunction | None) -> dict[str, Any]:
    """A reward function as JSON, for the process that loads it: by its place, or a callable by its pickle."""
    where = {"pickle": base64.b64encode(cloudpickle.dumps(function)).decode()} if function is not None else {"place": config.function or name}
    return {**where, "arguments": config.arguments}


def load(source: Mapping[str, Any]) -> RewardFunction:
    """The function behind `math`, `module:function`, `path.py:function` or a pickle, with its arguments, ready to be timed.

    Raises:
        ConfigError: no such file, module, function or argument. Whatever a user's module raises comes through.
    """
    function = _callable(cloudpickle.loads(base64.b64decode(source["pickle"])), "it") if "pickle" in source else _find(source["place"])
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    # Our own take any column (**_), so that a misspelt argument would be one; users' may mean it.
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters) and function not in BUILT_IN.values()
    for name in source["arguments"]:
        if name not in named and not takes_any:
            raise ConfigError(f"no argument {name!r}; it takes {', '.join(sorted(named - {'prompts', 'completions'}))}")
    if function is math_reward:
        for completion, gold in WARM_UP:
            math_reward(["1"], [completion], answer=[gold])
        global _memory_when_loaded
        _memory_when_loaded = _peak_memory()
    return functools.partial(function, **source["arguments"]) if source["arguments"] else function


def _find(place: str) -> RewardFunction:
    if place in BUILT_IN:
        return BUILT_IN[place]
    place, _, attribute = place.rpartition(":")
    if place.endswith(".py"):
        module = _load_file(Path(place).expanduser().resolve())
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not (place == error.name or place.startswith(error.name + ".")):
                raise  # the module is there, and something that it imports is not
            raise ConfigError(f"no module named {error.name}") from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{place} has no function {attribute!r}")
    return _callable(getattr(module, attribute), attribute)


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(f"gvpo_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.append(str(path.parent))  # helpers beside the file; last, so that they shadow nothing
    spec.loader.exec_module(module)
    return module


def _callable(value: Any, name: str) -> RewardFunction:
    if not callable(value):
        raise ConfigError(f"{name} is {type(value).__name__}, not a function")
    function: RewardFunction = value
    return function

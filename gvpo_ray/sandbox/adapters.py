"""Reward functions in the shapes of other systems are called as they expect, and what they return is read.

The signature decides: verl's `compute_score(data_source, solution_str, ground_truth, extra_info)` and slime's
`reward_func(args, sample)` get a row at a time, as does AReaL's
`reward_fn(prompt, completions, prompt_ids, completion_ids, answer)`. Their batched forms and OpenRLHF's
`reward_func(queries, prompts, labels)` get lists, and every other function is called as TRL does, with
`prompts`, `completions` and every column of the data by its name.

If the data's prompts are lists of messages, a function of TRL's form gets them as such, and each completion
as [{"role": "assistant", "content": text}]. Built-in functions, adapters and reward servers always get texts.
"""

from __future__ import annotations

import asyncio
import copy
import difflib
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from decimal import Decimal
from enum import Enum
from types import SimpleNamespace
from typing import Any

from gvpo_ray.config.base import ConfigError

Function = Callable[..., Any]

MESSAGES, MATCH = "prompt_messages", "answer_match"
"""Arguments beside the data's columns: the prompt's messages where it is a conversation; "any" or "all" where
`answer` is a list of several golds. Only functions that name them get them as arguments."""

GOLD = "gold_answer"
"""The gold where the data has a column `answer` that is not the gold: users' functions get that column as
`answer`, and built-in ones the gold."""

GIVEN = ("prompts", "completions", "completion_ids", "finish_reasons", "group_id", "dataset")
"""Arguments that are there for every data set."""

OF_TRL = ("log_extra", "log_metric")
"""Callbacks that TRL passes; what they are told is not kept."""


def adapted(function: Function, arguments: Mapping[str, Any], is_built_in: bool) -> Function:
    """Return a function of this package's form, `f(prompts, completions, **columns)`, that calls another.

    Args:
        function: a reward function in one of the shapes above.
        arguments: keyword arguments of the config; they hold where the data has a column of the same name.
        is_built_in: whether it is one of this package's own, which change nothing and get all golds.
    """
    if is_built_in:
        options = {
            p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty
        }
        own = options - set(GIVEN)  # what the config says, and no column of the data that is called so
        return lambda **columns: _over_golds(
            function, {name: v for name, v in columns.items() if name not in own} | dict(arguments)
        )
    named, takes_any = _parameters(function)
    arrange = _arrangement(named)
    bound = (
        functools.partial(function, SimpleNamespace(**arguments))
        if arrange in OF_SLIME
        else functools.partial(function, **arguments)
    )
    wanted = None if takes_any else named - set(arguments)

    def call(**columns: Any) -> Any:
        given = {name: values for name, values in columns.items() if name not in arguments}
        # functions may empty or change what they get, and the next one must not see it
        return arrange(bound, copy.deepcopy(given), wanted)

    return call


def check_signature(
    function: Function,
    arguments: Collection[str],
    is_built_in: bool,
    columns: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Check that a reward function can be called, as far as its signature shows it.

    Args:
        function: the reward function as the user wrote it.
        arguments: names of the config's arguments.
        is_built_in: whether it is one of this package's own, whose **columns take no arguments of the config.
        columns: key of a data set in the config -> its columns, `answer` included if it has golds: every
            required argument must be one. None: that is not checked.

    Raises:
        ConfigError: one line that says what is wrong, or names the argument and the data set.
    """
    if inspect.isclass(function):
        raise ConfigError(
            f"{function.__name__} is a class: name a function, or a callable object such as reward = "
            f"{function.__name__}()"
        )
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    named, takes_any = _parameters(function)
    arrange = _arrangement(named)
    if arrange in OF_SLIME:
        return  # it is called by position, and the config's arguments are attributes of `args`
    unknown = set(arguments) - (set(arguments) if takes_any and not is_built_in else named)
    for name in arguments:
        if name in unknown | {"prompts", "completions"}:
            raise ConfigError(
                f"no argument {name!r}; it takes {', '.join(sorted(named - {'prompts', 'completions'}))}"
            )
    if hidden := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]:
        raise ConfigError(
            f"its argument {hidden[0]!r} cannot be given by name (there is a / behind it), and arguments are "
            "given by name alone"
        )
    if not named and not takes_any:
        raise ConfigError("it takes no arguments by name, such as prompts, completions, answer")
    if arrange is _as_trl and _is_number(signature.return_annotation):
        raise ConfigError(
            "it says that it returns one number, and it is called with a list of completions: it must return "
            "a list with one reward for each"
        )
    given = {*GIVEN, MESSAGES, MATCH, *arguments, *ARRANGED[arrange]}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name in given:
            continue
        for key, names in (columns or {}).items():
            if parameter.default is parameter.empty and parameter.name not in names:
                near = difflib.get_close_matches(parameter.name, [*names, *GIVEN], n=1)
                raise ConfigError(
                    f"it needs the argument {parameter.name!r}, and {key} has no such column; it has "
                    f"{', '.join(names) or 'no further ones'}{f'; did you mean {near[0]}?' if near else ''}"
                )


def _is_number(annotation: Any) -> bool:
    """Return whether an annotation, such as float | None, says that a function returns one number."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    kinds = set(text.replace(" ", "").split("|"))
    return kinds <= {"float", "int", "bool", "None"} and kinds != {"None"}


def _parameters(function: Function) -> tuple[set[str], bool]:
    """Return the names of a function's parameters, and whether it takes any others."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


Arrange = Callable[[Function, dict[str, Any], set[str] | None], Any]
"""Calls a function with the arguments of a table, as far as it takes them (None: it takes any)."""


def _arrangement(named: Collection[str]) -> Arrange:
    """Return how a function with these parameters is called."""
    if {"prompt", "completions"} <= {*named} and "prompts" not in named:
        return _areal
    if "completions" in named:
        return _as_trl
    marks = {"solution_str": _verl, "solution_strs": _verl_batch, "queries": _openrlhf}
    marks |= {"sample": _slime, "samples": _slime_batch}
    return next((arrange for name, arrange in marks.items() if name in named), _as_trl)


def _as_trl(function: Function, columns: dict[str, Any], named: set[str] | None) -> Any:
    messages = columns.pop(MESSAGES, None)
    match = columns.pop(MATCH, None)
    columns.pop(GOLD, None)
    if messages is not None and any(messages):
        # each prompt of a group is the same, so all of them are conversations, or none is
        columns["prompts"] = messages
        columns["completions"] = [[{"role": "assistant", "content": text}] for text in columns["completions"]]
    for name, value in ((MESSAGES, messages), (MATCH, match)):
        if named is not None and name in named:
            columns[name] = value
    if named is not None:
        columns |= {name: _ignore for name in OF_TRL if name in named}
        columns = {name: value for name, value in columns.items() if name in named}
    return function(**columns)


def _ignore(*_: Any, **__: Any) -> None:
    """Take what a function tells TRL's logs."""


def _verl(function: Function, columns: dict[str, Any], named: set[str] | None) -> Any:
    """Call verl's form for each row, with the columns of the row by name."""
    allowed = named or ARRANGED[_verl]
    results = []
    for row in _rows(columns):
        row |= _of_verl(row) | {"solution_str": row["completions"]}
        results.append(function(**{name: value for name, value in row.items() if name in allowed}))
    return _awaited(results)


def _areal(function: Function, columns: dict[str, Any], named: set[str] | None) -> Any:
    """Call AReaL's form for each row: `completions` is one text, and `prompt_ids`, unknown here, are None."""
    results = []
    for row in _rows(columns):
        ours = {"prompt": row["prompts"], "prompt_ids": None, "answer": _gold(row)}
        row = {"completion_ids": None, **row, **ours}
        given = set(row) - {"prompts", GOLD, MATCH, MESSAGES} if named is None else named
        results.append(function(**{name: value for name, value in row.items() if name in given}))
    return _awaited(results)


def _rows(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Return the arguments of each completion by itself."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _awaited(results: list[Any]) -> Any:
    """Return the results of several calls; of a coroutine function, one coroutine that gives them all."""

    async def gathered() -> list[Any]:
        return list(await asyncio.gather(*results))

    return gathered() if any(map(inspect.isawaitable, results)) else results


def _gold(row: Mapping[str, Any], *usual: Any) -> Any:
    """Return the gold of a row, in the data's own type where it stands in a usual column of its system.

    The config decides which column is the gold, and `answer` holds it as text, or texts. Data without golds
    have what the first of the `usual` columns holds.
    """
    answer = row.get(GOLD, row.get("answer"))
    there = [value for value in usual if value is not None]
    same = [value for value in there if _texts(value) == _texts(answer)] if _texts(answer) else there
    return same[0] if same else answer


def _texts(gold: Any) -> list[str]:
    if isinstance(gold, (list, tuple)):
        return [text for entry in gold for text in _texts(entry)]
    return [] if gold is None or not str(gold).strip() else [str(gold)]


def _of_verl(row: dict[str, Any]) -> dict[str, Any]:
    """Return verl's arguments of a row: where its data has them, else from what every data set has."""
    inner = [row.get(column) for column in ("reward_model", "reward_spec")]
    golds = [of_model.get("ground_truth") for of_model in inner if isinstance(of_model, Mapping)]
    found: dict[str, Any] = {"data_source": row.get("dataset"), "extra_info": {}}
    found = {name: row[name] if row.get(name) is not None else value for name, value in found.items()}
    return found | {"ground_truth": _gold(row, *golds, row.get("ground_truth"))}


def _verl_batch(function: Function, columns: dict[str, Any], named: set[str] | None) -> Any:
    """Call verl's batched form: data_sources, solution_strs, ground_truths, extra_infos."""
    rows = [_of_verl(row) for row in _rows(columns)]
    given = {
        f"{name}s": [row[name] for row in rows] for name in ("data_source", "ground_truth", "extra_info")
    }
    given["solution_strs"] = columns["completions"]
    return function(**{name: value for name, value in given.items() if named is None or name in named})


def _openrlhf(function: Function, columns: dict[str, Any], named: set[str] | None) -> Any:
    """Call OpenRLHF's form: queries (prompt and completion as one text), prompts and labels."""
    prompts, completions = columns["prompts"], columns["completions"]
    given = {
        "queries": [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)],
        "prompts": prompts,
        "labels": [_gold(row, row.get("label")) for row in _rows(columns)],
    }
    others = {name: value for name, value in columns.items() if named is not None and name in named}
    return function(**{name: v for name, v in (others | given).items() if named is None or name in named})


class Status(Enum):
    """A Status says how a sample of slime ended."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"


def _sample(row: Mapping[str, Any]) -> Any:
    """Return a row as slime's Sample: of slime's own class where the user's file has imported it.

    It has `prompt` and `response` (texts), `label` (the gold), `metadata` (the column of that name),
    `response_length` (tokens), `status` and `group_index`.
    """
    cut_off = row.get("finish_reasons") == "length"
    sample = {
        "prompt": row["prompts"],
        "response": row["completions"],
        "label": _gold(row, row.get("label")),
        "metadata": row.get("metadata") or {},
        "response_length": len(row.get("completion_ids") or ()),
        "status": Status.TRUNCATED if cut_off else Status.COMPLETED,
        "group_index": row.get("group_id"),
    }
    theirs = getattr(sys.modules.get("slime.utils.types"), "Sample", None)
    if theirs is None:
        return SimpleNamespace(**sample)
    return theirs(**{**sample, "status": theirs.Status(sample["status"].value)})


def _slime(function: Function, columns: dict[str, Any], named: set[str] | None) -> Any:
    """Call slime's form for each row; `args` is bound already."""
    return _awaited([function(_sample(row)) for row in _rows(columns)])


def _slime_batch(function: Function, columns: dict[str, Any], named: set[str] | None) -> Any:
    """Call slime's form for groups (--group-rm), with a list of samples."""
    return function([_sample(row) for row in _rows(columns)])


OF_SLIME = (_slime, _slime_batch)

ARRANGED: dict[Arrange, tuple[str, ...]] = {
    _as_trl: OF_TRL,
    _areal: ("prompt", "prompt_ids"),
    _verl: ("data_source", "solution_str", "ground_truth", "extra_info"),
    _verl_batch: ("data_sources", "solution_strs", "ground_truths", "extra_infos"),
    _openrlhf: ("queries", "labels"),
}
"""The arguments that each form gets, whatever the data's columns are called."""


def _over_golds(function: Function, columns: dict[str, Any]) -> Any:
    """Call a built-in function, for each gold where a row has several.

    A completion that must match any of them gets the best of its scores, and none where no gold gives a
    reward and one cannot be compared. One that must match all is compared with all of them as one answer.
    """
    match, _ = columns.pop(MATCH, None), columns.pop(MESSAGES, None)
    if GOLD in columns:
        columns["answer"] = columns.pop(GOLD)
    answers = columns.get("answer")
    if answers is None or not any(isinstance(gold, list) for gold in answers):
        return function(**columns)
    scores = []
    for i, gold in enumerate(answers):
        options = gold if isinstance(gold, list) else [gold]
        if match is not None and match[i] == "all":
            options = [", ".join(options)]
        row = {
            name: [values[i]] if isinstance(values, list) and len(values) == len(answers) else values
            for name, values in columns.items()
        }
        found = [function(**{**row, "answer": [option]})[0] for option in options]
        scores.append(_best(found))
    return scores


def _best(scores: list[Any]) -> Any:
    values = [score[0] if isinstance(score, tuple) else score for score in scores]
    known = [i for i, value in enumerate(values) if value is not None]
    best = max(known, key=lambda i: values[i], default=0)
    unknown = [i for i, value in enumerate(values) if value is None]
    return scores[unknown[0] if unknown and (not known or values[best] <= 0) else best]


# ------------------------------------------------------------------------------------------- what is returned


def as_list(returned: Any, number: int) -> Any:
    """Return a function's result as a list where it is one in another dress, else unchanged.

    Dresses are numpy and torch arrays, generators (read up to one more than `number`), and OpenRLHF's
    {"rewards": ...} or {"scores": ...}.
    """
    if isinstance(returned, Mapping):
        returned = next((returned[key] for key in ("rewards", "scores") if key in returned), returned)
    if isinstance(returned, Iterator):
        return list(itertools.islice(returned, number + 1))
    return returned.tolist() if hasattr(returned, "tolist") else returned


def as_number(score: Any) -> tuple[Any, str | None]:
    """Return one score as a Python number where it is one in another dress, and what a dict says beside it.

    Dresses are numpy and torch scalars, decimals, and dicts with `score` (verl's), whose other entries become
    a remark. Texts stay texts: they are no numbers.
    """
    remark = None
    if isinstance(score, Mapping) and "score" in score:
        remark = ", ".join(f"{name}={value}" for name, value in score.items() if name != "score") or None
        score = score["score"]
    if isinstance(score, Decimal):
        score = float(score)
    elif hasattr(score, "item"):
        try:
            score = score.item()
        except (ValueError, RuntimeError):
            return score, remark  # an array of several numbers
    return score, remark

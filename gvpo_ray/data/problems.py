"""The rows of a data set become problems: a prompt, gold answers, and columns for the reward functions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.data.columns import (
    ABSENT,
    as_json,
    as_text,
    column_of,
    fields,
    fill,
    golds,
    has,
    missing,
    value_at,
    values,
)
from gvpo_ray.data.files import Columns, read, to_list
from gvpo_ray.data.layouts import LAST, Found, columns_of
from gvpo_ray.data.messages import (
    MEDIA,
    Message,
    as_messages,
    as_prompt,
    from_json,
    is_messages,
    split_answer,
)
from gvpo_ray.data.unfold import Unfolded

TAKEN = (
    "prompts",
    "completions",
    "completion_ids",
    "finish_reasons",
    "group_id",
    "prompt_messages",
    "answer_match",
    "gold_answer",
)
"""Arguments of reward functions that are the run's own, so that a column of such a name cannot reach them."""

OPTIONS = ("choices", "options")
"""Names of columns with the options of a multiple choice, which belong into the prompt."""


@dataclass(frozen=True)
class Problem:
    """A problem is one row of a data set, read."""

    row: int
    """Number of the row, from 0; of an unfolded data set that of the row that it was a part of."""
    prompt: str
    """The problem's text, or what stands for a conversation (messages.as_prompt)."""
    messages: list[Message] | None
    """The conversation that the prompt is; None: the prompt is a text."""
    golds: list[str]
    match: str
    """Whether a completion must match `any` or `all` of several golds."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Further columns of the row, as they are."""
    more: dict[str, Any] = field(default_factory=dict)
    """The columns that the caller of read_problems asked for, by its names."""

    def to_render(self) -> dict[str, Any]:
        """Return what a renderer needs of the problem."""
        return {"prompt": self.prompt, "messages": self.messages}

    @property
    def answer(self) -> str:
        """The gold answers as one text."""
        return {"any": " or ", "all": ", "}[self.match].join(self.golds)

    def data(self) -> dict[str, Any]:
        """Return what the column `data` of the group table holds, as JSON.

        It has "columns" (further columns by name), "messages" (the conversation), "golds" and "match" (where
        there are several), as far as there is something to say.
        """
        data: dict[str, Any] = {}
        if self.columns:
            data["columns"] = self.columns
        if self.messages is not None:
            data["messages"] = self.messages
        if len(self.golds) > 1:
            data |= {"golds": self.golds, "match": self.match}
        return data


def group_columns(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Return `prompt`, `answer` and `data` of the group table for these problems.

    Without anything to say in any of them, there is no `data`.
    """
    data = [problem.data() for problem in problems]
    columns = [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]
    if not any(data):
        return columns
    return [row | {"data": as_json(of_row)} for row, of_row in zip(columns, data, strict=True)]


@dataclass(frozen=True)
class Problems:
    """Problems holds the problems of a data set, and what was left out."""

    problems: list[Problem]
    num_rows: int
    num_without_prompt: int
    num_without_gold: int
    found: Found
    columns: list[str]
    """Names of the columns that every problem has for the reward functions."""
    notes: list[str]
    """Lines that a person should read of the data before a run, beside where prompt and gold were found."""


def read_rows(config: PromptsConfig, key: str) -> Columns:
    """Return the columns of a data set, of the rows that the config's limit leaves.

    Raises:
        ConfigError: the data cannot be read, or have no rows.
    """
    data = read(config, key)
    if not data or not len(next(iter(data.values()))):
        raise ConfigError(f"{key}.path: {config.path} has no rows")
    return {name: column[: config.limit] for name, column in data.items()}


def read_problems(
    config: PromptsConfig,
    key: str,
    more: Mapping[str, str] | None = None,
    may_lack: Collection[str] = (),
    without_gold: str | None = None,
    unfolded: Unfolded | None = None,
) -> Problems:
    """Read a data set as problems. Rows without a prompt or a gold answer are left out and counted.

    Args:
        config: the section of the config; `config.limit` takes the first rows before anything else does.
        key: where `config` stands in the run's config, for messages.
        more: further columns to read, by the names that the caller gives them.
        may_lack: names of `more` whose column may be absent.
        without_gold: the name in `more` of a column whose value makes a gold unnecessary, such as a reward.
        unfolded: the data, where the caller has read them already.

    Raises:
        ConfigError: the data cannot be read, lacks a column, has images or an entry of another kind, or no
            row has a prompt, or a gold answer.
    """
    data = read_rows(config, key) if unfolded is None else unfolded.data
    found, path = columns_of(config, data, key), f"{key}.path: {config.path}"
    for template_path in fields(found.prompt) or [found.prompt]:
        check_path(data, template_path, config, key, "prompt")
    more = {
        name: column
        for name, column in (more or {}).items()
        if name not in may_lack or column_of(data, column) is not None
    }
    for name, column in more.items():
        check_path(data, column, config, key, name)
    has_golds = found.gold not in ("", LAST)
    if has_golds and without_gold is not None and config.answer_column is None:
        has_golds = column_of(data, found.gold) is not None
    if has_golds:
        check_path(data, found.gold, config, key, "answer")
    _check_is_text(data, path)
    num_rows = len(next(iter(data.values())))
    numbers = range(num_rows) if unfolded is None else unfolded.rows
    prompts, is_json = _prompts(data, found, path, is_own=found.prompt == config.prompt_column)
    found = found._replace(is_json=is_json)
    answers = values(data, found.gold) if has_golds else [None] * num_rows
    extra = {name: values(data, column) for name, column in more.items()}
    # what reaches reward functions as prompts, answer and completions does not reach them a second time
    hidden = {*TAKEN, *more.values(), *({found.prompt, found.gold} & {"prompt", "answer"})}
    entries_of = {name: to_list(column) for name, column in data.items() if name not in hidden}
    problems, num_without_prompt, num_without_gold = [], 0, 0
    for row in range(num_rows):
        where = f"{path}: row {numbers[row]}"
        prompt, messages, last = _prompt(prompts[row], f"{where}: {found.prompt}")
        if not prompt.strip():
            num_without_prompt += 1
            continue
        answer = last if found.gold == LAST else _answer(answers[row], f"{where}: {found.gold}")
        texts = golds(answer, f"{where}: {found.gold}") if has_golds or found.gold == LAST else []
        own = {name: entries[row] for name, entries in extra.items()}
        if found.gold and not texts and (without_gold is None or own.get(without_gold) is None):
            num_without_gold += 1
            continue
        columns = {name: entries[row] for name, entries in entries_of.items()}
        problems.append(Problem(numbers[row], prompt, messages, texts, config.answer_match, columns, own))
    if not problems and num_without_gold:
        raise ConfigError(
            f"{path}: no row has a gold answer: {found.gold} is empty in all {num_without_gold} rows "
            f'({key}.answer_column: "" trains without golds, if no reward function needs them)'
        )
    if not problems:
        raise ConfigError(f"{path}: no row has a prompt: {found.prompt} is empty in all {num_rows} rows")
    names = list(dict.fromkeys([*entries_of, *(["answer"] if found.gold else [])]))
    notes = [*_notes(data, found, problems[0], key), *([] if is_json else _messages_as_text(prompts))]
    return Problems(problems, num_rows, num_without_prompt, num_without_gold, found, names, notes)


def _notes(data: Columns, found: Found, first: Problem, key: str) -> Iterator[str]:
    if taken := [name for name in data if name in TAKEN and name != found.prompt]:
        yield (
            f"reward functions get the run's own {', '.join(taken)}, not the data's column of that name: "
            "rename it if they need it"
        )
    for name in OPTIONS:
        options = first.columns.get(name)
        options = list(options.values()) if isinstance(options, dict) else options
        if not isinstance(options, list) or not options or fields(found.prompt):
            continue
        if str(options[0]) not in first.prompt:
            yield (
                f"the column {name} is not in the prompt; if it should be, write {key}.prompt_column as a "
                f'template, such as "{{{found.prompt}}}\\nA. {{{name}[0]}}"'
            )


def _messages_as_text(prompts: Sequence[Any]) -> Iterator[str]:
    texts = ((i, prompt) for i, prompt in enumerate(prompts) if isinstance(prompt, str))
    rows = [i for i, text in texts if is_messages(from_json(text))]
    if rows:
        yield (
            f"row {rows[0]} is a list of messages in JSON text ({len(rows)} of {len(prompts)} rows are), and "
            "most rows are not: all prompts are plain text"
        )


def check_path(data: Columns, path: str, config: PromptsConfig, key: str, name: str) -> None:
    """Raise a ConfigError if a data set lacks a column, or has nothing at a path into it.

    Args:
        data: the data set.
        path: the column or path.
        config: its section, for messages.
        key: where the section stands in the config, for messages.
        name: what the column is for, such as "prompt": the key `prompt_column` is named if there is one.
    """
    column = column_of(data, path)
    if column is not None and (column == path or has(data, path)):
        return
    # A column that is not the section's own (the solution of a warm start) is named by its role.
    named = f"{key}.{name}_column" if f"{name}_column" in type(config).model_fields else f"{key} ({name})"
    raise ConfigError(f"{named}: {config.path} {missing(data, path)}")


def _check_is_text(data: Columns, where: str) -> None:
    """Raise a ConfigError for data with images, sound or video, which prompts of text would lack."""
    for name, entries in data.items():
        if name.lower() not in MEDIA and not _is_media(entries):
            continue
        row = next((i for i, entry in enumerate(to_list(entries)) if entry), None)
        if row is not None:
            raise ConfigError(
                f"{where}: row {row} has {name}, and only text is trained: leave the column {name} out of "
                "the data if the prompts do not need it"
            )


def _is_media(entries: pa.ChunkedArray | list[Any]) -> bool:
    """Return whether a column has the type in which `datasets` stores images and sound, or lists of it."""
    if not isinstance(entries, pa.ChunkedArray):
        return False
    kind = entries.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def _prompts(data: Columns, found: Found, where: str, is_own: bool) -> tuple[list[Any], bool]:
    """Return the prompts of all rows, and whether they are messages that the data hold as JSON text.

    They are if every prompt is a list of messages then. Where few are, all of them are plain text; where most
    are, one that is not is a mistake of the data. A template of the config (`is_own`) is filled as it stands,
    and one of a layout has no blank ends.
    """
    paths = fields(found.prompt)
    if not paths:
        prompts = values(data, found.prompt)
        parsed = [from_json(prompt) for prompt in prompts]
        said = [row for row, prompt in enumerate(prompts) if _says(prompt)]
        if not any(isinstance(prompts[row], str) and is_messages(parsed[row]) for row in said):
            return prompts, False
        others = [row for row in said if not is_messages(parsed[row])]
        if others and 2 * len(others) < len(said):
            num = len(said) - len(others)
            raise ConfigError(
                f"{where}: row {others[0]}: {found.prompt} is no list of messages, as in {num} of "
                f"{len(said)} rows, whether as a list or in JSON text"
            )
        return (prompts, False) if others else (parsed, True)
    names = list(dict.fromkeys(str(column_of(data, path)) for path in paths))
    columns = [to_list(data[name]) for name in names]
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    texts = [
        # a template whose fields are all empty asks nothing
        fill(found.prompt, row, f"{where}: row {i}") if any(_says(value_at(row, p)) for p in paths) else ""
        for i, row in enumerate(rows)
    ]
    return texts if is_own else [text.strip() for text in texts], False


def _prompt(value: Any, where: str) -> tuple[str, list[Message] | None, Any]:
    """Return a prompt's text, its messages if it is a conversation, and what the assistant says last.

    The text is empty where the row has no prompt: an empty entry, or messages that say nothing to answer.
    """
    if not _says(value):
        return "", None, None
    if not is_messages(value):
        return as_text(value, where), None, None
    messages, last = split_answer(as_messages(value, where))
    text = as_prompt(messages) if any(message["content"].strip() for message in messages) else ""
    return text, messages, None if last is None else last["content"]


def _says(value: Any) -> bool:
    """Return whether an entry is more than null, NaN, blanks or an empty list."""
    if value is ABSENT or value is None or value == [] or value != value:
        return False
    return not isinstance(value, str) or bool(value.strip())


def _answer(value: Any, where: str) -> Any:
    """Return a gold answer; of a list of messages, what its last message says."""
    return as_messages(value, where)[-1]["content"] if is_messages(value) else value

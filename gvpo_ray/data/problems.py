"""The rows of a data set become problems: a prompt, gold answers, and columns for the reward functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.data.columns import (
    as_json,
    as_text,
    column_of,
    fields,
    fill,
    golds,
    has,
    missing,
    sample,
    values,
)
from gvpo_ray.data.files import Columns, read, to_list
from gvpo_ray.data.layouts import LAST, Found, columns_of
from gvpo_ray.data.messages import Message, as_messages, as_prompt, is_messages, split_answer


@dataclass(frozen=True)
class Problem:
    """A problem is one row of a data set, read."""

    row: int
    """Number of the row, from 0."""
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
    """The problems of a data set, and what was left out."""

    problems: list[Problem]
    num_rows: int
    num_without_gold: int
    found: Found
    columns: list[str]
    """Names of the columns that every problem has for the reward functions."""


def read_problems(
    config: PromptsConfig,
    key: str,
    more: Mapping[str, str] | None = None,
    may_lack: Collection[str] = (),
    without_gold: str | None = None,
) -> Problems:
    """Read a data set as problems. Rows without a gold answer are left out and counted.

    Args:
        config: the section of the config; `config.limit` takes the first rows before anything else does.
        key: where `config` stands in the run's config, for messages.
        more: further columns to read, by the names that the caller gives them.
        may_lack: names of `more` whose column may be absent.
        without_gold: the name in `more` of a column whose value makes a gold unnecessary, such as a reward.

    Raises:
        ConfigError: the data cannot be read, lacks a column, has an entry of another kind, or no row has a
            gold answer.
    """
    data = read(config, key)
    if not data or not len(next(iter(data.values()))):
        raise ConfigError(f"{key}.path: {config.path} has no rows")
    data = {name: column[: config.limit] for name, column in data.items()}
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
    num_rows = len(next(iter(data.values())))
    prompts = _prompts(data, found, path)
    answers = values(data, found.gold) if has_golds else [None] * num_rows
    extra = {name: values(data, column) for name, column in more.items()}
    hidden = {"prompt", "prompts", "completion", "completions", "completion_ids", *more.values()}
    hidden |= {"answer"} if found.gold == "answer" else set()
    kept = {name: to_list(column) for name, column in data.items() if name not in hidden}
    problems, num_without = [], 0
    for row in range(num_rows):
        where = f"{path}: row {row}"
        prompt, messages, last = _prompt(prompts[row], f"{where}: {found.prompt}")
        answer = last if found.gold == LAST else _answer(answers[row], f"{where}: {found.gold}")
        texts = golds(answer, f"{where}: {found.gold}") if has_golds or found.gold == LAST else []
        own = {name: entries[row] for name, entries in extra.items()}
        if found.gold and not texts and (without_gold is None or own.get(without_gold) is None):
            num_without += 1
            continue
        columns = {name: entries[row] for name, entries in kept.items()}
        problems.append(Problem(row, prompt, messages, texts, config.answer_match, columns, own))
    if not problems:
        raise ConfigError(
            f"{path}: no row has a gold answer: {found.gold} is empty in all {num_rows} rows "
            f'({key}.answer_column: "" trains without golds, if no reward function needs them)'
        )
    names = [*kept, *(["answer"] if found.gold else [])]
    return Problems(problems, num_rows, num_without, found, names)


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
    if column is not None and (column == path or has(sample(data), path)):
        return
    # A column that is not the section's own (the solution of a warm start) is named by its role.
    named = f"{key}.{name}_column" if f"{name}_column" in type(config).model_fields else f"{key} ({name})"
    raise ConfigError(f"{named}: {config.path} {missing(data, path)}")


def _prompts(data: Columns, found: Found, where: str) -> list[Any]:
    if not fields(found.prompt):
        return values(data, found.prompt)
    names = list(dict.fromkeys(str(column_of(data, path)) for path in fields(found.prompt)))
    columns = [to_list(data[name]) for name in names]
    return [
        fill(found.prompt, dict(zip(names, row, strict=True)), f"{where}: row {i}")
        for i, row in enumerate(zip(*columns, strict=True))
    ]


def _prompt(value: Any, where: str) -> tuple[str, list[Message] | None, Any]:
    """Return a prompt's text, its messages if it is a conversation, and what the assistant says last."""
    if not is_messages(value):
        return as_text(value, where), None, None
    messages, last = split_answer(as_messages(value, where))
    if not messages:
        raise ConfigError(f"{where} has no message to answer")
    return as_prompt(messages), messages, None if last is None else last["content"]


def _answer(value: Any, where: str) -> Any:
    """Return a gold answer; of a list of messages, what its last message says."""
    return as_messages(value, where)[-1]["content"] if is_messages(value) else value

"""Data sets become prompt rows of the group table.

A prompt set is fixed when it is made: it holds the rows that fit, in the file's order, templated and
tokenised. `group(id)` is then a pure function of the seed and the id. So a restarted run asks for the same
prompts again and no position has to be saved.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.data.columns import as_text, values
from gvpo_ray.data.dialogue import Dialogue
from gvpo_ray.data.files import read
from gvpo_ray.data.problems import Problem, check_path, group_columns, read_problems
from gvpo_ray.data.rendering import MakeRenderer, Renderer, renderer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptSet:
    """A prompt set holds the problems of one data set.

    Args:
        config: the section of the config; `config.limit` cuts before anything else does.
        tokenizer: the model's tokenizer; its chat template is used where the config has no `template`.
        name: the `dataset` column of the rows.
        max_tokens: tokens that the context leaves for a prompt; the smaller of it and `config.max_tokens`
            holds.
        seed: decides the order of each epoch.
        key: where `config` stands in the run's config, for messages: "prompts", "evaluation.sets.heldout".
        make_renderer: makes the renderer.

    Attributes:
        num_rows: rows read.
        num_without_prompt: rows left out because their prompt is empty.
        num_without_gold: rows left out because they have no gold answer.
        columns: names of the columns that reward functions get of each row.
        layout: where prompt and gold were found, if the config does not say it itself; else "".
        notes: further lines about the data that a person should read before a run.
        num_too_long: rows left out because their prompt is longer than the limit (it is never cut).
        longest: tokens of the longest prompt read, including prompts that are left out.

    Raises:
        ConfigError: one line that names the key, and the row or line where there is one.
    """

    def __init__(
        self,
        config: PromptsConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        max_tokens: int | None,
        seed: int = 0,
        key: str = "prompts",
        make_renderer: MakeRenderer = renderer_of,
    ) -> None:
        found = read_problems(config, key)
        problems = found.problems
        renderer = make_renderer(config, tokenizer, key)
        rendered = renderer.render([problem.to_render() for problem in problems])
        lengths = np.array([len(ids) for ids, _ in rendered])
        if not lengths.all():
            raise ConfigError(
                f"{key}.path: {config.path}: row {problems[int(np.argmin(lengths))].row}: the prompt has no "
                "tokens"
            )
        limit = min((n for n in (config.max_tokens, max_tokens) if n is not None), default=None)
        keep = np.arange(len(lengths)) if limit is None else np.flatnonzero(lengths <= limit)
        self.num_rows = found.num_rows
        self.num_without_prompt, self.num_without_gold = found.num_without_prompt, found.num_without_gold
        self.num_too_long = len(lengths) - len(keep)
        self.longest = int(lengths.max())
        self.columns, self.layout = found.columns, found.found.description()
        self.notes = [
            *found.notes,
            *_what_the_tokenizer_loses(problems[0], rendered[0].prompt_ids, renderer),
            *_what_the_template_leaves_out(problems[0], renderer),
        ]
        if not len(keep):
            all_long = f"all {len(lengths)} prompts are longer (the shortest has {lengths.min()} tokens)"
            if limit == config.max_tokens:
                raise ConfigError(f"{key}.max_tokens: {limit} tokens are too few: {all_long}")
            raise ConfigError(
                f"{key}.path: {config.path}: the context leaves {limit} tokens for a prompt, and {all_long}; "
                "lower sampling.max_tokens or raise model.max_length"
            )
        self._table = groups.table(
            {
                "group_id": i,
                "dataset": name,
                "prompt_ids": rendered[row].prompt_ids,
                **columns,
                **rendered[row].extras,
            }
            for i, (row, columns) in enumerate(
                zip(keep, group_columns([problems[row] for row in keep]), strict=True)
            )
        )
        self._order = EpochOrder(len(self), seed, config.shuffle)

    def __len__(self) -> int:
        """Return the number of prompts in one epoch."""
        return int(self._table.num_rows)

    def group(self, group_id: int) -> pa.Table:
        """Return the prompt of a group as one row (groups.PROMPT_COLUMNS), by the seed and the id alone.

        Ids count through the epochs: id // N is the epoch, id % N the place in that epoch's order.
        """
        return groups.with_columns(self._table.slice(self._order.row(group_id), 1), group_id=[group_id])

    def all(self, limit: int | None = None) -> pa.Table:
        """Return the first `limit` prompts (None: all) in the file's order, with group_id 0, 1, 2, …."""
        return self._table.slice(0, limit)

    def digest(self) -> str:
        """Return the SHA-256 of the problems, answers and further columns in use, in the file's order.

        Other data have another digest.
        """
        content = hashlib.sha256()
        names = [n for n in ("prompt", "answer", *groups.DATA_COLUMNS) if n in self._table.column_names]
        for row in zip(*(self._table[name].to_pylist() for name in names), strict=True):
            content.update(json.dumps(row).encode())
        return content.hexdigest()


def _what_the_tokenizer_loses(problem: Problem, ids: list[int], renderer: Renderer) -> Iterator[str]:
    """Yield a line if a problem's text cannot be read in its tokens.

    Transformers 5 reads a folder of some families, such as Qwen2, with that family's own rules for splitting
    text, whatever tokenizer.json says: a tokenizer of single characters then loses all spaces.
    """
    text = problem.prompt if problem.messages is None else problem.messages[-1]["content"]
    seen = renderer.text(ids, with_special=True)
    if isinstance(text, str) and _cleaned(text.strip()) not in _cleaned(seen):
        yield (
            f"the model's tokenizer does not keep the text of the first prompt: {_short(text)} is read as "
            f"{_short(seen)}"
        )


def _what_the_template_leaves_out(problem: Problem, renderer: Renderer) -> Iterator[str]:
    """Yield a line if the model is not told of an environment's tools."""
    names = renderer.unshown(problem.to_render()) if isinstance(renderer, Dialogue) else []
    if names:
        yield (
            f"the first prompt does not name the tool {names[0]}: its chat template leaves tools out; "
            "prompts.system_prompt can say what tools there are, and that a call is written "
            '<tool_call>{"name": …, "arguments": {…}}</tool_call>'
        )


def _cleaned(text: str) -> str:
    """Return a text without spaces before punctuation and carriage returns, and with accents in one part."""
    return re.sub(r" (?=[.?!,']|n't)", "", unicodedata.normalize("NFC", text).replace("\r", ""))


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:40]} … {text[-40:]}")


class EpochOrder:
    """An EpochOrder is a row order over epochs: each epoch visits every row once.

    Args:
        num: number of rows.
        seed: decides each epoch's permutation, together with the epoch's number.
        shuffle: reshuffle per epoch; otherwise rows keep the file's order.
    """

    def __init__(self, num: int, seed: int, shuffle: bool) -> None:
        self._num = num
        self._seed = seed
        self._shuffle = shuffle
        self._epochs: dict[int, np.ndarray] = {}

    def row(self, number: int) -> int:
        """Return the row of this number, a pure function of the number and the seed.

        Numbers count through the epochs.
        """
        epoch, place = divmod(number, self._num)
        if not self._shuffle:
            return place
        if epoch not in self._epochs:  # the last two are kept: numbers near a border alternate between epochs
            self._epochs = dict(list(self._epochs.items())[-1:])
            self._epochs[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self._num)
        return int(self._epochs[epoch][place])


def load_rows(config: PromptsConfig, columns: Mapping[str, str], key: str) -> pa.Table:
    """Read the named columns of a data set as text.

    Args:
        config: says where the data is; `limit` takes the first so many rows.
        columns: name in the result -> column in the data, such as {"prompt": "question", "answer": "gold"}.
        key: where `config` stands in the run's config, for messages.

    Returns:
        A table of string columns, in the order of `columns`, without nulls; numbers have become text.

    Raises:
        ConfigError: the file or data set is absent, not readable or empty, lacks a column, or has an entry
            that is neither text nor a number.
    """
    data = read(config, key)
    for name, path in columns.items():
        check_path(data, path, config, key, name)
    data = {name: column[: config.limit] for name, column in data.items()}
    texts = {
        name: [
            as_text(value, f"{key}.path: {config.path}: row {i}: {path}")
            for i, value in enumerate(values(data, path))
        ]
        for name, path in columns.items()
    }
    return pa.table(texts, schema=pa.schema([(name, pa.string()) for name in columns]))

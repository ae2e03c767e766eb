"""Offline completions (of people, other models, logs) become group rows, without sampling log-probs.

GVPO's optimum does not depend on who wrote a completion. So offline completions join groups of the policy's
own (`share`) or form groups by themselves (`group_share`). A source is fixed when it is made, and what it
returns is a pure function of the seed and a number: there is no position to save.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import SourceConfig
from gvpo_ray.data.prompts import EpochOrder, as_text, load_columns
from gvpo_ray.data.rendering import renderer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_REWARD = float(np.finfo(np.float32).max)
"""Rewards are float32."""


class OfflineSource:
    """A source holds the completions of one file, by prompt.

    Args:
        config: the section `sources.<name>`; `config.limit` cuts before anything else does.
        tokenizer: the model's tokenizer.
        name: name of the source; its completions have the source "offline:<name>".
        template: the run's prompt template, for a source without its own.
        system_prompt: the run's system prompt, for a source without its own.
        max_tokens: longest prompt, in tokens; the smaller of it and `config.max_tokens` holds.
        max_length: longest prompt + completion, in tokens, with the end-of-sequence token.
        num_completions: k, most completions of a whole group.
        seed: decides the order of each epoch and which completions join a group.

    Attributes:
        num_rows: rows read.
        num_too_long: rows left out because they are longer than a limit (they are never cut).
        num_single: prompts whose only completion makes no whole group; 0 for a source with `share`.

    Raises:
        ConfigError: one line that names the key, and the row where there is one.
    """

    def __init__(
        self,
        config: SourceConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        template: str | None,
        system_prompt: str | None,
        max_tokens: int | None,
        max_length: int,
        num_completions: int,
        seed: int = 0,
    ) -> None:
        key, self.source = f"sources.{name}", f"offline:{name}"
        given = {"template": template, "system_prompt": system_prompt}
        templated = config.model_copy(
            update={name: text for name, text in given.items() if getattr(config, name) is None}
        )
        renderer = renderer_of(templated, tokenizer, key)
        if renderer.end_id is None:
            raise ConfigError(
                f"{key}: the model's tokenizer has no end-of-sequence token, and every completion must end "
                "with one"
            )
        self._rows = _read(config, key)
        self._has_rewards = config.reward_column is not None
        prompts = self._rows["prompt"].to_pylist()
        distinct = list(dict.fromkeys(prompts))
        rendered = dict(
            zip(distinct, renderer.render([{"prompt": prompt} for prompt in distinct]), strict=True)
        )
        if empty := [prompt for prompt in distinct if not rendered[prompt].prompt_ids]:
            raise ConfigError(
                f"{key}.path: {config.path}: row {prompts.index(empty[0])}: the prompt has no tokens"
            )
        completion_ids = _with_end(renderer.encode(self._rows["completions"].to_pylist()), renderer.end_id)
        self._rows = self._rows.append_column(
            "completion_ids", pa.array(completion_ids, pa.list_(pa.int32()))
        )
        self._num_tokens = [len(ids) for ids in completion_ids]
        self._max_length = max_length

        longest_prompt = min(n for n in (config.max_tokens, max_tokens, max_length) if n is not None)
        fits = [
            len(rendered[prompt].prompt_ids) <= min(longest_prompt, max_length - tokens)
            for prompt, tokens in zip(prompts, self._num_tokens, strict=True)
        ]
        self.num_rows, self.num_too_long = len(fits), fits.count(False)
        if not any(fits):
            raise ConfigError(
                f"{key}.path: {config.path}: all {len(fits)} rows are too long: a prompt may have "
                f"{longest_prompt} tokens, and {max_length} with its completion"
            )
        by_prompt: dict[tuple[str, str], list[int]] = {}
        for row, (prompt, answer) in enumerate(zip(prompts, self._rows["answer"].to_pylist(), strict=True)):
            if fits[row]:
                by_prompt.setdefault((prompt, answer), []).append(row)
        self.num_single = 0
        if config.group_share:
            several = {problem: rows for problem, rows in by_prompt.items() if len(rows) > 1}
            self.num_single = len(by_prompt) - len(several)
            if not several:
                raise ConfigError(
                    f"{key}.path: {config.path}: no prompt has two completions, as a group must "
                    f"({self.num_single} have one, {self.num_too_long} of {self.num_rows} rows are too long)"
                )
            by_prompt = several
        self._prompts = groups.table(
            {
                "group_id": 0,
                "prompt": prompt,
                "answer": answer,
                "dataset": name,
                "prompt_ids": rendered[prompt].prompt_ids,
                **rendered[prompt].extras,
            }
            for prompt, answer in by_prompt
        )
        self._groups = [
            (i, part) for i, rows in enumerate(by_prompt.values()) for part in _parts(rows, num_completions)
        ]
        self._by_text: dict[str, list[int]] = {}
        for (prompt, _), rows in by_prompt.items():
            self._by_text.setdefault(prompt, []).extend(rows)
        self._order = EpochOrder(len(self), seed, config.shuffle)
        self._seed = seed

    def __len__(self) -> int:
        """Return the number of whole groups in one epoch."""
        return len(self._groups)

    def group(self, group_id: int, number: int) -> pa.Table:
        """Return the whole group of this number, as one row with this group_id.

        Numbers count through the epochs. Each epoch has every completion once, and is shuffled anew where
        `config.shuffle` says so.

        Returns:
            groups.PROMPT_COLUMNS and COMPLETION_COLUMNS; if the file has rewards also `rewards` (null: to be
                verified) and `reward_reasons`.
        """
        prompt, rows = self._groups[self._order.row(number)]
        return self._row(groups.with_columns(self._prompts.slice(prompt, 1), group_id=[group_id]), rows)

    def completions(self, prompt: pa.Table, num: int) -> pa.Table | None:
        """Return at most `num` of the file's completions of a prompt; None if it has none.

        The prompt is one row of groups.PROMPT_COLUMNS and is found by its text. The seed and the group's id
        decide which completions are drawn, so that over many groups all of them are used. The answer stays
        the given row's.
        """
        # The prompt is rendered by the run's template, which may be longer than this source's.
        room = self._max_length - len(prompt["prompt_ids"][0])
        rows = [
            row for row in self._by_text.get(prompt["prompt"][0].as_py(), ()) if self._num_tokens[row] <= room
        ]
        if not rows or num < 1:
            return None
        drawn = np.random.default_rng([self._seed, prompt["group_id"][0].as_py()]).permutation(len(rows))[
            :num
        ]
        return self._row(prompt.select(list(groups.PROMPT_COLUMNS)), [rows[i] for i in drawn])

    def all(self) -> pa.Table:
        """Return the source's prompts, one row each (groups.PROMPT_COLUMNS)."""
        return self._prompts

    def digest(self) -> str:
        """Return the SHA-256 of the problems, completions and rewards in use, in the file's order.

        Other data have another digest.
        """
        content = hashlib.sha256()
        in_use = sorted(row for rows in self._by_text.values() for row in rows)
        for row in self._rows.select(["prompt", "answer", "completions", "rewards"]).take(in_use).to_pylist():
            content.update(json.dumps(list(row.values())).encode())
        return content.hexdigest()

    def _row(self, prompt: pa.Table, rows: list[int]) -> pa.Table:
        taken, none = self._rows.take(rows), [[None] * len(rows)]
        rewards = (
            {"rewards": [taken["rewards"].to_pylist()], "reward_reasons": none} if self._has_rewards else {}
        )
        return groups.with_columns(
            prompt,
            completions=[taken["completions"].to_pylist()],
            completion_ids=[taken["completion_ids"].to_pylist()],
            finish_reasons=[["stop"] * len(rows)],
            sources=[[self.source] * len(rows)],
            version_min=none,
            version_max=none,
            sampling_logprobs=none,
            **rewards,
        )


def _read(config: SourceConfig, key: str) -> pa.Table:
    """Read the file in its order: prompt, answer and completions as text, rewards as float32.

    A null reward is to be verified.
    """
    columns = {
        "prompt": config.prompt_column,
        "completion": config.completion_column,
        "answer": config.answer_column,
    }
    if config.reward_column is not None:
        columns["reward"] = config.reward_column
    # An answer column other than the default was asked for by name: it must be there.
    is_optional = (
        config.reward_column is not None
        and config.answer_column == SourceConfig.model_fields["answer_column"].default
    )
    data = load_columns(config, columns, key, optional=("answer",) if is_optional else ())
    num_rows = len(data["prompt"])
    answers, rewards = data.get("answer", [None] * num_rows), data.get("reward", [None] * num_rows)
    rows: dict[str, list[Any]] = {"prompt": [], "answer": [], "completions": [], "rewards": []}
    for i in range(num_rows):
        where = f"{key}.path: {config.path}: row {i}"
        rows["prompt"].append(as_text(data["prompt"][i], f"{where}: {columns['prompt']}"))
        rows["completions"].append(as_text(data["completion"][i], f"{where}: {columns['completion']}"))
        rows["rewards"].append(
            None if rewards[i] is None else _number(rewards[i], f"{where}: {config.reward_column}")
        )
        if answers[i] is None and rewards[i] is not None:
            rows["answer"].append("")
        elif "answer" in data:
            rows["answer"].append(as_text(answers[i], f"{where}: {columns['answer']}"))
        else:
            raise ConfigError(
                f"{where}: {config.reward_column} is empty (null), and there is no column "
                f"{config.answer_column!r} to verify by"
            )
    texts = pa.schema([(name, pa.string()) for name in ("prompt", "answer", "completions")])
    return pa.table(rows, schema=texts.append(pa.field("rewards", pa.float32())))


def _number(value: Any, where: str) -> float:
    is_number = isinstance(value, (numbers.Real, Decimal))
    if not is_number or not abs(value) <= MAX_REWARD:  # written so that NaN is refused
        raise ConfigError(f"{where} is {str(value)[:60]!r}, not a finite number")
    return float(value)


def _with_end(completions: list[list[int]], end: int) -> list[list[int]]:
    """Return the completions with `end` as their last token, once: logs may have it in their text."""
    return [ids if ids[-1:] == [end] else [*ids, end] for ids in completions]


def _parts(rows: list[int], size: int) -> list[list[int]]:
    """Deal rows into parts of nearly equal size, at most `size` and at least two rows each.

    With size 2, one part of an odd number has three. Rows are dealt in turn, like cards, so that every part
    of a file sorted by reward has good and bad ones.
    """
    num_parts = max(1, min(math.ceil(len(rows) / size), len(rows) // 2))
    return [rows[i::num_parts] for i in range(num_parts)]

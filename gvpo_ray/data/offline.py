"""Offline completions (of people, other models, logs) become group rows, without sampling log-probs.

With one reference per prompt, GVPO's optimum is the same for all samplers that together cover the reference,
whoever they are. So offline completions join groups of the policy's own (`share`) or form groups by
themselves (`group_share`). A source is fixed when it is made, and what it returns is a pure function of the
seed and a number: there is no position to save.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import SourceConfig
from gvpo_ray.config.loss import GvpoLoss, LossOptions, PoftLoss
from gvpo_ray.data.columns import as_json, as_text
from gvpo_ray.data.files import Columns
from gvpo_ray.data.messages import Message, as_messages, as_prompt, is_messages, of_assistant
from gvpo_ray.data.problems import Problem, Problems, group_columns, read_problems, read_rows
from gvpo_ray.data.prompts import EpochOrder
from gvpo_ray.data.rendering import messages_of, renderer_of
from gvpo_ray.data.transcripts import transcripts_of
from gvpo_ray.data.unfold import Unfolded, unfold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ALIGNED = "aligned_logps"
"""The column with mean log-probs per token by name of an aligned model, which PoFT reads."""

MAX_REWARD = float(np.finfo(np.float32).max)
"""Rewards are float32."""


class OfflineSource:
    """A source holds the completions of one file, by prompt.

    Args:
        config: the section `sources.<name>`; `config.limit` cuts before anything else does.
        tokenizer: the model's tokenizer.
        name: name of the source; its completions have the source "offline:<name>".
        max_tokens: longest prompt, in tokens; the smaller of it and `config.max_tokens` holds.
        max_length: longest prompt + completion, in tokens, with the end-of-sequence token.
        num_completions: k, most completions of a whole group.
        loss: the objective, which says how few completions make a group, and whether rewards are read.
        seed: decides the order of each epoch and which completions join a group.

    Attributes:
        num_rows: rows read.
        num_without_prompt: rows left out because their prompt is empty.
        num_without_gold: rows left out because they have neither a reward nor a gold answer.
        columns: names of the columns that reward functions get of each prompt. Completions that join a
            group of the policy (`share`) have those of the run's own prompt instead; columns in which the
            completions of a prompt differ are left out of whole groups.
        layout: where prompt and gold were found, if the config does not say it itself; else "".
        notes: further lines about the data that a person should read before a run.
        num_too_long: rows left out because they are longer than a limit (they are never cut).
        num_single: prompts whose only completion makes no whole group; 0 for a source with `share`, and
            where the objective trains groups of one.
        brings_rewards: whether all completions have a reward, so that none is verified.

    Raises:
        ConfigError: one line that names the key, and the row where there is one.
    """

    def __init__(
        self,
        config: SourceConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        max_tokens: int | None,
        max_length: int,
        num_completions: int,
        loss: LossOptions | None = None,
        seed: int = 0,
    ) -> None:
        key, self.source = f"sources.{name}", f"offline:{name}"
        loss = loss or GvpoLoss()
        renderer = renderer_of(config, tokenizer, key)
        if renderer.end_id is None:
            raise ConfigError(
                f"{key}: the model's tokenizer has no end-of-sequence token, and every completion must end "
                "with one"
            )
        config, _, unfolded, found = read_completions(config, key, loss)
        problems, self._rows = found.problems, _as_table(config, found, key, loss)
        self.brings_rewards = config.reward_column is not None or not loss.reads_rewards
        prompts = self._rows["prompt"].to_pylist()
        first = {problem.prompt: problem for problem in reversed(problems)}
        distinct = list(dict.fromkeys(prompts))
        rendered = dict(
            zip(distinct, renderer.render([first[prompt].to_render() for prompt in distinct]), strict=True)
        )
        if empty := [prompt for prompt in distinct if not rendered[prompt].prompt_ids]:
            raise ConfigError(
                f"{key}.path: {config.path}: row {first[empty[0]].row}: the prompt has no tokens"
            )
        completion_ids = _with_end(renderer.encode(self._rows["completions"].to_pylist()), renderer.end_id)
        masks: list[list[bool] | None] = [None] * len(problems)
        transcripts = transcripts_of(config, tokenizer, key)
        for i, problem in enumerate(problems):
            if is_transcript(problem.more["completion"]):
                where = f"{key}.path: {config.path}: row {problem.row}"
                completion = _messages(problem.more["completion"], f"{where}: {config.completion_column}")
                before = problem.messages or messages_of(problem.prompt, None, None)
                completion_ids[i], masks[i] = transcripts.tokens(before, completion, where)
        self._rows = self._rows.append_column(
            "completion_ids", pa.array(completion_ids, pa.list_(pa.int32()))
        ).append_column(
            "trained_tokens", pa.array(masks, groups.SCHEMA.field("trained_tokens").type.value_type)
        )
        self._num_tokens = [len(ids) for ids in completion_ids]
        self._max_length = max_length

        longest_prompt = min(n for n in (config.max_tokens, max_tokens, max_length) if n is not None)
        fits = [
            len(rendered[prompt].prompt_ids) <= min(longest_prompt, max_length - tokens)
            for prompt, tokens in zip(prompts, self._num_tokens, strict=True)
        ]
        self.num_rows, self.num_too_long = found.num_rows, fits.count(False)
        self.num_without_prompt = found.num_without_prompt
        self.num_without_gold, self.layout = found.num_without_gold, found.found.description()
        self.columns = found.columns
        self.notes = [*([] if unfolded is None else [unfolded.note]), *found.notes]
        if not any(fits):
            raise ConfigError(
                f"{key}.path: {config.path}: all {len(fits)} rows are too long: a prompt may have "
                f"{longest_prompt} tokens, and {max_length} with its completion"
            )
        by_prompt: dict[tuple[str, str, int], list[int]] = {}
        for row, (prompt, answer) in enumerate(zip(prompts, self._rows["answer"].to_pylist(), strict=True)):
            if fits[row]:
                part_of = -1 if unfolded is None else problems[row].row
                by_prompt.setdefault((prompt, answer, part_of), []).append(row)
        self.num_single = 0
        if config.group_share and loss.least > 1:
            several = {problem: rows for problem, rows in by_prompt.items() if len(rows) > 1}
            self.num_single = len(by_prompt) - len(several)
            if not several:
                raise ConfigError(
                    f"{key}.path: {config.path}: no prompt has two completions, as a group must "
                    f"({self.num_single} have one, {self.num_too_long} of {self.num_rows} rows are too long)"
                )
            by_prompt = several
        of_prompts = [[problems[row] for row in rows] for rows in by_prompt.values()]
        of_one = _of_one_completion(of_prompts) if config.group_share else []
        self.columns = [name for name in self.columns if name not in of_one]
        if of_one and not self.brings_rewards:
            self.notes.append(
                f"{', '.join(of_one)}: not the same for all completions of a prompt, so that reward "
                "functions, which get the columns of a prompt, do not get this"
            )
        columns = group_columns([_without(of_prompt[0], of_one) for of_prompt in of_prompts])
        self._prompts = groups.table(
            {
                "group_id": 0,
                "dataset": name,
                "prompt_ids": rendered[of_row["prompt"]].prompt_ids,
                **of_row,
                **rendered[of_row["prompt"]].extras,
            }
            for of_row in columns
        )
        self._groups = [
            (i, part)
            for i, rows in enumerate(by_prompt.values())
            for part in ([rows] if unfolded is not None else _parts(rows, num_completions, loss.least))
        ]
        self._by_text: dict[str, list[int]] = {}
        for (prompt, *_), rows in by_prompt.items():
            self._by_text.setdefault(prompt, []).extend(rows)
        self._order = EpochOrder(len(self), seed, config.shuffle)
        self._seed = seed

    @property
    def token_ids(self) -> pa.ChunkedArray:
        """The token ids of the file's completions, one list each."""
        return self._rows["completion_ids"]

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
        own = [name for name in groups.DATA_COLUMNS if name in prompt.column_names]
        drawn = np.random.default_rng([self._seed, prompt["group_id"][0].as_py()]).permutation(len(rows))[
            :num
        ]
        return self._row(prompt.select([*groups.PROMPT_COLUMNS, *own]), [rows[i] for i in drawn])

    def all(self) -> pa.Table:
        """Return the source's prompts, one row each (groups.PROMPT_COLUMNS)."""
        return self._prompts

    def digest(self) -> str:
        """Return the SHA-256 of the problems, completions, rewards and columns in use, in the file's order.

        Other data have another digest.
        """
        content = hashlib.sha256()
        in_use = sorted(row for rows in self._by_text.values() for row in rows)
        for row in self._rows.select(["prompt", "answer", "completions", "rewards"]).take(in_use).to_pylist():
            content.update(json.dumps(list(row.values())).encode())
        # what reward functions read of each prompt, beside its answer
        own = [name for name in groups.DATA_COLUMNS if name in self._prompts.column_names]
        for row in self._prompts.select(own).to_pylist() if own else ():
            content.update(json.dumps(list(row.values())).encode())
        return content.hexdigest()

    def _row(self, prompt: pa.Table, rows: list[int]) -> pa.Table:
        taken, none = self._rows.take(rows), [[None] * len(rows)]
        masks = {"trained_tokens": [taken["trained_tokens"].to_pylist()]}
        rewards = (
            {"rewards": [taken["rewards"].to_pylist()], "reward_reasons": none} if self.brings_rewards else {}
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
            **({} if taken["trained_tokens"].null_count == len(rows) else masks),
            **rewards,
        )


def _of_one_completion(by_prompt: Iterable[Sequence[Problem]]) -> list[str]:
    """Return the columns in which some rows of a prompt differ: they are of a completion, not of a prompt."""
    differ: dict[str, None] = {}
    for first, *others in by_prompt:
        for other in others:
            for name, value in first.columns.items():
                other_value = other.columns[name]
                # as JSON, where NaN is NaN
                if name not in differ and value != other_value and as_json(value) != as_json(other_value):
                    differ[name] = None
    return [name for name in differ]


def _without(problem: Problem, names: Collection[str]) -> Problem:
    return replace(problem, columns={name: v for name, v in problem.columns.items() if name not in names})


COLUMNS = {"prompt_column": "prompt", "completion_column": "completion", "answer_column": ""}
"""The keys of a source whose rows are unfolded."""


class Completions(NamedTuple):
    """Completions are the rows of a source, read and not yet tokenised."""

    config: SourceConfig
    """The section, with the columns that were found."""
    data: Columns
    """The data set as it is."""
    unfolded: Unfolded | None
    """The rows of one completion each that it was turned into; None: it has these already."""
    found: Problems
    """The rows; `more` has `completion`, and `reward` where the config names its column."""


def read_completions(config: SourceConfig, key: str, loss: LossOptions) -> Completions:
    """Read the rows of a source.

    Args:
        config: the section.
        key: where it stands in the config, for messages.
        loss: the objective, which says what the data must have.

    Raises:
        ConfigError: one line that names the key, and the row where there is one.
    """
    data = read_rows(config, key)
    if loss.least == 1 and loss.reads_rewards and config.reward_column is None:
        if ALIGNED not in data:
            raise ConfigError(
                f"{key}.reward_column: required, as loss.objective {loss.objective} compares with it: the "
                "column with the mean log-prob per token by aligned models (gvpo-ray score CONFIG --out FILE "
                f"writes {ALIGNED}, which is found by itself)"
            )
        config = config.model_copy(update={"reward_column": ALIGNED})
    if loss.least == 1 and config.answer_column is None:  # nothing is verified
        config = config.model_copy(update={"answer_column": ""})
    unfolded = unfold(data, config, key, loss)
    if unfolded is not None:
        config = config.model_copy(update={**COLUMNS, "reward_column": unfolded.reward_column})
    without_gold = "reward" if config.reward_column else None
    found = read_problems(config, key, _more(config), without_gold=without_gold, unfolded=unfolded)
    return Completions(config, data, unfolded, found)


def is_transcript(completion: Any) -> bool:
    """Return whether a completion is messages that are more than one text: several turns, calls of tools."""
    if not is_messages(completion):
        return False
    messages = _messages(completion, "completion")
    return len(messages) > 1 or bool(messages[0].get("tool_calls"))


def _messages(completion: Any, where: str) -> list[Message]:
    """Return a completion that is messages, up to where the assistant has said its last."""
    return of_assistant(as_messages(completion, where), where)


def _more(config: SourceConfig) -> dict[str, str]:
    reward = {} if config.reward_column is None else {"reward": config.reward_column}
    return {"completion": config.completion_column, **reward}


def _as_table(config: SourceConfig, found: Problems, key: str, loss: LossOptions) -> pa.Table:
    """Return prompt, answer, completions (text) and rewards (float32; null: to be verified) of each row.

    Where the objective does not read rewards, they are 1.
    """
    rows: dict[str, list[Any]] = {"prompt": [], "answer": [], "completions": [], "rewards": []}
    for problem in found.problems:
        where = f"{key}.path: {config.path}: row {problem.row}"
        completion, reward = problem.more["completion"], problem.more.get("reward")
        if is_messages(completion):
            messages = _messages(completion, f"{where}: {config.completion_column}")
            completion = as_prompt(messages) if is_transcript(completion) else messages[-1]["content"]
        rows["prompt"].append(problem.prompt)
        rows["answer"].append(problem.answer)
        rows["completions"].append(as_text(completion, f"{where}: {config.completion_column}"))
        if loss.least == 1 and not rows["completions"][-1].strip():
            raise ConfigError(f"{where}: {config.completion_column} is empty: there is nothing to imitate")
        rows["rewards"].append(_reward(reward, f"{where}: {config.reward_column}", loss))
    texts = pa.schema([(name, pa.string()) for name in ("prompt", "answer", "completions")])
    return pa.table(rows, schema=texts.append(pa.field("rewards", pa.float32())))


def _reward(value: Any, where: str, loss: LossOptions) -> float | None:
    """Return a row's reward; None: its completion is verified. PoFT's may be given by each aligned model."""
    if not loss.reads_rewards:
        return 1.0
    if loss.least > 1:
        return None if value is None else _number(value, where)
    if isinstance(value, Mapping):
        names = list(loss.aligned if isinstance(loss, PoftLoss) and loss.aligned else value)
        for name in names:
            if value.get(name) is None:
                raise ConfigError(f"{where} has no log-prob of {name}")
        by_model = [_number(value[name], f"{where}.{name}") for name in names]
        value = math.fsum(by_model) / len(by_model) if by_model else None
    if value is None:
        raise ConfigError(f"{where} is null: loss.objective {loss.objective} needs it of every row")
    return _number(value, where)


def _number(value: Any, where: str) -> float:
    is_number = isinstance(value, (numbers.Real, Decimal))
    if not is_number or not abs(value) <= MAX_REWARD:  # written so that NaN is refused
        raise ConfigError(f"{where} is {str(value)[:60]!r}, not a finite number")
    return float(value)


def _with_end(completions: list[list[int]], end: int) -> list[list[int]]:
    """Return the completions with `end` as their last token, once: logs may have it in their text."""
    return [ids if ids[-1:] == [end] else [*ids, end] for ids in completions]


def _parts(rows: list[int], size: int, least: int) -> list[list[int]]:
    """Deal rows into parts of nearly equal size, at most `size` and at least `least` rows each.

    With size and least 2, one part of an odd number has three. Rows are dealt in turn, like cards, so that
    every part of a file sorted by reward has good and bad ones.
    """
    num_parts = max(1, min(math.ceil(len(rows) / size), len(rows) // least))
    return [rows[i::num_parts] for i in range(num_parts)]

"""Verifiers add rewards to group tables with completions.

A completion's verdict is correct, incorrect or unverifiable. An unverifiable completion (a limit, a crash, no
gold answer, a faulty reward function) has a null reward with a reason, never 0, and GVPO then has a smaller
group. A completion without an answer is incorrect.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from gvpo_ray import groups as group_tables
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.environment import ENVIRONMENT
from gvpo_ray.config.shown import know, masked
from gvpo_ray.config.verifiers import RewardConfig, VerifiersConfig
from gvpo_ray.sandbox.adapters import GOLD, MATCH, MESSAGES, check_signature
from gvpo_ray.sandbox.functions import (
    MAX_REASON,
    OutOfReach,
    Part,
    RewardFunction,
    call,
    fits_float32,
    load,
    of_user,
)
from gvpo_ray.sandbox.process import Sandbox
from gvpo_ray.verifiers.code import CodeReward
from gvpo_ray.verifiers.http_reward import HttpReward
from gvpo_ray.verifiers.outages import Record
from gvpo_ray.verifiers.rewards import BUILT_IN, CODE, source_of

COLUMNS = ("group_id", "answer", "dataset", "completion_ids", "finish_reasons")
"""Columns that a reward function gets beside prompts and completions, as far as the table has them."""

DataColumns = Mapping[str, Sequence[str]]
"""Key of a data set in the config -> names of the columns that its rows give to reward functions."""


@dataclass(frozen=True)
class Check:
    """A Check is the verifier's result for one completion."""

    reward: float | None
    """Weighted sum of the parts; None (unverifiable) if any part is None."""
    parts: Mapping[str, float | None]
    """Name of a reward function -> its value, without the weight."""
    reason: str | None
    """Why there is no reward, and remarks of the reward functions; one per line."""
    seconds: float
    """Seconds that the check took; a trusted function's time is shared equally by its completions."""

    @property
    def verdict(self) -> str:
        """The verdict "correct", "incorrect" or "unverifiable"; the first reward function decides.

        A reward that the completion came with decides itself, because it has no parts.
        """
        if self.reward is None:
            return "unverifiable"
        first = next(iter(self.parts.values()))
        return "correct" if (self.reward if first is None else first) > 0 else "incorrect"


def validate_rewards(
    config: VerifiersConfig,
    functions: Mapping[str, RewardFunction] | None = None,
    columns: DataColumns | None = None,
) -> None:
    """Load every reward function once, as the verifiers will, to find mistakes before a run.

    This takes about a second, and no time when all functions are built in and have no arguments.

    Args:
        config: the reward functions.
        functions: callables by name, as for a Verifier.
        columns: the columns of the run's data sets; every required argument of a function must be one.

    Raises:
        ConfigError: no such file, module, function, argument or column, or its import fails; the message
            names verifiers.rewards.<name>.
    """
    for name, reward in config.rewards.items():
        place = reward.function or name
        if (
            place not in (*BUILT_IN, CODE, ENVIRONMENT)
            and ":" not in place
            and name not in (functions or {})
            and not reward.url
            and not reward.model
        ):
            raise ConfigError(
                f"verifiers.rewards.{name}: unknown reward; built in is {', '.join((*BUILT_IN, CODE))}, "
                "your own is module:function or path.py:function, a callable is passed as reward= from "
                "Python, and a section says url or model"
            )
        if (built_in := BUILT_IN.get(place)) and name not in (functions or {}) and columns:
            try:
                check_signature(built_in, reward.arguments, True, columns)
            except ConfigError as error:
                raise ConfigError(f"verifiers.rewards.{name}: {error}") from error
    plain = all(
        (reward.function or name) in (*BUILT_IN, ENVIRONMENT) and not reward.arguments
        for name, reward in config.rewards.items()
    )
    if functions or not plain:
        Verifier(
            config, functions, columns=columns
        ).close()  # reward models are left out: their own actors load them


class Verifier:
    """A Verifier scores groups with the configured reward functions.

    A verifier must be used from one thread. Its sandbox starts at once, so that a bad function fails here.

    Args:
        config: the reward functions with their weights, and the limits.
        functions: callables by name. A callable with the name of a configured reward replaces that reward's
            function and keeps its section; any other is added with weight 1. Callables travel to the sandbox
            with cloudpickle.
        models: callables that call the reward models, by the name of their reward (pool.py makes them).
        columns: what the functions' arguments are checked against; None: nothing.
        record: what the reward functions have done so far, where several verifiers share it. None: a record
            of its own, by which a reward function that fails on every row is an error.

    Raises:
        ConfigError: a reward function cannot be loaded; the message names verifiers.rewards.<name>.
        SandboxError: the sandbox's processes do not start.
    """

    def __init__(
        self,
        config: VerifiersConfig,
        functions: Mapping[str, RewardFunction] | None = None,
        models: Mapping[str, RewardFunction] | None = None,
        columns: DataColumns | None = None,
        record: Record | None = None,
    ) -> None:
        know(config)
        self.record, self._checks_record = record or Record(), record is None
        self.known = Record()
        """What reward functions have given elsewhere."""
        functions = functions or {}
        self._rewards = {
            **config.rewards,
            **{name: RewardConfig() for name in functions if name not in config.rewards},
        }
        self._trusted: dict[str, RewardFunction] = dict(models or {})
        sandboxed = {}
        for name, reward in self._rewards.items():
            if name == ENVIRONMENT and not reward.is_elsewhere and name not in functions:
                continue  # the engines' tables have it
            if reward.url:
                self._trusted[name] = HttpReward(reward)
            elif not reward.model and (reward.function or name) == CODE and name not in functions:
                self._trusted[name] = CodeReward(name, config, reward, columns)
            elif not reward.model:
                source = source_of(name, reward, functions.get(name)) | {"columns": columns}
                if reward.trusted:
                    self._trusted[name] = of_user(f"verifiers.rewards.{name}", partial(load, source))
                else:
                    sandboxed[name] = source
        self._sandboxed = list(sandboxed)
        self._sandbox: Sandbox | None = None
        if sandboxed:
            self._sandbox = Sandbox(
                sandboxed,
                timeout_s=config.timeout_s,
                cpu_s=config.cpu_s,
                memory_gib=config.memory_gib,
                max_checks=config.max_checks,
            )
        with_code = [each for each in self._trusted.values() if isinstance(each, CodeReward)]
        self.unprotected = next((each.unprotected for each in (self._sandbox, *with_code) if each), [])
        """What this machine's kernel does not protect from the reward functions in the sandbox."""

    def score(self, groups: pa.Table, without: Iterable[str] = ()) -> pa.Table:
        """Add rewards, reward_parts and reward_reasons to a table with prompts and completions.

        Completions that already have a reward (replayed ones, and those of an offline file with rewards) keep
        their reward and are not checked again. One of whose tokens the policy has sampled none has no reward,
        with that as its reason: there is nothing of it to train.

        Args:
            groups: the table.
            without: names of reward functions whose service is not waited for: where it gives no rewards,
                the completions have none.

        Raises:
            OutOfReach: a service that a reward function calls does not answer.
            RewardError: a reward function has failed on every row so far, MAX_FAULTS times.
        """
        names = [
            name
            for name in (
                "prompt",
                "completions",
                *COLUMNS,
                *group_tables.DATA_COLUMNS,
                *group_tables.MASK_COLUMNS,
                *group_tables.REWARD_COLUMNS,
                *group_tables.EPISODE_COLUMNS,
            )
            if name in groups.column_names
        ]
        rewards, all_parts, all_reasons = [], [], []
        for row in group_tables.rows(groups.select(names)):
            given = _given(row, self._rewards)
            to_check = [i for i, check in enumerate(given) if check is None]
            new = iter(self._check_row(row, to_check, without) if to_check else ())
            checks = [check or next(new) for check in given]
            rewards.append([check.reward for check in checks])
            parts = {name: [check.parts.get(name) for check in checks] for name in self._rewards}
            all_parts.append([*parts.items()])
            all_reasons.append([check.reason for check in checks])
        return group_tables.with_columns(
            groups, rewards=rewards, reward_parts=all_parts, reward_reasons=all_reasons
        )

    def check(
        self,
        prompts: list[str],
        completions: list[str],
        columns: Mapping[str, list[Any]],
        without: Iterable[str] = (),
        of_episodes: Sequence[Part | None] = (),
        broken: Sequence[bool] = (),
        dataset: str = "",
    ) -> list[Check]:
        """Score completions: one at a time in the sandbox, all in one call by trusted functions.

        Args:
            prompts: one text per completion.
            completions: the texts to score.
            columns: further arguments of the reward functions; each is a list of one entry per completion.
            without: names of reward functions whose service is not waited for.
            of_episodes: what their environment gave the completions; None: it gives no rewards.
            broken: of the episodes of one group, which a tool call ended by bringing their environment down;
                nothing where they are no episodes.
            dataset: of the episodes.

        Raises:
            OutOfReach: a service that a reward function calls does not answer.
            RewardError: a reward function has failed on every row so far, MAX_FAULTS times.
        """
        by_name: dict[str, list[Part]] = {name: [] for name in (*self._trusted, *self._sandboxed)}
        seconds = [0.0] * len(completions)
        for name, function in self._trusted.items():  # first: they may have to wait, the sandbox never has
            begin = time.perf_counter()
            found = self._call(name, function, prompts, completions, columns, name not in without)
            by_name[name] = [_masked(part) for part in found]
            self.record.add(name, by_name[name], columns.get("group_id"))
            each = (time.perf_counter() - begin) / max(1, len(completions))
            seconds = [before + each for before in seconds]
        for i, completion in enumerate(completions if self._sandbox is not None else ()):
            assert self._sandbox is not None
            begin = time.perf_counter()
            of_one = {key: values[i] for key, values in columns.items()}
            for name, part in self._sandbox.check(prompts[i], completion, of_one).items():
                by_name[name].append(_masked(part))
            seconds[i] += time.perf_counter() - begin
        for name in by_name.keys() - self._trusted.keys():
            self.record.add(name, by_name[name], columns.get("group_id"))
        if known := [part for part in of_episodes if part is not None]:
            self.record.add(ENVIRONMENT, known, columns.get("group_id"))
        if self._checks_record:
            self.record.check()
        by_completion = [{name: parts[i] for name, parts in by_name.items()} for i in range(len(completions))]
        for i, of_episode in enumerate(of_episodes):
            if of_episode is not None:
                by_completion[i] = {ENVIRONMENT: of_episode, **by_completion[i]}
        if broken:
            self._judge_broken(by_completion, broken, dataset)
        return [self._combine(parts, seconds[i]) for i, parts in enumerate(by_completion)]

    def _judge_broken(
        self, by_completion: list[dict[str, Part]], broken: Sequence[bool], dataset: str
    ) -> None:
        """Replace what reward functions give episodes whose environment the policy has brought down.

        Each of them gives what Given.worst says; for the environment, which is no more, in place of a value.
        So the weighted sum is never above that of an episode of the group that has all its values.
        """
        by_name: dict[str, list[float]] = {}
        for parts, is_broken in zip(by_completion, broken, strict=True):
            for name, part in parts.items():
                if not is_broken and part.value is not None:
                    by_name.setdefault(name, []).append(part.value)
        for name, values in by_name.items():
            self.record.add_group(name, dataset, values)
        whole = Record()
        whole.learn(self.known)
        whole.learn(self.record)
        for parts, is_broken in zip(by_completion, broken, strict=True):
            if not is_broken:
                continue
            for name, part in parts.items():
                # that a function cannot judge it is no doing of the policy's
                if part.value is not None or name == ENVIRONMENT:
                    given, weight = whole.given.get((name, dataset)), self._rewards[name].weight
                    worst = None if given is None else given.worst(by_name.get(name, ()), weight)
                    parts[name] = replace(part, value=worst)

    def _call(
        self,
        name: str,
        function: RewardFunction,
        prompts: list[str],
        completions: list[str],
        columns: Mapping[str, Any],
        may_wait: bool,
    ) -> list[Part]:
        """Call a trusted function; raise OutOfReach if its completions should wait."""
        try:
            return call(name, function, prompts, completions, columns, may_wait=may_wait)
        except OutOfReach as error:
            if error.is_own and name not in self.record.worked | self.known.worked:
                return [Part(None, f"{name}: {error}", is_fault=True)] * len(completions)
            raise

    def close(self) -> None:
        """Kill the sandbox's processes, remove their scratch folder, and close connections."""
        for function in self._trusted.values():
            if isinstance(function, (HttpReward, CodeReward)):
                function.close()
        if self._sandbox is not None:
            self._sandbox.close()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_row(self, row: Mapping[str, Any], which: list[int], without: Iterable[str]) -> list[Check]:
        """Score the completions of one group that have the indices `which`."""
        # Columns about the prompt hold one entry per group, columns about completions one per completion.
        columns = {
            name: [row[name][i] for i in which]
            if name in group_tables.COMPLETION_COLUMNS and row[name] is not None
            else [row[name]] * len(which)
            for name in COLUMNS
            if name in row
        }
        for name, value in _of_data(row).items():
            columns[name] = [value] * len(which)
        completions = [row["completions"][i] for i in which]
        said = [entry and json.loads(entry).get("said") for entry in row.get("episodes") or ()]
        prompts = [row["prompt"] + ((said and said[i]) or "") for i in which]
        of_episodes = _of_episodes(row) if ENVIRONMENT in self._rewards else []
        given = [of_episodes[i] for i in which] if of_episodes else []
        broken = group_tables.broken_episodes(row)
        ended = [broken[i] for i in which] if any(row.get("episodes") or ()) else []
        return self.check(prompts, completions, columns, without, given, ended, row.get("dataset") or "")

    def _combine(self, parts: Mapping[str, Part], seconds: float) -> Check:
        """Make one result of the reward functions' parts: the weighted sum and all reasons."""
        reasons = [part.reason for part in parts.values() if part.reason]
        known = [
            self._rewards[name].weight * part.value for name, part in parts.items() if part.value is not None
        ]
        reward = sum(known) if len(known) == len(parts) else None
        if reward is not None and not fits_float32(reward):
            reward = None
            reasons.append("the weighted sum is not a finite float32")
        return Check(
            reward, {name: part.value for name, part in parts.items()}, "\n".join(reasons) or None, seconds
        )


def _masked(part: Part) -> Part:
    """Return the part with no secret in its reason, of limited length."""
    return replace(part, reason=part.reason and masked(part.reason, MAX_REASON))


def _of_episodes(row: Mapping[str, Any]) -> list[Part | None]:
    """Return what the environment gave each completion of a group; nothing where they are no episodes.

    An episode that the environment itself has ended with an error counts as its fault. None stands for one
    that has no reward because the environment gives none, or whose agent has returned a text to be graded.
    """
    if not any(row.get("episodes") or ()):
        return []
    none = [None] * len(row["completions"])
    values = (row.get("reward_parts") or {}).get(ENVIRONMENT)
    reasons = row.get("reward_reasons") or none
    broken = group_tables.broken_episodes(row)
    return [
        None
        if value is None and (reason is None or (values is None and is_broken))
        else Part(value, reason, is_fault=value is None and " raised " in (reason or "") and not is_broken)
        if value is None or fits_float32(value)
        else Part(None, f"{ENVIRONMENT}: its reward is {value:g}, no finite float32")
        for value, reason, is_broken in zip(values or none, reasons, broken, strict=True)
    ]


def _of_data(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the column `data` of a group adds to the arguments of reward functions, or replaces there.

    A column of the data takes the place of one of ours only if it is called `dataset` or `answer`; where the
    gold is not that `answer`, it is GOLD.
    """
    data = json.loads(row.get("data") or "{}")
    ours = set(COLUMNS) - {"dataset", "answer"}
    added = {name: value for name, value in data.get("columns", {}).items() if name not in ours}
    if "messages" in data:
        added[MESSAGES] = data["messages"]
    gold = GOLD if "answer" in added else "answer"
    if "golds" in data:
        added |= {gold: data["golds"], MATCH: data["match"]}
    elif gold == GOLD and "answer" in row:
        added[gold] = row["answer"]
    return added


def _given(row: Mapping[str, Any], names: Iterable[str]) -> list[Check | None]:
    """Return the results that are known of a group's completions before a check, and None for the others.

    Those with a reward have it; a reward function without a part in the table gets None as its part. Those of
    which no token is trained have none.
    """
    none = [None] * len(row["completions"])
    reasons, parts = row.get("reward_reasons") or none, row.get("reward_parts") or {}
    untrained = group_tables.untrained_completions(row)
    return [
        Check(None, dict.fromkeys(names), group_tables.UNTRAINED, 0.0)
        if i in untrained and not reasons[i]  # an environment has said why
        else None
        if reward is None
        else Check(reward, {name: (parts.get(name) or none)[i] for name in names}, reasons[i], 0.0)
        for i, reward in enumerate(row.get("rewards") or none)
    ]

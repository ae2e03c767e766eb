"""An evaluation's folder keeps its groups and its numbers on disk.

    OUT/evaluation.yaml       what was evaluated and how; nothing else is mixed in
    OUT/<set>/groups/         finished groups, one prompt with its samples each (the same log as a run's)
    OUT/eval.json             the numbers
    OUT/generations.parquet   one row per completion

Sampling and verifying is in run.py. An evaluation that was stopped continues, by the same command, with the
prompts that are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.table import Table

from gvpo_ray import groups
from gvpo_ray.buffer.log import GroupLog
from gvpo_ray.config.base import DECIDES_SCORES, ConfigError, is_marked, paths, walk
from gvpo_ray.config.loading import NOT_YAML
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.shown import hide
from gvpo_ray.data.hub import revision_of
from gvpo_ray.files import lock, replacing, write_whole
from gvpo_ray.groups import Row
from gvpo_ray.observe.episodes import episodes_of, tries_of
from gvpo_ray.observe.metrics import (
    bootstrap_interval,
    evaluation_metrics,
    is_correct,
    mean,
    pass_at_k,
    right_tries,
)

Number = dict[str, float]
"""A mean over prompts with its 95 % bootstrap interval: {"value", "low", "high"}."""


class EvaluationDir:
    """An EvaluationDir is the folder of one evaluation, locked by this process while it is open.

    Args:
        path: the folder, made if it is absent.
        config: the run's config.
        model: the model's folder or hub name.
        digests: digest of the prompts by name of set.

    Raises:
        ConfigError: the folder holds an evaluation of another model or config, is in use, or cannot be
            written.
    """

    def __init__(self, path: Path, config: GVPOConfig, model: str, digests: Mapping[str, str]) -> None:
        self.path = path
        now = {"model": model, "settings": _settings(config), "contents": _contents(config, model, digests)}
        try:
            path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = lock(path / ".lock")  # held until the evaluation ends
            except BlockingIOError as error:
                raise ConfigError(f"--out: another process is evaluating into {path}") from error
            file = path / "evaluation.yaml"
            if file.exists() and (difference := _difference(file, now)):
                raise ConfigError(f"--out: {path} {difference}; use another folder")
            write_whole(file, yaml.safe_dump(now, sort_keys=False))  # written again: sets may have been added
            self._logs = {name: GroupLog(path / name / "groups") for name in digests}
        except OSError as error:
            raise ConfigError(f"--out: cannot write {path}: {error.strerror}") from error

    def __enter__(self) -> EvaluationDir:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def missing(self, name: str, prompts: pa.Table) -> pa.Table:
        """Return those prompts of a set that have no samples yet."""
        done = set(self._logs[name].group_ids)
        return prompts.filter(
            pa.array([group_id not in done for group_id in prompts["group_id"].to_pylist()], type=pa.bool_())
        )

    def add(self, name: str, group: pa.Table) -> None:
        """Append a scored group to the log of a set, with all columns of its data."""
        self._logs[name].append(group)

    def rows(self, name: str) -> list[Row]:
        """Return the finished groups of a set, in the order of its file."""
        log = self._logs[name]
        return sorted(groups.rows(log.read(0, len(log))), key=lambda row: row["group_id"])

    def finish(
        self, config: GVPOConfig, model: str, left_out: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """Write eval.json and generations.parquet; return the content of eval.json and the folder.

        Args:
            config: the run's config.
            model: the model's folder or hub name.
            left_out: number of prompts of each set that are too long.
        """
        by_set = {name: self.rows(name) for name in self._logs}
        sets = {
            name: {**summary(rows, config, name), "left_out": (left_out or {}).get(name, 0)}
            for name, rows in by_set.items()
        }
        result = {"model": model, "sets": sets}
        with replacing(self.path / "generations.parquet") as part:
            pq.write_table(_generations(by_set), part)
        write_whole(self.path / "eval.json", json.dumps(result, indent=2) + "\n")
        return {"folder": str(self.path), **result}


def _settings(config: GVPOConfig) -> dict[str, Any]:
    """Return the config keys that the scores depend on, without secrets.

    Rewards are a list, because the first of them decides what is correct.
    """
    settings = {key: value for key, value, field in walk(config) if is_marked(field, DECIDES_SCORES)}
    settings["verifiers.rewards"] = [
        {"name": name, **section.model_dump(mode="json")}
        for name, section in config.verifiers.rewards.items()
    ]
    for name, section in config.evaluation.sets.items():
        num_samples, temperature, max_tokens = config.evaluation.of(name)
        own = {
            "num_samples": num_samples,
            "temperature": temperature,
            "max_completion_tokens": max_tokens or config.sampling.max_tokens,
            "template": section.template,
            "system_prompt": section.system_prompt,
        }
        settings |= {f"evaluation.sets.{name}.{key}": value for key, value in own.items()}
    return {key: hide(value) for key, value in settings.items()}


def _contents(config: GVPOConfig, model: str, digests: Mapping[str, str]) -> dict[str, str]:
    """Return digests of what the config's paths hold, by key: the paths themselves may change."""
    contents = {
        "model.path": model_digest(model),
        **{f"evaluation.sets.{name}.path": digest for name, digest in digests.items()},
    }
    for key, value, rule in paths(config):
        file = Path(value.rpartition(":")[0])
        if rule.kind == "function" and file.suffix == ".py" and file.is_file():
            contents[key.removesuffix(".function")] = hashlib.sha256(file.read_bytes()).hexdigest()
    for name, reward in config.verifiers.rewards.items():
        if reward.model is not None:
            contents[f"verifiers.rewards.{name}.model"] = model_digest(reward.model)
    return contents


def _difference(file: Path, now: Mapping[str, Any]) -> str:
    """Return how an existing evaluation.yaml differs from `now`, in words; empty if it does not.

    `now` may have more keys, such as a set that was added.
    """
    try:
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
        pairs = [(part, *item) for part in ("settings", "contents") for item in before[part].items()]
    except (*NOT_YAML, TypeError, KeyError, AttributeError):
        return "has an evaluation.yaml that is not an evaluation's"
    for part, key, value in pairs:
        if key not in now[part]:
            return f"holds an evaluation that also has {key}"
        if value != now[part][key]:
            if part == "contents":
                return f"holds an evaluation with another {key} (what is in it differs)"
            is_long = isinstance(value, (dict, list))
            shown = "" if is_long else f" ({value!r} there, {now[part][key]!r} here)"
            return f"holds an evaluation with another {key}{shown}"
    return ""


def model_digest(path: str) -> str:
    """Return a digest that tells one model folder from another without reading all of its weights.

    It covers the names, the sizes and 64 pieces of each file. A name on the hub is told by its commit, if
    that is known here.
    """
    if not Path(path).is_dir():
        revision = revision_of(path)
        return path if revision == "main" else f"{path}@{revision}"
    content = hashlib.sha256()
    for file in sorted(
        file for pattern in ("*.safetensors", "*.json", "*.jinja") for file in Path(path).glob(pattern)
    ):
        size = file.stat().st_size
        content.update(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            for i in range(64):
                opened.seek(i * size // 64)
                content.update(opened.read(1 << 16))
    return content.hexdigest()


def summary(rows: Sequence[Row], config: GVPOConfig, name: str) -> dict[str, Any]:
    """Return the numbers of one set.

    pass@k and mean@n are means over prompts with 95 % bootstrap intervals, and an agent's episode is one
    sample, however many branches it has; rates are over completions.

    Args:
        rows: the finished groups of the set.
        config: the run's config.
        name: name of the set.
    """
    num_samples, temperature, max_tokens = config.evaluation.of(name)
    correct = [right_tries(row) for row in rows]

    def number(values: Sequence[float]) -> Number:
        low, high = bootstrap_interval(values, seed=config.seed)
        return {"value": mean(values), "low": low, "high": high}

    metrics = evaluation_metrics(name, rows)
    return {
        "num_prompts": len(rows),
        "num_samples": num_samples,
        "temperature": temperature,
        "max_tokens": max_tokens or config.sampling.max_tokens,
        f"mean@{num_samples}": number([mean(row) for row in correct]),
        **{
            f"pass@{k}": number([pass_at_k(len(row), sum(row), k) for row in correct])
            for k in sorted({1, *config.evaluation.pass_k})
            if k <= min(map(len, correct), default=num_samples)
        },
        **{
            key: metrics[f"eval/{name}/{key}"]
            for key in ("extracted", "length_mean", "truncated", "unverifiable")
        },
        **_of_episodes(rows, number),
    }


def _of_episodes(rows: Sequence[Row], number: Callable[[Sequence[float]], Number]) -> dict[str, Number]:
    """Return turns and failed tool calls per episode, as means over prompts; none of plain completions."""
    by_prompt = [found for row in rows if (found := episodes_of([row]))]
    return {
        name: number([mean([one[key] for one in found]) for found in by_prompt])
        for name, key in (("turns", "turns"), ("tool_errors", "tool_errors"))
        if by_prompt
    }


GENERATIONS = pa.schema(
    [
        ("dataset", pa.string()),
        ("prompt_id", pa.int64()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("sample", pa.int64()),
        ("completion", pa.string()),
        ("correct", pa.bool_()),
        ("verdict", pa.string()),
        ("reward", pa.float64()),
        ("reason", pa.string()),
        ("num_tokens", pa.int64()),
        ("finish_reason", pa.string()),
    ]
)
"""Columns of generations.parquet, one row per completion.

`sample` counts the tries at a prompt from 0; the branches of an agent's episode are one try.

`verdict` is correct, incorrect or unverifiable (the reward is null and the reason says why).
"""


def _generations(by_set: Mapping[str, Sequence[Row]]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "dataset": name,
                "prompt_id": row["group_id"],
                "prompt": row["prompt"],
                "answer": row["answer"],
                "sample": sample,
                "completion": row["completions"][i],
                "correct": correct[i],
                "verdict": _verdict(correct[i], row["rewards"][i]),
                "reward": row["rewards"][i],
                "reason": row["reward_reasons"][i],
                "num_tokens": len(row["completion_ids"][i]),
                "finish_reason": row["finish_reasons"][i],
            }
            for name, rows in by_set.items()
            for row in rows
            for correct in [is_correct(row)]
            for sample, indices in enumerate(tries_of(row))
            for i in indices
        ],
        schema=GENERATIONS,
    )


def _verdict(correct: bool, reward: float | None) -> str:
    if reward is None:
        return "unverifiable"
    return "correct" if correct else "incorrect"


def results_table(result: Mapping[str, Any]) -> Table:
    """Return eval.json's content as a table for the console, with one column per set."""
    table = Table()
    table.add_column("")
    for name in result["sets"]:
        table.add_column(name, justify="right")
    sets = list(result["sets"].values())
    for key in dict.fromkeys(key for values in sets for key in values):
        cells = []
        for values in sets:
            value = values.get(key)
            if isinstance(value, Mapping):
                percent, low, high = (100 * value[name] for name in ("value", "low", "high"))
                cells.append(f"{percent:.2f} % [{low:.2f}, {high:.2f}]")
            elif key in ("extracted", "truncated", "unverifiable"):
                cells.append(f"{100 * value:.2f} %")
            else:
                text = "" if value is None else str(value)
                cells.append(f"{value:.4g}" if isinstance(value, float) else text)
        table.add_row(key, *cells)
    return table

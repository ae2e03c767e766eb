"""Evaluation of a model on benchmark files: what is kept on disk, the numbers, and the comparison of two evaluations.

    OUT/evaluation.yaml       what was evaluated and how; nothing else is mixed in
    OUT/<set>/groups/         finished groups, one prompt with its samples each (the same log as a run's)
    OUT/eval.json             the numbers
    OUT/generations.parquet   one row per sample

Sampling and verifying is the ring's (controller.evaluate). Stopped, the same command goes on with the prompts that are missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.table import Table

from gvpo_ray import groups
from gvpo_ray.buffer import GroupLog
from gvpo_ray.config import ConfigError, GVPOConfig
from gvpo_ray.metrics import Row, bootstrap_interval, evaluation_metrics, is_correct, mean, pass_at_k

Number = dict[str, float]
"""{"value", "low", "high"}: a mean over prompts and its 95 % bootstrap interval."""


class EvaluationDir:
    """The folder of one evaluation, this process's alone as long as it is open.

    Raises:
        ConfigError: another model's or another config's evaluation is there, or the folder cannot be written.
    """

    def __init__(self, path: Path, config: GVPOConfig, model: str, digests: Mapping[str, str]) -> None:
        self.path = path
        settings = {"model": model, "model_digest": model_digest(model), "prompts": dict(digests), **_settings(config)}
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "a")  # noqa: SIM115 - held as long as the evaluation
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"--out: another process is evaluating into {path}") from error
            kept = path / "evaluation.yaml"
            if kept.exists():
                before = yaml.safe_load(kept.read_text()) or {}
                changed = [key for key in settings if before.get(key) != settings[key]]
                if changed:
                    raise ConfigError(f"--out: {path} holds an evaluation with another {changed[0]} (see its evaluation.yaml); use another folder")
            else:
                part = path / ".evaluation.yaml.part"
                part.write_text(yaml.safe_dump(settings, sort_keys=False))
                part.replace(kept)
            self._logs = {name: GroupLog(path / name / "groups") for name in digests}
        except OSError as error:
            raise ConfigError(f"--out: cannot write {path}: {error.strerror}") from error

    def __enter__(self) -> EvaluationDir:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def missing(self, name: str, prompts: pa.Table) -> pa.Table:
        """The prompts of a set that have no samples yet."""
        done = set(self._logs[name].group_ids)
        return prompts.filter(pa.array([group_id not in done for group_id in prompts["group_id"].to_pylist()], type=pa.bool_()))

    def add(self, name: str, group: pa.Table) -> None:
        self._logs[name].append(group.select(list(groups.LOGGED_COLUMNS)))

    def rows(self, name: str) -> list[Row]:
        """The finished groups of a set, in the order of its file."""
        log = self._logs[name]
        return sorted(groups.rows(log.read(0, len(log))), key=lambda row: row["group_id"])

    def finish(self, config: GVPOConfig, model: str) -> dict[str, Any]:
        """Write eval.json and generations.parquet; returns what eval.json holds."""
        by_set = {name: self.rows(name) for name in self._logs}
        result = {"model": model, "sets": {name: summary(rows, config, name) for name, rows in by_set.items()}}
        pq.write_table(_generations(by_set), self.path / ".generations.part")
        (self.path / ".generations.part").replace(self.path / "generations.parquet")
        (self.path / ".eval.part").write_text(json.dumps(result, indent=2) + "\n")
        (self.path / ".eval.part").replace(self.path / "eval.json")
        return {"folder": str(self.path), **result}


def _settings(config: GVPOConfig) -> dict[str, Any]:
    """What the numbers depend on, beside the model and the prompts."""
    dump = config.model_dump(mode="json")
    sets = {name: config.evaluation.of(name) for name in config.evaluation.sets}
    return {
        "sets": {name: {"num_samples": n, "temperature": t, "max_tokens": m or config.sampling.max_tokens} for name, (n, t, m) in sets.items()},
        "top": {key: dump["sampling"][key] for key in ("top_p", "top_k", "min_p")},
        "seed": config.seed,
        "dtype": config.model.dtype,
        "max_length": config.model.max_length,
        "verifiers": {key: dump["verifiers"][key] for key in ("rewards", "timeout_s", "cpu_s", "memory_gib")},
    }


def model_digest(path: str) -> str:
    """Tells one model folder's weights from another's without reading them all: names, sizes and the first megabyte; of a hub name, the name."""
    content = hashlib.sha256(path.encode() if not Path(path).is_dir() else b"")
    for file in sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else ():
        content.update(f"{file.name} {file.stat().st_size}".encode())
        with open(file, "rb") as weights:
            content.update(weights.read(1 << 20))
            weights.seek(max(0, file.stat().st_size - (1 << 20)))
            content.update(weights.read(1 << 20))
    return content.hexdigest()


def summary(rows: Sequence[Row], config: GVPOConfig, name: str) -> dict[str, Any]:
    """The numbers of one set: pass@k and mean@n as means over prompts with 95 % bootstrap intervals, and rates over samples."""
    num_samples, temperature, max_tokens = config.evaluation.of(name)
    correct = [is_correct(row) for row in rows]

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
            if k <= num_samples
        },
        **{key: metrics[f"eval/{name}/{key}"] for key in ("extracted", "length_mean", "truncated", "unverifiable")},
    }


def _generations(by_set: Mapping[str, Sequence[Row]]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "dataset": name, "prompt_id": row["group_id"], "prompt": row["prompt"], "answer": row["answer"], "sample": i,
                "completion": row["completions"][i], "correct": correct, "reward": row["rewards"][i], "reason": row["reward_reasons"][i],
                "num_tokens": len(row["completion_ids"][i]), "finish_reason": row["finish_reasons"][i],
            }
            for name, rows in by_set.items()
            for row in rows
            for i, correct in enumerate(is_correct(row))
        ]
    )  # fmt: skip


def results_table(result: Mapping[str, Any]) -> Table:
    """What a person sees of eval.json."""
    table = Table(title=f"evaluation of {result['model']}", title_justify="left")
    table.add_column("")
    for name in result["sets"]:
        table.add_column(name, justify="right")
    sets = list(result["sets"].values())
    keys = list(dict.fromkeys(key for values in sets for key in values))
    for key in keys:
        cells = []
        for values in sets:
            value = values.get(key)
            if isinstance(value, Mapping):
                cells.append(f"{100 * value['value']:.2f} % [{100 * value['low']:.2f}, {100 * value['high']:.2f}]")
            elif key in ("extracted", "truncated", "unverifiable"):
                cells.append(f"{100 * value:.2f} %")
            else:
                cells.append("" if value is None else f"{value:.4g}")
        table.add_row(key, *cells)
    return table


def compare(a: str, b: str, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Paired differences of two evaluations: per set the mean over shared prompts of b's share of right samples less a's.

    Raises:
        ConfigError: no finished evaluation there, or no prompt in common.
    """
    one, two = _per_prompt(a), _per_prompt(b)
    result: dict[str, dict[str, Any]] = {}
    for name in one:
        shared = [key for key in one[name] if key in two.get(name, {})]
        if not shared:
            continue
        before, after = ([shares[name][key] for key in shared] for shares in (one, two))
        differences = [y - x for x, y in zip(before, after, strict=True)]
        low, high = bootstrap_interval(differences, seed=seed)
        result[name] = {
            "num_prompts": len(shared), "unmatched": len(one[name]) + len(two[name]) - 2 * len(shared),
            "a": mean(before), "b": mean(after), "difference": {"value": mean(differences), "low": low, "high": high},
        }  # fmt: skip
    if not result:
        raise ConfigError(f"--compare: {a} and {b} have no prompt in common")
    return result


def _per_prompt(place: str) -> dict[str, dict[tuple[str, str, int], float]]:
    """Set -> (prompt, answer, which of several alike) -> share of right samples."""
    path = Path(place).parent if Path(place).name == "eval.json" else Path(place)
    file = path / "generations.parquet"
    if not (path / "eval.json").is_file() or not file.is_file():
        raise ConfigError(f"--compare: no finished evaluation in {place} (eval.json, generations.parquet)")
    samples: dict[str, dict[tuple[str, str, int], list[bool]]] = {}
    numbers: dict[tuple[str, str, str], list[int]] = {}
    for row in pq.read_table(file, columns=["dataset", "prompt_id", "prompt", "answer", "correct"]).to_pylist():
        alike = numbers.setdefault((row["dataset"], row["prompt"], row["answer"]), [])
        if row["prompt_id"] not in alike:
            alike.append(row["prompt_id"])
        key = row["prompt"], row["answer"], alike.index(row["prompt_id"])
        samples.setdefault(row["dataset"], {}).setdefault(key, []).append(row["correct"])
    return {name: {key: mean(values) for key, values in prompts.items()} for name, prompts in samples.items()}


def comparison_table(a: str, b: str, result: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=f"A = {a}, B = {b}", title_justify="left")
    for column in ("set", "prompts", "A", "B", "B - A, 95 % interval"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for name, values in result.items():
        unmatched = f" ({values['unmatched']} without a partner)" if values["unmatched"] else ""
        difference = values["difference"]
        interval = f"{100 * difference['value']:+.2f} % [{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}]"
        table.add_row(name, f"{values['num_prompts']}{unmatched}", f"{100 * values['a']:.2f} %", f"{100 * values['b']:.2f} %", interval)
    return table

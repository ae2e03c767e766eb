"""Aligned models score the completions of a source once, for PoFT, into a file that training reads."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.loss import PoftLoss, SftLoss
from gvpo_ray.config.model import ScoringModelConfig
from gvpo_ray.config.plan import cluster_address
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.shown import visible
from gvpo_ray.data.columns import as_json, as_text
from gvpo_ray.data.files import Columns, to_list
from gvpo_ray.data.messages import as_messages, is_messages
from gvpo_ray.data.offline import ALIGNED, is_transcript, read_completions
from gvpo_ray.data.rendering import rendering_options
from gvpo_ray.files import replacing
from gvpo_ray.run.inputs import machine_resources
from gvpo_ray.run.models import check_scoring_model
from gvpo_ray.run.session import Session
from gvpo_ray.verifiers.references import ReferenceGroup
from gvpo_ray.verifiers.scoring_model import Score, Text

TEXTS_OF_A_CALL = 64
"""Texts that an actor gets at a time; it scores them in passes of the model's batch_size."""


def score(config: GVPOConfig, out: str | Path) -> Iterator[str]:
    """Write a source's rows with their mean log-probs per token by `loss.aligned`; yield lines about it.

    The file has the column ALIGNED beside the data's own: the mean log-prob by name of the model, over the
    completion's tokens in that model's own tokenizer and template. A row that a model cannot score is left
    out and counted. One model after the other is started.

    Args:
        config: with `loss: {objective: poft, aligned: {NAME: {model: PATH}}}` and one source.
        out: the file, .jsonl or .parquet.

    Raises:
        ConfigError: a mistake of the user, before any actor starts; or no row could be scored.
        RunError: the first cause that stopped the scoring.
    """
    config, out = config.absolute(), Path(out)
    aligned = config.loss.aligned if isinstance(config.loss, PoftLoss) else {}
    if not aligned:
        raise ConfigError("loss.aligned: no model to score with (loss.objective: poft has this key)")
    if len(config.sources) != 1:
        raise ConfigError(f"sources: scores are of one source, and the config has {len(config.sources)}")
    if out.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"--out: {out} ends neither in .jsonl nor in .parquet")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out: no folder {out.absolute().parent}")
    ((name, source),) = config.sources.items()
    key = f"sources.{name}"
    renderings = {key: rendering_options(source)}
    for model_name, model in aligned.items():
        where = f"loss.aligned.{model_name}"
        check_scoring_model(f"{where}.model", model.model, renderings)
        _check_fits(config, where, model)
    own, data, _, found = read_completions(source, key, SftLoss())
    rows = [problem.row for problem in found.problems]
    if len(set(rows)) < len(rows):
        raise ConfigError(f"{key}.path: {source.path}: PoFT's rows have one completion each, and these more")
    if out.suffix == ".parquet":
        _as_table(data, out)  # fails now rather than after the scoring
    texts = []
    for problem in found.problems:
        where = f"{key}.path: {source.path}: row {problem.row}: {own.completion_column}"
        completion = problem.more["completion"]
        if is_messages(completion):
            messages = as_messages(completion, where)
            completion = messages if is_transcript(completion) else messages[-1]["content"]
        else:
            completion = as_text(completion, where)
        texts.append(Text(problem.prompt, problem.messages, completion))
    session = Session(config.ray)
    by_model: dict[str, list[Score]] = {}
    try:
        for model_name, model in aligned.items():
            group = ReferenceGroup(model, renderings, _note, kind=f"aligned-{model_name}")
            session.on_stop(group.close)
            by_model[model_name] = session.guard(_score_all(group, texts, key))
            session.guard(_done(group.close()))
            yield _summary(model_name, rows, by_model[model_name])
    finally:
        session.stop()
    means: dict[int, dict[str, float]] = {}
    for row, of_row in zip(rows, zip(*by_model.values(), strict=True), strict=True):
        known = [one.mean for one in of_row if one.mean is not None]
        if len(known) == len(of_row):
            means[row] = dict(zip(by_model, known, strict=True))
    if not means:
        raise ConfigError(f"{key}.path: {source.path}: no row could be scored by all models")
    _write(out, data, means)
    num_rows = found.num_rows
    yield f"wrote {out}: {len(means)} of {num_rows} rows, with the column {ALIGNED}"


async def _score_all(group: ReferenceGroup, texts: list[Text], key: str) -> list[Score]:
    parts = [texts[i : i + TEXTS_OF_A_CALL] for i in range(0, len(texts), TEXTS_OF_A_CALL)]
    scores = await asyncio.gather(*(group.score_texts(part, key) for part in parts))
    return [score for of_part in scores for score in of_part]


async def _done(work: Coroutine[Any, Any, None]) -> bool:
    await work
    return True


def _note(who: str, name: str, why: str) -> None:
    print(visible(f"recovery of {name}: {why}"), file=sys.stderr)


def _summary(name: str, rows: list[int], scores: list[Score]) -> str:
    """Return a line about what a model has said."""
    known = [one.mean for one in scores if one.mean is not None]
    line = f"{name}: {len(known)} of {len(scores)} rows scored"
    if known:
        line += f", {sum(known) / len(known):.3f} nats per token"
    lost = next(((row, one.reason) for row, one in zip(rows, scores, strict=True) if one.reason), None)
    return line if lost is None else f"{line}; first left out is row {lost[0]}: {lost[1]}"


def _check_fits(config: GVPOConfig, where: str, model: ScoringModelConfig) -> None:
    """Refuse actors that this machine can never place.

    Raises:
        ConfigError: one line that names the key.
    """
    if cluster_address(config.ray) is not None:
        return
    shares = zip(("CPUs", "GPUs"), (model.num_cpus, model.num_gpus), machine_resources(config), strict=True)
    for unit, each, available in shares:
        if model.num * each > available:
            raise ConfigError(
                f"{where}.num: {model.num} x {each:g} {unit} are more than the {available:g} {unit} of this "
                "machine"
            )


def _as_table(data: Columns, out: Path) -> pa.Table:
    """Return a data set as an Arrow table.

    Raises:
        ConfigError: a column mixes types, as JSON's may; one line that names the file to write.
    """
    try:
        return pa.table(
            {
                name: column if isinstance(column, pa.ChunkedArray) else pa.array(column)
                for name, column in data.items()
            }
        )
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"--out: {out}: the data do not fit into Parquet ({why}): write .jsonl") from error


def _write(out: Path, data: Columns, means: dict[int, dict[str, float]]) -> None:
    """Write the scored rows of the data, with their scores.

    Raises:
        ConfigError: the file cannot be written.
    """
    scores = list(means.values())
    try:
        with replacing(out) as part:
            if out.suffix == ".parquet":
                scored = _as_table(data, out).take(pa.array(list(means)))
                scored = scored.drop_columns([ALIGNED]) if ALIGNED in scored.column_names else scored
                pq.write_table(scored.append_column(ALIGNED, pa.array(scores)), part)
            else:
                columns = {name: to_list(column) for name, column in data.items()}
                rows = ({name: column[row] for name, column in columns.items()} for row in means)
                lines = (as_json(row | {ALIGNED: own}) for row, own in zip(rows, scores, strict=True))
                part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: {out}: {error.strerror}") from error

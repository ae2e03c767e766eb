"""The run directory is made, continued or refused here, and recorded groups are read into it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from gvpo_ray import __version__, groups
from gvpo_ray.buffer.log import GroupLog, LogError, lock_folder
from gvpo_ray.config.base import RESUMABLE, ConfigError, is_marked
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.files import lock, make_folder, write_whole

FORMAT = 2
"""Format of a run directory, raised whenever a version cannot continue what the version before it wrote."""

FORMAT_FILE = "format.json"
"""A run directory's file with {"format", "gvpo_ray": version that made it}; format 1 had no such file."""

BLOCK = 100
"""Recorded groups of a log that are in memory at a time."""

Recorded: TypeAlias = pa.Table | GroupLog
"""Recorded groups: a file's, or a run's log, of which rows are read when they are needed."""

CONTENTS_FILE = "contents.json"
"""A run directory's file with a digest of what each of its data held when the run began with it, by key."""


def check_format(run_dir: str | Path) -> None:
    """Refuse a run directory that was made in another format; only reads.

    Raises:
        ConfigError: one line that says which version made it.
    """
    path = Path(run_dir)
    if not (path / "config.yaml").exists():
        return  # no run yet
    file = path / FORMAT_FILE
    number, version = 1, "0.1.0 or older"
    if file.exists():
        try:
            made = json.loads(file.read_text(encoding="utf-8"))
            number, version = int(made["format"]), str(made["gvpo_ray"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"run_dir: {file} does not say which format {path} has") from error
        except OSError as error:
            raise ConfigError(f"run_dir: {file} cannot be read: {error.strerror}") from error
    if number != FORMAT:
        raise ConfigError(
            f"run_dir: {path} was made by gvpo_ray {version}, in format {number}; this is {__version__}, "
            f"which goes on with format {FORMAT}: use another run_dir "
            f"(gvpo-ray learn --groups {path / 'groups'} reads its groups)"
        )


@contextlib.contextmanager
def open_run_dir(config: GVPOConfig, contents: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Make or continue the run directory, locked by this process, and write its config.yaml.

    Args:
        config: the run's config.
        contents: digests of the data that the run reads, by key. They may not change, as a group's id stands
            for the same prompt in the whole run. None: none are compared.

    Raises:
        ConfigError: another process uses the directory, it is another run's or in another format, the data
            are others, or it cannot be written.
    """
    path = Path(config.run_dir)
    check_format(path)  # before the lock, which is a file: a folder of another format is left as it is
    try:
        make_folder(path)
        # Waits, because `gvpo-ray status` takes the lock for a moment to see whether it is free.
        held = lock(path / ".lock", wait_s=1.0)
    except BlockingIOError as error:
        raise ConfigError(f"run_dir: another process is running in {path}") from error
    except OSError as error:
        raise ConfigError(f"run_dir: cannot write {path}: {error.strerror}") from error
    with held:
        recorded = path / "config.yaml"
        began = _began_with(config, contents or {})
        try:
            if not recorded.exists():
                made = {"format": FORMAT, "gvpo_ray": __version__}
                write_whole(path / FORMAT_FILE, json.dumps(made) + "\n", sync=True)
            write_whole(recorded, config.dump(), sync=True)
            if (known := {**(contents or {}), **began}) != began:
                write_whole(path / CONTENTS_FILE, json.dumps(known, indent=2) + "\n", sync=True)
        except OSError as error:
            raise ConfigError(f"run_dir: cannot write {path}: {error.strerror}") from error
        yield path


def check_same_run(config: GVPOConfig, contents: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of the data that the run in the directory began with; refuse another run.

    A directory in another format is refused, too; nothing is written.

    Args:
        config: the run's config.
        contents: digests of the data that the run reads, by key.

    Raises:
        ConfigError: one line that names what is another.
    """
    check_format(config.run_dir)
    return _began_with(config, contents)


def _began_with(config: GVPOConfig, contents: Mapping[str, str]) -> dict[str, str]:
    """Do what check_same_run does, in a directory whose format is this one's."""
    path = Path(config.run_dir)
    recorded = path / "config.yaml"
    if not recorded.exists():
        return {}
    try:
        old, new = GVPOConfig.from_file(recorded).model_dump(mode="json"), config.model_dump(mode="json")
    except ConfigError as error:
        raise ConfigError(
            f"run_dir: {recorded} is not the config of a run ({error}); use another run_dir"
        ) from error
    changed = [
        key
        for key, field in GVPOConfig.model_fields.items()
        if not is_marked(field, RESUMABLE) and old[key] != new[key]
    ]
    if changed:
        raise ConfigError(
            f"{changed[0]}: {path} holds a run with other values of it (see its config.yaml); use "
            "another run_dir"
        )
    if isinstance(new["loss"]["reference"], dict) and not isinstance(old["loss"]["reference"], dict):
        raise ConfigError(
            f"loss.reference: the groups of the run in {path} were not scored by another model; use another "
            "run_dir"
        )
    return _check_contents(path, contents)


def _check_contents(run_dir: Path, contents: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of the data that the run began with; refuse others.

    Raises:
        ConfigError: one line that names the key.
    """
    file = run_dir / CONTENTS_FILE
    if not file.exists():
        return {}  # a new run, or an older version began it
    try:
        began = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"run_dir: {file} does not say which data the run began with") from error
    except OSError as error:
        raise ConfigError(f"run_dir: {file} cannot be read: {error.strerror}") from error
    for key, digest in contents.items():
        if began.get(key, digest) != digest:
            what = (
                "with it, or the tokenizer or chat template of model.path, the model reads tokens that differ"
                if key.endswith(".template")
                else "what is in it differs"
            )
            raise ConfigError(
                f"{key}: {what} from what the run in {run_dir} began with: bring that back, or use another "
                "run_dir"
            )
    return began


def read_recorded(
    source: Path, groups_per_step: int, folder: Path
) -> tuple[Recorded, dict[int, tuple[int, int]], int]:
    """Return recorded groups, their assignment to steps, and the number of steps that they make.

    The log of a run brings its own assignment, and the run may be still going on; a file of groups is cut in
    its order.

    Args:
        source: an Arrow file, or the log's folder of a run.
        groups_per_step: groups that a step trains.
        folder: the log's folder of the run that is to learn from them; it may have some of them already.

    Raises:
        ConfigError: there are no groups, or too few, or the folder's log has others.
    """
    try:
        is_log = source.is_dir() and groups.segments(source)
        recorded = GroupLog(source) if is_log else groups.load(source)
        for part in parts_of(recorded):
            groups.validate(part, groups.LOGGED_COLUMNS)
            for name in (name for name in groups.REFERENCE_COLUMNS if name in part.schema.names):
                groups.validate(part.filter(pc.is_valid(part[name])), ("completions", name))
    except (groups.GroupError, LogError) as error:
        raise ConfigError(f"--groups: {error}") from error
    except (KeyError, pa.ArrowException) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"--groups: {source} is not the log of a run: {why}") from error
    except OSError as error:
        raise ConfigError(
            f"--groups: {error.filename or source} cannot be read: {error.strerror or error}"
        ) from error
    assigned, end = (recorded.assigned, recorded.end) if isinstance(recorded, GroupLog) else ({}, 0)
    here = GroupLog(folder)
    if not _is_beginning(here, recorded, assigned):
        raise ConfigError(
            f"run_dir: {folder} holds {len(here)} groups that are not the first ones of {source}, which has "
            f"{len(recorded)}: use another run_dir"
        )
    steps = max(assigned, default=0) + (len(recorded) - end) // groups_per_step
    if steps == 0:
        raise ConfigError(
            f"--groups: {source} has {len(recorded)} groups, fewer than groups_per_step ({groups_per_step})"
        )
    return recorded, assigned, steps


def parts_of(recorded: Recorded, begin: int = 0) -> Iterator[pa.Table]:
    """Yield recorded groups from row `begin` on: those of a log in blocks, and those of a file at once."""
    if isinstance(recorded, GroupLog):
        for row in range(begin, len(recorded), BLOCK):
            yield recorded.read(row, min(row + BLOCK, len(recorded)))
    else:
        yield recorded.slice(begin)


def _is_beginning(log: GroupLog, recorded: Recorded, assigned: Mapping[int, tuple[int, int]]) -> bool:
    """Return whether a log holds the first of the recorded groups, with the same assignment.

    The ids of all groups are compared, and of the first and the last one everything.
    """
    ids = recorded.group_ids if isinstance(recorded, GroupLog) else recorded["group_id"].to_pylist()
    if ids[: len(log)] != log.group_ids:
        return False
    rows = sorted({0, len(log) - 1}) if len(log) else []
    others = (next(parts_of(recorded, row)).slice(0, 1) for row in rows)
    return all(
        log.read(row, row + 1).equals(groups.log_columns(other).combine_chunks())
        for row, other in zip(rows, others, strict=True)
    ) and all(log.assigned.get(step, rows) == rows for step, rows in assigned.items())


def import_groups(recorded: Recorded, assigned: Mapping[int, tuple[int, int]], folder: Path) -> None:
    """Write recorded groups into the log of a run that only learns; go on behind those that are there.

    Raises:
        LogError: another process writes to the log.
    """
    with lock_folder(folder):
        log = GroupLog(folder)
        log.repair()
        # Batch by batch, because a slice of a table takes time in proportion to its number of batches.
        for part in parts_of(recorded, len(log)):
            for batch in part.to_batches(max_chunksize=1):
                log.append(pa.Table.from_batches([batch]))
        missing = {step: rows for step, rows in assigned.items() if step not in log.assigned}
        if missing:
            log.assign_all(missing)
        log.close()

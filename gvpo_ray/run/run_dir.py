"""The run directory is made, continued or refused here, and recorded groups are read into it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from gvpo_ray import __version__, groups
from gvpo_ray.buffer.log import GroupLog, read_assignments
from gvpo_ray.config.base import RESUMABLE, ConfigError, is_marked
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.files import lock, write_whole

FORMAT = 2
"""Format of a run directory, raised whenever a version cannot continue what the version before it wrote."""

FORMAT_FILE = "format.json"
"""A run directory's file with {"format", "gvpo_ray": version that made it}; format 1 had no such file."""


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
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"run_dir: {file} does not say which format {path} has") from error
    if number != FORMAT:
        raise ConfigError(
            f"run_dir: {path} was made by gvpo_ray {version}, in format {number}; this is {__version__}, "
            f"which goes on with format {FORMAT}: use another run_dir "
            f"(gvpo-ray learn --groups {path / 'groups'} reads its groups)"
        )


@contextlib.contextmanager
def open_run_dir(config: GVPOConfig) -> Iterator[Path]:
    """Make or continue the run directory, locked by this process, and write its config.yaml.

    Raises:
        ConfigError: another process uses the directory, it is another run's or in another format, or it
            cannot be written.
    """
    path = Path(config.run_dir)
    check_format(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Waits, because `gvpo-ray status` takes the lock for a moment to see whether it is free.
        held = lock(path / ".lock", wait_s=1.0)
    except BlockingIOError as error:
        raise ConfigError(f"run_dir: another process is running in {path}") from error
    except OSError as error:
        raise ConfigError(f"run_dir: cannot write {path}: {error.strerror}") from error
    with held:
        kept = path / "config.yaml"
        if kept.exists():
            try:
                old, new = GVPOConfig.from_file(kept).model_dump(mode="json"), config.model_dump(mode="json")
            except ConfigError as error:
                raise ConfigError(
                    f"run_dir: {kept} is not the config of a run ({error}); use another run_dir"
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
        try:
            if not kept.exists():
                made = {"format": FORMAT, "gvpo_ray": __version__}
                write_whole(path / FORMAT_FILE, json.dumps(made) + "\n")
            write_whole(kept, config.dump())
        except OSError as error:
            raise ConfigError(f"run_dir: cannot write {path}: {error.strerror}") from error
        yield path


def read_recorded(
    source: Path, groups_per_step: int, folder: Path
) -> tuple[pa.Table, dict[int, tuple[int, int]], int]:
    """Return recorded groups, their assignment to steps, and the number of steps that they make.

    The log of a finished run brings its own assignment; a file of groups is cut in its order.

    Args:
        source: an Arrow file, or the log's folder of a run.
        groups_per_step: groups that a step trains.
        folder: the log's folder of the run that is to learn from them.

    Raises:
        ConfigError: there are no groups, or too few, or the folder's log has others.
    """
    try:
        recorded = groups.validate(groups.load(source), groups.LOGGED_COLUMNS)
        here = len(groups.load(folder)) if any(folder.glob("*.arrow")) else 0
    except groups.GroupError as error:
        raise ConfigError(f"--groups: {error}") from error
    except OSError as error:
        raise ConfigError(f"--groups: {source} cannot be read: {error.strerror or error}") from error
    if here not in (0, len(recorded)):
        raise ConfigError(
            f"run_dir: {folder} holds {here} groups, {source} has {len(recorded)}: use another run_dir"
        )
    assigned = read_assignments(source / "assignments.jsonl")  # only read: that run may still be going on
    end = max((end for _, end in assigned.values()), default=0)
    steps = max(assigned, default=0) + (len(recorded) - end) // groups_per_step
    if steps == 0:
        raise ConfigError(
            f"--groups: {source} has {len(recorded)} groups, fewer than groups_per_step ({groups_per_step})"
        )
    return recorded, assigned, steps


def import_groups(recorded: pa.Table, assigned: Mapping[int, tuple[int, int]], folder: Path) -> None:
    """Write recorded groups into the log of a run that only learns; a log that has groups is left alone."""
    log = GroupLog(folder)
    if len(log) == 0:
        for i in range(len(recorded)):
            log.append(recorded.slice(i, 1).select(list(groups.LOGGED_COLUMNS)))
        for step, (begin, end) in assigned.items():
            log.assign(step, begin, end)

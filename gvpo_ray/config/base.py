"""What every section of the config stands on: Section, ConfigError, and which paths are local."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class GvpoError(Exception):
    """An error whose message is one line that a user can read alone; the command line shows no traceback."""

    status = 1
    """Exit status of the command line."""


class ConfigError(GvpoError, ValueError):
    """A bad key, path, model or data file: one clear line that names it."""

    status = 2


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


Resources = dict[str, Annotated[float, Field(gt=0)]]
"""Of one actor, beside its CPUs and GPUs: names that the cluster's nodes were started with."""


def is_local(path: str, root: Path = Path()) -> bool:
    """Whether a path is of this machine. Hub names are `name` or `owner/name`, without the suffix of a file,
    and nothing is there.
    """
    looks_local = (
        path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or Path(path).suffix in (".parquet", ".jsonl", ".json", ".py")
    )
    return looks_local or (root / path).exists()

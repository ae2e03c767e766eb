"""This file has the base of all config sections, their error, marks of keys, and a walk over all keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from gvpo_ray.errors import GvpoError


class ConfigError(GvpoError, ValueError):
    """A key, path, model or data file is bad; the message is one clear line that names it."""

    status = 2


class Section(BaseModel):
    """A Section is a part of the config; it refuses keys that it does not know."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


Resources = dict[str, Annotated[float, Field(gt=0)]]
"""Custom Ray resources of one actor: names that the cluster's nodes were started with, and amounts."""


LOCAL_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".arrow", ".gz", ".bz2", ".zst", ".py")
"""Suffixes of files; a name on the hub ends in none of them."""


def is_local(path: str, root: Path = Path()) -> bool:
    """Return whether a path is on this machine and not a name on the Hugging Face hub.

    A hub name is `name` or `owner/name`, without a file's suffix, and nothing exists there below `root`.
    """
    looks_local = (
        path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or Path(path).suffix in LOCAL_SUFFIXES
        or any(letter in path for letter in "*?[")
    )
    return looks_local or (root / path).exists()


TASKSET = "verifiers:"
"""Begins the name of a task set of the package verifiers: verifiers:package, or verifiers:path.py."""


@dataclass(frozen=True)
class LocalPath:
    """A LocalPath marks a key whose value may be a path of this machine: `Annotated[str, LocalPath()]`."""

    kind: Literal["input", "output", "function"] = "input"
    """`input`: a file or folder that is read, or a name on the Hugging Face hub. `output`: a folder that is
    written, always local. `function`: `path.py:function`, or the name of a function that is no path."""

    def absolute(self, text: str, root: Path) -> str:
        """Make a local path absolute, a relative one from `root`; return other values unchanged."""
        if text.startswith(TASKSET):
            file = text.removeprefix(TASKSET)
            is_file = file.endswith(".py")
            return f"{TASKSET}{(root / Path(file).expanduser()).absolute()}" if is_file else text
        file, colon, function = text.rpartition(":") if self.kind == "function" else (text, "", "")
        is_path = {"input": is_local(file, root), "output": True, "function": file.endswith(".py")}[self.kind]
        return f"{(root / Path(file).expanduser()).absolute()}{colon}{function}" if is_path else text


RESUMABLE: dict[str, Any] = {"resumable": True}
"""Marks a key of a run that may change when the run is resumed: `Field(json_schema_extra=RESUMABLE)`."""

DECIDES_SCORES: dict[str, Any] = {"decides_scores": True}
"""Marks a key that the scores of an evaluation depend on."""


def is_marked(field: FieldInfo, mark: dict[str, Any]) -> bool:
    """Return whether a field has a mark such as RESUMABLE."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and mark.items() <= extra.items()


def walk(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, FieldInfo]]:
    """Yield every key of a section and of the sections in it, with its value and field.

    Keys are dotted, such as evaluation.sets.NAME.path.
    """
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        yield prefix + name, value, field
        for key, child in _children(prefix + name, value):
            yield from walk(child, f"{key}.")


def _children(key: str, value: Any) -> Iterator[tuple[str, Section]]:
    if isinstance(value, Section):
        yield key, value
    elif isinstance(value, dict):
        yield from ((f"{key}.{name}", child) for name, child in value.items() if isinstance(child, Section))


def flattened(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, by dotted keys such as learner.num_workers."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        is_section = isinstance(value, dict) and bool(value)
        flat |= flattened(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return flat


def paths(section: Section) -> Iterator[tuple[str, str, LocalPath]]:
    """Yield every key that may be a path and has a value, with the value and the kind of path."""
    for key, value, field in walk(section):
        if value is not None and (rule := _path_rule(field)):
            yield from ((key, path, rule) for path in ([value] if isinstance(value, str) else value))


def _path_rule(field: FieldInfo) -> LocalPath | None:
    return next((mark for mark in field.metadata if isinstance(mark, LocalPath)), None)


Some = TypeVar("Some", bound=Section)


def with_paths(section: Some, change: Callable[[str, LocalPath], str]) -> Some:
    """Return a copy of a section in which `change` was applied to every path."""
    updates: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if value is not None and (rule := _path_rule(field)):
            updates[name] = (
                change(value, rule) if isinstance(value, str) else [change(path, rule) for path in value]
            )
        elif isinstance(value, Section):
            updates[name] = with_paths(value, change)
        elif isinstance(value, dict):
            updates[name] = {
                key: with_paths(child, change) if isinstance(child, Section) else child
                for key, child in value.items()
            }
    given = {name: value for name, value in updates.items() if value != getattr(section, name)}
    return section.model_copy(update=given)

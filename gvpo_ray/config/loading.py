"""A config is read from YAML and `key=value` overrides, and a mistake in it is described in one line.

For an unknown key the line suggests the nearest known one.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from gvpo_ray.config.base import ConfigError, Section
from gvpo_ray.config.shown import hide, is_secret, mask

NOT_YAML = (yaml.YAMLError, ValueError, OverflowError, RecursionError)
"""What yaml.safe_load raises of a text: errors of its own, and Python's at a date such as 2026-02-30, at a
number of 5,000 digits and at lists within lists without end."""

YAML_SPACE = " \t\r\n"
"""What may stand before a YAML value. Python takes more for space, such as U+00A0, which is text in YAML."""


def packaged_jobs() -> dict[str, Path]:
    """Return {name: file} of the jobs that come with this package: those of its wheel, or of its checkout."""
    package = Path(__file__).resolve().parents[1]
    folder = package / "jobs" if (package / "jobs").is_dir() else package.parent / "jobs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the keys and values of a YAML file.

    A path that is no file, and the name of a job that comes with this package, is that job's file.

    Raises:
        ConfigError: the file cannot be read, or holds no mapping.
    """
    if not os.path.exists(path):
        path = packaged_jobs().get(str(path), path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = difflib.get_close_matches(Path(path).stem, packaged_jobs(), n=1)
        hint = f"; did you mean {near[0]}, which comes with gvpo_ray?" if near else ""
        raise ConfigError(f"{path}: {error.strerror}{hint}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    try:
        data = yaml.safe_load(text)
    except NOT_YAML as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: expected keys and values, found {'nothing' if data is None else type(data).__name__}"
        )
    return data


def parse_override(text: str, model: type[Section]) -> tuple[str, Any]:
    """Split "key=value" and read the value as YAML, or as the text that it is.

    Where the key takes texts, what would be a mapping, a list, a date, a number, true or false, or no YAML at
    all is text, and so is a value with a comment: `prompts.template=Question: {prompt}` and `run_dir=010`
    need no quotes. A list stays one where the key takes lists.

    Args:
        text: the override.
        model: the section that the dotted key begins at.

    Raises:
        ConfigError: there is no key, no equals sign or no YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {mask(text)!r} is not key=value")
    key = key.strip()
    types = _types_of(model, key.split("."))
    try:
        parsed = yaml.safe_load(value)
    except NOT_YAML as error:
        if str in types:
            return key, value
        raise ConfigError(f"override {key}: {hide(value, key)!r} is not a YAML value") from error
    is_plain = parsed is None or (isinstance(parsed, str) and value.lstrip(YAML_SPACE)[0] not in "'\"|>")
    is_cut = is_plain and " #" in f" {value}"  # YAML takes the rest for a comment
    is_text = is_cut or not (parsed is None or type(parsed) in types)
    return key, value if str in types and is_text else parsed


def _types_of(model: type[Section] | None, key: list[str]) -> set[Any]:
    """Return the types of a dotted key's values, such as {str, list}; none where the key is not known."""
    if model is None or key[0] not in model.model_fields:
        return set()
    annotation = model.model_fields[key[0]].annotation
    is_named = get_origin(annotation) is dict  # evaluation.sets.<name>
    if rest := key[1 + is_named :]:
        return set().union(*(_types_of(section, rest) for section in _sections(annotation)))
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if is_named:
        return set()
    found = {get_origin(each) or each for each in alternatives}
    return found | ({dict} if _sections(annotation) else set())


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of nested dictionaries in place, making sections that are not there.

    Raises:
        ConfigError: a part of the key but the last holds no section.
    """
    *parents, last = key.split(".")
    for name in parents:
        child = data.setdefault(name, {})
        if child is None:
            child = data[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {key}: {name} is not a section")
        data = child
    data[last] = value


def one_line(error: ValidationError, model: type[Section]) -> str:
    """Describe the first problem in one line, with its key; an unknown key goes first, with a suggestion."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    parents, location = _without_tags(model, [str(part) for part in first["loc"]])
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = list(parents.model_fields) if parents else []
        near = [
            ".".join([*location[:-1], name]) for name in difflib.get_close_matches(location[-1], known, n=1)
        ]
        hints = near or [path for path in _all_keys(model) if path.rsplit(".", 1)[-1] == location[-1]]
        return f"unknown key {key}; " + (
            f"did you mean {hints[0]}?" if hints else f"known here: {', '.join(known)}"
        )
    if first["type"] == "missing":
        return f"{key}: required, and not given"
    message = first["msg"].removeprefix("Value error, ")
    is_short = isinstance(first["input"], (int, float, str, bool))
    shown = f" (got {first['input']!r})" if is_short and not is_secret(key) else ""
    more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
    return (f"{key}: " if key else "") + message + shown + more


def _sections(annotation: Any) -> list[type[Section]]:
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return [one for one in candidates if isinstance(one, type) and issubclass(one, Section)]


def _without_tags(root: type[Section], location: list[str]) -> tuple[type[Section] | None, list[str]]:
    """Return the section that holds the last part of pydantic's location, and the location without tags.

    Pydantic puts the tag of a union into a location: ("loss", "gvpo", "beta") is the key loss.beta.
    """
    model: type[Section] | None = root
    found: list[str] = []
    parts = iter(location)
    for part in parts:
        found.append(part)
        if len(found) == len(location) or model is None or part not in model.model_fields:
            break
        field = model.model_fields[part]
        sections = _sections(field.annotation)
        if field.discriminator is not None:
            tag = next(parts, None)
            sections = [one for one in sections if one.model_fields[str(field.discriminator)].default == tag]
        elif str(field.annotation).startswith("dict"):
            # the name of an entry in a dictionary of sections: evaluation.sets.<name>
            found += [name for name in [next(parts, None)] if name is not None]
        model = sections[0] if sections else None
    return model, found + list(parts)


def _all_keys(model: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if not str(field.annotation).startswith("dict"):
            for section in _sections(field.annotation):
                keys += _all_keys(section, prefix + name + ".")
    return list(dict.fromkeys(keys))

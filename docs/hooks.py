"""These hooks of mkdocs make pages from the code, and from the Markdown files outside docs/.

The command line, the config and the metrics are read from the objects themselves, so their reference cannot
be out of date. Links to files that are no page of the site become their paths; a link to nothing is a
warning, which ends a build with --strict.
"""

from __future__ import annotations

import json
import logging
import os
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OUTSIDE = {"index.md": ROOT / "README.md", "examples.md": ROOT / "jobs" / "README.md"}
"""Pages that are files outside docs/."""

log = logging.getLogger("mkdocs.hooks.gvpo_ray")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the folder of mkdocs.yml the folder of the pages, so that their links hold on GitHub too."""
    config.docs_dir = str(DOCS)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for uri, path in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    for name, lines in (("commands", commands()), ("config", config_keys()), ("metrics", metrics())):
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(lines) + "\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page as they are on GitHub into those of the site, and show what commands need."""
    uri = page.file.src_uri
    folder = (OUTSIDE[uri] if uri in OUTSIDE else DOCS / uri).parent
    uris = {path: uri for uri, path in OUTSIDE.items()}

    def link(match: re.Match[str]) -> str:
        bang, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        there = (folder / path).resolve()
        if there in uris or (there.is_relative_to(DOCS) and not there.is_dir()):
            to = uris.get(there) or there.relative_to(DOCS).as_posix()
            if (
                files.get_file_from_path(to) or not there.exists()
            ):  # mkdocs itself warns of a page that is not there
                return f"{bang}[{text}]({os.path.relpath(to, Path(uri).parent)}{'#' * bool(anchor)}{anchor})"
        if not there.exists():
            log.warning(f"{uri}: there is no {target}")
        name = there.relative_to(ROOT).as_posix()
        return text if name in text else f"{text} (`{name}`)"

    markdown = re.sub(r"^<!-- needs: (.+) -->$", r"*Needs \1:*\n", markdown, flags=re.MULTILINE)
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, parts[i])
    return "".join(parts)


def commands() -> Iterator[str]:
    """Yield the reference of the command line, as typer writes it."""
    import typer
    from typer.cli import get_docs_for_click

    from gvpo_ray import cli

    command = typer.main.get_command(cli.app)
    context = typer.Context(command, info_name="gvpo-ray")
    yield "# Commands\n"
    yield "This page is made from the command line's own help.\n"
    text = get_docs_for_click(obj=command, ctx=context, name="gvpo-ray", indent=1)
    yield re.sub(r"^example: (.*)$", r"**Example**: `\1`", text, flags=re.MULTILINE)


def config_keys() -> Iterator[str]:
    """Yield the reference of all keys of a run's YAML file: type, default and meaning of each."""
    from gvpo_ray.config.run import GVPOConfig

    yield "# Config\n"
    yield (
        "A run is one YAML file, and `key=value` on the command line overrides a key of it. Unknown keys are "
        "refused with the nearest right one. This page is made from the classes that read the file; "
        "`gvpo-ray check CONFIG` prints a file with all defaults filled in. Keys marked ↻, and all keys of a "
        "section so marked, may change when a run is resumed.\n"
    )
    yield from _section("The file", "", GVPOConfig, {})


def _section(title: str, prefix: str, section: Any, seen: dict[Any, str]) -> Iterator[str]:
    """Yield a table of a section's keys, then the sections in it; `seen` has the titles of those before."""
    from gvpo_ray.config.base import RESUMABLE, is_marked

    seen[section] = title
    yield f"## {title}\n"
    yield f"{' '.join((section.__doc__ or '').split())}\n"
    yield "| key | type | default | |\n|---|---|---|---|"
    below = []
    for name, field in section.model_fields.items():
        sections = _sections(field.annotation)
        below += [(name, sections, str(field.annotation).startswith("dict"))] if sections else []
        mark = " ↻" if is_marked(field, RESUMABLE) else ""
        kind = "section" if sections else _type(field.annotation)
        if sections and isinstance(field.annotation, types.UnionType) and str in get_args(field.annotation):
            kind = "text or section"
        meaning = " ".join((field.description or "").split())
        cells = map(_cell, (kind, _default(field), meaning))
        yield f"| {_name(prefix + name)}{mark} | {' | '.join(cells)} |"
    yield ""
    for name, sections, is_named in below:
        key = f"{prefix}{name}" + (".NAME" if is_named else "")
        for one in sections:
            if one in seen:
                if seen[one] == key:  # of another objective, which shares it
                    continue
                yield f"## {key}\n\nIts keys are those of `{seen[one]}`.\n"
                continue
            which = f" ({one.model_fields['objective'].default})" if len(sections) > 1 else ""
            yield from _section(key + which, f"{key}.", one, seen)


def _sections(annotation: Any) -> list[Any]:
    """Return the classes of sections in an annotation: one, the choices of a union, or those of a dict."""
    from gvpo_ray.config.base import Section

    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def _type(annotation: Any) -> str:
    """Return an annotation in words such as "integer or null"."""
    words = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true or false",
        type(None): "null",
        Any: "any",
    }
    if annotation in words:
        return words[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type(arguments[1])}"
    if str(origin) == "typing.Literal":
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is types.UnionType or str(origin) == "typing.Union":
        return " or ".join(map(_type, arguments))
    return _type(arguments[0])  # Annotated


def _default(field: FieldInfo) -> str:
    """Return a default as YAML writes it."""
    from gvpo_ray.config.base import Section

    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return ""
    if isinstance(value, dict):
        return "`{}`" if not value else ", ".join(f"`{name}`" for name in value)
    if isinstance(value, (list, tuple)):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{json.dumps(value) if value is None or isinstance(value, bool) else value}`"


def _name(text: str) -> str:
    """Return a name as code that a browser may break at its dots, slashes and underscores."""
    return "<code>" + re.sub(r"([./_])", r"\1<wbr>", text) + "</code>"


def _cell(text: str) -> str:
    """Return a text as it may stand in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def metrics() -> Iterator[str]:
    """Yield the reference of all metrics: name, unit and meaning, and the name in Prometheus."""
    from gvpo_ray.observe.metrics import METRICS
    from gvpo_ray.observe.ray_metrics import series_of

    yield "# Metrics\n"
    yield (
        "Each line of `metrics.jsonl` is a step, and these are its keys. The same numbers are on Ray's "
        "metrics endpoint, in the report and in trackers. A part in braces is free: the name of a pool, a "
        "held-out set, an age. This page is made from the registry of metrics.\n"
    )
    yield "| name | unit | in Prometheus | |\n|---|---|---|---|"
    for metric in METRICS:
        if " / " in metric.name:
            continue  # a quotient, which only the report draws
        example = re.sub(r"\{(\w+)\}", lambda part: "1" if part[1] == "k" else "x", metric.name)
        series, labels = series_of(example)
        prometheus = f"ray_{series}" + (f"{{{', '.join(labels)}}}" if labels else "")
        text = _cell(f"{metric.label}: {metric.text}")
        yield f"| {_name(metric.name)} | {metric.unit} | `{prometheus}` | {text} |"

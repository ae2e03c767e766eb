"""Grafana's dashboard by the libraries of those who made its schema and its query language.

No Grafana can be installed from the package indexes that the tests use, so nothing here loads it into one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import dashboard as schema

DASHBOARD = json.loads((Path(__file__).parents[1] / "cluster" / "grafana" / "gvpo.json").read_text())

register_default_plugins()  # the options of panels and the queries of data sources are plugins' to read


def lost(ours: Any, read: Any, path: str = "") -> Iterator[str]:
    """Yield what of our JSON Grafana's classes have not taken, and what they have made something else."""
    if isinstance(ours, dict) and isinstance(read, dict):
        for key, value in ours.items():
            yield from lost(value, read[key], f"{path}.{key}") if key in read else (f"{path}.{key}",)
    elif isinstance(ours, list) and isinstance(read, list) and len(ours) == len(read):
        for i, (one, other) in enumerate(zip(ours, read, strict=True)):
            yield from lost(one, other, f"{path}[{i}]")
    elif ours != read:
        yield f"{path}: {read}"


def not_in_the_schema(dashboard: Any) -> list[str]:
    read = schema.Dashboard.from_json(copy.deepcopy(dashboard))
    return [*lost(dashboard, json.loads(JSONEncoder().encode(read)))]


def test_every_key_of_the_dashboard_is_one_of_grafanas_schema() -> None:
    assert not_in_the_schema(DASHBOARD) == []


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ((), "refreshes"),
        (("time",), "since"),
        (("templating", "list", 2), "refreshes"),
        (("panels", 1), "gridpos"),
        (("panels", 1, "gridPos"), "width"),
        (("panels", 1, "fieldConfig", "defaults"), "units"),
        (("panels", 1, "fieldConfig", "defaults", "custom"), "linewidth"),
        (("panels", 1, "options", "legend"), "calc"),
        (("panels", 1, "targets", 0), "expression"),
    ],
)
def test_a_key_that_grafana_does_not_know_would_be_found(path: tuple[Any, ...], wrong: str) -> None:
    dashboard = copy.deepcopy(DASHBOARD)
    part = dashboard
    for key in path:
        part = part[key]
    part[wrong] = 1
    assert [found.endswith(f".{wrong}") for found in not_in_the_schema(dashboard)] == [True]


def test_every_query_of_a_panel_is_promql() -> None:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 40
    for query in queries:
        promql_parser.parse(query)
        for broken in (query.replace("(", "", 1), query + ")", query.replace("=~", "=~=")):
            with pytest.raises(ValueError):
                promql_parser.parse(broken)

"""The verbs of the command line share its typer app, and the arguments and checks that are here.

Nothing heavier than typer is imported at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from gvpo_ray.config.run import GVPOConfig

PLAIN: dict[str, Any] = {
    "rich_markup_mode": None,  # the same plain text in a terminal, a pipe and a job's log
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(
    **PLAIN,
    epilog="A run is one YAML file plus key=value overrides. Start with `gvpo-ray train quickstart`. Exit "
    "status: 0 success, 1 the run failed, 2 a bad command, config, path, model or data file (one line says "
    "which), 130 interrupted (run it again to resume), 141 its reader has gone.",
)
bench = typer.Typer(**PLAIN)
app.add_typer(bench, name="bench")


@app.callback()
def _gvpo_ray() -> None:
    """Post-train a language model with GVPO on Ray.

    Sample groups (vLLM), verify them, learn, publish the weights, again.
    """


@bench.callback()
def _bench() -> None:
    """Run a benchmark; it prints a table."""


Function = TypeVar("Function", bound=Callable[..., Any])


def verb(example: str, into: typer.Typer = app) -> Callable[[Function], Function]:
    """Make a function a verb of the command line, named by the first word of its example.

    The function's docstring is the help, and `example` its last line.
    """
    path = "gvpo-ray bench" if into is bench else "gvpo-ray"
    return into.command(example.split()[0], epilog=f"example: {path} {example}")


Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file of the run, or the name of a job (`gvpo-ray jobs`)")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="keys of the config to override, e.g. loss.beta=0.5"),
]


def read_config(config: str, overrides: list[str] | None, for_evaluation: bool = False) -> GVPOConfig:
    """Read the config of a verb, as `GVPOConfig.from_file` does.

    Raises:
        ConfigError: one line that names the wrong key.
    """
    from gvpo_ray.config.run import GVPOConfig

    return GVPOConfig.from_file(config, overrides, for_evaluation)


def names_of(option: str, given: str | None, known: list[str]) -> list[str]:
    """Split a list such as "sort,chain"; return all known names where none is given.

    Raises:
        ConfigError: a name is not known.
    """
    from gvpo_ray.config.base import ConfigError

    names = known if given is None else [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: {name}: must be some of {', '.join(known)}")
    return names


def at_least_one(option: str, number: int | None) -> None:
    """Refuse a number below 1.

    Raises:
        ConfigError: one line that names the option.
    """
    from gvpo_ray.config.base import ConfigError

    if number is not None and number < 1:
        raise ConfigError(f"{option}: {number}: must be at least 1")


def print_table(table: Table, title: str) -> None:
    """Print a table below its title; outside a terminal its lines are as long as they need to be."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(
            console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum
        )
    console.print(title, soft_wrap=True, markup=False)
    console.print(table)

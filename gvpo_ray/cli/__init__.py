"""Each verb of the command line `gvpo-ray` is a function, and its docstring is its help.

Each verb imports what it needs when it runs, so that `--help` and a mistake in a config are answered before
torch and Ray are loaded.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from types import TracebackType

import typer

from gvpo_ray.cli import benches, runs  # noqa: F401 - which add their verbs to the app
from gvpo_ray.cli.app import app
from gvpo_ray.cli.terminal import print_plainly, use_utf8
from gvpo_ray.errors import GvpoError
from gvpo_ray.home import ensure_home

RESUMES = ("train", "learn", "evaluate", "verify", "bench paper", "bench staleness")
"""Verbs that go on where they stopped, when the same command is given again."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status; each failure is one line on stderr."""
    if arguments is None:
        use_utf8()
        arguments = sys.argv[1:]
    print_plainly()
    for text in arguments:
        if any("\ud800" <= sign <= "\udfff" for sign in text):  # bytes that are not UTF-8
            print(f"error: {text}: an argument is not UTF-8 text", file=sys.stderr)
            return 2
    ensure_home()
    # SIGTERM, of `ray job stop` and Kubernetes, is to act as Ctrl-C; a shell's `&` makes SIGINT ignored
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.excepthook = _show_trace
    command = typer.main.get_command(app)
    try:
        # not command.main(), which turns a KeyboardInterrupt into something else and prints an empty line
        with command.make_context("gvpo-ray", list(arguments)) as context:
            command.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()
    except typer.Exit as exit:
        return exit.exit_code
    except typer.TyperException as error:
        from gvpo_ray.config.shown import visible

        path = getattr(getattr(error, "ctx", None), "command_path", "gvpo-ray")
        message = " ".join(error.format_message().split()).rstrip(".")
        print(visible(f"error: {message}; `{path} --help` says what there is"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = " ".join(arguments[:2]).startswith(RESUMES)
        print("interrupted" + ("; the same command resumes the run" if resumes else ""), file=sys.stderr)
        return 130
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich makes this of it
            return 128 + signal.SIGPIPE
        raise
    except (OSError, GvpoError) as error:  # any other is a defect, which deserves its trace
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return 128 + signal.SIGPIPE
        from gvpo_ray.config.shown import visible

        print(visible(f"error: {error}"), file=sys.stderr)
        return error.status if isinstance(error, GvpoError) else 1
    return 0


def _reader_has_gone() -> bool:
    """Return whether who reads our output, such as `head`, has closed it; nothing more is written there."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # none, a notebook's, pytest's
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # Python flushes once more at the end
    return True


def _show_trace(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the trace of a defect as Python does, without the config's secrets."""
    from gvpo_ray.config.shown import visible

    print(visible("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

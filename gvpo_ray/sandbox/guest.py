"""A guest is a child that runs a whole program, or the tests of one; this is what happens inside of it.

    {"program", "stdin"}    the program is run once; what it prints is all that counts of it
    {"program"}             the program is run, and then its functions are called from outside
    {"tests"}               asserts are run; what the program defines is asked for outside

A program shares its process with nothing that judges it. Asserts run in a second guest, where the names of
the program stand for objects in the first (Remote), and values travel between the two as data, which is made
anew on the other side out of Python's own types. So a program sees arguments, and never what is expected.
Of asserts, asserts.py has the rest.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import itertools
import json
import os
import socket
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from gvpo_ray.sandbox import asserts
from gvpo_ray.sandbox.channel import as_frame
from gvpo_ray.sandbox.functions import describe
from gvpo_ray.sandbox.remote import OPERATIONS
from gvpo_ray.sandbox.values import MAX_ITEMS, decode, encode

MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "typing"),
)
"""Modules that every program finds imported, with all their names, as in LiveCodeBench's own checks: starter
code with List in it, and many solutions, rely on that."""

RECURSION_LIMIT = 50_000
"""Depth of recursion in a program, as in LiveCodeBench's own checks."""

PLACE = f"{__name__}:serve"
"""Where a template finds `serve`."""

_names: dict[str, Any] = {}
"""What every program finds imported."""


def serve(
    channel: socket.socket, lines: Iterable[bytes], request: Mapping[str, Any], file: int = -1
) -> NoReturn:
    """Do what a guest is for, then end the process.

    Args:
        channel: where frames are sent to; whoever runs a program has no other.
        lines: frames from there.
        request: one of the module's forms.
        file: an empty file in memory, for a program's input: it reads its size, and reads it twice.
    """

    def send(frame: Mapping[str, Any]) -> None:
        channel.sendall(as_frame(frame))

    os.dup2(0, 2)  # descriptor 0 is the null device
    sys.stderr = _text_to(_Dropping(2, "w", closefd=False))
    if "stdin" in request:
        status = _run(request["program"], request["stdin"], file, send)
    else:
        os.dup2(0, 1)
        sys.stdout = _text_to(_Dropping(1, "w", closefd=False))
        if "program" in request:
            status = _answer(request["program"], iter(lines), send)
        else:
            status = asserts.Tests(iter(lines), send, MODULES).run(
                request["tests"], request.get("entry_point"), request["helpers"]
            )
    os._exit(status)


class _Dropping(io.FileIO):
    """A _Dropping drops what is written, so that the kernel does not count it as a program's."""

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes


def _text_to(file: io.FileIO) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(file, 1 << 16), "utf-8", "replace")


def _warm_up() -> None:
    """Import what programs import, once and before the guests are forked."""
    for name in MODULES:
        exec(f"from {name} import *\nimport {name}", _names)
    with contextlib.suppress(ImportError):
        import numpy  # noqa: F401
    exec("from builtins import *", _names)  # operator.pow and others have taken their place
    for name in ("__builtins__", "__name__", "__doc__"):
        _names.pop(name, None)


serve.warm_up = _warm_up  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------- one program


def _execute(program: str) -> dict[str, Any]:
    """Run a program as __main__; return its global names."""
    module = types.ModuleType("__main__")
    module.__dict__.update(_names)
    sys.modules["__main__"] = module
    sys.argv = ["main.py"]
    sys.setrecursionlimit(RECURSION_LIMIT)
    sys.set_int_max_str_digits(0)  # the golds come from times without this limit; CPU time has its own
    exec(compile(program, "main.py", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _run(program: str, stdin: str, file: int, send: Callable[[Mapping[str, Any]], None]) -> int:
    """Run a program as a shell would, with its input in a file; return its exit status, send its error."""
    with open(file, "wb", buffering=0, closefd=False) as written:
        data = memoryview(stdin.encode("utf-8", "surrogatepass"))
        while data:
            data = data[written.write(data) :]
    os.lseek(file, 0, os.SEEK_SET)
    os.dup2(file, 0)
    os.close(file)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False), 1 << 16), "utf-8", "replace")
    out = sys.stdout = _text_to(io.FileIO(1, "w", closefd=False))
    error: BaseException | None = None
    at_end: Any = (threading._shutdown, atexit._run_exitfuncs)  # type: ignore[attr-defined]
    for step in (lambda: _execute(program), *at_end):
        try:
            step()
        except BaseException as raised:  # whatever a program does is its own affair
            error = error or raised
    with contextlib.suppress(BaseException):
        if sys.stdout is not out:
            sys.stdout.flush()
        out.flush()
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0, False)):
        return 0
    with contextlib.suppress(BaseException):
        send({"error": [type(error).__name__, describe(error)]})
    return 1


def _entry(namespace: Mapping[str, Any], name: str) -> Any:
    """Return a function of a program: LeetCode's method of the class Solution, or a global function."""
    solution = namespace.get("Solution")
    if isinstance(solution, type) and hasattr(solution, name):
        return getattr(solution(), name)
    return _global(namespace, name)


def _global(namespace: Mapping[str, Any], name: str) -> Any:
    # what every program finds imported (operator.add) is no answer to "write a function add"
    if name not in namespace or (name in _names and namespace[name] is _names[name]):
        raise NameError(f"the program defines no {name}")
    return namespace[name]


def _answer(program: str, lines: Iterator[bytes], send: Callable[[Mapping[str, Any]], None]) -> int:
    """Run a program, then do what is asked with its names and objects until nobody asks any more."""
    objects: list[Any] = []
    numbers: dict[int, int] = {}

    def keep(value: Any) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        return numbers[id(value)]

    namespace: dict[str, Any] = {}
    operations: dict[str, Callable[..., Any]] = {
        **OPERATIONS,
        "call": lambda function, *arguments, **named: function(*arguments, **named),
        "list": lambda items: list(itertools.islice(items, MAX_ITEMS)),
        "run": lambda: namespace.update(_execute(program)),
        "global": lambda name: _global(namespace, name),
        "entry": lambda name: _entry(namespace, name),
    }
    asked: dict[str, Any] = {"do": "run", "arguments": []}
    while True:
        try:
            arguments = [decode(value, objects.__getitem__) for value in asked["arguments"]]
            named = {
                name: decode(value, objects.__getitem__) for name, value in asked.get("named", {}).items()
            }
            answer = {"value": encode(operations[asked["do"]](*arguments, **named), keep)}
            changed = [encode(value, keep) for value in arguments]
            if changed != asked["arguments"]:
                answer["changed"] = changed
        except BaseException as error:  # whatever a program does is its own affair
            python_s = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
            answer = {"error": [python_s, describe(error)]}
            if all(type(argument) in (int, float, str) for argument in error.args):
                answer["told"] = error.args
        send(answer)
        line = next(lines, b"")
        if not line:
            return 0
        asked = json.loads(line)

"""A guest is a child that runs a whole program, or the tests of one; this is what happens inside of it.

    {"program", "stdin"}    the program is run once; what it prints is all that counts of it
    {"program"}             the program is run, and then its functions are called from outside
    {"tests"}               asserts are run; what the program defines is asked for outside

A program shares its process with nothing that judges it. Asserts run in a second guest, where the names of
the program stand for objects in the first (Remote), and values travel between the two as data, which is made
anew on the other side out of Python's own types. So a program sees arguments, and never what is expected.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import contextlib
import io
import itertools
import json
import operator
import os
import socket
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from gvpo_ray.sandbox.channel import as_frame
from gvpo_ray.sandbox.functions import describe
from gvpo_ray.sandbox.values import MAX_ITEMS, UnsendableError, decode, encode

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


def serve(channel: socket.socket, lines: Iterable[bytes], request: Mapping[str, Any]) -> NoReturn:
    """Do what a guest is for, then end the process.

    Args:
        channel: where frames are sent to; whoever runs a program has no other.
        lines: frames from there.
        request: one of the module's forms.
    """

    def send(frame: Mapping[str, Any]) -> None:
        channel.sendall(as_frame(frame))

    os.dup2(0, 2)  # descriptor 0 is the null device
    if "stdin" in request:
        status = _run(request["program"], request["stdin"], send)
    else:
        os.dup2(0, 1)
        if "program" in request:
            status = _answer(request["program"], iter(lines), send)
        else:
            status = _Tests(iter(lines), send).run(request["tests"], request.get("entry_point"))
    os._exit(status)


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


def _run(program: str, stdin: str, send: Callable[[Mapping[str, Any]], None]) -> int:
    """Run a program as a shell would; return its exit status, and send its error."""
    read, write = os.pipe()  # a file could not be written where the kernel has no Landlock
    os.dup2(read, 0)
    os.close(read)
    data = stdin.encode("utf-8", "surrogatepass")
    threading.Thread(target=_feed, args=(write, data), daemon=True).start()
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False), 1 << 16), "utf-8", "replace")
    out = sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(1, "w", closefd=False), 1 << 16), "utf-8", "replace"
    )
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


def _feed(write: int, data: bytes) -> None:
    """Write a program's input, which may be more than a pipe holds."""
    with contextlib.suppress(OSError), open(write, "wb", buffering=0) as pipe:
        view = memoryview(data)
        while view:
            view = view[pipe.write(view) :]


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


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "list": lambda items: list(itertools.islice(items, MAX_ITEMS)),
    "len": len,
    "str": str,
}
"""What may be done with a program's objects from outside."""


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
        **_OPERATIONS,
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
            answer = {"error": [type(error).__name__, describe(error)]}
        send(answer)
        line = next(lines, b"")
        if not line:
            return 0
        asked = json.loads(line)


# --------------------------------------------------------------------------------------------------- asserts


class ProgramError(Exception):
    """The program raised an error that is none of Python's own; asserts of the tests may catch this one."""


class Remote:
    """A Remote stands for an object of the program that is no data, such as a function, and acts there.

    It is equal to itself alone and is neither true nor false: the program does not say how it compares.
    """

    __slots__ = ("_ask", "_is_global", "_number")

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_is_global", False)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Have the program's function called, and return its value."""
        return self._ask("call", self, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", self, key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask("list", self))

    def __len__(self) -> int:
        return int(self._ask("len", self))

    def __str__(self) -> str:
        return str(self._ask("str", self))

    def __eq__(self, other: object) -> bool:
        return type(other) is Remote and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)

    def __bool__(self) -> bool:
        raise TypeError("an object of the program is neither true nor false")


class _Globals(dict[str, Any]):
    """A _Globals holds the global names of asserts: what they do not define is the program's, or Python's."""

    def __init__(self, ask: Callable[..., Any], wanted: set[str]) -> None:
        super().__init__({name: sys.modules[name] for name in MODULES})
        self._ask, self._wanted = ask, wanted

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) and name not in self._wanted:
            raise KeyError(name)
        try:
            return self._ask("global", name)
        except Exception:  # a KeyError would let Python's own take its place
            raise NameError(f"the program defines no {name}") from None


class _Tests:
    """A _Tests holds the asserts of a row, and the program as far as they see it."""

    def __init__(self, lines: Iterator[bytes], send: Callable[[Mapping[str, Any]], None]) -> None:
        self._lines, self._send, self._num_asked = lines, send, 0

    def run(self, sources: list[str], entry_point: str | None) -> int:
        """Run the asserts one after the other, and send how each went.

        Frames are {"total": number of tests}, {"test": whether it passed, "text": why not}, {"fault": why the
        tests themselves do not work}, {"end": true}, and {"do", "arguments", "named"}, which the program's
        guest answers.
        """
        try:
            statements = [each for source in sources for each in ast.parse(source).body]
        except (SyntaxError, ValueError, RecursionError) as error:
            self._send({"fault": f"the tests are not Python: {describe(error)}"})
            return 0
        if entry_point and any(
            isinstance(each, ast.FunctionDef) and each.name == "check" for each in statements
        ):
            statements += ast.parse(f"check({entry_point})").body
        names = _Globals(self._ask, {entry_point} if entry_point else _called_builtins(statements))
        self._send({"total": sum(map(_is_test, statements))})
        for statement in statements:
            text = None
            try:
                code = compile(ast.Module([statement], []), "tests.py", "exec", dont_inherit=True)
                exec(code, names)
            except UnsendableError as error:
                self._send({"fault": str(error)})
                return 0
            except BaseException as error:  # tests fail in any way, and so do programs in them
                text = describe(error)
                if not _is_test(statement) and not self._num_asked:
                    self._send({"fault": f"the tests fail before they call the program: {text}"})
                    return 0
                if not _is_test(statement):
                    break
            if _is_test(statement):
                self._send({"test": text is None, "text": text})
        if not self._num_asked:
            self._send({"fault": "the tests ask for nothing that the program defines"})
        self._send({"end": True})
        return 0

    def _ask(self, do: str, *arguments: Any, **named: Any) -> Any:
        """Have something done in the program's process; return its value, or raise its error."""
        self._num_asked += 1
        try:
            frame = {
                "do": do,
                "arguments": [encode(value, self._number) for value in arguments],
                "named": {name: encode(value, self._number) for name, value in named.items()},
            }
        except UnsendableError as error:
            if arguments[0]._is_global:
                raise
            raise TypeError(str(error)) from None  # the program decides what objects the tests meet
        self._send(frame)
        answer = json.loads(next(self._lines))
        if "error" in answer:
            name, text = answer["error"]
            kind = getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                with contextlib.suppress(TypeError):  # some take more than a text
                    raise kind(text)
            raise ProgramError(f"{name}: {text}")
        for value, new in zip(arguments, answer.get("changed", ()), strict=False):
            _copy(decode(new, self._object), value)
        value = decode(answer["value"], self._object)
        if do == "global" and type(value) is Remote:
            object.__setattr__(value, "_is_global", True)
        return value

    def _object(self, number: int) -> Remote:
        return Remote(self._ask, number)

    def _number(self, value: Any) -> int:
        if type(value) is Remote:
            number: int = value._number
            return number
        raise UnsendableError(
            f"the tests give the program a {type(value).__name__}, which cannot be sent to it"
        )


def _copy(new: Any, old: Any) -> None:
    """Give a list, set or dict the content that the program has given it."""
    if isinstance(old, list):
        old[:] = new
    elif isinstance(old, (set, dict)):
        old.clear()
        old.update(new)


def _is_test(statement: ast.stmt) -> bool:
    """Return whether a statement tests something; others prepare it."""
    return isinstance(statement, (ast.Assert, ast.For, ast.While, ast.If, ast.With, ast.Try)) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    )


def _called_builtins(statements: list[ast.stmt]) -> set[str]:
    """Return the names of Python's that are the program's here, such as `sum` where `sum(1, 2)` is tested.

    They are those that every assert calls, where the tests have no name that only the program can define.
    """
    nodes = [node for statement in statements for node in ast.walk(statement)]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    defined = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | {*MODULES}
    defined |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    defined |= {
        (alias.asname or alias.name).partition(".")[0]
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    called = [
        {
            node.func.id
            for node in ast.walk(statement)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        for statement in statements
        if isinstance(statement, ast.Assert)
    ]
    if not called or any(not hasattr(builtins, name) for name in {node.id for node in names} - defined):
        return set()
    return set.intersection(*called) - defined

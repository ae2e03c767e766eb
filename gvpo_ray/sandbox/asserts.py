"""Asserts run in a guest of their own, where the names of a program stand for objects in another process.

Three rules keep what a program does there from changing what the asserts mean:

    errors      one that vanishes, in tests that catch none, fails the test: for the iteration of map and zip,
                for hasattr and others some errors mean something else than that a call has failed
    operators   they are passed on between objects that the tests make, by calling a class of the program's,
                and what comes out of these. So a program says nothing about a value of the tests, such as
                whether it is equal, and is never given what is expected; nor do results of its functions, and
                of methods of a class Solution, say how they compare with each other
    arguments   what a program does to them is seen from the next statement on, so that it cannot change the
                value out of which its own statement computes what it expects
"""

from __future__ import annotations

import ast
import builtins
import copy
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

from gvpo_ray.sandbox.arguments import (
    LOOK,
    MUTABLE,
    SETTLE,
    fill,
    is_written,
    kept_names,
    settled,
    sides,
)
from gvpo_ray.sandbox.functions import describe
from gvpo_ray.sandbox.remote import OF_CLASS, Remote, may_be_class, number_of, origin_of
from gvpo_ray.sandbox.values import UnsendableError, decode, encode

_MEANT = {("getattr", "AttributeError"), ("len", "TypeError")}
"""What is done, and the error by which Python asks whether it can be: hasattr, and the length of a list to be
made."""

_NEVER = ("StopIteration", "StopAsyncIteration")
"""Errors by which a call would tell Python that an iterator is at its end."""

_CATCHING = {"raises", "assertRaises", "assertRaisesRegex"}
"""Functions that catch errors where no `try` and no `with` is to be seen; the first argument is the class."""


class ProgramError(Exception):
    """The program raised an error that cannot be raised here as it was there."""


class _Globals(dict[str, Any]):
    """A _Globals holds the global names of asserts: what they do not define is the program's, or Python's.

    Args:
        ask: has something done in the program's process.
        wanted: names of Python's that are the program's here.
        modules: modules that asserts find imported.
        given: what a prompt gives: functions, and what these use.
    """

    def __init__(
        self, ask: Callable[..., Any], wanted: set[str], modules: Iterable[str], given: list[ast.stmt]
    ) -> None:
        super().__init__({name: sys.modules[name] for name in modules})
        self._ask, self._wanted, self._given = ask, wanted, given

    def give(self) -> None:
        """Make the functions that a prompt gives, behind what the row itself has defined up to now.

        Raises:
            UnsendableError: they do not run; the program's must not take their place.
        """
        if not self._given:
            return
        names = _GivenGlobals(self)
        try:
            given = ast.Module(settled(self._given, set()), [])
            exec(compile(given, "prompt.py", "exec", dont_inherit=True), names)
        except BaseException as error:  # it may import what is not here, or use what nobody defines
            text = f"functions of the prompt that the tests call do not run: {describe(error)}"
            raise UnsendableError(text) from None
        functions = self._functions()
        self._given, names.is_made = [], True
        self.update({name: names[name] for name in functions})

    def _functions(self) -> set[str]:
        return {each.name for each in self._given if isinstance(each, ast.FunctionDef)}

    def __missing__(self, name: str) -> Any:
        if name in self._functions():
            self.give()
            return self[name]
        if hasattr(builtins, name) and name not in self._wanted:
            raise KeyError(name)
        try:
            return self._ask("global", name)
        except Exception:  # a KeyError would let Python's own take its place
            raise NameError(f"the program defines no {name}") from None


class _GivenGlobals(dict[str, Any]):
    """A _GivenGlobals holds the global names of a prompt's functions: the other names are those of the tests.

    While they are made, nothing is the program's: what a prompt defines must not depend on it.
    """

    def __init__(self, tests: _Globals) -> None:
        super().__init__()
        self._tests, self.is_made = tests, False

    def __missing__(self, name: str) -> Any:
        if not self.is_made and name not in self._tests:
            raise KeyError(name)
        return self._tests[name]


class Tests:
    """A Tests holds the asserts of a row, and the program as far as they see it.

    Args:
        lines: frames that answer.
        send: sends a frame.
        modules: modules that asserts find imported.
    """

    def __init__(
        self, lines: Iterator[bytes], send: Callable[[Mapping[str, Any]], None], modules: Iterable[str]
    ) -> None:
        self._lines, self._send, self._modules, self._num_asked = lines, send, modules, 0
        self._error: str | None = None
        self._changed: dict[int, tuple[Any, Any, bool]] = {}
        self._views: dict[int, tuple[Any, Any, Any]] = {}
        self._last: Any = None
        self._origins: dict[int, int] = {}
        self._functions: set[str] = set()
        self._classes: set[int] = set()

    def run(self, sources: list[str], entry_point: str | None, helpers: list[str]) -> int:
        """Run the asserts one after the other, and send how each went.

        Where the first test begins, or before where they are used, the helpers are made, functions that a
        prompt gives; what the sources define counts before them.

        Frames are {"total": number of tests}, {"test": whether it passed, "text": why not}, {"stopped": why
        what prepares a test failed}, {"fault": why the tests themselves do not work}, {"end": true}, and
        {"do", "arguments", "named"}, which the program's guest answers.
        """
        sys.set_int_max_str_digits(0)
        try:
            given = [each for helper in helpers for each in ast.parse(helper).body]
            statements = [each for source in sources for each in ast.parse(source).body]
        except (SyntaxError, ValueError, RecursionError) as error:
            self._send({"fault": f"the tests are not Python: {describe(error)}"})
            return 0
        if entry_point and any(
            isinstance(each, ast.FunctionDef) and each.name == "check" for each in statements
        ):
            statements += ast.parse(f"check({entry_point})").body
        if fault := _asks_too_much([*given, *statements]):
            self._send({"fault": fault})
            return 0
        wanted = {entry_point} if entry_point else _called_builtins(statements, self._modules)
        self._functions = {entry_point or ""} | _valued(statements)
        names = _Globals(self._ask, wanted, self._modules, given)
        names[SETTLE], names[LOOK] = self._settle, self._look
        catches, kept = _catches([*given, *statements]), kept_names(statements, wanted)
        self._send({"total": sum(map(_is_test, statements))})
        for statement in statements:
            text: str | None = None
            is_test, self._error = _is_test(statement), None
            try:
                if is_test:
                    names.give()
                tree = ast.Module(settled([statement], kept), [])
                exec(compile(tree, "tests.py", "exec", dont_inherit=True), names)
                if not catches:
                    text = self._error
            except UnsendableError as error:
                self._send({"fault": str(error)})
                return 0
            except BaseException as error:  # tests fail in any way, and so do programs in them
                text = describe(error)
            if is_test:
                self._send({"test": text is None, "text": text})
            elif text is not None and not self._num_asked:
                self._send({"fault": f"the tests fail before they call the program: {text}"})
                return 0
            elif text is not None:
                self._send({"stopped": text})
                break
        if not self._num_asked:
            self._send({"fault": "the tests ask for nothing that the program defines"})
        self._send({"end": True})
        return 0

    def _ask(self, do: str, *arguments: Any, **named: Any) -> Any:
        """Have something done in the program's process; return its value, or raise its error."""
        self._num_asked += 1
        seen = [self._own(value) for value in arguments]
        try:
            frame = {
                "do": do,
                "arguments": [encode(value, number_of) for value in seen],
                "named": {name: encode(value, number_of) for name, value in named.items()},
            }
        except UnsendableError as error:
            if type(arguments[0]) is Remote and arguments[0]._is_global:
                raise
            raise TypeError(str(error)) from None  # the program decides what objects the tests meet
        self._send(frame)
        answer = json.loads(next(self._lines, b"{}"))
        if "error" in answer:
            self._raise(do, *answer["error"], *answer.get("told", ()))
        try:
            value = self._last = decode(answer["value"], partial(self._object, origin_of(do, arguments)))
            for argument, new in zip(arguments, answer.get("changed", ()), strict=False):
                if isinstance(argument, MUTABLE):
                    content = decode(new, partial(self._object, 0))
                    self._changed[id(argument)] = argument, content, value is None
        except Exception as error:  # the answer is none of ours
            self._error = describe(error)
            raise ProgramError(self._error) from None
        if do == "global" and type(value) is Remote:
            number, name = value._number, arguments[0]
            # a name of a function is that, also where it has the number of a class
            is_class = may_be_class(name) and name not in self._functions
            is_class = is_class and (number in self._classes or self._ask("is_class", value) is True)
            self._classes |= {number} if is_class else set()
            value = Remote(self._ask, number, OF_CLASS if is_class else 0)
            object.__setattr__(value, "_is_global", True)
        return value

    def _raise(self, do: str, name: str, text: str, *told: Any) -> NoReturn:
        """Raise an error of the program, and keep in mind that there was one.

        Args:
            do: what was done.
            name: the first of Python's own classes that the error's class derives from.
            text: the error's own class and text.
            told: the arguments of the error, if they are texts and numbers.
        """
        if (do, name) not in _MEANT:
            self._error = text
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)) or name in _NEVER:
            raise ProgramError(text)
        try:
            error = kind(*told)
        except TypeError:  # some take other arguments
            raise ProgramError(text) from None
        raise error

    def _own(self, value: Any) -> Any:
        """Return the content that the program has given an argument of earlier calls, or the argument."""
        if id(value) in self._changed:
            return self._changed[id(value)][1]
        return self._views[id(value)][2] if id(value) in self._views else value

    def _settle(self, *dropped: Any) -> None:
        """Give the arguments of earlier calls the content that the program has given them.

        Where a call has returned something, tests may compute what they expect of it from its arguments, and
        the program must not change those before. So its changes are only seen where they are compared with
        values that are written there (`_look`), unless the tests have `dropped` what the call has returned.
        """
        changed, self._changed = self._changed, {}
        is_dropped = any(each is not None and each is self._last for each in dropped)
        for value, new, is_all in changed.values():
            _, old, _ = self._views.pop(id(value), (value, copy.copy(value), new))
            if is_all or is_dropped:
                fill(value, new)
            else:
                self._views[id(value)] = value, old, new

    def _look(self, begins: bool) -> None:
        """Show what programs did to their arguments in calls that returned something, or hide it again."""
        for key, (value, old, new) in self._views.items():
            if not begins:  # the tests may have changed it as well
                self._views[key] = value, old, copy.copy(value)
            fill(value, new if begins else old)

    def _object(self, origin: int, number: int) -> Remote:
        # the tests' own objects stay that, wherever they come back from
        self._origins[number] = max(origin, self._origins.get(number, 0))
        return Remote(self._ask, number, self._origins[number])


def _is_test(statement: ast.stmt) -> bool:
    """Return whether a statement tests something; others prepare it."""
    return isinstance(statement, (ast.Assert, ast.For, ast.While, ast.If, ast.With, ast.Try)) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    )


def _valued(statements: list[ast.stmt]) -> set[str]:
    """Return the names whose results have to be equal to what is written there: they are no classes."""
    asserted = [
        test
        for statement in statements
        for node in ast.walk(statement)
        if isinstance(node, ast.Assert)
        for test in (node.test.values if isinstance(node.test, ast.BoolOp) else [node.test])
    ]
    return {
        side.func.id
        for test in asserted
        if isinstance(test, ast.Compare)
        and isinstance(test.ops[0], ast.Eq)
        and any(map(is_written, sides(test)))
        for side in sides(test)
        if isinstance(side, ast.Call) and isinstance(side.func, ast.Name)
    }


def _catches(statements: list[ast.stmt]) -> bool:
    """Return whether tests may mean to catch errors."""
    return any(
        (isinstance(node, (ast.Try, ast.TryStar)) and node.handlers)
        or isinstance(node, (ast.With, ast.AsyncWith))
        or _called(node) in _CATCHING
        for statement in statements
        for node in ast.walk(statement)
    )


def _called(node: ast.AST) -> str:
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "id", "") or getattr(function, "attr", "")


def _asks_too_much(statements: list[ast.stmt]) -> str | None:
    """Return why no program can pass the tests here: they need classes of the program's in this process."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    if any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in nodes):
        return None  # nobody knows what they define
    known = _defined(nodes) | set(dir(builtins))
    for node in nodes:
        classes: list[ast.expr] = []
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            classes = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and _called(node) in _CATCHING:
            classes = node.args[:1]
        elif isinstance(node, ast.ClassDef):
            classes = node.bases
        for each in classes:
            if isinstance(each, ast.Name) and each.id not in known:
                what = "derive a class from" if isinstance(node, ast.ClassDef) else "catch errors of"
                return f"the tests {what} {each.id}, a class of the program, which is in another process"
    return None


def _defined(nodes: list[ast.AST]) -> set[str]:
    """Return the names that tests define themselves."""
    defined = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    defined |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return defined | {
        (alias.asname or alias.name).partition(".")[0]
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }


def _called_builtins(statements: list[ast.stmt], modules: Iterable[str]) -> set[str]:
    """Return the names of Python's that are the program's here, such as `sum` where `sum(1, 2)` is tested.

    They are those that every assert calls, where the tests have no name that only the program can define.
    """
    nodes = [node for statement in statements for node in ast.walk(statement)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    defined = _defined(nodes) | set(modules)
    called = [
        {
            node.func.id
            for node in ast.walk(statement)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        for statement in statements
        if isinstance(statement, ast.Assert)
    ]
    if not called or any(not hasattr(builtins, name) for name in names - defined):
        return set()
    return set.intersection(*called) - defined

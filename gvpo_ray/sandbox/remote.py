"""Objects of a program stand in the tests' process as Remotes, whose operations are done in the program's."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

from gvpo_ray.sandbox.values import Named, UnsendableError

_BINARY = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift"),
    *("rshift", "lt", "le", "gt", "ge", "eq", "ne"),
)
_UNARY = ("neg", "pos", "abs", "invert", "index")
_ALONE: dict[str, Callable[..., Any]] = {
    "len": len,
    "str": str,
    "repr": repr,
    "int": int,
    "float": float,
    "bool": bool,
    "hash": hash,
}

OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, f"__{name}__") for name in (*_BINARY, *_UNARY)},
    **_ALONE,
    "round": round,
    "isinstance": isinstance,
    "issubclass": issubclass,
    "format": format,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "getattr": getattr,
    "setattr": setattr,
    "is_class": inspect.isclass,
}
"""What may be done with a program's objects from outside, beside calling and listing them."""

_CLASS = re.compile(r"_*[A-Z][A-Za-z0-9]*")
"""A name that may be that of a class whose objects tests make."""

OF_CLASS, _MADE = 1, 2
"""Where an object of the program has come from: it is such a class, or belongs to it (`C.RED`); or it is what
calling one of these has made, or has come out of that (by a method, an attribute). All others are 0."""


class Remote:
    """A Remote stands for an object of the program that is no data, such as a function, and acts there.

    Operators are passed on where it and the other operands are of classes whose objects the tests make.
    Others are equal where they are the same object.

    Args:
        ask: has something done in the program's process.
        number: number of the object there.
        origin: where it has come from.
    """

    __slots__ = ("_ask", "_is_global", "_number", "_of_tests")

    def __init__(self, ask: Callable[..., Any], number: int, origin: int = 0) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_of_tests", origin)
        object.__setattr__(self, "_is_global", False)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Have the program's function called, and return its value."""
        return self._ask("call", self, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__array") or name == "__dlpack__":  # by which numpy reads memory at an address
            raise AttributeError(name)
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._ask("delitem", self, key)

    def __format__(self, form: str) -> str:
        return str(self._ask("format", self, form))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask("list", self))

    def __round__(self, digits: int | None = None) -> Any:
        return self._ask("round", self, digits)

    def __instancecheck__(self, instance: object) -> bool:
        """Say whether an object of the program is of this class of the program; nothing else is."""
        is_known = type(instance) in (Remote, Named)
        return is_known and self._ask("isinstance", instance, self) is True

    def __subclasscheck__(self, subclass: object) -> bool:
        return type(subclass) is Remote and self._ask("issubclass", subclass, self) is True


def _passed_on(name: str) -> Callable[..., Any]:
    """Return a method that has an operation done in the program's process, with its objects alone."""

    def method(self: Remote, *others: Any) -> Any:
        if not all(type(other) is Remote for other in others):
            return NotImplemented
        origins = [each._of_tests for each in (self, *others)]
        if others and not (min(origins) and max(origins) == _MADE):
            if name not in ("eq", "ne"):
                return NotImplemented
            return (self._number == others[0]._number) is (name == "eq")
        if name not in ("eq", "ne"):
            return self._ask(name, self, *others)
        # Both are asked, always in this order: the program cannot know which of them is to hold.
        answers = [bool(self._ask(each, self, *others)) for each in ("eq", "ne")]
        if all(answers):
            raise TypeError("two objects of the program are equal, and not equal")
        return answers[name == "ne"]

    return method


for _name in (*_BINARY, *_UNARY, *_ALONE):
    setattr(Remote, f"__{_name}__", _passed_on(_name))


def may_be_class(name: str) -> bool:
    """Return whether a global name may be that of a class whose objects tests make.

    A class Solution has the function under test.
    """
    return _CLASS.fullmatch(name) is not None and name != "Solution"


def origin_of(do: str, arguments: tuple[Any, ...]) -> int:
    """Return where an object that the program returns has come from.

    Args:
        do: what was done; a global is nothing, unless somebody knows better.
        arguments: what with; the first is the object.
    """
    if do in _BINARY or do in _UNARY:
        return max(int(each._of_tests) for each in arguments)
    origin: int = arguments[0]._of_tests if type(arguments[0]) is Remote else 0
    return _MADE if origin and do == "call" else origin


def number_of(value: Any) -> int:
    """Return the number of a program's object."""
    if type(value) is Remote:
        number: int = value._number
        return number
    raise UnsendableError(f"the tests give the program a {type(value).__name__}, which cannot be sent to it")

"""Tests are rewritten so that they see what a program did to its arguments, where that is safe.

A program that changes an argument must not change what its tests compute from it and expect of the result:
y = f(x), assert y == sorted(x). So the changes are seen where nothing is expected of a result (the call has
returned None, or nobody takes what it returned), and else only beside values that tests have written down.
"""

from __future__ import annotations

import ast
import builtins
import collections
from collections.abc import Collection
from typing import Any

SETTLE = "what programs did to arguments is seen from here on"
LOOK = "what programs did to arguments is seen in the next statement"
"""Names of functions in the tests; no program and no test can spell them."""

MUTABLE = (list, set, dict, collections.deque, bytearray)

_SETTLING = (
    *(ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Assert, ast.Delete),
    *(ast.For, ast.While, ast.If, ast.With, ast.Try),
)

_LEAVING = {"len", "range", "all", "any"}
"""Functions of Python's that neither change an argument nor give it another name."""


def fill(value: Any, content: Any) -> None:
    """Give a collection another content."""
    if isinstance(value, (list, bytearray)):
        value[:] = content
    else:
        value.clear()
        value.extend(content) if isinstance(value, collections.deque) else value.update(content)


def settled(statements: list[ast.stmt], kept: Collection[str], begins: bool = False) -> list[ast.stmt]:
    """Return statements, each of which sees what a program did to its arguments in those before it.

    Args:
        statements: the statements.
        kept: what `kept_names` found.
        begins: whether a function begins with them.
    """
    made: list[ast.stmt] = [_call_at(statements[0], SETTLE)] if begins and statements else []
    for statement in statements:
        for part in (statement, *getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            for field in ("body", "orelse", "finalbody"):
                if inner := getattr(part, field, None):
                    is_function = isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
                    setattr(part, field, settled(inner, kept, not is_function))
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            made.append(_call_at(statement, SETTLE, statement.value))
            continue
        if isinstance(statement, ast.Assert) and _compares_with_what_is_written(statement.test, kept):
            body = [_call_at(statement, LOOK, ast.Constant(True)), statement]
            last = [_call_at(statement, LOOK, ast.Constant(False))]
            made.append(ast.copy_location(ast.Try(body, [], [], last), statement))
        else:
            made.append(statement)
        if isinstance(statement, _SETTLING):
            made.append(_call_at(statement, SETTLE))
    return made


def _call_at(statement: ast.stmt, name: str, *arguments: ast.expr) -> ast.stmt:
    call = ast.Expr(ast.Call(ast.Name(name, ast.Load()), list(arguments), []))
    return ast.fix_missing_locations(ast.copy_location(call, statement))


def _compares_with_what_is_written(test: ast.expr, kept: Collection[str]) -> bool:
    """Return whether a test has comparisons, and all of them ask whether one variable is what is written."""
    compared = [node for node in ast.walk(test) if isinstance(node, ast.Compare)]
    return bool(compared) and all(
        all(isinstance(each, (ast.Eq, ast.In, ast.Is)) for each in node.ops)
        and any(is_written(side, kept) for side in sides(node))
        and not any(map(_mixes, sides(node)))
        for node in compared
    )


def sides(node: ast.Compare) -> list[ast.expr]:
    """Return what a comparison compares."""
    return [node.left, *node.comparators]


def is_written(side: ast.expr, kept: Collection[str] = ()) -> bool:
    """Return whether an expression is a value without calls, or such a name, perhaps with an index."""
    if any(isinstance(node, ast.Call) for node in ast.walk(side)):
        return False
    while isinstance(side, ast.Subscript) and not any(
        isinstance(node, ast.Subscript) for node in ast.walk(side.slice)
    ):
        side = side.value
    return all(node.id in kept for node in ast.walk(side) if isinstance(node, ast.Name))


def _mixes(side: ast.expr) -> bool:
    """Return whether something is made of two variables, such as sum(y) - sum(x), beside indices."""
    if isinstance(side, (ast.List, ast.Tuple)):
        return any(map(_mixes, side.elts))
    names: set[str] = set()
    left: list[ast.AST] = [side]
    for node in left:
        if isinstance(node, ast.Name) and not hasattr(builtins, node.id):
            names.add(node.id)
        if isinstance(node, ast.Subscript):
            left.append(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            left += [*node.args, *node.keywords]
        else:
            left += ast.iter_child_nodes(node)
    return len(names) > 1


def kept_names(statements: list[ast.stmt], wanted: Collection[str]) -> set[str]:
    """Return the names of values that are written in tests, and that no program can change.

    They are those that nothing gets but asserts, and functions that leave their arguments as they are.

    Args:
        statements: the tests.
        wanted: names of Python's that are the program's here.
    """
    nodes = [node for statement in statements for node in ast.walk(statement)]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    leaving = [call for call in calls if getattr(call.func, "id", "") in _LEAVING - {*wanted}]
    given = {part for call in calls if call not in leaving for part in ast.walk(call)}
    given |= {node.iter for node in nodes if isinstance(node, ast.comprehension)}
    asserts = [node for node in nodes if isinstance(node, ast.Assert)]
    fine: set[ast.AST] = {part for node in (*asserts, *leaving) for part in ast.walk(node)} - given
    fine |= {
        target
        for node in nodes
        if isinstance(node, ast.Assign) and is_written(node.value)
        for target in node.targets
    }
    names = [node for node in nodes if isinstance(node, ast.Name)]
    others = {node.id for node in names if node not in fine}
    return {node.id for node in names} - others - {node.arg for node in nodes if isinstance(node, ast.arg)}

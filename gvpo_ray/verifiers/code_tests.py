"""The tests of a row are read in the forms of known data sets, and outputs are compared as those do.

    {"inputs", "outputs", "fn_name"?}                           APPS (`input_output`), TACO, PRIME
    {"input": [...], "output": [...]} in `public_tests`, ...    CodeContests
    [{"input", "output", "testtype"}] in `public_test_cases`    LiveCodeBench, with `metadata` {"func_name"}
    ["assert f(1) == 2", ...] in `test_list`                    MBPP, with `test_setup_code`, `test_imports`
    "def check(candidate): ..." in `test`, with `entry_point`   HumanEval and HumanEval+; MBPP+ without it

`answer` may hold any of them, as JSON text too, and what an object in it names counts before the columns.
"""

from __future__ import annotations

import ast
import base64
import binascii
import builtins
import functools
import importlib
import io
import json
import math
import pickle
import re
import symtable
import zlib
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from gvpo_ray.sandbox.guest import MODULES

COLUMNS = (
    *("answer", "input_output", "inputs", "public_tests", "private_tests", "generated_tests"),
    *("public_test_cases", "private_test_cases", "tests", "test_list", "test", "reward_model"),
)
"""Columns in which tests are found."""

MAX_BYTES = 1 << 30
"""Largest size of tests that are stored compressed."""


class Style(NamedTuple):
    """A Style says how a data set compares what is printed with what is expected; spaces never count."""

    by_line: bool
    """Whether the lines must be the same, but for empty ones."""
    ignores_case: bool
    relative: float
    """Tolerance where the expected number has a fraction, as a share of it."""
    absolute: float


APPS = Style(True, False, 1e-5, 1e-8)
"""As numpy.allclose, by which APPS, TACO and PRIME compare."""
CONTESTS = Style(False, True, 0.0, 1e-5)
LIVE = Style(True, False, 0.0, 0.0)


class Runs(NamedTuple):
    """Runs are tests by standard input and output."""

    inputs: list[str]
    outputs: list[str]
    style: Style


class Calls(NamedTuple):
    """Calls are tests by calls of a function."""

    name: str
    inputs: list[list[Any]]
    """The arguments of each call."""
    outputs: list[Any]
    may_be_wrapped: bool
    """Whether an expected value may stand in a list of its own, as in APPS."""


class Asserts(NamedTuple):
    """Asserts are tests in Python."""

    setup: list[str]
    asserts: list[str]
    entry_point: str | None


def read_tests(row: Mapping[str, Any]) -> Runs | Calls | Asserts:
    """Return the tests of a row.

    Args:
        row: the columns of the data by name.

    Raises:
        ValueError: there are none, or they are malformed; the message says what is wrong.
    """
    row = dict(row)
    gold = _json(row.pop("answer", None))
    if gold in (None, "", []):
        model = _json(row.get("reward_model"))
        gold = _json(model.get("ground_truth")) if isinstance(model, Mapping) else None
    if isinstance(gold, Mapping):
        row = {"tests": gold, **row, **gold}
    elif isinstance(gold, list) and gold and all(isinstance(entry, str) for entry in gold):
        read = [_json(entry) for entry in gold]
        row["test_list" if read == gold else "tests"] = gold if read == gold else read[0]
    elif isinstance(gold, list) and gold:
        row["tests"] = gold
    elif isinstance(gold, str) and gold.strip():
        row["test"] = gold
    for read_form in (_pairs, _asserts):
        if (found := read_form(row)) is not None:
            return found
    raise ValueError("the row has no tests")


def _json(value: Any) -> Any:
    """Return what a text holds as JSON, or the value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _pairs(row: Mapping[str, Any]) -> Runs | Calls | None:
    """Read tests that are inputs and outputs; None: there are none."""
    inputs: list[Any] = []
    outputs: list[Any] = []
    style, name = APPS, row.get("fn_name")
    metadata = _json(row.get("metadata"))
    if isinstance(metadata, Mapping):
        name = name or metadata.get("func_name")
    for column in COLUMNS[1:]:
        if column in ("test_list", "test", "reward_model"):
            continue
        held = (
            {"inputs": row["inputs"], "outputs": row.get("outputs")}
            if column == "inputs" and "inputs" in row
            else row.get(column)
        )
        held = _cases(held) if column.endswith("_cases") else _json(held)
        if column == "tests" and isinstance(held, Mapping) and "inputs" in row:
            continue  # it is the object whose entries are columns here
        if not held:
            continue
        if column.endswith("_cases") or (column == "tests" and isinstance(held, list)):
            style = LIVE
        elif column.endswith("_tests"):
            style = CONTESTS
        if isinstance(held, Mapping):
            found: list[Any] = [
                held.get(one, held.get(other)) for one, other in (("inputs", "input"), ("outputs", "output"))
            ]
            if not all(isinstance(entries, list) for entries in found) or len(found[0]) != len(found[1]):
                if column == "tests":
                    continue  # an object of another form, such as one of asserts
                raise ValueError(f"{column} has no inputs and outputs of the same number")
            name = name or held.get("fn_name")
            inputs, outputs = inputs + found[0], outputs + found[1]
        elif isinstance(held, list) and all(
            isinstance(one, Mapping) and "input" in one and "output" in one for one in held
        ):
            inputs, outputs = (
                inputs + [one["input"] for one in held],
                outputs + [one["output"] for one in held],
            )
            of_first = _json(held[0].get("metadata"))
            name = (
                name
                or held[0].get("fn_name")
                or (of_first.get("func_name") if isinstance(of_first, Mapping) else None)
            )
        else:
            raise ValueError(f"{column} is of no known form")
    if not inputs:
        return None
    if name:
        is_text = all(isinstance(entry, str) for entry in inputs)
        return Calls(
            name,
            [_arguments(entry) for entry in inputs],
            [_value(entry) if is_text else entry for entry in outputs],
            not is_text,
        )
    return Runs([_text(entry) for entry in inputs], [_text(entry) for entry in outputs], style)


def _arguments(entry: Any) -> list[Any]:
    """Return the arguments of a call: a list of them, or a text with one as JSON in each line."""
    if isinstance(entry, str):
        return [_value(line) for line in entry.split("\n") if line.strip()]
    arguments = entry if isinstance(entry, list) else [entry]
    return [_with_numbers(value) for value in arguments]


def _with_numbers(value: Any) -> Any:
    """Return a dict with the numbers as names that JSON has made texts, as APPS does."""
    if isinstance(value, dict) and value and all(name.lstrip("-").isdecimal() for name in value):
        return {int(name): entry for name, entry in value.items()}
    return value


def _value(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{text[:60]!r} is no JSON value") from error


def _text(entry: Any) -> str:
    """Return an input or an output as text; some rows have a list of lines."""
    return "\n".join(map(str, entry)) if isinstance(entry, list) else str(entry)


class _OnlyText(pickle.Unpickler):
    """An _OnlyText reads a pickle of a text, and nothing that would run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no text")


def _cases(held: Any) -> Any:
    """Read LiveCodeBench's tests: JSON, or a text of it that is pickled, compressed and in base 64."""
    found = _json(held)
    if not isinstance(found, str) or not found.strip():
        return found
    try:
        packed = zlib.decompressobj().decompress(base64.b64decode(found, validate=True), MAX_BYTES)
        return json.loads(_OnlyText(io.BytesIO(packed)).load())
    except (binascii.Error, zlib.error, pickle.UnpicklingError, ValueError, EOFError, TypeError) as error:
        raise ValueError(f"LiveCodeBench's tests cannot be read: {type(error).__name__}") from error


def _asserts(row: Mapping[str, Any]) -> Asserts | None:
    """Read tests in Python; None: there are none."""
    setup = [_text(row[name]) for name in ("test_imports", "test_setup_code") if row.get(name)]
    listed = [_json(row.get(name)) for name in ("test_list", "challenge_test_list")]
    asserts = [text for texts in listed if isinstance(texts, list) for text in texts]
    if isinstance(row.get("test"), str) and row["test"].strip():
        asserts.append(row["test"])
    if not asserts:
        return None
    if not all(isinstance(text, str) for text in asserts):
        raise ValueError("test_list is no list of texts")
    return Asserts(setup, asserts, row.get("entry_point") or None)


_CODE = (
    re.compile(r"(?ms)^[ \t]*(?:`{3,}|~{3,})[^\n]*\n(.*?)(?=^[ \t]*(?:`{3,}|~{3,})|\Z)"),
    re.compile(r"(?ms)^(?:import|from|def|class|@).*"),
)
"""Where a prompt that is not Python has some: in fenced blocks, or from a line on that looks like it."""


def helpers(prompt: str, setup: list[str], asserts: list[str], entry_point: str | None) -> list[str]:
    """Return the functions of a prompt that asserts call beside the one under test, with all that they use.

    HumanEval has such rows. The program has these functions too, and must not define what its tests mean.
    Nothing else of the prompt is taken: examples in it need not run. What these functions use, and the prompt
    does not define, is imported where every program finds it imported.

    Args:
        prompt: the prompt, with Python in it.
        setup: what the row has beside its tests; what that and the tests define is not taken from the prompt.
        asserts: the tests.
        entry_point: name of the function under test; None: any function may be under test.
    """
    if not entry_point or "def " not in prompt:
        return []
    trees = [tree for text in (*setup, *asserts) if (tree := _parsed(text))]
    imports = (ast.Import, ast.ImportFrom)
    imported, own = (
        {
            name
            for tree in trees
            for each in tree.body
            if isinstance(each, imports) is is_import
            for name in _defined(each)
        }
        for is_import in (True, False)
    )
    called = set[str]().union(*map(_used, (*setup, *asserts))) - own - imported
    for code in (prompt, *(found for form in _CODE for found in form.findall(prompt))):
        tree = _parsed(code) or _parsed(code + "\n    pass")
        given = [
            each
            for each in (tree.body if tree else ())
            if isinstance(each, ast.FunctionDef) and each.name != entry_point and not _is_stub(each)
        ]
        if tree and (wanted := called & {each.name for each in given}):
            _strip_annotations(tree)
            needed = (*imports, ast.Assign, ast.AnnAssign)
            offered = [each for each in tree.body if each in given or isinstance(each, needed)]
            kept: list[ast.stmt] = []
            while found := [each for each in offered if each not in kept and _defined(each) & wanted]:
                kept += found
                wanted = wanted.union({"*"}, *(_used(ast.unparse(each)) for each in found)) - own
            # a function that is still to be written, or a class, is the program's
            loose = wanted - imported - {entry_point}.union(*map(_defined, tree.body))
            places = _imported()
            lines = [f"from {places[name]} import {name}" for name in sorted(loose & set(places))]
            return ["\n".join(lines + [ast.unparse(each) for each in offered if each in kept])]
    return []


@functools.cache
def _imported() -> dict[str, str]:
    """Return the names that every program finds imported, and the module of each."""
    found: dict[str, str] = {}
    for place in MODULES:
        module = importlib.import_module(place)
        public = [name for name in vars(module) if not name.startswith("_")]
        found.update(dict.fromkeys(getattr(module, "__all__", public), place))
    return {name: place for name, place in found.items() if not hasattr(builtins, name)}


def _strip_annotations(tree: ast.Module) -> None:
    """Take the annotations out of Python, so that they need not be defined."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None


def _defined(statement: ast.stmt) -> set[str]:
    """Return the global names that a statement defines."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
    return {
        each.id
        for each in ast.walk(statement)
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
    }


def _used(code: str) -> set[str]:
    """Return the global names that Python uses."""
    try:
        tables = [symtable.symtable(code, "prompt.py", "exec")]
    except (SyntaxError, ValueError, RecursionError):  # it will not run
        return set()
    used: set[str] = set()
    for table in tables:
        tables += table.get_children()
        used |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module")
        }
    return used


def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return None


def _is_stub(function: ast.FunctionDef) -> bool:
    """Return whether a function is still to be written: it has a docstring, `pass` or `...` alone."""
    return all(
        isinstance(each, ast.Pass) or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        for each in function.body
    )


# ------------------------------------------------------------------------------------------------- comparison


def same_output(found: str, gold: str, style: Style) -> bool:
    """Return whether a program printed what is expected."""
    if style.ignores_case:
        found, gold = found.lower(), gold.lower()
    mine, theirs = _tokens(found, style.by_line), _tokens(gold, style.by_line)
    return mine == theirs or (
        [len(line) for line in mine] == [len(line) for line in theirs]
        and all(
            _same_token(one, other, style)
            for line, of_gold in zip(mine, theirs, strict=True)
            for one, other in zip(line, of_gold, strict=True)
        )
    )


def _tokens(text: str, by_line: bool) -> list[list[str]]:
    lines = text.split("\n") if by_line else [text]
    return [line.split() for line in lines if line.strip()]


def _same_token(found: str, gold: str, style: Style) -> bool:
    if found == gold:
        return True
    try:
        one, other = Decimal(found), Decimal(gold)
    except InvalidOperation:
        return False
    if not (one.is_finite() and other.is_finite()):
        return False
    if one == other:
        return True
    # APPS takes 1000000 for 1000001; an integer is exact here
    if gold.lstrip("+-").isdecimal():
        return False
    return abs(float(one) - float(other)) <= style.absolute + style.relative * abs(float(other))


def same_value(found: Any, gold: Any, may_be_wrapped: bool) -> bool:
    """Return whether a function returned what is expected; both are of JSON's types.

    Numbers with a fraction have numpy.allclose's tolerance, because results depend on the order of sums.
    """
    if may_be_wrapped and isinstance(gold, list) and len(gold) == 1 and same_value(found, gold[0], False):
        return True
    if isinstance(found, list) and isinstance(gold, list):
        return len(found) == len(gold) and all(
            same_value(one, other, False) for one, other in zip(found, gold, strict=True)
        )
    if isinstance(found, dict) and isinstance(gold, dict):
        return found.keys() == gold.keys() and all(
            same_value(found[name], gold[name], False) for name in gold
        )
    if isinstance(gold, float) and isinstance(found, (int, float)) and not isinstance(found, bool):
        try:
            return found == gold or math.isclose(found, gold, rel_tol=APPS.relative, abs_tol=APPS.absolute)
        except OverflowError:
            return False
    return bool(found == gold)

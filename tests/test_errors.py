"""All errors that a user can see, or that one module raises for another, are of one family."""

from __future__ import annotations

import ast
import builtins
import errno
import importlib
import pickle
from pathlib import Path

import pytest

from gvpo_ray.actors import RunError
from gvpo_ray.config.base import ConfigError
from gvpo_ray.errors import GvpoError

OUTSIDE = {
    "engines/openai_engine.py:_Refusal",  # within its module: a completion that there is not
    "engines/rollout.py:CutOff",  # a signal, which a user's rollout function must let pass
    "environments/agent_host.py:HangError",  # within its module: it becomes a reason
    "environments/world.py:HangError",  # within its module: it becomes what a tool call says
    "sandbox/asserts.py:ProgramError",  # raised into a stranger's asserts, in a process of theirs
    "sandbox/values.py:UnsendableError",  # a BaseException, so that no assert of a stranger can catch it
}
"""The package's exceptions that are no GvpoError. A new one is a decision: its reason stands here."""


def exceptions(sources: dict[str, str]) -> dict[str, set[str]]:
    """The exception classes of modules, "module:class", and the names of all their bases."""
    bases: dict[str, set[str]] = {}
    homes: dict[str, set[str]] = {}
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                own = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                # another library's class may have the same name
                bases[node.name] = bases.get(node.name, set()) | (own - {node.name})
                homes.setdefault(node.name, set()).add(module)

    def above(name: str) -> set[str]:
        own = bases.get(name, set())
        return own.union(*map(above, own)) if own else own

    def is_error(name: str) -> bool:  # also other libraries', by their names
        builtin = getattr(builtins, name, None)
        is_named = name.endswith(("Error", "Exception", "Exit", "Interrupt", "Warning"))
        return is_named or (isinstance(builtin, type) and issubclass(builtin, BaseException))

    found = {name: above(name) for name in bases}
    return {
        f"{home}:{name}": every
        for name, every in found.items()
        for home in homes[name]
        if any(map(is_error, every))
    }


def test_every_exception_of_the_package_is_a_gvpo_error_but_for_those_with_a_reason() -> None:
    package = Path(__file__).parents[1] / "gvpo_ray"
    found = exceptions({str(p.relative_to(package)): p.read_text("utf-8") for p in package.rglob("*.py")})
    family = {name for name, bases in found.items() if "GvpoError" in bases}
    assert found.keys() - family - {"errors.py:GvpoError"} == OUTSIDE
    assert {"files.py:DiskFull", "config/base.py:ConfigError", "sandbox/functions.py:OutOfReach"} < family


def test_an_exception_is_found_by_what_it_comes_from_however_far_up() -> None:
    code = """
class Near(KeyError): ...
class Far(Near): ...
class Foreign(ray.exceptions.RayActorError): ...
class Ours(GvpoError): ...
class Below(Ours): ...
class Plain: ...
class Kind(StrEnum): ...
"""
    found = exceptions({"a.py": code})
    assert {name for name, bases in found.items() if "GvpoError" in bases} == {"a.py:Ours", "a.py:Below"}
    assert found.keys() == {f"a.py:{name}" for name in ("Near", "Far", "Foreign", "Ours", "Below")}


@pytest.mark.parametrize(
    ("home", "name"),
    [
        ("config.base", "ConfigError"),
        ("actors", "RunError"),
        ("actors", "Draining"),
        ("actors", "Hang"),
        ("actors", "UpdateFailed"),
        ("environments.client", "LostError"),
        ("environments.forks", "BrokenError"),
        ("files", "DiskFull"),
        ("files", "NoLocks"),
        ("groups.table", "GroupError"),
        ("sandbox.channel", "GoneError"),
        ("sandbox.process", "SandboxError"),
        ("sandbox.programs", "StoppedError"),
        ("verifiers.outages", "RewardError"),
        ("verifiers.score_file", "MalformedRow"),
        ("weights.transfer", "WeightMismatch"),
    ],
)
def test_an_error_that_a_user_reads_is_of_one_family_and_says_its_exit_status(home: str, name: str) -> None:
    kind = getattr(importlib.import_module(f"gvpo_ray.{home}"), name)
    assert issubclass(kind, GvpoError)
    arguments = (errno.ENOLCK, "one line") if issubclass(kind, OSError) else ("one line",)
    error = kind(*arguments)
    assert error.status == (2 if kind is ConfigError else 1)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error) and str(again).endswith("one line")


def test_errors_keep_pythons_own_bases_that_callers_rely_on() -> None:
    assert issubclass(RunError, RuntimeError) and issubclass(ConfigError, ValueError)
    from gvpo_ray.files import DiskFull, NoLocks

    assert issubclass(DiskFull, OSError) and issubclass(NoLocks, OSError)

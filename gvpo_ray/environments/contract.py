"""The contract of an environment is TRL's `environment_factory`, and a method `respond`.

    class Calculator:
        def __init__(self, digits=3): ...                        # arguments: environment.arguments
        def reset(self, **row) -> str | None: ...                # appended to the last user message
        def add(self, a: int, b: int) -> str:                    # each further public method is a tool
            ...                                                  # with a docstring that has Args
        def respond(self, message: str) -> str | None: ...       # after a turn without tool calls; None: over
        def get_reward(self) -> float | None: ...                # None: this episode cannot be scored

Any of the methods may be async. An object belongs to one episode and has a process of its own, forked from
one that has imported the class, and confined where environment.sandbox says so.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.environment import ENVIRONMENT, EnvironmentConfig
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.environments.world import tool_names
from gvpo_ray.sandbox.functions import find, of_user


@dataclass(frozen=True)
class Contract:
    """A Contract is an environment's class, read."""

    cls: type
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the class."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """JSON schemas of its tools, as {"type": "function", "function": {...}}."""

    @property
    def responds(self) -> bool:
        """Return whether turns without tool calls are answered."""
        return hasattr(self.cls, "respond")

    @property
    def has_reward(self) -> bool:
        """Return whether it scores its episodes."""
        return hasattr(self.cls, "get_reward")


def read_contract(config: EnvironmentConfig, verifiers: VerifiersConfig | None = None) -> Contract:
    """Load an environment's class and read its tools.

    Args:
        config: the section.
        verifiers: the section `verifiers`, which must name a reward if the class has none.

    Raises:
        ConfigError: no such class, arguments that it does not take, a public method that is no tool, or no
            reward.
    """
    key = "environment.name"
    assert config.name is not None
    cls: Any = of_user(key, partial(find, config.name))
    if not isinstance(cls, type):
        raise ConfigError(f"{key}: {config.name} is {type(cls).__name__}, not a class")
    try:
        inspect.signature(cls).bind(**config.arguments)
    except TypeError as error:
        raise ConfigError(f"environment.arguments: {cls.__name__}: {error}") from error
    if config.sandbox and hasattr(cls, "_unprotected"):
        raise ConfigError(
            f"environment.sandbox: {cls.__name__} has a sandbox, and no sandbox starts in another"
        )
    names = tool_names(cls)
    contract = Contract(cls, config.arguments, [_schema(cls, name) for name in names])
    if not callable(getattr(cls, "reset", None)):
        raise ConfigError(f"{key}: {cls.__name__} has no method reset")
    if not names and not contract.responds:
        raise ConfigError(f"{key}: {cls.__name__} has neither tools (public methods) nor respond")
    if verifiers is not None and not contract.has_reward and [*verifiers.rewards] == [ENVIRONMENT]:
        raise ConfigError(f"verifiers.rewards: {cls.__name__} has no get_reward: name a reward function")
    return contract


def described(contract: Contract, config: EnvironmentConfig) -> Iterator[str]:
    """Yield lines about an environment for a person: its tools' schemas, and what it does beside them."""
    reward = "get_reward is the reward environment" if contract.has_reward else "it gives no reward"
    says = "respond answers turns without tool calls" if contract.responds else "a turn without calls ends"
    yield f"environment.name: {config.name}: at most {config.max_turns} turns; {says}; {reward}"
    for tool in contract.tools:
        yield f"environment.name: tool {json.dumps(tool['function'], ensure_ascii=False)}"


def _schema(cls: type, name: str) -> dict[str, Any]:
    """Return a tool's JSON schema, made of its types and its docstring."""
    from transformers.utils import chat_template_utils as made

    written = inspect.getattr_static(cls, name)
    method: Any = inspect.unwrap(written)
    if not isinstance(written, staticmethod):  # bound to something, since a tool has no `self`
        method = types.MethodType(method, object())
    try:
        schema: dict[str, Any] = made.get_json_schema(method)
    except (made.DocstringParsingException, made.TypeHintParsingException, NameError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(
            f"environment.name: {cls.__name__}.{name}: every public method is a tool, with types and a "
            f"docstring (Args: of each argument): {why}"
        ) from error
    return schema


def pickled_by_value(cls: Any) -> None:
    """Let a user's class or function travel to other machines with its code, as they may lack its file."""
    import ray

    module = sys.modules.get(cls.__module__)
    is_installed = module is None or "site-packages" in (getattr(module, "__file__", None) or "site-packages")
    if module is not None and not is_installed and module.__name__ != "__main__":
        register: Any = ray.cloudpickle.register_pickle_by_value  # without types
        register(importlib.import_module(cls.__module__))

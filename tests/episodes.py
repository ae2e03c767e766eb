"""Environments, and an engine that says what a function tells it, for tests of episodes."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from gvpo_ray import groups
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.config.environment import EnvironmentConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.engines.fake_engine import FakeEngine
from gvpo_ray.engines.rollout import ABORTED, ModelCall, Span
from gvpo_ray.environments.client import Client, LostError
from gvpo_ray.environments.contract import Contract, read_contract
from gvpo_ray.environments.episode import Episodes
from gvpo_ray.environments.host import Host
from gvpo_ray.environments.world import Limits, World

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|im_end|>"


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, with the marks of ChatML."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in (END, "<|im_start|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, chat_template=CHATML)


class Guess:
    """A number is to be found by asking; the world answers in words."""

    def reset(self, answer: str, **row: Any) -> str | None:
        self.secret, self.found, self.asked = int(answer), False, list[int]()
        return f" (1 to {row.get('most', 9)})"

    def respond(self, message: str) -> str | None:
        self.asked.append(int(message))
        self.found = self.found or self.asked[-1] == self.secret
        return None if self.found else "more" if self.asked[-1] < self.secret else "less"

    def get_reward(self) -> float:
        return float(self.found)


class Calculator:
    """Tools of every kind; `waiting` holds those that hang."""

    waiting = threading.Event()

    def __init__(self, digits: int = 3) -> None:
        self.digits, self.total = digits, 0

    def reset(self, **row: Any) -> None:
        self.order: list[str] = []

    def add(self, a: int, b: int = 1) -> int:
        """Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        self.order.append(f"add {a}")
        self.total += a + b
        return a + b

    async def later(self, a: int) -> dict[str, int]:
        """Wait for the other calls of this turn.

        Args:
            a: A number.
        """
        self.order.append(f"later {a}")
        await asyncio.sleep(0)
        return {"a": a}

    def fail(self) -> str:
        """Divide by zero."""
        return str(1 // 0)

    def leave(self) -> str:
        """End the process."""
        raise SystemExit(3)

    def hang(self) -> str:
        """Do not return."""
        Calculator.waiting.wait()
        return "late"

    async def sleep(self) -> str:
        """Do not return, either."""
        await asyncio.Event().wait()
        return "late"

    def get_reward(self) -> float | None:
        return None if self.total < 0 else self.total / 10


class Words:
    """A word game in the shape of TRL's own example: one object, one tool, feedback in letters."""

    def __init__(self) -> None:
        self.secret, self.reward, self.done = "", 0.0, False

    def reset(self, **kwargs: Any) -> str | None:
        self.secret, self.reward, self.done, self.guesses = kwargs["answer"], 0.0, False, 0
        return "\nGuess the five-letter word in six tries. G: right place, Y: other place, X: not there."

    def guess(self, guess: str) -> str:
        """
        Make a guess in the word game.

        Args:
            guess: The guessed word, formatted as '[abcde]'

        Returns:
            The feedback of the game: one letter for each letter of the word.
        """
        if self.done:
            raise ValueError("Game over.")
        word = guess.strip("[]").lower()
        if len(word) != len(self.secret):
            return "Invalid: five letters in brackets."
        self.guesses += 1
        marks = [
            "G" if a == b else "Y" if a in self.secret else "X"
            for a, b in zip(word, self.secret, strict=True)
        ]
        self.reward = marks.count("G") / len(marks)
        self.done = word == self.secret or self.guesses == 6
        return f"{' '.join(word.upper())}\n{' '.join(marks)}"

    def get_reward(self) -> float:
        return self.reward


class Files:
    """A small file system in memory."""

    def reset(self, **row: Any) -> str:
        self.files = {"notes.txt": row["answer"]}
        return "\nThere is a file system."

    def list_files(self) -> list[str]:
        """List the files."""
        return sorted(self.files)

    def read_file(self, path: str) -> str:
        """Read a file.

        Args:
            path: The name of the file.
        """
        return self.files[path]

    def write_file(self, path: str, content: str) -> str:
        """Write a file.

        Args:
            path: The name of the file.
            content: The new content.
        """
        self.files[path] = content
        return "ok"

    def get_reward(self) -> float:
        return float(self.files.get("copy.txt") == self.files["notes.txt"])


class Database:
    """A SQLite database that is to be queried."""

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:", check_same_thread=False)
        self.connection.execute("CREATE TABLE cities (name TEXT, people INTEGER)")
        self.connection.executemany("INSERT INTO cities VALUES (?, ?)", [("Ulm", 126), ("Jena", 110)])

    def reset(self, **row: Any) -> None:
        self.said: str | None = None

    def query(self, sql: str) -> list[Any]:
        """Query the table cities(name, people).

        Args:
            sql: The statement.
        """
        return self.connection.execute(sql).fetchall()

    def answer(self, text: str) -> str:
        """Give the final answer.

        Args:
            text: The answer.
        """
        self.said = text
        return "noted"

    def get_reward(self) -> float:
        return float(self.said == "Ulm")


Policy = Callable[[list[str], int], str | Awaitable[str]]
"""(the model's and the environment's turns so far, number of the completion) -> what the model writes."""


class Scripted(FakeEngine):
    """Writes what a policy says, with the token that ends a turn."""

    def __init__(self, policy: Policy, rollout: Any, drain_s: float | None = None) -> None:
        super().__init__(rollout=rollout, drain_s=drain_s)
        self.tokenizer, self.policy, self.num_calls = tokenizer(), policy, 0

    async def _span(self, call: ModelCall) -> Span:
        self.num_calls += 1
        text = self.tokenizer.decode(call.ids)
        said = self.policy(text.split("<|im_start|>"), call.number)
        if not isinstance(said, str):
            waits = [asyncio.ensure_future(said), asyncio.ensure_future(call.running.cut.wait())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not waits[0].done():
                return Span([], [], ABORTED, [])
            said = waits[0].result()
        ids = self.tokenizer(said + END, add_special_tokens=False)["input_ids"]
        new = ids[: call.max_tokens]
        return Span(new, [-0.5] * len(new), "stop" if new == ids else "length", [self.version])

    def _text(self, before: Any, ids: Any, stop_reason: Any, sampling: Any) -> str:
        return self.tokenizer.decode(ids)


class LocalClient(Client):
    """Calls a host of this process; `is_dead`: as if its process were gone."""

    def __init__(self, host: Any) -> None:
        self.host, self.is_dead = host, False

    async def _call(self, limit_s: float | None, method: str, *args: Any) -> Any:
        if self.is_dead:
            raise LostError("dead")
        return await getattr(self.host, method)(*args)


def host_of(cls: type, limits: Limits | None = None, **arguments: Any) -> Host:
    """A host whose environments are in this process."""

    async def make() -> World:
        return World(cls, arguments, limits or Limits())

    return Host(make)


def environment_of(host: Host, name: str) -> Any:
    """The environment of an episode at a host of this process."""
    world = host._episodes[name].world
    assert isinstance(world, World)
    return world.environment


def contract_of(cls: type, **arguments: Any) -> tuple[EnvironmentConfig, Contract]:
    config = EnvironmentConfig(name=f"{cls.__module__}:{cls.__name__}", arguments=arguments, timeout_s=60)
    return config, read_contract(config)


def episodes(
    cls: type,
    folder: Path,
    hosts: int = 2,
    template: str | None = None,
    vocab_size: int | None = None,
    **changes: Any,
) -> tuple[Episodes, list[LocalClient]]:
    """What engines make episodes with, and its hosts."""
    config, contract = contract_of(cls)
    config = config.model_copy(update=changes)
    tokenizer().save_pretrained(folder)
    LlamaConfig(vocab_size=vocab_size or len(tokenizer())).save_pretrained(folder)
    limits = Limits(config.timeout_s, config.max_calls, config.max_text)
    clients = [LocalClient(host_of(cls, limits)) for _ in range(hosts)]
    prompts = PromptsConfig(path="p.jsonl", template=template)
    model = ModelConfig(path=str(folder))
    made = Episodes(config, model, prompts, contract.tools, clients, contract.has_reward)
    return made, clients


async def prompt(made: Episodes, answer: str = "7", group_id: int = 0, **columns: Any) -> pa.Table:
    """One row, as a prompt set makes it."""
    row = {"prompt": "Find it.", "messages": None}
    return groups.table(
        [
            {
                "group_id": group_id,
                "prompt": "Find it.",
                "answer": answer,
                "dataset": "d",
                "prompt_ids": (await made.dialogue()).render([row])[0].prompt_ids,
                "data": json.dumps({"columns": columns}),
            }
        ]
    )

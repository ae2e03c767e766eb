"""Whatever a policy writes, and whatever an environment says, an episode goes on or ends: no run does."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any

import episodes as worlds
import pyarrow as pa
import pytest
from episodes import Database, Guess, host_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_dialogue import _dialogue, _tokenizer
from test_environments import call, ends, run, script
from transformers import PreTrainedTokenizerFast

from gvpo_ray import groups
from gvpo_ray.config.environment import ENVIRONMENT
from gvpo_ray.data.calls import MAX_BITS, MAX_DEPTH, Call, call_of
from gvpo_ray.environments.agent_host import AgentHost
from gvpo_ray.environments.forks import BrokenError
from gvpo_ray.environments.host import Host
from gvpo_ray.environments.world import Limits

TEXTS = st.text(st.one_of(st.characters(), st.sampled_from('\ud800\udfff\x00"{[<|im_end|>')))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(TEXTS, inner)),
)


class Parrot:
    """Says in every place what the policy has written."""

    def reset(self, said: str, **row: Any) -> str:
        self.said: Any = None
        return said

    def echo(self, **arguments: Any) -> Any:
        self.said = arguments
        return arguments if len(str(arguments)) % 2 else "".join(map(str, arguments.values()))

    def fail(self, **arguments: Any) -> Any:
        raise ValueError("".join(map(str, arguments.values())))

    def respond(self, message: str) -> str | None:
        return message

    def get_reward(self) -> float:
        raise KeyError("".join(map(str, self.said.values())))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer([])


@pytest.mark.parametrize("kind", ["chat", "plain", "qwen3"])
def test_whatever_a_policy_writes_goes_on_as_text_and_as_json(
    kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    dialogue = _dialogue(
        tokenizer,
        "qwen3" if kind == "qwen3" else None,
        **({"template": "{prompt}\n"} if kind == "plain" else {}),
    )
    asked = dialogue.render([{"prompt": "p", "messages": None}])[0].prompt_ids

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    async def answers(host: Host, said: str, calls: list[Call], message: str) -> list[Any]:
        (opened,) = await host.open(0, {"said": said}, 1)
        done = [await host.act(opened.name, 0, 0, {}, calls, "")] if calls else []
        done.append(await host.act(opened.name, 0, len(done), {}, [], message))
        return [opened.said, done, (await host.finish(opened.name, 0, {})).reason]

    @settings(max_examples=15, deadline=None, derandomize=True)
    @example(name="\ud800", arguments={"\udfff": "\ud83d"}, said="\ud800 <|im_end|>")
    @given(name=st.one_of(st.sampled_from(["echo", "fail"]), TEXTS),
           arguments=st.dictionaries(TEXTS, JSON), said=TEXTS)  # fmt: skip
    def check(name: str, arguments: Any, said: str) -> None:
        written = f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
        turn = [*ids(written), tokenizer.convert_tokens_to_ids("<|im_end|>")]
        read = dialogue.turn(asked, turn)
        assert pickle.loads(pickle.dumps(read)) and json.dumps(read)
        calls = [*read.calls, call_of(name, arguments)]  # whatever a family's parser reads
        opening, done, reason = asyncio.run(answers(host_of(Parrot), said, calls, written))
        # what would stop an engine: tokens that cannot be made, a text that Arrow does not hold
        assert dialogue.opening({"prompt": "p", "messages": None}, opening)
        for answer in done:
            assert dialogue.extension(asked, turn, answer.messages) is not None
        assert pa.array([reason, opening]).to_pylist() == [reason, opening]

    check()


def nested(depth: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(depth - 1):
        value = [value]
    return {"a": value}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (nested(MAX_DEPTH), None),
        (nested(MAX_DEPTH + 1), "the arguments are nested more than 100 deep"),
        ({"a": 2**MAX_BITS - 1}, None),
        ({"a": 2**MAX_BITS}, "the arguments hold an integer of 14001 bits"),
        ({"a": (1, 2)}, None),
        ({"a": b"x"}, "the arguments hold a value of Python's type bytes"),
        ({1: 2}, "the arguments hold a value of Python's type dict"),
        ([1], "the arguments are not an object"),
    ],
    ids=lambda value: "" if isinstance(value, (dict, list)) else str(value)[:30],
)
def test_arguments_that_cannot_go_on_are_an_error_for_the_policy(arguments: Any, error: str | None) -> None:
    made = call_of("add", arguments)
    assert made.error is None if error is None else (made.error or "").startswith(error)
    assert bool(made.arguments) == (error is None)
    json.dumps(made)


def test_brackets_by_the_hundred_cost_their_call_alone(tmp_path: Path) -> None:
    deep = f'<tool_call>{{"name": "query", "arguments": {{"sql": {"[" * 700}{"]" * 700}}}}}</tool_call>'

    async def main() -> None:
        made, _ = worlds.episodes(Database, tmp_path)
        row = await run(made, script(deep, call("answer", text="Ulm"), "Done."), most=5000)
        assert [end["tool_errors"] for end in ends(row)] == [1, 1] and row["reward_parts"] == {
            ENVIRONMENT: [1.0] * 2
        }
        assert "nested more than 100 deep" in worlds.tokenizer().decode(row["completion_ids"][0])

    asyncio.run(main())


class Judge:
    """Its reason quotes what the policy has written."""

    def reset(self, **row: Any) -> None: ...

    def answer(self, text: str) -> str:
        """Answer.

        Args:
            text: it.
        """
        self.said = text
        return text

    def get_reward(self) -> float:
        raise ValueError(f"no such answer: {self.said}")


def test_half_a_surrogate_pair_reaches_neither_a_tokenizer_nor_the_log(tmp_path: Path) -> None:
    async def main() -> None:
        made, _ = worlds.episodes(Judge, tmp_path)
        row = await run(
            made,
            script('<tool_call>{"name": "answer", "arguments": {"text": "a\\ud800"}}</tool_call>', "Done."),
        )
        assert (
            row["reward_reasons"]
            == ["environment: get_reward raised ValueError: no such answer: a\ufffd"] * 2
        )
        assert "<|im_start|>tool\na\ufffd<|im_end|>" in worlds.tokenizer().decode(row["completion_ids"][0])
        groups.table([row])

    asyncio.run(main())
    host = AgentHost(lambda base_url: 0.0, 60, 3, True)
    _, text, _ = host._judged("a\ud800")
    assert pa.array([text]).to_pylist() == ["a\ufffd"]


def test_a_reason_names_the_tools_of_a_turn_as_far_as_they_are_short() -> None:
    class Gone:
        async def open(self, row: Any) -> Any:
            return None, None

        async def act(self, calls: Any, message: str) -> Any:
            raise BrokenError("its process died")

    async def world() -> Any:
        return Gone()

    async def main(names: list[str]) -> str:
        host = Host(world)
        (opened,) = await host.open(0, {}, 1)
        answer = await host.act(opened.name, 0, 0, {}, [Call(name, {}) for name in names], "")
        assert answer.is_broken and answer.reason is not None
        return answer.reason.partition("environment: brought down by a tool call: crash: environment: ")[2]

    assert asyncio.run(main(["a" * 50, "b\ud800"])) == "a" * 50 + ", b\ufffd: its process died"
    assert asyncio.run(main(["a" * 199, "bc"])) == "a" * 199 + ",: its process died"
    assert asyncio.run(main(["x" * 100_000])) == "x" * 200 + ": its process died"


class Long:
    """Says as many letters as it is asked for."""

    def reset(self, size: int, **row: Any) -> str:
        return "r" * size

    def say(self, size: int) -> str:
        return "s" * size

    def list(self, size: int) -> list[int]:
        return [1] * size

    def fail(self, size: int) -> str:
        raise ValueError("f" * size)

    def respond(self, message: str) -> str:
        return "m" * int(message)


@pytest.mark.parametrize(("size", "more"), [(999, False), (1000, False), (1001, True), (100_000, True)])
def test_of_a_long_text_the_policy_reads_the_beginning_and_that_it_is_cut_off(size: int, more: bool) -> None:
    def want(letter: str, most: int = 1000, size: int = size) -> str:
        return letter * size if size <= most else f"{letter * most}\n[cut: {most} of {size} characters]"

    async def main() -> None:
        host = host_of(Long, Limits(max_text=1000))
        (opened,) = await host.open(0, {"size": size}, 1)
        assert opened.said == want("r") and ("[cut" in want("r")) == more

        def say(turn: int, *calls: tuple[str, int], message: str = "") -> Any:
            made = [Call(tool, {"size": n}) for tool, n in calls]
            return host.act(opened.name, 0, turn, {}, made, message)

        (one,) = (await say(0, ("say", size))).messages
        assert one["content"] == want("s")
        (one,) = (await say(1, message=str(size))).messages
        assert one == {"role": "user", "content": want("m")}
        # those of a turn share it
        first, second = (one["content"] for one in (await say(2, ("say", 500), ("say", size))).messages)
        assert first == "s" * 500 and second == want("s", 500)
        (one,) = (await say(3, ("list", size))).messages
        assert one["content"] == ("[" + "1, " * size)[:1000] + f"\n[cut: 1000 of {3 * size} characters]"
        (one,) = (await say(4, ("fail", size))).messages
        assert one["content"].startswith("Error: ValueError: fff") and len(one["content"]) < 1100
        assert ("[cut: 1000 of" in one["content"]) == (size + len("Error: ValueError: ") > 1000)

    asyncio.run(main())


def test_a_database_that_answers_in_megabytes_costs_the_engine_what_an_episode_has_room_for(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        made, _ = worlds.episodes(Database, tmp_path, hosts=1, max_text=1000)
        much = "SELECT hex(zeroblob(2000000))"
        row = await run(made, script(call("query", sql=much), call("answer", text="Ulm"), "Done."), most=3000)
        assert [end["end"] for end in ends(row)] == ["stop"] * 2 and row["reward_parts"] == {
            ENVIRONMENT: [1.0] * 2
        }
        assert "[cut: 1000 of 4000006 characters]" in worlds.tokenizer().decode(row["completion_ids"][0])

    asyncio.run(main())


def test_the_config_bounds_what_is_read(tmp_path: Path) -> None:
    made, _ = worlds.episodes(Guess, tmp_path)
    assert made._config.max_text == 100_000 == Limits().max_text

"""Episodes: what the policy and an environment say to each other, and how each ends, with a fake engine."""

from __future__ import annotations

import asyncio
import json
import random
import re
import runpy
from pathlib import Path
from typing import Any

import episodes as worlds
import pytest
from episodes import (
    END,
    Calculator,
    Database,
    Files,
    Guess,
    Policy,
    Scripted,
    Words,
    contract_of,
    environment_of,
    host_of,
    prompt,
)

from gvpo_ray import groups
from gvpo_ray.bench import episodes as bench_episodes
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.config.environment import ENVIRONMENT, EnvironmentConfig
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.verifiers import RewardConfig, VerifiersConfig
from gvpo_ray.data.calls import Call
from gvpo_ray.environments.contract import described, read_contract
from gvpo_ray.environments.host import GONE
from gvpo_ray.environments.pool import EnvironmentGroup
from gvpo_ray.environments.python import Python
from gvpo_ray.observe.episodes import episode_metrics
from gvpo_ray.observe.metrics import find
from gvpo_ray.observe.samples import sample_lines
from gvpo_ray.sandbox.confine import unprotected as unprotected_here
from gvpo_ray.verifiers.verifier import Verifier


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def binary(turns: list[str], number: int) -> str:
    """Halves what is left of 1 to 9, but completion 0, which always asks 1."""
    low, high, guess = 1, 9, 5
    for turn in turns:
        if turn.startswith("user\nmore"):
            low = guess + 1
        elif turn.startswith("user\nless"):
            high = guess - 1
        guess = (low + high) // 2
    return str(guess if number else 1)


def script(*said: str) -> Policy:
    """Says one text after the other."""
    return lambda turns, number: said[sum(turn.startswith("assistant\n") for turn in turns) - 1]


async def run(made: Any, policy: Policy, num: int = 2, most: int = 1000, **row: Any) -> dict[str, Any]:
    engine = Scripted(policy, made)
    await engine.update(0, {})
    sampling = SamplingConfig(num_completions=num, max_tokens=most)
    table, missing = await engine.generate(await prompt(made, **row), sampling)
    assert not missing
    (found,) = groups.rows(groups.validate(table, (*groups.PROMPT_COLUMNS, *groups.COMPLETION_COLUMNS)))
    return found


def ends(row: dict[str, Any]) -> list[dict[str, Any]]:
    counts = ("turns", "tool_calls", "tool_errors", "end")
    return [{name: json.loads(one)[name] for name in counts} for one in row["episodes"]]


def text(ids: list[int]) -> str:
    return str(worlds.tokenizer().decode(ids))


def test_a_world_that_answers_in_words_is_read_and_what_the_policy_says_is_trained(tmp_path: Path) -> None:
    async def main() -> None:
        made, _ = worlds.episodes(Guess, tmp_path, max_turns=4)
        row = await run(made, binary, answer="7")
        assert text(row["prompt_ids"]) == "<|im_start|>user\nFind it."
        first, second = row["completion_ids"]
        turns = f" (1 to 9){END}\n<|im_start|>assistant\n"
        more = f"\n<|im_start|>user\nmore{END}\n<|im_start|>assistant\n"
        assert text(second) == turns + f"5{END}" + more + f"7{END}"
        assert text(first) == turns + more.join([f"1{END}"] * 4)
        for ids, mask, logprobs in zip(
            row["completion_ids"], row["trained_tokens"], row["sampling_logprobs"], strict=True
        ):
            trained = text([i for i, is_trained in zip(ids, mask, strict=True) if is_trained])
            assert trained == (f"1{END}" * 4 if ids == first else f"5{END}7{END}")
            assert [value != 0 for value in logprobs] == mask
        assert row["reward_parts"] == {ENVIRONMENT: [0.0, 1.0]} and row["reward_reasons"] == [None] * 2
        assert ends(row) == [
            {"turns": 4, "tool_calls": 0, "tool_errors": 0, "end": "max_turns"},
            {"turns": 2, "tool_calls": 0, "tool_errors": 0, "end": "stop"},
        ]
        assert row["finish_reasons"] == ["stop"] * 2

    asyncio.run(main())


def test_under_a_plain_template_texts_are_appended_as_they_are(tmp_path: Path) -> None:
    async def main() -> None:
        made, _ = worlds.episodes(Guess, tmp_path, template="Q: {prompt}\n", max_turns=4)
        row = await run(made, lambda turns, number: "7" if "less" in turns[-1] else "9")
        assert text(row["prompt_ids"]) == "Q: Find it."
        assert text(row["completion_ids"][0]) == f" (1 to 9)\n9{END}less7{END}"

    asyncio.run(main())


def test_the_examples_of_the_contract_run_unchanged(tmp_path: Path) -> None:
    scripts: dict[type, tuple[str, ...]] = {
        Files: (
            call("list_files"),
            call("read_file", path="notes.txt"),
            call("write_file", path="copy.txt", content="7"),
            "Done.",
        ),
        Database: (
            call("query", sql="SELECT name FROM cities WHERE people > 120"),
            call("answer", text="Ulm"),
            "Done.",
        ),
        Words: (
            call("guess", guess="[cr]"),
            call("guess", guess="[crate]"),
            call("guess", guess="[caper]") + call("guess", guess="[later]"),
            "Done.",
        ),
        Calculator: (call("add", a=2, b=5) + call("later", a=1), call("add", a=2), "Done."),
    }
    errors, answers = {Words: 1}, {Words: "caper"}

    async def main() -> None:
        for cls, said in scripts.items():
            made, _ = worlds.episodes(cls, tmp_path)
            row = await run(made, script(*said), answer=answers.get(cls, "7"))
            assert row["reward_parts"] == {ENVIRONMENT: [pytest.approx(1.0)] * 2}, cls
            if cls is Words:
                read = text(row["completion_ids"][0])
                assert "C R A T E\nG Y Y X Y<|im_end|>" in read and "Error: ValueError: Game over." in read
            num_calls = sum(one.count("<tool_call>") for one in said)
            num_errors = errors.get(cls, 0)
            expected = {"turns": len(said), "tool_calls": num_calls, "tool_errors": num_errors, "end": "stop"}
            assert ends(row) == [expected] * 2
        assert '<|im_start|>tool\n7<|im_end|>\n<|im_start|>tool\n{"a": 1}' in text(row["completion_ids"][0])
        # no reward function sees, and grades, what the policy has read
        assert "<|im_start|>tool" not in row["completions"][0]
        assert row["completions"][0].count("<tool_call>") == 3 and "Done." in row["completions"][0]

    asyncio.run(main())


def test_what_goes_wrong_with_a_call_is_read_by_the_policy_and_counted(tmp_path: Path) -> None:
    bad = (
        (call("fail"), "Error: ZeroDivisionError: integer division or modulo by zero"),
        (call("leave"), "Error: RuntimeError: SystemExit: 3"),
        (call("add"), "Error: add: missing a required argument: 'a'"),
        (call("add", a=1, c=2), "Error: add: got an unexpected keyword argument 'c'"),
        (
            call("subtract", a=1),
            "Error: there is no tool 'subtract', only add, fail, hang, later, leave, sleep",
        ),
        (call("reset"), "Error: there is no tool 'reset'"),
        ("<tool_call>{", "Error: the tool call is not JSON"),
    )

    async def main() -> None:
        made, _ = worlds.episodes(Calculator, tmp_path, max_turns=20)
        row = await run(made, script(*(said for said, _ in bad), call("add", a=4, b=6), "Done."), most=9000)
        for _, answer in bad:
            assert answer in text(row["completion_ids"][0]) and answer not in row["completions"][0]
        assert ends(row)[0] == {"turns": 9, "tool_calls": 8, "tool_errors": 7, "end": "stop"}
        assert row["reward_parts"] == {ENVIRONMENT: [1.0] * 2}  # the environment says so

    asyncio.run(main())


def test_calls_of_one_turn_are_made_in_order_and_asynchronous_ones_at_once() -> None:
    async def main() -> None:
        host = host_of(Calculator)
        (opened,) = await host.open(0, {}, 1)
        calls = [
            Call("add", {"a": 1}),
            Call("later", {"a": 1}),
            Call("later", {"a": 2}),
            Call("add", {"a": 2}),
        ]
        answer = await host.act(opened.name, 0, 0, {}, calls, "")
        assert [message["content"] for message in answer.messages] == ["2", '{"a": 1}', '{"a": 2}', "3"]
        order = environment_of(host, opened.name).order
        assert order.index("add 1") < order.index("add 2") and sorted(order)[2:] == ["later 1", "later 2"]

    asyncio.run(main())


def test_a_result_that_has_no_text_is_an_error_that_the_policy_reads() -> None:
    class Power:
        def reset(self, **row: Any) -> None: ...

        def power(self, a: int, b: int) -> int:
            return int(a**b)

        def table(self) -> Any:
            return {(1, 2): 3}

    async def main() -> None:
        host = host_of(Power)
        (opened,) = await host.open(0, {}, 1)
        calls = [Call("power", {"a": 10, "b": 5000}), Call("table", {}), Call("power", {"a": 2, "b": 3})]
        answer = await host.act(opened.name, 0, 0, {}, calls, "")
        first, second, third = (message["content"] for message in answer.messages)
        assert first.startswith("Error: ValueError: Exceeds the limit")
        assert second.startswith("Error: TypeError: keys must be str")
        assert third == "8" and answer.num_errors == 2

    asyncio.run(main())


def test_a_parameter_or_a_column_may_be_called_function() -> None:
    class Plot:
        def reset(self, function: str, **row: Any) -> str:
            return function

        def plot(self, function: str) -> str:
            return f"drawn: {function}"

    async def main() -> None:
        host = host_of(Plot)
        (opened,) = await host.open(0, {"function": "cos", "args": 1}, 1)
        assert opened.said == "cos" and opened.reason is None
        answer = await host.act(opened.name, 0, 0, {}, [Call("plot", {"function": "sin"})], "")
        assert answer.messages[0]["content"] == "drawn: sin" and not answer.num_errors

    asyncio.run(main())


def test_a_name_that_is_no_tools_is_not_the_name_of_a_message() -> None:
    async def main() -> None:
        host = host_of(Calculator)
        (opened,) = await host.open(0, {}, 1)
        calls = [Call(f"add{END}", {}), Call("", {}, "not JSON"), Call("add", {"a": 1})]
        answer = await host.act(opened.name, 0, 0, {}, calls, "")
        assert [message["name"] for message in answer.messages] == ["unknown", "unknown", "add"]

    asyncio.run(main())


def test_no_error_of_an_environment_shows_a_secret_of_its_arguments() -> None:
    class Served:
        def __init__(self, api_key: str) -> None:
            self.api_key = api_key

        def reset(self, **row: Any) -> None: ...

        def ask(self) -> str:
            raise OSError(f"refused: {self.api_key}")

        def get_reward(self) -> float:
            raise OSError(f"refused: {self.api_key}")

    async def main() -> None:
        host = host_of(Served, api_key="correct-horse-battery")
        (opened,) = await host.open(0, {}, 1)
        answer = await host.act(opened.name, 0, 0, {}, [Call("ask", {})], "")
        assert answer.messages[0]["content"] == "Error: OSError: refused: …"
        reason = "environment: get_reward raised OSError: refused: …"
        assert await host.finish(opened.name, 0, {}) == (None, reason, False)

    asyncio.run(main())


def test_an_episode_ends_where_there_is_no_room_and_is_scored_as_the_environment_says(tmp_path: Path) -> None:
    async def main() -> None:
        made, _ = worlds.episodes(Guess, tmp_path)
        opening = len((await made.dialogue()).opening({"prompt": "", "messages": None}, " (1 to 9)"))
        more = f"\n<|im_start|>user\nmore{END}\n<|im_start|>assistant\n"
        extension = len(worlds.tokenizer()(more)["input_ids"])
        for most, turns, reward, reason in (
            (opening, 0, None, "untrained: what the environment has said leaves no room for a turn"),
            (opening + 1, 1, 0.0, None),  # in the midst of its first turn
            (opening + 2, 1, 0.0, None),  # just behind it
            (opening + 2 + extension, 1, 0.0, None),
            (opening + 2 + extension + 2, 2, 1.0, None),
        ):
            row = await run(made, script("5", "7"), most=most)
            assert row["reward_parts"] == {ENVIRONMENT: [reward] * 2}, most
            assert row["reward_reasons"] == [reason] * 2
            assert [end["turns"] for end in ends(row)] == [turns] * 2
            assert all(len(ids) <= most for ids in row["completion_ids"])
            want = "stop" if reward else "length"
            assert row["finish_reasons"] == [want] * 2, most

    asyncio.run(main())


@pytest.mark.parametrize("vocab_size", [93, 94])
@pytest.mark.parametrize(("opening", "answer", "turns"), [("~", "more", 0), (None, "~", 1)])
def test_an_episode_whose_environment_writes_a_token_that_the_model_lacks_is_left_out_with_its_reason(
    tmp_path: Path, opening: str | None, answer: str, turns: int, vocab_size: int
) -> None:
    class Says(Guess):
        def reset(self, answer: str, **row: Any) -> str | None:
            super().reset(answer, **row)
            return opening

        def respond(self, message: str) -> str | None:
            return super().respond(message) and answer

    async def main() -> None:
        assert worlds.tokenizer()("~")["input_ids"] == [93]
        made, clients = worlds.episodes(
            Guess, tmp_path, template="Q: {prompt}", vocab_size=vocab_size, max_turns=4
        )
        for client in clients:
            client.host = host_of(Says)
        row = await run(made, lambda said, number: "7" if answer in said[-1] else "5")
        if vocab_size == 94:
            assert row["reward_reasons"] == [None] * 2
            assert all(93 in ids for ids in row["completion_ids"])
            return
        has = "token 93, and the model has 93 (vocab_size of its config.json)"
        assert row["reward_reasons"] == [f"environment: what it has said has {has}"] * 2
        assert row["reward_parts"] == {ENVIRONMENT: [None] * 2}
        assert [end["turns"] for end in ends(row)] == [turns] * 2
        assert not any(93 in ids for ids in row["completion_ids"])

    asyncio.run(main())


def test_an_environment_that_fails_gives_a_reason_and_no_reward(tmp_path: Path) -> None:
    class Broken(Guess):
        def respond(self, message: str) -> str | None:
            raise KeyError("door")

    class Never(Guess):
        def reset(self, **row: Any) -> None:
            raise OSError("no server")

    class Silent(Guess):
        def get_reward(self) -> Any:
            return float("nan")

    async def main() -> None:
        for cls, reason, turns in (
            (Broken, "environment: respond raised KeyError: 'door'", 1),
            (Never, "environment: reset raised OSError: no server", 0),
            (Silent, "environment: get_reward gave nan, which is no finite float32", 1),
        ):
            made, clients = worlds.episodes(Guess, tmp_path)
            for client in clients:
                client.host = host_of(cls)
            row = await run(made, script("7"))
            assert row["reward_parts"] == {ENVIRONMENT: [None] * 2}
            assert row["reward_reasons"] == [reason] * 2
            assert [end["turns"] for end in ends(row)] == [turns] * 2
            with Verifier(VerifiersConfig(rewards={ENVIRONMENT: RewardConfig()})) as verifier:
                scored = verifier.score(groups.table([row]))
                assert scored["reward_reasons"][0].as_py() == [reason] * 2
                # what the user's class raises stops a run in which nothing else happens
                assert verifier.record.faults[ENVIRONMENT] == (2 if "raised" in reason else 0)

    asyncio.run(main())


@pytest.mark.components
def test_the_environments_reward_is_the_first_part_and_others_are_added() -> None:
    row = {
        **{"group_id": 0, "prompt": "p", "answer": "7", "dataset": "d", "prompt_ids": [1]},
        **{"completions": ["7", "7", "8"], "completion_ids": [[1]] * 3, "finish_reasons": ["stop"] * 3},
        **{"sources": ["policy"] * 3, "version_min": [0] * 3, "version_max": [0] * 3},
        "sampling_logprobs": [[-1.0]] * 3,
        "episodes": ['{"name": "a"}'] * 3,
        "reward_parts": {ENVIRONMENT: [0.5, None, 0.0]},
        "reward_reasons": [None, GONE, None],
    }
    rewards = {ENVIRONMENT: RewardConfig(weight=2), "exact_match": RewardConfig()}
    with Verifier(VerifiersConfig(rewards=rewards)) as verifier:
        (scored,) = groups.rows(verifier.score(groups.table([row])))
        assert scored["rewards"] == [2.0, None, 0.0] and scored["reward_reasons"] == [None, GONE, None]
        assert scored["reward_parts"] == {ENVIRONMENT: [0.5, None, 0.0], "exact_match": [1.0, 1.0, 0.0]}
        # a world without get_reward leaves the others alone, but for episodes that it has lost
        (scored,) = groups.rows(verifier.score(groups.table([{**row, "reward_parts": {}}])))
        assert scored["rewards"] == [1.0, None, 0.0]


@pytest.mark.components
def test_what_reset_says_is_a_part_of_the_question_from_which_no_answer_is_copied() -> None:
    entry = {"name": "a", "turns": 1, "tool_calls": 0, "tool_errors": 0, "end": "stop"}
    row = {
        **{"group_id": 0, "prompt": "Simplify:", "answer": "2/5", "dataset": "d", "prompt_ids": [1]},
        **{"completions": ["\\boxed{84/210}"] * 3, "completion_ids": [[1]] * 3},
        **{"finish_reasons": ["stop"] * 3, "sources": ["policy"] * 3, "sampling_logprobs": [[-1.0]] * 3},
        **{"version_min": [0] * 3, "version_max": [0] * 3, "reward_reasons": [None] * 3},
        "episodes": [json.dumps(entry | more) for more in ({}, {"said": " 84/210"}, {"said": " 3"})],
    }
    with Verifier(VerifiersConfig(rewards={"math": RewardConfig()})) as verifier:
        (scored,) = groups.rows(verifier.score(groups.table([row])))
    assert scored["rewards"] == [1.0, 0.0, 1.0]


def test_the_config_adds_the_reward_and_refuses_what_does_not_go_with_episodes() -> None:
    data: dict[str, Any] = {
        "run_dir": "r",
        "num_steps": 1,
        "model": {"path": "m"},
        "prompts": {"path": "p.jsonl"},
        "environment": {"name": "episodes:Guess"},
    }
    assert [*GVPOConfig.from_dict(data).verifiers.rewards] == [ENVIRONMENT]
    more = {**data, "verifiers": {"rewards": {"length": 0.5}}}
    assert [*GVPOConfig.from_dict(more).verifiers.rewards] == [ENVIRONMENT, "length"]
    own = {**data, "verifiers": {"rewards": {"length": 0.5, "environment": 2}}}
    again = GVPOConfig.from_dict(own)
    assert [*again.verifiers.rewards] == ["length", ENVIRONMENT]
    assert GVPOConfig.from_dict(again.model_dump(mode="json")) == again
    for change, message in (
        ({"environment": None, "verifiers": {"rewards": {"environment": 1}}}, "needs a section environment"),
        ({"environment": {"name": "Guess"}}, "environment.name.*path.py:Class"),
        ({"environment": {"name": "verifiers:x"}}, "prompts.path: with environment.name: verifiers:x"),
        ({"engines": {"url": "http://localhost:1/v1"}}, "a server makes no episodes"),
        ({"sources": {"a": {"path": "x.jsonl", "share": 0.5}}}, "sources.a: offline completions are no"),
    ):
        with pytest.raises(ConfigError, match=message):
            GVPOConfig.from_dict({**data, **change})


class Doubling:
    def reset(self, **row: Any) -> None: ...

    @staticmethod
    def double(a: int) -> int:
        """Double a number.

        Args:
            a: The number.
        """
        return 2 * a


def test_a_tool_may_be_a_static_method() -> None:
    _, contract = contract_of(Doubling)
    (tool,) = contract.tools
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {"a": {"type": "integer", "description": "The number."}},
        "required": ["a"],
    }


def test_a_class_that_does_not_keep_the_contract_is_named() -> None:
    config, contract = contract_of(Calculator, digits=4)
    assert [tool["function"]["name"] for tool in contract.tools] == [
        *("add", "fail", "hang", "later", "leave", "sleep")
    ]
    schema = contract.tools[0]["function"]
    assert schema["description"] == "Add two numbers."
    assert schema["parameters"]["properties"]["a"] == {"type": "integer", "description": "The first."}
    assert schema["parameters"]["required"] == ["a"]

    def read(**changes: Any) -> None:
        read_contract(EnvironmentConfig(**{"name": config.name, **changes}), VerifiersConfig())

    for changes, message in (
        ({"name": "episodes:Nothing"}, r"environment\.name: episodes has no .*'Nothing'"),
        ({"name": "nowhere.py:A"}, r"environment\.name: no file .*nowhere\.py"),
        ({"name": "episodes:binary_"}, r"environment\.name: "),
        ({"name": "episodes:tokenizer"}, "is function, not a class"),
        ({"arguments": {"digit": 1}}, r"environment\.arguments: Calculator: got an unexpected .*'digit'"),
        ({"name": "episodes:Scripted"}, r"environment\.(name|arguments): "),
        ({"name": "episodes:LocalClient"}, r"environment\.arguments: "),
    ):
        with pytest.raises(ConfigError, match=message):
            read(**changes)


ENDS = ("max_turns", "no_room", "renderer", "lost", "broken")


def test_metrics_say_what_episodes_were_like_and_how_they_ended() -> None:
    def entry(turns: int, calls: int, errors: int, end: str, **more: int) -> str:
        counts = {"turns": turns, "tool_calls": calls, "tool_errors": errors, "end": end}
        return json.dumps({"name": "x", **counts, **more})

    rows = [
        {"episodes": [entry(1, 0, 0, "stop"), entry(4, 3, 1, "max_turns"), entry(4, 5, 2, "lost")]},
        {"episodes": [entry(3, 2, 0, "length"), None, entry(3, 2, 0, "renderer")]},
        {"episodes": [entry(3, 6, 5, "broken", tool_hung=2, tool_refused=3)]},
        {},
    ]
    assert episode_metrics("episodes", rows) == {
        "episodes/turns_mean": 3.0,
        "episodes/tool_calls_mean": 3.0,
        "episodes/tool_errors": 8.0,
        "episodes/tool_hung": 2.0,
        "episodes/tool_refused": 3.0,
        **dict.fromkeys((f"episodes/{end}" for end in ENDS), 1 / 6),
    }
    assert episode_metrics("episodes", [{}, {"episodes": [None]}]) == {}
    for prefix in ("episodes", "eval/heldout"):
        assert all(find(name)[0] is not None for name in episode_metrics(prefix, rows))


@pytest.mark.components
def test_the_python_tool_runs_programs_in_the_sandbox() -> None:
    async def main() -> None:
        host = host_of(Python)
        (opened,) = await host.open(0, {}, 1)
        programs = (
            "print(6 * 7)",
            "x = 1",
            "1 / 0",
            "import socket; socket.create_connection(('127.0.0.1', 9))",
            "print('x' * 3999)",
            "print('x' * 4000)",
            "import os; print(os.getppid(), os.getpid())",
            "import os; print(os.getppid(), os.getpid())",
            "print('x' * (1 << 20))",
        )
        calls = [Call("python", {"code": program}) for program in programs]
        answer = await host.act(opened.name, 0, 0, {}, calls, "")
        printed = [message["content"] for message in answer.messages]
        assert printed[:2] == ["42\n", "(the program printed nothing)"] and answer.num_errors == 3
        assert printed[4:6] == ["x" * 3999 + "\n", "x" * 4000 + "\n[cut: 4000 of 4001 characters]"]
        first, second = (one.split() for one in printed[6:8])
        assert first[0] == second[0] and first[1] != second[1]  # children of one process
        assert printed[8] == "Error: RuntimeError: it printed more than 1048576 bytes"
        assert "ZeroDivisionError" in printed[2] and printed[3].startswith("Error: ")
        assert await host.finish(opened.name, 0, {}) == (None, None, False)  # the other rewards decide

    asyncio.run(main())


def test_the_job_with_a_tool_opens_no_more_boxes_than_it_says_however_many_a_turn_has() -> None:
    job = Path(__file__).parents[1] / "jobs" / "tools_cpu.py"
    trail = read_contract(EnvironmentConfig(name=f"{job}:Trail")).cls

    async def main() -> None:
        host = host_of(trail)
        for opens, reward in (((8, 5, 2, 1), 1.0), ((8, 5, 1, 2), 0.0), ((1, 8, 5, 2), 0.0)):
            (opened,) = await host.open(0, {"answer": "8 5 2"}, 1)
            calls = [Call("open", {"n": n}) for n in opens]
            answer = await host.act(opened.name, 0, 0, {}, calls, "")
            said = [message["content"] for message in answer.messages]
            assert said[3] == "Error: RuntimeError: no box is opened any more"
            told = {8: "go to 5", 5: "go to 2", 2: "treasure", 1: "empty"}
            assert said[:3] == [told[n] for n in opens[:3]]
            assert await host.finish(opened.name, 0, {}) == (reward, None, False)

    asyncio.run(main())


def test_the_job_with_a_calculator_pays_for_the_calls_that_its_prompts_show_and_for_no_other_sum() -> None:
    job = Path(__file__).parents[1] / "jobs" / "smollm2_tools_cpu.py"
    sums = read_contract(EnvironmentConfig(name=f"{job}:Sums")).cls
    row = runpy.run_path(str(job))["row"](random.Random(0))
    *shown, asked = row["prompt"]
    assert [message["role"] for message in shown] == ["user", "assistant"] * 3 and asked["role"] == "user"

    def total_of(message: dict[str, str]) -> int:
        return sum(map(int, re.findall(r"\d+", message["content"])))

    assert str(total_of(asked)) == row["answer"]

    async def main() -> None:
        host = host_of(sums)
        for question, reply in zip(shown[::2], shown[1::2], strict=True):
            total = total_of(question)
            call = json.loads(reply["content"].removeprefix("<tool_call>").removesuffix("</tool_call>"))
            for answer, reward in ((total, 1.0), (total + 1, 0.0)):
                (opened,) = await host.open(0, {"answer": str(answer)}, 1)
                made = await host.act(opened.name, 0, 0, {}, [Call(call["name"], call["arguments"])], "")
                assert made.messages[0]["content"] == str(total)
                assert await host.finish(opened.name, 0, {}) == (reward, None, False)

    asyncio.run(main())


def test_check_shows_the_tools_and_a_sample_how_each_episode_went() -> None:
    config, contract = contract_of(Calculator)
    first, second, *_ = described(contract, config)
    assert "at most 8 turns" in first and '"name": "add", "description": "Add two numbers."' in second
    (_, world) = contract_of(Guess)
    assert "respond answers" in next(iter(described(world, config)))
    counts = {"turns": 3, "tool_calls": 4, "tool_errors": 1, "end": "max_turns"}
    row = {
        **{"prompt_ids": [1], "answer": "7", "completion_ids": [[2]], "rewards": [1.0], "reward_parts": {}},
        **{"reward_reasons": [None], "finish_reasons": ["stop"], "episodes": [json.dumps(counts)]},
    }
    lines = "\n".join(sample_lines([row], str, 9))
    assert "3 turns, 4 tool calls, 1 failed, end: max_turns" in lines


def test_what_is_not_protected_or_not_set_is_said_once_and_every_restart_of_an_actor_is_noted() -> None:
    said: list[str] = []
    noted: list[tuple[str, str, str]] = []
    group = object.__new__(EnvironmentGroup)
    group._processes, group._said, group._say = {}, set(), said.append
    group._note = lambda *note: noted.append(note)
    for number, pid, unprotected in ((0, 7, ["files"]), (1, 8, ["files", "calls"]), (0, 7, []), (1, 9, [])):
        group._take(number, {"pid": pid, "unprotected": unprotected, "missing": ["KEY"] * number})
    before = "not protected from programs of the environment: "
    missing = "environment.variables: KEY is not set on the node of an environment actor"
    assert said == [f"{before}files", f"{before}calls", missing]
    assert [note[:2] for note in noted] == [("environment", "environment-1")]
    assert Python._unprotected() == unprotected_here()


@pytest.mark.components
def test_the_bench_of_episodes_plays_them_all_in_processes_of_their_own() -> None:
    assert bench_episodes.main(num_groups=1, num_turns=2) > 0

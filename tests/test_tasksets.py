"""Task sets of the package verifiers, the real one: played by their own harnesses against the server of a
fake engine (test_vllm_engine.py has vLLM's), and read as prompts.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from episodes import tokenizer
from test_agents import SAMPLING, World, check, row_of

from gvpo_ray import GVPOConfig, groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.environment import ENVIRONMENT, EnvironmentConfig
from gvpo_ray.data.prompts import PromptSet
from gvpo_ray.environments.agent import described_agent, read_agent
from gvpo_ray.environments.tasksets import TaskError, _reward

JOB = Path(__file__).parents[1] / "jobs" / "verifiers_cpu.py"
TASKS = """
import asyncio
import threading

import aiohttp
import verifiers.v1 as vf

GATE = threading.Event()


class CountData(vf.TaskData):
    goal: int
    kind: str
    answer: str = "7"


class Count(vf.Task[CountData]):
    @vf.reward(weight=2.0)
    async def close(self, task, trace) -> float:
        if task.kind == "raises":
            raise KeyError("no judge")
        if task.kind == "waits":
            await asyncio.sleep(1000)
        if task.kind == "blocks":
            GATE.wait()
        said = [node.message.content for node in trace.nodes if node.message.role == "assistant"]
        return float(len(said[-1]) == task.goal)


class CountConfig(vf.TasksetConfig):
    num: int = 3
    has_no_end: bool = False


class Counts(vf.Taskset[Count, CountConfig]):
    def __init__(self, config):
        super().__init__(config)
        self.INFINITE = config.has_no_end

    def load(self):
        i = 0
        while i < self.config.num or self.config.has_no_end:
            yield Count(CountData(prompt=f"Count to {i}", goal=i, kind="counts"), self.config.task)
            i += 1


class Talk(vf.Harness[vf.HarnessConfig]):
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        messages = [{"role": "user", "content": data.prompt}]
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {secret}"}) as http:
            for turn in range(3):
                body = {"model": ctx.model, "messages": messages}
                async with http.post(f"{endpoint}/chat/completions", json=body) as answer:
                    if answer.status != 200:
                        return vf.ProgramResult(0 if data.kind == "counts" else 1, "", "no answer")
                    said = (await answer.json())["choices"][0]["message"]["content"]
                messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "More!"}]
                if data.kind == "forgets" and turn == 1:
                    messages = messages[-1:]
        return vf.ProgramResult(0, "", "")


__all__ = ["Counts", "Talk"]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "count_tasks.py").write_text(TASKS)
    once = JOB.read_text().replace('["Search", "Talk", "Trails"]', '["Talk"]')
    (tmp_path / "talk_once.py").write_text(once)
    monkeypatch.syspath_prepend(tmp_path)
    before = {*sys.modules}
    yield tmp_path
    for name in {"count_tasks", "talk_once", "sleepy_tasks", JOB.stem} - before:
        sys.modules.pop(name, None)


def section(folder: Path, **more: Any) -> EnvironmentConfig:
    return EnvironmentConfig(**{"name": f"verifiers:{folder / 'count_tasks.py'}", **more})


def group(**data: Any) -> pa.Table:
    """A group's row, as a prompt set makes it."""
    row = {"group_id": 0, "prompt": "p", "answer": "", "dataset": "d", "prompt_ids": [1, 2, 3]}
    return groups.table([{**row, "data": json.dumps({"columns": {"task": json.dumps({"idx": 0, **data})}})}])


def count(goal: int, kind: str = "counts") -> pa.Table:
    return group(prompt=f"Count to {goal}", goal=goal, kind=kind)


def longer(turns: list[str], number: int) -> str:
    """Says 3, 5 and 7 letters in the first episode's turns, one more in the second's."""
    return "ab"[number] * (len(turns) + number)


def played(
    folder: Path, config: EnvironmentConfig, prompt: pa.Table, policy: Any = longer, most: int = 2000
) -> dict[str, Any]:
    """Let two episodes be played, by a copy as an actor has it; return their group."""
    agent: Any = pickle.loads(pickle.dumps(read_agent(config)))

    async def main() -> dict[str, Any]:
        async with World(folder, agent, max_turns=config.max_turns) as world:
            engine = await world.engine(policy)
            sampling = SAMPLING.model_copy(update={"max_tokens": most})
            row = row_of((await engine.generate(prompt, sampling))[0])
            check(row, engine.asked)
            env, _ = agent._begun.result()
            assert not env._interception.clients and not env._interception.sessions  # nothing of it stays
            await ended(agent)
            return row

    return asyncio.run(main())


async def ended(agent: Any) -> None:
    """End what an actor holds for ever."""

    async def there() -> None:
        agent._serving.cancel()
        await asyncio.gather(agent._serving, return_exceptions=True)
        await agent._begun.result()[1].aclose()

    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(there(), agent._loop))
    agent._loop.call_soon_threadsafe(agent._loop.stop)


def ends(row: dict[str, Any]) -> list[tuple[str, int]]:
    entries = [json.loads(one) for one in row["episodes"]]
    return [(entry["end"], entry["turns"]) for entry in entries]


# -------------------------------------------------------------------------------------------------- episodes


def test_a_task_is_played_by_its_own_harness_and_trained_with_the_tokens_that_were_sampled(
    folder: Path,
) -> None:
    row = played(folder, section(folder), count(7))
    assert row["reward_parts"] == {ENVIRONMENT: [2.0, 0.0]} and row["reward_reasons"] == [None, None]
    assert ends(row) == [("stop", 3)] * 2
    text = tokenizer().decode(row["prompt_ids"])
    assert text == "<|im_start|>user\nCount to 7<|im_end|>\n<|im_start|>assistant\n"


def test_a_context_that_is_begun_anew_is_a_branch_with_the_reward_of_its_episode(folder: Path) -> None:
    row = played(folder, section(folder), count(3, "forgets"))
    names = [json.loads(one)["name"] for one in row["episodes"]]
    assert len(names) == 4 and len({*names}) == 2  # check() has seen that each token is trained once
    rewards = dict(zip(names, row["reward_parts"][ENVIRONMENT], strict=True))
    assert sorted(rewards.values()) == [0.0, 2.0]
    assert [rewards[name] for name in names] == row["reward_parts"][ENVIRONMENT]


def test_a_score_that_fails_and_a_harness_that_fails_give_no_reward_and_a_reason(folder: Path) -> None:
    row = played(folder, section(folder), count(7, "raises"))
    assert row["reward_parts"] == {ENVIRONMENT: [None, None]} and ends(row) == [("lost", 3)] * 2
    for reason in row["reward_reasons"]:
        assert "TaskError: task Count scoring: KeyError: 'no judge'" in reason
    row = played(folder, section(folder), count(7, "gives up"), most=60)  # no room for a third turn
    assert row["reward_parts"] == {ENVIRONMENT: [None, None]}
    for reason in row["reward_reasons"]:
        assert "leave no room" in reason


def test_the_last_turn_that_there_may_be_ends_an_episode_which_verifiers_scores(folder: Path) -> None:
    row = played(folder, section(folder, max_turns=2), count(5))
    assert row["reward_parts"] == {ENVIRONMENT: [2.0, 0.0]} and [turns for _, turns in ends(row)] == [2, 2]
    row = played(folder, section(folder, arguments={"agent": {"max_turns": 1}}), count(3))
    assert row["reward_parts"] == {ENVIRONMENT: [2.0, 0.0]} and [turns for _, turns in ends(row)] == [1, 1]


def test_code_that_blocks_costs_its_episodes_and_not_what_their_actor_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor ends where its task set still hangs some time after that, and only there."""
    agent: Any = pickle.loads(pickle.dumps(read_agent(section(folder))))
    agent._timeout_s = 0.3  # of the look at the thread; that of the episodes is 3 s
    exits: list[int] = []
    monkeypatch.setattr("os._exit", exits.append)

    async def main() -> None:
        async with World(folder, agent, timeout_s=3.0) as world:
            engine = await world.engine(longer)

            async def lost(kind: str) -> None:
                playing = asyncio.create_task(engine.generate(count(7, kind), SAMPLING))
                while not playing.done():
                    await asyncio.sleep(0.2)
                    assert (await asyncio.wait_for(world.hosts[0].status(), 1))["pid"]
                row = row_of((await playing)[0])
                assert row["reward_parts"] == {ENVIRONMENT: [None, None]}
                assert [end for end, _ in ends(row)] == ["lost"] * 2
                assert all("timeout: environment: the agent: no call" in one for one in row["reward_reasons"])
                await asyncio.sleep(0.6)

            await lost("waits")
            assert not exits
            await lost("blocks")
            assert exits == [1, 1]
            sys.modules["count_tasks"].GATE.set()  # it has come to an end after all
            row = row_of((await engine.generate(count(7), SAMPLING))[0])
            assert row["reward_parts"] == {ENVIRONMENT: [2.0, 0.0]} and exits == [1, 1]
            await ended(agent)

    asyncio.run(main())


def test_the_time_that_a_task_set_needs_to_begin_is_no_time_of_an_episode(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verifiers.v1.utils import loaders

    agent: Any = read_agent(section(folder, timeout_s=60))
    load = loaders.load_environment

    def slowly(*given: Any) -> Any:
        time.sleep(3.5)
        return load(*given)

    monkeypatch.setattr(loaders, "load_environment", slowly)
    exits: list[int] = []
    monkeypatch.setattr("os._exit", exits.append)

    async def main() -> None:
        async with World(folder, agent, timeout_s=3.0) as world:
            engine = await world.engine(longer)
            with monkeypatch.context() as patch:
                patch.setattr("gvpo_ray.environments.tasksets.START_S", 0.2)
                row = row_of((await engine.generate(count(7), SAMPLING))[0])
            why = "count_tasks.py has not begun within 0.2 s"
            assert all(why in reason for reason in row["reward_reasons"])
            row = row_of((await engine.generate(count(7), SAMPLING))[0])
            assert row["reward_parts"] == {ENVIRONMENT: [2.0, 0.0]}
            assert exits == [1, 1]  # of the two that had 0.2 s
            await ended(agent)

    asyncio.run(main())


SEATED = """

class Seats(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig(SEAT)


class Seated(vf.Env[Seats]):
    async def run(self, task, agents):
        pass


__all__ += ["Seated"]
"""


@pytest.mark.parametrize(
    ("seat", "runtime", "turns"),
    [
        ("", "subprocess", 8),
        ("max_turns=2", "subprocess", 2),
        ("max_turns=20", "subprocess", 8),
        ("runtime=vf.DockerConfig(image='python:3.11')", "docker", 8),
    ],
)
def test_a_task_set_keeps_the_place_and_the_turns_that_it_gives_its_agent(
    folder: Path, seat: str, runtime: str, turns: int
) -> None:
    (folder / "count_tasks.py").write_text(TASKS + SEATED.replace("SEAT)", f"{seat})"))
    agent: Any = read_agent(section(folder))
    settings = agent._settings()[0].agent
    assert (settings.runtime.type, settings.max_turns) == (runtime, turns)


def test_a_task_set_that_could_not_begin_is_begun_again_by_the_next_episode(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verifiers.v1.utils import loaders

    agent: Any = read_agent(section(folder))

    def fails(*_: Any) -> Any:
        raise ConnectionError("the hub is out of reach")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(loaders, "load_environment", fails)
            for _ in range(2):
                with pytest.raises(ConnectionError):
                    await agent("http://127.0.0.1:9", "key", "m", task="{}")
        with pytest.raises(ValueError, match="validation error"):  # it has begun, and this is no task
            await agent("http://127.0.0.1:9", "key", "m", task="{}")
        await ended(agent)

    asyncio.run(main())


def test_the_jobs_task_set_answers_the_policy_in_its_own_environment(folder: Path) -> None:
    def asks(turns: list[str], number: int) -> str:
        if number == 0:  # goes where it is sent
            n = [8, 5, 2][sum("<tool_call>" in turn for turn in turns)]
            return f'<tool_call>{{"name": "open", "arguments": {{"n": {n}}}}}</tool_call>'
        return "It is in 2."

    task = group(prompt="Find it.", trail=[8, 5, 2])
    row = played(folder, section(folder, name=f"verifiers:{JOB}"), task, asks)
    assert row["reward_parts"] == {ENVIRONMENT: [1.0, 0.0]} and [turns for _, turns in ends(row)] == [3, 3]
    read = tokenizer().decode([*row["prompt_ids"], *row["completion_ids"][0]])
    assert read.index("\ngo to 5\n") < read.index("\ngo to 2\n")
    assert "Error: that is no call" in tokenizer().decode(row["completion_ids"][1])


def test_a_task_set_that_ships_with_verifiers_is_read_and_played(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hangman of textarena, whose list of words comes from a hub, and here from a folder."""
    nltk = pytest.importorskip("nltk")
    words = folder / "nltk_data" / "corpora" / "words"
    words.mkdir(parents=True)
    for name in ("en", "en-basic"):
        (words / name).write_text("abba\n")
    monkeypatch.setattr(nltk.data, "path", [str(folder / "nltk_data")])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: True)
    arguments = {"taskset": {"game": "Hangman-v0"}, "player": {"harness": {"id": "talk_once"}}}
    config = section(folder, name="verifiers:textarena", arguments=arguments)
    data = {**run_of(config), "prompts": {"path": "verifiers:textarena", "limit": 2}}
    prompts = PromptSet(GVPOConfig.from_dict(data).prompts, tokenizer(), name="d", max_tokens=None)
    assert len(prompts) == 2 and "Hangman" in prompts.all()["prompt"][0].as_py()

    def guesses(turns: list[str], number: int) -> str:
        return "[ABBA]" if number else "[B]" if any("[A]" in turn for turn in turns) else "[A]"

    row = played(folder, config, prompts.group(0), guesses, most=20_000)
    assert row["reward_reasons"] == [None, None] and row["reward_parts"] == {ENVIRONMENT: [1.0, 1.0]}
    assert [turns for _, turns in ends(row)] == [2, 1]


class Part:
    """As much of a trace or an episode as its reward is made of."""

    def __init__(self, **rewards: float | None) -> None:
        self.ok, self.last_error = True, None
        made = {name: None if one is None else Part() for name, one in rewards.items()}
        self.rewards, self.traces = made, [self]
        self.reward = sum(one for one in rewards.values() if one is not None)


def test_what_has_no_score_is_no_reward_whatever_else_has_one() -> None:
    assert _reward(Part(a=0.5, b=1.0)) == 1.5 and _reward(Part(a=0.0)) == 0.0
    with pytest.raises(TaskError, match="the reward b has no score"):
        _reward(Part(a=0.5, b=None))
    with pytest.raises(TaskError, match="its task gives no reward"):
        _reward(Part())
    two = Part(a=0.5)
    two.traces = [Part(a=1.0), Part(a=0.0)]
    with pytest.raises(TaskError, match="it has 2 traces"):
        _reward(two)


# --------------------------------------------------------------------------------------------------- prompts


def run_of(environment: EnvironmentConfig) -> dict[str, Any]:
    return {
        "run_dir": "r",
        "num_steps": 1,
        "model": {"path": "m"},
        "environment": environment.model_dump(exclude_unset=True),
        "engines": {"serve": True},
    }


def test_its_tasks_are_the_prompts_and_a_slice_of_them_is_held_out(folder: Path) -> None:
    name = f"verifiers:{folder / 'count_tasks.py'}"
    data = run_of(section(folder, arguments={"taskset": {"num": 10}}))
    sets = {"heldout": {"path": name, "split": "train[8:]"}, "more": {"path": name, "taskset": {"num": 4}}}
    config = GVPOConfig.from_dict({**data, "evaluation": {"sets": sets}})
    assert config.prompts.path == name and config.prompts.taskset == {"num": 10}

    def prompts(of: Any) -> PromptSet:
        return PromptSet(of, tokenizer(), name="d", max_tokens=None)

    every = prompts(config.prompts).all().to_pylist()
    assert [row["prompt"] for row in every] == [f"Count to {i}" for i in range(10)]
    columns = json.loads(every[3]["data"])["columns"]
    assert columns["answer"] == "7" and json.loads(columns["task"])["goal"] == 3
    held_out = prompts(config.evaluation.sets["heldout"]).all()
    assert held_out["prompt"].to_pylist() == ["Count to 8", "Count to 9"]
    assert len(prompts(config.evaluation.sets["more"])) == 4
    for limit in (1, 2, 3):  # of the slice: the first tasks are those that are trained
        few = {"heldout": {"path": name, "split": "train[8:]", "limit": limit}}
        few_of = GVPOConfig.from_dict({**data, "evaluation": {"sets": few}}).evaluation.sets["heldout"]
        assert prompts(few_of).all()["prompt"].to_pylist() == ["Count to 8", "Count to 9"][:limit]
    data["prompts"] = {"path": name, "answer_column": "answer", "limit": 2}
    data["environment"]["arguments"] = {"taskset": {"has_no_end": True}}
    endless = prompts(GVPOConfig.from_dict(data).prompts)
    assert endless.all()["answer"].to_pylist() == ["7", "7"]


def test_the_task_set_and_its_file_are_found_from_the_folder_of_the_run(folder: Path) -> None:
    data = {**run_of(section(folder, name="verifiers:count_tasks.py")), "root": str(folder)}
    config = GVPOConfig.from_dict(data)
    name = f"verifiers:{folder / 'count_tasks.py'}"
    assert config.environment is not None and (config.environment.name, config.prompts.path) == (name, name)
    assert EnvironmentConfig(name="verifiers:gsm8k-v1").taskset == "gsm8k-v1"


X, AGENT = {"name": "verifiers:x"}, {"agent": "a.py:f"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"environment": {"name": "verifiers:"}}, "environment.name: verifiers: names no task set"),
        ({"environment": {**X, "renderer": "qwen3"}}, "renderer is of an environment's class"),
        ({"environment": {**X, "sandbox": True}}, "sandbox is of an environment's class"),
        ({"environment": {**X, "max_text": 1000}}, "max_text is of an environment's class"),
        ({"environment": {**X, "variables": ["A"]}}, "variables is of an environment's class"),
        ({"engines": {}}, "environment.name: it asks its model over HTTP: set engines.serve: true"),
        ({"prompts": {"path": "p.jsonl"}}, "prompts.path: with environment.name: verifiers:x it can"),
        ({"evaluation": {"sets": {"h": {"path": "verifiers:y"}}}}, "evaluation.sets.h.path: with env"),
        ({"environment": AGENT, "prompts": {"path": "verifiers:x"}}, "prompts.path: verifiers:x goes"),
        ({"environment": AGENT, "prompts": {"path": ["p", "verifiers:x"]}}, "prompts.path: .* goes with"),
        ({"environment": AGENT, "prompts": {"path": ["verifiers:x", "p"]}}, "prompts.path: .* goes with"),
        ({"environment": AGENT, "prompts": {"path": "p", "taskset": {"a": 1}}}, "prompts.taskset: only"),
        ({"environment": {**X, "arguments": {"taskset": 3}}}, "environment.arguments: taskset"),
    ],
)
def test_a_section_that_does_not_go_with_a_task_set_is_refused_by_its_key(changes: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        GVPOConfig.from_dict({**run_of(EnvironmentConfig(name="verifiers:x")), **changes})


@pytest.mark.parametrize(
    ("old", "new", "who"),
    [
        ("EXECUTES_CODE = NEEDS_CONTAINER = False", "EXECUTES_CODE = False", "Talk"),
        (
            "class Count(vf.Task[CountData]):",
            "class Count(vf.Task[CountData]):\n    NEEDS_CONTAINER = True",
            "Count",
        ),
    ],
)
def test_what_needs_a_container_is_not_played_without_one(folder: Path, old: str, new: str, who: str) -> None:
    assert old in TASKS
    (folder / "count_tasks.py").write_text(TASKS.replace(old, new))
    bare = {"agent": {"runtime": {"type": "subprocess"}}}
    with pytest.raises(ConfigError, match=rf"arguments: agent.runtime: {who} needs a container, and subp"):
        read_agent(section(folder, arguments=bare))
    agent: Any = read_agent(section(folder))  # and nobody has said that it is this machine
    assert agent._settings()[0].agent.runtime.type != "subprocess"


def test_a_task_set_that_does_not_come_to_an_end_of_its_loading_is_refused_by_its_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "count_tasks.py").write_text(
        TASKS.replace("        i = 0\n", "        i = int(not GATE.wait())\n")
    )
    data = run_of(section(folder))
    monkeypatch.setattr("gvpo_ray.data.tasksets.LOAD_S", 2.0)
    with pytest.raises(
        ConfigError, match=r"prompts.path: verifiers:.*count_tasks.py is not loaded within 2 s"
    ):
        PromptSet(GVPOConfig.from_dict(data).prompts, tokenizer(), name="d", max_tokens=None)
    sys.modules["count_tasks"].GATE.set()
    assert len(PromptSet(GVPOConfig.from_dict(data).prompts, tokenizer(), name="d", max_tokens=None)) == 3
    (folder / "sleepy_tasks.py").write_text("import time\ntime.sleep(4)\n")
    with pytest.raises(ConfigError, match=r"environment.name: .*sleepy_tasks.py is not loaded within 2 s"):
        read_agent(section(folder, name=f"verifiers:{folder / 'sleepy_tasks.py'}"))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"id": "user-sim"}, r"has several agents \(assistant, user\): one is trained"),
        (
            {"retries": {"max_retries": 1}},
            "retries: a second play of an episode has calls of the first",
        ),
        ({"agent": {"retries": {"rules": [{"max_retries": 2}]}}}, "retries"),
        ({"interception": {"type": "elastic"}}, "interception: there is one server"),
        ({"taskset": {"nom": 3}}, "ValidationError: .*taskset.nom"),
        ({"agent": {"harness": {"id": "absent_harness"}}}, "harness 'absent_harness' not found"),
    ],
)
def test_settings_that_no_run_can_have_are_refused_before_any_actor_starts(
    folder: Path, arguments: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=r"^environment\.(name|arguments): .*" + why):
        read_agent(section(folder, arguments=arguments))


def test_a_task_set_that_is_absent_broken_or_without_an_end_is_refused_by_its_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="verifiers:absent_tasks taskset 'absent_tasks' not"):
        read_agent(section(folder, name="verifiers:absent_tasks"))
    with pytest.raises(ConfigError, match=r"environment.name: .*none.py cannot be read: No such file"):
        read_agent(section(folder, name=f"verifiers:{folder / 'none.py'}"))
    (folder / "broken_tasks.py").write_text("1 / 0\n")
    for _ in range(2):  # and it leaves no half-made module behind
        with pytest.raises(ConfigError, match=r"broken_tasks.py: ZeroDivisionError"):
            read_agent(section(folder, name=f"verifiers:{folder / 'broken_tasks.py'}"))
    (folder / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ConfigError, match=r"environment.name: .*leaves.py ends the process: SystemExit\(0\)"):
        read_agent(section(folder, name=f"verifiers:{folder / 'leaves.py'}"))
    for name in ("json", "textarena", "codex"):  # the last two are verifiers' own
        (folder / f"{name}.py").write_text(TASKS)
        with pytest.raises(ConfigError, match=f"another module is called {name}: rename the file"):
            read_agent(section(folder, name=f"verifiers:{folder / name}.py"))
    (folder / "tasks.v1.py").write_text(TASKS)
    with pytest.raises(ConfigError, match=r"tasks.v1.py: a module's name has no dot"):
        read_agent(section(folder, name=f"verifiers:{folder / 'tasks.v1.py'}"))
    (folder / "later_tasks.py").write_text("LATER = 1\n")  # on the path, and nobody has imported it yet
    (folder / "theirs").mkdir()
    (folder / "theirs" / "later_tasks.py").write_text(TASKS)
    with pytest.raises(ConfigError, match="another module is called later_tasks: rename the file"):
        read_agent(section(folder, name=f"verifiers:{folder / 'theirs' / 'later_tasks.py'}"))
    data = run_of(section(folder, arguments={"taskset": {"has_no_end": True}}))
    with pytest.raises(ConfigError, match=r"prompts.limit: .* has no end: say how many tasks"):
        PromptSet(GVPOConfig.from_dict(data).prompts, tokenizer(), name="d", max_tokens=None)
    data["prompts"] = {"path": data["environment"]["name"], "split": "test", "limit": 1}
    with pytest.raises(ConfigError, match=r"prompts.split: a task set has train and its slices"):
        PromptSet(GVPOConfig.from_dict(data).prompts, tokenizer(), name="d", max_tokens=None)
    assert "at most 8 calls of the model" in next(described_agent(section(folder)))
    monkeypatch.setitem(sys.modules, "verifiers.v1.utils.loaders", None)
    with pytest.raises(ConfigError, match="needs the package verifiers: pip install 'gvpo-ray"):
        read_agent(section(folder))
    data["prompts"] = {"path": data["environment"]["name"], "limit": 1}
    with pytest.raises(ConfigError, match="needs the package verifiers: pip install 'gvpo-ray"):
        PromptSet(GVPOConfig.from_dict(data).prompts, tokenizer(), name="d", max_tokens=None)

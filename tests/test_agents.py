"""Agents that know an address and a key alone: what they ask their model for is trained as it was sampled,
whatever becomes of the engines. A small application stands in for vLLM's (test_vllm_engine.py has that one).
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pyarrow as pa
import pytest
from episodes import END, LocalClient, Policy, Scripted, tokenizer
from transformers import LlamaConfig

from gvpo_ray import GVPOConfig, groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.config.engines import PoolConfig, SamplingConfig
from gvpo_ray.config.environment import ENVIRONMENT, EnvironmentConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.engines import serving
from gvpo_ray.engines.base import split_kept
from gvpo_ray.engines.rollout import ModelCall, Span
from gvpo_ray.engines.serving import NoRoomError, Serving
from gvpo_ray.engines.slots import Request, Slot
from gvpo_ray.engines.supervisor import Supervisor
from gvpo_ray.environments.agent import Agents, branches, read_agent, with_common_prompt
from gvpo_ray.environments.agent_host import AgentHost
from gvpo_ray.environments.host import GONE
from gvpo_ray.files import kept_secret
from gvpo_ray.observe.episodes import episodes_of

TOKENIZER = tokenizer()
SAMPLING = SamplingConfig(num_completions=2, max_tokens=2000)
TOKEN = "the-run's-own-token"


class DeadError(Exception):
    """As vLLM's EngineDeadError, which its application answers with 500."""


async def chat(scope: Any, receive: Any, send: Any) -> None:
    """As vLLM's route: messages become a prompt, tokens become the content of an answer."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    asked = json.loads(body)
    status, answer = 200, {}
    try:
        text = TOKENIZER.apply_chat_template(asked["messages"], tokenize=False, add_generation_prompt=True)
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        stop, deaths = asked.get("stop", ()), (DeadError,)
        _, span = await serving.sample(ids, asked.get("max_tokens"), stop, TOKENIZER.decode, deaths)
        said = TOKENIZER.decode(span.ids, skip_special_tokens=True)
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        made = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"]}
        answer = {**made, "choices": [choice]}
    except NoRoomError as error:
        status, answer = 400, {"error": {"message": str(error)}}
    except DeadError:
        status, answer = 500, {"error": {"message": "dead"}}
    await send(
        {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
    )
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


async def post(base_url: str, api_key: str, messages: Sequence[dict[str, str]], **more: Any) -> str:
    """What an agent does, with any client."""
    headers = {"Authorization": f"Bearer {api_key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{base_url}/chat/completions", json={"messages": messages, **more}) as answer,
    ):
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {(await answer.json())['error']['message']}")
        content: str = (await answer.json())["choices"][0]["message"]["content"]
        return content


async def talk(base_url: str, api_key: str, prompt: str, answer: str) -> float:
    """A conversation of three turns, each of which goes on with all that was said."""
    messages = [{"role": "user", "content": prompt}]
    for turn in range(3):
        said = await post(base_url, api_key, messages)
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": f"And {turn}?"}]
    return len(said) / int(answer)


class Engine(Scripted):
    """Says what a policy says; notes every call."""

    def __init__(self, policy: Policy, made: Agents) -> None:
        super().__init__(policy, made)
        self.made, self.asked = made, list[tuple[list[int], Span]]()

    async def _span(self, call: ModelCall) -> Span:
        span = await super()._span(call)
        self.asked.append((list(call.ids), span))
        return span


class World:
    """Hosts of an agent, and engines that serve."""

    def __init__(self, folder: Path, agent: Callable[..., Any], num: int = 1, **changes: Any) -> None:
        TOKENIZER.save_pretrained(folder)
        LlamaConfig(vocab_size=len(TOKENIZER)).save_pretrained(folder)
        options = {"timeout_s": 60.0, "max_turns": 8, "is_graded": False, **changes}
        self._config = EnvironmentConfig(agent="a.py:agent", max_turns=options["max_turns"])
        self._model = ModelConfig(path=str(folder))
        self.hosts = [AgentHost(agent, **options) for _ in range(num)]
        self.clients = [LocalClient(host) for host in self.hosts]
        self._served: list[Serving] = []

    async def engine(self, policy: Policy, version: int = 0) -> Engine:
        made = Agents(self._config, self._model, PromptsConfig(path="p"), [], self.clients)
        made.serving = served = Serving(chat, TOKEN, "127.0.0.1")
        await served.start()
        self._served.append(served)
        engine = Engine(policy, made)
        await engine.update(version, {})
        return engine

    async def __aenter__(self) -> World:
        return self

    async def __aexit__(self, *_: object) -> None:
        for served in self._served:
            await served.close()
        for host in self.hosts:
            if host._starting is not None:
                await host._session.close()
                host._runner._shutdown_timeout = 0.01  # 0 is for ever
                await host._runner.cleanup()


def prompt(answer: str = "10", group_id: int = 0) -> pa.Table:
    """One row, as a prompt set makes it: its tokens are not what the agents ask."""
    row = {"group_id": group_id, "prompt": "Talk.", "answer": answer, "dataset": "d"}
    return groups.table([{**row, "prompt_ids": [1, 2, 3]}])


def named(numbers: Iterable[int]) -> list[str]:
    """The column `episodes` of completions of the episodes with these numbers."""
    return [json.dumps({"name": str(number)}) for number in numbers]


def row_of(table: pa.Table) -> dict[str, Any]:
    (row,) = groups.rows(groups.validate(table, (*groups.PROMPT_COLUMNS, *groups.COMPLETION_COLUMNS)))
    return row


def sequences(row: dict[str, Any]) -> list[tuple[list[int], list[bool], list[float]]]:
    """Each completion with its prompt: tokens, what of them is trained, and log-probs."""
    masks, num = row["trained_tokens"], len(row["prompt_ids"])
    return [
        (row["prompt_ids"] + ids, [False] * num + mask, [0.0] * num + logprobs)
        for ids, mask, logprobs in zip(row["completion_ids"], masks, row["sampling_logprobs"], strict=True)
    ]


def check(row: dict[str, Any], asked: Sequence[tuple[list[int], Span]]) -> None:
    """That what is trained is what engines have sampled, behind the very tokens that they have read."""
    trained = 0
    for before, span in asked:
        end = len(before) + len(span.ids)
        (_,) = [
            ids
            for ids, mask, logprobs in sequences(row)
            if ids[:end] == [*before, *span.ids]
            and all(mask[len(before) : end])
            and logprobs[len(before) : end] == pytest.approx(span.logprobs)
        ]
        trained += len(span.ids)
    assert sum(sum(mask) for _, mask, _ in sequences(row)) == trained


def longer(turns: list[str], number: int) -> str:
    """Says as many letters as there are turns, and another letter in each completion."""
    return "abcdefgh"[number] * len(turns)


def run(main: Any) -> None:
    asyncio.run(main())


# ------------------------------------------------------------------------------------------ what is recorded


def test_a_conversation_is_one_completion_whose_tokens_are_those_that_the_engine_sampled(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with World(tmp_path, talk) as world:
            engine = await world.engine(longer, 3)
            table, missing = await engine.generate(prompt(), SAMPLING)
            row = row_of(table)
            assert not missing and len(engine.asked) == 6 and len(row["completions"]) == 2
            check(row, engine.asked)
            said = TOKENIZER.decode(row["prompt_ids"])
            assert said == "<|im_start|>user\nTalk.<|im_end|>\n<|im_start|>assistant\n"
            assert sorted(row["completions"]) == sorted(
                "\n".join(letter * num + END for num in (3, 5, 7)) for letter in "ab"
            )
            assert row["reward_parts"] == {ENVIRONMENT: pytest.approx([0.7, 0.7])}
            assert row["reward_reasons"] == [None, None] and row["version_min"] == [3, 3]
            ends = [json.loads(one) for one in row["episodes"]]
            assert [(one["turns"], one["end"]) for one in ends] == [(3, "stop")] * 2
            assert not world.hosts[0]._episodes

    run(main)


def tree(rng: random.Random) -> list[dict[str, Any]]:
    """Calls of a made-up agent: each goes on with an earlier one, or leaves it at some place."""
    calls: list[dict[str, Any]] = []
    for number in range(rng.randrange(1, 9)):
        before = rng.choice(calls) if calls and rng.random() < 0.8 else {"prompt_ids": [], "ids": []}
        there = before["prompt_ids"] + before["ids"]
        if rng.random() < 0.3:
            there = there[: rng.randrange(len(there) + 1)]
        ids = [1000 * number + i for i in range(1, rng.randrange(2, 5))]  # no two calls sample the same
        read = [7] * rng.randrange(0 if there else 1, 3)
        logprobs = [-float(token) for token in ids]
        call = {"prompt_ids": there + read, "ids": ids, "logprobs": logprobs}
        calls.append({**call, "versions": [number, number + 1], "finish_reason": "stop"})
    return calls


@pytest.mark.parametrize("seed", range(100))
def test_every_sampled_token_is_trained_once_and_behind_the_tokens_that_it_was_sampled_behind(
    seed: int,
) -> None:
    calls = tree(random.Random(seed))
    found = branches(calls)
    trained = [
        (tuple(one["completion_ids"][:place]), token, one["sampling_logprobs"][place])
        for one in found
        for place, token in enumerate(one["completion_ids"])
        if one["trained_tokens"][place]
    ]
    sampled = [
        (tuple(call["prompt_ids"] + call["ids"][:i]), token, -float(token))
        for call in calls
        for i, token in enumerate(call["ids"])
    ]
    assert sorted(trained) == sorted(sampled)
    assert sorted(v for one in found for v in one["versions"]) == sorted(
        v for call in calls for v in call["versions"]
    )
    assert all(
        value == 0 or is_trained
        for one in found
        for value, is_trained in zip(one["sampling_logprobs"], one["trained_tokens"], strict=True)
    )


def test_a_call_goes_on_with_the_longest_branch_that_it_extends() -> None:
    def call(prompt_ids: list[int], *ids: int) -> dict[str, Any]:
        return {
            "prompt_ids": prompt_ids,
            "ids": [*ids],
            "logprobs": [-1.0] * len(ids),
            "versions": [0, 0],
            "finish_reason": "stop",
        }

    found = branches([call([1], 2), call([1, 2, 3], 4), call([1, 2], 5), call([1, 2, 5, 6], 7), call([9], 8)])
    assert [one["completion_ids"] for one in found] == [[1, 2, 3, 4], [1, 2, 5, 6, 7], [9, 8]]
    assert [one["trained_tokens"] for one in found] == [
        [False, True, False, True],
        [False, False, True, False, True],
        [False, True],
    ]


def test_each_branch_is_a_completion_with_the_reward_of_its_episode(tmp_path: Path) -> None:
    async def plans(base_url: str, api_key: str) -> float:
        plan = await post(base_url, api_key, [{"role": "user", "content": "Plan."}])
        done = await post(base_url, api_key, [{"role": "user", "content": f"Do {plan}"}])
        return float(len(done))

    async def main() -> None:
        async with World(tmp_path, plans) as world:
            engine = await world.engine(longer)
            row = row_of((await engine.generate(prompt(), SAMPLING))[0])
            check(row, engine.asked)
            assert len(row["completions"]) == 4 and row["reward_parts"][ENVIRONMENT] == [3.0] * 4
            assert TOKENIZER.decode(row["prompt_ids"]) == "<|im_start|>user\n"
            branch = [json.loads(one).get("branch", 0) for one in row["episodes"]]
            assert branch == [0, 1, 0, 1]

    run(main)


@pytest.mark.parametrize("seed", range(30))
def test_the_prompt_of_a_group_is_what_its_completions_begin_with(seed: int) -> None:
    rng = random.Random(seed)
    shared = [rng.randrange(3) for _ in range(rng.randrange(1, 6))]
    whole, masks = [], []
    for _ in range(rng.randrange(2, 5)):
        own = [rng.randrange(3) for _ in range(rng.randrange(4))]
        whole.append([*shared, *own, 5, 6])
        masks.append([False] * (len(shared) + len(own)) + [True, False])
    whole.append([])
    masks.append([])
    num = len(whole)
    table = groups.with_columns(
        prompt(),
        completions=[["x"] * num],
        completion_ids=[whole],
        trained_tokens=[masks],
        episodes=[named(range(num))],
        sampling_logprobs=[[[-1.0 * m for m in mask] for mask in masks]],
        reward_parts=[{ENVIRONMENT: [1.0] * num}],
        reward_reasons=[[None] * num],
    )
    (row,) = groups.rows(with_common_prompt(table))
    assert [(ids, mask) for ids, mask, _ in sequences(row)][:-1] == list(zip(whole, masks, strict=True))[:-1]
    assert row["completion_ids"][-1] == [] and row["reward_reasons"] == [None] * num
    assert row["prompt_ids"][: len(shared)] == shared
    firsts = {tuple(ids[:1]) for ids in row["completion_ids"][:-1]}
    is_at_the_models = any(mask[0] for mask in row["trained_tokens"][:-1])
    assert len(firsts) > 1 or is_at_the_models


@pytest.mark.parametrize("others", [[2], [0], [1], [0, 3], [4, 1]])
def test_episodes_that_begin_with_another_token_than_most_are_left_out_with_their_reason(
    others: list[int],
) -> None:
    """Whichever place they have in the group, the first one too."""
    size = 2 * len(others) + 1
    begins = [2 + others.index(i) if i in others else 1 for i in range(size)]
    table = groups.with_columns(
        prompt(),
        completions=[["x"] * size],
        completion_ids=[[[token, 5 + i] for i, token in enumerate(begins)]],
        trained_tokens=[[[False, True]] * size],
        episodes=[named(range(size))],
        sampling_logprobs=[[[0.0, -1.0]] * size],
        reward_parts=[{ENVIRONMENT: [1.0] * size}],
        reward_reasons=[[None] * size],
    )
    (row,) = groups.rows(with_common_prompt(table))
    assert row["prompt_ids"] == [1]
    assert row["completion_ids"] == [[] if i in others else [5 + i] for i in range(size)]
    assert row["reward_parts"] == {ENVIRONMENT: [None if i in others else 1.0 for i in range(size)]}
    reasons = row["reward_reasons"]
    assert [reason is None for reason in reasons] == [i not in others for i in range(size)]
    assert all("no token" in reasons[i] for i in others)


def test_an_odd_episode_with_many_branches_costs_the_others_nothing() -> None:
    begins = [2] * 5 + [1] * 2
    table = groups.with_columns(
        prompt(),
        completions=[["x"] * 7],
        completion_ids=[[[token, 5 + i] for i, token in enumerate(begins)]],
        trained_tokens=[[[False, True]] * 7],
        episodes=[named([0] * 5 + [1, 2])],
        sampling_logprobs=[[[0.0, -1.0]] * 7],
        reward_parts=[{ENVIRONMENT: [1.0] * 7}],
        reward_reasons=[[None] * 7],
    )
    (row,) = groups.rows(with_common_prompt(table))
    assert row["prompt_ids"] == [1] and row["completion_ids"] == [[]] * 5 + [[10], [11]]
    assert row["reward_parts"] == {ENVIRONMENT: [None] * 5 + [1.0] * 2}


@pytest.mark.parametrize("seed", range(50))
def test_a_text_that_was_sampled_is_read_with_the_tokens_that_were_sampled(seed: int) -> None:
    """Tokens are pieces of a text; a text has many spellings."""
    rng = random.Random(seed)
    pieces = ["a", "b", "ab", "ba", "aba", "bb", "|"]

    def spelled(text: str) -> list[int]:
        ids = []
        while text:
            ids.append(rng.choice([i for i, piece in enumerate(pieces) if text.startswith(piece)]))
            text = text[len(pieces[ids[-1]]) :]
        return ids

    def decode(ids: list[int]) -> str:
        return "".join(pieces[i] for i in ids)

    def words() -> str:
        return "".join(rng.choice("ab") for _ in range(rng.randrange(1, 9))) + "|"

    texts = [words()]
    for _ in range(3):
        texts.append(texts[rng.randrange(len(texts))] + words())
    known = [spelled(text) for text in texts]
    said = rng.choice(texts)
    prompt_ids = spelled(said + words())
    found = serving.as_sampled(prompt_ids, known, decode)
    assert decode(found) == decode(prompt_ids)
    fitting = [ids for ids in known if decode(prompt_ids).startswith(decode(ids))]
    longest = max(map(len, fitting))  # the marks end tokens in every spelling
    assert any(found[: len(ids)] == ids for ids in fitting if len(ids) == longest)
    other = spelled("b" * 20)
    assert serving.as_sampled(other, [spelled("a|")], decode) == other


# ------------------------------------------------------------------------------------------ the config


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("class agent: pass", "is type, not a function"),
        ("def agent(url): pass", "has no parameter base_url"),
        ("agent = 3", "not"),
        ("def other(base_url): pass", "has no function 'agent'"),
        ("import nowhere", "nowhere"),
    ],
)
def test_a_function_that_is_no_agent_is_refused_by_name(code: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(code)
    with pytest.raises(ConfigError, match=r"^environment.agent: .*") as refused:
        read_agent(EnvironmentConfig(agent=f"{file}:agent"))
    assert why in str(refused.value) and "\n" not in str(refused.value)


def test_the_reason_of_a_host_that_does_not_know_an_episode_says_so(tmp_path: Path) -> None:
    host = AgentHost(talk, 60.0, 8, False)
    assert asyncio.run(host.play("nobody", 0, "http://127.0.0.1:1", "t")).reason == GONE


RUN = {"run_dir": "r", "num_steps": 1, "model": {"path": "m"}, "prompts": {"path": "p.jsonl"}}
SERVED = {"engines": {"serve": True}}


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"environment": {"agent": "a.py:f"}}, "environment.agent: .* set engines.serve: true"),
        ({"environment": {}}, "environment: name, .*, or agent, .*: one of the two"),
        ({"environment": {"agent": "a.py:f", "name": "b.py:C"}}, "one of the two"),
        ({"environment": {"agent": "a"}, **SERVED}, "environment.agent: must be path.py:function"),
        ({"environment": {"agent": "a.py:f", "arguments": {"b": 1}}, **SERVED}, "arguments is of an"),
        ({"environment": {"agent": "a.py:f", "renderer": "qwen3"}, **SERVED}, "renderer is of an"),
        ({"environment": {"agent": "a.py:f"}, "replay": {"share": 0.5}, **SERVED}, "replay.share: "),
        ({"engines": {"serve_arguments": {"a": 1}}}, "engines: serve_arguments need serve: true"),
        ({"engines": {"serve": True, "serve_arguments": {"api_key": "k"}}}, "api_key is set by the run"),
    ],
)
def test_a_section_that_no_agent_can_have_is_refused_by_its_key(sections: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        GVPOConfig.from_dict(RUN | sections)


def test_an_agent_is_rewarded_as_an_environment_is() -> None:
    config = GVPOConfig.from_dict(RUN | {"environment": {"agent": "a.py:f"}} | SERVED)
    assert [*config.verifiers.rewards] == [ENVIRONMENT]


# ------------------------------------------------------------------------------------------ what is shown


def test_an_episode_of_several_branches_is_one_where_completions_are_counted_and_metrics_made() -> None:
    entries = [
        {"name": "a", "turns": 3, "end": "stop"},
        {"name": "a", "turns": 3, "end": "stop", "branch": 1},
    ]
    part = groups.with_columns(
        prompt(),
        completions=[["x", "y"]],
        completion_ids=[[[1], [2]]],
        finish_reasons=[["stop"] * 2],
        sources=[["policy"] * 2],
        version_min=[[0, 0]],
        version_max=[[0, 0]],
        sampling_logprobs=[[[-1.0]] * 2],
        episodes=[[json.dumps(one) for one in entries]],
    )
    assert split_kept([part], 3)[2] == 2 and split_kept([part, part], 3)[2] == 1
    assert [one["turns"] for one in episodes_of([{"episodes": part["episodes"][0].as_py()}])] == [3]


def test_the_branches_of_a_finished_episode_free_one_place_at_its_engine() -> None:
    class Engine:
        def __init__(self, *tables: pa.Table) -> None:
            self._tables, self.take_finished = [*tables], self

        async def remote(self) -> tuple[list[int], pa.Buffer]:
            table = self._tables.pop(0)
            return table["group_id"].to_pylist(), groups.to_wire(table)

    names = ["a", "a", "a", "b"]
    entries = [{"name": name, **({"branch": i} if 0 < i < 3 else {})} for i, name in enumerate(names)]
    table = groups.with_columns(
        prompt(),
        completions=[names],
        finish_reasons=[["stop"] * 4],
        episodes=[[json.dumps(entry) for entry in entries]],
    )
    slot = Slot("p", PoolConfig(), 0, capacity=8, load=3)
    slot.in_flight[0] = Request(0.0, [])
    one = SimpleNamespace(_num_collected=0, _changed=lambda: None)
    asyncio.run(Supervisor._collect(one, slot, Engine(table, table[:0])))  # type: ignore[arg-type]
    assert (slot.load, slot.in_flight[0].num_freed) == (1, 2)


def test_the_token_of_a_run_stays_the_same_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "serve_token"
    assert kept_secret(path, "one") == kept_secret(path, "two") == "one"
    assert path.stat().st_mode & 0o777 == 0o600 and [*tmp_path.iterdir()] == [path]

"""The hosts that run agents: engines and hosts that fail, how episodes end, and who may ask."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
from test_agents import (
    RUN,
    SAMPLING,
    SERVED,
    TOKEN,
    DeadError,
    World,
    check,
    longer,
    post,
    prompt,
    row_of,
    run,
    sequences,
    talk,
)

from gvpo_ray import GVPOConfig
from gvpo_ray.config.environment import ENVIRONMENT
from gvpo_ray.engines import serving
from gvpo_ray.environments import agent_host
from gvpo_ray.environments.agent_host import NO_GRADE
from gvpo_ray.verifiers.verifier import Verifier


class Stuck:
    """A policy that says `longer`, until its call of a number, which has no answer."""

    def __init__(self, call: int) -> None:
        self._call, self._num, self.stands = call, 0, asyncio.Event()

    def __call__(self, turns: list[str], number: int) -> Any:
        self._num += 1
        return longer(turns, number) if self._num < self._call else self._wait()

    async def _wait(self) -> str:
        self.stands.set()
        await asyncio.Event().wait()
        return ""


@pytest.mark.parametrize("way", ["dies", "drains", "is cut off from its callers"])
@pytest.mark.parametrize("call", [1, 4, 6])
def test_an_agent_does_not_notice_that_its_engine_goes_and_no_call_is_recorded_twice(
    call: int, way: str, tmp_path: Path
) -> None:
    started = []

    async def noted(base_url: str, api_key: str, prompt: str, answer: str) -> float:
        started.append(api_key)
        return await talk(base_url, api_key, prompt, answer)

    async def main() -> None:
        async with World(tmp_path, noted, num=2) as world:
            stuck = Stuck(call)
            first = await world.engine(stuck, 1)
            work = asyncio.ensure_future(first.generate(prompt(), SAMPLING))
            await stuck.stands.wait()
            kept: tuple[pa.Table, ...] = ()
            if way == "drains":
                await first.drain(0)
                table, missing = await work
                assert missing == 2 - len(table["completions"][0])
                kept = (table,)
            elif way == "dies":
                assert first.made.serving is not None
                await first.made.serving.close()
                work.cancel()
            second = await world.engine(longer, 2)
            table, missing = await second.generate(prompt(), SAMPLING, 0, None, *kept)
            row = row_of(table)
            assert not missing and len(row["completions"]) == 2 and len(started) == len({*started}) == 2
            assert row["reward_reasons"] == [None, None]
            # what both have sampled, and the first was not asked for any more, is the same here
            asked = {(*before, *span.ids): (before, span) for before, span in first.asked + second.asked}
            asked = {tokens: call for tokens, call in asked.items() if call[1].ids}
            check(row, [*asked.values()])
            assert len(asked) == sum(json.loads(one)["turns"] for one in row["episodes"]) == 6
            work.cancel()

    run(main)


def test_a_call_at_an_engine_that_is_dead_but_answers_is_made_at_the_next_one(tmp_path: Path) -> None:
    def is_dead(turns: list[str], number: int) -> str:
        raise DeadError

    async def main() -> None:
        async with World(tmp_path, talk) as world:
            first = await world.engine(is_dead)
            work = asyncio.ensure_future(first.generate(prompt(), SAMPLING))
            while not any(episode.num_asked for episode in world.hosts[0]._episodes.values()):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            row = row_of((await (await world.engine(longer)).generate(prompt(), SAMPLING))[0])
            assert row["reward_reasons"] == [None, None]
            work.cancel()

    run(main)


@pytest.mark.parametrize("num_lost", [1, 3])
def test_a_call_whose_connection_alone_is_lost_is_made_again_at_the_same_engine(
    num_lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a server between that closes its first connections without an answer."""
    monkeypatch.setattr(agent_host, "AGAIN_S", 0.01)
    seen: list[str] = []

    async def main() -> None:
        async with World(tmp_path, talk) as world:
            engine = await world.engine(longer)
            assert engine.made.serving is not None
            there = urlsplit(engine.made.serving.address)

            async def passed_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                head = await reader.readuntil(b"\r\n\r\n")
                seen.append(head.split()[1].decode())
                if len(seen) > num_lost:
                    inside, out = await asyncio.open_connection(there.hostname, there.port)
                    length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
                    out.write(head + await reader.readexactly(length))
                    writer.write(await inside.read())  # to its end: connections are not kept
                    out.close()
                writer.close()

            between = await asyncio.start_server(passed_on, "127.0.0.1", 0)
            engine.made.serving.address = f"http://127.0.0.1:{between.sockets[0].getsockname()[1]}"
            row = row_of((await engine.generate(prompt(), SAMPLING))[0])
            assert row["reward_reasons"] == [None, None]
            turns = sum(json.loads(one)["turns"] for one in row["episodes"])
            assert len(seen) == turns + num_lost
            between.close()

    run(main)


def test_a_host_that_dies_takes_its_episodes_with_it_and_the_others_go_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with World(tmp_path, talk, num=2) as world:
            stuck = Stuck(1)
            first = await world.engine(stuck)
            work = asyncio.ensure_future(first.generate(prompt(), SAMPLING))
            await stuck.stands.wait()
            work.cancel()
            world.clients[0].is_dead = True
            claimed = {name for name in world.hosts[1]._episodes}
            second = await world.engine(longer)
            row = row_of((await second.generate(prompt(), SAMPLING))[0])
            names = {json.loads(one)["name"] for one in row["episodes"]}
            assert len(names) == 2 and claimed < names and row["reward_reasons"] == [None, None]

    run(main)


# ------------------------------------------------------------------------------------------ how episodes end


async def outcome(
    folder: Path, agent: Callable[..., Any], most: int = 2000, **changes: Any
) -> dict[str, Any]:
    async with World(folder, agent, **changes) as world:
        engine = await world.engine(longer)
        sampling = SAMPLING.model_copy(update={"max_tokens": most})
        row = row_of((await engine.generate(prompt(), sampling))[0])
        check(row, engine.asked)
        return {**row, "ends": [json.loads(one)["end"] for one in row["episodes"]]}


async def raises(base_url: str, api_key: str) -> float:
    await post(base_url, api_key, [{"role": "user", "content": "?"}])
    raise KeyError(f"no {api_key}")


async def waits(base_url: str) -> float:
    await asyncio.Event().wait()
    return 1.0


async def grades(base_url: str, api_key: str) -> str:
    return "said " + await post(base_url, api_key, [{"role": "user", "content": "?"}])


async def asks_for_ever(base_url: str, api_key: str) -> float:
    messages = [{"role": "user", "content": "?"}]
    try:
        while True:
            said = await post(base_url, api_key, messages)
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "?"}]
    except RuntimeError as error:
        assert str(error).startswith("400: ")
        return 1.0


async def nothing(base_url: str) -> None:
    return None


@pytest.mark.parametrize(
    ("agent", "changes", "end", "reason", "reward"),
    [
        (raises, {}, "lost", "environment: the agent raised KeyError", None),
        (waits, {"timeout_s": 0.05}, "lost", "timeout: environment: the agent: no call of the model", None),
        (nothing, {}, "stop", "environment: the agent gave None", None),
        (grades, {}, "stop", NO_GRADE, None),
        (grades, {"is_graded": True}, "stop", None, None),
        (asks_for_ever, {"max_turns": 3}, "max_turns", None, 1.0),
        (asks_for_ever, {"max_turns": 1000, "most": 300}, "length", None, 1.0),
    ],
)
def test_each_way_to_end_has_its_name_and_none_is_worth_0(
    agent: Any, changes: dict[str, Any], end: str, reason: str | None, reward: float | None, tmp_path: Path
) -> None:
    row = asyncio.run(outcome(tmp_path, agent, **changes))
    assert row["ends"] == [end] * 2
    assert row["reward_parts"] == {ENVIRONMENT: [reward] * 2}
    for told in row["reward_reasons"]:
        assert told is None if reason is None else told.startswith(reason)
    if agent is grades:
        assert row["completions"] == ["said aaa", "said bbb"]
    if agent is raises:
        assert row["reward_reasons"] == ["environment: the agent raised KeyError: 'no …'"] * 2
    if end == "length":
        assert all(250 < len(ids) <= 303 for ids, _, _ in sequences(row))
        assert row["finish_reasons"] == ["length"] * 2


def test_an_agents_time_stands_still_while_its_model_answers(tmp_path: Path) -> None:
    async def main() -> None:
        async with World(tmp_path, talk, timeout_s=1e9) as world:
            stuck = Stuck(2)
            engine = await world.engine(stuck)
            work = asyncio.ensure_future(engine.generate(prompt(), SAMPLING))
            await stuck.stands.wait()
            limits = [episode.limit for episode in world.hosts[0]._episodes.values()]
            assert any(limit is not None and limit.when() is None for limit in limits)
            work.cancel()

    run(main)


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("is_asking", [False, True])
def test_an_agent_whose_group_is_given_up_ends(in_thread: bool, is_asking: bool, tmp_path: Path) -> None:
    """It waits for an answer of its model, which never comes, or has not begun to ask."""
    ended, may_ask, begun = asyncio.Event(), threading.Event(), asyncio.Event()

    async def coroutine(base_url: str, api_key: str) -> float:
        begun.set()
        try:
            if is_asking:
                await post(base_url, api_key, [{"role": "user", "content": "?"}])
            await asyncio.Event().wait()
        finally:
            ended.set()
        return 1.0

    async def main() -> None:
        soon = asyncio.get_running_loop().call_soon_threadsafe

        def plain(base_url: str, api_key: str) -> float:
            soon(begun.set)
            try:
                if not is_asking:
                    may_ask.wait(60)
                asyncio.run(post(base_url, api_key, [{"role": "user", "content": "?"}]))
            finally:
                soon(ended.set)
            return 1.0

        async with World(tmp_path, plain if in_thread else coroutine, timeout_s=1e9) as world:
            stuck, host = Stuck(1), world.hosts[0]
            engine = await world.engine(stuck)
            work = asyncio.ensure_future(engine.generate(prompt(), SAMPLING))
            await (stuck.stands if is_asking else begun).wait()
            episodes = [*host._episodes.values()]
            await host.release(episodes[0].group_id)
            may_ask.set()
            played = [await episode.task for episode in episodes if episode.task is not None]
            await asyncio.wait_for(ended.wait(), 60)
            assert (await host.status())["num_episodes"] == 0
            assert played and {one.end for one in played} == {"lost"}
            assert all(one.reward is None and one.reason for one in played)
            work.cancel()

    run(main)


@pytest.mark.parametrize("is_listening", [False, True])
def test_a_group_that_is_given_up_while_the_host_begins_to_listen_costs_no_other_episode(
    is_listening: bool, tmp_path: Path
) -> None:
    async def agent(base_url: str) -> float:
        return 1.0

    async def main() -> None:
        async with World(tmp_path, agent) as world:
            (host,) = world.hosts
            (first,), (second,) = await host.open(0, {}, 1), await host.open(1, {}, 1)
            given_up = asyncio.ensure_future(host.play(first.name, 0, "http://x", TOKEN))
            while host._episodes[first.name].task is None or (is_listening and host._starting is None):
                await asyncio.sleep(0)
            assert host._starting is None or not host._starting.done()
            await host.release(0)
            assert (await asyncio.wait_for(given_up, 60)).end == "lost"
            assert (await asyncio.wait_for(host.play(second.name, 0, "http://x", TOKEN), 60)).reward == 1.0

    run(main)


def test_a_text_of_an_agent_is_graded_and_an_agent_that_fails_is_not(tmp_path: Path) -> None:
    async def says_or_fails(base_url: str, api_key: str) -> str:
        if await post(base_url, api_key, [{"role": "user", "content": "?"}]) == "bbb":
            raise KeyError("b")
        return "10"

    config = GVPOConfig.from_dict(
        RUN
        | {"environment": {"agent": "a.py:f"}, "verifiers": {"rewards": {"exact_match": {"trusted": True}}}}
        | SERVED
    )

    async def main() -> pa.Table:
        async with World(tmp_path, says_or_fails, is_graded=True) as world:
            return (await (await world.engine(longer)).generate(prompt(), SAMPLING))[0]

    with Verifier(config.verifiers) as verifier:
        row = row_of(verifier.score(asyncio.run(main())))
    assert sorted(row["rewards"], key=str) == [1.0, None]
    failed = row["rewards"].index(None)
    assert row["reward_reasons"][failed].startswith("environment: the agent raised KeyError")
    assert row["reward_reasons"][1 - failed] is None


def test_a_synchronous_agent_runs_in_a_thread_and_asks_with_another_clients_headers(tmp_path: Path) -> None:
    def plain(base_url: str, api_key: str, model: str, **row: Any) -> float:
        body = json.dumps({"model": "gpt-5", "messages": [{"role": "user", "content": row["prompt"]}]})
        request = urllib.request.Request(f"{base_url}/chat/completions", body.encode())
        request.add_header("x-api-key", api_key)
        with urllib.request.urlopen(request) as answer:
            said = json.load(answer)
        assert said["model"] == model == "policy" and answer.headers["Content-Type"] == "application/json"
        return 0.5

    row = asyncio.run(outcome(tmp_path, plain))
    assert row["reward_parts"] == {ENVIRONMENT: [0.5] * 2} and row["ends"] == ["stop"] * 2


# ------------------------------------------------------------------------------------------ who may ask


def test_nobody_asks_without_the_key_of_an_episode_or_the_token_of_the_run(tmp_path: Path) -> None:
    def status_of(url: str, **headers: str) -> int:
        request = urllib.request.Request(url, b'{"messages": []}', headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return int(answer.status)
        except HTTPError as error:
            error.close()
            return error.code

    async def asks(base_url: str, api_key: str) -> float:
        def of(*keys: str) -> list[int]:
            found = [status_of(f"{base_url}/chat/completions", Authorization=f"Bearer {key}") for key in keys]
            return [*found, status_of(f"{base_url}/chat/completions")]

        keys = ("", "wrong", TOKEN, api_key[:-1])
        assert await asyncio.to_thread(of, *keys) == [401] * 5
        elsewhere = base_url.replace("/v1", "x/v1")
        assert await asyncio.to_thread(status_of, elsewhere, Authorization=f"Bearer {api_key}") == 401
        return 1.0

    async def main() -> None:
        async with World(tmp_path, asks) as world:
            engine = await world.engine(longer)
            row = row_of((await engine.generate(prompt(), SAMPLING))[0])
            assert row["reward_reasons"] == [None, None]
            assert row["reward_parts"] == {ENVIRONMENT: [1.0, 1.0]} and not engine.asked
            served = engine.made.serving
            assert served is not None and TOKEN not in repr(serving.Serve(TOKEN, True))
            for path in ("/v1/models", "/health", "/episodes/x/v1/chat/completions", "/metrics"):
                url = served.address + path
                assert await asyncio.to_thread(status_of, url) == 401
                assert await asyncio.to_thread(status_of, url, Authorization="Bearer wrong") == 401
            url = f"{served.address}/episodes/x/v1/chat/completions"
            assert await asyncio.to_thread(status_of, url, Authorization=f"Bearer {TOKEN}") == 503

    run(main)


@pytest.mark.parametrize(
    "path", ["..", "%2e%2e", "v1/../..", "v1%2f..%2f..", "%252e%252e", "v1/models%3f/../.."]
)
def test_no_path_of_an_episode_leads_to_another_one_or_out_of_it(path: str, tmp_path: Path) -> None:
    def answer_of(base_url: str, api_key: str) -> int:
        _, _, host, name, _ = base_url.split("/")
        connection = http.client.HTTPConnection(host)
        with contextlib.closing(connection):  # urllib would leave out the dots itself
            own = {"Authorization": f"Bearer {api_key}"}
            connection.request("POST", f"/{name}/{path}/../v1/models", b"{}", own)
            return connection.getresponse().status

    async def asks(base_url: str, api_key: str) -> float:
        return float(await asyncio.to_thread(answer_of, base_url, api_key))

    async def main() -> None:
        async with World(tmp_path, asks) as world:
            engine = await world.engine(longer)
            served = engine.made.serving
            assert served is not None

            async def other(scope: Any, receive: Any, send: Any) -> None:
                raise AssertionError(scope["path"])

            served._app = other
            row = row_of((await engine.generate(prompt(), SAMPLING))[0])
            assert row["reward_parts"] == {ENVIRONMENT: [404.0] * 2}

    run(main)


def test_log_probs_of_the_route_for_tokens_have_both_spellings() -> None:
    content = [{"token_id": 7, "logprob": -0.5}, {"token_id": 8, "logprob": -1.0, "token": "x"}]
    body = json.dumps({"choices": [{"logprobs": {"content": content}}, {"logprobs": None}]}).encode()
    choices = json.loads(serving._with_both_spellings(body))["choices"]
    assert [one["token"] for one in choices[0]["logprobs"]["content"]] == ["token_id:7", "x"]
    stream = b'data: {"choices": []}\n\n'
    assert serving._with_both_spellings(stream) == stream

"""An agent host runs a user's agents, and forwards their calls of the model to the engine of their episode.

    agent ─► http://127.0.0.1:…/<episode>/v1/chat/completions ─► forwarder ─► the engine that has the episode

An agent is a function that knows an address and a key alone. When its engine dies or leaves, its call waits
until another engine has taken the episode over, and is made there: the agent sees a slow answer. The host
holds the calls of an episode, with their tokens, so that an engine's death loses none.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import secrets
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from gvpo_ray.config.shown import MASK, know, mask
from gvpo_ray.config.verifiers import ReasonKind
from gvpo_ray.data.calls import well_formed
from gvpo_ray.environments.host import GONE, Opened
from gvpo_ray.environments.tasksets import Tasks
from gvpo_ray.sandbox.functions import describe, fits_float32, guarded

CALLS_HEADER = "x-gvpo-calls"
"""Header of an engine's answer: the number of bytes of JSON behind the body (engines/serving.py)."""

MODEL = "policy"
"""What an agent's model is called. Any other name means it too."""

MAX_THREADS = 1024
"""Most agents at once that are no coroutines."""

MAX_HUNG = 8
"""Number of agents, late and still in their threads, which nothing can end, at which the host's process ends
and is started again."""

AGAIN_S = 0.5
"""Seconds after which a call that got no answer is made again, unless the episode moves to another engine."""

MAX_BODY = 1 << 26
"""Largest request of an agent, in bytes."""

NO_GRADE = "environment: the agent returned a text, and verifiers.rewards has no function that grades it"

OVER = "the key is of no episode that runs"

Call = dict[str, Any]
"""One call of the model: prompt_ids, ids, logprobs, versions (oldest and newest) and finish_reason."""


@dataclass
class Played:
    """Played is what an agent has done."""

    calls: list[Call] = field(default_factory=list)
    """In the order of their answers."""
    reward: float | None = None
    text: str | None = None
    """What it has returned, if that is a text to be graded."""
    reason: str | None = None
    """Why there is no reward."""
    end: str = "stop"
    """"stop", "max_turns", "length" (a prompt left no room) or "lost": the agent raised for no such cause."""


@dataclass(frozen=True)
class _Route:
    """A _Route says where an episode's calls go."""

    url: str
    token: str


@dataclass(eq=False)
class _Episode:
    name: str
    group_id: int
    row: Mapping[str, Any]
    lease: int = 0
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    played: Played = field(default_factory=Played)
    route: _Route | None = None
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and replaced, when another engine takes over."""
    task: asyncio.Task[Played] | None = None
    in_thread: Future[Any] | None = None
    """An agent that is no coroutine."""
    limit: asyncio.Timeout | None = None
    num_asked: int = 0
    num_waiting: int = 0
    """Calls without an answer yet; while there are any, the agent's time stands still."""
    is_over: bool = False

    def goes_to(self, route: _Route) -> None:
        if route != self.route:
            self.route, moved, self.moved = route, self.moved, asyncio.Event()
            moved.set()

    def give_up(self) -> None:
        """End its agent: a coroutine at once, and one in a thread by the refusal of all its calls.

        What goes on in a thread without calls ends at its time limit, as it would have before.
        """
        self.is_over, self.route = True, None
        self.moved.set()
        if self.task is not None and (self.in_thread is None or self.in_thread.cancel()):
            self.task.cancel()


class HangError(Exception):
    """An agent did nothing within its time limit; `_why` makes the reason of an episode of it."""


class AgentHost:
    """An AgentHost runs agents.

    Args:
        agent: the function: `agent(base_url, api_key, model, **row)`, of which it gets what it has parameters
            for; it returns a reward, None, or a text for reward functions to grade. It may be async.
        timeout_s: seconds that an agent may take between two calls of its model, before the first and after
            the last one.
        max_turns: most calls of the model in an episode.
        is_graded: whether some reward function grades texts.
    """

    def __init__(self, agent: Callable[..., Any], timeout_s: float, max_turns: int, is_graded: bool) -> None:
        self._agent, self._timeout_s, self._max_turns = agent, timeout_s, max_turns
        self._is_graded = is_graded
        self._episodes: dict[str, _Episode] = {}
        self._threads, self._late = ThreadPoolExecutor(MAX_THREADS), list[Future[Any]]()
        self._starting: asyncio.Task[str] | None = None
        self._token = ""

    # --- what engines ask ---------------------------------------------------------------------------------

    async def open(self, group_id: int, row: Mapping[str, Any], num: int) -> list[Opened]:
        """Begin `num` episodes of a group; their agents start when an engine plays them."""
        made = [_Episode(uuid.uuid4().hex, group_id, row) for _ in range(num)]
        self._episodes |= {episode.name: episode for episode in made}
        return [Opened(episode.name, 0, None) for episode in made]

    async def claim(self, group_id: int, without: Iterable[str] = ()) -> list[Opened]:
        """Take over the episodes of a group that there are, but for those of the names `without`."""
        left_out = set(without)
        found = [e for e in self._episodes.values() if e.group_id == group_id and e.name not in left_out]
        for episode in found:
            episode.lease += 1
        return [
            Opened(one.name, one.lease, None, {"completion_ids": [], "calls": one.played.calls})
            for one in found
        ]

    async def play(self, name: str, lease: int, url: str, token: str) -> Played:
        """Let an episode's agent ask the engine at a URL, start it if it does not run, and wait for its end.

        Args:
            name: of the episode.
            lease: from Opened.
            url: of the engine's server for this episode.
            token: of that server.
        """
        episode = self._episodes.get(name)
        if episode is None or episode.lease != lease:
            return Played(reason=GONE, end="lost")
        if token != self._token:
            self._token = token
            know({"token": token})
        episode.goes_to(_Route(url, token))
        if episode.task is None:
            episode.task = asyncio.create_task(self._play(episode))
        try:
            return await asyncio.shield(episode.task)
        except asyncio.CancelledError:
            if not episode.task.cancelled():
                raise
            return Played(reason=GONE, end="lost")  # given up before its task began

    async def release(self, group_id: int) -> None:
        """Forget the episodes of a group, which nobody will claim, and end the agents that still run."""
        for name in [e.name for e in self._episodes.values() if e.group_id == group_id]:
            self._episodes.pop(name).give_up()

    async def status(self) -> dict[str, Any]:
        """Return the number of episodes, and the pid."""
        return {"num_episodes": len(self._episodes), "pid": os.getpid(), "unprotected": []}

    # --- the agent ----------------------------------------------------------------------------------------

    async def _play(self, episode: _Episode) -> Played:
        if self._starting is None:
            self._starting = asyncio.create_task(self._listen())
        address = await asyncio.shield(self._starting)  # others wait for it, too, when this one is given up
        known = {"base_url": f"{address}/{episode.name}/v1", "api_key": episode.key, "model": MODEL}
        played = episode.played
        try:
            value = await self._result(episode, {**episode.row, **known})
            played.reward, played.text, played.reason = self._judged(value)
        except Exception as error:  # a user's function may raise anything
            played.reason = _why(error).replace(episode.key, MASK)
            if played.end == "stop":  # else it fell over the refusal of a further call
                played.end = "lost"
        except asyncio.CancelledError:
            if not episode.is_over:
                raise
            played.reason, played.end = GONE, "lost"
        episode.is_over = True
        return played

    def _judged(self, value: Any) -> tuple[float | None, str | None, str | None]:
        """Return the reward, the text and the reason of what an agent has returned."""
        if isinstance(value, str):
            return None, well_formed(value), None if self._is_graded else NO_GRADE
        if value is None:
            return None, None, "environment: the agent gave None"
        reward = float(value)
        if not fits_float32(reward):
            return None, None, f"environment: the agent gave {reward:g}, which is no finite float32"
        return reward, None, None

    async def _result(self, episode: _Episode, known: Mapping[str, Any]) -> Any:
        """Call the agent within its time limit, which does not run while the model answers."""
        arguments = _fitting(self._agent, known)
        in_thread: Future[Any] | None = None
        if isinstance(self._agent, Tasks):
            await self._agent.begin()
        try:
            async with asyncio.timeout(None) as episode.limit:
                if _is_async(self._agent):
                    self._time_runs(episode)
                    return await self._agent(**arguments)
                soon = asyncio.get_running_loop().call_soon_threadsafe

                def work() -> Any:
                    soon(self._time_runs, episode)  # not before: many may wait for a thread
                    return guarded(self._agent, (), arguments)

                in_thread = episode.in_thread = self._threads.submit(work)
                return await asyncio.wrap_future(in_thread)
        except TimeoutError:
            if episode.limit is None or not episode.limit.expired():  # the agent's own
                raise
        finally:
            episode.limit = None
        if in_thread is not None and not in_thread.cancel():
            self._late = [one for one in (*self._late, in_thread) if not one.done()]
            if len(self._late) >= MAX_HUNG:  # soon, so that this answer still arrives
                asyncio.get_running_loop().call_later(1.0, os._exit, 1)
        raise HangError(f"no call of the model, and no end, within {self._timeout_s:g} s")

    def _time_runs(self, episode: _Episode) -> None:
        """Let the agent's time run anew, or stand still while a call waits for its answer."""
        if episode.limit is not None and not episode.limit.expired():
            now = asyncio.get_running_loop().time()
            episode.limit.reschedule(None if episode.num_waiting else now + self._timeout_s)

    # --- its calls ----------------------------------------------------------------------------------------

    async def _listen(self) -> str:
        """Start the forwarder on this machine's loopback address; return its URL."""
        from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

        self._session = ClientSession(
            # a connection that is kept may be closed by the engine's server just as a call goes out on it
            connector=TCPConnector(limit=0, force_close=True),
            timeout=ClientTimeout(total=None),
            auto_decompress=False,
        )
        application = web.Application(client_max_size=MAX_BODY)
        application.router.add_route("*", "/{name}/{path:.*}", self._forward)
        # an agent that waits no longer must leave no call
        self._runner = web.AppRunner(application, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}"

    async def _forward(self, request: Any) -> Any:
        from aiohttp import web

        episode = self._episodes.get(request.match_info["name"])
        if episode is None or episode.is_over or not _has_key(request.headers, episode.key):
            return _refusal(web, 401, OVER)
        if ".." in request.match_info["path"].split("/"):
            return _refusal(web, 404, "an episode has no such path")
        if request.method == "POST":
            episode.num_asked += 1
            if episode.num_asked > self._max_turns:
                episode.played.end = "max_turns"
                return _refusal(web, 400, f"environment.max_turns: {self._max_turns} calls of the model")
        body = _with_our_model(await request.read())
        episode.num_waiting += 1
        self._time_runs(episode)
        try:
            status, headers, answer = await self._answered(episode, request, body)
        finally:
            episode.num_waiting -= 1
            self._time_runs(episode)
        if num := int(headers.get(CALLS_HEADER, 0)):
            answer, behind = answer[:-num], json.loads(answer[-num:])
            episode.played.calls += behind["calls"]
            if behind["has_no_room"]:
                episode.played.end = "length"
        kind = {"Content-Type": headers["Content-Type"]} if "Content-Type" in headers else {}
        return web.Response(status=status, body=answer, headers=kind)

    async def _answered(
        self, episode: _Episode, request: Any, body: bytes
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Return the answer of the episode's engine; of the next one, where an engine dies or leaves.

        Where the connection alone was lost, as it may be at any time, the same engine is asked again.
        """
        from aiohttp import ClientError

        while True:
            route, moved = episode.route, episode.moved
            if route is None:  # given up: the agent runs since there is one
                return 410, {"Content-Type": "application/json"}, json.dumps(_error(410, OVER)).encode()
            asking = asyncio.create_task(self._ask(route, request, body))
            moving = asyncio.create_task(moved.wait())
            try:
                await asyncio.wait([asking, moving], return_when=asyncio.FIRST_COMPLETED)
                if asking.done():
                    with contextlib.suppress(ClientError, OSError):  # the engine is gone
                        status, headers, answer = asking.result()
                        if status != 503:  # it leaves
                            return status, headers, answer
                await asyncio.wait([moving], timeout=AGAIN_S)
            finally:
                asking.cancel()
                moving.cancel()

    async def _ask(self, route: _Route, request: Any, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        left_out = ("host", "authorization", "x-api-key", "content-length", "connection", "accept-encoding")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in left_out}
        headers |= {"Authorization": f"Bearer {route.token}", "Accept-Encoding": "identity"}
        url = f"{route.url}/{quote(request.match_info['path'])}"
        if request.query_string:
            url += f"?{request.query_string}"
        async with self._session.request(request.method, url, data=body, headers=headers) as answer:
            return answer.status, answer.headers, await answer.read()


def _is_async(function: Callable[..., Any]) -> bool:
    """Return whether a function, or an object that is called as one, is a coroutine's."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _fitting(function: Callable[..., Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the known arguments that a function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(known)
    return {parameter.name: known[parameter.name] for parameter in parameters if parameter.name in known}


def _why(error: Exception) -> str:
    if isinstance(error, HangError):
        return f"{ReasonKind.TIMEOUT}: environment: the agent: {error}"
    return f"environment: the agent raised {mask(describe(error))}"


def _has_key(headers: Mapping[str, str], key: str) -> bool:
    given = headers.get("Authorization", "").partition(" ")[2] or headers.get("x-api-key", "")
    return secrets.compare_digest(given.encode(), key.encode())


def _with_our_model(body: bytes) -> bytes:
    """Return a request that asks for the policy, whatever model its agent has named."""
    try:
        asked = json.loads(body)
    except ValueError:
        return body
    return json.dumps({**asked, "model": MODEL}).encode() if isinstance(asked, dict) else body


def _refusal(web: Any, status: int, text: str) -> Any:
    return web.json_response(_error(status, text), status=status)


def _error(status: int, text: str) -> dict[str, Any]:
    error = {"message": text, "type": "invalid_request_error", "param": None, "code": status}
    return {"error": error}

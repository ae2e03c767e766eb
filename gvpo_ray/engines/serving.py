"""An engine serves an HTTP application, and an agent's calls of it become its episode.

    agent ─► its host's forwarder ─► /episodes/<name>/v1/… ─► the application ─► Serving.sample ─► the engine

The application is vLLM's own (vllm_server.py): it renders messages, reads tool calls and writes the answer.
What it would ask vLLM for an episode it asks the engine for, as any other call of the model, so that seeds,
the sampling section, drains and new weights are the same as elsewhere. The answer to an episode's request is
followed by the calls that it took, with their tokens. All other paths are the application's as they are.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import socket
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from gvpo_ray.config.shown import know
from gvpo_ray.engines.rollout import CutOff, Span
from gvpo_ray.errors import GvpoError

App = Callable[..., Awaitable[None]]
"""An ASGI application: `await app(scope, receive, send)`."""

Message = MutableMapping[str, Any]

Ask = Callable[[list[int], int | None, Sequence[str | int]], Awaitable[Span]]
"""`await ask(ids, max_tokens, stop)` -> what the model writes behind `ids` (Transcript.ask)."""

CALLS_HEADER = b"x-gvpo-calls"
"""Header of the answer to an episode's request: the number of bytes of JSON behind the application's body."""

GENERATE = "/inference/v1/generate"
"""vLLM's route for tokens, of which clients want another spelling than vLLM has."""


@dataclass(frozen=True)
class Serve:
    """A Serve says how the engines of a run serve."""

    token: str = field(repr=False)
    """Bearer token of all requests."""
    is_local: bool
    """Whether all engines are on this machine alone, so that they listen on its loopback address."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's server."""

    def host(self) -> str:
        """Return the address to listen on, in the process of an engine."""
        import ray

        if self.is_local:
            return "127.0.0.1"
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


class NoRoomError(GvpoError, ValueError):
    """An agent's prompt leaves no room for a token in its episode."""


@dataclass
class _Request:
    """A _Request is a request of an episode, with what its calls of the model have sampled."""

    ask: Ask
    known: list[list[int]]
    """Tokens of the episode's calls so far, each with its prompt."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    is_cut: bool = False
    has_no_room: bool = False


_request: ContextVar[_Request | None] = ContextVar("_request", default=None)


def is_of_episode() -> bool:
    """Return whether the request that is being answered is an episode's."""
    return _request.get() is not None


def as_sampled(ids: list[int], known: Sequence[list[int]], decode: Callable[[list[int]], str]) -> list[int]:
    """Return a prompt that has the tokens of an earlier call in place of another spelling of the same text.

    A client sends texts, and a text that was sampled is seldom spelled with the same tokens when it is
    tokenised anew. With the tokens that were sampled the prompt says the same, and goes on with that call.

    Args:
        ids: the prompt.
        known: the tokens of earlier calls, with their prompts.
        decode: returns the text of tokens, special ones included.
    """
    for before in sorted(known, key=len, reverse=True):
        if ids[: len(before)] == before:
            return ids
        text = decode(before)
        end = bisect_left(range(len(ids) + 1), len(text), key=lambda size: len(decode(ids[:size])))
        if end <= len(ids) and decode(ids[:end]) == text:
            return [*before, *ids[end:]]
    return ids


async def sample(
    ids: list[int],
    max_tokens: int | None,
    stop: Sequence[str | int] = (),
    decode: Callable[[list[int]], str] | None = None,
    deaths: tuple[type[Exception], ...] = (),
) -> tuple[list[int], Span]:
    """Sample for the episode whose request is being answered, and note the call.

    Args:
        ids: the prompt.
        max_tokens: the most to sample; None: as many as there is room for.
        stop: texts and tokens that end the call, beside those that end every one.
        decode: of as_sampled; None: the prompt came as tokens.
        deaths: what is raised where the engine is dead, so that the request will be made at another one.

    Returns:
        The prompt as the model has read it, and what was sampled.

    Raises:
        NoRoomError: the prompt is as long as the episode may be.
        CutOff: the engine leaves; the request will be made at another one.
    """
    request = _request.get()
    assert request is not None
    if decode is not None:
        ids = as_sampled(ids, request.known, decode)
    try:
        span = await request.ask(list(ids), max_tokens, stop)
    except Exception as error:
        request.is_cut = isinstance(error, (CutOff, *deaths))
        raise
    if not span.ids:
        request.has_no_room = True
        raise NoRoomError(
            f"the prompt has {len(ids)} tokens, which leave no room for another one in this episode "
            "(sampling.max_tokens bounds all of it, behind the data's prompt)"
        )
    request.known.append([*ids, *span.ids])
    request.calls.append(
        {
            "prompt_ids": list(ids),
            "ids": span.ids,
            "logprobs": span.logprobs,
            "versions": [min(span.versions), max(span.versions)],
            "finish_reason": span.finish_reason,
        }
    )
    return ids, span


class Serving:
    """Serving serves an application over HTTP, to those who have the token.

    Args:
        app: the application.
        token: the token; a request has it as a bearer token, or as `x-api-key`.
        host: the address to listen on.
    """

    def __init__(self, app: App, token: str, host: str) -> None:
        know({"token": token})
        self._app, self._token, self._host = app, token, host
        self._episodes: dict[str, tuple[Ask, list[list[int]]]] = {}
        self.address = ""
        """The URL of the server; "" until it is started."""

    async def start(self) -> None:
        """Listen on a free port.

        Raises:
            OSError: this machine does not have the address.
        """
        import uvicorn

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # they are the engine's

        listener = socket.create_server((self._host, 0), family=_family(self._host))
        shown = f"[{self._host}]" if ":" in self._host else self._host
        self.address = f"http://{shown}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
        )
        self.server = Server(config)
        self._serving = asyncio.create_task(self.server.serve(sockets=[listener]))
        while not self.server.started:
            if self._serving.done():
                self._serving.result()
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Stop listening, and drop the connections."""
        if self.address:
            state = self.server.server_state
            for task in list(state.tasks):
                task.cancel()
            for connection in list(state.connections):
                if connection.transport is not None:
                    connection.transport.abort()
            self.server.should_exit = self.server.force_exit = True
            await self._serving

    @contextlib.contextmanager
    def episode(self, name: str, ask: Ask, known: Sequence[list[int]] = ()) -> Iterator[tuple[str, str]]:
        """Answer the requests of an episode for a while; yield their URL, without /v1, and the token.

        Args:
            name: of the episode.
            ask: samples for it.
            known: the tokens of its calls at other engines, with their prompts.
        """
        self._episodes[name] = ask, [*known]
        try:
            yield f"{self.address}/episodes/{name}", self._token
        finally:
            del self._episodes[name]

    async def _answer(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if not self._is_allowed(scope):
            await _plain(send, 401, "the token is not this run's")
            return
        # vLLM asks for it too, and knows bearer tokens alone
        others = [pair for pair in scope["headers"] if pair[0] != b"authorization"]
        scope["headers"] = [*others, (b"authorization", b"Bearer " + self._token.encode())]
        _, _, rest = scope["path"].partition("/episodes/")
        name, _, path = rest.partition("/")
        if not name:
            if scope["path"] == GENERATE:
                await self._app(scope, receive, (answer := _Whole()).send)
                await answer.pass_on(send, _with_both_spellings(answer.body))
                return
            await self._app(scope, receive, send)
            return
        if (episode := self._episodes.get(name)) is None:
            await _plain(send, 503, "this engine does not have the episode")
            return
        request = _Request(*episode)
        _request.set(request)  # for this request's task, and those that it starts
        inner = {**scope, "path": f"/{path}", "raw_path": f"/{path}".encode()}
        answer = _Whole()
        try:
            await self._app(inner, receive, answer.send)
        except Exception:  # Starlette raises what it has answered once more
            if not request.is_cut and not answer.is_begun:
                raise
        if request.is_cut or name not in self._episodes:
            await _plain(send, 503, "this engine leaves")
            return
        body = answer.body
        if path == GENERATE.removeprefix("/"):
            body = _with_both_spellings(body)
        behind = json.dumps({"calls": request.calls, "has_no_room": request.has_no_room}).encode()
        await answer.pass_on(send, body + behind, (CALLS_HEADER, str(len(behind)).encode()))

    def _is_allowed(self, scope: Message) -> bool:
        headers = dict(scope["headers"])
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            given = headers.get(b"x-api-key", b"")
        return hmac.compare_digest(given, self._token.encode())


class _Whole:
    """A _Whole holds an application's answer back until the whole of it is there."""

    def __init__(self) -> None:
        self._start: Message = {}
        self.body = b""

    @property
    def is_begun(self) -> bool:
        return bool(self._start)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")

    async def pass_on(self, send: Any, body: bytes, *headers: tuple[bytes, bytes]) -> None:
        others = [pair for pair in self._start["headers"] if pair[0].lower() != b"content-length"]
        length = (b"content-length", str(len(body)).encode())
        await send({**self._start, "headers": [*others, length, *headers]})
        await send({"type": "http.response.body", "body": body})


def _with_both_spellings(body: bytes) -> bytes:
    """Return an answer of GENERATE in which each log-prob's token has vLLM's name and that of `renderers`.

    vLLM 0.32 writes `token_id: 7`; renderers 0.1.12 wants `token: "token_id:7"`, and raises without it.
    """
    try:
        answer = json.loads(body)
    except ValueError:  # a stream
        return body
    for choice in answer.get("choices") or ():
        for one in (choice.get("logprobs") or {}).get("content") or ():
            if "token_id" in one:
                one.setdefault("token", f"token_id:{one['token_id']}")
    return json.dumps(answer).encode()


async def _plain(send: Any, status: int, text: str) -> None:
    body = json.dumps({"error": {"message": text, "type": "invalid_request_error", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET

"""Reward functions that are served over HTTP, and the trusted ones that call a service themselves."""

from __future__ import annotations

import contextlib
import email.utils
import errno
import gzip
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import gvpo_ray
from gvpo_ray import groups
from gvpo_ray.config.verifiers import RewardConfig, VerifiersConfig
from gvpo_ray.sandbox.functions import OutOfReach, call
from gvpo_ray.verifiers import http_reward
from gvpo_ray.verifiers.http_reward import HttpReward, _asked_pause, _parsed
from gvpo_ray.verifiers.outages import RewardError
from gvpo_ray.verifiers.verifier import Verifier


class _Judge(BaseHTTPRequestHandler):
    """Rewards a completion with its length; fails as often as it is told to."""

    requests: list[dict[str, Any]]
    failures: list[int]
    more: dict[str, str]
    """Further header lines of its answers."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).requests.append(body)
        status = type(self).failures.pop(0) if type(self).failures else 200
        answer = json.dumps(
            {"rewards": [len(text) if text != "null" else None for text in body["completions"]]}
        ).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        for name, value in type(self).more.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def judge() -> Iterator[str]:
    _Judge.requests, _Judge.failures, _Judge.more = [], [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/score"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_reward_over_http_comes_in_batches_and_is_tried_again(judge: str) -> None:
    _Judge.failures = [503, 429]
    config = VerifiersConfig(
        rewards={"judge": {"url": judge, "weight": 0.5, "batch_size": 2, "arguments": {"rubric": "short"}}}
    )
    with Verifier(config) as verifier:
        scored = verifier.score(
            groups.table([{"group_id": 3, "prompt": "p", "answer": "1", "completions": ["a", "null", "ccc"]}])
        )
    assert scored["rewards"].to_pylist() == [[0.5, None, 1.5]]
    # twice refused, then answered, then the rest
    assert [len(body["completions"]) for body in _Judge.requests] == [2, 2, 2, 1]
    assert _Judge.requests[-1] == {
        "prompts": ["p"],
        "completions": ["ccc"],
        "columns": {"group_id": [3], "answer": ["1"]},
        "rubric": "short",
    }


def _score(verifier: Verifier, number: int = 2, **more: Any) -> Any:
    row = {"group_id": 3, "prompt": "p", "answer": "1", "completions": ["a"] * number, **more}
    return verifier.score(groups.table([row]))


def test_a_server_that_refuses_from_the_start_is_a_fault_with_its_cause(judge: str) -> None:
    config = VerifiersConfig(rewards={"judge": {"url": judge + "?key=SECRET"}})
    _Judge.failures = [404] * 10
    with Verifier(config) as verifier:
        scored = _score(verifier)
        assert scored["rewards"].to_pylist() == [[None, None]]
        assert scored["reward_reasons"].to_pylist() == [
            ['judge: the server answered 404: {"rewards": [1, 1]}'] * 2
        ]
        with pytest.raises(RewardError, match=r"fails on every row.*the server answered 404") as caught:
            for _ in range(10):
                _score(verifier)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "is_answer", "is_own", "num_tries"),
    [
        (500, True, False, 2),
        (503, False, False, 2),
        (429, False, False, 2),
        (521, False, False, 2),  # of a gateway: the server behind it is down
        (401, False, True, 1),  # a key that has run out is no fault of the request
        (422, True, True, 1),
    ],
)
def test_a_status_says_whether_the_request_or_the_service_is_at_fault(
    judge: str, status: int, is_answer: bool, is_own: bool, num_tries: int
) -> None:
    _Judge.failures = [status] * 9
    reward = HttpReward(RewardConfig(url=judge, num_retries=1))
    with (
        contextlib.closing(reward),
        pytest.raises(OutOfReach, match=f"the server answered {status}: ") as caught,
    ):
        reward(["p"], ["a"])
    assert (caught.value.is_answer, caught.value.is_own) == (is_answer, is_own)
    assert len(_Judge.requests) == num_tries


def test_a_server_that_has_trouble_is_out_of_reach_from_the_start(judge: str) -> None:
    _Judge.failures = [503] * 9
    with (
        Verifier(VerifiersConfig(rewards={"judge": {"url": judge, "num_retries": 0}})) as verifier,
        pytest.raises(OutOfReach, match="503") as caught,
    ):
        _score(verifier)
    assert caught.value.reward == "judge"


def test_a_pause_that_a_server_asks_for_is_a_number_or_a_date() -> None:
    in_100_s = time.time() + 100
    asked = [
        "100",
        email.utils.formatdate(in_100_s, usegmt=True),
        time.strftime("%A, %d-%b-%y %H:%M:%S GMT", time.gmtime(in_100_s)),
        time.asctime(time.gmtime(in_100_s)),
    ]
    assert [_asked_pause(text, 0.5) for text in asked] == pytest.approx([100] * 4, abs=3)
    past = email.utils.formatdate(in_100_s - 200, usegmt=True)
    others = (past, "", "soon", "-1", "Wed, 21 Oct 99999 07:28:00 GMT")
    assert [_asked_pause(text, 0.5) for text in others] == [0.5] * 5


def test_a_server_that_asks_for_a_pause_beyond_the_time_limit_is_not_asked_before_it(judge: str) -> None:
    _Judge.failures = [503] * 9
    _Judge.more = {"Retry-After": email.utils.formatdate(time.time() + 3600, usegmt=True)}
    reward = HttpReward(RewardConfig(url=judge))
    with contextlib.closing(reward), pytest.raises(OutOfReach, match="503"):
        reward(["p"], ["a"])
    assert len(_Judge.requests) == 1


def test_a_server_that_has_worked_and_refuses_now_is_out_of_reach(judge: str) -> None:
    with Verifier(VerifiersConfig(rewards={"judge": {"url": judge}})) as verifier:
        assert _score(verifier)["rewards"].to_pylist() == [[1.0, 1.0]]
        _Judge.failures = [401]
        with pytest.raises(OutOfReach, match="the server answered 401"):
            _score(verifier)
        _Judge.failures = [401]
        assert verifier.score(
            groups.table([{"prompt": "p", "answer": "1", "completions": ["a"]}]), without=["judge"]
        )["rewards"].to_pylist() == [[None]]
        assert _score(verifier)["rewards"].to_pylist() == [[1.0, 1.0]]


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_a_body_of_any_size_takes_no_memory(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """The first one never ends; the second one is small, and 64 MiB when it is decompressed."""
    monkeypatch.setattr(http_reward, "MAX_ANSWER_BYTES", 1 << 20)
    listener = socket.create_server(("127.0.0.1", 0))
    packed = gzip.compress(bytes(1 << 26))

    def serve() -> None:
        with listener, contextlib.suppress(OSError), listener.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\n".encode())
            if encoding == "gzip":
                connection.sendall(f"Content-Length: {len(packed)}\r\n\r\n".encode() + packed)
            else:
                connection.sendall(b"Content-Length: 999999999999\r\n\r\n")
                while True:
                    connection.sendall(bytes(1 << 16))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    reward = HttpReward(RewardConfig(url=f"http://127.0.0.1:{listener.getsockname()[1]}/", num_retries=0))
    said = "200 and more than 1048576 bytes" if encoding == "identity" else ".*, not 1 rewards"
    with (
        contextlib.closing(reward),
        pytest.raises(OutOfReach, match=f"server answered {said}") as caught,
    ):
        reward(["p"], ["a"])
    assert caught.value.is_own
    thread.join(60)
    assert not thread.is_alive()


def test_nobody_at_the_address_is_out_of_reach_for_servers_and_trusted_functions() -> None:
    def asks(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        urllib.request.urlopen("http://127.0.0.1:9/", timeout=5)
        return [1.0]

    for sections, functions in (
        ({"judge": {"url": "http://127.0.0.1:9/", "num_retries": 0}}, {}),
        ({"judge": {"trusted": True}}, {"judge": asks}),
    ):
        with (
            Verifier(VerifiersConfig(rewards=sections), functions) as verifier,
            pytest.raises(OutOfReach) as caught,
        ):
            _score(verifier)
        assert (caught.value.reward, caught.value.is_answer, caught.value.is_own) == ("judge", False, False)


@pytest.mark.parametrize("how", ["later", "body", "head", "silence"])
def test_the_time_limit_of_a_request_is_one_in_all(how: str) -> None:
    """What a server may do to keep a client waiting, each part of it shorter than the limit."""

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.recv(1 << 16)
            if how == "later":
                connection.sendall(b"HTTP/1.1 429 Busy\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n")
            elif how == "silence":
                stop.wait(60)
            else:
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                connection.sendall(b"Content-Length: 10000\r\n\r\n" if how == "body" else b"X-Slow: ")
                while not stop.wait(0.05):
                    connection.sendall(b" ")

    stop = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    reward = HttpReward(RewardConfig(url=url, timeout_s=0.5, num_retries=3))
    try:
        with pytest.raises(OutOfReach) as caught:
            reward(["p"], ["a"])
        assert not caught.value.is_answer  # so that its groups wait, however long it hangs
    finally:
        stop.set()
        reward.close()
        listener.close()


@pytest.mark.parametrize("answer", ["[1, 2, 3]", '{"error": "no"}', "<html>", "[" * 100_000, '"\\ud83d"'])
def test_an_answer_without_the_rewards_says_what_it_was(answer: str) -> None:
    with pytest.raises(OutOfReach, match=r"the server answered .*, not 2 rewards") as caught:
        _parsed(answer, 2)
    assert caught.value.is_own


def _wrapped(error: BaseException) -> Exception:
    """The error of a client, raised because of the system's."""
    of_client = RuntimeError("the client failed")
    of_client.__context__ = error
    return of_client


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        ConnectionResetError("the server hung up"),
        OSError(errno.EHOSTUNREACH, "no route to host"),
        OSError(errno.ETIMEDOUT, "the system gave up"),
        socket.gaierror(-3, "no such name"),
        gvpo_ray.OutOfReach("the judge says to come back later"),
        _wrapped(ConnectionAbortedError("aborted")),
        _wrapped(gvpo_ray.OutOfReach("later")),
    ],
)
def test_a_trusted_function_is_in_an_outage_where_the_system_or_itself_says_so(error: Exception) -> None:
    def fails(**_: Any) -> list[float]:
        raise error

    with pytest.raises(OutOfReach) as caught:
        call("judge", fails, ["p"], ["a"], {}, may_wait=True)
    assert (caught.value.reward, caught.value.is_answer, caught.value.is_own) == ("judge", False, False)


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("regex timed out"),
        TimeoutError(),
        BrokenPipeError(errno.EPIPE, "the child that it pipes to is gone"),
        OSError(errno.ENOSPC, "no space"),
        _wrapped(TimeoutError()),
    ],
)
def test_a_time_limit_or_a_pipe_of_the_functions_own_is_its_fault(error: Exception) -> None:
    def fails(**_: Any) -> list[float]:
        raise error

    (part,) = call("judge", fails, ["p"], ["a"], {}, may_wait=True)
    assert part.value is None and part.is_fault and type(error).__name__ in str(part.reason)

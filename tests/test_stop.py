"""A run that is stopped or interrupted tells everybody, and ends within seconds whatever still goes on."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import ray
from ray._private import services
from test_advice import WRONG, steps
from test_run_dir import source_of
from test_run_format import config
from tiny import make_model

from gvpo_ray import GVPO
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.run import GVPOConfig, RayConfig
from gvpo_ray.run import session as session_module
from gvpo_ray.run.session import Session


@pytest.fixture
def run(tmp_path: Path) -> GVPO:
    """A run that learns from the groups of one step, and has not started."""
    source_of(tmp_path / "source", 2).close()
    data = config(tmp_path).model_dump(mode="json")
    data["model"]["path"], data["num_steps"] = str(make_model(tmp_path / "model")), 100
    return GVPO(GVPOConfig.from_dict(data), groups_file=str(tmp_path / "source"), say=lambda line: None)


def test_learning_from_recorded_groups_is_judged_at_its_own_last_step(run: GVPO) -> None:
    assert run.num_steps == 1
    (line,) = steps(WRONG, num=1)
    said = run._first_steps.judge(line)
    assert said is not None and "the first step shows" in said
    run.stop()


@pytest.mark.parametrize("error", [TimeoutError(), OSError("no space left"), ray.exceptions.RayError()])
def test_the_learner_is_told_to_stop_although_the_final_status_cannot_be_written(
    run: GVPO, error: Exception
) -> None:
    done: list[str] = []

    async def write_final_status() -> None:
        raise error

    async def close_once() -> None:
        done.append("closed")

    fake: dict[str, Any] = {
        "_session": SimpleNamespace(call=lambda asked, timeout_s: asyncio.run(asked)),
        "_ring": SimpleNamespace(write_final_status=write_final_status),
        "_buffer": SimpleNamespace(close_once=close_once),
        "learners": SimpleNamespace(join=lambda timeout_s: done.append("joined")),
    }
    for name, value in fake.items():
        setattr(run, name, value)
    run.events.path = run.run_dir  # a folder: nothing can be appended to it
    run.stop()
    assert done == ["closed", "joined"]


def test_an_interrupt_ends_a_session_although_engines_start_and_a_step_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(session_module, "CLOSE_S", 0.05)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    session, ended = Session(RayConfig()), list[str]()

    async def for_ever(who: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(who)

    async def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await for_ever("step")

    async def fail(error: BaseException) -> None:
        ended.append(str(error))

    try:
        session.spawn(for_ever("start"), fail)
        session.on_stop(lambda: for_ever("engines"))
        with pytest.raises(KeyboardInterrupt):
            session.call(interrupted())
        session.stop()
        assert sorted(ended) == ["engines", "start", "step"] and not session._thread.is_alive()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("before", [None, "token"])
def test_a_run_leaves_no_tokens_to_the_next_ray_of_the_process_that_it_did_not_find(
    monkeypatch: pytest.MonkeyPatch, before: str | None, tmp_path: Path
) -> None:
    """An embedded Ray switches them on; actors of a cluster without them would end at once."""
    from ray._private.authentication.authentication_token_setup import _enable_token_auth
    from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, Config, get_authentication_mode

    monkeypatch.setattr(ray, "init", lambda **_: _enable_token_auth())
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # put back at the end, whatever happens
    if before is None:
        monkeypatch.delenv("RAY_AUTH_MODE")
    Config.initialize("")
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 40)
    session = Session(RayConfig())
    assert get_authentication_mode() == AuthenticationMode.TOKEN and loader.get_raw_token() == "t" * 40
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    session.stop()
    assert os.environ.get("RAY_AUTH_MODE") == before
    assert (get_authentication_mode() == AuthenticationMode.TOKEN) == (before is not None)
    assert loader.has_token(ignore_auth_mode=True) == (before is not None)  # else it is asked for
    monkeypatch.undo()
    Config.initialize("")
    loader.reset_cache()


@pytest.mark.parametrize(
    ("said", "num_tries"), [("The current node timed out during startup.", 3), ("no", 1)]
)
def test_an_embedded_ray_that_is_slow_to_start_is_started_again(
    monkeypatch: pytest.MonkeyPatch, said: str, num_tries: int
) -> None:
    tries: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        tries.append(options)
        raise Exception(said)  # Ray's own

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match="ray: cannot start on this machine: "):
        Session(RayConfig())
    assert len(tries) == num_tries and all(options == tries[0] for options in tries)


@pytest.mark.actors
def test_nothing_stays_of_an_embedded_ray_that_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own start, three times, where half a minute passes between two looks at a clock."""
    begun = psutil.Process().children()
    seen: list[str] = []

    def never(*arguments: Any) -> Any:
        seen.extend(child.name() for child in psutil.Process().children() if child not in begun)
        raise RuntimeError("not there")

    monkeypatch.setattr(services, "get_node", never)
    clock = itertools.count(step=31.0)
    slow = SimpleNamespace(monotonic=lambda: next(clock), **{n: getattr(time, n) for n in ("sleep", "time")})
    monkeypatch.setattr("ray._private.node.time", slow)
    with pytest.raises(ConfigError, match=r"ray: cannot start on this machine: .*timed out during startup"):
        Session(RayConfig(num_cpus=1))
    assert seen.count("gcs_server") == seen.count("raylet") == 3
    left = [child for child in psutil.Process().children() if child not in begun]
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive, [child.name() for child in alive]

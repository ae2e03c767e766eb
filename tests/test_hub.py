"""Names of the Hugging Face hub where the hub is away, fails, hangs, or answers after a while."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import constants
from tiny import make_model

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.data import hub as module
from gvpo_ray.data.hub import hub, silence
from gvpo_ray.run.models import read_model

LOST = 0
"""An answer that is lost on its way."""


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`endpoint(address)`: the hub is there, nothing was downloaded from it, and this process is online."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_out_of_reach", None)

    def use(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://{address}")
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"http://{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )

    return use


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between questions to the hub, which take no time here."""
    pauses: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append)
    monkeypatch.setattr(module, "time", clock)
    return pauses


@contextmanager
def server(*answers: int) -> Iterator[tuple[str, list[str]]]:
    """Answer with these statuses in turn, the last one again and again; list the paths that are asked for."""
    left, asked = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            status = left.pop(0) if len(left) > 1 else left[0]
            if status != LOST:
                self.send_response(status)
                self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{listening.server_address[1]}", asked
        listening.shutdown()


@pytest.fixture
def closed() -> str:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("status", [200, 302, 401, 404, 429])
def test_every_answer_but_that_of_a_fault_is_one(
    endpoint: Callable[[str], None], waited: list[float], status: int
) -> None:
    for kind, path in (
        ("model", "/no/such/resolve/main/config.json"),
        ("dataset", "/datasets/no/such/resolve"),
    ):
        with server(status) as (address, asked):
            endpoint(address)
            assert silence("no/such", kind) is None and waited == []  # type: ignore[arg-type]
        assert len(asked) == 1 and asked[0].startswith(path)


def test_a_hub_that_answers_after_faults_and_lost_answers_is_there(
    endpoint: Callable[[str], None], waited: list[float]
) -> None:
    for answers in ((503, 200), (LOST, 404), (503, LOST, 500, 200)):
        waited.clear()
        with server(*answers) as (address, _):
            endpoint(address)
            assert silence("no/such", "model") is None
        assert waited == [1.0, 2.0, 4.0][: len(answers) - 1]


def test_a_hub_that_refuses_or_fails_is_asked_for_some_seconds(
    endpoint: Callable[[str], None], waited: list[float], closed: str
) -> None:
    endpoint(closed)
    assert silence("no/such", "model") == f"http://{closed}: [Errno 111] Connection refused"
    assert waited == [1.0, 2.0, 4.0]
    with server(503) as (address, _):
        endpoint(address)
        assert silence("no/such", "model") == f"http://{address}: 503 Service Unavailable"


def test_a_hub_that_does_not_answer_is_asked_once(
    endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.1)
    monkeypatch.setattr(module, "AGAIN_S", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0)
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        address = f"127.0.0.1:{hangs.getsockname()[1]}"
        endpoint(address)
        assert silence("no/such", "model") == f"http://{address}: timed out"


def test_a_name_that_is_none_is_left_to_the_library(endpoint: Callable[[str], None], closed: str) -> None:
    endpoint(closed)
    assert silence("no such", "dataset") is None


@pytest.mark.parametrize(
    ("key", "override"),
    [
        ("model.path", "model.path=no/such"),
        ("prompts.path", "prompts.path=no/such"),
        ("evaluation.sets.held.path", "evaluation.sets={held: {path: no/such}}"),
        ("verifiers.rewards.taste.model", "verifiers.rewards={taste: {model: no/such}}"),
    ],
)
def test_a_name_that_the_hub_cannot_be_asked_for_is_one_line(
    endpoint: Callable[[str], None],
    waited: list[float],
    closed: str,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    override: str,
) -> None:
    endpoint(closed)
    advice = "give a local folder, or download it where there is a network, and set HF_HUB_OFFLINE=1"
    assert refused("train", "config.yaml", override) == (
        f"{key}: no/such is nothing on this machine, and the Hugging Face hub could not be reached "
        f"(http://{closed}: [Errno 111] Connection refused): {advice}"
    )
    assert waited == [1.0, 2.0, 4.0]
    assert not constants.HF_HUB_OFFLINE and "HF_HUB_OFFLINE" not in os.environ  # the next try asks again
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert refused("train", "config.yaml", override) == (
        f"{key}: no/such is nothing on this machine, and the Hugging Face hub is not asked "
        f"(HF_HUB_OFFLINE is set): {advice}"
    )


def downloaded(cache: Path, name: str) -> Path:
    """Lay a model into the cache as a download from the hub does; return its folder."""
    folder, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    return make_model(folder / "snapshots" / commit)


def test_a_downloaded_model_is_used_where_the_hub_is_away_and_nobody_asks_again(
    tmp_path: Path,
    endpoint: Callable[[str], None],
    waited: list[float],
    closed: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    endpoint(closed)
    folder = downloaded(tmp_path / "cache", "some/model")
    config = GVPOConfig.from_dict(
        {"run_dir": "run", "num_steps": 1, "model": {"path": "some/model"}, "prompts": {"path": "p.jsonl"}}
    )
    for _ in range(2):
        assert read_model(config)[0] == 128
    assert waited == [1.0, 2.0, 4.0] and os.environ["HF_HUB_OFFLINE"] == "1"
    # on stderr itself, whatever became of the loggers in this process
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("model.path")]
    assert line == (
        f"model.path: the Hugging Face hub could not be reached (http://{closed}: [Errno 111] Connection "
        "refused): what was downloaded from it is used"
    )
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^model.path: cannot load config.json of some/model: "):
        read_model(config)  # it is there, and its own fault


def test_the_hub_is_not_asked_for_what_is_on_this_machine(
    tmp_path: Path, endpoint: Callable[[str], None], waited: list[float], closed: str
) -> None:
    endpoint(closed)
    with pytest.raises(ConfigError, match=r"^a mistake$"), hub("prompts.path", str(tmp_path), "dataset"):
        raise ConfigError("a mistake")
    assert waited == []

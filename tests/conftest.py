"""Fixtures of several test files."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# Before torch is imported: the tests and all that they start share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's processes are polite by default (15), and would stand still for minutes beside another file's test.
os.environ.setdefault("RAY_worker_niceness", "0")

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

TIERS = {
    "cluster": {"test_autoscaler", "test_cluster", "test_images", "test_ray_up"},
    "end_to_end": {
        "test_backends",
        "test_bench_gpu",
        "test_direct",
        "test_docs",
        "test_lora",
        "test_native",
        "test_recovery",
        "test_report_in_browser",
        "test_ring_episodes",
        "test_ring",
        "test_ring_jobs",
        "test_ring_python",
        "test_sample",
        "test_setup",
        "test_spread",
        "test_vllm_engine",
        "test_warm_start",
        "test_nccl",
        "test_node_copy",
        "test_weights",
    },
    "actors": {
        "test_actors",
        "test_cli",
        "test_cli_check",
        "test_cli_inputs",
        "test_engines",
        "test_evaluate",
        "test_ray_metrics",
        "test_trackers",
        "test_verifier_group",
        "test_workers",
    },
    "components": {
        "test_answers",
        "test_answers_properties",
        "test_balance",
        "test_chaos",
        "test_code_reward",
        "test_confine",
        "test_confined_worlds",
        "test_experiments",
        "test_families",
        "test_hostile_code",
        "test_hostile_text",
        "test_http_reward",
        "test_isolation",
        "test_long_episodes",
        "test_memory",
        "test_passes",
        "test_process_log",
        "test_responses",
        "test_tasksets",
        "test_reward_shapes",
        "test_rewards",
        "test_rooms",
        "test_sandbox",
        "test_theory",
        "test_verifiers",
        "test_verify",
        "test_world_starts",
        "test_wrong_programs",
    },
}
"""Test files by tier.

A unit test stays in the process of pytest, and trains nothing until it converges. A component runs as in
production, but without Ray: the sandbox and the command line in processes of their own, training until it
converges or several times over, compiled kernels, families of models, what torch allocates, answers and
problems by the hundred, the sizes of a fleet. Actors are Ray's, with fake engines. An end-to-end test has a
real part: vLLM, DeepSpeed, several ranks, a browser, a set-up.

A test of another file says its tier by a marker; one that runs on several ranks is end to end wherever it
stands; all others are unit tests.
"""


LONGEST = [
    "test_ring",
    "test_ring_python",
    "test_ring_jobs",
    "test_recovery",
    "test_ring_episodes",
    "test_native",
    "test_spread",
    "test_policy",
    "test_setup",
    "test_wheel",
    "test_family_jobs",
    "test_vllm_engine",
    "test_backends",
    "test_learner",
    "test_autoscaler",
    "test_bench_gpu",
    "test_sample",
    "test_workers",
    "test_verifier_group",
    "test_report_in_browser",
    "test_theory",
    "test_lora",
    "test_sandbox",
    "test_packing",
]
"""Test files that begin first, in this order."""


def tier_of(item: pytest.Item) -> str:
    """Return the tier of a test, which is its marker: `tests/run.sh TIER` runs the tests of one."""
    if {"on_ranks", "made"} & set(getattr(item, "fixturenames", ())) or item.get_closest_marker("setup"):
        return "end_to_end"
    if own := [tier for tier in TIERS if item.get_closest_marker(tier)]:
        return own[0]
    return next((tier for tier, files in TIERS.items() if item.path.stem in files), "unit")


def pytest_configure(config: pytest.Config) -> None:
    """Look for no garbage until all test files are imported: it takes as long as they do.

    The process that hands tests out to xdist's workers imports none.
    """
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        gc.disable()


def pytest_collection_finish() -> None:
    """Look for garbage from now on, but not among what is there for good."""
    gc.freeze()
    gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave files of other tiers alone where unit tests are asked for: importing them takes a while."""
    others = {file for files in TIERS.values() for file in files}
    return True if config.option.markexpr == "unit" and collection_path.stem in others else None


@pytest.fixture(autouse=True, scope="module")
def environment_of_its_own() -> Iterator[None]:
    """What a file's tests leave in the environment is gone after them: vLLM in pytest's own process sets
    LD_PRELOAD, and no child of a later file's tests could load it from a path with a space.
    """
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test that starts a Python fails: it belongs to another tier."""
    begin = subprocess.Popen.__init__

    def refuse(self: Any, arguments: Any, *more: Any, **options: Any) -> None:
        assert sys.executable not in arguments, (
            "a unit test starts a process: tests/conftest.py has the tiers"
        )
        begin(self, arguments, *more, **options)  # libraries ask `uname` and the like

    if request.node.get_closest_marker("unit"):
        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test the marker of its tier, and start with the longest files: last, one would end alone.

    Tests marked `browser` are deselected where there is no Chromium.
    """
    for item in items:  # first of all hooks, so that -m sees them
        item.add_marker(tier_of(item))
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
        return
    without = [item for item in items if item.get_closest_marker("browser")]
    config.hook.pytest_deselected(items=without)
    items[:] = [item for item in items if item not in without]


@pytest.fixture
def policy(tmp_path: Path) -> Any:
    """A learner's, at its start, of the model in tmp_path/model."""
    import learners
    import tiny

    return learners.load(tiny.make_model(tmp_path / "model"), learners.settings(tmp_path))


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML file of a run of the whole ring, in a folder of the test file's own, with data and model."""
    import ring

    base = tmp_path_factory.getbasetemp()
    return ring.make(
        tmp_path_factory.mktemp("ring"), base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    )


@pytest.fixture(scope="module")
def no_child_left() -> Iterator[None]:
    """It fails where a process that the tests of a file have started is there after the last of them."""
    before = set(psutil.Process().children(recursive=True))
    yield
    started = set(psutil.Process().children(recursive=True)) - before
    assert psutil.wait_procs(started, timeout=60)[1] == []


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """`apart(check, …)`: a function, called with a World in a process of its own, in which nobody else
    opens or closes anything.
    """
    import world

    root = tmp_path_factory.mktemp("world")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), world.begin, (root,)) as process:
        yield lambda check, *arguments: process.submit(world.call, check, arguments).result()


_results: dict[tuple[int, str], dict[str, list[Any]]] = {}


@pytest.fixture
def on_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str], list[Any]]:
    """`on_ranks(world_size, case)`: what that entry of the test file's CASES returned on each rank.

    The first call starts the ranks and runs the whole list (CASES_ON_N, where the file has another one for N
    ranks); what a case raised is raised by the test that asks for it.
    """

    import tiny

    def ask(world_size: int, case: str) -> list[Any]:
        key = (world_size, request.module.__name__)
        if key not in _results:
            folder: Path = tmp_path_factory.mktemp(f"ranks-{world_size}")
            cases = getattr(request.module, f"CASES_ON_{world_size}", request.module.CASES)
            _results[key] = tiny.run_on_ranks(world_size, cases, folder)
        results = _results[key][case]
        for rank, result in enumerate(results):
            assert not isinstance(result, str), f"rank {rank} of {world_size}: {result}"
        return results

    return ask


PROBLEMS = [{"prompt": f"{a} + {b}?", "answer": str(a + b)} for a in range(2) for b in range(3)]


@pytest.fixture(scope="module")
def command_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No cluster in the environment, no Ray from here on, and the signal handler that `main` sets put
    back.
    """
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("gvpo_ray.run.session.Session.__init__", lambda *_: pytest.fail("Ray is started"))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def folder(tmp_path: Path, command_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run's inputs (config.yaml, model, train.jsonl), which is the working directory."""
    shutil.copytree(command_model, tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    config = {
        "run_dir": "run",
        "num_steps": 2,
        "groups_per_step": 2,
        "model": {"path": "./model"},
        "prompts": {"path": "train.jsonl", "template": "{prompt}="},
        "sampling": {"num_completions": 2, "max_tokens": 16},
        "engines": {"num_cpus": 0.1},
        "learner": {"num_mini_batches": 1, "num_cpus": 0.1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(quiet: None, folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused("train", "config.yaml", …)`: the one line on stderr, without the folder, after checking all
    that a refusal must be.
    """

    import ray
    import tiny

    from gvpo_ray.cli import main

    def run(*arguments: str) -> str:
        before = tiny.tree(folder)
        status = main(list(arguments))
        printed = capsys.readouterr()
        assert status == 2, printed.err
        assert re.fullmatch(r"error: [^\n]+\n", printed.err), f"not one line: {printed.err}"
        assert "Traceback" not in printed.out
        assert tiny.tree(folder) == before
        assert not ray.is_initialized()
        return printed.err.removeprefix("error: ").rstrip("\n").replace(f"{folder}/", "")

    return run

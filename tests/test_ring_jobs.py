"""The ring as jobs of a cluster, on offline data."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml
from ring import GROUPS_PER_STEP, left_behind, until

from gvpo_ray import groups

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def local_cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """cluster/local.sh: the environment in which `ray job …` speaks to it."""
    mark = uuid.uuid4().hex
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    plain |= {
        "PATH": f"{Path(sys.executable).parent}:{plain['PATH']}",
        "GVPO_TEST_MARK": mark,
        "GVPO_LOCAL_CLUSTER": str(tmp_path / "cluster"),
    }
    script = subprocess.Popen(
        [PROJECT / "cluster" / "local.sh", "--num-cpus=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=plain,
        start_new_session=True,
    )
    assert script.stdout is not None
    lines: list[str] = []
    for line in script.stdout:
        lines.append(line)
        if "Ctrl-C" in line:
            break
    assert (tmp_path / "cluster" / "env").is_file(), lines
    sourced = subprocess.run(
        ["bash", "-c", 'source "$0" && env -0', str(tmp_path / "cluster" / "env")],
        env=plain,
        check=True,
        capture_output=True,
        text=True,
    )
    yield dict(line.split("=", 1) for line in sourced.stdout.split("\0") if "=" in line)
    script.terminate()
    assert script.wait() == 143
    assert left_behind(mark) == []


def test_a_submitted_run_survives_a_killed_driver_and_a_stopped_job_and_needs_no_engine_for_offline_data(
    config_file: Path, local_cluster: dict[str, str]
) -> None:
    folder = config_file.parent
    rng = random.Random(0)
    graded = [(a, rng.randrange(1, 10)) for a in range(10, 100) for _ in range(4)]
    rows = [
        {"prompt": f"{a}=", "completion": rf"\boxed{{{x}}}", "score": float(x == a // 10)} for a, x in graded
    ]
    (folder / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load(config_file.read_text())
    del config["prompts"], config["evaluation"]
    source = {"path": "graded.jsonl", "reward_column": "score", "group_share": 1.0, "template": "{prompt}"}
    config |= {
        "run_dir": "offline",
        "model": {"path": "model"},
        "num_steps": 1000,
        "engines": {"num": 0},
        "sources": {"graded": source},
    }
    config["learner"] = {"backend": "ddp", "num_mini_batches": 2}
    config["checkpoint"] = {"every": 2}
    (folder / "offline.yaml").write_text(yaml.safe_dump(config))
    metrics = folder / "offline" / "metrics.jsonl"

    def job(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["ray", "job", *arguments]
        return subprocess.run(
            command,
            cwd=PROJECT,
            env=local_cluster,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(name: str, *arguments: str, wait: bool = False) -> subprocess.CompletedProcess[str]:
        command = ["python", "jobs/train.py", str(folder / "offline.yaml"), f"root={folder}", *arguments]
        return job(
            "submit",
            "--submission-id",
            name,
            *([] if wait else ["--no-wait"]),
            "--working-dir",
            ".",
            "--",
            *command,
        )

    def num_trained() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def until_more_steps(more: int) -> None:
        wanted = num_trained() + more
        until(lambda: num_trained() >= wanted)

    assert submit("killed").returncode == 0
    until_more_steps(3)
    (driver,) = drivers(local_cluster)
    os.kill(driver, signal.SIGKILL)

    assert submit("stopped").returncode == 0  # what the first one left in the cluster may still be going down
    until_more_steps(3)
    assert "FAILED" in job("list").stdout
    assert job("stop", "stopped").returncode == 0
    said = job("logs", "stopped")
    assert "recovery at step" in said.stdout and "the same command resumes the run" in said.stdout, said

    num_steps = num_trained() + 4
    with ThreadPoolExecutor() as threads:
        beside = threads.submit(submit, "wrong", "lerner.num_workers=1", wait=True)
        finished = submit("finished", f"num_steps={num_steps}", wait=True)
    assert finished.returncode == 0 and "complete" not in finished.stdout, finished
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, num_steps + 1))
    wrong = beside.result()
    assert wrong.returncode != 0 and "error: " in wrong.stdout and "did you mean learner" in wrong.stdout

    log = list(groups.rows(groups.load(folder / "offline" / "groups")))
    assert len(log) >= num_steps * GROUPS_PER_STEP and {
        source for row in log for source in row["sources"]
    } == {"offline:graded"}
    known = {(row["prompt"], row["completion"]): row["score"] for row in rows}
    assert all(
        known[row["prompt"], text] == reward
        for row in log
        for text, reward in zip(row["completions"], row["rewards"], strict=True)
    )
    assert (folder / "offline" / "checkpoints" / f"step-{num_steps}" / "model.safetensors").is_file()


def drivers(environment: dict[str, str]) -> list[int]:
    """Processes of a cluster's jobs that run jobs/train.py."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GVPO_TEST_MARK") == environment["GVPO_TEST_MARK"] and process.cmdline()[
                1:2
            ] == ["jobs/train.py"]:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found

"""An elastic run on Ray's real autoscaler: nodes of two types on this machine, whose resources stand for
kinds of machines.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from gvpo_ray.bench.scale import FakeRun
from gvpo_ray.config.engines import EnginesConfig
from gvpo_ray.run.session import forget_auth_mode

NODE_TYPES = {"learner": 1, "engine": 2}
"""Most nodes of each type; all begin with none."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(address, mark of all of its processes) of a cluster of a head alone, with Ray's autoscaler on it.

    It has no tokens, while another test's Ray may have left them switched on in this process.
    """
    forget_auth_mode()
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as another:
        port, clients_port = free.getsockname()[1], another.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    mark = uuid.uuid4().hex
    types = {
        name: {
            "resources": {"CPU": 1, name: 1, "object_store_memory": 1 << 28},
            "node_config": {},
            "min_workers": 0,
            "max_workers": number,
        }
        for name, number in NODE_TYPES.items()
    }
    config = {
        "cluster_name": "test",
        "max_workers": sum(NODE_TYPES.values()),
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 10.0,
        "provider": {
            # all of them have the same IP address
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            **types,
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        },
        "head_node_type": "ray.head.default",
        # What Ray's own files say by default.
        **{key: {} for key in ("auth", "file_mounts")},
        "file_mounts_sync_continuously": False,
        **{
            key: []
            for key in (
                "cluster_synced_files",
                "rsync_exclude",
                "rsync_filter",
                "initialization_commands",
                "setup_commands",
            )
        },
        **{
            f"{who}_{what}": []
            for who in ("head", "worker")
            for what in ("setup_commands", "start_ray_commands")
        },
    }
    file = tmp_path_factory.mktemp("autoscaler") / "cluster.json"
    said = file.with_name("log")
    file.write_text(json.dumps(config))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "GVPO_TEST_MARK": mark,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "15",
        "RAY_enable_autoscaler_v2": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    # Ray puts the path of Python into lines of bash as it is: this one has no space, wherever the project is
    (file.parent / "python").symlink_to(Path(sys.executable).parents[1])
    with open(said, "w") as log:
        head = subprocess.Popen(
            [
                file.parent / "python" / "bin" / Path(sys.executable).name,
                "-m",
                "ray.scripts.scripts",
                "start",
                "--head",
                "--block",
                f"--port={port}",
                "--num-cpus=1",
                "--object-store-memory=268435456",
                f"--autoscaling-config={file}",
                "--include-dashboard=false",
                "--include-log-monitor=false",
                '--resources={"verifier": 1}',
                f"--ray-client-server-port={clients_port}",
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _until(
            lambda: "Ray runtime started" in said.read_text() or head.poll() is not None, "the cluster is up"
        )
        assert head.poll() is None, said.read_text()
        yield address, mark
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait()
        for process in _processes(mark):  # the nodes that the autoscaler started are not the head's children
            process.kill()


def _processes(mark: str, **environment: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if {"GVPO_TEST_MARK": mark, **environment}.items() <= process.environ().items():
                found.append(process)
        except psutil.Error:
            continue
    return found


def _until(holds: Callable[[], Any], what: str, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def test_a_pool_grows_from_nothing_survives_a_lost_node_and_shrinks_to_nothing_during_one_run(
    cluster: tuple[str, str], tmp_path: Path
) -> None:
    address, mark = cluster
    pool = {
        "num": 0,
        "max_num": 2,
        "num_cpus": 0.5,
        "resources": {"engine": 1},
        "max_groups": 4,
        "vllm": {"seconds_per_token": 0.02},
    }
    run = FakeRun(
        tmp_path,
        EnginesConfig(scale_window_s=2.0, pools={"spot": pool}),
        groups_per_step=8,
        num_steps=1 << 20,
        max_staleness=1,
        address=address,
        num_verifiers=1,
        verifier_resources={"verifier": 0.5},
        learner_resources={"learner": 1.0},
    )

    def nodes() -> Counter[str]:
        return Counter(
            name for node in ray.nodes() if node["Alive"] for name in NODE_TYPES if name in node["Resources"]
        )

    def running() -> int:
        run.check()
        return sum(slot.state == "running" for slot in run.engines.slots)

    try:
        _until(lambda: running() == 2, "a learner that waits has the pool grow")
        assert nodes() == NODE_TYPES  # each came when somebody asked for what it has
        (raylet, *_) = (
            process for process in _processes(mark, RAY_NODE_TYPE_NAME="engine") if process.name() == "raylet"
        )
        before_that = {slot.node for slot in run.engines.slots}
        raylet.kill()
        _until(lambda: running() == 1, "its engine is missed")
        _until(
            lambda: running() == 2 and nodes()["engine"] == 2,
            "another node takes its place, and another engine the slot",
        )
        assert {slot.node for slot in run.engines.slots} != before_that
        before = run.num_finished()
        _until(lambda: run.num_finished() > before + 16, "groups come in")
        ray.get(run.learner.pace.remote(1e6))  # from now on it is busy for ever
        _until(
            lambda: all(slot.state == "off" for slot in run.engines.slots),
            "a full buffer has the pool shrink",
        )
        _until(lambda: nodes() == {"learner": 1}, "nodes without an engine leave")
        grown = [
            entry["why"].split(" engines: ")[0] for entry in run.events.entries if entry["who"] == "pool"
        ]
        assert grown == ["grows to 2", "shrinks to 1", "shrinks to 0"]
        assert run.events.counts()["engine"] == 1  # to be let go is no death
        groups = run.buffer.status()
        # what they had in flight was finished or handed over
        assert run.session.call(groups)["num_running"] == 0
    finally:
        run.close()

"""Processes of the ring are killed, stopped and told to go, and nodes leave, under real Ray actors with
engines that are fake: what is finished is kept, each group is logged once, and each step trains its own
groups.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray
import tiny
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gvpo_ray import groups
from gvpo_ray.actors import RunError
from gvpo_ray.bench.scale import FakeRun, maker
from gvpo_ray.buffer.log import GroupLog
from gvpo_ray.config.data import ReplayConfig
from gvpo_ray.config.engines import EnginesConfig, SamplingConfig
from gvpo_ray.config.loss import GvpoLoss
from gvpo_ray.config.model import ScoringModelConfig
from gvpo_ray.engines import supervisor
from gvpo_ray.engines.actor import ActorMethods, actor_options
from gvpo_ray.engines.base import BaseEngine
from gvpo_ray.engines.fake_engine import FakeEngine
from gvpo_ray.engines.pools import EngineGroup
from gvpo_ray.observe.status import EngineState, read_status, status_lines
from gvpo_ray.run.models import version_of
from gvpo_ray.verifiers import references
from gvpo_ray.verifiers.scoring_model import Renderings, Score, Text

# so that engines need not import this file, and torch with it
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

K = 8
SLOW = {"seconds_per_token": 0.01, "median_tokens": 100.0, "sigma": 1.0}
"""A completion of 1 s in a group of, mostly, 3 to 4 s: what is finished first waits for the others."""

QUICK = {"seconds_per_token": 0.01, "median_tokens": 30.0, "sigma": 0.2}

HELD: dict[str, Any] = {"step_s": None, "max_staleness": 9, "num_steps": 14}
"""A run of 56 groups of which 40 begin, and the others once the learner has a pace: an engine that comes late
has something left to do, however slow the machine is."""


class Signed(FakeEngine):
    """Its completions say which process has written them."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._texts = [f"pid {os.getpid()}"] * 10


class Mute(Signed):
    """The first one writes no token, and says so; those that come after it do."""

    def __init__(self, mark: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._is_mute = not os.path.exists(mark)
        if self._is_mute:
            open(mark, "w").close()
            self._seconds_per_token = 1e6

    async def status(self) -> dict[str, Any]:
        return await (BaseEngine if self._is_mute else FakeEngine).status(self)


class Recording(FakeEngine):
    """Appends the lengths of what it has sampled to a file of its own."""

    def __init__(self, folder: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._folder = folder

    async def generate(self, group: pa.Table, *arguments: Any) -> tuple[pa.Table, int]:
        table, missing = await super().generate(group, *arguments)
        with open(f"{self._folder}/{os.getpid()}", "a") as file:
            file.writelines(f"{len(ids)}\n" for ids in table["completion_ids"][0].as_py())
        return table, missing


class Broken(FakeEngine):
    """Does not start, and keeps count."""

    def __init__(self, file: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._file = file

    async def start(self) -> dict[str, Any]:
        with open(self._file, "a") as file:
            file.write("x")
        raise RuntimeError("no such model: tiny")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="gvpo", dir="/tmp")  # short, because sockets are in it
    with pytest.MonkeyPatch.context() as patch:
        # Cluster notes its address there, for whoever asks for any Ray of this machine
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster()
        without = {"include_dashboard": False, "include_log_monitor": False}
        add_node(cluster, num_cpus=4, object_store_memory=400 << 20, **without)
        yield cluster
        cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def add_node(cluster: Cluster, **options: Any) -> Any:
    """A node, as start_ray starts one: Ray gives it 30 s, which are too few on a busy machine."""
    for tries_left in (2, 1, 0):
        try:
            return cluster.add_node(**options)
        except Exception as error:
            if not tries_left or "timed out during startup" not in str(error):
                raise
    return None


Start = Callable[..., FakeRun]


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Iterator[Start]:
    """Starts a run in tmp_path; the test's end ends it."""
    runs: list[FakeRun] = []

    def start(
        engines: dict[str, Any],
        engine: type[FakeEngine] = FakeEngine,
        max_tokens: int = 400,
        **arguments: Any,
    ) -> FakeRun:
        sampling = SamplingConfig(num_completions=K, max_tokens=max_tokens)
        config = EnginesConfig.model_validate({"num_cpus": 0.1, "max_groups": 8, **engines})
        defaults = {
            "make": maker(engine),
            "sampling": sampling,
            "num_verifiers": 1,
            "groups_per_step": 4,
            "address": cluster.address,
        }
        runs.append(FakeRun(tmp_path, config, **{**defaults, **arguments}))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


def until(run: FakeRun, condition: Callable[[], Any], seconds: float = 300, every: float = 0.1) -> Any:
    """What the condition says once that is true."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        run.check()
        assert time.monotonic() < end, "\n".join(status_lines(run.status()))
        time.sleep(every)
    return answer


def slot_of(run: FakeRun, name: str) -> Any:
    (slot,) = [slot for slot in run.engines.slots if slot.name == name]
    return slot


def first(run: FakeRun, condition: Callable[[Any], bool]) -> Any:
    """The first slot of which the condition holds."""
    return until(run, lambda: next((slot for slot in run.engines.slots if condition(slot)), None), every=0.02)


def is_new(slot: Any, pid: int) -> bool:
    """Whether the slot is filled again."""
    return slot.state == "running" and slot.status.get("pid", pid) != pid


def recoveries(run: FakeRun) -> list[tuple[str, str, str]]:
    return [(entry["who"], entry["name"], entry["why"]) for entry in run.events.entries]


def finish(run: FakeRun, folder: Path, num_steps: int, groups_per_step: int = 4) -> list[dict[str, Any]]:
    """The log's rows at the end of the run: each group is there once, and each step has its own, one after
    the other.
    """
    until(run, lambda: ray.wait([run.done], timeout=0)[0])
    ray.get(run.done)
    run.check()
    rows = list(groups.rows(groups.load(folder / "groups")))
    assert sorted(row["group_id"] for row in rows) == list(range(num_steps * groups_per_step))
    assert all(len(row[name]) == K for row in rows for name in ("completions", "completion_ids", "rewards"))
    assigned = [
        json.loads(line) for line in (folder / "groups" / "assignments.jsonl").read_text().splitlines()
    ]
    begins = range(0, num_steps * groups_per_step, groups_per_step)
    assert assigned == [
        {"step": step, "begin": begin, "end": begin + groups_per_step} for step, begin in enumerate(begins, 1)
    ]
    return rows


def writers(row: dict[str, Any]) -> set[int]:
    """Processes that have written a group."""
    return {int(text.split()[1]) for text in row["completions"]}


def is_there(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# --- engines ------------------------------------------------------------------------------------------------


def test_what_a_killed_engine_had_finished_of_its_groups_is_kept_and_others_finish_them(
    start: Start, tmp_path: Path
) -> None:
    run = start({"num": 2, "vllm": SLOW}, Signed, **HELD)
    migrated: dict[int, list[Any]] = {}
    while sum(map(bool, migrated.values())) < 2:
        slot = first(
            run, lambda slot: slot.status and sum(bool(g.kept) for g in [*slot.in_flight.values()]) >= 2
        )
        pid = slot.status["pid"]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1)  # for what it has sent: a group may be wholly there, and then it is none of these
        migrated = {
            group_id: [
                ids
                for part in list(group.kept)
                for row in groups.rows(groups.from_wire(part))
                if row["group_id"] == group_id
                for ids in row["completion_ids"]
            ]
            for group_id, group in list(slot.in_flight.items())
        }
        os.kill(pid, signal.SIGCONT if sum(map(bool, migrated.values())) < 2 else signal.SIGKILL)
    until(run, lambda: is_new(slot, pid))
    assert recoveries(run) == [("engine", slot.name, "its process or its node died")]
    ray.get(run.learner.pace.remote(0.0))
    rows = {row["group_id"]: row for row in finish(run, tmp_path, 14)}
    assert recoveries(run) == [("engine", slot.name, "its process or its node died")]
    for group_id, completions in migrated.items():
        row = rows[group_id]
        assert Counter(row["completions"])[f"pid {pid}"] >= len(completions)
        assert all(ids in row["completion_ids"] for ids in completions)
        assert writers(row) - {pid}, "it was not finished when its engine died"
        assert bool(completions) <= (len(writers(row)) >= 2)
    # the new one works
    assert slot.status["pid"] in {writer for row in rows.values() for writer in writers(row)}


def test_an_engine_that_is_stopped_and_one_that_writes_nothing_are_replaced(
    start: Start, tmp_path: Path
) -> None:
    make, make_mute = maker(Signed), maker(Mute)
    run = start(
        {
            "hang_s": 10.0,
            "max_restarts_per_hour": 1000,
            "vllm": QUICK,
            "pools": {"stopped": {}, "mute": {"vllm": {**QUICK, "mark": f"{tmp_path}/m"}}},
        },
        num_steps=40,
        make=lambda name, pool, number: (make_mute if name == "mute" else make)(name, pool, number),
    )
    slots = stopped, mute = slot_of(run, "stopped-0"), slot_of(run, "mute-0")
    until(run, lambda: stopped.in_flight and mute.in_flight and stopped.status and mute.status)
    pids = [slot.status["pid"] for slot in slots]
    os.kill(pids[0], signal.SIGSTOP)  # from now on nothing moves
    until(run, lambda: is_new(stopped, pids[0]) and is_new(mute, pids[1]))
    why = {name: text for _, name, text in reversed(recoveries(run))}  # the first of each
    assert why["stopped-0"] == "Hang: no answer for 10 s"
    assert re.fullmatch(r"Hang: no token for \d+ s with \d+ completions in flight", why["mute-0"])
    written = {writer for row in finish(run, tmp_path, 40) for writer in writers(row)}
    # a busy machine may hold a successor still for as long, and then it has one, too
    assert written - {pids[0]} and pids[1] not in written
    until(run, lambda: not any(map(is_there, pids)))  # they hold no GPU any more


def test_an_engine_that_is_told_to_go_finishes_what_it_has_and_takes_nothing_new_and_all_go_with_the_run(
    start: Start, tmp_path: Path
) -> None:
    slow = {**SLOW, "drain_s": 100.0}
    run = start({"num": 2, "vllm": slow}, Signed, max_tokens=200, **HELD)
    slot = first(run, lambda slot: len(slot.in_flight) == 8 and slot.status.get("num_groups") == 8)
    pid, had = slot.status["pid"], set(slot.in_flight)
    os.kill(pid, signal.SIGTERM)
    # on a busy machine it may have left before anyone looks
    until(run, lambda: slot.state == "leaving" or is_new(slot, pid))
    begun = max(run.ring.running, default=max(had))
    until(run, lambda: is_new(slot, pid))
    assert [(who, name) for who, name, _ in recoveries(run)] == [("engine", slot.name)]
    assert recoveries(run)[0][2].startswith("left: ")
    ray.get(run.learner.pace.remote(0.0))
    rows = {row["group_id"]: row for row in finish(run, tmp_path, 14)}
    finished = [group_id for group_id in had if writers(rows[group_id]) == {pid}]
    # One that was on its way to the engine when it was told may have been refused: then it is wholly
    # another's.
    assert len(finished) >= 4 and all(pid not in writers(rows[group_id]) for group_id in had - {*finished})
    assert not any(pid in writers(row) for group_id, row in rows.items() if group_id > begun)
    assert any(slot.status["pid"] in writers(row) for row in rows.values())
    pids = [each.status["pid"] for each in run.engines.slots]
    assert len({*pids}) == 2 and all(map(is_there, pids))
    run.close()  # Ray goes on
    while any(map(is_there, pids)):  # `run` still has their handles
        time.sleep(0.1)


def test_a_run_waits_while_its_only_engine_has_gone_with_its_node_and_goes_on_when_another_node_joins(
    start: Start, cluster: Cluster, tmp_path: Path
) -> None:
    def join() -> Any:
        return add_node(cluster, num_cpus=0, resources={"spot": 1})

    def waits() -> bool:
        lines = status_lines(run.status())
        return (
            slot.state == "wanted"
            and "no engine is running: the run waits for the first that comes back" in lines
        )

    node = join()
    run = start({"num_cpus": 0, "resources": {"spot": 1}, "vllm": SLOW}, Signed, num_steps=6)
    slot = slot_of(run, "engines-0")
    until(run, lambda: slot.in_flight and slot.status)
    pids, node_id = [slot.status["pid"]], slot.node
    accepted, why_not = ray._raylet.GcsClient(address=cluster.address).drain_node(
        node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", int(1000 * (time.time() + 7))
    )
    assert accepted, why_not
    until(run, waits)
    assert recoveries(run) == [("engine", "engines-0", f"left: node {node_id[:8]} is about to go")]
    cluster.remove_node(node)
    node = join()
    # One table may be what the first engine was cut off at; the next is what the second has finished.
    until(
        run,
        lambda: (
            is_new(slot, pids[0]) and any(len(group.kept) >= 2 for group in list(slot.in_flight.values()))
        ),
    )
    assert slot.node != node_id
    pids.append(slot.status["pid"])
    cluster.remove_node(node)  # without a word
    until(run, waits)
    assert recoveries(run)[1:] == [("engine", "engines-0", "its process or its node died")]
    assert run.num_finished() < 24
    node = join()
    written = {writer for row in finish(run, tmp_path, 6) for writer in writers(row)}
    assert written == {*pids, slot.status["pid"]} and len(written) == 3
    run.close()
    cluster.remove_node(node)


def test_an_engine_that_cannot_start_ends_the_run_after_a_few_tries_with_the_cause(
    start: Start, tmp_path: Path
) -> None:
    run = start({"vllm": {"file": f"{tmp_path}/starts"}}, Broken, num_steps=1)
    with pytest.raises(RunError, match=r"^RuntimeError: no such model: tiny$"):
        until(run, lambda: False)
    assert (tmp_path / "starts").read_text() == "x" * supervisor.MAX_FAILURES
    why = ("engine", "engines-0", "RuntimeError: no such model: tiny")
    assert recoveries(run) == [why] * supervisor.MAX_FAILURES
    assert ray.get(run.done, timeout=60) is None  # the learner was told
    assert run.session.call(run.buffer.status())["error"] == why[2]


# --- the buffer ---------------------------------------------------------------------------------------------


def test_a_buffer_that_is_killed_loses_no_group_and_no_step_and_repeats_none(
    start: Start, tmp_path: Path
) -> None:
    run = start({"vllm": QUICK}, num_steps=20, max_staleness=2)
    for number in (1, 2):
        until(run, lambda number=number: run.num_finished() > 20 * number and run.ring.running)
        (pid,) = tiny.descendants("ray::_BufferActor")
        os.kill(pid, signal.SIGKILL)
        until(run, lambda number=number: len(recoveries(run)) == number)
    num_tokens = sum(len(ids) for row in finish(run, tmp_path, 20) for ids in row["completion_ids"])
    until(run, lambda: sum(slot.num_tokens for slot in run.engines.slots) >= num_tokens)
    # what was in flight was not begun again
    assert sum(slot.num_tokens for slot in run.engines.slots) == num_tokens
    assert [(who, name) for who, name, _ in recoveries(run)] == [("buffer", "buffer")] * 2
    assert all("it is rebuilt from its log" in why for _, _, why in recoveries(run))
    assert run.status()["buffer"]["num_finished"] == 80 and not run.ring.running


def test_a_buffer_does_not_grow_with_the_groups_that_wait_for_a_slow_learner(
    start: Start, tmp_path: Path
) -> None:
    run = start({"vllm": {"seconds_per_token": 1e-5}}, num_steps=1 << 30, max_tokens=8000)
    folder, mib = tmp_path / "groups", 1 << 20

    def logged() -> int:
        return sum(segment.stat().st_size for segment in folder.glob("*.arrow"))

    until(run, lambda: len(GroupLog(folder).assigned) >= 2 if folder.exists() else False)
    ray.get(run.learner.pace.remote(1e6))  # after the step that it is at
    (pid,) = tiny.descendants("ray::_BufferActor")
    bytes_before, memory_before, steps_before = (
        logged(),
        psutil.Process(pid).memory_full_info().uss,
        len(GroupLog(folder).assigned),
    )
    until(run, lambda: logged() > bytes_before + 40 * mib)
    status = run.status()["buffer"]
    assert psutil.Process(pid).memory_full_info().uss < memory_before + 10 * mib
    # the learner is behind indeed
    assert status["num_waiting"] > 0.5 * (status["num_finished"] - 4 * steps_before)
    run.close()
    shutil.rmtree(folder)


# --- what is slow, or does not come -------------------------------------------------------------------------


def test_long_completions_are_all_trained_on_while_a_pool_without_a_place_stays_wanted(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "lengths").mkdir()
    tail = {"seconds_per_token": 0.0005, "median_tokens": 50.0, "sigma": 1.5, "folder": f"{tmp_path}/lengths"}
    pools = {"here": {"num": 2}, "nowhere": {"resources": {"no node has this": 1}}}
    run = start(
        {"vllm": tail, "pools": pools},
        Recording,
        num_steps=12,
        groups_per_step=10,
        max_staleness=2,
        max_tokens=4000,
    )
    rows = finish(run, tmp_path, 12, 10)
    lengths = sorted(len(ids) for row in rows for ids in row["completion_ids"])
    sampled = sorted(
        int(line) for file in (tmp_path / "lengths").iterdir() for line in file.read_text().splitlines()
    )
    assert lengths == sampled and len(lengths) == 120 * K
    assert lengths[-1] > 20 * lengths[len(lengths) // 2]  # there is a tail
    assert [row["group_id"] for row in rows] != list(range(120))  # overtaken, not left out
    until(run, lambda: sum(slot.num_tokens for slot in run.engines.slots) == sum(lengths))
    nowhere = slot_of(run, "nowhere-0")
    assert nowhere.state == "wanted" and not nowhere.num_tokens and not recoveries(run)
    lines = status_lines(run.status())
    assert (
        "engines of nowhere: 1 wanted; 0 groups in flight" in lines
        and "engines of here: 2 running; 0 groups in flight" in lines
    )
    assert any(
        line.startswith("  nowhere-0: wanted {'CPU': 0.1, 'no node has this': 1.0}, since ") for line in lines
    )


def test_the_watchdog_and_the_status_command_say_who_waits_for_whom(start: Start, tmp_path: Path) -> None:
    began = time.time()
    run = start(
        {"max_groups": 3, "vllm": {"seconds_per_token": 1e6}},
        num_steps=9,
        watchdog_s=2.0,
        replay=ReplayConfig(share=0.5),
    )
    slot = slot_of(run, "engines-0")
    until(run, lambda: slot.state == "running" and len(slot.in_flight) == 3)
    before = len(run.said)
    until(run, lambda: len(run.said) >= before + 3)
    assert len(run.said) <= (time.time() - began) / 2.0
    lines = run.said[-1].splitlines()
    assert re.fullmatch(
        r"watchdog: no group has finished for \d+ s and no step has ended for \d+ s", lines[0]
    )
    stages = [
        "driver: step 0 of 9, training",
        r"learner: waits for groups: step 1 has 0 of 4, since .* ago",
        "buffer: version 0, 0 groups finished, 0 of them wait for the learner, 3 on their way; the "
        "staleness bound is open",
        "engines of engines: 1 running; 3 groups in flight",
        "verifiers: verifier-0 has 0 calls",
        r"oldest group on its way: 0, begun .* ago, now at engines-0: 'prompt 0'",
        "free resources: CPU .*",
    ]
    for said, stage in zip(lines[1:], stages, strict=True):
        assert re.fullmatch(f"  {stage}", said)
    (tmp_path / "config.yaml").write_text("")
    head, *written = read_status(tmp_path)
    assert str(tmp_path) in head
    for line, stage in zip(written, stages, strict=True):
        assert re.fullmatch(stage, line)


# --- replay -------------------------------------------------------------------------------------------------


def test_half_of_a_later_groups_completions_are_logged_ones_of_its_prompt_with_their_rewards(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "count.py").write_text(
        "import itertools\nnumber = itertools.count()\n"
        "def reward(prompts, completions, **columns):\n    return [float(next(number)) for _ in prompts]\n"
    )
    run = start(
        {"vllm": {"seconds_per_token": 0.001}},
        max_tokens=100,
        num_steps=8,
        max_staleness=0,
        num_prompts=4,
        replay=ReplayConfig(share=0.5),
        reward=f"{tmp_path}/count.py:reward",
    )
    rows = sorted(finish(run, tmp_path, 8), key=lambda row: row["group_id"])
    new: dict[float, tuple[Any, ...]] = {}  # by its reward, which no check gives twice
    for row in rows:
        is_replayed = [source == "replay" for source in row["sources"]]
        assert sum(is_replayed) == (0 if row["group_id"] < 4 else 4)
        replayed = [column for column, again in zip(columns(row), is_replayed, strict=True) if again]
        assert len({entry[0] for entry in replayed}) == len(replayed)
        assert all(new[entry[0]] == entry for entry in replayed)
        new.update(
            {entry[0]: entry for entry, again in zip(columns(row), is_replayed, strict=True) if not again}
        )
    assert len(new) == 4 * K + 28 * K // 2


def columns(row: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Of each completion: its reward, its prompt, and what its engine said of it."""
    names = (
        "rewards",
        "completion_ids",
        "sampling_logprobs",
        "completions",
        "version_min",
        "version_max",
        "finish_reasons",
    )
    return [
        (values[0], row["prompt"], *values[1:]) for values in zip(*(row[name] for name in names), strict=True)
    ]


# --- engines of several nodes -------------------------------------------------------------------------------


class Process:
    """One of vLLM's processes: it holds a GPU, and says on which node."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


class Spread(FakeEngine):
    """Starts processes as vLLM's Ray executor does, one in each bundle with a GPU of its actor's placement
    group, and writes down where.
    """

    def __init__(self, file: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._file = file

    async def start(self) -> dict[str, Any]:
        placement = ray.util.get_current_placement_group()
        bundles = [i for i, bundle in enumerate(placement.bundle_specs) if bundle.get("GPU")]
        self._processes = [
            ray.remote(Process)
            .options(
                num_cpus=0,
                num_gpus=1,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement, placement_group_bundle_index=i
                ),
            )
            .remote()
            for i in bundles
        ]
        nodes = [await process.node.remote() for process in self._processes]
        with open(self._file, "a") as file:
            file.write(json.dumps({"pid": os.getpid(), "nodes": nodes}) + "\n")
        return await super().start()


class SpreadActor(ActorMethods, Spread):
    pass


def test_an_engine_gets_gpus_of_two_nodes_and_gives_them_back_when_it_dies_and_when_it_is_closed(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPUs are only said to be there; vLLM's own functions read the placement group."""
    from vllm.platforms import current_platform
    from vllm.v1.executor import ray_utils

    monkeypatch.setattr(type(current_platform), "ray_device_key", "GPU")
    added = [add_node(cluster, num_cpus=1, num_gpus=2, object_store_memory=100 << 20) for _ in range(2)]
    file = tmp_path / "started"

    def make(name: str, pool: Any, number: int, placement: Any) -> Any:
        options = actor_options(name, pool, number, placement)
        return ray.remote(SpreadActor).options(**options).remote(file=str(file))

    def started() -> list[dict[str, Any]]:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    async def until_true(condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(240):
            while not condition():
                assert not run.done() or run.exception() is None, run.exception()
                await asyncio.sleep(0.1)

    def free() -> float:
        return float(ray.available_resources().get("GPU", 0.0))

    ray.init(address=cluster.address)
    notes: list[tuple[str, str, str]] = []
    config = {"num_cpus": 0.1, "num_gpus": 4, "tensor_parallel_size": 4}
    config |= {"vllm": {"distributed_executor_backend": "ray"}, "start_s": 200}
    group = EngineGroup(EnginesConfig.model_validate(config), K, make, None, lambda *note: notes.append(note))

    async def main() -> None:
        nonlocal run
        run = asyncio.ensure_future(group.run())
        try:
            (slot,) = group.slots
            await until_true(lambda: slot.state == EngineState.RUNNING)
            (before,) = started()
            assert sorted(Counter(before["nodes"]).values()) == [2, 2] and free() == 0
            parallel = SimpleNamespace(placement_group=slot.placement, world_size=4, tensor_parallel_size=4)
            ray_utils.initialize_ray_cluster(parallel, require_gpu_on_driver=False)
            bundles = ray_utils.get_bundles_sorted_by_node(slot.placement)
            assert sorted(number for number, _, _ in bundles) == [0, 1, 2, 3]
            first = slot.placement
            os.kill(before["pid"], signal.SIGKILL)
            await until_true(lambda: len(started()) == 2 and slot.state == EngineState.RUNNING)
            assert ray.util.placement_group_table(first)["state"] == "REMOVED"
            assert slot.placement is not first and len(notes) == 1
            await group.close()
            await until_true(lambda: free() == 4)
        finally:
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)

    run: asyncio.Future[None] = None  # type: ignore[assignment]
    try:
        asyncio.run(main())
    finally:
        ray.shutdown()
        for node in added:
            cluster.remove_node(node)


class Teacher(references._ReferenceActor):
    """Says of a completion its number of characters: what a model says of it, test_scoring_model tests."""

    def __init__(self, path: str, renderings: Renderings, *_: Any) -> None:
        assert json.loads((Path(path) / "config.json").read_text()) == {}
        self.renderings = renderings

    def score(self, texts: Sequence[Text], key: str = "prompts") -> list[Score]:
        return [Score(-float(len(text.completion)), len(text.completion)) for text in texts]


def test_another_model_scores_every_group_before_it_is_logged_and_is_started_again_when_it_dies(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight groups are logged; the model dies, and those after them are scored by the next process."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    monkeypatch.setattr(references, "_ReferenceActor", Teacher)
    loss = GvpoLoss(reference=ScoringModelConfig(model=str(tmp_path / "teacher"), num_cpus=0.1))
    run = start({"num": 1}, step_s=None, max_staleness=1, num_steps=3, max_tokens=8, loss=loss)
    until(run, lambda: run.num_finished() == 8)
    (actor,) = run.ring._references.actors
    os.kill(ray.get(actor.score_texts.remote([], "prompts"))[1], signal.SIGKILL)
    ray.get(run.learner.pace.remote(0.0))
    rows = finish(run, tmp_path, num_steps=3)
    ((who, name, why),) = recoveries(run)
    assert (who, name) == ("reference", "reference-0") and why.endswith("was scored again")
    for row in rows:
        assert row["reference_logprobs"] == [-float(len(text)) for text in row["completions"]]
        assert row["reference_versions"] == [version_of(str(tmp_path / "teacher"))] * K
    assert "reference-0 has 0 calls" in "".join(status_lines(run.status()))

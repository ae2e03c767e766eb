"""Situations in which a run would wait for ever or spin, each bounded by the time limit of `run`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray
from buffers import answer, make, make_again, put, run, settle, waits
from tiny import make_checkpoint, make_group, table

from gvpo_ray import groups
from gvpo_ray.actors import RunError
from gvpo_ray.buffer.actor import LearnerBufferClient
from gvpo_ray.buffer.buffer import GroupBuffer
from gvpo_ray.buffer.log import Quarantine
from gvpo_ray.config.data import ReplayConfig
from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.data.mixture import SourceSchedule
from gvpo_ray.files import lock
from gvpo_ray.learner import workers
from gvpo_ray.learner.checkpoints import LOCK, settled_checkpoint
from gvpo_ray.run.inputs import Inputs
from gvpo_ray.run.rollouts import Ring

NUM_SLOTS = 4


class Prompts:
    """Prompts of these texts, in their order in each epoch."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def _row(self, group_id: int) -> dict[str, Any]:
        row = make_group(group_id)
        texts = {"prompt": self._texts[group_id % len(self)], "answer": "7"}
        return {**{name: row[name] for name in groups.PROMPT_COLUMNS}, **texts}

    def group(self, group_id: int) -> pa.Table:
        return groups.table([self._row(group_id)])

    def all(self) -> pa.Table:
        return groups.table([self._row(i) for i in range(len(self))])


class Engines:
    """Engines of NUM_SLOTS slots, in which a group keeps its slot while it waits for its version."""

    def __init__(self, buffer: GroupBuffer) -> None:
        self.buffer, self.room = buffer, asyncio.Event()
        self.slots = [SimpleNamespace()]
        self.max_groups = NUM_SLOTS
        self._free = asyncio.Semaphore(NUM_SLOTS)
        self.num_sampled = 0

    def num_free(self) -> int:
        return self._free._value

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def sample(self, prompt: pa.Table, sampling: Any, min_version: int, **options: Any) -> pa.Table:
        async with self._free:
            while self.buffer._weights is None or self.buffer._weights[0] < min_version:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            self.num_sampled += 1
            row = next(groups.rows(prompt))
            return table({**make_group(row["group_id"]), "prompt": row["prompt"], "answer": row["answer"]})


class Verifiers:
    """Every check hits its limit, or none does."""

    actors = (1,)

    def __init__(self, is_slow: Callable[[str], bool] = lambda prompt: False) -> None:
        self._is_slow = is_slow
        self.calls: list[list[str]] = []
        """The prompts of each call."""
        self.at_a_call: Callable[[], None] = lambda: None

    async def score(self, sampled: pa.Table) -> pa.Table:
        self.at_a_call()
        self.calls.append(sampled["prompt"].to_pylist())
        lists = {name: sampled[name].to_pylist() for name in ("rewards", "reward_reasons")}
        for i, prompt in enumerate(self.calls[-1]):
            if self._is_slow(prompt):
                num = len(lists["rewards"][i])
                lists["rewards"][i] = [None] * num
                lists["reward_reasons"][i] = ["timeout: math took more than 10 s"] * num
        return groups.with_columns(sampled, **lists)


class Source(Prompts):
    """Whole groups of people, with the same prompts in each epoch."""

    def _row(self, group_id: int) -> dict[str, Any]:
        return {**super()._row(group_id), "dataset": "people"}

    def group(self, group_id: int, number: int) -> pa.Table:  # type: ignore[override]
        row = self._row(number)
        more = {name: row[name] for name in ("prompt", "answer", "dataset")}
        if row["prompt"].startswith("check"):
            more["rewards"] = [1.0, 0.0, None]
        return table({**make_group(group_id, (1.0, 0.0, 0.5)), **more})


def ring_of(
    folder: Path,
    buffer: GroupBuffer,
    texts: list[str],
    is_slow: Callable[[str], bool] = lambda prompt: False,
    share: float = 0.0,
    offline: list[str] | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Ring, Engines]:
    """The real rollout loop on a real buffer, in this process; a `share` of the groups is `offline`."""
    engines = Engines(buffer)
    sources = {"people": Source(offline or [])}
    schedule = SourceSchedule({"people": share} if share else {})
    inputs = Inputs(Prompts(texts) if texts else None, {}, 1 << 20, sources, schedule, {})  # type: ignore[arg-type]
    ring = Ring(
        inputs,
        engines,  # type: ignore[arg-type]
        Verifiers(is_slow),  # type: ignore[arg-type]
        buffer,  # type: ignore[arg-type]
        Quarantine(folder / "quarantine.jsonl", VerifiersConfig()),
        SamplingConfig(num_completions=3),
        ReplayConfig(),
        300.0,
        folder,
        lambda: {"recoveries": {}},
        lambda who, name, why: None,
        say,
    )

    async def watch() -> None:
        await asyncio.Event().wait()

    ring.watch = watch  # type: ignore[method-assign]
    return ring, engines


# ------------------------------------------------------------------------------------------------ what waits


@pytest.mark.parametrize(("has_model", "most", "together"), [(False, 64, 4), (False, 3, 2), (True, 64, 1)])
def test_whole_groups_with_all_their_rewards_go_together_and_each_other_one_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_model: bool, most: int, together: int
) -> None:
    """At most so many of them; of three that follow each other one is in quarantine, and skipped."""
    monkeypatch.setattr(ray, "put", groups.from_wire)
    monkeypatch.setattr("gvpo_ray.run.rollouts.MAX_TOGETHER", most)

    async def main() -> None:
        buffer = make(tmp_path / "groups", groups_per_step=4, num_steps=5, max_staleness=None)
        await buffer.published(0, {})
        ring, engines = ring_of(tmp_path, buffer, ["a"], share=0.5, offline=["x", "check y", "z"])
        ring._quarantine.add(Source(["z"]).all())
        engines.slots = []  # all groups may start at once
        verifiers: Any = ring._verifiers
        skip, skipped = buffer.skip, set()

        async def skip_and_note(group_id: int) -> None:
            await skip(group_id)
            skipped.add(group_id)

        def nothing_waits_for_what_is_skipped() -> None:  # a new buffer would, for what is running
            assert not skipped & ring.running.keys()

        monkeypatch.setattr(buffer, "skip", skip_and_note)
        verifiers.at_a_call = nothing_waits_for_what_is_skipped
        if has_model:  # it has actors of its own, and each of them should have something to do
            ring._references = verifiers  # type: ignore[assignment]
        running = asyncio.ensure_future(ring.run())
        while len(buffer.log) < 20:
            assert not running.done()
            await asyncio.sleep(0)
        await settle()
        assert not ring.running and len(buffer.log) == 20
        logged = buffer.log.read(0, 20).select(["prompt", "rewards"]).to_pylist()
        last = {"a": 0.5, "x": 0.5, "check y": None}
        assert all(row["rewards"] == [1.0, 0.0, last[row["prompt"]]] for row in logged)
        sizes = {text: [len(call) for call in verifiers.calls if text in call] for text in last}
        assert all(len({*call}) == 1 for call in verifiers.calls)
        assert {*sizes["a"], *sizes["check y"]} == {1} and max(sizes["x"]) == together
        assert skipped
        assert sum(map(len, verifiers.calls)) == (40 if has_model else 20)
        running.cancel()

    run(main)


# -------------------------------------------------------------------------------------------- behind the log


def test_an_evaluation_of_a_run_taken_up_between_checkpoints_gets_the_slots_of_groups_that_wait(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        first = make(tmp_path / "groups", groups_per_step=4, max_staleness=1)
        await put(first, *range(20))
        for step in range(1, 6):
            await first.batch(step)
        # Killed. The last checkpoint is that of step 1, where the learner stays until the driver lets it on.
        buffer = make_again(first, groups_per_step=4, max_staleness=1, version=1)
        ring, engines = ring_of(tmp_path, buffer, [f"p{i}" for i in range(100)])
        running = asyncio.ensure_future(ring.run())
        await buffer.learner_started(1)
        await buffer.published(1, {})
        await settle()
        assert buffer.version == 4 and ring.running  # groups were started, which ask for version 4
        for _ in range(2):  # two held-out sets, of which each is sampled by itself
            held_out = Prompts(["held out"]).all()
            await asyncio.gather(*(engines.sample(held_out, None, 1) for _ in range(12)))
            await settle()
        assert engines.num_sampled == 24 and not running.done()
        await buffer.permit(4)
        for step in (2, 3, 4):
            assert await answer(buffer.next_command(step)) == "train"
            await buffer.batch(step)
            await buffer.published(step, {}, {"loss": 0.0})
        while len(buffer.log) == 20:
            await asyncio.sleep(0)  # the groups go on once their version is there
        await buffer.close()
        running.cancel()

    run(main)


def test_a_group_that_waits_for_a_version_ends_with_the_run(tmp_path: Path) -> None:
    async def main() -> None:
        buffer = make(tmp_path)
        waiting = await waits(buffer.reached(3))
        await buffer.published(2, {})
        await settle()
        assert not waiting.done()
        await buffer.published(4, {})
        assert await answer(waiting) == 4 == await answer(buffer.reached(4))
        waiting = await waits(buffer.reached(5))
        await buffer.close()
        assert await answer(waiting) is None

    run(main)


# --------------------------------------------------------------------------------- driver and learner, apart


def test_a_driver_catches_up_with_a_learner_that_started_from_a_newer_checkpoint(tmp_path: Path) -> None:
    async def main() -> None:
        before = make(tmp_path, version=10)
        for step in range(11, 21):  # of the process before
            await before.published(step, {}, {"loss": float(step)})
        buffer = make_again(before, version=10)  # the driver has seen the checkpoint of step 10
        await buffer.permit(11)
        waiting = await waits(buffer.trained(11))
        await buffer.learner_started(20)  # and the learner that of step 20
        await buffer.published(20, {}, None)
        order = await waits(buffer.next_command(21, saved=True))
        assert await answer(waiting) == {"loss": 11.0}
        assert [await answer(buffer.trained(step)) for step in (12, 20)] == [{"loss": 12.0}, {"loss": 20.0}]
        await waits(buffer.trained(21))
        await buffer.permit(21)
        assert await answer(order) == "train"

    run(main)


def test_a_step_whose_metrics_died_with_the_buffer_is_answered_from_the_disk(tmp_path: Path) -> None:
    async def main() -> None:
        buffer = make(tmp_path)
        await buffer.published(5, {}, {"loss": 1.0})
        # The buffer is killed, then the learner, which had saved step 5 meanwhile.
        again = make_again(buffer)
        waiting = await waits(again.trained(5))
        await again.learner_started(5)
        assert await answer(waiting) == {"loss": 1.0}
        # A learner that comes back behind the step makes it again first.
        third = make_again(again)
        await third.learner_started(4)
        await waits(third.trained(5))

    run(main)


class Handle:
    """A handle of the last of some buffers, to which Ray's restarts add."""

    def __init__(self, buffers: list[GroupBuffer]) -> None:
        self.buffers = buffers

    def __getattr__(self, method: str) -> Any:
        async def call(*arguments: Any) -> Any:
            return await getattr(self.buffers[-1], method)(*arguments)

        return SimpleNamespace(remote=call)


@pytest.fixture
def buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[GroupBuffer]:
    async def batch_on_wire(self: GroupBuffer, step: int) -> None:
        return None

    monkeypatch.setattr(GroupBuffer, "batch_on_wire", batch_on_wire, raising=False)
    monkeypatch.setattr(ray, "get", lambda call: asyncio.run(asyncio.wait_for(call, 10)))
    return [make(tmp_path, groups_per_step=1)]


def test_a_learner_tells_a_buffer_that_was_restarted_unnoticed_where_its_weights_are(
    buffers: list[GroupBuffer],
) -> None:
    """No call was in flight when it died, so none has failed; engines would wait for weights for ever."""
    learner, other_rank = LearnerBufferClient(Handle(buffers)), LearnerBufferClient(Handle(buffers))
    learner.published(3, "weights 3", {"loss": 1.0})
    questions: list[Callable[[], Any]] = [lambda: learner.next_command(4, False), lambda: learner.batch(4)]
    for question in questions:
        buffers.append(make_again(buffers[-1], groups_per_step=1))
        asyncio.run(buffers[-1].permit(4))
        other_rank.next_command(4, False)  # knows of no weights, and has nothing to tell
        assert buffers[-1]._weights is None
        question()
        assert asyncio.run(buffers[-1].weights(2)) == (3, "weights 3")
        assert asyncio.run(buffers[-1].trained(3)) == {"loss": 1.0}


def test_a_buffer_that_dies_between_the_metrics_of_a_step_and_its_weights_is_told_both(
    buffers: list[GroupBuffer],
) -> None:
    """The driver would wait for the metrics for ever, and the learner for the driver."""
    learner = LearnerBufferClient(Handle(buffers))
    learner.published(3, "weights 3", None)
    learner.published(4, None, {"loss": 1.0})
    buffers.append(make_again(buffers[-1], groups_per_step=1))
    asyncio.run(buffers[-1].permit(5))
    learner.next_command(5, False)
    assert asyncio.run(asyncio.wait_for(buffers[-1].trained(4), 10)) == {"loss": 1.0}
    assert asyncio.run(buffers[-1].weights(2)) == (3, "weights 3")
    learner.published(4, "weights 4", None)
    assert asyncio.run(buffers[-1].weights(2)) == (4, "weights 4")


def test_a_restarted_buffer_is_told_no_older_weights_after_newer_ones(
    buffers: list[GroupBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread publishes while another one asks: engines would keep the older ones."""
    learner, reminds, newer = LearnerBufferClient(Handle(buffers)), threading.Event(), threading.Event()
    learner.published(3, "weights 3", None)
    buffers.append(make_again(buffers[-1], groups_per_step=1))
    asyncio.run(buffers[-1].permit(5))
    call = learner._call

    def delayed(method: str, *arguments: Any) -> Any:
        if arguments[:2] == (3, "weights 3"):
            reminds.set()
            newer.wait(0.3)  # for ever, if the older ones had to come last
        return call(method, *arguments)

    monkeypatch.setattr(learner, "_call", delayed)

    def publish() -> None:
        assert reminds.wait(10)
        learner.published(4, "weights 4", None)
        newer.set()

    thread = threading.Thread(target=publish)
    thread.start()
    learner.next_command(5, False)
    thread.join()
    assert asyncio.run(buffers[-1].weights(2)) == (4, "weights 4")


@pytest.fixture
def rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_world_rank=lambda: 0)
    monkeypatch.setattr("ray.train.get_context", lambda: context)


def test_a_learner_says_that_it_waits_for_another_and_goes_on_when_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank_0: None
) -> None:
    (tmp_path / "checkpoints").mkdir()
    other, said = lock(tmp_path / LOCK), list[str]()
    monkeypatch.setattr("gvpo_ray.files.time.sleep", lambda seconds: other.close())
    buffer: Any = SimpleNamespace(learner_waits=said.append)
    with workers._sole_writer(tmp_path, buffer), pytest.raises(BlockingIOError):
        lock(tmp_path / LOCK)
    assert said == [f"which still writes to {tmp_path / 'checkpoints'}"]
    with workers._sole_writer(tmp_path, buffer):
        assert len(said) == 1  # nobody is waited for


def test_a_learner_that_does_not_end_is_named_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank_0: None
) -> None:
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(workers, "WRITER_END_S", 0.0)
    closed = list[str]()
    buffer: Any = SimpleNamespace(learner_waits=lambda why: None, close=closed.append)
    monkeypatch.setattr(workers, "LearnerBufferClient", lambda handle: buffer)
    with (
        lock(tmp_path / LOCK),
        pytest.raises(RunError, match=r"another learner still writes to .*checkpoints after 0 s"),
    ):
        workers.train_loop({"run_dir": str(tmp_path), "buffer": None})
    assert len(closed) == 1 and "another learner" in closed[0]


def test_the_status_says_for_whom_a_learner_waits(tmp_path: Path) -> None:
    async def main() -> None:
        buffer = make(tmp_path)
        await buffer.learner_waits("which still writes to runs/a/checkpoints")
        said = (await buffer.status())["learner"]
        assert said == "waits for another learner which still writes to runs/a/checkpoints"

    run(main)


def test_a_new_process_takes_the_checkpoint_that_the_learner_before_it_still_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settled_checkpoint(tmp_path) is None and not (tmp_path / LOCK).exists()

    def save(step: int) -> None:
        make_checkpoint(tmp_path / "checkpoints" / f"step-{step}")

    save(10)
    dying = lock(tmp_path / LOCK)

    def nap(seconds: float) -> None:
        save(20)
        dying.close()

    monkeypatch.setattr("gvpo_ray.files.time.sleep", nap)
    assert settled_checkpoint(tmp_path) == (20, tmp_path / "checkpoints" / "step-20")
    held = lock(tmp_path / LOCK)
    monkeypatch.setattr("gvpo_ray.learner.checkpoints.LEARNER_END_S", 0.0)  # it does not end
    assert settled_checkpoint(tmp_path) == (20, tmp_path / "checkpoints" / "step-20")
    held.close()

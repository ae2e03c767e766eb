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
from gvpo_ray.actors import RunError, cause_of
from gvpo_ray.buffer.actor import LearnerBufferClient
from gvpo_ray.buffer.buffer import GroupBuffer
from gvpo_ray.buffer.log import EndedBy, Quarantine
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

    async def score(self, sampled: pa.Table) -> pa.Table:
        if not self._is_slow(sampled["prompt"][0].as_py()):
            return sampled
        num = len(sampled["completions"][0])
        return groups.with_columns(
            sampled, rewards=[[None] * num], reward_reasons=[["timeout: math took more than 10 s"] * num]
        )


class Source(Prompts):
    """Whole groups of people, with the same prompts in each epoch."""

    def _row(self, group_id: int) -> dict[str, Any]:
        return {**super()._row(group_id), "dataset": "people"}

    def group(self, group_id: int, number: int) -> pa.Table:  # type: ignore[override]
        row = self._row(number)
        texts = {name: row[name] for name in ("prompt", "answer", "dataset")}
        return table({**make_group(group_id), **texts})


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


# ------------------------------------------------------------------------------------------------ quarantine


@pytest.mark.parametrize("texts", [["a", "b", "c", "d"], ["a", "b", "c", "c"], ["a"], ["a", "a", "b", "a"]])
def test_a_run_whose_prompts_are_all_in_quarantine_ends_with_one_line(
    tmp_path: Path, texts: list[str]
) -> None:
    async def main() -> None:
        buffer = make(tmp_path / "groups", groups_per_step=4)
        await buffer.published(0, {})
        ring, _ = ring_of(tmp_path, buffer, texts, is_slow=lambda prompt: True)
        with pytest.raises(ExceptionGroup) as caught:
            await ring.run()
        assert cause_of(caught.value) == (
            f"RunError: every prompt is in {tmp_path / 'quarantine.jsonl'}: no check ends within the limits "
            "of the verifiers section (timeout_s, cpu_s, memory_gib); higher ones release the prompts"
        )
        buffer.release()
        # The same command again: nothing is sampled, and nothing is skipped for ever.
        again = make(tmp_path / "groups", groups_per_step=4)
        await again.published(0, {})
        ring, engines = ring_of(tmp_path, again, texts)
        with pytest.raises(RunError, match="every prompt is in"):
            await ring.run()
        assert engines.num_sampled == 0

    run(main)


@pytest.mark.parametrize("is_taken_up", [False, True])
def test_a_run_whose_prompts_are_all_in_quarantine_goes_on_with_whole_groups_of_a_source_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_taken_up: bool
) -> None:
    monkeypatch.setattr(ray, "put", groups.from_wire)

    async def main() -> None:
        buffer = make(tmp_path / "groups", groups_per_step=4, num_steps=5)
        await buffer.published(0, {})
        said: list[str] = []
        ring, engines = ring_of(
            tmp_path, buffer, ["a", "b"], lambda prompt: prompt in "ab", 0.25, ["x", "y"], said.append
        )
        if is_taken_up:
            for i in range(2):
                ring._quarantine.add(Prompts(["a", "b"]).all().slice(i, 1))
        running = asyncio.ensure_future(ring.run())
        while len(buffer.log) < 20:
            assert not running.done()
            await asyncio.sleep(0)
        datasets = buffer.log.read(0, 20)["dataset"].to_pylist()
        assert datasets.count("people") >= 16 and engines.num_sampled <= NUM_SLOTS
        assert engines.num_sampled == 0 or not is_taken_up
        assert said == [
            f"every prompt of prompts is in {tmp_path / 'quarantine.jsonl'}: the run goes on with "
            "sources.people"
        ]
        running.cancel()

    run(main)


@pytest.mark.parametrize(
    ("texts", "share", "offline", "is_slow"),
    [
        (["a"], 0.5, ["x"], lambda prompt: True),
        (["a"], 1.0, ["x", "y"], lambda prompt: prompt != "a"),  # no group has an ordinary prompt
        ([], 1.0, ["x"], lambda prompt: True),
    ],
)
def test_a_run_of_which_no_group_is_left_ends_with_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: list[str],
    share: float,
    offline: list[str],
    is_slow: Callable[[str], bool],
) -> None:
    monkeypatch.setattr(ray, "put", groups.from_wire)

    async def main() -> None:
        buffer = make(tmp_path / "groups", groups_per_step=4)
        await buffer.published(0, {})
        ring, _ = ring_of(tmp_path, buffer, texts, is_slow, share, offline)
        with pytest.raises(ExceptionGroup) as caught:
            await ring.run()
        assert "every prompt is in" in cause_of(caught.value)

    run(main)


def test_a_run_goes_on_while_one_prompt_is_not_in_quarantine(tmp_path: Path) -> None:
    async def main() -> None:
        buffer = make(tmp_path / "groups", groups_per_step=4, num_steps=3)
        await buffer.published(0, {})
        ring, _ = ring_of(tmp_path, buffer, ["a", "b", "c", "a"], is_slow=lambda prompt: prompt != "b")
        running = asyncio.ensure_future(ring.run())
        while len(buffer.log) < 12:
            await asyncio.sleep(0)
        texts = buffer.log.read(0, 12)["prompt"].to_pylist()
        assert texts.count("b") >= 8 and not running.done()
        running.cancel()

    run(main)


def test_higher_limits_release_prompts_from_quarantine_and_lower_ones_do_not(tmp_path: Path) -> None:
    prompts = Prompts(["a", "b"]).all()
    path, limits = tmp_path / "quarantine.jsonl", VerifiersConfig(timeout_s=10, cpu_s=5, memory_gib=2)
    first = Quarantine(path, limits)
    for i in range(2):
        first.add(prompts.slice(i, 1))
    assert first.holds_all(prompts)
    assert Quarantine(path).holds_all(prompts) and Quarantine(path, limits).holds_all(prompts)
    lower = limits.model_copy(update={"timeout_s": 5})
    assert Quarantine(path, lower).holds_all(prompts)
    for change in ({"timeout_s": 20}, {"cpu_s": 6}, {"memory_gib": 2.5, "timeout_s": 1}):
        higher = Quarantine(path, limits.model_copy(update=change))
        assert len(higher) == 0 == len(higher.entries()) and not higher.holds(prompts.slice(0, 1))
    higher.add(prompts.slice(1, 1))  # the limits were still too low
    again = Quarantine(path, limits.model_copy(update=change))
    assert [entry["prompt"] for entry in again.entries()] == ["b"] and not again.holds_all(prompts)


def _ended(buffer: GroupBuffer, reasons: list[str | None], **columns: Any) -> EndedBy:
    rewards = tuple(1.0 if reason is None else None for reason in reasons)
    episodes = ['{"name": "0"}'] * len(reasons)
    group = make_group(0, rewards, **{"reward_reasons": reasons, "episodes": episodes} | columns)
    return asyncio.run(buffer.put(groups.table([group])))


LATE = "timeout: environment: reset: no answer within 1 s"
AGENT = "timeout: environment: the agent: no call of the model"


@pytest.mark.parametrize(
    ("reasons", "cut_off"),
    [
        ([LATE, AGENT], EndedBy.LATE),
        ([LATE, f"math: no answer\n{LATE}"], EndedBy.LATE),
        ([LATE, "timeout: math took more than 1 s"], EndedBy.CHECKS),
        ([LATE, "crash: environment: reset: exited"], EndedBy.CHECKS),
        ([LATE, None], EndedBy.WELL),
        ([LATE, "environment: reset raised KeyError"], EndedBy.NONE),
        (["environment: lost", "environment: lost"], EndedBy.NONE),
        ([None, None], EndedBy.WELL),
    ],
)
def test_the_clock_of_an_environment_is_told_from_the_limits_of_a_check(
    tmp_path: Path, reasons: list[str | None], cut_off: EndedBy
) -> None:
    assert _ended(make(tmp_path), reasons) is cut_off


def test_a_group_in_which_nothing_was_played_says_nothing_about_the_environment(tmp_path: Path) -> None:
    whole = {"sources": ["offline:people"] * 2, "episodes": None}
    assert _ended(make(tmp_path / "whole"), [None, None], **whole) is EndedBy.NONE
    replayed = {"sources": ["replay", "policy"]}
    assert _ended(make(tmp_path / "replayed"), [None, LATE], **replayed) is EndedBy.NONE
    assert _ended(make(tmp_path / "played"), [LATE, None], **replayed) is EndedBy.WELL


def test_an_environment_that_is_late_is_the_prompts_fault_if_others_go_well(tmp_path: Path) -> None:
    a, b, c = (Prompts(["a", "b", "c"]).all().slice(i, 1) for i in range(3))
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, VerifiersConfig(), environment_s=60.0)
    quarantine.judge(c, EndedBy.WELL)  # before the first time: it says nothing
    # a busy machine: all are late
    assert not quarantine.judge(a, EndedBy.LATE) and not quarantine.judge(b, EndedBy.LATE)
    quarantine.judge(c, EndedBy.NONE)  # nothing was played, or all of it was lost
    assert not quarantine.judge(b, EndedBy.LATE)
    quarantine.judge(c, EndedBy.WELL)
    # a again, though another prompt's group went well meanwhile; b for the third time
    assert quarantine.judge(a, EndedBy.LATE) and quarantine.judge(b, EndedBy.LATE)
    assert not quarantine.judge(c, EndedBy.LATE) and not quarantine.holds(c)
    quarantine.judge(c, EndedBy.WELL)  # so it was not c's fault
    assert not quarantine.judge(c, EndedBy.LATE) and not quarantine.holds(c)
    assert quarantine.holds(a) and quarantine.holds(b)
    assert quarantine.what_ends().startswith("no environment answers within environment.timeout_s")
    # the limit that they hit releases them, and no other one
    assert len(Quarantine(path, VerifiersConfig(timeout_s=100), environment_s=60.0)) == 2
    assert len(Quarantine(path, VerifiersConfig(), environment_s=61.0)) == 0
    # a check's limit is certain at once
    assert quarantine.judge(c, EndedBy.CHECKS)
    assert quarantine.what_ends().startswith("no check ends within the limits of the verifiers section")
    assert len(Quarantine(path, VerifiersConfig(), environment_s=61.0)) == 1


def test_a_run_whose_environments_are_all_late_ends_with_one_line(tmp_path: Path) -> None:
    """Nobody has to wait for ever for a machine that does not recover, and the line names the limit."""
    prompts = Prompts(["a", "b"]).all()
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", VerifiersConfig(), environment_s=60.0)
    for _ in range(2):
        assert not any(quarantine.judge(prompts.slice(i, 1), EndedBy.LATE) for i in range(2))
    assert all(quarantine.judge(prompts.slice(i, 1), EndedBy.LATE) for i in range(2))
    assert quarantine.holds_all(prompts)


def test_looking_for_a_prompt_that_is_left_looks_at_each_prompt_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = Prompts([f"p{i}" for i in range(50)]).all()
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    looks: list[int] = []
    real = Quarantine.holds
    monkeypatch.setattr(Quarantine, "holds", lambda self, prompt: (looks.append(1), real(self, prompt))[1])
    for i in range(50):
        assert not quarantine.holds_all(prompts)
        quarantine.add(prompts.slice(i, 1))
    assert quarantine.holds_all(prompts) and len(looks) == 50 + 50  # one of each, and one at the first left


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

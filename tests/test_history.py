"""Replay: which completions of a prompt there are, in which order they are picked, and what is known of
them.
"""

import tempfile

import pyarrow as pa
import pytest
from buffers import answer, make, make_again, run, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_group, table

from gvpo_ray import groups
from gvpo_ray.buffer import replay as history_module
from gvpo_ray.buffer.buffer import GroupBuffer
from gvpo_ray.buffer.log import GroupLog
from gvpo_ray.buffer.replay import ReplayIndex
from gvpo_ray.config.data import ReplayConfig


def one_prompt(group_id: int, *versions: int, **columns) -> pa.Table:
    """A group of the one prompt that all of these tests ask for; a completion per version."""
    m = len(versions)
    row = {
        **make_group(group_id, tuple(float(i) for i in range(m))),
        "prompt": "p",
        "answer": "7",
        "dataset": "d",
    }
    texts = [f"{group_id}.{i}" for i in range(m)]
    return table({**row, "completions": texts, "version_min": [0] * m, "version_max": [*versions], **columns})


PROMPT = one_prompt(1000).select(list(groups.PROMPT_COLUMNS))


def replaying(folder, window=None, **arguments) -> GroupBuffer:
    return make(folder, replay=ReplayConfig(share=0.5, window=window), **arguments)


def test_the_newest_completions_of_a_prompt_come_first_with_everything_that_is_known_of_them(tmp_path):
    async def main():
        buffer = replaying(tmp_path)
        first, second = one_prompt(0, 1, 3, 3), one_prompt(1, 3, 2)
        for group in (first, second, table(make_group(2, version=9))):  # the last is another prompt's
            await buffer.put(group)
        history = await buffer.history(PROMPT, 4)
        # version 3: the later row, then by index; then version 2
        assert texts(history) == ["1.0", "0.1", "0.2", "1.1"]
        assert groups.validate(history, groups.LOGGED_COLUMNS).schema == groups.SCHEMA
        row, logged = next(groups.rows(history)), [next(groups.rows(group)) for group in (first, second)]
        picked = [(logged[1], 0), (logged[0], 1), (logged[0], 2), (logged[1], 1)]
        for name in (
            "completion_ids",
            "finish_reasons",
            "version_min",
            "version_max",
            "sampling_logprobs",
            "rewards",
            "reward_reasons",
        ):
            assert row[name] == [group[name][i] for group, i in picked], name
        assert row["reward_parts"] == {"math": [0.0, 1.0, 2.0, 1.0]}
        assert row["sources"] == ["replay"] * 4
        assert row["reference_logprobs"] is None and row["reference_versions"] is None
        assert {name: row[name] for name in groups.PROMPT_COLUMNS} == next(groups.rows(PROMPT))
        assert texts(await buffer.history(PROMPT, 9)) == ["1.0", "0.1", "0.2", "1.1", "0.0"]
        assert texts(await buffer.history(PROMPT, 2)) == ["1.0", "0.1"]  # once more: for another group

    run(main)


def test_there_is_no_history_of_a_new_prompt_and_none_without_replay(tmp_path):
    async def main():
        with_replay, without = replaying(tmp_path / "with"), make(tmp_path / "without", replay=ReplayConfig())
        for buffer in (with_replay, without):
            await buffer.put(one_prompt(0, 1, 2))
        for buffer, prompt in ((with_replay, groups.with_columns(PROMPT, answer=["8"])), (without, PROMPT)):
            history = await buffer.history(prompt, 4)
            assert (
                groups.validate(history, groups.LOGGED_COLUMNS).schema == groups.SCHEMA
                and texts(history) == []
            )
        assert texts(await with_replay.history(PROMPT, 0)) == []

    run(main)


def test_prompts_whose_hashes_are_equal_do_not_get_each_others_completions(tmp_path, monkeypatch):
    monkeypatch.setattr(history_module, "hash", lambda key: 0, raising=False)

    async def main():
        buffer = replaying(tmp_path)
        await buffer.put(one_prompt(0, 1))
        await buffer.put(one_prompt(1, 1, answer="8"))
        assert texts(await buffer.history(PROMPT, 9)) == ["0.0"]

    run(main)


def test_only_the_policys_own_completions_that_can_be_trained_on_are_replayed(tmp_path):
    async def main():
        buffer = replaying(tmp_path)
        columns = {
            "sources": ["policy", "replay", "offline:people", "policy", "policy", "policy"],
            "rewards": [1.0, 1.0, 1.0, None, 1.0, 1.0],
            "completion_ids": [[3, 1]] * 4 + [[], [3, 1]],
            "sampling_logprobs": [[-1.0, -1.0]] * 4 + [[], None],
        }
        await buffer.put(one_prompt(0, *[1] * 6, **columns))
        assert texts(await buffer.history(PROMPT, 9)) == ["0.0"]

    run(main)


def test_only_completions_of_the_last_steps_are_replayed_and_what_fell_out_is_forgotten(tmp_path):
    async def main():
        buffer = replaying(tmp_path, window=2, groups_per_step=1)
        for step, group in enumerate(
            [one_prompt(0, 0, 0), one_prompt(1, 0, 1), one_prompt(2, 2, 1), one_prompt(3, 3, 3)], start=1
        ):
            await buffer.put(group)
            await answer(buffer.batch(step))
            await buffer.published(step, {})
        # version 4: from 4 - 2 on
        assert texts(await buffer.history(PROMPT, 9)) == ["3.0", "3.1", "2.0"]
        assert list(buffer._history._rows) == [2, 3]  # steps 1 and 2 were written before version 2
        again = make_again(buffer, replay=ReplayConfig(share=0.5, window=2), version=4)
        assert texts(await again.history(PROMPT, 9)) == ["3.0", "3.1", "2.0"]
        assert list(again._history._rows) == [2, 3]
        await again.report_references(0, {0: [-1.0, -1.0]})
        assert list(again._history._rows) == [2, 3]
        await again.published(6, {})
        await again.put(table(make_group(9)))
        assert texts(await again.history(PROMPT, 9)) == []
        assert list(again._history._rows) == [9] and sum(map(len, again._history._by_prompt.values())) == 1

    run(main)


def test_what_a_reference_model_said_of_a_completion_comes_with_it_when_it_is_replayed(tmp_path):
    async def main():
        buffer = replaying(tmp_path)
        for group_id in (0, 1, 2):
            await buffer.put(one_prompt(group_id, group_id, group_id))
        precise = -40.123456789012345
        await buffer.report_references(4, {0: [precise, None]})  # one rank's; group 2 is another's
        await buffer.report_references(7, {2: [-3.0, -4.0]})
        history = next(groups.rows(await buffer.history(PROMPT, 9)))
        assert history["completions"] == ["2.0", "2.1", "1.0", "1.1", "0.0", "0.1"]
        assert history["reference_logprobs"] == [-3.0, -4.0, None, None, precise, None]
        assert history["reference_versions"] == [7, 7, None, None, 4, None]
        await buffer.report_references(9, {2: [-5.0, None]})
        assert next(groups.rows(await buffer.history(PROMPT, 2)))["reference_versions"] == [9, None]

    run(main)


def test_a_group_with_replayed_completions_is_logged_with_their_references(tmp_path):
    async def main():
        buffer = replaying(tmp_path)
        await buffer.put(one_prompt(0, 1, 2))
        await buffer.report_references(0, {0: [-1.5, -2.5]})
        new = one_prompt(1000, 3)
        await buffer.put(groups.join(PROMPT, await buffer.history(PROMPT, 1), new))
        _, logged = groups.rows(await answer(buffer.batch(1)))
        assert logged["completions"] == ["0.1", "1000.0"] and logged["sources"] == ["replay", "policy"]
        assert logged["reference_logprobs"] == [-2.5, None] and logged["reference_versions"] == [0, None]
        # the copy is not history of its own
        assert texts(await buffer.history(PROMPT, 9)) == ["1000.0", "0.1", "0.0"]
        with pytest.raises(groups.GroupError, match="reference_logprobs has 1 entries, completions has 2"):
            await buffer.put(groups.with_columns(one_prompt(7, 1, 2), reference_logprobs=[[-1.0]]))

    run(main)


def test_the_history_is_that_of_the_log_whoever_reads_it(tmp_path):
    async def main():
        buffer = replaying(tmp_path)
        for group_id in range(7):
            await buffer.put(one_prompt(group_id, 1, 2, 3))
        again = make_again(buffer, replay=ReplayConfig(share=0.5))
        await again.put(one_prompt(7, 4))
        histories = [
            texts(await b.history(PROMPT, 5))
            for b in (again, make_again(again, replay=ReplayConfig(share=0.5)))
        ]
        assert histories[0] == histories[1] and len(histories[0]) == 5

    run(main)


def test_picking_reads_only_the_rows_that_it_picks_however_many_came_before(tmp_path, monkeypatch):
    read: list[int] = []
    real = GroupLog.rows
    monkeypatch.setattr(GroupLog, "rows", lambda log, rows: (read.extend(rows), real(log, rows))[1])

    async def main():
        buffer = replaying(tmp_path)
        for num in (10, 40, 160):
            for group_id in range(len(buffer.log), num):
                await buffer.put(one_prompt(group_id, group_id, group_id))
            del read[:]
            assert texts(await buffer.history(PROMPT, 3)) == [f"{num - 1}.0", f"{num - 1}.1", f"{num - 2}.0"]
            assert read == [num - 1, num - 2]

    run(main)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.none() | st.integers(0, 5), min_size=1, max_size=4), max_size=8),
    st.integers(0, 6),
    st.none() | st.integers(1, 4),
    st.integers(0, 3),
)
def test_the_pick_is_that_of_sorting_everything(versions, num, window, forgotten):
    with tempfile.TemporaryDirectory() as folder:
        log = GroupLog(folder)
        index = ReplayIndex(log, ReplayConfig(share=0.5, window=window), 0)
        for group_id, of_group in enumerate(versions):
            sources = ["policy" if version is not None else "offline:people" for version in of_group]
            log.append(one_prompt(group_id, *of_group, sources=sources))
            index.add(group_id, log.read(group_id, group_id + 1))
        if window and forgotten and forgotten <= len(versions):
            log.assign(forgotten, 0, forgotten)
            index.forget(forgotten + window)
        now = forgotten + (window or 0) if forgotten <= len(versions) else 6
        first = forgotten if window and forgotten <= len(versions) else 0
        everything = sorted(
            (-version, -row, i)
            for row, of_group in enumerate(versions)
            for i, version in enumerate(of_group)
            if row >= first and version is not None and version >= (now - window if window else 0)
        )
        want = [f"{-row}.{i}" for _, row, i in everything[:num]]
        assert texts(index.pick(PROMPT, num, now)) == want

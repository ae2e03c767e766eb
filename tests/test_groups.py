"""The group table: what goes in comes out, what is cut off is left out, what does not fit is named."""

import errno
import io
import os
from pathlib import Path

import pyarrow as pa
import pytest

from gvpo_ray import groups

ROW = {
    "group_id": 17,
    "prompt": "What is 3 + 4?",
    "answer": "7",
    "dataset": "quickstart",
    "prompt_ids": [12, 5, 9],
    "data": '{"columns": {"level": 2}}',
    "completions": ["\\boxed{7}", "\\boxed{8}", "siebzehn ✓"],
    "completion_ids": [[4, 7, 1], [4, 8], [3, 3, 3, 1]],
    "finish_reasons": ["stop", "length", "stop"],
    "sources": ["policy", "policy", "offline:people"],
    "version_min": [3, 3, None],
    "version_max": [3, 4, None],
    "sampling_logprobs": [[-0.5, -0.25, 0.0], [-1.0, -2.0], None],
    "trained_tokens": [[True, False, True], None, None],
    "rewards": [1.0, 0.0, None],
    "reward_parts": {"math": [1.0, 0.0, None], "style": [0.5, 0.25, 0.125]},
    "reward_reasons": [None, None, "timeout"],
    "reference_logprobs": [-0.75, -3.0, -40.123456789012345],  # float64: would not survive float32
    "reference_versions": [0, 2, None],
    "episodes": ['{"turns": 2}', None, None],
    "routed_experts": [b"\x00\x03\x01\x02", None, None],
}


def row(group_id: int, num_completions: int = 2, prompt: int = 3, completion: int = 4) -> dict:
    """A group with so many tokens; the log-probs are its id."""
    return {
        **{name: ROW[name] for name in ("prompt", "answer", "dataset")},
        "group_id": group_id,
        "prompt_ids": [1] * prompt,
        "completions": ["text"] * num_completions,
        "completion_ids": [[2] * completion] * num_completions,
        "finish_reasons": ["stop"] * num_completions,
        "sources": ["policy"] * num_completions,
        "version_min": [0] * num_completions,
        "version_max": [0] * num_completions,
        "sampling_logprobs": [[-float(group_id)] * completion] * num_completions,
        "rewards": [0.0] * num_completions,
        "reward_parts": {"math": [0.0] * num_completions},
        "reward_reasons": [None] * num_completions,
    }


def write_stream(path, tables: list[pa.Table]) -> bytes:
    """As the buffer's log does: one record batch per table. Returns the bytes."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    return path.read_bytes()


# ------------------------------------------------------------------------------------------- in and out again


def test_a_row_survives_the_table():
    table = groups.table([ROW, {**ROW, "group_id": 18}])
    assert table.schema == groups.SCHEMA
    assert list(groups.rows(table)) == [ROW, {**ROW, "group_id": 18}]


def test_columns_are_in_schema_order_whatever_the_order_of_the_row():
    backwards = dict(reversed([(name, ROW[name]) for name in groups.PROMPT_COLUMNS]))
    assert groups.table([backwards]).schema.names == list(groups.PROMPT_COLUMNS)


def test_ipc_file_stream_and_folder_give_back_the_same_table(tmp_path):
    one, two = groups.table([ROW]), groups.table([{**ROW, "group_id": 18}, {**ROW, "group_id": -1}])
    both = pa.concat_tables([one, two])
    groups.save(both, tmp_path / "file.arrow")
    write_stream(tmp_path / "stream.arrow", [one, two])
    log = tmp_path / "groups"
    log.mkdir()
    write_stream(log / "00001.arrow", [two])
    groups.save(one, log / "00000.arrow")
    (log / "assignments.jsonl").write_text("not Arrow, and not looked at")
    for path in (tmp_path / "file.arrow", tmp_path / "stream.arrow", log):
        assert groups.load(path).equals(both), path
        assert groups.load(str(path)).equals(both), path


def test_a_file_of_no_groups_is_a_table_of_no_groups(tmp_path):
    groups.save(groups.empty(), tmp_path / "none.arrow")
    loaded = groups.load(tmp_path / "none.arrow")
    assert len(loaded) == 0 and loaded.schema.names == list(groups.LOGGED_COLUMNS)
    groups.validate(loaded, groups.LOGGED_COLUMNS)


def test_with_columns_adds_and_replaces_typed_by_the_schema():
    table = groups.table([{name: ROW[name] for name in groups.PROMPT_COLUMNS}] * 2)
    wider = groups.with_columns(table, rewards=[[1, None], [0, 2]], answer=["8", "9"])
    assert wider.schema.names == [*groups.PROMPT_COLUMNS, "rewards"]
    assert wider.schema.field("rewards").type == pa.list_(pa.float32())
    assert wider.column("rewards").to_pylist() == [[1.0, None], [0.0, 2.0]]
    assert wider.column("answer").to_pylist() == ["8", "9"]
    assert table.column("answer").to_pylist() == ["7", "7"]  # tables are values


# ---------------------------------------------------------------------------------------------------- cut off


def test_a_log_cut_anywhere_is_read_up_to_its_last_whole_group(tmp_path):
    tables = [groups.table([row(i, num_completions=2 + i)]) for i in range(4)]
    whole = write_stream(tmp_path / "whole.arrow", tables)
    log = tmp_path / "groups"
    log.mkdir()
    counts = []
    for end in [*range(0, len(whole), 50), len(whole)]:
        (log / "00000.arrow").write_bytes(whole[:end])
        loaded = groups.load(log)
        optional = (*groups.DATA_COLUMNS, *groups.MASK_COLUMNS, *groups.REFERENCE_COLUMNS)
        nothing = dict.fromkeys((*optional, *groups.EPISODE_COLUMNS, *groups.EXPERT_COLUMNS))
        assert list(groups.rows(loaded)) == [
            row(i, num_completions=2 + i) | nothing for i in range(len(loaded))
        ], end
        counts.append(len(loaded))
    assert counts == sorted(counts) and set(counts) == {0, 1, 2, 3, 4}


def test_a_cut_segment_does_not_hide_the_next_one(tmp_path):
    whole = write_stream(tmp_path / "00000.arrow", [groups.table([row(0)]), groups.table([row(1)])])
    (tmp_path / "00000.arrow").write_bytes(whole[:-100])
    (tmp_path / "00001.arrow").write_bytes(b"")
    write_stream(tmp_path / "00002.arrow", [groups.table([row(2)])])
    assert groups.load(tmp_path).column("group_id").to_pylist() == [0, 2]


def test_a_log_that_an_older_version_began_is_read_with_what_came_after(tmp_path):
    write_stream(tmp_path / "00000.arrow", [groups.table([row(0)])])
    write_stream(tmp_path / "00001.arrow", [groups.table([ROW])])
    loaded = groups.load(tmp_path)
    assert loaded.schema == groups.SCHEMA
    assert loaded["reference_logprobs"].to_pylist() == [None, ROW["reference_logprobs"]]
    assert loaded["trained_tokens"].to_pylist() == [None, ROW["trained_tokens"]]
    groups.save(groups.table([row(0)]), tmp_path / "recorded.arrow")  # a single file is as it is
    assert groups.load(tmp_path / "recorded.arrow").schema.names == list(groups.LOGGED_COLUMNS)


def test_a_single_stream_without_its_end_is_read_too(tmp_path):
    whole = write_stream(tmp_path / "a.arrow", [groups.table([row(0)]), groups.table([row(1)])])
    (tmp_path / "a.arrow").write_bytes(whole[:-100])
    assert groups.load(tmp_path / "a.arrow").column("group_id").to_pylist() == [0]


@pytest.mark.parametrize("is_log", [False, True])
def test_a_file_that_cannot_be_read_is_an_error_that_names_it_and_not_the_end_of_the_log(
    tmp_path, monkeypatch, is_log
):
    tables = [groups.table([row(i)]) for i in range(3)]
    whole = write_stream(tmp_path / "00000.arrow", tables)

    class Failing(io.BytesIO):
        """A file of which nothing from the byte `good` on can be read."""

        good = len(whole)

        def read(self, size=-1):
            if self.tell() + max(size, 0) > self.good:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(size)

    monkeypatch.setattr(pa, "memory_map", lambda path: pa.PythonFile(Failing(Path(path).read_bytes()), "r"))
    place = tmp_path if is_log else tmp_path / "00000.arrow"
    assert len(groups.load(place)) == 3
    for Failing.good in (len(whole) - 300, len(whole) // 2, 10):
        with pytest.raises(OSError, match="Input/output error") as error:
            groups.load(place)
        assert error.value.errno == errno.EIO and error.value.filename == str(tmp_path / "00000.arrow")


@pytest.mark.parametrize(
    "content",
    [b"", b'{"id": 1}\n', b"ARROW1\0\0 and no more", b"\xff" * 1000],
    ids=["empty", "json", "magic", "ff"],
)
def test_a_file_that_is_not_arrow_is_named(tmp_path, content):
    (tmp_path / "data.arrow").write_bytes(content)
    with pytest.raises(groups.GroupError, match=r"data\.arrow is not an Arrow IPC file"):
        groups.load(tmp_path / "data.arrow")


def test_a_missing_file_and_a_folder_without_arrow_files_are_named(tmp_path):
    for path in (tmp_path / "nowhere.arrow", tmp_path):
        with pytest.raises(groups.GroupError, match=f"no Arrow file at {path}"):
            groups.load(path)


def test_files_with_different_columns_are_refused_in_one_line(tmp_path):
    groups.save(groups.table([ROW]), tmp_path / "0.arrow")
    groups.save(groups.table([{"group_id": 1, "prompt": "x"}]), tmp_path / "1.arrow")
    with pytest.raises(groups.GroupError, match="have different columns") as error:
        groups.load(tmp_path)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------- what is refused


def test_a_good_table_is_valid_and_comes_back():
    references = {"reference_logprobs": [0.0, 0.0], "reference_versions": [0, 0]}
    table = groups.table(
        [ROW, row(1) | references | dict.fromkeys(("trained_tokens", "data", "episodes", "routed_experts"))]
    )
    assert groups.validate(table, groups.SCHEMA.names) is table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1.0, 0.0]}, r"row 1 \(group 17\): rewards has 2 entries, completions has 3"),
        ({"sources": ["policy"] * 4}, r"row 1 \(group 17\): sources has 4 entries, completions has 3"),
        ({"reward_reasons": []}, r"row 1 \(group 17\): reward_reasons has 0 entries, completions has 3"),
        (
            {"reference_logprobs": [0.0]},
            r"row 1 \(group 17\): reference_logprobs has 1 entries, completions has 3",
        ),
        ({"version_min": None}, r"row 1 \(group 17\): version_min is null"),
        ({"completions": None}, r"row 1 \(group 17\): completions is null"),
        (
            {"sampling_logprobs": [[-0.5, -0.2, 0], [-1], None]},
            r"row 1 \(group 17\): sampling_logprobs\[1\] has 1 entries, completion_ids\[1\] has 2",
        ),
        ({"trained_tokens": [None]}, r"row 1 \(group 17\): trained_tokens has 1 entries, completions has 3"),
        (
            {"trained_tokens": [None, [True], None]},
            r"row 1 \(group 17\): trained_tokens\[1\] has 1 entries, completion_ids\[1\] has 2",
        ),
        (
            {"trained_tokens": [None, [True, None], None]},
            r"row 1 \(group 17\): trained_tokens\[1\] is null for token 1",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_lists_that_do_not_fit_are_named_with_column_and_row(change, message):
    with pytest.raises(groups.GroupError, match=message):
        groups.validate(groups.table([ROW, {**ROW, **change}, ROW]), groups.SCHEMA.names)


def test_the_logged_columns_are_not_valid_beside_a_mask_that_does_not_fit():
    table = groups.table([{**ROW, "trained_tokens": [[True] * 3, [True] * 3, None]}])
    with pytest.raises(groups.GroupError, match=r"row 0 \(group 17\): trained_tokens\[1\] has 3 entries"):
        groups.validate(table, groups.LOGGED_COLUMNS)


def test_missing_columns_and_other_types_are_named():
    table = groups.table([ROW])
    with pytest.raises(groups.GroupError, match="column 'rewards' is missing"):
        groups.validate(table.drop_columns(["rewards"]), groups.SCHEMA.names)
    wrong = table.set_column(
        table.schema.get_field_index("rewards"),
        "rewards",
        pa.array([[1.0, 0.0, 0.0]], pa.list_(pa.float64())),
    )
    with pytest.raises(groups.GroupError, match=r"column 'rewards' is list<.*double>, not list<.*float>"):
        groups.validate(wrong, groups.SCHEMA.names)
    groups.validate(table.drop_columns(["rewards"]), groups.PROMPT_COLUMNS)  # only what is asked for


def test_rows_that_are_not_alike_are_named():
    with pytest.raises(groups.GroupError, match=r"row 0: columns .*'colour'"):
        groups.table([{**ROW, "colour": "red"}])
    with pytest.raises(groups.GroupError, match="row 1: columns"):
        groups.table([ROW, {name: ROW[name] for name in groups.PROMPT_COLUMNS}])
    with pytest.raises(groups.GroupError, match=r"column 'group_id': .*seventeen"):
        groups.table([{**ROW, "group_id": "seventeen"}])


def test_with_columns_refuses_other_names_numbers_and_types():
    table = groups.table([ROW])
    with pytest.raises(groups.GroupError, match="column 'colour' is not one of"):
        groups.with_columns(table, colour=["red"])
    with pytest.raises(groups.GroupError, match="column 'answer' has 2 entries for 1 groups"):
        groups.with_columns(table, answer=["7", "8"])
    with pytest.raises(groups.GroupError, match="column 'rewards'"):
        groups.with_columns(table, rewards=[["right"]])


# ----------------------------------------------------------------------------------------------- put together


def test_the_log_holds_every_column_and_nothing_where_nobody_has_computed_it():
    assert list(groups.LOG_COLUMNS) == groups.SCHEMA.names
    bare = groups.table([row(0), row(1)])
    completed = groups.log_columns(bare)
    assert completed.schema == groups.SCHEMA and completed.select(bare.schema.names) == bare
    assert (
        completed["reference_logprobs"].to_pylist()
        == completed["reference_versions"].to_pylist()
        == completed["trained_tokens"].to_pylist()
        == [None, None]
    )
    whole = groups.table([ROW])
    assert groups.log_columns(whole).equals(whole)
    assert groups.log_columns(bare.append_column("colour", [["red", "blue"]])).equals(completed)


def test_the_parts_of_a_group_are_joined_in_their_order():
    of_prompt = (*groups.PROMPT_COLUMNS, *groups.DATA_COLUMNS)
    prompt = groups.table([{**{name: ROW[name] for name in of_prompt}, "group_id": 99}])
    referenced = groups.table([ROW])
    rewarded = groups.table(
        [row(5, num_completions=1) | {"reward_parts": {"style": [0.75]}, "reward_reasons": ["short"]}]
    )
    sampled = groups.table([row(6)]).drop_columns(list(groups.REWARD_COLUMNS))
    joined = groups.join(prompt, rewarded, sampled, referenced)
    assert joined.schema == groups.SCHEMA
    (group,) = groups.rows(groups.validate(joined, groups.SCHEMA.names))
    assert {name: group[name] for name in of_prompt} == next(groups.rows(prompt))
    assert group["completions"] == ["text", "text", "text", *ROW["completions"]]
    assert group["completion_ids"] == [[2] * 4] * 3 + ROW["completion_ids"]
    assert group["sources"] == ["policy"] * 3 + ROW["sources"]
    assert group["version_max"] == [0, 0, 0, 3, 4, None]
    assert group["sampling_logprobs"] == [[-5.0] * 4, [-6.0] * 4, [-6.0] * 4, *ROW["sampling_logprobs"]]
    assert group["trained_tokens"] == [None, None, None, [True, False, True], None, None]
    assert group["rewards"] == [0.0, None, None, 1.0, 0.0, None]
    assert group["reward_parts"] == {
        "style": [0.75, None, None, 0.5, 0.25, 0.125],
        "math": [None, None, None, 1.0, 0.0, None],
    }
    assert group["reward_reasons"] == ["short", None, None, None, None, "timeout"]
    assert group["reference_logprobs"] == [None, None, None, *ROW["reference_logprobs"]]
    assert group["reference_versions"] == [None, None, None, 0, 2, None]


def test_a_joined_group_has_the_rewards_and_references_that_some_part_has():
    prompt = groups.table([row(1)]).select(list(groups.PROMPT_COLUMNS))
    sampled = groups.table([row(6)]).drop_columns(list(groups.REWARD_COLUMNS))
    assert groups.join(prompt, sampled, sampled).schema.names == [
        *groups.PROMPT_COLUMNS,
        *groups.COMPLETION_COLUMNS,
    ]
    logged = groups.log_columns(groups.table([row(6)]))  # its references are null: it has none
    assert groups.join(prompt, sampled, logged).schema.names == list(groups.LOGGED_COLUMNS)
    nothing = groups.join(prompt)
    assert nothing["completions"].to_pylist() == nothing["sampling_logprobs"].to_pylist() == [[]]
    assert groups.join(prompt, nothing, sampled, nothing) == groups.join(prompt, sampled)
    groups.validate(nothing, [*groups.PROMPT_COLUMNS, *groups.COMPLETION_COLUMNS])


def test_a_group_is_joined_from_its_slice_of_a_larger_table():
    table = groups.table([row(0)]).append_column("colour", [["red"]])
    large = pa.concat_tables(
        [groups.log_columns(groups.table([row(i, num_completions=1 + i)])) for i in range(3)]
    )
    joined = groups.join(table, large.slice(2, 1), large.slice(0, 1))
    assert joined["sampling_logprobs"].to_pylist() == [[[-2.0] * 4] * 3 + [[0.0] * 4]]


def test_some_completions_of_a_group_are_taken_with_all_that_belongs_to_them():
    taken = groups.take(groups.table([ROW]), [2, 0])
    assert taken.schema == groups.SCHEMA
    (group,) = groups.rows(groups.validate(taken, groups.SCHEMA.names))
    assert group["completion_ids"] == [[3, 3, 3, 1], [4, 7, 1]] and group["sampling_logprobs"] == [
        None,
        [-0.5, -0.25, 0.0],
    ]
    assert group["trained_tokens"] == [None, [True, False, True]]
    assert group["reward_parts"] == {"math": [None, 1.0], "style": [0.125, 0.5]}
    assert group["reference_logprobs"] == [-40.123456789012345, -0.75] and group["reference_versions"] == [
        None,
        0,
    ]
    assert group["prompt_ids"] == ROW["prompt_ids"]
    assert groups.take(groups.log_columns(groups.table([row(1)])), [])["reference_logprobs"].to_pylist() == [
        None
    ]


def test_replayable_are_the_policys_own_completions_with_reward_token_and_log_probs():
    # the third is a copy, the fourth empty, the fifth without a reward
    group = row(1, num_completions=5) | {
        "sources": ["policy", "policy", "replay", "policy", "policy"],
        "completion_ids": [[2], [2], [2], [], [2]],
        "rewards": [1.0, 0.0, 4.0, 9.0, None],
        "version_max": [3, 4, 4, 4, 4],
    }
    assert groups.replayable(groups.table([group])) == [[3, 4, None, None, None]]
    assert groups.replayable(groups.table([group | {"sampling_logprobs": [None] * 5}, group])) == [
        [None] * 5,
        [3, 4, None, None, None],
    ]


def test_of_a_completion_with_holes_the_sampled_tokens_are_counted():
    table = groups.table([ROW])  # 3 + 2 + 4 tokens, of which the mask of the first leaves out one
    assert (groups.num_completion_tokens(table), groups.num_sampled_tokens(table)) == (9, 8)
    for none in ([None, None, None], None):
        whole = groups.table([ROW | {"trained_tokens": none}])
        assert (
            groups.num_sampled_tokens(whole) == groups.num_sampled_tokens(groups.table([row(0), row(1)])) - 7
        )
    assert groups.num_sampled_tokens(table.drop_columns(["trained_tokens"])) == 9

"""A run directory is taken up where it stands: recorded groups, the data it began with, its config."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_run_format import config
from tiny import make_group, make_model, table

from gvpo_ray import GVPO, groups
from gvpo_ray.buffer.log import GroupLog
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.run import run_dir as run_dir_module
from gvpo_ray.run.inputs import read_inputs
from gvpo_ray.run.run_dir import import_groups, open_run_dir, read_recorded


def source_of(folder: Path, num: int, **assigned: tuple[int, int]) -> GroupLog:
    """The log of a run: steps are named s1, s2, ..."""
    log = GroupLog(folder)
    for group_id in range(num):
        log.append(table(make_group(group_id)))
    if assigned:
        log.assign_all({int(step[1:]): rows for step, rows in assigned.items()})
    return log


# ---------------------------------------------------------------------------------------------------- import


@pytest.mark.parametrize("num_there", [0, 1, 5, 12])
def test_an_import_that_was_killed_goes_on_where_it_ended(tmp_path: Path, num_there: int) -> None:
    source_of(tmp_path / "source", 12, s1=(0, 4), s2=(4, 8)).close()
    part = GroupLog(tmp_path / "groups")
    for i in range(num_there):
        part.append(table(make_group(i)))
    part.close()
    recorded, assigned, steps = read_recorded(tmp_path / "source", 4, tmp_path / "groups")
    assert steps == 3
    import_groups(recorded, assigned, tmp_path / "groups")
    log = GroupLog(tmp_path / "groups")
    assert log.assigned == {1: (0, 4), 2: (4, 8)}
    assert log.read(0, 12).equals(GroupLog(tmp_path / "source").read(0, 12)) and len(log) == 12


def test_learning_goes_on_when_the_recorded_run_has_gone_on(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", 12, s1=(0, 4))
    recorded, assigned, _ = read_recorded(tmp_path / "source", 4, tmp_path / "groups")
    import_groups(recorded, assigned, tmp_path / "groups")
    GroupLog(tmp_path / "groups").assign(2, 4, 8)  # learning is ahead of what was recorded then
    for group_id in (12, 13):
        source.append(table(make_group(group_id)))
    source.assign_all({2: (4, 8), 3: (8, 12)})
    recorded, assigned, steps = read_recorded(tmp_path / "source", 2, tmp_path / "groups")
    assert steps == 4
    import_groups(recorded, assigned, tmp_path / "groups")
    log = GroupLog(tmp_path / "groups")
    assert log.group_ids == list(range(14)) and log.assigned == {1: (0, 4), 2: (4, 8), 3: (8, 12)}


def test_other_groups_and_another_assignment_are_refused(tmp_path: Path) -> None:
    source_of(tmp_path / "source", 6, s1=(0, 3)).close()
    others = GroupLog(tmp_path / "others")  # the same ids, but other completions
    for i in range(4):
        others.append(table({**make_group(i), "completions": ["of another run"] * 3}))
    longer = source_of(tmp_path / "longer", 7)
    cut = source_of(tmp_path / "cut", 6, s1=(0, 2))
    for log in (others, longer, cut):
        with pytest.raises(ConfigError, match=r"that are not the first ones of .*source, which has 6"):
            read_recorded(tmp_path / "source", 3, log.folder)


def test_a_recorded_log_that_has_lost_groups_is_refused(tmp_path: Path) -> None:
    source_of(tmp_path / "source", 4, s1=(0, 4)).close()
    segment = tmp_path / "source" / "00000.arrow"
    os.truncate(segment, segment.stat().st_size - 50)
    with pytest.raises(
        ConfigError, match=r"--groups: .*step 1 was trained on the groups up to row 4, and only 3"
    ):
        read_recorded(tmp_path / "source", 2, tmp_path / "groups")


def test_learning_trains_on_logged_references_and_masks(tmp_path: Path) -> None:
    group = groups.with_columns(
        table(make_group(0)),
        sources=[["replay", "policy", "policy"]],
        reference_logprobs=[[-3.25, None, None]],
        reference_versions=[[0, None, None]],
        trained_tokens=[[[False] + [True] * (len(ids) - 1) for ids in make_group(0)["completion_ids"]]],
    )
    GroupLog(tmp_path / "source").append(group)
    groups.save(group, tmp_path / "one.arrow")
    for source in ("source", "one.arrow"):
        folder = tmp_path / f"of-{source}"
        recorded, assigned, _ = read_recorded(tmp_path / source, 1, folder)
        import_groups(recorded, assigned, folder)
        assert GroupLog(folder).read(0, 1).equals(groups.log_columns(group))
    broken = groups.with_columns(group, reference_logprobs=[[-3.25]])
    groups.save(broken, tmp_path / "broken.arrow")
    with pytest.raises(ConfigError, match="reference_logprobs has 1 entries, completions has 3"):
        read_recorded(tmp_path / "broken.arrow", 1, tmp_path / "none")


class OnceThrough:
    """A table that counts what is taken of it, and gives it batch by batch only."""

    def __init__(self, recorded: pa.Table) -> None:
        self._recorded, self.num_slices = recorded, 0

    def slice(self, begin: int) -> pa.Table:
        self.num_slices += 1
        return self._recorded.slice(begin)


def test_an_import_takes_one_slice_of_the_table_however_many_groups_there_are(tmp_path: Path) -> None:
    for num in (10, 40):
        source_of(tmp_path / f"source-{num}", num).close()
        recorded = OnceThrough(groups.load(tmp_path / f"source-{num}"))
        import_groups(recorded, {}, tmp_path / f"groups-{num}")  # type: ignore[arg-type]
        assert len(GroupLog(tmp_path / f"groups-{num}")) == num and recorded.num_slices == 1


def test_of_a_recorded_run_a_block_of_groups_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of all of them takes some 10 KB for each, beside their data."""
    monkeypatch.setattr(run_dir_module, "BLOCK", 3)
    monkeypatch.setattr(groups, "load", lambda path: pytest.fail("all groups at once"))
    sizes: list[int] = []
    real = GroupLog.rows
    monkeypatch.setattr(GroupLog, "rows", lambda log, rows: (sizes.append(len(rows)), real(log, rows))[1])
    for num in (2, 3, 7):
        source_of(tmp_path / f"source-{num}", num, s1=(0, 2)).close()
        for _ in range(2):  # the second time all are there
            folder = tmp_path / f"groups-{num}"
            recorded, assigned, _ = read_recorded(tmp_path / f"source-{num}", 2, folder)
            import_groups(recorded, assigned, folder)
        assert GroupLog(folder).group_ids == list(range(num)) and assigned == {1: (0, 2)}
        assert max(sizes) == min(num, 3)


def test_a_folder_of_other_arrow_files_is_no_log(tmp_path: Path) -> None:
    with pa.OSFile(str(tmp_path / "00000.arrow"), "wb") as sink:
        writer = pa.ipc.new_stream(sink, pa.schema([("group_id", pa.int64())]))
        writer.write_table(pa.table({"group_id": [1, 2]}))
        writer.close()
    with pytest.raises(ConfigError, match=r"^--groups: .* is not the log of a run: "):
        read_recorded(tmp_path, 1, tmp_path / "none")


# -------------------------------------------------------------------------------------- what it began with


def test_a_run_is_not_taken_up_with_other_data(tmp_path: Path) -> None:
    began = {"prompts.path": "abc", "sources.people.path": "def"}
    with open_run_dir(config(tmp_path), began) as run_dir:
        assert json.loads((run_dir / "contents.json").read_text()) == began
    with open_run_dir(config(tmp_path), began):
        pass
    with open_run_dir(config(tmp_path)):  # `learn` reads no prompts
        pass
    for key in began:
        with (
            pytest.raises(
                ConfigError, match=f"^{key}: what is in it differs from what the run in .*run began"
            ),
            open_run_dir(config(tmp_path), {**began, key: "other"}),
        ):
            pass
    assert json.loads((run_dir / "contents.json").read_text()) == began
    (run_dir / "contents.json").write_text("[")
    with pytest.raises(ConfigError, match="does not say which data"), open_run_dir(config(tmp_path), began):
        pass
    (run_dir / "contents.json").unlink()  # an older version began the run
    with open_run_dir(config(tmp_path), began):
        assert json.loads((run_dir / "contents.json").read_text()) == began


def test_data_that_a_run_has_since_it_was_resumed_may_not_change_from_then_on(tmp_path: Path) -> None:
    with open_run_dir(config(tmp_path), {"model.path": "m"}):
        pass
    with open_run_dir(config(tmp_path), {"prompts.path": "abc", "model.path": "m"}) as run_dir:
        began = {"prompts.path": "abc", "model.path": "m"}
        assert json.loads((run_dir / "contents.json").read_text()) == began
    with (
        pytest.raises(ConfigError, match=r"^prompts\.path: "),
        open_run_dir(config(tmp_path), {"prompts.path": "other"}),
    ):
        pass


def test_another_chat_template_is_noticed_when_a_run_is_taken_up(tmp_path: Path) -> None:
    """The text of the problems is the same, and the model's weights and vocabulary are."""
    folder = make_model(tmp_path / "model")
    rows = [{"question": "1 + 2?", "answer": "3"}, {"question": "2 + 2?", "answer": "4"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = config(tmp_path).model_dump(mode="json")
    data["model"]["path"], data["prompts"]["path"] = str(folder), str(tmp_path / "train.jsonl")
    data["prompts"] |= {"template": None, "prompt_column": "question"}
    of_run = GVPOConfig.from_dict(data)

    def take_up(template: str) -> None:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        with open_run_dir(of_run, read_inputs(of_run).digests()):
            pass

    first = "{% for message in messages %}{{ message['content'] }}{% endfor %}="
    take_up(first)
    take_up(first)
    with pytest.raises(
        ConfigError,
        match=r"^prompts\.template: with it, or the tokenizer or chat template of model\.path, the model "
        r"reads tokens that differ from what the run in .* began with",
    ):
        take_up(first + "+")


def test_a_config_with_letters_of_any_language_is_taken_up_in_any_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_template(text: str) -> GVPOConfig:
        data = config(tmp_path).model_dump(mode="json")
        data["prompts"]["template"] = text
        return GVPOConfig.from_dict(data)

    # as under a locale with ISO-8859-1, which the machine may not have
    monkeypatch.setattr(io, "text_encoding", lambda given, level=2: given or "latin-1")
    assert (tmp_path / "x").write_text("ü") and (tmp_path / "x").read_bytes() == b"\xfc"
    for _ in range(2):
        with open_run_dir(with_template("für {prompt} 数")) as run_dir:
            assert "für {prompt} 数".encode() in (run_dir / "config.yaml").read_bytes()


def test_from_run_dir_takes_the_folder_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(GVPO, "__init__", lambda self, config, reward=None: taken.append(config.run_dir))
    began = GVPOConfig.from_dict(
        {**config(tmp_path).model_dump(mode="json"), "run_dir": "runs/x", "root": str(tmp_path / "shared")}
    )
    with open_run_dir(began) as run_dir:
        assert run_dir == tmp_path / "shared" / "runs" / "x"
    monkeypatch.chdir(run_dir.parent)
    for given in ("x", str(run_dir), Path("../runs/x")):
        GVPO.from_run_dir(given)
    assert [Path(path).resolve() for path in taken] == [run_dir.resolve()] * 3


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_one_line_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError) as caught, open_run_dir(config(tmp_path)):
        pass
    assert str(caught.value).startswith(
        f"run_dir: cannot write {tmp_path / 'run'}: its file system has no file locks "
        f"(flock: {os.strerror(number)})"
    )


def test_a_run_whose_prompts_have_changed_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model")
    rows = [json.dumps({"prompt": f"{i} + 1", "answer": str(i + 1)}) for i in range(4)]
    prompts = tmp_path / "train.jsonl"
    prompts.write_text("\n".join(rows[:3]))
    for _ in range(2):
        GVPO(config(tmp_path)).stop()
    prompts.write_text("\n".join(rows))  # a row more, and most group ids stand for another prompt
    with pytest.raises(ConfigError, match=r"^prompts\.path: what is in it differs from what the run in"):
        GVPO(config(tmp_path))
    prompts.write_text("\n".join(rows[:3]))
    GVPO(config(tmp_path)).stop()

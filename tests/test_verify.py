import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvpo_ray.cli import main
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.verifiers import score_file
from gvpo_ray.verifiers.outages import MAX_FAULTS
from gvpo_ray.verifiers.score_file import _as_table

ROWS: list[dict[str, Any]] = [
    {"response": "so \\boxed{5}", "gold": "5", "label_correct": True, "id": "a"},
    {"prediction": "4", "answer": "5", "expected": False, "id": 2},
    # a wrong label: a false positive
    {"response": "\\boxed{\\frac12}", "gold": 0.5, "expected": False, "id": None},
    {"response": "so \\boxed{5", "gold": "5", "expected": True},  # another: a false negative
    {"response": "\\boxed{1}", "gold": ""},
]


TRUSTED = "rewards={exact_match: {trusted: true}}"
"""In this process, without the sandbox's second."""

IN_SANDBOX = "rewards={exact_match: 1}"
"""Without the seconds of the parser that `math` brings."""


def _write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _verify(source: str, out: Path, *more: str) -> int:
    return main(["verify", source, "--out", str(out), "--workers", "2", *more])


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_keeps_its_columns_and_place_and_gets_its_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(_write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl") == 0
    scored = _read(tmp_path / "out.jsonl")
    assert [{key: row[key] for key in old} for row, old in zip(scored, ROWS, strict=True)] == ROWS
    assert [row["verdict"] for row in scored] == [
        "correct",
        "incorrect",
        "correct",
        "incorrect",
        "unverifiable",
    ]
    assert [row["reward"] for row in scored] == [1.0, 0.0, 1.0, 0.0, None]
    assert [row["reason"] is None for row in scored] == [True, True, True, False, False]
    assert all(row["seconds"] > 0 for row in scored)
    printed = capsys.readouterr().out
    assert "agree with the label │    2 │ 50.00 %" in printed
    assert "false negatives      │    1 │ 25.00 %" in printed
    assert "false positives      │    1 │ 25.00 %" in printed
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out.jsonl"]


def test_labels_are_read_in_any_dress_and_others_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = [True, 1, 1.0, "true", "True", False, 0, "0", "false", "maybe", 2]
    rows = [{"response": "\\boxed{5}", "gold": "5", "expected": label} for label in labels]
    assert _verify(_write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", TRUSTED) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "agree with the label │ 5 │ 55.56 %" in printed
    assert "false positives │ 4 │ 44.44 %" in printed
    assert "2 labels are not read: expected or label_correct is none of true, 1, false, 0" in printed


def test_the_files_own_columns_of_our_names_are_kept_under_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"response": "5", "gold": "5", "reward": 0.25, "reason": "theirs"},
        {"response": "4", "gold": "5"},
    ]
    assert _verify(_write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", TRUSTED) == 0
    assert "INPUT has a column reward of its own, which is input_reward in OUT" in capsys.readouterr().err
    assert _verify(str(tmp_path / "out.jsonl"), tmp_path / "again.jsonl", TRUSTED) == 0
    first, second = _read(tmp_path / "again.jsonl")
    assert (first["input_reward"], first["input_reason"]) == (0.25, "theirs")
    assert (first["input_input_reward"], first["input_verdict"]) == (1.0, "correct")
    assert (first["reward"], first["verdict"], first["reason"]) == (1.0, "correct", None)
    assert (second["reward"], second["input_reward"]) == (0.0, 0.0) and "input_input_reward" not in second


def test_a_malformed_row_is_reported_with_its_line_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        json.dumps(ROWS[0]),
        "{not json",
        "",
        "[1]",
        json.dumps({"gold": "5"}),
        json.dumps({"response": "5"}),
        json.dumps({"response": ["5"], "gold": "5"}),
        json.dumps(ROWS[1]),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    assert _verify(str(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", TRUSTED) == 0
    scored = _read(tmp_path / "out.jsonl")
    assert [row["verdict"] for row in scored] == ["correct", *["unverifiable"] * 5, "incorrect"]
    printed = " ".join(capsys.readouterr().err.split())
    for complaint in (
        "line 2: not JSON",
        "line 4: not a JSON object",
        "line 5: no response or prediction",
        "line 6: no gold or answer",
        "line 7: response is list, not text",
    ):
        assert complaint in printed


def test_parquet_goes_in_and_out(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"response": ["\\boxed{1}", "\\boxed{2}"], "answer": ["1", "1"], "n": [1, 2]}),
        tmp_path / "in.parquet",
    )
    assert _verify(str(tmp_path / "in.parquet"), tmp_path / "out.parquet", TRUSTED) == 0
    scored = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert (
        scored["verdict"] == ["correct", "incorrect"]
        and scored["n"] == [1, 2]
        and scored["reward"] == [1.0, 0.0]
    )


def test_a_parquet_text_that_is_not_utf8_costs_nothing(tmp_path: Path) -> None:
    broken = pa.array([b"\xff \\boxed{1}", b"\\boxed{2}", None]).view(pa.string())
    pq.write_table(pa.table({"response": broken, "answer": ["1", "1", "1"]}), tmp_path / "in.parquet")
    assert _verify(str(tmp_path / "in.parquet"), tmp_path / "out.jsonl", IN_SANDBOX) == 0
    assert [row["verdict"] for row in _read(tmp_path / "out.jsonl")] == [
        "correct",
        "incorrect",
        "unverifiable",
    ]


def test_columns_of_mixed_types_and_halves_of_surrogate_pairs_become_text_in_parquet() -> None:
    table = _as_table([{"a": 1, "b": "\ud800x"}, {"a": "two"}, {"a": {"k": None}}])
    assert table.to_pydict() == {"a": ["1", "two", '{"k": null}'], "b": ["?x", None, None]}


def test_broken_unicode_in_a_row_is_scored_like_any_text(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(
        '{"response": "\\ud800 \\\\boxed{5}", "gold": "5"}\n{"response": "\\u0000 \\\\boxed{6}", "gold": '
        '"5"}\n'
    )
    assert _verify(str(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", IN_SANDBOX) == 0
    assert [row["reward"] for row in _read(tmp_path / "out.jsonl")] == [1.0, 0.0]


@pytest.mark.parametrize("name", ["in.jsonl", "link.jsonl", "../{folder}/in.jsonl"])
def test_input_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    source = _write(tmp_path / "in.jsonl", ROWS)
    (tmp_path / "link.jsonl").symlink_to(source)
    before = Path(source).read_text()
    assert _verify(source, tmp_path / name.format(folder=tmp_path.name)) == 2
    assert "is INPUT, which would be lost: name another file" in capsys.readouterr().err
    assert Path(source).read_text() == before


def test_lines_that_are_pretty_printed_are_read_as_the_values_that_they_are(tmp_path: Path) -> None:
    text = "\n".join(json.dumps({"response": answer, "gold": "5"}, indent=2) for answer in ("5", "4"))
    (tmp_path / "in.jsonl").write_text(text)
    assert _verify(str(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", TRUSTED) == 0
    assert [row["reward"] for row in _read(tmp_path / "out.jsonl")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            '{"response": "5", "gold": "5"}\n'.encode("utf-16"),
            "{source} is not UTF-8 but looks like UTF-16: ",
        ),
        (b"<html>\n</html>\n", "{source}: no row can be scored: line 1: not JSON: Expecting value"),
        (
            b'{"response": ["5"], "gold": "5"}\n' * 2,
            "{source}: no row can be scored: line 1: response is list",
        ),
    ],
)
def test_the_last_line_says_why_no_row_can_be_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, complaint: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    assert _verify(str(source), tmp_path / "out.jsonl", TRUSTED) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.removeprefix("error: ").removeprefix("INPUT: ").startswith(complaint.format(source=source))


def test_nan_is_an_empty_entry_as_null_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pandas writes it where a row has none."""
    nan = float("nan")
    rows = {"response": [5.0, 5.0, nan], "gold": [5.0, nan, 5.0], "expected": [nan] * 3}
    pq.write_table(pa.table(rows), tmp_path / "in.parquet")
    assert _verify(str(tmp_path / "in.parquet"), tmp_path / "out.jsonl", TRUSTED) == 0
    scored = _read(tmp_path / "out.jsonl")
    assert [row["verdict"] for row in scored] == ["correct", "unverifiable", "unverifiable"]
    assert "no response or prediction" in scored[2]["reason"]
    printed = capsys.readouterr().out
    assert "labels are not read" not in printed and "agree" not in printed


SLOW = """
import time
def reward(prompts, completions, **columns):
    time.sleep(0.05)
    return [float(len(completions[0]))]
"""


def test_a_killed_run_goes_on_after_its_last_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    source = _write(tmp_path / "in.jsonl", [{"response": "x" * i, "gold": "g", "i": i} for i in range(100)])
    rewards = f"rewards={{'{tmp_path}/slow.py:reward': 1}}"
    command = [
        sys.executable,
        "-m",
        "gvpo_ray",
        "verify",
        source,
        "--out",
        str(tmp_path / "out.jsonl"),
        "--workers",
        "2",
        rewards,
    ]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stderr=subprocess.DEVNULL
    )
    part = tmp_path / "out.jsonl.part"
    while not part.exists() or part.read_bytes().count(b"\n") < 20:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(part, "ab") as file:
        file.write(b'[99, {"torn')
    assert not (tmp_path / "out.jsonl").exists()
    num_done = part.read_bytes().count(b"\n") - 1
    assert main([*command[3:-1], rewards]) == 0
    assert f"going on after the {num_done} rows" in " ".join(capsys.readouterr().err.split())
    assert [(row["i"], row["reward"]) for row in _read(tmp_path / "out.jsonl")] == [
        (i, float(i)) for i in range(100)
    ]


def test_a_reward_that_worked_in_the_earlier_part_does_not_end_the_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "def reward(prompts, completions, **columns):\n"
        "    if completions[0] == 'bad': raise ValueError\n    return [1.0]\n"
    )
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"response": "good" if i < 3 else "bad", "gold": "1"} for i in range(3 + MAX_FAULTS)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = VerifiersConfig(rewards={f"{tmp_path}/mine.py:reward": 1.0})  # type: ignore[dict-item]
    write = score_file._Work.write

    def interrupted(work: Any, line: int, row: Any) -> None:
        if line == 4:
            raise KeyboardInterrupt
        write(work, line, row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(score_file._Work, "write", interrupted)
        score_file.main(str(source), str(out), config, 1)
    summary = score_file.main(str(source), str(out), config, 1)
    assert (summary["rows"], summary["correct"]) == (3 + MAX_FAULTS, 3)


def test_unfinished_work_on_other_input_or_with_other_settings_is_not_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _write(tmp_path / "in.jsonl", ROWS)
    (tmp_path / "out.jsonl.part").write_text('{"input": "another"}\n')
    assert _verify(source, tmp_path / "out.jsonl") == 2
    assert (
        "is unfinished work on another input or with other settings; remove it first"
        in capsys.readouterr().err
    )
    assert (tmp_path / "out.jsonl.part").read_text() == '{"input": "another"}\n'


@pytest.mark.parametrize(
    ("text", "arguments", "complaint"),
    [
        (None, [], "INPUT: {source}: No such file or directory"),
        ("", [], "INPUT: {source} has no rows"),
        (
            '{"question": "?"}\n',
            [],
            "{source}: no row has one of response or prediction or completion or output or",
        ),
        (
            '{"response": "1", "gold": "1"}\n',
            ["timout_s=3"],
            "overrides: unknown key verifiers.timout_s; did you mean verifiers.timeout_s?",
        ),
        (
            '{"response": "1", "gold": "1"}\n',
            ["rewards={brevity: 1}"],
            "verifiers.rewards.brevity: unknown reward; built in is math",
        ),
        (
            '{"response": "1", "gold": "1"}\n',
            ["rewards={rm: {model: x}}"],
            "verifiers.rewards.rm: a reward model needs a cluster",
        ),
        (
            '{"response": "1", "gold": "1"}\n',
            ["rewards={numeric: {arguments: {units: m}}}"],
            "verifiers.rewards.numeric: no argument 'units'",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, arguments: list[str], complaint: str
) -> None:
    source = tmp_path / "in.jsonl"
    if text is not None:
        source.write_text(text)
    assert _verify(str(source), tmp_path / "out.jsonl", *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: " + complaint.format(source=source))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_function_that_ends_its_process_on_every_row_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text("import os\ndef reward(completions, **columns):\n    os._exit(3)\n")
    source = _write(tmp_path / "in.jsonl", [ROWS[0]] * 2)
    assert _verify(source, tmp_path / "out.jsonl", f"rewards={{'{tmp_path}/bad.py:reward': 1}}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: a reward function fails on every row: crash: ")
    assert error.endswith("bad.py:reward: exited with status 3")


def test_a_function_that_fails_on_every_row_is_an_error_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text(
        "def reward(prompts, completions, **columns):\n    return [float('nan')]\n"
    )
    rewards = f"rewards={{'{tmp_path}/bad.py:reward': 1}}"
    for number in (3, 40):
        source = _write(tmp_path / f"in{number}.jsonl", [ROWS[0]] * number)
        assert _verify(source, tmp_path / "out.jsonl", rewards) != 0
        error = capsys.readouterr().err.splitlines()[-1]
        assert (
            error.startswith("error: ")
            and "bad.py:reward" in error
            and "returned nan, not a finite float32" in error
        )

"""Data files in the forms that people have: each is read as rows, or refused in one line with its name."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.data.files import read, to_list

ROWS = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(5)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(path: Path | str | list[str], **keys: Any) -> list[dict[str, Any]]:
    data = read(PromptsConfig(path=path if isinstance(path, list) else str(path), **keys), "prompts")
    columns = {name: to_list(values) for name, values in data.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def error(path: Path | str, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        rows(path, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def zst(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY, PRETTY = json.dumps(ROWS).encode(), json.dumps(ROWS, indent=4).encode()
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
DIGITS = b'{"answer": ' + b"1" * 5000 + b"}"  # more than Python makes a number of
CSV = ("problem,answer\n" + "".join(f"{row['problem']},{row['answer']}\n" for row in ROWS)).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.json", ARRAY),
        ("a.jsonl", ARRAY),
        ("a.json", PRETTY),
        ("a.json", b"\n\n".join(json.dumps(row, indent=2).encode() for row in ROWS)),
        ("a.json", json.dumps({"version": 1, "data": ROWS}).encode()),
        ("a.json", json.dumps({"train": ROWS}, indent=1).encode()),
        ("a.json", json.dumps(COLUMNS).encode()),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.json.gz", gzip.compress(PRETTY, mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.zst", zst(LINES)),
        ("a.json.zst", zst(ARRAY)),
        ("A.CSV", CSV),
        ("a.csv", b"\xef\xbb\xbf" + CSV),
        ("a.tsv", CSV.replace(b",", b"\t")),
        ("a.csv.gz", gzip.compress(CSV, mtime=0)),
    ],
)
def test_every_form_of_a_text_file_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert rows(tmp_path / name) == ROWS


def test_a_single_row_with_lists_in_it_stays_one_row(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "Hi"}], "solutions": ["5"]}
    for one in (row, {"question": "q", "tests": [{"in": 1}], "answer": "5"}):
        (tmp_path / "a.jsonl").write_text(json.dumps(one))
        assert rows(tmp_path / "a.jsonl") == [one]


def test_a_csv_keeps_its_cells_as_text_and_an_empty_cell_empty(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('problem,answer\n"one, two\nlines",007\nNA,1.50\nx,\n')
    assert [row["answer"] for row in rows(tmp_path / "a.csv")] == ["007", "1.50", ""]
    assert rows(tmp_path / "a.csv")[0]["problem"] == "one, two\nlines"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("prompt,answer\nWhat is 1,000 + 1?,1001\n", "line 2 has 3 cells, and the header has 2: quote cells"),
        ("prompt,answer\na,1\n\nb\n", "line 4 has 1 cells, and the header has 2: quote cells"),
        ("prompt,answer,answer\na,1,2\n", "two columns are called 'answer'"),
        ('prompt,answer\n"a,1\nb,2\n', "is not CSV: line 3: unexpected end of data"),
    ],
)
def test_cells_of_a_csv_never_go_to_other_columns(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    assert complaint in error(tmp_path / "a.csv")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_another_encoding_is_named_with_its_file(tmp_path: Path, name: str, encoding: str) -> None:
    content = CSV if name.endswith("csv") else LINES
    (tmp_path / name).write_bytes(content.decode().encode(encoding))
    shown = encoding[:6].upper()
    assert error(tmp_path / name).startswith(
        f"prompts.path: {tmp_path / name} is not UTF-8 but looks like {shown}: save it as UTF-8"
    )


def test_a_byte_that_is_not_utf_8_is_named_by_its_line(tmp_path: Path) -> None:
    for content in (LINES + b'{"problem": "\xff"}\n', PRETTY[:-1] + b',\n"\xff"]'):
        (tmp_path / "a.json").write_bytes(content)
        line = content.count(b"\n", 0, content.index(b"\xff")) + 1
        assert error(tmp_path / "a.json").endswith(f"a.json: line {line} is not JSON: it is not UTF-8")


def test_a_damaged_file_is_one_line_with_its_name(tmp_path: Path) -> None:
    cases = {
        "a.json": (PRETTY[:-30], "is not JSON"),
        "a.jsonl.gz": (gzip.compress(LINES, mtime=0)[:-20], "cannot be read"),
        "b.jsonl.gz": (LINES, "cannot be read"),
        "a.jsonl.zst": (LINES, "cannot be read"),
        "a.parquet": (LINES, "is not Parquet"),
        "many.jsonl": (
            b'{"answer": 1}\n{"answer": ' + DIGITS + b"}",
            "line 2 is not JSON: Exceeds the limit",
        ),
        "one.jsonl": (b'\n{"answer": ' + DIGITS + b"}", "line 2 is not JSON: Exceeds the limit"),
        "deep.json": (b"[" * 10**5, "line 1 is not JSON: maximum recursion depth"),
    }
    for name, (content, complaint) in cases.items():
        (tmp_path / name).write_bytes(content)
        message = error(tmp_path / name)
        assert f"prompts.path: {tmp_path / name}" in message and complaint in message


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    columns = [pa.array([text]) for text in "abc"]
    for names in (["problem", "answer", "answer"], ["problem", "level", "answer"]):
        pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "a.parquet")
        if len(set(names)) == 3:
            assert rows(tmp_path / "a.parquet") == [{"problem": "a", "level": "b", "answer": "c"}]
        else:
            path = tmp_path / "a.parquet"
            assert error(path) == f"prompts.path: {path}: two columns are called 'answer'"


def test_a_glob_and_a_list_give_the_rows_of_their_files_in_order(tmp_path: Path) -> None:
    for i, row in enumerate(ROWS):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"part-{i}.parquet")
    assert rows(tmp_path / "part-*.parquet") == ROWS
    (tmp_path / "more.jsonl").write_text('{"problem": "x", "answer": 3, "level": 1}\n')
    both = rows([str(tmp_path / "part-[01].parquet"), str(tmp_path / "more.jsonl")])
    assert [row["answer"] for row in both] == ["0", "2", 3] and [row["level"] for row in both] == [
        None,
        None,
        1,
    ]
    assert error(tmp_path / "no-*.parquet") == f"prompts.path: no file matches {tmp_path / 'no-*.parquet'}"


def test_a_glob_over_shards_of_several_splits_reads_the_split_of_the_config(tmp_path: Path) -> None:
    for split, part in (("train", ROWS[:2]), ("train", ROWS[2:4]), ("test", ROWS[4:])):
        number = len(list(tmp_path.glob(f"{split}-*")))
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"{split}-{number:05d}-of-00002.parquet")
    assert rows(tmp_path / "*.parquet") == ROWS[:4]
    assert rows(tmp_path / "*.parquet", split="test") == ROWS[4:]
    assert "are of the splits test, train, not dev" in error(tmp_path / "*.parquet", split="dev")
    # datasets itself knows the shards of a folder
    assert rows(tmp_path, split="test") == ROWS[4:]


def test_a_slice_of_rows_is_written_as_datasets_does_for_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(LINES)
    for path in (tmp_path / "a.jsonl", tmp_path / "saved", folder):
        for split, want in (
            ("[:2]", ROWS[:2]),
            ("[1:3]", ROWS[1:3]),
            ("[60%:]", ROWS[3:]),
            ("[-1:]", ROWS[-1:]),
        ):
            assert rows(path, split=f"train{split}") == want, (path, split)
    for wrong in ("train[a:b]", "train[3", "train[:2]+train[3:]"):
        assert error(tmp_path / "a.jsonl", split=wrong).startswith("prompts.split: ")


def test_a_split_or_subset_that_the_data_do_not_have_is_refused_and_never_dropped(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.jsonl", "a.json", "a.csv", "a.parquet")]
    for file, content in zip(files, (LINES, PRETTY, CSV, b""), strict=True):
        file.write_bytes(content)
    pq.write_table(pa.Table.from_pylist(ROWS), files[-1])
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "parts.csv").mkdir()
    (tmp_path / "parts.csv" / "part-0.csv").write_bytes(CSV)
    for path in (*files, tmp_path / "a*.csv", tmp_path / "parts.csv", tmp_path / "saved"):
        assert rows(path) == rows(path, split="train") == ROWS
        for split in ("test", "train+test", "test[:2]"):
            message = error(path, split=split)
            assert message.startswith(f"prompts.split: {tmp_path}"), message
            assert f"has no split {split.partition('[')[0]}; name the file of that split" in message
        assert error(path, subset="main").startswith(f"prompts.subset: {path} has no subsets")


def test_shards_of_one_split_are_no_other_split(tmp_path: Path) -> None:
    name = tmp_path / "test-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), name)
    for path in (name, tmp_path / "test-*.parquet"):
        assert rows(path) == rows(path, split="test") == ROWS
        assert rows(path, split="test[:2]") == ROWS[:2]
        assert (
            error(path, split="dev") == f"prompts.split: the files of {path} are of the split test, not dev"
        )


def test_a_json_object_of_splits_gives_the_one_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"test": ROWS[:1], "train": ROWS[1:], "mine": ROWS[2:]}))
    assert (
        rows(path) == ROWS[1:]
        and rows(path, split="test") == ROWS[:1]
        and rows(path, split="mine") == ROWS[2:]
    )
    assert error(path, split="dev") == f"prompts.split: {path} has no split dev; it has test, train"
    path.write_text(json.dumps({"test": ROWS[:1], "dev": ROWS[1:]}))
    assert error(path) == f"prompts.split: {path} has no split train; it has test, dev"
    path.write_text(json.dumps({"test": ROWS}))
    assert rows(path) == ROWS


def test_what_save_to_disk_wrote_is_read_with_its_splits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, rest = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    with_bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": rest}).save_to_disk(tmp_path / "two")
    if not with_bars:
        datasets.enable_progress_bars()
    capfd.readouterr()
    assert rows(tmp_path / "one") == rows(tmp_path / "two") == ROWS
    assert rows(tmp_path / "two", split="test") == ROWS[:1]
    assert rows(tmp_path / "one" / "data-00000-of-00001.arrow") == ROWS
    assert error(tmp_path / "two", split="dev").endswith("has no split dev; it has train, test")
    folder = tmp_path / "folder"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train.parquet")
    assert rows(folder) == ROWS
    assert capfd.readouterr() == ("", "")  # no progress bars among a run's lines
    assert datasets.are_progress_bars_disabled() == with_bars

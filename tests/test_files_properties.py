"""Properties of the JSON lines, whatever a killed writer has left of them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gvpo_ray.files import append_line, read_lines, repair_lines

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NO_LINE_END = st.binary(max_size=40).map(lambda torn: torn.replace(b"\n", b""))


@st.composite
def cut_files(draw: st.DrawFn) -> tuple[list[Any], bytes]:
    """Values, and the bytes of a file of them that ends at any byte."""
    values = draw(st.lists(VALUES, max_size=5))
    lines = [json.dumps(value).encode() + b"\n" for value in values]
    data = b"".join(lines)
    end = draw(st.integers(0, len(data)))
    whole = data[:end].count(b"\n")
    return values[:whole], data[:end]


@settings(max_examples=40, deadline=None)
@given(cut_files(), st.lists(VALUES, min_size=1, max_size=3))
def test_a_file_that_ends_at_any_byte_has_its_whole_lines_and_those_that_are_appended(
    cut: tuple[list[Any], bytes], more: list[Any]
) -> None:
    whole, data = cut
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        path.write_bytes(data)
        assert read_lines(path) == whole
        for value in more:
            append_line(path, value)
        assert read_lines(path) == whole + more
        assert path.read_bytes().startswith(data[: data.rfind(b"\n") + 1])  # whole lines stay as they are


@settings(max_examples=40, deadline=None)
@given(st.lists(VALUES, max_size=3), NO_LINE_END, VALUES)
def test_a_last_line_of_any_bytes_without_an_end_is_left_out_and_written_over(
    whole: list[Any], torn: bytes, value: Any
) -> None:
    lines = b"".join(json.dumps(entry).encode() + b"\n" for entry in whole)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        path.write_bytes(lines + torn)
        assert read_lines(path) == whole
        repair_lines(path)
        assert path.read_bytes() == lines
        path.write_bytes(lines + torn)
        append_line(path, value, sync=True)
        assert read_lines(path) == [*whole, value]
        assert path.read_bytes() == lines + json.dumps(value).encode() + b"\n"


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=80))
@example(b"[" * 100_000)
@example(b"1" * 5_000)
def test_any_bytes_can_be_read_by_who_skips_what_is_malformed(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        path.write_bytes(data + b'\n{"step": 1}\n7\n{"step": 2}')
        assert read_lines(path, skip_malformed=True)[-2:] == [{"step": 1}, {"step": 2}]

"""The first cause of the death of vLLM's processes, as it is read from what they wrote and how they ended."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gvpo_ray.engines import vllm_engine
from gvpo_ray.engines.process_log import last_error, why_it_died

IN_FILES = """
import json, subprocess, sys
sys.path.insert(0, {root!r})
from gvpo_ray.engines.process_log import ProcessLog
print("ValueError: of an earlier one", flush=True)
log = ProcessLog()
subprocess.run([sys.executable, "-c", {core!r}], check=True)
open({answer!r}, "w").write(json.dumps([log.lines(), [path.name for path in log.paths]]))
"""

PREFIX = "(EngineCore pid=7) ERROR 11-27 [core.py:1510] "
FATAL = f"{PREFIX}EngineCore encountered a fatal error."
KILLED = "EngineCore was ended by SIGKILL (out of memory?) and wrote no cause"


def test_what_a_child_process_writes_to_our_log_is_read_from_now_on_and_without_colours(
    tmp_path: Path,
) -> None:
    answer, root = tmp_path / "answer", str(Path(__file__).parents[1])
    core = "import sys; print('\\x1b[31mKeyError: 1\\x1b[0m'); print('all is well ', file=sys.stderr)"
    code = IN_FILES.format(root=root, core=core, answer=str(answer))
    with open(tmp_path / "1.out", "a") as out, open(tmp_path / "2.err", "a") as err:
        assert subprocess.run([sys.executable, "-c", code], stdout=out, stderr=err).returncode == 0
    assert json.loads(answer.read_text()) == [["KeyError: 1", "all is well"], ["1.out", "2.err"]]


def test_a_process_whose_output_goes_to_a_pipe_has_no_log_to_read() -> None:
    code = "from gvpo_ray.engines.process_log import ProcessLog as P; print(P().paths, P().lines())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout == "[] []\n", told.stderr


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (
            [
                f"{PREFIX}EngineCore failed to start.",
                f"{PREFIX}ValueError: Seed must be between 0 and 2**32 - 1",
                "Exception: WorkerProc initialization failed. See stack trace for root cause.",
            ],
            "ValueError: Seed must be between 0 and 2**32 - 1",
        ),
        (
            ["torch.OutOfMemoryError: CUDA out of memory", "/x.py:3: UserWarning: an Error: is not one"],
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        (["KeyError: 1", "AssertionError"], "AssertionError"),
        (["all is well"], None),
    ],
)
def test_the_last_line_that_names_an_error_and_points_to_no_other_is_the_cause(
    lines: list[str], error: str | None
) -> None:
    assert last_error(lines) == error


@pytest.mark.parametrize(
    ("lines", "statuses", "why"),
    [
        # the core says it itself, before it is gone or after
        (["KeyError: before", FATAL, f"{PREFIX}x.Y.KeyError: 2"], {}, "x.Y.KeyError: 2"),
        ([FATAL, "ValueError: 3"], {"EngineCore": 1}, "ValueError: 3"),
        (["ERROR [async_llm.py:1] AsyncLLM output_handler failed.", "TypeError: 4"], {}, "TypeError: 4"),
        # what the core says points to a worker's error above it
        (
            [
                "(Worker_TP1 pid=8) ERROR 11-27 [m.py:9] torch.OutOfMemoryError: CUDA out of memory",
                FATAL,
                "RuntimeError: Worker failed with error 'x', please check the stack trace above for the "
                "root cause",
            ],
            {"EngineCore": 1},
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        # or to one that was killed, whatever was written before
        (
            [
                "OSError: long ago",
                "Worker proc Worker-1 died unexpectedly (exit code: -9), shutting down executor.",
                FATAL,
                "RuntimeError: Executor failed.",
            ],
            {"EngineCore": 1},
            "Worker-1 was ended by SIGKILL (out of memory?) and wrote no cause",
        ),
        # the client's error is only a consequence where the core was killed
        (
            ["ERROR [async_llm.py:1] AsyncLLM output_handler failed.", "asyncio.exceptions.CancelledError"],
            {"EngineCore": -9},
            KILLED,
        ),
        # nobody says anything
        (["KeyError: before"], {"EngineCore": -9}, KILLED),
        ([], {"EngineCore": -9}, KILLED),
        ([], {"EngineCore": -11}, "EngineCore was ended by SIGSEGV and wrote no cause"),
        ([], {"EngineCore": 3}, "EngineCore ended with status 3 and wrote no cause"),
        ([], {"a": 0, "EngineCore": -9}, KILLED),
        ([], {}, "no cause is known, its processes wrote none"),
        # but C++ or the interpreter
        (
            [
                "terminate called after throwing an instance of 'c10::Error'",
                "  what():  CUDA error: an illegal memory access was encountered",
            ],
            {"EngineCore": -6},
            "EngineCore was ended by SIGABRT: CUDA error: an illegal memory access was encountered",
        ),
        (
            ["Fatal Python error: Segmentation fault"],
            {"EngineCore": -11},
            "EngineCore was ended by SIGSEGV: Segmentation fault",
        ),
    ],
)
def test_a_dead_core_has_a_first_cause_or_it_is_said_how_it_ended(
    lines: list[str], statuses: Mapping[str, int], why: str
) -> None:
    assert why_it_died(lines, statuses) == why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "Engine core initialization failed. See root cause above. Failed core proc(s): {'Core': -9}",
            "vLLM did not start: its core process was ended by SIGKILL (out of memory?) and wrote no cause",
        ),
        ("CUDA is not\navailable", "CUDA is not available"),
    ],
)
def test_a_start_that_failed_without_a_word_says_by_which_signal(text: str, why: str) -> None:
    silent: Any = SimpleNamespace(paths=[], lines=list)
    assert vllm_engine._why_not_started(RuntimeError(text), silent) == why

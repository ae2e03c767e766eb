"""What one check can reach of the next one, of the verifier and of its machine; and what it may use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scoring import (
    LIMIT_S,
    group_of,
    reasons_of,
    rewards_of,
    score_with,
)

from gvpo_ray import groups
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.verifiers.verifier import Verifier

pytestmark = pytest.mark.usefixtures("no_child_left")


@pytest.mark.parametrize(
    "attempt",
    [
        "__import__('subprocess').run(['true'])",
        "__import__('os').fork()",
        "__import__('socket').create_connection(('127.0.0.1', 9))",
        "open(outside, 'w')",
        "__import__('os').remove(__file__)",
        "__import__('os').kill(__import__('os').getppid(), 9)",
    ],
)
def test_a_function_can_only_compute(tmp_path: Path, attempt: str) -> None:
    (tmp_path / "mine.py").write_text(
        f"outside = {str(tmp_path / 'outside')!r}\n"
        "def reward(prompts, completions, **columns):\n"
        f"    {attempt}\n"
        "    return [1.0]\n"
    )
    with Verifier(
        VerifiersConfig(timeout_s=LIMIT_S, rewards={f"{tmp_path}/mine.py:reward": 1.0})
    ) as verifier:
        scored = verifier.score(group_of("1", ["a"]))
    assert rewards_of(scored) == [None]
    assert "PermissionError" in (reasons_of(scored)[0] or "")
    assert (tmp_path / "mine.py").exists() and not (tmp_path / "outside").exists()


def test_a_function_may_write_into_its_scratch_folder_which_goes_with_it() -> None:
    def writes(prompts: list[str], completions: list[str], **_: Any) -> list[Any]:
        import tempfile

        with tempfile.NamedTemporaryFile("w", delete=False) as file:
            file.write(completions[0])
        with open(file.name) as written:
            return [(float(len(written.read())), file.name)]

    scored = score_with(writes, ["abc"])
    assert rewards_of(scored) == [3.0]
    assert not Path(reasons_of(scored)[0] or "").exists()


def test_the_scratch_folder_of_a_killed_verifier_is_removed_by_the_next_one() -> None:
    program = (
        "import os, signal; from gvpo_ray.config.run import VerifiersConfig; from "
        "gvpo_ray.verifiers.verifier import Verifier\n"
        "verifier = Verifier(VerifiersConfig(rewards={'format': 1}))\n"
        "print(verifier._sandbox._scratch.folder, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    left = Path(killed.stdout.strip())
    assert killed.returncode == -signal.SIGKILL and left.is_dir()
    with Verifier(VerifiersConfig(rewards={"format": 1})):
        assert not left.exists() and not left.with_suffix(".lock").exists()


def test_what_a_function_prints_and_reads_does_not_touch_the_protocol(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def talks(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import os
        import sys

        print('{"part": 0.0, "reason": null}', flush=True)
        os.write(1, b'{"part": 0.0, "reason": null}\n')
        return [1.0 if sys.stdin.read() == "" else 0.0]

    assert rewards_of(score_with(talks, ["a", "b"])) == [1.0, 1.0]
    assert capfd.readouterr().err.count('{"part": 0.0') == 4


def test_the_child_gets_no_secrets_and_a_scratch_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")

    def environment(prompts: list[str], completions: list[str], **_: Any) -> list[Any]:
        import os

        return [(1.0, " ".join(["leak" if "HF_TOKEN" in os.environ else "clean", os.environ["HOME"]]))]

    status, home = (reasons_of(score_with(environment, ["a"]))[0] or "").split()
    assert status == "clean"
    assert home != os.environ.get("HOME") and not Path(home).exists()  # removed by close


def test_a_completion_that_is_run_changes_no_later_verdict() -> None:
    def runs(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        scope: dict[str, Any] = {}
        exec(completions[0], scope)
        return [float(scope.get("result") == int(answer[0]))]

    poison = (
        "import builtins, os, tempfile\n"
        "import gvpo_ray.verifiers.math.reward as reward\n"
        "import gvpo_ray.sandbox.template as template\n"
        "reward.grade = lambda *_, **__: reward.Grade(True, None, 'x')\n"
        "builtins.int = lambda text: 7\n"
        "open(os.environ['TMPDIR'] + '/left', 'w').close()\n"
        "os.chdir(os.environ['TMPDIR'])\n"
        "os.set_blocking(1, False)\n"
        "result = 0\n"
    )
    innocent = "import os; print('x' * 2**20); result = 8 if os.listdir(os.environ['TMPDIR']) == [] else 9"
    with Verifier(
        VerifiersConfig(timeout_s=LIMIT_S, rewards={"runs": 1, "math": 1}), {"runs": runs}
    ) as verifier:
        scored = verifier.score(group_of("8", ["result = 7", poison, "result = 7", "\\boxed{7}", innocent]))
    (row,) = groups.rows(scored)
    assert row["reward_parts"]["runs"][:3] == [0.0, 0.0, 0.0]
    assert row["reward_parts"]["math"][:3] == [0.0, 0.0, 0.0]
    assert row["reward_parts"]["runs"][4] == 1.0


def test_a_print_costs_no_reward_and_little_of_it_reaches_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    def talks(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import os

        print("\x1b[31mred", completions[0])
        for _ in range(64):
            os.write(1, b"x" * 2**20)
            os.write(2, b"y" * 2**20)
        if completions[0] == "closes":
            os.close(1)
            os.close(2)
        return [1.0]

    scored = score_with(talks, ["a", "closes", "b"])
    assert rewards_of(scored) == [1.0, 1.0, 1.0]
    printed = capfd.readouterr()
    assert printed.out == "" and len(printed.err) < 100_000
    assert printed.err.count("\\x1b[31mred") == 3 and "\x1b" not in printed.err
    assert printed.err.count("the rest of what this reward function prints is left out") == 3


def test_what_all_checks_print_is_limited_as_well(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gvpo_ray.sandbox.channel.MAX_PRINTED_BYTES_IN_ALL", 100)

    def talks(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        print(completions[0] * 40)
        return [1.0]

    assert rewards_of(score_with(talks, ["a", "b", "c", "d"])) == [1.0] * 4
    printed = capfd.readouterr().err
    assert [printed.count(letter * 20) for letter in "abcd"] == [2, 2, 0, 0]
    assert printed.count("left out") == 1


def test_no_descriptor_of_a_check_is_a_file_of_the_verifier() -> None:
    def looks(prompts: list[str], completions: list[str], **_: Any) -> list[Any]:
        import os
        import stat

        tried = []
        for descriptor in range(256):
            try:
                is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
                tried.append(is_file)
                os.ftruncate(descriptor, 0)
                tried.append(True)
            except OSError:
                pass
        return [(float(any(tried)), str(tried))]

    assert rewards_of(score_with(looks, ["a"])) == [0.0]


@pytest.mark.parametrize(
    "part",
    ["1" + "0" * 400, "1" + "0" * 5000, "1e999", "NaN", "[1.0]", '"1.0"', "true", "{}", '1.0, "reason": 3'],
)
def test_a_forged_answer_costs_its_own_check_alone(part: str) -> None:
    def forges(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import os
        import sys

        frame = sys._getframe()
        while frame is not None and "check" not in frame.f_locals:
            frame = frame.f_back  # type: ignore[assignment]
        if completions[0] == "forge":
            check, channel = frame.f_locals["check"], frame.f_locals["channel"]
            channel.sendall(f'{{"number": "{check["number"]}", "part": {part}}}\n'.encode() * 3)
            os._exit(0)
        return [1.0]

    scored = score_with(forges, ["a", "forge", "b"])
    assert rewards_of(scored) == [1.0, None, 1.0]
    assert (reasons_of(scored)[1] or "").startswith("crash: math: an answer that is not ")


@pytest.mark.parametrize(
    "take", [lambda scratch: scratch.folder.rmdir(), lambda scratch: Path(scratch._lock.name).unlink()]
)
def test_a_scratch_folder_that_a_cleaner_took_is_made_again(take: Callable[[Any], None]) -> None:
    def writes(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        import tempfile

        tempfile.TemporaryDirectory().cleanup()
        if completions[0] == "ends":
            os._exit(1)
        return [1.0]

    with Verifier(VerifiersConfig(timeout_s=LIMIT_S), {"math": writes}) as verifier:
        assert verifier._sandbox is not None
        for completion, reward in (("a", 1.0), ("ends", None), ("b", 1.0)):
            take(verifier._sandbox._scratch)
            assert rewards_of(verifier.score(group_of("1", [completion]))) == [reward]
        folder = verifier._sandbox._scratch.folder
        assert folder.is_dir()
    assert not folder.exists() and not folder.with_suffix(".lock").exists()


def test_whatever_a_check_leaves_in_the_scratch_folder_is_gone_for_the_next() -> None:
    def leaves(prompts: list[str], completions: list[str], **_: Any) -> list[Any]:
        import os

        here = os.environ["TMPDIR"]
        found = os.listdir(here)
        os.chdir(here)
        open(b"\xff name", "w").close()
        os.symlink("/", "link")
        os.mkfifo("pipe")
        os.mkdir("closed", 0o000)
        for _ in range(1200):  # deeper than recursion goes
            os.mkdir("d")
            os.chdir("d")
        return [(float(len(found)), str(found))]

    scored = score_with(leaves, ["a", "b", "c"])
    assert rewards_of(scored) == [0.0, 0.0, 0.0]


USED = {
    "arrays": "import numpy; numpy.linalg.svd(numpy.random.rand(100, 100))",
    "formulas": "import sympy; assert sympy.integrate(sympy.Symbol('x')) == sympy.sympify('x**2/2')",
    "optimisation": "import scipy.optimize; scipy.optimize.minimize(lambda x: (x**2).sum(), [1.0, 2.0])",
    "tables": "import pandas; pandas.DataFrame({'a': [1]}).to_string()",
    "tensors": "import torch; assert (torch.ones(9, 9) @ torch.ones(9, 9)).sum() == 729",
    "threads": "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool:\n"
    "    assert list(pool.map(int, '123')) == [1, 2, 3]",
    "a database": "import os, sqlite3\ndatabase = sqlite3.connect(os.environ['TMPDIR'] + '/x.db')\n"
    "database.execute('create table t (a)')\ndatabase.commit()",
    "archives": "import shutil, tempfile, zipfile\nwith tempfile.TemporaryDirectory() as folder:\n"
    "    with zipfile.ZipFile(folder + '/a.zip', 'w') as file:\n        file.writestr('a', 'b')\n"
    "    shutil.copyfile(folder + '/a.zip', folder + '/b')\n    shutil.move(folder + '/b', folder + '/c')",
    "time zones": "import datetime, zoneinfo\ndatetime.datetime.now(zoneinfo.ZoneInfo('Europe/Berlin'))",
    "an alarm": "import signal, time\n"
    "def rings(*_): raise TimeoutError\nsignal.signal(signal.SIGALRM, rings)\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.05)\ntry:\n    time.sleep(60)\nexcept TimeoutError:\n    pass\n"
    "else:\n    raise AssertionError",
}


def test_what_reward_functions_use_works_in_the_sandbox() -> None:
    def runs(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        exec(completions[0], {})
        return [1.0]

    scored = score_with(runs, list(USED.values()), timeout_s=60, cpu_s=30, memory_gib=8.0)
    assert dict(zip(USED, reasons_of(scored), strict=True)) == dict.fromkeys(USED)
    assert rewards_of(scored) == [1.0] * len(USED)

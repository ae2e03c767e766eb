"""The command line: a bad config or command is one line that names it, exit status 2, and nothing starts."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import tree

from gvpo_ray.cli import main
from gvpo_ray.config.run import GVPOConfig

JOBS = Path(__file__).parent.parent / "jobs"
pytestmark = pytest.mark.usefixtures("quiet")


# --- the config ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("nowhere.yaml", None, "No such file"),
        (".", None, "Is a directory"),
        ("bad.yaml", "run_dir: [1", "not YAML"),
        ("bad.yaml", "{run_dir: {a: 1, a", "not YAML"),
        ("bad.yaml", "", "found nothing"),
        ("bad.yaml", "- run_dir", "found list"),
        ("bad.yaml", "run_dir: runs/x", "num_steps: required"),
    ],
)
def test_a_config_that_is_none_is_refused(
    refused: Callable[..., str], folder: Path, name: str, text: str | None, complaint: str
) -> None:
    if text is not None:
        (folder / name).write_text(text)
    for verb in ("train", "check"):
        message = refused(verb, name)
        assert message.startswith(f"{name}: ") and complaint in message


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        # misspelt, and in the wrong place
        ("groups_per_stp=8", "unknown key groups_per_stp; did you mean groups_per_step?"),
        ("learner.learning_rat=1", "unknown key learner.learning_rat; did you mean learner.learning_rate?"),
        ("beta=0.1", "unknown key beta; did you mean loss.beta?"),
        (
            "evaluation.sets.x.pth=1",
            "unknown key evaluation.sets.x.pth; did you mean evaluation.sets.x.path?",
        ),
        ("xyzzy=1", "unknown key xyzzy; known here: run_dir,"),
        # values that GVPO cannot train with
        ("sampling.num_completions=1", "sampling.num_completions: "),
        ("loss.beta=0", "loss.beta: "),
        ("loss.beta=-0.1", "loss.beta: "),
        ("loss.beta=.inf", "loss.beta: "),
        ("loss.reference=newest", "loss.reference: must be behaviour, previous, initial or every: N"),
        ("sampling.top_p=0.9", "sampling: top_p=0.9 cuts the sampler's support"),
        ("sampling.top_k=50", "sampling: top_k=50 cuts the sampler's support"),
        ("sampling.temperature=0", "sampling.temperature: "),
        ("num_steps=many", "num_steps: "),
        ("learner.num_mini_batches=3", "learner.num_mini_batches (3) must not exceed groups_per_step (2)"),
        ("evaluation.every=5", "evaluation.every is set but evaluation.sets is empty"),
        ("prompts.template=Question", "prompts.template: must contain {prompt}"),
        # overrides that are none
        ("num_steps", "override 'num_steps' is not key=value"),
        ("=3", "override '=3' is not key=value"),
        ("num_steps=[1", "override num_steps: '[1' is not a YAML value"),
        ("num_steps.x=1", "override num_steps.x: num_steps is not a section"),
    ],
)
def test_a_bad_key_or_value_is_named(refused: Callable[..., str], override: str, complaint: str) -> None:
    for verb in ("train", "check"):
        assert complaint in refused(verb, "config.yaml", override)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train", "config.yaml", "--loss.beta=1"], "No such option: --loss.beta; `gvpo-ray train --help`"),
        (["train"], "Missing argument 'CONFIG'; `gvpo-ray train --help`"),
        (["tarin", "config.yaml"], "No such command 'tarin'. Did you mean 'train'"),
        (["rollout", "config.yaml"], "Missing option '--out'; `gvpo-ray rollout --help`"),
        (
            ["rollout", "config.yaml", "--out", "x", "--groups", "many"],
            "Invalid value for '--groups'",
        ),
        (["status", "run", "more"], "unexpected extra argument"),
        ([], "Missing command; `gvpo-ray --help`"),
        (["bench"], "Missing command; `gvpo-ray bench --help`"),
        (["bench", "lerner"], "No such command 'lerner'. Did you mean 'learner'"),
        (["verify", "in.jsonl", "--out", "out.jsonl", "--workers", "0"], "--workers: 0: must be at least 1"),
        (["bench", "paper", "--seeds", "0"], "--seeds: 0: must be at least 1"),
        (["bench", "paper", "--tasks", "sort,chian"], "--tasks: chian: must be some of arithmetic, chain"),
        (["bench", "scale", "--engines", "8,0"], "--engines: 8,0: must be numbers such as 8,64"),
        (["bench", "scale", "--turns", "0"], "--turns: 0: must be at least 1"),
        (["bench", "episodes", "--groups", "0"], "--groups: 0: must be at least 1"),
        (["bench", "episodes", "--model", "absent"], "--model: absent has no config.json"),
        (["bench", "gpu", "--sections", "prob"], "--sections: prob: must be some of probe, "),
        (["bench", "chaos", "config.yaml", "learner.lerning_rate=1"], "learner.lerning_rate; did you mean"),
    ],
)
def test_a_command_that_is_none_is_one_line_that_says_where_help_is(
    refused: Callable[..., str], arguments: list[str], complaint: str
) -> None:
    assert complaint in refused(*arguments)


# --- what is shipped ----------------------------------------------------------------------------------------


def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    def help_of(*path: str) -> str:
        assert main([*path, "--help"]) == 0
        text = capsys.readouterr().out
        assert "\x1b" not in text and "completion" not in text.lower().replace("completions", "")
        return text

    def verbs_in(text: str) -> list[tuple[str, str]]:
        return re.findall(r"^  ([\w-]+) +(.+)$", text.partition("Commands:\n")[2], flags=re.MULTILINE)

    text = help_of()
    assert "Exit status: 0 success" in text
    verbs = verbs_in(text.partition("\n  A run is")[0])
    assert " ".join(name for name, _ in verbs) == (
        "train rollout learn evaluate compare export check warm-start jobs score status report verify bench"
    )
    benches = verbs_in(help_of("bench"))
    assert {name for name, _ in benches} == {
        path.stem for path in (JOBS.parent / "gvpo_ray" / "bench").iterdir() if path.stem[0] not in "_."
    } - {"experiments", "turns"} | {"family", "paper", "staleness"}
    for path, line in [((name,), line) for name, line in verbs if name != "bench"] + [
        (("bench", name), line) for name, line in benches
    ]:
        assert line.endswith("."), f"{path}: its first sentence is cut: {line}"
        text = help_of(*path)
        assert " ".join(line.split()) in text and f"example: gvpo-ray {' '.join(path)}" in text


def test_help_and_a_wrong_key_are_answered_before_anything_heavy_is_imported(folder: Path) -> None:
    program = (
        "import sys\nfrom gvpo_ray.cli import main\nstatus = main(sys.argv[1:])\n"
        "print({'torch', 'ray', 'vllm', 'transformers', 'pyarrow'} & set(sys.modules) or 'light')\n"
        "sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(JOBS.parent)}
    for arguments, status in ((["--help"], 0), (["train", "config.yaml", "loss.betta=1"], 2)):
        ran = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment
        )
        assert ran.returncode == status, ran.stderr
        assert ran.stdout.endswith("light\n")


def test_an_interrupted_verb_says_whether_the_same_command_resumes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GVPOConfig, "from_file", interrupted)
    assert main(["train", "config.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted; the same command resumes the run\n"
    assert main(["bench", "ring", "config.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_has_seen_enough_is_no_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `gvpo-ray jobs | head -1`; another pipe that breaks is an error like any."""
    few, many = (lambda: {"a": JOBS / "quickstart.yaml"}), lambda: {"a" * 9000: JOBS / "quickstart.yaml"}
    for jobs in (few, many):  # less than a buffer, and more
        for buffering in (0, 1, -1):  # none (as in Ray's jobs), a line, and what is left at the end
            reads, writes = os.pipe()
            os.close(reads)
            with (
                open(writes, "wb", buffering=min(buffering, 0)) as binary,
                io.TextIOWrapper(
                    binary, encoding="utf-8", line_buffering=buffering == 1, write_through=buffering == 0
                ) as stdout,
                monkeypatch.context() as patch,
            ):
                patch.setattr("gvpo_ray.config.loading.packaged_jobs", jobs)
                patch.setattr(sys, "stdout", stdout)
                assert main(["jobs"]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)  # as of a daemon
        assert main(["jobs"]) == 0

    def broken(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(GVPOConfig, "from_file", broken)
    assert main(["check", "config.yaml"]) == 1
    assert capsys.readouterr().err == "error: [Errno 32] Broken pipe\n"


def test_a_reader_that_has_seen_enough_of_what_rich_prints_is_no_error_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads, writes = os.pipe()
    os.close(reads)

    def prints(*_: Any, **__: Any) -> None:
        Console().print("a line")

    with open(writes, "w", buffering=1, encoding="utf-8") as stdout:
        monkeypatch.setattr(GVPOConfig, "from_file", prints)
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["check", "config.yaml"]) == 128 + signal.SIGPIPE
        monkeypatch.undo()


def test_the_papers_job_states_the_papers_settings() -> None:
    config = GVPOConfig.from_file(JOBS / "qwen2.5_math_7b_8gpu.yaml")
    assert config.model.path == "Qwen/Qwen2.5-Math-7B"
    assert (config.loss.beta, config.learner.learning_rate) == (0.1, 1e-6)
    assert 8 <= config.sampling.num_completions <= 32
    assert set(config.evaluation.sets) == {"aime24", "amc", "math500", "minerva", "olympiadbench"}
    assert all(data.system_prompt == config.prompts.system_prompt for data in config.evaluation.sets.values())


def test_the_real_process_prints_one_line_too(folder: Path) -> None:
    """What libraries say while they are imported and load things must not be in the way. The last check of
    all is the one that fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(JOBS.parent)}
    command = [sys.executable, "-m", "gvpo_ray", "train", "config.yaml", "prompts.max_tokens=3"]
    before = tree(folder)
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert ran.returncode == 2
    assert re.fullmatch(r"error: prompts.max_tokens: 3 tokens are too few: [^\n]+\n", ran.stderr)
    assert ran.stdout == ""
    assert tree(folder) == before

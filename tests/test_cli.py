"""The command line: every bad input is one line that names it, exit status 2, nothing started and nothing
written over.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from tiny import make_group, make_model, table

from gvpo_ray import groups
from gvpo_ray.cli import main
from gvpo_ray.config.plan import check_resources
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.run.run_dir import open_run_dir

JOBS = Path(__file__).parent.parent / "jobs"
PROBLEMS = [{"prompt": f"{a} + {b}?", "answer": str(a + b)} for a in range(2) for b in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No cluster in the environment, no Ray from here on, and the signal handler that `main` sets put
    back.
    """
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("gvpo_ray.run.session.Session.__init__", lambda *_: pytest.fail("Ray is started"))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run's inputs (config.yaml, model, train.jsonl), which is the working directory."""
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    config = {
        "run_dir": "run",
        "num_steps": 2,
        "groups_per_step": 2,
        "model": {"path": "./model"},
        "prompts": {"path": "train.jsonl", "template": "{prompt}="},
        "sampling": {"num_completions": 2, "max_tokens": 16},
        "engines": {"num_cpus": 0.1},
        "learner": {"num_mini_batches": 1, "num_cpus": 0.1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> dict[str, Any]:
    """What is in a folder: any change of a name, a content or a time makes it another."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        )
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused("train", "config.yaml", …)`: the one line on stderr, without the folder, after checking all
    that a refusal must be.
    """

    def run(*arguments: str) -> str:
        before = tree(folder)
        status = main(list(arguments))
        printed = capsys.readouterr()
        assert status == 2, printed.err
        assert re.fullmatch(r"error: [^\n]+\n", printed.err), f"not one line: {printed.err}"
        assert "Traceback" not in printed.out
        assert tree(folder) == before
        assert not ray.is_initialized()
        return printed.err.removeprefix("error: ").rstrip("\n").replace(f"{folder}/", "")

    return run


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
        (["bench", "gpu", "--sections", "prob"], "--sections: prob: must be some of probe, "),
        (["bench", "chaos", "config.yaml", "learner.lerning_rate=1"], "learner.lerning_rate; did you mean"),
    ],
)
def test_a_command_that_is_none_is_one_line_that_says_where_help_is(
    refused: Callable[..., str], arguments: list[str], complaint: str
) -> None:
    assert complaint in refused(*arguments)


# --- model and data -----------------------------------------------------------------------------------------


def _remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [next(folder.glob(name)).unlink() for name in names] and None


def _write(name: str, content: str | list[dict[str, Any]]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            pq.write_table(
                pa.Table.from_pylist(
                    content, schema=pa.schema([("prompt", pa.string()), ("answer", pa.string())])
                ),
                folder / name,
            )

    return write


def _nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "overrides", "complaint"),
    [
        # the model
        (_nothing, ["model.path=./nowhere"], "model.path: no folder nowhere"),
        (_nothing, ["model.path=train.jsonl"], "model.path: no folder train.jsonl"),
        (_remove("model/config.json"), [], "model.path: model has no config.json"),
        (_remove("model/*.safetensors"), [], "model.path: model has no weights"),
        (
            _remove("model/tokenizer.json", "model/tokenizer_config.json"),
            [],
            "model.path: model has no tokenizer",
        ),
        (_remove("model/tokenizer.json"), [], "model.path: model has no tokenizer"),
        *(
            (_write("model/config.json", text), [], "model.path: cannot load config.json of model: ")
            for text in ("{", "[]", "{}", '{"model_type": "qwen1000"}')
        ),
        *(
            (_write(f"model/{name}", text), [], "model.path: cannot load the tokenizer of model: ")
            for name in ("tokenizer.json", "tokenizer_config.json")
            for text in ("{", "[]", "null")
        ),
        *(
            (_write("model/tokenizer.json", text), [], "model.path: cannot load the tokenizer of model: ")
            for text in ("{}", '{"model": {"type": "BPE"}}', '{"model": {"type": "New"}}', "\x00")
        ),
        (
            _write(
                "model/chat_template.jinja",
                "{{ raise_exception('no system') if messages[0].role[0] == 's' }}",
            ),
            ["prompts={path: train.jsonl, system_prompt: x}"],
            "prompts.system_prompt: the tokenizer's chat template does not take one: TemplateError: no ",
        ),
        (
            _write("model/chat_template.jinja", "{% for %}"),
            ["prompts={path: train.jsonl}"],
            "model.path: the chat template of the tokenizer fails (TemplateSyntaxError: ",
        ),
        (_nothing, ["model.max_length=256"], "model.max_length: 256 is more than the model's context of 128"),
        (
            _nothing,
            ["sampling.max_tokens=128"],
            "sampling.max_tokens: 128 tokens leave no room for a prompt in a context of 128",
        ),
        # the prompts
        (_nothing, ["prompts.path=nowhere.parquet"], "prompts.path: no file nowhere.parquet"),
        (_nothing, ["prompts.path=config.yaml"], "prompts.path: config.yaml: a data file ends in .parquet"),
        (
            _nothing,
            ["prompts.answer_column=gold"],
            "prompts.answer_column: train.jsonl has no column 'gold'; it has prompt, answer",
        ),
        (
            _nothing,
            ["prompts.prompt_column=promt"],
            "no column 'promt'; it has prompt, answer; did you mean prompt?",
        ),
        (_write("train.jsonl", ""), [], "prompts.path: train.jsonl has no rows"),
        (_write("none.parquet", []), ["prompts.path=none.parquet"], "prompts.path: none.parquet has no rows"),
        *(
            (
                _write("bad.parquet", text),
                ["prompts.path=bad.parquet"],
                "prompts.path: bad.parquet is not Parquet",
            )
            for text in ("x", "", "PAR1" * 9)
        ),
        (
            _write("parts.parquet/_SUCCESS", ""),
            ["prompts.path=parts.parquet"],
            "is a folder without .parquet files",
        ),
        (
            _write("parts.parquet/a.parquet", ""),
            ["prompts.path=parts.parquet"],
            "parts.parquet/a.parquet is not Parquet",
        ),
        (
            _write("parts.jsonl/a.jsonl", "\n{"),
            ["prompts.path=parts.jsonl"],
            "parts.jsonl/a.jsonl: line 2 is not JSON",
        ),
        (
            _write("train.jsonl", '{"prompt": "1", "answer": "2"}\n{"prompt"\n'),
            [],
            "prompts.path: train.jsonl: line 2 is not JSON",
        ),
        (
            _write("train.jsonl", '{"prompt": "1", "answer": ""}\n{"prompt": "1"}\n'),
            [],
            "prompts.path: train.jsonl: no row has a gold answer: answer is empty in all 2 rows",
        ),
        (
            _nothing,
            ["prompts.template=null"],
            "prompts.template: required, because the tokenizer has no chat template",
        ),
        (
            _nothing,
            ["sampling.max_tokens=124"],
            "the context leaves 4 tokens for a prompt, and all 6 prompts are longer",
        ),
        (
            _nothing,
            ["prompts.max_tokens=3"],
            "prompts.max_tokens: 3 tokens are too few: all 6 prompts are longer",
        ),
        (
            _nothing,
            ["evaluation.sets.held.path=nowhere.jsonl"],
            "evaluation.sets.held.path: no file nowhere.jsonl",
        ),
        (
            _nothing,
            ["evaluation.sets.held={path: train.jsonl, template: '{prompt}', answer_column: x}"],
            "evaluation.sets.held.answer_column: train.jsonl has no column 'x'",
        ),
        # the rewards
        (_nothing, ["verifiers.rewards={maths: 1}"], "verifiers.rewards.maths: unknown reward"),
        (_nothing, ["verifiers.rewards={nowhere.py:reward: 1}"], "nowhere.py"),
        (_nothing, ["verifiers.rewards={gvpo_ray.nowhere:reward: 1}"], "gvpo_ray.nowhere"),
        (_write("own.py", "def reward(): 1 +"), ["verifiers.rewards={own.py:reward: 1}"], "own.py"),
        (_nothing, ["verifiers.rewards={}"], "verifiers.rewards: name at least one reward function"),
        # the machine
        (_nothing, ["engines.num=100000"], "engines.num: 100000 x 0.1 CPUs are more than the "),
        (
            _nothing,
            ["learner.num_workers=100000"],
            "learner.num_workers: 100000 x 0.1 CPUs are more than the ",
        ),
        (
            _nothing,
            ["engines.num=1000", "engines.num_gpus=1", "engines.num_cpus=0.0001"],
            "engines.num: 1000 x 1 GPUs are more than the ",
        ),
        (
            _nothing,
            ["learner.num_workers=1000", "learner.num_gpus=1", "learner.num_cpus=0.0001"],
            "learner.num_workers: 1000 x 1 GPUs",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_starts(
    refused: Callable[..., str],
    folder: Path,
    spoil: Callable[[Path], None],
    overrides: list[str],
    complaint: str,
) -> None:
    spoil(folder)
    assert complaint in refused("train", "config.yaml", *overrides)


def test_rollout_refuses_what_train_refuses(refused: Callable[..., str]) -> None:
    assert "prompts.path: no file nowhere.jsonl" in refused(
        "rollout", "config.yaml", "--out", "out.arrow", "prompts.path=nowhere.jsonl"
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--out", "nowhere/out.arrow"], "--out: nowhere/out.arrow: No such file or directory"),
        (["--out", "train.jsonl/out.arrow"], "--out: train.jsonl/out.arrow: Not a directory"),
        (["--out", "model"], "--out: model is a folder"),
        (["--out", "out.arrow", "--groups", "0"], "--groups: 0: must be at least 1"),
        (["--out", "out.arrow", "--groups", "-3"], "--groups: -3: must be at least 1"),
    ],
)
def test_rollout_refuses_what_it_could_not_write(
    refused: Callable[..., str], arguments: list[str], complaint: str
) -> None:
    assert complaint in refused("rollout", "config.yaml", *arguments)


def test_check_reads_the_data_as_train_does(
    folder: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "verl.json").write_text(
        '[{"prompt": [{"role": "user", "content": "1"}], "reward_model": {"ground_truth": "1"}},'
        ' {"prompt": [{"role": "user", "content": "2"}], "reward_model": {"ground_truth": null}}]'
    )
    (folder / "own.py").write_text("def reward(completions, solution): return [1.0 for _ in completions]\n")
    assert main(["check", "config.yaml", "prompts.path=verl.json"]) == 0
    printed = capsys.readouterr().out
    assert "prompts: 1 prompts (longest 2 tokens, 1 without a gold answer: left out)" in printed
    assert "prompts: layout verl: the prompt is prompt, the gold is reward_model.ground_truth" in printed
    for verb in ("check", "train"):
        assert "prompts.answer_column: train.jsonl has no column 'gold'" in refused(
            verb, "config.yaml", "prompts.answer_column=gold"
        )
        assert (
            "verifiers.rewards.own.py:reward: it needs the argument 'solution', and prompts has"
            in refused(verb, "config.yaml", "verifiers.rewards={own.py:reward: 1}")
        )


def test_check_shows_the_first_prompt_with_its_special_tokens(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}<eos>a")
    (folder / "train.jsonl").write_text('{"prompt": "0+0?", "answer": "0"}\n')
    chat = "prompts={path: train.jsonl}"
    assert main(["check", "config.yaml", chat]) == 0
    assert "\nthe first prompt, 6 tokens, answer '0':\n  | 0+0?<eos>a\n" in capsys.readouterr().out
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["num_steps"]
    config["evaluation"] = {"sets": {"held": config.pop("prompts") | {"template": "{prompt}<eos>="}}}
    (folder / "evaluates.yaml").write_text(yaml.safe_dump(config))
    assert main(["check", "evaluates.yaml"]) == 0
    shown = "evaluation.sets.held: the first prompt, 6 tokens, answer '0':\n  | 0+0?<eos>=\n"
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("engines.num=100000", "engines.num: 100000 x 0.1 CPUs are more than the "),
        (
            "ray.address=http://127.0.0.1:8265",
            "ray.address: http://127.0.0.1:8265 is the address of a dashboard",
        ),
        ("tracking.mlflow={experiment: x}", "tracking.mlflow: the package mlflow is not installed"),
        ("seed=1", "seed: run holds a run with other values of it"),
        ("prompts.path=other.jsonl", "prompts: run holds a run with other values of it"),
        ("run_dir=old", "run_dir: old was made by gvpo_ray 0.1.0 or older, in format 1"),
        ("model.lora={target_modules: [q]}", "model.lora.target_modules: Target modules {'q'} not found"),
    ],
)
def test_check_refuses_what_train_would_refuse_here(
    refused: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch, override: str, complaint: str
) -> None:
    shutil.copy(folder / "train.jsonl", folder / "other.jsonl")
    (folder / "old").mkdir()
    (folder / "old" / "config.yaml").write_text((folder / "config.yaml").read_text())
    with open_run_dir(_config(folder)):
        pass
    is_there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "mlflow" else is_there(name)
    )
    for verb in ("check", "train"):
        assert complaint in refused(verb, "config.yaml", override)


def test_check_refuses_a_model_that_train_refuses(folder: Path, refused: Callable[..., str]) -> None:
    file = folder / "model" / "generation_config.json"
    file.write_text('{"do_sample": false, "temperature": 0.7}')
    for verb in ("check", "train"):
        assert "generation_config.json: temperature: no checkpoint" in refused(verb, "config.yaml")


def test_check_names_what_is_not_there(refused: Callable[..., str]) -> None:
    assert "prompts.path: nothing at nowhere.jsonl" in refused(
        "check", "config.yaml", "prompts.path=nowhere.jsonl"
    )
    assert "model.path: nothing at ./nowhere" in refused("check", "config.yaml", "model.path=./nowhere")
    assert "evaluation.sets.x.path: nothing at x.parquet" in refused(
        "check", "config.yaml", "evaluation.sets.x.path=x.parquet"
    )
    assert "verifiers.rewards.maths: unknown reward" in refused(
        "check", "config.yaml", "verifiers.rewards={maths: 1}"
    )


def test_a_missing_model_says_how_to_make_it_where_the_config_can(refused: Callable[..., str]) -> None:
    message = refused("train", "config.yaml", "model.path=./nowhere", "warm_start.data.path=train.jsonl")
    assert message == "model.path: no folder nowhere; make it with: python jobs/warm_start.py CONFIG"


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


# --- the run directory --------------------------------------------------------------------------------------


def _config(folder: Path, *overrides: str) -> GVPOConfig:
    return GVPOConfig.from_file(folder / "config.yaml", list(overrides)).absolute()


@pytest.mark.parametrize(
    ("run_dir", "complaint"),
    [
        ("train.jsonl", "run_dir: cannot write train.jsonl: File exists"),
        ("train.jsonl/run", "run_dir: cannot write train.jsonl/run: Not a directory"),
        ("/proc/gvpo_ray/run", "run_dir: cannot write /proc/gvpo_ray/run: No such file or directory"),
        ("/sys/gvpo_ray", "run_dir: cannot write /sys/gvpo_ray: "),  # for root too
    ],
)
def test_a_run_dir_that_cannot_be_made_is_refused(
    refused: Callable[..., str], run_dir: str, complaint: str
) -> None:
    assert complaint in refused("train", "config.yaml", f"run_dir={run_dir}")


def test_a_full_disk_is_named_and_the_config_that_is_there_stays(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_run_dir(_config(folder)) as run_dir:
        pass
    (run_dir / ".config.yaml.part").symlink_to("/dev/full")
    before = {path: path.read_bytes() for path in run_dir.iterdir() if path.suffix != ".part"}
    assert main(["train", "config.yaml"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(
        f"error: run_dir: cannot write {run_dir}: no room for {run_dir}/config.yaml on "
    )
    assert printed.count("\n") == 1
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before  # and the part is gone


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "groups_per_step=3",
        "sampling.temperature=0.5",
        "prompts.template='{prompt} ='",
        "model.dtype=bfloat16",
    ],
)
def test_the_run_dir_of_another_run_is_refused(
    refused: Callable[..., str], folder: Path, override: str
) -> None:
    with open_run_dir(_config(folder)) as run_dir:
        (run_dir / "checkpoints").mkdir()
        (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    key = re.split(r"[.=]", override)[0]
    assert refused("train", "config.yaml", override).startswith(
        f"{key}: run holds a run with other values of it"
    )


def test_what_may_change_on_resuming_is_not_refused(folder: Path) -> None:
    with open_run_dir(_config(folder)):
        pass
    with open_run_dir(
        _config(folder, "num_steps=9", "engines.num=2", "learner.learning_rate=1", "loss.beta=1")
    ) as run_dir:
        assert yaml.safe_load((run_dir / "config.yaml").read_text())["num_steps"] == 9


def test_a_run_dir_in_use_by_another_process_is_refused(refused: Callable[..., str], folder: Path) -> None:
    with open_run_dir(_config(folder)) as run_dir:
        pass
    with open(run_dir / ".lock") as held:  # another open file is to the lock as another process
        fcntl.flock(held, fcntl.LOCK_EX)
        assert refused("train", "config.yaml") == "run_dir: another process is running in run"


@pytest.mark.parametrize("text", ["", "run_dir: [", "- x"])
def test_a_run_dir_whose_config_is_none_is_refused(
    refused: Callable[..., str], folder: Path, text: str
) -> None:
    with open_run_dir(_config(folder)) as run_dir:
        (run_dir / "config.yaml").write_text(text)
    assert refused("train", "config.yaml").startswith("run_dir: run/config.yaml is not the config of a run")


# --- learn --------------------------------------------------------------------------------------------------


def _save(name: str, *rows: dict[str, Any], without: str | None = None) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        recorded = table(*rows)
        groups.save(recorded.drop_columns([without]) if without else recorded, folder / name)

    return save


@pytest.mark.parametrize(
    ("spoil", "file", "complaint"),
    [
        (_nothing, "nowhere.arrow", "--groups: no Arrow file at nowhere.arrow"),
        (_nothing, "model", "--groups: no Arrow file at model"),
        (_write("none.arrow", ""), "none.arrow", "--groups: none.arrow is not an Arrow IPC file"),
        (_nothing, "train.jsonl", "--groups: train.jsonl is not an Arrow IPC file"),
        (
            _save("g.arrow", make_group(0)),
            "g.arrow",
            "--groups: g.arrow has 1 groups, fewer than groups_per_step (2)",
        ),
        (
            _save("g.arrow", *map(make_group, range(4)), without="rewards"),
            "g.arrow",
            "--groups: column 'rewards' is missing",
        ),
        (
            _save("g.arrow", make_group(0), {**make_group(1), "rewards": [1.0]}),
            "g.arrow",
            "--groups: row 1: rewards has 1 entries",
        ),
    ],
)
def test_learn_names_what_is_wrong_with_the_recorded_groups(
    refused: Callable[..., str], folder: Path, spoil: Callable[[Path], None], file: str, complaint: str
) -> None:
    spoil(folder)
    assert complaint in refused("learn", "config.yaml", "--groups", file)


def test_what_a_verb_does_not_start_need_not_fit_the_machine(refused: Callable[..., str]) -> None:
    """Learning starts no engines and sampling no learner: each gets past the machine's check, to its next
    complaint.
    """
    assert "--groups: no Arrow file" in refused(
        "learn", "config.yaml", "--groups", "nowhere.arrow", "engines.num=100000"
    )
    assert "--out: model is a folder" in refused(
        "rollout", "config.yaml", "--out", "model", "learner.num_workers=100000"
    )
    assert "learner.num_workers: 100000 x" in refused(
        "learn", "config.yaml", "--groups", "nowhere.arrow", "learner.num_workers=100000"
    )
    assert "engines.num: 100000 x" in refused(
        "rollout", "config.yaml", "--out", "model", "engines.num=100000"
    )


def test_learn_does_not_mix_two_logs(refused: Callable[..., str], folder: Path) -> None:
    from gvpo_ray.buffer.log import GroupLog

    _save("g.arrow", *map(make_group, range(4)))(folder)
    with open_run_dir(_config(folder)) as run_dir:
        GroupLog(run_dir / "groups").append(table(make_group(7)))
    assert (
        "run_dir: run/groups holds 1 groups that are not the first ones of g.arrow, which has 4: use another "
        "run_dir"
    ) in refused("learn", "config.yaml", "--groups", "g.arrow")


# --- what is shipped ----------------------------------------------------------------------------------------


def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    def help_of(*path: str) -> str:
        assert main([*path, "--help"]) == 0
        text = capsys.readouterr().out
        assert "\x1b" not in text and "completion" not in text.lower().replace("completions", "")
        return text

    def verbs_in(text: str) -> list[tuple[str, str]]:
        return re.findall(r"^  (\w+) +(.+)$", text.partition("Commands:\n")[2], flags=re.MULTILINE)

    text = help_of()
    assert "Exit status: 0 success" in text
    verbs = verbs_in(text.partition("\n  A run is")[0])
    assert [name for name, _ in verbs] == (
        ["train", "rollout", "learn", "evaluate", "compare", "check", "status", "report", "verify", "bench"]
    )
    benches = verbs_in(help_of("bench"))
    assert {name for name, _ in benches} == {
        path.stem for path in (JOBS.parent / "gvpo_ray" / "bench").iterdir() if path.stem[0] not in "_."
    } - {"experiments"} | {"paper", "staleness"}
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


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("qwen2.5_math_7b_8gpu.yaml", [("learner worker", 4, 1), ("engine", 4, 1)]),
        ("qwen2.5_math_1.5b_1gpu.yaml", [("learner worker", 1, 0.5), ("engine", 1, 0.5)]),
    ],
)
def test_check_accepts_the_gpu_jobs_where_their_gpus_are_and_says_it_all_elsewhere_too(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    plan: list[tuple[str, int, float]],
) -> None:
    monkeypatch.setattr("gvpo_ray.run.machine.machine_resources", lambda config: (32.0, 8.0))
    assert main(["check", str(JOBS / name)]) == 0
    there = capsys.readouterr().out
    monkeypatch.setattr("gvpo_ray.run.machine.machine_resources", lambda config: (32.0, 0.0))
    assert main(["check", str(JOBS / name)]) == 2
    printed, error = capsys.readouterr()
    assert printed == there
    asked = "{} x {} GPUs".format(*plan[0][1:])
    assert error == f"error: learner.num_workers: {asked} are more than the 0 GPUs of this machine\n"
    for who, number, gpus in plan:
        assert re.search(rf"{who} +│ +{number} │ +[\d.]+ │ +{gpus} │ +[\d.]+ │ +{number * gpus:g} ", printed)
    assert (
        "Qwen/Qwen2.5-Math" in printed and "is a Hugging Face name, looked up when the run starts" in printed
    )
    assert "the data are not read and the columns not checked" in printed
    config = GVPOConfig.from_file(JOBS / name)
    check_resources(config, num_cpus=32, num_gpus=8 if "8gpu" in name else 1)


def test_the_papers_job_states_the_papers_settings() -> None:
    config = GVPOConfig.from_file(JOBS / "qwen2.5_math_7b_8gpu.yaml")
    assert config.model.path == "Qwen/Qwen2.5-Math-7B"
    assert (config.loss.beta, config.learner.learning_rate) == (0.1, 1e-6)
    assert 8 <= config.sampling.num_completions <= 32
    assert set(config.evaluation.sets) == {"aime24", "amc", "math500", "minerva", "olympiadbench"}
    assert all(data.system_prompt == config.prompts.system_prompt for data in config.evaluation.sets.values())


@pytest.mark.parametrize("name", ["quickstart.yaml", "gsm8k_cpu.yaml"])
def test_check_accepts_the_cpu_jobs_and_they_fit_two_cores(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config = GVPOConfig.from_file(JOBS / name)
    check_resources(config, num_cpus=2, num_gpus=0)
    here = [
        "model.path=./model",
        "prompts.path=train.jsonl",
        "sampling.max_tokens=64",  # the model of these tests has a context of 128
        *(f"evaluation.sets.{held}.path=train.jsonl" for held in config.evaluation.sets),
    ]
    assert main(["check", str(JOBS / name), *here]) == 0
    printed = capsys.readouterr().out
    assert "resource plan" in printed and "prompts.path: train.jsonl is here" in printed
    resolved = GVPOConfig.from_dict(yaml.safe_load(printed[: printed.index("resource plan")]))
    assert resolved == GVPOConfig.from_file(JOBS / name, here)

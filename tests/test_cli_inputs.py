"""Inputs of the commands: every bad one is one line that names it, before anything starts or is written."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny import make_group, table

from gvpo_ray import groups
from gvpo_ray.cli import main
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.run.run_dir import open_run_dir

pytestmark = pytest.mark.usefixtures("quiet")


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
        (
            _nothing,
            ["verifiers.rewards={rm: {model: /on/the/workers/alone}}"],
            "verifiers.rewards.rm.model: no folder /on/the/workers/alone here: like model.path it has to be",
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


def test_a_missing_model_says_how_to_make_it_where_the_config_can(refused: Callable[..., str]) -> None:
    message = refused(
        "rollout",
        "config.yaml",
        "--out",
        "out.arrow",
        "model.path=./nowhere",
        "warm_start.data.path=train.jsonl",
    )
    assert message == "model.path: no folder nowhere; make it with: gvpo-ray warm-start CONFIG"


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
            "--groups: row 1 (group 1): rewards has 1 entries",
        ),
        (
            _save("g.arrow", *(make_group(i, trained_tokens=[None, [True], None]) for i in range(2))),
            "g.arrow",
            "--groups: row 0 (group 0): trained_tokens[1] has 1 entries, completion_ids[1] has 6",
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

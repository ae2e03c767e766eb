"""`gvpo-ray check`: what it shows, and that it refuses what `train` would refuse here."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gvpo_ray.cli import main
from gvpo_ray.config.plan import check_resources
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.run.models import check_class
from gvpo_ray.run.run_dir import open_run_dir

JOBS = Path(__file__).parent.parent / "jobs"
pytestmark = pytest.mark.usefixtures("quiet")


def _config(folder: Path, *overrides: str) -> GVPOConfig:
    return GVPOConfig.from_file(folder / "config.yaml", list(overrides)).absolute()


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


def test_completions_that_join_the_runs_prompts_need_no_columns_and_whole_groups_do(
    folder: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "levels.jsonl").write_text('{"prompt": "0+0?", "answer": "0", "level": 1}\n')
    (folder / "worked.jsonl").write_text('{"prompt": "0+0?", "answer": "0", "completion": "0"}\n' * 2)
    (folder / "own.py").write_text("def reward(completions, level): return [1.0 for _ in completions]\n")
    given = ("config.yaml", "prompts.path=levels.jsonl", "verifiers.rewards={own.py:reward: 1}")
    source = "sources={worked: {path: worked.jsonl, template: '{prompt}', %s: 0.5}}"
    assert main(["check", *given, source % "share"]) == 0
    assert "it needs the argument 'level', and sources.worked has" in refused(
        "check", *given, source % "group_share"
    )


def test_check_shows_the_first_prompt_with_its_special_tokens(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}<eos>a")
    (folder / "train.jsonl").write_text('{"prompt": "0+0?", "answer": "0"}\n')
    chat = "prompts={path: train.jsonl}"
    assert main(["check", "config.yaml", chat]) == 0
    assert "\nthe first prompt, 6 tokens, answer '0':\n  | 0+0?<eos>a\n" in capsys.readouterr().out
    (folder / "worked.jsonl").write_text(
        '{"prompt": "0+0?", "answer": "0", "completion": "0", "reward": 1}\n' * 2
    )
    source = "sources={worked: {path: worked.jsonl, group_share: 0.5, template: '{prompt}<eos>='}}"
    assert main(["check", "config.yaml", chat, source]) == 0
    printed = capsys.readouterr().out
    assert "\nthe first prompt, 6 tokens, answer '0':\n  | 0+0?<eos>a\n" in printed
    assert "\nsources.worked: the first prompt, 6 tokens, answer '0':\n  | 0+0?<eos>=\n" in printed
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


def test_check_refuses_the_directory_of_another_run_although_the_model_is_on_the_hub(
    folder: Path, refused: Callable[..., str]
) -> None:
    hub = "model.path=somebody/model"
    with open_run_dir(_config(folder, hub)):
        pass
    assert "seed: run holds a run with other values of it" in refused("check", "config.yaml", hub, "seed=1")


def test_check_asks_a_model_that_is_here_although_the_data_are_on_the_hub(
    folder: Path, refused: Callable[..., str]
) -> None:
    on_hub = "prompts.path=somebody/data"
    assert "router_aux_loss: " in refused("check", "config.yaml", on_hub, "model.router_aux_loss=true")
    learner = "learner={backend: native, num_mini_batches: 1, num_workers: 3, tensor_parallel_size: 3}"
    assert "3 workers cannot share out the num_attention_heads" in refused(
        "check", "config.yaml", on_hub, learner
    )


def test_check_refuses_a_model_that_train_refuses(folder: Path, refused: Callable[..., str]) -> None:
    file = folder / "model" / "generation_config.json"
    file.write_text('{"do_sample": false, "temperature": 0.7}')
    for verb in ("check", "train"):
        assert "generation_config.json: temperature: no checkpoint" in refused(verb, "config.yaml")


def test_a_model_with_images_is_refused_where_vllm_cannot_load_it(
    folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Gemma3Config, Qwen3_5TextConfig

    Gemma3Config(text_config={"hidden_size": 32, "num_hidden_layers": 2}).save_pretrained(folder / "model")
    is_there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchvision" else is_there(name)
    )
    held = "evaluation.sets={held: {path: train.jsonl, template: '{prompt}'}}"
    for verb, *overrides in (["train"], ["check"], ["evaluate", held]):
        assert (
            "model is of a family with images (gemma3), which vLLM loads only with the package torchvision"
            in (refused(verb, "config.yaml", *overrides))
        )
    Qwen3_5TextConfig(hidden_size=32, num_hidden_layers=2).save_pretrained(folder / "model")
    assert "is of a family with images (qwen3_5_text), which" in refused("train", "config.yaml")
    check_class(_config(folder, "engines.pools={theirs: {url: 'http://127.0.0.1:1/v1'}}"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_class(_config(folder))


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
    (of_hub,) = [line for line in printed.splitlines() if "of the Hugging Face hub" in line]
    assert of_hub.startswith("model.path (Qwen/Qwen2.5-Math") and "prompts.path (" in of_hub
    assert of_hub.endswith(
        "): of the Hugging Face hub, which `check` does not ask: the data are not read and the columns not "
        "checked; give downloaded folders for that"
    )
    config = GVPOConfig.from_file(JOBS / name)
    check_resources(config, num_cpus=32, num_gpus=8 if "8gpu" in name else 1)


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

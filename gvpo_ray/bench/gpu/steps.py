"""This section checks that training steps on the device equal those on the CPU, with torch's backends."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gvpo_ray.bench.gpu.models import Shape, make_folder, make_rows
from gvpo_ray.bench.gpu.report import Box, Report, now
from gvpo_ray.config.learner import CheckpointConfig, LearnerConfig
from gvpo_ray.config.loss import GvpoLoss
from gvpo_ray.config.model import LoraConfig, ModelConfig
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import Settings, train_step

SHAPE = Shape("qwen2", 4, 2, 64, 2, 512, vocab=2048)
NUM_STEPS = 3


def settings(folder: str | Path, **learner: Any) -> Settings:
    """Return settings of a learner in one process with GVPO's defaults; `learner`: keys of its config."""
    options = {
        "backend": "ddp",
        "learning_rate": 1e-5,
        "num_mini_batches": 1,
        "micro_batch_tokens": 2048,
        **learner,
    }
    return Settings(
        str(folder),
        10**9,
        10**9,
        GvpoLoss(),
        LearnerConfig(**options),
        CheckpointConfig(),
        str(folder),
        parity_every=0,
    )


def of_version(rows: list[dict[str, Any]], version: int) -> list[dict[str, Any]]:
    """Return the groups as if the policy of `version` had sampled them."""
    return [
        {
            **row,
            "version_min": [version] * len(row["rewards"]),
            "version_max": [version] * len(row["rewards"]),
        }
        for row in rows
    ]


def run(report: Report, device: torch.device, toy: bool, box: Box) -> None:
    """Compare three steps with each choice of options on the device with three float32 steps on the CPU.

    A checkpoint must also resume to the same weights, and a LoRA adapter train as on the CPU (if peft is
    installed).
    """
    with tempfile.TemporaryDirectory(prefix="gvpo_gpu_") as name:
        folder = make_folder(Path(name) / "model", SHAPE.config())
        torch.manual_seed(0)
        make: Any = AutoModelForCausalLM.from_config  # without types
        make(SHAPE.config(), dtype=torch.float32).save_pretrained(folder)
        rows = make_rows([(60, [40, 90, 17, 128]), (33, [200, 64]), (100, [150, 151, 30])], SHAPE.vocab)
        want = _steps(folder, rows, torch.device("cpu"), "float32")
        ways: dict[str, dict[str, Any]] = {
            "ddp, float32": {},
            "ddp, bf16": {"dtype": "bfloat16"},
            "ddp, float32, checkpointed": {"gradient_checkpointing": True},
            "ddp, float32, groups in parts": {"micro_batch_tokens": 200},
            "ddp, float32, padded": {"packing": False},
            "fsdp, float32": {"backend": "fsdp"},
            "fsdp, bf16": {"backend": "fsdp", "dtype": "bfloat16"},
            "fsdp, bf16, checkpointed": {
                "backend": "fsdp",
                "dtype": "bfloat16",
                "gradient_checkpointing": True,
            },
        }
        for way, options in ways.items():
            if not box.has(5):
                report.add("train_step", way, skipped="no time left")
                continue
            with report.attempt("train_step", way):
                torch._dynamo.reset()
                begin = now(device)
                got = _steps(folder, rows, device, options.pop("dtype", "float32"), **options)
                bound = 1e-4 if "float32" in way else 2e-2
                loss, norm = (_relative(got[key], want[key]) for key in ("loss", "grad_norm"))
                weights = max(
                    float((a - b).abs().max()) for a, b in zip(got["weights"], want["weights"], strict=True)
                )
                report.add(
                    "train_step",
                    way,
                    loss_error=loss,
                    grad_norm_error=norm,
                    weights_differ=weights,
                    packs=got["packs"],
                    flex=got["flex"],
                    seconds=now(device) - begin,
                    rule="train_step",
                    ok=loss < bound and norm < bound,
                )
        with report.attempt("train_step", "saved and resumed"):
            _resume(report, folder, rows, device, Path(name) / "checkpoint")
        if importlib.util.find_spec("peft"):
            with report.attempt("train_step", "lora"):
                lora = LoraConfig(rank=8, alpha=16)
                cpu = _steps(folder, rows, torch.device("cpu"), "float32", lora=lora)
                got = _steps(folder, rows, device, "float32", lora=lora)
                error = _relative(got["grad_norm"], cpu["grad_norm"])
                report.add("train_step", "lora", grad_norm_error=error, rule="train_step", ok=error < 1e-4)


def _steps(
    folder: Path, rows: Any, device: torch.device, dtype: Any, lora: LoraConfig | None = None, **learner: Any
) -> dict[str, Any]:
    given = settings(folder, **learner)
    policy = Policy(ModelConfig(path=str(folder), dtype=dtype, lora=lora), given.learner, folder, device)
    result: dict[str, Any] = {
        "loss": [],
        "grad_norm": [],
        "packs": policy.packs,
        "flex": getattr(policy, "_flex", False),
    }
    for step in range(NUM_STEPS):
        metrics = train_step(policy, of_version(rows, step), given)
        result["loss"].append(metrics["loss"])
        result["grad_norm"].append(metrics["grad_norm"])
    result["weights"] = [tensor.detach().float().cpu() for _, tensor in policy.named_tensors()]
    return result


def _resume(report: Report, folder: Path, rows: Any, device: torch.device, checkpoint: Path) -> None:
    """Check that a policy resumed from a checkpoint trains to the same weights as the one that wrote it."""
    given = settings(folder)
    model = ModelConfig(path=str(folder))
    policy = Policy(model, given.learner, folder, device)
    train_step(policy, of_version(rows, 0), given)
    policy.save(checkpoint)
    train_step(policy, of_version(rows, 1), given)
    other = Policy(model, given.learner, checkpoint, device)
    train_step(other, of_version(rows, 1), given)
    pairs = zip(policy.named_tensors(), other.named_tensors(), strict=True)
    difference = max(float((a - b).abs().max()) for (_, a), (_, b) in pairs)
    report.add(
        "train_step", "saved and resumed", weights_differ=difference, rule="train_step", ok=difference < 1e-6
    )


def _relative(got: list[float], want: list[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(got, want, strict=True))

"""What the tests of the whole ring share: a config, commands, and what they leave behind."""

from __future__ import annotations

import random
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from gvpo_ray import GVPOConfig
from gvpo_ray.bench import chaos
from gvpo_ray.files import lock
from gvpo_ray.learner.warm_start import warm_start

NUM_STEPS, GROUPS_PER_STEP = 40, 16


def make(folder: Path, shared: Path) -> Path:
    """Write a run's config, data and model to a folder, and return the YAML file.

    The data are numbers of which to say the tens. The model has learned to do so and is often wrong; it is
    trained once, in a folder that all who make a run share.
    """
    made = shared / "ring"
    with lock(shared / "ring.lock", wait_s=None):
        if not (made / "model").exists():
            made.mkdir(exist_ok=True)
            write_data(made)
            warm_start(GVPOConfig.from_file(write_config(made)))
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return write_config(folder)


def write_data(folder: Path) -> None:
    rng = random.Random(0)
    worked = [(rng.randrange(10, 100), rng.random() < 0.5) for _ in range(6400)]
    write(folder / "train.parquet", [{"prompt": f"{a}=", "answer": str(a // 10)} for a in range(10, 100)])
    write(folder / "test.parquet", [{"prompt": f"{a}=", "answer": str(a // 10)} for a in range(10, 100, 5)])
    solutions = [rf"\boxed{{{a // 10 if is_right else rng.randrange(1, 10)}}}" for a, is_right in worked]
    rows = [
        {"prompt": f"{a}=", "answer": str(a // 10), "solution": text}
        for (a, _), text in zip(worked, solutions, strict=True)
    ]
    write(folder / "worked.parquet", rows)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def make_mixture(dense: Path, folder: Path) -> Path:
    """Make a mixture of experts of the ring's model: each expert is its MLP with some noise, and two of four
    are chosen for a token. It writes what the model has learned, and routers decide what is rounded how.
    """
    shutil.copytree(dense, folder)
    model = AutoModelForCausalLM.from_pretrained(dense)
    config = model.config.to_dict()
    sizes = {name: config[name] for name in Qwen2MoeConfig().to_dict() if name in config}
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        sizes.pop(name, None)
    size, num = config["intermediate_size"], 4
    sizes |= {"moe_intermediate_size": size, "shared_expert_intermediate_size": 32, "num_experts": num}
    made = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**sizes, num_experts_per_tok=2, norm_topk_prob=True, qkv_bias=True)
    )
    made.load_state_dict(model.state_dict(), strict=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for theirs, layer in zip(model.model.layers, made.model.layers, strict=True):
            mlp, experts = theirs.mlp, layer.mlp.experts
            both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            for values, of_expert in (
                (experts.gate_up_proj, both),
                (experts.down_proj, mlp.down_proj.weight),
            ):
                values.copy_(of_expert + 0.3 * of_expert.std() * torch.randn(num, *of_expert.shape))
            layer.mlp.gate.weight.normal_()
            layer.mlp.shared_expert.down_proj.weight.zero_()
    made.save_pretrained(folder)
    return folder


def write_config(folder: Path) -> Path:
    prompts = {"path": str(folder / "train.parquet"), "template": "{prompt}"}
    config = {
        "run_dir": str(folder / "run"),
        "num_steps": NUM_STEPS,
        "groups_per_step": GROUPS_PER_STEP,
        "max_staleness": 1,
        "model": {"path": str(folder / "model")},
        "prompts": prompts,
        "sampling": {"num_completions": 8, "max_tokens": 12},
        "engines": {"num_threads": 1, "parity_every": 4},
        "learner": {"num_workers": 2, "zero_stage": 1, "learning_rate": 2.0e-3, "num_mini_batches": 2},
        "evaluation": {
            "every": NUM_STEPS // 2,
            "sets": {"test": {**prompts, "path": str(folder / "test.parquet")}},
        },
        "checkpoint": {"every": 4},
        "warm_start": {
            "data": {**prompts, "path": str(folder / "worked.parquet")},
            "vocab_size": 300,
            # Tied embeddings: the case in which the naive way of updating vLLM's weights is silently wrong.
            "architecture": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 64,
                "tie_word_embeddings": True,
            },
            "num_epochs": 3,
            "learning_rate": 4.0e-3,
        },
    }
    file = folder / "ring.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


class Command:
    """`gvpo-ray …` in a process of its own; everything it starts carries its mark."""

    def __init__(self, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        self._lines: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GVPO_TEST_MARK", self.mark)
            self._command = chaos.Command(arguments, self._lines.append)
        self.process = self._command.process

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def wait(self) -> int:
        return self._command.wait()

    def wait_for_steps(self, number: int) -> None:
        """Until so many steps are trained, or it ends."""
        while self.process.poll() is None and sum(line.startswith("step ") for line in self._lines) < number:
            time.sleep(0.05)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.wait()

    def left_behind(self) -> list[str]:
        return left_behind(self.mark)


def left_behind(mark: str) -> list[str]:
    """What carries the mark and has not ended, after a while for those that notice by themselves."""
    for _ in range(240):
        left = []
        for process in psutil.process_iter():
            try:
                if (
                    process.environ().get("GVPO_TEST_MARK") == mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    left.append(" ".join(process.cmdline())[:100])
            except psutil.Error:
                continue
        if not left:
            return []
        time.sleep(0.5)
    return left


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)

"""The memory plan: the parameters of a model, what a step of the learner allocates, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM

from gvpo_ray.bench.gpu.models import Shape, make_folder, make_rows
from gvpo_ray.bench.gpu.steps import settings
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.memory import (
    KNOWN,
    check_memory,
    engine_bytes,
    host_bytes,
    learner_bytes,
    memory_plan,
    shape_of,
    total,
)
from gvpo_ray.config.model import LoraConfig, ModelConfig
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.learner.adapter import add_adapter
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import train_step

JOBS = Path(__file__).parent.parent / "jobs"

N, HEAD = (getattr(KNOWN["Qwen/Qwen2.5-Math-1.5B"], what) for what in ("parameters", "of_the_head"))


def config_of(path: str, **sections: Any) -> GVPOConfig:
    return GVPOConfig.from_dict(
        {
            "run_dir": "r",
            "num_steps": 1,
            "groups_per_step": 4,
            "prompts": {"path": "p"},
            "model": {"path": path, **sections.pop("model", {})},
            **sections,
        }
    )


def made(folder: Path, shape: Shape) -> Path:
    make_folder(folder, shape.config())
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape.config()).save_pretrained(folder)
    return folder


def mixture(folder: Path, family: str, **sizes: Any) -> Path:
    """A mixture of experts with the tokenizer of other models here."""
    make_folder(folder, Shape("qwen2", 4, 2, 32, 1, 64, vocab=512).config())
    torch.manual_seed(0)
    given = {
        **{"vocab_size": 512, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 32, "num_hidden_layers": 2, "num_experts_per_tok": 2, "bos_token_id": None},
        **{"eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 2048},
        **sizes,
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given)).save_pretrained(folder)
    return folder


QWEN3_MOE = {"num_experts": 8, "intermediate_size": 64, "moe_intermediate_size": 192}
MIXTRAL = {"num_local_experts": 4, "intermediate_size": 320}


@pytest.mark.parametrize(("family", "sizes"), [("qwen3_moe", QWEN3_MOE), ("mixtral", MIXTRAL)])
def test_so_are_those_of_a_mixture_of_experts(tmp_path: Path, family: str, sizes: dict[str, int]) -> None:
    folder = mixture(tmp_path, family, **sizes)
    shape = shape_of(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert shape is not None and shape.parameters == sum(p.numel() for p in model.parameters())
    add_adapter(model, LoraConfig(rank=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    assert shape.of_an_adapter(4) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = json.loads((folder / "config.json").read_text())
    for change in ({"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}):  # layers of two kinds
        (folder / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
        assert shape_of(str(folder)) is None


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_parameters_are_counted_from_the_config_alone(tmp_path: Path, kind: str, tied: bool) -> None:
    folder = made(tmp_path, Shape(kind, 4, 2, 32, 3, 352, vocab=512, tied=tied))
    shape = shape_of(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert shape is not None and shape.parameters == sum(p.numel() for p in model.parameters())


def test_the_known_models_have_the_parameters_that_their_cards_say() -> None:
    numbers = {name: shape.parameters for name, shape in KNOWN.items()}
    assert numbers["Qwen/Qwen2.5-Math-1.5B"] == 1_543_714_304
    assert numbers["Qwen/Qwen2.5-Math-7B"] == 7_615_616_512
    assert numbers["Qwen/Qwen2.5-32B"] == 32_763_876_352
    assert numbers["Qwen/Qwen3-30B-A3B"] == 30_532_122_624


def test_a_model_of_experts_or_of_another_kind_has_no_plan(tmp_path: Path) -> None:
    given = json.loads(
        (made(tmp_path, Shape("qwen2", 4, 2, 32, 1, 64, vocab=64)) / "config.json").read_text()
    )
    for change in ({"num_experts": 8}, {"hidden_size": None}):
        (tmp_path / "config.json").write_text(json.dumps({**given, **change}), encoding="utf-8")
        assert shape_of(str(tmp_path)) is None
        ((line, wrong),) = memory_plan(config_of(str(tmp_path), learner={"num_gpus": 1}))
        assert "no memory plan" in line and wrong is None
    assert shape_of("somebody/some-model") is None


SMALL = Shape("qwen2", 4, 2, 32, 2, 384, vocab=512)
MEASURED = {
    "activations kept": (SMALL, False, [(64, [64] * 8)]),
    "activations recomputed, untied": (
        Shape("qwen2", 4, 2, 32, 3, 384, vocab=1024, tied=False),
        True,
        [(64, [64] * 8)],
    ),
    "a head of two chunks": (Shape("qwen2", 2, 2, 64, 1, 352, vocab=16_384), True, [(32, [32] * 12)]),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_plan_is_within_a_fifth_of_what_torch_allocates_in_a_step(tmp_path: Path, name: str) -> None:
    """Every tensor is counted when it is made and freed, whatever else this machine does."""
    shape, recomputed, lengths = MEASURED[name]
    check_plan(made(tmp_path, shape), shape.vocab, recomputed, lengths)


@pytest.mark.parametrize("recomputed", [False, True])
def test_so_it_is_of_a_mixture_of_experts(tmp_path: Path, recomputed: bool) -> None:
    check_plan(mixture(tmp_path, "qwen3_moe", **QWEN3_MOE), 512, recomputed, [(64, [64] * 8)])


def check_plan(folder: Path, vocab: int, recomputed: bool, lengths: list[tuple[int, list[int]]]) -> None:
    tokens = sum(prompt + sum(sizes) for prompt, sizes in lengths)
    given = settings(folder, micro_batch_tokens=tokens, gradient_checkpointing=recomputed)
    policy, rows = (
        Policy(ModelConfig(path=str(folder)), given.learner, folder),
        make_rows(lengths, vocab),
    )
    train_step(policy, rows, given)  # makes the optimizer's state
    policy.backward(policy.logprobs(rows).sum() * 0, False)  # as if it were not the update's first pass
    tracker = MemTracker()
    tracker.track_external(policy._module, policy._backend._optimizer)  # type: ignore[attr-defined]
    with tracker:
        train_step(policy, rows, given)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    measured = {str(kind).rpartition(".")[2]: size for kind, size in peak.items()}
    learner = {
        "backend": "ddp",
        "micro_batch_tokens": tokens,
        "gradient_checkpointing": recomputed,
        "num_mini_batches": 1,
    }
    plan = learner_bytes(config_of(str(folder), learner=learner), shape_of(str(folder)), on_gpu=False)
    assert plan["parameters"] == pytest.approx(measured["PARAM"], rel=0.01)
    assert plan["gradients"] == pytest.approx(measured["GRAD"], rel=0.01)
    assert plan["optimizer"] == pytest.approx(measured["OPT"], rel=0.01)
    assert total(plan) == pytest.approx(measured["Total"], rel=0.2)


def test_what_each_backend_shards_is_divided_by_the_ranks() -> None:
    path = "Qwen/Qwen2.5-Math-7B"
    number = KNOWN[path].parameters

    def plan(**learner: Any) -> dict[str, float]:
        given = config_of(path, model={"dtype": "bfloat16"}, learner={"num_gpus": 1, **learner})
        return learner_bytes(given, KNOWN[path], on_gpu=True)

    for backend, stage, want in [
        ("ddp", 0, (4, 8, 8)),  # the gradients a second time, in the buckets that are reduced
        ("fsdp", 0, (1, 1, 2)),
        ("deepspeed", 1, (2, 1, 3)),  # which runs as stage 2
        ("deepspeed", 2, (2, 1, 3)),
        ("deepspeed", 3, (0.5, 1, 3)),
    ]:
        parts = plan(backend=backend, zero_stage=stage, num_workers=4)
        got = tuple(parts[name] / number for name in ("parameters", "gradients", "optimizer"))
        assert got == pytest.approx(want), (backend, stage)
    offloaded = plan(backend="deepspeed", zero_stage=3, num_workers=4, offload="optimizer")
    assert offloaded["optimizer"] == 0 and offloaded["parameters"] == number / 2


@pytest.mark.parametrize(
    "name",
    [
        "qwen2.5_math_1.5b_1gpu",
        "qwen2.5_math_7b_8gpu",
        "qwen2.5_math_7b_kuberay",
        "qwen2.5_32b_2nodes",
        "qwen3_30b_a3b_2nodes",
        "qwen3_30b_a3b_kuberay",
    ],
)
def test_the_gpu_jobs_fit_80_gb_and_their_comments_have_the_plans_number(name: str) -> None:
    config = GVPOConfig.from_file(JOBS / f"{name}.yaml")
    check_memory(config, here=80.0)
    *_, (line, _) = memory_plan(config, 80.0)
    found = re.match(r"memory of a learner worker, GB: ([\d.]+) ", line)
    assert found and f"(plan) {float(found[1]):.0f} GB" in (JOBS / f"{name}.yaml").read_text(encoding="utf-8")


def test_what_cannot_fit_is_refused_in_one_line_that_says_what_to_change() -> None:
    path = "Qwen/Qwen2.5-32B"
    fits = {"num_gpus": 1, "num_workers": 16, "zero_stage": 3, "accelerator_type": "H100"}
    half, engine = (
        {"dtype": "bfloat16"},
        {"num_gpus": 4, "tensor_parallel_size": 4, "accelerator_type": "H100"},
    )
    check_memory(config_of(path, model=half, learner=fits, engines=engine))
    for learner, says in [
        ({**fits, "num_workers": 4}, "learner: "),
        ({**fits, "zero_stage": 0}, "learner: "),
        ({**fits, "micro_batch_tokens": 65_536}, "learner.micro_batch_tokens"),
    ]:
        with pytest.raises(ConfigError, match=says) as error:
            check_memory(config_of(path, model=half, learner=learner, engines=engine))
        assert "\n" not in str(error.value) and "80 GB" in str(error.value)
    small = {"num_gpus": 1, "accelerator_type": "L4"}
    with pytest.raises(ConfigError, match=r"engines of engines: .*of 24 GB.*raise tensor_parallel_size"):
        check_memory(config_of(path, model=half, learner=fits, engines=small))
    # nobody knows how large the GPUs are: nothing is refused
    unknown = {key: value for key, value in fits.items() if key != "accelerator_type"}
    check_memory(config_of(path, model=half, learner={**unknown, "num_workers": 1}, engines={"num_gpus": 1}))
    # an engine and the learner on one GPU are added up
    shared = {"num_gpus": 0.5, "accelerator_type": "H100", "memory_fraction": 0.8}
    one = {"num_gpus": 0.5, "zero_stage": 1, "accelerator_type": "H100"}
    with pytest.raises(ConfigError, match="beside 64 GB of the engine"):
        check_memory(config_of("Qwen/Qwen2.5-Math-1.5B", model=half, learner=one, engines=shared))


def test_an_engines_weights_and_keys_are_shared_by_its_gpus() -> None:
    shape = KNOWN["Qwen/Qwen2.5-Math-7B"]
    config = config_of("Qwen/Qwen2.5-Math-7B", model={"dtype": "bfloat16"}, engines={"num_gpus": 1})
    (pool,) = config.engines.all_pools().values()
    one = engine_bytes(config, pool, shape)
    assert one == {"weights": 2 * shape.parameters, "of a token": 2 * 2 * 28 * 4 * 128}
    four = engine_bytes(config, pool.model_copy(update={"tensor_parallel_size": 4, "num_gpus": 4}), shape)
    assert four == {name: value / 4 for name, value in one.items()}
    fp8 = engine_bytes(config, pool.model_copy(update={"quantization": "fp8"}), shape)
    assert 0.5 < fp8["weights"] / one["weights"] < 0.6


def test_engines_and_a_learner_that_take_turns_on_a_gpu_are_not_added_up_but_what_the_learner_keeps_is() -> (
    None
):
    half, learner = {"dtype": "bfloat16"}, {"num_gpus": 0.5, "zero_stage": 1, "accelerator_type": "H100"}
    engines = {"num_gpus": 0.5, "accelerator_type": "H100", "colocated": "sleep"}

    def check(fraction: float) -> None:
        given = {**engines, "memory_fraction": fraction}
        check_memory(config_of("Qwen/Qwen2.5-Math-1.5B", model=half, learner=learner, engines=given))

    check(0.6)  # 48 GB, and the learner keeps 29 of its 36, a weight that a checkpoint gathers included
    with pytest.raises(ConfigError, match=r"learner: it keeps 29 GB per GPU .* 64 of 80 GB: lower"):
        check(0.8)


@pytest.mark.parametrize(
    "sections, sent, of_a_checkpoint, of_others",
    [
        # a copy to compare with, and where the next step trains meanwhile one to send from; tied weights are
        # sent twice
        ({}, 2 * (N + HEAD), 12 * N + 2 * N, 12 * N),
        ({"max_staleness": 1}, 2 * 2 * (N + HEAD), 12 * N + 2 * N, 12 * N),
        ({"model": {"dtype": "float32"}}, 4 * (N + HEAD), 12 * N + 4 * N, 12 * N),
        ({"learner": {"num_workers": 8}}, 2 * (N + HEAD), 12 * N / 8 + 2 * N, 12 * N / 8),
        ({"loss": {"reference": "every: 3"}}, 2 * (N + HEAD), 12 * N + 2 * N + 4 * N, 12 * N),
    ],
)
def test_the_copies_of_a_learner_in_its_hosts_memory_are_counted(
    sections: dict[str, Any], sent: float, of_a_checkpoint: float, of_others: float
) -> None:
    """Of a model of 1.5 B parameters, whose head is the embedding."""
    given = {"model": {"dtype": "bfloat16"}, **sections}
    config = config_of("Qwen/Qwen2.5-Math-1.5B", **given)
    first, other = (host_bytes(config, KNOWN["Qwen/Qwen2.5-Math-1.5B"], rank) for rank in (0, 1))
    assert first["weights to send"] == sent
    assert sum(first.values()) - sent == of_a_checkpoint
    assert sum(other.values()) == of_others


def test_the_plan_says_what_rank_0_and_the_others_need_of_the_host() -> None:
    learner = {"num_gpus": 1, "num_workers": 2}
    config = config_of("Qwen/Qwen2.5-Math-1.5B", model={"dtype": "bfloat16"}, learner=learner)
    lines = [line for line, _ in memory_plan(config)]
    assert (
        "copies in the host's memory of learner worker 0, GB: 15.9 (weights to send 3.6, training state 9.3, "
        "model of a checkpoint 3.1); of each other worker: 9.3"
    ) in lines

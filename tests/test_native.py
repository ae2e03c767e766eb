"""Layers and sequences that are split over workers: tensor parallel by transformers, context parallel by
ourselves. What a step does is what one rank does, and each rank holds the less.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import learners
import pytest
import test_backends
import test_spread
import torch
import torch.distributed as dist
import transformers
from learners import settings
from tiny import make_model
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.distributed.tensor_parallel import ReplicatedWithGradAllReduce

from gvpo_ray.bench import traffic
from gvpo_ray.bench.learner import make_model as make_bench_model
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.memory import learner_bytes, shape_of
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.learner.backends import native
from gvpo_ray.learner.backends.native import SummedGradients
from gvpo_ray.learner.head import linear_logprobs
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.sizes import SPLIT_MIXTURES, check_sizes
from gvpo_ray.learner.step import train_step

TENSOR = {"backend": "native", "tensor_parallel_size": 2}
CONTEXT = {"context_parallel_size": 2}


def two_steps_of_qwen3(folder: Path, **learner: Any) -> dict[str, torch.Tensor]:
    """A model with norms of queries and keys, which see some heads, in updates of several passes."""
    path = folder / "model"
    if not dist.is_initialized() or dist.get_rank() == 0:
        make_model(path)
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=46,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
        Qwen3ForCausalLM(config).save_pretrained(path)
    if dist.is_initialized():
        dist.barrier()
    given = settings(folder, num_steps=2, micro_batch_tokens=30, **learner)
    policy = learners.load(path, given)
    for step in (1, 2):
        train_step(policy, learners.mixed_batch(step), given)
    return learners.weights(policy)


def resumed(folder: Path, kind: str = "qwen2", **learner: Any) -> dict[str, Any]:
    """Two steps in a row, and the second of them by a policy that is read from a checkpoint of the first."""
    path = learners.shared_model(folder, kind)
    given = settings(folder, reference="every: 2", num_steps=2, **learner)
    policy = learners.load(path, given)
    train_step(policy, learners.mixed_batch(1), given)
    checkpoint = folder / "step-1"
    policy.save(checkpoint)
    other = learners.load(checkpoint, given)
    for one in (policy, other):
        train_step(one, learners.mixed_batch(2), given)
    return {
        "same": learners.same(learners.weights(policy), learners.weights(other)),
        "weights": learners.weights(other),
        "checkpoint": checkpoint,
    }


def large_mixture(folder: Path) -> Path:
    """A mixture that is large beside the masks of a pass."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        make_model(folder)  # for its tokenizer
        torch.manual_seed(0)
        config = transformers.Qwen3MoeConfig(
            vocab_size=46,
            hidden_size=64,
            moe_intermediate_size=96,
            num_experts=8,
            num_experts_per_tok=4,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=4096,
        )
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    if dist.is_initialized():
        dist.barrier()
    return folder


def held_of_a_mixture(folder: Path, **learner: Any) -> dict[str, int]:
    """As `held`, of a model with experts."""
    path, given = large_mixture(folder / "model"), settings(folder, **learner).learner
    prompt, completion = [2 + i % 20 for i in range(200)], [3 + i % 20 for i in range(350)]
    row = {"group_id": 1, "prompt_ids": prompt, "completion_ids": [completion] * 8}
    return held_by(Policy(ModelConfig(path=str(path)), given, path), row)


def held(folder: Path, **learner: Any) -> dict[str, int]:
    """Numbers of parameters that this rank has, and bytes that a pass keeps for its backward pass."""
    path = test_backends.large_model(folder / "model", False)
    given = settings(folder, micro_batch_tokens=10_000, **learner)
    policy = Policy(ModelConfig(path=str(path)), given.learner, path)
    return held_by(policy, test_backends.group(1, [200] * 8))


def held_by(policy: Policy, row: Any) -> dict[str, int]:
    parameters = {id(p): p.data for p in policy._module.parameters()}.values()
    parts = [part.to_local() if isinstance(part, DTensor) else part for part in parameters]
    own = {part.untyped_storage().data_ptr() for part in parts}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = policy.logprobs([row])
    policy.backward(logprobs.sum(), True)
    return {"parameters": sum(part.numel() for part in parts), "kept": sum(kept.values())}


def steps(**options: Any) -> Any:
    return functools.partial(test_spread.three_steps, **options)


def split_head(folder: Path) -> list[float]:
    """How far log-probs and gradients of a head with bias, scale and cap are from those of the whole one,
    for seven targets and for none.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    found = []
    for number in (7, 0):
        generator = torch.Generator().manual_seed(number)
        weight, bias, hidden, towards = (
            torch.randn(size, generator=generator, dtype=torch.float64)
            for size in ((4 * world, 5), (4 * world,), (number, 5), (number,))
        )
        targets = torch.randint(0, 4 * world, (number,), generator=generator)
        own = slice(4 * rank, 4 * (rank + 1))
        results = []
        for part, group in ((slice(None), None), (own, dist.group.WORLD)):
            leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight[part], bias[part])]
            logprobs = linear_logprobs(leaves[0], leaves[1], targets, leaves[2], 1.5, 2.0, group)
            logprobs.backward(towards)
            results.append([logprobs.detach(), *(leaf.grad for leaf in leaves)])
        (logprobs, *whole), split = results
        whole = [logprobs, whole[0], whole[1][own], whole[2][own]]
        found += [float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(whole, split, strict=True)]
    return found


LENGTHS = [(16, [16] * 4)] * 8
"""Tokens of prompts and completions of a step's groups, of which traffic.measure makes four passes."""


def sent(folder: Path, **layout: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Messages and bytes of this rank in a step, by kind."""
    path = folder / "model"
    if dist.get_rank() == 0:
        make_bench_model(path, traffic.SHAPE)
    dist.barrier()
    found = traffic.measure(str(path), {"num_workers": dist.get_world_size(), **layout}, LENGTHS)
    return dict(found.messages), dict(found.sent)


CASES_ON_2 = {
    "sent by ddp": functools.partial(sent),
    "sent by fsdp": functools.partial(sent, backend="fsdp"),
    "sent with context": functools.partial(sent, **CONTEXT),
    "sent with tensor": functools.partial(sent, **TENSOR),
    "a split head": split_head,
    "tensor 2": steps(**TENSOR, micro_batch_tokens=40),
    "tensor 2, padded": steps(**TENSOR, micro_batch_tokens=100, packing=False),
    "tensor 2, recomputed": steps(**TENSOR, micro_batch_tokens=200, gradient_checkpointing=True),
    "tensor 2, every: 2": steps(**TENSOR, micro_batch_tokens=70, reference="every: 2"),
    "tensor 2, qwen3_moe": steps(**TENSOR, **test_spread.MIXTURE, micro_batch_tokens=40),
    "tensor 2, qwen3_moe, padded, recomputed": steps(
        **TENSOR,
        **test_spread.MIXTURE,
        micro_batch_tokens=100,
        packing=False,
        gradient_checkpointing=True,
    ),
    "tensor 2, mixtral": steps(**TENSOR, mixture="mixtral", aux=True, micro_batch_tokens=40),
    "context 2, qwen3_moe": steps(**CONTEXT, **test_spread.MIXTURE, micro_batch_tokens=40),
    "data 2": steps(backend="native", micro_batch_tokens=70),
    "context 2, ddp": steps(**CONTEXT, micro_batch_tokens=40),
    "context 2, fsdp, recomputed": steps(
        **CONTEXT, backend="fsdp", micro_batch_tokens=200, gradient_checkpointing=True
    ),
    "context 2, native": steps(**CONTEXT, backend="native", micro_batch_tokens=70),
    "context 2, zero 3": steps(
        **CONTEXT, backend="deepspeed", zero_stage=3, dtype="float32", micro_batch_tokens=40
    ),
    "a large head": functools.partial(
        test_backends.two_steps, backend="native", zero_stage=0, tie=False, tensor_parallel_size=2
    ),
    "a large tied head": functools.partial(
        test_backends.two_steps, backend="native", zero_stage=0, tie=True, tensor_parallel_size=2
    ),
    "small gradients": functools.partial(
        test_backends.small_gradients, backend="native", zero_stage=0, tensor_parallel_size=2
    ),
    "qwen3": functools.partial(two_steps_of_qwen3, **TENSOR),
    "resumed": functools.partial(resumed, **TENSOR),
    "resumed, qwen3_moe": functools.partial(resumed, kind="qwen3_moe", **TENSOR),
    "held by ddp": functools.partial(held, backend="ddp"),
    "held with tensor": functools.partial(held, **TENSOR),
    "held with context": functools.partial(held, backend="ddp", **CONTEXT),
    "held of a mixture": functools.partial(held_of_a_mixture, **TENSOR),
}
CASES_ON_4 = {
    "tensor 2, data 2": steps(**TENSOR, micro_batch_tokens=40),
    "tensor 2, data 2, every: 2": steps(**TENSOR, micro_batch_tokens=70, reference="every: 2"),
    "tensor 2, data 2, qwen3_moe": steps(**TENSOR, **test_spread.MIXTURE, micro_batch_tokens=40),
    "tensor 2, context 2, qwen3_moe": steps(
        **TENSOR, **CONTEXT, **test_spread.MIXTURE, micro_batch_tokens=40
    ),
    "tensor 2, context 2": steps(**TENSOR, **CONTEXT, micro_batch_tokens=40),
    "context 4": steps(context_parallel_size=4, micro_batch_tokens=70),  # of 2 key-value heads
    "context 2, data 2": steps(**CONTEXT, backend="fsdp", micro_batch_tokens=70),
    "small gradients": functools.partial(
        test_backends.small_gradients, backend="native", zero_stage=0, tensor_parallel_size=2
    ),
    "qwen3": functools.partial(two_steps_of_qwen3, **TENSOR),
    "resumed": functools.partial(resumed, **TENSOR),
    "held with context": functools.partial(held, backend="ddp", context_parallel_size=4),
}
CASES: dict[str, Any] = {}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One process without a process group, by the reference, or the family of a mixture of experts."""
    options: dict[str, dict[str, Any]] = {name: {"reference": name} for name in ("behaviour", "every: 2")}
    options |= {family: {"mixture": family, "aux": True} for family in SPLIT_MIXTURES}
    return {
        name: test_spread.three_steps(tmp_path_factory.mktemp("alone"), **given)
        for name, given in options.items()
    }


SPREAD = [(2, name) for name in CASES_ON_2 if name.startswith(("tensor", "context", "data"))]
SPREAD += [(4, name) for name in CASES_ON_4 if name.startswith(("tensor", "context"))]


def test_what_a_worker_sends_in_a_step_is_what_its_layout_has_to(on_ranks: Any) -> None:
    shape = traffic.SHAPE
    num_layers, hidden, vocab = shape.layers, shape.hidden_size, shape.vocab
    layer = hidden * (shape.heads + 2 * shape.kv_heads) * shape.head_dim  # and their biases, below
    layer += hidden * hidden + 3 * hidden * shape.intermediate + 2 * hidden
    biases = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    num_bytes = 4 * (vocab * hidden + num_layers * (layer + biases) + hidden)
    for messages, sent in on_ranks(2, "sent by ddp"):
        assert num_bytes <= sent["all-reduce"] < num_bytes + 1000 and "all-gather" not in messages
    for messages, sent in on_ranks(2, "sent by fsdp"):
        # each rank has two passes; gradients are scattered in each, by layer and for the rest at once
        assert sent["reduce-scatter"] == pytest.approx(2 * num_bytes / 2, rel=0.001)
        assert messages["reduce-scatter"] == 2 * (num_layers + 1)
    for messages, sent in on_ranks(2, "sent with context"):
        # queries, keys, values and what attention makes of them: for the reference, forward and backward
        assert messages["all-to-all"] == 3 * 4 * num_layers * 4
        each = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * 4
        # nothing follows a completion's last token, so it is not read
        num_tokens = sum(prompt + sum(n - 1 for n in completions) for prompt, completions in LENGTHS)
        assert sent["all-to-all"] == 3 * num_layers * each * (num_tokens // 2) // 2
    for messages, sent in on_ranks(2, "sent with tensor"):
        # hidden states: two sums for the reference, two forward, and one for the input of each of queries,
        # keys, values, gate and up backward; the embedding's, for the reference and forward; the head's and
        # a norm's gradient
        assert messages["all-reduce"] == 9 * num_layers * 4 + 2 * 4 + 4 + 1
        states = num_tokens * hidden * 4
        predicted = sum(sum(completions) for _, completions in LENGTHS) * hidden * 4  # what the head reads
        assert sent["all-reduce"] == pytest.approx((9 * num_layers + 2) * states + predicted, rel=0.0001)


def test_what_a_worker_sends_in_a_call_is_what_a_ring_sends() -> None:
    shares = {kind: share(4) for kind, share in traffic.SENT.values()}
    assert shares == {
        "all-reduce": 1.5,
        "all-gather": 3,
        "reduce-scatter": 0.75,
        "all-to-all": 0.75,
        "broadcast": 0.75,
    }


@pytest.mark.parametrize("world_size, name", SPREAD)
def test_three_steps_are_one_ranks_however_layers_and_sequences_are_split(
    on_ranks: Any, alone: Any, world_size: int, name: str
) -> None:
    """In float64 to 1e-9; sums of several ranks come in another order, which was measured as 1e-14."""
    want = alone[next((of for of in alone if of in name), "behaviour")]
    for result in on_ranks(world_size, name):
        if "zero" in name:  # in float32, as in test_spread
            assert test_spread.difference(result["weights"], want["weights"]) < 1e-5
        else:
            assert test_spread.difference(result["weights"], want["weights"]) < 1e-9
            test_spread.same_metrics(result["metrics"], want["metrics"], 1e-8)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_head_of_several_chunks_is_split_by_its_vocabulary(
    on_ranks: Any, tmp_path: Path, tie: bool
) -> None:
    want = test_backends.two_steps(tmp_path, "ddp", 0, tie)
    for result in on_ranks(2, f"a large {'tied ' * tie}head"):
        assert result["norms"] == pytest.approx(want["norms"], rel=1e-4)
        for name, moved in want["moved"].items():
            assert moved.norm() > 0 and (result["moved"][name] - moved).norm() < 0.01 * moved.norm(), name


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_are_added_up_in_float32_where_bfloat16_is_by_autocast_and_by_fsdp(
    on_ranks: Any, world_size: int
) -> None:
    for result in on_ranks(world_size, "small gradients"):
        once, more = result["norms"]
        assert once > 0 and more / once == pytest.approx(1.018, abs=0.002)


@pytest.mark.parametrize("style, want", [(ReplicatedWithGradAllReduce, 6.0), (SummedGradients, 4.0)])
def test_transformers_style_counts_the_first_pass_twice_and_ours_once(
    monkeypatch: pytest.MonkeyPatch, style: Any, want: float
) -> None:
    """Two passes with a gradient of 1 on each of two ranks: 4, unless the first sum is summed again."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.mul_(2))
    norm = torch.nn.Linear(1, 1, bias=False)
    style().install_forward(norm, SimpleNamespace(get_group=lambda: None))
    for _ in range(2):
        norm(torch.ones(1, 1, requires_grad=True)).sum().backward()
    assert norm.weight.grad is not None and float(norm.weight.grad) == want


@pytest.mark.parametrize("world_size", [2, 4])
def test_norms_of_some_heads_have_the_gradients_of_all_in_updates_of_several_passes(
    on_ranks: Any, tmp_path: Path, world_size: int
) -> None:
    want = two_steps_of_qwen3(tmp_path)
    for result in on_ranks(world_size, "qwen3"):
        assert learners.difference(result, want) < 1e-5


@pytest.mark.parametrize("world_size, name", [(2, "resumed"), (2, "resumed, qwen3_moe"), (4, "resumed")])
def test_a_checkpoint_of_split_layers_is_resumed_and_other_backends_read_it(
    on_ranks: Any, world_size: int, name: str
) -> None:
    results = on_ranks(world_size, name)
    given = settings(reference="every: 2", num_steps=2)
    policy = learners.load(results[0]["checkpoint"], given)
    train_step(policy, learners.mixed_batch(2), given)
    for result in results:
        assert result["same"]
        assert learners.difference(result["weights"], learners.weights(policy)) < 1e-5


def test_each_rank_holds_less_by_the_formula(on_ranks: Any, tmp_path: Path) -> None:
    path = test_backends.large_model(tmp_path, False)
    shape = shape_of(str(path))
    assert shape is not None
    whole, tensor = on_ranks(2, "held by ddp")[0], on_ranks(2, "held with tensor")
    assert whole["parameters"] == shape.parameters
    for rank in tensor:
        assert rank["parameters"] == shape.of_a_part(2)
    shares = [rank["kept"] / whole["kept"] for size in (2, 4) for rank in on_ranks(size, "held with context")]
    assert shares[:2] == pytest.approx([1 / 2] * 2, rel=0.15)
    assert shares[2:] == pytest.approx([1 / 4] * 4, rel=0.35)


def test_each_rank_holds_half_of_the_experts_and_all_routers_and_rows_for_all_experts(
    on_ranks: Any, tmp_path: Path
) -> None:
    shape = shape_of(str(large_mixture(tmp_path)))
    assert shape is not None and shape.num_experts == 8
    assert shape.of_a_part(2) < 0.6 * shape.parameters
    plan = planned(shape, 200 + 8 * 349, num_workers=2, **TENSOR)
    assert plan > 0.9 * planned(shape, 200 + 8 * 349)
    for rank in on_ranks(2, "held of a mixture"):
        assert rank["parameters"] == shape.of_a_part(2)
        assert rank["kept"] == pytest.approx(plan, rel=0.2)


def planned(shape: Any, tokens: int, **learner: Any) -> float:
    given = {
        "run_dir": "r",
        "num_steps": 1,
        "groups_per_step": 4,
        "model": {"path": "m"},
        "prompts": {"path": "p"},
        "learner": {"micro_batch_tokens": tokens, "gradient_checkpointing": False, **learner},
    }
    return learner_bytes(GVPOConfig.from_dict(given), shape, on_gpu=False)["activations"]


def test_the_memory_plan_knows_how_layers_and_sequences_are_split() -> None:
    def plan(**learner: Any) -> dict[str, float]:
        given = {
            "run_dir": "r",
            "num_steps": 1,
            "groups_per_step": 4,
            "model": {"path": "Qwen/Qwen2.5-32B", "dtype": "bfloat16"},
            "prompts": {"path": "p"},
            "learner": {"num_gpus": 1, "num_workers": 16, **learner},
        }
        shape = shape_of("Qwen/Qwen2.5-32B")
        assert shape is not None
        return learner_bytes(GVPOConfig.from_dict(given), shape, on_gpu=True)

    data = plan(backend="fsdp")
    tensor = plan(backend="native", tensor_parallel_size=8)
    context = plan(backend="fsdp", context_parallel_size=8)
    assert plan(backend="native") == data
    assert context["parameters"] == data["parameters"]
    assert context["activations"] == pytest.approx(data["activations"] / 8)
    # an embedding of 0.78 of 32.8 billion is whole on each of 8 ranks, and halved by the other two
    assert data["parameters"] < tensor["parameters"] < 1.2 * data["parameters"]
    assert tensor["head"] < data["head"] / 2


def config_of(**learner: Any) -> GVPOConfig:
    run = {"run_dir": "r", "num_steps": 1, "groups_per_step": 4, "prompts": {"path": "p"}}
    model = {"path": "m", **({"lora": {"rank": 4}} if learner.pop("lora", False) else {})}
    return GVPOConfig.from_dict({**run, "model": model, "learner": learner})


@pytest.mark.parametrize(
    "learner, words",
    [
        (
            {"tensor_parallel_size": 2, "num_workers": 2},
            r"tensor_parallel_size \(2\) needs .*native, not deeps",
        ),
        ({**TENSOR, "num_workers": 3}, r"tensor_parallel_size \(2\) must divide learner.num_workers \(3\)"),
        (
            {**TENSOR, **CONTEXT, "num_workers": 2},
            r"tensor_parallel_size \(2\) x learner.context_parallel_size \(2\) must divide .*\(2\)",
        ),
        ({**CONTEXT, "num_workers": 2, "max_workers": 4}, r"max_workers does not go with .*context_parallel"),
        ({**CONTEXT, "num_workers": 2, "packing": False}, r"context_parallel_size .*packing is false"),
        ({"backend": "native", "lora": True}, r"model.lora cannot be trained with learner.backend: native"),
        ({"context_parallel_size": 0}, r"learner.context_parallel_size.*greater than or equal to 1"),
    ],
)
def test_a_split_that_workers_cannot_make_is_refused_in_one_line(learner: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        config_of(**learner)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "learner, words",
    [
        (
            {**TENSOR, "tensor_parallel_size": 4, "num_workers": 4},
            r"4 workers cannot.*num_key_value_heads \(2\)",
        ),
        ({**TENSOR, **CONTEXT, "num_workers": 4}, None),
        (
            {"context_parallel_size": 3, "num_workers": 3},
            r"3 workers cannot share out the num_attention_heads \(4",
        ),
        ({**TENSOR, "context_parallel_size": 4, "num_workers": 8}, r"context.*num_attention_heads \(4 / 2\)"),
        ({"num_workers": 3}, None),
    ],
)
def test_a_model_that_workers_cannot_share_out_is_refused_by_its_number(
    tmp_path: Path, learner: dict[str, Any], words: str | None
) -> None:
    model = ModelConfig(path=str(make_model(tmp_path)))
    if words is None:
        check_sizes(model, LearnerConfig(**learner))
        return
    with pytest.raises(ConfigError, match=words):
        check_sizes(model, LearnerConfig(**learner))


@pytest.mark.parametrize("name", ["Gemma2Config", "Qwen3_5TextConfig", "MambaConfig"])
def test_a_family_whose_groups_cannot_be_packed_is_not_split_by_sequence(tmp_path: Path, name: str) -> None:
    config = getattr(transformers, name)()
    config.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"^learner.context_p.* the groups of a {config.model_type} cannot"
    ):
        check_sizes(ModelConfig(path=str(tmp_path)), LearnerConfig(**CONTEXT))


def test_a_head_that_ranks_have_in_parts_gives_what_the_whole_one_gives(on_ranks: Any) -> None:
    for differences in on_ranks(2, "a split head"):
        assert len(differences) == 8 and max(differences) < 1e-12


def test_a_mixture_of_experts_is_split_where_its_family_is_known_and_its_experts_can_be_shared_out(
    tmp_path: Path,
) -> None:
    models = {}
    for kind, name in {"qwen2_moe": "Qwen2MoeConfig", "mixtral": "MixtralConfig"}.items():
        config = getattr(transformers, name)(num_local_experts=6, num_key_value_heads=8)
        config.save_pretrained(tmp_path / kind)
        models[kind] = ModelConfig(path=str(tmp_path / kind))
        for learner in ({}, CONTEXT):
            check_sizes(models[kind], LearnerConfig(**learner))
    check_sizes(models["mixtral"], LearnerConfig(**TENSOR))
    with pytest.raises(ConfigError, match=r"^learner.tensor_parallel_size: a qwen2_moe is .* not known"):
        check_sizes(models["qwen2_moe"], LearnerConfig(**TENSOR))
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: 4 workers cannot .* the 6 experts of"):
        check_sizes(models["mixtral"], LearnerConfig(**{**TENSOR, "tensor_parallel_size": 4}))


def test_experts_that_are_computed_one_by_one_are_not_shared_out() -> None:
    native._check_product("grouped_mm", torch.bfloat16)
    with pytest.raises(ConfigError, match="computes this model's experts by eager"):
        native._check_product("eager", torch.bfloat16)

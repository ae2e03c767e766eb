"""What an engine asks of vLLM, at sizes on both sides of every limit; nothing here starts vLLM."""

import asyncio
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_families import config_of

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.engines import SPLITS, EnginesConfig, PoolConfig, SamplingConfig
from gvpo_ray.config.memory import engine_bytes, shape_of
from gvpo_ray.config.model import LoraConfig, ModelConfig
from gvpo_ray.config.plan import check_resources, engine_layouts
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.engines.pools import EngineGroup
from gvpo_ray.engines.vllm_arguments import check_experts, of_the_model, returns_experts
from gvpo_ray.engines.vllm_engine import Engine
from gvpo_ray.run.session import placement_notes

GPU = {"num_gpus": 1}


@pytest.mark.parametrize(
    ("family", "replays", "says"),
    [("qwen3_moe", True, True), ("qwen3_moe", False, False), ("qwen3", True, False)],
)
def test_an_engine_says_which_experts_it_chose_where_there_are_some_and_the_learner_asks(
    tmp_path: Path, family: str, replays: bool, says: bool
) -> None:
    config_of(family).save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path), router_replay=replays)
    assert returns_experts(model) == says
    given = of_the_model(model, arguments(**GPU), says)
    assert given.get("enable_return_routed_experts", False) == says
    assert "enable_return_routed_experts" not in of_the_model(
        model, arguments(), False
    )  # vLLM on a CPU refuses


@pytest.mark.parametrize(
    "given",
    [
        {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
        {"prefill_context_parallel_size": 2},
        {"decode_context_parallel_size": 2},
        {"enable_prefix_caching": False},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_keeps_vllm_from_saying_its_experts_is_refused_where_it_has_to_say_them(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    """vLLM itself refuses just these, at an engine's start: its own check is asked with and without."""
    from vllm.config import VllmConfig

    (key, value), *_ = given.items()
    folders = {family: tmp_path / family for family in ("qwen3_moe", "qwen3")}
    for family, folder in folders.items():
        config_of(family).save_pretrained(folder)
    mixture, dense = (ModelConfig(path=str(folder)) for folder in folders.values())
    num = 2 if "parallel" in key and "decode" not in key else 1
    pool = {"num_gpus": num, "tensor_parallel_size": 1, "vllm": given}
    with pytest.raises(ConfigError, match=rf"^engines\.vllm\.{key}: {value}: .*model\.router_replay: false$"):
        check_experts(mixture, EnginesConfig.model_validate(pool))
    with pytest.raises(ConfigError, match=rf"^engines\.pools\.b\.vllm\.{key}"):
        check_experts(mixture, EnginesConfig.model_validate({"pools": {"a": GPU, "b": pool}}))
    check_experts(dense, EnginesConfig.model_validate(pool))
    check_experts(mixture.model_copy(update={"router_replay": False}), EnginesConfig.model_validate(pool))
    check_experts(mixture, EnginesConfig.model_validate(GPU))

    def ask(**changed: Any) -> None:
        parts = {name: changed.get(name, 1) for name in (*SPLITS, "decode_context_parallel_size")}
        caches = changed.get("enable_prefix_caching", True)
        VllmConfig._verify_aux_output_compatibility(
            SimpleNamespace(  # type: ignore[arg-type]
                aux_output_config=SimpleNamespace(enabled=True),
                use_v2_model_runner=True,
                model_config=SimpleNamespace(runner_type="generate", is_moe=True),
                cache_config=SimpleNamespace(enable_prefix_caching=caches),
                speculative_config=None,
                parallel_config=SimpleNamespace(**parts),
                kv_transfer_config=None,
            )
        )

    ask()
    with pytest.raises(ValueError, match=r"incompatible|prefix caching"):
        ask(**{key: value})


def arguments(
    model: dict[str, Any] | None = None, k: int = 8, sleeps: bool = False, **pool: Any
) -> dict[str, Any]:
    policy = ModelConfig(path="m", **(model or {}))
    return Engine(policy, PoolConfig(**pool), "objects", 0, num_completions=k, sleeps=sleeps).arguments


@pytest.mark.parametrize(
    ("num_gpus", "size", "executor"),
    [
        (0, 1, "vllm.v1.executor.uniproc_executor.UniProcExecutor"),  # of `uni` vLLM makes `mp` on a CPU
        (1, 1, "uni"),
        (0, 2, "mp"),
        (2, 2, "mp"),
    ],
)
def test_a_single_worker_of_vllm_has_no_process_of_its_own(num_gpus: int, size: int, executor: str) -> None:
    given = arguments(num_gpus=num_gpus, tensor_parallel_size=size)
    assert given["distributed_executor_backend"] == executor
    if not num_gpus:
        own = arguments(num_gpus=0, vllm={"tensor_parallel_size": size})  # as vLLM calls it
        assert own["distributed_executor_backend"] == executor


def several(**pool: Any) -> dict[str, Any]:
    run = {"run_dir": "r", "num_steps": 1, "groups_per_step": 4, "prompts": {"path": "p"}}
    model = {"path": "Qwen/Qwen3-30B-A3B", "dtype": "bfloat16"}
    learner = {"num_gpus": 1, "num_workers": 8}
    engines = {"weight_transfer": "nccl", "accelerator_type": "H100", **pool}
    return {**run, "model": model, "learner": learner, "engines": engines}


@pytest.mark.parametrize(
    ("pool", "executor", "line", "gb"),
    [
        ({"num_gpus": 1}, "uni", None, 61.1),
        (
            {"num_gpus": 4, "tensor_parallel_size": 4},
            "mp",
            "engine of engines: 4 tensor parallel; all on one node",
            15.3,
        ),
        (
            {
                "num_gpus": 16,
                "tensor_parallel_size": 8,
                "vllm": {"pipeline_parallel_size": 2, "distributed_executor_backend": "ray"},
            },
            "ray",
            "engine of engines: 8 tensor x 2 pipeline parallel; a placement group of 16 x 1 GPU and its "
            "actor, on as few nodes as have room",
            3.8,
        ),
        (
            {"num_gpus": 8, "vllm": {"data_parallel_size": 8, "enable_expert_parallel": True}},
            "uni",
            "engine of engines: 8 data parallel, experts shared out; all on one node",
            10.3,  # 3.1 of what is no expert, and an eighth of 58
        ),
        (
            {"num_gpus": 4, "tensor_parallel_size": 2, "vllm": {"data_parallel_size": 2}},
            "mp",
            "engine of engines: 2 tensor x 2 data parallel; all on one node",
            30.5,  # two models of two halves
        ),
    ],
)
def test_an_engine_of_several_gpus_is_planned_and_started_as_vllm_splits_it(
    pool: dict[str, Any], executor: str, line: str | None, gb: float
) -> None:
    config = GVPOConfig.from_dict(several(**pool))
    assert engine_layouts(config) == ([] if line is None else [line])
    (only,) = config.engines.all_pools().values()
    assert only.num_processes == pool["num_gpus"]
    weights = engine_bytes(config, only, shape_of("Qwen/Qwen3-30B-A3B"))["weights"]
    assert weights / 1e9 == pytest.approx(gb, abs=0.06)
    given = arguments(**pool)
    assert given["distributed_executor_backend"] == executor
    assert all(given.get(name, 1) == size for name, size in only.sizes.items())


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        (
            {"num_gpus": 4, "tensor_parallel_size": 4, "vllm": {"pipeline_parallel_size": 2}},
            r"num_gpus \(4\) must equal tensor_parallel_size \(4\) x pipeline_parallel_size \(2\)",
        ),
        ({"num_gpus": 1, "vllm": {"data_parallel_size": "two"}}, "data_parallel_size: 'two' is not a number"),
        ({"num_gpus": 1, "vllm": {"pipeline_parallel_size": 0}}, "pipeline_parallel_size: 0 is not a number"),
        ({"vllm": {"distributed_executor_backend": "ray"}}, "executor_backend: ray needs whole GPUs"),
        (
            {
                "num_gpus": 2,
                "vllm": {"data_parallel_size": 2, "distributed_executor_backend": "ray"},
            },
            r"data_parallel_size \(2\) cannot go with distributed_executor_backend: ray",
        ),
        ({"num_gpus": 1, "vllm": {"nnodes": 2}}, "vllm.nnodes: 2: engines get their places from the run"),
        (
            {"num_gpus": 1, "vllm": {"data_parallel_backend": "ray"}},
            "data_parallel_backend: ray: engines get",
        ),
        (
            {
                "num_gpus": 1,
                "vllm": {"distributed_executor_backend": "ray"},
                "weight_transfer": "objects",
            },
            "objects brings weights to one node of an engine",
        ),
        (
            {
                "num_gpus": 1,
                "resources": {"spot": 0.01},
                "vllm": {"distributed_executor_backend": "ray"},
            },
            "resources are asked for on one node",
        ),
        (
            {"num_gpus": 1, "weight_transfer": "sharded_rdt"},
            "sharded_rdt needs vllm.distributed_executor_backend: ray",
        ),
        (
            {"vllm": {"distributed_executor_backend": "vllm.v1.executor.ray_executor_v2.RayExecutorV2"}},
            "distributed_executor_backend: 'vllm.v1.executor.ray_executor_v2.RayExecutorV2' is none of",
        ),
    ],
)
def test_a_split_of_an_engine_that_cannot_be_is_refused_in_one_line(pool: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        GVPOConfig.from_dict(several(**pool))
    assert "\n" not in str(refused.value)


def test_an_engine_for_which_all_nodes_together_have_no_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = {"distributed_executor_backend": "ray"}
    config = GVPOConfig.from_dict(several(num_gpus=16, tensor_parallel_size=16, vllm=vllm))
    nodes = [
        {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0}} for _ in "ab"
    ]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert list(placement_notes(config, engines=True)) == []
    nodes[1]["Resources"]["GPU"] = 7.0
    (note,) = placement_notes(config, engines=True)
    assert "all nodes of this cluster together have no room for the 16 GPUs of an engine of pool" in note
    with pytest.raises(ConfigError, match=r"^engines\.num: 1 x 16 GPUs are more than the 8 GPUs of"):
        check_resources(config, 64, 8)


@pytest.mark.parametrize(
    ("max_groups", "k", "sequences", "tokens"),
    [
        (1, 2, 2, 8192),
        (16, 8, 128, 8192),  # vLLM's own default, which it had whatever max_groups said
        (17, 8, 136, 8192),
        (64, 8, 512, 8192),  # 16 x 512
        (65, 8, 520, 8320),
        (128, 8, 1024, 16384),
        (129, 8, 1024, 16384),
        (64, 64, 1024, 16384),
    ],
)
def test_vllm_decodes_all_completions_in_flight_at_once_up_to_1024(
    max_groups: int, k: int, sequences: int, tokens: int
) -> None:
    given = arguments(k=k, max_groups=max_groups, **GPU)
    assert (given["max_num_seqs"], given["max_num_batched_tokens"]) == (sequences, tokens)
    on_cpu = arguments(k=k, max_groups=max_groups)
    # without chunked prefill vLLM's default is the longest prompt, and ours might be too short
    assert on_cpu["max_num_seqs"] == sequences and "max_num_batched_tokens" not in on_cpu


def test_what_the_pool_says_of_the_scheduler_is_kept_and_fits_together() -> None:
    given = arguments(max_groups=64, vllm={"max_num_seqs": 7, "max_num_batched_tokens": 100}, **GPU)
    assert (given["max_num_seqs"], given["max_num_batched_tokens"]) == (7, 100)
    # vLLM refuses more sequences than tokens in a step
    assert arguments(max_groups=64, vllm={"max_num_batched_tokens": 511})["max_num_seqs"] == 511
    assert arguments(max_groups=64, vllm={"max_num_batched_tokens": 513})["max_num_seqs"] == 512


def test_cuda_graphs_are_off_on_a_cpu_and_on_on_a_gpu_unless_the_pool_says_otherwise() -> None:
    assert arguments()["enforce_eager"] is True and arguments(**GPU)["enforce_eager"] is False
    assert arguments(num_gpus=0.5)["enforce_eager"] is False
    assert arguments(enforce_eager=False)["enforce_eager"] is False
    assert arguments(enforce_eager=True, **GPU)["enforce_eager"] is True


def test_only_an_engine_that_takes_turns_on_a_gpu_is_made_to_sleep_and_its_cache_may_have_a_size() -> None:
    assert arguments(sleeps=True, **GPU)["enable_sleep_mode"] is True
    assert arguments(**GPU)["enable_sleep_mode"] is False
    assert "enable_sleep_mode" not in arguments(sleeps=True)  # vLLM refuses it on a CPU
    assert arguments(kv_cache_gib=2.5, **GPU)["kv_cache_memory_bytes"] == 5 * 2**29
    for without in (arguments(**GPU), arguments(kv_cache_gib=2.5)):
        assert "kv_cache_memory_bytes" not in without


def test_the_head_computes_in_float32_whatever_the_rest_computes_in() -> None:
    tied = {"tie_word_embeddings": False}
    assert arguments()["hf_overrides"] == tied
    assert arguments({"dtype": "bfloat16"})["hf_overrides"] == tied | {"head_dtype": "float32"}
    assert arguments(dtype="float16", **GPU)["hf_overrides"] == tied | {"head_dtype": "float32"}
    lora = {"dtype": "bfloat16", "lora": LoraConfig()}
    assert arguments(lora)["hf_overrides"] == {"head_dtype": "float32"}
    own = {"hf_overrides": {"head_dtype": "model", "rope_theta": 5}}
    # beside the pool's own overrides a tied model stays untied
    assert arguments({"dtype": "bfloat16"}, vllm=own)["hf_overrides"] == tied | own["hf_overrides"]


def test_the_hit_rate_of_the_prefix_cache_is_of_the_prompts_since_the_step_before() -> None:
    config = EnginesConfig.model_validate({"pools": {"ours": {"num": 2}, "theirs": {"url": "http://x/v1"}}})
    group = EngineGroup(config, 4, lambda *_: None, None, lambda *_: None)

    def has(number: int, pid: int, cached: int, prompts: int) -> None:
        group.slots[number].status = {"pid": pid, "num_cached_tokens": cached, "num_prompt_tokens": prompts}

    assert group.prefix_cache() == {}  # no engine has answered: not 0
    has(0, 10, 60, 80)
    has(1, 11, 0, 20)
    has(2, 12, 5, 5)  # a server, whose cache is not ours
    assert group.prefix_cache() == {"engines/prefix_cache_hit_rate": 60 / 100}
    assert group.prefix_cache() == {}
    has(0, 10, 90, 120)  # 30 of 40 since then
    has(1, 13, 10, 10)  # another engine took the place, and counts from 0
    assert group.prefix_cache() == {"engines/prefix_cache_hit_rate": 40 / 50}
    group.slots[1].status = {}  # died
    has(0, 10, 90, 130)
    assert group.prefix_cache() == {"engines/prefix_cache_hit_rate": 0.0}


@pytest.mark.parametrize(("keeps", "versions"), [(False, {2}), (True, {1, 2})])
def test_what_looks_at_older_keys_and_values_is_not_of_the_new_version_alone(
    monkeypatch: pytest.MonkeyPatch, keeps: bool, versions: set[int]
) -> None:
    """New weights come after a call was made and before its first token: the learner must not take its
    log-probs for its own.
    """
    for name, kind in (("vllm", "SamplingParams"), ("vllm.sampling_params", "RequestOutputKind")):
        module = ModuleType(name)
        setattr(module, kind, type(kind, (), {"FINAL_ONLY": 0, "__init__": lambda self, **given: None}))
        monkeypatch.setitem(sys.modules, name, module)
    engine = Engine(ModelConfig(path="m"), PoolConfig(keep_kv=keeps), "objects", 0)
    engine.version = 1

    async def final(*_: Any) -> Any:
        engine.version = 2
        new = SimpleNamespace(
            token_ids=[5],
            logprobs=SimpleNamespace(logprobs=[-1.0]),
            weight_versions=[SimpleNamespace(version="2", start=0, end=1)],
            finish_reason="stop",
            stop_reason=None,
        )
        return SimpleNamespace(outputs=[new], num_cached_tokens=0)

    monkeypatch.setattr(engine, "_final", final)
    monkeypatch.setattr(engine, "_turns", lambda sampling: SimpleNamespace(ends=[0]))
    call = SimpleNamespace(
        sampling=SamplingConfig(),
        max_tokens=1,
        seed=None,
        ids=[1],
        running=SimpleNamespace(name="g"),
        number=0,
    )
    span = asyncio.run(engine._span(call))  # type: ignore[arg-type]
    assert {*span.versions} == versions and span.written == [(2, 0, 1)]

"""The memory plan says what learner and engine need of each GPU, from the config and the model's shape.

It is arithmetic: nothing is loaded. Of the host's memory it counts the copies that a learner worker makes
there, and does not know how much there is. On a CPU the learner's part of it is compared with what torch
allocates (tests/test_memory.py, within 20 %); on a GPU it has not been compared yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.engines import PoolConfig
from gvpo_ray.config.run import GVPOConfig

GB = 1e9

GPU_GB = {
    "T4": 16.0,
    "L4": 24.0,
    "A10G": 24.0,
    "L40S": 48.0,
    "A100-40G": 40.0,
    "A100-80G": 80.0,
    "H100": 80.0,
    "H200": 141.0,
    "B200": 180.0,
}
"""Memory of a GPU in GB, by Ray's name of its type. `A100` alone may be either."""

HEAD_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Logits that the fused head holds at a time (learner/head.py)."""

CONTEXT_GB = 1.5
"""What CUDA, NCCL and the allocator's rests take of a GPU, per process, in GB; a rule of thumb."""

ENGINE_GB = 2.0
"""What CUDA, its graphs and the activations of an engine take of a GPU, in GB; a rule of thumb."""

LIVE_PARAMETERS = 1_000_000_000
"""Parameters that ZeRO-3 gathers at most at a time (stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Shape:
    """A Shape holds the sizes of a decoder as its config.json names them."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    has_bias: bool = True
    """Whether queries, keys and values have a bias, as Qwen2's do."""
    has_norms: bool = False
    """Whether queries and keys have a norm of a head's size, as Qwen3's do."""
    num_experts: int = 0
    """Experts of each layer, of `intermediate_size` each; 0: a dense model."""
    num_experts_per_tok: int = 0

    @property
    def of_a_layer(self) -> int:
        """The parameters of one layer."""
        heads = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        attention = self.hidden_size * heads + self.num_attention_heads * self.head_dim * self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size * (self.num_experts or 1)
        mlp += self.hidden_size * self.num_experts  # the router
        norms = 2 * self.hidden_size + 2 * self.has_norms * self.head_dim
        return attention + mlp + norms + self.has_bias * heads

    @property
    def of_the_head(self) -> int:
        """The parameters of the head, and of the embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """The parameters of the model."""
        ends = self.of_the_head * (1 if self.tie_word_embeddings else 2) + self.hidden_size
        return self.num_hidden_layers * self.of_a_layer + ends

    def of_a_part(self, parts: int) -> float:
        """Return the parameters that one of `parts` tensor parallel workers has, before they are sharded.

        Norms, routers, and an embedding that is not tied to the head, are whole on each; so are biases that
        are added after a sum, which the families of this shape do not have.
        """
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        norms += 2 * self.has_norms * self.head_dim * self.num_hidden_layers
        routers = self.num_hidden_layers * self.hidden_size * self.num_experts
        whole = norms + routers + (0 if self.tie_word_embeddings else self.of_the_head)
        return whole + (self.parameters - whole) / parts

    def of_an_adapter(self, rank: int) -> int:
        """Return the parameters of an adapter of all linear layers but the head."""
        q, kv = (n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads))
        ends = 2 * (self.hidden_size + q) + 2 * (self.hidden_size + kv)
        if not self.num_experts:  # experts are no linear layers
            ends += 3 * (self.hidden_size + self.intermediate_size)
        return self.num_hidden_layers * rank * ends


KNOWN = {
    "Qwen/Qwen2.5-Math-1.5B": Shape(151_936, 1536, 28, 8960, 12, 2, 128, True),
    "Qwen/Qwen2.5-Math-7B": Shape(152_064, 3584, 28, 18_944, 28, 4, 128, False),
    "Qwen/Qwen2.5-32B": Shape(152_064, 5120, 64, 27_648, 40, 8, 128, False),
    "Qwen/Qwen3-30B-A3B": Shape(151_936, 2048, 48, 768, 32, 4, 128, False, False, True, 128, 8),
}
"""The shapes of the models of jobs/, which are looked up on the hub only when a run starts."""


def shape_of(path: str) -> Shape | None:
    """Return the shape of a model in a folder, or of a known name; None: it is not a model with one."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return KNOWN.get(path)
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        read = None
    if not isinstance(read, dict):
        return None  # who loads the model says what is wrong with it
    given: dict[str, Any] = read.get("text_config") or read
    kind = given.get("model_type")
    size = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}.get(kind or "")
    if any(word in key for key in given for word in ("expert", "ssm", "mamba")) and size is None:
        return None
    if given.get("mlp_only_layers") or given.get("decoder_sparse_step", 1) != 1:
        return None
    try:
        hidden, heads = int(given["hidden_size"]), int(given["num_attention_heads"])
        return Shape(
            int(given["vocab_size"]),
            hidden,
            int(given["num_hidden_layers"]),
            int(given[size or "intermediate_size"]),
            heads,
            int(given.get("num_key_value_heads") or heads),
            int(given.get("head_dim") or hidden // heads),
            bool(given.get("tie_word_embeddings", False)),
            has_bias=kind == "qwen2" or bool(given.get("attention_bias")),
            has_norms=kind in ("qwen3", "qwen3_moe"),
            # transformers writes one name for both families; the hub's files of Qwen3 have another
            num_experts=int(given.get("num_local_experts") or given["num_experts"]) if size else 0,
            num_experts_per_tok=int(given["num_experts_per_tok"]) if size else 0,
        )
    except (KeyError, TypeError, ValueError):
        return None


def learner_bytes(config: GVPOConfig, shape: Shape, on_gpu: bool) -> dict[str, float]:
    """Return the bytes that one learner worker needs of its device, by what they hold.

    Args:
        config: the run's.
        shape: the model's.
        on_gpu: whether the device is a GPU; else the memory is the host's.
    """
    learner, lora = config.learner, config.model.lora
    is_half = config.model.dtype == "bfloat16"
    tensor, context = learner.tensor_parallel_size, learner.context_parallel_size
    number, ranks = shape.of_a_part(tensor), learner.num_workers // tensor
    trained = shape.of_an_adapter(lora.rank) if lora else number
    stage = learner.zero_stage if learner.backend == "deepspeed" else 0
    width = 2 if is_half else 4
    reference = width if _keeps_a_copy(config) and not lora else 0  # of the reference model's weights
    gathered = 0.0  # parameters that a pass reads beside the resident ones
    if learner.backend in ("fsdp", "native"):
        parameters, gradients, optimizer = 4 * number / ranks, 4 * trained / ranks, 8 * trained / ranks
        reference *= 2 if is_half else 1
        reference_bytes = reference * number / ranks
        if learner.backend == "native" and ranks == 1:
            gathered = 2.0 * number if is_half else 0.0  # autocast's copies, as without shards
        elif ranks > 1 or is_half:
            # two layers, and what is not in a layer; and of these the gradients
            layer = shape.of_a_layer / tensor
            gathered = 2 * width * (2 * layer + number - shape.num_hidden_layers * layer)
    elif stage == 0:
        parameters, gradients, optimizer = 4.0 * number, 4.0 * trained, 8.0 * trained
        gradients *= 2 if ranks > 1 else 1  # the buckets that are reduced
        gathered = 2.0 * number if is_half else 0.0  # autocast keeps what it has converted until a pass ends
        reference_bytes = float(4 * number) if reference else 0.0
    else:
        parts = ranks if stage == 3 else 1
        parameters = width * number / parts
        gradients = (4 if stage == 1 and not is_half else 4 / ranks) * trained
        optimizer = 12 * trained / ranks
        reference_bytes = reference * number / parts
        gathered = width * min(number, LIVE_PARAMETERS) if stage == 3 and ranks > 1 else 0.0
        gathered += 4 * min(trained, 500_000_000)  # the bucket of gradients that are reduced
    if learner.offload != "none":
        optimizer = gradients = 0.0
    if learner.offload == "parameters":
        parameters = 0.0
    recomputed = on_gpu if learner.gradient_checkpointing is None else learner.gradient_checkpointing
    tokens = -(-learner.micro_batch_tokens // context)
    by_fsdp = learner.backend == "fsdp" or (learner.backend == "native" and ranks > 1)
    residual = 2 if is_half and (stage > 0 or by_fsdp) else 4
    return {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "reference": reference_bytes,
        "gathered": gathered,
        **_of_a_pass(shape, tokens, width, residual, recomputed, on_gpu, tensor),
    }


def host_bytes(config: GVPOConfig, shape: Shape, rank: int) -> dict[str, float]:
    """Return the bytes of the copies that one learner worker has in its host's memory, by what they are for.

    Rank 0 sends the weights, and compares them with the version before; and it writes the model of a
    checkpoint. The training state of a checkpoint is copied by all ranks, a part each.

    Args:
        config: the run's.
        shape: the model's.
        rank: of the worker.
    """
    learner, lora = config.learner, config.model.lora
    width = 2 if config.model.dtype == "bfloat16" else 4
    trained = shape.of_an_adapter(lora.rank) if lora else shape.parameters
    sent = 0.0
    if rank == 0 and config.engines.weight_transfer == "objects":
        tied = shape.of_the_head if shape.tie_word_embeddings else 0  # sent under both of its names
        sent = 4.0 * trained if lora else float(width * (trained + tied))
        sent *= 2 if config.max_staleness != 0 and config.engines.colocated != "sleep" else 1
    parts = {"weights to send": sent, "training state": 12 * trained / learner.num_workers}
    if rank == 0:
        parts["model of a checkpoint"] = float(width * shape.parameters + 4 * trained * bool(lora))
        if isinstance(config.loss.reference, str) and config.loss.reference.startswith("every"):
            is_half = width == 2 and learner.backend == "deepspeed" and learner.zero_stage > 0
            parts["its reference"] = float((2 if is_half else 4) * trained)
    return parts


def gathered_by_a_checkpoint(config: GVPOConfig, shape: Shape) -> float:
    """Return the bytes of a device that a checkpoint takes: the largest weight, whole, and converted."""
    learner = config.learner
    is_whole = learner.backend == "ddp" or (learner.backend == "deepspeed" and learner.zero_stage == 0)
    converted = 2 if config.model.dtype == "bfloat16" else 0
    experts = shape.num_experts * 2 * shape.intermediate_size * shape.hidden_size  # of a layer, in one weight
    return float(((0 if is_whole else 4) + converted) * max(shape.of_the_head, experts))


def total(parts: dict[str, float]) -> float:
    """Return the bytes that the parts of `learner_bytes` are together.

    The head works before the layers' backward passes, in memory that a recomputed layer takes later.
    """
    return sum(parts.values()) - min(parts["a layer"], parts["head"])


def _keeps_a_copy(config: GVPOConfig) -> bool:
    return config.loss.has_reference_model


def _of_a_pass(
    shape: Shape, tokens: int, width: int, residual: int, recomputed: bool, on_gpu: bool, parts: int
) -> dict[str, float]:
    """Return the bytes of what a pass keeps for its backward pass, of a recomputed layer, and of the head.

    Per token a layer keeps its hidden states some eight times, queries and attention's outputs three times
    (with padded blocks, on a CPU, twice as often), and the MLP's inner states four times. The head holds the
    logits of a chunk, the float32 gradient of its weight, and in bfloat16 copies of that and of the weight.
    Of `parts` tensor parallel workers each has its share of queries, of inner states and of the head. Experts
    that are shared out give no such share: each worker has rows for all experts of a token, and makes those
    of experts that it lacks zero.
    """
    queries = (3 if on_gpu else 6) * shape.num_attention_heads * shape.head_dim
    experts = shape.num_experts_per_tok
    inner = 4 * shape.intermediate_size * (experts or 1 / parts)
    wide = 8 * shape.hidden_size + queries / parts + inner
    wide += experts * 3 * shape.hidden_size  # a copy for each expert
    vocabulary = shape.vocab_size // parts
    head = vocabulary * shape.hidden_size
    layer = float(tokens * (width * wide + 4 * 3 * shape.hidden_size * (width == 2)))
    states = float(tokens * residual * shape.hidden_size)
    chunk = min(tokens, max(1, HEAD_LOGITS["cuda" if on_gpu else "cpu"] // vocabulary))
    half = 2 * width * head if width == 2 else 0
    return {
        "activations": shape.num_hidden_layers * (states if recomputed else layer),
        "a layer": 1.5 * layer if recomputed else 0.0,
        "head": float(2 * 4 * chunk * vocabulary + 4 * head + half),
    }


def engine_bytes(config: GVPOConfig, pool: PoolConfig, shape: Shape) -> dict[str, float]:
    """Return the bytes of weights, and of keys and values of one token, on one GPU of an engine of a pool."""
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[pool.dtype or config.model.dtype]
    untied = shape.parameters + (shape.of_the_head if shape.tie_word_embeddings else 0)
    layers = shape.num_hidden_layers * shape.of_a_layer
    experts = shape.num_hidden_layers * 3 * shape.hidden_size * shape.intermediate_size * shape.num_experts
    quantised = 1 if pool.quantization else width
    keys = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * width
    tensor = pool.sizes["tensor_parallel_size"]
    parts = tensor * pool.sizes["pipeline_parallel_size"]
    # data parallel parts have the whole model each, but for experts that are shared out to all of them
    shares = pool.sizes["data_parallel_size"] if pool.vllm.get("enable_expert_parallel") else 1
    return {
        "weights": ((layers - experts + experts / shares) * quantised + (untied - layers) * width) / parts,
        "of a token": keys / min(tensor, shape.num_key_value_heads) / pool.sizes["pipeline_parallel_size"],
    }


def gpu_gb(accelerator_type: str | None, here: float | None) -> float | None:
    """Return the memory of a GPU in GB: of its type, or else of this machine's; None: nobody knows."""
    return GPU_GB.get(accelerator_type or "", None if accelerator_type else here)


def memory_plan(config: GVPOConfig, here: float | None = None) -> Iterator[tuple[str, str | None]]:
    """Yield a line for the learner and for each pool of engines on GPUs, with what is wrong or None.

    Args:
        config: the run's.
        here: memory of this machine's GPUs, in GB; None: it has none.
    """
    shape = shape_of(config.model.path)
    on_gpus = {name: pool for name, pool in config.engines.all_pools().items() if pool.num_gpus}
    if not on_gpus and not config.learner.num_gpus:
        return
    if shape is None:
        yield f"no memory plan: the shape of {config.model.path} is not known here", None
        return
    shared = 0.0  # what engines take of a GPU that they share with the learner
    for name, pool in on_gpus.items():
        need = engine_bytes(config, pool, shape)
        gb = gpu_gb(pool.accelerator_type, here)
        fraction = pool.memory_fraction
        weights, of_a_token = need["weights"], need["of a token"]
        line, wrong = f"memory of an engine of {name} per GPU: {weights / GB:.1f} GB of weights", None
        line += f", {of_a_token / 1e3:.0f} kB of keys and values per token"
        if gb is not None:
            if pool.num_gpus < 1:
                shared = max(shared, fraction * gb)
            room = fraction * gb * GB - weights - ENGINE_GB * GB
            longest = config.model.max_length or 0
            line += f"; {fraction:g} of {gb:g} GB has room for {max(0, room / of_a_token):,.0f} tokens"
            if room <= of_a_token * longest:
                wrong = (
                    f"engines of {name}: {fraction:g} of {gb:g} GB (memory_fraction) does not hold "
                    f"{weights / GB:.1f} GB of weights and one sequence: raise tensor_parallel_size"
                )
        yield line, wrong
    if config.learner.num_gpus:
        need = learner_bytes(config, shape, on_gpu=True)
        needed = total(need) / GB + CONTEXT_GB
        parts = ", ".join(f"{name} {value / GB:.1f}" for name, value in need.items() if value)
        gb = gpu_gb(config.learner.accelerator_type, here)
        wrong = None
        if (
            config.engines.colocated == "sleep"
        ):  # each has the GPU in its turn; the learner keeps what is no pass
            # a checkpoint is written in the engines' turn
            resident = sum(need[name] for name in ("parameters", "gradients", "optimizer", "reference"))
            resident = (resident + gathered_by_a_checkpoint(config, shape)) / GB
            shared, needed_beside = 0.0, shared + resident + CONTEXT_GB
            if gb is not None and needed_beside > gb:
                wrong = (
                    f"learner: it keeps {resident:.0f} GB per GPU in the engines' turn, which take "
                    f"{needed_beside - resident - CONTEXT_GB:.0f} of {gb:g} GB: lower engines.memory_fraction"
                )
        if gb is not None and needed + shared > gb:
            beside = f" beside {shared:.0f} GB of the engine" if shared else ""
            wrong = (
                f"learner: {needed:.0f} GB per GPU{beside} are more than its {gb:g} GB ({parts}): lower "
                "learner.micro_batch_tokens, or raise learner.num_workers or learner.zero_stage"
            )
        yield _host_line(config, shape), None
        yield f"memory of a learner worker, GB: {needed:.1f} ({parts}, CUDA {CONTEXT_GB:g})", wrong


def _host_line(config: GVPOConfig, shape: Shape) -> str:
    first, other = (host_bytes(config, shape, rank) for rank in (0, 1))
    parts = ", ".join(f"{name} {value / GB:.1f}" for name, value in first.items() if value)
    others = f"; of each other worker: {sum(other.values()) / GB:.1f}" * (config.learner.num_workers > 1)
    whole = sum(first.values()) / GB
    return f"copies in the host's memory of learner worker 0, GB: {whole:.1f} ({parts}){others}"


def check_memory(config: GVPOConfig, here: float | None = None) -> None:
    """Refuse a run that does not fit into the memory of its GPUs, where their memory is known.

    Raises:
        ConfigError: one line that says what does not fit, and what to change.
    """
    for _, wrong in memory_plan(config, here):
        if wrong:
            raise ConfigError(wrong)

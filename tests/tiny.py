"""What several tests need: a model and a tokenizer small enough to make on the spot, groups, and a few ranks
to run on.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load as from_bytes
from torch.overrides import TorchFunctionMode

from gvpo_ray import groups
from gvpo_ray.bench import chaos
from gvpo_ray.weights.deltas import apply_delta

EOS = 1
ALPHABET = " 0123456789+=?.abcdefghijklmnopqrstuvwxyz\\{}"
VOCAB_SIZE = 2 + len(ALPHABET)


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
MIXTURE |= {"router_aux_loss_coef": 0.25}  # which only model.router_aux_loss reads


def make_model(folder: str | Path, kind: str = "qwen2", tie: bool = True, seed: int = 0) -> Path:
    """Write a random model (two layers, a few thousand weights) with a tokenizer of single characters; 0 is
    <pad>, 1 is <eos>.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    tokens = ["<pad>", "<eos>", *ALPHABET]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder
    )
    config, model, sizes = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
        "llama": (LlamaConfig, LlamaForCausalLM, {}),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, MIXTURE),
        "mixtral": (MixtralConfig, MixtralForCausalLM, {**MIXTURE, "num_local_experts": 4}),
    }[kind]
    torch.manual_seed(seed)
    model(
        config(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=tie,
            initializer_range=0.2,  # far from uniform: log-probs of -1 and of -20
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=0,
            **sizes,
        )
    ).save_pretrained(folder)
    return Path(folder)


def vllm_model(**config: Any) -> Any:
    """A random model of heads of 32, which vLLM runs on a CPU, for make_model's tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=1024,
            bos_token_id=None,
            pad_token_id=0,
            **{"eos_token_id": EOS, "initializer_range": 0.2, **config},
        )
    )


def tree(folder: Path) -> dict[str, Any]:
    """What is in a folder: any change of a name, a content or a time makes it another."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        )
        for path in sorted(folder.rglob("*"))
    }


def make_checkpoint(folder: Path) -> Path:
    """Write the smallest folder that is a whole checkpoint."""
    from safetensors.torch import save_file

    (folder / "optimizer").mkdir(parents=True)
    save_file({"torch_rng": torch.zeros(1)}, folder / "optimizer" / "00000.safetensors")
    (folder / "state.json").write_text("{}", encoding="utf-8")
    return folder


def float64(model: torch.nn.Module) -> torch.nn.Module:
    """Norms and routers compute in float32 whatever the model is in: replaced, so that all is in float64.

    The fused product of experts knows no float64 either.
    """

    def norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return (
            self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm.__get__(module)
        if type(module).__name__.endswith("TopKRouter"):
            module.forward = functools.partial(_with_softmax64, module.forward)
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")
    return model.double().eval()


def _with_softmax64(usual: Any, hidden: torch.Tensor) -> Any:
    with _Softmax64():
        return usual(hidden)


class _Softmax64(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.softmax:
            return func(*args, **{**kwargs, "dtype": torch.float64})
        if func is torch.Tensor.float:  # Mixtral's
            return args[0].double()
        return func(*args, **(kwargs or {}))


def make_group(
    group_id: int,
    rewards: tuple[float | None, ...] = (1.0, 0.0, 0.5),
    version: int | None = 0,
    **columns: Any,
) -> dict[str, Any]:
    """A row with random tokens, fixed by its id. `version` sampled it (None: foreign); `columns` replace what
    they name.
    """
    random = torch.Generator().manual_seed(1000 + group_id)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, VOCAB_SIZE, (length,), generator=random).tolist()

    m = len(rewards)
    completions = [[*tokens(2 + (group_id + 3 * i) % 5), EOS] for i in range(m)]
    return {
        "group_id": group_id,
        "prompt": f"prompt {group_id}",
        "answer": "7",
        "dataset": "tiny",
        "prompt_ids": tokens(3 + group_id % 4),
        "completions": ["text"] * m,
        "completion_ids": completions,
        "finish_reasons": ["stop"] * m,
        "sources": ["policy" if version is not None else "offline:people"] * m,
        "version_min": [version] * m,
        "version_max": [version] * m,
        "sampling_logprobs": [
            None if version is None else [-0.5 - 0.25 * i] * len(ids) for i, ids in enumerate(completions)
        ],
        "rewards": list(rewards),
        "reward_parts": {"math": list(rewards)},
        "reward_reasons": [None] * m,
        **columns,
    }


def table(*rows: dict[str, Any]) -> pa.Table:
    masks = [name for name in groups.MASK_COLUMNS if name in rows[0]]
    return groups.table(rows).select([*groups.LOGGED_COLUMNS, *masks])


# --- ranks --------------------------------------------------------------------------------------------------


def descendants(title: str) -> list[int]:
    """Numbers of the processes below this one whose title begins so."""
    return chaos.descendants(os.getpid(), title)


RANKS_IMPORT = [
    "pytest",
    "peft",
    "deepspeed",
    # DeepSpeed's engine imports it, and with it Inductor and Dynamo's back-ends: 4 s of every rank
    "deepspeed.runtime.zero.muon.original_muon",
    "setuptools",  # and this, to look for its own kernels
    "transformers.models.qwen2.modeling_qwen2",
    "gvpo_ray.learner.loop",
]


def run_on_ranks(
    world_size: int, cases: dict[str, Callable[[Path], Any]], folder: Path
) -> dict[str, list[Any]]:
    """Run every case on every rank of one gloo group; its results by rank. A case that raised has its
    traceback as a string.

    Each case gets a folder of its own that the ranks share. Importing what they need takes longer than many
    cases do: a server does it once, and all ranks of all test files are forks of that.
    """
    import torch.multiprocessing

    torch.multiprocessing.set_forkserver_preload(RANKS_IMPORT)
    torch.multiprocessing.start_processes(
        _run, args=(world_size, cases, folder), nprocs=world_size, start_method="forkserver"
    )
    results = [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]
    return {name: [result[name] for result in results] for name in cases}


def _run(rank: int, world_size: int, cases: dict[str, Callable[[Path], Any]], folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    gc.freeze()  # of the imports: half a million objects that each of ZeRO-3's full collections would visit
    dist = torch.distributed
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=10),
    )
    results: dict[str, Any] = {}
    for name, case in cases.items():
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        try:
            results[name] = case(own)
        except Exception:  # the test of this case fails with it; the others have theirs
            results[name] = traceback.format_exc()
            # the other ranks may wait for this one in vain
            print(f"rank {rank}, case {name}: {results[name]}", file=sys.stderr)
        dist.barrier()
    torch.save(results, folder / f"result-{rank}.pt")
    dist.destroy_process_group()


def sent_weights(published: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a published version, from its whole and its deltas."""
    shards = [np.array(shard) for shard in published["shards"]]
    for delta in published["deltas"]:
        for shard, of_shard in zip(shards, delta, strict=True):
            apply_delta(shard, of_shard)
    return {name: tensor for shard in shards for name, tensor in from_bytes(shard.tobytes()).items()}

"""The model that is trained: load, forward to sequence log-probs, update, checkpoint. One instance per learner worker.

Two back-ends behind one small seam, DistributedDataParallel and DeepSpeed ZeRO 0 to 3; the rest of the project sees `Policy`.
It imports neither ray nor vllm: torch.distributed is set up by whoever calls (Ray Train; a test; nobody, for one process).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo_ray import packing
from gvpo_ray.config import LearnerConfig, ModelConfig
from gvpo_ray.weights import shards

Row = Mapping[str, Any]


class CompletionLogprobs(nn.Module):
    """log pi(y_t | x, y_<t) for every token of every completion of a micro-batch. Prompt tokens never meet the head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor, positions: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        """Token targets[i] is predicted at [rows[i], positions[i]] of what `inputs` (padded_inputs, packing.pack) lay out. Returns [N].

        In float32, or in the model's precision if that is higher.
        """
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state[rows, positions]
        head = self.model.get_output_embeddings()
        size = max(1, HEAD_ELEMENTS[hidden.device.type] // self.model.config.vocab_size)
        if len(hidden) <= size:
            return _head_logprobs(head, hidden, targets)
        # The logits of a chunk are computed again in the backward pass: [tokens, vocabulary] never exists as a whole.
        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(_head_logprobs, head, *chunk, use_reentrant=False) for chunk in chunks])


HEAD_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Logits at a time: 64 MB in float32; 1 GB on a GPU, where small products waste it and ZeRO-3 may gather the head for each."""


def _head_logprobs(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """log softmax(head(hidden))[targets], [N, hidden] and [N] -> [N], without a second matrix of the logits' size."""
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(1, targets[:, None]).squeeze(1) - torch.logsumexp(logits, dim=-1)


def padded_inputs(rows: Sequence[Row], device: torch.device | str) -> tuple[dict[str, Tensor], list[int]]:
    """Lay out every completion with its prompt, right-padded. Returns the arguments of CompletionLogprobs and the completions' lengths."""
    sequences = [(row["prompt_ids"], ids) for row in rows for ids in row["completion_ids"]]
    width = max(len(prompt) + len(ids) for prompt, ids in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    index: list[tuple[int, int, int]] = []
    for i, (prompt, ids) in enumerate(sequences):
        end = len(prompt) + len(ids)
        input_ids[i, :end] = torch.tensor([*prompt, *ids])
        mask[i, :end] = 1
        index += [(i, len(prompt) + t - 1, token) for t, token in enumerate(ids)]
    where = torch.tensor(index)
    tensors = {"input_ids": input_ids, "attention_mask": mask, "rows": where[:, 0], "positions": where[:, 1], "targets": where[:, 2]}
    return {name: tensor.to(device) for name, tensor in tensors.items()}, [len(ids) for _, ids in sequences]


def sequence_sums(token_logprobs: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sum token log-probs [sum of lengths] over each completion, in float64. Returns [number of completions]."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(token_logprobs.device)
    return torch.zeros(len(lengths), dtype=torch.float64, device=owner.device).index_add(0, owner, token_logprobs.double())


class Backend(Protocol):
    """How parameters, gradients and the optimizer are spread over the ranks.

    Every rank makes the same number of forward and backward passes per update: with sharded parameters they are collectives.
    Both average gradients over the ranks, so a loss that is a share of a global sum is multiplied by the number of ranks.
    """

    def forward(self, inputs: dict[str, Tensor], is_last: bool) -> Tensor: ...  # with gradients; is_last: of this update
    def backward(self, loss: Tensor, is_last: bool) -> None: ...
    def step(self, learning_rate: float) -> float: ...  # update; returns the gradient's norm before clipping
    def full(self, parameter: nn.Parameter) -> Tensor: ...  # the whole parameter, on every rank
    def get_state(self, parameter: nn.Parameter) -> dict[str, Tensor]: ...  # exp_avg, exp_avg_sq, master: whole, float32
    def init_state(self, num_updates: int) -> None: ...  # make the state that set_state then fills
    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None: ...


def _adamw(module: nn.Module, config: LearnerConfig) -> torch.optim.AdamW:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=config.learning_rate, betas=config.adam_betas, weight_decay=config.weight_decay)


def _fill_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], num_updates: int) -> None:
    """AdamW makes its state at its first step; one that is restored must be there before."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(num_updates)),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


class DDPBackend:
    """torch's DistributedDataParallel: replicated float32 parameters and optimizer; bfloat16 by autocast."""

    def __init__(self, module: nn.Module, config: LearnerConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self._optimizer = _adamw(module, config)
        self._module: nn.Module = module
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._module = nn.parallel.DistributedDataParallel(module)

    def _no_sync(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        ddp = isinstance(self._module, nn.parallel.DistributedDataParallel)
        return self._module.no_sync() if ddp and not is_last else contextlib.nullcontext()

    def forward(self, inputs: dict[str, Tensor], is_last: bool) -> Tensor:
        with self._no_sync(is_last), self._autocast():
            return self._module(**inputs)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        with self._no_sync(is_last):
            loss.backward()

    def step(self, learning_rate: float) -> float:
        norm = nn.utils.clip_grad_norm_(self._module.parameters(), self._config.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def full(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def get_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self._optimizer.state[parameter]
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq")} if state else {}

    def init_state(self, num_updates: int) -> None:
        _fill_state(self._optimizer, self._module.parameters(), num_updates)

    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            (parameter.data if name == "master" else self._optimizer.state[parameter][name]).copy_(value)


class DeepSpeedBackend:
    """DeepSpeed ZeRO 0 to 3 over the process group that is there, with torch's AdamW (no op is built)."""

    def __init__(self, module: nn.Module, config: LearnerConfig, dtype: torch.dtype, device: torch.device) -> None:
        import deepspeed

        self._config = config
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=module, optimizer=_adamw(module, config), config=deepspeed_config(config, dtype), dist_init_required=False
        )
        self._is_zero = config.zero_stage > 0

    def forward(self, inputs: dict[str, Tensor], is_last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(is_last)
        return self._engine(**inputs)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        norm = None
        if not self._is_zero:  # DeepSpeed clips plain gradients too, but does not say what their norm was
            norm = nn.utils.get_total_norm([p.grad for p in self._engine.module.parameters() if p.grad is not None])
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def full(self, parameter: nn.Parameter) -> Tensor:
        if not hasattr(parameter, "ds_id"):
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def get_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not self._base.state:
            return {}
        if not self._is_zero:
            return {name: self._base.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")}
        state = {name: safe_get_full_optimizer_state(parameter, name) for name in ("exp_avg", "exp_avg_sq")}
        return {**state, "master": safe_get_full_fp32_param(parameter)}

    def init_state(self, num_updates: int) -> None:
        # ZeRO-3 shows AdamW its flat shards only while it steps.
        stage = self._config.zero_stage
        flat = self._optimizer.fp32_partitioned_groups_flat if stage == 3 else [p for g in self._base.param_groups for p in g["params"]]
        _fill_state(self._base, flat, num_updates)
        if stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def set_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, value in state.items():
            if not self._is_zero:
                (parameter.data if name == "master" else self._base.state[parameter][name]).copy_(value)
            elif name == "master":
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, name)

    @property
    def _base(self) -> torch.optim.Optimizer:
        """torch's AdamW below DeepSpeed's sharding."""
        return self._optimizer.optimizer if self._is_zero else self._optimizer


def deepspeed_config(config: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed configuration of a run. Accumulation boundaries are set by hand: micro-batches vary in number.

    bfloat16 without ZeRO is autocast over float32 parameters, as for DDP: DeepSpeed's own wrapper there hides optimizer and master weights.
    """
    is_half = dtype == torch.bfloat16
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": is_half and config.zero_stage > 0},
        "torch_autocast": {"enabled": is_half and config.zero_stage == 0, "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


class _Weights:
    def __init__(self, model: nn.Module, backend: Backend) -> None:
        self._model, self._backend = model, backend

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            yield name, self._backend.full(parameter)


class Policy:
    """One rank's part of the policy. `path`: a Hugging Face folder; with `state.json` in it, a checkpoint, which is resumed.

    Methods that say "every rank" are collectives.
    """

    def __init__(self, model: ModelConfig, config: LearnerConfig, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._model_config = model
        self._path = Path(path)  # not to be read later: a checkpoint is pruned when newer ones are there
        self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
        dtype = getattr(torch, model.dtype)
        if config.backend == "deepspeed":
            import deepspeed

            # Built with g++ for a minute at the first start, and used by nothing but DeepSpeed's inference.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        shard_on_load = None
        if config.backend == "deepspeed" and config.zero_stage == 3:
            from transformers.integrations import HfDeepSpeedConfig

            shard_on_load = HfDeepSpeedConfig(deepspeed_config(config, dtype))  # must live while from_pretrained runs
        is_zero = config.backend == "deepspeed" and config.zero_stage > 0  # its master weights are apart; others compute by autocast
        self._module = CompletionLogprobs(self._load(path, dtype if is_zero else torch.float32))
        del shard_on_load
        if config.gradient_checkpointing:
            self._module.model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in self._module.modules():  # the layers recompute in training mode only; elsewhere it would switch dropout on
                module.training = getattr(module, "gradient_checkpointing", False)
        backend = DeepSpeedBackend if config.backend == "deepspeed" else DDPBackend
        self._backend: Backend = backend(self._module, config, dtype, self.device)
        self._autocast_dtype = torch.float32 if is_zero else dtype
        self.vocab_size: int = self._module.model.config.vocab_size
        self.max_length: int = model.max_length or self._module.model.config.max_position_embeddings
        self.reference: nn.Module | None = None
        self.packs = config.packing and self._can_pack()
        self.step = self.num_updates = 0
        if (self._path / "state.json").exists():
            self._resume()

    def _load(self, path: str | Path, dtype: torch.dtype) -> nn.Module:
        trust = self._model_config.trust_remote_code
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=trust, attention_dropout=0.0)
        return model.to(self.device).eval()

    def _can_pack(self) -> bool:
        """Whether packed groups have the log-probs of padded ones, tried with a few tokens. Every rank. Leaves the model ready for what it says."""
        model, ids = self._module.model, [i % self.vocab_size for i in range(13)]
        rows = [{"prompt_ids": ids[:4], "completion_ids": [ids[4:7], ids[7:8], ids[8:]]}]
        self.packs = False
        padded = torch.cat(self.token_logprobs(rows))
        usual = model.config._attn_implementation
        try:
            model.set_attn_implementation(packing.NAME)
            self.packs = True
            difference = float((torch.cat(self.token_logprobs(rows)) - padded).abs().max())
            why = f"its log-probs differ by {difference:.2g} nats"
            if difference < (1e-3 if self._model_config.dtype == "float32" else 0.1):
                return True
        except (TypeError, ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0]
        model.set_attn_implementation(usual)
        logging.getLogger(__name__).warning("%s cannot be packed by groups (%s): its sequences are padded", type(model).__name__, why)
        return False

    # --- forward and update --------------------------------------------------------------------------------------------

    def _inputs(self, rows: Sequence[Row]) -> tuple[dict[str, Any], list[int]]:
        return packing.pack(rows, self.device) if self.packs else padded_inputs(rows, self.device)

    def logprobs(self, rows: Sequence[Row], is_last: bool = True) -> Tensor:
        """Sequence log-probs with gradients, float64 [completions of all rows]. Every rank. is_last: of this update's micro-batches."""
        inputs, lengths = self._inputs(rows)
        return sequence_sums(self._backend.forward(inputs, is_last), lengths)

    @torch.no_grad()
    def token_logprobs(self, rows: Sequence[Row], reference: bool = False) -> list[Tensor]:
        """Token log-probs per completion, without gradients, of the policy (every rank) or of the reference model."""
        inputs, lengths = self._inputs(rows)
        module = self.reference if reference else self._module
        assert module is not None
        enabled = not reference and self._autocast_dtype != torch.float32
        with torch.autocast(self.device.type, self._autocast_dtype, enabled=enabled):
            return list(module(**inputs).split(lengths))

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate the gradient of this rank's share of a global sum. Every rank."""
        self._backend.backward(loss * self.world_size, is_last)

    def update(self, learning_rate: float) -> float:
        """One optimizer step; returns the norm of the gradient before clipping. Every rank."""
        self.num_updates += 1
        return self._backend.step(learning_rate)

    # --- reference -----------------------------------------------------------------------------------------------------

    def load_reference(self, path: str | Path) -> None:
        """Hold a frozen copy of another model as the reference."""
        self.reference = CompletionLogprobs(self._load(path, getattr(torch, self._model_config.dtype))).requires_grad_(False)
        self.reference.model.set_attn_implementation(self._module.model.config._attn_implementation)

    def refresh_reference(self) -> None:
        """Make the reference a copy of the policy as it is now. Every rank."""
        if self.reference is None:
            self.load_reference(self._model_config.path)  # for its shape; the weights follow
        assert self.reference is not None
        target = dict(self.reference.model.named_parameters(remove_duplicate=False))
        for name, tensor in self.named_tensors():
            target[name].data.copy_(tensor)

    # --- whole weights and checkpoints -----------------------------------------------------------------------------------

    def named_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """The whole weights under their Hugging Face names, one at a time, tied ones under each name. Every rank, to the end.

        It can be gone through more than once: vLLM's NCCL broadcast asks for the shapes first.
        """
        return _Weights(self._module.model, self._backend)

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint: Hugging Face model and tokenizer, optimizer and random state beside them. Every rank.

        Written beside its name and then renamed: under its name there is a whole checkpoint or none.
        """
        folder = Path(folder)
        part = folder.with_name(f".{folder.name}.part")
        writes = self.rank == 0
        if writes:
            shutil.rmtree(part, ignore_errors=True)
            (part / "optimizer").mkdir(parents=True)  # in a folder of its own: vLLM takes every *.safetensors beside config.json for weights
        weights = {name: tensor.cpu() if writes else None for name, tensor in self.named_tensors()}
        if writes:
            model = self._module.model
            for tied in model.all_tied_weights_keys if model.config.tie_word_embeddings else ():
                weights.pop(tied, None)
            model.save_pretrained(part, state_dict=weights)
            self._tokenizer.save_pretrained(part)
        del weights
        for i, data in enumerate(shards(self._optimizer_tensors(), torch.float32)):
            if writes:
                (part / "optimizer" / f"{i:05d}.safetensors").write_bytes(data)
        if writes:
            if self.reference is not None:
                self.reference.model.save_pretrained(part / "reference")
            (part / "state.json").write_text(json.dumps({"step": self.step, "num_updates": self.num_updates}))
            for file in part.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as written:
                        os.fsync(written.fileno())
            _remove(folder)
            part.rename(folder)
        if self.world_size > 1:
            dist.barrier()

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._module.model.named_parameters():
            for key, value in self._backend.get_state(parameter).items():
                yield f"{key}.{name}", value
        yield "torch_rng", torch.get_rng_state()

    def _resume(self) -> None:
        state = json.loads((self._path / "state.json").read_text())
        self.step, self.num_updates = state["step"], state["num_updates"]
        files = [safe_open(file, framework="pt") for file in sorted(self._path.glob("optimizer/*.safetensors"))]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict
        torch.set_rng_state(where["torch_rng"].get_tensor("torch_rng"))
        if self.num_updates:
            self._backend.init_state(self.num_updates)
        for name, parameter in self._module.model.named_parameters():
            keys = [key for key in ("exp_avg", "exp_avg_sq", "master") if f"{key}.{name}" in where]
            self._backend.set_state(parameter, {key: where[f"{key}.{name}"].get_tensor(f"{key}.{name}").to(self.device) for key in keys})
        if (self._path / "reference").is_dir():
            self.load_reference(self._path / "reference")


def latest_checkpoint(run_dir: str | Path) -> tuple[int, Path] | None:
    """Step and folder of the newest whole checkpoint of a run."""
    found = [(int(path.parent.name.removeprefix("step-")), path.parent) for path in Path(run_dir).glob("checkpoints/step-*/state.json")]
    return max(found, default=None)


def prune_checkpoints(run_dir: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted save or removal left."""
    folder = Path(run_dir) / "checkpoints"
    whole = sorted((path.parent for path in folder.glob("step-*/state.json")), key=lambda path: int(path.name.removeprefix("step-")))
    for path in {*folder.glob("step-*"), *folder.glob(".step-*.part")}.difference(whole[-keep:]):
        _remove(path)


def _remove(checkpoint: Path) -> None:
    """state.json goes first: what an interrupted removal leaves is no checkpoint."""
    (checkpoint / "state.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)

"""Policy is the model that is trained: it loads, computes log-probs and updates.

Its reference model, whole weights and checkpoints are objects in files of their own.

Each learner worker has one instance. A backend (backends/) spreads the model over the ranks; the rest of the
project uses only `Policy`. This module imports neither ray nor vllm: the caller sets up torch.distributed
(Ray Train, or a test), which one process alone does not need.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.model import ModelConfig, aux_loss_coefficient, num_experts
from gvpo_ray.groups import Row
from gvpo_ray.learner import packing
from gvpo_ray.learner.adapter import adapter_name, add_adapter, trained_parameters
from gvpo_ray.learner.backends.base import ranks
from gvpo_ray.learner.backends.registry import BACKENDS
from gvpo_ray.learner.checkpoint import Checkpoint
from gvpo_ray.learner.context import Context
from gvpo_ray.learner.families import without_dropout
from gvpo_ray.learner.logprobs import CompletionLogprobs, check_head, padded_inputs, sequence_sums
from gvpo_ray.learner.mismatch import Mismatch
from gvpo_ray.learner.reference_model import ReferenceModel
from gvpo_ray.learner.routing import Load, Routers
from gvpo_ray.learner.whole_weights import WholeWeights


class Policy:
    """A Policy is one rank's part of the model that is trained.

    Methods that say "every rank" are collectives, and so is making a Policy.

    Args:
        model: the config section `model`.
        config: the config section `learner`.
        path: a Hugging Face folder; with `state.json` in it a checkpoint.
        device: this rank's device.
        resumes: whether training goes on from a checkpoint. A run that begins with that of another run takes
            its weights alone.

    Raises:
        RuntimeError: the backend has rounded the frequencies of rotary embeddings.
        TypeError, ValueError: the model's output head is not one that can be fused (see `logprobs`).
    """

    def __init__(
        self,
        model: ModelConfig,
        config: LearnerConfig,
        path: str | Path,
        device: torch.device | str = "cpu",
        resumes: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.rank = ranks()[0]
        self._model_config = model
        folder = Path(path)  # read only here: a checkpoint is removed when there are newer ones
        self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
        dtype = getattr(torch, model.dtype)
        self._backend = BACKENDS[config.backend](config, dtype, self.device)
        parts = config.context_parallel_size
        self.data_rank, self.data_size = self._backend.data_rank // parts, self._backend.data_size // parts
        """The share of the groups that this rank computes, and the number of shares."""
        self.num_copies = ranks()[1] // self.data_size
        """The number of ranks that compute the same share together, and follow each other."""
        self.num_parts = parts
        """The number of them that have a part of each packed sequence alone."""
        self._context = Context(parts, self.num_copies // parts) if parts > 1 else None
        self._dtype = self._backend.dtype
        whole: Any = self._backend.load(lambda: self._load(path if model.lora is None else model.path))
        self.adapter: dict[str, Any] | None = None
        """The contents of adapter_config.json, where a LoRA adapter is trained; else None."""
        if model.lora is not None:
            self.adapter = add_adapter(whole, model.lora) | {"base_model_name_or_path": str(model.path)}
            if resumes and (folder / "adapter").is_dir():
                values = load_file(folder / "adapter" / "adapter_model.safetensors")
                for name, parameter in trained_parameters(whole):
                    parameter.data.copy_(values[adapter_name(name)])
        self.aux_loss_coefficient = aux_loss_coefficient(whole.config) if model.router_aux_loss else 0.0
        """The factor of the auxiliary loss; 0: there is none."""
        has_routers = num_experts(whole.config) and (model.router_replay or self.aux_loss_coefficient)
        self.routers = Routers(whole, model.router_replay, self._context) if has_routers else None
        """The routers of a mixture of experts that replays, or has an auxiliary loss; else None."""
        self._module = CompletionLogprobs(whole)
        if recomputes_activations(config, self.device):
            self._module.checkpoint_activations()
        self._backend.wrap(self._module)
        for name, buffer in self._module.named_buffers():
            if name.endswith("inv_freq") and buffer.itemsize < 4:
                raise RuntimeError(f"{name} is in {buffer.dtype}: rotary frequencies need float32")
        text = self._module.model.config.get_text_config()
        self.vocab_size: int = text.vocab_size
        self.max_length: int = model.max_length or text.max_position_embeddings
        self._weights = WholeWeights(self._module, self._backend, self.adapter)
        self.reference = ReferenceModel(
            self._module, self._backend, self._load, self.device, self.adapter is not None
        )
        self._checkpoint = Checkpoint(self._weights, self.reference, self.rank, self.device, dtype)
        self.packs = self._flex = False
        self._fallbacks: list[str] = []
        self._recomputes = recomputes_activations(config, self.device)
        self._check_head()
        self.packs = config.packing and self._can_pack()
        if self._context is not None and not self.packs:
            raise ConfigError(
                f"learner.context_parallel_size: {path} cannot be split: "
                + ("; ".join(self._fallbacks) or "learner.packing is false")
            )
        self.step = self.num_updates = self.num_skipped = 0
        self.beta: float | None = None
        """The beta of the next step, where beta is adaptive; None before the first step."""
        self.mismatch = Mismatch()
        """How far engines' log-probs were from the learner's for the same weights, in all steps so far."""
        if resumes and (folder / "state.json").exists():
            state = self._checkpoint.read(folder)
            self.step, self.num_updates, self.beta = state["step"], state["num_updates"], state["beta"]
            self.mismatch = Mismatch(**state.get("mismatch", {}))  # 0.2 and older have none

    def _load(self, path: str | Path) -> Any:
        trust = self._model_config.trust_remote_code
        config = without_dropout(AutoConfig.from_pretrained(path, trust_remote_code=trust))
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=self._dtype, trust_remote_code=trust, **self._backend.reading(config)
        )
        if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
            model.set_attn_implementation("eager")  # other implementations silently leave it out
        return model.eval()

    @torch.no_grad()
    def _check_head(self) -> None:
        """Compare the fused head's log-probs of a few tokens with those of the model's logits. Every rank."""
        ids = [i % self.vocab_size for i in range(7, 23)]
        inputs, _ = padded_inputs([{"prompt_ids": ids[:4], "completion_ids": [ids[4:]]}], self.device)
        by_model = self._backend.forward({**inputs, "by_model": True}, True)
        ours = self._backend.forward(inputs, True)
        check_head(by_model, ours, self._module.model.config, self._model_config.dtype == "bfloat16")

    def _can_pack(self) -> bool:
        """Try with one group whether packed log-probs are those of padded sequences. Every rank.

        The model's attention is afterwards the one that the answer asks for.
        """
        # With 192 tokens the packed group has over 256; below 128, GPUs run another kernel.
        model, longest = self._module.model, min(192, self.max_length)
        ids = [i % self.vocab_size for i in range(7, 7 + 2 * longest)]
        start, middle = longest // 4, longest // 4 + 1
        completions = [ids[start:longest], ids[:1], ids[middle : longest + 1]]
        rows = [{"prompt_ids": ids[:start], "completion_ids": completions}]
        is_half = self._model_config.dtype == "bfloat16"
        usual = model.config._attn_implementation
        padded = torch.cat(self.token_logprobs(rows))
        for flex in (True, False) if self.device.type == "cuda" else (False,):
            self._flex = flex
            try:
                if flex:
                    packing.check_kernel(
                        model.config, rows, self.device, torch.bfloat16 if is_half else torch.float32
                    )
                model.set_attn_implementation(packing.NAME)
                self.packs = True
                error = (torch.cat(self.token_logprobs(rows)) - padded).double()
                # In bfloat16 the largest of many differences is rounding: one ulp of a logit near 20 is 1/8.
                difference = float(error.square().mean().sqrt() if is_half else error.abs().max())
                why = f"its log-probs differ by {difference:.2g} nats"
                if difference < (0.1 if is_half else 1e-3):
                    return True
            except (AttributeError, TypeError, ValueError, RuntimeError) as failure:
                why = str(failure).splitlines()[0]
            how = "FlexAttention cannot run it packed by groups" if flex else "it cannot be packed by groups"
            self._fallbacks.append(f"{how} ({why})")
        self.packs = False
        model.set_attn_implementation(usual)
        return False

    @property
    def computes(self) -> str:
        """Return a line that says how this policy computes, and what a fallback costs."""
        if self.packs and self._flex:
            layout = "groups packed, a prompt once each; FlexAttention"
        elif self.packs:
            layout = "groups packed, a prompt once each; attention in padded blocks"
        else:
            layout = "completions padded; the model's own attention"
        if self._context is not None:
            layout += f"; each sequence split over {self._context.size} workers"
        why = "; ".join(self._fallbacks)
        if why:
            cost = (
                "attention needs memory for prompt x completion scores"
                if self.packs
                else "a prompt is computed again for each completion, and padding too"
            )
            layout += f", because {why}: {cost}"
        if num_experts(self._module.model.config):
            replays = self.routers is not None and self.routers.replays
            chosen = "the engine, where it has said so" if replays else "the learner"
            aux = f"with {self.aux_loss_coefficient:g} x the" if self.aux_loss_coefficient else "without an"
            layout += f"; experts chosen by {chosen}, {aux} auxiliary loss"
        activations = "recomputed" if self._recomputes else "kept"
        return f"{layout}; fused head, float32 log-probs; activations {activations} for the backward pass"

    # --- forward and update ---------------------------------------------------------------------------------

    def lay_out(
        self, rows: Sequence[Row], loads: bool = False, counts: bool = False
    ) -> tuple[dict[str, Any], list[int]]:
        """Return the module's inputs for the groups of a pass, and the trained tokens of each completion.

        Args:
            rows: the groups.
            loads: whether the routers fill a Load, `load` of the inputs.
            counts: whether that counts how often each expert is chosen.
        """
        if self.packs:
            inputs, lengths = packing.pack(rows, self.device, self._flex, self._context)
        else:
            inputs, lengths = padded_inputs(rows, self.device)
        if self.routers and (experts := self.routers.experts(rows, inputs, self.packs)) is not None:
            inputs["experts"] = experts
        if self.routers and loads:
            inputs["load"] = self.routers.load(rows, inputs, self.packs, counts)
        return inputs, lengths

    @torch.no_grad()
    def loads(self, rows: Sequence[Row]) -> Load:
        """Return what the routers say of a pass, with how often each expert is chosen. Every rank."""
        laid_out = self.lay_out(rows, loads=True, counts=True)
        self.forward(laid_out)
        load: Load = laid_out[0]["load"]
        return load

    def forward(self, laid_out: tuple[dict[str, Any], list[int]], is_last: bool = True) -> Tensor:
        """Return the log-probs of all completions' trained tokens, [T], with gradients. Every rank.

        They are in float32, or float64 for a float64 model.

        Args:
            laid_out: what `lay_out` returned.
            is_last: whether this is the update's last pass.
        """
        return self._backend.forward(laid_out[0], is_last)

    def logprobs(self, rows: Sequence[Row], is_last: bool = True) -> Tensor:
        """Return sequence log-probs with gradients, float64 [completions of all rows]. Every rank."""
        laid_out = self.lay_out(rows)
        return sequence_sums(self.forward(laid_out, is_last), laid_out[1])

    @torch.no_grad()
    def token_logprobs(self, rows: Sequence[Row], reference: bool = False) -> list[Tensor]:
        """Return each completion's token log-probs, [its trained tokens], without gradients. Every rank.

        They are the policy's, or with `reference` the reference model's.
        """
        laid_out = self.lay_out(rows)
        with self.reference.computes() if reference else contextlib.nullcontext():
            tokens = self.forward(laid_out)
        return list(tokens.split(laid_out[1]))  # type: ignore[no-untyped-call]

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate the gradient of this rank's share of a global sum. Every rank.

        Args:
            loss: a scalar; the ranks' losses add up to the update's loss.
            is_last: whether this is the update's last pass.
        """
        # ranks of a context have a part of the gradient each, and backends take the mean over them too
        self._backend.backward(loss * self._backend.data_size, is_last)

    def update(self, learning_rate: float) -> float:
        """Make one optimizer update and return the gradient's norm before clipping. Every rank.

        Where that norm is not finite, the gradient is dropped and no parameter changes; `num_skipped` counts
        such updates in a row.
        """
        norm = self._backend.step(learning_rate)
        if norm < float("inf"):
            self.num_updates += 1
            self.num_skipped = 0
        else:
            self.num_skipped += 1
        return norm

    # --- whole weights and checkpoints ----------------------------------------------------------------------

    def named_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Return what engines need of the current weights, gathered one tensor at a time.

        That is all weights under their Hugging Face names, tied ones under each of their names; or where a
        LoRA adapter is trained its weights alone, under peft's names. Every rank has to iterate to the end,
        and may do so more than once.
        """
        return self._weights

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint (see checkpoint.py). Every rank."""
        self.begin_saving(folder)
        self.finish_saving()

    def begin_saving(self, folder: str | Path, written: Callable[[], None] = lambda: None) -> None:
        """Copy a checkpoint to the host, and let a thread write it. Every rank.

        A checkpoint that is still being written is waited for.

        Args:
            folder: the checkpoint.
            written: called on rank 0, by the thread, once it is on the disk.
        """
        state = {
            "step": self.step,
            "num_updates": self.num_updates,
            "reference_version": self.reference.version,
            "beta": self.beta,
            "mismatch": dataclasses.asdict(self.mismatch),
        }
        self._checkpoint.begin(Path(folder), self._tokenizer, state, written)

    @property
    def saving(self) -> Future[None] | None:
        """The end of the checkpoint that a thread writes; None: there is none."""
        return self._checkpoint.writing

    def wait_for_saving(self, limit_s: float) -> None:
        """Wait for the checkpoint, written or failed, at most `limit_s` seconds: a rank may be gone."""
        if self.saving is not None:
            wait([self.saving], limit_s)

    def finish_saving(self) -> None:
        """Wait until the checkpoint is on the disk, and raise the error that this failed with. Every rank."""
        self._checkpoint.finish()


def recomputes_activations(config: LearnerConfig, device: torch.device) -> bool:
    """Return whether activations are computed again in the backward pass; by default they are on GPUs."""
    given = config.gradient_checkpointing
    return device.type == "cuda" if given is None else given

"""Policy is the model that is trained: it loads, computes log-probs, updates, and saves checkpoints.

Each learner worker has one instance. A backend (backends/) spreads the model over the ranks; the rest of the
project uses only `Policy`. This module imports neither ray nor vllm: the caller sets up torch.distributed
(Ray Train, or a test), which one process alone does not need.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.model import LoraConfig, ModelConfig
from gvpo_ray.files import part_of
from gvpo_ray.groups import Row
from gvpo_ray.learner import packing
from gvpo_ray.learner.backends.registry import make_backend
from gvpo_ray.learner.checkpoints import finish_checkpoint
from gvpo_ray.learner.families import without_dropout
from gvpo_ray.learner.logprobs import CompletionLogprobs, check_head, padded_inputs, sequence_sums
from gvpo_ray.weights.lora import merged
from gvpo_ray.weights.transfer import shards


def add_adapter(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """Put a LoRA adapter (Hu et al. 2021, arXiv 2106.09685) into the model, which still computes the same.

    Returns:
        The contents of peft's adapter_config.json.
    """
    import peft

    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it by r and needs no whole number
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same adapter on every rank and in every start of a run
        peft.inject_adapter_in_model(lora, model)
    layers = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    known: dict[str, Any] = lora.to_dict()  # type: ignore[no-untyped-call]
    return {**known, "peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": sorted(layers)}


class _Tensors:
    """This iterable gathers named tensors one at a time, each time that it is iterated over."""

    def __init__(self, gather: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        self._gather = gather

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._gather()


class Policy:
    """A Policy is one rank's part of the model that is trained.

    Methods that say "every rank" are collectives, and so is making a Policy.

    Args:
        model: the config section `model`.
        config: the config section `learner`.
        path: a Hugging Face folder; with `state.json` in it a checkpoint, from which training resumes.
        device: this rank's device.

    Raises:
        RuntimeError: the backend has rounded the frequencies of rotary embeddings.
        TypeError, ValueError: the model's output head is not one that can be fused (see `logprobs`).
    """

    def __init__(
        self, model: ModelConfig, config: LearnerConfig, path: str | Path, device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._model_config = model
        self._path = Path(path)  # read only here: a checkpoint is removed when there are newer ones
        self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
        dtype = getattr(torch, model.dtype)
        self._backend = make_backend(config, dtype, self.device)
        self.data_rank, self.data_size = self._backend.data_rank, self._backend.data_size
        """The share of the groups that this rank computes, and the number of shares."""
        self._dtype = self._backend.dtype
        whole: Any = self._backend.load(lambda: self._load(path if model.lora is None else model.path))
        self.adapter: dict[str, Any] | None = None
        """The contents of adapter_config.json, where a LoRA adapter is trained; else None."""
        if model.lora is not None:
            self.adapter = add_adapter(whole, model.lora) | {"base_model_name_or_path": str(model.path)}
            if (self._path / "adapter").is_dir():
                values = load_file(self._path / "adapter" / "adapter_model.safetensors")
                for name, parameter in _trained(whole):
                    parameter.data.copy_(values[_adapter_name(name)])
        self._module = CompletionLogprobs(whole)
        if config.gradient_checkpointing:
            self._module.model.gradient_checkpointing_enable({"use_reentrant": False})
            # Layers recompute only in training mode; in other modules that mode would switch dropout on.
            for module in self._module.modules():
                module.training = getattr(module, "gradient_checkpointing", False)
        self._backend.wrap(self._module)
        for name, buffer in self._module.named_buffers():
            if name.endswith("inv_freq") and buffer.itemsize < 4:
                raise RuntimeError(f"{name} is in {buffer.dtype}: rotary frequencies need float32")
        text = self._module.model.config.get_text_config()
        self.vocab_size: int = text.vocab_size
        self.max_length: int = model.max_length or text.max_position_embeddings
        self._reference: list[Tensor] | Literal["without adapter"] | None = None
        self._keep_reference = False
        self.reference_version = 0
        """The step whose weights the reference has; 0: the initial ones."""
        self.packs = self._flex = False
        self._check_head()
        self.packs = config.packing and self._can_pack()
        self.step = self.num_updates = self.num_skipped = 0
        self.beta: float | None = None
        """The beta of the next step, where beta is adaptive; None before the first step."""
        if (self._path / "state.json").exists():
            self._resume()

    def _load(self, path: str | Path) -> Any:
        trust = self._model_config.trust_remote_code
        config = without_dropout(AutoConfig.from_pretrained(path, trust_remote_code=trust))
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=self._dtype, trust_remote_code=trust
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
        rows = [
            {
                "prompt_ids": ids[:start],
                "completion_ids": [ids[start:longest], ids[:1], ids[middle : longest + 1]],
            }
        ]
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
            then = "padded blocks do" if flex else "its sequences are padded"
            logging.getLogger(__name__).warning("%s: %s (%s): %s", type(model).__name__, how, why, then)
        self.packs = False
        model.set_attn_implementation(usual)
        return False

    # --- forward and update ---------------------------------------------------------------------------------

    def forward(self, rows: Sequence[Row], is_last: bool = True) -> tuple[Tensor, list[int]]:
        """Return the log-probs of all completions' trained tokens, [T], with gradients. Every rank.

        Args:
            rows: the groups of this pass.
            is_last: whether this is the update's last pass.

        Returns:
            The log-probs in float32 (float64 for a float64 model), and the number of trained tokens of each
            completion.
        """
        inputs, lengths = (
            packing.pack(rows, self.device, self._flex) if self.packs else padded_inputs(rows, self.device)
        )
        return self._backend.forward(inputs, is_last), lengths

    def logprobs(self, rows: Sequence[Row], is_last: bool = True) -> Tensor:
        """Return sequence log-probs with gradients, float64 [completions of all rows]. Every rank."""
        return sequence_sums(*self.forward(rows, is_last))

    @torch.no_grad()
    def token_logprobs(self, rows: Sequence[Row], reference: bool = False) -> list[Tensor]:
        """Return each completion's token log-probs, [its trained tokens], without gradients. Every rank.

        They are the policy's, or with `reference` the reference model's.
        """
        with self._as_reference() if reference else contextlib.nullcontext():
            tokens, lengths = self.forward(rows)
        return list(tokens.split(lengths))  # type: ignore[no-untyped-call]

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate the gradient of this rank's share of a global sum. Every rank.

        Args:
            loss: a scalar; the ranks' losses add up to the update's loss.
            is_last: whether this is the update's last pass.
        """
        self._backend.backward(loss * self.data_size, is_last)

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

    # --- reference ------------------------------------------------------------------------------------------

    # A reference model is a copy of each rank's part of the trained parameters, which is swapped with them
    # for a pass. So it is sharded as they are, computes as they do (a log-ratio of 0 is exactly 0), and needs
    # no second module.

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference model."""
        return self._reference is not None

    def load_reference(self, path: str | Path) -> None:
        """Take the model in a folder as the reference model. Every rank.

        Where a LoRA adapter is trained, the reference is the base model instead, and `path` is not read.
        """
        if self.adapter is not None:
            self._reference = "without adapter"
            return
        self._fill_reference(dict(self._load(path).named_parameters()))

    def refresh_reference(self) -> None:
        """Make the reference model a copy of the current policy. Every rank."""
        self._reference = [part.clone() for part in self._parts()]
        self._keep_reference, self.reference_version = True, self.step

    @torch.no_grad()
    def _fill_reference(self, values: Mapping[str, Tensor]) -> None:
        self._reference = [part.clone() for part in self._parts()]
        for name, parameter in _trained(self._module.model):
            self._backend.fill(parameter, values[name].to(self.device))
        self._swap_reference()

    def _parts(self) -> list[Tensor]:
        return [
            part for _, parameter in _trained(self._module.model) for part in self._backend.local(parameter)
        ]

    @torch.no_grad()
    def _swap_reference(self) -> None:
        assert isinstance(self._reference, list)
        for part, other in zip(self._parts(), self._reference, strict=True):
            kept = part.clone()
            part.copy_(other)
            other.copy_(kept)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Let the module compute as the reference model within this context.

        Raises:
            RuntimeError: there is no reference model.
        """
        if self._reference is None:
            raise RuntimeError("the policy has no reference")
        if self._reference == "without adapter":
            self._switch_adapter(False)
        else:
            self._swap_reference()
        try:
            yield
        finally:
            if self._reference == "without adapter":
                self._switch_adapter(True)
            else:
                self._swap_reference()

    def _switch_adapter(self, on: bool) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self._module.modules():
            if isinstance(module, BaseTunerLayer):
                module._disable_adapters = not on  # enable_adapters() would also change what is trained

    # --- whole weights and checkpoints ----------------------------------------------------------------------

    def named_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Return what engines need of the current weights, gathered one tensor at a time.

        That is all weights under their Hugging Face names, tied ones under each of their names; or where a
        LoRA adapter is trained its weights alone, under peft's names. Every rank has to iterate to the end.
        The result can be iterated over more than once: vLLM's NCCL broadcast asks for the shapes first.
        """
        return _Tensors(self._model_tensors if self.adapter is None else self._adapter_tensors)

    def _adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in _trained(self._module.model):
            yield _adapter_name(name), self._backend.full(parameter)

    def _model_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Gather the whole model, with the adapter merged into it, under Hugging Face names."""
        config = self.adapter or {}
        adapters = dict(_trained(self._module.model)) if self.adapter is not None else {}
        for name, parameter in self._module.model.named_parameters(remove_duplicate=False):
            if name in adapters:
                continue
            value = self._backend.full(parameter)
            layer, is_adapted, _ = name.partition(".base_layer.")
            if is_adapted and name.endswith(".weight"):
                a, b = (self._backend.full(adapters[f"{layer}.lora_{x}.default.weight"]) for x in "AB")
                value = merged(value, a, b, config["lora_alpha"] / config["r"]).to(value.dtype)
            yield name.replace(".base_layer.", "."), value

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint: a Hugging Face model with tokenizer, optimizer and random state. Every rank.

        It is written under another name and then renamed, so that under its name there is a complete
        checkpoint or none. Beside the model's files it has `state.json` (step, updates, beta), `optimizer/`,
        and where there are such `adapter/` and `reference/`.
        """
        folder = Path(folder)
        part = part_of(folder)
        writes = self.rank == 0
        if writes:
            shutil.rmtree(part, ignore_errors=True)
            # In a folder of its own, because vLLM reads every *.safetensors beside config.json as weights.
            (part / "optimizer").mkdir(parents=True)
        self._save_model(part)
        self._save_adapter(part / "adapter")
        if self._keep_reference:
            with self._as_reference():
                self._save_model(part / "reference") if self.adapter is None else self._save_adapter(
                    part / "reference"
                )
        for i, data in enumerate(shards(self._optimizer_tensors(), torch.float32)):
            if writes:
                (part / "optimizer" / f"{i:05d}.safetensors").write_bytes(data)
        if writes:
            self._tokenizer.save_pretrained(part)
            state = {
                "step": self.step,
                "num_updates": self.num_updates,
                "reference_version": self.reference_version,
                "beta": self.beta,
            }
            (part / "state.json").write_text(json.dumps(state), encoding="utf-8")
            finish_checkpoint(part, folder)
        if dist.is_initialized():
            dist.barrier()

    def _save_model(self, folder: Path) -> None:
        weights = {name: tensor.cpu() if self.rank == 0 else None for name, tensor in self._model_tensors()}
        if self.rank == 0:
            model = self._module.model
            for tied in model.all_tied_weights_keys if model.config.tie_word_embeddings else ():
                weights.pop(tied, None)
            model.save_pretrained(folder, state_dict=weights)

    def _save_adapter(self, folder: Path) -> None:
        """Write the adapter, where there is one, in peft's format."""
        if self.adapter is None:
            return
        weights = {name: tensor.cpu().contiguous() for name, tensor in self._adapter_tensors()}
        if self.rank == 0:
            folder.mkdir()
            save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            (folder / "adapter_config.json").write_text(
                json.dumps(self.adapter, indent=2, default=list), encoding="utf-8"
            )

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in _trained(self._module.model):
            for key, value in self._backend.get_state(parameter).items():
                yield f"{key}.{name}", value
        yield "torch_rng", torch.get_rng_state()

    @torch.no_grad()
    def _resume(self) -> None:
        state = json.loads((self._path / "state.json").read_text(encoding="utf-8"))
        self.step, self.num_updates, self.reference_version = (
            state["step"],
            state["num_updates"],
            state["reference_version"],
        )
        self.beta = state["beta"]
        files: list[Any] = [
            safe_open(file, framework="pt") for file in sorted(self._path.glob("optimizer/*.safetensors"))
        ]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict
        if self.num_updates:
            self._backend.init_state(self.num_updates)
        for name, parameter in _trained(self._module.model):
            keys = [key for key in ("exp_avg", "exp_avg_sq", "master") if f"{key}.{name}" in where]
            self._backend.set_state(
                parameter,
                {key: where[f"{key}.{name}"].get_tensor(f"{key}.{name}").to(self.device) for key in keys},
            )
        if (self._path / "reference").is_dir():
            if self.adapter is None:
                self.load_reference(self._path / "reference")
            else:
                values = load_file(self._path / "reference" / "adapter_model.safetensors")
                self._fill_reference(
                    {name: values[_adapter_name(name)] for name, _ in _trained(self._module.model)}
                )
            self._keep_reference = True
        torch.set_rng_state(where["torch_rng"].get_tensor("torch_rng"))


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Return the parameters that the optimizer updates: all of the model's, or the adapter's."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _adapter_name(name: str) -> str:
    """Return the name that peft's files give a parameter of an adapter."""
    return "base_model.model." + name.replace(".default.", ".")

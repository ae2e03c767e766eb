"""A Checkpoint writes and reads the folder from which training resumes as if it had not ended.

It is a Hugging Face model with its tokenizer, and beside that `state.json` (step, updates, beta),
`optimizer/` with the random state in it, and where there are such `adapter/` and `reference/`. checkpoints.py
finds and removes the checkpoints of a run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gvpo_ray.files import part_of
from gvpo_ray.learner.adapter import adapter_name, trained_parameters
from gvpo_ray.learner.checkpoints import finish_checkpoint
from gvpo_ray.learner.reference_model import ReferenceModel
from gvpo_ray.learner.whole_weights import WholeWeights
from gvpo_ray.weights.transfer import shards


class Checkpoint:
    """A Checkpoint has access to all that is saved of a policy; its methods are for every rank.

    Args:
        weights: the policy's.
        reference: the policy's.
        rank: rank 0 writes.
    """

    def __init__(self, weights: WholeWeights, reference: ReferenceModel, rank: int) -> None:
        self._weights, self._reference, self._rank = weights, reference, rank
        self._module, self._backend, self._adapter = weights.module, weights.backend, weights.adapter

    def write(self, folder: Path, tokenizer: Any, state: dict[str, Any]) -> None:
        """Write a checkpoint.

        It is written under another name and then renamed, so that under its name there is a complete
        checkpoint or none.

        Args:
            folder: the checkpoint.
            tokenizer: the model's.
            state: numbers that `read` returns again.
        """
        part = part_of(folder)
        writes = self._rank == 0
        if writes:
            shutil.rmtree(part, ignore_errors=True)
            # In a folder of its own, because vLLM reads every *.safetensors beside config.json as weights.
            (part / "optimizer").mkdir(parents=True)
        self._write_model(part)
        if self._adapter is not None:
            self._write_adapter(part / "adapter")
        if self._reference.is_copy:
            with self._reference.computes():
                write = self._write_model if self._adapter is None else self._write_adapter
                write(part / "reference")
        for i, data in enumerate(shards(self._optimizer_tensors(), torch.float32)):
            if writes:
                (part / "optimizer" / f"{i:05d}.safetensors").write_bytes(data)
        if writes:
            tokenizer.save_pretrained(part)
            (part / "state.json").write_text(json.dumps(state), encoding="utf-8")
            finish_checkpoint(part, folder)
        if dist.is_initialized():
            dist.barrier()

    def _write_model(self, folder: Path) -> None:
        named = self._weights.of_model()
        weights = {name: tensor.cpu() if self._rank == 0 else None for name, tensor in named}
        if self._rank == 0:
            model = self._module.model
            for tied in model.all_tied_weights_keys if model.config.tie_word_embeddings else ():
                weights.pop(tied, None)
            model.save_pretrained(folder, state_dict=weights)

    def _write_adapter(self, folder: Path) -> None:
        """Write the adapter in peft's format."""
        weights = {name: tensor.cpu().contiguous() for name, tensor in self._weights.of_adapter()}
        if self._rank == 0:
            folder.mkdir()
            save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            (folder / "adapter_config.json").write_text(
                json.dumps(self._adapter, indent=2, default=list), encoding="utf-8"
            )

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in trained_parameters(self._module.model):
            for key, value in self._backend.get_state(parameter).items():
                yield f"{key}.{name}", value
        yield "torch_rng", torch.get_rng_state()

    @torch.no_grad()
    def read(self, folder: Path, device: torch.device) -> dict[str, Any]:
        """Restore the optimizer, the reference model and the random state; return the state of `write`.

        The model itself, and its adapter, are read when the policy is made.

        Args:
            folder: the checkpoint.
            device: this rank's.
        """
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files: list[Any] = [
            safe_open(file, framework="pt") for file in sorted(folder.glob("optimizer/*.safetensors"))
        ]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict
        if state["num_updates"]:
            self._backend.init_state(state["num_updates"])
        for name, parameter in trained_parameters(self._module.model):
            keys = [key for key in ("exp_avg", "exp_avg_sq", "master") if f"{key}.{name}" in where]
            self._backend.set_state(
                parameter,
                {key: where[f"{key}.{name}"].get_tensor(f"{key}.{name}").to(device) for key in keys},
            )
        if (folder / "reference").is_dir():
            if self._adapter is None:
                self._reference.load(folder / "reference")
            else:
                values = load_file(folder / "reference" / "adapter_model.safetensors")
                names = [name for name, _ in trained_parameters(self._module.model)]
                self._reference.fill({name: values[adapter_name(name)] for name in names})
            self._reference.is_copy, self._reference.version = True, state["reference_version"]
        torch.set_rng_state(where["torch_rng"].get_tensor("torch_rng"))
        return state

"""The engine's end of the `objects` transport runs inside vLLM's own processes.

vLLM imports this module through its `worker_extension_cls` argument, before it loads the model; importing it
registers the transport. Nothing else imports this module, because it needs vLLM, and transfer.py, which the
learner imports, must not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file
from vllm.config import LoadConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from gvpo_ray.weights.transfer import NamedTensors, merge
from gvpo_ray.weights.vllm_experts import ChosenExperts


@dataclass
class ObjectsInitInfo(WeightTransferInitInfo):
    """ObjectsInitInfo is empty: both ends of `objects` need nothing from each other beforehand."""


@dataclass
class ObjectsUpdateInfo(WeightTransferUpdateInfo):
    """ObjectsUpdateInfo names the files, in this node's shared memory, of one version of the weights."""

    paths: list[str]
    """The safetensors files of all weights, or of a LoRA adapter alone."""
    adapter_scale: float | None = None
    """alpha / rank of the adapter; None: the files hold all weights."""


class ObjectsWeightTransferEngine(WeightTransferEngine[ObjectsInitInfo, ObjectsUpdateInfo]):
    """This engine loads weights from safetensors files with vLLM's layerwise reload.

    A plain load would fail, because layers re-pack their weights after they are loaded.
    """

    init_info_cls = ObjectsInitInfo
    update_info_cls = ObjectsUpdateInfo
    _bias: torch.Tensor | None = None
    """The bias of the head, where vLLM registers it only when it is loaded (Phi)."""

    def init_transfer_engine(self, init_info: ObjectsInitInfo) -> None:
        """Do nothing: there is no connection to set up."""

    def start_weight_update(self) -> None:
        """Prepare the layers to be loaded again."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ObjectsUpdateInfo) -> None:
        """Load all weights, or the base model with the adapter merged into it.

        Raises:
            ValueError: the adapter does not fit the model.
        """
        dtype: Any = self.model_config.dtype  # resolved by now
        if update_info.adapter_scale is not None:
            adapter = {name: tensor for path in update_info.paths for name, tensor in load_file(path).items()}
            with torch.no_grad():
                self._load(merge(self._base(), adapter, update_info.adapter_scale, dtype, self.device))
            return
        # Families that are always tied (Gemma 2, Cohere) have no head of their own in vLLM, which reads the
        # embeddings instead; it would refuse a head that the learner sends beside them.
        has_head = any(name.endswith("lm_head") for name, _ in self.model.named_modules())
        for path in update_info.paths:
            with safe_open(path, framework="pt", device="cpu") as file, torch.no_grad():
                names: list[str] = file.keys()
                sent = (name for name in names if has_head or not name.startswith("lm_head."))
                self._load((name, file.get_tensor(name)) for name in sent)

    def _load(self, tensors: NamedTensors) -> None:
        """Load tensors, but a bias of the head that vLLM registers only when it comes (Phi): it is kept."""
        model: Any = self.model  # vLLM's models have load_weights, torch's Module does not
        comes_late = not getattr(getattr(model, "lm_head", None), "has_bias", True)

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                if comes_late and name == "lm_head.bias":
                    self._bias = tensor
                else:
                    yield name, tensor

        model.load_weights(others())

    def _base(self) -> NamedTensors:
        """Read the base model's tensors from disk, mostly from the page cache.

        vLLM's own weights cannot be used, because the last adapter is merged into them.
        """
        load, config = self.vllm_config.load_config, copy.copy(self.model_config)
        if not Path(config.model).is_dir():  # vLLM has downloaded it: an update must not need the network
            config.model = snapshot_download(
                config.model, revision=config.revision, cache_dir=load.download_dir, local_files_only=True
            )
        return DefaultModelLoader(LoadConfig(use_tqdm_on_load=False)).get_all_weights(config, self.model)

    def finish_weight_update(self) -> None:
        """Let the layers re-pack what was loaded."""
        finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[no-untyped-call]
        if self._bias is not None:
            # The reload puts the head back as it was when the update began: without a bias that was
            # registered meanwhile.
            head: Any = self.model.lm_head
            with self.device, torch.no_grad():
                if getattr(head, "bias", None) is None:
                    head._register_bias()
                head.bias.weight_loader(head.bias, self._bias)
            self._bias = None

    def shutdown(self) -> None:
        """Do nothing: there is no connection to close."""


WeightTransferEngineFactory.register_engine("objects", ObjectsWeightTransferEngine)

_OF_EXPERTS: Any = UnquantizedFusedMoEMethod
_set_up_kernel = _OF_EXPERTS._setup_kernel


def _set_up_kernel_again(method: Any, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
    """Put the experts' weights into their kernel's layout also when they are loaded again.

    vLLM does so on a CPU only when it loads a layer for the first time: after an update the kernel would read
    weights in another order, without an error.
    """
    is_update = method.moe_kernel is not None
    _set_up_kernel(method, layer, w13, w2)
    if is_update and method.unquantized_backend == UnquantizedMoeBackend.CPU:
        method.moe_kernel.fused_experts.process_weights_after_loading(layer)


_OF_EXPERTS._setup_kernel = _set_up_kernel_again


class WorkerExtension:
    """A WorkerExtension adds methods to vLLM's worker, which the engine calls by name."""

    model_runner: Any
    _chosen: ChosenExperts

    def keep_experts(self) -> None:
        """Keep the experts that are chosen from now on."""
        self._chosen = ChosenExperts(self.model_runner)

    def take_experts(self, request: str) -> bytes | None:
        """Return the experts of a request, once."""
        return self._chosen.take(request)

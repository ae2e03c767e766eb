"""The engine's end of the `objects` transport, inside vLLM's own processes.

vLLM imports this module through its `worker_extension_cls` argument, before it loads the model; importing it
registers the transport. Nothing else imports it: it needs vLLM, and transfer.py, which the learner imports,
must not.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

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
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from gvpo_ray.weights.transfer import NamedTensors, merge


@dataclass
class ObjectsInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class ObjectsUpdateInfo(WeightTransferUpdateInfo):
    """Paths of safetensors files in this node's shared memory: of all weights, or of a LoRA adapter's."""

    paths: list[str]
    adapter_scale: float | None = None
    """alpha / rank, where it is an adapter."""


class ObjectsWeightTransferEngine(WeightTransferEngine[ObjectsInitInfo, ObjectsUpdateInfo]):
    """Loads weights from safetensors files with vLLM's layerwise reload (layers re-pack their weights, so a
    plain load fails).
    """

    init_info_cls = ObjectsInitInfo
    update_info_cls = ObjectsUpdateInfo

    def init_transfer_engine(self, init_info: ObjectsInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ObjectsUpdateInfo) -> None:
        if update_info.adapter_scale is not None:
            adapter = {name: tensor for path in update_info.paths for name, tensor in load_file(path).items()}
            with torch.no_grad():
                self.model.load_weights(
                    merge(
                        self._base(), adapter, update_info.adapter_scale, self.model_config.dtype, self.device
                    )
                )
            return
        for path in update_info.paths:
            with safe_open(path, framework="pt", device="cpu") as file, torch.no_grad():
                self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - not a dict

    def _base(self) -> NamedTensors:
        """The model that the adapter is of, read anew (from the page cache, mostly): vLLM has it no more,
        only what was merged last.
        """
        load, config = self.vllm_config.load_config, copy.copy(self.model_config)
        if not Path(config.model).is_dir():  # as it was when vLLM started: no update may need the network
            config.model = snapshot_download(
                config.model, revision=config.revision, cache_dir=load.download_dir, local_files_only=True
            )
        return DefaultModelLoader(LoadConfig(use_tqdm_on_load=False)).get_all_weights(config, self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("objects", ObjectsWeightTransferEngine)


class WorkerExtension:
    """What vLLM asks this module for; it adds nothing to the worker."""

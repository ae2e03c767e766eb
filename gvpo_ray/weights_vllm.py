"""The engine's end of the `objects` transport, inside vLLM's own processes.

vLLM imports this module through its `worker_extension_cls` argument, before it loads the model; importing it registers the
transport. Nothing else imports it: it needs vLLM, and weights.py, which the learner imports, must not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class ObjectsInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class ObjectsUpdateInfo(WeightTransferUpdateInfo):
    """Paths of safetensors files in this node's shared memory."""

    paths: list[str]


class ObjectsWeightTransferEngine(WeightTransferEngine[ObjectsInitInfo, ObjectsUpdateInfo]):
    """Loads weights from safetensors files with vLLM's layerwise reload (layers re-pack their weights, so a plain load fails)."""

    init_info_cls = ObjectsInitInfo
    update_info_cls = ObjectsUpdateInfo

    def init_transfer_engine(self, init_info: ObjectsInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ObjectsUpdateInfo) -> None:
        for path in update_info.paths:
            with safe_open(path, framework="pt", device="cpu") as file, torch.no_grad():
                self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - not a dict

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("objects", ObjectsWeightTransferEngine)


class WorkerExtension:
    """What vLLM asks this module for; it adds nothing to the worker."""

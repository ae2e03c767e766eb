"""The experts that vLLM chooses on a CPU are kept here, inside vLLM's own process, until the engine asks.

On GPUs vLLM returns them itself (`enable_return_routed_experts`). That needs Triton, which there is none of
for CPUs: vLLM would refuse to start.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from gvpo_ray.groups import experts_entry

MOST_REQUESTS = 4096
"""Requests that are kept, the newest: nobody asks for those of other callers."""


class ChosenExperts:
    """ChosenExperts are those of each token when it was first read, by request.

    Args:
        runner: vLLM's model runner, whose model's routers say what they choose from now on.
    """

    def __init__(self, runner: Any) -> None:
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        self._runner = runner
        config = runner.model_config
        self._num_experts = config.get_num_experts()
        self._shape = (config.get_total_num_hidden_layers(), config.get_num_experts_per_tok())
        self._step: dict[int, torch.Tensor] = {}
        self._kept: OrderedDict[str, list[np.ndarray]] = OrderedDict()
        for module in runner.model.modules():
            if isinstance(module, MoERunner):
                module.router.set_capture_fn(functools.partial(self._chosen, module.layer_id))
        runner.model.register_forward_hook(lambda *_: self._keep())

    def _chosen(self, layer: int, experts: torch.Tensor) -> None:
        self._step[layer] = experts.clone()

    def _keep(self) -> None:
        batch, begins = self._runner.input_batch, self._runner.query_start_loc.np
        step, self._step = self._step, {}
        for i, request in enumerate(batch.req_ids):
            first, begin, end = int(batch.num_computed_tokens_cpu[i]), int(begins[i]), int(begins[i + 1])
            new = np.zeros((end - begin, *self._shape), np.int16)
            for layer, experts in step.items():
                new[:, layer] = experts[begin:end].numpy()
            kept = self._kept.setdefault(request.rpartition("-")[0], [])  # vLLM adds a part to our names
            num = sum(map(len, kept))
            if first > num:  # found in the prefix cache
                kept.append(np.full((first - num, *self._shape), -1, np.int16))
                num = first
            kept.append(new[num - first :])
        while len(self._kept) > MOST_REQUESTS:
            self._kept.popitem(last=False)

    def take(self, request: str) -> bytes | None:
        """Return a request's entry of `routed_experts`, once; None: it is not known."""
        kept = self._kept.pop(request, None)
        return None if kept is None else experts_entry(np.concatenate(kept), self._num_experts)

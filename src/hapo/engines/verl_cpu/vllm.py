"""Weight sync of verl into vLLM on CPUs, by
`+actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=hapo.engines.verl_cpu.vllm.WorkerExtension`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


class WorkerExtension(vLLMColocateWorkerExtension):
    """verl's extension of vLLM's worker, loading the weights that it receives as vLLM loads a checkpoint.

    vLLM packs linear weights for the CPU and drops the originals, into which verl's own would load.
    """

    def update_weights_from_ipc(
        self, peft_config: dict[str, Any] | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """Receive all weights, then load them at once.

        Raises:
            ValueError: verl sends a LoRA adapter.
        """
        if peft_config:
            raise ValueError("weight sync into vLLM on CPUs has no LoRA: train all weights")
        weights: list[tuple[str, Tensor]] = []

        def keep(bucket: list[tuple[str, Tensor]], is_last: bool) -> None:
            weights.extend((name, weight.clone()) for name, weight in bucket)  # the bucket is used again

        BucketedWeightReceiver(self._get_zmq_handle(), self.device, use_shm).receive_weights(keep)
        self.reload_weights(weights_iterator=weights)

"""The rollout "transformers" of verl: one server a replica, which samples with a plain forward pass.

It applies the temperature rule of a request as vLLM does, and returns the log-probs of the distribution that
drew. The draws of a request depend on the seed, the weights' version, the prompt and how often it was asked
before, not on the order of requests or the number of ranks.
"""

from __future__ import annotations

import asyncio
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import ray
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout import base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

from ...samplers.rule import TemperatureRule, temper_

ROLLOUT = "transformers"


def server_name(replica: int) -> str:
    """The Ray actor of a replica's server."""
    return f"hapo_rollout_{replica}"


class Server:
    """A policy that answers requests one by one, on one thread."""

    def __init__(self, config: Any, model: str, eos: list[int]) -> None:
        torch.set_num_threads(1)
        self.config, self.eos = config, set(eos)
        self.net = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.float32).eval()
        self.version = 0
        self._asked: Counter[tuple[int, ...]] = Counter()
        self._busy = asyncio.Lock()

    async def set_weights(self, weights: dict[str, Tensor], version: int | None) -> None:
        """The policy from now on.

        Raises:
            RuntimeError: a weight is missing.
        """
        missing, unexpected = self.net.load_state_dict(weights, strict=False)
        if set(missing) - set(self.net._tied_weights_keys or ()) or unexpected:
            raise RuntimeError(
                f"the weights do not fit the rollout's model: {missing} missing, {unexpected} unknown"
            )
        self.net.tie_weights()
        self.version = self.version + 1 if version is None else version
        self._asked.clear()

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **others: Any
    ) -> TokenOutput:
        """Sample one response.

        Raises:
            ValueError: parameters that this rollout does not know, or a wrong temperature rule.
        """
        params = {k: v for k, v in sampling_params.items() if k != "logprobs"}
        temperature, most = params.pop("temperature", 1.0), params.pop("max_tokens", self.config.response_length)
        rule = TemperatureRule.from_args(params.pop("extra_args", None))
        neutral = {"top_p": (1.0,), "top_k": (-1, 0), "repetition_penalty": (1.0,)}
        odd = {k: v for k, v in params.items() if v not in neutral.get(k, ())}
        if odd:
            raise ValueError(f"the transformers rollout samples from the whole vocabulary and does not know {odd}")
        async with self._busy:
            key = (*prompt_ids,)
            self._asked[key] += 1
            text = f"{self.config.seed} {self.version} {self._asked[key]} {key}"
            generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
            ids, logps = self._sample(list(prompt_ids), temperature, rule, most, generator)
        return TokenOutput(
            token_ids=ids, log_probs=logps, stop_reason="completed", extra_fields={"global_steps": self.version}
        )

    @torch.no_grad()
    def _sample(
        self,
        prompt: list[int],
        t_base: float,
        rule: TemperatureRule | None,
        most: int,
        generator: torch.Generator,
    ) -> tuple[list[int], list[float]]:
        ids, logps, cache = [], [], None
        given = torch.tensor([prompt])
        for _ in range(most):
            out = self.net(input_ids=given, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1].float()
            if not t_base:
                token = int(logits.argmax())
                logp = torch.zeros(())
            else:
                if rule is not None:
                    temper_(logits, rule, torch.full((1,), t_base), None)
                scores = (logits / t_base).log_softmax(-1)[0]
                token = int(torch.multinomial(scores.exp(), 1, generator=generator))
                logp = scores[token]
            ids.append(token)
            logps.append(float(logp))
            if token in self.eos:
                break
            given = torch.tensor([[token]])
        return ids, logps

    async def ready(self) -> None:
        """Returns when the server can answer."""

    async def nothing(self, *args: Any, **kwargs: Any) -> None:
        """Weights and cache of a CPU stay where they are."""

    wake_up = sleep = clear_kv_cache = abort_all_requests = resume_generation = nothing
    release_kv_cache = resume_kv_cache = start_profile = stop_profile = nothing


class Replica(RolloutReplica):
    """Launches the server."""

    async def launch_servers(self) -> None:
        """One, whatever the parallel sizes say."""
        hf = omega_conf_to_dataclass(self.model_config)
        tokenizer, generation = hf.tokenizer, hf.generation_config
        eos = generation.eos_token_id if generation is not None else None
        eos = tokenizer.eos_token_id if eos is None else eos
        server = ray.remote(Server).options(name=server_name(self.replica_rank), num_cpus=0, max_concurrency=1000)
        handle = server.remote(self.config, hf.local_path, eos if isinstance(eos, list) else [eos])
        await handle.ready.remote()
        self.servers, self._server_handle = [handle], handle
        self._server_address = server_name(self.replica_rank)


class TransformersRollout(BaseRollout):
    """The side of the training worker: it hands the weights over."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any) -> None:
        super().__init__(config, model_config, device_mesh)
        self.replica, self.rank = divmod(int(os.environ["RANK"]), self.config.tensor_model_parallel_size)

    async def resume(self, tags: list[str]) -> None:
        """Nothing was released."""

    async def release(self) -> None:
        """Nothing is."""

    async def update_weights(
        self, weights: Iterator[tuple[str, Tensor]], global_steps: int | None = None, **others: Any
    ) -> None:
        """All ranks gather the weights, the first of a replica sends them."""
        gathered = {name: weight.detach().cpu().clone() for name, weight in weights}
        if self.rank == 0:
            await ray.get_actor(server_name(self.replica)).set_weights.remote(gathered, global_steps)


RolloutReplicaRegistry.register(ROLLOUT, lambda: Replica)
base._ROLLOUT_REGISTRY[(ROLLOUT, "async")] = f"{__name__}.TransformersRollout"

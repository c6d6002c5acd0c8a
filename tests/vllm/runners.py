"""Both model runners' way from a request to its tempered logits, on CPU.

V1 is all vLLM's: loader, InputBatch with its BatchUpdateBuilder, sampler. V2's loader and sampler are vLLM's too;
what they keep in GPU memory (built-in sampling states, the request buffers) is replaced by what stands here. Up to
vLLM 0.30 there is no V2 that takes logits processors.
"""

import inspect
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vllm
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.sample.sampler import Sampler as SamplerV1
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from hapo.versions import one_runner

V1_ONLY = one_runner(vllm.__version__)
if not V1_ONLY:
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors
    from vllm.v1.worker.gpu.sample.sampler import Sampler as SamplerV2

CPU = torch.device("cpu")
needs_v2 = pytest.mark.skipif(V1_ONLY, reason="this vLLM keeps logits processors to Runner V1")


class RunnerV1:
    """The loader, batch and sampler of Model Runner V1."""

    def __init__(self, rows: int, vocabulary: int) -> None:
        config = SimpleNamespace(speculative_config=None, scheduler_config=SimpleNamespace(max_num_seqs=rows))
        config.parallel_config = SimpleNamespace(enable_dbo=False)
        # Asked for up to 0.31; blocks play no part here.
        more = (
            {"kernel_block_sizes": [16]}
            if "kernel_block_sizes" in inspect.signature(InputBatch).parameters
            else {}
        )
        self.batch = InputBatch(
            max_num_reqs=rows,
            max_model_len=16,
            max_num_batched_tokens=64,
            device=CPU,
            vocab_size=vocabulary,
            block_sizes=[16],
            max_num_blocks_per_req=[1],
            logitsprocs=build_logitsprocs(config, CPU, False, False),
            **more,
        )

    def step(
        self, remove: list[str], add: dict[str, SamplingParams], swap: Sequence[tuple[int, int]] = ()
    ) -> list[str]:
        """One scheduler step, as vLLM's model runner makes it; the requests of the rows."""
        for name in remove:
            self.batch.remove_request(name)
        for name, params in add.items():
            state = CachedRequestState(name, [1], [], params, None, ([0],), 0, [])
            self.batch.add_request(state)
        self.batch.condense()
        for a, b in swap:
            self.batch.swap_states(a, b)
        self.batch.refresh_metadata()
        return self.batch.req_ids

    def sample_from(self, logits: Tensor) -> Tensor:
        """Logits divided by all temperatures."""
        metadata, sampler = self.batch.sampling_metadata, SamplerV1()
        logits = sampler.apply_logits_processors(logits.to(torch.float32), metadata, False)
        if metadata.temperature is None:
            return logits
        return sampler.apply_temperature(logits, metadata.temperature, metadata.all_random)


class _SamplingStates:
    """T_base of each slot, in place of the kernels of vLLM's SamplingStates."""

    def __init__(self, slots: int) -> None:
        self.t_base = torch.ones(slots)

    def add_request(self, slot: int, params: SamplingParams) -> bool:
        self.t_base[slot] = params.temperature or 1.0
        return params.temperature not in (0.0, 1.0)

    def apply_temperature(self, logits: Tensor, row_to_slot: Tensor, _: np.ndarray) -> None:
        logits.div_(self.t_base[row_to_slot].unsqueeze(1))

    def apply_min_p(self, *_: object) -> None:
        pass


class RunnerV2:
    """The loader and sampler of Model Runner V2."""

    def __init__(self, slots: int, vocabulary: int) -> None:
        buffers = dict.fromkeys(["all_token_ids", "prompt_len", "prefill_len", "total_len"])
        states = SimpleNamespace(device=CPU, max_num_reqs=slots, vocab_size=vocabulary, **buffers)
        nothing = SimpleNamespace(add_request=lambda *_: False, apply=lambda *_: None)
        self.sampler = object.__new__(SamplerV2)
        self.sampler.sampling_states = _SamplingStates(slots)
        self.sampler.thinking_budget_state = self.sampler.logprob_token_ids_state = nothing
        self.sampler.trace_replay_state = None
        self.sampler.needs_logits_processing = np.zeros(slots, dtype=bool)
        self.sampler.logits_processors = build_custom_logits_processors(SimpleNamespace(), states, False)

    def add(self, slot: int, params: SamplingParams) -> None:
        """A request enters the batch and gets this slot."""
        self.sampler.add_request(slot, params)

    def sample_from(self, logits: Tensor, slots: list[int], rows_each: list[int] | None = None) -> Tensor:
        """Logits divided by all temperatures; `rows_each` > 1 is speculative decoding."""
        index = torch.tensor(slots)
        expanded = index if rows_each is None else index.repeat_interleave(torch.tensor(rows_each))
        unread = torch.zeros(len(expanded), dtype=torch.long)
        return self.sampler.apply_sampling_params(
            logits, expanded, index, index.numpy(), unread, unread, unread, np.array(slots), skip_top_k_top_p=True
        )

"""What engines log of their draws. As a script with Model Runner V2, by Triton's interpreter: IN.json OUT.json.

IN: name -> requests; those under "ahead" are scheduled asynchronously. OUT: name -> what `logged` gives.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    import interpreted

from vllm import LLM, SamplingParams
from vllm.platforms.cpu import CpuPlatform

from hapo.assets import tiny_model_path
from hapo.samplers.vllm import logging_draws

_checked = CpuPlatform.check_and_update_config


@classmethod
def scheduled_ahead(cls: type[CpuPlatform], config: Any) -> None:
    """In the place of `CpuPlatform.check_and_update_config`: steps begin before the last one is read, as on GPUs."""
    _checked(config)
    config.scheduler_config.async_scheduling = True


def engine(**options: Any) -> LLM:
    """The tiny model in an engine in this process."""
    return LLM(
        str(tiny_model_path()),
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=16,
        logprobs_mode="processed_logprobs",
        distributed_executor_backend="uni",
        **options,
    )


def logged(llm: LLM, requests: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Prompts, tokens and vLLM's log-probs of these requests, the log, and what it says of them."""
    params = [SamplingParams(logprobs=0, seed=seed, **p) for seed, (_, p) in enumerate(requests)]
    with logging_draws(llm) as log:
        outputs = llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
    prompts = [list(output.prompt_token_ids) for output in outputs]
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    logps = [
        [step[t].logprob for step, t in zip(output.outputs[0].logprobs, row, strict=True)]
        for output, row in zip(outputs, tokens, strict=True)
    ]
    draws = log.draws(prompts, tokens, logps)
    return {"prompts": prompts, "tokens": tokens, "logps": logps, "log": log, "draws": draws}


def main(of: dict[str, list[tuple[str, dict[str, Any]]]]) -> dict[str, Any]:
    """The same as lists, and the runner and the scheduler that it came from."""
    interpreted.without_the_kernel()
    out = {}
    for name, requests in of.items():
        CpuPlatform.check_and_update_config = scheduled_ahead if name == "ahead" else _checked
        llm = engine()
        found = logged(llm, requests)
        draws = found.pop("draws")
        del found["log"]
        runner = type(llm.llm_engine.model_executor.driver_worker.model_runner).__module__
        ahead = llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        known = draws and {"policy_logp": draws.policy_logp.tolist(), "entropy": draws.entropy.tolist()}
        out[name] = found | {"runner": runner, "ahead": ahead, "draws": known}
        llm.llm_engine.engine_core.shutdown()
    return out


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(main(json.loads(source.read_text()))))

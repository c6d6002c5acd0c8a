"""Short training runs of HAPOTrainer with vLLM on a CPU: trl_run.py RUNS.json OUT.json [v2 | URL].

The engine is in the same process, with `v2` by Model Runner V2 in Triton's interpreter; with URL it is a server's,
whose weights stay: TRL sends them by NCCL.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
warnings.filterwarnings("ignore", "TRL currently supports vLLM")

V2 = sys.argv[3:] == ["v2"]
SERVER = {"vllm_mode": "server", "vllm_server_base_url": sys.argv[3]} if sys.argv[3:] and not V2 else {}
if V2:
    import interpreted

import torch  # noqa: E402
import trl.generation.vllm_generation as backend  # noqa: E402
from datasets import Dataset  # noqa: E402

from hapo.assets import tiny_model_path  # noqa: E402
from hapo.engines.trl.scorer import Sequences  # noqa: E402
from hapo.scoring import score_tokens  # noqa: E402
from hapo.trl import HAPOConfig, HAPOTrainer  # noqa: E402

# vLLM takes float32 checkpoints down to bfloat16; what is compared here is the plumbing, so it stays.
backend.LLM = partial(backend.LLM, dtype="float32", **(interpreted.ENGINE if V2 else {}))
if V2:
    interpreted.without_the_kernel()
if SERVER:
    backend.VLLMClient.init_communicator = lambda *_, **__: None
    backend.VLLMGeneration.sync_weights = lambda _: None


def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text.rpartition(";")[2] == gold) for text, gold in zip(completions, answer, strict=True)]


def replayed_gap(trainer: HAPOTrainer) -> float:
    """Largest distance of vLLM's log-probs from those of the adaptive temperature in a pass of our own."""
    rule, stats = trainer.method.temperature_rule, trainer._sampled_with
    worst = 0.0
    for inputs in trainer._buffered_inputs:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        mask = inputs["completion_mask"].bool()
        factor = None if rule is None or stats is None else lambda entropy: rule(entropy, stats)
        with torch.no_grad():
            options = {"t_base": trainer.temperature, "factor": factor, "support": inputs.get("support")}
            scores = score_tokens(trainer.model, ids, attention, mask, **options)
        ours = scores.logp if factor is None else scores.sampler_logp
        worst = max(worst, (ours - inputs["sampling_per_token_logps"])[mask].abs().max().item())
    return worst


def old_gaps(trainer: HAPOTrainer) -> dict[str, float]:
    """Largest distance of the old policy's log-probs and entropies from those of a pass of our own."""
    gaps = {"old_gap": 0.0, "entropy_gap": 0.0}
    for inputs in trainer._buffered_inputs:
        rows = Sequences.of(inputs)
        with torch.no_grad():
            scores = score_tokens(trainer.model, *rows.columns, t_base=trainer.temperature, support=rows.support)
        of = {"old_gap": (scores.logp, "old_per_token_logps"), "entropy_gap": (scores.entropy, "old_entropies")}
        for name, (ours, theirs) in of.items():
            gaps[name] = max(gaps[name], (ours - inputs[theirs])[rows.mask].abs().max().item())
    return gaps


def main(options: dict[str, Any]) -> dict[str, Any]:
    """Log lines of the run, how far the last rollout's log-probs are from a replay, and its supports."""
    synced = options.pop("synced", None)
    pairs = [(a, b) for a in range(100, 1000, 17) for b in range(100, 1000, 19)]
    data = Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs])
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "max_steps": 6,
            "max_completion_length": 32,
            "per_device_train_batch_size": 16,
            "num_generations": 8,
            "steps_per_generation": 1,
            "num_iterations": 2,
            "temperature": 0.9,
            "logging_steps": 1,
            "lr_scheduler_type": "constant",
            "vllm_max_model_length": 64,
            "vllm_gpu_memory_utilization": 0.3,
            **SERVER,
            **options,
        }
        args = HAPOConfig(
            folder, use_cpu=True, bf16=False, use_vllm=True, report_to="none", save_strategy="no", **given
        )
        trainer = HAPOTrainer(str(tiny_model_path()), right, args=args, train_dataset=data)
        if synced is not None:
            send, times = trainer.vllm_generation.sync_weights, iter(range(synced))
            trainer.vllm_generation.sync_weights = lambda: send() if next(times, None) is not None else None
        scored: list[bool] = []
        scores, text = trainer.scorer.drawn.scores, trainer.scorer.text

        def watched(*args: Any) -> Any:
            scored.append(False)
            return scores(*args)

        def seen(*args: Any) -> Any:
            if not torch.is_grad_enabled() and scored:
                scored[-1] = True
            return text(*args)

        trainer.scorer.drawn.scores, trainer.scorer.text = watched, seen  # type: ignore[method-assign]
        trainer.train()
        if not SERVER:
            trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()  # room for the next run's
    lines = [line for line in trainer.state.log_history if "loss" in line]
    still = given.get("learning_rate") == 0.0
    replayed = {"replayed_gap": replayed_gap(trainer), **old_gaps(trainer)} if still else {"replayed_gap": None}
    supports = [x["support"].tolist() for x in trainer._buffered_inputs if "support" in x]
    return {"lines": lines, "scored": scored, "supports": supports, **replayed}


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    runs = json.loads(source.read_text())
    target.write_text(json.dumps({name: main(options) for name, options in runs.items()}))

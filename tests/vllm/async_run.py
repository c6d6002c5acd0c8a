"""AsyncHAPOTrainer with TRL's own rollout worker and a vLLM server, on a CPU: async_run.py URL RUNS.json OUT.json."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
warnings.filterwarnings("ignore", "TRL currently supports vLLM")

import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import hapo.engines.trl.asynchronous.trainer as module  # noqa: E402
from hapo.assets import tiny_model_path  # noqa: E402
from hapo.trl import AsyncHAPOConfig, AsyncHAPOTrainer, DiskWeightTransfer  # noqa: E402


def even(completions: list[Any], **_: Any) -> list[float]:
    """A reward that about half of the answers earn."""
    return [float(sum(map(ord, answer[-1]["content"])) % 2 == 0) for answer in completions]


class KeptQueue(module.SeenQueue):
    """Keeps all samples."""

    samples: list[Any]

    def get(self, timeout: float | None = None) -> Any:
        sample = super().get(timeout)
        self.samples.append(sample)
        return sample


class KeptTransfer(DiskWeightTransfer):
    """Keeps the weights of every version, from 1."""

    versions: list[dict[str, torch.Tensor]]

    def send_weights(self, iterator: Any) -> None:
        weights = {name: tensor.detach().clone() for name, tensor in iterator}
        self.versions.append(weights)
        super().send_weights(iter(weights.items()))


def distances(samples: list[Any], versions: list[dict[str, torch.Tensor]]) -> list[dict[str, float]]:
    """Of each response drawn by one version alone: how far vLLM's log-probs are from those of each version."""
    net = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    found = []
    for sample in samples:
        drawn = sample.completion_mask > 0
        (version, *others) = sorted(set(sample.versions[drawn].tolist()))
        if others or version > len(versions):
            continue
        gap = {}
        for number, weights in enumerate(versions, 1):
            net.load_state_dict(weights, strict=True)
            with torch.no_grad():
                logits = net(input_ids=torch.from_numpy(sample.input_ids)[None]).logits[0, :-1]
            ids = torch.from_numpy(sample.input_ids)[1:, None]
            logp = logits.log_softmax(-1).gather(-1, ids)[:, 0][torch.from_numpy(drawn)[1:]]
            gap[str(number)] = (logp - torch.from_numpy(sample.old_log_probs[drawn])).abs().max().item()
        found.append({"version": version, **gap})
    return found


def main(url: str, options: dict[str, Any]) -> dict[str, Any]:
    """Log lines, token records and distances of a run."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "fields": {"content": {"close_pattern": "<eos>", "content": "text"}},
    }
    prompts = [[{"role": "user", "content": f"{a}+{a + 3}="}] for a in range(10, 90)]
    KeptQueue.samples, KeptTransfer.versions = [], []
    module.SeenQueue = KeptQueue
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        args = AsyncHAPOConfig(
            str(out),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_steps=4,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            num_generations=8,
            max_completion_length=24,
            max_inflight_tasks=16,
            max_staleness=1,  # the fourth step's answers were begun after the first step
            vllm_server_base_url=url,
            heartbeat_stale_after_s=1800,
            run_records=True,
            record_tokens_every=1,
            **options,
        )
        trainer = AsyncHAPOTrainer(
            str(tiny_model_path()),
            even,
            args,
            Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            weight_transfer=KeptTransfer(url, Path(folder) / "weights", timeout=1800),
        )
        trainer.rollout_worker._child_ready_timeout = 1800  # its imports take minutes on a machine with other work
        trainer.train()
        records = pq.read_table(out / "tokens").to_pandas()
    columns = records[["step", "staleness", "logp_old", "logp_new", *({"logp_sampler"} & {*records})]]
    lines = [line for line in trainer.state.log_history if "loss" in line]
    tempered = trainer.method.temperature_rule is not None
    return {
        "lines": lines,
        "records": columns.to_dict("list"),
        "distances": [] if tempered else distances(KeptQueue.samples, KeptTransfer.versions),
        "labels": sorted({v for sample in KeptQueue.samples for v in sample.versions.tolist()}),
        "split": sum(len({*s.versions[s.completion_mask > 0].tolist()}) > 1 for s in KeptQueue.samples),
        "samples": len(KeptQueue.samples),
    }


if __name__ == "__main__":
    runs = json.loads(Path(sys.argv[2]).read_text())
    Path(sys.argv[3]).write_text(json.dumps({name: main(sys.argv[1], run) for name, run in runs.items()}))

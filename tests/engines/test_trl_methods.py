"""Methods train the demo through `hapo train`; the records of the run are enough to redo its first step."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

import hapo
from hapo.cli import main
from tests.examples import one_step

DEMO = {
    "max_steps": 4,
    "num_iterations": 2,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 16,
    "max_num_gen_batches": 1,
    "logging_steps": 1,
    "record_tokens_every": 1,
    "save_strategy": "no",
    "learning_rate": 1e-4,
    "report": False,
}
"""The demo, cut to two rollout batches of 4 x 8 answers, each used for two optimiser steps."""


def train(folder: Path, method: str, evaluate: bool = False, **options) -> list[dict]:
    """Lines of metrics.jsonl."""
    given = {**DEMO, "method": method, "output_dir": folder, **options}
    argv = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    assert main(["train", *argv, *([] if evaluate else ["--no_evaluate"])]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def recorded(folder: Path, step: int) -> hapo.TokenBatch:
    """A step's tokens as a batch; responses without tokens are not in a record."""
    table = pd.read_parquet(folder / "tokens" / f"step-{step:06d}-0.parquet")
    rows = table.response.astype("category").cat.codes.to_numpy()
    where = torch.tensor(rows).long(), torch.tensor(table.position.to_numpy())
    shape = int(where[0].max()) + 1, int(where[1].max()) + 1

    def column(name: str) -> torch.Tensor:
        return torch.zeros(shape).index_put(where, torch.tensor(table[name].to_numpy(), dtype=torch.float32))

    by_row = table.groupby("response").first()
    return hapo.TokenBatch(
        mask=torch.zeros(shape, dtype=torch.bool).index_put(where, torch.tensor(True)),
        old_logp=column("logp_old"),
        logp=column("logp_new"),
        sampler_logp=column("logp_sampler"),
        ref_logp=column("logp_ref") if "logp_ref" in table else None,
        token_reward=column("token_reward") if "token_reward" in table else None,
        old_entropy=column("entropy"),
        entropy=column("entropy_new"),
        reward=torch.tensor(by_row.reward.to_numpy(), dtype=torch.float32),
        group=torch.tensor(by_row.group.to_numpy()),
    )


@pytest.mark.parametrize(
    ("name", "options", "flags"),
    [
        ("hapo", {}, {}),
        ("rloo", {}, {"beta": 0.05}),
        ("gspo", {"temperature": {"tau": 0.3}}, {}),
    ],
    ids=["signal-and-bounds", "reference-and-sums", "ratio-of-a-response-and-temperature"],
)
def test_a_method_trains_the_demo_and_its_loss_is_the_core_s(name, options, flags, tmp_path):
    """Three of different shape; `test_engine_equals_core` has loss and gradient of every method."""
    lines = train(tmp_path / "run", name, method_options=json.dumps(options), **flags)
    assert len(lines) == 4
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines)
    # Both steps use the whole rollout batch: on-policy, then with ratios that have moved.
    core = hapo.method(name, **options, **({"kl_coef": flags["beta"]} if flags else {}))
    for step in (1, 2):
        batch = recorded(tmp_path / "run", step)
        loss = core.loss(one_step(core, batch)).loss.item()
        assert lines[step - 1]["loss"] == pytest.approx(loss, abs=1e-6)
    assert (batch.logp - batch.old_logp).abs().max() > 1e-3
    if "temperature" in options:
        assert "temperature/min" not in lines[0]  # no statistics yet
        assert lines[2]["temperature/min"] < 0.95 < 1.05 < lines[2]["temperature/max"]

"""verl's SFT trainer with a supervised method, in this process: its optimiser steps against a plain replay."""

from pathlib import Path
from typing import Any

import hydra
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import verl.trainer
from omegaconf import DictConfig
from tensordict import TensorDict
from transformers import AutoModelForCausalLM
from verl.utils import tensordict_utils as tu
from verl.workers.utils.losses import sft_loss

import hapo
import hapo.verl_cpu
from hapo.engines.verl.sft import SupervisedSFTTrainer, supervised_loss, supervised_of

STEPS, ROWS, RATE, EPS = 2, 4, 4e-3, 1e-2


def compose(folder: Path, *overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(Path(verl.trainer.__file__).parent / "config"), version_base=None):
        return hydra.compose(
            "sft_trainer_engine",
            [
                f"data.train_files={folder}/sft.parquet",
                f"data.train_batch_size={ROWS}",
                "data.micro_batch_size_per_gpu=2",
                "data.use_dynamic_bsz=False",
                "data.num_workers=0",
                "data.max_length=64",
                "data.ignore_input_ids_mismatch=True",
                f"model.path={folder}/model",
                "model.enable_gradient_checkpointing=False",
                "model.use_remove_padding=False",
                "+model.override_config.attn_implementation=sdpa",
                "engine.strategy=fsdp2",
                "engine.model_dtype=fp32",
                "+engine.mixed_precision.param_dtype=fp32",
                "+engine.mixed_precision.reduce_dtype=fp32",
                "+engine.mixed_precision.buffer_dtype=fp32",
                "engine.use_torch_compile=False",
                f"optim.lr={RATE}",
                f"optim.override_optimizer_config={{eps:{EPS}}}",
                "trainer.device=cpu",
                "trainer.logger=[console]",
                f"trainer.total_training_steps={STEPS}",
                f"trainer.default_local_dir={folder}/run",
                "trainer.resume_mode=disable",
                *overrides,
            ],
        )


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ((), r"needs a supervised method, got None: set \+hapo.method to one of chord_phi"),
        (("+hapo.method=hapo",), "needs a supervised method, got 'hapo'"),
        (("+hapo.method=ranktuner",), "reads the entropy and the rank .*use hapo.trl.SupervisedTrainer"),
        (("+hapo.method=dft", "+hapo.run_records=True"), "run_records"),
        (("+hapo.method=dft", "engine.strategy=megatron"), "set fsdp or fsdp2"),
        (("+hapo.method=dft", "data.pad_mode=right"), "set no_padding"),
    ],
)
def test_refused(tmp_path: Path, overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        supervised_of(compose(tmp_path, *overrides))


def test_sft_is_verls_own_and_slices_add_up() -> None:
    """Loss and gradient of `sft` are those of verl's `sft_loss`; micro-batches of another method add up to the whole."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 3, 7, 4]
    masks = [torch.tensor([0] + [int(i % 3 > 0) for i in range(n - 1)]) for n in lengths]

    def data_of(rows: list[int]) -> TensorDict:
        data = TensorDict(
            {"loss_mask": torch.nested.as_nested_tensor([masks[i] for i in rows], layout=torch.jagged)},
            batch_size=len(rows),
        )
        tu.assign_non_tensor(data, dp_size=2, batch_num_tokens=int(sum(map(sum, masks))))
        return data

    logps = [-torch.rand(n, generator=generator) for n in lengths]

    def loss_of(loss: Any, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        given = [logps[i].clone().requires_grad_() for i in rows]
        nested = torch.nested.as_nested_tensor(given, layout=torch.jagged)
        value, _ = loss(model_output={"log_probs": nested}, data=data_of(rows))
        return value, torch.cat(torch.autograd.grad(value, given))

    def ours(name: str) -> Any:
        return lambda **given: supervised_loss(hapo.method(name), **given)

    everything = [0, 1, 2, 3]
    theirs = loss_of(lambda **given: sft_loss(None, **given), everything)
    for expected, found in zip(theirs, loss_of(ours("sft"), everything), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    whole, parts = loss_of(ours("dft"), everything), [loss_of(ours("dft"), rows) for rows in ([0, 1], [2, 3])]
    torch.testing.assert_close(whole[0], parts[0][0] + parts[1][0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(whole[1], torch.cat([parts[0][1], parts[1][1]]), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(whole[1], theirs[1])


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_replay(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two optimiser steps of two micro-batches with DFT: weights, loss and norm of plain torch and the core."""
    sums = [(a, b) for a in (12, 345, 67, 8) for b in (9, 10)]
    talk = [
        {"messages": [{"role": "user", "content": f"{a}+{b}="}, {"role": "assistant", "content": str(a + b)}]}
        for a, b in sums
    ]
    pq.write_table(pa.Table.from_pylist(talk), inputs / "sft.parquet")
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", ""),
        ("MASTER_PORT", ""),
    ):
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", init_method=f"file://{inputs}/sft_store", rank=0, world_size=1)
    try:
        trainer = SupervisedSFTTrainer(compose(inputs, "+hapo.method=dft"))
        seen: list[dict[str, Any]] = []
        steps = trainer.training_client.train_batch

        def watched(data: TensorDict) -> TensorDict:
            rows = [
                (i.clone(), m.clone())
                for i, m in zip(data["input_ids"].unbind(), data["loss_mask"].unbind(), strict=True)
            ]
            output = steps(data=data)
            seen.append({"rows": rows, **tu.get(output, "metrics")})
            return output

        monkeypatch.setattr(trainer.training_client, "train_batch", watched)
        trainer.fit()
        trained = {name: weight.full_tensor() for name, weight in trainer.engine.module.state_dict().items()}
    finally:
        dist.destroy_process_group()

    model = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=EPS, weight_decay=0.01)
    method = hapo.method("dft")
    assert len(seen) == STEPS and not any("hapo" in name for name in seen[0])  # verl would log lists of objects
    for step in seen:
        assert len(step["rows"]) == ROWS
        logps = []
        for ids, mask in step["rows"]:
            scores = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            logps.append(scores[mask[1:].bool()])
        logp = torch.cat(logps)[None]
        loss = method.loss(hapo.TokenBatch(mask=torch.ones_like(logp, dtype=torch.bool), logp=logp)).loss
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        assert step["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
        assert step["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    moved = max(
        float((w - v).abs().max()) for w, v in zip(model.state_dict().values(), trained.values(), strict=True)
    )
    assert moved < 1e-5
    fresh = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32).state_dict()
    assert max(float((fresh[name] - trained[name]).abs().max()) for name in fresh) > 1e-3

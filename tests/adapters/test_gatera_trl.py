"""GateRA in `HAPOTrainer`: the loss of its gates, whatever the split, and their means in the log."""

import math
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model

import hapo.prompts
from hapo.adapters import GateRAConfig, gate_entropy, record_gates
from hapo.engines.trl.gates import layer_number
from hapo.engines.trl.scorer import Scorer, Sequences
from hapo.insight.run import Run
from hapo.scoring import attach_scoring, score_tokens
from hapo.trl import HAPOTrainer
from tests.engines import fixed_rollout, tiny

IDS = torch.tensor([[0, 5, 7, 9, 11, 1], [0, 5, 7, 8, 10, 12], [4, 6, 8, 10, 1, 0]])
ATTENTION = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
MASK = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])


def adapted(weight=0.5, branch="hira", **config):
    net = tiny.model(**config)
    torch.manual_seed(1)
    options = {"r": 4, "gate_std": 0.5, "init_weights": False, "entropy_weight": weight}
    return get_peft_model(net, GateRAConfig(branch=branch, task_type="CAUSAL_LM", **options))


def test_scoring_gives_the_gates_of_the_positions_that_predict_the_tokens(monkeypatch):
    """Also where equal prompts, here those of the first two rows, are run once."""
    model = adapted()
    attach_scoring(model)
    position = (ATTENTION.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), record_gates(model) as gates:
        model(input_ids=IDS, attention_mask=ATTENTION, position_ids=position)
        whole = gates.take()[:, 2:5]
    for worth in (math.inf, 0):
        monkeypatch.setitem(hapo.prompts.WORTH, "cpu", worth)
        with record_gates(model) as gates:
            found = score_tokens(model, IDS, ATTENTION, MASK, beside=gates.take).beside
        torch.testing.assert_close(found[MASK], whole[MASK], atol=1e-5, rtol=1e-5)
        assert found.requires_grad and not found[~MASK].any()
        plain = score_tokens(model, IDS, ATTENTION, MASK)
        assert plain.beside is None


def step(*split, net=None, **options):
    """Gradients of one optimiser step, and its log."""
    options = {"max_steps": 1, "method": "dapo", "method_options": {"filter_groups": False}, **options}
    keep, trainer = fixed_rollout.run(*split, 1, net=adapted() if net is None else net, **options)
    return keep.steps[0], trainer.state.log_history[0]


@pytest.fixture(scope="module")
def whole():
    return step(16, 1, 2)


@pytest.mark.parametrize(
    ("split", "options"),
    [
        ((4, 4, 8), {"tokens_per_pass": 24}),
        ((16, 1, 2), {"activation_checkpointing": True}),
    ],
    ids=["micro-batches", "checkpointing"],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL's
def test_gradients_and_metrics_do_not_change_with_the_split(split, options, whole):
    gradients, log = step(*split, **options)
    assert len(gradients) == len(whole[0]) == 40
    for name, grad in whole[0].items():
        torch.testing.assert_close(gradients[name], grad, atol=1e-6, rtol=1e-3, msg=name)
    for name in ("loss", "gate_entropy", "gate/mean", "gate/layer_00", "gate/layer_01"):
        assert log[name] == pytest.approx(whole[1][name], abs=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL's
def test_reentrant_checkpointing_needs_a_weight_of_zero():
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(RuntimeError, match="entropy_weight=0"):
        step(16, 1, 2, **options)
    gradients, log = step(16, 1, 2, net=adapted(weight=0.0), **options)
    assert log["gate/mean"] > 0 and any(g.any() for n, g in gradients.items() if "gatera_gate" in n)


def test_the_loss_is_the_method_s_and_the_weighted_entropy_over_valid_tokens(whole):
    seen = []

    class Watching(HAPOTrainer):
        def auxiliary_losses(self, batch, scored):
            seen.append((scored.gates, batch))
            return super().auxiliary_losses(batch, scored)

    gradients, log = step(16, 1, 2, net=adapted(weight=0.0), kind=Watching)
    (gates, batch), entropy = seen[0], whole[1]["gate_entropy"]
    assert gates.logits.shape == (*batch.mask.shape, 10) and gates.names[3] == "model.layers.0.mlp.up_proj"
    assert batch.totals.tokens == batch.mask.sum() < batch.mask.numel()
    assert log["gate_entropy"] == pytest.approx(entropy, abs=1e-6)
    assert entropy == pytest.approx(
        gate_entropy(gates.logits[batch.mask], batch.mask[batch.mask]).item(), abs=1e-6
    )
    assert whole[1]["loss"] == pytest.approx(log["loss"] + 0.5 * entropy, abs=1e-5)
    means = torch.sigmoid(gates.logits[batch.mask]).detach().mean(0)
    assert log["gate/mean"] == pytest.approx(means.mean().item(), abs=1e-5)
    assert log["gate/layer_01"] == pytest.approx(means[5:].mean().item(), abs=1e-5)
    pulled = [n for n, g in gradients.items() if (whole[0][n] - g).abs().max() > 1e-4]
    assert len(pulled) > 10 and any("gatera_gate" in n for n in pulled)


def test_a_run_with_a_reference_trains_and_saves_the_adapter(tmp_path):
    """TRL copies an adapter that is there already as the reference; with `peft_config` it is the model without."""
    config = GateRAConfig(r=4, task_type="CAUSAL_LM", branch="lora", lora_alpha=8)
    for i, (net, options) in enumerate(((tiny.model(), {"peft_config": config}), (adapted(), {}))):
        options |= {"beta": 0.1, "max_steps": 3, "reward": tiny.half_mixed, "run_records": True}
        trainer = tiny.trainer(tmp_path / str(i), net=net, record_tokens_every=1, **options)
        trainer.train()
        (drawn,) = Run(tmp_path / str(i)).rollouts
        gates = Run(tmp_path / str(i)).tokens(drawn)["gate"]
        assert len(gates) > 50 and gates.between(0, 1, inclusive="neither").all() and gates.nunique() > 20
        lines = [line for line in trainer.state.log_history if "gate_entropy" in line]
        assert len(lines) == 3 and all(0 < line["gate_entropy"] < math.log(2) for line in lines)
        trainer.save_model(tmp_path / "saved")
        trainer.create_model_card()
        card = (tmp_path / str(i) / "README.md").read_text()
        assert "```python\nimport hapo.adapters  # makes the adapter known to PEFT\nfrom transformers" in card
        again = PeftModel.from_pretrained(tiny.model(), tmp_path / "saved").eval()
        ids = {"input_ids": IDS, "attention_mask": ATTENTION}
        with torch.no_grad():
            torch.testing.assert_close(again(**ids).logits, trainer.model.eval()(**ids).logits)


@pytest.mark.parametrize("where", ["peft_config", "model"])
def test_vllm_is_refused(where, tmp_path):
    options = {"net": adapted()} if where == "model" else {"peft_config": GateRAConfig()}
    with pytest.raises(ValueError, match="use_vllm.*GateRA.*cannot be merged"):
        tiny.trainer(tmp_path, use_vllm=True, method="dapo", **options)


@pytest.mark.parametrize("asked", ["images", "router_loss"])
def test_what_takes_trls_own_pass_is_refused(asked):
    images = {"pixel_values": torch.zeros(3, 1)} if asked == "images" else {}
    scorer = Scorer(1.0, nullcontext, None, None)
    with pytest.raises(ValueError, match="GateRA.*another adapter"):
        scorer.current(adapted(), Sequences(IDS, ATTENTION, MASK, images), router_loss=asked == "router_loss")


def test_the_number_of_a_layer():
    assert layer_number("model.layers.11.mlp.up_proj") == 11
    assert layer_number("lin") is None

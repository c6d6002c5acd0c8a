"""What is asked for of the TRL engine is what is done, or is refused with what to set."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import logging
import sys

import pytest
import torch
import trl
from accelerate import Accelerator
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

import hapo
from hapo.engines.trl import config as config_file
from hapo.engines.trl.arguments import resolve_method
from hapo.engines.trl.drawn import DrawnScores
from hapo.engines.trl.scorer import Scorer
from hapo.samplers.decoding import Draws
from hapo.samplers.transformers import sampling
from hapo.scoring import attach_scoring, score_tokens
from hapo.trl import HAPOConfig, HAPOTrainer
from tests.engines import tiny

HEAD = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")


def whole_head(net):
    return net.get_base_model().lm_head.modules_to_save["default"].weight


def test_the_trained_copy_of_the_output_layer_is_what_draws_scores_and_learns():
    net = get_peft_model(tiny.model(), HEAD).eval()
    attach_scoring(net)
    with torch.no_grad():
        whole_head(net).add_(torch.randn_like(whole_head(net)))
    ids = torch.randint(2, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    attention, mask = torch.ones_like(ids), torch.ones(3, 4, dtype=torch.bool)

    def expected():
        logp = net(input_ids=ids, attention_mask=attention).logits[:, 2:-1].log_softmax(-1)
        return logp.gather(-1, ids[:, 3:, None])[..., 0]

    scored = score_tokens(net, ids, attention, mask).logp
    torch.testing.assert_close(scored, expected(), atol=1e-5, rtol=0)
    (mine,) = torch.autograd.grad(scored.square().sum(), whole_head(net))
    (theirs,) = torch.autograd.grad(expected().square().sum(), whole_head(net))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert mine.abs().sum() > 0

    torch.manual_seed(0)
    with sampling(net) as record:
        drawn = net.generate(input_ids=ids, attention_mask=attention, max_new_tokens=4, do_sample=True)
    again = score_tokens(net, drawn, torch.ones_like(drawn), drawn[:, 7:] != 0).logp
    seen = record.draws.policy_logp.masked_fill(drawn[:, 7:] == 0, 0)
    torch.testing.assert_close(again, seen, atol=1e-5, rtol=0)

    with net.disable_adapter():  # the reference: the original layer
        torch.testing.assert_close(score_tokens(net, ids, attention, mask).logp, expected(), atol=1e-5, rtol=0)
        assert (expected() - scored).abs().mean() > 0.1


@pytest.mark.parametrize("ready_made", [False, True], ids=["peft_config", "a PEFT model"])
def test_a_run_trains_the_output_layer_that_peft_is_to_save(tmp_path, ready_made):
    net = get_peft_model(tiny.model(), HEAD) if ready_made else tiny.model()
    extra = {} if ready_made else {"peft_config": HEAD}
    trainer = tiny.trainer(tmp_path, net, beta=0.05, method="grpo", max_steps=5, **extra)
    core = trainer.model.get_base_model().lm_head
    before = {name: x.clone() for name, x in core.named_parameters()}
    trainer.train()
    changed = {name for name, x in core.named_parameters() if not torch.equal(before[name], x)}
    assert changed == {"modules_to_save.default.weight"}
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert trainer.state.log_history[4]["kl"] > 0


PROMPTS = {
    "PREFIX_TUNING": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "P_TUNING": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompt_learning_adapters_are_refused_by_name(tmp_path, kind):
    remedy = f"{kind} is prompt-learning: .* draws from another policy .* peft_config=LoraConfig"
    with pytest.raises(ValueError, match=remedy):
        tiny.trainer(tmp_path, peft_config=PROMPTS[kind])
    with pytest.raises(ValueError, match=remedy):
        tiny.trainer(tmp_path, get_peft_model(tiny.model(), PROMPTS[kind]))
    names = list(inspect.signature(trl.GRPOTrainer).parameters)
    by_place = [{"train_dataset": tiny.data()}.get(n) for n in names[3 : names.index("peft_config")]]
    with pytest.raises(ValueError, match=remedy):
        HAPOTrainer(tiny.model(), tiny.count_digits, tiny.config(tmp_path), *by_place, PROMPTS[kind])


class Rollouts:
    """A scorer that counts the rollouts which it scores, and generation that is off by a gap."""

    def __init__(self, dtype=torch.float32, mixed_precision="no"):
        self.net = tiny.model().to(dtype)
        attach_scoring(self.net)
        accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
        self.scorer = Scorer(1.0, accelerator.autocast, DrawnScores(accelerator), None)
        self.scored = 0
        score = self.scorer.text

        def counted(*args):
            self.scored += 1
            return score(*args)

        self.scorer.text = counted
        from tests.engines.test_trl_parts import text

        self.rows = text()
        self.known = self.scorer.old(self.net, self.rows, None)
        self.scored = 0

    def old(self, gap):
        tokens = self.rows.ids[:, 2:]
        turns = [Draws(tokens, self.known.logp, self.known.logp + gap, self.known.entropy)]
        return self.scorer.old(self.net, self.rows, None, turns)


def test_in_float32_a_gap_of_a_thousandth_of_a_nat_stops_the_run_at_the_rollouts_that_are_checked():
    with pytest.raises(RuntimeError, match="0.0015 nats per token, where rounding explains at most 0.001"):
        Rollouts().old(0.0015)
    run, checked = Rollouts(), []
    for rollout in range(1, 10):
        before = run.scored
        run.old(1e-6)
        checked += [rollout] if run.scored > before else []
    assert checked == [1, 2, 4, 8]
    for _ in range(10, 16):
        run.old(0.5)  # between two checks
    with pytest.raises(RuntimeError, match=r"0\.5 nats per token.*use_vllm=True"):
        run.old(0.5)


def test_a_gap_that_float32_does_not_explain_but_half_precision_does(monkeypatch):
    half = Rollouts(torch.bfloat16)
    known = half.old(0.02)
    assert torch.equal(known.logp, half.known.logp) and half.scored == 1
    tf32 = Rollouts()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    tf32.old(0.02)
    assert tf32.scored == 1
    with pytest.raises(RuntimeError, match="rounding explains at most 0.1"):
        tf32.old(0.2) and tf32.old(0.2)


def test_several_turns_are_scored_and_the_next_rollout_of_one_turn_is_compared():
    run = Rollouts()
    draws = Draws(run.rows.ids[:, 2:], run.known.logp, run.known.logp, run.known.entropy)
    run.scorer.old(run.net, run.rows, None, [draws, draws])
    assert run.scored == 1
    for _ in range(2):
        run.old(0.0)
    with pytest.raises(RuntimeError, match="disagree"):
        run.old(0.01)
    assert run.scored == 3


def own_generate(net):
    """A generation of the user's own: transformers', out of sight."""

    def generate(input_ids, **kwargs):
        kwargs.pop("custom_generate")
        return type(net).generate(net, input_ids, **kwargs)

    net.generate = generate
    return net


def test_a_generate_of_the_user_s_own_trains_without_a_weight_and_cannot_have_a_temperature_rule(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hapo"):
        trainer = tiny.trainer(tmp_path, own_generate(tiny.model()), method="dapo", max_steps=5)
        trainer.train()
    assert len([r for r in caplog.records if "is not transformers'" in r.message]) == 1
    assert "sampler_weight/mean" not in trainer.state.log_history[4]
    with pytest.raises(ValueError, match=r'LlamaForCausalLM is not transformers.*"components": "BCD"'):
        tiny.trainer(tmp_path, own_generate(tiny.model()), method="hapo").train()


def later_config(without):
    """The config file, read beside a TRL whose config lacks some fields."""

    def post_init(self):
        now = object.__new__(trl.GRPOConfig)
        vars(now).update({f.name: f.default for f in dataclasses.fields(trl.GRPOConfig) if f.name in without})
        vars(now).update(vars(self))
        trl.GRPOConfig.__post_init__(now)
        vars(self).update({name: x for name, x in vars(now).items() if name not in without})

    base = trl.GRPOConfig.__mro__[1]
    of_base = {f.name: f for f in dataclasses.fields(base)}
    own = [f for f in dataclasses.fields(trl.GRPOConfig) if of_base.get(f.name) is not f and f.name not in without]
    made = [(f.name, f.type, dataclasses.field(default=f.default, metadata=f.metadata)) for f in own]
    later = dataclasses.make_dataclass("GRPOConfig", made, bases=(base,), namespace={"__post_init__": post_init})
    spec = importlib.util.spec_from_file_location("hapo.engines.trl.config_of_later_trl", config_file.__file__)
    module = importlib.util.module_from_spec(spec)
    return module, spec, later


@pytest.mark.parametrize(
    "without",
    [
        ["vllm_importance_sampling_cap", "delta"],
        ["loss_type", "sapo_temperature_neg", "vespo_k_pos"],
        ["mask_truncated_completions", "off_policy_mask_threshold"],
    ],
    ids=" ".join,
)
def test_a_field_that_a_later_trl_takes_away_breaks_no_refusal(tmp_path, monkeypatch, without):
    module, spec, later = later_config(without)
    assert not {*without} & {f.name for f in dataclasses.fields(later)}
    monkeypatch.setattr(trl, "GRPOConfig", later)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    options = {"use_cpu": True, "bf16": False, "activation_checkpointing": False}
    assert module.HAPOConfig(str(tmp_path), method="dapo", epsilon=0.2, **options).epsilon == 0.2
    with pytest.raises(ValueError, match="epsilon=0.3 cannot be honoured.*eps_low"):
        module.HAPOConfig(str(tmp_path), method="dapo", epsilon=0.3, **options)
    assert resolve_method(None, module.HAPOConfig(str(tmp_path), method="dapo", **options)).name == "dapo"


def test_a_schedule_that_is_refused_names_one_that_goes(tmp_path):
    with pytest.raises(ValueError, match="set steps_per_generation=2 x gradient_accumulation_steps"):
        tiny.config(tmp_path, steps_per_generation=4, gradient_accumulation_steps=3)
    assert isinstance(tiny.config(tmp_path, steps_per_generation=6, gradient_accumulation_steps=3), HAPOConfig)
    assert hapo.method("hapo").temperature_rule is not None

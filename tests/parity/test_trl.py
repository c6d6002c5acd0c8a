"""hapo's methods against TRL 1.16.0's code: equal where we say so, different where we say so."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import hapo
from hapo.engines.trl.entropy_term import EntropyTerm
from hapo.parts.advantage import decoupled_advantage, group_advantage
from hapo.parts.reduce import valid_token_mean
from hapo.parts.select import most_uncertain

from . import trl_code
from .compare import TOLERANCE, call, differences, gradient, largest, ours, random_batch

KL = {"beta": 0.04, "use_bias_correction_kl": False}
DAPO = {"loss_type": "dapo", "epsilon_high": 0.28}
SEQUENCE = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
LUSPO = {"loss_type": "luspo", "importance_sampling_level": "sequence"}
MASK = {"off_policy_mask_threshold": 0.1}
TOP = {**DAPO, "top_entropy_quantile": 0.2}
TRUNCATE = {
    "use_vllm": True,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": 2.0,
}
ALL = {"filter_groups": False}
WIDE = {"eps_low": 0.2, "eps_high": 0.2}

LOSSES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"loss_type": "grpo"}, "grpo", {"kl_coef": 0.0}),
    ({"loss_type": "grpo", **KL}, "grpo", {"kl_coef": 0.04}),
    ({"loss_type": "grpo", "delta": 3.0}, "grpo", {"kl_coef": 0.0, "dual_clip": 3.0}),
    ({"loss_type": "bnpo"}, "dapo", {**ALL, "eps_high": 0.2}),
    ({"loss_type": "dr_grpo", "max_completion_length": 64}, "dr_grpo", {"length_limit": 64}),
    (
        {"loss_type": "dr_grpo", "max_completion_length": 64, **KL},
        "dr_grpo",
        {"length_limit": 64, "kl_coef": 0.04},
    ),
    (DAPO, "dapo", ALL),
    ({**DAPO, **KL}, "dapo", {**ALL, "kl_coef": 0.04}),
    ({**DAPO, "delta": 3.0}, "dapo", {**ALL, "dual_clip": 3.0}),
    ({**DAPO, **TRUNCATE}, "dapo", {**ALL, "sampler_cap": 2.0}),
    ({"loss_type": "cispo", "epsilon_high": 1.28}, "cispo", ALL),
    ({"loss_type": "cispo", "epsilon_high": 5.0, **KL}, "cispo", {**ALL, "is_weight_cap": 5.0, "kl_coef": 0.04}),
    ({"loss_type": "sapo"}, "sapo", {}),
    (SEQUENCE, "gspo", WIDE),
    ({**SEQUENCE, **KL}, "gspo", {**WIDE, "kl_coef": 0.04}),
    ({**LUSPO}, "luspo", WIDE),
    ({**LUSPO, **KL, "delta": 3.0}, "luspo", {**WIDE, "kl_coef": 0.04, "dual_clip": 3.0}),
    ({"loss_type": "vespo"}, "vespo", {}),
    ({"loss_type": "vespo", "vespo_k_pos": 1.0, **KL}, "vespo", {"k_pos": 1.0, "kl_coef": 0.04}),
    ({"loss_type": "grpo", **MASK}, "grpo", {"kl_coef": 0.0, **MASK}),
    ({**SEQUENCE, **MASK, **KL}, "gspo", {**WIDE, **MASK, "kl_coef": 0.04}),
    ({**DAPO, **MASK, **TRUNCATE}, "dapo", {**ALL, **MASK, "sampler_cap": 2.0}),
    (TOP, "forking_tokens", ALL),
    ({**TOP, **MASK}, "forking_tokens", {**ALL, **MASK}),
    ({**TOP, **KL}, "forking_tokens", {**ALL, "kl_coef": 0.04}),
]


@pytest.mark.parametrize(("config", "name", "options"), LOSSES)
def test_losses(config, name, options, record):
    """Given the same advantages, TRL's loss and its gradient are ours."""
    trainer, method, ours_is = trl_code.grpo(**config), hapo.method(name, **options), call(name, options)
    if name == "forking_tokens":  # TRL divides by all valid tokens
        method, ours_is = (
            method.replace(reduce=valid_token_mean),
            f"{ours_is[:-1]}.replace(reduce=valid_token_mean)`",
        )

    def measure(batch: hapo.TokenBatch) -> tuple[float, float]:
        if trainer.use_vllm:
            batch = batch.replace(sampler_logp=batch.ref_logp)  # any other log-probs will do
        prepared = method.step(method.prepare(batch))
        weight = trainer.rollout(prepared).get("importance_sampling_ratio")
        drawn = {} if prepared.sampler_logp is None else {"sampling_per_token_logps": prepared.sampler_logp}
        theirs = trainer.loss(prepared, importance_sampling_ratio=weight, **drawn)
        return differences(theirs, ours(method, prepared), batch.logp)

    found = largest(measure)
    record(call("GRPOConfig", config), ours_is, found)
    assert max(found) <= TOLERANCE


ADVANTAGES: list[tuple[Any, dict[str, Any], str, dict[str, Any]]] = [
    (trl_code.grpo, {"scale_rewards": "none"}, "dr_grpo", {}),
    (trl_code.rloo, {"beta": 0.0}, "rloo", {}),
    (trl_code.rloo, {"beta": 0.05}, "rloo", {"kl_coef": 0.05}),
]


@pytest.mark.parametrize(("trainer", "config", "name", "options"), ADVANTAGES)
def test_advantages(trainer, config, name, options, record):
    """TRL's advantages are ours; RLOO's hold the KL to the reference."""
    method, trl = hapo.method(name, **options), trainer(**config)

    def measure(batch: hapo.TokenBatch) -> tuple[float]:
        prepared = method.step(method.prepare(batch))
        theirs = trl.rollout(prepared)["advantages"].unsqueeze(1) * batch.mask
        return ((theirs - prepared.advantage).abs().max().item(),)

    found = largest(measure, "even")
    record(call(trl.args.__class__.__name__, config) + ", advantages", call(name, options), found)
    assert max(found) <= TOLERANCE


def test_advantages_with_their_constant(record):
    """TRL adds 1e-4 to the standard deviation, we 1e-6; with 1e-4 in our function the rest is equal."""
    trl = trl_code.grpo(scale_rewards="group")

    def measure(batch: hapo.TokenBatch, std_eps: float) -> tuple[float]:
        theirs = trl.rollout(batch)["advantages"].unsqueeze(1) * batch.mask
        our = group_advantage(batch.reward, batch.group, batch.mask, std_eps=std_eps)
        return ((theirs - our).abs().max().item(),)

    found = largest(partial(measure, std_eps=1e-4), "even")
    record(
        call("GRPOConfig", {"scale_rewards": "group"}) + ", advantages", "`group_advantage(std_eps=1e-4)`", found
    )
    assert max(found) <= TOLERANCE
    assert max(largest(partial(measure, std_eps=1e-6), "even")) > 1e-4


WEIGHTS = [1.0, 0.5]
SEVERAL = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": WEIGHTS}
WITH_THEIR_CONSTANT: list[tuple[dict[str, Any], Any]] = [
    (
        {"scale_rewards": "batch"},
        lambda b, eps: group_advantage(b.reward, b.group, b.mask, scale="batch", std_eps=eps),
    ),
    (SEVERAL, lambda b, eps: decoupled_advantage(b.rewards, b.group, b.mask, weights=WEIGHTS, std_eps=eps)),
]


@pytest.mark.parametrize(("config", "function"), WITH_THEIR_CONSTANT)
def test_advantages_over_the_batch(config, function, record):
    """TRL's scale_rewards="batch" and its sum of normalised rewards (GDPO), with its constant in our functions."""
    trl = trl_code.grpo(**config)

    def measure(batch: hapo.TokenBatch, std_eps: float) -> tuple[float]:
        batch = with_rewards(batch) if config is SEVERAL else batch
        theirs = trl.rollout(batch)["advantages"].unsqueeze(1) * batch.mask
        return ((theirs - function(batch, std_eps)).abs().max().item(),)

    found = largest(partial(measure, std_eps=1e-4), "even")
    our = 'group_advantage(scale="batch"' if config is not SEVERAL else "decoupled_advantage(weights=(1.0, 0.5)"
    record(call("GRPOConfig", config) + ", advantages", f"`{our}, std_eps=1e-4)`", found)
    assert max(found) <= TOLERANCE
    assert max(largest(partial(measure, std_eps=1e-6), "even")) > 1e-5


def with_rewards(batch: hapo.TokenBatch) -> hapo.TokenBatch:
    """Two rewards a row: the first function has nothing to say of some rows, and neither of one of them."""
    g = torch.Generator().manual_seed(int(batch.mask.sum()))
    rewards = torch.rand(len(batch), 2, generator=g, dtype=torch.float64).round(decimals=1)
    rewards[torch.rand(len(batch), generator=g) < 0.2, 0] = torch.nan
    rewards[int(torch.randint(len(batch), (), generator=g))] = torch.nan
    return batch.replace(rewards=rewards.to(batch.reward.dtype))


ADAPTIVE = {"use_adaptive_entropy": True, "entropy_target": 1.7, "entropy_coef_delta": 0.05}


@pytest.mark.parametrize("config", [{"entropy_coef": 0.1}, {"entropy_coef": 0.1, **ADAPTIVE}])
def test_entropy_term(config, record):
    """TRL's entropy bonus and the control of its weight, step after step, each of one micro-batch."""
    trainer, method = trl_code.grpo(loss_type="grpo", **config), hapo.method("grpo", kl_coef=0.0)
    term, weights = EntropyTerm(trainer.args), []

    def measure(batch: hapo.TokenBatch) -> tuple[float, float]:
        batch = method.step(method.prepare(batch))
        weights.append(term.weight)

        def loss(logp: Tensor) -> Tensor:
            share = term.share(batch, trl_code.entropy_of(batch, logp), train=False)
            return ours(method, batch)(logp) + share.weight * share.value

        held = copy(trainer.__dict__)  # TRL's weight moves with every call
        term.share(batch, batch.entropy, train=True)
        found = differences(lambda x: trainer.__dict__.update(held) or trainer.loss(batch)(x), loss, batch.logp)
        term.end_of_step(lambda x: x)
        assert term.coef == pytest.approx(trainer.entropy_coef)
        return found

    found = largest(measure)
    if trainer.args.use_adaptive_entropy:
        assert min(weights) == 0.0 and len(set(weights)) > 3
    record(call("GRPOConfig", {"loss_type": "grpo", **config}), "`grpo(kl_coef=0.0)` and `EntropyTerm`", found)
    assert max(found) <= TOLERANCE


def test_rloo_on_policy(record):
    """Where the ratio is 1, TRL's RLOO has our gradient."""
    trl, method = trl_code.rloo(beta=0.0), hapo.method("rloo")

    def measure(batch: hapo.TokenBatch) -> tuple[float]:
        prepared = method.step(method.prepare(batch))
        theirs = trl.loss(prepared, advantages=prepared.advantage[:, 0])
        return differences(theirs, ours(method, prepared), batch.old_logp)[1:]

    found = largest(measure, "even")
    record("`RLOOConfig()`, gradient at ratio 1", "`rloo()`", found)
    assert max(found) <= TOLERANCE


def test_rloo_off_policy_differs():
    """TRL clips the ratio of the whole response, a product over its tokens; we clip token ratios."""
    trl, method = trl_code.rloo(beta=0.0), hapo.method("rloo", clip=(0.2, 0.2))
    prepared = method.step(method.prepare(random_batch(0, groups="even")))
    theirs = trl.loss(prepared, advantages=prepared.advantage[:, 0])
    product = method.replace(
        ratio=lambda b: ((b.logp - b.old_logp) * b.mask).sum(-1, keepdim=True).exp() + 0 * b.logp
    )
    per_row = prepared.replace(advantage=prepared.advantage / prepared.mask.sum(-1, keepdim=True))
    assert max(differences(theirs, ours(product, per_row), prepared.logp)) <= TOLERANCE
    assert min(differences(theirs, ours(method, prepared), prepared.logp)) > 0.1


@pytest.mark.parametrize(("level", "name"), [("token", "grpo"), ("sequence", "gspo")])
def test_kl_is_weighted_by_the_ratio_by_default(level, name, record):
    """TRL multiplies k3 by the importance ratio, gradient included, unless use_bias_correction_kl=False."""
    config = {"loss_type": "grpo", "importance_sampling_level": level, "beta": 0.04}
    options = {"kl_coef": 0.04, "eps_low": 0.2, "eps_high": 0.2}
    plain, unbiased = (hapo.method(name, **options, unbiased_kl=on) for on in (False, True))

    def measure(batch: hapo.TokenBatch) -> tuple[float, float]:
        prepared = unbiased.step(unbiased.prepare(batch))
        return differences(trl_code.grpo(**config).loss(prepared), ours(unbiased, prepared), batch.logp)

    found = largest(measure)
    record(call("GRPOConfig", config), call(name, {**options, "unbiased_kl": True}), found)
    assert max(found) <= TOLERANCE
    prepared = plain.step(plain.prepare(random_batch(0)))
    theirs = trl_code.grpo(**config).loss(prepared)
    assert min(differences(theirs, ours(plain, prepared), prepared.logp)) > 1e-4


@pytest.mark.parametrize(("loss_type", "name"), [("grpo", "grpo"), ("dr_grpo", "dr_grpo")])
def test_rows_without_tokens_are_counted(loss_type, name):
    """TRL divides by all rows, we by the rows that have tokens."""
    batch = random_batch(0)
    batch = batch.replace(mask=batch.mask & (torch.arange(16) % 4 > 0).unsqueeze(1))
    method = hapo.method(name, kl_coef=0.0, **({"length_limit": 64} if name == "dr_grpo" else {}))
    prepared = method.step(method.prepare(batch))
    theirs = trl_code.grpo(loss_type=loss_type, max_completion_length=64).loss(prepared)
    assert differences(theirs, ours(method, prepared), batch.logp)[1] > 0.3
    assert max(differences(lambda x: theirs(x) * 16 / 12, ours(method, prepared), batch.logp)) <= TOLERANCE


def test_log_ratios_are_not_clamped():
    """Beyond 20 nats our ratio is e^20 and has no gradient; TRL's goes on."""
    method = hapo.method("grpo", kl_coef=0.0)
    batch = random_batch(0)
    far = batch.replace(logp=batch.old_logp + 25.0)
    prepared = method.step(method.prepare(far))
    prepared = prepared.replace(advantage=-prepared.mask.double())
    theirs = trl_code.grpo(loss_type="grpo").loss(prepared)
    value, grad = gradient(theirs, far.logp)
    our_value, our_grad = gradient(ours(method, prepared), far.logp)
    assert value / our_value == pytest.approx(torch.e**5, rel=TOLERANCE)
    assert grad.abs().max() > 0 and (our_grad == 0).all()


def test_delta_below_the_clip_bound():
    """TRL's delta is a dual clip only above 1 + eps_high. Below, the two change places."""
    method = hapo.method("grpo", kl_coef=0.0, dual_clip=1.1)
    prepared = method.step(method.prepare(random_batch(0)))
    theirs = trl_code.grpo(loss_type="grpo", delta=1.1).loss(prepared)
    assert min(differences(theirs, ours(method, prepared), prepared.logp)) > 1e-3
    swapped = hapo.method("grpo", kl_coef=0.0, eps_high=0.1, dual_clip=1.2)
    assert max(differences(theirs, ours(swapped, prepared), prepared.logp)) <= TOLERANCE


def test_token_means_are_taken_over_the_rollout_batch():
    """With two optimiser steps a rollout batch, dapo divides each by half of all tokens, we by the step's own."""
    method = hapo.method("dapo", eps_high=0.2, filter_groups=False)
    prepared = method.step(method.prepare(random_batch(0)))
    trainer = trl_code.grpo(rows=8, loss_type="dapo", steps_per_generation=2)
    for rows in (slice(0, 8), slice(8, 16)):
        step = method.step(prepared.rows(rows))
        theirs = trainer.loss(step, num_items_in_batch=prepared.mask.sum())
        share = prepared.mask.sum() / 2 / step.mask.sum()
        assert differences(theirs, ours(method, step), step.logp)[1] > 1e-3
        assert max(differences(lambda x: theirs(x) * share, ours(method, step), step.logp)) <= TOLERANCE  # noqa: B023


def test_micro_batches():
    """Two micro-batches of a step: the shares of grpo and dapo add up as ours do; those of bnpo do not."""
    prepared = hapo.method("grpo").prepare(random_batch(0))
    halves = slice(0, 8), slice(8, 16)

    def theirs(loss_type: str) -> Any:
        accumulate = {"steps_per_generation": 2, "gradient_accumulation_steps": 2}
        trainer = trl_code.grpo(rows=8, loss_type=loss_type, **accumulate)
        total = prepared.mask.sum()
        return lambda logp: sum(
            trainer.loss(prepared.rows(rows), num_items_in_batch=total)(logp[rows]) for rows in halves
        )

    mean = ours(hapo.method("grpo", kl_coef=0.0), prepared)
    tokens = ours(hapo.method("dapo", eps_high=0.2, filter_groups=False), prepared)
    assert max(differences(theirs("grpo"), mean, prepared.logp)) <= TOLERANCE
    assert max(differences(theirs("dapo"), tokens, prepared.logp)) <= TOLERANCE
    assert min(differences(theirs("bnpo"), tokens, prepared.logp)) > 1e-3


def test_top_entropy_tokens():
    """TRL keeps 1 + floor(rho (N - 1)) tokens of a micro-batch, we ceil(rho N) of the step."""
    trainer = trl_code.grpo()

    def kept(rows: int, tokens: int, rho: float) -> tuple[Tensor, Tensor]:
        entropy = torch.arange(rows * tokens).double().reshape(rows, tokens)
        mask = torch.ones(rows, tokens, dtype=torch.bool)
        micro_batches = zip(entropy.split(1), mask.split(1), strict=True)
        theirs = torch.cat([trainer.get_high_entropy_mask(e, m, 1 - rho) for e, m in micro_batches])
        return theirs, most_uncertain(entropy, mask, rho)

    theirs, our = kept(1, 7, 0.3)
    assert (theirs.sum(), our.sum()) == (2, 3)
    theirs, our = kept(2, 10, 0.2)
    assert (theirs.sum(-1).tolist(), our.sum(-1).tolist()) == ([2, 2], [0, 4])
    for n in range(1, 60):
        theirs, our = kept(1, n, 0.2)
        assert torch.equal(theirs, our)


def test_defaults_that_differ():
    """What TRL does unless told otherwise, and groups of one, which it refuses."""
    config = trl_code.grpo().args
    assert config.loss_type == "dapo" and config.beta == 0.0 and config.use_bias_correction_kl
    assert config.vllm_importance_sampling_mode == "sequence_mask"
    assert config.vllm_importance_sampling_clip_max == 3.0
    with pytest.raises(ValueError, match="less than the minimum"):
        trl_code.grpo(num_generations=1)

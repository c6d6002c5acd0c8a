"""hapo's methods against verl 0.9.1's registered functions: equal where we say so, different where we say so."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import kl_penalty
from verl.workers.config import ActorConfig

import hapo
from hapo.parts.penalty import k3
from hapo.parts.reduce import token_mean

from . import verl_code
from .compare import TOLERANCE, call, differences, gradient, largest, ours, random_batch

OFF = {"clip_ratio_c": float("inf")}
REWARD = {"singleton": "reward"}
DAPO = {**REWARD, "filter_groups": False}
CISPO = {**DAPO, "is_weight_floor": 0.8, "is_weight_cap": 1.2}
GSPO = {**REWARD, "eps_low": 0.2, "eps_high": 0.2}
NORM = {"loss_scale_factor": 64}
MEAN, TOKENS, SUM, SUM_NORM = "seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"


ESTIMATORS = {
    "grpo": partial(verl_code.advantage, "grpo"),
    "grpo_vectorized": partial(verl_code.advantage, "grpo_vectorized"),
    "grpo, norm_adv_by_std_in_grpo=False": partial(verl_code.advantage, "grpo", norm_adv_by_std_in_grpo=False),
    "rloo": partial(verl_code.advantage, "rloo"),
    "rloo_vectorized": partial(verl_code.advantage, "rloo_vectorized"),
}

LOSSES: list[tuple[str, str, str, dict[str, Any], str, dict[str, Any]]] = [
    ("grpo", "vanilla", MEAN, {}, "grpo", {**REWARD, "kl_coef": 0.0, "dual_clip": 3.0}),
    ("grpo", "vanilla", MEAN, {**OFF, "kl_loss_coef": 0.04}, "grpo", REWARD),
    ("grpo_vectorized", "vanilla", MEAN, OFF, "grpo", {**REWARD, "kl_coef": 0.0}),
    (
        "grpo",
        "vanilla",
        TOKENS,
        {},
        "dapo",
        {**REWARD, "filter_groups": False, "eps_high": 0.2, "dual_clip": 3.0},
    ),
    (
        "grpo, norm_adv_by_std_in_grpo=False",
        "vanilla",
        SUM_NORM,
        NORM,
        "dr_grpo",
        {**REWARD, "dual_clip": 3.0, "length_limit": 64},
    ),
    (
        "grpo",
        "vanilla",
        TOKENS,
        {"clip_ratio_high": 0.28, "clip_ratio_c": 10.0},
        "dapo",
        {**DAPO, "dual_clip": 10.0},
    ),
    ("grpo", "vanilla", TOKENS, {**OFF, "clip_ratio_high": 0.28, "rollout_is": "token"}, "dapo", DAPO),
    ("grpo", "gspo", MEAN, {}, "gspo", GSPO),
    ("grpo", "gspo", MEAN, {"rollout_is": "token"}, "gspo", {**GSPO, "form": "token"}),
    ("grpo", "cispo", TOKENS, {}, "cispo", CISPO),
    ("grpo", "sapo", MEAN, {}, "sapo", REWARD),
    ("grpo", "cispo", TOKENS, {"rollout_is": "token", "kl_loss_coef": 0.04}, "cispo", {**CISPO, "kl_coef": 0.04}),
    ("rloo", "vanilla", SUM, OFF, "rloo", {**REWARD, "clip": (0.2, 0.2)}),
    ("rloo_vectorized", "vanilla", SUM, OFF, "rloo", {"clip": (0.2, 0.2)}),
]


@pytest.mark.parametrize(("estimator", "policy", "agg", "config", "name", "options"), LOSSES)
def test_methods(estimator, policy, agg, config, name, options, record):
    """From rewards to the gradient: verl's estimator and loss against our prepare() and loss()."""
    method = hapo.method(name, **options)

    def measure(batch: hapo.TokenBatch) -> tuple[float, float]:
        if "rollout_is" in config:
            batch = batch.replace(sampler_logp=batch.ref_logp)  # any other log-probs will do
        theirs = verl_code.loss(policy, batch, agg, ESTIMATORS[estimator](batch), **config)
        return differences(theirs, ours(method, method.prepare(batch)), batch.logp)

    found = largest(measure)
    theirs = ", ".join([estimator, policy, agg, *(f"{k}={v}" for k, v in config.items())])
    record(f"`{theirs}`", call(name, options), found)
    assert max(found) <= TOLERANCE


ADVANTAGES = {
    "grpo": ("grpo", REWARD),
    "grpo_vectorized": ("grpo", REWARD),
    "grpo, norm_adv_by_std_in_grpo=False": ("dr_grpo", REWARD),
    "rloo": ("rloo", REWARD),
    "rloo_vectorized": ("rloo", {}),
}


@pytest.mark.parametrize("estimator", ADVANTAGES)
def test_advantages(estimator, record):
    """verl's advantages are ours."""
    name, options = ADVANTAGES[estimator]
    method = hapo.method(name, **options)

    def measure(batch: hapo.TokenBatch) -> tuple[float]:
        return ((ESTIMATORS[estimator](batch) - method.prepare(batch).advantage).abs().max().item(),)

    found = largest(measure)
    record(f"`{estimator}`, advantages", call(name, options), found)
    assert max(found) <= TOLERANCE


def test_penalty(record):
    """verl's low_var_kl is our k3, up to 10."""

    def measure(batch: hapo.TokenBatch) -> tuple[float, float]:
        theirs = lambda logp: kl_penalty(logp, batch.ref_logp, "low_var_kl").sum()  # noqa: E731
        return differences(theirs, lambda logp: k3(logp, batch.ref_logp).sum(), batch.logp)

    found = largest(measure)
    record('`kl_penalty("low_var_kl")`', "`k3`", found)
    assert max(found) <= TOLERANCE


def test_rloo_on_policy(record):
    """Where the ratio is 1, verl's policy gradient without a ratio (`gpg`) has our gradient."""
    method = hapo.method("rloo", **REWARD)

    def measure(batch: hapo.TokenBatch) -> tuple[float]:
        theirs = verl_code.loss("gpg", batch, SUM, ESTIMATORS["rloo"](batch))
        prepared = method.prepare(batch)
        return differences(theirs, ours(method, prepared), batch.old_logp)[1:]

    found = largest(measure)
    record(f"`rloo, gpg, {SUM}`, gradient at ratio 1", call("rloo", REWARD), found)
    assert max(found) <= TOLERANCE


def test_gspo_over_tokens(record):
    """verl's actor averages over tokens unless told otherwise, also for GSPO; so does our composition."""
    method = hapo.method("gspo", **GSPO)
    over_tokens = method.replace(reduce=token_mean)

    def measure(batch: hapo.TokenBatch, method: hapo.Method) -> tuple[float, float]:
        theirs = verl_code.loss("gspo", batch, TOKENS, ESTIMATORS["grpo"](batch))
        return differences(theirs, ours(method, method.prepare(batch)), batch.logp)

    found = largest(partial(measure, method=over_tokens))
    record(f"`grpo, gspo, {TOKENS}`", f"`gspo({call('', GSPO)[2:-2]}).replace(reduce=token_mean)`", found)
    assert max(found) <= TOLERANCE
    assert measure(random_batch(0), method)[1] > 0.1


@pytest.mark.parametrize(("agg", "name"), [(MEAN, "grpo"), (TOKENS, "dapo"), (SUM_NORM, "dr_grpo")])
def test_micro_batches(agg, name):
    """Given the step's totals, as verl's engine gives them, slices add up as ours do."""
    batch = random_batch(0)
    length = {"length_limit": 64} if name == "dr_grpo" else {}
    method = hapo.method(name, kl_coef=0.0, eps_high=0.2, dual_clip=3.0, filter_groups=False, **length)
    prepared = method.prepare(batch)
    totals = {"dp_size": 1, "batch_num_tokens": prepared.totals.tokens, "global_batch_size": len(batch)}

    def theirs(logp: Tensor) -> Tensor:
        slices = [prepared.rows(slice(i, i + 4)) for i in range(0, 16, 4)]
        losses = [verl_code.loss("vanilla", s, agg, s.advantage, totals=totals, **NORM) for s in slices]
        return sum(loss(x) for loss, x in zip(losses, logp.split(4), strict=True))

    assert max(differences(theirs, ours(method, prepared), batch.logp)) <= TOLERANCE


def test_groups_of_one():
    """verl's `grpo` divides a lone reward by 1 + 1e-6, `rloo` keeps it, and so do we; `rloo_vectorized` gives 0."""
    batch = random_batch(0)
    alone = (batch.group == 0).unsqueeze(1) & batch.mask
    reward, zero = (hapo.method("rloo", singleton=s).prepare(batch).advantage[alone] for s in ("reward", "zero"))
    assert reward.min() > 0.1 and (zero == 0).all()
    assert torch.equal(verl_code.advantage("rloo", batch)[alone], reward)
    assert torch.equal(verl_code.advantage("rloo_vectorized", batch)[alone], zero)
    divided = hapo.method("grpo", singleton="reward").prepare(batch).advantage[alone]
    torch.testing.assert_close(
        verl_code.advantage("grpo", batch)[alone], divided, rtol=2e-7, atol=0
    )  # float32 there
    assert (divided < reward).all()


def test_equal_rewards_that_do_not_add_up_exactly():
    """In float32 the mean of equal rewards can miss them by an ulp; verl divides that by 1e-6, we say 0."""
    batch = random_batch(0, torch.float32)
    batch = batch.replace(group=torch.zeros(16, dtype=torch.long), reward=torch.full((16,), 0.1))
    batch = batch.rows(slice(0, 7))
    assert verl_code.advantage("grpo", batch).abs().max() > 1e-3
    assert (hapo.method("grpo").prepare(batch).advantage == 0).all()


def test_rows_without_tokens():
    """Their rewards are in their group's mean on both sides; verl's mean over responses counts them where it has the
    batch size."""
    batch = random_batch(0)
    empty = torch.arange(16) == 15
    batch = batch.replace(mask=batch.mask & ~empty.unsqueeze(1), reward=batch.reward.masked_fill(empty, 0.0))
    method = hapo.method("grpo", kl_coef=0.0, dual_clip=3.0, **REWARD)
    prepared = method.prepare(batch)
    assert (ESTIMATORS["grpo"](batch) - prepared.advantage).abs().max() <= TOLERANCE
    theirs = verl_code.loss("vanilla", batch, MEAN, prepared.advantage)
    assert max(differences(theirs, ours(method, prepared), batch.logp)) <= TOLERANCE
    sized = verl_code.loss("vanilla", batch, MEAN, prepared.advantage, totals={"global_batch_size": 16})
    assert max(differences(lambda x: sized(x) * 16 / 15, ours(method, prepared), batch.logp)) <= TOLERANCE


def test_a_batch_without_tokens():
    """verl divides 0 by 0; our loss and gradient are 0."""
    batch = random_batch(0)
    batch = batch.replace(mask=torch.zeros_like(batch.mask))
    method = hapo.method("grpo", kl_coef=0.0)
    assert verl_code.loss("vanilla", batch, TOKENS, torch.zeros_like(batch.logp))(batch.logp).isnan()
    value, grad = gradient(ours(method, method.prepare(batch)), batch.logp)
    assert value == 0 and (grad == 0).all()


def test_penalty_beyond_ten():
    """verl holds k3 at 10, without a gradient; ours goes on."""
    logp, ref = (
        torch.zeros(1, 41, dtype=torch.float64),
        torch.linspace(-14, 6, 41, dtype=torch.float64).reshape(1, -1),
    )
    theirs, our = kl_penalty(logp, ref, "low_var_kl"), k3(logp, ref)
    _, grad = gradient(lambda x: kl_penalty(x, ref, "low_var_kl").sum(), logp)
    _, our_grad = gradient(lambda x: k3(x, ref).sum(), logp)
    beyond = our > 10
    assert torch.equal(theirs, our.clamp(max=10)) and beyond.any()
    assert torch.equal(grad, our_grad.masked_fill(beyond, 0.0)) and (our_grad[beyond] != 0).all()


def test_dual_clip_is_always_on():
    """verl caps the ratio of negative advantages at 3; the papers, and we unless told, do not."""
    method = hapo.method("grpo", kl_coef=0.0, **REWARD)
    batch = random_batch(0)
    prepared = method.prepare(batch)
    theirs = verl_code.loss("vanilla", batch, MEAN, prepared.advantage)
    assert min(differences(theirs, ours(method, prepared), batch.logp)) > 1e-3


def test_defaults_that_differ():
    """What verl's actor does unless told otherwise."""
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    assert config.policy_loss.loss_mode == "vanilla" and config.loss_agg_mode == "token-mean"
    assert config.clip_ratio_c == 3.0 and config.loss_scale_factor is None
    assert not config.use_kl_loss and config.kl_loss_coef == 0.001


def test_the_default_length_is_the_padded_width():
    """Without a loss_scale_factor, verl's seq-mean-token-sum-norm depends on the padding."""
    batch = random_batch(0)
    method = hapo.method("dr_grpo", dual_clip=3.0, length_limit=20)
    prepared = method.prepare(batch)
    theirs = verl_code.loss("vanilla", batch, SUM_NORM, prepared.advantage)
    assert max(differences(theirs, ours(method, prepared), batch.logp)) <= TOLERANCE

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 20))

    wide = batch.replace(
        mask=padded(batch.mask), logp=None, ref_logp=None, entropy=None, old_logp=padded(batch.old_logp)
    )
    wider = verl_code.loss("vanilla", wide, SUM_NORM, padded(prepared.advantage))
    assert max(differences(lambda x: 2 * wider(padded(x)), theirs, batch.logp)) <= TOLERANCE


@pytest.mark.parametrize("limit", [20.0, 10.0])
def test_log_ratios_are_clamped_alike(limit):
    """Beyond 20 nats a token, or 10 a response, both stop: the same value, no gradient."""
    policy, name, options = ("vanilla", "grpo", {"kl_coef": 0.0}) if limit == 20.0 else ("gspo", "gspo", GSPO)
    method = hapo.method(name, **options)
    batch = random_batch(0)
    prepared = method.prepare(batch)
    prepared = prepared.replace(advantage=-prepared.mask.double(), logp=batch.old_logp + limit + 5)
    theirs = verl_code.loss(policy, batch, MEAN, prepared.advantage, clip_ratio_c=float("inf"))
    (value, grad), (our_value, our_grad) = (gradient(f, prepared.logp) for f in (theirs, ours(method, prepared)))
    assert value.item() == pytest.approx(math.exp(limit)) and our_value.item() == pytest.approx(math.exp(limit))
    assert (grad == 0).all() and (our_grad == 0).all()

"""SENT: worked example in the paper's and the release's form, the sets of tokens, limits."""

import math

import pytest
import torch

import hapo
from hapo.methods.sent import covariance_weights, weighted_kl
from hapo.parts.select import smallest
from tests.examples import close, example, loss_and_grad, one_step, padded, token_losses, worked_batch

VARIANTS = [
    ("sent", {"variant": "release"}),
    ("sent", {"variant": "release", "ref_kl_coef": 0.0, "high_cov_ratio": 0.3, "filter_groups": True}),
    ("sent", {"cov_mean": "all", "high_cov_ratio": 0.3, "kl_estimator": "k1", "dual_clip": 3.0}),
    ("sent", {"high_cov_ratio": 0.25, "ref_kl_coef": 0.01, "low_factor": 0.0, "singleton": "reward"}),
]
LIMITS = [
    (("sent", {"kl_coef": 0.0}), ("grpo", {"kl_coef": 0.0})),
    (("sent", {"high_factor": 0.0, "low_factor": 0.0}), ("grpo", {"kl_coef": 0.0})),
    (("sent", {"kl_coef": 0.0, "ref_kl_coef": 0.04}), ("grpo", {})),
]

ROWS = {
    "new": [[-0.10, -1.20, -0.30], [-0.05, -2.00]],
    "old": [[-0.20, -1.00, -0.35], [-0.06, -1.70]],
    "ref": [[-0.15, -0.90, -0.50], [-0.02, -1.80]],
    "entropy": [[0.20, 1.50, 0.60], [0.10, 1.10]],
    "reward": [1.0, 0.0],
}
ADVANTAGE = padded([[0.8] * 3, [-0.8] * 2], fill=0.0)
SETS = {"high_cov_ratio": 0.25}


def weights(**options: object) -> torch.Tensor:
    batch = example(**ROWS)
    logp, entropy, advantage = batch.logp, batch.entropy, ADVANTAGE
    told = {"low": 0.05, "high": 0.2, "high_cov_ratio": 0.25, **options}
    return covariance_weights(logp, entropy, advantage, batch.mask, **told)


def test_sent():
    batch, method = example(**ROWS), hapo.method("sent", **SETS)
    loss, grad, out = loss_and_grad(method, batch, ADVANTAGE)
    close(out.tokens["signal"], [[0.05, 0.0, 0.05], [0.05, 0.2]])
    assert loss == pytest.approx(-0.033438, abs=1e-6)
    close(grad, [[-0.146950, -0.109164, -0.138659], [0.201629, -0.011070]])
    assert out.tokens["clipped"].tolist() == [[False] * 3, [False, True, False]]
    of_surrogate = token_losses(method, batch, out)
    penalty = weighted_kl(out.tokens["signal"], batch.logp.detach(), batch.ref_logp)
    close(
        torch.where(batch.mask, of_surrogate + penalty, 0.0),
        [[-0.884075, -0.654985, -0.840080], [0.808063, 0.644281]],
    )


def test_sent_as_released_with_a_boolean_mask():
    method = hapo.method("sent", variant="release", ref_kl_coef=0.0, **SETS)
    loss, grad, out = loss_and_grad(method, example(**ROWS), ADVANTAGE)
    close(out.tokens["signal"], [[0.0] * 3, [0.05, 0.2]])
    assert loss == pytest.approx(-0.183789, abs=1e-6)
    close(grad, [[-0.176827, -0.130997, -0.168203], [0.171608, 0.078531]])
    # the reference's 0.001 k3 on every token: d = ref - logp is -0.05, 0.3, -0.2, 0.03, 0.2
    k3 = sum(math.exp(d) - d - 1 for d in (-0.05, 0.3, -0.2, 0.03, 0.2)) / 5
    more, *_ = loss_and_grad(hapo.method("sent", variant="release", **SETS), example(**ROWS), ADVANTAGE)
    assert more - loss == pytest.approx(0.001 * k3, abs=1e-7)


def test_the_worked_advantages():
    batch = example(old=[[-1.0]] * 5, new=[[-1.0]] * 5, reward=[1, 0, 0, 1, 1], group=[0, 0, 0, 0, 1])
    advantage = hapo.method("sent", singleton="reward").prepare(batch).advantage
    close(advantage, [[0.866024], [-0.866024], [-0.866024], [0.866024], [0.999999]])


def test_the_means_of_the_covariance():
    """Over T_low: logp -0.6125, A 0. Over all five: logp -0.73, A 0.16; the largest is then another token."""
    close(weights(), [[0.05, 0.0, 0.05], [0.05, 0.2]])
    of_all = weights(
        cov_mean="all", high_cov_ratio=0.5
    )  # 0.63 * 0.64, -, 0.43 * 0.64; 0.68 * -0.96, -1.27 * -0.96
    close(of_all, [[0.2, 0.0, 0.05], [0.05, 0.2]])


def test_advantages_of_uncertain_tokens_do_not_matter_to_a_covariance_over_the_certain():
    batch, other = example(**ROWS), ADVANTAGE.clone()
    other[0, 1] = 1e6
    given = (batch.logp, batch.entropy)
    told = {"low": 0.05, "high": 0.2, "high_cov_ratio": 0.25}
    assert torch.equal(covariance_weights(*given, other, batch.mask, **told), weights())


def test_equal_tokens():
    """Entropies all equal: the likelier tokens are certain. Advantages all equal: covariances are 0, not rounding."""
    logp, same = torch.tensor([[-1.0, -0.1, -0.7, -3.0, -0.2]]), torch.full((1, 5), 0.3)
    mask = torch.ones(1, 5, dtype=torch.bool)
    told = {"low": 1.0, "high": 3.0, "low_share": 0.6, "high_cov_ratio": 0.4}
    found = covariance_weights(logp, same, same, mask, **told)
    assert found.tolist() == [[0.0, 3.0, 1.0, 0.0, 1.0]]
    assert covariance_weights(logp, same, same, mask, **told, ends=True).tolist() == [[0.0, 1.0, 0.0, 0.0, 0.0]]
    equal = torch.zeros(2, 2)
    assert smallest(3, (equal, equal), torch.tensor([[True, False], [True, True]])).tolist() == [
        [True, False],
        [True, True],
    ]
    assert smallest(1, (equal,), torch.tensor([[False, True], [True, True]])).tolist() == [
        [False, True],
        [False, False],
    ]


def test_the_counts_are_rounded_down_and_at_least_one():
    mask = torch.ones(1, 9, dtype=torch.bool)
    entropy = torch.arange(9.0).unsqueeze(0)
    logp = -entropy / 7
    found = covariance_weights(logp, entropy, -entropy, mask, low=1.0, high=3.0)  # 7 of 9, one of 7
    assert found.tolist() == [[3.0] + [1.0] * 6 + [0.0] * 2]
    alone = covariance_weights(logp[:, :1], entropy[:, :1], entropy[:, :1], mask[:, :1], low=1.0, high=3.0)
    assert alone.tolist() == [[3.0]]
    nothing = torch.zeros(2, 3)
    assert covariance_weights(nothing, nothing, nothing, nothing.bool(), low=1.0, high=3.0).sum() == 0


def test_at_the_reference_and_the_old_policy_only_the_advantage_is_left():
    rows = {**ROWS, "old": ROWS["new"], "ref": ROWS["new"]}
    batch = example(**rows)
    _, grad, _ = loss_and_grad(hapo.method("sent"), batch, ADVANTAGE)
    lengths = batch.mask.sum(1, keepdim=True)
    torch.testing.assert_close(grad, -ADVANTAGE / (lengths * 2))
    release = hapo.method("sent", variant="release")
    _, grad, _ = loss_and_grad(release, example(**rows), ADVANTAGE)
    torch.testing.assert_close(grad, -ADVANTAGE / 5)


def test_the_estimate_is_held_to_ten():
    logp = torch.tensor([[-30.0, -2.0]], requires_grad=True)
    penalty = weighted_kl(torch.ones(1, 2), logp, torch.tensor([[-1.0, -2.0]]))
    assert penalty.tolist() == [[10.0, 0.0]]
    assert torch.autograd.grad(penalty.sum(), logp)[0].tolist() == [[0.0, 0.0]]


def test_the_sets_are_those_of_the_step_not_of_the_slice():
    method, batch = hapo.method("sent", high_cov_ratio=0.2), worked_batch()
    prepared = one_step(method, batch)
    signal = method.loss(prepared.rows([2, 3])).tokens["signal"]
    assert torch.equal(signal, prepared.signal[2:4])
    assert (prepared.signal == 0.2).sum() == 2  # 12 of 16 tokens are certain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_share": 0.0}, r"low_share must be in \(0, 1\], got 0\.0"),
        ({"high_cov_ratio": 1.5}, r"high_cov_ratio must be in \[0, 1\]"),
        ({"high_factor": 0.2}, r"high_factor must be >= low_factor, which is 0\.5, got 0\.2"),
        ({"unbiased_kl": True}, "unbiased_kl must be False: SENT weighs its own penalty"),
        ({"variant": "release", "eps_high": 0.28}, "eps_high must be at its default: the release does not clip"),
        ({"variant": "release", "kl_estimator": "k1"}, "kl_estimator must be at its default"),
    ],
)
def test_sent_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        hapo.method("sent", **options)

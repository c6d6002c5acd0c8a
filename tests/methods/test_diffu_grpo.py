"""diffu-GRPO: a worked example in both normalisers; its likelihood."""

import math

import pytest
import torch

import hapo
from hapo.parts.elbo import MaskedPass
from tests.examples import close, example, loss_and_grad

LIMITS = [
    (
        ("diffu_grpo", {}),
        ("grpo", {"eps_low": 0.5, "eps_high": 0.5, "scale_rewards": "none", "sampler_cap": None}),
    ),
]
VARIANTS = [("diffu_grpo", {"variant": "release", "kl_coef": 0.0, "singleton": "reward", "filter_groups": True})]

RATIO = [[1.6, 0.8], [0.4, 1.2, 1.0]]
OLD = [[-1.0, -0.5], [-0.3, -2.0, -0.7]]
NEW = [[o + math.log(r) for o, r in zip(*rows, strict=True)] for rows in zip(OLD, RATIO, strict=True)]


@pytest.mark.parametrize(("variant", "weights"), [("paper", [1 / 4, 1 / 6]), ("release", [1 / 5, 1 / 5])])
def test_diffu_grpo(variant, weights):
    """A = 1/2 and -1/2; 1.6 and 0.4 are beyond 1 -+ 0.5."""
    batch = example(old=OLD, new=NEW, reward=[1.0, 0.0])
    loss, grad, out = loss_and_grad(hapo.method("diffu_grpo", variant=variant, kl_coef=0.0), batch)
    losses = [[-0.75, -0.4], [0.25, 0.6, 0.5]]
    assert loss == pytest.approx(sum(w * sum(row) for w, row in zip(weights, losses, strict=True)), abs=1e-6)
    slopes = [[0.0, -0.4], [0.0, 0.6, 0.5]]
    close(grad, [[w * s for s in row] for w, row in zip(weights, slopes, strict=True)])
    close(out.tokens["clipped"], [[1.0, 0.0], [1.0, 0.0, 0.0]], batch.mask)


def test_reference_values():
    """Reference values: outputs of the authors' trainer (dllm-reasoning/d1 at commit 837888f) on these inputs.

    Their log-probs are float32 whatever the model's dtype is, so the figures are good to 1e-7.
    """
    old, ref = (-(1 + (k * torch.arange(12) + start) % 13).view(4, 3) / 8 for k, start in ((5, 0), (7, 3)))
    steps = (torch.arange(12) * 5 % 7 - 3).view(4, 3) / 4
    new = (old + steps).clamp(max=-1 / 16)
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 3]).unsqueeze(1)
    batch = hapo.TokenBatch(
        mask=mask,
        old_logp=old,
        ref_logp=ref,
        logp=new.requires_grad_(),
        reward=torch.tensor([1.0, 0, 0, 0.5]),
        group=torch.zeros(4, dtype=torch.long),
    )
    loss, grad, out = loss_and_grad(hapo.method("diffu_grpo", variant="release"), batch)
    assert out.tokens["advantage"][:, 0].tolist() == [0.625, -0.375, -0.375, 0.125]
    assert loss == pytest.approx(-0.14649863, abs=1e-7)
    rows = [
        [-0.03482542, 0.00300154, -0.0744089],
        [0.02733762, 0.0, 0.0],
        [0.03245004, -0.02453697, 0.0],
        [-0.01774776, -0.01464126, 0.00119282],
    ]
    assert grad.tolist() == [pytest.approx(row, abs=1e-7) for row in rows]


def test_the_penalty_is_grpos():
    batch = example(old=OLD, new=NEW, reward=[1.0, 0.0], ref=OLD)
    with_penalty, without = (
        loss_and_grad(hapo.method("diffu_grpo", kl_coef=coef), batch)[0] for coef in (0.04, 0.0)
    )
    k3 = [[1 / r + math.log(r) - 1 for r in row] for row in RATIO]
    assert with_penalty - without == pytest.approx(0.04 * (sum(k3[0]) / 4 + sum(k3[1]) / 6), abs=1e-6)


def test_one_pass_with_the_whole_response_hidden():
    likelihood = hapo.method("diffu_grpo", prompt_rate=0.3).likelihood
    assert likelihood == MaskedPass(0.3)
    assert not likelihood.whole and hapo.method("espo").likelihood.whole

"""ESPO: worked example in value and gradient, the estimators of the penalty, eps = 0, what is refused."""

import pytest
import torch

import hapo
from hapo.methods.espo import elbo_penalty
from hapo.parts.advantage import leave_one_out_advantage
from hapo.parts.elbo import contributions, elbo, mask_views
from hapo.stage import Stage
from tests.examples import loss_and_grad, one_step

F64 = torch.float64
LENGTH = 8
NEW, OLD, REF = [-10.0, -12, -9, -11], [-12.0, -11, -10, -11], [-11.0, -11.5, -9.5, -11]
REWARD = [1.0, 0, 0, 0.5]

OTHERS = {"advantage": Stage(leave_one_out_advantage, "reward", "group", "mask")}
WIDE = {"eps_low": 0.2, "eps_high": 0.2, "sampler_cap": None}
LIMITS = [
    (("espo", {}), ("gspo", WIDE, OTHERS)),
    (("espo", {"baseline": "mean"}), ("gspo", {**WIDE, "scale_rewards": "none"})),
]
VARIANTS = [
    ("espo", {"kl_coef": 0.01, "scale_rewards": "group", "singleton": "reward", "filter_groups": True}),
    ("espo", {"kl_coef": 0.01, "kl_estimator": "k1", "kl_per_position": False, "eps_low": 0.0, "eps_high": 0.0}),
    ("espo", {"kl_coef": 0.01, "kl_estimator": "k3", "baseline": "mean", "coupled": False, "draws": 1}),
]


def on_positions(elbos: list[float]) -> torch.Tensor:
    """ELBOs spread unevenly over the positions of a response: only their sums count."""
    shares = torch.arange(1, LENGTH + 1, dtype=F64)
    return torch.tensor(elbos, dtype=F64).unsqueeze(1) * shares / shares.sum()


def batch_of(new: list[float] = NEW, old: list[float] = OLD, **changes) -> hapo.TokenBatch:
    batch = hapo.TokenBatch(
        mask=torch.ones(4, LENGTH, dtype=torch.bool),
        old_logp=on_positions(old),
        logp=on_positions(new).requires_grad_(),
        ref_logp=on_positions(REF),
        reward=torch.tensor(REWARD, dtype=F64),
        group=torch.zeros(4, dtype=torch.long),
    )
    return batch.replace(**changes)


def numbers(values: torch.Tensor, expected: list[float]) -> None:
    assert values.tolist() == pytest.approx(expected, abs=1e-6)


def test_worked_example_b():
    batch = batch_of()
    method = hapo.method("espo", kl_coef=0.01)
    loss, grad, out = loss_and_grad(method, batch)
    numbers(out.tokens["advantage"][:, 0], [0.833333, -0.5, -0.5, 0.166667])
    numbers(out.tokens["ratio"][:, 0], [1.284025, 0.882497, 1.133148, 1.0])
    assert loss == pytest.approx(-0.039477, abs=1e-6)
    for column in grad.unbind(1):  # dE / dlogp is 1 at every position
        numbers(column, [0.0003125, 0.013633, 0.017862, -0.005208])
    assert (out.metrics["clip/low"].item(), out.metrics["clip/high"].item()) == (0.0, 0.25)
    assert loss_and_grad(hapo.method("espo"), batch)[0] == pytest.approx(-0.039711, abs=1e-6)
    scaled = hapo.method("espo", scale_rewards="group").prepare(batch).advantage[:, 0]
    numbers(scaled, [1.740413, -1.044248, -1.044248, 0.348083])


def test_the_papers_baseline_and_penalty():
    """The group's mean is (G - 1) / G of leave-one-out; without a length in it the penalty is L times as large."""
    batch = batch_of()
    mean = hapo.method("espo", baseline="mean").prepare(batch).advantage
    torch.testing.assert_close(mean * 4 / 3, hapo.method("espo").prepare(batch).advantage)
    plain = loss_and_grad(hapo.method("espo"), batch)[0]
    with_penalty = loss_and_grad(hapo.method("espo", kl_coef=0.01, kl_per_position=False), batch)[0]
    assert with_penalty - plain == pytest.approx(0.01 * 0.0234375 * LENGTH, abs=1e-9)


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [("k1", 1.0, 1.0), ("k2", 0.5, 1.0), ("k3", 0.367879, 0.632121)],  # d = 1
)
def test_the_estimators_of_the_penalty(estimator, value, slope):
    logp = on_positions([-10.0]).requires_grad_()
    mask = torch.ones(1, LENGTH, dtype=torch.bool)
    out = elbo_penalty(logp, on_positions([-11.0]), mask, estimator=estimator, per_position=False)
    assert out.tolist()[0] == pytest.approx([value] * LENGTH, abs=1e-6)
    (grad,) = torch.autograd.grad(out[0, 0], logp)
    assert grad.tolist()[0] == pytest.approx([slope] * LENGTH, abs=1e-6)


def test_the_squared_penalty_acts_however_far_the_elbos_are_apart():
    logp = on_positions([-60.0]).requires_grad_()
    out = elbo_penalty(logp, on_positions([-10.0]), torch.ones(1, LENGTH, dtype=torch.bool), per_position=False)
    (grad,) = torch.autograd.grad(out[0, 0], logp)
    assert out[0, 0].item() == pytest.approx(1250)
    assert grad[0].tolist() == pytest.approx([-50.0] * LENGTH)


def test_equal_elbos_have_ratio_one_no_penalty_and_no_loss():
    batch = batch_of(new=OLD, ref_logp=on_positions(OLD))
    loss, grad, out = loss_and_grad(hapo.method("espo", kl_coef=0.01), batch)
    assert (out.tokens["ratio"] == 1).all()
    assert loss == pytest.approx(0.0, abs=1e-12)
    numbers(grad[:, 0], [-0.833333 / 32, 0.5 / 32, 0.5 / 32, -0.166667 / 32])


def test_an_eps_of_zero_keeps_the_gradient_at_ratio_one_and_nothing_beyond():
    """The setting of Countdown: the first update is unclipped; later, only moves in the wrong way learn."""
    method = hapo.method("espo", eps_low=0.0, eps_high=0.0)
    _, at_one, _ = loss_and_grad(method, batch_of(new=OLD))
    assert (at_one != 0).all()
    _, moved, out = loss_and_grad(method, batch_of())
    assert (moved[:2] == 0).all()  # up with A > 0, down with A < 0
    assert (moved[2:] != 0).all()  # up with A < 0; not moved
    assert out.tokens["clipped"][:, 0].tolist() == [True, True, False, False]


def test_differences_and_length_scaled_alike_leave_the_ratio():
    method = hapo.method("espo")
    wide = batch_of()
    wide = wide.replace(
        **{name: torch.cat([x, x], 1) for name in ("mask", "old_logp", "ref_logp") for x in [getattr(wide, name)]},
        logp=torch.cat([wide.logp, wide.logp], 1).detach(),
    )
    ratio, twice = (method.loss(one_step(method, b)).tokens["ratio"][:, 0] for b in (batch_of(), wide))
    torch.testing.assert_close(ratio, twice)


def eighths(step: int, start: int, numbers: int = 24) -> torch.Tensor:
    """Log-probs -1/8 to -13/8: of 4 responses, 2 draws and 3 positions, in the view where the token is hidden."""
    return -(1 + (step * torch.arange(numbers) + start) % 13).to(F64).view(4, -1, 3) / 8


def test_reference_values():
    """Reference values: outputs of the authors' trainer (ML-GSAI/ESPO at commit b5f2dac) on these inputs.

    It drew the masks, from a seed of its own; advantages, ELBOs, loss and gradient are its functions' in float64.
    """
    hidden = [["111", "101"], ["000", "111"], ["001", "000"], ["011", "010"]]
    masks = torch.tensor([[[c == "1" for c in draw] for draw in row] for row in hidden])
    old, ref = eighths(5, 0), eighths(7, 3)
    steps = (torch.arange(24) * 5 % 7 - 3).to(F64).view(4, 2, 3) / 8
    new = (old + steps).clamp(max=-1 / 16).requires_grad_()

    _, weight = mask_views(masks)
    old_logp, ref_logp, logp = (contributions(x.repeat_interleave(2, 1), weight) for x in (old, ref, new))
    batch = hapo.TokenBatch(
        mask=torch.ones(4, 3, dtype=torch.bool),
        old_logp=old_logp,
        ref_logp=ref_logp,
        logp=logp,
        reward=torch.tensor(REWARD, dtype=F64),
        group=torch.zeros(4, dtype=torch.long),
    )
    method = hapo.method("espo", kl_coef=0.02, eps_low=0.1, eps_high=0.1)
    out = method.loss(one_step(method, batch))
    (grad,) = torch.autograd.grad(out.loss, new)

    numbers(elbo(new.repeat_interleave(2, 1), weight), [-2.4791667, -1.7291667, -2.6666667, -3.875])
    numbers(out.tokens["advantage"][:, 0], [0.8333333, -0.5, -0.5, 0.1666667])
    assert out.loss.item() == pytest.approx(-0.0379611537, abs=1e-9)
    assert (out.metrics["clip/low"].item(), out.metrics["clip/high"].item()) == (0.25, 0.25)
    rows = [
        [-0.02496477, -0.02496477, -0.02496477, -0.03744716, -0.07489432, -0.03744716],
        [0.01333633] * 6,
        [0.00045139, 0.00045139, 0.00090278, 0.00030093, 0.00030093, 0.00030093],
        [-0.00072917, -0.00036458, -0.00036458, -0.00036458, -0.00072917, -0.00036458],
    ]
    assert grad.flatten(1).tolist() == [pytest.approx(row, abs=1e-8) for row in rows]


NO_ORDER = "temperature must be None: a diffusion model draws many tokens at once"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("espo", {"temperature": {"tau": 0.1}}, NO_ORDER),
        ("diffu_grpo", {"temperature": {"tau": 0.1}}, NO_ORDER),
        ("espo", {"sampler_cap": 2.0}, "sampler_cap must be None"),
        ("diffu_grpo", {"sampler_cap": 2.0}, "sampler_cap must be None"),
        ("espo", {"unbiased_kl": True}, "unbiased_kl must be False"),
        ("espo", {"eps_low": 1.0}, "eps_low must be in"),
        ("espo", {"eps_high": -0.1}, "eps_high must be >= 0"),
        ("espo", {"draws": 0}, "draws must be >= 1"),
        ("diffu_grpo", {"prompt_rate": 1.0}, "prompt_rate must be in"),
    ],
)
def test_what_a_diffusion_model_has_not_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        hapo.method(name, **options)

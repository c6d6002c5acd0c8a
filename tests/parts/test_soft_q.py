"""Soft Q token by token: the worked example and the checks of the spec, laws and edges."""

import math

import pytest
import torch

from hapo.parts import soft_q as sq

BETA, GAMMA, DELTA = 0.1, 0.99, 10.0
Q = [[[0.5, 0.1, -0.2], [0.3, 0.9, 0.0]], [[0.2, 0.4, 0.6], [0.0, 0.0, 0.0]], [[0.0] * 3] * 2]
PI = [[[1.0, 0.0, -1.0], [0.0, 0.5, 0.5]], [[0.2, 0.0, 0.4], [0.0] * 3], [[0.0] * 3] * 2]
RHO = [[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], [[0.0] * 3] * 2, [[0.0] * 3] * 2]
ACTIONS = [[0, 1], [2, 0]]
MASK = torch.tensor([[True, True], [True, False]])
REWARD, GOES_ON = torch.tensor([-1.0, 0.75]), torch.tensor([True, False])


def example(dtype=torch.float32):
    return tuple(torch.tensor(x, dtype=dtype) for x in (Q, PI, RHO))


def close(x, y, atol=1e-6):
    torch.testing.assert_close(x, torch.as_tensor(y, dtype=x.dtype), atol=atol, rtol=0)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_worked_example(chunk):
    q, pi, rho = example()
    made = sq.soft_q_targets(q, pi, rho, REWARD, GOES_ON, MASK, beta=BETA, gamma=GAMMA, chunk=chunk)
    close(made.kl[0], [0.170640, 0.093425])
    close(made.kl[1, 0], 0.013201)
    close(made.value[0], [0.322023, 0.405753])
    close(made.value[1, 0], 0.413245)
    close(made.target, [[0.405753, -0.590887], [0.75, 0.0]])

    online = q[:2].clone().requires_grad_()
    loss = sq.critic_loss(online, torch.tensor(ACTIONS), made.target, MASK, delta=DELTA)
    close(loss, 0.375688)
    (grad,) = torch.autograd.grad(loss, online)
    expected = torch.zeros(2, 2, 3)
    expected[0, 0, 0], expected[0, 1, 1], expected[1, 0, 2] = 0.031416, 0.496962, -0.05
    close(grad, expected)


@pytest.mark.parametrize(
    ("target", "value", "first"),
    [
        ("kl_ref", -0.380340, [-0.027261, 0.014444, 0.012816]),
        ("entropy", -0.489322, None),
        ("released", -0.432584, [-0.011064, 0.002953, 0.008110]),
    ],
)
@pytest.mark.parametrize("chunk", [None, 1])
def test_policy_losses_of_the_worked_example(target, value, first, chunk):
    q, pi, rho = example()
    logits = pi[:2].clone().requires_grad_()
    loss = sq.policy_loss(logits, q[:2], rho[:2], MASK, beta=BETA, target=target, chunk=chunk)
    close(loss, value)
    (grad,) = torch.autograd.grad(loss, logits)
    if first is not None:
        close(grad[0, 0], first)
    if target == "kl_ref":
        close(grad[0, 1], [0.008927, -0.055617, 0.046690])
        close(grad[1, 0], [0.023235, -0.000726, -0.022510])
    assert (grad[1, 1] == 0).all()


def test_token_backups_give_the_values_and_the_policy_of_whole_actions():
    reward, beta = torch.tensor([[1.0, 0.0], [0.5, -0.5]], dtype=torch.float64), 0.5
    first = torch.zeros(2, dtype=torch.float64)
    second = torch.tensor([[0.0, 1.0], [0.5, 0.0]], dtype=torch.float64)
    log_second, value_second = sq.soft_optimum(reward, second, beta)
    close(value_second, [0.5, 0.302406])
    log_first, value = sq.soft_optimum(value_second, first, beta)
    close(value, 0.410901)
    close(log_first.exp(), [0.597531, 0.402469])
    joint = (log_first[:, None] + log_second).exp()
    close(joint, [[0.436830, 0.160701], [0.371939, 0.030531]])
    rho = first.softmax(-1)[:, None] * second.softmax(-1)
    weight = rho * (reward / beta).exp()
    close(joint, weight / weight.sum(), 1e-12)
    close(value, beta * weight.sum().log(), 1e-12)

    # The backup itself: V of the optimal policies is V*, and y of the first token is V of the second place.
    q = torch.stack([torch.stack([value_second, reward[a]]) for a in (0, 1)])[:, None]
    pi = torch.stack([torch.stack([log_first, log_second[a]]) for a in (0, 1)])[:, None]
    ref = torch.stack([torch.stack([first, second[a]]) for a in (0, 1)])[:, None]
    q, pi, ref = (torch.cat([x, torch.zeros_like(x)], 1) for x in (q, pi, ref))
    for b in (0, 1):
        made = sq.soft_q_targets(
            q,
            pi,
            ref,
            reward[:, b, None],
            torch.zeros(2, 1).bool(),
            torch.ones(2, 1, 2).bool(),
            beta=beta,
            gamma=0.3,
        )
        close(made.target[:, 0, 0], value_second, 1e-12)
        close(made.target[:, 0, 1], reward[:, b], 1e-12)
        close(made.value[:, 0, 0], value.expand(2), 1e-12)


def test_where_the_policy_is_the_reference_there_is_no_kl_and_the_value_is_the_mean():
    q, logits = random(4, 7), random(4, 7, seed=1)
    value, kl = sq.soft_value(q, logits, logits + 3.0, 0.7)
    close(kl, torch.zeros(4), 1e-12)
    close(value, (logits.softmax(-1) * q).sum(-1), 1e-12)


def test_at_the_optimum_value_is_the_soft_maximum_and_the_gradient_is_0():
    q, rho = random(3, 1, 5), random(3, 1, 5, seed=1)
    log_pi, best = sq.soft_optimum(q, rho, 0.3)
    value, _ = sq.soft_value(q, log_pi, rho, 0.3)
    close(value, best, 1e-12)
    logits = log_pi.clone().requires_grad_()
    loss = sq.policy_loss(logits, q, rho, torch.ones(3, 1).bool(), beta=0.3)
    (grad,) = torch.autograd.grad(loss, logits)
    close(grad, torch.zeros(3, 1, 5), 1e-12)
    close(loss, -best.mean(), 1e-12)  # beta KL(pi || pi*) - V*


def test_policy_gradient_is_the_one_of_the_spec_and_sums_to_0():
    q, logits, rho = random(2, 3, 6), random(2, 3, 6, seed=1).requires_grad_(), random(2, 3, 6, seed=2)
    mask, beta = torch.tensor([[True, True, False], [True, False, False]]), 0.4
    (grad,) = torch.autograd.grad(sq.policy_loss(logits, q, rho, mask, beta=beta, chunk=2), logits)
    p = logits.detach().softmax(-1)
    f = beta * (p.log() - rho.log_softmax(-1)) - q
    close(grad, mask[..., None] * p * (f - (p * f).sum(-1, keepdim=True)) / mask.sum(), 1e-12)
    close(grad.sum(-1), torch.zeros(2, 3), 1e-12)


@pytest.mark.parametrize(("target", "changes"), [("kl_ref", True), ("entropy", True), ("released", False)])
def test_only_the_released_gradient_does_not_know_the_critic(target, changes):
    logits, rho, mask = random(1, 2, 5).requires_grad_(), random(1, 2, 5, seed=1), torch.ones(1, 2).bool()

    def gradient(q):
        return torch.autograd.grad(sq.policy_loss(logits, q, rho, mask, beta=0.2, target=target), logits)[0]

    one, two = gradient(random(1, 2, 5, seed=2)), gradient(random(1, 2, 5, seed=3))
    assert ((one - two).abs().max() > 1e-3) == changes
    if target == "released":
        close(one, 0.2 * (1 / 5 - logits.detach().softmax(-1)) / 2, 1e-12)


@pytest.mark.parametrize("target", ["kl_ref", "entropy", "released"])
def test_a_constant_on_q_moves_the_value_alone(target):
    q, logits, rho = random(1, 4, 5), random(1, 4, 5, seed=1).requires_grad_(), random(1, 4, 5, seed=2)
    mask, more = torch.ones(1, 4).bool(), torch.tensor([0.0, 3.0, -2.0, 7.0], dtype=torch.float64)[None, :, None]
    (a, va), (b, vb) = (
        (
            torch.autograd.grad(sq.policy_loss(logits, x, rho, mask, beta=0.3, target=target), logits)[0],
            sq.soft_value(x, logits, rho, 0.3)[0],
        )
        for x in (q, q + more)
    )
    close(a, b, 1e-12)
    close(vb - va, more[..., 0], 1e-12)
    close(sq.soft_optimum(q, rho, 0.3)[0], sq.soft_optimum(q + more, rho, 0.3)[0], 1e-12)


@pytest.mark.parametrize("error", [-30.0, -3.0, 0.0, 2.0, 30.0])
def test_critic_gradient_is_the_clipped_error_at_the_taken_token(error):
    q = random(1, 2, 4).requires_grad_()
    actions, mask = torch.tensor([[2, 3]]), torch.tensor([[True, False]])
    target = torch.tensor([[q[0, 0, 2].item() + error, math.nan]], dtype=torch.float64, requires_grad=True)
    loss = sq.critic_loss(q, actions, target, mask, delta=10.0, count=4)
    grad, to_target = torch.autograd.grad(loss, [q, target], allow_unused=True)
    expected = torch.zeros(1, 2, 4, dtype=torch.float64)
    expected[0, 0, 2] = -max(-10.0, min(error, 10.0)) / 4
    close(grad, expected, 1e-12)
    assert to_target is None
    close(loss.detach(), min(error**2 / 2, 10 * abs(error) - 50 if abs(error) > 10 else math.inf) / 4, 1e-9)


def test_more_tokens_for_the_same_action_leave_its_value():
    q, logits, rho, beta = random(1, 1, 3), random(1, 1, 3, seed=1), random(1, 1, 3, seed=2), 0.3
    value, _ = sq.soft_value(q, logits, rho, beta)
    # Behind each token stands one that rho, and so the policy, has no choice of; its q is that of the token before.
    certain = torch.tensor([0.0, -torch.inf, -torch.inf], dtype=torch.float64)
    behind = torch.full((1, 1, 3), -5.0, dtype=torch.float64)
    behind[..., 0] = q[..., 1]
    split = [
        torch.cat(pair, 1)[None]
        for pair in ((q, behind), (logits, certain[None, None]), (rho, certain[None, None]))
    ]
    split = [torch.cat([x, torch.zeros_like(x)], 1) for x in split]
    mask = torch.ones(1, 1, 2).bool()
    made = sq.soft_q_targets(*split, torch.tensor([[9.0]]), torch.tensor([[False]]), mask, beta=beta, gamma=0.1)
    close(made.target[0, 0, 0], q[0, 0, 1], 1e-12)
    close(made.value[0, 0, 0], value[0, 0], 1e-12)


@pytest.mark.parametrize("target", ["kl_ref", "entropy"])
def test_without_beta_it_is_expected_sarsa_and_the_policy_is_moved_by_q_alone(target):
    q, logits, rho = random(1, 2, 5), random(1, 2, 5, seed=1), random(1, 2, 5, seed=2)
    value, _ = sq.soft_value(q, logits, rho, 0.0)
    expected = (logits.softmax(-1) * q).sum(-1)
    close(value, expected, 1e-12)
    loss = sq.policy_loss(logits, q, rho, torch.ones(1, 2).bool(), beta=0.0, target=target)
    close(loss, -expected.mean(), 1e-12)


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("length", [0, 1, 3])
def test_last_tokens_of_terminal_and_truncated_turns(goes_on, length):
    """The last turn has `length` tokens; what stands in its end state counts if the episode goes on there."""
    value = random(3, 3)
    mask = torch.arange(3) < torch.tensor([2, length])[:, None]
    reward = torch.tensor([0.5, -1.0], dtype=torch.float64)
    target = sq.bellman_targets(value, reward, torch.tensor([True, goes_on]), mask, 0.9)
    close(target[0], [value[0, 1], 0.5 + 0.9 * value[1, 0], 0.0], 1e-12)
    if length:
        close(target[1, length - 1], -1.0 + (0.9 * value[2, 0] if goes_on else 0.0), 1e-12)
        close(target[1, : length - 1], value[1, 1:length], 1e-12)
    assert (target[~mask] == 0).all()


def test_what_is_not_read_may_be_anything():
    q, pi, rho = example()
    q, pi, rho = (x.clone() for x in (q, pi, rho))
    clean = sq.soft_q_targets(q, pi, rho, REWARD, GOES_ON, MASK, beta=BETA)
    q[1, 1], pi[1, 1], rho[1, 1] = math.nan, math.inf, math.nan
    q[2], pi[2], rho[2] = math.nan, math.nan, math.inf
    dirty = sq.soft_q_targets(q, pi, rho, REWARD, GOES_ON, MASK, beta=BETA)
    assert torch.equal(clean.target, dirty.target)
    logits, online = pi[:2].clone().requires_grad_(), q[:2].clone().requires_grad_()
    loss = sq.policy_loss(logits, q[:2], rho[:2], MASK, beta=BETA)
    loss = loss + sq.critic_loss(online, torch.tensor([[0, 1], [2, -100]]), dirty.target, MASK)
    close(loss.detach(), -0.380340 + 0.375688, 2e-6)
    for grad in torch.autograd.grad(loss, [logits, online]):
        assert grad.isfinite().all() and (grad[1, 1] == 0).all()


def test_slices_of_a_step_add_up():
    q, logits, rho = random(4, 3, 5), random(4, 3, 5, seed=1).requires_grad_(), random(4, 3, 5, seed=2)
    online = random(4, 3, 5, seed=3).requires_grad_()
    mask = random(4, 3, seed=4) > 0
    actions, target = torch.arange(12).view(4, 3) % 5, random(4, 3, seed=5)

    def gradients(rows):
        n = mask.sum()
        loss = sq.policy_loss(logits[rows], q[rows], rho[rows], mask[rows], count=n, chunk=1)
        loss = loss + sq.critic_loss(online[rows], actions[rows], target[rows], mask[rows], count=n)
        return torch.autograd.grad(loss, [logits, online])

    whole = gradients(slice(None))
    parts = [gradients(rows) for rows in ([3], [0, 2], [1])]
    for i, grad in enumerate(whole):
        close(sum(part[i] for part in parts), grad, 1e-12)


def test_no_token_no_loss():
    q, logits = random(1, 2, 3), random(1, 2, 3, seed=1).requires_grad_()
    none = torch.zeros(1, 2).bool()
    loss = sq.policy_loss(logits, q, q, none) + sq.critic_loss(logits, none.long(), q[..., 0], none)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and (grad == 0).all()


def test_tokens_that_the_reference_rules_out_cost_much_and_not_infinity():
    q = torch.tensor([[0.0, 1.0]])
    rho = torch.tensor([[0.0, -torch.inf]])
    logits = torch.tensor([[0.0, 0.0]], requires_grad=True)
    value, kl = sq.soft_value(q, logits, rho, 0.1)
    close(kl, [0.5 * (math.log(0.5) + math.log(0.5) + 100)], 1e-4)
    close(value, 0.5 - 0.1 * kl, 1e-6)
    loss = sq.policy_loss(logits[None], q[None], rho[None], torch.tensor([[True]]), beta=0.1)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.isfinite().all() and grad[0, 1] > 0  # away from the token, in spite of its q


@pytest.mark.parametrize("q_there", [0.0, -math.inf, math.inf, math.nan])
def test_tokens_that_the_policy_rules_out_add_nothing(q_there):
    q, rho = random(1, 3, dtype=torch.float32), random(1, 3, seed=1, dtype=torch.float32)
    pi = torch.tensor([[0.3, -torch.inf, 0.1]], requires_grad=True)
    kept = [0, 2]
    value, kl = sq.soft_value(q.index_fill(-1, torch.tensor([1]), q_there), pi, rho, 0.1)
    log_rho = rho.log_softmax(-1)
    p = pi.detach().softmax(-1)[:, kept]
    close(kl, (p * (p.log() - log_rho[:, kept])).sum(-1))
    close(value, (p * q[:, kept]).sum(-1) - 0.1 * kl)
    with_it = q.index_fill(-1, torch.tensor([1]), q_there)[None]
    loss = sq.policy_loss(pi[None], with_it, rho[None], torch.tensor([[True]]), beta=0.1)
    (grad,) = torch.autograd.grad(loss, pi)
    assert grad.isfinite().all() and grad[0, 1] == 0


@pytest.mark.parametrize("target", ["kl_ref", "entropy", "released"])
def test_finite_differences(target):
    q, logits, rho = random(1, 2, 4), random(1, 2, 4, seed=1).requires_grad_(), random(1, 2, 4, seed=2)
    mask = torch.tensor([[True, True]])
    assert torch.autograd.gradcheck(
        lambda x: sq.policy_loss(x, q, rho, mask, beta=0.3, target=target, chunk=1), logits, raise_exception=True
    )
    assert torch.autograd.gradgradcheck(lambda x: sq.policy_loss(x, q, rho, mask, beta=0.3, target=target), logits)
    assert torch.autograd.gradcheck(lambda x: sq.critic_loss(x, mask.long(), rho[..., 0], mask, delta=0.5), logits)


def test_nothing_but_the_policy_gets_a_gradient_of_its_loss():
    q, logits, rho = (random(1, 2, 4, seed=i).requires_grad_() for i in range(3))
    loss = sq.policy_loss(logits, q, rho, torch.ones(1, 2).bool())
    got = torch.autograd.grad(loss, [logits, q, rho], allow_unused=True)
    assert got[0] is not None and got[1] is None and got[2] is None
    made = sq.soft_q_targets(
        q[None], logits[None], rho[None], torch.zeros(1, 0), torch.ones(1, 0).bool(), torch.ones(1, 0, 2).bool()
    )
    assert not any(x.requires_grad for x in made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    q, pi, rho = (x.to(dtype) for x in example())
    half = sq.soft_q_targets(q, pi, rho, REWARD, GOES_ON, MASK, beta=BETA)
    full = sq.soft_q_targets(q.double(), pi.double(), rho.double(), REWARD, GOES_ON, MASK, beta=BETA)
    assert half.target.dtype == torch.float32
    close(half.target.double(), full.target, 1e-5)
    a, b = (
        sq.policy_loss(p[:2], x[:2], r[:2], MASK, beta=BETA)
        for p, x, r in ((pi, q, rho), (pi.double(), q.double(), rho.double()))
    )
    close(a.double(), b, 1e-5)


def trajectory(seed=0):
    mask = torch.arange(3) < torch.tensor([[2, 3, 1], [1, 0, 3]])[..., None]
    value, kl = random(2, 4, 3, seed=seed), random(2, 4, 3, seed=seed + 1).abs()
    reward = random(2, 3, seed=seed + 2)
    goes_on = torch.tensor([[True, False, True], [True, True, False]])
    return value, kl, reward, goes_on, mask


def test_lambda_0_is_the_one_step_target_bit_for_bit():
    value, kl, reward, goes_on, mask = trajectory()
    options = {"beta": 0.2, "gamma": 0.9}
    none = sq.lambda_targets(value, kl, reward, goes_on, mask, **options, lam=0.0)
    assert torch.equal(none, sq.bellman_targets(value, reward, goes_on, mask, 0.9))


def test_lambda_1_is_the_soft_return_of_the_trajectory():
    value, kl, reward, goes_on, mask = trajectory()
    target = sq.lambda_targets(value, kl, reward, goes_on, mask, beta=0.2, gamma=0.9, lam=1.0)
    # row 0: turns of 2 and 3 tokens, the second one terminal; then one of one token, truncated
    end = reward[0, 1]
    second = [end - 0.2 * (kl[0, 1, 1] + kl[0, 1, 2]), end - 0.2 * kl[0, 1, 2], end]
    close(target[0, 1], torch.stack(second), 1e-12)
    first = reward[0, 0] + 0.9 * (second[0] - 0.2 * kl[0, 1, 0])
    close(target[0, 0], torch.stack([first - 0.2 * kl[0, 0, 1], first, torch.zeros_like(first)]), 1e-12)
    close(target[0, 2, 0], reward[0, 2] + 0.9 * value[0, 3, 0], 1e-12)
    # row 1: behind an empty turn the trajectory is cut: its state has a value alone
    close(target[1, 0, 0], reward[1, 0] + 0.9 * value[1, 1, 0], 1e-12)


def test_lambda_between_agrees_with_its_recursion_written_out():
    value, kl, reward, goes_on, mask = (x[:1] for x in trajectory())
    beta, gamma, lam = 0.2, 0.9, 0.6
    target = sq.lambda_targets(value, kl, reward, goes_on, mask, beta=beta, gamma=gamma, lam=lam)[0]
    v, k, r = value[0], kl[0], reward[0]

    def mixed(s, j, y):
        return (1 - lam) * v[s, j] + lam * (y - beta * k[s, j])

    close(target[1, 2], r[1], 1e-12)
    close(target[1, 1], mixed(1, 2, r[1]), 1e-12)
    close(target[1, 0], mixed(1, 1, target[1, 1]), 1e-12)
    close(target[0, 1], r[0] + gamma * mixed(1, 0, target[1, 0]), 1e-12)
    close(target[0, 0], mixed(0, 1, target[0, 1]), 1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sq.soft_value(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), -0.1), "beta"),
        (lambda: sq.soft_optimum(torch.zeros(1, 2), torch.zeros(1, 2), 0.0), "beta must be positive, got 0"),
        (lambda: sq.policy_terms(*[torch.zeros(1, 2)] * 3, beta=0.1, target="best"), "kl_ref, entropy, released"),
        (lambda: sq.huber(torch.zeros(1), 0.0), "delta must be positive, got 0"),
        (lambda: sq.in_chunks(lambda x: (x[:, 0],), [torch.zeros(2, 2)], 0), "chunk must be at least 1, got 0"),
        (
            lambda: sq.bellman_targets(torch.zeros(2, 2), torch.zeros(1), torch.ones(1).bool(), MASK[:1], 1.5),
            "gamma must be between 0 and 1, got 1.5",
        ),
        (
            lambda: sq.bellman_targets(torch.zeros(1, 2), torch.zeros(1), torch.ones(1).bool(), MASK[:1], 0.9),
            r"value must be \(... S\+1 L\)",
        ),
        (
            lambda: sq.bellman_targets(
                torch.zeros(2, 2), torch.zeros(1), torch.ones(1).bool(), torch.tensor([[False, True]]), 0.9
            ),
            "without a gap",
        ),
        (
            lambda: sq.lambda_targets(
                *[torch.zeros(2, 2)] * 2,
                torch.zeros(1),
                torch.ones(1).bool(),
                MASK[:1],
                beta=0.1,
                gamma=0.9,
                lam=2.0,
            ),
            "lam must be between 0 and 1, got 2",
        ),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pieces_are_made_anew_and_never_all_at_once():
    """The largest tensor that autograd keeps of a loss in pieces is the input: no second (S, L, V)."""
    logits = random(1, 64, 50, dtype=torch.float32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = sq.policy_loss(logits, logits.detach(), logits.detach(), torch.ones(1, 64).bool(), chunk=4)
    assert max(kept, default=0) < logits.numel()
    loss.backward()

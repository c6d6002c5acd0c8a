"""The coupled estimate of the ELBO: worked examples, every mask enumerated, the bound, what is hidden in a view."""

import itertools
import math

import pytest
import torch

from hapo.parts.elbo import (
    Elbo,
    MaskedPass,
    contributions,
    draw_masks,
    elbo,
    elbo_variance,
    mask_views,
    stratified_counts,
)

F64 = torch.float64


def enumerated(length: int) -> list[torch.Tensor]:
    """All masks by their size: element l holds every subset of l positions, (subsets, L)."""
    subsets = [
        [[i in chosen for i in range(length)] for chosen in itertools.combinations(range(length), size)]
        for size in range(length + 1)
    ]
    return [torch.tensor(rows, dtype=torch.bool).view(-1, length) for rows in subsets]


def random_model(length: int, seed: int = 0):
    """log p(y_k | hidden set): any number for every set and position, as a table."""
    table = -3 * torch.rand(2**length, length, generator=torch.Generator().manual_seed(seed), dtype=F64)

    def logp(hidden: torch.Tensor) -> torch.Tensor:
        return table[(hidden.long() * 2 ** torch.arange(length)).sum(-1)]

    return logp


def estimates(masks: torch.Tensor, model, *, coupled: bool = True) -> torch.Tensor:
    """The estimate of each mask (N, L) alone."""
    hidden, weight = mask_views(masks.unsqueeze(1), coupled=coupled)
    return elbo(model(hidden), weight)


def test_worked_example_a():
    masks = torch.tensor([[[1, 0, 0, 1]], [[0, 0, 0, 0]]], dtype=torch.bool)
    nan = math.nan  # no number of a place that a view does not hide is read
    seen = torch.tensor([[0.5, nan, nan, 0.25], [nan] * 4], dtype=F64).log()
    complement = torch.tensor([[nan, 0.8, 0.4, nan], [0.2, 0.5, 0.4, 0.1]], dtype=F64).log()
    _, weight = mask_views(masks)
    logp = torch.stack([seen, complement], 1)
    assert elbo(logp, weight).tolist() == pytest.approx([-4.023595, -3.450913], abs=1e-6)
    assert contributions(logp, weight).sum(-1).tolist() == pytest.approx(elbo(logp, weight).tolist())
    _, alone = mask_views(masks, coupled=False)
    assert elbo(seen.unsqueeze(1), alone).tolist() == pytest.approx([-5.198604, 0.0], abs=1e-6)


def test_worked_example_c():
    assert stratified_counts(3, 4, 8).tolist() == [3, 5, 8, 1]
    assert stratified_counts(7, 3, 8).tolist() == [7, 1, 4]


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("length", range(1, 7))
def test_unbiased_over_every_mask(length, coupled):
    """l uniform on 0..L and every subset of that size, l = 0 and l = L included: the discrete ELBO over 1..L."""
    model, sizes = random_model(length), enumerated(length)
    mean = torch.stack([estimates(masks, model, coupled=coupled).mean() for masks in sizes]).mean()
    of_size = [(model(masks) * masks).sum(-1).mean() / size for size, masks in enumerate(sizes) if size]
    assert mean.item() == pytest.approx(torch.stack(of_size).sum().item(), abs=1e-10)


@pytest.mark.parametrize("size", [0, 2, 4])
def test_one_draw_of_equal_log_probs(size):
    """(L + 1) c, and half of it where all or nothing is hidden."""
    mask = (torch.arange(4) < size).view(1, 1, 4)
    _, weight = mask_views(mask)
    half = 0.5 if size in (0, 4) else 1.0
    assert elbo(torch.full((1, 2, 4), -0.7), weight).item() == pytest.approx(-0.7 * 5 * half)


def test_below_the_exact_log_likelihood_of_a_model_of_two_tokens():
    """A joint distribution of two tokens, whose conditionals are a masked model's answers: ELBO <= log p(y)."""
    joint = torch.rand(3, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    joint = joint / joint.sum()
    first, second = joint.sum(1), joint.sum(0)
    bias = 0.8  # a model that is wrong about one conditional by this factor is below by more
    for a, b in itertools.product(range(3), repeat=2):
        given = {
            (True, True): [first[a], second[b]],
            (True, False): [joint[a, b] / second[b], 1.0],
            (False, True): [1.0, joint[a, b] / first[a]],
            (False, False): [1.0, 1.0],
        }

        def model(hidden, given=given):
            return torch.tensor([[given[tuple(view.tolist())] for view in row] for row in hidden], dtype=F64).log()

        exact = joint[a, b].log().item()
        mean = torch.stack([estimates(masks, model).mean() for masks in enumerated(2)]).mean().item()
        # l = 1: the two orders of the chain rule leave E log p(y_k | other); l = 2: the product of marginals, halved.
        conditional = (joint[a, b] / second[b]).log() + (joint[a, b] / first[a]).log()
        by_hand = (conditional / 2 + (first[a] * second[b]).log() / 2).item()
        assert mean == pytest.approx(by_hand, abs=1e-12)
        assert mean == pytest.approx(exact, abs=1e-12)  # consistent conditionals: the bound is tight
        given[True, False][0] *= bias
        assert torch.stack([estimates(masks, model).mean() for masks in enumerated(2)]).mean() < exact - 0.1


def test_below_the_likelihood_of_what_the_model_generates():
    """An inconsistent model in any order: the ELBO is at most the log of the probability that it generates y.

    Generation unmasks one position at a time in a uniform order, so p(y) = mean over orders of a product.
    """
    conditional = torch.rand(
        2, 2, 2, generator=torch.Generator().manual_seed(3), dtype=F64
    )  # position, other, value
    marginal = torch.rand(2, 2, generator=torch.Generator().manual_seed(4), dtype=F64)
    conditional, marginal = (
        conditional / conditional.sum(-1, keepdim=True),
        marginal / marginal.sum(-1, keepdim=True),
    )
    gaps = []
    for a, b in itertools.product(range(2), repeat=2):
        generated = (marginal[0, a] * conditional[1, a, b] + marginal[1, b] * conditional[0, b, a]) / 2

        def model(hidden, a=a, b=b):
            both = hidden.all(-1, keepdim=True)
            alone = torch.stack([conditional[0, b, a], conditional[1, a, b]]).log()
            return torch.where(both, torch.stack([marginal[0, a], marginal[1, b]]).log(), alone)

        bound = torch.stack([estimates(masks, model).mean() for masks in enumerated(2)]).mean()
        gaps.append((generated.log() - bound).item())
    assert min(gaps) >= -1e-12
    assert max(gaps) > 0.01


def test_masks_have_the_stratified_sizes_and_uniform_subsets():
    generator = torch.Generator().manual_seed(0)
    state = torch.random.get_rng_state()
    masks = draw_masks(9, 8, 500, generator)
    assert torch.equal(torch.random.get_rng_state(), state)
    for j in range(500):  # nine rows, nine sizes: each once
        assert sorted(masks[:, j].sum(-1).tolist()) == list(range(9))
    assert masks.float().mean((0, 1)).sub(0.5).abs().max() < 0.03
    assert torch.equal(draw_masks(9, 8, 500, torch.Generator().manual_seed(0)), masks)


def test_the_variance_is_that_of_the_estimate():
    """Mean of the estimated variance over many draws against the spread of the estimates; coupling lowers it."""
    model, spread = random_model(5), {}
    for coupled in (True, False):
        masks = torch.stack(
            [draw_masks(64, 5, 3, torch.Generator().manual_seed(seed)) for seed in range(40)]
        ).flatten(0, 1)
        hidden, weight = mask_views(masks, coupled=coupled)
        estimate, variance = elbo(model(hidden), weight), elbo_variance(model(hidden), weight, 3)
        assert variance.mean().item() == pytest.approx(estimate.var().item(), rel=0.15)
        spread[coupled] = variance.mean().item()
    assert spread[True] < spread[False] / 2
    with pytest.raises(ValueError, match="at least 2 draws"):
        elbo_variance(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), 1)


def test_gradients_reach_what_is_hidden_and_nothing_else():
    masks = draw_masks(4, 6, 2, torch.Generator().manual_seed(2))
    hidden, weight = mask_views(masks)
    logp = torch.zeros(4, 4, 6).masked_fill(~hidden, torch.nan).requires_grad_()
    (grad,) = torch.autograd.grad(elbo(logp, weight).sum(), logp)
    assert torch.equal(grad.nan_to_num(0.0), weight.float())
    assert torch.equal(weight > 0, hidden)


def test_views_of_a_likelihood():
    """The prompt is never hidden from the ELBO; one masked pass hides the response, and coins of the prompt."""
    prompt = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    likelihood = Elbo(draws=2)
    noise = likelihood.draw(2, 5, torch.Generator().manual_seed(0))
    hidden, weight = likelihood.views(noise, prompt, 5)
    assert hidden.shape == (2, likelihood.per_response, 8) and not hidden[..., :3].any()
    assert torch.equal(hidden[:, 0, 3:], ~hidden[:, 1, 3:])
    assert torch.equal(weight > 0, hidden[..., 3:])

    one = MaskedPass(prompt_rate=0.5)
    seeds = one.draw(40, 5, torch.Generator().manual_seed(0))
    wide = torch.ones(40, 30, dtype=torch.bool)
    hidden, weight = one.views(seeds, wide, 5)
    assert hidden[..., 30:].all() and (weight == 1).all()
    assert hidden[..., :30].float().mean().item() == pytest.approx(0.5, abs=0.05)
    padded = torch.cat([torch.zeros(40, 4, dtype=torch.bool), wide], 1)
    assert torch.equal(one.views(seeds, padded, 5).hidden[..., 4:], hidden)
    assert not one.views(seeds, padded, 5).hidden[..., :4].any()


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Elbo(draws=0), "draws must be >= 1"),
    (lambda: MaskedPass(prompt_rate=1.0), "prompt_rate must be in"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()

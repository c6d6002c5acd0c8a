"""Scores over the support of truncated sampling: a hand-worked triple of logits, float64, and enumeration."""

import math

import pytest
import torch

from hapo.parts.ratio import token_ratio, truncated_correction
from hapo.scoring import attach_scoring, score_hidden, score_tokens

from .test_scoring import batch, factor, inputs, relative, tiny

PAD = -1


def supports(tokens, v, k, seed=1):
    """Up to k random tokens for each position, its own among them, in random places."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.full((len(tokens), k), PAD)
    for i, token in enumerate(tokens.tolist()):
        others = [t for t in torch.randperm(v, generator=g).tolist() if t != token]
        size = int(torch.randint(1, k + 1, (), generator=g))
        chosen = torch.tensor([token, *others[: size - 1]])
        places = torch.randperm(k, generator=g)[:size]
        rows[i, places] = chosen[torch.randperm(size, generator=g)]
    return rows


def plain(logits, tokens, support):
    """log p and sampler log p over the support, and H of the whole vocabulary, in float64."""
    z = logits.double()
    allowed = torch.zeros_like(z, dtype=torch.bool)
    for row, members in zip(allowed, support, strict=True):
        row[members[members >= 0]] = True
    whole = z.log_softmax(-1)
    entropy = -(whole.exp() * whole).sum(-1)

    def taken(x):
        return x.masked_fill(~allowed, -math.inf).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

    return taken(z), entropy, taken(z / factor(entropy)[:, None]).detach()


def test_worked_example():
    # p = (6, 3, 1) / 10; without the last (2/3, 1/3), and the factor 1/2 squares it to (4/5, 1/5)
    scores = score_hidden(
        torch.tensor([[1.0]]),
        torch.tensor([[math.log(6.0)], [math.log(3.0)], [0.0]]),
        torch.tensor([1]),
        factor=lambda entropy: torch.full_like(entropy, 0.5),
        support=torch.tensor([[1, PAD, 0]]),
    )
    torch.testing.assert_close(scores.logp, torch.tensor([-1.0986123]))
    torch.testing.assert_close(scores.sampler_logp, torch.tensor([-1.6094379]))
    torch.testing.assert_close(scores.entropy, torch.tensor([0.8979457]))  # of all three


@pytest.mark.parametrize("chunk", [2, None])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(("t_base", "softcap", "with_bias"), [(1.0, None, True), (0.7, 3.0, False)])
def test_values_and_gradients_are_those_of_a_plain_float64_computation(
    t_base, softcap, with_bias, with_entropy, chunk
):
    hidden, weight, bias, tokens = inputs()
    bias = bias if with_bias else None
    support = supports(tokens, len(weight), 5)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    options = {"bias": bias, "t_base": t_base, "softcap": softcap, "chunk_tokens": chunk}
    scores = score_hidden(hidden, weight, tokens, factor=factor, support=support.int(), **options)
    x = hidden.double() @ weight.double().t()
    x = x if bias is None else x + bias.double()
    x = x if softcap is None else softcap * (x / softcap).tanh()
    logp, entropy, sampler_logp = plain(x / t_base, tokens, support)
    found = scores.logp, scores.entropy, scores.sampler_logp
    for ours, exact in zip(found, (logp, entropy, sampler_logp), strict=True):
        assert (ours - exact).abs().max() < 2e-6
    assert not scores.sampler_logp.requires_grad
    along = torch.linspace(-1, 2, len(tokens))
    pairs = [(scores.logp * along, logp * along)]
    pairs += [(scores.entropy * along.flip(0), entropy * along.flip(0))] if with_entropy else []
    ours, exact = (torch.autograd.grad(sum(x.sum() for x in side), leaves) for side in zip(*pairs, strict=True))
    assert max(map(relative, ours, exact)) < 2e-6


def test_the_whole_vocabulary_is_no_truncation():
    hidden, weight, _, tokens = inputs()
    everything = torch.stack([torch.randperm(len(weight)) for _ in tokens])
    got = score_hidden(hidden, weight, tokens, factor=factor, support=everything)
    want = score_hidden(hidden, weight, tokens, factor=factor)
    for name in ("logp", "entropy", "sampler_logp"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=1e-6, rtol=0)
    ours, theirs = (torch.autograd.grad(s.logp.sum(), weight)[0] for s in (got, want))
    assert relative(ours, theirs) < 1e-6


def test_a_token_alone_in_its_support_is_certain_and_has_no_gradient():
    hidden, weight, _, tokens = inputs()
    scores = score_hidden(hidden, weight, tokens, support=tokens[:, None])
    assert torch.equal(scores.logp, torch.zeros(len(tokens)))
    assert not torch.autograd.grad(scores.logp.sum(), weight)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    hidden, weight, _, tokens = inputs(dtype=dtype)
    support = supports(tokens, len(weight), 5)
    got = score_hidden(hidden, weight, tokens, support=support)
    want, *_ = plain(hidden.double() @ weight.double().t(), tokens, support)
    assert got.logp.dtype == torch.float32
    assert (got.logp - want).abs().max() < 1e-5


def test_a_token_outside_of_its_support_is_named():
    hidden, weight, _, tokens = inputs()
    support = tokens[:, None].clone()
    support[3] = (tokens[3] + 1) % len(weight)
    with pytest.raises(ValueError, match=f"token {tokens[3]} at position 3 is not in its support"):
        score_hidden(hidden, weight, tokens, support=support)


def test_model_scores_are_those_of_its_own_logits_and_nothing_is_read_where_the_mask_is_false():
    model = tiny()
    attach_scoring(model)
    ids, attention, mask = batch()
    width = mask.shape[1]
    tokens = ids[:, -width:]
    support = torch.full((*mask.shape, 4), PAD)
    support[mask] = supports(tokens[mask], model.config.vocab_size, 4)
    scores = score_tokens(model, ids, attention, mask, factor=factor, support=support)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1]
    logp, entropy, sampler_logp = plain(logits[mask], tokens[mask], support[mask])
    assert (scores.logp[mask] - logp).abs().max() < 1e-5
    assert (scores.entropy[mask] - entropy).abs().max() < 1e-5
    assert (scores.sampler_logp[mask] - sampler_logp).abs().max() < 1e-5
    garbage = torch.where(mask[..., None], support, 10**6)
    again = score_tokens(model, ids, attention, mask, factor=factor, support=garbage)
    assert torch.equal(scores.logp, again.logp)


@pytest.mark.parametrize("over_support", [True, False])
def test_the_expected_gradient_is_that_of_the_truncated_policy(over_support):
    """All draws of one position, each with its probability: weight times ratio times reward, against dJ/dtheta.

    J = sum_{a in S} p_S(a) R(a), with S fixed. Draws are of softmax(z / factor(H)) over S. Over the whole vocabulary
    both the value and the gradient miss by the kept mass.
    """
    v = 9
    hidden, weight, _, _ = inputs(n=1, v=v)
    inside = torch.tensor([8, 1, 4, 5])
    reward = torch.tensor([1.0, -2.0, 0.5, 3.0])
    n = len(inside)
    every = hidden.expand(n, -1)
    options = {"factor": factor, "support": inside.expand(n, n)}
    drawn = score_hidden(every, weight, inside, **options)
    policy = drawn if over_support else score_hidden(every, weight, inside)
    probability = drawn.sampler_logp.exp()
    torch.testing.assert_close(probability.sum(), torch.tensor(1.0))
    old, now = policy.logp.detach()[:, None], policy.logp[:, None]
    weights = truncated_correction(old, drawn.sampler_logp[:, None], cap=math.inf)[:, 0]
    estimate = (probability * weights * token_ratio(now, old)[:, 0] * reward).sum()
    p_s = (hidden.double() @ weight.double().t())[0, inside].softmax(-1)
    value = (p_s * reward).sum()
    ours, theirs = (torch.autograd.grad(x, weight)[0] for x in (estimate, value))
    assert (abs(estimate.item() - value.item()) < 1e-6) == over_support
    assert (relative(ours, theirs) < 1e-5) == over_support
    mass = (hidden @ weight.t()).softmax(-1)[0, inside].sum().item()
    mean = (probability * weights).sum().item()
    assert mean == pytest.approx(1.0 if over_support else mass, abs=1e-6)
    assert mass < 0.9

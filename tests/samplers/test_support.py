"""Support of truncated draws in transformers: what is left, how often it is drawn, and log-probs over it."""

import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from hapo.batch import EntropyStats
from hapo.parts.temperature import zscore_factor
from hapo.samplers import decoding
from hapo.samplers.transformers import sampling
from hapo.scoring import attach_scoring, score_tokens

PAD, EOS, V = 0, 2, 40
T_BASE, TAU = 0.9, 0.1
STATS = EntropyStats(pivot=0.2, sigma=0.5, h_max=1.0, h_min=-1.0)
TRUNCATED = {"top_p": 0.9, "top_k": 20}


def factor(entropy):
    return zscore_factor(entropy, STATS, tau=TAU)


def tiny(spread=6.0):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=V, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None, **sizes)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(spread)
    attach_scoring(model)
    return model


def drawn(model, ids, new, rule=factor, **options):
    """Answers with their support, and what was drawn of them."""
    settings = {"do_sample": True, "max_new_tokens": new, "temperature": T_BASE, "top_k": 0, **options}
    config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, **settings)
    with sampling(model, rule, support=True) as record:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out, record.draws


def left(logits, rule=factor, top_p=1.0, top_k=0):
    """In float64: the tempered distribution after top-k, then top-p over what that left."""
    z = logits.double() / T_BASE
    entropy = torch.distributions.Categorical(logits=z).entropy()
    z = z if rule is None else z / rule(entropy).double()
    order = z.argsort(descending=True)[: top_k or len(z)]
    p = z[order].softmax(0)
    members = order[(p.cumsum(0) - p) < top_p]
    return members, z[members].softmax(0)


@pytest.mark.parametrize("rule", [factor, None])
@pytest.mark.parametrize("truncation", [TRUNCATED, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.3}])
def test_policy_and_scores_are_over_the_same_tokens_as_the_draw(truncation, rule):
    """Scored again at the unchanged policy, both log-probs are those of generation: every ratio is 1 to 1e-4."""
    model = tiny()
    torch.manual_seed(3)
    ids = torch.randint(3, V, (6, 4))
    out, draws = drawn(model, ids, 7, rule, **truncation)
    end = (draws.tokens == EOS).int().cumsum(1)
    mask = (end - (draws.tokens == EOS).int()) == 0
    assert (draws.support[~mask] == -1).all()
    scores = score_tokens(
        model, out, torch.ones_like(out), mask, t_base=T_BASE, factor=rule, support=draws.support
    )
    tempered = scores.logp if rule is None else scores.sampler_logp
    assert ((scores.logp - draws.policy_logp)[mask].exp() - 1).abs().max() < 1e-4
    assert ((tempered - draws.logp)[mask].exp() - 1).abs().max() < 1e-4
    torch.testing.assert_close(scores.entropy[mask], draws.entropy[mask], atol=1e-5, rtol=0)
    whole = score_tokens(model, out, torch.ones_like(out), mask, t_base=T_BASE, factor=rule)
    before = whole.logp if rule is None else whole.sampler_logp
    mass = (before - draws.logp)[mask].exp()
    assert mass.max() < 1 + 1e-4 and mass.mean() < 0.98  # what scoring over the whole vocabulary is biased by


@torch.no_grad()
def test_draws_follow_the_tempered_and_truncated_distribution():
    """Chi-square of 100,000 draws, and the recorded support and log-probs, against float64."""
    model, n = tiny(spread=3.0), 100_000
    ids = torch.tensor([[5, 9, 14, 3]])
    members, p = left(model(ids).logits[0, -1], **TRUNCATED)
    assert 5 < len(members) < 20  # both truncations act: top-p leaves fewer than top-k
    torch.manual_seed(11)
    draws = drawn(model, ids.expand(n, -1), 1, **TRUNCATED)[1]
    tokens, support = draws.tokens[:, 0], draws.support[:, 0]
    assert torch.equal(support[0][support[0] >= 0], members)
    assert (support == support[0]).all()
    counts = tokens.bincount(minlength=V)[members]
    assert counts.sum() == n
    assert chisquare(counts.numpy(), (n * p).numpy()).pvalue > 1e-3
    expected = torch.zeros(V, dtype=torch.float64).index_put((members,), p.log())
    torch.testing.assert_close(draws.logp[:, 0].double(), expected[tokens], atol=1e-5, rtol=0)


def test_the_mean_weight_is_one_over_the_support_and_the_kept_mass_over_the_vocabulary():
    model, n = tiny(spread=3.0), 100_000
    ids = torch.tensor([[5, 9, 14, 3]])
    torch.manual_seed(12)
    _, draws = drawn(model, ids.expand(n, -1), 1, **TRUNCATED)
    with torch.no_grad():
        z = model(ids).logits[0, -1].double() / T_BASE
    mass = z.softmax(0)[left(z * T_BASE, **TRUNCATED)[0]].sum().item()
    over_support = (draws.policy_logp - draws.logp).exp()
    over_all = (z.log_softmax(0)[draws.tokens] - draws.logp).exp()
    error = over_support.std().item() / n**0.5
    assert over_support.mean().item() == pytest.approx(1.0, abs=4 * error)
    assert over_all.mean().item() == pytest.approx(mass, abs=4 * error)
    assert mass < 0.95


def test_a_support_that_is_too_large_is_refused_and_continuous_batching_tells_none(monkeypatch):
    monkeypatch.setattr(decoding, "MOST_SUPPORT", 8)
    model = tiny(spread=0.1)
    ids = torch.tensor([[5, 9, 14, 3]])
    with pytest.raises(
        RuntimeError, match=r"tokens are left to a draw, more than the 8 .* set a top_k of at most 8"
    ):
        drawn(model, ids, 1, top_p=0.9)
    assert drawn(model, ids, 1, top_k=8)[1].support.shape == (1, 1, 8)
    with pytest.raises(ValueError, match=r"generate_batch\(\) tells no support"), sampling(model, support=True):
        model.generate_batch(ids.tolist())

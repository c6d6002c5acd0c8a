"""Calibration against plain forward passes of what was drawn."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hapo.assets import tiny_model_path
from hapo.batch import EntropyStats
from hapo.samplers import calibration
from hapo.samplers.calibration import calibrate

PROMPTS = ["347+586=", "1+2=", "999+1=", "12+34=", "500+500="]


@pytest.fixture(scope="module")
def tiny():
    path = tiny_model_path()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def spied(monkeypatch, model):
    """Lists that fill up: the ids that generate() returns, the entropies that statistics are taken of."""
    ids, entropies = [], []
    generate, stats = model.generate, calibration.entropy_stats
    monkeypatch.setattr(model, "generate", lambda **kw: ids.append(generate(**kw)) or ids[-1])
    monkeypatch.setattr(
        calibration, "entropy_stats", lambda h, mask, rho: entropies.append(h[0]) or stats(h, mask, rho)
    )
    return ids, entropies


@torch.no_grad()
def plain_entropies(
    model, tokenizer, batches: list[torch.Tensor], t_base: float
) -> tuple[torch.Tensor, list[int]]:
    """One pass a row, without padding, in float64; and the number of tokens of each answer."""
    found, lengths, prompts = [], [], iter(PROMPTS)
    for ids in batches:
        for row in ids.tolist():
            prompt = tokenizer(next(prompts)).input_ids
            start = next(i for i in range(len(row)) if row[i : i + len(prompt)] == prompt)
            answer = row[start + len(prompt) :]
            ends = [i + 1 for i, token in enumerate(answer) if token == tokenizer.eos_token_id]
            answer = answer[: ends[0]] if ends else answer
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
            found.append(torch.distributions.Categorical(logits=logits / t_base).entropy())
            lengths.append(len(answer))
    return torch.cat(found), lengths


@pytest.mark.parametrize("t_base", [1.0, 0.7])
def test_statistics_are_of_every_sampled_position(tiny, monkeypatch, t_base):
    model, tokenizer = tiny
    ids, entropies = spied(monkeypatch, model)
    found = calibrate(model, tokenizer, PROMPTS, max_new_tokens=24, t_base=t_base, rho=0.75, batch_size=2, seed=1)
    expected, lengths = plain_entropies(model, tokenizer, ids, t_base)
    assert [len(batch) for batch in ids] == [2, 2, 1]
    assert len(set(lengths)) > 1  # answers end at different steps
    # Decoding step by step and one pass round differently in float32: by 5e-6 here.
    torch.testing.assert_close(entropies[0].double(), expected, atol=1e-4, rtol=0)

    log_h = entropies[0].double().clamp_min(1e-8).log().sort().values
    pivot = log_h[round(0.75 * (len(log_h) - 1))]
    by_hand = [pivot, log_h.std(correction=0), log_h[-1] - pivot, log_h[0] - pivot]
    assert [found.pivot, found.sigma, found.h_max, found.h_min] == pytest.approx(
        torch.stack(by_hand).tolist(), abs=1e-5
    )
    assert found.tokens == sum(lengths)
    assert found.floored == (entropies[0] <= 1e-8).double().mean()


def test_the_seed_decides_and_nothing_else_is_touched(tiny):
    model, tokenizer = tiny

    def run(seed: int, prompts=PROMPTS) -> EntropyStats:
        return calibrate(model, tokenizer, prompts, max_new_tokens=16, batch_size=4, seed=seed)

    model.train()
    before = torch.get_rng_state()
    first = run(0)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert run(0) == first != run(1)
    model.eval()


def test_a_chat_is_written_by_the_template_without_further_special_tokens(tiny, monkeypatch):
    model, tokenizer = tiny
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ids, _ = spied(monkeypatch, model)
    calibrate(model, tokenizer, [[{"role": "user", "content": "1+2"}]], max_new_tokens=2)
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    assert ids[0][0, :-2].tolist() == bos + tokenizer("1+2=", add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there are no prompts"),
        (["1+2=", [{"role": "user", "content": "1+2"}]], {}, "one kind"),
        (["1+2="], {"t_base": 0.0}, "t_base must be > 0, got 0.0"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(tiny, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(*tiny, prompts, **options)


def test_the_model_s_own_generation_settings_do_not_matter(tiny):
    model, tokenizer = tiny
    own = model.generation_config
    plain = calibrate(model, tokenizer, PROMPTS, max_new_tokens=8)
    model.generation_config = GenerationConfig(**{**own.to_dict(), "no_repeat_ngram_size": 1, "min_p": 0.5})
    try:
        assert calibrate(model, tokenizer, PROMPTS, max_new_tokens=8) == plain
        assert model.generation_config.min_p == 0.5
    finally:
        model.generation_config = own

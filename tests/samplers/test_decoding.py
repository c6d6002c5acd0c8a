"""The decoding loop: equal prompts, rows that end, caches that cannot move, and the draw itself."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from hapo.cache import cache_of
from hapo.samplers.decoding import decode_alike, draw
from hapo.samplers.transformers import less_work, sampling

PAD, EOS, VOCAB, NEW = 0, [1, 7, 12, 19, 31], 48, 24
PROMPTS = [[5, 9, 2], [11, 3, 30, 4, 21, 8], [40, 41]]
SAMPLES = 4
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}


def tiny(config) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


def generate(model, **options):
    """SAMPLES answers to each prompt, left-padded, and the rows of every forward pass."""
    width = max(map(len, PROMPTS))
    prompts = [p for p in PROMPTS for _ in range(SAMPLES)]
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options = {"do_sample": True, "max_new_tokens": NEW, "top_k": 0, "temperature": 0.7, **options}
    rows = []
    hook = model.register_forward_pre_hook(lambda *a: rows.append(len(a[2]["input_ids"])), with_kwargs=True)
    torch.manual_seed(5)
    try:
        config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, **options)
        out = model.generate(ids, attention_mask=mask, generation_config=config)
    finally:
        hook.remove()
    return prompts, out[:, width:], rows


def sample(model, **options):
    """The same inside `sampling`, with the draws."""
    with sampling(model) as record:
        prompts, tokens, rows = generate(model, **options)
    return prompts, tokens, record.draws, rows


def ended(tokens: torch.Tensor) -> torch.Tensor:
    """Lengths with the end of sequence."""
    end = torch.isin(tokens, torch.tensor(EOS))
    return torch.where(end.any(1), end.int().argmax(1) + 1, tokens.shape[1])


@torch.no_grad()
def check(model, prompts, tokens, draws) -> None:
    """Every recorded number against a forward pass of that row alone."""
    assert torch.equal(draws.tokens, tokens)
    for row, (prompt, length) in enumerate(zip(prompts, ended(tokens).tolist(), strict=True)):
        completion = tokens[row, :length].tolist()
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double() / 0.7
        policy = torch.distributions.Categorical(logits=logits)
        for found, expected in (
            (draws.policy_logp, policy.log_prob(torch.tensor(completion))),
            (draws.logp, policy.log_prob(torch.tensor(completion))),
            (draws.entropy, policy.entropy()),
        ):
            torch.testing.assert_close(found[row, :length].double(), expected, atol=1e-4, rtol=0)
            assert not found[row, length:].any()
        assert (tokens[row, length:] == PAD).all()


def test_equal_prompts_are_run_once_and_ended_rows_leave():
    model = tiny(LlamaConfig(**SHAPE))
    prompts, tokens, draws, rows = sample(model)
    lengths = ended(tokens)
    assert lengths.min() < 8 and lengths.max() == NEW  # rows end early, and not all of them
    check(model, prompts, tokens, draws)
    assert rows[0] == len(PROMPTS)
    running = [int((lengths > t).sum()) for t in range(1, len(rows))]
    assert all(n <= run <= n / (7 / 8) + 1 for n, run in zip(running, rows[1:], strict=True))


def test_a_sliding_window_moves_with_its_row():
    model = tiny(MistralConfig(**SHAPE, sliding_window=4))
    prompts, tokens, draws, rows = sample(model)
    assert rows[0] == len(PROMPTS)
    check(model, prompts, tokens, draws)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_where_rows_cannot_move_all_are_kept(options):
    model = tiny(LlamaConfig(**SHAPE))
    prompts, tokens, draws, rows = sample(model, disable_compile=True, **options)
    assert set(rows) == {len(prompts)}
    check(model, prompts, tokens, draws)


WAYS = [{"do_sample": False}, {}, {"top_k": 5, "top_p": 0.9, "min_p": 0.05}, {"repetition_penalty": 1.3}]


@pytest.mark.parametrize("options", WAYS, ids=lambda options: "-".join(options) or "sampled")
@pytest.mark.parametrize("config", [LlamaConfig, lambda **c: MistralConfig(**c, sliding_window=4)])
def test_the_loop_that_measures_gives_the_tokens_of_transformers(config, options):
    model = tiny(config(**SHAPE))
    _, theirs, passes = generate(model, **options)
    with less_work(model):
        _, ours, rows = generate(model, **options)
    assert torch.equal(ours, theirs)
    lengths = ended(ours)
    assert lengths.min() < lengths.max() and len(rows) == len(passes)
    leave = "repetition_penalty" not in options  # which may know rows by their place
    assert rows[0] == len(PROMPTS) and (rows[-1] < passes[-1]) == leave


def test_beams_are_refused_not_ignored():
    model = tiny(LlamaConfig(**SHAPE))
    with less_work(model), pytest.raises(ValueError, match="num_beams=2: one token a row"):
        generate(model, do_sample=False, num_beams=2)


def test_a_generate_of_ones_own_is_left_alone():
    model = tiny(LlamaConfig(**SHAPE))
    theirs = model.generate
    with less_work(model):
        assert model.generate.keywords["custom_generate"] is decode_alike
    assert model.generate == theirs and "generate" not in vars(model)
    model.generate = own = lambda input_ids: input_ids
    with less_work(model):
        assert model.generate is own
    del model.generate
    model.__class__ = type("OwnLoop", (LlamaForCausalLM,), {"_sample": lambda self, *args, **kwargs: None})
    with less_work(model):
        assert "generate" not in vars(model)


class WithFeatures(LlamaForCausalLM):
    """Adds a vector per row to the prompt's embeddings, as features of images are added, from a list of rows."""

    def forward(self, input_ids=None, features=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids)
        if features is not None and cache_of(kwargs).get_seq_length() == 0:
            embeds = embeds + torch.stack(features).unsqueeze(1)
        return super().forward(inputs_embeds=embeds, **kwargs)


def test_equal_tokens_with_other_features_are_no_equal_prompts():
    model = tiny(LlamaConfig(**SHAPE))
    model.__class__ = WithFeatures
    ids, features = torch.tensor([[5, 9, 2]] * 4), [x * torch.ones(32) for x in (0.0, 0.05, 0.1, 0.1)]
    with sampling(model) as record:
        model.generate(
            ids,
            features=features,
            generation_config=GenerationConfig(do_sample=True, top_k=0, max_new_tokens=1, pad_token_id=PAD),
        )
    with torch.no_grad():
        want = model(ids, features=features, cache=DynamicCache()).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(record.draws.policy_logp, want.gather(1, record.draws.tokens))
    assert (want[0] - want[1]).abs().max() > 0.01


def test_draws_follow_the_softmax():
    torch.manual_seed(0)
    scores = torch.tensor([2.0, -torch.inf, 0.0, -3.0, 1.0, -torch.inf])
    n = 40_000
    tokens, logp = draw(scores.expand(n, -1))
    p = scores.double().softmax(0)
    counts = tokens.bincount(minlength=6)
    possible = p > 0
    assert not counts[~possible].any()
    assert chisquare(counts[possible].numpy(), (n * p[possible]).numpy()).pvalue > 1e-3
    torch.testing.assert_close(logp.double(), p.log()[tokens], atol=1e-6, rtol=0)


def test_a_certain_token_is_drawn_with_certainty():
    scores = torch.full((1000, 5), -torch.inf)
    scores[:, 2] = 7.0
    tokens, logp = draw(scores)
    assert (tokens == 2).all() and not logp.any()

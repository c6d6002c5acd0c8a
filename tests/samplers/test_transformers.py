"""What the sampler says it drew from, against a plain forward pass that knows nothing of generation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from scipy.stats import chisquare
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from hapo.methods import TemperatureOptions
from hapo.parts.entropy import EntropyStats, entropy_from_logits
from hapo.parts.temperature import bounded_factor, zscore_factor
from hapo.samplers.rule import TemperatureRule
from hapo.samplers.transformers import TemperedLogits, sampling

PAD, EOS, VOCAB, NEW = 0, [1, 7, 12, 19, 31], 48, 16
PROMPTS = [[5, 9, 2], [7], [11, 3, 30, 4, 21, 8], [40, 41], [17, 6, 33], [25, 2, 2, 2]]
STATS = EntropyStats(pivot=0.4, sigma=0.9, h_max=0.9, h_min=-3.0)
RULES = {
    "none": None,
    "bounded": partial(bounded_factor, stats=STATS, tau=0.3),
    "zscore": partial(zscore_factor, stats=STATS, tau=0.3),
}


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
        )
    ).eval()
    with torch.no_grad():  # spread-out logits: entropies from nearly 0 to nearly ln V
        model.lm_head.weight.mul_(40)
    return model


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


def config(**options) -> GenerationConfig:
    defaults = {"do_sample": True, "max_new_tokens": NEW, "pad_token_id": PAD, "eos_token_id": EOS, "top_k": 0}
    return GenerationConfig(**{**defaults, **options})


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def until_eos(rows: list[list[int]]) -> list[list[int]]:
    ends = [next((t + 1 for t, token in enumerate(row) if token in EOS), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def draw(model, engine: str, factor=None, **options) -> tuple[list[list[int]], list[list[float]]]:
    torch.manual_seed(3)
    with sampling(model, factor) as record:
        if engine == "generate":
            inputs = padded(PROMPTS)
            out = model.generate(**inputs, generation_config=config(**options))
            completions = until_eos(out[:, inputs["input_ids"].shape[1] :].tolist())
        else:  # few and small: prompts are split, requests wait for one another
            batching = ContinuousBatchingConfig(
                num_blocks=32, page_size=16, max_batch_tokens=8, max_requests_per_batch=4, seed=3
            )
            out = model.generate_batch(PROMPTS, config(**options), batching)
            completions = [request.generated_tokens for request in out.values()]
    return completions, record.logps(completions)


@torch.no_grad()
def policy_logits(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """The logits that each token of the completion was drawn from, from one pass without padding or cache."""
    return model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()


def tempered(logits: torch.Tensor, t_base: float, factor) -> torch.Tensor:
    h = torch.distributions.Categorical(logits=logits / t_base).entropy()
    return logits / (t_base * (1.0 if factor is None else factor(h)[:, None].double()))


def taken(logits: torch.Tensor, completion: list[int]) -> torch.Tensor:
    return logits.log_softmax(-1)[range(len(completion)), completion]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("t_base", [1.0, 0.7])
@pytest.mark.parametrize("engine", ["generate", "generate_batch"])
def test_recorded_logps_are_those_of_a_plain_forward_pass(model, engine, t_base, rule):
    completions, logps = draw(model, engine, RULES[rule], temperature=t_base)
    assert len({len(c) for c in completions}) > 2  # rows that end early, at different steps
    assert max(map(len, completions)) == NEW
    changed, entropies = 0.0, []
    for prompt, completion, recorded in zip(PROMPTS, completions, logps, strict=True):
        logits = policy_logits(model, prompt, completion)
        expected = taken(tempered(logits, t_base, RULES[rule]), completion)
        torch.testing.assert_close(torch.tensor(recorded).double(), expected, atol=1e-4, rtol=0)
        changed = max(changed, (expected - taken(logits / t_base, completion)).abs().max().item())
        entropies.append(entropy_from_logits(logits, t_base))
    assert torch.cat(entropies).min() < 0.3  # the rule meets certain and uncertain tokens
    assert torch.cat(entropies).max() > 1.5
    assert changed == 0.0 if rule == "none" else changed > 0.05


@pytest.mark.parametrize("engine", ["generate", "generate_batch"])
def test_top_p_logps_are_renormalised_over_the_kept_set(model, engine):
    completions, logps = draw(model, engine, RULES["bounded"], temperature=0.7, top_p=0.9)
    gained = 0.0
    for prompt, completion, recorded in zip(PROMPTS, completions, logps, strict=True):
        full = tempered(policy_logits(model, prompt, completion), 0.7, RULES["bounded"]).log_softmax(-1)
        order = full.exp().sort(dim=-1, descending=True)
        more_likely = order.values.cumsum(-1) - order.values
        kept = (more_likely < 0.9).scatter(-1, order.indices, more_likely < 0.9)
        expected = taken(full.masked_fill(~kept, -torch.inf), completion)
        torch.testing.assert_close(torch.tensor(recorded).double(), expected, atol=1e-4, rtol=0)
        gained = max(gained, (expected - taken(full, completion)).max().item())
    assert 0.05 < gained <= -torch.tensor(0.9).log() + 1e-6


def test_all_warpers_and_penalties_are_in_the_recorded_logps(model):
    options = {"temperature": 0.8, "top_k": 12, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3}
    completions, logps = draw(model, "generate", RULES["zscore"], **options)
    for prompt, completion, recorded in zip(PROMPTS, completions, logps, strict=True):
        warpers = model._get_logits_processor(config(**options), input_ids_seq_length=len(prompt), device="cpu")
        logits = policy_logits(model, prompt, completion).float()
        scores = logits / RULES["zscore"](entropy_from_logits(logits, 0.8)).unsqueeze(-1)
        ids = torch.tensor([prompt + completion])
        final = [warpers(ids[:, : len(prompt) + t], row[None])[0] for t, row in enumerate(scores)]
        expected = taken(torch.stack(final), completion)
        torch.testing.assert_close(torch.tensor(recorded), expected, atol=1e-4, rtol=0)


def test_draws_follow_the_tempered_distribution(model):
    n, prompt, factor = 100_000, PROMPTS[0], lambda h: torch.full_like(h, 1.2)
    torch.manual_seed(5)
    with sampling(model, factor):
        out = model.generate(
            torch.tensor([prompt] * n), generation_config=config(max_new_tokens=1, temperature=0.9)
        )
    counts = out[:, -1].bincount(minlength=VOCAB).double()
    logits = policy_logits(model, prompt, [0])

    def p_value(logits: torch.Tensor) -> float:
        expected = n * logits[0].softmax(-1)
        rare = expected < 5
        pooled = [torch.cat([x[~rare], x[rare].sum()[None]]).numpy() for x in (counts, expected)]
        return chisquare(*pooled).pvalue

    assert p_value(tempered(logits, 0.9, factor)) > 0.01
    assert p_value(logits / 0.9) < 1e-12


@pytest.mark.parametrize("engine", ["generate", "generate_batch"])
def test_greedy_decoding_is_left_untouched(model, engine):
    def greedy(factor) -> list[list[int]]:
        with sampling(model, factor) as record:
            if engine == "generate":
                out = model.generate(**padded(PROMPTS), generation_config=config(do_sample=False)).tolist()
            else:
                batching = ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=64)
                requests = model.generate_batch(PROMPTS, config(do_sample=False), batching)
                out = [request.generated_tokens for request in requests.values()]
        with pytest.raises(RuntimeError, match="greedy"):
            record.logps(out)
        return out

    def breaking(entropy):
        raise AssertionError("the rule was asked in greedy decoding")

    assert greedy(breaking) == greedy(None)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # asked for by peft itself
def test_peft_model_is_followed_to_its_base(model):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    completions, logps = draw(wrapped, "generate", RULES["bounded"])
    for prompt, completion, recorded in zip(PROMPTS, completions, logps, strict=True):
        expected = taken(tempered(policy_logits(wrapped, prompt, completion), 1.0, RULES["bounded"]), completion)
        torch.testing.assert_close(torch.tensor(recorded).double(), expected, atol=1e-4, rtol=0)


def test_generation_that_misses_the_processors_is_an_error(model):
    other = tiny_llama(1)
    with (
        pytest.raises(RuntimeError, match="no generation of this LlamaForCausalLM"),
        sampling(model, RULES["bounded"]),
    ):
        other.generate(**padded(PROMPTS), generation_config=config())


def test_a_rule_with_statistics_serves(model, tmp_path):
    rule = TemperatureRule(TemperatureOptions(rule="zscore", tau=0.3), STATS)
    rule.save(tmp_path / "rule.json")
    loaded = TemperatureRule.load(tmp_path / "rule.json")
    by_rule = draw(model, "generate", loaded, temperature=0.7)
    assert by_rule == draw(model, "generate", RULES["zscore"], temperature=0.7)
    assert by_rule != draw(model, "generate", None, temperature=0.7)


def test_another_decoding_loop_is_refused(model):
    def own_loop(model, input_ids, **kwargs):
        return input_ids

    with pytest.raises(ValueError, match="no custom_generate"), sampling(model, RULES["bounded"]):
        model.generate(torch.tensor([PROMPTS[0]]), generation_config=config(), custom_generate=own_loop)
    with pytest.raises(ValueError, match="return_dict_in_generate=False"), sampling(model):
        model.generate(torch.tensor([PROMPTS[0]]), generation_config=config(return_dict_in_generate=True))


def test_a_continuous_batch_that_drops_the_rule_is_an_error(model, monkeypatch):
    monkeypatch.setattr(TemperedLogits, "supports_continuous_batching", False)
    with pytest.raises(RuntimeError, match="no generation"):
        draw(model, "generate_batch", RULES["bounded"])


def test_a_manager_from_before_the_block_is_an_error(model):
    """It holds the processors that it was made with, so neither the first nor a second batch would see the rule."""
    batching = ContinuousBatchingConfig(num_blocks=32, page_size=16, max_batch_tokens=8, return_logprobs=True)
    kept = model._cached_continuous_batching_manager = model.init_continuous_batching(config(), batching)
    try:
        with pytest.raises(RuntimeError, match="no generation"), sampling(model, RULES["bounded"]):
            model.generate_batch(PROMPTS, config(), batching)
        with sampling(model, RULES["bounded"]):
            model.generate(**padded(PROMPTS), generation_config=config())
            with pytest.raises(ValueError, match="second generation"):
                model.generate_batch(PROMPTS, config(), batching)
    finally:
        kept.destroy()
        del model._cached_continuous_batching_manager


@pytest.mark.parametrize(
    ("options", "message"), [({"num_beams": 2}, "beam_sample"), ({"prompt_lookup_num_tokens": 2}, "assisted")]
)
def test_beams_and_lookup_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message), sampling(model, RULES["bounded"]):
        model.generate(torch.tensor([PROMPTS[0]]), generation_config=config(**options))


def test_assistant_model_is_refused(model):
    with pytest.raises(ValueError, match="no assistant"), sampling(model, RULES["bounded"]):
        model.generate(torch.tensor([PROMPTS[0]]), generation_config=config(), assistant_model=tiny_llama(1))


def test_one_generation_a_block_and_no_persistent_manager(model):
    with sampling(model):
        model.generate(torch.tensor([PROMPTS[0]]), generation_config=config())
        with pytest.raises(ValueError, match="second generation"):
            model.generate(torch.tensor([PROMPTS[0]]), generation_config=config())
    with pytest.raises(ValueError, match="persistent_manager"), sampling(model):
        model.generate_batch(PROMPTS, config(), persistent_manager=True)


def test_failing_rule_fails_the_continuous_batch(model):
    def failing(entropy):
        raise ArithmeticError("no temperature today")

    with pytest.raises(RuntimeError, match="no temperature today"):
        draw(model, "generate_batch", failing)


def test_instance_is_restored(model, monkeypatch):
    monkeypatch.setattr(model, "generate_batch", model.generate_batch)  # someone else's patch survives
    before = dict(vars(model))
    with pytest.raises(KeyError), sampling(model, RULES["bounded"]):
        raise KeyError("from the block, not replaced by a complaint about missing generation")
    draw(model, "generate", RULES["bounded"])
    assert vars(model) == before


def test_completions_that_were_not_drawn_are_refused(model):
    torch.manual_seed(6)
    with sampling(model) as record:
        out = model.generate(**padded(PROMPTS), generation_config=config())
    completions = until_eos(out[:, len(PROMPTS[2]) :].tolist())
    with pytest.raises(ValueError, match="5 completions, but 6"):
        record.logps(completions[:-1])
    with pytest.raises(ValueError, match="completion 0 differs"):
        record.logps(completions[::-1])

"""Scoring runs equal prompts once, and neither rows nor columns that no valid token needs."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

import hapo.prompts as prompts
from hapo.prompts import distinct_rows
from hapo.scoring import attach_scoring, score_tokens

PROMPTS = [[5, 9, 2, 8, 3], [11, 3], [40, 41, 7], [5, 9, 2, 8, 3], [11, 3], [11, 3], [8, 8, 8]]
RESPONSES = [[4, 6, 1], [9], [3, 3, 12, 1], [2, 1], [7, 7, 7, 7, 7], [6], [5, 5]]
SCORED = [True, True, True, True, True, True, False]
"""The last row, the longest prompt's padding and the last two columns are needed by nothing."""
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=3),
    "gemma2": Gemma2Config(**SIZES, sliding_window=3),
    "gpt2": GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0),
}  # fmt: skip


def tiny(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")
    attach_scoring(model)
    return model.train()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    before, after = 8, 7
    rows = list(zip(PROMPTS, RESPONSES, strict=True))
    ids = [[0] * (before - len(p)) + p + r + [0] * (after - len(r)) for p, r in rows]
    attention = [[0] * (before - len(p)) + [1] * (len(p) + len(r)) + [0] * (after - len(r)) for p, r in rows]
    mask = torch.tensor(attention)[:, before:].bool() & torch.tensor(SCORED).unsqueeze(1)
    return torch.tensor(ids), torch.tensor(attention), mask


def by_rows(model) -> torch.Tensor:
    """Log-probs of each row alone, without padding."""
    logps = []
    for prompt, response, scored in zip(PROMPTS, RESPONSES, SCORED, strict=True):
        if scored:
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1))
    return torch.cat(logps)


def sizes(model) -> list[tuple[int, ...]]:
    """Shapes of what the layers see."""
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def gradients(model, logps: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_same(model, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Log-probs and the gradients of all weights."""
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    for got, want in zip(gradients(model, found), gradients(model, expected), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.fixture(autouse=True)
def _share_whatever_it_saves(monkeypatch):
    monkeypatch.setitem(prompts.WORTH, "cpu", 0.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_and_gradients_are_those_of_each_row_alone(name):
    model = tiny(name)
    ids, attention, mask = batch()
    expected = by_rows(model)
    seen = sizes(model)
    found = score_tokens(model, ids, attention, mask).logp[mask]
    # Three prompts of five columns, then six rows; the longest response has five tokens, the last predicts nothing.
    assert seen == [(3, 5), (6, 4)]
    assert_same(model, found, expected)


def test_checkpointed_layers_run_whole_rows():
    model = tiny("llama")
    ids, attention, mask = batch()
    expected = by_rows(model)
    model.activation_checkpointing_enable()
    seen = sizes(model)
    found = score_tokens(model, ids, attention, mask).logp[mask]
    assert seen == [(6, 9)]
    assert_same(model, found, expected)


def test_one_token_responses_need_the_prompts_alone():
    model = tiny("llama")
    ids, attention, mask = batch()
    whole = score_tokens(model, ids, attention, mask).logp
    seen = sizes(model)
    mask[:, 1:] = False
    torch.testing.assert_close(score_tokens(model, ids, attention, mask).logp[:, 0], whole[:, 0])
    assert seen == [(3, 5)]


def test_distinct_rows_do_not_read_padding():
    ids = torch.tensor([[9, 4], [3, 4], [5, 4], [9, 4]])
    mask = torch.tensor([[0, 1], [0, 1], [1, 1], [1, 1]])
    first, of_row = distinct_rows(ids, mask)
    assert sorted(first.tolist()) == [0, 2, 3]
    assert first[of_row].tolist() == [0, 0, 2, 3]


def test_what_saves_little_is_not_shared(monkeypatch):
    model = tiny("llama")
    ids, attention, mask = batch()
    monkeypatch.setitem(prompts.WORTH, "cpu", 15 * 50_000.0)  # 3 rows of 5 columns, a layer of 11,000 weights
    seen = sizes(model)
    score_tokens(model, ids, attention, mask)
    assert seen == [(6, 9)]

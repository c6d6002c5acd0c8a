"""Held-out accuracy: intervals, and that measuring disturbs nothing."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig

from hapo.cache import cache_of
from hapo.cli import episodes
from hapo.cli.measure import Answer, Decoding, draw_answers, estimate
from hapo.samplers.transformers import less_work, say_what_model_asked
from tests.engines import tiny

PROBLEMS = Dataset.from_dict({"prompt": ["1+2=", "12+34=", "5+5=", "123+4="], "answer": ["3", "46", "10", "127"]})


def answers(*scores: float, samples: int = 1) -> list[Answer]:
    return [Answer(i // samples, i % samples, "", 0, score) for i, score in enumerate(scores)]


def draw(net: torch.nn.Module, reward=tiny.count_digits, weights=None, **decoding) -> list[Answer]:
    given = Decoding(**{"max_new_tokens": 8, "batch_size": 3, **decoding})
    return draw_answers(net, tiny.tokenizer(), PROBLEMS, [reward] * len(weights or [1]), given, weights=weights)


def test_wilson_interval_of_eight_in_ten():
    found = estimate(answers(*[1.0] * 8, *[0.0] * 2))
    assert (found.mean, found.binary) == (0.8, True)
    assert (found.low, found.high) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert str(found) == "80.0 % [49.0, 94.3]"


def test_several_samples_give_the_normal_interval_of_the_means_of_problems():
    found = estimate(answers(1, 0, 1, 1, 0, 0, 1, 0, samples=2))  # means 1/2, 1, 0, 1/2: s = 0.408248
    assert (found.mean, found.problems, found.samples) == (0.5, 4, 2)
    assert (found.low, found.high) == pytest.approx((0.5 - 0.400082, 0.5 + 0.400082), abs=1e-5)


def test_scores_other_than_0_and_1_are_no_accuracy():
    found = estimate(answers(0.5, 2.0, 3.5))
    assert not found.binary
    assert str(found) == "2.000 [0.303, 3.697]"


def test_measuring_leaves_generator_and_mode_as_they_were():
    net = tiny.model()
    net.train()
    before = torch.get_rng_state()
    first, second = draw(net, temperature=1.0, seed=3), draw(net, temperature=1.0, seed=3)
    assert first == second != draw(net, temperature=1.0, seed=4)
    assert net.training
    assert torch.equal(torch.get_rng_state(), before)


def test_keys_and_values_have_room_to_grow_while_answers_are_measured(monkeypatch):
    asked = []
    monkeypatch.setattr("hapo.samplers.decoding.give_room", lambda kwargs: asked.append(cache_of(kwargs)))
    net, tokenizer = tiny.model(), tiny.tokenizer()
    draw(net)
    assert len(asked) == 2 and None not in asked  # two batches
    config = GenerationConfig(max_new_tokens=2, eos_token_id=[tokenizer.eos_token_id], pad_token_id=0)
    with less_work(net):
        episodes._turn(net, tokenizer, config, [[5, 6], [7]])
    assert len(asked) == 3


FILES = [
    {"min_p": 0.9},
    {"num_beams": 4},
    {"typical_p": 0.2},
    {"suppress_tokens": [5, 6, 7, 8]},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 8},
    {"repetition_penalty": 3.0, "temperature": 0.1, "top_p": 0.1, "top_k": 1},
    {"bad_words_ids": [[5]], "exponential_decay_length_penalty": [1, 3.0], "epsilon_cutoff": 0.2},
    {"forced_eos_token_id": 1, "encoder_repetition_penalty": 2.0, "sequence_bias": [[[5], -9.0]]},
]
"""What a generation_config.json may hold beside token ids."""


@pytest.mark.parametrize("asked", FILES, ids=lambda asked: "-".join(asked))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_the_model_s_own_generation_config_asks_for_does_not_act(asked, temperature):
    net = tiny.model()
    plain = draw(net, temperature=temperature)
    own = net.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, **asked)
    assert draw(net, temperature=temperature) == plain
    assert net.generation_config is own
    said = say_what_model_asked(own)
    assert all(name in said for name in asked) and "none of it does" in said
    assert say_what_model_asked(GenerationConfig(eos_token_id=[1, 2], pad_token_id=0, do_sample=True)) == ""


def test_greedy_answers_do_not_depend_on_batch_or_padding():
    net = tiny.model()
    assert draw(net, batch_size=1) == draw(net, batch_size=4)


def test_answers_to_messages_do_not_depend_on_batch_or_padding():
    rows = [[{"role": "user", "content": text.rstrip("=")}] for text in PROBLEMS["prompt"]]
    problems = Dataset.from_dict({"prompt": rows, "answer": PROBLEMS["answer"]})
    chat = {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}="}
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "right"  # as many tokenizers come
    for size in (1, 4):
        decoding = Decoding(max_new_tokens=8, batch_size=size)
        net, reward = tiny.model(), lambda completions, **columns: [0.0] * len(completions)
        found = draw_answers(net, tokenizer, problems, [reward], decoding, chat_template_kwargs=chat)
        assert [a.text for a in found] == [a.text for a in draw(net)]


def test_samples_of_a_problem_are_numbered_and_the_score_is_the_weighted_sum():
    found = draw(tiny.model(), samples=2, temperature=1.0, weights=[0.5, 0.25])
    assert [(a.problem, a.sample) for a in found] == [(i, k) for i in range(4) for k in range(2)]
    assert {a.score for a in found} == {0.0, 0.75}


def test_messages_go_through_the_chat_template_and_answers_come_back_as_messages():
    seen: list = []

    def reward(prompts, completions, answer, **columns):
        seen.extend(completions)
        return [float(len(gold)) for gold in answer]

    tokenizer = tiny.tokenizer()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    problems = Dataset.from_dict({"prompt": [[{"role": "user", "content": "1+2"}]], "answer": ["3"]})
    decoding = Decoding(max_new_tokens=8)
    plain = draw_answers(tiny.model(), tokenizer, PROBLEMS.select([0]), [tiny.count_digits], decoding)
    chat = draw_answers(
        tiny.model(), tokenizer, problems, [reward], decoding, chat_template_kwargs={"chat_template": template}
    )
    assert seen == [[{"role": "assistant", "content": plain[0].text}]]
    assert chat[0].score == 1.0

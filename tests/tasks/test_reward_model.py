"""A reward model as a score of token ids: where it is read, what masks, attention, refusals; and the bundled one."""

import hashlib
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from hapo.assets import reward_model_path, tiny_model_path
from hapo.tasks.addition import draw_problems, parts_right, prompt, solution, wrong_places
from hapo.tasks.attribution import Attribution
from hapo.tasks.reward_model import RewardModel

PAD, EOS = 0, 1
SMALL = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tokens(**ids):
    """What a tokenizer says of its special tokens."""
    found = {"mask_token_id": None, "unk_token_id": None, "pad_token_id": PAD, **ids}
    return SimpleNamespace(all_special_ids=[PAD, EOS], added_tokens_decoder={}, **found)


def llama(labels=1):
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_key_value_heads=2, num_labels=labels, pad_token_id=PAD, eos_token_id=EOS)
    return LlamaForSequenceClassification(config)


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SMALL, num_labels=1, pad_token_id=PAD))


ROWS = [[5, 6, 7, 8, 9, 1], [5, 6], [7, 8, 9, 4, 4, 4, 4, 1], [9]]


@pytest.mark.parametrize("make", [llama, bert])
def test_a_row_has_one_score_whatever_stands_beside_it(make):
    model = RewardModel(make(), tokens())
    together = model(ROWS)
    for score, row in zip(together, ROWS, strict=True):
        with torch.no_grad():
            alone = model.model(input_ids=torch.tensor([row])).logits.item()
        assert score == pytest.approx(alone, abs=1e-6) == pytest.approx(model([row])[0], abs=1e-6)
    assert not model.model.training and all(isinstance(score, float) for score in together)


@pytest.mark.parametrize("make", [llama, bert])
def test_a_row_beyond_the_context_is_refused(make):
    model = RewardModel(make(), tokens())
    model.model.config.max_position_embeddings = 7
    assert len(model([[5] * 7])) == 1
    for score in (model, model.attention):
        with pytest.raises(ValueError, match=r"a row of 8 tokens .* context of 7"):
            score([[5] * 8])


def test_a_masked_last_token_does_not_move_the_place_that_is_read():
    """transformers reads a classifier at the last token that is not the padding: with a mask of that id, earlier."""
    model = RewardModel(llama(), tokens())
    assert model.masks_with == "padding" and model.mask_id == PAD
    row = [5, 6, 7, PAD]
    with torch.no_grad():
        hidden = model.model.model(input_ids=torch.tensor([row])).last_hidden_state
        here = model.model.score(hidden)[0, :, 0]
        theirs = model.model(input_ids=torch.tensor([row])).logits.item()
    assert theirs == pytest.approx(here[2].item(), abs=1e-6)
    assert model([row, [5] * 9])[0] == pytest.approx(here[3].item(), abs=1e-6) != pytest.approx(theirs, abs=1e-3)


def test_what_a_token_is_masked_with():
    for ids, chosen in (
        ({"mask_token_id": 7, "unk_token_id": 8}, ("mask", 7)),
        ({"unk_token_id": 8}, ("unknown", 8)),
        ({}, ("padding", PAD)),
    ):
        model = RewardModel(llama(), tokens(**ids))
        assert (model.masks_with, model.mask_id) == chosen
    assert RewardModel(llama(), tokens(), mask_id=9).mask_id == 9
    with pytest.raises(ValueError, match="no mask, unknown or padding token to mask with: give mask_id"):
        RewardModel(llama(), tokens(pad_token_id=None))
    assert len(RewardModel(llama(), tokens(pad_token_id=None), mask_id=9)(ROWS)) == 4
    added = tokens()
    added.added_tokens_decoder = {20: SimpleNamespace(special=True), 21: SimpleNamespace(special=False)}
    assert RewardModel(llama(), added).special_ids == {PAD, EOS, 20}


def test_several_logits_need_a_label():
    with pytest.raises(ValueError, match="3 logits: give label"):
        RewardModel(llama(3), tokens())
    with pytest.raises(ValueError, match="label 3 is none of the model's 3 logits"):
        RewardModel(llama(3), tokens(), label=3)
    scores = [RewardModel(llama(3), tokens(), label=label)([[5, 6]])[0] for label in range(3)]
    with torch.no_grad():
        assert scores == pytest.approx(
            llama(3).eval()(input_ids=torch.tensor([[5, 6]])).logits[0].tolist(), abs=1e-6
        )


@pytest.mark.parametrize("make", [llama, bert])
def test_attention_of_the_last_layer_from_the_place_that_is_read(make):
    model = RewardModel(make(), tokens())
    kind = model.model.config._attn_implementation
    found = model.attention(ROWS)
    assert model.model.config._attn_implementation == kind != "eager"
    for weights, row in zip(found, ROWS, strict=True):
        assert len(weights) == len(row) and sum(weights) == pytest.approx(1.0, abs=1e-5)
    eager = make().eval()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        layer = eager(input_ids=torch.tensor([ROWS[0]]), output_attentions=True).attentions[-1][0].mean(0)
    assert found[0] == pytest.approx(layer[0 if make is bert else -1].tolist(), abs=1e-6)


def test_a_model_that_pools_has_no_place():
    config = ModernBertConfig(
        **{**SMALL, "num_hidden_layers": 1}, num_labels=1, classifier_pooling="mean", pad_token_id=PAD,
        bos_token_id=None, eos_token_id=EOS, cls_token_id=2, sep_token_id=3,
    )  # fmt: skip
    model = RewardModel(ModernBertForSequenceClassification(config), tokens())
    assert len(model(ROWS)) == 4
    with pytest.raises(ValueError, match="pools over all tokens"):
        model.attention(ROWS)


def test_the_identity_is_that_of_weights_and_options():
    one = RewardModel(llama(), tokens())
    assert one.identity == RewardModel(llama(), tokens()).identity
    assert RewardModel(llama(3), tokens(), label=0).identity != RewardModel(llama(3), tokens(), label=1).identity
    changed = llama()
    with torch.no_grad():
        changed.score.weight[0, 0] += 1e-3
    assert RewardModel(changed, tokens()).identity != one.identity


def test_attribution_of_a_model(tmp_path):
    """All channels, no gradient; special tokens have none, and the attention of the rest is what the model has."""
    model = RewardModel(llama(), tokens())
    channels = Attribution(model, ("shap", "lime", "attention", "sparse"), cache=tmp_path)
    found = channels([[5, 6], [7]], [[7, 8, 9, EOS], [8, 9]])
    assert [set(one.channels) for one in found] == [{"shap", "lime", "attention", "sparse"}] * 2
    assert found[0].score == pytest.approx(model([[5, 6, 7, 8, 9, EOS]])[0], abs=1e-6)
    assert found[0].channels["shap"][3] == found[0].channels["attention"][3] == 0.0
    assert found[0].channels["attention"][:3] == pytest.approx(model.attention([[5, 6, 7, 8, 9, EOS]])[0][2:5])
    assert abs(found[0].gap) < 1e-9 and found[0].passes == 9
    assert all(p.grad is None for p in model.model.parameters())
    again = Attribution(model, channels.channels, cache=tmp_path)([[5, 6], [7]], [[7, 8, 9, EOS], [8, 9]])
    assert [one.channels for one in again] == [one.channels for one in found] and again[0].passes == 0


# ---- the bundled model


@pytest.fixture(scope="module")
def bundled():
    return RewardModel.load(reward_model_path())


def rows_of(model, answers):
    tokenizer = model.tokenizer
    questions = [tokenizer(prompt(a, b)).input_ids for a, b, _ in answers]
    return questions, [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for *_, text in answers]


def spoilt_answers(count, seed):
    """Right answers to held-out problems with one digit wrong, and the place of it."""
    rng = random.Random(seed)
    answers, places = [], []
    for a, b in draw_problems(rng, count, evaluation=True):
        text = solution(a, b)
        place = rng.choice([i for i, c in enumerate(text) if c.isdigit()])
        digit = rng.choice([d for d in "0123456789" if d != text[place]])
        answers.append((a, b, text[:place] + digit + text[place + 1 :]))
        places.append(place)
        assert wrong_places(*answers[-1]) == [place]
    return answers, places


def test_the_bundled_model_is_what_its_card_says(bundled):
    folder = reward_model_path()
    card = (folder / "CARD.md").read_text()
    names = {"CARD.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in folder.iterdir()} == names
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card
    assert f"{bundled.model.num_parameters():,} parameters" in card and "license: apache-2.0" in card
    assert (folder / "model.safetensors").stat().st_size < 2**20
    assert bundled.masks_with == "mask" and bundled.mask_id == 98


def test_the_bundled_model_reads_the_ids_of_the_tiny_model(bundled):
    from transformers import AutoTokenizer

    bundled.check_tokens(AutoTokenizer.from_pretrained(tiny_model_path(), local_files_only=True))
    other = SimpleNamespace(get_vocab=lambda: {"0": 2, "zero": 3})
    with pytest.raises(ValueError, match="token 'zero' has id 3 for the policy and None for the reward model"):
        bundled.check_tokens(other)


def test_the_bundled_model_tells_right_parts_from_wrong_ones(bundled):
    answers, _ = spoilt_answers(60, seed=7)
    answers += [(a, b, solution(a, b)) for a, b, _ in answers]
    questions, completions = rows_of(bundled, answers)
    scores = np.array(bundled([q + c for q, c in zip(questions, completions, strict=True)]))
    truth = np.array([parts_right(*answer) for answer in answers])
    assert np.sqrt(np.square(scores - truth).mean()) < 0.15
    assert (scores[60:] > scores[:60]).mean() > 0.9  # a right answer above the same one with an error


def test_the_heaviest_blame_falls_on_the_wrong_digit(bundled):
    answers, places = spoilt_answers(12, seed=8)
    channels = Attribution(bundled, ("shap", "sparse"), samples=128)
    found = channels(*rows_of(bundled, answers))
    hits = [int(np.argmin(one.channels["shap"])) == place for one, place in zip(found, places, strict=True)]
    assert sum(hits) >= 8  # by chance one in 27

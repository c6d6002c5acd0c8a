"""The embedded default: worked answers, the outcome reward, the split, and the bundled model."""

import hashlib
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from hapo.assets import MODELS, diffusion_model_path, tiny_model_path
from hapo.masked import mask_token
from hapo.samplers.diffusion import Unmasking, decode
from hapo.tasks import TaskConfig, load_task
from hapo.tasks.addition import (
    MAX_COMPLETION,
    addition_reward,
    held_out,
    load_addition,
    parts_right,
    solution,
    wrong_places,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_model_path(), local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_model_path(), local_files_only=True).eval()


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (347, 586, "7+6=13;4+8+1=13;3+5+1=9;933"),
        (123, 456, "3+6=9;2+5=7;1+4=5;579"),
        (100, 900, "0+0=0;0+0=0;1+9=10;1000"),
        (999, 999, "9+9=18;9+9+1=19;9+9+1=19;1998"),
    ],
)
def test_worked_answers(a, b, text):
    assert solution(a, b) == text


def test_worked_answer_needs_columns_that_match():
    with pytest.raises(ValueError, match="12 and 345 differ in their number of digits"):
        solution(12, 345)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("7+6=13;4+8+1=13;3+5+1=9;933", 1.0),
        ("7+6=99;933", 1.0),  # an outcome reward reads the sum only
        ("933", 1.0),
        ("7+6=13;4+8+1=13;3+5+1=9;934", 0.0),
        ("7+6=13;4+8+1=13;3+5+1=9;933;", 0.0),
        ("933;934", 0.0),
        (";0933", 0.0),
        (";+933", 0.0),
        (";933.0", 0.0),
        ("; 933", 0.0),
        (";933\n", 0.0),
        (";9339", 0.0),
        (";933 or 934", 0.0),
        (";٩٣٣", 0.0),
        ("", 0.0),
    ],
)
def test_reward_is_the_exact_sum_and_nothing_else(completion, reward):
    assert addition_reward(["347+586="], [completion], ["933"]) == [reward]


@pytest.mark.parametrize(
    ("completion", "share", "places"),
    [
        ("7+6=13;4+8+1=13;3+5+1=9;933", 1.0, []),
        ("7+6=14;4+8+1=13;3+5+1=9;933", 0.75, [5]),
        ("7+6=13;4+8+1=13;3+5+1=9;934", 0.75, [26]),
        ("8+6=14;4+8+1=13;3+5+1=9;833", 0.5, [0, 5, 24]),
        ("7+6=13;4+8=12;3+5+1=9;933", 0.75, []),  # shorter: no character can be named
        ("933", 0.0, []),
        ("7+6=13", 0.25, []),
        ("", 0.0, []),
        ("7+6=13;4+8+1=13;3+5+1=9;933;", 0.8, []),
        ("4+8+1=13;7+6=13;3+5+1=9;933", 0.5, [0, 2, 3, 5, 6, 7, 8, 9, 11]),
    ],
)
def test_parts_that_are_right_and_places_that_are_wrong(completion, share, places):
    assert parts_right(347, 586, completion) == share
    assert wrong_places(347, 586, completion) == places


def test_split_is_by_content():
    train, evaluation = load_addition(seed=1, train_size=4000, eval_size=1000)

    def pairs(data):
        return [tuple(sorted(map(int, q.split("+")))) for q in data["question"]]

    trained, evaluated = pairs(train), pairs(evaluation)
    assert len(set(trained)) == 4000
    assert len(set(evaluated)) == 1000
    assert not set(trained) & set(evaluated)
    assert all(held_out(b, a) and held_out(a, b) for a, b in evaluated)
    assert train[0]["prompt"] == train[0]["question"] + "="
    assert all(int(r["answer"]) == sum(map(int, r["question"].split("+"))) for r in evaluation)


def test_seed_changes_training_but_not_evaluation():
    train_1, evaluation_1 = load_addition(1, 50, 20)
    train_2, evaluation_2 = load_addition(2, 50, 40)
    assert train_1["prompt"][:] != train_2["prompt"][:]
    assert evaluation_1["prompt"][:] == evaluation_2["prompt"][:20]


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="cannot draw 1000000 distinct problems; choose a size between"):
        load_addition(0, 10, 1_000_000)


def test_no_answer_wins_by_being_common():
    _, evaluation = load_addition(0, 0, 500)
    answers = evaluation["answer"][:]
    assert max(answers.count(a) for a in answers) <= 10


def test_tokenizer_round_trips_and_the_limit_fits(tokenizer):
    longest = 0
    for a, b in [(999, 999), (347, 586), (100, 100), (905, 195)]:
        ids = tokenizer(solution(a, b)).input_ids
        longest = max(longest, len(ids) + 1)
        assert len(ids) == len(solution(a, b))
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == solution(a, b)
    assert longest < MAX_COMPLETION
    text = 'Any ASCII: "two  spaces", it \'s (x < 3) .\n'
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_bundled_model_is_what_its_card_says(model):
    folder = tiny_model_path()
    card = (folder / "CARD.md").read_text()
    assert {f.name for f in folder.iterdir()} == {
        "CARD.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card
    assert f"{model.num_parameters():,} parameters" in card
    assert 700_000 < model.num_parameters() < 1_300_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_bundled_model_adds_as_well_as_its_card_says(model, tokenizer):
    recorded = float(re.search(r"greedy accuracy \| ([\d.]+)", (tiny_model_path() / "CARD.md").read_text())[1])
    _, problems = load_addition(0, 0, 200)
    inputs = tokenizer(problems["prompt"][:], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=MAX_COMPLETION, do_sample=False)
    answers = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    rewards = addition_reward(problems["prompt"][:], answers, problems["answer"][:])
    # 200 of the card's 500 problems: three standard errors are 10 points
    assert 100 * sum(rewards) / len(rewards) == pytest.approx(recorded, abs=10)


def test_bundled_diffusion_model_is_what_its_card_says():
    folder = diffusion_model_path()
    card = (folder / "CARD.md").read_text()
    names = {"CARD.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {f.name for f in folder.iterdir()} == names
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card
    model = AutoModelForMaskedLM.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert f"{model.num_parameters():,} parameters" in card
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert mask_token(model.config, tokenizer) == model.config.mask_token_id == tokenizer.mask_token_id
    assert MODELS["diffusion_tiny"] == folder

    _, problems = load_addition(0, 0, 200)
    ids = tokenizer(problems["prompt"][:], return_tensors="pt").input_ids
    ends = {"mask_id": tokenizer.mask_token_id, "eos_ids": [tokenizer.eos_token_id]}
    for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        recorded = float(re.search(rf"{how} accuracy \| ([\d.]+)", card)[1])
        assert 15 <= recorded <= 40
        unmasking, generator = Unmasking(length=14, temperature=temperature), torch.Generator().manual_seed(0)
        drawn = decode(model, ids, torch.ones_like(ids), unmasking, generator=generator, **ends).ids
        answers = [text.partition(tokenizer.eos_token)[0] for text in tokenizer.batch_decode(drawn.tolist())]
        rewards = addition_reward(problems["prompt"][:], answers, problems["answer"][:])
        # 200 of the card's 500 problems: three standard errors are 10 points
        assert 100 * sum(rewards) / len(rewards) == pytest.approx(recorded, abs=10)


@pytest.mark.parametrize("options", [{"chat": True}, {"prompt_template": "{question}?"}])
def test_prompts_of_another_form_are_refused(options):
    with pytest.raises(ValueError, match="do not go with dataset addition"):
        load_task(TaskConfig(**options), seed=0)

import json

import pytest
import reasoning_gym

from hapo.tasks import TaskConfig, load_task
from hapo.tasks.verifier import Judge

from .answer_cases import BOTH


def load(name, seed=0, **options):
    sizes = {"train_size": 40, "eval_size": 10} | options
    return load_task(TaskConfig(dataset=f"reasoning_gym:{name}", **sizes), seed=seed)


def score(task, completions, row=0):
    columns = {name: [value] * len(completions) for name, value in task.eval[row].items() if name != "prompt"}
    (reward,) = task.reward_funcs
    return reward([task.eval[row]["prompt"]] * len(completions), completions, **columns)


def test_partial_credit_for_containing_the_answer_counts_as_wrong():
    task = load("chain_sum")
    gold = task.eval[0]["answer"]
    entry = {"answer": gold}
    partial = reasoning_gym.create_dataset("chain_sum").score_answer(f"{gold}0", entry)
    assert 0 < partial < 1
    assert score(task, [f"{gold}0", f"{gold} {gold}", gold, f"thus\n<answer> {gold} </answer>."]) == [
        0.0,
        0.0,
        1.0,
        1.0,
    ]


def test_a_score_above_one_is_no_right_answer():
    """spell_backward gives 1.0000000000000002 for the right word of 9 or 11 letters with text behind it."""
    task = load("spell_backward", train_size=2, eval_size=8, task_options={"min_word_len": 9, "max_word_len": 11})
    for row in range(8):
        gold = task.eval[row]["answer"]
        assert score(task, [gold, f"{gold} and so on"], row) == [1.0, 0.0]


def test_the_stated_answer_is_the_one_that_other_rewards_find():
    task = load("chain_sum")
    gold, other = task.eval[0]["answer"], str(int(task.eval[0]["answer"]) + 1)
    for kind in ("tags", "statement"):
        for stated, completion, right in BOTH[kind]:
            if stated == "5" and right is not None:
                text = completion.replace("6", other).replace("5", gold)
                assert score(task, [text]) == [right], completion


@pytest.mark.parametrize("name", ["rearc", "prime_factorization", "word_ladder"])
def test_entries_are_scored_as_they_were_made(name):
    """rearc scores by tuples that JSON would turn into lists; prime_factorization's scorer raises on prose."""
    task = load(name, train_size=2, eval_size=3)
    for row in range(3):
        assert score(task, [task.eval[row]["answer"], "not an answer"], row) == [1.0, 0.0]


def test_evaluation_is_held_out_by_content_and_the_same_for_every_seed():
    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    first, second = (load("chain_sum", seed, task_options=small) for seed in (0, 1))
    for task in (first, second):
        assert not set(task.train["question"]) & set(task.eval["question"])
        assert len(set(task.eval["question"])) == 10
    assert first.eval["question"] == second.eval["question"]
    assert first.train["question"] != second.train["question"]


FOLLOW_THE_PROCESS = [
    "isomorphic_strings",
    "list_functions",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
]
"""Of which reasoning-gym alone makes others in a process with another hash seed: bench/gym_repeats.py, which has
knight_swap and intermediate_integration as well; making these takes longer."""


@pytest.mark.parametrize("name", FOLLOW_THE_PROCESS)
def test_problems_repeat_themselves_in_another_process(name, monkeypatch):
    """In another order as well: a judge that was restarted makes the entries that it is asked for."""
    made = []
    for hash_seed, order in (("1", range(20)), ("2", reversed(range(20)))):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        judge = Judge("reasoning_gym", 60.0, name=name, options={})
        problems = {index: judge.call("problem", json.dumps([7, 20, index])) for index in order}
        made.append([problems[index] for index in range(20)])
        judge.close()
    assert made[0] == made[1]


def test_an_entry_whose_question_is_another_one_is_not_judged(caplog):
    task = load("chain_sum", train_size=2, eval_size=1)
    (reward,) = task.reward_funcs
    row = task.eval[0]
    *entry, digest = json.loads(row["entry"])
    for known, score in ((digest, 1.0), ("0" * 16, 0.0)):
        assert reward(["?"], [row["answer"]], entry=[json.dumps([*entry, known])]) == [score]
    assert "made another question of this entry than was asked" in caplog.text


def test_a_mixture_of_tasks_is_scored_by_the_task_of_each_problem():
    parts = [
        {"name": "gcd", "weight": 3, "config": {"max_value": 50}},
        {"name": "spell_backward", "config": {"min_word_len": 3, "max_word_len": 5}},
    ]
    task = load("composite", train_size=12, eval_size=12, task_options={"datasets": parts})
    questions = [row["question"] for row in task.eval]
    spelling = ["backward" in question for question in questions]
    assert 0 < sum(spelling) < len(spelling)
    for row, problem in enumerate(task.eval):
        assert score(task, [problem["answer"], "?"], row) == [1.0, 0.0]


def test_tasks_without_gold_answers_need_their_own_scorer():
    task = load("graph_color", train_size=3, eval_size=2)
    assert task.majority_share == 0.0
    seed, size, index, _ = json.loads(task.eval[0]["entry"])
    entry = reasoning_gym.create_dataset("graph_color", seed=seed, size=size)[index]
    solution = json.dumps(entry["metadata"]["possible_answer"])
    assert score(task, [solution, "{}"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="gold answers cannot be used; the first is row 1: '' .it is empty"):
        load("graph_color", train_size=3, eval_size=2, rewards=["exact"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_sums", {}, "reasoning-gym has no task 'chain_sums'; did you mean chain_sum"),
        ("chain_sum", {"task_options": {"terms": 2}}, r"'chain_sum' refuses the options \{'terms': 2\}: .*terms"),
        ("composite", {}, r"'composite' refuses the options \{\}: Must specify at least one dataset"),
        ("game_of_life_halting", {}, r"the scorer of .*'game_of_life_halting' accepts any text, such as '#\?#'"),
        (
            "codeio",
            {},
            "task 'codeio' makes other problems in every process, .*: it runs programs that ask for the time",
        ),
        (
            "composite",
            {"task_options": {"datasets": [{"name": "chain_sum", "weight": 1}, {"name": "codeio", "weight": 1}]}},
            "task 'codeio' makes other problems",
        ),
        ("composite", {"task_options": {"datasets": {"gcd": 1}}}, "datasets must be a list of mappings"),
        ("composite", {"task_options": {"datasets": [{"name": "gcd"}, {"name": "gcd"}]}}, "holds gcd twice"),
        (
            "composite",
            {"task_options": {"datasets": [{"name": "gcd", "config": {"seed": 1}}]}},
            "the config of gcd sets seed; use task_seed",
        ),
        ("composite", {"task_options": {"datasets": [{"name": "gcd", "wait": 1}]}}, "refuses the options .*wait"),
        (
            "chain_sum",
            {"task_options": {"seed": 2}},
            "task_options sets seed; use task_seed, train_size, eval_size",
        ),
        (
            "chain_sum",
            {"eval_size": 500, "task_options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}},
            r"only \d+ of 500 problems wanted in 2000 draws; ask for fewer",
        ),
    ],
)
def test_unknown_and_impossible_tasks_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        load(name, **options)

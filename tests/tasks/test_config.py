import dataclasses

import pytest
from trl import GRPOConfig, ModelConfig, TrlParser

from hapo.tasks import TaskConfig


@pytest.mark.parametrize("other", [GRPOConfig, ModelConfig])
def test_shares_no_option_with_trl(other):
    fields = {f.name for f in dataclasses.fields(TaskConfig)}
    assert not fields & {f.name for f in dataclasses.fields(other)}


def test_is_parsed_from_yaml_with_flags_over_it(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "dataset: reasoning_gym:chain_sum\ntask_options: {min_terms: 2}\nrewards: exact\n"
        "on_reward_error: 0\ntrain_size: 100\nchat: true\n"
    )
    (config,) = TrlParser([TaskConfig]).parse_args_and_config(["--config", str(recipe), "--train_size", "7"])
    assert (config.task_options, config.rewards, config.train_size, config.chat) == (
        {"min_terms": 2},
        ["exact"],
        7,
        True,
    )
    assert config.reward_fallback() == 0.0

    flags = ["--dataset", "reasoning_gym:x", "--task_options", '{"a": 1}', "--rewards", "exact", "math_verify"]
    (config,) = TrlParser([TaskConfig]).parse_args_and_config(flags)
    assert (config.task_options, config.rewards) == ({"a": 1}, ["exact", "math_verify"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dataset": "a.csv", "prompt_template": "Solve."},
            r"prompt_template 'Solve\.' does not contain \{question\}",
        ),
        ({"dataset": "a.csv", "system_prompt": "Be brief."}, "system_prompt needs chat"),
        ({"dataset": "reasoning_gym:x", "task_options": "{"}, r"task_options is no JSON: '\{'"),
        ({"dataset": "reasoning_gym:x", "task_options": "[1]"}, r"task_options must be a mapping, not \[1\]"),
        ({"dataset": "a.csv", "task_options": {"n": 1}}, "task_options are for reasoning_gym:NAME"),
        ({"on_reward_error": "zero"}, "on_reward_error must be raise or a number, not 'zero'"),
        ({"on_reward_error": "nan"}, "on_reward_error must be raise or a number, not 'nan'"),
        ({"on_bad_gold": "ignore"}, "on_bad_gold must be raise or drop, not 'ignore'"),
        ({"reward_timeout": 0.0}, r"reward_timeout must be positive, not 0\.0"),
        ({"rewards": []}, "rewards is empty"),
        ({"train_size": 0}, "train_size must be at least 1, not 0"),
        ({"extra_columns": ["prompt"]}, "extra_columns may not contain prompt"),
        ({"test_split": "test", "eval_file": "a.csv"}, "both test_split and eval_file"),
    ],
)
def test_impossible_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TaskConfig(**options)


def test_none_takes_back_what_a_recipe_says():
    config = TaskConfig(dataset="a.jsonl", eval_file="b.jsonl", test_split="none", dataset_config="none")
    assert (config.test_split, config.dataset_config) == (None, None)

"""The doctor: each finding on a configuration or a run that is broken in that one way, none on healthy ones."""

from __future__ import annotations

import csv
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from trl import ModelConfig

from hapo.assets import tiny_model_path
from hapo.cli.model import AdaptedModelConfig
from hapo.cli.recipe import RecipeParser
from hapo.cli.train import TrainOptions, config_of
from hapo.insight.doctor import (
    CONFIG_CHECKS,
    DEMONSTRATION_CHECKS,
    RUN_CHECKS,
    SUPERVISED_CHECKS,
    Finding,
    examine_config,
    examine_run,
)
from hapo.insight.run import Run
from hapo.tasks import TaskConfig, load_task
from hapo.trl import HAPOConfig

ROOT = Path(__file__).parents[2]
RECIPES = ["demo", *sorted(str(p) for p in (ROOT / "recipes").glob("*.yaml") if p.stem != "etpo_code")]
"""The other one is of another loop, which the doctor refuses."""
BIG = LlamaConfig(hidden_size=2048, num_hidden_layers=16, vocab_size=128256, max_position_embeddings=16384)
CAP_OFF = {"sampler_cap": None}


def harmful(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings if finding.severity != "note"]


def only(findings: list[Finding]) -> Finding:
    """The one finding that is more than a note."""
    assert len(harmful(findings)) == 1, findings
    return findings[0]


# -- before training ----------------------------------------------------------------------------------------


def examine(
    task: dict[str, Any] | None = None, model: dict[str, Any] | None = None, architecture: Any = None, **args: Any
) -> list[Finding]:
    """The demo with other options."""
    config = TaskConfig(**{"train_size": 64, "eval_size": 8, **(task or {})})
    usual = {
        "per_device_train_batch_size": 32,
        "steps_per_generation": 4,
        "max_completion_length": 32,
        "learning_rate": 3e-5,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One optimiser step a rollout batch")
        trainer = HAPOConfig("out", use_cpu=True, bf16=False, activation_checkpointing=False, **(usual | args))
    return examine_config(
        config,
        trainer,
        AdaptedModelConfig("tiny", **(model or {})),
        task=load_task(TaskConfig(**{**vars(config), "on_bad_gold": "drop"}), seed=0),
        tokenizer=AutoTokenizer.from_pretrained(tiny_model_path()),
        architecture=architecture or AutoConfig.from_pretrained(tiny_model_path()),
    )


def problems(folder: Path, answers: list[Any]) -> dict[str, Any]:
    file = folder / "problems.jsonl"
    rows = [{"question": f"problem {i}", "answer": answer} for i, answer in enumerate(answers)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"dataset": str(file), "rewards": ["exact"], "train_size": None, "eval_size": 2}


BROKEN_CONFIGS = [
    ("ratio_always_one", "warning", {"steps_per_generation": 1}, "--steps_per_generation 4"),
    ("ratio_always_one", "warning", {"steps_per_generation": 1, "method": "sapo"}, "steps_per_generation 1"),
    ("uncorrected_sampler", "warning", {"method_options": CAP_OFF}, "the adaptive temperature"),
    (
        "uncorrected_sampler",
        "warning",
        {"method": "dapo", "method_options": CAP_OFF, "top_p": 0.9, "generation_kwargs": {"min_p": 0.1}},
        "policy: top_p 0.9, min_p 0.1",
    ),
    ("truncated_ratios", "warning", {"top_p": 0.9, "sampling_support": False}, "sampling_support is off"),
    ("truncated_ratios", "warning", {"top_p": 0.9, "architecture": BIG}, "set top_k, to at most 1024"),
    (
        "truncated_ratios",
        "warning",
        {"top_k": 20, "use_transformers_continuous_batching": True},
        "set use_transformers_continuous_batching=False",
    ),
    ("temperature_range", "warning", {"method_options": {"temperature": {"tau": 0.8}}}, "at 0.2 to 1.8 times"),
    (
        "temperature_range",
        "warning",
        {"method_options": {"temperature": {"rule": "zscore", "tau": 0.3}}},
        "tau 0.3, t_min 0.1, t_max 2 draws tokens at 0.1 to 1.9 times T_base",
    ),
    ("small_groups", "warning", {"num_generations": 2}, "50 % of the groups hold both if half"),
    ("short_completions", "error", {"max_completion_length": 20}, "the longest has 30 tokens"),
    ("short_completions", "warning", {"max_completion_length": 28}, "--max_completion_length 32"),
    (
        "context_exceeded",
        "error",
        {"max_completion_length": 121},
        "100 % of 64 prompts are longer than the other 7",
    ),
    ("few_problems", "error", {"task": {"train_size": 15}}, "15 training problems; a rollout batch takes 16"),
    ("learning_rate", "warning", {"learning_rate": 1e-9}, "the policy stays where it is"),
    ("learning_rate", "warning", {"learning_rate": 2e-4, "architecture": BIG}, "--learning_rate 1e-06"),
    (
        "learning_rate",
        "warning",
        {"learning_rate": 2e-3, "architecture": BIG, "model": {"use_peft": True}},
        "learning_rate 0.002 with an adapter",
    ),
    (
        "learning_rate",
        "warning",
        {"learning_rate": 2e-3, "architecture": BIG, "model": {"gatera": {"branch": "lora"}}},
        "learning_rate 0.002 with an adapter",
    ),
    (
        "learning_rate",
        "warning",
        {"learning_rate": 2e-2, "architecture": BIG, "model": {"gatera": {}}},
        "learning_rate 0.02 with GateRA on HiRA",
    ),
]


@pytest.mark.parametrize(("name", "severity", "options", "text"), BROKEN_CONFIGS)
def test_a_broken_configuration_has_its_finding_and_no_other(name, severity, options, text):
    finding = only(examine(**options))
    assert (finding.name, finding.severity) == (name, severity)
    assert text in f"{finding.saw} {finding.why} {finding.change}"


@pytest.mark.parametrize(
    "options",
    [
        {"steps_per_generation": 1, "method": "rloo"},
        {"method_options": {"temperature": {"rule": "zscore"}}},
        {"method": "grpo", "top_p": 0.9},
        {"method": "dapo", "method_options": CAP_OFF},
        {"learning_rate": 2e-4, "architecture": BIG, "model": {"use_peft": True}},
        {"learning_rate": 3e-4},
    ],
)
def test_sound_variants_of_the_demo_have_no_finding(options):
    assert examine(**options) == []


def test_every_unusable_gold_answer_is_counted_and_the_first_are_named(tmp_path):
    task = problems(tmp_path, [i if i % 4 else None for i in range(40)] + ["  "])
    finding = only(examine(task=task))
    assert (finding.name, finding.severity) == ("unusable_golds", "error")
    assert "11 of 41 gold answers (27 %)" in finding.saw
    assert "problems.jsonl, row 1: None (no text and no number); problems.jsonl, row 5: None" in finding.saw
    assert finding.saw.endswith("and 6 more")
    assert finding.change == "repair them, or --on_bad_gold drop"
    assert only(examine(task={**task, "on_bad_gold": "drop"})).severity == "warning"


def test_few_unusable_gold_answers_that_are_dropped_are_a_note(tmp_path):
    task = {**problems(tmp_path, [*range(40), None]), "on_bad_gold": "drop"}
    (finding,) = examine(task=task)
    assert (finding.name, finding.severity) == ("unusable_golds", "note")


def test_gold_answers_that_math_verify_cannot_parse_are_found_in_evaluation_data_too(tmp_path):
    task = problems(tmp_path, list(range(40)))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"question": "a", "answer": "1/2"}\n{"question": "b", "answer": "no idea at all"}\n')
    task |= {"rewards": ["auto"], "eval_file": str(held_out), "eval_size": None}
    assert "1 of 42 gold answers (2.4 %) cannot be used: held_out.jsonl, row 2" in only(examine(task=task)).saw


def test_an_answer_that_wins_by_majority_is_named(tmp_path):
    task = problems(tmp_path, ["Yes"] * 24 + list(range(16)))
    finding = only(examine(task=task))
    assert finding.name == "majority_answer"
    assert re.match(r"the gold answer 'yes' is that of (6\d|5\d) % of 38 training problems", finding.saw)


def test_worked_solutions_count_where_the_data_have_them(tmp_path):
    file = tmp_path / "solved.jsonl"
    rows = [{"question": f"q{i}", "answer": i, "solution": "7 " * 10 * (1 + i % 5)} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"dataset": str(file), "rewards": ["exact"], "train_size": None, "eval_size": 2}
    assert examine(task=task) == []
    finding = only(examine(task={**task, "extra_columns": ["solution"]}))
    assert finding.name == "short_completions"
    assert "the longest has 101 tokens" in finding.saw
    assert finding.change == "--max_completion_length 128"


def test_without_data_tokeniser_and_sizes_the_options_alone_are_examined():
    cpu = {"use_cpu": True, "bf16": False, "activation_checkpointing": False}
    args = HAPOConfig("out", num_generations=2, max_completion_length=1, **cpu)
    assert only(examine_config(TaskConfig(train_size=1), args, ModelConfig("tiny"))).name == "small_groups"


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """Problems with the columns of the data sets that the recipes name on the Hub."""
    file = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [
        {
            "prompt": f"What is {i} + {i}?",
            "question": f"Add {i} to {i}.",
            "solution": str(2 * i),
            "answer": str(2 * i),
        }
        for i in range(600)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def word_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "?": 2}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}Answer"
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="?", chat_template=template
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: Path(recipe).stem)
def test_the_recipes_are_healthy(recipe, stand_in):
    argv = ["--config", recipe, "--use_cpu", "--bf16", "false", "--activation_checkpointing", "false"]
    kinds = [TaskConfig, config_of(argv), AdaptedModelConfig, TrainOptions]
    task_config, args, model, *_ = RecipeParser("hapo doctor", "", kinds).read(argv)
    if task_config.dataset.startswith("reasoning_gym"):
        task_config.train_size, task_config.eval_size = 64, 8
    elif task_config.dataset != "addition":
        task_config.dataset, task_config.test_split, task_config.eval_size = str(stand_in), None, 8
        task_config.train_size = None
        task_config.rewards = ["exact"]
    addition = task_config.dataset == "addition" and task_config.environment is None
    findings = examine_config(
        task_config,
        args,
        model,
        task=load_task(task_config, seed=0),
        tokenizer=AutoTokenizer.from_pretrained(tiny_model_path()) if addition else word_tokenizer(),
        architecture=AutoConfig.from_pretrained(tiny_model_path()) if addition else BIG,
    )
    assert findings == []


# -- after training -----------------------------------------------------------------------------------------

STEPS = 40


def put(**values: Any) -> dict[str, Any]:
    """Metrics over those of a healthy run: a number, or (done in (0, 1], step) -> number."""
    names = {name.replace("__", "/"): value for name, value in values.items()}

    def change(line: dict[str, Any]) -> dict[str, Any]:
        step = line["step"]
        return line | {n: v(step / STEPS, step) if callable(v) else v for n, v in names.items()}

    return {"lines": change}


BROKEN_RUNS = [
    (
        "constant_reward",
        "error",
        put(reward=0.0, reward_std=0.0, frac_reward_zero_std=1.0, loss=0.0, grad_norm=0.0, kl_old=0.0),
        "the reward of every answer was 0",
    ),
    ("constant_reward", "error", put(reward=1.0, reward_std=0.0), "harder problems"),
    (
        "zero_variance_groups",
        "warning",
        put(
            frac_reward_zero_std=lambda done, step: 0.3 + 0.6 * (done > 0.5), reward=lambda done, step: 0.05 * done
        ),
        "90 % of the groups had equal rewards",
    ),
    ("zero_variance_groups", "warning", put(dynamic_sampling__kept=0.15), "85 % of the groups"),
    ("truncated", "error", put(completions__clipped_ratio=0.97), "97 % of the answers were cut off at 24 tokens"),
    (
        "truncated",
        "warning",
        put(completions__clipped_ratio=lambda done, step: 0.7 * done),
        "max_completion_length 48",
    ),
    (
        "truncation_rising",
        "warning",
        put(completions__clipped_ratio=lambda done, step: 0.45 * done),
        "rose from 6.2 % to 40 %",
    ),
    (
        "wrong_answers_grow",
        "warning",
        put(completions__mean_length_wrong=lambda done, step: 18 + 40 * done, completions__mean_length_right=17.0),
        "right ones have 17",
    ),
    (
        "collapse",
        "error",
        put(reward=lambda done, step: 0.6 + 0.01 * (step % 3) - 0.5 * (done > 0.7)),
        "from 0.61",
    ),
    (
        "entropy_collapse",
        "warning",
        put(
            entropy=lambda done, step: 0.6 if done < 0.3 else 0.03,
            reward=lambda done, step: 0.4 + 0.02 * (step % 2),
        ),
        "entropy fell from 0.6 to 0.03 nats, and the reward went from 0.41 to 0.41",
    ),
    ("entropy_explosion", "warning", put(entropy=lambda done, step: 0.2 + 3 * done), "--learning_rate 1e-05"),
    ("entropy_floor", "warning", put(entropy=0.004), "mean entropy was 0.004 nats"),
    ("entropy_floor", "warning", put(entropy_stats__floored=0.7), "70 % of the tokens had none"),
    (
        "sampler_mismatch",
        "warning",
        {"method": "dapo"} | put(sampling__sampling_logp_difference__mean=0.2),
        "0.2 at",
    ),
    (
        "sampler_mismatch",
        "warning",
        {"method": "dapo"}
        | put(sampling__sampling_logp_difference__mean=lambda done, step: 0.001 + 0.05 * done**2),
        "0.0022 nats a token at first, 0.041 at the end",
    ),
    (
        "truncated_ratios",
        "warning",
        {"method": "dapo", "config": {"top_p": 0.9, "sampling_support": False}}
        | put(sampler_weight__mean=0.91, sampling__sampling_logp_difference__mean=0.2),  # no mismatch of engines
        "the mean importance weight was 0.91",
    ),
    (
        "truncated_ratios",
        "warning",
        {"config": {"top_p": 0.9, "engine": "verl"}} | put(sampler_weight__mean=0.91),
        "actor_rollout_ref.rollout.top_p 1",
    ),
    (
        "sampler_mismatch",
        "warning",
        {"method": "dapo", "config": {"top_p": 0.9, "sampling_support": True}}
        | put(sampling__sampling_logp_difference__mean=0.2),
        "0.2 at the end",
    ),
    (
        "ratio_always_one",
        "warning",
        put(kl_old=0.0, ratio__mean=1.0, clip_ratio__low_mean=0.0, clip_ratio__high_mean=0.0),
        "importance ratios were 1 in all 40 logged steps",
    ),
    (
        "nothing_clipped",
        "warning",
        put(clip_ratio__low_mean=0.0, clip_ratio__high_mean=0.0),
        "no token was clipped",
    ),
    (
        "nothing_clipped",
        "warning",
        {"method": None} | put(clip_ratio__low_mean=0.0, clip_ratio__high_mean=0.0),
        "no token was clipped in 40 logged steps",
    ),
    (
        "non_finite",
        "error",
        put(grad_norm=lambda done, step: float("nan") if step > 30 else 1.0),
        "in 10 of 40 logged steps, first at step 31",
    ),
    ("non_finite", "error", put(loss=lambda done, step: float("inf") if step == 7 else 0.0), "first at step 7"),
    (
        "zero_gradients",
        "warning",
        put(grad_norm=lambda done, step: float(step % 2)),
        "0 in 50 % of 40 logged steps",
    ),
    ("unfinished", "warning", {"finished": False, "config": {"max_steps": 90}}, "last logged step is 40 of 90"),
]


@pytest.mark.parametrize(("name", "severity", "options", "text"), BROKEN_RUNS)
def test_a_broken_run_has_its_finding_and_no_other(name, severity, options, text, make_run, tmp_path):
    run = Run(make_run(tmp_path / "run", steps=STEPS, tokens=False, **options))
    finding = only(examine_run(run))
    assert (finding.name, finding.severity) == (name, severity)
    assert text in f"{finding.saw} {finding.why} {finding.change}"


def test_a_run_of_verl_is_told_the_options_of_verl(make_run, tmp_path):
    lines = put(**{"completions/clipped_ratio": lambda done, step: 0.9})
    own = only(examine_run(Run(make_run(tmp_path / "own", steps=STEPS, tokens=False, **lines))))
    config = {**lines.get("config", {}), "engine": "verl"}
    theirs = only(examine_run(Run(make_run(tmp_path / "verl", steps=STEPS, tokens=False, **lines, config=config))))
    assert own.name == theirs.name == "truncated"
    assert "--max_completion_length" in own.change and "data.max_response_length" in theirs.change
    assert "--" not in theirs.change.replace("(--chat)", "")


def with_scores(folder: Path, *measured: list[float]) -> Run:
    """The run with these scores of the held-out problems, in the order of training."""
    lines = []
    for step, scores in enumerate(measured):
        mean = sum(scores) / len(scores)
        figures = {"mean": mean, "low": mean - 0.07, "high": mean + 0.07, "problems": len(scores), "samples": 1}
        place = {"step": 10 * step, "num_tokens": 0.0, "seconds": 0.0, "how": "greedy", "binary": True}
        lines.append(json.dumps({**place, **figures, "scores": scores}) + "\n")
    (folder / "evaluations.jsonl").write_text("".join(lines))
    return Run(folder)


def test_held_out_accuracy_that_fell_below_the_interval_of_its_best_is_a_collapse(make_run, tmp_path):
    folder = make_run(tmp_path / "run", steps=STEPS, tokens=False)
    run = with_scores(folder, [0.0, 1.0] * 50, [1.0] * 80 + [0.0] * 20, [1.0] * 40 + [0.0] * 60)
    finding = only(examine_run(run))
    assert (finding.name, finding.severity) == ("collapse", "error")
    assert "(greedy) fell from 0.800 [0.730, 0.870] at step 10 to 0.400" in finding.saw


def test_no_gain_beyond_the_paired_interval_is_a_note(make_run, tmp_path):
    folder = make_run(tmp_path / "run", steps=STEPS, tokens=False)
    first = [1.0] * 50 + [0.0] * 50
    finding = examine_run(with_scores(folder, first, [1.0] * 48 + [0.0] * 2 + [1.0] * 4 + [0.0] * 46))[0]
    assert (finding.name, finding.severity) == ("no_improvement", "note")
    assert "greedy [-0.028, +0.068]" in finding.saw
    # Ten problems gained and none lost: shown, although the two intervals of 0.07 overlap.
    gained = examine_run(with_scores(folder, first, [1.0] * 60 + [0.0] * 40))
    assert [f.name for f in gained] == ["loss_near_zero"]


def test_a_loss_about_zero_is_explained(make_run, tmp_path):
    (note,) = examine_run(Run(make_run(tmp_path / "run", steps=STEPS, tokens=False)))
    assert (note.name, note.severity) == ("loss_near_zero", "note")
    assert "a loss about 0 is normal here" in note.why
    larger = Run(make_run(tmp_path / "larger", steps=STEPS, tokens=False, **put(loss=0.3)))
    assert examine_run(larger) == []


HEALTHY_RUNS = [
    {"method": "hapo"},
    {"method": "grpo", "seed": 1},
    {"method": None, "seed": 2},
    {"method": "sapo", "seed": 3} | put(clip_ratio__low_mean=0.0, clip_ratio__high_mean=0.0),
    {"method": "rloo", "seed": 4}
    | put(kl_old=0.0, ratio__mean=1.0, clip_ratio__low_mean=0.0, clip_ratio__high_mean=0.0),
    {"method": "hapo", "seed": 5} | put(sampling__sampling_logp_difference__mean=0.2),
    {"method": "dapo", "seed": 6, "config": {"top_p": 0.9, "sampling_support": True}}
    | put(sampling__sampling_logp_difference__mean=0.001),
    {"method": "dapo", "seed": 7} | put(frac_reward_zero_std=0.85, dynamic_sampling__kept=1.0),
    put(entropy=lambda done, step: 0.6 if step <= 40 else 0.03),  # while the reward rises
    put(completions__mean_length_wrong=40.0, completions__mean_length_right=17.0),
]


@pytest.mark.parametrize("options", HEALTHY_RUNS)
def test_healthy_runs_have_no_finding(options, make_run, tmp_path):
    run = Run(make_run(tmp_path / "run", steps=120, tokens=False, **options))
    assert harmful(examine_run(run)) == []


def test_the_runs_of_the_demo_have_no_finding(tmp_path):
    with (ROOT / "docs/evidence/demo.csv").open() as file:
        rows = list(csv.DictReader(file))
    seeds = {row["seed"] for row in rows}
    assert len(seeds) >= 3
    for seed in seeds:
        mine = [row for row in rows if row["seed"] == seed]
        lines = [{"loss": 0.1, **{k: float(v) for k, v in row.items() if v and k != "seed"}} for row in mine]
        folder = tmp_path / seed
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "config.yaml").write_text("method: hapo\n")
        (folder / "finished.json").write_text('{"steps": 480, "why": "max_steps"}')
        assert len(lines) > 20
        assert examine_run(Run(folder)) == []


@pytest.mark.parametrize("metrics", ["", '{"loss": 0.5, "step": 1}\n', '{"loss": null, "step": 1}\n{"lo'])
def test_a_run_that_has_hardly_begun_is_examined_as_far_as_it_goes(metrics, tmp_path):
    (tmp_path / "config.yaml").write_text("method: no_longer_there\n")
    (tmp_path / "metrics.jsonl").write_text(metrics)
    assert set(harmful(examine_run(Run(tmp_path)))) - {"non_finite"} == {"unfinished"}


# -- the page -----------------------------------------------------------------------------------------------


def test_the_page_has_every_finding():
    page = (ROOT / "docs/doctor_findings.md").read_text()
    before, _, after = page.partition("## After training")
    after, _, supervised = after.partition("Of a run that learnt from")
    own = [check for check in SUPERVISED_CHECKS if check not in RUN_CHECKS]
    before, _, demonstrations = before.partition("Of a recipe of `hapo sft`")
    demonstrations, _, _ = demonstrations.partition(
        "## Of the installed engines"
    )  # tests/insight/test_checks_engine.py
    parts = (
        (before, CONFIG_CHECKS),
        (demonstrations, DEMONSTRATION_CHECKS),
        (after, RUN_CHECKS),
        (supervised, own),
    )
    for text, checks in parts:
        assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == [check.__name__ for check in checks]


def test_every_finding_has_a_broken_case_here():
    source = Path(__file__).read_text()
    assert [c.__name__ for c in (*CONFIG_CHECKS, *RUN_CHECKS) if f'"{c.__name__}"' not in source] == []

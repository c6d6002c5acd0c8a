"""`hapo shape`: trials, killing and going on, failed trials, the confirmation, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from transformers import AutoTokenizer

import hapo.cli.shape
import hapo.cli.trials
from hapo.assets import tiny_model_path
from hapo.cli import main
from hapo.cli.arms import PLAN, Job
from hapo.cli.trials import trials_of
from hapo.tasks.reward_options import TokenRewardOptions
from tests.cli.reward_model import random_reward_model
from tests.cli.small import flags
from tests.insight.conftest import make_run

pytestmark = pytest.mark.xdist_group("shape")  # one search that nobody stopped serves most of them

ROOT = Path(__file__).parents[2]
SMALL = {
    "config": "shape",
    "train_size": 40,
    "eval_size": 6,
    "search_size": 6,
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 8,
    "trials": 5,
    "initial": 4,
    "confirm": 5,
    "jobs": 1,
}
CENTRE = {"shap": 0.5, "lime": 0.3, "sparse": 0.2}


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> str:
    return str(random_reward_model(tmp_path_factory.mktemp("reward") / "model"))


def shape(folder: Path, reward: dict | None, **options) -> list[str]:
    told = {} if reward is None else {"token_reward": json.dumps(reward)}
    return ["shape", *flags(**{**SMALL, **told, "output_dir": folder, **options})]


def weights_of(job: Job) -> dict[str, float]:
    reward = job.flags["token_reward"]
    return dict(zip(reward["channels"], reward["weights"], strict=True))


class Runs:
    """In the place of training: runs that end with a score by their weights and seed, at once.

    Args:
        kill: interrupts after so many.
        fails: of which weights they fail.
    """

    def __init__(self, kill: int | None = None, fails: Callable[[dict], bool] = lambda weights: False) -> None:
        self.left, self.fails, self.made = kill, fails, []

    def __call__(self, jobs: list[Job], at_once: int, what: str, console) -> bool:
        for job in [job for job in jobs if not job.done]:
            if self.left is not None and not self.left:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            self.made.append(job.folder)
            self._make(job)
        return all(job.done for job in jobs)

    def _make(self, job: Job) -> None:
        TokenRewardOptions.read(job.flags["token_reward"])  # as training does
        weights = weights_of(job)
        make_run(job.folder, "grpo", seed=job.seed, tokens=False, steps=4, finished=not self.fails(weights))
        (job.folder / PLAN).write_text(json.dumps(job.plan))
        if self.fails(weights):
            (job.folder / "log.txt").write_text("Traceback\nRuntimeError: out of memory\n\n")
            return
        off = sum((weights.get(name, 0.0) - w) ** 2 for name, w in CENTRE.items())
        noise = 0.02 * np.random.default_rng(job.seed).standard_normal()
        lines = [json.loads(line) for line in (job.folder / "evaluations.jsonl").read_text().splitlines()]
        for line in lines:
            if line["step"]:
                line["mean"] = 0.8 - 0.3 * off + noise
        (job.folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def train(monkeypatch) -> Callable[[Runs], Runs]:
    def put(runs: Runs) -> Runs:
        monkeypatch.setattr(hapo.cli.trials, "run_all", runs)
        monkeypatch.setattr(hapo.cli.shape, "run_all", runs)
        return runs

    return put


@pytest.fixture(scope="module")
def whole(tmp_path_factory, reward_model) -> Path:
    """A search that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "search"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hapo.cli.trials, "run_all", Runs())
        patch.setattr(hapo.cli.shape, "run_all", Runs())
        assert main(shape(folder, {"model": reward_model})) == 0
    return folder


def trials(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_a_search_has_its_trials_page_weights_and_confirmation(whole):
    lines = trials(whole)
    assert [line["weights"] for line in lines[:3]] == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert [line["seed"] for line in lines] == [1, 2, 3, 4, 5] and all(line["error"] is None for line in lines)
    best = yaml.safe_load((whole / "weights.yaml").read_text())["token_reward"]
    assert best["weights"] in [line["weights"] for line in lines] and best["channels"] == [
        "shap",
        "lime",
        "sparse",
    ]
    results = pd.read_csv(whole / "confirmation/results.csv")
    assert sorted(results.seed.unique()) == [1001, 1002, 1003, 1004, 1005]  # none of a trial
    assert results.groupby("arm").size().to_dict() == {"dense": 5, "sparse": 5}
    page = (whole / "shape.html").read_text()
    for words in (
        "confirmation: ",
        "dense better than sparse by",
        "lime alone",
        "Expected score over the simplex",
    ):
        assert words in page
    assert {file.stem for file in (whole / "figures").iterdir()} == {"simplex", "deviation", "slices", "trials"}
    plan = json.loads((whole / "trials/002/plan.json").read_text())
    assert plan["tuning"] and plan["tune_size"] == 6  # measured on problems taken out of the training data
    assert plan["token_reward"]["weights"] == [0.0, 1.0, 0.0] and plan["arm's options"] == {
        "advantage": "token_reward"
    }
    sparse = next((whole / "confirmation/sparse").glob("seed-*/plan.json"))
    assert not json.loads(sparse.read_text())["tuning"]


@pytest.mark.parametrize("kill", [2, 7])
def test_a_search_stopped_anywhere_goes_on_to_the_same_trials(kill, whole, reward_model, train, tmp_path, capsys):
    folder = tmp_path / "search"
    stopped = train(Runs(kill=kill))
    assert main(shape(folder, {"model": reward_model})) == 130
    assert len(stopped.made) == kill
    resumed = train(Runs())
    assert main(shape(folder, {"model": reward_model}, jobs=3)) == 0
    assert trials(folder) == trials(whole) and not set(stopped.made) & set(resumed.made)
    assert (folder / "weights.yaml").read_text() == (whole / "weights.yaml").read_text()


def test_more_trials_are_added_and_a_whole_search_makes_no_run_again(whole, reward_model, train, capsys):
    before = trials(whole)
    runs = train(Runs())
    assert main(shape(whole, {"model": reward_model})) == 0
    assert runs.made == [] and "5 of them made already" in capsys.readouterr().out
    assert main(shape(whole, {"model": reward_model}, trials=6, confirm=0)) == 0
    assert trials(whole)[:5] == before and len(trials(whole)) == 6
    assert [folder.name for folder in runs.made] == ["006"]


def test_failed_trials_are_recorded_and_never_made_again(reward_model, train, tmp_path, capsys):
    folder = tmp_path / "search"
    failing = Runs(fails=lambda weights: weights["shap"] > 0.6)
    argv = shape(folder, {"model": reward_model}, trials=6, confirm=0)
    train(failing)
    assert main(argv) == 0
    lines = trials(folder)
    failed = [line for line in lines if line["value"] is None]
    assert lines[0] in failed and failed[0]["error"] == "RuntimeError: out of memory"
    for later in lines[4:]:
        assert all(math.dist(later["weights"], one["weights"]) >= 0.02 for one in failed if one is not later)
    assert (
        "trial 1 of 6: shap 1.00, lime 0.00, sparse 0.00: failed (RuntimeError: out of memory)"
        in capsys.readouterr().out
    )
    assert "failed: RuntimeError: out of memory" in (folder / "shape.html").read_text()
    again = train(Runs())
    assert main(argv) == 0 and again.made == [] and trials(folder) == lines


def test_where_every_vertex_fails_the_search_ends_and_says_why(reward_model, train, tmp_path, capsys):
    runs = train(Runs(fails=lambda weights: True))
    assert main(shape(tmp_path / "search", {"model": reward_model})) == 1
    err = capsys.readouterr().err
    assert "all 3 trials failed" in err and "RuntimeError: out of memory. Mend the recipe" in err
    assert len(runs.made) == 3


def test_another_search_in_the_folder_is_refused_or_moved_aside(reward_model, train, tmp_path, capsys):
    folder, reward = tmp_path / "search", {"model": reward_model, "channels": ["lime", "sparse"]}
    options = {"trials": 2, "initial": 2, "confirm": 0}
    train(Runs())
    assert main(shape(folder, reward, **options)) == 0
    before = trials(folder)
    assert main(shape(folder, reward, **options, learning_rate=1e-3)) == 2
    assert "holds another search, with learning_rate: " in capsys.readouterr().err
    assert main(shape(folder, {**reward, "samples": 12}, **options)) == 2
    assert "with token_reward: " in capsys.readouterr().err
    assert trials(folder) == before
    assert main([*shape(folder, reward, **options, learning_rate=1e-3), "--replace"]) == 0
    assert (folder / "aside/trials.jsonl.1").is_file() and (folder / "aside/trials.1/001/plan.json").is_file()
    assert "see the slices" in (folder / "shape.html").read_text()  # two channels make no triangle


def test_the_sparse_reward_as_the_best_has_nothing_to_confirm(reward_model, train, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(CENTRE, "sparse", 1.0)
    monkeypatch.setitem(CENTRE, "lime", 0.0)
    train(Runs())
    reward = {"model": reward_model, "channels": ["lime", "sparse"]}
    assert main(shape(tmp_path / "search", reward, trials=2, initial=2)) == 0
    assert "there is nothing to confirm" in capsys.readouterr().out


def test_a_mixture_without_the_sparse_channel_meets_it_all_the_same(reward_model, train, tmp_path, capsys):
    runs = train(Runs())
    reward = {"model": reward_model, "channels": ["lime", "shap"], "normalisation": {"shap": "abs"}}
    folder = tmp_path / "search"
    assert main(shape(folder, reward, trials=2, initial=2, confirm=1)) == 0
    assert "confirmation: no interval: 1 pair with sparse" in capsys.readouterr().out
    told = json.loads((folder / "confirmation/sparse/seed-1001/plan.json").read_text())["token_reward"]
    assert told["weights"] == [0.0, 0.0, 1.0] and told["normalisation"] == {"shap": "abs"} and len(runs.made) == 4


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        (None, {"token_reward": "none"}, "the recipe has no token_reward: name the reward model and the channels"),
        ({"channels": ["shap", "lmie"]}, {}, "token_reward: unknown channel 'lmie'; did you mean lime?"),
        ({"channels": ["shap"]}, {}, "has the channel shap alone: a mixture needs two at least"),
        ({"channels": ["shap", "shap"]}, {}, "channels must be different ones"),
        ({"channels": []}, {}, "channels must be different ones, one at least, got []"),
        ({"weights": [0.2, 0.3, 0.5]}, {}, "weights is what this command finds: leave it out"),
        ({"weights": [0.2, 0.3, 0.6]}, {}, "weights must be numbers >= 0 that add up to 1"),
        ({"weights": [1.2, 0.3, -0.5]}, {}, "weights must be numbers >= 0 that add up to 1"),
        ({"weights": [0.5, 0.5]}, {}, "2 weights for 3 channels (shap, lime, sparse)"),
        ({"mode": "sum"}, {}, "mode must be normalised or additive, got 'sum'"),
        ({"normalisation": {"shap": "max"}}, {}, "normalisation has shap: max"),
        ({"mode": "additive", "normalisation": {"shap": "abs"}}, {}, "normalises nothing"),
        ({"sample": 3}, {}, "unknown key 'sample'; did you mean samples?"),
        ({"samples": 1}, {}, "samples must be a whole number from 2 on, got 1"),
        ({"model": 3}, {}, "model must name a reward model, got 3"),
        (
            {},
            {"trials": 2},
            "2 trials, 4 of them initial: each of the 3 channels is tried alone, so set both to 3",
        ),
        ({}, {"initial": 2}, "set both to 3 at least"),
        ({}, {"trials": 0}, "trials must be at least 1, got 0"),
        ({}, {"confirm": -1}, "confirm must be at least 0"),
        ({}, {"seed": 3}, "the seeds of a search count up from --first_seed; drop --seed"),
        ({}, {"max_steps": -1}, "shape needs max_steps"),
        ({}, {"evaluate": "false"}, "shape needs evaluate"),
        ({}, {"method_options": "{}"}, "method_options to {advantage: token_reward}"),
        ({}, {"reward_weights": 1.0}, "reward_weights weighs several rewards"),
        ({}, {"search_size": 40}, "tune_size 40 leaves none of the 40 training problems"),
        ({}, {"rewards": "rewrad_model"}, "unknown reward 'rewrad_model' (did you mean reward_model?)"),
    ],
)
def test_what_cannot_be_searched_is_refused(reward, options, message, reward_model, tmp_path, capsys):
    told = None if reward is None else {"model": reward_model, **reward}
    assert main(shape(tmp_path / "search", told, **options)) in (1, 2)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("search/trials*"))


CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.slow
def test_the_recipe_of_a_public_reward_model_runs_on_tiny_random_ones(tmp_path, capsys):
    """Messages without answers, judged by the score of whole answers, in real runs."""
    reward, policy, data = tmp_path / "reward", tmp_path / "policy", tmp_path / "data.jsonl"
    for folder in (random_reward_model(reward), Path(shutil.copytree(tiny_model_path(), policy))):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder)
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1="}]} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        **{name: value for name, value in SMALL.items() if name not in ("initial", "confirm")},
        "config": ROOT / "recipes/shape_reward_model.yaml",
        "model": policy,
        "dataset": data,
        "train_size": 20,
        "eval_size": 4,
        "trials": 3,
        "initial": 3,
        "confirm": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "bf16": "false",
        "use_cpu": "true",
        "activation_checkpointing": "false",
        "token_reward": json.dumps({"model": str(reward), "samples": 16}),
        "first_seed": 5,
    }
    folder = tmp_path / "search"
    assert main(["shape", *flags(**options, output_dir=folder)]) == 0, capsys.readouterr()
    lines = trials(folder)
    assert [line["error"] for line in lines] == [None] * 3 and not any(line["binary"] for line in lines)
    assert len({line["value"] for line in lines}) == 3  # three policies, by scores that are no accuracies
    best = yaml.safe_load((folder / "weights.yaml").read_text())["token_reward"]["weights"]
    said = capsys.readouterr().out
    assert ("nothing to confirm" in said) == (best == [0.0, 0.0, 1.0])
    assert best == [0.0, 0.0, 1.0] or "no interval: 1 pair with sparse" in said


def test_the_error_of_a_trial_is_that_of_its_interval():
    line = {"weights": [0.5, 0.5], "value": 0.3, "low": 0.3 - 0.0588, "high": 0.3 + 0.0588}
    failed = {"weights": [1.0, 0.0], "value": None, "low": None, "high": None}
    exact = {"weights": [0.0, 1.0], "value": 2.0, "low": 2.0, "high": 2.0}
    of = trials_of([line, failed, exact])
    assert of[0].error == pytest.approx(0.03) and of[1].error is None and of[2].error is None

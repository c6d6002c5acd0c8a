"""`hapo compare`: paired runs in processes of their own, tuning, killing and going on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from hapo.cli import UsageError, main
from hapo.cli.arms import Arm
from hapo.cli.recipe import read_recipe
from tests.cli.small import flags
from tests.insight.conftest import make_run

SMALL = {
    "config": "demo",
    "train_size": 64,
    "eval_size": 8,
    "evaluate_samples": 2,
    "num_generations": 4,
    "max_num_gen_batches": 1,
    "per_device_train_batch_size": 8,
    "steps_per_generation": 2,
    "max_steps": 4,
    "evaluate_every": 2,
    "record_tokens_every": 0,
    "learning_rate": 1e-3,
}
CLOCKS = ["seconds", "seconds_to_target"]


def compare(folder: Path, *arms: str, **options) -> list[str]:
    given = flags(**{**SMALL, "output_dir": folder, "jobs": 2, "target": 0.5, **options})
    return ["compare", *given, "--arms", *arms]


def results(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "results.csv").drop(columns=CLOCKS)


@pytest.mark.slow
def test_a_comparison_killed_at_any_point_goes_on_to_the_same_results(tmp_path, capsys):
    arms = ("hapo:components=BCD", "dapo", "trl:dapo")
    assert main(compare(tmp_path / "whole", *arms, seeds=1)) == 0
    assert "no interval: 1 pair with dapo" in capsys.readouterr().out

    command = [sys.executable, "-m", "hapo.cli", *compare(tmp_path / "killed", *arms, seeds=1)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    runs = tmp_path / "killed/runs"
    while not list(runs.glob("*/*/finished.json")):  # at least one is done, others have begun
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {file: file.stat().st_mtime_ns for file in runs.glob("*/*/finished.json")}
    assert len(done) < 3
    assert main(compare(tmp_path / "killed", *arms, seeds=1)) == 0
    assert {file: file.stat().st_mtime_ns for file in done} == done  # finished runs stay
    pd.testing.assert_frame_equal(results(tmp_path / "killed"), results(tmp_path / "whole"))

    # The same prompts, weights and samples for every arm of ours.
    first = [
        json.loads((tmp_path / "whole/runs" / arm / "seed-1/metrics.jsonl").read_text().splitlines()[0])["reward"]
        for arm in ("hapo_components=BCD", "dapo")
    ]
    assert first[0] == first[1]

    # More seeds are added to what is there; another recipe is another comparison.
    assert main(compare(tmp_path / "whole", "dapo", seeds=2)) == 0
    assert results(tmp_path / "whole").seed.tolist() == [1, 2]

    # What runs begin with is measured once a seed, and once for TRL's trainer.
    starts = sorted((tmp_path / "whole/starts").glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
    assert len(starts) == 3
    left = [json.loads(line) for line in starts[-1].read_text().splitlines()]
    starts[-1].write_text("".join(json.dumps({**line, "mean": 0.123}) + "\n" for line in left))
    assert main(compare(tmp_path / "whole", "dapo", "hapo:components=BCD", seeds=2)) == 0
    lines = (tmp_path / "whole/runs/hapo_components=BCD/seed-2/evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines[:2]] == [{**line, "mean": 0.123, "took": 0.0} for line in left]
    assert json.loads(lines[2])["step"] == 2
    assert main(compare(tmp_path / "whole", "dapo", seeds=2, learning_rate=1e-4)) == 2
    assert "with learning_rate: 0.001 there, 0.0001 here" in capsys.readouterr().err


@pytest.mark.slow
def test_tuning_takes_the_best_rate_of_each_arm_on_problems_of_its_own(tmp_path, capsys):
    # A recipe may hold the arms, too.
    told = {"arms": ["dapo", "grpo:learning_rate=1e-4"], "seeds": 1, "tune": ["1e-5", 1e-3]}  # as YAML reads 1e-5
    recipe = tmp_path / "recipe.yaml"
    small = {name: value for name, value in SMALL.items() if name != "config"}
    recipe.write_text(yaml.safe_dump(read_recipe("demo") | small | told))
    argv = flags(config=recipe, output_dir=tmp_path, tune_size=16, tune_seeds=1, target=0.5)
    assert main(["compare", *argv]) == 0
    tuning = pd.read_csv(tmp_path / "tuning.csv")
    assert tuning.arm.tolist() == ["dapo", "dapo"]  # the other arm has a rate of its own
    best = tuning.set_index("learning_rate").sampled.idxmax()
    assert f"dapo: learning rate {best:g}" in capsys.readouterr().out
    rates = {
        arm: json.loads((tmp_path / "runs" / arm / "seed-1/metrics.jsonl").read_text().splitlines()[0])[
            "learning_rate"
        ]
        for arm in ("dapo", "grpo_learning_rate=1e-4")
    }
    assert rates == {"dapo": best, "grpo_learning_rate=1e-4": 1e-4}
    measured = (tmp_path / "tuning/dapo/1e-05/seed-1001/evaluations.jsonl").read_text().splitlines()
    assert json.loads(measured[0])["problems"] == 16

    # Where every arm has a rate, nothing is tuned, and the problems for tuning stay set aside.
    known = f"dapo:learning_rate={best:g}"
    again = flags(config=recipe, output_dir=tmp_path / "again", tune_size=16, tune_seeds=1, target=0.5)
    assert main(["compare", *again, "--arms", known]) == 0
    assert not (tmp_path / "again/tuning").exists()
    before, after = results(tmp_path).iloc[0], results(tmp_path / "again").iloc[0]
    # what does not depend on other runs
    alone = ["seed", "start", "sampled", "greedy", "num_tokens", "entropy", "kl_old"]
    assert after[alone].equals(before[alone])


def test_a_run_that_fails_is_named_and_the_others_stay(tmp_path, capsys):
    argv = compare(tmp_path, "dapo", "trl:dapo:learning_rate=abc", seeds=1)
    assert main(argv) == 1
    out = capsys.readouterr().out
    assert re.search("^runs: [12] of 2, dapo, seed 1", out, re.MULTILINE)
    folder = tmp_path / "runs/trl_dapo_learning_rate=abc/seed-1"
    assert f"failed: trl:dapo:learning_rate=abc, seed 1: see {folder / 'log.txt'}" in out
    assert "Traceback" in (folder / "log.txt").read_text()
    assert results(tmp_path).arm.tolist() == ["dapo"]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("hapoo", "there is no method 'hapoo'"),
        ("hapo:componets=B", "no option 'componets'; did you mean components?"),
        ("hapo:components=XY", "components"),
        ("dapo:eps_high", "'dapo:eps_high'"),
        ("trl:dapo:eps_high=0.3", "no option 'eps_high'"),
        ("trl:no_such_loss", "TRL's losses are grpo"),
        ("dapo:eval_size=5", "eval_size decides what is held equal"),
        ("trl:dapo:temperature=0.5", "temperature decides what is held equal"),
        ("dapo:repetition_penalty=1.1", "repetition_penalty decides what is held equal"),
        ("dapo:shuffle_dataset=false", "shuffle_dataset decides what is held equal"),
        ("trl:dapo:generation_kwargs={}", "generation_kwargs decides what is held equal"),
        ("dapo:resume_from_checkpoint=x", "resume_from_checkpoint decides what is held equal"),
    ],
)
def test_an_arm_that_cannot_run_is_refused(label, message):
    with pytest.raises(UsageError, match="arm") as caught:
        Arm(label)
    assert message in str(caught.value)


def test_options_go_to_the_method_and_flags_to_the_trainer():
    arm = Arm("dapo:eps_high=0.3,learning_rate=1e-4,beta=0.01")
    assert (arm.name, arm.options, arm.flags) == ("dapo", {"eps_high": 0.3}, {"learning_rate": 1e-4, "beta": 0.01})
    assert Arm("hapo:beta=0.5").options == {"beta": 0.5}  # a name that both have is the method's
    assert Arm("trl:grpo:beta=0.04").flags == {"beta": 0.04}


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        (
            ["dapo:max_num_gen_batches=3", "trl:dapo"],
            {},
            "max_num_gen_batches is 1 in every arm beside one of trl:",
        ),
        (
            ["dapo"],
            {"resume_from_checkpoint": "x"},
            "runs of a comparison begin anew: drop resume_from_checkpoint",
        ),
        (["hapo:temperature={tau: 0.1}", "hapo:temperature={tau:  0.1}"], {}, "two arms would share the folder"),
    ],
)
def test_arms_that_cannot_be_held_equal_are_refused(arms, options, message, tmp_path, capsys):
    assert main(compare(tmp_path, *arms, **options)) == 2
    assert message in capsys.readouterr().err


def test_the_ablation_is_one_flag(tmp_path, capsys):
    assert main([*compare(tmp_path, "dapo", "dapo")]) == 2
    assert "an arm is named twice" in capsys.readouterr().err
    from hapo.cli.compare import CompareOptions

    options = CompareOptions(ablation=True)
    assert options.reference == "dapo"
    assert options.arms == ["dapo", *(f"hapo:components={c}" for c in ("A", "B", "C", "D", "AB", "ABC")), "hapo"]


def of_verl(folder: Path, method: str, seed: int) -> str:
    """A finished run as verl leaves it: greedy validation alone, no hash of the weights."""
    make_run(folder, method, seed=seed, tokens=False, config={"engine": "verl"})
    told = json.loads((folder / "manifest.json").read_text())
    del told["weights_sha256"]
    (folder / "manifest.json").write_text(json.dumps(told))
    lines = (folder / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (folder / "evaluations.jsonl").write_text("".join(line for line in lines if '"greedy"' in line))
    return str(folder)


def test_finished_runs_of_verl_are_compared_without_training(tmp_path, capsys):
    """Labels and folders may hold a `=`; the seeds are the manifests'."""
    named = [f"dapo={of_verl(tmp_path / f'd{seed}', 'dapo', seed)}" for seed in (5, 9)]
    named += [f"hapo:alpha=2={of_verl(tmp_path / f'alpha=2/{seed}', 'hapo', seed)}" for seed in (9, 5)]
    out = tmp_path / "out"
    assert main(["compare", "--runs", *reversed(named), "--target", "0.4", "--output_dir", str(out)]) == 0
    told = capsys.readouterr().out
    assert "held-out accuracy at the end, greedy\n  hapo:alpha=2: no interval: 2 pairs with dapo" in told
    assert "warning: accuracy here is that of greedy answers" in told
    assert f"page: {out / 'compare.html'}" in told
    found = pd.read_csv(out / "results.csv")
    assert list(zip(found.arm, found.seed, strict=True)) == [
        ("hapo:alpha=2", 5),
        ("hapo:alpha=2", 9),
        ("dapo", 9),
        ("dapo", 5),
    ]
    assert "Target: 40.0 % held-out, greedy." in (out / "comparison.md").read_text()
    assert not (out / "runs").exists()
    other = ["--runs", *named, "--reference", "hapo:alpha=2", "--output_dir", str(out)]
    assert main(["compare", *other]) == 0
    assert "dapo: no interval: 2 pairs with hapo:alpha=2" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Of one run, at seed 3."""
    return make_run(tmp_path_factory.mktemp("finished") / "run", "dapo", seed=3, tokens=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dapo={run}", "--arms", "dapo", "--tune=1e-4"], "--runs trains nothing: drop --arms, --tune"),
        (["dapo={run}", "--config", "demo", "--max-steps", "3"], "drop --config, --max_steps"),
        (["dapo={run}", "--reference", "hapo"], "the reference 'hapo' is none of the arms (dapo)"),
        (["dapo={run}", "dapo={run}"], "are both seed 3 of arm 'dapo'"),
        (["dapo={run}x"], "x' is no ARM=FOLDER with the folder of a run"),
        (["{run}"], "is no ARM=FOLDER"),
        (["=" + "{run}"], "is no ARM=FOLDER"),
    ],
)
def test_runs_that_cannot_be_told_apart_or_found_are_refused(words, message, finished, tmp_path, capsys):
    given = [word.format(run=finished) for word in words]
    assert main(["compare", "--output_dir", str(tmp_path / "out"), "--runs", *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/results.csv").exists()


def test_a_run_that_was_stopped_or_names_no_seed_is_refused(tmp_path, capsys):
    stopped = make_run(tmp_path / "stopped", "dapo", tokens=False, finished=False)
    nameless = make_run(tmp_path / "nameless", "dapo", tokens=False, manifest={"seed": None})
    for folder, message in ((stopped, "has no finished.json"), (nameless, "has the seed None")):
        assert main(["compare", "--runs", f"dapo={folder}", "--output_dir", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_runs_are_not_written_over_a_run_or_a_comparison_that_trains(finished, tmp_path, capsys):
    assert main(["compare", "--runs", f"dapo={finished}", "--output_dir", str(finished)]) == 2
    assert "is the folder of a run" in capsys.readouterr().err
    (tmp_path / "runs/dapo/seed-1").mkdir(parents=True)
    (tmp_path / "runs/dapo/seed-1/plan.json").write_text("{}")
    assert main(["compare", "--runs", f"dapo={finished}", "--output_dir", str(tmp_path)]) == 2
    assert "holds a comparison that trains its runs" in capsys.readouterr().err

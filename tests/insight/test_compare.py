"""What a comparison reads, counts, and says; the runs are written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from hapo.insight.compare import MEASURES, Comparison, read_comparison
from hapo.insight.compare_page import summary, write_comparison

SEEDS = range(1, 7)


def write_run(
    folder: Path,
    accuracies: list[float],
    *,
    gradient: list[float],
    clipped: float = 0.02,
    weights: str | None = "same",
    model: str = "tiny",
    kl_old: float = 1e-3,
    hows: Sequence[str] = ("greedy", "sampled"),
    problems: int = 10,
) -> Path:
    """A run measured at 0, 1,000, ... tokens on ten problems with two answers each."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("method: dapo\n")
    told = {"model": model} if weights is None else {"model": model, "weights_sha256": weights}
    (folder / "manifest.json").write_text(json.dumps(told))
    metrics = {"loss": 0.0, "entropy": 0.5, "completions/mean_length": 20.0, "kl_old": kl_old}
    metrics |= {"clip_ratio/low_mean": clipped, "clip_ratio/high_mean": 0.0}
    logged = [*({"step": step, **metrics} for step in range(1, 11)), {"step": 10, "train_loss": 0.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    lines = []
    for k, accuracy in enumerate(accuracies):
        solved = round(20 * accuracy)
        scores = [1.0] * (solved // 2) + [0.5] * (solved % 2)
        scores += [0.0] * (10 - len(scores))
        for how in hows:
            values = {"mean": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "samples": 2}
            more = {"problems": problems, "binary": True, "scores": scores, "how": how}
            lines.append({"step": 4 * k, "num_tokens": 1000.0 * k, "seconds": 2.0 * k, **values, **more})
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    end = {"steps": 4 * (len(accuracies) - 1), "num_tokens": 1000.0 * (len(accuracies) - 1), "seconds": 4.0}
    (folder / "finished.json").write_text(json.dumps({**end, "why": "max_steps"}))
    save_file({"gradient": np.array(gradient, np.float32)}, folder / "first_gradient.safetensors")
    return folder


def two_arms(folder: Path, **other) -> dict[tuple[str, int], Path]:
    """a climbs from 0.2 to 0.6, b to 0.8, with a little noise by seed that both share."""
    runs = {}
    for seed in SEEDS:
        noise = 0.05 * (seed % 3)
        a = [0.2, 0.4 + noise, 0.6 + noise]
        b = [0.2, 0.5 + noise, 0.8 + noise - 0.05 * (seed % 2)]
        runs["a", seed] = write_run(folder / "a" / str(seed), a, gradient=[1.0, 0.0])
        runs["b", seed] = write_run(folder / "b" / str(seed), b, **{"gradient": [0.6, 0.8], **other})
    return runs


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Comparison:
    return read_comparison(two_arms(tmp_path_factory.mktemp("arms")), "a", target=0.5)


def test_figures_of_a_run_are_those_of_its_measurements(comparison):
    row = comparison.runs.set_index(["arm", "seed"]).loc[("a", 3)]
    assert (row.start, row.sampled, row.best) == (0.2, 0.6, 0.6)
    assert row.auc == pytest.approx((0.3 + 0.5) / 2)
    assert row.tokens_to_target == pytest.approx(1500)
    assert row.seconds_to_target == pytest.approx(3.0)
    assert row.reached and not row.collapsed
    assert (row.entropy, row.length) == (0.5, 20)  # the last line that has them
    # 0.6 of 20 answers are 6 problems with both right: one of two drawn is right as often as both.
    assert (row["pass@1"], row["pass@2"]) == (pytest.approx(0.6), pytest.approx(0.6))
    assert row.gradient_cosine == pytest.approx(1.0)
    assert comparison.runs[comparison.runs.arm == "b"].gradient_cosine.tolist() == pytest.approx([0.6] * 6)


def test_pairs_decide_and_the_verdict_says_so(comparison):
    table = comparison.table(MEASURES[0])
    differences = [0.2 - 0.05 * (seed % 2) for seed in SEEDS]
    assert table.loc["b", "difference"] == pytest.approx(np.mean(differences))
    assert 0.14 < table.loc["b", "low"] < table.loc["b", "high"] < 0.21
    assert table.loc["b", "verdict"].startswith("b better than a by 17.5 points")
    assert comparison.warnings == []


def test_a_run_that_never_arrives_counts_with_the_whole_budget(tmp_path):
    runs = two_arms(tmp_path / "arms")
    runs["b", 1] = write_run(tmp_path / "flat", [0.2, 0.2, 0.2], gradient=[0.6, 0.8])
    row = read_comparison(runs, "a", target=0.5).runs.set_index(["arm", "seed"]).loc[("b", 1)]
    assert not row.reached
    assert row.tokens_to_target == 2000


def test_measurements_within_one_rollout_batch_are_one_point_of_the_curve(tmp_path):
    runs = two_arms(tmp_path / "arms")
    for folder in runs.values():
        lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
        doubled = [{**lines[-1], "mean": 0.0}, lines[-1]]
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*lines[:-1], *doubled]))
    row = read_comparison(runs, "a", target=0.5).runs.set_index(["arm", "seed"]).loc[("a", 3)]
    assert row.auc == pytest.approx((0.3 + 0.5) / 2)


def test_the_area_ends_where_the_shortest_run_ends_and_unequal_budgets_are_said(tmp_path):
    runs = two_arms(tmp_path / "arms")
    for seed in SEEDS:
        runs["b", seed] = write_run(tmp_path / f"long{seed}", [0.2, 0.4, 0.6, 1.0], gradient=[0.6, 0.8])
    found = read_comparison(runs, "a", target=0.9)
    row = found.runs.set_index(["arm", "seed"]).loc[("b", 1)]
    assert row.auc == pytest.approx((0.3 + 0.5) / 2)
    assert not row.reached  # within the 2,000 tokens that all runs have
    assert "b generated 3,000 tokens a run, a 2,000" in "".join(found.warnings)


def test_a_fall_below_the_best_beyond_the_intervals_is_a_collapse(tmp_path):
    runs = two_arms(tmp_path / "arms")
    runs["b", 1] = write_run(tmp_path / "fallen", [0.2, 0.7, 0.3], gradient=[0.6, 0.8])
    assert read_comparison(runs, "a").runs.set_index(["arm", "seed"]).loc[("b", 1)].collapsed


def test_the_target_is_half_way_of_the_reference_unless_given(tmp_path):
    means = [0.6 + 0.05 * (seed % 3) for seed in SEEDS]
    expected = round((0.2 + np.mean(means)) / 2, 3)
    assert read_comparison(two_arms(tmp_path), "a").target == pytest.approx(expected)


@pytest.mark.parametrize(
    ("quirk", "words"),
    [
        ({"gradient": [1.0, 0.001]}, "begin with the same update"),
        ({"clipped": 1e-5}, "next to nothing is clipped (b 0.001 % of the tokens)"),
        ({"kl_old": 0.0}, "b: the policy never leaves the rollout policy"),
    ],
)
def test_a_comparison_that_can_show_nothing_says_why(quirk, words, tmp_path):
    (warning,) = read_comparison(two_arms(tmp_path, **quirk), "a").warnings
    assert words in warning


def flat(folder: Path, accuracy: float, seeds: Sequence[int] = SEEDS) -> dict[tuple[str, int], Path]:
    """Two arms that are measured as this, from the start to the end, and learn nothing."""
    same = {"gradient": [0.0], "clipped": 0.0, "kl_old": 0.0}
    return {(arm, s): write_run(folder / arm / str(s), [accuracy] * 3, **same) for arm in "ab" for s in seeds}


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (
            0.0,
            "no answer was ever right, in any arm: nothing was learned, and arms cannot differ. Read some answers",
        ),
        (1.0, "every answer was right, in every arm, from the start: nothing was left to learn"),
    ],
)
def test_where_all_answers_are_wrong_or_all_right_that_is_what_is_said_and_what_to_check(
    accuracy, words, tmp_path
):
    found = read_comparison(flat(tmp_path / "arms", accuracy, seeds=[1]), "a", target=0.0)
    (warning,) = found.warnings
    assert warning.startswith(words) and "rewards" in warning and "problems" in warning
    assert found.target is None and not {"reached", "tokens_to_target", "seconds_to_target"} & set(found.runs)
    page = write_comparison(found, tmp_path).read_text()
    written = (tmp_path / "comparison.md").read_text()
    for text in (page, written):
        assert words in text
        assert "reached the target" not in text and "train longer" not in text and "to the target" not in text
    assert written.startswith("Reference: a. Target: none.")
    assert "There is no target." in page and "2 arms, 1 paired seed, against" in page
    assert "no interval: 1 pair with a" in written


def test_a_target_that_a_run_begins_with_is_none(tmp_path):
    runs = two_arms(tmp_path / "arms")
    assert read_comparison(runs, "a", target=0.201).target == 0.201
    for target in (0.2, 0.1):
        found = read_comparison(runs, "a", target=target)
        words = f"there is no target: {100 * target:.1f} % is not above the start, where a run had 20.0 %"
        assert found.target is None and found.warnings == [f"{words}; name a higher one with --target"]
    found = read_comparison(flat(tmp_path / "flat", 0.3), "a")
    assert found.warnings[0].startswith("there is no target: half of a's gain, 30.0 %, is not above the start")
    assert "no arm learned anything (under one point): train longer" in found.warnings[-1]


@pytest.mark.parametrize(
    ("accuracy", "words"), [(0.005, "next to no answer was ever right"), (0.99, "take harder problems")]
)
def test_who_has_nothing_to_learn_from_is_not_told_to_train_longer(accuracy, words, tmp_path):
    last = read_comparison(flat(tmp_path, accuracy, seeds=[1]), "a").warnings[-1]
    assert words in last and "train longer" not in last


def test_arms_that_began_with_different_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a and b began with different weights in seed 1"):
        read_comparison(two_arms(tmp_path, weights="other"), "a")


def of_verl(folder: Path, **other) -> dict[tuple[str, int], Path]:
    """The two arms as verl leaves them: one kind of measurement, no hash of the weights, no first gradient."""
    runs = {}
    for seed in SEEDS:
        for arm, changes in (("a", {}), ("b", other)):
            end = 0.6 + 0.05 * (seed % 3) + 0.1 * (arm == "b")
            options = {"gradient": [1.0], "weights": None, "hows": ["greedy"], **changes}
            runs[arm, seed] = write_run(folder / arm / str(seed), [0.2, 0.4, end], **options)
            (runs[arm, seed] / "first_gradient.safetensors").unlink()
    return runs


def test_where_no_answers_were_sampled_accuracy_is_that_of_greedy_ones_and_is_said_to_be(tmp_path):
    found = read_comparison(of_verl(tmp_path / "arms"), "a", target=0.5)
    assert found.how == "greedy"
    assert "sampled" not in found.runs and "pass@1" not in found.runs
    assert found.runs.gradient_cosine.isna().all()
    row = found.runs.set_index(["arm", "seed"]).loc[("b", 3)]
    assert (row.start, row.greedy, row.best) == (0.2, pytest.approx(0.7), pytest.approx(0.7))
    assert row.auc == pytest.approx((0.3 + 0.55) / 2)
    assert row.tokens_to_target == pytest.approx(1000 + 1000 / 3)
    assert [m.column for m in found.measures[:2]] == ["greedy", "auc"]
    (warning,) = found.warnings
    assert warning.startswith("accuracy here is that of greedy answers")
    page = write_comparison(found, tmp_path).read_text()
    assert "b better than a by 10.0 points" in page
    assert "50.0 % held-out accuracy, greedy; a run" in page
    assert "held-out accuracy, greedy" in page
    assert "accuracy, sampled" not in page and "at the end, sampled" not in page


def test_where_every_answer_was_sampled_there_is_no_greedy_column(tmp_path):
    runs = two_arms(tmp_path / "arms", hows=["sampled"])  # b alone
    found = read_comparison(runs, "a", target=0.5)
    assert (found.how, found.warnings) == ("sampled", [])
    assert "greedy" not in found.runs
    assert "greedy" not in (write_comparison(found, tmp_path).parent / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": "large"}, r"a and b began with different weights in seed 1 \(model tiny and large\)"),
        ({"weights": "known", "model": "large"}, "began with different weights in seed 1"),
        ({"problems": 11}, "a, seed 1 was measured on 10 held-out problems and b, seed 1 on 11"),
        ({"hows": ["sampled"]}, r"a/1 has no accuracy of sampled answers and .*b/1 none of greedy ones"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(other, message, tmp_path):
    assert read_comparison(of_verl(tmp_path / "equal", weights="known"), "a").arms == ["a", "b"]
    with pytest.raises(ValueError, match=message):
        read_comparison(of_verl(tmp_path / "unequal", **other), "a")


def test_a_run_measured_once_is_refused(tmp_path):
    once = write_run(tmp_path / "once", [0.2], gradient=[1.0])
    with pytest.raises(ValueError, match="once has no curve of held-out accuracy"):
        read_comparison({("a", 1): once}, "a")


def test_the_files_hold_every_run_and_the_page_every_verdict(comparison, tmp_path):
    tuning = pd.DataFrame([{"arm": "a", "learning_rate": r, "seed": 1, "sampled": 0.3} for r in (1e-4, 1e-3)])
    page = write_comparison(comparison, tmp_path, tuning).read_text()
    assert len(pd.read_csv(tmp_path / "results.csv")) == 12
    assert len(pd.read_csv(tmp_path / "curves.csv")) == 12 * 6
    assert "b better than a by 17.5 points" in page
    assert "b better than a by 17.5 points" in (tmp_path / "comparison.md").read_text()
    assert summary(comparison).loc["b", "reached the target"] == "6 of 6"
    for name in ("accuracy", "differences", "seeds", "tuning"):
        assert f'<figure id="{name}"' in page


def test_hostile_labels_stay_text(tmp_path):
    hostile = '</script><script>alert(1)</script>"\u202e'
    runs = {
        (arm if arm == "a" else hostile, seed): folder for (arm, seed), folder in two_arms(tmp_path / "x").items()
    }
    page = write_comparison(read_comparison(runs, "a"), tmp_path).read_text()
    assert "<script>alert" not in page


def test_too_few_seeds_give_means_without_intervals(tmp_path):
    runs = {key: folder for key, folder in two_arms(tmp_path / "x").items() if key[1] < 3}
    found = read_comparison(runs, "a")
    table = found.table(MEASURES[0])
    assert math.isnan(table.loc["b", "low"])
    assert "at least 5 needed" in table.loc["b", "verdict"]
    page = write_comparison(found, tmp_path).read_text()
    assert "an interval needs two arms with 5 seeds each" in page

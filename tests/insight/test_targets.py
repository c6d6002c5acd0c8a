"""Runs that learnt from demonstrations: their records, read back and shown."""

import numpy as np
import pandas as pd
import pytest

import hapo
from hapo.insight.doctor import examine_run
from hapo.insight.microscope import encode
from hapo.insight.report import write_report
from hapo.insight.run import Run
from hapo.insight.targets import extremes, method_of_targets, parse_supervised, ranks, reweigh, target_figures
from hapo.insight.token_figures import analysed
from tests.insight.conftest import make_run
from tests.insight.demonstrations import make_demonstrations


@pytest.fixture
def demonstrations(tmp_path):
    return lambda name="r", **options: Run(make_demonstrations(tmp_path / name, **options))


def test_recorded_weights_are_what_the_method_makes_of_the_recorded_scores(demonstrations):
    run = demonstrations()
    assert run.supervised and run.rollouts == [1, 5]
    tokens = run.tokens(1)
    assert len(tokens) == 22 and tokens["position"].max() == 6 and "reward" not in tokens
    made = reweigh(tokens, method_of_targets(run))
    np.testing.assert_allclose(made["weight"], tokens["weight"], rtol=1e-6)
    dft = reweigh(tokens, parse_supervised("dft"))
    np.testing.assert_allclose(dft["push"], np.exp(tokens["logp"]), rtol=1e-6)
    exact = parse_supervised("ranktuner:estimator=exact,base_weight=1")
    assert reweigh(tokens, exact)["weight"].between(0.5, 2, inclusive="neither").all()


def test_the_page_has_targets_and_no_word_of_rewards(demonstrations, tmp_path):
    run = demonstrations()
    page = write_report([run.folder], tmp_path / "page.html", against=["sft", "dft"]).read_text()
    for words in (
        "Rank against expected rank",
        "Heaviest, lightest",
        "held-out loss",
        "2.0000 →",
        "Weight against",
    ):
        assert words in page, words
    for words in ("Most amplified", "No step with a reward", "wrong answers"):
        assert words not in page, words


def test_several_methods_see_the_same_targets(demonstrations):
    run = demonstrations()
    one, three = encode(run, 5, []), encode(run, 5, [hapo.method("sft"), hapo.method("dft")])
    assert one.complete and one.responses == one.recorded == 5 and len(three.data) > len(one.data)


def test_methods_of_the_other_kind_are_refused(demonstrations, tmp_path):
    run = demonstrations()
    with pytest.raises(ValueError, match="'grpo' is a policy method"):
        write_report([run.folder], tmp_path / "page.html", against=["grpo"])
    policy = make_run(tmp_path / "policy", "grpo", rollouts=1)
    with pytest.raises(ValueError, match="'sft' is a supervised method"):
        write_report([policy], tmp_path / "page.html", against=["sft"])
    with pytest.raises(ValueError, match="was trained with a supervised method"):
        write_report([policy, run.folder], tmp_path / "page.html", against=["grpo:kl_coef=0.0"])
    write_report([policy, run.folder], tmp_path / "both.html")


def test_figures_say_what_is_missing_without_records(demonstrations):
    empty = analysed(demonstrations(steps=()))
    assert all(figure.chart is None for figure in target_figures(empty))
    tokens = analysed(demonstrations("s"))
    cells = ranks(tokens).chart.layer[0].data.values
    assert sum(cell["targets"] for cell in cells) == len(tokens) == 44
    assert all(cell["x"] <= cell["x2"] and cell["y"] <= cell["y2"] for cell in cells)


def test_extremes_are_the_heaviest_and_the_lightest_that_are_not_ranked_first():
    table = pd.DataFrame({"weight": [0.1, 0.9, 0.5, 0.0], "rank": [3.0, 1.0, 2.0, 1.0]})
    heavy, light = extremes(table, 2).values()
    assert heavy["weight"].tolist() == [0.9, 0.5] and light["weight"].tolist() == [0.1, 0.5]


@pytest.mark.parametrize(
    ("losses", "finished", "found"),
    [
        ((2.0, 1.0, 0.9), True, []),
        ((2.0, 1.0, 1.2), True, ["learnt_by_heart"]),
        ((2.0, 1.995), True, ["nothing_learnt"]),
        ((2.0, 1.0), False, ["demonstrations_unfinished"]),
        ((2.0, 1.0, float("nan")), True, ["non_finite"]),
    ],
)
def test_the_doctor(losses, finished, found, demonstrations):
    assert [finding.name for finding in examine_run(demonstrations(losses=losses, finished=finished))] == found

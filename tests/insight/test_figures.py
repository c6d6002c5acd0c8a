"""Figures hold the numbers of the records, and say what is missing."""

from __future__ import annotations

import json
import math
import warnings

import altair as alt
import numpy as np
import pytest
import vl_convert

from hapo.insight.curves import POINTS, SPAN, accuracy, curves, others, times
from hapo.insight.figures import VEGA_LITE, Figure, labels, theme, visible
from hapo.insight.run import Run
from hapo.insight.token_figures import (
    ROLLOUTS,
    analysed,
    clipping,
    lengths,
    positions,
    ratios,
    signals,
    spread,
    temperatures,
    token_figures,
)
from hapo.insight.tokens import Tokens
from hapo.insight.unmasking import unmasking
from hapo.insight.word_figures import dual_entropy, landscape


@pytest.fixture(scope="module")
def hapo_run(make_run, tmp_path_factory):
    return Run(make_run(tmp_path_factory.mktemp("runs") / "hapo", groups=8, size=8))


@pytest.fixture(scope="module")
def tokens(hapo_run):
    """All that was recorded, as a table."""
    return hapo_run.tokens()


@pytest.fixture(scope="module")
def recorded(hapo_run):
    """The same, as figures read it."""
    return analysed(hapo_run)


def rows(figure: Figure) -> list[dict]:
    """The first data of a figure."""
    spec = figure.spec
    while "data" not in spec:
        spec = spec["layer"][0]
    return figure.spec["datasets"][spec["data"]["name"]]


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures}


def test_a_run_with_everything_has_every_figure_and_vega_lite_takes_them(hapo_run, recorded):
    figures = [*curves([hapo_run]), *token_figures(recorded), *others([hapo_run])]
    assert [figure.name for figure in figures if figure.chart is None] == []
    assert len({figure.name for figure in figures}) == len(figures)
    for figure in figures:
        alt.Chart.from_dict(figure.spec)  # raises where the schema forbids something
        json.dumps(figure.spec, allow_nan=False)
        assert figure.look.endswith(".")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vl_convert.vegalite_to_vega(figure.spec, VEGA_LITE)


def test_several_runs_share_a_figure_in_colours_of_their_own(hapo_run, make_run, tmp_path):
    other = Run(make_run(tmp_path / "dapo", "dapo"))
    baseline = Run(make_run(tmp_path / "trl", None))
    found = by_name(curves([hapo_run, other, baseline]))
    assert {row["run"] for row in rows(found["reward"])} == {"hapo", "dapo", "trl"}
    assert {row["run"] for row in rows(found["temperature"])} == {"hapo"}
    assert {row["line"] for row in rows(found["length"]) if row["run"] == "trl"} == {"all"}
    assert {row["line"] for row in rows(found["length"]) if row["run"] == "dapo"} == {"right", "wrong"}
    assert {row["run"] for row in rows(found["time"])} == {"hapo", "dapo"}
    for name in ("reward", "length", "accuracy", "time"):
        vl_convert.vegalite_to_vega(found[name].spec, VEGA_LITE)


def test_runs_of_one_name_are_told_apart(make_run, tmp_path):
    runs = [Run(make_run(tmp_path / place / "run", None, steps=2)) for place in "ab"]
    assert labels(runs) == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]
    assert labels([runs[0], runs[0]]) == [f"1: {tmp_path / 'a' / 'run'}", f"2: {tmp_path / 'a' / 'run'}"]


def test_long_runs_are_thinned_without_a_change_of_their_mean(make_run, tmp_path):
    steps = 3 * POINTS
    run = Run(make_run(tmp_path / "long", None, steps=steps))
    drawn = rows(curves([run])[0])
    assert len(drawn) == POINTS
    assert drawn[-1]["step"] == steps
    reward = run.metrics["reward"]
    assert np.mean([row["raw"] for row in drawn]) == pytest.approx(reward.mean(), abs=1e-4)
    assert drawn[-1]["smooth"] == pytest.approx(reward.ewm(span=steps / SPAN).mean().iloc[-1], abs=1e-4)


def test_a_log_scale_gets_no_zeros_and_no_figure_gets_what_is_no_number(make_run, tmp_path):
    name = "sampling/sampling_logp_difference/mean"

    def broken(line):
        changes = {1: {name: 0.0}, 2: {"reward": math.nan}, 3: {"reward": math.inf}, 4: {"reward": None}}
        return line | changes.get(line["step"], {})

    found = by_name(curves([Run(make_run(tmp_path / "run", lines=broken))]))
    assert 1 not in [row["step"] for row in rows(found["mismatch"]) if row["line"] == "mean"]
    assert min(row["step"] for row in rows(found["reward"]) if row["step"] > 1) == 5


def test_metrics_of_verl_are_shown_under_their_names(make_run, tmp_path):
    def verl(line):
        step = {"step": line["step"], "loss": 0.0}
        return step | {"critic/score/mean": 0.5, "actor/entropy": 1.5, "actor/pg_clipfrac": 0.01, "perf/mfu": 0.4}

    run = Run(make_run(tmp_path / "verl", None, lines=verl))
    found = by_name(curves([run]))
    assert rows(found["reward"])[0]["raw"] == 0.5
    assert rows(found["entropy"])[0]["raw"] == 1.5
    assert "perf/mfu" in [figure.title for figure in others([run])]


def test_accuracy_is_that_of_the_evaluations(hapo_run):
    drawn = rows(accuracy([hapo_run]))
    assert [row["mean"] for row in drawn] == pytest.approx(hapo_run.evaluations["mean"].tolist(), abs=1e-4)
    assert [row["high"] for row in drawn] == pytest.approx(hapo_run.evaluations["high"].tolist(), abs=1e-4)


def test_what_was_not_logged_is_left_out_with_what_would_make_it_appear(make_run, tmp_path):
    run = Run(make_run(tmp_path / "empty", None, steps=0, evaluations=False))
    for figure in [*curves([run]), *token_figures(analysed(run))]:
        assert figure.chart is None
        assert figure.missing.endswith(".")
    with pytest.raises(ValueError, match="there is no figure 'reward': No step"):
        _ = curves([run])[0].spec


def test_one_logged_step_is_a_visible_point(make_run, tmp_path):
    run = Run(make_run(tmp_path / "short", steps=1, rollouts=1, updates=1))
    for figure in (curves([run])[0], times([run])):
        assert len({row["step"] for row in rows(figure) if "step" in row}) <= 1
        svg = vl_convert.vegalite_to_svg({**figure.spec, "width": 300}, VEGA_LITE, config=theme("light"))
        assert 'opacity="1"' in svg or "mark-rect" in svg


def test_landscape_is_frequency_and_mean_entropy_of_each_text(tokens, recorded):
    drawn = {row["text"]: row for row in rows(landscape(recorded))}
    wait = tokens[tokens["text"] == " wait"]
    assert drawn["␣wait"]["count"] == len(wait)
    assert drawn["␣wait"]["entropy"] == pytest.approx(wait["entropy"].mean(), rel=1e-3)
    assert sum(row["count"] for row in drawn.values()) == len(tokens)


def test_dual_entropy_joins_case_and_spaces_and_shows_words_at_both_ends(tokens, recorded):
    drawn = {row["stem"]: row for row in rows(dual_entropy(recorded))}
    both = tokens[tokens["text"].isin([" the", "The"])]["entropy"]
    assert drawn["the"]["count"] == len(both)
    assert drawn["the"]["low"] == pytest.approx(both.quantile(0.1), rel=1e-3)
    assert drawn["the"]["high"] == pytest.approx(both.quantile(0.9), rel=1e-3)
    assert {"=", "7"}.isdisjoint(drawn)  # certain wherever they stand


def test_ratios_count_each_token_that_could_have_moved(tokens, recorded):
    moved = tokens[tokens["kept"] & (tokens["step"] > tokens["rollout"])]
    assert sum(row["tokens"] for row in rows(ratios(recorded))) == len(moved)


def test_ratios_are_left_out_where_each_batch_served_one_step(make_run, tmp_path):
    figure = ratios(analysed(Run(make_run(tmp_path / "on-policy", updates=1))))
    assert figure.chart is None and "steps_per_generation" in figure.missing


def test_clipping_shares_add_up_to_the_clipped_tokens(tokens, recorded):
    kept = tokens[tokens["kept"]]
    drawn = rows(clipping(recorded))
    for bound, side in (("low", kept["ratio"] < 1), ("high", kept["ratio"] > 1)):
        shares = [row["share"] for row in drawn if row["bound"] == bound]
        assert len(shares) == 10
        assert np.mean(shares) == pytest.approx((kept["clipped"] & side).mean(), abs=2e-3)


def test_clipping_is_left_out_where_nothing_was_clipped(tokens):
    assert clipping(Tokens.of(tokens.assign(clipped=False))).missing == "No recorded token met a clip bound."


def test_lengths_are_distributions_of_right_and_of_wrong_responses(tokens, recorded):
    drawn = rows(lengths(recorded))
    for kind in ("right", "wrong"):
        shares = [row["share"] for row in drawn if row["kind"] == kind]
        assert sum(shares[:-1]) == pytest.approx(1.0, abs=1e-3)  # the last only closes the outline
    right = tokens[tokens["verdict"] > 0].groupby(["rollout", "response"]).size()
    assert f"{right.median():g} tokens in {len(right)} responses" in {row["median"] for row in drawn}


def test_positions_are_medians_of_first_middle_and_last_rollout(tokens, recorded):
    drawn = rows(positions(recorded))
    assert {row["step"] for row in drawn} == {"step 1", "step 9", "step 17"}
    first = tokens[(tokens["rollout"] == 1) & (tokens["position"] == 3)]["entropy"].median()
    assert [r["mid"] for r in drawn if (r["step"], r["position"]) == ("step 1", 3)] == [
        pytest.approx(first, rel=1e-3)
    ]


def test_signal_histogram_holds_every_token(tokens, recorded):
    assert sum(row["share"] for row in rows(signals(recorded))) == pytest.approx(1.0, abs=2e-3)
    assert "HAPO" in signals(Tokens.of(tokens.drop(columns="signal"))).missing


def test_gates_have_a_histogram_where_the_run_has_gates(tokens, recorded):
    assert "gates" not in by_name(token_figures(recorded))
    gated = tokens.assign(gate=(tokens["rollout"] == 1) * 0.5 + 0.26)
    figure = by_name(token_figures(Tokens.of(gated)))["gates"]
    shown = {(row["step"], row["gate"]) for row in rows(figure) if row["share"] == 1}
    assert shown == {("step 1", 0.7625), ("step 9", 0.2625), ("step 17", 0.2625)}
    alt.Chart.from_dict(figure.spec)


def test_the_order_of_unmasking_is_of_the_tokens_that_were_drawn(tokens):
    drawn = tokens.assign(unmasked=3.0 - tokens["position"] % 4, confidence=0.5)
    drawn["unmasked"] = drawn["unmasked"].mask(drawn["position"] >= 4)  # the responses had ended
    figure = unmasking(Tokens.of(drawn))
    shown = {(row["step"], row["position"]): row["mean"] for row in rows(figure)}
    assert shown == {(f"step {first}", i): 3.0 - i for first in (1, 9, 17) for i in range(4)}
    assert {(row["low"], row["high"], row["confidence"]) for row in rows(figure)} == {
        (x, x, 0.5) for x in range(4)
    }
    alt.Chart.from_dict(figure.spec)
    assert unmasking(Tokens.of(drawn.assign(unmasked=np.nan))).chart is None


def test_temperature_appears_where_it_was_adapted(tokens, recorded, make_run, tmp_path):
    drawn = rows(temperatures(recorded))
    assert {row["step"] for row in drawn} == {"step 9", "step 17"}  # the first rollout has no statistics yet
    hot = max(drawn, key=lambda row: row["entropy"])
    assert hot["temperature"] == max(row["temperature"] for row in drawn) > 1
    fixed = Run(make_run(tmp_path / "dapo", "dapo"))
    assert temperatures(analysed(fixed)).chart is None
    assert temperatures(Tokens.of(fixed.tokens().drop(columns="temperature"))).chart is None


def test_of_many_rollouts_some_are_read_first_and_last_among_them(make_run, tmp_path):
    run = Run(make_run(tmp_path / "run", rollouts=11, groups=2, size=2, length=4))
    read = analysed(run).rollouts
    assert len(read) == ROLLOUTS
    assert (read[0], read[-1]) == (run.rollouts[0], run.rollouts[-1])
    assert spread([1, 2, 3], 8) == [1, 2, 3] and spread([], 8) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the\n", "␣the↵"),
        ("a\u202eb\x00", "a\\u202eb\\u0000"),
        ("x" * 50, "x" * 40 + "…"),
        ("é漢🙂", "é漢🙂"),
    ],
)
def test_texts_are_shown_with_what_does_not_print(text, shown):
    assert visible(text) == shown


def test_texts_are_cut_from_the_side_that_is_asked_for():
    assert visible("abcdef ghi", 4, tail=True) == "…␣ghi"
    assert visible("a b\nc", marks=False) == "a b c"


def test_any_text_may_be_a_name_or_a_token(make_run, tmp_path):
    words = ["if", "datum.x", "a'b\"c\\", "</script>", "\x00", "\u202ex", "x" * 10_000, " the", "The"]
    run = Run(make_run(tmp_path / "run", words=words, groups=8, size=8))
    run.name = "".join(words)
    for figure in [*curves([run, run]), *token_figures(analysed(run))]:
        vl_convert.vegalite_to_svg({**figure.spec, "width": 300}, VEGA_LITE)


def test_files_for_papers_are_light_and_sharp(hapo_run, tmp_path):
    figure = curves([hapo_run])[0]
    figure.save(tmp_path / "a.png", "png")
    figure.save(tmp_path / "a.svg", "svg")
    png = (tmp_path / "a.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png[16:20], "big") > 1800  # pixels across
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert theme("light")["background"] in svg and "#0072B2" in svg

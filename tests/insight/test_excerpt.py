"""One prompt's answers as a figure."""

import pytest

from hapo.insight.excerpt import excerpt
from hapo.insight.run import Run, recompute


def rows(figure):
    """What is drawn for each token."""
    return figure.spec["datasets"][figure.spec["layer"][0]["data"]["name"]]


def test_every_token_stands_in_its_place_with_its_push(make_run, tmp_path):
    run = Run(make_run(tmp_path / "run", length=6))
    first = run.rollouts[0]
    tokens = run.tokens(first)
    pushes = recompute(run.rollout(first), run.method())
    tokens = tokens[tokens["group"] == 1].merge(pushes, on=["response", "step", "position"])
    tokens = tokens.sort_values(["verdict", "response", "position"], ascending=[False, True, True])
    drawn = rows(excerpt(run, first, group=1))
    assert [row["value"] for row in drawn] == pytest.approx(tokens["push"].tolist(), rel=1e-5, abs=1e-6)
    assert [row["text"].replace("␣", " ").replace("↵", "\n") for row in drawn] == tokens["text"].tolist()
    ends = {}
    for row in drawn:
        assert row["start"] == ends.get(row["line"], 0)
        ends[row["line"]] = row["end"]
    assert list(ends) == [0, 1, 2, 3]


def test_unless_told_it_is_the_prompt_that_is_pushed_hardest(make_run, tmp_path):
    run = Run(make_run(tmp_path / "run", length=6))
    last = run.rollouts[-1]
    totals = {}
    for group in run.tokens(last)["group"].unique():
        totals[group] = sum(abs(row["value"]) for row in rows(excerpt(run, last, group)))
    drawn = rows(excerpt(run))
    assert sum(abs(row["value"]) for row in drawn) == pytest.approx(max(totals.values()), abs=1e-4)
    assert max(totals.values()) > min(totals.values())


def test_a_notebook_shows_it_and_what_is_missing_is_said(make_run, tmp_path):
    run = Run(make_run(tmp_path / "run", length=6))
    assert excerpt(run, colour="entropy")._repr_png_().startswith(b"\x89PNG")
    for told, message in (
        ({"colour": "prompt"}, "no number of the tokens is called 'prompt'"),
        ({"group": 99}, "has no prompt 99"),
        ({"rollout": 2}, "no rollout batch 2"),
    ):
        with pytest.raises(ValueError, match=message):
            excerpt(run, **told)
    with pytest.raises(ValueError, match="recorded no tokens"):
        excerpt(Run(make_run(tmp_path / "none", tokens=False)))

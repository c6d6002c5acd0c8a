"""Attributions for readers: a page of pairs of answers, columns of the records, and quantities of the microscope."""

import math
import re

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from hapo.insight.attributions import AttributedAnswer, record_attributions, write_attributions
from hapo.insight.microscope import encode
from hapo.insight.run import Run
from hapo.tasks.attribution import Attribution
from tests.insight.conftest import make_run
from tests.insight.test_microscope import Unpacked

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e"


def answer(right=True, prompt="1+1=", tokens=("2", "<eos>"), **channels):
    channels = channels or {"shap": [0.5, -0.25], "mixture": [0.1, 0.0]}
    return AttributedAnswer(prompt=prompt, tokens=list(tokens), score=float(right), right=right, channels=channels)


def test_the_page_shows_pairs_with_the_right_answer_first(tmp_path):
    file = write_attributions([answer(False), answer(True), answer(True, "2+2=")], tmp_path / "page.html")
    page = file.read_text()
    assert re.findall(r"✓ right|✗ wrong", page) == ["✓ right", "✗ wrong", "✓ right"]
    assert page.count('<h2>Prompt <bdi class="at-prompt">1+1=</bdi></h2>') == 1
    assert '<span class="at p k10" title="0.5">2</span>' in page  # the largest of its channel
    assert '<span class="at n k5" title="-0.25">&lt;eos&gt;</span>' in page
    assert '<span class="at " title="0.0">' in page or '<span class="at " title="0">' in page
    write_attributions([answer(False), answer(True), answer(True, "2+2=")], file)
    with pytest.raises(FileExistsError, match="--replace"):
        write_attributions([answer()], file)


def test_text_of_a_model_is_text(tmp_path):
    shown = answer(prompt=HOSTILE, tokens=(HOSTILE, "\n"), **{HOSTILE: [1.0, -1.0]})
    page = write_attributions([shown], tmp_path / "page.html").read_text()
    assert "<img" not in page and "\u202e" not in page
    assert page.count("</script>") == page.count("<script")


def test_a_channel_that_is_not_finite_has_no_colour(tmp_path):
    page = write_attributions([answer(shap=[math.nan, math.nan])], tmp_path / "page.html").read_text()
    assert page.count('class="at "') == 2


def test_pages_that_cannot_be():
    for answers, message in (
        ([], "needs an answer"),
        ([answer(), answer(lime=[0.0, 0.0])], r"answer 1 has the channels \['lime'\], the first one \['shap'"),
        ([answer(shap=[0.0])], "answer 0: 1 numbers of shap for 2 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            write_attributions(answers, "nowhere.html")


def attribution():
    worth = np.random.default_rng(0).normal(size=100)
    return Attribution(lambda rows: [float(worth[row].sum()) for row in rows], mask_id=99, samples=64)


def test_channels_in_the_records_and_in_the_microscope(tmp_path):
    folder = make_run(tmp_path / "run", "hapo", rollouts=2, ranks=2)
    before = Run(folder).tokens()
    columns = record_attributions(folder, attribution(), lambda text: [len(text)], {"shap": 0.5, "sparse": 0.5})
    assert columns == [f"attribution_{name}" for name in ("shap", "lime", "sparse", "mixture")]
    run = Run(folder)
    after = run.tokens()
    pd.testing.assert_frame_equal(after.drop(columns=columns), before)
    file = next((folder / "tokens").glob("*.parquet"))
    assert b"rollout" in pq.read_schema(file).metadata
    for _, some in after.groupby(["rollout", "response", "step"]):
        ids, prompt = some["id"].tolist(), [len(some["prompt"].iloc[0])]
        found = attribution()([prompt], [ids])[0]
        for name in ("shap", "lime", "sparse"):
            np.testing.assert_allclose(some[f"attribution_{name}"], found.channels[name], atol=1e-5)
        mixed = found.mixture({"shap": 0.5, "sparse": 0.5})
        np.testing.assert_allclose(some["attribution_mixture"], mixed, atol=1e-5)
    data = Unpacked(encode(run, 1, []).data)
    drawn = run.tokens(1).sort_values("group", kind="stable")
    for name in columns:
        np.testing.assert_array_equal(data.numbers(data.head["shared"][name]), drawn[name])
    again = record_attributions(folder, attribution(), lambda text: [len(text)], {"shap": 0.5, "sparse": 0.5})
    assert again == columns and list(Run(folder).tokens().columns) == list(after.columns)


def test_a_run_without_tokens_has_nothing_to_add_to(tmp_path):
    folder = make_run(tmp_path / "run", tokens=False)
    with pytest.raises(ValueError, match="recorded no tokens: train with record_tokens_every"):
        record_attributions(folder, attribution(), lambda text: [1])

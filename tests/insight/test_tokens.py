"""Tokens that are read a rollout batch and some columns at a time: what is exact, whatever the files look like."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hapo.insight.report import write_report
from hapo.insight.run import Run
from hapo.insight.token_figures import analysed, token_figures
from hapo.insight.tokens import Tokens, gather, parts_of, quantiles_by

PLACE = ["rollout", "response", "step", "position"]


def values_of(n: int, seed: int = 0) -> np.ndarray:
    """Some float32 with ties, zeros of either sign and negative numbers."""
    rng = np.random.default_rng(seed)
    values = (rng.normal(0, 1, n) * 10.0 ** rng.integers(-30, 10, n)).astype(np.float32)
    values[: n // 4] = rng.integers(-2, 3, n // 4)
    values[0] = -0.0
    return rng.permutation(values)


@pytest.mark.parametrize("n", [1, 2, 7, 500])
def test_quantiles_by_a_key_are_exact(n):
    values, key = values_of(n), np.random.default_rng(1).integers(0, 5, n) * 3
    shares = [0.0, 0.1, 0.5, 0.8, 1.0]
    half = n // 2
    found = quantiles_by([(key[:half], values[:half]), (key[half:], values[half:])], n + 10, shares)
    grouped = pd.Series(values.astype(float)).groupby(key)
    assert found["count"].to_dict() == grouped.size().to_dict()
    expected = grouped.quantile(shares).unstack()
    np.testing.assert_allclose(found[shares], expected, rtol=1e-12)


def test_quantiles_leave_out_what_is_no_number_and_keep_infinity():
    key, values = np.array([0, 0, 0, 2]), np.array([np.nan, 1.0, -np.inf, np.nan], np.float32)
    found = quantiles_by([(key, values)], 4, [0.0, 1.0])
    assert found.index.tolist() == [0] and found.loc[0].tolist() == [2, -np.inf, 1.0]
    assert quantiles_by([], 0, [0.5]).empty


@pytest.mark.parametrize("n", [3, 10, 101])
def test_equal_parts_are_those_of_ranks_in_the_order_of_ties(n):
    values = values_of(n).round(1)
    tenth = pd.Series(values).rank(method="first").sub(1) * 10 // n
    for number, places in enumerate(parts_of(values, 10)):
        assert sorted(places) == np.flatnonzero(tenth == number).tolist()
        assert (np.diff(values[places]) >= 0).all()


def test_gathered_parts_stand_behind_one_another():
    found = gather(iter([np.array([1, 2]), np.array([], int), np.array([3])]), 9, np.float32)
    assert found.dtype == np.float32 and found.tolist() == [1, 2, 3]


def test_batches_are_those_of_the_table(make_run, tmp_path):
    run = Run(make_run(tmp_path / "run"))
    table, tokens = run.tokens(), analysed(run)
    assert len(tokens) == len(table) and tokens.rollouts == run.rollouts and "gate" not in tokens
    batches = list(tokens.batches("text", "entropy", "text", "gate"))
    assert [list(batch) for batch in batches] == [["text", "entropy"]] * 3
    assert pd.concat(batches)["text"].tolist() == table["text"].tolist()
    np.testing.assert_array_equal(tokens.column("entropy"), table["entropy"])
    held = Tokens.of(table)
    for one, other in zip(token_figures(tokens), token_figures(held), strict=True):
        assert one.spec == other.spec


def shuffled(table: pa.Table) -> pa.Table:
    """Rows in any order."""
    return table.take(np.random.default_rng(0).permutation(len(table)))


def test_rows_in_any_order_and_in_row_groups_are_read_in_order(make_run, tmp_path):
    plain, mixed = (Run(make_run(tmp_path / name, rows=rows)) for name, rows in (("a", None), ("b", shuffled)))
    for file in (mixed.folder / "tokens").iterdir():
        pq.write_table(pq.ParquetFile(file).read(), file, row_group_size=50, dictionary_pagesize_limit=16)
    pd.testing.assert_frame_equal(
        plain.tokens().astype({"text": str, "prompt": str}), mixed.tokens().astype({"text": str, "prompt": str})
    )
    assert plain.tokens()[PLACE].apply(tuple, axis=1).is_monotonic_increasing
    some = mixed.tokens(9, ["text", "response"], responses=[3, 5, 99])
    assert list(some) == ["response", "text"]
    pd.testing.assert_frame_equal(
        some.astype({"text": str}),
        plain.tokens(9)
        .query("response in [3, 5]")[["response", "text"]]
        .astype({"text": str})
        .reset_index(drop=True),
    )


def test_strings_that_repeat_are_categories_and_a_column_may_be_missing_in_a_file(make_run, tmp_path):
    run = Run(make_run(tmp_path / "run", rollouts=2))
    first, second, *_ = sorted((run.folder / "tokens").iterdir())
    table = pq.ParquetFile(second).read()
    pq.write_table(table.drop_columns("entropy_new"), second)
    tokens = run.tokens(1)
    assert tokens["text"].dtype == "category" and tokens["prompt"].dtype == "category"
    assert tokens["entropy_new"].isna().sum() == len(table)
    assert pq.ParquetFile(first).metadata.num_rows + len(table) == run.count(1) == len(tokens)
    assert analysed(run).batch(1, "entropy_new")["entropy_new"].isna().sum() == len(table)


def test_a_folder_of_an_earlier_version_opens(make_run, tmp_path):
    """Without a word in the metadata, plain strings, one row group, as pandas writes it."""
    run = Run(make_run(tmp_path / "run", rollouts=2))
    for file in (run.folder / "tokens").iterdir():
        pd.read_parquet(file).to_parquet(file)
        assert b"rollout" not in pq.read_schema(file).metadata
    old = Run(run.folder)
    assert old.rollouts == [1, 9] and not old.rollout(1).complete
    pd.testing.assert_frame_equal(old.tokens(), run.tokens(), check_categorical=False)
    assert write_report([run.folder], tmp_path / "page.html").is_file()


def test_a_rollout_batch_without_a_token_is_none(make_run, tmp_path):
    run = Run(make_run(tmp_path / "run", rollouts=2))
    table = pq.ParquetFile(run.folder / "tokens" / "step-000001-0.parquet").read()
    empty = pa.table({}).replace_schema_metadata({"rollout": "17", "without_tokens": "[[0, 0, 1.0, 1.0]]"})
    pq.write_table(empty, run.folder / "tokens" / "step-000017-0.parquet")
    assert len(table) and Run(run.folder).rollouts == [1, 9]
    assert write_report([run.folder], tmp_path / "page.html").is_file()


def test_a_page_of_a_large_run_reads_no_rollout_batch_whole(make_run, tmp_path, monkeypatch):
    """Some columns of all its tokens, or all columns of some responses: never a table of everything."""
    folder, read, asked = make_run(tmp_path / "run", rollouts=2), Run.tokens, []

    def noted(run, rollout=None, columns=None, responses=None):
        asked.append((rollout, columns, responses))
        return read(run, rollout, columns, responses)

    monkeypatch.setattr(Run, "tokens", noted)
    monkeypatch.setattr("hapo.insight.microscope.BUDGET", 1)
    write_report([folder], tmp_path / "page.html")
    assert asked
    for rollout, columns, responses in asked:
        assert rollout is not None and (columns is not None or responses is not None)
        assert columns is None or len(columns) <= 8

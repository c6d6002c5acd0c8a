"""What the microscope puts into a page: exact numbers, within a budget, and nothing that could run."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from markupsafe import Markup

import hapo
from hapo.insight import microscope as module
from hapo.insight.excerpt import excerpt
from hapo.insight.microscope import SHARED, encode, microscope, sample
from hapo.insight.run import Run, parse_method, recompute
from tests.insight.conftest import make_run

MADE = ("signal", "weight", "advantage", "advantage_used", "ratio", "bound_low", "bound_high", "clipped", "kept")


class Unpacked:
    """The data of a rollout batch, read as the page reads it."""

    def __init__(self, data: str) -> None:
        stream = gzip.decompress(base64.b64decode(data))
        length = int.from_bytes(stream[:4], "little")
        self.head: dict[str, Any] = json.loads(stream[4 : 4 + length])
        self._arrays = stream[4 + length :]

    def numbers(self, spec: tuple[int, str, int]) -> np.ndarray:
        offset, kind, n = spec
        if kind == "u1":
            return np.frombuffer(self._arrays, np.uint8, n, offset)
        planes = np.frombuffer(self._arrays, np.uint8, 4 * n, offset).reshape(4, n)
        return np.ascontiguousarray(planes.T).view(f"<{kind}").ravel()


def index_of(markup: Markup) -> list[dict[str, Any]]:
    (text,) = re.findall(r'<script type="application/json" id="mx-index">(.*?)</script>', markup)
    index: list[dict[str, Any]] = json.loads(text)
    return index


def size_of(markup: Markup) -> int:
    return sum(len(x) for x in re.findall(r'<script type="application/octet-stream"[^>]*>(.*?)</script>', markup))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(make_run(tmp_path_factory.mktemp("runs") / "mine", "hapo", rollouts=5, seed=1))


def test_the_data_are_the_records_to_the_bit(run: Run) -> None:
    tokens = run.tokens(9).sort_values("group", kind="stable")
    data = Unpacked(encode(run, 9, []).data)
    for name in SHARED:
        assert (name in data.head["shared"]) == (name in tokens)
        if name in tokens:
            np.testing.assert_array_equal(data.numbers(data.head["shared"][name]), tokens[name])
    for name in MADE:
        np.testing.assert_array_equal(data.numbers(data.head["methods"][0][name]), tokens[name], name)
    np.testing.assert_array_equal(data.numbers(data.head["position"]), tokens["position"])
    words = [data.head["words"][i] for i in data.numbers(data.head["word"])]
    assert words == [list(pair) for pair in zip(tokens["id"], tokens["text"], strict=True)]


def test_of_a_diffusion_model_the_order_of_its_draws(tmp_path: Path) -> None:
    def with_draws(table: pa.Table) -> pa.Table:
        place = table["position"].to_numpy().astype(np.float32)
        ended = np.where(place > 5, np.float32(np.nan), place)
        return table.append_column("unmasked", pa.array(ended)).append_column("confidence", pa.array(place / 32))

    drawn = Run(make_run(tmp_path / "run", "espo", rollouts=1, rows=with_draws))
    tokens = drawn.tokens(1).sort_values("group", kind="stable")
    data = Unpacked(encode(drawn, 1, []).data)
    for name in ("unmasked", "confidence", "logp_new"):
        np.testing.assert_array_equal(data.numbers(data.head["shared"][name]), tokens[name])
    page = microscope([drawn], nonce="n")
    assert all(f'key: "{name}"' in page for name in ("unmasked", "confidence", "contribution"))


def test_push_and_other_methods_are_what_the_core_says(run: Run) -> None:
    others = [hapo.method("dapo"), hapo.method("grpo", kl_coef=0.0)]
    order = run.tokens(9).sort_values("group", kind="stable").index
    data = Unpacked(encode(run, 9, others).data)
    own = recompute(run.rollout(9), run.method()).loc[order]
    np.testing.assert_array_equal(data.numbers(data.head["methods"][0]["push"]), own["push"])
    for spec, method in zip(data.head["methods"][1:], others, strict=True):
        made = recompute(run.rollout(9), method).loc[order]
        assert "signal" not in spec
        for name in {*MADE, "push"} - {"signal"}:
            np.testing.assert_array_equal(data.numbers(spec[name]), made[name], name)


def test_responses_stand_by_group_and_cover_all_tokens(run: Run) -> None:
    head = Unpacked(encode(run, 1, []).data).head
    responses = head["responses"]
    groups = [r["group"] for r in responses]
    assert groups == sorted(groups)
    assert [r["end"] for r in responses[:-1]] == [r["start"] for r in responses[1:]]
    tokens = run.tokens(1)
    for r in responses:
        rows = tokens[(tokens.response == r["response"]) & (tokens.step == r["step"])]
        assert len(rows) == r["end"] - r["start"]
        assert (r["reward"], r["verdict"]) == (rows.reward.iloc[0], rows.verdict.iloc[0])
        assert head["prompts"][r["group"]] == rows.prompt.iloc[0]


def test_a_method_that_changes_nothing_costs_almost_nothing(run: Run) -> None:
    alone, twice = encode(run, 1, []), encode(run, 1, [run.method()])
    assert len(twice.data) < 1.05 * len(alone.data)


@pytest.mark.parametrize(
    ("fits", "shown"), [(1, [1]), (2, [1, 33]), (3, [1, 17, 33]), (4, [1, 9, 17, 33]), (5, [1, 9, 17, 25, 33])]
)
def test_as_many_rollouts_as_the_budget_holds(run: Run, fits: int, shown: list[int]) -> None:
    assert run.rollouts == [1, 9, 17, 25, 33]
    largest = max(len(encode(run, first, []).data) for first in run.rollouts)
    page = microscope([run], nonce="n", budget=fits * largest)
    (entry,) = index_of(page)
    assert [x["rollout"] for x in entry["rollouts"]] == shown
    assert entry["left"] == sorted(set(run.rollouts) - set(shown))
    assert entry["command"] == f"hapo report {run.folder} --rollouts"
    assert size_of(page) <= fits * largest


def test_several_runs_share_the_budget(run: Run) -> None:
    largest = max(len(encode(run, first, []).data) for first in run.rollouts)
    entries = index_of(microscope([run, run], nonce="n", budget=4 * largest))
    assert [len(entry["rollouts"]) for entry in entries] == [2, 2]


def test_of_rollouts_too_large_whole_prompts_of_the_first_and_the_last(run: Run) -> None:
    whole = encode(run, 1, [hapo.method("dapo")])
    assert whole.left == []
    page = microscope([run], against=["dapo"], nonce="n", budget=int(0.7 * len(whole.data)))
    assert size_of(page) <= 0.7 * len(whole.data)
    first, last = index_of(page)[0]["rollouts"]
    assert (first["rollout"], last["rollout"]) == (1, 33)
    for shown in (first, last):
        assert (shown["recorded"], shown["responses"]) == (16, 4)
        assert len(shown["left"]) == 3
    (held,) = {0, 1, 2, 3} - set(first["left"])
    tokens = run.tokens(1)
    chosen = tokens[tokens["group"] == held]["response"].unique().tolist()
    part = encode(run, 1, [hapo.method("dapo")], chosen)
    a, b = Unpacked(whole.data), Unpacked(part.data)
    places = [r for r in a.head["responses"] if r["response"] in chosen]
    assert [r["response"] for r in b.head["responses"]] == [r["response"] for r in places]
    there = np.concatenate([np.arange(r["start"], r["end"]) for r in places])
    for one, other in zip(a.head["methods"], b.head["methods"], strict=True):
        for name in other:  # the methods saw the whole rollout batch
            np.testing.assert_array_equal(a.numbers(one[name])[there], b.numbers(other[name]))


def test_a_response_is_shown_however_small_the_budget(run: Run) -> None:
    (shown,) = index_of(microscope([run], nonce="n", budget=10))[0]["rollouts"]
    assert (shown["rollout"], shown["responses"], shown["left"]) == (1, 1, [0, 1, 2, 3])


def test_a_large_rollout_is_not_encoded_whole_to_see_that_it_is_too_large(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    pack = module._pack
    monkeypatch.setattr(module, "PROBE", 20)
    monkeypatch.setattr(module, "_pack", lambda tokens, tables: sizes.append(len(tokens)) or pack(tokens, tables))
    microscope([run], nonce="n", budget=len(encode(run, 1, []).data) // 3)
    del sizes[0]
    assert max(sizes) <= run.count(1) / 2


HEADS = pd.DataFrame(
    {
        "response": range(12),
        "group": np.repeat([0, 1, 2, 3], 3),
        "tokens": 10,
        "verdict": [0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0],
        "reward": [0.0, 0, 0, 1, 1, 1, 0.5, 0, 1, 1, 1, 0],
    }
)
"""Four prompts: all wrong, all right, and two with mixed verdicts."""


@pytest.mark.parametrize(
    ("most", "groups"), [(35, [2]), (65, [2, 1]), (95, [2, 1, 0]), (120, [2, 1, 0, 3]), (10**6, [2, 1, 0, 3])]
)
def test_the_most_mixed_the_best_and_the_worst_prompt_come_first(most: int, groups: list[int]) -> None:
    chosen = sample(HEADS, most, seed=0)
    assert chosen == [response for group in groups for response in range(3 * group, 3 * group + 3)]


def test_where_no_prompt_fits_right_and_wrong_responses_take_turns() -> None:
    assert sample(HEADS, 25, seed=0) == [6, 7]
    assert sample(HEADS, 5, seed=0) == [6]


def test_a_prompt_that_does_not_fit_leaves_room_for_another_and_the_others_are_drawn() -> None:
    long = HEADS.assign(tokens=HEADS["tokens"].where(HEADS["group"] != 1, 1000))
    assert set(sample(long, 65, seed=0)) == {6, 7, 8, 0, 1, 2}
    targets = pd.DataFrame({"response": range(50), "group": range(50), "tokens": 10})
    one, again, other = (sample(targets, 100, seed) for seed in (1, 1, 2))
    assert one == again != other and len(one) == 10


def test_prompts_by_number(run: Run) -> None:
    page = microscope([run], nonce="n", rollouts=[9], prompts=[2])
    (entry,) = index_of(page)
    (shown,) = entry["rollouts"]
    assert entry["asked"] and (shown["rollout"], shown["responses"], shown["left"]) == (9, 4, [0, 1, 3])
    (data,) = re.findall(r'<script type="application/octet-stream"[^>]*>(.*?)</script>', page)
    tokens = run.tokens(9).query("group == 2")
    assert {r["response"] for r in Unpacked(data).head["responses"]} == set(tokens["response"])
    with pytest.raises(ValueError, match=re.escape("mine: no prompt 7 in the rollout batches [9]")):
        microscope([run], nonce="n", rollouts=[9], prompts=[2, 7])


def test_rollouts_by_name(run: Run) -> None:
    (entry,) = index_of(microscope([run], nonce="n", rollouts=[17, 9]))
    assert [x["rollout"] for x in entry["rollouts"]] == [9, 17]
    with pytest.raises(ValueError, match=re.escape("mine recorded no rollout batch 10, only [1, 9, 17, 25, 33]")):
        microscope([run], nonce="n", rollouts=[9, 10])


def test_methods_by_name_and_built(run: Run) -> None:
    page = microscope([run], against=["hapo:components=BCD", hapo.method("dapo")], nonce="n")
    assert index_of(page)[0]["methods"] == ["hapo", "hapo:components=BCD", "dapo"]
    with pytest.raises(ValueError, match="against has two methods called 'dapo'"):
        microscope([run], against=["dapo", hapo.method("dapo")], nonce="n")
    with pytest.raises(ValueError, match="there is no method 'dappo'"):
        microscope([run], against=["dappo"], nonce="n")


def test_a_run_without_tokens_is_named(tmp_path: Path, run: Run) -> None:
    empty = Run(make_run(tmp_path / "trl <b>", None))
    page = microscope([empty, run], nonce="n")
    assert "Without recorded tokens: <bdi>trl &lt;b&gt;</bdi>." in page
    assert [entry["name"] for entry in index_of(page)] == ["mine"]
    assert "<script" not in microscope([empty], nonce="n")


def test_responses_of_several_steps_keep_apart(tmp_path: Path) -> None:
    def repeat(table: pd.DataFrame) -> pd.DataFrame:
        later = table.to_pandas()
        return type(table).from_pandas(
            pd.concat([later, later.assign(step=later.step + 10)]), preserve_index=False
        )

    run = Run(make_run(tmp_path / "twice", "dapo", rollouts=1, rows=repeat))
    responses = Unpacked(encode(run, 1, []).data).head["responses"]
    assert len(responses) == 32
    assert len({(r["response"], r["step"]) for r in responses}) == 32


def test_nothing_hostile_stands_in_the_page(tmp_path: Path) -> None:
    hostile = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\u2028", "\u0000", "\u202e"]
    name = "<img src=x onerror=alert(2)>"
    run = Run(make_run(tmp_path / name, "dapo", rollouts=1, words=hostile, prompts=hostile))
    page = microscope([run], nonce='"><b>', against=["grpo:kl_coef=0.0"])
    assert "alert(" not in page.replace("onerror=alert(2)", "")
    assert name not in page
    assert '"><b>' not in page
    assert not set(page) & {"\u2028", "\u0000", "\u202e"}
    tokens = run.tokens(1).sort_values("group", kind="stable")
    head = Unpacked(encode(run, 1, []).data).head
    assert [text for _, text in head["words"]] == tokens["text"].drop_duplicates().tolist()


def test_the_section_is_whole(run: Run) -> None:
    page = microscope([run], nonce="N0nce")
    assert page.startswith('<section class="mx" id="microscope"')
    assert re.findall(r"<script(?! type=)([^>]*)>", page) == [' nonce="N0nce"']
    assert page == microscope([run], nonce="N0nce")
    for forbidden in ("http:", "https:", "innerHTML", "eval(", "@import", "url(", "fetch("):
        assert forbidden not in page
    assert not re.search(r"\son\w+=", page)


def test_token_rewards_are_a_quantity_and_what_other_methods_learn_from(tmp_path: Path) -> None:
    """In the page, in an excerpt, and read by a method that the run was not trained with."""

    def rewarded(table: pd.DataFrame) -> pd.DataFrame:
        """Each response's reward in halves on its first two tokens."""
        halves = np.where(table["position"] < 2, table["reward"] / 2, 0.0).astype(np.float32)
        return table.assign(token_reward=halves)

    folder = make_run(
        tmp_path / "run",
        rollouts=1,
        length=6,
        rows=lambda table: pa.Table.from_pandas(rewarded(table.to_pandas())),
    )
    run = Run(folder)
    tokens = run.tokens(1).sort_values("group", kind="stable")
    data = Unpacked(encode(run, 1, []).data)
    np.testing.assert_array_equal(data.numbers(data.head["shared"]["token_reward"]), tokens["token_reward"])
    assert 'key: "token_reward"' in microscope([run], nonce="x")
    drawn = excerpt(run, 1, group=0, colour="token_reward").spec
    values = {row["value"] for rows in drawn["datasets"].values() for row in rows if "value" in row}
    assert values == {0.0, 0.5}
    table = recompute(run.rollout(1), parse_method("dr_grpo:advantage=token_reward")).merge(
        run.tokens(1)[["response", "step", "position", "reward"]], on=["response", "step", "position"]
    )
    assert (table.loc[table["position"] >= 2, "advantage"] == 0).all()
    first, second = (table[table["position"] == place].set_index("response")["advantage"] for place in (0, 1))
    np.testing.assert_allclose(first, 2 * second, atol=1e-7)
    assert (first.abs() > 0).any()

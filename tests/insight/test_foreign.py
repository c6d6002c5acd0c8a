"""Dumps of prime-rl, slime and miles, made by hand, open as run folders."""

from __future__ import annotations

import json
import math

import pytest
import torch

import hapo
from hapo.insight.foreign import convert, read_dumps
from hapo.insight.report import write_report
from hapo.insight.run import Run, recompute

WORDS = ["<pad>", "a", "b", "c", "d", "."]


def decode(rows):
    return ["".join(WORDS[token] for token in row) for row in rows]


def sequence(prompt, drawn, reward, shift=0.0, mask=None, **more):
    """A line of prime-rl's export; prompts have no log-probs there."""
    mask = [True] * len(drawn) if mask is None else mask
    n = len(prompt)
    old = [-0.5 - 0.1 * i for i in range(len(drawn))]
    return {
        "schema_version": 1,
        "env_name": "sums",
        "token_ids": prompt + drawn,
        "loss_mask": [False] * n + mask,
        "rewards": [reward] * (n + len(drawn)),
        "inference_logprobs": [0.0] * n + old,
        "trainer_logprobs": [None] * n + [x + shift for x in old],
        "entropy": [None] * n + [0.3 + 0.2 * i for i in range(len(drawn))],
        **more,
    }


def export(folder, steps):
    for step, ranks in steps.items():
        for rank, lines in enumerate(ranks):
            file = folder / "token_exports" / f"step_{step}" / f"rank_{rank}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


TWO = {
    9: [[sequence([1], [2, 5], 1.0)], [sequence([1], [3, 4, 5], 0.0)]],
    10: [
        [sequence([1], [2, 5], 1.0, 0.1), sequence([1], [3, 5], 0.0, -0.3)],
        [sequence([2, 2], [3, 1, 5], 0.0, mask=[True, False, True]), sequence([2, 2], [4, 5], 1.0)],
    ],
}


def test_a_file_that_is_broken_leaves_the_folder_as_it_was(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "mine.txt").write_text("kept")
    broken = export(tmp_path, TWO) / "token_exports" / "step_10" / "rank_0.jsonl"
    whole = broken.read_text()
    broken.write_text(whole[:-20])
    with pytest.raises(ValueError, match="is no token export of prime-rl"):
        convert(tmp_path, output, decode)
    assert [file.name for file in output.iterdir()] == ["mine.txt"]
    broken.write_text(whole)
    assert convert(tmp_path, output, decode) == 2


def test_prime_rl(tmp_path):
    output = tmp_path / "run"
    assert convert(export(tmp_path, TWO), output, decode) == 2
    run = Run(output)
    assert run.rollouts == [9, 10]  # by number, not by name
    assert run.config["engine"] == "prime-rl" and run.finished["steps"] == 2
    tokens = run.tokens(10)
    assert [(t.response, t.position, t.text) for t in tokens.itertuples()] == [
        (0, 0, "b"),
        (0, 1, "."),
        (1, 0, "c"),
        (1, 1, "."),
        (2, 0, "c"),
        (2, 2, "."),  # what a tool said in between is no token of the policy
        (3, 0, "d"),
        (3, 1, "."),
    ]
    assert tokens["prompt"].tolist() == ["a"] * 4 + ["bb"] * 4
    assert tokens["group"].tolist() == [0] * 4 + [1] * 4
    assert tokens["ratio"].tolist()[:4] == pytest.approx([math.exp(0.1)] * 2 + [math.exp(-0.3)] * 2)
    assert tokens["entropy"].tolist()[4:6] == pytest.approx([0.3, 0.7])
    assert (tokens["advantage"] > 0).tolist() == [True, True, False, False, False, False, True, True]
    assert run.metrics["reward"].tolist() == [0.5, 0.5]
    rollout = run.rollout(10)
    assert rollout.complete
    assert recompute(rollout, hapo.method("hapo"))["ratio"].tolist() == pytest.approx(tokens["ratio"].tolist())


def sample(group, tokens, length, reward, **more):
    """A sample of slime and miles, as its to_dict gives it."""
    whole = {
        "group_index": group,
        "tokens": tokens,
        "response_length": length,
        "reward": reward,
        "loss_mask": None,
        "rollout_log_probs": [-0.5] * length,
        "status": "completed",
    }
    return whole | more


def dump(folder, rollout, samples):
    torch.save({"rollout_id": rollout, "samples": samples}, folder / f"rollout_{rollout}.pt")


def test_slime_and_miles(tmp_path):
    for rollout in (10, 9):
        one = sample(0, [1, 2, 5], 2, 1.0)
        dump(tmp_path, rollout, [one, sample(0, [1, 3, 4, 5], 3, 0.0, loss_mask=[1, 0, 1])])
    torch.save({}, tmp_path / "eval_9.pt")
    output = tmp_path / "run"
    assert convert(tmp_path, output, decode) == 2
    run = Run(output)
    assert run.rollouts == [9, 10]
    tokens = run.tokens(9)
    assert tokens["text"].tolist() == ["b", ".", "c", "."]
    assert tokens["position"].tolist() == [0, 1, 0, 2]
    assert tokens["ratio"].tolist() == [1.0] * 4
    assert "entropy" not in tokens
    with pytest.raises(ValueError, match="entropy"):
        convert(tmp_path, tmp_path / "other", decode, "hapo")


@pytest.mark.parametrize("form", ["prime-rl", "miles"])
def test_the_report_and_the_microscope_open_it(tmp_path, form):
    if form == "prime-rl":
        export(tmp_path, TWO)
    else:
        dump(tmp_path, 0, [sample(0, [1, 2, 5], 2, 1.0), sample(0, [1, 3, 5], 2, 0.0)])
    convert(tmp_path, tmp_path / "run", decode)
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    first = 9 if form == "prime-rl" else 0
    assert f'id="mx-0-{first}"' in page
    assert "TRL's own" not in page


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (sequence([1], [2], 1.0, schema_version=2), "line 1 has schema_version 2"),
        (sequence([1], [2], 1.0, trainer_logprobs=[None, None]), "trainer_logprobs is null at a token"),
        ({"schema_version": 1}, "no token export of prime-rl: KeyError.*loss_mask"),
    ],
)
def test_a_broken_export(tmp_path, line, told):
    export(tmp_path, {0: [[line]]})
    with pytest.raises(ValueError, match=told):
        list(read_dumps(tmp_path)[1])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"reward": {"right": 1.0, "form": 0.5}}, r"several parts \(right, form\)"),
        ({"rollout_log_probs": None}, "no tokens with rollout_log_probs"),
        ({"metadata": Exception("code")}, "holds plain data"),
    ],
)
def test_a_broken_dump(tmp_path, change, told):
    dump(tmp_path, 0, [sample(0, [1, 2], 1, 1.0) | change])
    with pytest.raises(ValueError, match=told):
        list(read_dumps(tmp_path)[1])


def test_a_folder_without_dumps(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither prime-rl's token_exports"):
        read_dumps(tmp_path)


def test_a_response_without_a_reward_is_left_out(tmp_path):
    dump(tmp_path, 0, [sample(0, [1, 2, 5], 2, None), sample(0, [1, 3, 5], 2, 0.0), sample(0, [1, 4], 1, 1.0)])
    convert(tmp_path, tmp_path / "run", decode)
    run = Run(tmp_path / "run")
    assert run.tokens(0)["response"].tolist() == [1, 1, 2]
    assert run.rollout(0).complete

"""What the TRL engine leaves out: passes that are too large, rows that count nowhere, scores that are known."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hapo.engines.trl.drawn import as_drawn
from hapo.engines.trl.passes import passes
from hapo.engines.trl.scorer import Scorer, Sequences
from hapo.prompts import WORTH
from hapo.samplers.decoding import Draws
from tests.engines import fixed_rollout, tiny
from tests.engines.test_trl_exactness import ROUNDING, difference
from tests.two_ranks import SPLIT


def sizes(trainer) -> list[int]:
    """Tokens of every call of the layers that takes part in training."""
    seen: list[int] = []

    def look(module, args, kwargs):
        if torch.is_grad_enabled():
            seen.append(kwargs["input_ids"].numel())

    trainer.model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


@pytest.mark.parametrize("options", [{"method": "hapo"}, {"method": "gspo"}, {"method": "grpo"}, SPLIT["several"]])
def test_passes_add_up_to_the_micro_batch(options):
    whole, in_one = fixed_rollout.run(16, 1, 2, 1, tokens_per_pass=0, **options)
    parts, trainer = fixed_rollout.run(16, 1, 2, 1, tokens_per_pass=40, **options)
    for reference, split in zip(whole.steps, parts.steps, strict=True):
        assert difference(reference, split) <= ROUNDING
    losses, expected = (
        [line["loss"] for line in t.state.log_history if "loss" in line] for t in (trainer, in_one)
    )
    assert len(losses) == 2 and all(losses)
    assert losses == pytest.approx(expected, abs=1e-6)


def test_a_pass_is_bounded_and_holds_like_rows():
    ids = torch.tensor([[0, 5], [7, 8], [0, 5], [7, 8], [0, 5], [7, 9]])
    prompts = torch.tensor([[0, 1], [1, 1], [0, 1], [1, 1], [0, 1], [1, 1]])
    lengths = torch.tensor([1, 4, 3, 2, 0, 4])
    mask = torch.arange(4) < lengths.unsqueeze(1)
    # The last but one row counts nowhere. One prompt of one token with answers of 1 and 3: 1 + 2 x 3 = 7.
    parts = [part.tolist() for part in passes(ids, prompts, mask, 10)]
    assert parts == [[0, 2], [3, 1], [5]]
    assert [part.tolist() for part in passes(ids, prompts, mask, 100)] == [[0, 1, 2, 3, 4, 5]]
    assert [part.tolist() for part in passes(ids, prompts, mask & False, 1)] == [[0, 1, 2, 3, 4, 5]]


def test_training_passes_are_as_small_as_told(tmp_path, monkeypatch):
    monkeypatch.setitem(WORTH, "cpu", 0.0)
    trainer = tiny.trainer(tmp_path, tokens_per_pass=40, max_steps=2)
    seen = sizes(trainer)
    trainer.train()
    assert len(seen) > 4 and max(seen) <= 40


def test_the_prompts_of_whole_groups_are_run_in_one_step(tmp_path, monkeypatch):
    monkeypatch.setitem(WORTH, "cpu", 0.0)
    prompts = {}
    for together in (False, True):
        trainer = tiny.trainer(tmp_path / str(together), whole_groups=together, method="dapo")
        begin, groups, ran = trainer._begin_step, [], []

        def watched(micro_batches, begin=begin, groups=groups):
            groups.extend(part["hapo_group"].unique().tolist() for part in micro_batches)
            begin(micro_batches)

        def look(module, args, kwargs, ran=ran):
            if torch.is_grad_enabled() and kwargs["cache"].get_seq_length() == 0:
                ran.append(len(kwargs["input_ids"]))

        trainer._begin_step = watched
        trainer.model.base_model.register_forward_pre_hook(look, with_kwargs=True)
        trainer.train()  # one rollout batch of eight prompts, in four steps
        assert {group for step in groups for group in step} == set(range(8))
        prompts[together] = sum(ran)
        assert (sum(map(len, groups)) == 8) == together
    assert prompts[True] <= 8 < prompts[False]  # groups of equal rewards are not run


def test_a_step_without_a_counted_row_runs_one_row(tmp_path):
    trainer = tiny.trainer(tmp_path, reward=lambda completions, **_: [1.0] * len(completions), max_steps=1)
    seen = sizes(trainer)
    trainer.train()  # all groups have equal rewards, and are dropped
    assert len(seen) == 1 and seen[0] <= 4 + 1


def passes_without_gradient(trainer) -> list[int]:
    """Rows of every scoring pass of the rollout policy."""
    rows: list[int] = []
    score = trainer.scorer.text

    def counted(model, sequences, *args):
        if not torch.is_grad_enabled():
            rows.append(len(sequences.ids))
        return score(model, sequences, *args)

    trainer.scorer.text = counted
    return rows


def test_the_draw_serves_as_the_score_of_the_rollout(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=12, temperature=0.7)
    rows = passes_without_gradient(trainer)
    worst = []

    def compare(rollout):
        with torch.no_grad():
            logp, entropy = Scorer.text(trainer.scorer, trainer.model, Sequences.of(rollout))
        worst.append((rollout["old_per_token_logps"] - logp).abs().max().item())
        worst.append((rollout["old_entropies"] - entropy).abs().max().item())
        return prepare(rollout)

    prepare, trainer._prepare = trainer._prepare, compare
    trainer.train()
    assert rows == [32, 32]  # the first two of three rollouts, as a check
    assert len(worst) == 6 and max(worst) < 2e-5


@pytest.mark.parametrize("why", ["dropout", "rounding"])
def test_what_scoring_would_not_repeat_is_scored(tmp_path, why, monkeypatch):
    if why == "rounding":
        monkeypatch.setattr("hapo.engines.trl.drawn.SAME", 0.0)
    net = tiny.model(attention_dropout=0.1) if why == "dropout" else None
    trainer = tiny.trainer(tmp_path, net, max_steps=8)
    rows = passes_without_gradient(trainer)
    trainer.train()
    assert rows == [32, 32]


def test_an_evaluation_runs_equal_prompts_once_and_lets_ended_rows_leave(tmp_path, monkeypatch):
    found = []
    for less in (True, False):
        if not less:
            monkeypatch.setattr("hapo.engines.trl.sampler.less_work", lambda model: nullcontext())
        trainer = tiny.trainer(tmp_path, max_completion_length=16, per_device_eval_batch_size=32)
        rows = []
        trainer.model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs, rows=rows: rows.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        torch.manual_seed(3)
        metrics = trainer.evaluate(tiny.data(8))
        found.append((metrics["eval_reward"], metrics["eval_completions/mean_length"], rows))
    (*ours, few), (*theirs, many) = found
    assert ours == theirs and 0 < ours[0] < 1
    assert len(few) == len(many) and (few[0], many[0]) == (8, 32)  # prompts
    assert few[15] < many[15] == 32  # the last token


def test_other_tokens_than_those_drawn_are_scored():
    numbers = torch.zeros(2, 3)
    tokens = torch.tensor([[4, 5, 6], [7, 1, 0]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    ids = torch.tensor([[4, 5, 6, 0], [7, 1, 9, 9]])
    draws = Draws(tokens, numbers, numbers - 1, numbers + 2)
    logp, entropy = as_drawn([draws], ids, mask)
    assert logp.tolist() == [[-1, -1, -1, 0], [-1, -1, 0, 0]] and entropy[0].tolist() == [2, 2, 2, 0]
    assert as_drawn([draws], ids + 1, mask) is None
    assert as_drawn([draws, None], ids, mask) is None  # a second turn


class Roundings(TorchDispatchMode):
    """How often each weight is rounded to bfloat16."""

    def __init__(self, weights) -> None:
        super().__init__()
        self.counts = {weight.data_ptr(): 0 for weight in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


def test_weights_are_rounded_once_a_generation_under_autocast(tmp_path):
    trainer = tiny.trainer(tmp_path, bf16=True, max_steps=1)
    projections = [p for name, p in trainer.model.named_parameters() if "proj" in name]
    counts, draw = [], trainer.sampler.draw

    def watched(asked):
        with Roundings(projections) as seen:
            turn = draw(asked)
        counts.append(list(seen.counts.values()))
        return turn

    trainer.sampler.draw = watched
    trainer.train()
    assert counts == [[1] * len(projections)]


def test_weights_are_rounded_once_where_a_rollout_is_scored_under_autocast(tmp_path):
    trainer = tiny.trainer(tmp_path, bf16=True, max_steps=1)  # scored in four parts
    projections = [p for name, p in trainer.model.named_parameters() if "proj" in name]
    counts, old = [], trainer.scorer.old

    def watched(*asked):
        with Roundings(projections) as seen:
            scored = old(*asked)
        counts.append(list(seen.counts.values()))
        return scored

    trainer.scorer.old = watched
    before = projections[0].detach().clone()
    trainer.train()
    assert counts == [[1] * len(projections)]
    assert not torch.equal(projections[0], before)  # what was rounded there is not what learns

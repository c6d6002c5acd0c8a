"""The study of bench/gatera_gsm8k.py: what is equal in all arms, its constant gate, its search, and going on."""

import math

import pytest
import torch

from bench.gatera_gsm8k import CONFIGS, TUNED_ON, Settings, Study, Texts, adapted, gates_of, tuned
from tests.engines import tiny


@pytest.fixture(scope="module")
def base():
    return tiny.model()


def texts(rows=40, length=6):
    drawn = torch.randint(2, 20, (rows, length), generator=torch.Generator().manual_seed(0))
    return Texts(train=drawn[:20], tune=drawn[20:30], held_out=drawn[30:])


def test_all_arms_begin_with_the_same_a_and_as_the_base_model(base):
    first = {}
    for arm in CONFIGS:
        model = adapted(base, arm, seed=3)
        found = [p.detach().clone() for name, p in model.named_parameters() if "_A." in name]
        assert len(found) == 10 and all(p.any() for p in found)
        for mine, theirs in zip(found, first.setdefault("A", found), strict=True):
            assert torch.equal(mine, theirs)
        with torch.no_grad():
            ids = texts().train[:2]
            torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits)
    other = [p for name, p in adapted(base, "LoRA", seed=4).named_parameters() if "_A." in name]
    assert not torch.equal(other[0], first["A"][0])


def test_the_constant_gate_is_trained_and_does_not_read_the_token(base, tmp_path):
    study = Study(tmp_path / "runs.jsonl", Settings("tiny", steps=3, rows=4, length=6), texts(), base)
    for arm in ("GateRA, constant gate", "GateRA without entropy"):
        study.run(arm, 1e-1, 0)
    constant, gated = study.runs.values()
    assert constant["over_tokens"] == 0 < gated["over_tokens"]
    assert constant["gate"] != 0.5
    start = gates_of(adapted(base, "GateRA, constant gate", 0), texts().train)
    assert start == {"gate": 0.5, "over_tokens": 0.0, "over_modules": 0.0, "entropy": round(math.log(2), 5)}


def test_a_study_goes_on_where_it_was_stopped(base, tmp_path, monkeypatch):
    file, settings = tmp_path / "runs.jsonl", Settings("tiny", steps=2, rows=4, length=6)
    first = Study(file, settings, texts(), base)
    found = first.run("LoRA", 1e-2, 0), first.run("GateRA", 1e-2, TUNED_ON)
    assert found[0] != found[1] and len(file.read_text().splitlines()) == 3
    monkeypatch.setattr("bench.gatera_gsm8k.train", None)
    again = Study(file, settings, texts(), base)
    assert (again.run("LoRA", 1e-2, 0), again.run("GateRA", 1e-2, TUNED_ON)) == found
    with pytest.raises(ValueError, match="has runs of .*'steps': 2.*, not of .*'steps': 9"):
        Study(file, Settings("tiny", steps=9, rows=4, length=6), texts(), base)


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (-2.5, [2e-3, 3e-3, 6e-3]),
        (-3.5, [2e-4, 3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 6e-3]),
        (-1.75, [2e-3, 3e-3, 6e-3, 1e-2, 2e-2, 3e-2]),
    ],
)
def test_rates_are_tried_until_the_best_is_at_no_end(best, tried):
    found = tuned(lambda rate: abs(math.log10(rate) - best), 3e-3)
    assert list(found) == pytest.approx(tried)
    assert min(found, key=found.get) not in (tried[0], tried[-1])

"""Requests that are added, removed and moved at random keep their own rule, in both runners."""

import random

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from hapo.samplers.vllm import AdaptiveTemperature

from .reference import BOUNDED, ZSCORE, tempered
from .runners import CPU, RunnerV1, RunnerV2, needs_v2

ROWS, VOCABULARY, UPDATES = 12, 24, 2000
RULES = [None, BOUNDED, ZSCORE]


def draw(rng: random.Random) -> SamplingParams:
    """A random request."""
    rule = rng.choice(RULES)
    args = None if rule is None else rule.to_args()
    return SamplingParams(temperature=rng.choice([0.0, 0.7, 1.0, 1.3]), extra_args=args)


def check(found, logits, params):
    """Each row against its request's own rule; rows without one against T_base alone, bit for bit."""
    rules = {frozenset(r.to_args().items()): r for r in RULES if r is not None}
    for row, p in enumerate(params):
        rule = rules[frozenset(p.extra_args.items())] if p.extra_args else None
        expected = tempered(logits[row : row + 1], rule, p.temperature)[0]
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)
        if rule is None or p.temperature == 0:
            assert torch.equal(found[row], logits[row] / (p.temperature or 1.0))


def test_runner_v1():
    """Through InputBatch and its BatchUpdateBuilder: removals, additions, condensation, swaps."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    runner, live, count = RunnerV1(ROWS, VOCABULARY), {}, 0
    for _ in range(UPDATES):
        remove = rng.sample(sorted(live), rng.randint(0, len(live)))
        if rng.random() < 0.5:
            remove = remove[:2]
        for name in remove:
            del live[name]
        add = {f"r{count + i}": draw(rng) for i in range(rng.randint(0, ROWS - len(live)))}
        count += len(add)
        live |= add
        swap = [tuple(rng.sample(range(len(live)), 2)) for _ in range(rng.randint(0, 3)) if len(live) > 1]
        rows = runner.step(remove, add, swap)
        assert sorted(rows) == sorted(live)
        if rows:
            logits = 3 * torch.randn(len(rows), VOCABULARY, generator=generator)
            check(runner.sample_from(logits.clone()), logits, [live[name] for name in rows])


@needs_v2
def test_runner_v2():
    """Slots are given again, rows reordered, and every third step is one of speculative decoding."""
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    runner, live = RunnerV2(ROWS, VOCABULARY), {}
    for update in range(UPDATES):
        for slot in rng.sample(sorted(live), rng.randint(0, len(live))):
            del live[slot]  # V2 says nothing of a request that ends; its slot is given again
        free = [slot for slot in range(ROWS) if slot not in live]
        for slot in rng.sample(free, rng.randint(0, len(free))):
            live[slot] = draw(rng)
            runner.add(slot, live[slot])
        if live:
            slots = rng.sample(sorted(live), rng.randint(1, len(live)))
            rows_each = [rng.randint(1, 4) for _ in slots] if update % 3 == 0 else None
            each = rows_each or [1] * len(slots)
            logits = 3 * torch.randn(sum(each), VOCABULARY, generator=generator)
            params = [live[slot] for slot, n in zip(slots, each, strict=True) for _ in range(n)]
            check(runner.sample_from(logits.clone(), slots, rows_each), logits, params)


@pytest.mark.parametrize(("direction", "rows"), [("UNIDIRECTIONAL", [1]), ("SWAP", [0, 1])])
def test_the_documented_order_is_removed_added_moved(direction, rows):
    """Row 0 is given again in the update that removes it, and is then moved onto row 1, or swapped with it."""
    processor = AdaptiveTemperature(object(), CPU)
    added = [(row, SamplingParams(extra_args=BOUNDED.to_args()), [1], []) for row in range(2)]
    processor.update_state(BatchUpdate(2, [0], added, [(0, 1, MoveDirectionality[direction])]))
    logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(0))
    after = processor.apply(logits.clone())
    assert [row for row in range(2) if not torch.equal(after[row], logits[row])] == rows

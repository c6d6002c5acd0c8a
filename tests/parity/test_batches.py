"""The random batches reach every branch of the functions that are compared on them."""

import pytest
import torch

import hapo
from hapo.parts.penalty import k3
from hapo.parts.ratio import sequence_ratio

from .compare import GROUPS, SEEDS, random_batch


@pytest.mark.parametrize("groups", GROUPS)
def test_branches(groups):
    """Each event occurs in most batches, and all of them in some batch."""
    seen = []
    for seed in SEEDS:
        batch = random_batch(seed, groups=groups)
        mask, ratio = batch.mask, (batch.logp - batch.old_logp).exp()
        response = sequence_ratio(batch.logp, batch.old_logp, mask)
        up, down = (
            sign * hapo.method("grpo", singleton="reward").prepare(batch).advantage > 0 for sign in (1, -1)
        )
        sizes = batch.group.bincount()
        events = {
            "a rise that is clipped, and one that is not": up & (ratio > 1.28),
            "a rise from below": up & (ratio < 0.8),
            "a fall that is clipped": down & (ratio < 0.8),
            "a fall from above, below the dual clip": down & (ratio > 1.28) & (ratio < 3),
            "beyond the dual clip at 3": down & (ratio > 3),
            "inside": mask & (ratio > 0.8) & (ratio < 1.2),
            "a response that is clipped above": up & (response > 1.2),
            "a response that is clipped below": down & (response < 0.8),
            "a response inside": mask & (response > 0.8) & (response < 1.2),
            "beyond the importance cap of 5": mask & (ratio > 5),
            "beyond the sampler cap of 2": mask & (batch.old_logp - batch.ref_logp > 0.7),
            "a response of one token": mask.sum(-1) == 1,
            "a hole": mask[:, 1:] & ~mask[:, :-1],
            "equal rewards": mask & ~up & ~down,
            "a group of one" if groups == "ragged" else "groups of four": sizes == min(GROUPS[groups]),
        }
        seen.append([bool(event.any()) for event in events.values()])
        assert mask.any(-1).all() and k3(batch.logp, batch.ref_logp)[mask].max() < 5
    seen = torch.tensor(seen)
    assert seen.all(-1).sum() >= 3
    assert (seen.float().mean(0) > 0.5).all(), dict(zip(events, seen.float().mean(0).tolist(), strict=True))

"""A score that remembers its calls, for the tests of attribution and for the process that one of them kills."""

import itertools
import math

import numpy as np

from hapo.tasks.attribution import Attribution

MASK, END = 0, 1
WORTH = np.random.default_rng(0).normal(size=100)
TIES = np.triu(np.random.default_rng(1).normal(size=(100, 100)), 1)


class Counted:
    """A score that remembers its calls: what tokens are worth, alone and with the one before."""

    def __init__(self, scale=1.0, without=None):
        self.calls = []
        self.scale = scale
        self.without = without

    def __call__(self, rows):
        self.calls.append([tuple(row) for row in rows])
        return [self.of(row) for row in rows]

    def of(self, row):
        if self.without is not None and self.without not in row:
            return math.nan
        worth = sum(WORTH[token] * (1 + 0.1 * place) for place, token in enumerate(row) if token != MASK)
        ties = sum(TIES[a, b] for a, b in itertools.pairwise(row) if MASK not in (a, b))
        return self.scale * float(np.tanh(0.3 * (worth + ties)))

    @property
    def rows(self):
        return [row for call in self.calls for row in call]


def attribution(score, **options):
    return Attribution(score, **{"mask_id": MASK, "special_ids": [END], **options})


def drawn(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [[2, 3]] * len(lengths), [rng.integers(2, 100, size=n).tolist() for n in lengths]

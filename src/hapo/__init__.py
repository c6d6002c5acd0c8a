"""Token-level policy optimisation of language models: HAPO and its siblings, exact and engine-free.

>>> import hapo
>>> method = hapo.method("hapo", eps_low=0.2, eps_high=0.28)
>>> batch = method.prepare(batch)   # once a rollout batch
>>> out = method.loss(batch)        # on the whole batch or any slice; out.loss.backward()
"""

from .batch import EntropyStats, StepTotals, TokenBatch
from .method import LossOutput, Method
from .methods import method, methods

__version__ = "0.1.0"

__all__ = [
    "EntropyStats",
    "LossOutput",
    "Method",
    "StepTotals",
    "TokenBatch",
    "__version__",
    "method",
    "methods",
]

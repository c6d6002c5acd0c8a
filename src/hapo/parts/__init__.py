"""Pure functions on tensors, one stage a file. No trainer, configuration object or global enters here."""

from . import (  # noqa: F401 - each is there after `import hapo`, as hapo.parts.NAME
    advantage,
    bounds,
    credit,
    elbo,
    entropy,
    groups,
    penalty,
    rank,
    ratio,
    reduce,
    select,
    shaping,
    soft_q,
    surrogate,
    temperature,
    turns,
)

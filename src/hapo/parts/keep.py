"""Which responses and tokens take part in an update."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from .advantage import equal_rewards


def mixed_groups(
    verdict: Float[Tensor, " B"], group: Int[Tensor, " B"], rows: Bool[Tensor, " B"]
) -> Bool[Tensor, " B"]:
    """Rows of groups whose verdicts differ (DAPO's dynamic sampling, arXiv 2503.14476, eq. 11).

    It acts on the verifier's verdict, not on the shaped reward: with a length penalty even an all-correct
    group has some spread. `rows` are the responses that count. A group of one is never kept.
    """
    return ~equal_rewards(verdict, group, rows) & rows

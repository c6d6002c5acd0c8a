"""Log-probs and entropies of the rollout policy, taken as it drew: scoring the rollout again gives the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...samplers.decoding import Draws

MOST_REPLAY_GAP = 0.1
"""Mean difference in nats that rounding may explain: bfloat16 stays well below, another policy does not."""

SAME = 1e-4
"""Mean difference in nats up to which both are the same numbers: float32 stays below 1e-5, TF32 and bfloat16 do
not."""


class DrawnScores:
    """What `generate` computed about the tokens of one rollout.

    Taken in the place of a scoring pass where both agree to float32 rounding: weights in float32, no autocast, no
    dropout, answers of one turn. In half precision the two passes round differently, and the ratio must compare
    like with like. The first rollout is scored in any case, which finds architectures whose logits hapo.scoring
    does not reproduce.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._turns: list[Draws | None] = []
        self._gap: float | None = None

    def begin(self) -> None:
        """A new rollout."""
        self._turns = []

    def add(self, draws: Draws | None) -> None:
        """What one turn of the rollout drew; None where generation does not tell."""
        self._turns.append(draws)

    def scores(
        self,
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        score: Callable[[], tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]],
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Log-probs and entropies of these response tokens under the rollout policy; `score` computes them.

        Raises:
            RuntimeError: generation and scoring disagree.
        """
        drawn = self._drawn(ids, mask)
        net = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if drawn is None or _drops_out(net):
            return score()
        whole = self.trainer.accelerator.mixed_precision == "no"
        whole = whole and all(p.dtype == torch.float32 for p in net.parameters())
        scored = None
        if self._gap is None:
            scored = score()
            self._gap = self._check(net, drawn[0], scored[0], mask)
        if whole and self._gap <= SAME:
            return drawn
        return score() if scored is None else scored

    def _drawn(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """As wide as the responses; None where other tokens were drawn."""
        draws = self._turns[0] if len(self._turns) == 1 else None
        if draws is None or len(draws.tokens) != len(ids):
            return None

        def fitted(x: Tensor) -> Tensor:
            x = torch.nn.functional.pad(x, (0, max(0, ids.shape[1] - x.shape[1])))[:, : ids.shape[1]]
            return x.masked_fill(~mask, 0)

        if not torch.equal(fitted(draws.tokens), ids.masked_fill(~mask, 0)):
            return None
        return fitted(draws.policy_logp), fitted(draws.entropy)

    def _check(self, net: torch.nn.Module, drawn: Tensor, scored: Tensor, mask: Tensor) -> float:
        """Mean difference of all ranks."""
        off = (drawn - scored).abs().masked_fill(~mask, 0).sum()
        off, tokens = self.trainer.accelerator.reduce(torch.stack([off, mask.sum()]), "sum").tolist()
        gap = off / max(tokens, 1)
        if gap > MOST_REPLAY_GAP:
            raise RuntimeError(
                f"generation and scoring disagree about the same policy by {gap:.3f} nats a token: the logits of "
                f"{type(net).__name__} are not what hapo.scoring computes "
                "from its hidden states; please report the architecture"
            )
        return gap


def _drops_out(model: torch.nn.Module) -> bool:
    """Whether two passes of the model in training mode differ by dropout."""
    modules = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return modules or getattr(config, "attention_dropout", 0.0) > 0

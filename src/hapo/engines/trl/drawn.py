"""Log-probs and entropies of the rollout policy, taken as it drew: scoring the rollout again gives the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...samplers.decoding import Draws

MOST_REPLAY_GAP = 0.1
"""Mean difference in nats that rounding may explain: bfloat16 stays well below, another policy does not."""

SAME = 1e-4
"""Mean difference in nats up to which both are the same numbers: float32 stays below 1e-5, TF32 and bfloat16 do
not."""


class DrawnScores:
    """Whether what `generate` computed about the tokens of a rollout stands for their scores.

    Taken in the place of a scoring pass where both agree to float32 rounding: weights in float32, no autocast, no
    dropout, answers of one turn. In half precision the two passes round differently, and the ratio must compare
    like with like. The first rollout is scored in any case, which finds architectures whose logits hapo.scoring
    does not reproduce.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._gap: float | None = None

    def scores(
        self,
        model: nn.Module,
        turns: Sequence[Draws | None],
        ids: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        score: Callable[[], tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]],
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Log-probs and entropies of these response tokens under the rollout policy, in nats; 0 where masked.

        Args:
            model: the policy.
            turns: what each turn of the rollout drew; None where generation does not tell.
            ids: the tokens.
            mask: those that count.
            score: computes the same in a scoring pass.

        Raises:
            RuntimeError: generation and scoring disagree.
        """
        drawn = as_drawn(turns, ids, mask)
        net = self.accelerator.unwrap_model(model)
        if drawn is None or _drops_out(net):
            return score()
        whole = self.accelerator.mixed_precision == "no"
        whole = whole and all(p.dtype == torch.float32 for p in net.parameters())
        scored = None
        if self._gap is None:
            scored = score()
            self._gap = self._check(net, drawn[0], scored[0], mask)
        if whole and self._gap <= SAME:
            return drawn
        return score() if scored is None else scored

    def _check(self, net: nn.Module, drawn: Tensor, scored: Tensor, mask: Tensor) -> float:
        """Mean difference of all ranks."""
        off = (drawn - scored).abs().masked_fill(~mask, 0).sum()
        off, tokens = self.accelerator.reduce(torch.stack([off, mask.sum()]), "sum").tolist()
        gap = off / max(tokens, 1)
        if gap > MOST_REPLAY_GAP:
            raise RuntimeError(
                f"generation and scoring disagree about the same policy by {gap:.3f} nats a token: the logits of "
                f"{type(net).__name__} are not what hapo.scoring computes "
                "from its hidden states; please report the architecture"
            )
        return gap


def as_drawn(
    turns: Sequence[Draws | None], ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]] | None:
    """The policy's log-probs and entropies of the draws, as wide as the responses; None where other tokens, or
    several turns, were drawn."""
    draws = turns[0] if len(turns) == 1 else None
    if draws is None or len(draws.tokens) != len(ids):
        return None

    def fitted(x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, max(0, ids.shape[1] - x.shape[1])))[:, : ids.shape[1]]
        return x.masked_fill(~mask, 0)

    if not torch.equal(fitted(draws.tokens), ids.masked_fill(~mask, 0)):
        return None
    return fitted(draws.policy_logp), fitted(draws.entropy)


def _drops_out(model: nn.Module) -> bool:
    """Whether two passes of the model in training mode differ by dropout."""
    modules = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return modules or getattr(config, "attention_dropout", 0.0) > 0

"""Log-probs and entropies of the rollout policy, taken as it drew: scoring the rollout again gives the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...samplers.decoding import Draws

MOST_REPLAY_GAP = 0.1
"""Mean difference in nats that rounding may explain in bfloat16, TF32 and 8 bits; another policy is beyond."""

MOST_EXACT_GAP = 1e-3
"""The same in float32, which stays below 1e-5."""

SAME = 1e-4
"""Mean difference in nats up to which both are the same numbers: float32 stays below 1e-5, TF32 and bfloat16 do
not."""


class DrawnScores:
    """Whether what `generate` computed about the tokens of a rollout stands for their scores.

    Taken in the place of a scoring pass where both agree to float32 rounding: weights in float32, no autocast, no
    dropout, answers of one turn. In half precision the two passes round differently, and the ratio must compare
    like with like. Rollouts 1, 2, 4, 8, ... are scored in any case and compared, which finds architectures whose
    logits hapo.scoring does not reproduce, and adapters that act in one of the two passes only: these begin as
    nothing, so that the first rollout cannot show it.

    Args:
        accelerator: whose precision decides.
        trusted: take what was drawn in any precision, unless it is beyond what rounding may explain
            (`score_rollouts=False`).
    """

    def __init__(self, accelerator: Accelerator, trusted: bool = False) -> None:
        self.accelerator, self.trusted = accelerator, trusted
        self._gap: float | None = None
        self._rollouts = 0

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
            ValueError: the model has dropout, and the draws are trusted.
        """
        net = self.accelerator.unwrap_model(model)
        if self.trusted and _drops_out(net):
            raise ValueError(
                f"score_rollouts=False, and this {type(net).__name__} has dropout, which vLLM does not: set it to "
                "0, or score the rollouts"
            )
        if self.trusted:
            turns = self._whole(turns)
        if not turns or turns[0] is None or _drops_out(net):  # alike on all ranks; the number of turns is not
            return score()
        drawn, scored = as_drawn(turns, ids, mask), None
        exact = self.accelerator.mixed_precision == "no" and torch.get_float32_matmul_precision() == "highest"
        exact = exact and all(p.dtype == torch.float32 for p in net.parameters())
        self._rollouts += 1
        if self._gap is None or self._rollouts & (self._rollouts - 1) == 0:
            scored = score()
            self._check(net, None if drawn is None else drawn[0], scored[0], mask, exact)
        if drawn is not None and self._gap is not None and (self.trusted or (exact and self._gap <= SAME)):
            return drawn
        return score() if scored is None else scored

    def _whole(self, turns: Sequence[Draws | None]) -> Sequence[Draws | None]:
        """None of them where a rank has not all: vLLM put a request off, and nobody knows its first tokens."""
        mine = torch.tensor(float(bool(turns) and turns[0] is not None), device=self.accelerator.device)
        if int(self.accelerator.reduce(mine, "sum")) == self.accelerator.num_processes:
            return turns
        return ()

    def _check(self, net: nn.Module, drawn: Tensor | None, scored: Tensor, mask: Tensor, exact: bool) -> None:
        """Keep the mean difference of all ranks, where any has a token to compare."""
        compared = mask if drawn is not None else torch.zeros_like(mask)
        off = scored.new_zeros(()) if drawn is None else (drawn - scored).abs().masked_fill(~mask, 0).sum()
        off, tokens = self.accelerator.reduce(torch.stack([off, compared.sum()]), "sum").tolist()
        if not tokens:
            return
        self._gap = gap = off / tokens
        most = MOST_EXACT_GAP if exact and not self.trusted else MOST_REPLAY_GAP
        if not gap <= most and self.trusted:
            raise RuntimeError(
                f"vLLM's log-probs are {gap:.2g} nats per token from the trainer's for the same tokens, where "
                f"rounding explains at most {most:g}: its weights are others, or its precision is lower. Set "
                "score_rollouts=True, and the importance weight corrects for the difference"
            )
        if not gap <= most:
            raise RuntimeError(
                f"generation and scoring disagree about the same policy by {gap:.2g} nats per token, where "
                f"rounding explains at most {most:g}: the logits of {type(net).__name__}, or of its adapter, are "
                "not what hapo.scoring computes from the hidden states. Please report the architecture; "
                "use_transformers_continuous_batching=True or use_vllm=True draws in another way, and the "
                "importance weight then corrects for the difference"
            )


def as_drawn(
    turns: Sequence[Draws | None], ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]] | None:
    """The policy's log-probs and entropies of the draws, as wide as the responses; None where other tokens, or
    several turns, were drawn."""
    draws = turns[0] if len(turns) == 1 else None
    if draws is None or len(draws.tokens) != len(ids):
        return None

    def fitted(x: Tensor) -> Tensor:
        x = nn.functional.pad(x.to(ids.device), (0, max(0, ids.shape[1] - x.shape[1])))[:, : ids.shape[1]]
        return x.masked_fill(~mask, 0)

    if not torch.equal(fitted(draws.tokens), ids.masked_fill(~mask, 0)):
        return None
    return fitted(draws.policy_logp), fitted(draws.entropy)


def _drops_out(model: nn.Module) -> bool:
    """Whether two passes of the model in training mode differ by dropout."""
    modules = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return modules or getattr(config, "attention_dropout", 0.0) > 0

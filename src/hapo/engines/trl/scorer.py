"""Log-probs and entropies of response tokens under the old policy, the current one, and the reference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...samplers.decoding import Draws, casts_kept
from ...scoring import Scores, score_tokens
from .drawn import DrawnScores
from .gates import GateLogits, recorded

MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""What TRL hands to the model beside text."""

TRLPass = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
"""TRL's `_get_per_token_logps_and_entropies`: log-probs, entropies, router loss."""


@dataclass(frozen=True)
class Sequences:
    """Prompts and responses as a model reads them, L = P + T columns."""

    ids: Int[Tensor, "B L"]
    attention: Int[Tensor, "B L"]
    mask: Bool[Tensor, "B T"]
    """Response tokens, the last columns, whose scores are needed; text is scored there alone, and 0 elsewhere."""
    images: dict[str, Any]
    """Images and tiles that belong to the rows, as TRL's pass takes them; empty for text."""
    support: Int[Tensor, "B T K"] | None = None
    """Tokens that log-probs are over, -1 for padding; None: the whole vocabulary."""

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `score_tokens` reads, but for the support."""
        return self.ids, self.attention, self.mask

    def split(self, size: int | None) -> Iterator[Sequences]:
        """So many rows at a time; None: all."""
        size = size or len(self.ids)
        for start in range(0, len(self.ids), size):
            part = slice(start, start + size)
            support = None if self.support is None else self.support[part]
            yield Sequences(self.ids[part], self.attention[part], self.mask[part], self.images, support)

    @classmethod
    def of(cls, inputs: dict[str, Any], mask: Bool[Tensor, "B T"] | None = None) -> Sequences:
        """Of a dict of TRL's; `mask`: all response tokens where it is None."""
        return cls(
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            inputs["completion_mask"].bool() if mask is None else mask,
            {name: inputs[name] for name in MULTIMODAL if inputs.get(name) is not None},
            inputs.get("support"),
        )


class Scored(NamedTuple):
    """What a policy says of the response tokens, at T_base, in nats."""

    logp: Float[Tensor, "B T"]
    """Differentiable, where gradients are on."""
    entropy: Float[Tensor, "B T"] | None
    """Differentiable likewise; None with the reference."""
    router_loss: Float[Tensor, ""] | None = None
    """Load balancing of a mixture of experts, where it was asked for: the mean over these rows."""
    gates: GateLogits | None = None
    """Of a model with a GateRA adapter."""


class Scorer:
    """Scores of response tokens: text by `hapo.scoring`, images and router losses by TRL's own pass.

    `HAPOTrainer.make_scorer` makes one; a subclass of both takes its place.

    Args:
        t_base: the base temperature.
        autocast: the context of a forward pass, `accelerator.autocast`.
        drawn: decides whether what generation computed is taken as the scores of the old policy.
        trl_pass: TRL's own pass.
    """

    def __init__(
        self,
        t_base: float,
        autocast: Callable[[], AbstractContextManager[Any]],
        drawn: DrawnScores,
        trl_pass: TRLPass,
    ) -> None:
        self.t_base = t_base
        self.autocast = autocast
        self.drawn = drawn
        self.trl_pass = trl_pass

    def sequences(self, inputs: dict[str, Any], mask: Bool[Tensor, "B T"]) -> Sequences:
        """What `current` is to be given of a dict of TRL's; `mask`: the response tokens whose scores are
        needed."""
        return Sequences.of(inputs, mask)

    @torch.no_grad()
    def old(
        self, model: nn.Module, rows: Sequences, batch_size: int | None, turns: Sequence[Draws | None] = ()
    ) -> Scored:
        """Of the policy that has just drawn these rows, detached, `batch_size` rows at a time.

        `turns` is what each turn of the rollout drew: taken as the scores where scoring would give the same. With
        images the rows are scored in any case.

        Raises:
            RuntimeError: generation and scoring disagree.
        """
        if rows.images:
            return self._trls(model, rows, batch_size)

        def score() -> tuple[Tensor, Tensor]:
            return self.text(model, rows, batch_size)

        return Scored(*self.drawn.scores(model, turns, rows.ids[:, -rows.mask.shape[1] :], rows.mask, score))

    @torch.no_grad()
    def reference(self, model: nn.Module, rows: Sequences, batch_size: int | None) -> Scored:
        """Log-probs of the reference policy, detached, `batch_size` rows at a time."""
        if rows.images:
            return self._trls(model, rows, batch_size, compute_entropy=False)  # TRL's head on it has none
        return Scored(self.text(model, rows, batch_size)[0], None)

    def current(self, model: nn.Module, rows: Sequences, router_loss: bool = False) -> Scored:
        """Of the policy as it is, in one pass, differentiable where gradients are on.

        Raises:
            ValueError: the model has gates, or log-probs are over a support, and images or a router loss need
                TRL's own pass.
        """
        with recorded(model) as gates:
            if rows.images or router_loss:
                if gates is not None:
                    raise ValueError(
                        "the gates of a GateRA adapter are read in text, and without router_aux_loss_coef: take "
                        "another adapter"
                    )
                return self._trls(model, rows, None, compute_aux_loss=router_loss)
            if gates is None:
                return Scored(*self.text(model, rows))
            with self.autocast():
                scores = score_tokens(
                    model, *rows.columns, t_base=self.t_base, support=rows.support, beside=gates.take
                )
        assert scores.beside is not None
        return Scored(
            scores.logp, scores.entropy, gates=GateLogits(scores.beside, gates.names, gates.check_gradient)
        )

    def targets(self, model: nn.Module, rows: Sequences, reads: Collection[str] = ()) -> Scores:
        """Of the targets of demonstrations, in one pass, differentiable; the ranks of `reads` with them."""
        ranks = ("rank" in reads, "expected_rank" in reads)
        with self.autocast():
            return score_tokens(model, *rows.columns, t_base=self.t_base, rank=ranks[0], expected_rank=ranks[1])

    def text(
        self, model: nn.Module, rows: Sequences, batch_size: int | None = None
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Log-probs and entropies of the response tokens, `batch_size` rows at a time."""
        parts = []
        with nullcontext() if torch.is_grad_enabled() else casts_kept():
            for part in rows.split(batch_size):
                with self.autocast():
                    parts.append(score_tokens(model, *part.columns, t_base=self.t_base, support=part.support))
        return torch.cat([p.logp for p in parts]), torch.cat([p.entropy for p in parts])

    def _trls(
        self, model: nn.Module, rows: Sequences, batch_size: int | None, compute_entropy: bool = True, **asked: Any
    ) -> Scored:
        if rows.support is not None:
            raise ValueError(
                "images and a router loss need TRL's own pass, which scores over the whole vocabulary: set "
                "sampling_support=False"
            )
        width = rows.mask.shape[1]
        asked |= {"batch_size": batch_size, "compute_entropy": compute_entropy, **rows.images}
        return Scored(*self.trl_pass(model, rows.ids, rows.attention, width, **asked))


def is_reference(model: nn.Module, net: nn.Module, ref_model: nn.Module | None) -> bool:
    """Whether `model`, as it is now, stands for the reference policy, not for the one that is trained.

    TRL's reference is `ref_model`, or, where an adapter is trained, the same model with it off or set to "ref".
    `net` is `model` without wrappers.

    Raises:
        ValueError: the adapter is of a kind that changes no layer, where one could not tell.
    """
    if model is ref_model:
        return True
    if not hasattr(net, "peft_config"):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in net.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        kinds = sorted(str(config.peft_type) for config in net.peft_config.values())  # type: ignore[operator]
        raise ValueError(f"beta > 0 with an adapter of the kind {', '.join(kinds)}: take LoRA, or set beta=0")
    return any(layer.disable_adapters or "ref" in layer.active_adapters for layer in layers)

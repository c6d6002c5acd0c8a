"""Draws and scores of masked-diffusion models: whole responses, and views of them with some of it hidden.

Shapes: B responses of L positions, P prompt columns, W views of a response, J uses of a rollout batch, K numbers
of noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...masked import masked_scores
from ...parts.elbo import Likelihood, contributions
from ...samplers.decoding import Draws
from ...samplers.diffusion import Decoded, Unmasking, decode
from .sampler import Request, Sampler, Turn
from .scorer import Scored, Scorer, Sequences

NOISE, OLD, REF, NOW = "hapo_noise", "hapo_uses_old", "hapo_uses_ref", "hapo_noise_now"
"""Keys in a dict of TRL's: the noise of each use of the rollout batch (B,J,K), log-probs under it of the old
policy and of the reference (B,J,L), and the noise of the use that is under way (B,K)."""

UNMASKED, CONFIDENCE = "hapo_unmasked", "hapo_confidence"
"""The same of a response's decoding (B,L): the forward pass that drew each token, from 0, and its probability
there; NaN where the response had ended before."""


@dataclass(frozen=True)
class MaskedSequences(Sequences):
    """Prompts and responses, and the noise that says what is hidden of each."""

    noise: Tensor | None = None
    """(B,K)."""


class DiffusionSampler(Sampler):
    """Masked-diffusion decoding (`hapo.samplers.diffusion`), the same in training and evaluation.

    Args:
        how: blocks, steps, order, temperature.
        mask_id, eos_ids, pad_id: of the tokenizer.
        shifted: the model says at k - 1 what stands at k.
        autocast: the context of a forward pass.
    """

    def __init__(
        self,
        how: Unmasking,
        *,
        mask_id: int,
        eos_ids: Sequence[int],
        pad_id: int,
        shifted: bool,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().__init__(None)
        self.how, self.mask_id, self.eos_ids, self.pad_id = how, mask_id, [*eos_ids], pad_id
        self.shifted, self.autocast = shifted, autocast
        self.drawn: Decoded | None = None
        """How the responses of the last turn came about."""

    def draw(self, asked: Request) -> Turn:
        """One turn: all L positions of every response; with which log-prob they were drawn is not known.

        Raises:
            ValueError: the prompts have images.
        """
        if asked.images is not None:
            raise ValueError("masked-diffusion decoding reads text alone: leave the images out")
        device = next(asked.net.parameters()).device
        width = max(map(len, asked.prompt_ids))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + [*p] for p in asked.prompt_ids], device=device)
        lengths = torch.tensor([len(p) for p in asked.prompt_ids], device=device)
        mask = (torch.arange(width, device=device) >= width - lengths.unsqueeze(1)).long()
        self.drawn = self.decoded(asked.net, ids, mask, self.how)
        return Turn(self.drawn.ids.tolist(), None)

    def decoded(self, net: Any, ids: Int[Tensor, "B P"], mask: Int[Tensor, "B P"], how: Unmasking) -> Decoded:
        """Responses to left-padded prompts, with the model in evaluation mode."""
        training = net.training
        net.eval()
        try:
            with self.autocast():
                return decode(
                    net, ids, mask, how, mask_id=self.mask_id, eos_ids=self.eos_ids, shifted=self.shifted
                )
        finally:
            net.train(training)


class DiffusionScorer(Scorer):
    """Scores of responses from views with some of them hidden, as the method's `likelihood` says.

    All policies that are compared see the same views: the noise is drawn once for each use of a rollout batch,
    from a generator of its own that is seeded for the rollout, over the rows of all ranks, and goes with the rows.

    Args:
        likelihood: of the method.
        t_base: the base temperature.
        autocast: the context of a forward pass.
        unwrap: a model -> the same without wrappers.
        mask_id: the token that hides others.
        shifted: the model says at k - 1 what stands at k.
        rank: this process, and how many there are.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        t_base: float,
        autocast: Callable[[], AbstractContextManager[Any]],
        unwrap: Callable[[nn.Module], nn.Module],
        *,
        mask_id: int,
        shifted: bool,
        rank: tuple[int, int],
    ) -> None:
        self.likelihood, self.t_base, self.autocast, self.unwrap = likelihood, t_base, autocast, unwrap
        self.mask_id, self.shifted, self.rank = mask_id, shifted, rank
        self.begin(0, 1)

    def begin(self, seed: int, uses: int) -> None:
        """A rollout begins that will be used so many times: its noise is drawn from this seed."""
        self._seed, self._uses = seed, uses
        self.noise: Tensor | None = None
        self.of_uses: dict[str, Tensor] = {}

    def sequences(self, inputs: dict[str, Any], mask: Bool[Tensor, "B T"]) -> MaskedSequences:
        """The rows with the noise of the use that is under way; in an evaluation there is one."""
        rows = Sequences.of(inputs, mask)
        noise = inputs[NOW] if NOW in inputs else inputs[NOISE][:, 0]
        return MaskedSequences(rows.ids, rows.attention, rows.mask, rows.images, noise=noise)

    @torch.no_grad()
    def old(
        self, model: nn.Module, rows: Sequences, batch_size: int | None, turns: Sequence[Draws | None] = ()
    ) -> Scored:
        """Of the policy that has just drawn these rows, under the noise of the first use; kept for the others."""
        return self._every_use(OLD, model, rows, batch_size)

    @torch.no_grad()
    def reference(self, model: nn.Module, rows: Sequences, batch_size: int | None) -> Scored:
        """Log-probs of the reference policy, likewise."""
        return self._every_use(REF, model, rows, batch_size)._replace(entropy=None)

    def current(self, model: nn.Module, rows: Sequences, router_loss: bool = False) -> Scored:
        """Of the policy as it is, all views in one pass, differentiable where gradients are on."""
        assert isinstance(rows, MaskedSequences) and rows.noise is not None
        return Scored(*self._views(model, rows, rows.noise))

    def _every_use(self, key: str, model: nn.Module, rows: Sequences, batch_size: int | None) -> Scored:
        if self.noise is None:
            self.noise = self._draw(*rows.mask.shape).to(rows.ids.device)
        size = batch_size or len(rows.ids)
        uses = []
        for use in range(self._uses):
            columns = (rows.ids, rows.attention, rows.mask, self.noise[:, use])
            parts = [
                self._views(model, Sequences(ids, attention, mask, {}), noise)
                for ids, attention, mask, noise in zip(*(x.split(size) for x in columns), strict=True)
            ]
            uses.append((torch.cat([logp for logp, _ in parts]), torch.cat([entropy for _, entropy in parts])))
        self.of_uses[key] = torch.stack([logp for logp, _ in uses], 1)
        return Scored(*uses[0])

    def _draw(self, rows: int, length: int) -> Tensor:
        """Noise (B,J,K) of this rank's rows: their share of what is drawn for those of all ranks."""
        rank, ranks = self.rank
        generator = torch.Generator().manual_seed(self._seed)
        uses = [self.likelihood.draw(rows * ranks, length, generator) for _ in range(self._uses)]
        return torch.stack(uses, 1)[rank * rows : (rank + 1) * rows]

    def _views(
        self, model: nn.Module, rows: Sequences, noise: Tensor
    ) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
        """Log-probs (contributions of each position) and mean entropies of the positions that were hidden."""
        length = rows.mask.shape[1]
        width = rows.ids.shape[1] - length
        prompt = rows.attention[:, :width].bool()
        hidden, weight = self.likelihood.views(noise, prompt, length)
        b, w, _ = hidden.shape
        wanted = (weight > 0) & rows.mask.unsqueeze(1)
        everywhere = torch.cat([wanted.new_zeros(b, w, width), wanted], 2)
        attention = torch.cat([prompt, prompt.new_ones(b, length)], 1).long()
        tokens, seen = (x.unsqueeze(1).expand_as(hidden).flatten(0, 1) for x in (rows.ids, attention))
        shown = tokens.masked_fill(hidden.flatten(0, 1), self.mask_id)
        with self.autocast():
            logp, entropy = masked_scores(
                model,
                self.unwrap(model),
                shown,
                seen,
                tokens,
                everywhere.flatten(0, 1),
                shifted=self.shifted,
                t_base=self.t_base,
            )
        logp, entropy = (x[:, width:].view(b, w, length) for x in (logp, entropy))
        return contributions(logp, weight * wanted), entropy.sum(1) / wanted.sum(1).clamp_min(1)

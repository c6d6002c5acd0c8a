"""Log-likelihoods of masked-diffusion language models: what is hidden, and what is made of the answers.

Such a model has no log-prob of a response as a product over tokens. It says log p(y_k | what is not hidden) at
hidden positions, and a likelihood is made of one or more views of a response, each with other positions hidden:
`Elbo`, a lower bound of log pi(y | prompt), or `MaskedPass`, one number a token from a single view.

Shapes: B responses, P prompt columns, L response positions, M draws, W views of a response, K numbers of noise.
Nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Views(NamedTuple):
    """What a model is shown of each response, and what its answers count."""

    hidden: Bool[Tensor, "B W C"]
    """Columns whose token is replaced by the mask token; C = P + L, the prompt first."""
    weight: Float[Tensor, "B W L"]
    """Factor on log p of the response's token in this view; 0 where it is not asked for."""


class Likelihood(ABC):
    """How the log-probs of a method are made of views of a response."""

    whole: ClassVar[bool]
    """All L positions belong to a response, also those after its end-of-sequence token."""

    @property
    @abstractmethod
    def per_response(self) -> int:
        """Views of a response, W."""

    @abstractmethod
    def draw(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """The noise (B, K) of so many responses; K does not depend on their prompts."""

    @abstractmethod
    def views(self, noise: Tensor, prompt_mask: Bool[Tensor, "B P"], length: int) -> Views:
        """What this noise hides; a function of each row alone."""


@dataclass(frozen=True)
class Elbo(Likelihood):
    """The discrete ELBO of a response by Monte Carlo, coupled or not (ESPO, arXiv 2512.03759).

        ELBO = E_l E_{m, |m| = l} [ (L / l) sum_{k in m} log p(y_k | y without m, prompt) ],   l uniform on 1..L

    Its estimate adds up the contributions of `contributions` over L. Unbiased: l is uniform on 0..L and the factor
    (L + 1) / l, so that draws with nothing hidden pay for it. Prompts are never hidden.

    Raises:
        ValueError: draws < 1.
    """

    draws: int = 2
    """M, independent draws of a mask."""
    coupled: bool = True
    """Each draw is looked at twice, with the mask and with its complement, and the two are averaged: every token
    of the response is scored in every draw."""
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the range."""
        if self.draws < 1:
            raise ValueError(f"draws must be >= 1, got {self.draws}")

    @property
    def per_response(self) -> int:
        """Views of a response."""
        return self.draws * (2 if self.coupled else 1)

    def draw(self, rows: int, length: int, generator: torch.Generator) -> Bool[Tensor, "B K"]:
        """M masks of each response as noise, K = M L, their sizes stratified over the rows."""
        return draw_masks(rows, length, self.draws, generator).flatten(1)

    def views(self, noise: Bool[Tensor, "B K"], prompt_mask: Bool[Tensor, "B P"], length: int) -> Views:
        """The views of these masks."""
        mask, weight = mask_views(noise.view(len(noise), self.draws, length), coupled=self.coupled)
        prompt = prompt_mask.new_zeros(prompt_mask.shape, dtype=torch.bool).unsqueeze(1)
        return Views(torch.cat([prompt.expand(-1, mask.shape[1], -1), mask], 2), weight)


@dataclass(frozen=True)
class MaskedPass(Likelihood):
    """One log-prob a token from a single view with the whole response hidden (diffu-GRPO, arXiv 2504.12216).

    A mean-field estimate: the product over tokens of log p(y_k | prompt alone). Tokens of the prompt are hidden
    with probability `prompt_rate`, anew for each use of a rollout, which regularises.

    Raises:
        ValueError: prompt_rate is not in [0, 1).
    """

    prompt_rate: float = 0.15
    """Share of the prompt that is hidden (paper)."""
    whole: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.prompt_rate < 1:
            raise ValueError(f"prompt_rate must be in [0, 1), got {self.prompt_rate}")

    @property
    def per_response(self) -> int:
        """One view."""
        return 1

    def draw(self, rows: int, length: int, generator: torch.Generator) -> Int[Tensor, "B K"]:
        """A seed of each row, K = 1: how many tokens its prompt has is not known here."""
        return torch.randint(2**62, (rows, 1), generator=generator)

    def views(self, noise: Int[Tensor, "B K"], prompt_mask: Bool[Tensor, "B P"], length: int) -> Views:
        """The view of each seed: its coins are tossed from the last prompt token backwards, so padding moves
        none."""
        rows, width = prompt_mask.shape
        coins = torch.empty(rows, width)
        for i, seed in enumerate(noise[:, 0].tolist()):
            coins[i] = torch.rand(width, generator=torch.Generator().manual_seed(seed))
        prompt = (coins.flip(1).to(prompt_mask.device) < self.prompt_rate) & prompt_mask.bool()
        response = prompt.new_ones(rows, length)
        return Views(torch.cat([prompt, response], 1).unsqueeze(1), response.unsqueeze(1).double())


def stratified_counts(start: int, rows: int, length: int) -> Int[Tensor, " B"]:
    """l_i = round(start + i (L + 1) / B) mod (L + 1): sizes of masks, in 0..L, spread evenly over B rows.

    With `start` uniform on 0..L every l_i is uniform, up to the rounding (half to even). The authors' scheme.
    """
    steps = start + torch.arange(rows, dtype=torch.float64) * (length + 1) / max(rows, 1)
    return steps.round().long() % (length + 1)


def draw_masks(rows: int, length: int, draws: int, generator: torch.Generator) -> Bool[Tensor, "B M L"]:
    """Masks of the responses, True where hidden: sizes stratified over the rows of each draw, subsets uniform.

    Drawn on the CPU from `generator` alone, whose state moves on; no global generator is touched.
    """
    masks = torch.empty(rows, draws, length, dtype=torch.bool)
    for j in range(draws):
        start = int(torch.randint(length + 1, (), generator=generator))
        order = torch.rand(rows, length, generator=generator, dtype=torch.float64).argsort(1).argsort(1)
        masks[:, j] = order < stratified_counts(start, rows, length).unsqueeze(1)
    return masks


def mask_views(
    masks: Bool[Tensor, "B M L"], *, coupled: bool = True
) -> tuple[Bool[Tensor, "B W L"], Float[Tensor, "B W L"]]:
    """What is hidden in each view, and the weight of each log-prob in the estimate of the ELBO.

    A view with l of L positions hidden has weight (L + 1) / (l W) there and 0 elsewhere, W views in all; one with
    nothing hidden has weight 0 everywhere. Coupled: W = 2 M, each mask followed by its complement; else W = M. The
    masks decide, not the tokens: a response that still holds mask tokens is scored there as anywhere else.
    """
    length = masks.shape[-1]
    hidden = torch.stack([masks, ~masks], 2).flatten(1, 2) if coupled else masks
    size = hidden.sum(-1, keepdim=True).clamp_min(1).double()
    return hidden, hidden * ((length + 1) / (size * hidden.shape[1]))


def contributions(logp: Float[Tensor, "B W L"], weight: Float[Tensor, "B W L"]) -> Float[Tensor, "B L"]:
    """sum over the views of weight times logp: a number per token, whose sum over L is the estimate of the ELBO.

    Differentiable in `logp`, and in its dtype. Where the weight is 0 it is not read.
    """
    return torch.where(weight > 0, logp * weight.to(logp.dtype), 0.0).sum(1)


def elbo(logp: Float[Tensor, "B W L"], weight: Float[Tensor, "B W L"]) -> Float[Tensor, " B"]:
    """The estimate itself, nats: `contributions` summed over the response."""
    return contributions(logp, weight).sum(-1)


def elbo_variance(logp: Float[Tensor, "B W L"], weight: Float[Tensor, "B W L"], draws: int) -> Float[Tensor, " B"]:
    """Estimated variance of `elbo`, nats squared: that of the M draws, divisor M - 1, over M.

    Raises:
        ValueError: one draw has no spread, or the views are not those of so many draws.
    """
    b, w, _ = logp.shape
    if draws < 2 or w % draws:
        raise ValueError(f"a variance needs at least 2 draws that make up the {w} views, got draws={draws}")
    of_view = torch.where(weight > 0, logp * weight.to(logp.dtype), 0.0).sum(-1)
    return (of_view.view(b, draws, w // draws).sum(-1) * draws).var(1) / draws

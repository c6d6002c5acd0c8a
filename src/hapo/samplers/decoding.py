"""One token after another, as transformers samples, with what a policy gradient needs of every draw.

It differs from transformers' own loop in what it computes, not in what it draws from: equal prompts are run once,
and rows that have ended leave the batch. `decode` draws a token with one random number in place of one for each
entry of the vocabulary, and records the draws; `decode_alike`, for measuring, takes transformers' random numbers.
Where the keys and values cannot move between rows (static, quantised or recurrent caches, images), every row is
kept; where a processor may know rows by their place (penalties), ended ones stay.

Shapes: B sequences, n rows still running, T new tokens, V vocabulary, K tokens of the largest support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from ..cache import cache_of, give_room, rows_can_move
from ..parts.entropy import entropy_and_normaliser
from ..prompts import distinct_rows

ROW_FIELDS = frozenset({"attention_mask", "position_ids"})
"""Tensors of a forward pass that have one row a sequence."""

STATELESS = (
    *(TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper),
    *(MaxLengthCriteria, EosTokenCriteria),
)
"""Processors and criteria that see each row alone; others may know rows by their place."""

MOST_SUPPORT = 1024
"""Most tokens of a support that are recorded: 4 KiB for each token of a rollout."""

ENDED = 1 / 8
"""Share of the rows in the batch that have ended before those that run move together."""


@dataclass(frozen=True)
class Draws:
    """What one generation drew; each tensor (B,T), zero after the end of a row."""

    tokens: Int[Tensor, "B T"]
    logp: Float[Tensor, "B T"]
    """Log-prob, nats, under the distribution that the token was drawn from."""
    policy_logp: Float[Tensor, "B T"]
    """Log-prob, nats, under softmax(logits / T_base): over the support where it is known, else over the full
    vocabulary."""
    entropy: Float[Tensor, "B T"]
    """Entropy, nats, of softmax(logits / T_base) over the full vocabulary."""
    support: Int[Tensor, "B T K"] | None = None
    """Tokens that the token was drawn from: what top-k, top-p, min-p and any other processor left, the likeliest
    first, -1 for padding and after the end of a row; None where it was not asked for."""


@contextmanager
def casts_kept() -> Iterator[None]:
    """Weights that autocast rounds inside this block are rounded once, not in every forward pass.

    Autocast keeps what it has rounded until its outermost block ends; accelerate opens one for each forward pass.
    This block is one more around them in which nothing is rounded by itself.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


@dataclass(frozen=True)
class RunningRows:
    """Which rows of a generation a forward pass was of."""

    size: int
    """B, the rows of the generation."""
    index: Int[Tensor, " n"]
    """Those of the pass, by their number among all."""
    alive: Bool[Tensor, " n"]
    """Those of the pass that have not ended."""

    def spread(self, x: Shaped[Tensor, "n *rest"], end: int) -> Shaped[Tensor, "B *rest"]:
        """What the rows that have not ended have in `x`, in their places among all; `end` elsewhere."""
        ended = ~self.alive.view(-1, *[1] * (x.ndim - 1))
        return x.new_full((self.size, *x.shape[1:]), end).index_copy(0, self.index, x.masked_fill(ended, end))

    def kept(self, index: Int[Tensor, " m"]) -> RunningRows:
        """These rows of the pass."""
        return RunningRows(self.size, self.index[index], self.alive[index])


Choose = Callable[[Tensor, Tensor, RunningRows], Tensor]
"""Token ids (n,L), logits (n,V) of the next token in float32 and which rows they are of -> next tokens (n,)."""


@torch.no_grad()
@casts_kept()
def decode(
    model: Any,
    input_ids: Int[Tensor, "B P"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    factor: Callable[[Tensor], Tensor] | None = None,
    support: bool = False,
    **model_kwargs: Any,
) -> tuple[Int[Tensor, "B L"], Draws]:
    """Prompts with their sampled answers, padded after the end, and the draws; with `support` those of the draws.

    T = T_base factor(H) with T_base the temperature of `generation_config` and H the entropy of softmax(logits /
    T_base); `logits_processor` holds the warper for T_base, and acts on logits / factor(H).

    Raises:
        RuntimeError: a support has more than `MOST_SUPPORT` tokens.
    """
    t_base = 1.0 if generation_config.temperature is None else generation_config.temperature
    steps: list[list[Tensor]] = []
    supports: list[Tensor] = []

    def choose(ids: Tensor, logits: Tensor, rows: RunningRows) -> Tensor:
        entropy, normaliser = entropy_and_normaliser(logits, t_base)
        scores = logits if factor is None else logits / factor(entropy).unsqueeze(-1)
        if factor is None and logits_processor:
            scores = logits.clone()  # a processor may write into it
        scores = logits_processor(ids, scores)
        tokens, logp = draw(scores)
        if support:
            members = support_of(scores)
            within = logits.gather(-1, members.clamp_min(0)).masked_fill(members < 0, -torch.inf)
            normaliser = (within / t_base).logsumexp(-1)
            supports.append(rows.spread(members, -1))
        policy_logp = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) / t_base - normaliser
        steps.append([rows.spread(x, 0) for x in (logp, policy_logp, entropy)])
        return tokens

    loop = logits_processor, stopping_criteria, generation_config
    ids = _generate(model, input_ids, choose, *loop, **model_kwargs)
    figures = (torch.stack(columns, 1) for columns in zip(*steps, strict=True))
    draws = Draws(ids[:, input_ids.shape[1] :], *figures, *([_stacked(supports)] if support else []))
    return ids, draws


@torch.no_grad()
@casts_kept()
def decode_alike(
    model: Any,
    input_ids: Int[Tensor, "B P"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Int[Tensor, "B L"]:
    """Prompts with their answers, greedy or sampled, as transformers' own loop draws them, with less work.

    Sampling takes the same random numbers, those of rows that have left included. In float32 the tokens are the
    same; in half precision fewer rows may round differently, and a token may change. Padded after any criterion
    that ends a row, where transformers asks for one with an end-of-sequence token.

    Raises:
        ValueError: beams are asked for.
    """
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(f"num_beams={generation_config.num_beams}: one token a row is drawn here; set it to 1")

    def choose(ids: Tensor, logits: Tensor, rows: RunningRows) -> Tensor:
        scores = logits_processor(ids, logits.clone() if logits_processor else logits)
        if not generation_config.do_sample:
            return scores.argmax(-1)
        probs = scores.softmax(-1)
        if len(probs) < rows.size:
            return torch.multinomial(rows.spread(probs, 1), 1).squeeze(1)[rows.index]
        return torch.multinomial(probs, 1).squeeze(1)

    loop = logits_processor, stopping_criteria, generation_config
    return _generate(model, input_ids, choose, *loop, **model_kwargs)


def _generate(
    model: Any,
    input_ids: Int[Tensor, "B P"],
    choose: Choose,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool | None = None,
    **model_kwargs: Any,
) -> Int[Tensor, "B L"]:
    """The loop: prompts with the tokens that are chosen, padded after the end of a row."""
    pad = 0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor)
    prompts = input_ids
    give_room(model_kwargs)
    tensors = {name: x for name, x in model_kwargs.items() if isinstance(x, Tensor)}
    plain = all(name in ROW_FIELDS and x.ndim == 2 for name, x in tensors.items())
    # Anything else may hold rows, as the features of images do: equal tokens are then no equal prompts.
    others = (x for name, x in model_kwargs.items() if name not in tensors and x is not cache_of(model_kwargs))
    plain = plain and all(x is None or isinstance(x, bool | int | float | str) for x in others)
    plain = plain and rows_can_move(cache_of(model_kwargs))
    may_leave = plain and all(type(f) in STATELESS for f in (*logits_processor, *stopping_criteria))
    synced = _synced(model) if synced_gpus is None else synced_gpus
    outputs = _prefill(model, input_ids, generation_config, model_kwargs, shared=plain)
    index = torch.arange(len(input_ids), device=input_ids.device)
    rows = RunningRows(len(index), index, torch.ones_like(index, dtype=torch.bool))
    running = rows.size
    columns: list[Tensor] = []
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        if running:
            logits = outputs.logits[:, -1].to(device=input_ids.device, dtype=torch.float32)
            del outputs
            tokens = torch.where(rows.alive, choose(input_ids, logits, rows), pad)
            columns.append(rows.spread(tokens, pad))
            input_ids = torch.cat([input_ids, tokens.unsqueeze(-1)], -1)
            rows = replace(rows, alive=rows.alive & ~stopping_criteria(input_ids, None))
            running = int(rows.alive.sum())
        if not model._has_unfinished_sequences(not running, synced, device=input_ids.device):
            return torch.cat([prompts, torch.stack(columns, -1)], -1)
        if may_leave and 0 < running <= (1 - ENDED) * len(rows.index):
            kept = rows.alive.nonzero().squeeze(-1)
            rows, input_ids = rows.kept(kept), input_ids[kept]
            model_kwargs |= {name: model_kwargs[name][kept] for name in tensors}
            cache_of(model_kwargs).batch_select_indices(kept)
        width = 1 if model_kwargs["use_cache"] else None
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=width, **model_kwargs)
        outputs = model(**inputs, return_dict=True)


def draw(scores: Float[Tensor, "n V"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """A token of softmax(scores) for each row, and its log-prob in nats, by one uniform number a row."""
    highest = scores.amax(-1, keepdim=True)
    cumulated = (scores - highest).exp_().cumsum_(-1)
    total = cumulated[:, -1:]
    # (0, total]: an entry of probability 0 adds nothing to the sum before it, so it is never the first to reach
    # it.
    target = total * (1.0 - torch.rand_like(total))
    tokens = torch.searchsorted(cumulated, target)
    return tokens.squeeze(-1), (scores.gather(-1, tokens) - highest - total.log()).squeeze(-1)


def support_of(scores: Float[Tensor, "n V"]) -> Int[Tensor, "n K"]:
    """The tokens that softmax(scores) can draw, the likeliest first, -1 for padding.

    Raises:
        RuntimeError: they are more than `MOST_SUPPORT` in a row.
    """
    size = int((scores > -torch.inf).sum(-1).amax())
    if size > MOST_SUPPORT:
        raise RuntimeError(
            f"{size} tokens are left to a draw, more than the {MOST_SUPPORT} that are recorded of it: set a top_k "
            f"of at most {MOST_SUPPORT}, or do not ask for the support (sampling_support=False)"
        )
    values, members = scores.topk(size)
    return members.masked_fill(values == -torch.inf, -1)


def _stacked(supports: list[Tensor]) -> Tensor:
    """(B, K_t) of each step as (B, T, K)."""
    most = max(x.shape[1] for x in supports)
    return torch.stack([torch.nn.functional.pad(x, (0, most - x.shape[1]), value=-1) for x in supports], 1)


def _prefill(model: Any, ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any], shared: bool) -> Any:
    """The forward pass over the prompts; `shared`: over each distinct one, its cache then repeated."""
    if shared:
        first, inverse = distinct_rows(ids, model_kwargs.get("attention_mask"))
    if not shared or len(first) == len(ids):
        return model._prefill(ids, config, model_kwargs)
    rows = {name: x[first] for name, x in model_kwargs.items() if isinstance(x, Tensor)}
    outputs = model._prefill(ids[first], config, {**model_kwargs, **rows})
    cache_of(model_kwargs).batch_select_indices(inverse)
    outputs.logits = outputs.logits[inverse]
    return outputs


def _synced(model: Any) -> bool:
    """Whether every rank has to make as many forward passes as the others."""
    split = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    return split and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1

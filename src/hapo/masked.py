"""Forward passes of masked-diffusion language models: answers at hidden positions, without all logits.

Shapes: B rows, C columns, V vocabulary, N positions that are asked for, D width.

Such a model sees a whole sequence in which some tokens are replaced by its mask token. What it says of the token
at position k stands at k (LLaDA), or at k - 1 (Dream, and others that began as autoregressive models).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .scoring import Scores, output_layer, score_states


def predicts_next(config: Any) -> bool:
    """Whether a model with this configuration says at k - 1 what stands at k.

    Those of the type Dream do, and those whose configuration has `predicts_next: true`.
    """
    return bool(getattr(config, "predicts_next", is_dream(config)))


def is_dream(config: Any) -> bool:
    """Whether this is the configuration of a Dream model, which is code of its own beside its weights."""
    return str(getattr(config, "model_type", "")).lower() == "dream"


def mask_token(config: Any, tokenizer: Any) -> int:
    """Id of the token that hides others: the tokenizer's mask token, or `mask_token_id` of the configuration.

    Raises:
        ValueError: there is none: the model is no masked-diffusion model.
    """
    found = getattr(tokenizer, "mask_token_id", None)
    found = getattr(config, "mask_token_id", None) if found is None else found
    if found is None:
        kind = getattr(config, "model_type", type(config).__name__)
        raise ValueError(
            f"a model of the type {kind!r} has no mask token, neither in its tokenizer nor as mask_token_id "
            "in its configuration, and the estimate of its likelihood hides tokens behind one. A diffusion model "
            "whose noise is random tokens (DiffusionGemma) cannot be trained with it; where the token has another "
            "name, set tokenizer.mask_token"
        )
    return int(found)


def masked_scores(
    model: nn.Module,
    net: Any,
    ids: Int[Tensor, "B C"],
    attention: Int[Tensor, "B C"],
    tokens: Int[Tensor, "B C"],
    wanted: Bool[Tensor, "B C"],
    *,
    shifted: bool,
    t_base: float = 1.0,
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """Log-prob and entropy, nats, of `tokens` where `wanted`, given `ids`; 0 elsewhere. Differentiable.

    Only the wanted positions meet the output layer, chunk by chunk (`hapo.scoring`), so memory does not grow with
    C x V.

    Args:
        model: the model, in its wrappers (DDP), which run with it.
        net: the same without them; a PEFT model may stay one.
        ids: what the model is shown.
        attention: 0 at padding.
        tokens: what is scored.
        wanted: where.
        shifted: the answer for position k stands at k - 1.
        t_base: the base temperature.

    Raises:
        ValueError: the logits are no plain linear map of what enters the output layer, or it is not run.
    """
    base = net.get_base_model() if hasattr(net, "get_base_model") else net
    asked = torch.cat([wanted[:, 1:], wanted.new_zeros(len(wanted), 1)], 1) if shifted else wanted
    found: list[Tensor] = []

    def take(states: Tensor) -> Tensor:
        found.append(states[asked.to(states.device)])
        return states[:, :0]

    with _before_output(base, take):
        model(**inputs_of(base, ids, attention))
    if not found:
        raise ValueError(f"the forward of {type(base).__name__} does not run its output layer")
    scores: Scores = score_states(base, found[0], tokens[wanted], t_base=t_base)

    def placed(values: Tensor) -> Tensor:
        return values.new_zeros(wanted.shape).masked_scatter(wanted.to(values.device), values).to(ids.device)

    return placed(scores.logp), placed(scores.entropy)


@torch.no_grad()
def masked_logits(
    net: Any, ids: Int[Tensor, "B C"], attention: Int[Tensor, "B C"], first: int, last: int, *, shifted: bool
) -> Float[Tensor, "B N V"]:
    """Logits for the tokens of the columns first <= k < last, float32; no other column meets the output layer.

    Raises:
        ValueError: as `masked_scores`; or shifted, and the first column has none before it.
    """
    base = net.get_base_model() if hasattr(net, "get_base_model") else net
    if first < shifted:
        raise ValueError("the model says at k - 1 what stands at k: a prompt needs at least one token")
    with _before_output(base, lambda states: states[:, first - shifted : last - shifted]):
        return net(**inputs_of(base, ids, attention)).logits.float()


def inputs_of(base: nn.Module, ids: Int[Tensor, "B C"], attention: Int[Tensor, "B C"]) -> dict[str, Any]:
    """What the forward of this model takes: positions are counted from the first token that is not padding.

    Dream hands the mask to torch's attention as it is, so it gets one that is broadcast over heads and queries.
    """
    known = inspect.signature(base.forward).parameters
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": attention}
    if is_dream(getattr(base, "config", None)):
        given["attention_mask"] = attention.bool()[:, None, None]
    if "position_ids" in known:
        given["position_ids"] = (attention.long().cumsum(1) - 1).clamp_min(0)
    if "use_cache" in known:
        given["use_cache"] = False
    return given


@contextmanager
def _before_output(base: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What enters the output layer goes through `change` first."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return change(args[0]), *args[1:]

    handle = output_layer(base).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()

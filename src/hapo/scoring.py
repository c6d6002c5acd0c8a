"""Scores of the taken tokens, from hidden states, without the (B, T, V) logits.

Shapes: B sequences, P prompt tokens, T response tokens, N positions, D width, V vocabulary.

The logits of `chunk` positions are made, reduced to three numbers a position, and overwritten by those of the
next chunk. `chunk x V` stays near a fixed number of elements (2**24 on CPU, 2**27 elsewhere, where few large
products pay), and no more than three such buffers live at once, so memory does not grow with N x V. The
backward pass makes the logits a second time instead of keeping them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .head import Factor, Head, Score, operand_dtype, rounds_operands


@dataclass(frozen=True)
class Scores:
    """What a policy says of the tokens that were taken; every field has the same shape."""

    logp: Float[Tensor, "*n"]
    """Log-probability, nats, under softmax(logits / t_base), over the support, where there is one. Differentiable.
    """
    entropy: Float[Tensor, "*n"]
    """Entropy, nats, of softmax(logits / t_base) over the whole vocabulary, support or not. Differentiable."""
    sampler_logp: Float[Tensor, "*n"] | None
    """Log-probability, nats, under softmax(logits / (t_base factor(entropy))), over the support likewise.
    Detached; None without a factor."""
    rank: Float[Tensor, "*n"] | None = None
    """Number of tokens that are at least as likely, itself included: 1 is the best, ties count against it.
    Detached; None unless it was asked for."""
    expected_rank: Float[Tensor, "*n"] | None = None
    """sum_i i P_(i), the rank of a token that the policy draws, P in decreasing order. Detached; None likewise."""
    beside: Float[Tensor, "*n M"] | None = None
    """What `score_tokens` was asked to keep of the positions that predict the tokens. Differentiable."""


def score_hidden(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    tokens: Int[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    t_base: float = 1.0,
    factor: Factor | None = None,
    support: Int[Tensor, "N K"] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    rank: bool = False,
    expected_rank: bool = False,
    chunk_tokens: int | None = None,
) -> Scores:
    """Log-prob, entropy and sampler log-prob of `tokens`, each of which `hidden` predicts; ranks on demand.

    With x = logit_scale (hidden weight^T + bias) and z = x / t_base, or z = softcap tanh(x / softcap) / t_base,

        log p = z - logsumexp(z),   H = -sum p log p,   sampler log p = log softmax(z / factor(H)),
        d log p_a / dz = onehot(a) - p,   dH / dz = -p (log p + H).

    Gradients of `logp` and `entropy` reach `hidden`, `weight` and `bias`, exactly; the entropy's work is left
    out where only `logp` gets a gradient, and nothing is kept where no gradient is needed. `sampler_logp` is
    detached, and `factor` sees entropies without a gradient, chunk by chunk.

    `support` holds the tokens S that top-k, top-p or min-p left for each draw, each once, and -1 for padding. Both
    log-probs are then over them alone, so that two of one position have the same normaliser:

        log p = z_a - logsumexp_{v in S} z_v,   d log p_a / dz = onehot(a) - p on S, 0 elsewhere.

    S is a constant. Entropies and ranks are those of the whole vocabulary all the same.

    `rank` compares the chunk's logits, as they are before a softmax rounds two of them to one number.
    `expected_rank` sorts their probabilities, some rows at a time: on a CPU as long as the product that makes the
    logits of a model 600 wide.

    A logit of -inf (a bias of -inf in a padded output layer) is a token of probability 0: it adds nothing to the
    entropy and gets no gradient.

    Sums and outputs are float32 (float64 if an input is), for bf16 and fp16 inputs too. CUDA takes half-precision
    operands, autocast's included, as they are; there the logits' gradient is rounded to that dtype, as in a linear
    layer, before the two products that end the backward pass. A CPU with AMX does so under autocast to bfloat16,
    with float32 sums; of a chunk of 16 positions or fewer the weight's gradient stays exact.

    On CUDA HAPO_TRITON=1 takes Triton kernels (`hapo.kernels`).

    Raises ValueError for t_base <= 0, chunk_tokens < 1, or a token that is not in its support.
    """
    if not t_base > 0:
        raise ValueError(f"t_base must be positive, got {t_base}")
    if chunk_tokens is None:
        budget = 2**24 if hidden.device.type == "cpu" else 2**27
        chunk_tokens = max(1, budget // weight.shape[0])
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if support is not None and not (there := (support == tokens[:, None]).any(-1)).all():
        at = int((~there).nonzero()[0])
        raise ValueError(
            f"token {int(tokens[at])} at position {at} is not in its support: it was not drawn from these tokens, "
            "and has no log-prob over them"
        )
    how = operand_dtype(hidden, weight), rounds_operands(hidden, weight)
    head = Head(logit_scale, softcap, t_base, chunk_tokens, *how)
    options = head, factor, rank, expected_rank
    return Scores(*Score.apply(hidden, weight, bias, tokens.long(), support, *options))


def attach_scoring(model: nn.Module) -> None:
    """Teach a transformers causal language model to answer `score_tokens`; a second call does nothing.

    The forward of the instance is wrapped, beneath any PEFT wrapper, so that scoring runs through the outermost
    `model(...)` and the hooks of DDP and FSDP with it. Any other call, `generate` included, is passed on as it
    came. Attach before wrapping in DDP or FSDP.

    An output layer of PEFT's `modules_to_save` is the copy that runs: the trained one, or the original where
    adapters are off. Raises ValueError where the logits are not a plain linear map of the hidden states: no output
    embedding, one that carries a PEFT adapter or is quantised, one that DeepSpeed ZeRO-3 has partitioned.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    output_layer(base)
    if getattr(base, "_scores_tokens", False):
        return
    bound = base.forward
    # Unbound, so that a deep copy of the model calls its own weights; accelerate's dispatch leaves no method.
    forward = getattr(bound, "__func__", lambda _, *args, **kwargs: bound(*args, **kwargs))

    @functools.wraps(type(base).forward)  # generate() checks its keywords against this signature
    def scoring_forward(self: Any, *args: Any, hapo_score: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if hapo_score is None:
            return forward(self, *args, **kwargs)
        return _score_forward(self, hapo_score, args, kwargs)

    base.forward = types.MethodType(scoring_forward, base)
    base._scores_tokens = True


def score_tokens(
    model: nn.Module,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Int[Tensor, "B L"],
    response_mask: Bool[Tensor, "B T"],
    *,
    t_base: float = 1.0,
    factor: Factor | None = None,
    support: Int[Tensor, "B T K"] | None = None,
    beside: Callable[[], Float[Tensor, "b l M"]] | None = None,
    rank: bool = False,
    expected_rank: bool = False,
    **model_kwargs: Any,
) -> Scores:
    """Scores (B, T) of the response tokens, the last T of the L = P + T columns; zeros where the mask is False.

    Only positions that predict a valid token meet the output layer, and of text only what they need is run: no
    rows or columns without any, and equal prompts once (`hapo.prompts`). Without any valid token the zeros are
    still connected to the model, so that backward and the collectives in it run. `model_kwargs` go to the model
    as they are, and with them the whole batch. Positions are counted from the first token that is not padding.
    `support` is that of `score_hidden`; what it holds where the mask is False is not read.

    `beside` is called after each run of the layers, and gives M values of each position that was run, such as the
    logits of gates (`hapo.adapters.Gates.take`); `Scores.beside` has those of the positions that predict the
    tokens.

    Raises ValueError without a prompt column (nothing predicts the first token), without `attach_scoring`, or for
    a token that is not in its support.
    """
    length, responses = input_ids.shape[1], response_mask.shape[1]
    if length <= responses:
        raise ValueError(
            f"input_ids has {length} columns and response_mask {responses}: the first response token needs at "
            "least one prompt token before it"
        )
    request = {
        "tokens": input_ids[:, length - responses :],
        "mask": response_mask,
        "t_base": t_base,
        "factor": factor,
        "support": support,
        "beside": beside,
        "rank": rank,
        "expected_rank": expected_rank,
    }
    output = model(input_ids=input_ids, attention_mask=attention_mask, hapo_score=request, **model_kwargs)
    if not isinstance(output, dict) or "sampler_logp" not in output:
        raise ValueError(f"{type(model).__name__} does not score tokens: call attach_scoring(model) first")
    return Scores(**output)


def _score_forward(
    model: Any, request: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor | None]:
    from .prompts import response_states  # transformers, which comes with the model: not needed before

    # A dict, not Scores: FSDP finds the tensors of an output by its pytree and hooks their gradients.
    tokens, mask, beside = request["tokens"], request["mask"], request.get("beside")
    config = model.config
    if not args and set(kwargs) == {"input_ids", "attention_mask"} and config.get_text_config() is config:
        states, *more = response_states(model, **kwargs, response_mask=mask, beside=beside)
    else:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("labels", "logits_to_keep")} | {"use_cache": False}
        hidden = model.base_model(*args, **kwargs).last_hidden_state
        found = [hidden] if beside is None else [hidden, beside()]
        states, *more = (x[:, x.shape[1] - mask.shape[1] - 1 : -1][mask.to(x.device)] for x in found)
    options: dict[str, Any] = {
        name: request[name] for name in ("t_base", "factor", "rank", "expected_rank") if name in request
    }
    if request.get("support") is not None:
        options["support"] = request["support"][mask].to(states.device)
    scores = score_states(model, states, tokens[mask], **options)

    def scatter(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        whole, at = values.new_zeros(mask.shape + values.shape[1:]), mask.to(values.device)
        return whole.masked_scatter(at.view(*mask.shape, *[1] * (values.ndim - 1)), values).to(mask.device)

    scores = replace(scores, beside=more[0] if more else None)
    return {name: scatter(values) for name, values in vars(scores).items()}


def score_states(model: Any, states: Float[Tensor, "N D"], tokens: Int[Tensor, " N"], **options: Any) -> Scores:
    """`score_hidden` of what enters the output layer of a transformers model, with its weight, scale and soft cap.

    Raises ValueError as `attach_scoring` does.
    """
    layer = output_layer(model)
    weight, bias = _whole(layer.weight), _whole(layer.bias)
    scale, softcap = logit_transform(model.config.get_text_config())
    given = states.to(weight.device), weight, tokens.to(weight.device)
    return score_hidden(*given, bias=bias, logit_scale=scale, softcap=softcap, **options)


def output_layer(model: Any) -> nn.Linear:
    """The plain linear layer that makes the logits; `attach_scoring` says what is refused."""
    get = getattr(model, "get_output_embeddings", None)
    layer = _running(get() if get is not None else None)
    if layer is None:
        raise ValueError(f"{type(model).__name__} has no output embedding to score tokens with")
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        raise ValueError(
            f"the output embedding of {type(model).__name__} is a {type(layer).__name__}, not a plain linear "
            "layer: leave it out of target_modules of PEFT (modules_to_save trains it whole), and do not "
            "quantise it"
        )
    if layer.weight.numel() == 0:
        raise ValueError(
            "the output embedding is empty, as DeepSpeed ZeRO-3 leaves a partitioned weight: use ZeRO-2 or FSDP"
        )
    return layer


def _running(layer: Any) -> Any:
    """The layer that PEFT's `modules_to_save` runs in the place of this one, as its forward chooses, or itself."""
    copies = getattr(layer, "modules_to_save", None)
    if copies is None:
        return layer
    if layer.disable_adapters or not layer.active_adapters:
        return layer.original_module
    return copies[layer.active_adapters[0]]


def _whole(parameter: Any) -> Any:
    """The full tensor of a parameter that FSDP2 or tensor parallelism left sharded; any other as it is.

    Its gradient is averaged over the ranks, which is FSDP's rule for different data and changes nothing for equal.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def logit_transform(config: Any) -> tuple[float, float | None]:
    """Scale and soft cap between output layer and logits, by the names that transformers' models give them."""
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        if (scale := getattr(config, name, None)) is not None:
            return float(scale), softcap
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0, softcap
    return (scaling if config.model_type == "hyperclovax" else 1.0 / scaling), softcap  # Granite, MiniCPM3 divide

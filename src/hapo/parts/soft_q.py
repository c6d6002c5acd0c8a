"""Soft Q-learning token by token: values, Bellman targets, critic loss and policy loss (ETPO, arXiv 2402.06700).

A turn is a text, and each of its tokens a decision. The critic says a value q for every token of the vocabulary:

    KL(s)  = sum_v P(v|s) (log P(v|s) - log rho(v|s))
    V(s)   = sum_v P(v|s) q(s,v) - beta KL(s)
    y[s,j] = V[s,j+1]                        inside a turn: no reward, no discount
    y[s,j] = r_s + gamma c_s V[s+1,0]        at its last token; c_s is 0 where the turn ended the episode

P is the policy that took the tokens, rho the frozen initial model, q in the targets a slow copy of the critic.
Logits go through log-softmax. What is given as a target, a value or a mask is a constant here.

The paper's numbered equations could not be read: targets and critic loss are those of the authors' code, its KL
index set right and its Huber loss made symmetric; the policy loss is derived from the objective that the abstract
states.

A log-probability below `LOWEST` nats counts as `LOWEST`, so that a token which rho rules out costs beta (log P +
100) and not infinity. A token that the policy rules out (logit -inf) adds nothing, whatever q says of it.

Shapes: S turns, Z = S + 1 slots, of which slot S is the state after the last turn; L tokens; V vocabulary; ...
axes in front (batch, agents). Float32 inside; float64 stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..batch import working_dtype

LOWEST = -100.0
"""Floor of a log-probability, nats: exp of it is the smallest that float32 tells from 0."""

PolicyTarget = Literal["kl_ref", "entropy", "released"]
"""What the policy is moved towards; see `policy_terms`."""


class SoftTargets(NamedTuple):
    """Constants of an update."""

    target: Float[Tensor, "... S L"]
    """y; 0 at masked positions."""
    value: Float[Tensor, "... Z L"]
    """V of each state."""
    kl: Float[Tensor, "... Z L"]
    """KL(P || rho) of each state, nats."""


def soft_value(
    q: Float[Tensor, "*n V"], logits: Float[Tensor, "*n V"], ref_logits: Float[Tensor, "*n V"], beta: float
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """V = E_P q - beta KL(P || rho) and the KL, nats; without a gradient.

    With P = pi* of `soft_optimum` this is beta log sum_v rho exp(q / beta). `beta` = 0 is expected SARSA.

    Raises:
        ValueError: beta < 0.
    """
    _check(beta=beta)
    with torch.no_grad():
        logp, p = _log_softmax(logits), _softmax(logits)
        kl = (p * (logp - _log_softmax(ref_logits))).sum(-1)
        return (p * _valued(q, logits)).sum(-1) - beta * kl, kl


def bellman_targets(
    value: Float[Tensor, "... Z L"],
    reward: Float[Tensor, "... S"],
    goes_on: Bool[Tensor, "... S"],
    mask: Bool[Tensor, "... S L"],
    gamma: float,
) -> Float[Tensor, "... S L"]:
    """The targets y of the module's first lines; 0 at masked positions. Constants.

    A turn of one token has the second line alone. An empty turn (no position of its mask is True) has no target
    and its reward reaches none; the turn before it bootstraps from the state that the empty one was taken in. A
    truncated episode goes on (c = 1): its last turn bootstraps from slot S. What stands in `value` where it is not
    read, and in slot S after a terminal turn, is without effect.

    Args:
        value: V of the states; [s, j] is the state in which token j of turn s is taken.
        reward: of each turn.
        goes_on: c, False where the turn ended the episode.
        mask: valid tokens; those of a turn stand at its beginning.
        gamma: between turns.

    Raises:
        ValueError: shapes that do not fit, a mask with a gap, or gamma outside [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be between 0 and 1, got {gamma}")
    *front, turns, length = mask.shape
    if value.shape != (*front, turns + 1, length) or not reward.shape == goes_on.shape == mask.shape[:-1]:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} (... S L), so value must be (... S+1 L), reward and goes_on "
            f"(... S); got {tuple(value.shape)}, {tuple(reward.shape)}, {tuple(goes_on.shape)}"
        )
    if (mask[..., 1:] & ~mask[..., :-1]).any():
        raise ValueError("mask must have the valid tokens of a turn at its beginning, without a gap")
    value, reward = (x.detach().to(working_dtype(x)) for x in (value, reward))
    following = torch.nn.functional.pad(value[..., :-1, 1:], (0, 1))
    after = torch.where(goes_on, value[..., 1:, 0], 0.0)
    last = mask & ~torch.nn.functional.pad(mask[..., 1:], (0, 1))
    target = torch.where(last, (reward + gamma * after)[..., None], following)
    return torch.where(mask, target, 0.0)


def lambda_targets(
    value: Float[Tensor, "... Z L"],
    kl: Float[Tensor, "... Z L"],
    reward: Float[Tensor, "... S"],
    goes_on: Bool[Tensor, "... S"],
    mask: Bool[Tensor, "... S L"],
    *,
    beta: float,
    gamma: float,
    lam: float,
) -> Float[Tensor, "... S L"]:
    """Soft TD(lambda): `bellman_targets`, with a state's value mixed with what the trajectory got from there on.

        V[s,j]  is replaced by  (1 - lam) V[s,j] + lam (y[s,j] - beta KL[s,j])      where a token was taken

    `lam` = 0 is `bellman_targets`, the paper's; `lam` = 1 the soft return of the trajectory, up to slot S. It is
    ours: one-step targets carry a reward one token further with each update of the target critic. For tokens that
    were drawn from P it has the same expectation; sampling at another temperature or top-k biases it.

    Args:
        value, reward, goes_on, mask, gamma: as in `bellman_targets`.
        kl: KL(P || rho) of the states.
        beta: weight of the KL.
        lam: share of the trajectory.

    Raises:
        ValueError: lam outside [0, 1], and as `bellman_targets` does.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be between 0 and 1, got {lam}")
    target = bellman_targets(value, reward, goes_on, mask, gamma)
    if lam == 0:
        return target
    value, kl, reward = (x.detach().to(working_dtype(x)) for x in (value, kl, reward))
    *_, turns, length = mask.shape
    first = value[..., turns, 0]  # what the first state of the turn after is worth
    for s in reversed(range(turns)):
        after = torch.where(goes_on[..., s], first, 0.0)
        following = reward[..., s] + gamma * after
        for j in reversed(range(length)):
            there = mask[..., s, j]
            target[..., s, j] = torch.where(there, following, 0.0)
            mixed = (1 - lam) * value[..., s, j] + lam * (target[..., s, j] - beta * kl[..., s, j])
            following = torch.where(there, mixed, following)
        first = torch.where(mask[..., s, 0], following, value[..., s, 0])
    return target


def soft_q_targets(
    q: Float[Tensor, "... Z L V"],
    logits: Float[Tensor, "... Z L V"],
    ref_logits: Float[Tensor, "... Z L V"],
    reward: Float[Tensor, "... S"],
    goes_on: Bool[Tensor, "... S"],
    mask: Bool[Tensor, "... S L"],
    *,
    beta: float = 0.01,
    gamma: float = 0.99,
    chunk: int | None = None,
) -> SoftTargets:
    """Values of all states, and the targets: `soft_value` in pieces of `chunk` positions, then `bellman_targets`.

    `q` is the target critic's. See the two functions for the other arguments and what is raised.
    """
    value, kl = in_chunks(partial(soft_value, beta=beta), [q, logits, ref_logits], chunk)
    return SoftTargets(bellman_targets(value, reward, goes_on, mask, gamma), value, kl)


def huber(error: Float[Tensor, "*n"], delta: float) -> Float[Tensor, "*n"]:
    """error^2 / 2 up to |error| = delta, then delta (|error| - delta / 2): symmetric, gradient clip(error)."""
    if not delta > 0:
        raise ValueError(f"delta must be positive, got {delta}")
    size = error.abs()
    return torch.where(size <= delta, error.square() / 2, delta * (size - delta / 2))


def critic_loss(
    q: Float[Tensor, "*n L V"],
    actions: Int[Tensor, "*n L"],
    target: Float[Tensor, "*n L"],
    mask: Bool[Tensor, "*n L"],
    *,
    delta: float = 10.0,
    count: int | Tensor | None = None,
) -> Float[Tensor, ""]:
    """sum mask huber(y - q[a]) / N, with N the valid tokens.

    The gradient reaches the taken tokens' q alone, as -clip(y - q, -delta, delta) / N; `target` is a constant.

    Args:
        q: of the critic that learns.
        actions: taken tokens; any number where masked.
        target: y of `bellman_targets`.
        delta: where the loss becomes linear.
        count: N, where this is a slice of a step; the slice's own where None. No token: the loss is 0.
    """
    taken = q.gather(-1, actions.masked_fill(~mask, 0).long().unsqueeze(-1)).squeeze(-1)
    taken, target = (torch.where(mask, x.to(working_dtype(x)), 0.0) for x in (taken, target.detach()))
    return _mean(huber(target - taken, delta), mask, count)


def policy_terms(
    logits: Float[Tensor, "*n V"],
    q: Float[Tensor, "*n V"],
    ref_logits: Float[Tensor, "*n V"],
    *,
    beta: float,
    target: str = "kl_ref",
) -> Float[Tensor, "*n"]:
    """The policy loss of each position; the gradient flows through `logits` alone.

        kl_ref    E_{v~P} [beta (log P - log rho) - q]    = beta KL(P || pi*) + a constant, least at pi*
        entropy   E_{v~P} [beta log P - q]                as kl_ref with a uniform rho
        released  mean_v [beta log P - q]                 the authors' code, whose gradient does not depend on q

    With f the bracket, d/dz_k = P_k (f_k - E_P f), and of the released one beta (1/V - P_k).

    Raises:
        ValueError: beta < 0, or another target.
    """
    _check(beta=beta, target=target)
    logp = _log_softmax(logits)
    inner = beta * logp - _valued(q.detach(), logits)
    if target == "released":
        return inner.mean(-1)
    if target == "kl_ref":
        inner = inner - beta * _log_softmax(ref_logits.detach())
    return (_softmax(logits) * inner).sum(-1)


def policy_loss(
    logits: Float[Tensor, "*n L V"],
    q: Float[Tensor, "*n L V"],
    ref_logits: Float[Tensor, "*n L V"],
    mask: Bool[Tensor, "*n L"],
    *,
    beta: float = 0.01,
    target: str = "kl_ref",
    count: int | Tensor | None = None,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """sum mask l / N with l of `policy_terms`, exactly over the vocabulary, in pieces of `chunk` positions.

    Args:
        logits: of the policy that learns.
        q: of the critic that learns, a constant here.
        ref_logits: of rho.
        mask: valid tokens.
        beta: weight of the KL, in units of reward per nat.
        target: one of `PolicyTarget`, what the policy is moved towards.
        count: N, where this is a slice of a step; the slice's own where None. No token: the loss is 0.
        chunk: positions at a time; `chunk_size` of the vocabulary where None.
    """
    there = mask.unsqueeze(-1)

    def terms(valid: Tensor, *rows: Tensor) -> tuple[Tensor]:
        return (policy_terms(*(torch.where(valid, x, 0.0) for x in rows), beta=beta, target=target),)

    (loss,) = in_chunks(terms, [there, logits, q.detach(), ref_logits.detach()], chunk)
    return _mean(loss, mask, count)


def soft_optimum(
    q: Float[Tensor, "*n V"], ref_logits: Float[Tensor, "*n V"], beta: float
) -> tuple[Float[Tensor, "*n V"], Float[Tensor, "*n"]]:
    """log pi* with pi* = rho exp(q / beta) / Z, and its value V* = beta log Z; without a gradient.

    Raises:
        ValueError: beta is not positive: the greedy policy of beta = 0 has no log-probabilities.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}: the optimum of beta = 0 is the greedy policy")
    with torch.no_grad():
        z = _log_softmax(ref_logits) + q.to(working_dtype(q)) / beta
        return z.log_softmax(-1), beta * z.logsumexp(-1)


def chunk_size(vocabulary: int, device: torch.device) -> int:
    """Positions at a time: 2**22 numbers on a CPU, 2**25 elsewhere."""
    return max(1, (2**22 if device.type == "cpu" else 2**25) // vocabulary)


def in_chunks(
    part: Callable[..., tuple[Tensor, ...]], rows: Sequence[Tensor], size: int | None = None
) -> tuple[Tensor, ...]:
    """What `part` makes of the rows, `size` positions at a time: numbers per position, in the rows' leading shape.

    What a piece makes on its way is dropped and made anew in the backward pass, so that memory holds the tensors
    of one piece beside the rows. `part` may take hidden states and make logits of them.

    Args:
        part: (rows of n positions, ...) -> tensors (n,).
        rows: tensors (..., width) with the same leading axes; integers and masks may be among them.
        size: positions at a time; `chunk_size` of the last row's width where None.

    Raises:
        ValueError: size < 1.
    """
    front = rows[-1].shape[:-1]
    size = chunk_size(rows[-1].shape[-1], rows[-1].device) if size is None else size
    if size < 1:
        raise ValueError(f"chunk must be at least 1, got {size}")
    pieces = zip(*(x.reshape(-1, x.shape[-1]).split(size) for x in rows), strict=True)
    if torch.is_grad_enabled():
        made = [checkpoint(part, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    else:
        made = [part(*piece) for piece in pieces]
    return tuple(torch.cat(of).reshape(front) for of in zip(*made, strict=True))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(working_dtype(logits)).log_softmax(-1).clamp(min=LOWEST)


def _softmax(logits: Tensor) -> Tensor:
    return logits.to(working_dtype(logits)).softmax(-1)


def _valued(q: Tensor, logits: Tensor) -> Tensor:
    """q, and 0 for tokens that the policy rules out."""
    return q.to(working_dtype(q)).masked_fill(logits.detach() == -torch.inf, 0.0)


def _mean(loss: Tensor, mask: Tensor, count: int | Tensor | None) -> Tensor:
    n = mask.sum() if count is None else torch.as_tensor(count)
    return torch.where(mask, loss, 0.0).sum() / n.clamp(min=1)


def _check(*, beta: float, target: str = "kl_ref") -> None:
    if not beta >= 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    if target not in get_args(PolicyTarget):
        raise ValueError(f"target must be one of {', '.join(get_args(PolicyTarget))}, got {target!r}")

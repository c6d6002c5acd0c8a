"""Between TRL's packed rows, flat lists of loss terms, and the responses (B,T) that a method reads.

Shapes: R packed rows of a rank's micro-batch, one a pass; M loss terms; B responses, T their trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from ....batch import TokenBatch
from ....method import Method
from ....stage import MissingFieldError
from ..gather import TensorDict, concat_rows, gather_rows
from ..scorer import Scored

Inputs = dict[str, Any]


class Terms(NamedTuple):
    """The loss terms of one packed row."""

    place: Int[Tensor, " M"]
    """In the row, of what predicts the token."""
    response: Int[Tensor, " M"]
    column: Int[Tensor, " M"]

    @classmethod
    def of(cls, inputs: Inputs, row: int) -> Terms:
        """Those of a row of a micro-batch."""
        there = inputs["token_index"][row] >= 0
        return cls(*(inputs[name][row][there] for name in ("token_index", "response", "column")))

    def spread(self, values: Tensor, shape: tuple[int, int]) -> Tensor:
        """Values (M,) at their places in responses (B,T), differentiably; 0 elsewhere."""
        return values.new_zeros(shape).index_put((self.response, self.column), values)


def model_inputs(inputs: Inputs, row: int) -> dict[str, Any]:
    """What TRL gives to the model for a packed row, without the padding between ranks."""
    there = inputs["attention_mask"][row].bool()
    given = {k: inputs[k][row][there].unsqueeze(0) for k in ("input_ids", "position_ids", "shift_labels")}
    for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k"):
        given[name] = inputs[name][row][inputs[name][row] >= 0]
    given["tree_max_seqlen_q"], given["tree_max_seqlen_k"] = inputs["tree_max_seqlens"][row].tolist()
    return given


def score_row(model: nn.Module, inputs: Inputs, row: int, *, router_loss: bool = False) -> Scored:
    """Log-probs and entropies (M,), nats at T_base, of the loss terms of a packed row, by TRL's fused head.

    The log-probs are differentiable where gradients are on; entropies are used as constants.
    """
    asked: dict[str, Any] = {"output_router_logits": True} if router_loss else {}
    outputs = model(fused_lm_head=True, **model_inputs(inputs, row), **asked)
    place = Terms.of(inputs, row).place
    logp, entropy = (x.flatten()[place] for x in (outputs.log_probs, outputs.entropy))
    return Scored(logp, entropy.detach(), outputs.aux_loss if router_loss else None)


def context_ids(inputs: Inputs, row: int, place: int) -> list[int]:
    """The tokens on the path from the root to a place of a packed row, itself included."""
    given = model_inputs(inputs, row)
    segment = int((given["tree_cu_seqlens_q"] <= place).sum()) - 1
    first, last = given["tree_cu_seqlens_k"][segment : segment + 2].tolist()
    path = given["tree_kv_index"][first:last]
    return given["input_ids"][0, path[path <= place]].tolist()


def responses(inputs: Inputs) -> TensorDict:
    """A rank's micro-batch as responses: mask, log-prob and version of each drawn token (B,T), rewards, group."""
    there = inputs["token_index"] >= 0
    place = inputs["response"][there], inputs["column"][there]
    shape = inputs["reward"].shape[1], max(1, int(place[1].max()) + 1 if len(place[1]) else 1)
    found: TensorDict = {"mask": torch.zeros(shape, dtype=torch.bool, device=there.device)}
    found["mask"][place] = True
    sources = {"drawn_logp": "old_log_probs", "version": "version", "turn": "turn"}
    for name, source in sources.items():
        values = inputs[source][there]
        found[name] = values.new_zeros(shape).index_put(place, values)
    for name in ("reward", "group", "number", "rewards"):
        if name in inputs:
            found[name] = inputs[name][0]
    return found


class Step(NamedTuple):
    """An optimiser step as the stages of a method leave it."""

    batch: TokenBatch
    """Of all ranks."""
    everyone: TensorDict
    """What `responses` found, of all ranks."""
    rows: list[slice]
    """Those of each micro-batch of this rank."""


def make_step(
    method: Method,
    micro_batches: list[Inputs],
    accelerator: Accelerator,
    score: Callable[[Inputs, int], Scored],
    *,
    old_policy: str,
    score_first: bool = False,
) -> Step:
    """`Method.prepare` and `Method.step` over the responses of an optimiser step, of all ranks.

    Args:
        method: whose stages run.
        micro_batches: those of the step, on this rank.
        accelerator: gathers.
        score: (micro-batch, row) -> scores of the current policy; called without gradients, and only where the old
            policy is the current one, where the method reads entropies before the loss, or with `score_first`.
        old_policy: "sampler": `old_logp` is what the server said of the tokens it drew; "current": it is the
            policy at the beginning of this step, and the server's is `sampler_logp`.
        score_first: score in any case.
    """
    found = [responses(inputs) for inputs in micro_batches]
    everyone = gather_rows(accelerator, concat_rows(found))
    size, share = len(found[0]["mask"]), len(everyone["mask"]) // accelerator.num_processes
    first = accelerator.process_index * share
    rows = [slice(start, start + size) for start in range(first, first + share, size)]
    given: dict[str, Any] = {
        n: everyone[n] for n in ("mask", "reward", "group", "turn", "rewards") if n in everyone
    }
    drawn = everyone["drawn_logp"]

    if not (score_first or old_policy == "current" or method.step_reads_policy):
        try:
            return Step(method.prepare(TokenBatch(old_logp=drawn, **given)), everyone, rows)
        except MissingFieldError:  # it reads entropies, which the server does not tell
            pass
    now = current(micro_batches, found, accelerator, score)
    raw: dict[str, Any] = {"old_logp": drawn, "old_entropy": now["entropy"]}
    if old_policy == "current":
        raw |= {"old_logp": now["logp"], "sampler_logp": drawn}
    batch = method.prepare(TokenBatch(**raw, **given))
    if method.step_reads_policy:
        batch = method.step(batch.replace(**now)).replace(logp=None, entropy=None)
    return Step(batch.replace(**raw), everyone, rows)  # also of dropped groups, which records show


@torch.no_grad()
def current(
    micro_batches: list[Inputs],
    found: list[TensorDict],
    accelerator: Accelerator,
    score: Callable[[Inputs, int], Scored],
) -> dict[str, Float[Tensor, "B T"]]:
    """Log-probs and entropies of the current policy, of all ranks."""
    parts = []
    for inputs, rows in zip(micro_batches, found, strict=True):
        shape = tuple(rows["mask"].shape)
        total: TensorDict = {}
        for row in range(len(inputs["input_ids"])):
            scored, terms = score(inputs, row), Terms.of(inputs, row)
            assert scored.entropy is not None
            for name, values in (("logp", scored.logp), ("entropy", scored.entropy)):
                spread = terms.spread(values.float(), shape)  # type: ignore[arg-type]
                total[name] = total[name] + spread if name in total else spread
        parts.append(total)
    return gather_rows(accelerator, concat_rows(parts))

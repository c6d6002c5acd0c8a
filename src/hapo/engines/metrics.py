"""Names and figures that every engine logs, so that report, doctor and compare read runs of any engine."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool
from torch import Tensor

from ..batch import EntropyStats, TokenBatch

NAMES = {
    "clip/low": "clip_ratio/low_mean",
    "clip/high": "clip_ratio/high_mean",
    "sampler_weight": "sampler_weight/mean",
    "ratio": "ratio/mean",
    "kl_old": "kl_old",
    "kept": "kept",
    "reshaped": "reshaped",
    "kl": "kl",
}
"""`LossOutput.metrics` -> the name in the log: TRL's where TRL has one."""


def rollout_metrics(
    batch: TokenBatch,
    scored: Bool[Tensor, "B T"],
    factor: Callable[[Tensor, EntropyStats], Tensor] | None,
    sampled_with: EntropyStats | None,
    t_base: float,
) -> dict[str, float]:
    """Figures of a prepared rollout batch of all ranks.

    Args:
        batch: what `Method.prepare` made.
        scored: valid response tokens, those of dropped groups included.
        factor: the method's temperature rule.
        sampled_with: the statistics that the batch was drawn with; None: at `t_base`.
        t_base: the base temperature.
    """
    assert batch.group is not None and batch.reward is not None
    metrics: dict[str, float] = {}
    rows = scored.any(1)
    if rows.any():
        metrics["groups/used"] = (
            batch.group[batch.mask.any(1)].unique().numel() / batch.group[rows].unique().numel()
        )
    length, right = scored.sum(1), (batch.reward if batch.verdict is None else batch.verdict) > 0
    for name, chosen in (("right", rows & right), ("wrong", rows & ~right)):
        if chosen.any():
            metrics[f"completions/mean_length_{name}"] = length[chosen].float().mean().item()
    if batch.stats is not None:
        for name in ("pivot", "sigma", "floored"):
            metrics[f"entropy_stats/{name}"] = getattr(batch.stats, name)
    if factor is not None and sampled_with is not None and batch.old_entropy is not None and batch.mask.any():
        temperature = t_base * factor(batch.old_entropy[batch.mask], sampled_with)
        for name in ("mean", "min", "max"):
            metrics[f"temperature/{name}"] = getattr(temperature, name)().item()
    return metrics


def sampler_gap(batch: TokenBatch) -> dict[str, float]:
    """|old - sampler| over the valid tokens, nats; empty where the sampler's log-probs are not known."""
    if batch.old_logp is None or batch.sampler_logp is None or not batch.mask.any():
        return {}
    gap = (batch.old_logp - batch.sampler_logp)[batch.mask].abs()
    name = "sampling/sampling_logp_difference"
    return {f"{name}/mean": gap.mean().item(), f"{name}/max": gap.max().item()}

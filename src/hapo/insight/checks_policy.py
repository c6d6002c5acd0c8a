"""What a run did to the policy: entropy, ratios, gradients. Thresholds: docs/doctor_findings.md."""

from __future__ import annotations

import math

import numpy as np

from .checks_config import MISSING_MASS
from .finding import Finding, percent
from .run import Run
from .trends import TREND, ends, method_of, rose, smaller_rate, values


def entropy_floor(run: Run) -> Finding | None:
    """The policy is certain of nearly every token."""
    entropy, floored = values(run, "entropy"), values(run, "entropy_stats/floored")
    mean = ends(entropy)[1] if len(entropy) > 1 else math.inf
    share = ends(floored)[1] if len(floored) > 1 else 0.0
    if mean >= 0.01 and share < 0.5:
        return None
    return Finding(
        "entropy_floor",
        "warning",
        f"at the end the mean entropy was {mean:.2g} nats a token, and {percent(share)} of the tokens had none",
        "the answers of a group come out equal, so nothing more can be learned; and statistics of entropy, which "
        "hapo steers by, are made of rounding",
        "stop where the entropy was above 0.01, or train again with "
        f"{smaller_rate(run)} or a larger upper clip range: --method_options '{{\"eps_high\": 0.28}}'",
    )


def entropy_collapse(run: Run) -> Finding | None:
    """Entropy is used up without a gain in reward."""
    entropy, reward = values(run, "entropy"), values(run, "reward")
    if len(entropy) < TREND or len(reward) < 2:
        return None
    first, last = ends(entropy)
    if last >= 0.1 * first or rose(reward):
        return None
    before, after = ends(reward)
    return Finding(
        "entropy_collapse",
        "warning",
        f"entropy fell from {first:.3g} to {last:.2g} nats, and the reward went from {before:.3g} to {after:.3g}",
        "the policy became certain without becoming right, and no longer tries anything else",
        f"{smaller_rate(run)}; --method_options '{{\"eps_high\": 0.28}}', which lets rare tokens gain more",
    )


def entropy_explosion(run: Run) -> Finding | None:
    """The policy falls apart into guessing."""
    entropy = values(run, "entropy")
    if len(entropy) < TREND:
        return None
    first, last = ends(entropy)
    if last <= max(3 * first, 1.0):
        return None
    return Finding(
        "entropy_explosion",
        "warning",
        f"entropy rose from {first:.3g} to {last:.3g} nats a token",
        "the policy guesses more and more: text falls apart, usually soon before the reward does",
        f"{smaller_rate(run)}; a temperature rule with a smaller tau; --max_grad_norm 0.2",
    )


def sampler_mismatch(run: Run) -> Finding | None:
    """Sampler and policy disagree where they should be the same."""
    gap = values(run, "sampling/sampling_logp_difference/mean")
    truncating = any(run.config.get(name) for name in ("top_k", "min_p", "generation_kwargs"))
    truncating |= run.config.get("top_p", 1.0) != 1.0 or run.config.get("repetition_penalty", 1.0) != 1.0
    truncating &= not run.config.get("sampling_support")
    if len(gap) < 2 or len(values(run, "temperature/mean")) or truncating:
        return None
    first, last = ends(gap)
    if last <= 0.1 and not (len(gap) >= TREND and last > max(3 * first, 0.01)):
        return None
    return Finding(
        "sampler_mismatch",
        "warning",
        f"log-probs of sampler and policy differed by {first:.2g} nats a token at first, {last:.2g} at the end, "
        "with plain sampling",
        "the engine that draws the tokens does not run the model that is trained: other precision, stale weights, "
        "or another template; gradients get a bias that grows with it",
        "the same dtype in both engines (--dtype, vllm's dtype), weights sent before each rollout, and "
        "--method_options '{\"sampler_cap\": 2.0}'",
    )


def truncated_ratios(run: Run) -> Finding | None:
    """Tokens were left out of the draw, and log-probs are over all."""
    given = {name: run.config.get(name) for name in ("top_p", "top_k", "min_p")}
    cut = [f"{name}={x}" for name, x in given.items() if x not in (None, 0, 1.0)]
    weight = values(run, "sampler_weight/mean")
    if not cut or run.config.get("sampling_support") or not len(weight):
        return None
    verl = run.config.get("engine") == "verl"
    return Finding(
        "truncated_ratios",
        "warning",
        f"{', '.join(cut)} with log-probs over the whole vocabulary; the mean importance weight was "
        f"{weight.mean():.2f}",
        MISSING_MASS,
        "--top_p 1 --top_k -1: verl 0.9 does not hand on what is left"
        if verl
        else "a top_k, with generate() of transformers or vLLM in Model Runner V2, and sampling_support unset",
    )


def ratio_always_one(run: Run) -> Finding | None:
    """The policy never left the rollout policy."""
    moved, ratio = values(run, "kl_old"), values(run, "ratio/mean")
    if len(moved) < 2 or moved.max() >= 1e-7 or np.abs(ratio - 1).max(initial=0.0) >= 1e-4:
        return None
    from ..parts.surrogate import unclipped_surrogate
    from ..stage import part_of

    if (method := method_of(run)) is not None and part_of(method.surrogate) is unclipped_surrogate:
        return None
    return Finding(
        "ratio_always_one",
        "warning",
        f"importance ratios were 1 in all {len(moved)} logged steps (kl_old at most {moved.max():.1g})",
        "nothing is ever clipped: what a method does at its bounds never happened, and a comparison with another "
        "clipped method shows nothing",
        "more optimiser steps a rollout batch: steps_per_generation 4 times gradient_accumulation_steps",
    )


def nothing_clipped(run: Run) -> Finding | None:
    """The bounds of the method were never reached."""
    low, high = values(run, "clip_ratio/low_mean"), values(run, "clip_ratio/high_mean")
    if len(low) < TREND or low.max() > 0 or high.max(initial=0.0) > 0:
        return None
    from ..parts.bounds import no_bounds
    from ..stage import part_of

    if (method := method_of(run)) is not None and part_of(method.bounds) is no_bounds:
        return None
    return Finding(
        "nothing_clipped",
        "warning",
        f"no token was clipped in {len(low)} logged steps",
        "the bounds did nothing: methods that differ in them alone were one method here",
        "more optimiser steps a rollout batch (--steps_per_generation), a higher --learning_rate, or tighter "
        "bounds, if the bounds are what you want to see",
    )


def non_finite(run: Run) -> Finding | None:
    """NaN or infinite loss or gradient."""
    names = [name for name in ("loss", "grad_norm") if name in run.metrics]
    broken = run.metrics[[~np.isfinite(row).all() for row in run.metrics[names].to_numpy(float)]]
    if not len(broken):
        return None
    return Finding(
        "non_finite",
        "error",
        f"loss or gradient norm was NaN or infinite in {len(broken)} of {len(run.metrics)} logged steps, first at "
        f"step {broken['step'].iloc[0]}",
        "one such step can turn every weight into NaN; the weights from there on are worth nothing",
        f"go back to a checkpoint before that step; {smaller_rate(run)}, --bf16 in place of fp16, and look for "
        "rewards that are not finite",
    )


def zero_gradients(run: Run) -> Finding | None:
    """Optimiser steps without a gradient."""
    norm = values(run, "grad_norm")
    share = float((norm == 0).mean()) if len(norm) >= 4 else 0.0
    if share <= 0.25:
        return None
    return Finding(
        "zero_gradients",
        "warning",
        f"the gradient was 0 in {percent(share)} of {len(norm)} logged steps",
        "these steps cost a rollout and taught nothing: every group had equal rewards, every token was clipped, "
        "or no weight is trained",
        "see frac_reward_zero_std, completions/clipped_ratio and kept in metrics.jsonl at those steps; "
        "--max_num_gen_batches 10 fills batches with groups that teach",
    )


def unfinished(run: Run) -> Finding | None:
    """The run has no end."""
    if run.finished is not None:
        return None
    last = int(run.metrics["step"].iloc[-1]) if len(run.metrics) else 0
    most = run.config.get("max_steps", -1)
    return Finding(
        "unfinished",
        "warning",
        f"finished.json is missing; the last logged step is {last}" + (f" of {most}" if most > 0 else ""),
        "it is still training, or it was killed: its last figures are not its result",
        f"hapo train --resume {run.folder}",
    )


def loss_near_zero(run: Run) -> Finding | None:
    """The loss is about 0, as it should be."""
    loss = np.abs(values(run, "loss"))
    if not len(loss) or not np.median(loss) < 0.01:
        return None
    return Finding(
        "loss_near_zero",
        "note",
        f"the median of |loss| was {np.median(loss):.1g}",
        "a loss about 0 is normal here: the advantages of a group sum to 0 and ratios start at 1, so the value "
        "is 0 by construction, while its gradient is not; it says nothing about learning",
        "nothing; watch reward, held-out accuracy and grad_norm",
    )

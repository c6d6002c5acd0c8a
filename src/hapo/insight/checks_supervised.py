"""What a run that learnt from demonstrations did on held-out ones. Thresholds: docs/doctor_findings.md."""

from __future__ import annotations

from .finding import Finding
from .run import Run
from .trends import smaller_rate


def learnt_by_heart(run: Run) -> Finding | None:
    """Held-out loss ended above its best."""
    losses = run.held_out_loss()
    if len(losses) < 3:
        return None
    best, last = losses.loc[losses["eval_loss"].idxmin()], losses.iloc[-1]
    if not last["eval_loss"] > 1.05 * best["eval_loss"]:  # NaN is another finding
        return None
    return Finding(
        "learnt_by_heart",
        "warning",
        f"held-out loss rose from {best['eval_loss']:.4g} at step {best['step']:.0f} to {last['eval_loss']:.4g}",
        "the demonstrations are learnt by heart from there on, and the last weights are not the best ones",
        "take the checkpoint next to the best measurement, train for fewer steps (--max_steps), on more "
        f"demonstrations, or with {smaller_rate(run)}",
    )


def nothing_learnt(run: Run) -> Finding | None:
    """Held-out loss did not fall."""
    losses = run.held_out_loss()["eval_loss"]
    if len(losses) < 2 or losses.min() < 0.99 * losses.iloc[0]:
        return None
    return Finding(
        "nothing_learnt",
        "warning",
        f"held-out loss was {losses.iloc[0]:.4g} before and {losses.iloc[-1]:.4g} after, and never lower by 1 %",
        "the model knew the demonstrations' form already, or the learning rate is far off",
        "train longer (--max_steps), or with another --learning_rate; look at the heaviest targets in the report",
    )


def demonstrations_unfinished(run: Run) -> Finding | None:
    """The run has no end."""
    if run.finished is not None:
        return None
    last = int(run.metrics["step"].iloc[-1]) if len(run.metrics) else 0
    return Finding(
        "demonstrations_unfinished",
        "warning",
        f"finished.json is missing; the last logged step is {last}",
        "it is still training, or it was killed: its last figures are not its result",
        f"hapo sft --resume {run.folder}",
    )

"""The doctor: what is wrong with a run, before it starts and after. Every finding: docs/doctor_findings.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..tasks import Task, TaskConfig
from . import checks_config, checks_data, checks_demonstrations, checks_policy, checks_reward, checks_supervised
from .checks_config import Plan
from .checks_demonstrations import DemonstrationPlan
from .finding import Finding, in_verl
from .run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from trl import ModelConfig

    from ..engines.trl import HAPOConfig

__all__ = [
    "CONFIG_CHECKS",
    "DEMONSTRATION_CHECKS",
    "RUN_CHECKS",
    "SUPERVISED_CHECKS",
    "DemonstrationPlan",
    "Finding",
    "examine_config",
    "examine_demonstrations",
    "examine_run",
]

SEVERITIES = ("error", "warning", "note")

CONFIG_CHECKS: tuple[Callable[[Plan], Finding | None], ...] = (
    checks_data.few_problems,
    checks_data.unusable_golds,
    checks_data.context_exceeded,
    checks_data.short_completions,
    checks_data.majority_answer,
    checks_config.ratio_always_one,
    checks_config.uncorrected_sampler,
    checks_config.truncated_ratios,
    checks_config.temperature_range,
    checks_config.small_groups,
    checks_config.learning_rate,
)
"""Each looks for one thing, and has the name of its finding."""

DEMONSTRATION_CHECKS: tuple[Callable[[DemonstrationPlan], Finding | None], ...] = (
    checks_demonstrations.targets_cut,
    checks_demonstrations.beyond_context,
    checks_demonstrations.packed_across,
    checks_demonstrations.prompts_learnt,
    checks_demonstrations.many_passes,
    checks_demonstrations.not_measured,
    checks_demonstrations.no_accuracy,
    checks_demonstrations.answers_cut,
    checks_demonstrations.supervised_rate,
)
"""Those of a recipe of `hapo sft`."""

RUN_CHECKS: tuple[Callable[[Run], Finding | None], ...] = (
    checks_policy.non_finite,
    checks_reward.constant_reward,
    checks_reward.collapse,
    checks_reward.zero_variance_groups,
    checks_reward.truncated,
    checks_reward.truncation_rising,
    checks_reward.wrong_answers_grow,
    checks_policy.entropy_collapse,
    checks_policy.entropy_explosion,
    checks_policy.entropy_floor,
    checks_policy.sampler_mismatch,
    checks_policy.truncated_ratios,
    checks_policy.ratio_always_one,
    checks_policy.nothing_clipped,
    checks_policy.zero_gradients,
    checks_policy.unfinished,
    checks_reward.no_improvement,
    checks_policy.loss_near_zero,
)
"""Each looks for one thing, and has the name of its finding."""

SUPERVISED_CHECKS: tuple[Callable[[Run], Finding | None], ...] = (
    checks_policy.non_finite,
    checks_supervised.learnt_by_heart,
    checks_supervised.nothing_learnt,
    checks_supervised.demonstrations_unfinished,
    checks_reward.no_improvement,
)
"""Those of a run that learnt from demonstrations."""

AGENT_CHECKS: tuple[Callable[[Run], Finding | None], ...] = (
    checks_policy.non_finite,
    checks_policy.entropy_collapse,
    checks_policy.entropy_explosion,
    checks_policy.unfinished,
    checks_reward.no_improvement,
)
"""Those of a run that trained an agent with a critic."""

CAUSES = {
    "nothing_learnt": ("no_improvement",),
    "constant_reward": (
        "zero_variance_groups",
        "ratio_always_one",
        "nothing_clipped",
        "zero_gradients",
        "no_improvement",
        "loss_near_zero",
    ),
    "zero_variance_groups": ("zero_gradients",),
    "ratio_always_one": ("nothing_clipped",),
    "truncated": ("truncation_rising",),
    "collapse": ("no_improvement",),
}
"""Finding -> symptoms that it explains."""


def examine_config(
    task_config: TaskConfig,
    args: HAPOConfig,
    model_config: ModelConfig,
    *,
    task: Task | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    architecture: PreTrainedConfig | None = None,
) -> list[Finding]:
    """What is wrong with a training run before it starts, the worst first.

    Without `task` the data are not looked at, without `tokenizer` no length, without `architecture` (the model's
    config.json) neither its context nor its size.
    """
    plan = Plan(
        task_config=task_config,
        args=args,
        model_config=model_config,
        task=task,
        tokenizer=tokenizer,
        architecture=architecture,
    )
    return _worst_first(check(plan) for check in CONFIG_CHECKS)


def examine_demonstrations(plan: DemonstrationPlan) -> list[Finding]:
    """What is wrong with learning from demonstrations before it starts, the worst first."""
    return _worst_first(check(plan) for check in DEMONSTRATION_CHECKS)


def examine_run(run: Run) -> list[Finding]:
    """What went wrong in a run, the worst first; reads metrics and evaluations, not the token records.

    Runs of any engine, finished or not: what was not recorded is not judged. Where the cause of a symptom is
    found, the symptom is left out.

    Raises:
        ValueError: a file of the run is broken.
    """
    checks = SUPERVISED_CHECKS if run.supervised else AGENT_CHECKS if run.agent else RUN_CHECKS
    findings = _worst_first(check(run) for check in checks)
    symptoms = {symptom for finding in findings for symptom in CAUSES.get(finding.name, ())}
    kept = [finding for finding in findings if finding.name not in symptoms]
    return [in_verl(finding) for finding in kept] if run.config.get("engine") == "verl" else kept


def _worst_first(found: Iterable[Finding | None]) -> list[Finding]:
    findings = [finding for finding in found if finding is not None]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))

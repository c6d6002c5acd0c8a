"""What hapo does in the process of verl's trainer, whichever of the two trainers of verl it is.

Each of them inherits from `Driver`, and overrides those methods of verl's that call it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

from ...batch import EntropyStats
from ...outputs import write_whole
from ...parts.credit import last_token, onto_valid_tokens
from ...samplers.rule import rule_of
from ..identity import differences, identity
from ..metrics import rollout_metrics, sampler_gap
from .columns import Columns
from .config import NAME, Settings, check, recipe, resolve_method, select
from .estimator import Estimation
from .plan import RolloutPlan
from .records import Records
from .rewards import token_scores
from .sampling import Tempering, check_rollout

STATE = "hapo.json"
"""In a checkpoint's folder."""


class Driver:
    """The method, the statistics of the rollout and the records of a run.

    Entropies are those of verl's pass over the old policy at T_base; group means, statistics and signals are taken
    over the whole rollout batch, in this process, and frozen. Each optimiser step is normalised by its exact
    totals over all ranks. verl's KL penalty, entropy bonus, rollout correction, metrics and checkpoints stay.
    """

    config: Any
    global_steps: int
    total_training_steps: int
    llm_server_manager: Any
    tokenizer: Any

    def begin(self, config: Any, *, queue: bool) -> None:
        """Check the configuration and the run's folder, before any worker starts.

        Raises:
            ValueError: the configuration asks for what a method cannot honour; with the remedy.
            ImportError: the rollout's engine is missing or was not tested.
            FileExistsError: the run's folder holds another run, and nothing is resumed.
        """
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        self.settings = Settings.of(plain)
        self.method = resolve_method(plain, self.settings)
        check(plain, self.method, queue=queue)
        self.temperature_stats: EntropyStats | None = None
        self._sampled_with: EntropyStats | None = None
        self._plan: RolloutPlan | None = None
        self._steps = 0
        self._said = False
        checkpoint = resumed_from(plain)
        self.records = Records.open(plain, self.settings, recipe(plain, self.method), checkpoint)
        if checkpoint is not None:
            self._load_state(checkpoint / STATE)

    # -- rollout --------------------------------------------------------------------------------------------

    def start_tempering(self) -> None:
        """With an adaptive temperature: the board from which the rollout's clients read its rule."""
        self.tempering = Tempering() if self.method.temperature_rule is not None else None

    def check_rollout(self) -> None:
        """Ask the rollout servers whether they apply rules."""
        if self.tempering is not None:
            check_rollout(self.llm_server_manager.server_handles, self.tokenizer.encode("1"))

    def send_rule(self) -> None:
        """The prompts of a step go out, with the statistics of the last rollout."""
        self._sampled_with = self.temperature_stats
        if self.tempering is not None:
            self.tempering.send(rule_of(self.method, self._sampled_with))

    def send_no_rule(self) -> None:
        """Validation samples at its own temperature."""
        if self.tempering is not None:
            self.tempering.send(None)

    # -- advantage and update -------------------------------------------------------------------------------

    def place_scores(self, columns: Columns) -> None:
        """Put the scores of a `TokenRewardManager`, for which verl has one number a response, into `rm_scores`."""
        given = columns.read("response_mask", "rm_scores")
        scores, mask = given["rm_scores"], given["response_mask"].bool()
        by_token = token_scores(columns.infos(), scores)
        if by_token is not None:
            columns.write({"rm_scores": by_token})
            scores = by_token
        dense = onto_valid_tokens(scores, mask)[~last_token(mask)].any()
        if dense and self.method.credit is None and not self._said:
            self._said = True
            warnings.warn(
                "the reward gives scores by token, of which the method takes the sum: "
                "+hapo.options.advantage=token_reward lets each token learn from its own. Said once",
                stacklevel=2,
            )

    def known(self, columns: Columns) -> dict[str, Tensor]:
        """What the estimator needs besides verl's arguments, as far as the columns have it."""
        names = {"old_log_probs": "old_logp", "entropy": "old_entropy", "ref_log_prob": "ref_logp"}
        found = columns.read("rm_scores", *names)
        return {"verdict": self._verdict(columns, found["rm_scores"])} | {
            ours: found[theirs] for theirs, ours in names.items() if theirs in found
        }

    def _verdict(self, columns: Columns, scores: Tensor) -> Tensor:
        """Of each response (B,): what verl's group filter would go by, `algorithm.filter_groups.metric`."""
        name = OmegaConf.select(self.config, "algorithm.filter_groups.metric") or "reward"
        if name == "reward":
            return scores.float().sum(1)
        found = []
        for info in columns.infos():
            if name not in info:
                raise ValueError(
                    f"algorithm.filter_groups.metric={name} names the verdict, and the reward function returns "
                    f"only {sorted(info)}: name one of them, or reward"
                )
            found.append(float(info[name]))
        return torch.tensor(found)

    def freeze(self, columns: Columns, made: Estimation) -> dict[str, float]:
        """Write what the method made beside verl's own columns, and make the plan of the update.

        Returns:
            figures of the rollout batch, for the log.
        """
        prepared, scored = made.prepared, made.scored
        assert prepared is not None and scored is not None
        fields: dict[str, Any] = {
            "hapo_mask": prepared.mask,
            "hapo_reward": prepared.reward,
            "hapo_verdict": prepared.verdict,
            "hapo_group": prepared.group,
            "hapo_response": torch.arange(len(prepared)),
        }
        for name in ("signal", "keep", "token_reward"):
            if getattr(prepared, name) is not None:
                fields[f"hapo_{name}"] = getattr(prepared, name)
        columns.write(fields)
        sampler = columns.read("rollout_log_probs").get("rollout_log_probs")
        if sampler is not None:
            prepared = prepared.replace(sampler_logp=sampler)
        t_base = self.config.actor_rollout_ref.rollout.temperature
        figures = rollout_metrics(prepared, scored, self.method.temperature_rule, self._sampled_with, t_base)
        if prepared.stats is not None:  # a rollout of which every group was dropped leaves the former ones
            self.temperature_stats = prepared.stats
        rows = int((prepared.scored & ~columns.added).sum())
        self._plan = RolloutPlan(
            method=self.method.name,
            options={k: v for k, v in self.method.options.items() if k != "method"},
            step=self._steps + 1,
            stats=prepared.stats or self.temperature_stats,
            sampled_with=self._sampled_with,
            t_base=t_base,
            responses=rows,
            record=self.records.tokens_of(self.global_steps) if self.records is not None else None,
            groups=max(1, self.settings.record_tokens_rows // self.config.actor_rollout_ref.rollout.n),
        )
        return {f"{NAME}/{k}": v for k, v in {**figures, **sampler_gap(prepared)}.items()}

    def updated(self, responses: int, metrics: dict[str, Any]) -> None:
        """After verl's update of the actor: its optimiser steps are counted, and the method's metrics named."""
        for name in [name for name in metrics if name.startswith(f"actor/{NAME}/")]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
        actor = self.config.actor_rollout_ref.actor
        rows = actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n
        self._steps += responses // rows * actor.ppo_epochs

    # -- checkpoints and records ----------------------------------------------------------------------------

    def save_state(self) -> None:
        """Before verl's checkpoint, which names the folder the latest one when all of it is written."""
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        stats = self.temperature_stats
        state = {
            "method": identity(self.method),
            "steps": self._steps,
            "stats": None if stats is None else stats.to_dict(),
        }
        if self.records is not None:
            state |= {"tokens": self.records.tokens, "seconds": self.records.seconds}
        write_whole(folder / STATE, json.dumps(state, indent=2) + "\n")

    def _load_state(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(
                f"{file} is missing: the checkpoint is of another trainer, and the statistics of its last rollout "
                "are not known. Set trainer.resume_mode=disable and actor_rollout_ref.model.path to its weights"
            )
        state = json.loads(file.read_text())
        if details := differences(state["method"], identity(self.method)):
            raise ValueError(
                f"{file.parent} is a checkpoint of another method ({details}): resume with the method that it was "
                "written with, or begin another run (trainer.default_local_dir)"
            )
        self._steps = state["steps"]
        self.temperature_stats = None if state["stats"] is None else EntropyStats(**state["stats"])
        if self.records is not None:
            self.records.tokens, self.records.seconds = state.get("tokens", 0), state.get("seconds", 0.0)

    def begin_records(self) -> None:
        """After verl has loaded its checkpoint."""
        if self.records is not None:
            self.records.begin(self._steps)

    def record_metrics(self, metrics: Mapping[str, Any]) -> None:
        """One line, at the last optimiser step."""
        if self.records is not None:
            self.records.add_metrics(self._steps, metrics)

    def record_evaluation(self, uids: Any, infos: Mapping[str, Any]) -> None:
        """One line a validation."""
        if self.records is not None:
            self.records.add_evaluation(self._steps, uids, infos)

    def finish_records(self, why: str) -> None:
        """The run is complete."""
        if self.records is not None:
            self.records.finish(self._steps, why)


def resumed_from(config: Mapping[str, Any]) -> Path | None:
    """The folder of the checkpoint that verl will resume, by its own rules."""
    mode = select(config, "trainer.resume_mode")
    if mode == "resume_path":
        return Path(select(config, "trainer.resume_from_path", "")).resolve()
    found = find_latest_ckpt_path(select(config, "trainer.default_local_dir")) if mode == "auto" else None
    return None if found is None else Path(found).resolve()

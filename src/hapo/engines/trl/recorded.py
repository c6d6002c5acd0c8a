"""What a run leaves behind: the order of its data, its log lines, records, model card and checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from ...method import Method
from ...outputs import write_whole
from ...supervised import Supervised
from ..records import RunRecords
from .card import model_card, paper_of, told_of
from .checkpoint import RunState, check_checkpoint, layout_of, load_state, save_state, state_of
from .config import HAPOConfig
from .finite import check, check_weights
from .optimizer import NamedOptimizer
from .recorder import Recorder, open_records, options_told
from .rollout import EpochSampler
from .stages import Stages, StageSampler


class Recorded(NamedOptimizer, Trainer):
    """A trainer with run records, a model card, and checkpoints that a resumed run continues bit for bit.

    Put it before a trainer of TRL. A subclass sets `method` and `recipe`, and says what of it a checkpoint holds.
    """

    method: Method | Supervised
    recipe: dict[str, Any]
    """What beside `args` the run was told (model, task); written to config.yaml."""
    _run_folder: RunRecords | None = None

    def _open_records(self, checkpoint: str | None) -> None:
        """Open the run folder as `_run_folder`, with a checkpoint that of the run which goes on."""
        raise NotImplementedError

    def _layout(self) -> dict[str, Any]:
        """How an optimiser step is cut, which a resumed run must share."""
        raise NotImplementedError

    def _card(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Facts of the model card: of the data, and of the training."""
        raise NotImplementedError

    def _run_state(self) -> RunState:
        """What a checkpoint holds beside TRL's; called on all ranks."""
        raise NotImplementedError

    def _take_up(self, state: RunState) -> None:
        """Go on from where a checkpoint was written."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As in TRL. A checkpoint is checked before any work; the run folder is opened for records.

        From a checkpoint of the last step nothing is trained: its weights are loaded.
        """
        folder = Path(self._get_output_dir(None))
        checkpoint = check_checkpoint(resume_from_checkpoint, folder, self.method, self._layout())
        if self.args.run_records:
            self._open_records(checkpoint)
        if checkpoint is not None and self.is_last(checkpoint):
            return self.take_up_last(checkpoint)
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def is_last(self, checkpoint: str | Path) -> bool:
        """Whether a checkpoint was written at the last optimiser step of the run."""
        state = state_of(checkpoint)
        return state.global_step >= (self.args.max_steps if self.args.max_steps > 0 else state.max_steps)

    def take_up_last(self, checkpoint: str | Path) -> TrainOutput:
        """Weights and state of the last checkpoint: transformers would train one step more."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = state_of(checkpoint)
        return TrainOutput(self.state.global_step, math.nan, {})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL; the line goes to metrics.jsonl too."""
        super().log(logs, start_time)
        if self._run_folder is not None:
            self._run_folder.add_metrics(self.state.log_history[-1])

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / "checkpoints") if self.args.run_records else folder

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None:  # with fp16 the scaler skips steps whose gradients overflow
            check("gradient norm", norm, self.state.global_step + 1)
        return norm

    def create_model_card(
        self, model_name: Any = None, dataset_name: Any = None, tags: Any = None, weights: str | None = None
    ) -> None:
        """Write the card of the model as it is now to README.md of the output folder; each checkpoint does.

        Args:
            model_name, dataset_name, tags: TRL's, not read: the card knows them from the run.
            weights: folder of the weights, seen from the output folder; the repository on the Hub, if the model
                goes to one, or else the checkpoint of this step.
        """
        if not self.is_world_process_zero():
            return
        folder, checkpoints = Path(self.args.output_dir), Path(self._get_output_dir(None))
        last = checkpoints.relative_to(folder) / f"checkpoint-{self.state.global_step}"
        net = self.accelerator.unwrap_model(self.model)
        adapter = str(net.active_peft_config.peft_type.value) if is_peft_model(net) else None
        task, schedule = told_of(self.args, self.recipe)
        data, settings = self._card()
        card = model_card(
            folder,
            self.method.name,
            options_told(self.method),
            paper_of(self.method.name),
            base=str(self.recipe.get("model_name_or_path") or self.model.config._name_or_path or ""),
            adapter=adapter,
            data=task | data,
            settings=schedule | settings,
            step=self.state.global_step,
            seed=self.args.seed,
            tags=self._tag_names,
            hub_id=self.hub_model_id,
            weights=self.hub_model_id or weights or last.as_posix(),
        )
        write_whole(folder / "README.md", str(card))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in TRL; weights that are not finite are refused (`hapo.engines.trl.finite`)."""
        check_weights(self.accelerator.unwrap_model(self.model), self.state.global_step)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        save_state(checkpoint, self._run_state(), self.accelerator, self.method, self._layout())
        if self.args.should_save:  # older ones go only now that this one is complete
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), limit, best_model_checkpoint=best, use_mtime=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._take_up(load_state(Path(checkpoint), self.accelerator))

    def _loss_sums(self) -> dict[str, float]:
        """What transformers has added up of the loss."""
        return {
            "since_log": self.accelerator.gather(self._tr_loss.detach()).mean().item(),
            "last_log": self._globalstep_last_logged,
            "total": self._total_loss_scalar,
        }

    def _restore_loss(self, loss: dict[str, float]) -> None:
        self._tr_loss.fill_(loss["since_log"])
        self._globalstep_last_logged = loss["last_log"]
        self._total_loss_scalar = loss["total"]
        self._initial_global_step = 0  # the mean loss is of the whole run


class RecordedTrainer(Recorded, GRPOTrainer):
    """TRL's trainer of policies with run records."""

    args: HAPOConfig
    method: Method
    _records: Recorder | None = None
    _stages: Stages | None = None
    """Of the prompts, where they have any."""

    def _get_train_sampler(self, dataset: Any = None) -> RepeatSampler:
        template = super()._get_train_sampler(dataset)
        if self._stages is not None:
            return StageSampler(template, self._stages, self)
        return EpochSampler.like(template, lambda: self.state)

    def _open_records(self, checkpoint: str | None) -> None:
        net = self.accelerator.unwrap_model(self.model)
        records = open_records(self.args, self.method, self.recipe, net, self.train_dataset, checkpoint)
        self._run_folder = records
        self._records = Recorder(records, self.args, self.method, self._tokenizer.batch_decode)

    def _card(self) -> tuple[dict[str, Any], dict[str, Any]]:
        rewards = ", ".join(f"`{reward}`" for reward in self.reward_func_names)
        penalty = f"{self.args.beta:g}" if self.args.beta else None
        data = {"training prompts": length(self.train_dataset), "rewards": rewards}
        return data, {"weight of the KL penalty": penalty}

    def _layout(self) -> dict[str, Any]:
        return layout_of(self.args, self.accelerator.num_processes)


def length(dataset: Any) -> int | None:
    """None of a stream."""
    return len(dataset) if hasattr(dataset, "__len__") else None

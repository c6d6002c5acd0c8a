"""`SupervisedTrainer`: TRL's `SFTTrainer` with the loss of a `Supervised` method, and its `SupervisedConfig`."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ...batch import StepTotals, TokenBatch
from ...methods import supervised
from ...parts.reduce import token_mean
from ...scoring import attach_scoring
from ...stage import part_of
from ...supervised import Supervised
from ..records import check_writable
from . import finite, optimizer
from .checkpoint import OnceAtBegin, RunState
from .gates import GateLogits, gate_losses, has_gates, recorded
from .recorded import Recorded, length
from .recorder import open_records
from .targets import TargetRecorder

RANKS = frozenset({"rank", "expected_rank"})
"""What TRL's own pass does not give."""

SUMS = "sum of "
"""Before the names of sums that a checkpoint holds among the metrics since the last line."""

ONE = StepTotals(sequences=1, tokens=1, kept=1)
"""With these totals a loss is a plain sum over the targets; TRL divides it by those of the optimiser step."""


@dataclass
class SupervisedConfig(SFTConfig):
    """`SFTConfig` plus a supervised method. All TRL options keep their meaning, except `loss_type`, which the
    method decides.

    Raises:
        ValueError: unknown method or option, a policy method, or an option that cannot be honoured.
    """

    _VALID_DICT_FIELDS: ClassVar = [*SFTConfig._VALID_DICT_FIELDS, "method_options"]

    method: str = field(
        default="sft", metadata={"help": "Supervised method; `hapo methods` lists them with their kind."}
    )
    method_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Options of the method, e.g. {"estimator": "exact"}; `hapo methods NAME`.'},
    )
    optim: str = field(default=TrainingArguments.default_optim, metadata=optimizer.HELP)

    run_records: bool = field(
        default=False,
        metadata={"help": "Write config.yaml, manifest.json, metrics.jsonl and tokens/ into output_dir."},
    )
    record_tokens_every: int = field(
        default=50,
        metadata={"help": "Optimiser steps between token records, besides the first; 0 writes none."},
    )
    record_tokens_rows: int = field(
        default=64, metadata={"help": "Demonstrations of a token record, at most: the first ones of the step."}
    )

    def __post_init__(self) -> None:
        """TRL's checks, then ours."""
        with optimizer.checked(self):
            super().__post_init__()
        for name, low in {"record_tokens_every": 0, "record_tokens_rows": 1}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        options = self.method_options or {}
        if not isinstance(options, dict):
            raise ValueError(f"method_options must be a mapping of option names to values, got {options!r}")
        supervised(self.method, **options)
        if self.loss_type not in ("nll", self.method):
            raise ValueError(
                f"loss_type={self.loss_type!r} cannot be honoured: the method decides the loss; "
                f'choose method="{self.loss_type}"'
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} cannot be honoured: it is another loss "
                "than the method's; set it to 0"
            )
        if not self.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices=False cannot be honoured: the gradient would depend on the ranks; "
                "leave it out"
            )


class SupervisedTrainer(Recorded, SFTTrainer):
    """TRL's `SFTTrainer` with the loss of a supervised method; all else is TRL's.

    The loss of an optimiser step is normalised by its targets, over all micro-batches and ranks, whatever the
    model says of itself. So the gradient does not depend on accumulation, packing or ranks. Methods that read
    ranks are scored by `hapo.scoring`, the others by TRL's fused head; neither makes all logits.

    The entropy of the gates of a GateRA adapter is added with the weight of its config, normalised alike, while
    the model trains; an evaluation logs it and leaves its loss the method's.

    With `args.run_records` the output folder is a run of `hapo.insight`: the log, and the targets of some steps
    with their weights and ranks. A resumed run continues bit for bit.

    Args:
        method: a `Supervised` object, in the place of `args.method` and `args.method_options`.
        model, args, ...: as in `SFTTrainer`; `args` is a `SupervisedConfig`.

    Raises:
        ValueError: what is asked for cannot be honoured, or `resume_from_checkpoint` names a checkpoint of another
            method, or an incomplete one; the message says what to do.
        FileExistsError: `args.run_records` and the output folder holds another run.
    """

    args: SupervisedConfig
    method: Supervised
    _records: TargetRecorder | None = None

    def __init__(
        self,
        model: Any,
        args: SupervisedConfig | None = None,
        *trl_args: Any,
        method: Supervised | None = None,
        **trl_kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SupervisedConfig(f"{str(name).split('/')[-1] or 'model'}-supervised")
        if not isinstance(args, SupervisedConfig):
            raise TypeError(
                f"args must be a SupervisedConfig, got {type(args).__name__}; "
                "from hapo.trl import SupervisedConfig"
            )
        if trl_kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func cannot be honoured: the method decides the loss; leave it out")
        self.method = _resolve(method, args)
        self._tag_names = ["trl", "sft", "hapo"]
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self.recipe = {}
        self._given = trl_kwargs.get("train_dataset")  # whose fingerprint says which data these are
        if args.run_records:
            check_writable(Path(args.output_dir))
        args = copy.copy(args)
        args.loss_type = "nll"  # TRL then sums the log-probs and divides; any weight is the method's
        super().__init__(model, args, *trl_args, **trl_kwargs)
        self._check_parallelism()
        # Some models say that they take no token counts (`accepts_loss_kwargs = False`), and TRL then divides each
        # micro-batch by its own; others are of no known loss, and the first column is counted as targets.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        if self.method.reads & RANKS and self.aux_loss_enabled:
            raise ValueError(
                f"method {self.method.name!r} reads ranks, whose pass has no router loss: set "
                "router_aux_loss_coef=0.0"
            )
        if self.method.reads & RANKS or (args.run_records and args.record_tokens_every):
            attach_scoring(self.model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's, which sums the log-probs of the targets: the model hands it the method's sum in their place."""

        def with_method(**inputs: Any) -> Any:
            if not inputs.get("fused_lm_head"):
                return model(**inputs)
            with recorded(model) as gates:
                outputs, ranks = (
                    self._scores(model, inputs) if self.method.reads & RANKS else (model(**inputs), {})
                )
            if gates is None:
                return self._weighted(outputs, ranks)
            predicting = gates.take()[:, :-1].to(outputs.log_probs.device)
            return self._weighted(outputs, ranks, GateLogits(predicting, gates.names, gates.check_gradient))

        step, train = self.state.global_step + 1, self.model.training
        takes = self._records is not None and train and self._records.takes(step)
        if takes and self._records is not None:
            self._records.add(step, model, inputs)
        loss = super().compute_loss(with_method, inputs, return_outputs, num_items_in_batch)
        if train and not return_outputs:
            finite.check("loss", loss.detach(), step)
        if takes and self._records is not None and self.accelerator.gradient_state.sync_gradients:
            self._records.write(step)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL, with the means of what the method made over all targets since the line before."""
        mode = "train" if self.model.training else "eval"
        if sums := self._sums[mode]:
            names = sorted(sums)
            made = self.accelerator.reduce(torch.stack([sums[name] for name in names]), "sum")
            for name, (total, n) in zip(names, made.tolist(), strict=True):
                self._metrics[mode][name] = [total / n if n else 0.0]
            sums.clear()
        super().log(logs, start_time)

    def _scores(self, model: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        """One pass of `hapo.scoring` in the form of TRL's, and the ranks."""
        inputs = {name: x for name, x in inputs.items() if name != "fused_lm_head"}
        targets = inputs.pop("labels")[:, 1:]
        mask = targets != -100
        asked = {name: name in self.method.reads for name in RANKS} | {"rank": True}
        request = {"tokens": targets, "mask": mask, "t_base": 1.0, "factor": None, **asked}
        scores = model(**inputs, hapo_score=request)
        outputs = FusedCausalLMOutput(
            log_probs=scores["logp"],
            entropy=scores["entropy"],
            is_top1=(scores["rank"] == 1) & mask,
            label_mask=mask,
        )
        return outputs, {name: scores[name] for name in RANKS if scores[name] is not None}

    def _weighted(self, outputs: Any, ranks: dict[str, Tensor], gates: GateLogits | None = None) -> Any:
        """The outputs with the method's loss in the place of the log-probs, whose sum TRL takes."""
        mask, entropy, train = outputs.label_mask, outputs.entropy.detach(), self.model.training
        batch = TokenBatch(mask=mask, logp=outputs.log_probs, entropy=entropy, totals=ONE)
        out = self.method.loss(batch.replace(**ranks))
        loss, sums = out.loss, {}
        if self.method.weight is not None:
            sums["weight"] = out.tokens["weight"].sum()
        for name, weight, value in gate_losses(gates, batch, self.accelerator.unwrap_model(self.model)):
            sums[name] = value
            if weight and train:
                loss = loss + weight * value
        kept = self._sums["train" if train else "eval"]
        for name, value in sums.items():
            of_batch = torch.stack([value.detach().float(), mask.sum().float()])
            kept[name] = kept[name] + of_batch if name in kept else of_batch
        outputs.log_probs = -loss.unsqueeze(0)
        return outputs

    def _open_records(self, checkpoint: str | None) -> None:
        net, args = self.accelerator.unwrap_model(self.model), self.args
        self._run_folder = open_records(
            args, self.method, self.recipe, net, self._given or self.train_dataset, checkpoint
        )
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        self._records = TargetRecorder(
            self._run_folder,
            self.method,
            args.record_tokens_every,
            args.record_tokens_rows,
            args.process_index,
            args.world_size,
            tokenizer.batch_decode,
        )

    def _card(self) -> tuple[dict[str, Any], dict[str, Any]]:
        data = self._given or self.train_dataset
        measured = [line for line in self.state.log_history if "eval_loss" in line][-1:]
        losses = [f"{line['eval_loss']:.4f} nats per target, after step {line['step']}" for line in measured]
        facts = {"training demonstrations": length(data), "held-out loss": losses[0] if losses else None}
        return facts, {}

    def _layout(self) -> dict[str, Any]:
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "packing", "padding_free")
        return {"processes": self.accelerator.num_processes, **{n: getattr(self.args, n) for n in names}}

    def _run_state(self) -> RunState:
        sums = {
            f"{SUMS}{name}": self.accelerator.reduce(x, "sum").tolist() for name, x in self._sums["train"].items()
        }
        seen = {f"{SUMS}tokens": [self._total_train_tokens]}
        return RunState(metrics={**self._metrics["train"], **sums, **seen}, loss=self._loss_sums())

    def _take_up(self, state: RunState) -> None:
        """Put the trainer where a checkpoint left it; the first rank has the sums of all."""
        kept = {name: x for name, x in state.metrics.items() if not name.startswith(SUMS)}
        sums = {name.removeprefix(SUMS): x for name, x in state.metrics.items() if name.startswith(SUMS)}
        self._metrics["train"] = defaultdict(list, kept)
        self._total_train_tokens = sums.pop("tokens")[0]
        first, device = self.accelerator.is_main_process, self.accelerator.device
        self._sums["train"] = {name: torch.tensor(x, device=device) * first for name, x in sums.items()}
        self.add_callback(OnceAtBegin(partial(self._restore_loss, state.loss)))

    def _check_parallelism(self) -> None:
        config = self.accelerator.parallelism_config
        if config is None:
            return
        if has_gates(self.model) and (config.sp_enabled or config.cp_enabled):
            raise ValueError(
                "the gates of a GateRA adapter are not read in sequences that are cut over ranks: set sp_size=1 "
                "and cp_size=1"
            )
        if config.sp_enabled or (config.cp_enabled and self.method.reads & RANKS):
            raise ValueError(
                f"method {self.method.name!r} cannot be trained with sequences that are cut over ranks: set "
                + ("sp_size=1 and cp_size=1" if self.method.reads & RANKS else "sp_size=1")
            )


def _resolve(method: Supervised | None, args: SupervisedConfig) -> Supervised:
    """The method that a trainer was given, or that its config names."""
    if method is None:
        method = supervised(args.method, **(args.method_options or {}))  # type: ignore[arg-type]
    if not isinstance(method, Supervised):
        raise TypeError(
            f"method must be a Supervised, got {method!r}; a name goes into SupervisedConfig(method=...), and "
            "policy methods into HAPOTrainer"
        )
    if part_of(method.reduce) is not token_mean:
        raise ValueError(
            f"method {method.name!r} reduces by {method.stages['reduce']}, and a row of a packed batch is no "
            "sequence: take token_mean"
        )
    return method

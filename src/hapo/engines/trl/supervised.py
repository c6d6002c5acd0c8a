"""`SupervisedTrainer`: TRL's `SFTTrainer` with the loss of a `Supervised` method, and its `SupervisedConfig`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
from . import optimizer

RANKS = frozenset({"rank", "expected_rank"})
"""What TRL's own pass does not give."""

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

    def __post_init__(self) -> None:
        """TRL's checks, then ours."""
        with optimizer.checked(self):
            super().__post_init__()
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


class SupervisedTrainer(optimizer.NamedOptimizer, SFTTrainer):
    """TRL's `SFTTrainer` with the loss of a supervised method; all else is TRL's.

    The loss of an optimiser step is normalised by its targets, over all micro-batches and ranks, whatever the
    model says of itself. So the gradient does not depend on accumulation, packing or ranks. Methods that read
    ranks are scored by `hapo.scoring`, the others by TRL's fused head; neither makes all logits.

    Args:
        method: a `Supervised` object, in the place of `args.method` and `args.method_options`.
        model, args, ...: as in `SFTTrainer`; `args` is a `SupervisedConfig`.

    Raises:
        ValueError: what is asked for cannot be honoured; the message says what to do.
    """

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
        args = copy.copy(args)
        args.loss_type = "nll"  # TRL then sums the log-probs and divides; any weight is the method's
        super().__init__(model, args, *trl_args, **trl_kwargs)
        self._check_parallelism()
        # Some models say that they take no token counts (`accepts_loss_kwargs = False`), and TRL then divides each
        # micro-batch by its own; others are of no known loss, and the first column is counted as targets.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        if self.method.reads & RANKS:
            if self.aux_loss_enabled:
                raise ValueError(
                    f"method {self.method.name!r} reads ranks, whose pass has no router loss: set "
                    "router_aux_loss_coef=0.0"
                )
            attach_scoring(self.model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's, which sums the log-probs of the targets: the model hands it the method's sum in their place."""

        def with_method(**inputs: Any) -> Any:
            if not inputs.get("fused_lm_head"):
                return model(**inputs)
            outputs = self._scores(model, inputs) if self.method.reads & RANKS else (model(**inputs), {})
            return self._weighted(*outputs)

        return super().compute_loss(with_method, inputs, return_outputs, num_items_in_batch)

    def _scores(self, model: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        """One pass of `hapo.scoring` in the form of TRL's, and the ranks."""
        inputs = {name: x for name, x in inputs.items() if name != "fused_lm_head"}
        targets = inputs.pop("labels")[:, 1:]
        mask = targets != -100
        asked = {name: name in self.method.reads for name in RANKS} | {"rank": True}
        request = {"tokens": targets, "mask": mask, **asked}
        scores = model(**inputs, hapo_score=request)
        outputs = FusedCausalLMOutput(
            log_probs=scores["logp"],
            entropy=scores["entropy"],
            is_top1=(scores["rank"] == 1) & mask,
            label_mask=mask,
        )
        return outputs, {name: scores[name] for name in RANKS if scores[name] is not None}

    def _weighted(self, outputs: Any, ranks: dict[str, Tensor]) -> Any:
        """The outputs with the method's loss in the place of the log-probs, whose sum TRL takes."""
        mask, entropy = outputs.label_mask, outputs.entropy.detach()
        batch = TokenBatch(mask=mask, logp=outputs.log_probs, entropy=entropy, totals=ONE)
        out = self.method.loss(batch.replace(**ranks))
        if self.method.weight is not None:
            total, n = (self.accelerator.gather_for_metrics(x.sum()).sum() for x in (out.tokens["weight"], mask))
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["weight"].append((total / n).item() if n else 0.0)
        outputs.log_probs = -out.loss.unsqueeze(0)
        return outputs

    def _check_parallelism(self) -> None:
        config = self.accelerator.parallelism_config
        if config is None:
            return
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

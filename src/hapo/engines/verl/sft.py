"""verl's SFT trainer with a supervised method in the place of its loss: `python -m hapo.verl_sft`.

Its `TrainingWorker.set_loss_fn` is the hook: data, engine, optimiser, checkpoints, validation and trackers are
verl's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxtyping import Bool
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.sft_trainer import SFTTrainer

import hapo

from ...batch import StepTotals, TokenBatch
from ...methods._options import check_names
from ...supervised import Supervised
from .config import NAME, select


class SupervisedSFTTrainer(SFTTrainer):
    """verl's `SFTTrainer`, whose loss is the method's of `+hapo.method` and `+hapo.options`."""

    def _build_engine(self) -> None:
        super()._build_engine()
        self.loss_fn = partial(supervised_loss, supervised_of(OmegaConf.to_container(self.config)))
        self.training_client.set_loss_fn(self.loss_fn)


def supervised_of(config: Any) -> Supervised:
    """The method of verl's SFT configuration, checked.

    Raises:
        ValueError: no supervised method, one that reads what verl does not give, or an option not honoured.
    """
    section: Mapping[str, Any] = config.get(NAME) or {}
    check_names("the section hapo of the configuration", section, ["method", "options"])
    known = hapo.methods("supervised")
    if section.get("method") not in known:
        raise ValueError(
            f"verl's SFT trainer needs a supervised method, got {section.get('method')!r}: set +hapo.method to "
            f"one of {', '.join(known)}"
        )
    method = hapo.method(section["method"], **section.get("options", {}))
    assert isinstance(method, Supervised)
    if method.reads:
        raise ValueError(
            f"method {method.name!r} reads the {' and the '.join(sorted(method.reads))} of each target, and "
            "verl's SFT hands its loss log-probs alone: use hapo.trl.SupervisedTrainer"
        )
    for path, served in (("engine.strategy", ("fsdp", "fsdp2")), ("data.pad_mode", ("no_padding",))):
        if select(config, path) not in served:
            raise ValueError(f"{path}={select(config, path)} was not tested: set {' or '.join(served)}")
    return method


def supervised_loss(
    method: Supervised, model_output: Mapping[str, Tensor], data: TensorDict, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """This micro-batch's share of the optimiser step's loss, times the ranks, over which verl averages gradients.

    Its rows are one packed row; a target's log-prob stands at the token before it. The normaliser is verl's count
    of `loss_mask` over all micro-batches and ranks.
    """
    mask, tokens, ranks = targets(data["loss_mask"]), data["batch_num_tokens"], data["dp_size"]
    rows = len(data["loss_mask"])  # counts of rows are of no supervised method's normaliser
    batch = TokenBatch(
        mask=mask.unsqueeze(0),
        logp=model_output["log_probs"].values().unsqueeze(0),
        totals=StepTotals(rows, tokens, tokens),
    )
    return method.loss(batch).loss * ranks, {}  # verl's SFT trainer adds up no metrics over micro-batches


def targets(loss_mask: Any) -> Bool[Tensor, " N"]:
    """Where the next token of the same row is a target, of a nested mask; nowhere at a row's end."""
    mask: Tensor = loss_mask.values().bool().roll(-1)
    mask[loss_mask.offsets()[1:] - 1] = False
    return mask

"""Token records of an asynchronous run: hands the rows of a pass to `hapo.engines.records`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ....batch import LossOutput, TokenBatch
from ...records import RunRecords
from .config import AsyncHAPOConfig
from .rows import Inputs, Terms, context_ids


class AsyncRecorder:
    """Feeds a run folder with the tokens of some optimiser steps, each of which is a rollout batch of its own.

    Args:
        records: the open folder.
        args: how often, and how many rows.
        tempered: whether tokens are drawn at a temperature that the trainer is not told.
        decode: rows of token ids -> strings.
    """

    def __init__(
        self,
        records: RunRecords,
        args: AsyncHAPOConfig,
        tempered: bool,
        decode: Callable[[Sequence[Any]], list[str]],
    ) -> None:
        self.records, self.args, self.tempered, self.decode = records, args, tempered, decode

    def takes(self, step: int) -> bool:
        """Whether an optimiser step, from 1, is one to record."""
        every = self.args.record_tokens_every
        return bool(every) and (step == 1 or step % every == 0)

    def add(
        self,
        step: int,
        inputs: Inputs,
        row: int,
        rows: Int[Tensor, " b"],
        batch: TokenBatch,
        out: LossOutput,
        valid: Bool[Tensor, "b T"],
        staleness: Int[Tensor, "b T"],
    ) -> None:
        """Tokens of one pass.

        Args:
            step: the optimiser step at work, from 1.
            inputs: the micro-batch.
            row: the packed row of the pass.
            rows: the micro-batch's responses that are in it.
            batch: they, with the current policy's scores.
            out: their loss.
            valid: their trained tokens, those of dropped groups included.
            staleness: how many versions older than the policy the weights were that drew each token.
        """
        number = inputs["number"][0][rows]
        most = max(1, self.args.record_tokens_rows // self.args.num_generations) * self.args.num_generations
        kept = number < most
        if not kept.any():
            return
        terms = Terms.of(inputs, row)
        shape = (len(inputs["number"][0]), valid.shape[1])
        places = terms.spread(terms.place, shape)[rows]
        labels = inputs["shift_labels"][row][inputs["attention_mask"][row].bool()]
        ids = labels[places].masked_fill(~valid, 0)
        prompts = [context_ids(inputs, row, int(first)) for first in places[:, 0]]
        batch = batch.rows(kept)
        self.records.add_tokens(
            step,
            step,
            batch,
            {**{name: x[kept] for name, x in out.tokens.items()}, "staleness": staleness[kept]},
            mask=valid[kept] & batch.scored.unsqueeze(1),
            response=number[kept],
            responses=self.responses,
            ids=ids[kept],
            texts=[self.decode([[token] for token in one]) for one in ids[kept].tolist()],
            prompts=self.decode([prompt for prompt, take in zip(prompts, kept.tolist(), strict=True) if take]),
            temperature=None if self.tempered else torch.full(ids[kept].shape, self.args.temperature),
        )

    responses = 0
    """Rows of the optimiser step that could be scored."""

"""Token records of verl's actors: each rank hands its rows to `hapo.engines.records`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict

from ...batch import TokenBatch
from ...method import LossOutput, Method
from ..records import RunRecords
from .columns import prompts_of
from .plan import RolloutPlan


class TokenRecorder:
    """The tokens of one optimiser step on one rank."""

    def __init__(self, plan: RolloutPlan, step: int, tokenizer: Any) -> None:
        assert plan.record is not None
        self.plan, self.step, self.tokenizer = plan, step, tokenizer
        self.records = RunRecords(Path(plan.record), dist.get_rank())

    def add(self, batch: TokenBatch, out: LossOutput, data: TensorDict, method: Method) -> None:
        """The rows of a micro-batch that are of the recorded groups."""
        chosen = data.select("responses", "response_mask")
        rows = (data["hapo_group"] < self.plan.groups).nonzero().squeeze(1)
        if not len(rows):
            return
        padded = chosen.to_padded_tensor()
        index = rows.tolist()
        ids = padded["responses"][rows].cpu()
        prompts = prompts_of(data)
        batch = batch.rows(rows)
        assert batch.old_entropy is not None
        temperature = torch.full_like(batch.old_entropy, self.plan.t_base)
        if method.temperature_rule is not None and self.plan.sampled_with is not None:
            temperature = temperature * method.temperature_rule(batch.old_entropy, self.plan.sampled_with)
        decode = self.tokenizer.batch_decode
        mask = padded["response_mask"][rows].bool() & batch.scored.unsqueeze(1)
        response = data["hapo_response"][rows]
        self.records.add_rewards(self.plan.step, batch, mask, response, self.plan.responses)
        self.records.add_tokens(
            self.step,
            self.plan.step,
            batch,
            {name: x[rows] for name, x in out.tokens.items()},
            mask=mask,
            response=response,
            responses=self.plan.responses,
            ids=ids,
            texts=[decode([[t] for t in row]) for row in ids.tolist()],
            prompts=decode([prompts[i] for i in index]),
            temperature=temperature,
        )

    def write(self) -> None:
        """At the end of the step."""
        (self.records.folder / "tokens").mkdir(parents=True, exist_ok=True)
        self.records.write_tokens(self.step)

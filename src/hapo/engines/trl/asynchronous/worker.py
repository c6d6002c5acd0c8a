"""TRL's rollout loop, which also says of every token which weights drew it, and sends the temperature rule.

It runs in the process that `AsyncRolloutWorker` starts. What is overridden: the request for one turn, and the
samples that are made of a scored group.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from trl.experimental.async_grpo.async_rollout_worker import (
    RolloutGroup,
    RolloutSample,
    TrainingSequence,
    _AsyncRolloutLoop,
)

UNKNOWN = -1
"""Version of the weights behind a token that was not drawn, or of which nobody told."""

COMPLETIONS, GENERATE = "/v1/completions", "/inference/v1/generate"


class DrawnLogp(float):
    """A log-prob, nats, that carries the version of the weights that drew its token through TRL's lists."""

    version: int

    def __new__(cls, value: float, version: int) -> DrawnLogp:
        """The number, with a version beside it."""
        self = super().__new__(cls, value)
        self.version = version
        return self


@dataclass(slots=True)
class WholeGroupSample(RolloutSample):
    """TRL's sample of a conversation, one row of it, and what it needs to be put together again."""

    response: int = 0
    """Which conversation of its group the row is of."""
    of_group: int = 0
    """Rows of the whole group."""
    versions: np.ndarray | None = None
    """Version of the weights behind each token (L,), `UNKNOWN` of the context."""


class VersionedLoop(_AsyncRolloutLoop):
    """TRL's loop of generation and scoring.

    Args:
        labelled: the server says which weights drew each token (`weight_versions`, vLLM 0.32): turns are asked for
            by its token interface, which answers that; TRL asks by `/v1/completions`, which does not. Where False,
            a token's version is the newest when its turn was asked for.
        rule_file: where the trainer writes the temperature rule (`TemperatureRule.save`); None: no rule.
        trls: what TRL gives to its loop.
    """

    def __init__(self, *, labelled: bool = False, rule_file: str | None = None, **trls: Any) -> None:
        super().__init__(**trls)
        self.labelled = labelled
        self.rule_file = None if rule_file is None else Path(rule_file)

    async def _post(
        self, path: str, payload: dict[str, Any], timeout: float, max_retries: int = 3
    ) -> dict[str, Any]:
        if path != COMPLETIONS:
            return await super()._post(path, payload, timeout, max_retries)
        asked_of, rule = self.model_version, self._rule()
        if self.labelled:
            answer = await super()._post(GENERATE, generate_request(payload, rule), timeout, max_retries)
        else:
            payload = payload | {"vllm_xargs": rule} if rule else payload
            answer = await super()._post(path, payload, timeout, max_retries)
        (choice,) = answer["choices"]
        found = choice["logprobs"]
        logps = [token["logprob"] for token in found["content"]] if self.labelled else found["token_logprobs"]
        versions = versions_of(choice.get("weight_versions"), len(logps), asked_of)
        choice["logprobs"] = {"token_logprobs": [*map(DrawnLogp, logps, versions)]}
        return answer

    def _rule(self) -> dict[str, Any]:
        """The rule as it is now; none before the first step has statistics."""
        if self.rule_file is None or not self.rule_file.exists():
            return {}
        return json.loads(self.rule_file.read_text())

    async def _score_group(self, group: RolloutGroup) -> list[RolloutSample]:
        for sequences in group.completions_sequences:
            if not sequences:  # nothing to learn from, but its reward counts in the group
                sequences.append(TrainingSequence(self.eos_token_ids[:1], [0], [0.0], ""))
        samples = await super()._score_group(group)
        rows = [(i, row) for i, conversation in enumerate(group.completions_sequences) for row in conversation]
        return [
            WholeGroupSample(
                *(getattr(sample, f.name) for f in fields(RolloutSample)),
                response=i,
                of_group=len(rows),
                versions=np.array([getattr(x, "version", UNKNOWN) for x in row.old_log_probs], dtype=np.int64),
            )
            for sample, (i, row) in zip(samples, rows, strict=True)
        ]


def generate_request(payload: dict[str, Any], rule: dict[str, Any]) -> dict[str, Any]:
    """A request of TRL's to /v1/completions as one to vLLM's token interface, with the rule in `extra_args`."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "logprobs", "seed")
    sampling = {name: payload[name] for name in names if name in payload} | {"detokenize": False}
    if rule:
        sampling["extra_args"] = rule
    return {"model": payload["model"], "token_ids": payload["prompt"], "sampling_params": sampling}


def versions_of(spans: list[dict[str, Any]] | None, tokens: int, asked_of: int) -> list[int]:
    """The version behind each token; `asked_of` where a span has a label that is no number, or none is told."""
    versions = [asked_of] * tokens
    for span in spans or []:
        if span["version"].isdecimal():
            versions[span["start"] : span["end"]] = [int(span["version"])] * (span["end"] - span["start"])
    return versions

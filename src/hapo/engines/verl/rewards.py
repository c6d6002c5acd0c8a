"""Scores by token from a reward function of verl's: the reward manager "hapo_tokens".

verl carries one number a response from its reward functions to its trainers, and sets it on the last token. This
manager sends the sum as that number, and the scores as text among the reward's infos, where text is carried along
and averaged nowhere. `Driver.place_scores` puts them into `rm_scores`, where those of a reward manager that
overrides verl's `assemble_rm_scores`, for a colocated reward model, stand anyway.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from verl.experimental.reward_loop.reward_manager import register
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

from ...tasks.per_token import fault, tokens_of

MANAGER = "hapo_tokens"
"""`reward.reward_manager.name`."""
COLUMN = "token_scores"
"""Of the reward's infos: the text of `packed`; empty where the function returned a number."""


@register(MANAGER)
class TokenRewardManager(NaiveRewardManager):
    """verl's own manager, for functions that may return a list in the place of a number, one score for each token.

    A list may be what the function returns, or its `score`; `extra_info["response_ids"]` has the tokens.
    """

    async def run_single(self, data: Any) -> dict[str, Any]:
        """
        Raises:
            ValueError: a list is not as long as the response, or holds what is no finite number.
        """
        row = data[-1]  # of a session of several outputs verl scores the last
        length = int(row.batch["attention_mask"][-row.batch["responses"].shape[-1] :].sum())
        told = dict(row.non_tensor_batch.get("extra_info") or {})
        told["response_ids"] = row.batch["responses"][:length].tolist()
        data = data[-1:]
        data.non_tensor_batch["extra_info"] = np.array([told], dtype=object)
        result = await super().run_single(data)
        infos, tokens = result["reward_extra_info"], tokens_of(result["reward_score"])
        if tokens is None:
            return {**result, "reward_extra_info": {**infos, COLUMN: ""}}
        if wrong := fault(tokens, length):
            raise ValueError(
                f"the reward function {wrong}. A list has one finite number for each id of "
                'extra_info["response_ids"]; return a number for the response as a whole'
            )
        total = math.fsum(tokens)
        infos = {name: total if tokens_of(info) == tokens else info for name, info in infos.items()}
        return {"reward_score": total, "reward_extra_info": {**infos, COLUMN: packed(tokens)}}


def packed(scores: Sequence[float]) -> str:
    """Float32 as text."""
    return base64.b64encode(zlib.compress(np.array(scores, np.float32).tobytes())).decode()


def unpacked(text: str) -> np.ndarray:
    """The scores of `packed`, float32."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.float32)


def token_scores(infos: Sequence[Mapping[str, Any]], scores: Float[Tensor, "B T"]) -> Float[Tensor, "B T"] | None:
    """verl's scores, with those by token in the rows that have them; None where no row has."""
    out = None
    for row, info in enumerate(infos):
        if text := info.get(COLUMN):
            out = scores.clone() if out is None else out
            own = torch.from_numpy(unpacked(str(text)).copy())
            out[row] = torch.nn.functional.pad(own, (0, scores.shape[1] - len(own)))
    return out

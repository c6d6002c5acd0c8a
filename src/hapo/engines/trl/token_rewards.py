"""Rewards per token: a reward function of TRL's may return a list for a completion in the place of a number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor, nn
from trl.trainer.utils import is_async_callable

from ...parts.credit import last_token, onto_valid_tokens
from ...tasks.per_token import fault, outcome_of, tokens_of

LOG = logging.getLogger(__name__)


class TokenRewards:
    """Keeps the lists that reward functions return, and hands TRL their sums."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._kept: dict[tuple[int, int], list[float]] = {}
        self._names: dict[int, str] = {}
        self._seen = self._said = False

    def watched(self, functions: Sequence[Any], names: Sequence[str]) -> list[Any]:
        """The functions, which may return lists from now on; reward models stay as they are."""
        out = []
        for i, (function, name) in enumerate(zip(functions, names, strict=True)):
            kind = Later if is_async_callable(function) else Now
            take = partial(self._take, i, name)
            out.append(function if isinstance(function, nn.Module) else kind(function, name, take))
        return out

    def begin(self) -> None:
        """Forget the lists of the last rollout."""
        self._kept, self._names = {}, {}

    def of(
        self,
        per_func: Float[Tensor, "B K"],
        weight: Float[Tensor, " K"],
        mask: Bool[Tensor, "B T"],
        *,
        wanted: bool,
    ) -> Float[Tensor, "B T"] | None:
        """The reward of each token, of these rows of this rank; None where no function gave any, on no rank.

        A number stands on the last valid token of its completion. Rewards of several functions are weighed and
        added up. A reward on a token that the policy did not write, the output of a tool, goes to the last valid
        token before it. The sum over the tokens is the outcome, up to rounding; the number itself where there is
        no list.

        Args:
            per_func: outcome of each function, NaN where it does not apply.
            weight: of each function.
            mask: valid response tokens.
            wanted: the method reads them: give them in any case.
        """
        found = torch.tensor(float(bool(self._kept)), device=mask.device)
        self._seen |= bool(self.accelerator.reduce(found, "sum") > 0)
        if not self._seen and not wanted:
            return None
        if self._kept and not wanted:
            self._say_that_they_are_summed()
        numbers, per_token = per_func.clone(), torch.zeros(mask.shape, device=mask.device)
        for (function, row), values in self._kept.items():
            numbers[row, function] = torch.nan
            given = torch.tensor(values, device=mask.device)[: mask.shape[1]]
            per_token[row, : len(given)] += weight[function] * given
        on_last = (numbers * weight).nansum(1, keepdim=True)
        return onto_valid_tokens(per_token, mask) + torch.where(last_token(mask), on_last, 0.0)

    def _take(self, function: int, name: str, values: Any, ids: Sequence[Sequence[int]]) -> list[Any]:
        """Outcomes of what a function returned; its lists are kept.

        Raises:
            ValueError: a list is not as long as its completion, or holds what is no finite number.
        """
        outcomes = []
        for row, value in enumerate(values):
            tokens = tokens_of(value)
            if tokens is not None and row < len(ids):
                if wrong := fault(tokens, len(ids[row])):
                    raise ValueError(
                        f"the reward function {name!r} {wrong} (row {row} of {len(ids)}, counted from 0). A list "
                        "has one finite number for each id of completion_ids; return a number for the completion "
                        "as a whole, or None where the reward does not apply"
                    )
                self._kept[function, row] = [float(x) for x in tokens]
                self._names[function] = name
            outcomes.append(outcome_of(value))
        return outcomes

    def _say_that_they_are_summed(self) -> None:
        if not self._said:
            self._said = True
            names = ", ".join(map(repr, self._names.values()))
            LOG.warning(
                f"{names} returned rewards per token, of which the method takes the sum: "
                'method_options={"advantage": "token_reward"} lets each token learn from its own. Said once'
            )


class Now:
    """A reward function whose lists are taken."""

    def __init__(self, function: Callable[..., Any], name: str, take: Callable[[Any, Any], list[Any]]) -> None:
        self.__name__, self.function, self._take = name, function, take

    def __call__(self, *, completion_ids: Any, **columns: Any) -> list[Any]:
        """What TRL reads: a number or None a completion."""
        return self._take(self.function(completion_ids=completion_ids, **columns), completion_ids)


class Later(Now):
    """The same of an async function."""

    async def __call__(self, *, completion_ids: Any, **columns: Any) -> list[Any]:  # type: ignore[override]
        """What TRL awaits."""
        return self._take(await self.function(completion_ids=completion_ids, **columns), completion_ids)

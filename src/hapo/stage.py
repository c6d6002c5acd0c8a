"""What a stage of a `Method` reads, the record, and how a part becomes one, `Stage`.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from torch import Tensor

from .batch import TOKEN_FIELDS, TokenBatch, masked, working_dtype
from .parts.turns import turn_index

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from .batch import EntropyStats, StepTotals
    from .parts.bounds import Bounds

When = Literal["prepare", "step", "loss"]
"""A stage is made of the rollout batch, of an optimiser step with the current policy, or of each micro-batch."""

MISSING = {
    "logp": "the log-prob of each token under the current policy",
    "old_logp": "the log-prob of each token under the policy at rollout",
    "reward": "the outcome reward of each response (B,); without it, token_reward gives it as its sum",
    "token_reward": "the reward of each token (B,T), where the reward side attributes one",
    "turn": "the number of the turn that each token is of (B,T)",
    "group": "the prompt id of each response (B,): equal ids are samples of one prompt",
    "ref_logp": "the log-prob of each token under the reference policy; give it, or kl_coef=0 for no penalty",
    "sampler_logp": "the log-prob of each token under the distribution that drew it",
    "rewards": "the reward of each function (B,K), before they are weighted and added up",
    "old_entropy": "the policy's entropy at rollout, nats, taken in the same pass as old_logp",
    "entropy": "the current policy's entropy, nats, taken in the same pass as logp",
    "rank": "the rank of each token in the current distribution; score_hidden(..., rank=True) gives it",
    "expected_rank": "the rank that the distribution expects; score_hidden(..., expected_rank=True) gives it",
    "signal": "the stage `signal` makes it, at prepare(), step() or loss() as `signal_at` says",
    "returns": "the stage `credit` makes it of token_reward, in prepare() before the advantage",
    "advantage": "the stage `advantage` makes it, in prepare()",
    "weight": "prepare() makes it where sampler_logp is given and sampler_cap is not None",
    "keep": "the stage `select` makes it, at prepare(), step() or loss() as `select_at` says",
    "stats": "the stage `stats` makes it, in prepare()",
    "totals": "step() makes it",
    "ratio": "the stage `ratio` makes it, in loss()",
    "bounds": "the stage `bounds` makes it, in loss() after the ratio",
}
"""Field of the record -> where it comes from."""

SOURCE = {"verdict": "reward", "drawn_logp": "old_logp"}
"""Field that stands for another where nobody gave it -> that other."""


class MissingFieldError(ValueError, AttributeError):
    """A stage read a field of the record that nobody gave or made."""


class Record:
    """What a stage reads: the fields of a `TokenBatch`, and what the stages before it have made, by name.

    Tensors per token are float32 (float64 stays) and 0 outside the mask, whatever stood there. `logp` alone has a
    gradient, and none outside the mask. `verdict` is the reward where no verdict was given; `drawn_logp` is
    `sampler_logp` where it is known, else `old_logp`; `turn` numbers the runs of valid tokens where no numbers
    were given. `ratio` and `bounds` exist in loss(), the ratio with its gradient. `returns` is not 0 outside the
    mask: a response that has ended still stands there for its group. `stats` is None where no token is valid.

    Raises:
        MissingFieldError: on reading a field that nobody gave or made; it says where the field comes from.
    """

    if TYPE_CHECKING:
        mask: Bool[Tensor, "B T"]
        logp: Float[Tensor, "B T"]
        old_logp: Float[Tensor, "B T"]
        ref_logp: Float[Tensor, "B T"]
        sampler_logp: Float[Tensor, "B T"]
        old_entropy: Float[Tensor, "B T"]
        entropy: Float[Tensor, "B T"]
        rank: Float[Tensor, "B T"]
        expected_rank: Float[Tensor, "B T"]
        drawn_logp: Float[Tensor, "B T"]
        reward: Float[Tensor, " B"]
        rewards: Float[Tensor, "B K"]
        verdict: Float[Tensor, " B"]
        token_reward: Float[Tensor, "B T"]
        returns: Float[Tensor, "B T"]
        group: Int[Tensor, " B"]
        turn: Int[Tensor, "B T"]
        advantage: Float[Tensor, "B T"]
        signal: Float[Tensor, "B T"]
        weight: Float[Tensor, "B T"]
        keep: Bool[Tensor, "B T"]
        stats: EntropyStats | None
        totals: StepTotals
        ratio: Float[Tensor, "B T"]
        bounds: Bounds

    def __init__(self, method: str, batch: TokenBatch) -> None:
        self._method = method
        self._batch = batch
        self.mask = batch.mask

    def __getattr__(self, name: str) -> Any:
        """A field that was not read before; from then on it is an attribute like any other."""
        if name not in FIELDS:
            raise AttributeError(f"a record has no field {name!r}")
        value = self._given(name)
        if value is None:
            self.check(name)
        if name in TOKEN_FIELDS or name == "drawn_logp":
            value = masked(value if name == "logp" else value.detach(), self.mask)
        elif name in ("reward", "verdict"):
            value = value.to(working_dtype(value))
        setattr(self, name, value)
        return value

    def check(self, *names: str) -> None:
        """Find out whether fields are there, without making them.

        Raises:
            MissingFieldError: one is not.
        """
        for name in names:
            nothing_to_count = name == "stats" and not self.mask.any()
            if name not in self and not nothing_to_count:
                if name not in FIELDS:
                    raise AttributeError(f"a record has no field {name!r}")
                why = MISSING[SOURCE.get(name, name)]
                raise MissingFieldError(
                    f"method {self._method!r} reads TokenBatch.{name}, and it is missing: {why}"
                )

    def __contains__(self, name: str) -> bool:
        return name in vars(self) or name == "turn" or self._given(name) is not None

    def _given(self, name: str) -> Any:
        if name == "drawn_logp":
            return self._batch.old_logp if self._batch.sampler_logp is None else self._batch.sampler_logp
        value = getattr(self._batch, name, None)
        if name == "turn" and value is None:
            return turn_index(self.mask)
        return self._batch.reward if value is None and name == "verdict" else value


FIELDS = frozenset({"mask", "verdict", *MISSING, "drawn_logp"})
"""What a stage can read."""

Out = TypeVar("Out")


class Stage(Generic[Out]):
    """A part as a stage: `part(record.a, record.b, ..., **options)` for the named fields, in order.

    >>> Stage(constant_bounds, "ratio", low=0.2, high=0.28)

    Any function of the record is a stage too. This one can be pickled, and prints as the part with its fields
    and options, those at the part's own defaults left out.

    Raises:
        ValueError: the record has no field of this name.
    """

    def __init__(self, part: Callable[..., Out], *reads: str, **options: Any) -> None:
        for name in reads:
            if name not in FIELDS:
                raise ValueError(f"a record has no field {name!r}; its fields: {', '.join(sorted(FIELDS))}")
        self.part, self.reads, self.options = part, reads, options

    def __call__(self, batch: Record) -> Out:
        """What the part makes of the record."""
        return self.part(*(getattr(batch, name) for name in self.reads), **self.options)

    def __repr__(self) -> str:
        return call(self.part, self.reads, self.options)


def part_of(stage: Any) -> Any:
    """The part that a `Stage` is made of; any other stage itself."""
    return stage.part if isinstance(stage, Stage) else stage


def describe(stage: Any) -> str:
    """A stage in words: a `Stage`, a dataclass or a partial with its options, any other function by its name."""
    if isinstance(stage, partial):
        return call(stage.func, (), stage.keywords)
    if isinstance(stage, Stage) or is_dataclass(stage):
        return repr(stage)
    return getattr(stage, "__name__", type(stage).__name__)


def call(part: Callable[..., Any], reads: tuple[str, ...], options: dict[str, Any]) -> str:
    """`part(a, b, option=value)`, without the options that stand at the part's defaults."""
    defaults = {name: p.default for name, p in inspect.signature(part).parameters.items()}
    told = [f"{name}={value!r}" for name, value in options.items() if defaults.get(name, ...) != value]
    arguments = ", ".join([*reads, *told])
    return f"{part.__name__}({arguments})" if arguments else part.__name__

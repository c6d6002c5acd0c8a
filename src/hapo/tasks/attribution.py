"""Which tokens of a completion made its score: channels of attribution for any score of whole completions.

The dense rewards of arXiv 2504.16272 spread the score r = f(1) of a reward model over the T tokens of a completion.
f(z) is the score with the tokens where z = 0 replaced by a mask token; prompt, padding and special tokens always stay.

>>> channels = Attribution(score, channels=("shap", "lime", "sparse"), samples=256, mask_id=0)
>>> found = channels(prompt_ids, completion_ids)[0]
>>> found.score, found.empty, found.channels["shap"], found.gap, found.passes
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .shapley import Masks, Values, all_masks, lime, shapley

Score = Callable[[list[list[int]]], Sequence[float]]
"""Scores of rows of token ids, prompt and completion in one; a number a row."""

CHANNELS = ("shap", "lime", "attention", "sparse")


@dataclass(frozen=True)
class Attributed:
    """What the channels say about one completion of T tokens. Plain numbers: nothing has a gradient."""

    score: float
    """r = f(1), in the unit of the score."""
    empty: float
    """f(0): every token masked that may be; NaN where no channel needs it."""
    channels: dict[str, list[float]]
    """Channel -> T numbers; 0 at special tokens. Channels that need a score which is not finite hold NaN."""
    gap: float
    """Additivity gap of the Shapley values, sum_t phi_t - (f(1) - f(0)); NaN without them."""
    passes: int
    """Rows that the score function was given for this completion; 0 where all were known."""

    @property
    def finite(self) -> bool:
        """Whether every channel is; shaping takes the sparse reward where one is not."""
        return all(math.isfinite(x) for row in self.channels.values() for x in row)


@dataclass
class _Game:
    """The set function of one completion; its players are the tokens that may be masked."""

    prompt: list[int]
    completion: list[int]
    places: list[int]
    """Of the players in the completion."""
    scores: dict[bytes, float] = field(default_factory=dict)
    """Bits of a mask -> f there."""
    passes: int = 0

    def row(self, bits: bytes, mask_id: int) -> list[int]:
        """Token ids in which the players that do not play are masked."""
        tokens = list(self.completion)
        for place, plays in zip(self.places, bits, strict=True):
            if not plays:
                tokens[place] = mask_id
        return self.prompt + tokens

    def values(self, masks: Masks) -> Values:
        """f at these masks."""
        return np.array([self.scores[mask.tobytes()] for mask in masks])

    def spread(self, phi: Values) -> list[float]:
        """A number a token, from a number a player."""
        row = np.zeros(len(self.completion))
        row[self.places] = phi
        return row.tolist()


class Attribution:
    """Channels of attribution over the tokens of completions.

    - shap: Shapley values phi_t of the game f; of a completion with at most log2(samples) tokens the exact ones.
    - lime: coefficients of the local linear model (`hapo.tasks.shapley.lime`).
    - sparse: r on the last token, 0 elsewhere: the ordinary reward.

    Args:
        score: of rows of token ids.
        channels: some of CHANNELS.
        samples: most masks per completion for each of shap and lime.
        seed: of the masks that are drawn. What a completion gets depends on it and on the completion alone.
        cache: folder that keeps what was computed, across restarts; None keeps nothing.
        batch_size: most rows in a call of `score`.
        mask_id: token id that stands for a masked token; None takes the score's own.
        special_ids: token ids that are never masked, such as the end of the sequence; None takes the score's own,
            or none.

    Raises:
        ValueError: an unknown channel, a size below 1, or no mask token.
    """

    def __init__(
        self,
        score: Score,
        channels: Sequence[str] = ("shap", "lime", "sparse"),
        *,
        samples: int = 256,
        seed: int = 0,
        cache: Path | str | None = None,
        batch_size: int = 256,
        mask_id: int | None = None,
        special_ids: Collection[int] | None = None,
    ) -> None:
        if unknown := [name for name in channels if name not in CHANNELS]:
            raise ValueError(f"there is no channel {unknown[0]!r}: choose among {', '.join(CHANNELS)}")
        if not channels or len(set(channels)) < len(channels):
            raise ValueError(f"channels must name each at most once and at least one, got {list(channels)}")
        if samples < 2 or batch_size < 1:
            raise ValueError(f"samples must be at least 2 and batch_size 1, got {samples} and {batch_size}")
        mask_id = getattr(score, "mask_id", None) if mask_id is None else mask_id
        if mask_id is None:
            raise ValueError("nothing to mask tokens with: give mask_id, a token id that stands for no token")
        self.mask_id = mask_id
        self.special_ids = frozenset(getattr(score, "special_ids", ()) if special_ids is None else special_ids)
        self.channels = tuple(channels)
        self._score = score
        self._samples = samples
        self._seed = seed
        self._batch_size = batch_size

    def __call__(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[Attributed]:
        """What the channels say about each completion, in their order.

        Raises:
            ValueError: prompts and completions differ in number, or the score returns another number of scores
                than it was given rows.
        """
        if len(prompt_ids) != len(completion_ids):
            raise ValueError(f"{len(prompt_ids)} prompts and {len(completion_ids)} completions: give one each")
        rows = [(tuple(p), tuple(c)) for p, c in zip(prompt_ids, completion_ids, strict=True)]
        games = {row: self._game(*row) for row in rows}
        plans = {row: self._masks(game) for row, game in games.items()}
        self._play([(games[row], mask) for row, masks in plans.items() for mask in masks])
        return [self._attributed(games[row]) for row in rows]

    def _game(self, prompt: Sequence[int], completion: Sequence[int]) -> _Game:
        places = [i for i, token in enumerate(completion) if token not in self.special_ids]
        return _Game(list(prompt), list(completion), places)

    def _masks(self, game: _Game) -> Masks:
        players = len(game.places)
        if not {"shap", "lime"} & set(self.channels):
            return np.ones((1, players), bool)
        if 2**players > self._samples:
            raise ValueError(f"{players} tokens need more than samples={self._samples} masks")
        return all_masks(players)

    def _play(self, wanted: Sequence[tuple[_Game, np.ndarray]]) -> None:
        """Score what is not known yet, each row once, in as few calls as there are full batches."""
        missing = {(id(game), mask.tobytes()): game for game, mask in wanted if mask.tobytes() not in game.scores}
        todo = [(game, bits) for (_, bits), game in missing.items()]
        for start in range(0, len(todo), self._batch_size):
            batch = todo[start : start + self._batch_size]
            found = list(self._score([game.row(bits, self.mask_id) for game, bits in batch]))
            if len(found) != len(batch):
                raise ValueError(f"the score returned {len(found)} numbers for {len(batch)} rows")
            for (game, bits), value in zip(batch, found, strict=True):
                game.scores[bits] = float(value)
                game.passes += 1

    def _attributed(self, game: _Game) -> Attributed:
        players = len(game.places)
        full = game.scores[b"\x01" * players]
        empty = game.scores.get(b"\x00" * players, math.nan)
        channels: dict[str, list[float]] = {}
        for name in self.channels:
            if name == "sparse":
                channels[name] = [0.0] * (len(game.completion) - 1) + [full] * bool(game.completion)
                continue
            values = game.values(all_masks(players))
            if not np.isfinite(values).all():
                channels[name] = [math.nan] * len(game.completion)
            else:
                channels[name] = game.spread(
                    shapley(values) if name == "shap" else lime(all_masks(players), values)[1]
                )
        gap = math.fsum(channels["shap"]) - (full - empty) if "shap" in channels else math.nan
        return Attributed(full, empty, channels, gap, game.passes)


def seed_of(seed: int, *rows: Sequence[int]) -> int:
    """A seed for one completion, from its tokens, so that it does not depend on what else is in the batch."""
    text = repr((seed, [list(row) for row in rows])).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1

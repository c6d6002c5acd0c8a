"""The game of one completion, as explainers play it: scores are looked up, and what is missing is noted.

An explainer is run again from its beginning whenever the scores that it lacked are there. So the masks of several
completions and explainers go through the score together, and what a kill left unfinished is taken up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .shapley import Masks, Values


class UnknownScoreError(Exception):
    """Scores are missing: play them and begin again."""


class NoScoreError(Exception):
    """A score that is not finite: there is no attribution."""


@dataclass
class Played:
    """The game of one completion, and its scores as far as they are known."""

    prompt: list[int]
    completion: list[int]
    players: list[list[int]]
    """Places in the completion of each player's tokens."""
    key: str
    """Hash of prompt and completion."""
    scores: dict[bytes, float] = field(default_factory=dict)
    """Mask -> f there, a byte a player."""
    missing: dict[bytes, None] = field(default_factory=dict)
    """Masks that an explainer asked for, in its order."""
    found: dict[str, Values] = field(default_factory=dict)
    """Channel -> a number a player."""
    passes: int = 0

    def __call__(self, masks: Masks) -> Values:
        """f at these masks, for an explainer."""
        bits = [mask.tobytes() for mask in np.ascontiguousarray(masks, dtype=bool)]
        if unknown := [one for one in bits if one not in self.scores]:
            self.missing.update(dict.fromkeys(unknown))
            raise UnknownScoreError
        values = np.array([self.scores[one] for one in bits], dtype=float)
        if not np.isfinite(values).all():
            raise NoScoreError
        return values

    def row(self, bits: bytes, mask_id: int) -> list[int]:
        """Token ids, those of players who do not play masked."""
        tokens = list(self.completion)
        for places, plays in zip(self.players, bits, strict=True):
            for place in places if not plays else ():
                tokens[place] = mask_id
        return self.prompt + tokens

    def per_token(self, phi: Values) -> list[float]:
        """The tokens of a player have equal parts of its number."""
        row = [0.0] * len(self.completion)
        for places, value in zip(self.players, phi, strict=True):
            for place in places:
                row[place] = float(value) / len(places)
        return row

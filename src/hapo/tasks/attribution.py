"""Which tokens of a completion made its score: channels of attribution, for any score of whole completions.

The dense rewards of arXiv 2504.16272 spread the score r = f(1) of a reward model over the T tokens of a
completion. f(z) is the score where the tokens with z = 0 are replaced by a mask token; the prompt and special
tokens stay.

>>> channels = Attribution(RewardModel.load(reward_model_path()), samples=256)
>>> found = channels(prompt_ids, completion_ids)[0]
>>> found.score, found.empty, found.channels["shap"], found.gap, found.passes
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from .explainers import Explainer, local_model, shapley_values
from .played import NoScoreError, Played, UnknownScoreError
from .score_cache import ScoreCache

Score = Callable[[list[list[int]]], Sequence[float]]
"""Scores of rows of token ids, prompt and completion in one; a number a row. `RewardModel` is one."""

CHANNELS = ("shap", "lime", "attention", "sparse")

PER_PLAYER = 4
"""Masks that each player has at least: a longer completion has players of several neighbouring tokens."""
AT_ONCE = 2**23
"""Tokens of masked completions that are held at once."""
LEAST_BAR = 4096
"""Rows below which no progress is shown."""


@dataclass(frozen=True)
class Attributed:
    """What the channels say about one completion of T tokens. Plain numbers: nothing has a gradient."""

    score: float
    """r = f(1), in the unit of the score."""
    empty: float
    """f(0), every player masked; NaN where no channel needs it."""
    channels: dict[str, list[float]]
    """Channel -> T numbers; 0 at special tokens. One that met a score which is not finite is NaN throughout."""
    gap: float
    """Additivity gap of the channel shap, sum_t phi_t - (f(1) - f(0)); NaN without it."""
    players: int
    """Players of the game: the tokens that may be masked, or fewer where players are of several tokens."""
    passes: int
    """Rows that the score was asked for on behalf of this completion; 0 where all was known."""

    @property
    def finite(self) -> bool:
        """Whether every channel is. Shaping takes the sparse reward in the place of one that is not."""
        return all(math.isfinite(x) for row in self.channels.values() for x in row)

    def mixture(self, weights: Mapping[str, float]) -> list[float]:
        """sum_k w_k c_kt, T numbers: the additive form of the shaped reward, of channels in the unit of the score.

        A channel that is not finite gives way to the sparse reward. The shares of the normalised form are made by
        `hapo.parts.credit`.

        Raises:
            ValueError: a weight for a channel that was not asked for.
        """
        if unknown := sorted(set(weights) - set(self.channels)):
            raise ValueError(f"there is no channel {unknown[0]!r} here, only {', '.join(self.channels)}")
        mixed = np.zeros(len(next(iter(self.channels.values()))))
        sparse = np.zeros_like(mixed)
        sparse[-1:] = self.score
        for name, weight in weights.items():
            row = np.array(self.channels[name])
            mixed = mixed + weight * (row if np.isfinite(row).all() else sparse)
        return mixed.tolist()


class Attribution:
    """Channels of attribution over the tokens of completions.

    - shap: Shapley values (`explainers.shapley_values`): exact where 2^n <= samples for n tokens, else estimated.
    - lime: coefficients of the local linear model (`explainers.local_model`).
    - attention: of the last layer of a `RewardModel`, mean of its heads, from where the score is read.
    - sparse: r on the last token, 0 elsewhere: the ordinary reward.

    Equal rows are scored once, whichever channels and completions ask for them, and a call of `score` holds masks
    of several completions. What a completion gets depends on it, on the seed and on the options alone, up to what
    the score makes of another neighbour in the batch.

    Args:
        score: of rows of token ids, higher is better.
        channels: some of CHANNELS, or names in `explainers`.
        samples: most masks of a completion for each explainer. A player has at least PER_PLAYER of them: of more
            tokens than samples / PER_PLAYER, neighbours play as one and have equal parts of its number.
        seed: of the masks that are drawn.
        cache: folder that keeps scores and results, so that a kill loses at most one call of `score`; None keeps
            nothing.
        batch_size: most rows in a call of `score`.
        mask_id: token id in the place of a masked token; None takes the score's own, which `RewardModel` has.
        special_ids: token ids that are never masked, such as the end of the sequence; None takes the score's own,
            or none.
        identity: what tells this score from others in the cache; None takes the score's own.
        explainers: name -> explainer, for further channels, or in the place of the two that there are. In a cache
            one is known by its name.
        progress: a bar, on a terminal, where there is much to do.

    Raises:
        ValueError: an unknown channel, a size out of range, no mask token, a score without attention, or a cache
            for a score without identity.
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
        identity: str | None = None,
        explainers: Mapping[str, Explainer] | None = None,
        progress: bool = True,
    ) -> None:
        self.explainers: dict[str, Explainer] = {"shap": shapley_values, "lime": local_model, **(explainers or {})}
        known = list(dict.fromkeys([*CHANNELS, *self.explainers]))
        if unknown := [name for name in channels if name not in known]:
            raise ValueError(f"there is no channel {unknown[0]!r}: choose among {', '.join(known)}")
        if not channels or len(set(channels)) < len(channels):
            raise ValueError(f"channels must name one or more, each once, got {list(channels)}")
        if samples < 2 * PER_PLAYER or batch_size < 1:
            raise ValueError(
                f"samples must be at least {2 * PER_PLAYER} and batch_size 1, got {samples} and {batch_size}"
            )
        if "attention" in channels and not hasattr(score, "attention"):
            raise ValueError("the channel attention needs a hapo.tasks.reward_model.RewardModel: leave it out")
        mask_id = getattr(score, "mask_id", None) if mask_id is None else mask_id
        if mask_id is None:
            raise ValueError("nothing to mask tokens with: give mask_id, the id of a token that means nothing")
        self.channels = tuple(channels)
        self.samples = samples
        self.seed = seed
        self.mask_id = mask_id
        self.special_ids = frozenset(getattr(score, "special_ids", ()) if special_ids is None else special_ids)
        self._score = score
        self._batch_size = batch_size
        self._progress = progress
        self._cache: ScoreCache | None = None
        if cache is not None:
            own = getattr(score, "identity", None) if identity is None else identity
            if own is None:
                raise ValueError("a cache must know which score it keeps: give identity, a text that says so")
            self._cache = ScoreCache(cache, _hash(own, mask_id, sorted(self.special_ids)))

    def __call__(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[Attributed]:
        """What the channels say about each completion, in their order.

        Raises:
            ValueError: prompts and completions differ in number, the score returns another number of scores than
                it was given rows, or an explainer asks for other masks whenever it is called.
        """
        if len(prompt_ids) != len(completion_ids):
            raise ValueError(f"{len(prompt_ids)} prompts and {len(completion_ids)} completions: give one each")
        rows = [
            (tuple(map(int, prompt)), tuple(map(int, completion)))
            for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
        ]
        done: dict[tuple[tuple[int, ...], ...], Attributed] = {}
        todo: dict[tuple[tuple[int, ...], ...], Played] = {}
        for row in rows:
            if row in done or row in todo:
                continue
            game = self._game(*row)
            kept = self._cache and self._cache.result(self._key(game))
            if kept:
                done[row] = Attributed(**{**kept, "passes": 0})
            else:
                todo[row] = game
        for some in self._in_parts(list(todo)):
            games = [todo.pop(row) for row in some]
            done.update(zip(some, self._attributed(games), strict=True))
        out = []
        for row in rows:
            out.append(done[row])
            done[row] = replace(done[row], passes=0)  # the same completion again
        return out

    def between_seeds(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> list[dict[str, float]]:
        """How far chance in the masks moves the channels: of each completion, channel -> the root mean square over
        its tokens of the standard deviation (divisor n - 1) between these seeds, in the unit of the score.

        It costs an attribution for each seed; an exact channel has 0.

        Raises:
            ValueError: fewer than two seeds.
        """
        if len(set(seeds)) < 2:
            raise ValueError(f"the spread between seeds needs at least two, got {list(seeds)}")
        own, found = self.seed, []
        try:
            for self.seed in seeds:
                found.append(self(prompt_ids, completion_ids))
        finally:
            self.seed = own
        return [
            {name: _deviation([one.channels[name] for one in same]) for name in self.channels}
            for same in zip(*found, strict=True)
        ]

    def _game(self, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Played:
        places = [place for place, token in enumerate(completion) if token not in self.special_ids]
        count = min(len(places), self.samples // PER_PLAYER)
        players = [part.tolist() for part in np.array_split(np.array(places, dtype=int), count)] if count else []
        return Played(list(prompt), list(completion), players, _hash(prompt, completion))

    def _key(self, game: Played) -> str:
        return _hash(game.key, self.channels, self.samples, self.seed)

    def _in_parts(self, rows: list[tuple[tuple[int, ...], ...]]) -> Iterator[list[tuple[tuple[int, ...], ...]]]:
        """Short completions first, for little padding; few enough at once that their masks fit into memory."""
        part: list[tuple[tuple[int, ...], ...]] = []
        size = 0
        for row in sorted(rows, key=lambda row: len(row[0]) + len(row[1])):
            part.append(row)
            size += 2 * self.samples * (len(row[1]) + 1)
            if size > AT_ONCE:
                yield part
                part, size = [], 0
        if part:
            yield part

    def _attributed(self, games: Sequence[Played]) -> list[Attributed]:
        for game in games:
            if self._cache:
                game.scores.update(self._cache.scores(self._scores_key(game)))
            game.missing[b"\x01" * len(game.players)] = None
            if self._explained:
                game.missing[b"\x00" * len(game.players)] = None
        for _ in range(self.samples):  # an explainer may look at some scores before it asks for others
            for game in games:
                self._explain(game)
            self._play([(game, bits) for game in games for bits in game.missing if bits not in game.scores])
            for game in games:
                game.missing.clear()
            if all(len(game.found) == len(self._explained) for game in games):
                break
        else:
            raise ValueError("an explainer asks for other masks whenever it is called: let it use its seed alone")
        attention = self._attention(games) if "attention" in self.channels else [[]] * len(games)
        return [self._result(game, weights) for game, weights in zip(games, attention, strict=True)]

    @property
    def _explained(self) -> list[str]:
        return [name for name in self.channels if name in self.explainers]

    def _scores_key(self, game: Played) -> str:
        return _hash(game.key, len(game.players))

    def _explain(self, game: Played) -> None:
        """Let each explainer go as far as the scores that are known."""
        for name in self._explained:
            if name in game.found:
                continue
            players = len(game.players)
            try:
                seed = int(_hash(self.seed, game.key)[:8], 16)  # below 2^32, as libraries want it
                game.found[name] = np.asarray(self.explainers[name](game, players, self.samples, seed), float)
            except UnknownScoreError:
                continue
            except NoScoreError:
                game.found[name] = np.full(players, math.nan)

    def _play(self, todo: Sequence[tuple[Played, bytes]]) -> None:
        """Score these rows, equal ones once, in full batches; keep the scores of each at once."""
        of_row: dict[tuple[int, ...], list[tuple[Played, bytes]]] = {}
        for game, bits in todo:
            of_row.setdefault(tuple(game.row(bits, self.mask_id)), []).append((game, bits))
        rows = list(of_row)
        with _bar(len(rows), self._progress) as advance:
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                found = [float(x) for x in self._score([list(row) for row in batch])]
                if len(found) != len(batch):
                    raise ValueError(f"the score returned {len(found)} numbers for {len(batch)} rows: one each")
                kept = [(*one, x) for row, x in zip(batch, found, strict=True) for one in of_row[row]]
                for game, bits, value in kept:
                    game.scores[bits] = value
                for row in batch:
                    of_row[row][0][0].passes += 1
                if self._cache:
                    self._cache.add_scores((self._scores_key(game), bits, value) for game, bits, value in kept)
                advance(len(batch))

    def _attention(self, games: Sequence[Played]) -> list[list[float]]:
        weights: list[list[float]] = []
        for start in range(0, len(games), self._batch_size):
            some = games[start : start + self._batch_size]
            found = self._score.attention([game.prompt + game.completion for game in some])  # type: ignore[attr-defined]
            weights += [row[len(game.prompt) :] for game, row in zip(some, found, strict=True)]
        for game in games:
            game.passes += 1
        return weights

    def _result(self, game: Played, attention: list[float]) -> Attributed:
        score = game.scores[b"\x01" * len(game.players)]
        empty = game.scores.get(b"\x00" * len(game.players), math.nan)
        channels: dict[str, list[float]] = {}
        for name in self.channels:
            if name in self.explainers:
                phi = game.found[name]
                whole = bool(np.isfinite(phi).all())
                channels[name] = game.per_token(phi) if whole else [math.nan] * len(game.completion)
            elif name == "attention":
                masked = {place for places in game.players for place in places}
                channels[name] = [x if place in masked else 0.0 for place, x in enumerate(attention)]
            else:
                channels[name] = [*[0.0] * (len(game.completion) - 1), *[score] * bool(game.completion)]
        gap = math.fsum(channels["shap"]) - (score - empty) if "shap" in channels else math.nan
        found = Attributed(score, empty, channels, gap, len(game.players), game.passes)
        if self._cache:
            self._cache.add_result(self._key(game), asdict(found))
        return found


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, nothing elsewhere; gives the function that moves it."""
    if not shown or total < LEAST_BAR:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scores of masked completions", total=total)
        yield lambda n: bar.advance(task, n)


def _deviation(rows: Sequence[Sequence[float]]) -> float:
    """Root mean square over the columns of their standard deviation, exactly 0 for equal rows."""
    from_first = np.subtract(rows, rows[0])
    return float(np.sqrt(np.var(from_first, axis=0, ddof=1).mean())) if from_first.size else 0.0


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=list).encode()).hexdigest()

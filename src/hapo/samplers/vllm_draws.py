"""What vLLM knew of each token when it drew it: entropies and log-probs of the policy, which no release returns.

An engine in this process hands them over through the logits processor (`hapo.samplers.vllm`): no pass scores the
rollout again.

Shapes: N rows of logits, n logged rows of them, V vocabulary, B sequences, T tokens, K a request's top-k.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..parts.entropy import entropy_and_normaliser
from .decoding import Draws
from .rule import TemperatureRule

UNKNOWN = -1
"""vLLM's place holder for a token that is still on the device."""


@dataclass
class Asked:
    """A request in the engine, known by what it is of: vLLM tells a processor no name."""

    prompt: list[int] | None
    """None until its first row comes (Runner V2)."""
    drawn: list[int]
    """Its tokens so far, in Runner V1 vLLM's own list, which grows; in V2 filled in when the log is read."""
    top_k: int = 0
    """0: none."""
    figures: dict[int, list[float]] = field(default_factory=dict)
    """Position in the answer -> entropy, its factor on T_base, normalisers at T_base and as it was drawn."""
    largest: dict[int, tuple[Int[Tensor, " K"], Float[Tensor, " K"]]] = field(default_factory=dict)
    """With top-k: position -> the tokens with the largest logits, and these at T_base."""

    def is_of(self, completion: list[int]) -> bool:
        """Whether every position was seen, with the tokens before it.

        The last token is known where a further step was begun before the engine had read that this one ends the
        answer (asynchronous scheduling); that step's position lies behind the answer.
        """
        length = len(completion)
        drawn, last = self.drawn[: length - 1], self.drawn[length - 1 : length]
        seen = set(self.figures) - {length} == set(range(length))
        return seen and drawn == completion[:-1] and last in ([], [UNKNOWN], completion[-1:])


@dataclass(frozen=True)
class _Step:
    rows: list[tuple[Asked, int]]
    """Request and position of each logged row."""
    figures: Float[Tensor, "4 n"]
    fed: Int[Tensor, " n"] | None
    """The tokens before, in Runner V2."""
    largest: tuple[Int[Tensor, "n most"], Float[Tensor, "n most"]] | None
    """Of the largest top-k among the rows."""


class DrawLog:
    """Entropies and normalisers of the rows of an engine; nothing waits for the device before `draws`.

    With z the logits after vLLM's masks and biases, f the factor of the temperature rule (1 without one), a the
    token drawn and q its log-prob that vLLM returns (`processed_logprobs`, without truncation and penalties):

        H = entropy of softmax(z / T_base),   q = z_a / (T_base f) - logsumexp(z / (T_base f)),
        log p_a = f (q + logsumexp(z / (T_base f))) - logsumexp(z / T_base).

    Of a truncated draw the policy is over the support S, which vLLM tells after the draw. S is among the top-k
    logits, and they are kept: log p_S(a) = z_a / T_base - logsumexp over S of z / T_base.
    """

    def __init__(self) -> None:
        self._asked: dict[int, Asked] = {}  # by the identity of `drawn`
        self._steps: list[_Step] = []

    def begin(self, prompt: list[int] | None, drawn: list[int], top_k: int = 0) -> Asked:
        """A request enters the batch, or comes back with what it has drawn."""
        return self._asked.setdefault(id(drawn), Asked(prompt, drawn, max(0, top_k)))

    def temper_(
        self,
        logits: Float[Tensor, "n V"],
        factors: Sequence[tuple[TemperatureRule, Int[Tensor, " m"]]],
        t_base: Float[Tensor, " n"],
        rows: list[tuple[Asked, int]],
        fed: Int[Tensor, " n"] | None,
    ) -> None:
        """Divide logits by the factors of their rules in place, and keep what is known of them.

        Args:
            logits: of the logged rows.
            factors: rules and the rows that each acts on.
            t_base: temperature of each row.
            rows: request and position of each.
            fed: the token before each, where the engine tells (Runner V2).
        """
        entropy, normaliser = entropy_and_normaliser(logits, t_base)
        most, largest = min(max(asked.top_k for asked, _ in rows), logits.shape[1]), None
        if most > 0:
            values, tokens = logits.topk(most)
            largest = tokens.int(), values / t_base.unsqueeze(1)
        factor = torch.ones_like(entropy)
        for rule, which in factors:
            factor[which] = rule.factor(entropy[which])
        logits.div_(factor.unsqueeze(1))
        drawn_from = entropy_and_normaliser(logits, t_base)[1]
        self._steps.append(_Step(rows, torch.stack([entropy, factor, normaliser, drawn_from]), fed, largest))

    def draws(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
        logps: Sequence[list[float]],
        supports: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> Draws | None:
        """What was drawn for these prompts, with their log-probs as vLLM returned them.

        None where the log does not hold every token of them: a request that vLLM put off and began again.

        Args:
            prompts: token ids.
            completions: what was drawn, and is looked for.
            logps: of each token of them.
            supports: where top-k, top-p or min-p left out tokens, what they left to each; log-probs of the policy
                are then over it. The requests have a top-k.
        """
        self._read()
        of_prompt: dict[tuple[int, ...], list[Asked]] = defaultdict(list)
        for asked in self._asked.values():
            of_prompt[tuple(asked.prompt or ())].append(asked)
        size = (len(completions), max(map(len, completions), default=0))
        tokens, table = torch.zeros(size, dtype=torch.long), torch.zeros(5, *size, dtype=torch.float64)
        over = torch.zeros(size, dtype=torch.float64)
        for b, (prompt, completion, logp) in enumerate(zip(prompts, completions, logps, strict=True)):
            candidates = of_prompt[tuple(prompt)]
            found = next((asked for asked in candidates if asked.is_of(completion)), None)
            if found is None or any(q is None for q in logp):
                return None
            candidates.remove(found)
            length = len(completion)
            tokens[b, :length] = torch.tensor(completion)
            table[0, b, :length] = torch.tensor(logp, dtype=torch.float64)
            table[1:, b, :length] = torch.tensor([found.figures[t] for t in range(length)]).double().T
            if supports is not None and length > 0:
                ids, values = map(torch.stack, zip(*(found.largest[t] for t in range(length)), strict=True))
                over[b, :length] = logp_over(tokens[b, :length], supports[b], ids.long(), values.double())
        q, entropy, factor, normaliser, drawn_from = table
        policy = factor * (q + drawn_from) - normaliser if supports is None else over
        return Draws(tokens, q.float(), policy.float(), entropy.float())

    def _read(self) -> None:
        """Bring the steps from the device, in their order."""
        for step in self._steps:
            figures = step.figures.T.tolist()
            fed = [None] * len(step.rows) if step.fed is None else step.fed.tolist()
            largest = None if step.largest is None else [x.cpu() for x in step.largest]
            for row, ((asked, position), values, token) in enumerate(zip(step.rows, figures, fed, strict=True)):
                asked.figures[position] = values
                if largest is not None:
                    ids, logits = (x[row, : asked.top_k] for x in largest)
                    asked.largest[position] = ids, logits
                if token is not None and position > 0:
                    asked.drawn[position - 1 :] = [token]
        self._steps = []


def logp_over(
    tokens: Int[Tensor, " T"],
    support: Sequence[Sequence[int]],
    ids: Int[Tensor, "T K"],
    logits: Float[Tensor, "T K"],
) -> Float[Tensor, " T"]:
    """Log-probs of tokens, nats, over the support of each.

    A member that is not among the K is as likely as the last of them: top-k keeps what ties with it.

    Args:
        tokens: each in its support.
        support: token ids.
        ids: of the K largest logits.
        logits: these, at the temperature of the log-probs.
    """
    members = torch.full((len(tokens), 1 + max(map(len, support))), -1)
    members[:, 0] = tokens
    for row, of_token in zip(members, support, strict=True):
        row[1 : 1 + len(of_token)] = torch.tensor(of_token)
    ids, order = ids.sort(-1)
    place = torch.searchsorted(ids, members).clamp(max=ids.shape[1] - 1)
    known = ids.gather(1, place) == members
    logit = logits.gather(1, order).gather(1, place).where(known, logits.amin(1, keepdim=True))
    inside = logit[:, 1:].masked_fill(members[:, 1:] < 0, -torch.inf)
    return logit[:, 0] - inside.logsumexp(1)

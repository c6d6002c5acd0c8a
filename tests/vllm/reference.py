"""What a request must have been drawn from: transformers' forward and the rules, both written out."""

import math
from functools import cache

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from hapo.assets import tiny_model_path
from hapo.batch import EntropyStats
from hapo.methods._options import TemperatureOptions
from hapo.samplers.rule import TemperatureRule

STATS = EntropyStats(pivot=-0.5, sigma=1.0, h_max=1.2, h_min=-4.0)
BOUNDED = TemperatureRule(TemperatureOptions(tau=0.5), STATS)
ZSCORE = TemperatureRule(TemperatureOptions(tau=0.4, rule="zscore"), STATS)


def factor(rule: TemperatureRule, entropy: float) -> float:
    """The two rules of HAPO, for one token."""
    options, stats = rule.options, rule.stats
    d = math.log(max(entropy, 1e-8)) - stats.pivot
    if options.rule == "zscore":
        return min(max(1 + options.tau * d / stats.sigma, options.t_min), options.t_max)
    h = d / stats.h_max if d > 0 else d / -stats.h_min
    return 1 + options.tau * min(max(h, -1.0), 1.0)


def temperatures(logits: Tensor, rule: TemperatureRule | None, t_base: float) -> Tensor:
    """Temperature of each row, float64, as a column; 1 for greedy rows, which are not divided."""
    if t_base == 0:
        return torch.ones(len(logits), 1, dtype=torch.float64)
    p = (logits.double() / t_base).softmax(-1)
    entropy = torch.special.entr(p).sum(-1)
    t = [t_base * (1.0 if rule is None else factor(rule, h)) for h in entropy.tolist()]
    return torch.tensor(t, dtype=torch.float64).unsqueeze(-1)


def tempered(logits: Tensor, rule: TemperatureRule | None, t_base: float) -> Tensor:
    """Logits as they are drawn from, float64: divided by the temperature of their row."""
    return logits.double() / temperatures(logits, rule, t_base)


def truncated(logits: Tensor, top_p: float) -> Tensor:
    """Keeps the most likely tokens until their probability reaches top_p."""
    if top_p == 1:
        return logits
    p, order = logits.softmax(-1).sort(-1, descending=True)
    drop = (p.cumsum(-1) - p >= top_p).gather(-1, order.argsort(-1))
    return logits.masked_fill(drop, -torch.inf)


@cache
def model() -> LlamaForCausalLM:
    """The bundled tiny model."""
    return LlamaForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32).eval()


@torch.no_grad()
def logps(
    prompt: list[int], drawn: list[int], rule: TemperatureRule | None, t_base: float, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs of the whole vocabulary at each drawn token, and the temperature of each, a column."""
    logits = model()(torch.tensor([prompt + drawn])).logits[0, len(prompt) - 1 : -1]
    t = temperatures(logits, rule, t_base)
    return truncated(logits.double() / t, top_p).log_softmax(-1), t


FORWARD = 5e-4
"""What two float32 forward passes may differ by, nats (`largest_error`)."""

DRAWN = 1e-4
"""What the log-probs of tokens that were drawn may differ by, nats."""


def largest_error(found: Tensor, expected: Tensor, t: Tensor) -> float:
    """Largest |found - expected| x T of two tables of log-probs, over all tokens likelier than e^-20, drawn or not.

    The forward passes of two engines round differently, and a processor's instructions decide how. A logit's error
    enters the log-prob divided by T, most of all at unlikely tokens: so it is the error times T that has a bound.
    A rule that is ignored moves log-probs by more than 0.05. Tokens less likely than e^-20 need only be as low, and
    what top-p cuts off in one table must be cut off in the other.
    """
    possible = expected > -20.0
    assert (found[~possible] < -19.0).all() and (found[~expected.isfinite()] < -1000.0).all()
    return ((found.double() - expected) * t)[possible].abs().max().item()

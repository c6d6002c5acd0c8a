"""One turn of generation: who draws, at which temperature, and what is known of the draws afterwards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...batch import EntropyStats
from ...method import Method
from ...samplers.decoding import Draws
from ...samplers.transformers import NotSampledError, less_work, only_what_is_asked, sampling
from . import vllm
from .options import NO_TEMPERATURE
from .support import over

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is to be drawn."""

    net: nn.Module
    """The policy, without wrappers."""
    prompt_ids: list[list[int]]
    images: list[Any] | None
    """Of each prompt; None for text."""
    generate: Callable[[], tuple[list[list[int]], list[list[float]] | None]]
    """TRL's generation of this turn: completions, and log-probs where TRL knows them."""
    train: bool
    """False: an evaluation, which draws at T_base."""
    stats: EntropyStats | None
    """Of the last rollout batch; None at the first, and in an evaluation."""


class Turn(NamedTuple):
    """What one turn drew."""

    completion_ids: list[list[int]]
    """A row a prompt, end of sequence included, without padding."""
    logps: list[list[float]] | None
    """Log-probs in nats under the distribution that drew each token, with their supports where they are asked for;
    None where they are not known."""
    draws: Draws | None = None
    """The policy's own log-probs and entropies, where generation tells them: they may save a scoring pass."""


class Sampler:
    """`generate()` or continuous batching of transformers, with a temperature rule.

    A model whose `generate` is the user's own is taken at its word, as TRL does: its log-probs are not known, and
    the importance weight is 1.

    `HAPOTrainer.make_sampler` makes one; a subclass of both takes its place.

    Args:
        factor: the temperature rule, (entropies in nats, statistics) -> factors on T_base; None: T_base.
        support: whether the tokens that truncation leaves to each draw are asked for.

    Raises:
        ValueError: of `draw`, a temperature rule and a model whose `generate` is the user's own.
    """

    def __init__(self, factor: Callable[[Tensor, EntropyStats], Tensor] | None, support: bool = False) -> None:
        self.factor, self.support = factor, support
        self._said = False

    def draw(self, asked: Request) -> Turn:
        """One turn: call `asked.generate` once, or draw in another way."""
        with only_what_is_asked(asked.net):
            return self._draw(asked)

    def _draw(self, asked: Request) -> Turn:
        if not asked.train:
            with less_work(asked.net):
                return Turn(*asked.generate())
        factor, stats = self.factor, asked.stats
        rule = None if factor is None or stats is None else lambda entropy: factor(entropy, stats)
        try:
            with sampling(asked.net, rule, support=self.support) as record:
                completion_ids, logps = asked.generate()
        except NotSampledError:
            self._check_own_generate(asked.net)
            return Turn(completion_ids, logps)
        logps, draws = record.logps(completion_ids), record.draws
        if self.support and draws is not None and draws.support is not None:
            logps = over(logps, draws.support)
        return Turn(completion_ids, logps, draws)

    def _check_own_generate(self, net: nn.Module) -> None:
        name = type(net).__name__
        if self.factor is not None:
            raise ValueError(
                f"the generate() of this {name} is not transformers', and the temperature rule cannot act in it: "
                f"leave generate() as it is, or {NO_TEMPERATURE}"
            )
        if not self._said:
            self._said = True
            LOG.warning(
                f"the generate() of this {name} is not transformers': its draws are taken for those of the policy "
                "at T_base, without an importance weight. Said once"
            )


class VLLMSampler(Sampler):
    """TRL's vLLM, told the temperature rule with every request.

    Args:
        method: whose temperature rule it is.
        generation: TRL's `vllm_generation`.
        is_main: whether this process is the one that asks a server.
        support: whether the tokens that truncation leaves to each draw are asked for.
        log: keep what vLLM knew of each token at the draw, in place of a scoring pass; colocated vLLM only.

    Raises:
        ValueError: the server returns log-probs of another distribution than the one that drew the tokens; or, of
            `draw`, TRL would send images without the rule, or images come and nothing is scored.
        RuntimeError: vLLM does not run the processor of `hapo.samplers.vllm`.
    """

    def __init__(
        self, method: Method, generation: Any, is_main: bool, support: bool = False, log: bool = False
    ) -> None:
        super().__init__(method.temperature_rule, support)
        self.method, self.generation, self.log = method, generation, log
        vllm.attach(generation, method, is_main)
        if support and (is_main or generation.mode != "server"):
            vllm.take_supports(generation)

    def draw(self, asked: Request) -> Turn:
        """One turn."""
        if asked.images is not None:
            vllm.check_images(self.generation, self.method)
        vllm.send_rule(self.generation, self.method, asked.stats, support=self.support)
        if not self.log or not asked.train:
            return Turn(*asked.generate())
        if asked.images is not None:
            raise ValueError("score_rollouts=False takes text, and these prompts hold images: score the rollouts")
        drawn = vllm.generate_logged(self.generation.llm, asked.generate, asked.prompt_ids, support=self.support)
        turn = Turn(*drawn)
        if turn.draws is None and not self._said:
            self._said = True
            LOG.warning(
                "vLLM put off some request of this rollout, for want of memory, and what it knew of its first "
                "tokens is lost: such a rollout is scored. Said once; raise vllm_gpu_memory_utilization"
            )
        return turn

"""Adaptive temperature inside transformers generation, and the log-probs of the distribution that drew.

`generate()` and `generate_batch()` (continuous batching) both make their processors in the private method
`model._get_logits_processor`. `sampling` wraps it on the model instance while its `with` block lasts.
Tested with transformers 5.23.

Shapes: B sequences (in continuous batching: rows of one forward pass), T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMode

from ..parts.entropy import entropy_from_logits
from .rule import TemperatureRule

Factor = Callable[[Float[Tensor, " B"]], Float[Tensor, " B"]]
"""A law of `hapo.parts.temperature` with its statistics bound: entropies in nats -> factors > 0."""


class TemperedLogits(LogitsProcessor):
    """Divides the logits by factor(H), with H the entropy of softmax(logits / t_base) (HAPO, eq. 8).

    It stands first in the list, so that H is the policy's entropy before penalties, top-p and top-k. The base
    temperature is left to the warper of transformers further down: together T = t_base x factor(H).
    """

    supports_continuous_batching = True

    def __init__(self, factor: Factor, t_base: float = 1.0) -> None:
        self.factor = factor
        self.t_base = t_base
        self.called = False

    def __call__(self, input_ids: Int[Tensor, "*ids"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The logits of the next token, divided row by row; `input_ids` is not read."""
        self.called = True
        return scores / self.factor(entropy_from_logits(scores, self.t_base)).unsqueeze(-1)


class SamplingRecord(LogitsProcessor):
    """What one generation drew: the log-prob of each token under the distribution that it was drawn from.

    In `generate()` it stands last in the list and leaves the scores as they are. The token drawn at one step
    is the last column of `input_ids` at the next, so only the scores of the latest step are kept. In
    continuous batching rows are regrouped at every step: there the log-probs are those that transformers
    returns for each request, likewise of the final scores.
    """

    supports_continuous_batching = False

    def __init__(self) -> None:
        self.greedy = False
        self._logps: list[Float[Tensor, " B"]] = []
        self._last: tuple[Int[Tensor, "B T"], Float[Tensor, "B V"]] | None = None
        self._requests: list[tuple[list[int], list[float]]] | None = None

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """Records the token drawn at the step before, keeps this step's final scores and returns them."""
        if self._last is not None:
            ids, drawn_from = self._last
            rows, width = ids.shape
            if input_ids.shape != (rows, width + 1):
                raise ValueError(
                    f"input_ids went from {(rows, width)} to {tuple(input_ids.shape)} between two steps; "
                    "sampling() follows plain sampling only: one token a step, no assistant model, no beams"
                )
            self._logps.append(_logp(drawn_from, input_ids[:, -1]))
        self._last = input_ids, scores
        return scores

    @property
    def complete(self) -> bool:
        """Whether a generation was recorded, or was greedy, where nothing is drawn."""
        return self.greedy or self._last is not None or self._requests is not None

    def logps(self, completion_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs in nats of the drawn tokens, one for each token of `completion_ids`.

        `completion_ids` are the real tokens of each completion in generation order: end-of-sequence included,
        without prompt and without the padding of rows that ended early. They are compared with the draws.

        Raises RuntimeError if nothing was drawn (no generation yet, or a greedy one) and ValueError if
        `completion_ids` are not the tokens that were drawn.
        """
        if self.greedy:
            raise RuntimeError("greedy decoding draws no tokens; set do_sample=True for sampler log-probs")
        if self._requests is not None:
            drawn = self._requests
        elif self._last is not None:
            drawn = self._steps(*self._last, completion_ids)
        else:
            raise RuntimeError("nothing was generated yet; call generate() inside the block of sampling()")
        if len(completion_ids) != len(drawn):
            raise ValueError(f"{len(completion_ids)} completions, but {len(drawn)} sequences were drawn")
        for row, (given, (tokens, _)) in enumerate(zip(completion_ids, drawn, strict=True)):
            if list(given) != tokens[: len(given)]:
                raise ValueError(
                    f"completion {row} differs from the tokens that were drawn; "
                    "pass the real tokens in generation order, without prompt and padding"
                )
        return [logps[: len(given)] for given, (_, logps) in zip(completion_ids, drawn, strict=True)]

    def _steps(
        self, ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"], completion_ids: Sequence[Sequence[int]]
    ) -> list[tuple[list[int], list[float]]]:
        """Tokens and log-probs of each row; the last token, which no step followed, is from completion_ids."""
        before = len(self._logps)
        last = torch.zeros(len(ids), dtype=torch.long)
        for row, completion in enumerate(completion_ids[: len(ids)]):
            if len(completion) > before:
                last[row] = completion[before]
        logps = torch.stack([*self._logps, _logp(scores, last.to(scores.device))], dim=1).tolist()
        tokens = torch.cat([ids[:, ids.shape[1] - before :].cpu(), last[:, None]], dim=1).tolist()
        return list(zip(tokens, logps, strict=True))


@contextmanager
def sampling(model: Any, law: Factor | TemperatureRule | None = None) -> Iterator[SamplingRecord]:
    """Draw with temperature T_base x factor(H) inside the block, and record what was really drawn.

        with sampling(model, TemperatureRule.load("rule.json")) as record:
            ids = model.generate(**inputs, generation_config=config)
        logps = record.logps(completion_ids)

    `model` is a transformers model or a PEFT model around one; call its `generate()` or `generate_batch()`
    once inside the block. T_base is the temperature of the generation config. `law` is a rule, or a function
    from entropies to factors; with None (no statistics yet, evaluation) the temperature is exactly T_base.
    Greedy decoding is left untouched, law or not. Penalties act on the tempered logits; the recorded log-probs
    are of the final distribution, after temperature, penalties, top-p, top-k and min-p.

    Raises ValueError for decoding that is neither greedy nor plain sampling (beams, assisted), for a
    persistent manager and for a second generation in the block; RuntimeError if requests of a continuous batch
    failed, or if the block ends and no generation went through the processors. The instance is restored in
    every case.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    get_processors, generate_batch = core._get_logits_processor, core.generate_batch
    record = SamplingRecord()
    tempered: TemperedLogits | None = None
    factor = law.factor if isinstance(law, TemperatureRule) else law
    hooked = continuous = False

    def refuse_second() -> None:
        if hooked:
            raise ValueError("a second generation inside one sampling() block; open a block for each")

    def wrapped_processors(generation_config: GenerationConfig, **kwargs: Any) -> LogitsProcessorList:
        nonlocal tempered, hooked
        processors = get_processors(generation_config, **kwargs)
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
            raise ValueError(
                f"decoding mode {mode.value!r} has no adaptive temperature; "
                "use num_beams=1 without assisted decoding, or generate outside sampling()"
            )
        refuse_second()
        hooked = True
        record.greedy = mode == GenerationMode.GREEDY_SEARCH
        if record.greedy:
            return processors
        if factor is not None:
            t_base = generation_config.temperature
            tempered = TemperedLogits(factor, 1.0 if t_base is None else t_base)
            processors = [tempered, *processors]
        return LogitsProcessorList(processors if continuous else [*processors, record])

    def wrapped_batch(
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        nonlocal continuous
        if kwargs.get("persistent_manager"):
            raise ValueError("persistent_manager=True would keep this block's law for later batches; drop it")
        refuse_second()  # here too: a manager kept from before the block would not ask for processors
        continuous = True
        config = replace(continuous_batching_config or ContinuousBatchingConfig(), return_logprobs=True)
        outputs = generate_batch(inputs, generation_config, config, **kwargs)
        errors = [output.error for output in outputs.values() if output.error is not None]
        if errors or len(outputs) < len(inputs):
            raise RuntimeError(
                f"continuous batching finished {len(outputs) - len(errors)} of {len(inputs)} prompts; "
                f"first error: {next(iter(errors), 'none reported, see the log')}"
            )
        record._requests = [(output.generated_tokens, output.logprobs) for output in outputs.values()]
        return outputs

    with _replaced(core, _get_logits_processor=wrapped_processors, generate_batch=wrapped_batch):
        yield record
    if not (hooked and record.complete) or (tempered is not None and not tempered.called):
        raise RuntimeError(
            f"no generation of this {type(core).__name__} went through the processors of sampling(); call "
            "generate() or generate_batch() of the same instance in the block, without a persistent manager"
        )


def _logp(scores: Float[Tensor, "B V"], tokens: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """log softmax(scores) at one token a row, in nats."""
    return scores.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@contextmanager
def _replaced(instance: Any, **methods: Any) -> Iterator[None]:
    """Shadows methods of one instance; its former state comes back also after an exception."""
    attributes = vars(instance)
    former = {name: attributes[name] for name in methods if name in attributes}
    attributes.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del attributes[name]
        attributes.update(former)

"""Adaptive temperature inside transformers generation, and the log-probs of the distribution that drew.

While its `with` block lasts, `sampling` gives `generate()` of one model instance the decoding loop of
`samplers.decoding`. Continuous batching, `generate_batch()`, keeps its own: there the rule goes in front of the
processors that the private method `model._get_logits_processor` makes. Tested with transformers 5.23.

Shapes: n rows of one forward pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.generation import GenerationMode

from ..parts.entropy import entropy_from_logits
from .decoding import Draws, decode, decode_alike
from .rule import TemperatureRule

Factor = Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]
"""A rule of `hapo.parts.temperature` with its statistics bound: entropies in nats -> factors > 0."""

OWN_LOOP = frozenset({"assistant_model", "custom_generate", "streamer", "tokenizer"})
"""Arguments of generate() that ask for another loop than one token a step, or that only transformers' own
reads."""


class NotSampledError(RuntimeError):
    """A generation did not go through the loop of `sampling`: nothing is known of its draws."""


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

    def __call__(self, input_ids: Int[Tensor, "*ids"], scores: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """The logits of the next token, divided row by row; `input_ids` is not read."""
        self.called = True
        return scores / self.factor(entropy_from_logits(scores, self.t_base)).unsqueeze(-1)


class SamplingRecord:
    """What one generation drew: the log-prob of each token under the distribution that it was drawn from.

    `generate()` records the policy's own log-probs and entropies too, before rule, penalties and truncation, and
    the support of each draw where it is asked for. In continuous batching the log-probs are those that
    transformers returns for each request.
    """

    def __init__(self) -> None:
        self.greedy = False
        self.draws: Draws | None = None
        """Of `generate()`, one row a sequence."""
        self._requests: list[tuple[list[int], list[float]]] | None = None

    @property
    def complete(self) -> bool:
        """Whether a generation was recorded, or was greedy, where nothing is drawn."""
        return self.greedy or self.draws is not None or self._requests is not None

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
        elif self.draws is not None:
            drawn = list(zip(self.draws.tokens.tolist(), self.draws.logp.tolist(), strict=True))
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


@contextmanager
def sampling(
    model: Any, rule: Factor | TemperatureRule | None = None, *, support: bool = False
) -> Iterator[SamplingRecord]:
    """Draw with temperature T_base x factor(H) inside the block, and record what was really drawn.

        with sampling(model, TemperatureRule.load("rule.json")) as record:
            ids = model.generate(**inputs, generation_config=config)
        logps = record.logps(completion_ids)

    `model` is a transformers model or a PEFT model around one; call its `generate()` or `generate_batch()`
    once inside the block. T_base is the temperature of the generation config. `rule` has its statistics, or is a
    function from entropies to factors; with None (no statistics yet, evaluation) the temperature is exactly
    T_base. Greedy decoding is left untouched, rule or not. Penalties act on the tempered logits; the recorded
    log-probs are of the final distribution, after temperature, penalties, top-p, top-k and min-p.

    With `support` the record's `draws` hold the tokens that these left for each draw, and the policy's own
    log-probs over them (`hapo.scoring.score_hidden` says why).

    Raises ValueError for decoding that is neither greedy nor plain sampling (beams, assisted), for a
    persistent manager, for a second generation in the block, and for `generate_batch()` with `support`, which it
    does not tell; RuntimeError if more than `MOST_SUPPORT` tokens were left to a draw, if requests of a continuous
    batch failed, or if the block ends and no generation went through the processors (`NotSampledError`). The
    instance is restored in every case.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    get_processors, generate, generate_batch = core._get_logits_processor, core.generate, core.generate_batch
    record = SamplingRecord()
    tempered: TemperedLogits | None = None
    factor = rule.factor if isinstance(rule, TemperatureRule) else rule
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
        if generation_config.return_dict_in_generate:
            raise ValueError("sampling() returns token ids: set return_dict_in_generate=False and read the record")
        refuse_second()
        hooked = True
        record.greedy = mode == GenerationMode.GREEDY_SEARCH
        if continuous and factor is not None and not record.greedy:
            t_base = generation_config.temperature
            tempered = TemperedLogits(factor, 1.0 if t_base is None else t_base)
            processors = LogitsProcessorList([tempered, *processors])
        return processors

    def wrapped_generate(*args: Any, **kwargs: Any) -> Any:
        given = sorted(OWN_LOOP & {name for name, value in kwargs.items() if value is not None})
        if given:
            raise ValueError(
                f"sampling() follows plain sampling only, one token a step: no {', '.join(given)}; generate "
                "without, or outside sampling()"
            )
        return generate(*args, **kwargs, custom_generate=wrapped_loop)

    def wrapped_loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        if record.greedy:
            return decode_alike(model, input_ids, **kwargs)
        ids, record.draws = decode(model, input_ids, factor=factor, support=support, **kwargs)
        return ids

    def wrapped_batch(
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        nonlocal continuous
        if support:
            raise ValueError("generate_batch() tells no support of its draws: call generate(), or leave it out")
        if kwargs.get("persistent_manager"):
            raise ValueError("persistent_manager=True would keep this block's rule for later batches; drop it")
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

    with _replaced(
        core, _get_logits_processor=wrapped_processors, generate=wrapped_generate, generate_batch=wrapped_batch
    ):
        yield record
    if not (hooked and record.complete) or (tempered is not None and not tempered.called):
        raise NotSampledError(
            f"no generation of this {type(core).__name__} went through the processors of sampling(); call "
            "generate() or generate_batch() of the same instance in the block, without a persistent manager"
        )


IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""What of a model's own generation config is the model's to say."""

SILENT = {*IDS, "transformers_version", "do_sample", "use_cache", "max_length", "max_new_tokens"}
"""What of it is not worth a word; nor is what begins as in `asked_by_model`."""


def asked_by_model(config: GenerationConfig | None) -> dict[str, Any]:
    """What a model's own generation config (`generation_config.json`) asks for beyond its token ids."""
    told = {} if config is None else config.to_diff_dict()
    quiet = ("_", "output_", "return_", "cache")
    return {k: v for k, v in told.items() if k not in SILENT and not k.startswith(quiet) and v is not None}


def say_what_model_asked(config: GenerationConfig | None) -> str:
    """A sentence on what of the model's own generation config does not act; empty where it asks for nothing."""
    asked = ", ".join(f"{name}={value!r}" for name, value in asked_by_model(config).items())
    return (
        asked
        and f"the model's generation_config.json asks for {asked}: only what you set acts, so none of it does"
    )


def ids_only(config: GenerationConfig | None) -> GenerationConfig:
    """A model's own generation config without what changes the distribution that is drawn from."""
    return GenerationConfig(**{name: getattr(config, name, None) for name in IDS})


@contextmanager
def only_what_is_asked(model: Any) -> Iterator[None]:
    """Inside the block generation takes from the model's own generation config its token ids alone.

    transformers fills what a call leaves open from there: penalties, min-p, beams, suppressed tokens, ...
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = core.generation_config
    core.generation_config = ids_only(own)
    try:
        yield
    finally:
        core.generation_config = own


@contextmanager
def less_work(model: Any) -> Iterator[None]:
    """Inside the block `generate()` of this instance draws in `decode_alike`, as transformers' own loop would.

    A model whose `generate` or `_sample` is its own is left alone: it need not draw as transformers does.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    loop = ("generate", "_sample")
    theirs = all(getattr(type(core), name, None) is getattr(GenerationMixin, name) for name in loop)
    if "generate" in vars(core) or not theirs:
        yield
        return
    with _replaced(core, generate=partial(core.generate, custom_generate=decode_alike)):
        yield


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

"""Adaptive temperature inside vLLM, unmodified: one logits processor for Model Runner V1 and V2.

vLLM finds it by the entry point `vllm.logits_processors` of this package; it acts on the requests whose
`SamplingParams.extra_args` hold a rule (`TemperatureRule.to_args`), and on no other. vLLM 0.24 to 0.33: Runner V1
in all of them, V2 from 0.31 (docs/engines.md says which were run, and which read).

Shapes: N rows of logits, V vocabulary.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import vllm
from jaxtyping import Float, Int
from torch import Tensor, device, float32, int64
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1

from ..versions import PAGE, check_vllm, one_runner
from .rule import TemperatureRule, temper_
from .vllm_draws import Asked, DrawLog

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

# The entry point must keep no vLLM from starting, so what a release has not is done without.
try:
    from vllm.utils.torch_utils import async_tensor_h2d
except ImportError:  # Older than any that takes a rule.
    async_tensor_h2d = None
try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2
except ImportError:  # Up to 0.30.
    ProcessorV2 = object

LOG = logging.getLogger(__name__)

Group = tuple[TemperatureRule, "Int[Tensor, ' n'] | None"]
"""A rule and the rows of logits that it acts on; None: all of them."""


class Tempered(NamedTuple):
    """What is kept of a request that samples."""

    rule: TemperatureRule | None
    t_base: float
    asked: Asked | None
    """Its place in the log, where there is one."""


class AdaptiveTemperature(ProcessorV1, ProcessorV2):
    """Divides the rows of a request by factor(H), so that its tokens are drawn at T_base x factor(H).

    H is the entropy of softmax(logits / T_base) with T_base the request's temperature, after vLLM's masks and
    biases and before its temperature, min-p, top-k and top-p. Requests without a rule, and greedy ones, are left
    as they are, bit for bit.

    In Runner V1 a request is known by its row, which changes; in V2 by its slot, which it keeps, and every step
    says which slot each row belongs to. If vLLM makes the processor twice for one engine, because it is named
    explicitly besides the entry point, then only the one made last acts.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device_or_states: device | LogitsProcRequestState,
        is_pin_memory: bool | None = None,
    ) -> None:
        self.log: DrawLog | None = None
        self._engine = vllm_config
        self._states = device_or_states
        self._requests: dict[int, Tempered] = {}
        self._slots: Sequence[int] | None = None
        self._groups: list[Group] = []
        self._t_base: Float[Tensor, " N"] | None = None
        _acting[id(vllm_config)] = self
        _say_which_runner()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request, at admission, whose rule is wrong or would not be applied.

        Raises:
            ValueError: with the reason; the server answers 400.
        """
        if TemperatureRule.from_args(sampling_params.extra_args) is None:
            return
        check_vllm(vllm.__version__)
        engine = _admitting_engine()
        if engine is None:
            return
        if engine.model_config.is_diffusion:
            raise ValueError("a diffusion model samples without logits processors: it has no adaptive temperature")
        if engine.speculative_config is not None and not engine.use_v2_model_runner:
            raise ValueError(
                "Model Runner V1 skips logits processors under speculative decoding, so that the adaptive "
                "temperature would not act: switch speculative decoding off, or use Model Runner V2"
            )

    def is_argmax_invariant(self) -> bool:
        """False: Runner V1 then hands over float32 logits before it divides by T_base, as V2 always does."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Runner V1: follow the requests from row to row, in the order removed, added, moved."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._requests.pop(row, None)
        for row, params, prompt, drawn in batch_update.added:
            self.add_request(row, params, prompt, drawn)
        for a, b, direction in batch_update.moved:
            from_a, from_b = self._requests.pop(a, None), self._requests.pop(b, None)
            if from_a is not None:
                self._requests[b] = from_a
            if from_b is not None and direction == MoveDirectionality.SWAP:
                self._requests[a] = from_b
        self._slots = None

    def add_request(
        self,
        req_idx: int,
        sampling_params: SamplingParams,
        prompt: list[int] | None = None,
        drawn: list[int] | None = None,
    ) -> bool:
        """Keep what the request in this slot asks for, in place of the one before; whether its logits change.

        `prompt` and `drawn`, a list that grows, come from Runner V1 only.
        """
        rule = TemperatureRule.from_args(sampling_params.extra_args)
        rule = rule if rule is not None and rule.options.acts else None
        self._slots = None
        if (rule is None and self.log is None) or sampling_params.sampling_type == SamplingType.GREEDY:
            self._requests.pop(req_idx, None)
            return False
        asked = None
        if self.log is not None:
            asked = self.log.begin(prompt, [] if drawn is None else drawn, sampling_params.top_k)
        self._requests[req_idx] = Tempered(rule, sampling_params.temperature, asked)
        return True

    def apply(self, logits: Float[Tensor, "N V"], ctx: LogitsContext | None = None) -> Float[Tensor, "N V"]:
        """Divide in place; `ctx` comes from Runner V2 only, and says which slot each row belongs to."""
        if not self._requests or _acting.get(id(self._engine)) is not self:
            return logits
        if ctx is None:
            slots = range(len(logits))
        elif len(logits) == len(ctx.idx_mapping_np):
            slots = ctx.idx_mapping_np.tolist()
        else:  # Speculative decoding: several rows a request, known on the device only.
            slots = ctx.expanded_idx_mapping.tolist()
        if self.log is not None:
            return self._apply_logged(self.log, logits, slots, ctx)
        if slots != self._slots:
            self._group(slots, logits.device)
        for rule, rows in self._groups:
            assert self._t_base is not None
            temper_(logits, rule, self._t_base, rows)
        return logits

    def _apply_logged(
        self, log: DrawLog, logits: Float[Tensor, "N V"], slots: Sequence[int], ctx: LogitsContext | None
    ) -> Float[Tensor, "N V"]:
        """The same, and what is known of each row goes into the log."""
        logged: list[tuple[int, Tempered, int]] = []
        for row, slot in enumerate(slots):
            request = self._requests.get(slot)
            if request is None or request.asked is None:
                continue
            position = len(request.asked.drawn) if ctx is None else self._position(request.asked, slot, row, ctx)
            if position >= 0:  # below: a part of a prompt
                logged.append((row, request, position))
        if not logged:
            return logits
        of_rule: dict[TemperatureRule, list[int]] = {}
        for i, (_, request, _) in enumerate(logged):
            if request.rule is not None:
                of_rule.setdefault(request.rule, []).append(i)
        on = logits.device
        rows = async_tensor_h2d([row for row, *_ in logged], on, int64)
        part = logits if len(logged) == len(logits) else logits[rows]
        log.temper_(
            part,
            [(rule, async_tensor_h2d(which, on, int64)) for rule, which in of_rule.items()],
            async_tensor_h2d([request.t_base for _, request, _ in logged], on, float32),
            [(request.asked, position) for _, request, position in logged if request.asked is not None],
            None if ctx is None else ctx.input_ids[rows],
        )
        if part is not logits:
            logits[rows] = part
        return logits

    def _position(self, asked: Asked, slot: int, row: int, ctx: LogitsContext) -> int:
        """Of the token that Runner V2 draws next, in the answer; its prompt is read at the first."""
        states: Any = self._states
        length = int(states.prompt_len.np[slot])
        if asked.prompt is None:
            asked.prompt = states.all_token_ids.gpu[slot, :length].tolist()
        return int(ctx.seq_lens_upper_bound_np[row]) - length

    def _group(self, slots: Sequence[int], on: device) -> None:
        """Gather the rows that have the same rule, and the temperatures of all rows."""
        rows: dict[TemperatureRule, list[int]] = {}
        t_base = [1.0] * len(slots)
        for row, slot in enumerate(slots):
            request = self._requests.get(slot)
            if request is not None and request.rule is not None:
                t_base[row] = request.t_base
                rows.setdefault(request.rule, []).append(row)
        self._groups = [
            (rule, None if len(found) == len(slots) else async_tensor_h2d(found, on, int64))
            for rule, found in rows.items()
        ]
        self._t_base = async_tensor_h2d(t_base, on, float32)
        self._slots = slots


_acting: WeakValueDictionary[int, AdaptiveTemperature] = WeakValueDictionary()
"""The processor of each engine, by the id of its configuration, which the processor keeps alive."""


def processor_of(llm: Any) -> AdaptiveTemperature | None:
    """The processor that acts in an engine of this process, in Runner V1 or V2; None where none was loaded."""
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    batch = getattr(runner, "input_batch", None)
    loaded = batch.logitsprocs.all if batch is not None else runner.sampler.logits_processors
    ours = [processor for processor in loaded if isinstance(processor, AdaptiveTemperature)]
    return next((processor for processor in ours if _acting.get(id(processor._engine)) is processor), None)


@contextmanager
def logging_draws(llm: Any) -> Iterator[DrawLog]:
    """A log of what an engine of this process draws inside the block, of requests that begin there.

    It costs two passes over the logits of a step, and a rule one.

    Raises:
        ValueError: speculative decoding, in which a request has several rows a step.
        RuntimeError: vLLM did not load the processor.
    """
    processor = processor_of(llm)
    if processor is None:
        raise RuntimeError(NOT_LOADED)
    if llm.llm_engine.vllm_config.speculative_config is not None:
        raise ValueError("under speculative decoding vLLM draws several tokens a step: score the rollouts")
    batch = getattr(llm.llm_engine.model_executor.driver_worker.model_runner, "input_batch", None)
    needed = getattr(batch, "logitsprocs_need_output_token_ids", False)
    processor.log = log = DrawLog()
    try:
        if batch is not None:  # Runner V1: else asynchronous scheduling never tells which tokens it drew
            batch.logitsprocs_need_output_token_ids = True
        yield log
    finally:
        processor.log = None
        if batch is not None:
            batch.logitsprocs_need_output_token_ids = needed


NOT_LOADED = (
    "vLLM did not load hapo's processor: install hapo where vLLM finds its entry point (group "
    "vllm.logits_processors), and leave speculative decoding off"
)


def _say_which_runner() -> None:
    """Once, and only where vLLM would choose by itself: that this release takes Runner V1 because of hapo."""
    global _said
    if _said or not one_runner(vllm.__version__) or os.environ.get("VLLM_USE_V2_MODEL_RUNNER") is not None:
        return
    _said = True
    LOG.warning(
        f"vLLM {vllm.__version__} keeps to Model Runner V1 wherever a logits processor is named or installed, as "
        "hapo's is, whether or not a request brings a rule. For Model Runner V2 take vLLM 0.31 or newer, or leave "
        f"hapo out of this environment; VLLM_USE_V2_MODEL_RUNNER=0 takes this message away ({PAGE})"
    )


_said = False


def _admitting_engine() -> Any | None:
    """The configuration of the engine that admits a request; None outside of one.

    vLLM gives `validate_params` no configuration, and under speculative decoding Runner V1 makes no processor that
    could read it: so it is taken from the caller, vLLM's `InputProcessor`.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        engine = getattr(frame.f_locals.get("self"), "vllm_config", None)
        if engine is not None:
            return engine
    return None

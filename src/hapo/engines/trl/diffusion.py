"""`DiffusionTrainer`: a `HAPOTrainer` of masked-diffusion models, its scorer and its sampler swapped."""

from __future__ import annotations

import hashlib
import inspect
import logging
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from trl import GRPOTrainer

from ...masked import mask_token, predicts_next
from ...samplers.diffusion import Unmasking
from . import passes
from .arguments import resolve_method
from .config import HAPOConfig
from .masked_models import adapter_for, give_generation_config, load, loaded_by_us
from .scorer import Scored
from .trainer import HAPOTrainer
from .views import CONFIDENCE, NOISE, NOW, OLD, REF, UNMASKED, DiffusionSampler, DiffusionScorer

LOG = logging.getLogger(__name__)

UNKNOWN = {
    "use_vllm": (False, "vLLM draws from left to right"),
    "use_transformers_continuous_batching": (False, "it draws from left to right"),
    "top_p": (1.0, "the decoding here has a temperature alone"),
    "top_k": (0, "the decoding here has a temperature alone"),
    "min_p": (None, "the decoding here has a temperature alone"),
    "repetition_penalty": (1.0, "the decoding here has a temperature alone"),
    "generation_kwargs": (None, "they are those of generate(), which does not run"),
    "pad_to_multiple_of": (None, "a response has a fixed length"),
}
"""Option -> the one value that can be honoured, and why."""


@dataclass
class DiffusionConfig(HAPOConfig):
    """`HAPOConfig` for masked-diffusion models; `max_completion_length` is the length of every response.

    Raises:
        ValueError: as `HAPOConfig` does; blocks or steps that do not fit the length; an option that a diffusion
        model
            cannot honour.
    """

    trains_diffusion: ClassVar[bool] = True

    method: str = field(
        default="espo", metadata={"help": "Method of diffusion models: espo or diffu_grpo; `hapo methods`."}
    )
    diffusion_steps: int | None = field(
        default=None, metadata={"help": "Forward passes that unmask a response; default: one per position."}
    )
    block_length: int | None = field(
        default=None,
        metadata={"help": "Positions that are finished before the next ones begin; default: the whole response."},
    )
    unmask_order: str = field(
        default="confidence",
        metadata={"help": "Which tokens stay in a pass: those of confidence, of least entropy, or random ones."},
    )

    def __post_init__(self) -> None:
        """Those of HAPOConfig, then ours."""
        super().__post_init__()
        for name, (value, why) in UNKNOWN.items():
            if getattr(self, name, value) not in (value, None, {}):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} cannot be honoured for a masked-diffusion model: {why}. "
                    "Leave it out"
                )
        self.unmasking(self.temperature)

    def unmasking(self, temperature: float) -> Unmasking:
        """How responses are drawn."""
        order: Any = self.unmask_order
        return Unmasking(
            length=self.max_completion_length,
            block=self.block_length,
            steps=self.diffusion_steps,
            order=order,
            temperature=temperature,
        )


class DiffusionTrainer(HAPOTrainer):
    """`HAPOTrainer` for masked-diffusion language models: LLaDA, Dream, and transformers with full attention.

    ```python
    from hapo.trl import DiffusionConfig, DiffusionTrainer
    trainer = DiffusionTrainer(model, reward_funcs, args=DiffusionConfig("out", method="espo"), train_dataset=data)
    ```

    Responses have the fixed length `max_completion_length`; reward functions see their text up to the first end of
    sequence. What is hidden is drawn once per use of a rollout batch (`num_iterations`), and is the same for the
    current, the old and the reference policy, whatever the micro-batches and ranks. Dropout is switched off: two
    passes of one policy would differ by it.

    Raises:
        ValueError: the method needs an autoregressive model; the model has no mask token; or an option asks for
        what
            a masked-diffusion model cannot do.
    """

    args: DiffusionConfig

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: DiffusionConfig | None = None, *more: Any, **others: Any
    ) -> None:
        names = list(inspect.signature(GRPOTrainer.__init__).parameters)[4:]  # after those above
        others |= dict(zip(names, more, strict=False))
        if not isinstance(args, DiffusionConfig):
            raise TypeError(
                f"args must be a DiffusionConfig, got {type(args).__name__}; from hapo.trl import DiffusionConfig"
            )
        for name in ("rollout_func", "tools", "environment_factory"):
            if others.get(name):
                raise ValueError(
                    f"{name} cannot be honoured: a masked-diffusion model draws a response as a whole"
                )
        if others.get("demonstrations") is not None:
            raise ValueError(
                "demonstrations cannot be honoured: supervised methods weigh the targets of an autoregressive "
                "model; leave them out"
            )
        self._rounds = (-1, 0)
        by_us = isinstance(model, str)
        if by_us:
            resolve_method(others.get("method"), args.filled_in())  # what it refuses, before a model is loaded
            given = (others.pop("quantization_config", None), others.get("processing_class"))
            model, others["processing_class"] = load(model, args, *given)
        give_generation_config(model)
        if "peft_config" in others:
            others["peft_config"] = adapter_for(model, others["peft_config"])
        with loaded_by_us() if by_us else nullcontext():
            super().__init__(model, reward_funcs, args, **others)
        net = self.accelerator.unwrap_model(self.model)
        if self._sharded or self.aux_loss_enabled or any(hasattr(m, "gatera_gate") for m in net.modules()):
            raise ValueError(
                "DiffusionTrainer takes models in one piece (no FSDP, no DeepSpeed), without a router loss and "
                "without GateRA"
            )
        if dropped := switch_off_dropout(net):
            LOG.warning(f"dropout is switched off in {dropped} modules: policies are compared on equal passes")

    # -- scorer and sampler ---------------------------------------------------------------------------------

    def make_scorer(self) -> DiffusionScorer:
        """The scorer of views."""
        assert self.method.likelihood is not None
        return DiffusionScorer(
            self.method.likelihood,
            self.temperature,
            self.accelerator.autocast,
            self.accelerator.unwrap_model,
            mask_id=self._mask_id,
            shifted=self._shifted,
            rank=(self.accelerator.process_index, self.accelerator.num_processes),
        )

    def make_sampler(self) -> DiffusionSampler:
        """The sampler of whole responses."""
        return DiffusionSampler(
            self.args.unmasking(self.temperature),
            mask_id=self._mask_id,
            eos_ids=self.eos_token_ids,
            pad_id=self._tokenizer.pad_token_id,
            shifted=self._shifted,
            autocast=self.accelerator.autocast,
        )

    def draw_responses(
        self, prompt_ids: Int[Tensor, "B P"], prompt_mask: Int[Tensor, "B P"], temperature: float
    ) -> Int[Tensor, "B L"]:
        """Responses of the model as it is, decoded as in training but for the temperature."""
        assert isinstance(self.sampler, DiffusionSampler)
        how = self.args.unmasking(temperature)
        return self.sampler.decoded(self.accelerator.unwrap_model(self.model), prompt_ids, prompt_mask, how).ids

    @property
    def _mask_id(self) -> int:
        return mask_token(self.accelerator.unwrap_model(self.model).config, self._tokenizer)

    @property
    def _shifted(self) -> bool:
        return predicts_next(self.accelerator.unwrap_model(self.model).config)

    # -- rollout --------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Tensor:
        """Of the responses up to their first end of sequence."""
        ends = {*self.eos_token_ids}
        ids = [row[: next((i + 1 for i, t in enumerate(row) if t in ends), len(row))] for row in completion_ids]
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        if not isinstance(completions[0], str):
            texts = [[{**c[-1], "content": text}] for c, text in zip(completions, texts, strict=True)]
        return super()._calculate_rewards(inputs, prompts, texts, ids)

    def _rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """As in `HAPOTrainer`, with the noise of each use, the log-probs under it, and how it was decoded."""
        train, scorer, sampler = self.model.training, self.scorer, self.sampler
        assert isinstance(scorer, DiffusionScorer) and isinstance(sampler, DiffusionSampler)
        assert self.method.likelihood is not None
        at = self._step if train else -1
        self._rounds = at, self._rounds[1] + 1 if train and self._rounds[0] == at else 0
        words = f"{self.args.seed}:{at}:{self._rounds[1]}"
        seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1
        scorer.begin(seed, self.num_iterations if train else 1)
        rollout = super()._rollout(inputs)
        rollout |= {NOISE: scorer.noise, **scorer.of_uses}
        assert sampler.drawn is not None
        ended = sampler.drawn.step < 0
        rollout[UNMASKED] = sampler.drawn.step.float().masked_fill(ended, torch.nan)
        rollout[CONFIDENCE] = sampler.drawn.confidence.masked_fill(ended, torch.nan)
        if not self.method.likelihood.whole:
            rollout["completion_mask"] = rollout["completion_mask"] * self._up_to_end(rollout["completion_ids"])
        return rollout

    def _up_to_end(self, ids: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """1 up to the first end of sequence, itself included."""
        ends = torch.isin(ids, torch.tensor(self.eos_token_ids, device=ids.device)).long()
        return (ends.cumsum(1) - ends == 0).long()

    def _begin_step(self, micro_batches: list[dict[str, Any]]) -> None:
        """The use that this optimiser step belongs to says which noise counts, and which log-probs of the
        others."""
        assert self.args.steps_per_generation is not None
        use = self._step // self.args.steps_per_generation % self.num_iterations
        for inputs in micro_batches:
            inputs[NOW] = inputs[NOISE][:, use]
            inputs["old_per_token_logps"] = inputs[OLD][:, use]
            if REF in inputs:
                inputs["ref_per_token_logps"] = inputs[REF][:, use]
        super()._begin_step(micro_batches)

    # -- loss -----------------------------------------------------------------------------------------------

    def _recorded_beside(self, inputs: dict[str, Any], scored: Scored) -> dict[str, Tensor]:
        return {"unmasked": inputs[UNMASKED], "confidence": inputs[CONFIDENCE]}

    def _passes(self, inputs: dict[str, Any], mask: Tensor) -> list[tuple[dict[str, Any], Tensor]]:
        assert self.method.likelihood is not None
        row = self.method.likelihood.per_response * (inputs["prompt_ids"].shape[1] + mask.shape[1])
        most = 0 if "split" in self.method.breaks else self.args.tokens_per_pass
        return passes.split_rows(inputs, mask, most, row)


def switch_off_dropout(net: nn.Module) -> int:
    """Set every dropout of a model to 0 for good, in memory; how many there were."""
    found = 0
    for module in net.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p, found = 0.0, found + 1
        for name in ("attention_dropout", "dropout_prob"):
            value = getattr(module, name, None)
            if isinstance(value, float) and value > 0:
                setattr(module, name, 0.0)
                found += 1
    return found

"""Held-out accuracy: answers to problems, their scores, and 95 % intervals."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..engines.estimate import Estimate
from ..samplers.transformers import less_work, only_what_is_asked
from ..scoring import attach_scoring, score_tokens
from ..tasks.per_token import outcome_of
from ..tasks.rewards import RewardFunction

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are drawn. Temperature 0 is greedy; the adaptive temperature of a method never acts here."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    samples: int = 1
    """Answers to each problem."""
    batch_size: int = 64
    """Answers drawn at once."""
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer to a problem and its score, the weighted sum of the rewards."""

    problem: int
    sample: int
    text: str
    tokens: int
    score: float
    truncated: bool = False
    """It does not end with an end-of-sequence token: it was cut off."""


@dataclass(frozen=True)
class LikelyAnswer(Answer):
    """An answer, and how likely it is as a whole."""

    logp: float = math.nan
    """Sum over its tokens, the end included, of their log-probs under softmax(logits / temperature), nats."""


def draw_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset,
    reward_funcs: list[RewardFunction],
    decoding: Decoding,
    *,
    weights: list[float] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    draw: Callable[[Tensor, Tensor, float], Tensor] | None = None,
    advance: Callable[[int], object] = lambda n: None,
    likelihood: bool = False,
) -> list[Answer]:
    """Answer the problems and score the answers; `advance` is told how many were done.

    With `likelihood` each answer is a `LikelyAnswer`, which takes one more forward pass.

    The state of the random generators and `model.training` are as before when it returns, so that training
    does not depend on whether it was measured. `draw` takes the place of `model.generate`: prompts (B,P), their
    mask and the temperature -> responses (B,L).

    Raises:
        ValueError: the model attends in both directions, and no `draw` is given.
    """
    if draw is None and not getattr(model.config, "is_causal", True):
        raise ValueError(
            f"this {type(model).__name__} attends in both directions (is_causal is false): it says what is "
            "hidden, and not what comes next. Its accuracy is measured in training, by hapo train with a method "
            "of diffusion models"
        )
    asked = [(i, k) for i in range(len(problems)) for k in range(decoding.samples)]
    config = generation_config(model, tokenizer, decoding)
    training, answers = model.training, []
    model.eval()
    try:
        with generators_kept(), torch.no_grad(), only_what_is_asked(model), less_work(model):
            torch.manual_seed(decoding.seed)
            for start in range(0, len(asked), decoding.batch_size):
                part = asked[start : start + decoding.batch_size]
                prompts = [problems[i]["prompt"] for i, _ in part]
                inputs = encode(tokenizer, prompts, chat_template_kwargs or {}).to(model.device)
                if draw is not None:
                    output = draw(inputs["input_ids"], inputs["attention_mask"], decoding.temperature)
                else:
                    whole = model.generate(**inputs, generation_config=config)
                    output = whole[:, inputs["input_ids"].shape[1] :]
                ids = [until_end(row, config.eos_token_id) for row in output.tolist()]
                judged = judge(tokenizer, problems, part, ids, config.eos_token_id, reward_funcs, weights)
                if likelihood:
                    judged = likely(judged, _logps(model, inputs, output, ids, decoding.temperature))
                answers += judged
                advance(len(part))
    finally:
        model.train(training)
    return answers


@contextmanager
def generators_kept() -> Iterator[None]:
    """The random generators of torch, numpy and Python are afterwards as they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def likely(answers: list[Answer], logps: list[float]) -> list[Answer]:
    """The answers with their log-probs."""
    return [LikelyAnswer(**asdict(one), logp=logp) for one, logp in zip(answers, logps, strict=True)]


def _logps(
    model: PreTrainedModel, inputs: Any, output: torch.Tensor, ids: list[list[int]], temperature: float
) -> list[float]:
    """The log-prob of each answer `ids`, the first tokens of a row of `output` (B,T), after its prompt."""
    attach_scoring(model)
    lengths = torch.tensor([len(row) for row in ids], device=output.device)
    mask = torch.arange(output.shape[1], device=output.device) < lengths[:, None]
    attention = torch.cat([inputs["attention_mask"], mask.long()], 1)
    tokens = torch.cat([inputs["input_ids"], output], 1)
    scores = score_tokens(model, tokens, attention, mask, t_base=temperature)
    return torch.where(mask, scores.logp.double(), 0.0).sum(1).tolist()


def estimate(answers: list[Answer]) -> Estimate:
    """Mean score of the answers with its 95 % interval over problems."""
    by_problem: dict[int, list[float]] = {}
    for answer in answers:
        by_problem.setdefault(answer.problem, []).append(answer.score)
    return Estimate.from_scores(list(by_problem.values()))


def judge(
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset,
    asked: list[tuple[int, int]],
    ids: list[list[int]],
    ends: list[int],
    reward_funcs: list[RewardFunction],
    weights: list[float] | None,
) -> list[Answer]:
    """The answers to problem and sample `asked`, from their token ids; `ends` are the end-of-sequence tokens."""
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    weight = torch.tensor(weights or [1.0] * len(reward_funcs))
    scores = _score(problems[[i for i, _ in asked]], texts, ids, reward_funcs, weight)
    return [
        Answer(*which, text, len(row), score, truncated=not row or row[-1] not in ends)
        for which, text, row, score in zip(asked, texts, ids, scores, strict=True)
    ]


def ends_of(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's and those of the model."""
    ends = generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    return sorted({tokenizer.eos_token_id, *ends})


def encode(tokenizer: PreTrainedTokenizerBase, prompts: list[Any], chat_template_kwargs: dict[str, Any]) -> Any:
    """Token ids and mask (B,T) of prompts, padded on the left; messages go through the chat template."""
    padding = {"padding_side": "left", "return_token_type_ids": False}
    if isinstance(prompts[0], str):
        return tokenizer(text=prompts, padding=True, return_tensors="pt", **padding)
    return tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        tokenize=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
        tokenizer_kwargs=padding,
        **chat_template_kwargs,
    )


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding
) -> GenerationConfig:
    """What `generate` is told."""
    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.temperature > 0:
        sampling = {"do_sample": True, **{k: getattr(decoding, k) for k in ("temperature", "top_p", "top_k")}}
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends_of(model.generation_config, tokenizer),
        repetition_penalty=1.0,
        disable_compile=True,
        **sampling,
    )


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    """The ids up to and with the first end-of-sequence token."""
    return ids[: next((t + 1 for t, token in enumerate(ids) if token in ends), len(ids))]


def _score(
    batch: dict[str, list[Any]],
    texts: list[str],
    ids: list[list[int]],
    reward_funcs: list[RewardFunction],
    weight: torch.Tensor,
) -> list[float]:
    columns = {name: values for name, values in batch.items() if name != "prompt"}
    completions: list[Any] = texts
    if not isinstance(batch["prompt"][0], str):
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = [
        reward(prompts=batch["prompt"], completions=completions, completion_ids=ids, **columns)
        for reward in reward_funcs
    ]
    by_answer = torch.tensor([[math.nan if r is None else outcome_of(r) for r in column] for column in rewards]).T
    unscored = int(by_answer.isnan().all(1).sum())
    if unscored:
        logger.warning(
            "%d of %d answers got a number from no reward (all say None) and count as 0", unscored, len(texts)
        )
    return (by_answer * weight).nansum(1).tolist()

"""Statistics for a temperature rule from a model's answers to prompts: adaptive temperature without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..batch import EntropyStats
from ..parts.entropy import entropy_stats
from .transformers import only_what_is_asked, sampling


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, Any]]],
    *,
    max_new_tokens: int = 256,
    t_base: float = 1.0,
    rho: float = 0.8,
    batch_size: int = 16,
    seed: int = 0,
    advance: Callable[[int], object] = lambda n: None,
) -> EntropyStats:
    """Statistics of log H over one sampled answer to each prompt; of use at the same T_base.

    Answers are drawn at `t_base` from the whole vocabulary, without top-p, top-k or an adaptive factor. H is the
    entropy of softmax(logits / t_base), nats, at every sampled position up to and with the end of the answer.
    The state of the random generators and `model.training` are as before when it returns.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer, with a padding token.
        prompts: texts, or chats as lists of messages; one kind.
        max_new_tokens: longest answer, tokens.
        t_base: the temperature that is to be adapted.
        rho: quantile of log H that is the pivot.
        batch_size: prompts answered at once.
        seed: of the draws.
        advance: is told how many prompts were done.

    Raises:
        ValueError: there are no prompts, or prompts of both kinds, or `t_base` is not above 0.
    """
    if not prompts:
        raise ValueError("there are no prompts to calibrate on")
    if len({isinstance(prompt, str) for prompt in prompts}) > 1:
        raise ValueError("some prompts are texts and some are chats; calibrate on one kind")
    if not t_base > 0:
        raise ValueError(f"t_base must be > 0, got {t_base}: greedy decoding has no temperature to adapt")
    config = _generation_config(model, tokenizer, max_new_tokens, t_base)
    training, drawn = model.training, []
    model.eval()
    try:
        with torch.random.fork_rng(), only_what_is_asked(model):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                drawn.append(_entropies(model, _encode(tokenizer, batch).to(model.device), config))
                advance(len(batch))
    finally:
        model.train(training)
    entropy = torch.cat(drawn).unsqueeze(0)
    stats = entropy_stats(entropy, torch.ones_like(entropy, dtype=torch.bool), rho)
    assert stats is not None  # an answer has at least one token
    return stats


def _entropies(model: PreTrainedModel, inputs: Any, config: GenerationConfig) -> Tensor:
    """Draw an answer to each row; the entropies of all sampled positions, one after the other."""
    with sampling(model) as record:
        model.generate(**inputs, generation_config=config)
    assert record.draws is not None
    end = torch.isin(record.draws.tokens, torch.tensor(config.eos_token_id, device=record.draws.tokens.device))
    answer = end.cumsum(1) - end.long() == 0  # up to and with the first end
    return record.draws.entropy[answer].cpu()


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> Any:
    chat = not isinstance(prompts[0], str)  # a template writes the special tokens itself
    if chat:
        prompts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    return tokenizer(
        text=list(prompts),
        add_special_tokens=not chat,
        return_token_type_ids=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, t_base: float
) -> GenerationConfig:
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    return GenerationConfig(
        do_sample=True,
        temperature=t_base,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted({i for i in (tokenizer.eos_token_id, *ends) if i is not None}),
        disable_compile=True,
    )

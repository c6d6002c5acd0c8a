"""Answers drawn by vLLM's offline engine, as it is, from the prompts and to the ends of `draw_answers`."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from ..tasks.rewards import RewardFunction
from ..versions import PAGE
from . import UsageError
from .measure import Answer, Decoding, encode, ends_of, judge, likely


class VLLMAnswers:
    """An engine with the model at `path` (a folder, or an id of the Hub); `options` go to `vllm.LLM`.

    Raises ImportError without vLLM, UsageError for an adapter without its model, and what `vllm.LLM` raises.
    """

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                f"{error}; --engine vllm needs vLLM: pip install vllm==0.32.* (what goes with it: {PAGE}), or "
                "take --engine transformers"
            ) from error
        if (Path(path) / "adapter_config.json").is_file():
            raise UsageError(f"{path} is an adapter: merge it into its model first, or take --engine transformers")
        self._params = vllm.SamplingParams
        self._tokenizer = tokenizer
        self.generation_config = _generation_config(path, options)
        """The model's own, of which the ends of answers alone act."""
        self._ends = ends_of(self.generation_config, tokenizer)
        self._engine = vllm.LLM(path, **options)

    def draw(
        self,
        problems: Dataset,
        reward_funcs: list[RewardFunction],
        decoding: Decoding,
        *,
        weights: list[float] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        advance: Callable[[int], object] = lambda n: None,
        likelihood: bool = False,
    ) -> list[Answer]:
        """As `draw_answers`; every problem has a seed of its own, so that its answers do not hang on the batch.

        With `likelihood` the engine must have been made with logprobs_mode="processed_logprobs", for vLLM else
        gives the log-probs before the temperature.
        """
        chat, seeds = chat_template_kwargs or {}, random.Random(decoding.seed)
        prompts = [
            {"prompt_token_ids": encode(self._tokenizer, [prompt], chat)["input_ids"][0].tolist()}
            for prompt in problems["prompt"]
        ]
        params = [
            self._params(
                n=decoding.samples,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                top_k=decoding.top_k,
                max_tokens=decoding.max_new_tokens,
                stop_token_ids=self._ends,
                seed=seeds.getrandbits(31),
                detokenize=False,
                logprobs=0 if likelihood else None,  # 0: of the token that was drawn alone
            )
            for _ in prompts
        ]
        outputs = self._engine.generate(prompts, params, use_tqdm=sys.stderr.isatty())
        answers = []
        for problem, output in enumerate(outputs):
            samples = sorted(output.outputs, key=lambda drawn: drawn.index)
            ids = [list(drawn.token_ids) for drawn in samples]
            asked = [(problem, k) for k in range(len(ids))]
            judged = judge(self._tokenizer, problems, asked, ids, self._ends, reward_funcs, weights)
            answers += likely(judged, [one.cumulative_logprob for one in samples]) if likelihood else judged
            advance(len(ids))
        return answers


def _generation_config(path: str, options: dict[str, Any]) -> GenerationConfig:
    """What transformers would load with the model, which knows its end-of-sequence tokens."""
    revision = options.get("revision")
    try:
        return GenerationConfig.from_pretrained(path, revision=revision)
    except OSError:
        trust = options.get("trust_remote_code", False)
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust)
        return GenerationConfig.from_model_config(config)

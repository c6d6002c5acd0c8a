"""A sequence-classification model of transformers as a score of token ids, with what its attribution needs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

REMEDY = "give mask_id, the id of a token that means nothing to the model"


class RewardModel:
    """The score of rows of token ids, (N,): a logit of a sequence-classification model, in its unit, no gradient.

    The rows are padded on the right for the model, and the padding is masked in its attention. A model whose head
    is called `score` (Llama, Qwen, GPT-2 ... as classifiers) is read at the last token of the row, whatever that
    token is: transformers itself looks for the last one that is not the padding token, and finds another one where
    a masked token has that id. Others (BERT ...) are asked for their logits.

    A token is masked by the tokenizer's mask token, else by its unknown token, else by its padding token, which
    `masks_with` says.

    Args:
        model: put into evaluation mode.
        tokenizer: of the model. Its special tokens are never masked.
        label: logit that is the score; a model with one logit needs no such word.
        mask_id: token id to mask with.

    Raises:
        ValueError: several logits and no label, or a tokenizer with none of the three tokens.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, label: int | None = None, mask_id: int | None = None
    ) -> None:
        logits = int(model.config.num_labels)
        if label is None and logits != 1:
            raise ValueError(f"the model has {logits} logits: give label, the one that is the score")
        if label is not None and not 0 <= label < logits:
            raise ValueError(f"label {label} is none of the model's {logits} logits")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._label = label or 0
        kinds = {"mask": "mask_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
        found = {kind: getattr(tokenizer, name, None) for kind, name in kinds.items()}
        own = next(((kind, one) for kind, one in found.items() if one is not None), None)
        if mask_id is None and own is None:
            raise ValueError(f"the tokenizer has no mask, unknown or padding token to mask with: {REMEDY}")
        chosen: tuple[str, int] = ("given", mask_id) if mask_id is not None else own or ("", 0)
        self.masks_with, self.mask_id = chosen
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        self.special_ids = frozenset(special)
        """Token ids that are never masked."""
        self._pad = found["padding"] if found["padding"] is not None else self.mask_id

    @classmethod
    def load(cls, name: str | Path, **options: Any) -> RewardModel:
        """From a folder or the Hugging Face Hub, safetensors only; `options` as above.

        Raises:
            OSError: there is no such model, or it has no safetensors.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True)
        return cls(model, AutoTokenizer.from_pretrained(name), **options)

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the weights, the configuration and the options, for a cache."""
        digest = hashlib.sha256(f"{self.model.config.to_json_string()}\n{self._label}".encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def check_tokens(self, tokenizer: Any) -> None:
        """Find out whether token ids of a policy mean the same to this model.

        Raises:
            ValueError: a token of the policy's vocabulary has another id here, or none.
        """
        own = self.tokenizer.get_vocab()
        for token, number in tokenizer.get_vocab().items():
            if own.get(token) != number:
                raise ValueError(
                    f"token {token!r} has id {number} for the policy and {own.get(token)} for the reward model: "
                    "attribution to tokens needs a reward model with the policy's tokenizer"
                )

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The score of each row.

        Raises:
            ValueError: a row is longer than the model's context.
        """
        ids, there = self._padded(rows)
        if hasattr(self.model, "score"):
            hidden = self.model.base_model(input_ids=ids, attention_mask=there).last_hidden_state
            logits = self.model.score(hidden[torch.arange(len(ids)), there.sum(1) - 1])
        else:
            logits = self.model(input_ids=ids, attention_mask=there).logits
        return logits[:, self._label].double().tolist()

    @torch.inference_mode()
    def attention(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Attention of the last layer, averaged over its heads, from the place that the score is read at.

        A number for each token of a row; they sum to 1. That place is the last token where the head is called
        `score`, else the first, BERT's [CLS].

        Raises:
            ValueError: the model pools over all tokens, or gives no attention.
        """
        if getattr(self.model.config, "classifier_pooling", "cls") != "cls":
            raise ValueError("the model pools over all tokens: it is read at no one place. Leave out attention")
        ids, there = self._padded(rows)
        kind = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")  # the fast kinds keep no attention
        try:
            out = self.model.base_model(input_ids=ids, attention_mask=there, output_attentions=True)
        finally:
            self.model.set_attn_implementation(kind)
        if not out.attentions or out.attentions[-1] is None:
            raise ValueError(f"{type(self.model).__name__} gives no attention: leave out attention")
        mean: Float[Tensor, "N L L"] = out.attentions[-1].float().mean(1)
        place = there.sum(1) - 1 if hasattr(self.model, "score") else torch.zeros(len(ids), dtype=torch.long)
        return [line[: len(row)].tolist() for line, row in zip(mean[range(len(ids)), place], rows, strict=True)]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "N L"], Int[Tensor, "N L"]]:
        width = max(map(len, rows))
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and width > most:
            raise ValueError(
                f"a row of {width} tokens is longer than the reward model's context of {most} "
                "(max_position_embeddings): shorten prompts or completions, or take another reward model"
            )
        ids = torch.tensor([[*row, *[self._pad] * (width - len(row))] for row in rows])
        there = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
        return ids.to(self.model.device), there.long().to(self.model.device)

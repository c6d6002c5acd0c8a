"""A tiny model with the interface of LLaDA: names of modules, arguments of forward, configuration. Not its code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LLaDAConfig(PreTrainedConfig):
    model_type = "llada"

    def __init__(self, d_model: int = 16, n_layers: int = 2, vocab_size: int = 32, **others: Any) -> None:
        self.d_model, self.n_layers, self.vocab_size = d_model, n_layers, vocab_size
        super().__init__(**others)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj, self.up_proj = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(2 * width, width, bias=False)
        self.attn_norm, self.ff_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        h = self.attn_norm(x)
        attention = (self.q_proj(h) @ self.k_proj(h).mT) / h.shape[-1] ** 0.5
        attention = attention if bias is None else attention + bias
        x = x + self.attn_out(attention.softmax(-1) @ self.v_proj(h))
        h = self.ff_norm(x)
        return x + self.ff_out(nn.functional.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAModel(nn.Module):
    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width = config.d_model
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, width),
                "blocks": nn.ModuleList(Block(width) for _ in range(config.n_layers)),
                "ln_f": nn.RMSNorm(width),
                "ff_out": nn.Linear(width, config.vocab_size, bias=False),
            }
        )

    def forward(self, ids: Tensor, attention: Tensor | None) -> Tensor:
        x = self.transformer["wte"](ids)
        bias = None if attention is None else (1.0 - attention[:, None].to(x.dtype)) * torch.finfo(x.dtype).min
        for block in self.transformer["blocks"]:
            x = block(x, bias)
        return self.transformer["ff_out"](self.transformer["ln_f"](x))


class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig
    base_model_prefix = "model"

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer["ff_out"]

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_bias: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Any = None,
    ) -> CausalLMOutput:
        assert input_ids is not None and not use_cache
        return CausalLMOutput(logits=self.model(input_ids, attention_mask))

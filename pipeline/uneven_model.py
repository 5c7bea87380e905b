"""An uneven model in torch: transformers' Llama, layer by layer, each of its own sizes.

Parameters have the names of the checkpoint's tensors. No cache: transformers' asks its first layer for its length,
which may have no attention.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pipeline.architectures import ARCHITECTURES, Config, layer_config


class _NoAttention(torch.nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor, **unused: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class _LinearAttention(torch.nn.Module):
    """One matrix (hidden, hidden) in attention's place: every token by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_attn = torch.nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: torch.Tensor, **unused: Any) -> tuple[torch.Tensor, None]:
        return self.linear_attn(hidden_states), None


class _NoFfn(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def uneven_model(model_type: str, config: Config) -> LlamaForCausalLM:
    """The model of an uneven config in float32, its parameters not filled yet; attention is eager."""
    known = {key: value for key, value in config.items() if key not in _apart(model_type)}
    whole = LlamaConfig(**known, num_hidden_layers=0, attn_implementation="eager", use_cache=False)
    model = LlamaForCausalLM(whole)
    layers = [_layer(layer_config(model_type, config, i), i, model_type) for i in range(config["num_hidden_layers"])]
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    return model.float()


def _apart(model_type: str) -> tuple[str, ...]:
    return ("model_type", "architectures", "num_hidden_layers", "use_cache", *ARCHITECTURES[model_type].per_layer)


def _layer(own: Config, index: int, model_type: str) -> LlamaDecoderLayer:
    known = {key: value for key, value in own.items() if key not in _apart(model_type)}
    heads, kv_heads, width = own["num_attention_heads"], own["num_key_value_heads"], own["intermediate_size"]
    sizes = {"num_attention_heads": max(1, heads), "num_key_value_heads": max(1, kv_heads)}
    config = LlamaConfig(**known, **sizes, intermediate_size=max(1, width), attn_implementation="eager")
    layer = LlamaDecoderLayer(config, index)
    if not heads:
        layer.self_attn, layer.input_layernorm = _NoAttention(), torch.nn.Identity()
    elif not kv_heads:
        layer.self_attn = _LinearAttention(own["hidden_size"])
    elif own["attention_bias"] != own["attention_out_bias"]:
        projection = layer.self_attn.o_proj
        layer.self_attn.o_proj = torch.nn.Linear(
            projection.in_features, projection.out_features, bias=own["attention_out_bias"]
        )
    if not width:
        layer.mlp, layer.post_attention_layernorm = _NoFfn(), torch.nn.Identity()
    return layer

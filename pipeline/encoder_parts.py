"""ENCODER_PARTS: where transformers keeps the prunable parts of its encoders, as data; one line a family.

All of them add before they normalize (post-LayerNorm): a part's last matrix and the residual make a sum, and the
LayerNorm of that sum is what the next part reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from device.records import SlimpiError


@dataclass(frozen=True)
class EncoderParts:
    """`layers`: path of the list of layers in the model's body. Paths in a layer: the matrix that ends the attention,
    the LayerNorm behind it, the MLP's two matrices, the LayerNorm behind them. Keys of config.json: n_layers, n_heads,
    n_channels.

    biased: path in a layer of the module whose fourth argument is a bias (1, heads, n, n) that all layers share, "" if
    there is none.
    """

    layers: str
    attention: str
    attention_norm: str
    up: str
    mlp: str
    mlp_norm: str
    n_layers: str = "num_hidden_layers"
    n_heads: str = "num_attention_heads"
    n_channels: str = "intermediate_size"
    biased: str = ""


_BERT = EncoderParts(
    layers="encoder.layer",
    attention="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    mlp="output.dense",
    mlp_norm="output.LayerNorm",
)

ENCODER_PARTS: Mapping[str, EncoderParts] = MappingProxyType(
    {
        "bert": _BERT,
        "roberta": _BERT,
        "distilbert": EncoderParts(
            layers="transformer.layer",
            attention="attention.out_lin",
            attention_norm="sa_layer_norm",
            up="ffn.lin1",
            mlp="ffn.lin2",
            mlp_norm="output_layer_norm",
            n_layers="n_layers",
            n_heads="n_heads",
            n_channels="hidden_dim",
        ),
        "mpnet": EncoderParts(
            layers="encoder.layer",
            attention="attention.attn.o",
            attention_norm="attention.LayerNorm",
            up="intermediate.dense",
            mlp="output.dense",
            mlp_norm="output.LayerNorm",
            biased="attention.attn",
        ),
    }
)


@dataclass(frozen=True)
class EncoderSizes:
    """How many layers a model has, and how many heads and MLP channels each of them."""

    layers: int
    heads: int
    channels: int


def parts_of(model_type: str) -> EncoderParts:
    """Of a config's model_type; SlimpiError for a family that is not in the table."""
    if model_type not in ENCODER_PARTS:
        known = ", ".join(sorted(ENCODER_PARTS))
        raise SlimpiError(f"a {model_type} cannot be pruned. Take one of {known}, or a variant without pruning.")
    return ENCODER_PARTS[model_type]


def sizes_of(config: Mapping[str, Any], origin: str) -> EncoderSizes:
    """Of a config.json. SlimpiError for a family that is not in the table, a size that is missing, and heads that went
    before: what is left of them in each layer would not be told apart."""
    parts = parts_of(str(config.get("model_type")))
    if config.get("pruned_heads"):
        raise SlimpiError(f"{origin} has lost heads already. Prune the model it came from.")
    sizes = [config.get(key) for key in (parts.n_layers, parts.n_heads, parts.n_channels)]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise SlimpiError(f"{origin} names no {parts.n_layers}, {parts.n_heads} or {parts.n_channels}. Save it again.")
    return EncoderSizes(*(int(size) for size in sizes))  # type: ignore[arg-type]


def sizes_in(model_dir: Path) -> EncoderSizes:
    """Of a Hugging Face folder, as `sizes_of`; defaults that its config.json leaves out are transformers'."""
    import transformers

    try:
        read = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        kind = str(read.get("model_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise SlimpiError(
            f"{model_dir} has no config.json of a model ({error}). Name a Hugging Face folder."
        ) from error
    parts_of(kind)
    return sizes_of({**transformers.AutoConfig.for_model(kind).to_dict(), **read}, str(model_dir))


def attach_kept_heads(model: Any) -> None:
    """Let layers that lost heads read their own heads' part of the bias that all layers share (MPNet's positions).

    transformers 4.57 loads such a model and fails when it runs it: it adds all heads' bias to the heads that stay.
    Nothing is done where there is no such bias, nothing is pruned, or it was done already.
    """
    parts = ENCODER_PARTS.get(model.config.model_type)
    if parts is None or not parts.biased:
        return
    n_heads = getattr(model.config, parts.n_heads)
    layers = model.base_model.get_submodule(parts.layers)
    for index, gone in model.config.pruned_heads.items():
        module = layers[index].get_submodule(parts.biased)
        if gone and not module._forward_pre_hooks:
            module.register_forward_pre_hook(_KeptHeads([head for head in range(n_heads) if head not in set(gone)]))


class _KeptHeads:
    def __init__(self, kept: list[int]) -> None:
        self.kept = kept

    def __call__(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        import torch

        if len(args) < 4 or args[3] is None:
            return args
        return (*args[:3], args[3].index_select(1, torch.tensor(self.kept, device=args[3].device)), *args[4:])

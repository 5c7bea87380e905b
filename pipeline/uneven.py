"""Models whose layers differ in heads, key heads and FFN width, or lack a part: as llama.cpp's architecture deci.

`as_uneven` and `as_even` rename a config and leave the tensors alone. `runnable` gives a model with missing parts the
form that llama.cpp's src/models/deci.cpp runs.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from device.records import SlimpiError
from pipeline.architectures import ARCHITECTURES, Config, tensor_shapes
from pipeline.checkpoint import Checkpoint, Tensor, held
from pipeline.gguf_keys import check_layers, check_lists

UNEVEN = "deci"

STAND_IN_WIDTH = 32
"""Of an FFN that does nothing: the fewest columns that the blocks of llama.cpp's plainer types divide."""

_BIASES = ("attention_bias", "attention_out_bias", "mlp_bias")

_UNFIT = {
    "gemma2": "its soft-capped scores, its norms after each part and its sliding windows",
    "gemma3_text": "its norms of queries and keys, its norms after each part and its sliding windows",
}
"""What llama.cpp's deci does not compute of a family."""


def _biases(model_type: str, config: Config) -> dict[str, bool]:
    """Which of a Llama-shaped family's linear layers add a bias."""
    if model_type == "qwen2":
        return dict(zip(_BIASES, (True, False, False), strict=True))
    attention = bool(config["attention_bias"])
    return dict(zip(_BIASES, (attention, attention, bool(config["mlp_bias"])), strict=True))


def as_uneven(checkpoint: Checkpoint) -> Checkpoint:
    """The same model with one entry a layer for heads, key heads and FFN width, so that each may be changed.

    SlimpiError for a family that llama.cpp's deci does not compute. Llama and Qwen2 it does: it adds the biases that a
    file has, and what llama.cpp's Qwen2 rotates otherwise is a matter of the rows' order.
    """
    model_type = checkpoint.architecture
    if model_type == UNEVEN:
        return checkpoint
    if model_type in _UNFIT:
        raise SlimpiError(
            f"a {model_type} with uneven layers does not run: llama.cpp's deci, the only architecture for them, lacks "
            f"{_UNFIT[model_type]}. Prune whole layers, or all layers alike."
        )
    config, arch = checkpoint.config, ARCHITECTURES[UNEVEN]
    lists = {key: [config[key]] * config["num_hidden_layers"] for key in arch.per_layer}
    changed = {**config, **lists, **_biases(model_type, config), "rope_scaling": config.get("rope_scaling")}
    return replace(checkpoint, architecture=UNEVEN, config=_named(UNEVEN, changed))


def keeps_name(family: str, config: Config) -> bool:
    """Whether llama.cpp loads a model with these sizes, alike in all layers, under its family's own name: a qwen2's
    heads have to be as wide as its hidden state."""
    return family != "qwen2" or config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]


def as_even(checkpoint: Checkpoint) -> Checkpoint:
    """An uneven model as the family with its biases, if all its layers have the same sizes; as it is otherwise."""
    config, per_layer = checkpoint.config, ARCHITECTURES[checkpoint.architecture].per_layer
    if not per_layer:
        return checkpoint
    sizes = {key: config[key][0] for key in per_layer}
    biases = {key: config[key] for key in _BIASES}
    family = next((m for m in ("llama", "qwen2") if _biases(m, config) == biases), "")
    if not family or any(config[key] != [size] * len(config[key]) for key, size in sizes.items()):
        return checkpoint
    if not all(sizes.values()) or not keeps_name(family, {**config, **sizes}):
        return checkpoint  # a part that all layers lack; llama.cpp's Qwen2 takes the size of a head from the hidden one
    dropped = set(_BIASES) - ARCHITECTURES[family].optional_tensors.keys()
    changed = {key: value for key, value in config.items() if key not in dropped} | sizes
    return replace(checkpoint, architecture=family, config=_named(family, changed))


def _named(model_type: str, config: Config) -> Config:
    arch = ARCHITECTURES[model_type]
    return {**config, **arch.fixed, "model_type": model_type, "architectures": [arch.hf_class]}


def runnable(checkpoint: Checkpoint) -> Checkpoint:
    """The model with what llama.cpp needs of a layer that lacks parts, computing the same.

    A layer without an FFN gets one of zeros, STAND_IN_WIDTH wide: deci.cpp would leave out the attention with it. A
    layer without either is left out and those behind it move up. A first layer without attention gets a head of
    zeros: llama.cpp takes the size of a head from there. Tensors in new places are the same ones renamed. SlimpiError
    if no layer has any part, and for lists that are none.
    """
    if checkpoint.architecture != UNEVEN:
        return checkpoint
    config = dict(checkpoint.config)
    check_lists(UNEVEN, config)
    heads, kv_heads, widths = (list(config[key]) for key in _SIZES)
    kept = [i for i in range(config["num_hidden_layers"]) if heads[i] or widths[i]]
    if not kept:
        raise SlimpiError("no layer of this model has attention or an FFN left. Prune fewer parts.")
    heads, kv_heads, widths = ([sizes[i] for i in kept] for sizes in (heads, kv_heads, widths))
    if not heads[0]:
        heads[0] = kv_heads[0] = 1
    widths = [width or STAND_IN_WIDTH for width in widths]
    config |= dict(zip(_SIZES, (heads, kv_heads, widths), strict=True)) | {"num_hidden_layers": len(kept)}
    check_layers(UNEVEN, config)
    tensors = {}
    dtype = checkpoint.tensors["model.embed_tokens.weight"].dtype
    for name, shape in tensor_shapes(UNEVEN, config).items():
        tensors[name] = _moved(checkpoint, name, kept) or _stand_in(name, shape, dtype)
    return replace(checkpoint, config=config, tensors=tensors)


_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def _moved(checkpoint: Checkpoint, name: str, kept: list[int]) -> Tensor | None:
    """The tensor that a layer had in its old place."""
    parts = name.split(".")
    if name.startswith("model.layers."):
        parts[2] = str(kept[int(parts[2])])
    found = checkpoint.tensors.get(".".join(parts))
    return found.renamed(name) if found else None


def _stand_in(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    gain = 1.0 if name.endswith("layernorm.weight") else 0.0
    return held(name, torch.full(shape, gain, dtype=dtype))

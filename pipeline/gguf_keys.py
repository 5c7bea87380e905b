"""config.json <-> GGUF keys, and the checks that llama.cpp will compute what transformers does."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import gguf
import numpy as np

from device.records import SlimpiError
from pipeline.architectures import (
    ARCHITECTURES,
    Config,
    Hparam,
    architecture,
    gguf_names,
    layer_config,
    model_type_of,
)
from pipeline.gguf_file import Value

_FLOATS = {
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.freq_base_swa",
    "attn_logit_softcapping",
    "final_logit_softcapping",
}

_MAX_LAYERS = 512

_LLAMA3_DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every published Llama 3.x uses; a GGUF keeps only the factors computed from them."""


def check_config(model_type: str, config: Config) -> None:
    """SlimpiError if llama.cpp would compute something else than transformers for this config."""
    arch = architecture(model_type)
    for key, wanted in arch.fixed.items():
        if config.get(key) != wanted:
            raise SlimpiError(
                f"{model_type} with {key} = {config.get(key)!r} does not run in llama.cpp, which knows only {wanted!r}."
            )
    for hparam in arch.hparams:
        value = config.get(hparam.config)
        if not hparam.per_layer and (not isinstance(value, (int, float)) or value <= 0):
            raise SlimpiError(f"the config of this {model_type} has no usable {hparam.config}: {value!r}. Correct it.")
    if config["num_hidden_layers"] > _MAX_LAYERS:
        raise SlimpiError(f"{config['num_hidden_layers']} layers are more than llama.cpp's {_MAX_LAYERS}.")
    if arch.always_tied and not config["tie_word_embeddings"]:
        raise SlimpiError(f"{model_type} with an output matrix of its own does not load in llama.cpp. Tie it.")
    if arch.per_layer:
        check_layers(model_type, config)
    else:
        _check_heads(config["num_attention_heads"], config["num_key_value_heads"], "")
    if model_type == "qwen2" and (width := config["num_attention_heads"] * config["head_dim"]) != config["hidden_size"]:
        raise SlimpiError(
            f"qwen2 with {config['num_attention_heads']} heads of {config['head_dim']} needs hidden_size {width}, not "
            f"{config['hidden_size']}."
        )
    if arch.swa_period:
        if len(config["layer_types"]) != config["num_hidden_layers"]:
            raise SlimpiError(f"layer_types of {model_type} does not name all {config['num_hidden_layers']} layers.")
        _check_attention_scale(model_type, config)
    _rope_kind(model_type, config)


def check_layers(model_type: str, config: Config) -> None:
    """SlimpiError for layers that llama.cpp's src/models/deci.cpp runs otherwise or not at all, and as `check_lists`.

    `pipeline.uneven.runnable` mends what lacks parts.
    """
    check_lists(model_type, config)
    for i in range(int(config["num_hidden_layers"])):
        _check_layer(layer_config(model_type, config, i), i, "Mend it with pipeline.uneven.runnable.")


def check_lists(model_type: str, config: Config) -> None:
    """SlimpiError if a per-layer value is no list of a whole number from 0 on for each layer."""
    n_layers = int(config["num_hidden_layers"])
    for key in ARCHITECTURES[model_type].per_layer:
        values = config.get(key)
        if not isinstance(values, list) or len(values) != n_layers:
            shown = f"{len(values)} entries" if isinstance(values, list) else f"{values!r:.80}"
            raise SlimpiError(f"{key} of {model_type} is {shown}, not a list of {n_layers} numbers. Give one a layer.")
        if wrong := [value for value in values if type(value) is not int or value < 0]:
            raise SlimpiError(f"{key} of {model_type} has the entry {wrong[0]!r:.80}. Give whole numbers from 0 on.")


def _check_layer(own: Config, index: int, remedy: str) -> None:
    heads, kv_heads, width = own["num_attention_heads"], own["num_key_value_heads"], own["intermediate_size"]
    if kv_heads:
        _check_heads(heads, kv_heads, f"layer {index}: ")
    if not heads and not width:
        raise SlimpiError(f"layer {index} has neither attention nor FFN: llama.cpp fails if it is the last. {remedy}")
    if not heads and not index:
        raise SlimpiError(f"the first layer lacks attention: llama.cpp takes the head's size from there. {remedy}")
    if heads and not width:
        raise SlimpiError(f"layer {index} lacks an FFN: llama.cpp would leave out its attention too. {remedy}")


def _check_heads(heads: int, kv_heads: int, where: str) -> None:
    if not heads or heads % kv_heads:
        raise SlimpiError(
            f"{where}{heads} attention heads are no multiple of {kv_heads} key heads. Give each key head as many."
        )


def _assumed_attention_scalar(model_type: str, config: Config) -> int:
    """llama.cpp knows Gemma's 27B by its layer count and takes hidden / heads there, head_dim elsewhere."""
    if config["num_hidden_layers"] == ARCHITECTURES[model_type].n_layers_27b:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _check_attention_scale(model_type: str, config: Config) -> None:
    assumed = _assumed_attention_scalar(model_type, config)
    if config["query_pre_attn_scalar"] != assumed:
        raise SlimpiError(
            f"{model_type} with query_pre_attn_scalar {config['query_pre_attn_scalar']} would be scaled by "
            f"{assumed} in llama.cpp, which fixes it by the number of layers. It cannot be exported."
        )


def _rope_kind(model_type: str, config: Config) -> str:
    """ "default" or one of the family's rope scalings, its parameters checked."""
    scaling = config.get("rope_scaling")
    if not scaling:
        return "default"
    kind = scaling.get("rope_type", scaling.get("type"))
    known = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", *_LLAMA3_DEFAULTS},
        "yarn": {"factor", "original_max_position_embeddings"},
    }
    if kind not in ("default", *ARCHITECTURES[model_type].rope_scalings):
        raise SlimpiError(f"rope scaling {kind!r} is not supported for {model_type}.")
    unknown = set(scaling) - known[kind] - {"rope_type", "type", "rope_theta"}
    missing = known[kind] - set(scaling)
    if unknown or missing:
        what = f"has the unsupported {sorted(unknown)}" if unknown else f"lacks {sorted(missing)}"
        raise SlimpiError(f"rope scaling {kind!r} of {model_type} {what}: {scaling}.")
    return kind


def gguf_keys(model_type: str, config: Config) -> dict[str, Value]:
    """The architecture's GGUF keys for a checked config. Floats are stored as float32."""
    arch = ARCHITECTURES[model_type]
    prefix = gguf.MODEL_ARCH_NAMES[arch.gguf_arch]
    keys: dict[str, Value] = {}
    keys[f"{prefix}.vocab_size"] = config["vocab_size"]
    for hparam in arch.hparams:
        for key in hparam.keys:
            value = config[hparam.config]
            if hparam.per_layer:
                keys[f"{prefix}.{key}"] = list(value)
            else:
                keys[f"{prefix}.{key}"] = float(value) if key in _FLOATS else int(value)
    kind = _rope_kind(model_type, config)
    if kind in ("linear", "yarn"):
        keys[f"{prefix}.rope.scaling.type"] = kind
        keys[f"{prefix}.rope.scaling.factor"] = float(config["rope_scaling"]["factor"])
    if kind == "yarn":
        original = config["rope_scaling"]["original_max_position_embeddings"]
        keys[f"{prefix}.rope.scaling.original_context_length"] = int(original)
    if arch.swa_period and (pattern := _sliding(config)) != _regular(arch.swa_period, len(pattern)):
        keys[f"{prefix}.attention.sliding_window_pattern"] = pattern
    return keys


def _sliding(config: Config) -> list[bool]:
    return [kind == "sliding_attention" for kind in config["layer_types"]]


def _regular(period: int, n_layers: int) -> list[bool]:
    """llama.cpp's pattern for a period: its last layer sees everything, the others slide; period 0 = all slide."""
    return [period == 0 or i % period < period - 1 for i in range(n_layers)]


def rope_factors(model_type: str, config: Config) -> np.ndarray | None:
    """Divisors of the rotary frequencies under llama3 scaling, float32 (head_dim / 2,); None otherwise.

    Transformers' _compute_llama3_parameters: long wavelengths are divided by the factor, short ones kept, those
    between interpolated.
    """
    if _rope_kind(model_type, config) != "llama3":
        return None
    scaling, dim = config["rope_scaling"], config["head_dim"]
    frequency = config["rope_theta"] ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    wavelength = 2 * math.pi / frequency
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    smooth = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def config_from_keys(
    keys: Mapping[str, Any], tensors: Collection[str], vocab_size: int, factors: np.ndarray | None
) -> Config:
    """The inverse of `gguf_keys`: the config.json that a GGUF's keys and tensor names tell.

    `factors` is the content of ROPE_FACTORS if the file has it. SlimpiError on a missing key, or on rope factors
    that no published llama3 scaling gives.
    """
    prefix = keys.get("general.architecture", "")
    model_type = model_type_of(prefix)
    arch = ARCHITECTURES[model_type]
    config: Config = {"model_type": model_type, "architectures": [arch.hf_class], **arch.fixed}
    config["vocab_size"] = vocab_size
    config["tie_word_embeddings"] = "output.weight" not in tensors
    for hparam in arch.hparams:
        config[hparam.config] = _from_keys(prefix, hparam, keys)
    if config.get("head_dim") in (None, -1):
        heads = config["num_attention_heads"]
        config["head_dim"] = config["hidden_size"] // (max(1, *heads[:1], 1) if isinstance(heads, list) else heads)
    if config["num_hidden_layers"] > _MAX_LAYERS:
        raise SlimpiError(f"the GGUF names {config['num_hidden_layers']} layers, llama.cpp allows {_MAX_LAYERS}.")
    for flag, group in arch.optional_tensors.items():
        # A layer may lack the part that the others' are in.
        layers = range(config["num_hidden_layers"] if arch.absences else 1)
        wanted = [f"model.layers.{i}.{name}" for i in layers for name in group]
        config[flag] = any(name in tensors for name in gguf_names(model_type, wanted, len(layers)).values())
    if arch.swa_period:
        pattern = keys.get(f"{prefix}.attention.sliding_window_pattern", arch.swa_period)
        if isinstance(pattern, int):
            pattern = _regular(pattern, config["num_hidden_layers"])
        config["layer_types"] = ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
        config["query_pre_attn_scalar"] = _assumed_attention_scalar(model_type, config)
    if arch.rope_scalings:
        config["rope_scaling"] = _scaling_from_keys(prefix, config, keys, factors)
    return config


def _from_keys(prefix: str, hparam: Hparam, keys: Mapping[str, Any]) -> Any:
    given = [keys[f"{prefix}.{key}"] for key in hparam.keys if f"{prefix}.{key}" in keys]
    if any(value != given[0] for value in given) or (not given and hparam.absent is None):
        what = f"contradict each other ({given})" if given else "are missing"
        raise SlimpiError(f"the GGUF's keys {prefix}.{', '.join(hparam.keys)} {what}. Convert the model again.")
    value = given[0] if given else hparam.absent
    if hparam.per_layer:
        return _list_from_key(prefix, hparam, value, keys)
    if not isinstance(value, (int, float)) or (given and value <= 0):
        raise SlimpiError(f"the GGUF's key {prefix}.{hparam.keys[0]} is {value!r:.80}, which is not supported.")
    # The shortest decimal that gives the stored float32: 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _list_from_key(prefix: str, hparam: Hparam, value: Any, keys: Mapping[str, Any]) -> list[int]:
    """A number a layer; llama.cpp takes a single one for all of them."""
    n_layers = keys[f"{prefix}.block_count"]
    values = value if isinstance(value, list) else [value] * int(min(n_layers, _MAX_LAYERS))
    if any(type(v) is not int for v in values):
        raise SlimpiError(f"the GGUF's key {prefix}.{hparam.keys[0]} is {value!r:.80}, which is not supported.")
    return values


def _scaling_from_keys(
    prefix: str, config: Config, keys: Mapping[str, Any], factors: np.ndarray | None
) -> dict[str, Any] | None:
    kind = keys.get(f"{prefix}.rope.scaling.type", "none")
    if factors is not None and factors.shape == (config["head_dim"] // 2,):
        scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3_DEFAULTS}
        expected = rope_factors(config["model_type"], {**config, "rope_scaling": scaling})
        if expected is not None and np.allclose(expected, factors, rtol=1e-4):
            return scaling
    if factors is not None:
        raise SlimpiError("the GGUF's rope factors are of no published Llama 3 scaling. Use its HF folder instead.")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": keys.get(f"{prefix}.rope.scaling.factor")}
    if kind == "yarn":
        original = keys.get(f"{prefix}.rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
    return scaling

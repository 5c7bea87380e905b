"""What slimpi knows of each model family, as data: tensors and their shapes, GGUF keys, and what llama.cpp assumes.

Facts from llama.cpp (conversion/*.py, src/models/*.cpp) and transformers' modelling files. A config that
llama.cpp would run differently from transformers is refused, never approximated.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import gguf
import numpy as np

from device.records import SlimpiError
from pipeline.layers import Fold

Config = dict[str, Any]

_ROTARY_BUFFERS = ("*rotary_emb.*",)


@dataclass(frozen=True)
class Hparam:
    """One number of config.json and the GGUF keys (after "{arch}.") that carry it.

    `absent` is what llama.cpp takes when a GGUF lacks the key; None = the key must be there.
    `per_layer`: a list with one int a decoder layer, 0 where the layer lacks the part.
    """

    config: str
    keys: tuple[str, ...]
    absent: float | None = None
    per_layer: bool = False


@dataclass(frozen=True)
class Absence:
    """What a layer lacks if its entry of the per-layer value `config` is 0: tensors by how their names begin.

    instead: the tensors that it has for them.
    """

    config: str
    lacks: tuple[str, ...]
    instead: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Shapes are symbols: v vocabulary, d hidden, f intermediate, q and k widths of all query and key heads, h head.
    `fixed` are config values that llama.cpp hard-codes. `swa_period`: every n-th layer attends to everything.
    `renamed`: prefixes of tensor names in multimodal checkpoints, and what they are in the text model's own.
    `ignored`: patterns of tensors that are no part of the language model, or are recomputed.
    `folds`: input scales that can be hidden in what precedes, in GGUF names without `blk.N.`; see `layer_folds`.
    `absences`: in this order, what makes a layer unlike the others; none = all layers are alike.
    `defaults_of`: model_type whose class in transformers fills in what a config.json leaves out; "" = its own.
    """

    gguf_arch: gguf.MODEL_ARCH
    hf_class: str
    hparams: tuple[Hparam, ...]
    layer_tensors: dict[str, tuple[str, ...]]
    fixed: dict[str, Any]
    optional_tensors: dict[str, dict[str, tuple[str, ...]]]
    folds: tuple[Fold, ...]
    rope_scalings: tuple[str, ...] = ()
    norm_offset: float = 0.0
    permuted: tuple[str, ...] = ()
    swa_period: int = 0
    n_layers_27b: int = 0
    always_tied: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = _ROTARY_BUFFERS
    absences: tuple[Absence, ...] = ()
    defaults_of: str = ""

    @property
    def per_layer(self) -> tuple[str, ...]:
        """The config values that are lists with an entry a decoder layer."""
        return tuple(hparam.config for hparam in self.hparams if hparam.per_layer)


_SIZES = (
    Hparam("max_position_embeddings", ("context_length",)),
    Hparam("hidden_size", ("embedding_length",)),
    Hparam("num_hidden_layers", ("block_count",)),
    Hparam("intermediate_size", ("feed_forward_length",)),
    Hparam("num_attention_heads", ("attention.head_count",)),
    Hparam("num_key_value_heads", ("attention.head_count_kv",)),
    Hparam("rms_norm_eps", ("attention.layer_norm_rms_epsilon",)),
    Hparam("rope_theta", ("rope.freq_base",), absent=10000.0),
)
# -1: derived from the other sizes when the key is absent.
_HEAD = Hparam("head_dim", ("attention.key_length", "attention.value_length"), absent=-1)
_ROTATED_HEAD = Hparam("head_dim", (*_HEAD.keys, "rope.dimension_count"), absent=-1)

_UNEVEN = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
_UNEVEN_SIZES = tuple(replace(hparam, per_layer=hparam.config in _UNEVEN) for hparam in _SIZES)

# llama.cpp's src/models/deci.cpp: a layer without key heads multiplies its normed input by one matrix.
_ABSENCES = (
    Absence("intermediate_size", ("post_attention_layernorm.", "mlp.")),
    Absence("num_key_value_heads", ("self_attn.",), {"self_attn.linear_attn.weight": ("d", "d")}),
    Absence("num_attention_heads", ("input_layernorm.", "self_attn.")),
)

_LAYER = {
    "input_layernorm.weight": ("d",),
    "self_attn.q_proj.weight": ("q", "d"),
    "self_attn.k_proj.weight": ("k", "d"),
    "self_attn.v_proj.weight": ("k", "d"),
    "self_attn.o_proj.weight": ("d", "q"),
    "post_attention_layernorm.weight": ("d",),
    "mlp.gate_proj.weight": ("f", "d"),
    "mlp.up_proj.weight": ("f", "d"),
    "mlp.down_proj.weight": ("d", "f"),
}
_QKV_BIAS: dict[str, tuple[str, ...]] = {
    "self_attn.q_proj.bias": ("q",),
    "self_attn.k_proj.bias": ("k",),
    "self_attn.v_proj.bias": ("k",),
}
_MLP_BIAS: dict[str, tuple[str, ...]] = {
    "mlp.gate_proj.bias": ("f",),
    "mlp.up_proj.bias": ("f",),
    "mlp.down_proj.bias": ("d",),
}
_GEMMA_LAYER = {
    **_LAYER,
    "pre_feedforward_layernorm.weight": ("d",),
    "post_feedforward_layernorm.weight": ("d",),
}

# GGUF calls the norm before the gate ffn_norm in every family; Gemma's norms after a part are other tensors, and its
# norm gains have the offset added, so that dividing them is all there is to do. ffn_up's output is multiplied by the
# activated gate before ffn_down sees it, attn_v's is averaged over positions before attn_output does: both are linear.
_FOLDS = (
    Fold("attn_norm.weight", ("attn_q.weight", "attn_k.weight", "attn_v.weight")),
    Fold("attn_v.weight", ("attn_output.weight",)),
    Fold("ffn_norm.weight", ("ffn_gate.weight", "ffn_up.weight")),
    Fold("ffn_up.weight", ("ffn_down.weight",)),
)

ARCHITECTURES = {
    "llama": Architecture(
        gguf_arch=gguf.MODEL_ARCH.LLAMA,
        hf_class="LlamaForCausalLM",
        hparams=(*_SIZES, _ROTATED_HEAD),
        layer_tensors=_LAYER,
        optional_tensors={
            "attention_bias": {**_QKV_BIAS, "self_attn.o_proj.bias": ("d",)},
            "mlp_bias": _MLP_BIAS,
        },
        folds=_FOLDS,
        fixed={"hidden_act": "silu"},
        rope_scalings=("llama3", "linear", "yarn"),
        permuted=("q_proj", "k_proj"),
    ),
    "qwen2": Architecture(
        gguf_arch=gguf.MODEL_ARCH.QWEN2,
        hf_class="Qwen2ForCausalLM",
        hparams=_SIZES,
        layer_tensors={**_LAYER, **_QKV_BIAS},
        optional_tensors={},
        folds=_FOLDS,
        fixed={"hidden_act": "silu", "use_sliding_window": False},
        rope_scalings=("linear", "yarn"),
    ),
    "gemma2": Architecture(
        gguf_arch=gguf.MODEL_ARCH.GEMMA2,
        hf_class="Gemma2ForCausalLM",
        hparams=(
            *_SIZES,
            _HEAD,
            Hparam("sliding_window", ("attention.sliding_window",), absent=4096),
            Hparam("attn_logit_softcapping", ("attn_logit_softcapping",), absent=50.0),
            Hparam("final_logit_softcapping", ("final_logit_softcapping",), absent=30.0),
        ),
        layer_tensors=_GEMMA_LAYER,
        optional_tensors={},
        folds=_FOLDS,
        fixed={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
        norm_offset=1.0,
        swa_period=2,
        n_layers_27b=46,
        always_tied=True,
    ),
    "gemma3_text": Architecture(
        gguf_arch=gguf.MODEL_ARCH.GEMMA3,
        hf_class="Gemma3ForCausalLM",
        hparams=(
            *_SIZES,
            _HEAD,
            Hparam("sliding_window", ("attention.sliding_window",)),
            Hparam("rope_local_base_freq", ("rope.freq_base_swa",), absent=10000.0),
        ),
        layer_tensors={**_GEMMA_LAYER, "self_attn.q_norm.weight": ("h",), "self_attn.k_norm.weight": ("h",)},
        optional_tensors={},
        folds=_FOLDS,
        fixed={
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        rope_scalings=("linear",),
        norm_offset=1.0,
        swa_period=6,
        n_layers_27b=62,
        renamed=(
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("model.language_model.", "model."),
        ),
        ignored=(*_ROTARY_BUFFERS, "*vision_tower.*", "*multi_modal_projector.*"),
    ),
    "deci": Architecture(
        gguf_arch=gguf.MODEL_ARCH.DECI,
        hf_class="UnevenLlamaForCausalLM",  # pipeline.uneven_model's: transformers has no class for it
        hparams=(*_UNEVEN_SIZES, _ROTATED_HEAD),
        layer_tensors=_LAYER,
        optional_tensors={
            "attention_bias": _QKV_BIAS,
            "attention_out_bias": {"self_attn.o_proj.bias": ("d",)},
            "mlp_bias": _MLP_BIAS,
        },
        folds=_FOLDS,
        fixed={"hidden_act": "silu"},
        rope_scalings=("llama3", "linear", "yarn"),
        permuted=("q_proj", "k_proj"),
        absences=_ABSENCES,
        defaults_of="llama",
    ),
}
"""Hugging Face model_type -> family. Multimodal gemma3 checkpoints are read as their text part, gemma3_text."""

ROPE_FACTORS = "rope_freqs.weight"
"""GGUF tensor with the divisors of llama3 rope scaling, float32 (head_dim / 2,)."""


def architecture(model_type: str) -> Architecture:
    """The family of a config.json's model_type; SlimpiError lists the supported ones."""
    if model_type not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, "gemma3"])
        raise SlimpiError(f"architecture {model_type!r} is not supported. Supported: {known}.")
    return ARCHITECTURES[model_type]


def model_type_of(gguf_arch: str) -> str:
    """The model_type whose GGUF architecture has this name."""
    names = {gguf.MODEL_ARCH_NAMES[a.gguf_arch]: model_type for model_type, a in ARCHITECTURES.items()}
    if gguf_arch not in names:
        raise SlimpiError(f"GGUF architecture {gguf_arch!r} is not supported. Supported: {', '.join(names)}.")
    return names[gguf_arch]


def layer_config(model_type: str, config: Config, index: int) -> Config:
    """The config as decoder layer `index` has it: its own entry of every per-layer list."""
    return {**config, **{key: config[key][index] for key in ARCHITECTURES[model_type].per_layer}}


def tensor_shapes(model_type: str, config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor the checkpoint must have, by its Hugging Face name, with its shape."""
    sizes = {"v": config["vocab_size"], "d": config["hidden_size"]}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes["v"], sizes["d"])}
    for i in range(config["num_hidden_layers"]):
        own = layer_config(model_type, config, i)
        sizes |= {
            "f": own["intermediate_size"],
            "h": own["head_dim"],
            "q": own["num_attention_heads"] * own["head_dim"],
            "k": own["num_key_value_heads"] * own["head_dim"],
        }
        for name, symbols in _layer_tensors(ARCHITECTURES[model_type], own).items():
            shapes[f"model.layers.{i}.{name}"] = tuple(sizes[s] for s in symbols)
    shapes["model.norm.weight"] = (sizes["d"],)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (sizes["v"], sizes["d"])
    return shapes


def _layer_tensors(arch: Architecture, own: Config) -> dict[str, tuple[str, ...]]:
    """Symbolic shapes of the tensors of a layer with this config."""
    found = dict(arch.layer_tensors)
    for flag, tensors in arch.optional_tensors.items():
        found |= tensors if own[flag] else {}
    for absence in arch.absences:
        if not own[absence.config]:
            found = {name: shape for name, shape in found.items() if not name.startswith(absence.lacks)}
            found |= absence.instead
    return found


def layer_folds(model_type: str, config: Config) -> tuple[Fold, ...]:
    """The folds of every decoder block of a model with this config, their producers before them in the block. A block
    that lacks one of a fold's tensors has not got the fold."""
    return tuple(replace(fold, head_size=config["head_dim"]) for fold in ARCHITECTURES[model_type].folds)


def gguf_names(model_type: str, names: list[str], n_layers: int) -> dict[str, str]:
    """Hugging Face tensor name -> GGUF tensor name."""
    mapping = gguf.get_tensor_name_map(ARCHITECTURES[model_type].gguf_arch, n_layers)
    found = {name: mapping.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    for name, target in found.items():
        if target is None:
            raise SlimpiError(f"tensor {name} has no place in a {model_type} GGUF. Remove it from the checkpoint.")
    return found


def row_order(model_type: str, config: Config, name: str) -> np.ndarray | None:
    """Row order of a tensor in GGUF (gguf = hf[order]), or None if the rows stay.

    llama.cpp rotates adjacent pairs where transformers rotates halves: a head's rows (2, h/2) become (h/2, 2).
    """
    part = name.split(".")[-2]
    if part not in ARCHITECTURES[model_type].permuted:
        return None
    own = layer_config(model_type, config, int(name.split(".")[2]))
    heads = own["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
    order = np.arange(heads * config["head_dim"]).reshape(heads, 2, config["head_dim"] // 2)
    return order.swapaxes(1, 2).reshape(-1)


def norm_offset(model_type: str, name: str) -> float:
    """What GGUF's norm weights have added: Gemma's norms multiply by 1 + weight."""
    return ARCHITECTURES[model_type].norm_offset if name.endswith("norm.weight") else 0.0

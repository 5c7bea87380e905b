"""A small decoder block with inputs as language models have them: correlated, a few columns much larger."""

from __future__ import annotations

import torch

from pipeline.architectures import layer_folds
from pipeline.layers import Layer, Stats

D, KV, FF, HEAD = 256, 128, 256, 32
SHAPES = {
    "attn_q.weight": (D, D),
    "attn_k.weight": (KV, D),
    "attn_v.weight": (KV, D),
    "attn_output.weight": (D, D),
    "ffn_gate.weight": (FF, D),
    "ffn_up.weight": (FF, D),
    "ffn_down.weight": (D, FF),
}
INPUTS = {
    "attn_norm": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    "attn_v": ("attn_output.weight",),
    "ffn_norm": ("ffn_gate.weight", "ffn_up.weight"),
    "ffn_up": ("ffn_down.weight",),
}


def samples(n: int, columns: int, seed: int, outliers: float = 10.0) -> torch.Tensor:
    """float32 (n, columns), every 16th column `outliers` times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, columns, generator=generator)
    x = x + 0.5 * torch.randn(n, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
    size = torch.exp(0.5 * torch.randn(columns, generator=generator))
    size[::16] *= outliers
    return x * size


def stats_of(x: torch.Tensor) -> Stats:
    return Stats((x * x).mean(0), x.abs().mean(0), len(x), lambda: x.T @ x / len(x))


def toy_layer(seed: int = 0, outliers: float = 10.0) -> tuple[Layer, dict[str, Stats]]:
    generator = torch.Generator().manual_seed(seed)
    matrices = {n: 0.05 * torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
    vectors = {n: 1 + 0.2 * torch.randn(D, generator=generator) for n in ("attn_norm.weight", "ffn_norm.weight")}
    vectors["attn_v.bias"] = 0.1 * torch.randn(KV, generator=generator)
    stats = {}
    for at, names in enumerate(INPUTS.values()):
        known = stats_of(samples(400, matrices[names[0]].shape[1], seed + at, outliers))
        stats |= dict.fromkeys(names, known)
    return Layer(0, matrices, vectors, layer_folds("llama", {"head_dim": HEAD})), stats


def two_matrices(seed: int = 0, rows: int = 24) -> tuple[Layer, dict[str, Stats]]:
    """A part of the toy layer that is quick to quantize: a norm and its two consumers, of few rows."""
    layer, stats = toy_layer(seed)
    names = ("ffn_gate.weight", "ffn_up.weight")
    matrices = {name: layer.matrices[name][:rows] for name in names}
    vectors = {"ffn_norm.weight": layer.vectors["ffn_norm.weight"]}
    return Layer(0, matrices, vectors, layer.folds[2:3]), {name: stats[name] for name in names}


def block(matrices: dict[str, torch.Tensor], vectors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What a decoder block does with its matrices and norms, with attention that only looks at the token itself."""
    m, v = matrices, vectors
    h = x / x.square().mean(1, keepdim=True).sqrt() * v["attn_norm.weight"]
    gate = torch.sigmoid((h @ m["attn_q.weight"].T).reshape(len(x), -1, KV) * (h @ m["attn_k.weight"].T)[:, None])
    value = (h @ m["attn_v.weight"].T + v["attn_v.bias"]).reshape(len(x), -1, HEAD).repeat_interleave(D // KV, 1)
    x = x + (value.reshape(len(x), -1) * gate.mean((1, 2))[:, None]) @ m["attn_output.weight"].T
    h = x / x.square().mean(1, keepdim=True).sqrt() * v["ffn_norm.weight"]
    up = torch.nn.functional.silu(h @ m["ffn_gate.weight"].T) * (h @ m["ffn_up.weight"].T)
    return x + up @ m["ffn_down.weight"].T

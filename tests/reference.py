"""Naive float64 twins of what the project computes: slow, obvious, and sharing no code with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def llama_logits(weights: dict[str, Array], shape: Any, tokens: list[int]) -> Array:
    """(n, n_vocab) logits of a llama (Touvron et al. 2023) in float64 from its GGUF tensors, token by token and
    head by head. `shape` has layers, dim, heads, kv_heads, eps, rope_base. q and k rows are paired as llama.cpp's
    LLAMA_ROPE_TYPE_NORM wants them: (0, 1), (2, 3), ..."""
    w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    size = shape.dim // shape.heads
    x = [w["token_embd.weight"][token] for token in tokens]
    for layer in range(shape.layers):
        part = {name.split(".", 2)[2]: t for name, t in w.items() if name.startswith(f"blk.{layer}.")}
        normed = [rms_norm(row, part["attn_norm.weight"], shape.eps) for row in x]
        q = [heads_of(part["attn_q.weight"] @ row, size, at, shape.rope_base) for at, row in enumerate(normed)]
        k = [heads_of(part["attn_k.weight"] @ row, size, at, shape.rope_base) for at, row in enumerate(normed)]
        v = [(part["attn_v.weight"] @ row).reshape(-1, size) for row in normed]
        for at in range(len(tokens)):
            mixed = []
            for head in range(shape.heads):
                shared = head // (shape.heads // shape.kv_heads)
                scores = [q[at][head] @ k[past][shared] / math.sqrt(size) for past in range(at + 1)]
                shares = np.exp(np.array(scores) - max(scores))
                shares /= shares.sum()
                mixed.append(sum(share * v[past][shared] for past, share in enumerate(shares)))
            x[at] = x[at] + part["attn_output.weight"] @ np.concatenate(mixed)
        for at, row in enumerate(x):
            y = rms_norm(row, part["ffn_norm.weight"], shape.eps)
            gate = part["ffn_gate.weight"] @ y
            x[at] = row + part["ffn_down.weight"] @ (gate / (1 + np.exp(-gate)) * (part["ffn_up.weight"] @ y))
    return np.array([w["output.weight"] @ rms_norm(row, w["output_norm.weight"], shape.eps) for row in x])


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x) + eps) * gain


def heads_of(x: Array, size: int, position: int, base: float) -> Array:
    """(heads, size) with each neighbouring pair rotated by its angle (Su et al. 2021, RoPE)."""
    heads = x.reshape(-1, size).copy()
    for pair in range(size // 2):
        angle = position * base ** (-2 * pair / size)
        even, odd = heads[:, 2 * pair].copy(), heads[:, 2 * pair + 1].copy()
        heads[:, 2 * pair] = even * math.cos(angle) - odd * math.sin(angle)
        heads[:, 2 * pair + 1] = even * math.sin(angle) + odd * math.cos(angle)
    return heads


def negative_log_likelihood(logits: Array, token: int) -> float:
    row = [float(value) for value in logits]
    top = max(row)
    return math.log(math.fsum(math.exp(value - top) for value in row)) - (row[token] - top)


def chunk_nlls(evaluate: Any, tokens: list[int], n_ctx: int, bos: int | None) -> list[float]:
    """Mean NLL of each chunk as llama-perplexity defines it; evaluate(list of tokens) -> (n, n_vocab) logits."""
    means = []
    for start in range(0, len(tokens) - n_ctx + 1, n_ctx):
        chunk = tokens[start : start + n_ctx]
        seen = chunk if bos is None else [bos, *chunk[1:]]
        logits = evaluate(seen)
        scored = [negative_log_likelihood(logits[at], chunk[at + 1]) for at in range(n_ctx // 2, n_ctx - 1)]
        means.append(math.fsum(scored) / len(scored))
    return means


def kl_divergence(golden: Array, other: Array) -> float:
    """KL(softmax(golden) || softmax(other)) of two rows of logits, nats."""
    p = [math.exp(-negative_log_likelihood(golden, i)) for i in range(len(golden))]
    q = [math.exp(-negative_log_likelihood(other, i)) for i in range(len(other))]
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

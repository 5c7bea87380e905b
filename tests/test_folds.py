"""Folds: scaling what they name leaves what llama.cpp computes from the file as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType

from device.records import SlimpiError
from pipeline.architectures import ARCHITECTURES, layer_folds
from pipeline.checkpoint import Checkpoint, Tensor, load
from pipeline.export.gguf import EncodedTensor, export_gguf, gguf_tensors
from pipeline.folds import changed_vectors, fold_in, n_scales, per_column, per_producer, possible, scaled_stats
from pipeline.layers import Fold, Layer, Stats
from tests.llama_cpp_side import llama_logits
from tests.test_convert import TOKENS, agreement, hf_logits
from tests.tiny_models import save_tiny

FAMILIES = ["llama", "llama-biased", "qwen2", "gemma2", "gemma3"]


def layers_of(checkpoint: Checkpoint) -> list[Layer]:
    folds = layer_folds(checkpoint.architecture, checkpoint.config)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(checkpoint.config["num_hidden_layers"])]
    for name, tensor in gguf_tensors(checkpoint).items():
        if name.startswith("blk."):
            _, index, part = name.split(".", 2)
            parts[int(index)][part] = tensor.read().float()
    split = [({n: t for n, t in p.items() if t.ndim == 2}, {n: t for n, t in p.items() if t.ndim == 1}) for p in parts]
    return [Layer(i, matrices, vectors, folds) for i, (matrices, vectors) in enumerate(split)]


def logits_of(checkpoint: Checkpoint, layers: list[Layer], folder: Path) -> np.ndarray:
    """llama.cpp's logits with these float32 tensors in the file."""
    values = {f"blk.{la.index}.{n}": t for la in layers for n, t in {**la.matrices, **la.vectors}.items()}

    def encode(name: str, tensor: Tensor) -> EncodedTensor | None:
        if name not in values:
            return None
        assert values[name].shape == tensor.shape
        return EncodedTensor(GgmlType.F32, lambda: values[name].contiguous().numpy().view(np.uint8))

    export_gguf(checkpoint, folder / "m.gguf", "F32", encode)
    return llama_logits(folder / "m.gguf", TOKENS, folder)


def random_scales(n: int, seed: int) -> torch.Tensor:
    return torch.exp(torch.randn(n, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_fold_leaves_the_logits(name: str, tmp_path: Path) -> None:
    model = save_tiny(name, tmp_path)
    checkpoint = load(tmp_path)
    layers = layers_of(checkpoint)
    for at, layer in enumerate(layers):
        assert len(layer.folds) == 4
        for number, fold in enumerate(layer.folds):
            layer = fold_in(layer, fold, random_scales(n_scales(layer, fold), 10 * at + number))
        changed = [n for n, t in layer.matrices.items() if (t - layers[at].matrices[n]).abs().max() > 0.1]
        assert len(changed) == 7, changed
        layers[at] = layer
    top1, kl = agreement(hf_logits(model, TOKENS), logits_of(checkpoint, layers, tmp_path))
    assert top1 >= 0.995
    assert kl < 1e-6


def test_the_comparison_notices_a_wrong_fold(tmp_path: Path) -> None:
    """Scales that the producer does not take back change the logits by far."""
    model = save_tiny("llama-biased", tmp_path)
    checkpoint = load(tmp_path)
    layers = layers_of(checkpoint)
    fold = layers[0].folds[1]
    scaled = fold_in(layers[0], fold, random_scales(n_scales(layers[0], fold), 0))
    layers[0] = replace(scaled, vectors=layers[0].vectors)
    assert agreement(hf_logits(model, TOKENS), logits_of(checkpoint, layers, tmp_path))[1] > 1e-3


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_producers_come_first(model_type: str) -> None:
    """A matrix's rows are scaled as a producer after its columns as a consumer, in the order of the table."""
    folds = layer_folds(model_type, {"head_dim": 8})
    consumed = [name for fold in folds for name in fold.consumers]
    assert sorted(consumed) == sorted(set(consumed)), "a column has one scale"
    assert len(consumed) == 7
    assert all(fold.head_size == 8 for fold in folds)


def test_shared_heads() -> None:
    s = torch.tensor([1.0, 2.0, 3.0, 4.0])
    shared = per_column(s, 8, 2)
    assert shared.tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
    assert per_column(s, 4, 2).tolist() == s.tolist()
    assert torch.equal(per_producer(shared, 4, 2), s)
    assert per_producer(torch.arange(8.0), 4, 2).tolist() == [1, 2, 5, 6]


def test_stats_of_scaled_inputs() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    s = random_scales(6, 2)

    def stats(x: torch.Tensor) -> Stats:
        return Stats((x * x).mean(0), x.abs().mean(0), len(x), lambda: x.T @ x / len(x))

    found, expected = scaled_stats(stats(x), s), stats(x / s)
    torch.testing.assert_close(found.mean_x2, expected.mean_x2)
    torch.testing.assert_close(found.mean_abs_x, expected.mean_abs_x)
    torch.testing.assert_close(found.hessian(), expected.hessian())


def test_what_cannot_change_is_said() -> None:
    matrices = {name: torch.zeros(4, 4) for name in ("attn_q.weight", "attn_k.weight")}
    layer = Layer(3, matrices, {"attn_norm.weight": torch.ones(4)}, (Fold("attn_norm.weight", tuple(matrices)),))
    assert possible(layer, matrices) == (list(layer.folds), [])
    folds, notes = possible(layer, {"attn_q.weight": 0})
    assert folds == []
    assert notes == ["blk.3.attn_norm.weight: not scaled, attn_k.weight keeps its float weights"]
    with pytest.raises(SlimpiError, match=r"blk\.3\.attn_norm\.weight makes 3 values in heads of 1"):
        n_scales(replace(layer, vectors={"attn_norm.weight": torch.ones(3)}), layer.folds[0])


def test_changed_vectors() -> None:
    layer = Layer(0, {"a.weight": torch.ones(2, 2)}, {"n.weight": torch.ones(2), "b": torch.ones(1)})
    after = fold_in(layer, Fold("n.weight", ("a.weight",)), torch.tensor([2.0, 4.0]))
    assert {n: v.tolist() for n, v in changed_vectors(layer, after).items()} == {"n.weight": [0.5, 0.25]}

"""What a quantization method sees: one decoder block's matrices, and what calibration knows of their inputs.

Tensors carry GGUF names without `blk.N.` and GGUF layouts: matrices (rows = outputs, columns = inputs), norms with
their offset added, so that a norm's weight is a plain gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from pipeline.formats import Format, Quantized


@dataclass(frozen=True)
class Stats:
    """The input x of one linear layer over the calibration tokens.

    mean_x2, mean_abs_x: float32 (columns,). hessian() reads E[x x^T], float32 (columns, columns), from disk when it
    is asked for; layers with the same input share it.
    """

    mean_x2: torch.Tensor
    mean_abs_x: torch.Tensor
    n_tokens: int
    hessian: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Fold:
    """An input scale that costs nothing at run time: dividing rows of `producer` (a norm's gain, or a matrix and its
    bias) by s and multiplying the same columns of every one of `consumers` by s leaves the block's function as it is.

    With grouped queries attn_v has fewer rows than attn_output columns: `head_size` columns after `head_size` columns
    are the query heads that share one key head, and so its s.
    """

    producer: str
    consumers: tuple[str, ...]
    head_size: int = 1


@dataclass(frozen=True)
class Layer:
    """Decoder block `index`: float32 matrices and vectors on one device, and the folds its architecture allows."""

    index: int
    matrices: Mapping[str, torch.Tensor]
    vectors: Mapping[str, torch.Tensor]
    folds: tuple[Fold, ...] = ()


@dataclass(frozen=True)
class QuantizedLayer:
    """What a method made of a layer: codes for every planned matrix, the vectors that a fold changed, and what
    it wants said (fallbacks, raised damping)."""

    tensors: Mapping[str, Quantized]
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Method = Callable[[Layer, Mapping[str, Stats], Mapping[str, Format]], QuantizedLayer]
"""(layer, stats by matrix, format by matrix) -> quantized layer. Pure: the same input gives the same codes."""


Single = Callable[[torch.Tensor, Stats | None, Format], tuple[Quantized, list[str]]]
"""(matrix, its statistics, format) -> (codes, notes)"""


@dataclass(frozen=True)
class MethodEntry:
    """An entry of METHODS: the function, and what of Stats it reads ("nothing", "means" or "hessian").

    outside: how it codes a matrix outside the blocks for which there are statistics; None: by `search`.
    lattices: whether it also takes the types of `llama_codes`.
    """

    run: Method
    needs: str
    outside: Single | None = None
    lattices: bool = False


def each(quantize: Single) -> Method:
    """A method that looks at one matrix at a time."""

    def run(layer: Layer, stats: Mapping[str, Stats], formats: Mapping[str, Format]) -> QuantizedLayer:
        tensors, notes = {}, []
        for name, kind in formats.items():
            tensors[name], said = quantize(layer.matrices[name], stats.get(name), kind)
            notes += [f"blk.{layer.index}.{name}: {line}" for line in said]
        return QuantizedLayer(tensors, notes=notes)

    return run

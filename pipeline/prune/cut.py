"""A cut: what pruning leaves of a model, as the indices that are kept; and the checkpoint that it leaves.

The units are key-value groups (a key head, its value head and all query heads that read them: KV groups stay whole),
channels of the MLP, and channels of the hidden state. A layer that keeps neither groups nor channels is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from device.records import SlimpiError
from pipeline.architectures import ARCHITECTURES, Config, tensor_shapes
from pipeline.checkpoint import Checkpoint, Tensor, held
from pipeline.uneven import as_uneven, keeps_name, runnable

ATTENTION = "self_attn.o_proj.weight"
MLP = "mlp.down_proj.weight"
"""The matrix that ends each part of a layer."""
LINEAR = "self_attn.linear_attn.weight"


@dataclass(frozen=True)
class LayerCut:
    """What one layer keeps, ascending: indices of key-value groups and of MLP channels. () = that part is gone.

    linear: in the place of both one matrix (hidden, hidden), LINEAR, of the normalized hidden state.
    """

    groups: tuple[int, ...]
    channels: tuple[int, ...]
    linear: bool = False

    @property
    def gone(self) -> bool:
        return not self.groups and not self.channels and not self.linear


@dataclass(frozen=True)
class Cut:
    """One LayerCut for every layer of the whole model; `hidden`: kept channels of the hidden state, None = all."""

    layers: tuple[LayerCut, ...]
    hidden: tuple[int, ...] | None = None

    def replaced(self, index: int, layer: LayerCut) -> Cut:
        return replace(self, layers=(*self.layers[:index], layer, *self.layers[index + 1 :]))


@dataclass(frozen=True)
class Dims:
    """Sizes of a model whose layers are alike, and what a unit of each kind costs in weights of its matrices."""

    n_layers: int
    hidden: int
    channels: int
    groups: int
    queries_per_group: int
    head: int

    @property
    def group_weights(self) -> int:
        return self.hidden * self.head * (2 * self.queries_per_group + 2)

    @property
    def channel_weights(self) -> int:
        return 3 * self.hidden

    @property
    def multiple(self) -> int:
        """What channels stay divisible by: a K-quant's super-block where it divides them now, else a block."""
        return next((block for block in (256, 32) if self.channels % block == 0), 1)

    @property
    def whole(self) -> Cut:
        layer = LayerCut(tuple(range(self.groups)), tuple(range(self.channels)))
        return Cut((layer,) * self.n_layers)

    def weights(self, cut: Cut) -> int:
        """Weights in the matrices of the blocks that a cut keeps."""
        kept = sum(self.layer_weights(layer) for layer in cut.layers)
        return kept if cut.hidden is None else kept * len(cut.hidden) // self.hidden

    def layer_weights(self, layer: LayerCut) -> int:
        linear = self.hidden**2 if layer.linear else 0
        return len(layer.groups) * self.group_weights + len(layer.channels) * self.channel_weights + linear

    def share_removed(self, cut: Cut) -> float:
        return 1 - self.weights(cut) / self.weights(self.whole)


def dims_of(checkpoint: Checkpoint) -> Dims:
    """SlimpiError for a model whose layers differ already, and for query heads that its KV groups do not divide."""
    config = checkpoint.config
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if isinstance(heads, list):
        raise SlimpiError(f"{checkpoint.origin} was pruned to uneven layers already. Prune the model it came from.")
    if groups < 1 or heads % groups:
        raise SlimpiError(f"{checkpoint.origin} has {heads} heads, which its {groups} key-value groups do not divide.")
    return Dims(
        n_layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        channels=config["intermediate_size"],
        groups=groups,
        queries_per_group=heads // groups,
        head=config["head_dim"],
    )


def rounded(channels: float, multiple: int, most: int) -> int:
    """Channels to keep: the nearest multiple, at least one of them, at most all."""
    return min(most, max(multiple, round(channels / multiple) * multiple))


def indices_of(symbol: str, dims: Dims, layer: LayerCut, hidden: Sequence[int] | None) -> np.ndarray | None:
    """Which entries of a dimension (a symbol of `Architecture`) stay; None = all."""
    if symbol == "d":
        return None if hidden is None else np.array(hidden)
    if symbol == "f":
        return None if len(layer.channels) == dims.channels else np.array(layer.channels, dtype=np.int64)
    if symbol in ("q", "k") and len(layer.groups) != dims.groups:
        size = dims.head * (dims.queries_per_group if symbol == "q" else 1)
        return (np.array(layer.groups, dtype=np.int64)[:, None] * size + np.arange(size)).reshape(-1)
    return None


def apply(checkpoint: Checkpoint, cut: Cut, new: Mapping[str, torch.Tensor] | None = None) -> Checkpoint:
    """The checkpoint that a cut leaves, its tensors read on demand.

    `new`: tensors with other values than a slice of the old ones, by the name they have in the whole model, in the
    cut's shape. Layers that are alike keep the family; uneven ones become `deci`. SlimpiError where the family has no
    such form, or nothing is left.
    """
    dims, new = dims_of(checkpoint), new or {}
    kept = [index for index, layer in enumerate(cut.layers) if not layer.gone]
    if not kept:
        raise SlimpiError("nothing is left of the model: every layer is gone. Prune less.")
    base = _resized(checkpoint, dims, cut, kept)
    symbols = _symbols(checkpoint)
    tensors = {}
    for name in tensor_shapes(base.architecture, base.config):
        old, layer, short = _origin(name, kept, cut)
        if old in new:
            tensors[name] = held(name, new[old])
        else:
            which = [indices_of(s, dims, layer, cut.hidden) for s in symbols.get(short, ())]
            tensors[name] = sliced(checkpoint.tensors[old], name, which)
    return runnable(replace(base, tensors=tensors))


def _resized(checkpoint: Checkpoint, dims: Dims, cut: Cut, kept: list[int]) -> Checkpoint:
    """The checkpoint with the config that a cut leaves; its tensors are still the old ones."""
    layers = [cut.layers[index] for index in kept]
    base = replace(checkpoint, config=_config(checkpoint.config, dims, cut, kept))
    # Heads without key heads are how deci names a linear layer.
    heads = [1 if layer.linear else len(layer.groups) * dims.queries_per_group for layer in layers]
    sizes = [(n, len(layer.groups), len(layer.channels)) for n, layer in zip(heads, layers, strict=True)]
    keys = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    even = {**base.config, **dict(zip(keys, sizes[0], strict=True))}
    if len(set(sizes)) == 1 and all(sizes[0]) and keeps_name(base.architecture, even):
        return replace(base, config=even)
    base = as_uneven(base)
    lists = {key: list(values) for key, values in zip(keys, zip(*sizes, strict=True), strict=True)}
    return replace(base, config={**base.config, **lists})


def _config(config: Config, dims: Dims, cut: Cut, kept: list[int]) -> Config:
    config = {**config, "num_hidden_layers": len(kept)}
    if cut.hidden is not None:
        config["hidden_size"] = len(cut.hidden)
    if isinstance(kinds := config.get("layer_types"), list) and len(kinds) == dims.n_layers:
        config["layer_types"] = [kinds[index] for index in kept]
    return config


def _symbols(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """The dimensions of every tensor, by name; of those of layers by what follows `model.layers.N.`."""
    arch = ARCHITECTURES[checkpoint.architecture]
    found = dict(arch.layer_tensors)
    for flag, tensors in arch.optional_tensors.items():
        found |= tensors if checkpoint.config[flag] else {}
    outside = {"model.embed_tokens.weight": ("v", "d"), "model.norm.weight": ("d",), "lm_head.weight": ("v", "d")}
    return found | outside


def _origin(name: str, kept: list[int], cut: Cut) -> tuple[str, LayerCut, str]:
    """(name in the whole model, its layer's cut, name without its layer)."""
    if not name.startswith("model.layers."):
        return name, LayerCut((), ()), name
    index, short = name.removeprefix("model.layers.").split(".", 1)
    old = kept[int(index)]
    return f"model.layers.{old}.{short}", cut.layers[old], short


def sliced(tensor: Tensor, name: str, which: Sequence[np.ndarray | None]) -> Tensor:
    """A tensor under a new name with only the rows and columns of `which` (None: all)."""
    rows, columns = (*which, None, None)[:2]
    shape = (tensor.shape[0] if rows is None else len(rows), *tensor.shape[1:])
    if columns is not None:
        shape = (shape[0], len(columns))
    take_columns = _taker(columns)

    def read_rows(start: int, stop: int) -> torch.Tensor:
        if rows is None:
            return take_columns(tensor.read_rows(start, stop))
        wanted = rows[start:stop]
        first = int(wanted.min())
        return take_columns(tensor.read_rows(first, int(wanted.max()) + 1)[torch.from_numpy(wanted - first)])

    return Tensor(name, shape, tensor.dtype, read_rows)


def _taker(columns: np.ndarray | None) -> Callable[[torch.Tensor], torch.Tensor]:
    if columns is None:
        return lambda values: values
    index = torch.from_numpy(columns)
    return lambda values: values[:, index]


def describe(cut: Cut, dims: Dims) -> dict[str, Any]:
    """What a manifest says of a cut: layers, parts and widths that stay."""
    return {
        "layers": sum(not layer.gone for layer in cut.layers),
        "layers_before": dims.n_layers,
        "linear_layers": sum(layer.linear for layer in cut.layers),
        "kv_groups": [len(layer.groups) for layer in cut.layers],
        "channels": [len(layer.channels) for layer in cut.layers],
        "hidden": dims.hidden if cut.hidden is None else len(cut.hidden),
        "share_removed": round(dims.share_removed(cut), 4),
    }

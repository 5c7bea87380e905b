"""Quantize a checkpoint part by part: one decoder block in memory at a time, each kept on disk once it is done.

A part (a decoder block, the embeddings, the output matrix) is a stage of its own, a small GGUF file with the tensors
that were made of it. A run that was killed goes on from the parts that are whole. `encoder` reads them back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from device.records import SlimpiError
from pipeline.architectures import layer_folds
from pipeline.checkpoint import Checkpoint, Tensor
from pipeline.export.gguf import Encode, EncodedTensor, gguf_tensors
from pipeline.formats import FORMATS, Format, QTensor, Quantized, check_columns
from pipeline.gguf_file import add_keys, read_gguf
from pipeline.layers import Fold, Layer, QuantizedLayer, Stats
from pipeline.methods import METHODS, llama_codes, search
from pipeline.packing import pack
from pipeline.plan import Plan
from pipeline.progress import Tick
from pipeline.store import stage

_PART = "part.gguf"
_NOTES = "slimpi.notes"


@dataclass(frozen=True)
class Workshop:
    """Where parts are made: the stages' folder, a name for them, what identifies the weights and the statistics.

    outer_key: what identifies the statistics of matrices outside the blocks.
    """

    root: Path
    name: str
    weights_key: Any
    stats_key: Any
    device: torch.device
    say: Callable[[str], None] = print
    outer_key: Any = None


@dataclass(frozen=True)
class Parts:
    """Folders of the quantized blocks, and of the matrices outside of them; what the method said about the blocks."""

    blocks: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compute_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def coded(plan: Plan, lattices: bool = False) -> dict[str, Format]:
    """The tensors that get codes, by name; `lattices`: those of llama.cpp's own search too. SlimpiError if only it can
    choose them otherwise, or GGUF cannot hold them."""
    found = {}
    for name, asked in plan.formats.items():
        kind = FORMATS[asked]
        if kind.ggml_type is None:
            raise SlimpiError(f"{name} is planned as {asked}, which GGUF does not hold. Plan a ggml type.")
        ours = kind.codes is not None or (lattices and asked in llama_codes.TYPES)
        if not ours and asked not in ("F32", "F16", "BF16"):
            raise SlimpiError(f"{name} is planned as {asked}, whose codes only llama.cpp chooses. Plan another type.")
        if ours:
            found[name] = kind
    return found


def quantize_model(
    checkpoint: Checkpoint, method: str, plan: Plan, stats: Mapping[str, Stats], shop: Workshop, tick: Tick
) -> Parts:
    """Make every part that the plan gives codes; those already made of the same input by the same code are kept.

    Blocks are made by METHODS[method], one at a time; `stats` are by tensor name, {} for methods that need none. A
    matrix outside the blocks without statistics has its scales searched with equal weights, whatever the method.
    SlimpiError for formats that do not fit the tensors, and for statistics that the method needs and lacks.
    """
    tensors = gguf_tensors(checkpoint)
    wanted = coded(plan, METHODS[method].lattices)
    for name, kind in wanted.items():
        check_columns(name, tensors[name].shape[-1], kind)
    folds = layer_folds(checkpoint.architecture, checkpoint.config)
    count = _Count(sum(math.prod(tensors[name].shape) for name in wanted), tick)
    parts = Parts()
    for name, kind in wanted.items():
        if not name.startswith("blk."):
            parts.others.append(_quantize_matrix(tensors[name], kind, method, stats.get(name), shop, count))
    for index in range(checkpoint.config["num_hidden_layers"]):
        formats = {_short(name): kind for name, kind in wanted.items() if name.startswith(f"blk.{index}.")}
        if formats:
            block = _quantize_block(tensors, index, folds, method, formats, stats, shop)
            parts.blocks.append(block)
            parts.notes.extend(read_gguf(block / _PART).keys.get(_NOTES, []))  # type: ignore[arg-type]
            count.add(sum(math.prod(tensors[f"blk.{index}.{name}"].shape) for name in formats), f"blk.{index}")
    return parts


def quantize_in_memory(
    checkpoint: Checkpoint, method: str, formats: Mapping[str, Format], stats: Mapping[str, Stats], tick: Tick
) -> tuple[dict[str, Quantized], dict[str, tuple[torch.Tensor, torch.Tensor]], list[str]]:
    """For files that are written as a whole: codes of the decoder blocks' matrices among `formats`, by GGUF name and in
    GGUF's row order; the vectors that the method changed, (before, after); and its notes."""
    tensors = gguf_tensors(checkpoint)
    folds = layer_folds(checkpoint.architecture, checkpoint.config)
    device, n_layers = compute_device(), checkpoint.config["num_hidden_layers"]
    codes: dict[str, Quantized] = {}
    vectors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    notes: list[str] = []
    for index in range(n_layers):
        prefix = f"blk.{index}."
        mine = {name.removeprefix(prefix): kind for name, kind in formats.items() if name.startswith(prefix)}
        if mine:
            layer = read_layer(tensors, index, folds, device)
            made = METHODS[method].run(layer, _stats(method, index, mine, stats, device), mine)
            made = _checked(method, layer, mine, made)
            codes |= {prefix + name: q for name, q in made.tensors.items()}
            vectors |= {prefix + name: (layer.vectors[name].cpu(), v.cpu()) for name, v in made.vectors.items()}
            notes += made.notes
        tick(index + 1, n_layers, "layers")
    return codes, vectors, notes


@dataclass
class _Count:
    """Weights done so far, told in millions."""

    total: int
    tick: Tick
    done: int = 0

    def add(self, n_weights: int, what: str) -> None:
        self.done += n_weights
        self.tick(round(self.done / 1e6), round(self.total / 1e6), f"million weights, {what}")


def encoder(parts: Parts, plan: Plan) -> Encode:
    """For `export_gguf`: tensors of the parts as they lie there, the others in the float type of the plan."""
    stored = {t.name: t for part in parts.blocks + parts.others for t in read_gguf(part / _PART).tensors.values()}

    def encode(name: str, tensor: Tensor) -> EncodedTensor | gguf.GGMLQuantizationType | None:
        if (found := stored.get(name)) is not None:
            return EncodedTensor(found.type, lambda: found.read_rows(0, found.n_rows))
        return FORMATS[plan.formats[name]].ggml_type

    return encode


def read_layer(tensors: Mapping[str, Tensor], index: int, folds: tuple[Fold, ...], device: torch.device) -> Layer:
    """Decoder block `index` of `gguf_tensors` in float32 on the device, with the folds whose tensors it has."""
    block = {_short(n): t.read().float().to(device) for n, t in tensors.items() if n.startswith(f"blk.{index}.")}
    return Layer(
        index,
        {name: t for name, t in block.items() if t.ndim == 2},
        {name: t for name, t in block.items() if t.ndim == 1},
        tuple(fold for fold in folds if block.keys() >= {fold.producer, *fold.consumers}),
    )


def _short(name: str) -> str:
    """A block tensor's name without `blk.N.`."""
    return name.split(".", 2)[2]


def _quantize_block(
    tensors: Mapping[str, Tensor],
    index: int,
    folds: tuple[Fold, ...],
    method: str,
    formats: dict[str, Format],
    stats: Mapping[str, Stats],
    shop: Workshop,
) -> Path:
    """The folder of one block's part. Blocks that another plan gives the same formats are the same part."""
    entry = METHODS[method]

    def make(folder: Path) -> None:
        known = _stats(method, index, formats, stats, shop.device)
        layer = read_layer(tensors, index, folds, shop.device)
        made = _checked(method, layer, formats, entry.run(layer, known, formats))
        blocks = {f"blk.{index}.{name}": (q.format, pack(q)) for name, q in made.tensors.items()}
        vectors = {f"blk.{index}.{name}": v.float().cpu().numpy() for name, v in made.vectors.items()}
        _write_part(folder / _PART, blocks, vectors, made.notes)

    key = [shop.weights_key, {name: kind.name for name, kind in formats.items()}, shop.device.type]
    key += [shop.stats_key] if entry.needs != "nothing" else []
    return stage(shop.root, f"{shop.name}-{method}-blk.{index}", key, make, shop.say)


def _quantize_matrix(
    tensor: Tensor, kind: Format, method: str, stats: Stats | None, shop: Workshop, count: _Count
) -> Path:
    """The folder of a matrix outside the blocks, quantized in chunks of rows."""
    before = count.done
    outside = METHODS[method].outside if stats else None
    known = _moved(stats, shop.device) if stats else None

    def make(folder: Path) -> None:
        packed = []
        for rows in tensor.chunks():
            packed.append(pack((outside or search.quantize)(rows.float().to(shop.device), known, kind)[0]))
            count.add(rows.numel(), tensor.name)
        _write_part(folder / _PART, {tensor.name: (kind, np.concatenate(packed))}, {}, [])

    by = (method if outside else "search") if stats else "alike"
    key = [shop.weights_key, tensor.name, kind.name, shop.device.type, by, shop.outer_key if stats else None]
    name = f"{shop.name}-{by}-{tensor.name.removesuffix('.weight')}-{kind.name}"
    folder = stage(shop.root, name, key, make, shop.say)
    if count.done == before:
        count.add(math.prod(tensor.shape), tensor.name)
    return folder


def _stats(
    method: str, index: int, formats: Mapping[str, Format], stats: Mapping[str, Stats], device: torch.device
) -> dict[str, Stats]:
    """What the method reads of the calibration, on the device, named as in a Layer."""
    if METHODS[method].needs == "nothing":
        return {}
    found = {_short(name): of for name, of in stats.items() if name.startswith(f"blk.{index}.")}
    if missing := sorted(formats.keys() - found.keys()):
        raise SlimpiError(f"{method} needs calibration, there is none for blk.{index}.{missing[0]}. Calibrate again.")
    return {name: _moved(of, device) for name, of in found.items()}


def _moved(stats: Stats, device: torch.device) -> Stats:
    return Stats(
        stats.mean_x2.to(device), stats.mean_abs_x.to(device), stats.n_tokens, lambda: stats.hessian().to(device)
    )


def _checked(method: str, layer: Layer, formats: Mapping[str, Format], made: QuantizedLayer) -> QuantizedLayer:
    """The result, if it is one for this layer and these formats; ValueError, a bug of the method, if it is not."""
    if made.tensors.keys() != formats.keys():
        raise ValueError(f"{method} made {sorted(made.tensors)}, asked were {sorted(formats)}")
    for name, q in made.tensors.items():
        if q.format != formats[name] or q.shape != layer.matrices[name].shape:
            raise ValueError(f"{method} made {name} as {q.format.name} {tuple(q.shape)}")
        _refuse_infinite(f"blk.{layer.index}.{name} in {q.format.name} by {method}", q)
    for name, vector in made.vectors.items():
        if name not in layer.vectors or vector.shape != layer.vectors[name].shape or not vector.isfinite().all():
            raise ValueError(f"{method} made a vector {name} that is not finite or not this layer's")
    return made


def _refuse_infinite(what: str, q: Quantized) -> None:
    if not isinstance(q, QTensor):
        return  # llama.cpp's own search bounds what it stores
    for scales in (q.scales.d, q.scales.dmin):
        if scales is not None and not scales.isfinite().all():
            raise SlimpiError(f"{what} needs scales beyond {scales.dtype}. Its weights are too large: keep it in F16.")


def _write_part(
    path: Path,
    matrices: Mapping[str, tuple[Format, np.ndarray]],
    vectors: Mapping[str, np.ndarray],
    notes: list[str],
) -> None:
    writer = gguf.GGUFWriter(path, "slimpi-part")
    add_keys(writer, {_NOTES: notes})
    for name, (kind, rows) in matrices.items():
        writer.add_tensor(name, rows, raw_dtype=kind.ggml_type)
    for name, vector in vectors.items():
        writer.add_tensor(name, vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

"""ONNX of a language model: FP32, and METHODS in the blocks of MatMulNBits.

The decoder blocks' matrices get the variant's type, the output matrix 8 bits in groups of 32, the embeddings 8 bits
with one scale a row.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from device.records import SlimpiError
from device.schema import Fallback, Step
from pipeline import checkpoint, quantize
from pipeline.architectures import gguf_names, row_order
from pipeline.calibration_stages import stats_for
from pipeline.export import onnx, onnx_language, onnx_nbits
from pipeline.export.gguf import gguf_tensors
from pipeline.exporter import Context, Exporter, Made, Prepared
from pipeline.exporter_gguf import lossless
from pipeline.formats import FORMATS, Format, QTensor, rows_of
from pipeline.methods import METHODS, rtn
from pipeline.store import stage

REFERENCE = "FP32"
OUTPUT_FORMAT = "INT8_G32"


def parse(variant: str) -> tuple[str, Format] | None:
    """METHOD-INT4_G32 taken apart, None for the reference. SlimpiError for any other name."""
    if variant == REFERENCE:
        return None
    method, _, kind = variant.partition("-")
    if method.lower() not in METHODS or method != method.upper() or kind not in onnx_nbits.TYPES:
        raise SlimpiError(
            f"unknown ONNX variant {variant!r} of a language model. Known: {REFERENCE}, and METHOD-TYPE of "
            f"{', '.join(name.upper() for name in METHODS)} and {', '.join(onnx_nbits.TYPES)}."
        )
    return method.lower(), FORMATS[kind]


def _prepare(context: Context) -> Prepared:
    model = checkpoint.load(context.source.path)

    def export(folder: Path) -> None:
        with context.progress.step("export to ONNX FP32"):
            onnx_language.export_language(model, folder)

    key = ["onnx-lm-base", context.source.sha256]
    base = stage(context.places.stages, f"{context.recipe.name}-onnx", key, export, context.progress.say)
    lineage = [Step(action="export", source=context.source.spec, settings={"dtype": "fp32"})]
    notes = [f"the reference: {note}" for note in model.notes]
    return Prepared(base / "model.onnx", model.vocab.sha256(), lineage, notes)


def _make(context: Context, prepared: Prepared, variant: str, folder: Path) -> Made:
    out = folder / "model.onnx"
    asked = parse(variant)
    if asked is None:
        for name in ("model.onnx", "tokenizer.json"):
            shutil.copyfile(prepared.base.with_name(name), folder / name)
        return _described(out, [], [], [])
    method, kind = asked
    model = checkpoint.load(context.source.path)
    tensors = gguf_tensors(model)
    linear = [n for n, t in tensors.items() if n.startswith("blk.") and len(t.shape) == 2]
    formats = {n: kind for n in linear if tensors[n].shape[1] % kind.block_size == 0}
    if not formats:
        raise SlimpiError(f"{variant}: no matrix has rows of whole blocks of {kind.block_size}. Take smaller blocks.")
    stats, lineage = stats_for(context, lossless(context)[0], METHODS[method].needs)
    with context.progress.step(f"quantize {variant}") as tick:
        codes, vectors, notes = quantize.quantize_in_memory(model, method, formats, stats, tick)
    with context.progress.step(f"write {variant}"):
        hugging = {
            of: name
            for name, of in gguf_names(
                model.architecture, list(model.tensors), model.config["num_hidden_layers"]
            ).items()
        }
        placed = {hugging[name]: _unpermuted(model, hugging[name], q) for name, q in codes.items()}
        placed[onnx_language.OUTPUT] = _output(model)
        moved = {hugging[name]: pair for name, pair in vectors.items()}
        onnx_language.write_blocks(prepared.base, out, placed, moved)
    reason = f"its rows are no whole blocks of {kind.block_size}"
    fallbacks = [
        Fallback(tensor=hugging[n], asked=kind.name, got=REFERENCE, reason=reason) for n in linear if n not in formats
    ]
    settings = {"method": method, "type": kind.name}
    return _described(
        out, [*lineage, Step(action="quantize", source="model.onnx", settings=settings)], fallbacks, notes
    )


def _unpermuted(model: checkpoint.Checkpoint, name: str, q: object) -> QTensor:
    """Codes in GGUF's row order, in the checkpoint's: what the exported graph has."""
    assert isinstance(q, QTensor)
    order = row_order(model.architecture, model.config, name)
    return q if order is None else rows_of(q, torch.from_numpy(np.argsort(order)))


def _output(model: checkpoint.Checkpoint) -> QTensor:
    name = onnx_language.OUTPUT if onnx_language.OUTPUT in model.tensors else onnx_language.EMBEDDINGS
    return rtn.quantize(model.tensors[name].read().float(), None, FORMATS[OUTPUT_FORMAT])[0]


def _described(out: Path, lineage: list[Step], fallbacks: list[Fallback], notes: list[str]) -> Made:
    summary = onnx.describe_onnx(out, except_linear=(onnx_language.OUTPUT,))
    return Made(
        entry=out.name,
        types=summary.types,
        n_weights=summary.n_weights,
        n_linear_weights=summary.n_linear_weights,
        bits_per_weight=summary.bits_per_weight,
        bits_per_linear_weight=summary.bits_per_linear_weight,
        lineage=lineage,
        fallbacks=fallbacks,
        notes=notes,
    )


ONNX_LM = Exporter("onnx", "lm", parse, _prepare, _make)

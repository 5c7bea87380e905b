"""EXPORTERS: from a source to variants a stock runtime loads. One entry a file format."""

from __future__ import annotations

from device.records import SlimpiError
from pipeline.exporter import Exporter
from pipeline.exporter_gguf import GGUF
from pipeline.exporter_onnx import ONNX
from pipeline.exporter_onnx_lm import ONNX_LM
from pipeline.recipes import Recipe

EXPORTERS: dict[str, Exporter] = {"gguf": GGUF, "onnx": ONNX, "onnx-lm": ONNX_LM}


def knows(recipe: Recipe, variant: str) -> bool:
    """Whether the recipe's exporter makes a variant of this name."""
    try:
        EXPORTERS[recipe.export].check(variant)
    except SlimpiError:
        return False
    return True

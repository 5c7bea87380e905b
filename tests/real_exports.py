"""SmolLM2 and MiniLM as slow tests need them, and llama.cpp's own tools; absent ones skip (fail under CI=true)."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from device.records import SlimpiError
from pipeline import sources
from pipeline.export.llama_quantize import quantize_gguf
from pipeline.recipes import read_recipe

REPO = Path(__file__).resolve().parent.parent


@functools.cache
def source(recipe: str) -> Path:
    """The checkpoint of models/<recipe>.toml, kept where recipes keep theirs."""
    wanted = read_recipe(REPO / "models" / f"{recipe}.toml")
    try:
        return sources.fetch(wanted.source, wanted.sha256, REPO / "models" / "sources").path
    except SlimpiError as error:
        _absent(str(error))


@functools.cache
def smollm2_f32() -> Path:
    """SmolLM2-135M-Instruct dequantized to F32 by llama.cpp."""
    out = Path(_scratch().name) / "smollm2.gguf"
    quantize_gguf(source("smollm2-135m"), out, "F32", None, 1, None)
    return out


@functools.cache
def smollm2_imatrix(text: Path) -> Path:
    """llama-imatrix's own file for two chunks of `text`."""
    out = Path(_scratch().name) / "imatrix.gguf"
    argv = [peer("llama-imatrix"), "-m", smollm2_f32(), "-f", text, "-o", out, "-c", 512, "--chunks", 2, "-t", 1]
    subprocess.run([*map(str, argv), "--no-ppl"], check=True, capture_output=True)
    return out


def peer(name: str) -> Path:
    """A binary of the same llama.cpp: in $SLIMPI_PEERS, else what `make peers` built. CI builds them first."""
    built = sorted((REPO / "benchmarks" / "peers").glob("llama.cpp-*"))
    named = os.environ.get("SLIMPI_PEERS")
    for folder in [Path(named)] if named else built:
        if (folder / name).is_file():
            return folder / name
    reason = f"no {name}: run `make peers`, or name the folder of such tools in SLIMPI_PEERS"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="slimpi-tests-")


def _absent(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)

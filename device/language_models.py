"""Which runtime opens an artifact's language model. Both offer the tasks the same methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from device.llama import N_BATCH, N_UBATCH, LlamaModel, llama_api
from device.schema import Artifact

if TYPE_CHECKING:
    from device.onnx_language import OnnxLanguageModel

LanguageModel: TypeAlias = "LlamaModel | OnnxLanguageModel"


@dataclass(frozen=True)
class Runtime:
    """open: the model of a path, on so many threads. load: import the library, so that a timed load does not.
    settings: what a time measured with it holds under."""

    open: Callable[[Path, int], LanguageModel]
    load: Callable[[], Any]
    settings: Mapping[str, Any]


def _open_onnx(path: Path, threads: int) -> OnnxLanguageModel:
    from device.onnx_language import OnnxLanguageModel  # here, since it imports numpy

    return OnnxLanguageModel(path, threads)


def _load_onnx() -> None:
    from device.runtimes import load_onnxruntime

    load_onnxruntime()


RUNTIMES: Mapping[str, Runtime] = {
    "gguf": Runtime(
        LlamaModel, llama_api, {"n_batch": N_BATCH, "n_ubatch": N_UBATCH, "flash_attention": "auto", "kv": "f16"}
    ),
    "onnx": Runtime(_open_onnx, _load_onnx, {"n_batch": N_BATCH, "kv": "f32", "runtime": "onnxruntime"}),
}


def open_language_model(artifact: Artifact, folder: str, threads: int) -> LanguageModel:
    """SlimpiError for a file that its runtime refuses."""
    return RUNTIMES[artifact.kind].open(Path(folder) / artifact.entry, threads)

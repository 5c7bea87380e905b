"""ONNX Runtime, as little of it as the tasks need, and the arrays that models take and give.

It is imported when a model is opened, so that the agent, which only starts workers, never loads it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.records import SlimpiError

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]


def load_onnxruntime() -> None:
    """Import it, so that what is timed afterwards does not hold the import."""
    importlib.import_module("onnxruntime")


class OnnxSession:
    """A graph in ONNX Runtime on the CPU: its input names, and its output `logits` (or the first, if none is)."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        # ONNX Runtime's error classes share no base of their own.
        self._errors = (
            state.Fail,
            state.InvalidArgument,
            state.InvalidGraph,
            state.InvalidProtobuf,
            state.NoSuchFile,
            state.NotImplemented,
            state.RuntimeException,
        )
        self._path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # x86 without VNNI adds pairs of u8 x s8 products in 16 bits, which saturates; this makes them exact there.
        options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except self._errors as error:
            raise SlimpiError(
                f"ONNX Runtime cannot load {path}: {one_line(error)}. Build the artifact again."
            ) from error
        self._value = onnxruntime.OrtValue
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]
        self._output = "logits" if "logits" in self.outputs else self.outputs[0]

    def run(self, feeds: dict[str, NDArray[Any]], n: int) -> Logits:
        """The logits (n, labels) float32 of a batch of n texts. SlimpiError if the graph cannot run or gives others."""
        return self.run_beside(feeds, n, [])[0]

    def run_beside(self, feeds: dict[str, NDArray[Any]], n: int, outputs: list[str]) -> tuple[Logits, list[Any]]:
        """The logits as from `run`, and the named outputs of the same computation."""
        try:
            logits, *others = self._session.run([self._output, *outputs], feeds)
        except self._errors as error:
            raise SlimpiError(f"ONNX Runtime cannot run {self._path}: {one_line(error)}. Build it again.") from error
        if logits.ndim != 2 or logits.shape[0] != n:
            raise SlimpiError(
                f"{self._path} gives `{self._output}` of shape {logits.shape} for {n} texts, expected "
                "(texts, labels). Export it as a sequence classifier."
            )
        return np.asarray(logits, dtype=np.float32), others

    def value(self, array: NDArray[Any]) -> Any:
        """The array as ONNX Runtime's own value."""
        return self._value.ortvalue_from_numpy(array)

    def run_values(self, feeds: dict[str, Any], outputs: list[str]) -> list[Any]:
        """The named outputs as ONNX Runtime's own values, which may be fed again without a copy."""
        try:
            values: list[Any] = self._session.run_with_ort_values(outputs, feeds)
        except self._errors as error:
            raise SlimpiError(f"ONNX Runtime cannot run {self._path}: {one_line(error)}. Build it again.") from error
        return values

    def close(self) -> None:
        del self._session


def one_line(error: BaseException) -> str:
    """A library's message as part of ours."""
    return " ".join(str(error).split())[:300]

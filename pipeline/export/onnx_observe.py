"""What the inputs of an encoder's products look like: ranges and samples over passages of open text.

Texts of one token count make a batch, so that nothing is padded: graphs differ in where the batch axis is.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper
from tokenizers import Tokenizer

from device.records import SlimpiError
from pipeline.progress import Tick, quiet

Float32 = npt.NDArray[np.float32]
Feeds = dict[str, npt.NDArray[np.int64]]

N_PASSAGES = 2560  # ten batches of 256
SAMPLED_ROWS = 1024
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Observed:
    """A tensor's values over all tokens: low and high of each channel (d,), and a sample of rows (n, d)."""

    low: Float32
    high: Float32
    rows: Float32


@dataclass(frozen=True)
class Calibration:
    """Open text to calibrate on: passages with their tokens, cut at max_tokens. `name`: what the lineage calls it."""

    name: str
    encodings: list[Any]

    @property
    def n_tokens(self) -> int:
        return sum(len(e.ids) for e in self.encodings)

    def first(self, n: int) -> Calibration:
        return Calibration(self.name, self.encodings[:n])

    def sha256(self) -> str:
        """Of the token ids."""
        return hashlib.sha256(b"".join(np.array(e.ids, np.int64).tobytes() for e in self.encodings)).hexdigest()


def read_calibration(text: Path, name: str, tokenizer: Path, max_tokens: int, n_passages: int = 0) -> Calibration:
    """The first n_passages non-empty lines of `text` (0 = N_PASSAGES). SlimpiError if there is none."""
    try:
        lines = text.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SlimpiError(f"cannot read the calibration text {text}: {error}. Name a UTF-8 text.") from error
    if not tokenizer.is_file():
        raise SlimpiError(f"{tokenizer} is missing: only encoders are calibrated. Take INT8-dynamic.")
    passages = [line.strip() for line in lines if line.strip()][: n_passages or N_PASSAGES]
    if not passages:
        raise SlimpiError(f"the calibration text {text} is empty. Name one with passages, one a line.")
    reader = Tokenizer.from_file(str(tokenizer))
    reader.no_padding()
    reader.enable_truncation(max_tokens)
    return Calibration(name, reader.encode_batch(passages))


def batches(calibration: Calibration, inputs: list[str]) -> list[Feeds]:
    """Feeds (n, length) of texts of one length, in the order of lengths."""
    columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    if unknown := set(inputs) - columns.keys():
        raise SlimpiError(
            f"it wants unknown inputs {sorted(unknown)}: only encoders are calibrated. Take INT8-dynamic."
        )
    by_length: dict[int, list[Any]] = {}
    for encoding in calibration.encodings:
        by_length.setdefault(len(encoding.ids), []).append(encoding)
    made = []
    for length, group in sorted(by_length.items()):
        size = max(1, BATCH_TOKENS // length)
        for start in range(0, len(group), size):
            part = group[start : start + size]
            made.append({name: np.array([getattr(e, columns[name]) for e in part], np.int64) for name in inputs})
    return made


def in_batches(calibration: Calibration) -> list[int]:
    """The order of texts in `batches`: by length, of one length as they come."""
    return sorted(range(len(calibration.encodings)), key=lambda i: len(calibration.encodings[i].ids))


def open_session(model: onnx.ModelProto | bytes, threads: int = 0) -> Any:
    """A session whose integer products are exact on every CPU (`x64quantprecision`: FACTS of x86 without VNNI)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def logits_of(model: onnx.ModelProto | bytes, calibration: Calibration) -> Float32:
    """(n_passages, n_labels) logits, in the order of `in_batches`."""
    session = open_session(model)
    feeds = batches(calibration, [entry.name for entry in session.get_inputs()])
    return np.concatenate([session.run(["logits"], feed)[0] for feed in feeds])


def tapped(model: onnx.ModelProto, tensors: list[str]) -> onnx.ModelProto:
    """A copy with these fp32 tensors among its outputs."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    known = {value.name for value in made.graph.output}
    extra = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors if name not in known]
    made.graph.output.extend(extra)
    return made


def observe(
    model: onnx.ModelProto, tensors: list[str], calibration: Calibration, seed: int = 0, tick: Tick = quiet
) -> dict[str, Observed]:
    """Run the fp32 `model` over the calibration text and look at `tensors`, each (..., d)."""
    session = open_session(tapped(model, tensors))
    rng = np.random.default_rng(seed)
    share = min(1.0, SAMPLED_ROWS / calibration.n_tokens)
    lows: dict[str, Float32] = {}
    highs: dict[str, Float32] = {}
    rows: dict[str, list[Float32]] = {name: [] for name in tensors}
    feeds = batches(calibration, [entry.name for entry in session.get_inputs()])
    for done, feed in enumerate(feeds, 1):
        n_tokens = next(iter(feed.values())).size
        chosen = rng.random(n_tokens) < share
        for name, value in zip(tensors, session.run(tensors, feed), strict=True):
            flat = value.reshape(-1, value.shape[-1])
            lows[name] = np.minimum(lows.get(name, flat[0]), flat.min(axis=0))
            highs[name] = np.maximum(highs.get(name, flat[0]), flat.max(axis=0))
            # What there is once a text (after pooling) is too little to be thinned.
            rows[name].append(flat[chosen] if len(flat) == n_tokens else flat)
        tick(done, len(feeds), "batches")
    found = {n: Observed(lows[n], highs[n], np.concatenate(rows[n])[:SAMPLED_ROWS]) for n in tensors}
    if bad := [n for n, seen in found.items() if not (np.isfinite(seen.low).all() and np.isfinite(seen.high).all())]:
        raise SlimpiError(f"`{bad[0]}` is not finite on the calibration text. Export the encoder again.")
    return found

"""Read and write safetensors files tensor by tensor, without mapping them.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
The safetensors package maps files (their pages count as this process's memory) and saves only whole shards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from device.records import SlimpiError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a safetensors file; `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    offset: int

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the first dimension, in the stored dtype."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = bytearray((stop - start) * row_bytes)
        with self.path.open("rb", buffering=0) as handle:
            handle.seek(self.offset + start * row_bytes)
            view = memoryview(data)
            while view and (n := handle.readinto(view)):
                view = view[n:]
        if view:
            raise SlimpiError(f"{self.path} ends inside {self.name}: it changed while it was read. Fetch it again.")
        if not data:
            return torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).reshape(stop - start, *self.shape[1:])


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file. SlimpiError if it is missing, truncated, garbled or of an unknown dtype."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise _damaged(path, "its header is cut off")
            header = json.loads(handle.read(length))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        return {name: _stored(path, name, entry, 8 + length, size) for name, entry in entries}
    except OSError as error:
        raise SlimpiError(f"cannot read {path}: {error.strerror}. Check the path, or fetch it again.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its header is garbled: {error}") from error


def _stored(path: Path, name: str, entry: dict, start: int, size: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise SlimpiError(f"{path}: {name} has dtype {entry['dtype']}, supported are {', '.join(DTYPES)}.")
    tensor = StoredTensor(name, tuple(entry["shape"]), DTYPES[entry["dtype"]], path, start + entry["data_offsets"][0])
    n_bytes = math.prod(tensor.shape) * tensor.dtype.itemsize
    begin, end = entry["data_offsets"]
    if end - begin != n_bytes or begin < 0 or min(tensor.shape, default=0) < 0:
        raise _damaged(path, f"{name} of shape {list(tensor.shape)} does not fill its {end - begin} bytes")
    if start + end > size:
        raise _damaged(path, f"truncated, {name} ends {start + end - size:,} bytes after the file")
    return tensor


def _damaged(path: Path, what: str) -> SlimpiError:
    return SlimpiError(f"{path} is a damaged safetensors file ({what}). Fetch it again.")


def write_safetensors(
    path: Path, tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype, Iterable[torch.Tensor]]]
) -> None:
    """Write (name, shape, dtype, chunks of rows) one after the other; no more than a chunk is in memory."""
    entries, offset = list(tensors), 0
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, shape, dtype, _ in entries:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, chunks in entries:
            for chunk in chunks:
                handle.write(chunk.contiguous().reshape(-1).view(torch.uint8).numpy().data)

"""Read GGUF files: keys, and where each tensor's blocks lie. Nothing is mapped; blocks are read when asked for.

Layout after ggml's docs/gguf.md, versions 2 and 3, little-endian. The gguf package's reader wants seconds and
gigabytes for a vocabulary of 262,144 entries and maps the whole file; this one reads it in half a second.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from device.records import SlimpiError

Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate("BbHhIif?", start=0)) | {10: "Q", 11: "q", 12: "d"}
"""GGUF value type -> struct code."""

_MAX_DIMS = 4
_GGUF_VERSIONS = (2, 3)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place in a GGUF file. `shape` is row-major: (rows, columns); `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    path: Path
    offset: int
    row_bytes: int

    @property
    def n_rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def n_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def n_bytes(self) -> int:
        return self.n_rows * self.row_bytes

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Stored bytes of rows [start, stop): uint8 (stop - start, row_bytes)."""
        with self.path.open("rb") as handle:
            handle.seek(self.offset + start * self.row_bytes)
            data = np.fromfile(handle, np.uint8, (stop - start) * self.row_bytes)
        if data.size != (stop - start) * self.row_bytes:
            raise SlimpiError(f"{self.path} ends inside {self.name}: it changed while it was read. Fetch it again.")
        return data.reshape(stop - start, self.row_bytes)


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's header."""

    path: Path
    keys: dict[str, Value]
    tensors: dict[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """Whether the file starts with GGUF's magic bytes."""
    try:
        with path.open("rb") as handle:
            return handle.read(4) == b"GGUF"
    except OSError as error:
        raise SlimpiError(f"cannot read {path}: {error.strerror}. Check the path.") from error


def read_gguf(path: Path) -> GgufFile:
    """Parse a GGUF header. SlimpiError on anything truncated, garbled, split or of another version."""
    if not is_gguf(path):
        raise SlimpiError(f"{path} is not a GGUF file: it does not start with the bytes GGUF.")
    try:
        with path.open("rb") as handle:
            return _Parser(handle, path).parse()
    except (UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise SlimpiError(f"{path} is a damaged GGUF file ({error}). Fetch or build it again.") from error
    except OSError as error:
        raise SlimpiError(f"cannot read {path}: {error.strerror}.") from error


class _Parser:
    """A cursor over the header; every read is checked against the file's size."""

    def __init__(self, handle: BinaryIO, path: Path) -> None:
        self.handle = handle
        self.path = path
        self.size = path.stat().st_size

    def parse(self) -> GgufFile:
        self.take(4)
        version = self.scalar("I")
        if version not in _GGUF_VERSIONS:
            raise self.damaged(f"version {version}, known are 2 and 3, little-endian")
        n_tensors, n_keys = self.scalar("Q"), self.scalar("Q")
        keys = {}
        for _ in range(n_keys):
            name = self.string()
            keys[name] = self.value(self.scalar("I"))
        if keys.get("split.count", 0) not in (0, 1):
            raise SlimpiError(f"{self.path} is one part of a split GGUF. Merge the parts with llama-gguf-split first.")
        infos = [self.tensor_info() for _ in range(n_tensors)]
        alignment = keys.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise self.damaged(f"alignment {alignment}")
        start = -(-self.handle.tell() // alignment) * alignment
        return GgufFile(self.path, keys, {info[0]: self.place(start, *info) for info in infos})

    def place(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        try:
            ggml_type = gguf.GGMLQuantizationType(kind)
            block, size = gguf.GGML_QUANT_SIZES[ggml_type]
        except (ValueError, KeyError) as error:
            raise self.damaged(f"tensor {name} has the unknown type {kind}") from error
        if shape[-1] % block:
            raise self.damaged(f"tensor {name} has {shape[-1]} columns, {ggml_type.name} needs a multiple of {block}")
        tensor = GgufTensor(name, shape, ggml_type, self.path, start + offset, shape[-1] // block * size)
        missing = tensor.offset + tensor.n_bytes - self.size
        if missing > 0:
            raise self.damaged(f"truncated, tensor {name} ends {missing:,} bytes after the file")
        return tensor

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dims = self.string(), self.scalar("I")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self.damaged(f"tensor {name} has {n_dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(n_dims))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.scalar("I"), self.scalar("Q")
            if kind == _STRING:
                return [self.string() for _ in range(self.plausible(count, 8))]
            if kind in _SCALARS:
                dtype = np.dtype("<" + _SCALARS[kind])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        elif kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        raise self.damaged(f"value type {kind}")

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode()

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def take(self, n_bytes: int) -> bytes:
        return self.handle.read(self.plausible(n_bytes, 1))

    def plausible(self, count: int, least_bytes: int) -> int:
        """`count`, if that many items can still follow; garbage lengths stop here instead of filling memory."""
        if self.handle.tell() + count * least_bytes > self.size:
            raise self.damaged("truncated in its header")
        return count

    def damaged(self, what: str) -> SlimpiError:
        return SlimpiError(f"{self.path} is a damaged GGUF file ({what}). Fetch or build it again.")


def add_keys(writer: gguf.GGUFWriter, keys: Mapping[str, Value]) -> None:
    """Enter keys into a writer: int as uint32 (in lists int32), float as float32, by the first item of a list."""
    scalars = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    for name, value in keys.items():
        if value == []:
            continue  # the writer refuses empty arrays, and readers take an absent one for empty
        if isinstance(value, list):
            kind = {**scalars, int: "INT32"}[type(value[0])]
            writer.add_key_value(name, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kind])
        else:
            writer.add_key_value(name, value, gguf.GGUFValueType[scalars[type(value)]])

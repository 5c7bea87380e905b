"""Checkpoint -> GGUF, tensor by tensor, so that memory stays near the largest chunk whatever the model's size."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType

from device.records import SlimpiError
from pipeline.architectures import ARCHITECTURES, ROPE_FACTORS, gguf_names, norm_offset, row_order
from pipeline.checkpoint import Checkpoint, Tensor, held, require_space
from pipeline.gguf_file import add_keys, read_gguf
from pipeline.gguf_keys import check_config, gguf_keys, rope_factors

DType = Literal["F32", "F16", "BF16", "auto"]

_TORCH_DTYPES = {GgmlType.F32: torch.float32, GgmlType.F16: torch.float16, GgmlType.BF16: torch.bfloat16}
_LOSSLESS = {dtype: ggml_type for ggml_type, dtype in _TORCH_DTYPES.items()}
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor in codes of its own: its ggml type, and its blocks as uint8 (rows, bytes of a row) when written."""

    type: GgmlType
    read: Callable[[], np.ndarray]


Encode = Callable[[str, Tensor], EncodedTensor | GgmlType | None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Output:
    """One tensor of the file to be."""

    tensor: Tensor
    type: GgmlType
    n_bytes: int
    chunks: Callable[[], Iterator[np.ndarray]]


def gguf_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The checkpoint's tensors as GGUF holds them: GGUF names, rows permuted, norms offset, rope factors added."""
    model_type, config = checkpoint.architecture, checkpoint.config
    names = gguf_names(model_type, list(checkpoint.tensors), config["num_hidden_layers"])
    found = {}
    factors = rope_factors(model_type, config)
    if factors is not None:
        found[ROPE_FACTORS] = held(ROPE_FACTORS, torch.from_numpy(factors))
    for name, tensor in checkpoint.tensors.items():
        target = names[name]
        if (order := row_order(model_type, config, name)) is not None:
            found[target] = tensor.reordered(target, order)
        elif offset := norm_offset(model_type, name):
            found[target] = tensor.shifted(target, offset)
        else:
            found[target] = tensor.renamed(target)
    return found


def export_gguf(
    checkpoint: Checkpoint,
    out: Path,
    dtype: DType,
    encode: Encode | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write a GGUF file and return {GGUF tensor name: type written}.

    `dtype` "auto" keeps each tensor's own precision; one-dimensional tensors are always F32. `encode(name, tensor)`
    is asked first, with GGUF names and layouts, and may give a tensor in blocks of its own, or the float type it gets.
    `progress(tensor, bytes done, bytes in all)`. Whole or not at all. SlimpiError on a config llama.cpp runs
    differently, values outside F16's range, blocks of the wrong size, or too little disk space.
    """
    check_config(checkpoint.architecture, checkpoint.config)
    outputs = {name: _plan(name, t, dtype, encode) for name, t in gguf_tensors(checkpoint).items()}
    writer = _header(checkpoint, outputs)
    total = sum(output.n_bytes for output in outputs.values())
    require_space(out, total + (64 << 20))
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        writer.write_header_to_file(path=partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with partial.open("ab") as handle:
            _write_tensors(handle, outputs, total, progress)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(out)
    except OSError as error:
        raise SlimpiError(f"cannot write {out}: {error.strerror}. Free some space or fix permissions.") from error
    finally:
        partial.unlink(missing_ok=True)
    return {name: output.type.name for name, output in outputs.items()}


def _plan(name: str, tensor: Tensor, dtype: DType, encode: Encode | None) -> _Output:
    encoded = encode(name, tensor) if encode is not None else None
    if isinstance(encoded, EncodedTensor):
        return _encoded(name, tensor, encoded)
    if encoded is not None:
        ggml_type = encoded
    elif len(tensor.shape) == 1:
        ggml_type = GgmlType.F32
    else:
        ggml_type = _LOSSLESS[tensor.dtype] if dtype == "auto" else GgmlType[dtype]
    target = _TORCH_DTYPES[ggml_type]

    def chunks() -> Iterator[np.ndarray]:
        for chunk in tensor.chunks():
            yield _converted(name, chunk, target)

    return _Output(tensor, ggml_type, math.prod(tensor.shape) * target.itemsize, chunks)


def _encoded(name: str, tensor: Tensor, encoded: EncodedTensor) -> _Output:
    block, block_bytes = gguf.GGML_QUANT_SIZES[encoded.type]
    columns = tensor.shape[-1]
    if columns % block:
        raise SlimpiError(f"{name} has {columns} columns, which {encoded.type.name}'s blocks of {block} do not divide.")
    n_bytes = math.prod(tensor.shape) // block * block_bytes

    def chunks() -> Iterator[np.ndarray]:
        data = encoded.read()
        if data.dtype != np.uint8 or data.size != n_bytes:
            raise SlimpiError(f"{name} as {encoded.type.name} needs {n_bytes} bytes, got {data.size} of {data.dtype}.")
        yield np.ascontiguousarray(data)

    return _Output(tensor, encoded.type, n_bytes, chunks)


def _converted(name: str, chunk: torch.Tensor, target: torch.dtype) -> np.ndarray:
    """A chunk's bytes in another dtype; SlimpiError where float16 would overflow to infinity."""
    converted = chunk.to(target)
    if target == torch.float16 and not torch.isfinite(converted).all():
        worst = chunk.float().abs().max().item()
        raise SlimpiError(f"{name} has values up to {worst:g}, beyond F16's 65504. Use BF16 or F32.")
    return converted.contiguous().reshape(-1).view(torch.uint8).numpy()


def _header(checkpoint: Checkpoint, outputs: dict[str, _Output]) -> gguf.GGUFWriter:
    arch = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[checkpoint.architecture].gguf_arch]
    writer = gguf.GGUFWriter(None, arch)
    writer.add_name(Path(checkpoint.origin).stem)
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    sizes = Counter[str]()
    for output in outputs.values():
        sizes[output.type.name] += math.prod(output.tensor.shape)
    main = sizes.most_common(1)[0][0]
    file_types = gguf.LlamaFileType.__members__
    # K-quants name mixtures here, not types: llama.cpp guesses those from the tensors.
    if (known := file_types.get("ALL_F32" if main == "F32" else f"MOSTLY_{main}")) is not None:
        writer.add_file_type(known)
    add_keys(writer, gguf_keys(checkpoint.architecture, checkpoint.config))
    add_keys(writer, checkpoint.vocab.keys)
    for name, output in outputs.items():
        shape = output.tensor.shape
        writer.add_tensor_info(name, shape, np.dtype(np.float32), output.n_bytes, raw_dtype=output.type)
    return writer


def _write_tensors(handle: BinaryIO, outputs: dict[str, _Output], total: int, progress: Progress | None) -> None:
    done = 0
    for name, output in outputs.items():
        handle.write(b"\0" * (-handle.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
        for chunk in output.chunks():
            handle.write(chunk.data)
        done += output.n_bytes
        if progress is not None:
            progress(name, done, total)
    handle.write(b"\0" * (-handle.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def read_gguf_types(path: Path) -> list[tuple[str, str, int, int]]:
    """(tensor name, type, n_elements, n_bytes) of every tensor; reads the header only."""
    return [(t.name, t.type.name, t.n_elements, t.n_bytes) for t in read_gguf(path).tensors.values()]

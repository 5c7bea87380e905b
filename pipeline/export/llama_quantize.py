"""GGUF variants by llama.cpp's own quantizer, llama_model_quantize, run in a fresh process.

The mixes are those of llama-quantize (llama.cpp tools/quantize/quantize.cpp and src/llama-quant.cpp); the same
base and importance matrix give the same tensor bytes.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from device.records import SlimpiError
from device.schema import Fallback
from pipeline.calibrate import Importance, load_importance
from pipeline.native import emit, run_fresh, serve


@dataclass(frozen=True)
class Variant:
    """A mix of llama-quantize: llama.cpp's ftype number, and the type it gives tensors without a rule of their own.

    `output_type` is what the output matrix gets (the embeddings if tied) where the columns allow it, "" =
    base_type. `needs_imatrix`: llama.cpp refuses some of its types without one.
    """

    ftype: int
    base_type: str
    output_type: str = "Q6_K"
    needs_imatrix: bool = False


VARIANTS: dict[str, Variant] = {
    "F32": Variant(0, "F32", output_type=""),
    "F16": Variant(1, "F16", output_type=""),
    "BF16": Variant(32, "BF16", output_type=""),
    "Q8_0": Variant(7, "Q8_0", output_type=""),
    "Q6_K": Variant(18, "Q6_K"),
    "Q5_K_M": Variant(17, "Q5_K"),
    "Q5_K_S": Variant(16, "Q5_K"),
    "Q5_1": Variant(9, "Q5_1"),
    "Q5_0": Variant(8, "Q5_0"),
    "Q4_K_M": Variant(15, "Q4_K"),
    "Q4_K_S": Variant(14, "Q4_K"),
    "Q4_1": Variant(3, "Q4_1"),
    "Q4_0": Variant(2, "Q4_0"),
    "IQ4_NL": Variant(25, "IQ4_NL"),
    "IQ4_XS": Variant(30, "IQ4_XS"),
    "Q3_K_L": Variant(13, "Q3_K"),
    "Q3_K_M": Variant(12, "Q3_K"),
    "Q3_K_S": Variant(11, "Q3_K"),
    "IQ3_M": Variant(27, "IQ3_S"),
    "IQ3_S": Variant(26, "IQ3_S"),
    "IQ3_XS": Variant(22, "IQ3_S", needs_imatrix=True),
    "IQ3_XXS": Variant(23, "IQ3_XXS", output_type="Q5_K", needs_imatrix=True),
    "Q2_K": Variant(10, "Q2_K"),
    "Q2_K_S": Variant(21, "Q2_K", needs_imatrix=True),
    "IQ2_M": Variant(29, "IQ2_S", output_type="Q5_K", needs_imatrix=True),
    "IQ2_S": Variant(28, "IQ2_XS", output_type="Q5_K", needs_imatrix=True),
    "IQ2_XS": Variant(20, "IQ2_XS", output_type="Q5_K", needs_imatrix=True),
    "IQ2_XXS": Variant(19, "IQ2_XXS", output_type="Q5_K", needs_imatrix=True),
    "IQ1_M": Variant(31, "IQ1_M", output_type="Q5_K", needs_imatrix=True),
    "IQ1_S": Variant(24, "IQ1_S", output_type="Q5_K", needs_imatrix=True),
}


@dataclass(frozen=True)
class Quantized:
    """What the file holds: {tensor: type}, the tensors that fell back, and those the matrix did not cover."""

    types: dict[str, str]
    fallbacks: list[Fallback]
    without_importance: list[str] = field(default_factory=list)


def quantize_gguf(
    base: Path,
    out: Path,
    variant: str,
    imatrix: Path | None,
    threads: int,
    progress: Callable[[int, int, str], None] | None,
) -> Quantized:
    """Quantize the float GGUF `base` to `out` (whole or not at all). F32 also dequantizes a quantized `base`.

    `imatrix` is a file `calibrate.load_importance` reads, or None. Raises SlimpiError for an unknown variant, a
    missing matrix, too little disk space, a base llama.cpp refuses, or a log that contradicts the file.
    """
    kind = _checked(base, out, variant, imatrix, threads)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    request = _request(base, partial, variant, imatrix, threads)
    try:
        log = _run(request, base, variant, progress)
        result = _read_result(partial, kind, log)
        _sync(partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return result


def planned_types(base: Path, variant: str, imatrix: Path | None) -> Quantized:
    """What `quantize_gguf` would make of `base`, from llama.cpp's dry run: types and fallbacks, no file written.

    Raises SlimpiError as `quantize_gguf` does. `without_importance` stays empty: only the real run tells.
    """
    nowhere = base.with_name(f".{base.name}.planned")
    kind, log = _checked(base, nowhere, variant, imatrix, 1), _Log()
    request = {**_request(base, nowhere, variant, imatrix, 1), "dry_only": True}

    def on_line(line: str) -> None:
        log.read(line)

    run_fresh("pipeline.export.llama_quantize", request, on_line, f"planning {variant} for {base.name}")
    _check_log(log, log.types)
    return Quantized(log.types, [*log.fallbacks, *_unlogged_fallbacks(log.types, kind, log.columns)])


def _request(base: Path, out: Path, variant: str, imatrix: Path | None, threads: int) -> dict[str, Any]:
    return {
        "base": str(base),
        "out": str(out),
        "ftype": VARIANTS[variant].ftype,
        "imatrix": str(imatrix) if imatrix else None,
        "threads": threads,
        "dequantize": variant == "F32",
        "dry_only": False,
    }


def _checked(base: Path, out: Path, variant: str, imatrix: Path | None, threads: int) -> Variant:
    kind = VARIANTS.get(variant)
    if kind is None:
        raise SlimpiError(f"unknown GGUF variant {variant!r}. Known: {', '.join(VARIANTS)}.")
    if not base.is_file():
        raise SlimpiError(f"{base} is not a file. Convert the model to GGUF first.")
    if out.exists() and out.samefile(base):
        raise SlimpiError(f"{out} is the file to quantize. Write to another path.")
    if kind.needs_imatrix and imatrix is None:
        raise SlimpiError(f"{variant} needs an importance matrix. Calibrate first (pipeline.calibrate), or use Q2_K.")
    if threads < 1:
        raise SlimpiError(f"threads is {threads}. Use at least 1.")
    return kind


_PLANNED = "slimpi-planned"  # between the child's dry run and its real one

# Log of llama.cpp, which is the only place that says what a type was before it fell back.

_TENSOR = re.compile(r"\[ *(\d+)/ *(\d+)\] (\S+) +- \[ *(\d+), [^\]]*\], type = +(\S+),")
_NEW_TYPE = re.compile(r"-> +[\d.]+ MiB \((\S+)\)$|, converting to (\S+) \.\.")
_FALLBACK = re.compile(
    r"warning: (\S+) +- ncols +(\d+) not divisible by +(\d+) \(required for type +(\S+)\) "
    r"(?:\(WARNING: must use F16 due to unusual shape\) )?-> falling back to +(\S+)"
)
_N_FALLBACKS = re.compile(r"WARNING: (\d+) of \d+ tensor\(s\) required fallback quantization")
_UNWEIGHTED = re.compile(r"did not find weights for (\S+)|imatrix size .* is different from tensor size .* for (\S+)")
_SIZE = re.compile(r"(model|quant) size += +([\d.]+) MiB")


@dataclass
class _Log:
    """The facts in llama_model_quantize's log, in order of appearance."""

    columns: dict[str, int] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    n_fallbacks: int = 0
    unweighted: list[str] = field(default_factory=list)
    sizes_mib: dict[str, float] = field(default_factory=dict)

    def read(self, line: str) -> tuple[int, int, str] | None:
        """Take in one line; (done, total, tensor) if it is about a tensor's turn."""
        if found := _FALLBACK.search(line):
            tensor, columns, block, asked, got = found.groups()
            self.fallbacks.append(_fallback(tensor, asked.upper(), got.upper(), int(columns), int(block)))
        elif found := _N_FALLBACKS.search(line):
            self.n_fallbacks = int(found[1])
        elif found := _UNWEIGHTED.search(line):
            self.unweighted.append(found[1] or found[2])
        elif found := _SIZE.search(line):
            self.sizes_mib[found[1]] = float(found[2])
        if found := _TENSOR.search(line):
            done, total, tensor, columns, kept = found.groups()
            self.columns[tensor] = int(columns)
            new = _NEW_TYPE.search(line)
            self.types[tensor] = ((new[1] or new[2]) if new else kept).upper()
            return int(done), int(total), tensor
        return None


def _fallback(tensor: str, asked: str, got: str, columns: int, block: int) -> Fallback:
    return Fallback(tensor=tensor, asked=asked, got=got, reason=f"{columns} columns are not divisible by {block}")


def _run(request: dict[str, Any], base: Path, variant: str, progress: Callable[[int, int, str], None] | None) -> _Log:
    """The log of the real run. The dry run before it tells the size; a disk too small ends the child there."""
    planned, log = _Log(), _Log()
    dry = True

    def on_line(line: str) -> None:
        nonlocal dry
        if line == _PLANNED:
            dry = False
            _check_space(Path(request["out"]).parent, planned, base)
        turn = (planned if dry else log).read(line)
        if turn and progress and not dry:
            progress(*turn)

    run_fresh("pipeline.export.llama_quantize", request, on_line, f"quantizing {base.name} to {variant}")
    return log


def _check_space(folder: Path, planned: _Log, base: Path) -> None:
    """The dry run's tensor bytes plus the base's metadata must fit on the disk."""
    mib = 1024 * 1024
    metadata_bytes = base.stat().st_size - planned.sizes_mib["model"] * mib
    needed_mib = planned.sizes_mib["quant"] + max(metadata_bytes, 0) / mib + 1
    free_mib = shutil.disk_usage(folder).free / mib
    if needed_mib > free_mib:
        raise SlimpiError(f"{folder} has {free_mib:.0f} MiB free, {needed_mib:.0f} MiB are needed. Free some space.")


def _read_result(path: Path, kind: Variant, log: _Log) -> Quantized:
    """Types from the file, fallbacks from the log; SlimpiError where the two disagree."""
    from pipeline.export.gguf import read_gguf_types

    types = {tensor: got for tensor, got, _, _ in read_gguf_types(path)}
    _check_log(log, types)
    return Quantized(types, [*log.fallbacks, *_unlogged_fallbacks(types, kind, log.columns)], log.unweighted)


def _check_log(log: _Log, types: dict[str, str]) -> None:
    wrong = [f.tensor for f in log.fallbacks if types.get(f.tensor) != f.got]
    if wrong or len(log.fallbacks) != log.n_fallbacks or types.keys() != log.columns.keys():
        raise SlimpiError(
            f"llama.cpp's log tells of {log.n_fallbacks} fallbacks and {len(log.columns)} tensors, read were "
            f"{len(log.fallbacks)} and {len(types)}, {len(wrong)} with other types in the file. "
            "Install the pinned llama-cpp-python."
        )


def _unlogged_fallbacks(types: dict[str, str], kind: Variant, columns: dict[str, int]) -> Iterable[Fallback]:
    """The output matrix becomes Q8_0 without a word where the mix's base type does not fit its columns."""
    import gguf

    if not kind.output_type:
        return
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.base_type]]
    output = "output.weight" if "output.weight" in types else "token_embd.weight"
    if columns[output] % block and types[output] == "Q8_0":
        yield _fallback(output, kind.output_type, "Q8_0", columns[output], block)


def _sync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


# Child process from here on.


def _handle(request: dict[str, Any]) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = request["ftype"]
    params.nthread = request["threads"]
    params.allow_requantize = request["dequantize"]
    keep: list[Any] = []
    if request["imatrix"]:
        importance = load_importance(Path(request["imatrix"]))
        params.imatrix = _imatrix_array(importance, keep)
        params.kv_overrides = _imatrix_facts(importance, Path(request["imatrix"]).name, keep)
    for params.dry_run in (True, False):
        status = llama_cpp.llama_model_quantize(request["base"].encode(), request["out"].encode(), ctypes.byref(params))
        if status:
            sys.exit(status)  # the log's last lines say why
        if request["dry_only"]:
            return
        if params.dry_run:
            emit(_PLANNED)


def _imatrix_array(importance: Importance, keep: list[Any]) -> Any:
    """llama_model_imatrix_data[], ended by a NULL name; `keep` holds what it points to."""
    import llama_cpp

    array = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(importance.mean_x2) + 1))()
    for entry, (tensor, values) in zip(array, importance.mean_x2.items(), strict=False):
        entry.name, entry.size = tensor.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        keep.append(values)
    keep.append(array)
    return array


def _imatrix_facts(importance: Importance, file: str, keep: list[Any]) -> Any:
    """The keys llama-quantize leaves in the file to tell which matrix was used, ended by an empty key."""
    import llama_cpp

    facts: list[tuple[str, str | int]] = [
        ("quantize.imatrix.file", file),
        ("quantize.imatrix.dataset", importance.text),
        ("quantize.imatrix.entries_count", len(importance.mean_x2)),
        ("quantize.imatrix.chunks_count", importance.n_chunks),
    ]
    array = (llama_cpp.llama_cpp.llama_model_kv_override * (len(facts) + 1))()
    for entry, (key, value) in zip(array, facts, strict=False):
        entry.key = key.encode()
        if isinstance(value, str):
            entry.tag = llama_cpp.llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            entry.value.val_str = value.encode()[:127]
        else:
            entry.tag = llama_cpp.llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
            entry.value.val_i64 = value
    keep.append(array)
    return array


if __name__ == "__main__":
    sys.exit(serve(_handle))

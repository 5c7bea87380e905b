"""llama.cpp's quantizer driven from Python: types, fallbacks, bytes, and what bad input leaves behind."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import psutil
import pytest
import real_exports
from fakes import LlamaShape, write_llama

from device.records import SlimpiError
from pipeline import calibrate
from pipeline.calibrate import Importance, load_importance
from pipeline.export import llama_quantize
from pipeline.export.llama_quantize import VARIANTS, quantize_gguf

NARROW = LlamaShape(dim=64, ffn=96)
WIDE = LlamaShape(dim=256, ffn=512)
PROSE = Path(__file__).resolve().parent.parent / "pipeline" / "data" / "prose_calibration.txt"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """narrow.gguf and wide.gguf, F32, with importance matrices made up for every block matrix."""
    folder = tmp_path_factory.mktemp("models")
    for name, shape in {"narrow": NARROW, "wide": WIDE}.items():
        write_llama(folder / f"{name}.gguf", shape)
        rng = np.random.default_rng(0)
        matrices = {
            tensor.name: rng.uniform(0.1, 4.0, int(tensor.shape[0])).astype(np.float32)
            for tensor in gguf.GGUFReader(folder / f"{name}.gguf").tensors
            if tensor.name.startswith("blk.") and len(tensor.shape) == 2
        }
        calibrate._save(folder / f"{name}.npz", Importance(matrices, 1024, 512, "made up"))
    return folder


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_ftypes_are_llama_cpps() -> None:
    for name, variant in VARIANTS.items():
        constant = "LLAMA_FTYPE_ALL_F32" if name == "F32" else f"LLAMA_FTYPE_MOSTLY_{name}"
        assert variant.ftype == getattr(llama_cpp, constant), name


def check_fallbacks(models: Path, tmp_path: Path, variant: str) -> None:
    """The same mix on the same blocks, 256 columns wide, says what each tensor would have got."""
    narrow, wide = (
        quantize_gguf(models / f"{name}.gguf", tmp_path / f"{name}.gguf", variant, imatrix, 1, None)
        for name in ("narrow", "wide")
        for imatrix in [models / f"{name}.npz" if VARIANTS[variant].needs_imatrix else None]
    )
    assert wide.fallbacks == []
    asked = {f.tensor: f.asked for f in narrow.fallbacks}
    assert len(asked) == len(narrow.fallbacks)
    assert narrow.types | asked == wide.types
    assert asked == {name: kind for name, kind in wide.types.items() if kind != narrow.types[name]}
    for fallback in narrow.fallbacks:
        assert fallback.got == narrow.types[fallback.tensor]
        columns = 96 if "ffn_down" in fallback.tensor else 64
        assert fallback.reason == f"{columns} columns are not divisible by 256"
    for result, path in ((narrow, "narrow.gguf"), (wide, "wide.gguf")):
        assert result.types == {name: t.tensor_type.name for name, t in tensors(tmp_path / path).items()}


@pytest.mark.parametrize("variant", ["Q4_0", "Q6_K", "Q4_K_M", "Q2_K"])
def test_fallbacks_are_what_a_wider_model_gets(models: Path, tmp_path: Path, variant: str) -> None:
    check_fallbacks(models, tmp_path, variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("F32", "Q4_0", "Q6_K", "Q4_K_M", "Q2_K")])
def test_fallbacks_of_every_other_mix(models: Path, tmp_path: Path, variant: str) -> None:
    check_fallbacks(models, tmp_path, variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_needs_imatrix_is_what_llama_cpp_says(
    models: Path, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = VARIANTS[variant]
    monkeypatch.setitem(VARIANTS, variant, llama_quantize.Variant(kind.ftype, kind.base_type, kind.output_type, False))
    if kind.needs_imatrix:
        with pytest.raises(SlimpiError, match="requires an imatrix"):
            quantize_gguf(models / "wide.gguf", tmp_path / "out.gguf", variant, None, 1, None)
    else:
        quantize_gguf(models / "wide.gguf", tmp_path / "out.gguf", variant, None, 1, None)


@pytest.mark.parametrize("variant", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_bits_equal_the_gguf_packages(models: Path, tmp_path: Path, variant: str) -> None:
    quantize_gguf(models / "narrow.gguf", tmp_path / "q.gguf", variant, None, 1, None)
    base = tensors(models / "narrow.gguf")
    for name, tensor in tensors(tmp_path / "q.gguf").items():
        expected = gguf.quants.quantize(np.array(base[name].data), tensor.tensor_type)
        assert tensor.data.tobytes() == expected.tobytes(), name
        if name.startswith("blk.") and len(tensor.shape) == 2:
            assert tensor.tensor_type.name == variant


def test_importance_reaches_every_matrix_it_covers(models: Path, tmp_path: Path) -> None:
    """Each tensor's bytes are those of ggml's own quantizer called with that tensor's row of importances."""
    result = quantize_gguf(models / "wide.gguf", tmp_path / "q.gguf", "Q4_K_S", models / "wide.npz", 1, None)
    assert sorted(result.without_importance) == ["output.weight", "token_embd.weight"]
    importance = load_importance(models / "wide.npz").mean_x2
    base = tensors(models / "wide.gguf")
    changed = 0
    for name, tensor in tensors(tmp_path / "q.gguf").items():
        if len(tensor.shape) == 2:
            weighted = ggml_quantize(np.array(base[name].data), tensor, importance.get(name))
            assert tensor.data.tobytes() == weighted, name
            changed += weighted != ggml_quantize(np.array(base[name].data), tensor, None)
    assert changed == len(importance)
    facts = gguf.GGUFReader(tmp_path / "q.gguf").fields
    assert facts["quantize.imatrix.file"].contents() == "wide.npz"
    assert facts["quantize.imatrix.entries_count"].contents() == len(importance)
    assert facts["quantize.imatrix.chunks_count"].contents() == 2


def ggml_quantize(values: np.ndarray, like: Any, importance: np.ndarray | None) -> bytes:
    quantize = llama_cpp.llama_cpp._lib.ggml_quantize_chunk
    pointer, size = ctypes.POINTER(ctypes.c_float), ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, ctypes.c_void_p, size, size, size, pointer]
    quantize.restype = ctypes.c_size_t
    out = ctypes.create_string_buffer(int(like.n_bytes))
    weights = None if importance is None else importance.ctypes.data_as(pointer)
    rows, columns = values.shape
    written = quantize(int(like.tensor_type), values.ctypes.data_as(pointer), out, 0, rows, columns, weights)
    assert written == like.n_bytes
    return out.raw


def test_f32_dequantizes_a_quantized_file(models: Path, tmp_path: Path) -> None:
    quantize_gguf(models / "narrow.gguf", tmp_path / "q8.gguf", "Q8_0", None, 1, None)
    result = quantize_gguf(tmp_path / "q8.gguf", tmp_path / "f32.gguf", "F32", None, 1, None)
    assert set(result.types.values()) == {"F32"}
    quantized = tensors(tmp_path / "q8.gguf")
    for name, tensor in tensors(tmp_path / "f32.gguf").items():
        expected = gguf.quants.dequantize(np.array(quantized[name].data), quantized[name].tensor_type)
        assert np.array_equal(tensor.data, expected), name


def test_progress_counts_tensors(models: Path, tmp_path: Path) -> None:
    ticks: list[tuple[int, int, str]] = []
    result = quantize_gguf(
        models / "narrow.gguf", tmp_path / "q.gguf", "Q8_0", None, 1, lambda *tick: ticks.append(tick)
    )
    assert [done for done, _, _ in ticks] == list(range(1, len(result.types) + 1))
    assert {total for _, total, _ in ticks} == {len(result.types)}
    assert {what for _, _, what in ticks} == set(result.types)


@pytest.mark.parametrize(
    ("base", "variant", "imatrix", "message"),
    [
        ("narrow.gguf", "Q9_X", None, "unknown GGUF variant 'Q9_X'. Known: F32"),
        ("narrow.gguf", "IQ2_XXS", None, "IQ2_XXS needs an importance matrix. Calibrate first"),
        ("absent.gguf", "Q8_0", None, "absent.gguf is not a file"),
        ("truncated.gguf", "Q8_0", None, "quantizing truncated.gguf to Q8_0 failed .*not within the file bounds"),
        ("garbage.gguf", "Q8_0", None, "quantizing garbage.gguf to Q8_0 failed .*failed to quantize"),
        ("q8.gguf", "Q4_0", None, "requantizing from type q8_0 is disabled"),
        ("narrow.gguf", "Q4_0", "absent.npz", "absent.npz is not a file"),
        ("narrow.gguf", "Q4_0", "wide.npz", "imatrix size 256 is different from tensor size 64"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    models: Path, tmp_path: Path, base: str, variant: str, imatrix: str | None, message: str
) -> None:
    (models / "truncated.gguf").write_bytes((models / "narrow.gguf").read_bytes()[:-5000])
    (models / "garbage.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    if base == "q8.gguf":
        quantize_gguf(models / "narrow.gguf", models / base, "Q8_0", None, 1, None)
    with pytest.raises(SlimpiError, match=message) as caught:
        quantize_gguf(models / base, tmp_path / "q.gguf", variant, models / imatrix if imatrix else None, 1, None)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_base_is_never_overwritten(models: Path) -> None:
    before = (models / "narrow.gguf").read_bytes()
    with pytest.raises(SlimpiError, match="is the file to quantize"):
        quantize_gguf(models / "narrow.gguf", models / "narrow.gguf", "Q8_0", None, 1, None)
    assert (models / "narrow.gguf").read_bytes() == before


def test_a_full_disk_is_noticed_before_writing(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = llama_quantize.shutil.disk_usage(tmp_path)
    for free_bytes, fits in ((200_000, False), (3_000_000, True)):
        monkeypatch.setattr(llama_quantize.shutil, "disk_usage", lambda _, n=free_bytes: usage._replace(free=n))
        if fits:
            quantize_gguf(models / "wide.gguf", tmp_path / "q.gguf", "Q4_0", None, 1, None)
        else:
            with pytest.raises(SlimpiError, match=r"MiB free, \d MiB are needed"):
                quantize_gguf(models / "wide.gguf", tmp_path / "q.gguf", "Q4_0", None, 1, None)
            assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_neither_file_nor_process(models: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(KeyboardInterrupt):
        quantize_gguf(models / "wide.gguf", tmp_path / "q.gguf", "Q4_0", None, 1, interrupt)
    assert list(tmp_path.iterdir()) == []
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.mark.parametrize("lie", ["count", "type", "tensor"])
def test_a_log_that_contradicts_the_file_is_refused(models: Path, tmp_path: Path, lie: str) -> None:
    quantize_gguf(models / "narrow.gguf", tmp_path / "q.gguf", "Q4_0", None, 1, None)
    log = llama_quantize._Log()
    for number, name in enumerate(tensors(tmp_path / "q.gguf"), 1):
        log.read(f"[{number:4}/  22] {name:36} - [   64,    64,     1,     1], type =    f32, size = 1.0 MiB")
    got = "q5_0" if lie == "type" else "q8_0"
    columns = "ncols     64 not divisible by 256 (required for type    q6_K)"
    log.read(f"warning: {'output.weight':36} - {columns} -> falling back to    {got}")
    log.read(f"x: WARNING: {2 if lie == 'count' else 1} of 22 tensor(s) required fallback quantization")
    if lie == "tensor":
        log.columns.pop("output.weight")
    with pytest.raises(SlimpiError, match="log tells of"):
        llama_quantize._read_result(tmp_path / "q.gguf", VARIANTS["Q4_0"], log)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "n_fallbacks", "n_logged"),
    [("Q8_0", 0, 0), ("Q4_0", 1, 1), ("Q6_K", 181, 180), ("Q4_K_M", 181, 180), ("Q2_K", 181, 180)],
)
def test_fallbacks_of_a_real_model(tmp_path: Path, variant: str, n_fallbacks: int, n_logged: int) -> None:
    """576 columns: six matrices in each of 30 blocks, and the embeddings, which llama.cpp does not log for K mixes."""
    result = quantize_gguf(real_exports.smollm2_f32(), tmp_path / "q.gguf", variant, None, 1, None)
    assert len(result.types) == 272
    assert len(result.fallbacks) == n_fallbacks
    assert sum(f.tensor.startswith("blk.") for f in result.fallbacks) == n_logged - (n_fallbacks == 1)
    assert not any("ffn_down" in f.tensor for f in result.fallbacks)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["F16", "Q8_0", "Q4_K_M", "Q4_0", "Q2_K", "IQ3_XXS"])
def test_bytes_equal_llama_quantizes(tmp_path: Path, variant: str) -> None:
    binary, base = real_exports.peer("llama-quantize"), real_exports.smollm2_f32()
    imatrix = None
    if variant in ("Q4_0", "Q2_K", "IQ3_XXS"):
        imatrix = real_exports.smollm2_imatrix(PROSE)
    quantize_gguf(base, tmp_path / "ours.gguf", variant, imatrix, 1, None)
    option = ["--imatrix", imatrix] if imatrix else []
    argv = [binary, *option, base, tmp_path / "theirs.gguf", variant, 1]
    subprocess.run([str(arg) for arg in argv], check=True, capture_output=True)
    theirs = tensors(tmp_path / "theirs.gguf")
    ours = tensors(tmp_path / "ours.gguf")
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        assert ours[name].data.tobytes() == tensor.data.tobytes(), name

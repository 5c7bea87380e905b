"""Hessians and means of the inputs, against importance, against transformers in float64, and after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_exports
import torch
from fakes import write_llama
from llama_cpp_side import llama_tokens
from tiny_models import PROSE, save_tiny

from device.records import SlimpiError
from pipeline import hessians
from pipeline.architectures import gguf_names
from pipeline.calibrate import collect_importance, load_importance
from pipeline.checkpoint import load
from pipeline.export.gguf import export_gguf
from pipeline.hessians import collect_stats, load_stats
from pipeline.layers import Stats

N_CTX = 64
N_CHUNKS = 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.gguf, text.txt, and the statistics of one on the other in stats/."""
    folder = tmp_path_factory.mktemp("tiny")
    write_llama(folder / "tiny.gguf")
    (folder / "text.txt").write_text("the hat the tea\nthan that " * 20, encoding="utf-8")
    collect_stats(folder / "tiny.gguf", folder / "text.txt", folder / "stats", N_CTX, N_CHUNKS)
    return folder


def hf_inputs(model: Any, chunks: list[list[int]]) -> dict[str, np.ndarray]:
    """float64 (tokens, columns) of every linear layer's input, by its weight's Hugging Face name."""
    seen: dict[str, list[np.ndarray]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.setdefault(name, []).append(inputs[0][0].double().numpy())

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(hook(f"{name}.weight"))
    with torch.inference_mode():
        for chunk in chunks:
            model(torch.tensor([chunk]))
    return {name: np.concatenate(rows) for name, rows in seen.items()}


def twin(x: np.ndarray) -> np.ndarray:
    """E[x x^T] token by token in float64."""
    total = np.zeros((x.shape[1], x.shape[1]))
    for row in x:
        total += np.outer(row, row)
    return total / len(x)


def check_symmetric(stats: dict[str, Stats]) -> None:
    for name, entry in stats.items():
        h = entry.hessian()
        assert h.shape == (len(entry.mean_x2), len(entry.mean_x2)), name
        assert torch.equal(h, h.T), name
        torch.testing.assert_close(h.diagonal(), entry.mean_x2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["llama-biased", "qwen2", "gemma3"])
def test_equal_transformers_inputs(tmp_path: Path, name: str) -> None:
    model = save_tiny(name, tmp_path / "hf")
    gguf = tmp_path / "m.gguf"
    export_gguf(load(tmp_path / "hf"), gguf, "F32")
    text = tmp_path / "text.txt"
    text.write_text(PROSE.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    stats = load_stats(collect_stats(gguf, text, tmp_path / "stats", N_CTX, N_CHUNKS))
    tokens = llama_tokens(gguf, [text.read_text(encoding="utf-8")], tmp_path, add_special=True)[0]
    chunks = [tokens[i * N_CTX : (i + 1) * N_CTX] for i in range(N_CHUNKS)]
    if name.startswith("gemma"):
        chunks = [[model.config.bos_token_id, *chunk[1:]] for chunk in chunks]
    inputs = hf_inputs(model, chunks)
    inputs.pop("lm_head.weight")
    names = gguf_names(name.split("-")[0].replace("gemma3", "gemma3_text"), list(inputs), len(model.model.layers))
    assert set(names.values()) == stats.keys()
    for hf_name, gguf_name in names.items():
        got, want = stats[gguf_name], twin(inputs[hf_name])
        # the first block's q, k, v see no F16 cache yet
        tolerance = 2e-6 if gguf_name.startswith(("blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v")) else 1e-2
        error = np.linalg.norm(got.hessian().double().numpy() - want) / np.linalg.norm(want)
        assert error < tolerance, (gguf_name, error)
        mean_abs = np.abs(inputs[hf_name]).mean(0)
        assert np.abs(got.mean_abs_x.numpy() - mean_abs).sum() < tolerance * mean_abs.sum(), gguf_name
        assert got.n_tokens == N_CTX * N_CHUNKS
    check_symmetric(stats)


def test_means_equal_the_importance_matrix(tmp_path: Path, tiny: Path) -> None:
    stats = load_stats(tiny / "stats")
    path = collect_importance(tiny / "tiny.gguf", tiny / "text.txt", tmp_path / "i.npz", N_CTX, N_CHUNKS)
    importance = load_importance(path)
    assert stats.keys() == importance.mean_x2.keys()
    for name, values in importance.mean_x2.items():
        np.testing.assert_allclose(stats[name].mean_x2.numpy(), values, rtol=1e-6, err_msg=name)
    check_symmetric(stats)


def test_one_hessian_for_matrices_with_one_input(tiny: Path) -> None:
    stats = load_stats(tiny / "stats")
    groups: dict[int, set[str]] = {}
    for name, entry in stats.items():
        groups.setdefault(id(entry), set()).add(name.removesuffix(".weight"))
    assert [groups[id(stats[f"blk.1.{part}.weight"])] for part in ("attn_q", "attn_output", "ffn_up", "ffn_down")] == [
        {"blk.1.attn_q", "blk.1.attn_k", "blk.1.attn_v"},
        {"blk.1.attn_output"},
        {"blk.1.ffn_gate", "blk.1.ffn_up"},
        {"blk.1.ffn_down"},
    ]
    assert len(list((tiny / "stats").glob("*.hessian.npy"))) == 8


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_pass_for_each_layer_gives_the_same_bytes(tmp_path: Path, tiny: Path) -> None:
    ticks: list[tuple[int, int, str]] = []
    out = collect_stats(
        tiny / "tiny.gguf",
        tiny / "text.txt",
        tmp_path / "stats",
        N_CTX,
        N_CHUNKS,
        memory_gib=1e-9,
        progress=lambda *tick: ticks.append(tick),
    )
    assert ticks == [(i, 6, "chunks") for i in range(1, 7)]
    assert arrays(out) == arrays(tiny / "stats")


def test_a_killed_run_goes_on_after_its_last_layer(tmp_path: Path, tiny: Path) -> None:
    def run(stop_after: int) -> list[tuple[int, int, str]]:
        ticks: list[tuple[int, int, str]] = []

        def progress(*tick: Any) -> None:
            ticks.append(tick)
            if tick[0] == stop_after:
                raise KeyboardInterrupt

        request = tiny / "tiny.gguf", tiny / "text.txt", tmp_path / "stats", N_CTX, N_CHUNKS
        collect_stats(*request, memory_gib=1e-9, progress=progress)
        return ticks

    with pytest.raises(KeyboardInterrupt):
        run(stop_after=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        run(stop_after=4)
    assert [path.name for path in tmp_path.iterdir()] == [".stats.partial"]
    with pytest.raises(SlimpiError, match="holds no calibration"):
        load_stats(tmp_path / ".stats.partial")
    assert run(stop_after=0) == [(i, 3, "chunks") for i in range(1, 4)]
    assert arrays(tmp_path / "stats") == arrays(tiny / "stats")
    assert run(stop_after=0) == []
    assert [path.name for path in tmp_path.iterdir()] == ["stats"]


def test_another_request_starts_again(tmp_path: Path, tiny: Path) -> None:
    for source, name in ((tiny / "stats", "stats"), (tiny / "stats", ".stats.partial")):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / ".stats.partial" / "key.txt").write_text("another")
    (tmp_path / ".stats.partial" / "blk.0.json").write_text("[]")
    stats = load_stats(collect_stats(tiny / "tiny.gguf", tiny / "text.txt", tmp_path / "stats", N_CTX, 2))
    assert {entry.n_tokens for entry in stats.values()} == {2 * N_CTX}
    assert [path.name for path in tmp_path.iterdir()] == ["stats"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_chunks": 1000}, "1000 asked"),
        ({"n_ctx": 8}, "use n_ctx >= 16"),
        ({"memory_gib": 0.0}, "memory_gib > 0"),
        ({"text": "absent.txt"}, "absent.txt is not a file"),
        ({"gguf": "text.txt"}, "cannot load"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, tiny: Path, changes: dict[str, Any], message: str
) -> None:
    request = {"gguf": "tiny.gguf", "text": "text.txt", "n_ctx": N_CTX} | changes
    request |= {"gguf": tiny / request["gguf"], "text": tiny / request["text"], "out": tmp_path / "stats"}
    with pytest.raises(SlimpiError, match=message) as caught:
        collect_stats(**request)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["version", "hessian", "means", "shape", "missing"])
def test_damaged_statistics_are_refused(tmp_path: Path, tiny: Path, change: str) -> None:
    folder = tmp_path / "stats"
    shutil.copytree(tiny / "stats", folder)
    index = json.loads((folder / "index.json").read_text())
    if change == "version":
        index["version"] = 2
    elif change == "shape":
        index["inputs"][0]["columns"] += 1
    elif change == "missing":
        (folder / index["inputs"][0]["means"]["path"]).unlink()
    else:
        path = folder / index["inputs"][0][change]["path"]
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(SlimpiError, match="stats"):
        load_stats(folder)["blk.0.attn_q.weight"].hessian()


def test_unpack_is_exact_beyond_one_block() -> None:
    n = 1100
    square = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    full = square + square.T
    from scipy.linalg import lapack

    packed, _ = lapack.strttf(full, uplo="L")
    np.testing.assert_array_equal(hessians._unpack(packed, n), full)


@pytest.mark.slow
def test_real_model_equals_its_importance(tmp_path: Path) -> None:
    gguf = real_exports.smollm2_f32()
    stats = load_stats(collect_stats(gguf, PROSE, tmp_path / "stats", 512, 2))
    importance = load_importance(collect_importance(gguf, PROSE, tmp_path / "i.npz", 512, 2))
    assert len(stats) == len(importance.mean_x2) == 210
    for name, values in importance.mean_x2.items():
        np.testing.assert_allclose(stats[name].mean_x2.numpy(), values, rtol=1e-6, err_msg=name)
    check_symmetric({name: stats[name] for name in list(stats)[:14]})

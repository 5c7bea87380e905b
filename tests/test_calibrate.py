"""The importance matrix against a float64 twin and against llama-imatrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_exports
from fakes import LlamaShape, llama_weights, write_llama
from llama_cpp_side import llama_tokens
from reference import llama_logits

from device.records import SlimpiError
from pipeline.calibrate import collect_importance, load_importance

N_CTX = 32
PROSE = Path(__file__).resolve().parent.parent / "pipeline" / "data" / "prose_calibration.txt"


class Spy(np.ndarray):
    """A matrix that notes every vector it is multiplied by."""

    def __array_finalize__(self, parent: Any) -> None:
        self.seen = getattr(parent, "seen", None)

    def __matmul__(self, row: Any) -> Any:
        self.seen.append(np.asarray(row))
        return np.asarray(self) @ row


def twin_mean_x2(shape: LlamaShape, chunks: list[list[int]]) -> dict[str, np.ndarray]:
    """Mean x^2 of each block matrix's input, float64, by running the naive twin on spying weights."""
    spies = {}
    for name, weight in llama_weights(shape).items():
        spies[name] = weight.view(Spy)
        spies[name].seen = []
    for chunk in chunks:
        llama_logits(spies, shape, chunk)
    matrices = {n: w for n, w in spies.items() if n.startswith("blk.") and w.ndim == 2}
    return {name: np.mean(np.square(matrix.seen), axis=0) for name, matrix in matrices.items()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_llama(folder / "tiny.gguf")
    (folder / "text.txt").write_text("the hat the tea\nthan that " * 20, encoding="utf-8")
    return folder


@pytest.mark.parametrize("add_bos", [True, False])
def test_mean_squares_equal_the_twins(tmp_path: Path, tiny: Path, add_bos: bool) -> None:
    shape = LlamaShape(add_bos=add_bos)
    write_llama(tmp_path / "m.gguf", shape)
    ticks: list[tuple[int, int, str]] = []
    out = collect_importance(
        tmp_path / "m.gguf", tiny / "text.txt", tmp_path / "i.npz", N_CTX, 3, progress=lambda *tick: ticks.append(tick)
    )
    tokens = llama_tokens(tmp_path / "m.gguf", [(tiny / "text.txt").read_text()], tmp_path, add_special=True)[0]
    chunks = [tokens[i * N_CTX : (i + 1) * N_CTX] for i in range(3)]
    if add_bos:
        chunks = [[1, *chunk[1:]] for chunk in chunks]
    importance = load_importance(out)
    expected = twin_mean_x2(shape, chunks)
    assert importance.mean_x2.keys() == expected.keys()
    for name, values in expected.items():
        # after the first attention llama.cpp has passed through an F16 cache; before it, float32 all the way
        exact = name.startswith("blk.0.attn_") and "output" not in name
        np.testing.assert_allclose(importance.mean_x2[name], values, rtol=2e-6 if exact else 1e-2, err_msg=name)
    assert (importance.n_tokens, importance.n_ctx, importance.n_chunks) == (3 * N_CTX, N_CTX, 3)
    assert ticks == [(1, 3, "chunks"), (2, 3, "chunks"), (3, 3, "chunks")]


def test_all_chunks_by_default_and_the_same_bytes_twice(tmp_path: Path, tiny: Path) -> None:
    files = [collect_importance(tiny / "tiny.gguf", tiny / "text.txt", tmp_path / f"{i}.npz", N_CTX) for i in range(2)]
    tokens = llama_tokens(tiny / "tiny.gguf", [(tiny / "text.txt").read_text()], tmp_path, add_special=True)[0]
    assert load_importance(files[0]).n_chunks == len(tokens) // N_CTX > 5
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".npz") == ["0.npz", "1.npz"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "short.txt"}, r"has \d+ tokens, one chunk needs 32"),
        ({"n_chunks": 1000}, r"has \d+ chunks of 32 tokens, 1000 asked"),
        ({"n_ctx": 1024}, "n_ctx 1024 is longer than the 512 tokens"),
        ({"n_ctx": 8}, "use n_ctx >= 16"),
        ({"text": "latin1.txt"}, "is not UTF-8"),
        ({"text": "absent.txt"}, "absent.txt is not a file"),
        ({"gguf": "truncated.gguf"}, "calibration of|cannot load"),
        ({"gguf": "text.txt"}, "calibration of|cannot load"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, tiny: Path, changes: dict[str, Any], message: str
) -> None:
    (tiny / "short.txt").write_text("the cat")
    (tiny / "latin1.txt").write_bytes(b"caf\xe9 " * 100)
    (tiny / "truncated.gguf").write_bytes((tiny / "tiny.gguf").read_bytes()[:-4000])
    request = {"gguf": "tiny.gguf", "text": "text.txt", "n_ctx": N_CTX, "n_chunks": 0} | changes
    with pytest.raises(SlimpiError, match=message) as caught:
        collect_importance(
            tiny / request["gguf"], tiny / request["text"], tmp_path / "i.npz", request["n_ctx"], request["n_chunks"]
        )
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, tiny: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_importance(tiny / "tiny.gguf", tiny / "text.txt", tmp_path / "i.npz", N_CTX, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_not_finite_activations_are_refused(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = llama_weights(LlamaShape())
    weights["blk.1.attn_norm.weight"][3] = np.inf
    monkeypatch.setattr("fakes.llama_weights", lambda shape, seed: weights)
    write_llama(tmp_path / "m.gguf")
    with pytest.raises(SlimpiError, match=r"the input of blk\.1\.attn_\w\.weight is not finite"):
        collect_importance(tmp_path / "m.gguf", tiny / "text.txt", tmp_path / "i.npz", N_CTX)


@pytest.mark.parametrize("change", ["pickle", "version", "values", "truncated", "text"])
def test_damaged_matrices_are_refused(tmp_path: Path, tiny: Path, change: str) -> None:
    path = collect_importance(tiny / "tiny.gguf", tiny / "text.txt", tmp_path / "i.npz", N_CTX, 1)
    with np.load(path) as data:
        arrays = dict(data)
    name = next(key for key in arrays if key != "meta")
    if change == "pickle":
        arrays[name] = np.array([{}], dtype=object)
    elif change == "version":
        arrays["meta"] = np.array(str(arrays["meta"]).replace('"version": 1', '"version": 2'))
    elif change == "values":
        arrays[name] = -arrays[name]
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif change == "text":
        path.write_text("not a matrix")
    else:
        np.savez(path, **arrays)
    with pytest.raises(SlimpiError, match=r"i\.npz"):
        load_importance(path)


@pytest.mark.slow
def test_equals_llama_imatrix_on_a_real_model(tmp_path: Path) -> None:
    """On two chunks: of three, llama-imatrix's batches leave rests too short for it, and it counts 1530 tokens."""
    theirs = load_importance(real_exports.smollm2_imatrix(PROSE))
    ours = load_importance(collect_importance(real_exports.smollm2_f32(), PROSE, tmp_path / "i.npz", 512, 2))
    assert ours.mean_x2.keys() == theirs.mean_x2.keys()
    assert len(ours.mean_x2) == 210
    assert (ours.n_tokens, ours.n_ctx, ours.text) == (theirs.n_tokens, theirs.n_ctx, theirs.text)
    for name, values in theirs.mean_x2.items():
        assert np.abs(ours.mean_x2[name] - values).sum() < 1e-4 * values.sum(), name

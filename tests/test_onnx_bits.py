"""Mixed bits: codes at their levels, both sizes recounted, the search against enumeration and after a kill."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_onnx import LABELS, TEXTS
from tiny_encoders import MAX_TOKENS, save_encoder
from tokenizers import Tokenizer

from device.records import SlimpiError
from pipeline.export import onnx_bits
from pipeline.export.onnx import export_encoder
from pipeline.export.onnx_bits import FULL, LEVELS, MixedBits, Validation, matrices, quantize_bits, search, with_bits
from pipeline.export.onnx_observe import Calibration, in_batches, logits_of
from pipeline.plan_search import GeneticSettings

SETTINGS = GeneticSettings(population=6, generations=3, elites=1, mutated_elites=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bits")
    save_encoder("distilbert", folder / "hf", len(LABELS))
    export_encoder(folder / "hf", folder, LABELS, MAX_TOKENS)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx")


@pytest.fixture(scope="module")
def validation(folder: Path, model: onnx.ModelProto) -> Validation:
    """Labels that the fp32 encoder itself gives."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = Calibration("t", tokenizer.encode_batch(TEXTS))
    targets = np.empty(len(TEXTS), np.int64)
    targets[in_batches(texts)] = logits_of(model, texts).argmax(axis=1)
    return Validation(texts, targets)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", LEVELS[:-1])
def test_codes_keep_to_their_levels_and_are_the_nearest(bits: int, axis: int) -> None:
    weight = np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)
    codes, scale, zero = quantize_bits(weight, axis, bits)
    restored = (codes.astype(float) - zero) * scale
    if bits == 1:
        mean = np.abs(weight).mean(axis=1 - axis, keepdims=True)
        assert np.allclose(restored, np.sign(weight) * mean)
    else:
        assert codes.max() <= 2**bits - 1
        inside = (codes > 0) & (codes < 2**bits - 1)
        assert inside.any() or bits < 3
        assert (np.abs(restored - weight) <= 0.5001 * scale + 1e-7)[inside].all()


def test_what_is_not_named_stays_and_sizes_add_up(model: onnx.ModelProto, validation: Validation) -> None:
    counts = matrices(model)
    names = list(counts)
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert counts == {name: weights[name].size for name in counts}
    mixed = with_bits(model, {names[0]: 8, names[1]: 2, names[2]: FULL})
    kinds = {t.name: numpy_helper.to_array(t).dtype for t in mixed.graph.initializer}
    assert [kinds[name] == np.uint8 for name in names] == [True, True, *(False for _ in names[2:])]
    assert validation.score(with_bits(model, {}))[1] == 1.0
    with pytest.raises(SlimpiError, match="`odd` is no matrix of this encoder"):
        with_bits(model, {"odd": 8})


def test_search_goes_on_where_it_was_killed(
    model: onnx.ModelProto, validation: Validation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(state: str) -> MixedBits:
        return search(model, validation, SETTINGS, seed=3, state=tmp_path / state, accuracy_floor=0.9)

    whole = run("whole.json")
    n_scored, scored = 0, Validation.score

    def dying(self: Validation, candidate: onnx.ModelProto) -> tuple[float, float]:
        nonlocal n_scored
        n_scored += 1
        if n_scored == 5:
            raise KeyboardInterrupt
        return scored(self, candidate)

    monkeypatch.setattr(Validation, "score", dying)
    with pytest.raises(KeyboardInterrupt):
        run("cut.json")
    assert run("cut.json") == whole
    assert n_scored == whole.n_evaluated + 1  # the one it died in was measured again, no other
    counts = matrices(model)
    assert whole.mean_bits == pytest.approx(sum(counts[k] * b for k, b in whole.bits.items()) / sum(counts.values()))
    stored = len(with_bits(model, whole.bits).SerializeToString())
    spared = sum(counts[k] * (8 - b) for k, b in whole.bits.items() if b < 8)
    assert (whole.stored_bytes, whole.theoretical_bytes) == (stored, stored - spared // 8)
    assert whole.history == sorted(whole.history, reverse=True)


def test_another_searchs_state_and_a_broken_one_are_refused(
    model: onnx.ModelProto, validation: Validation, tmp_path: Path
) -> None:
    state = tmp_path / "state.json"
    for text, message in (("{", "is not a search's state"), ('{"search": "x", "known": {}}', "of another search")):
        state.write_text(text)
        with pytest.raises(SlimpiError, match=message):
            search(model, validation, SETTINGS, seed=0, state=state, accuracy_floor=0.9)
        assert state.read_text() == text


def test_search_finds_the_optimum_of_a_small_space(
    model: onnx.ModelProto, validation: Validation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three genes open, fitness replaced by one whose optimum is enumerated."""
    names = list(matrices(model))[:3]
    price = dict(zip(names, (0.3, 0.01, 1.0), strict=True))
    monkeypatch.setattr(onnx_bits, "matrices", lambda _: dict.fromkeys(names, 100))

    def loss(bits: dict[str, int]) -> float:
        return sum(price[name] * 2.0**-b for name, b in bits.items())

    monkeypatch.setattr(Validation, "score", lambda _, bits: (loss(bits), 1.0))
    settings = GeneticSettings(population=20, generations=12)
    genomes = itertools.product(LEVELS, repeat=3)
    best = min(loss(dict(zip(names, g, strict=True))) + sum(g) / 3 / FULL for g in genomes)

    class Sized(dict):  # type: ignore[type-arg]
        def SerializeToString(self) -> bytes:
            return b""

    monkeypatch.setattr(onnx_bits, "with_bits", lambda _, bits: Sized(bits))
    found = search(model, validation, settings, seed=0, state=tmp_path / "s.json", accuracy_floor=0.9)
    assert found.fitness == pytest.approx(best)

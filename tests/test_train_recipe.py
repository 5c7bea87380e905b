"""Recipes with [train]: from labelled rows to artifacts that the agent runs, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_encoders import MAX_TOKENS
from toy_tweets import save_toy_encoder, toy_settings, toy_tweets, write_vectors

from device.records import SlimpiError
from device.words import Text
from pipeline import deploy
from pipeline.build import build
from pipeline.classify import classify
from pipeline.hosts import LOCAL
from pipeline.progress import Progressor
from pipeline.recipes import Recipe, read_recipe
from pipeline.store import Places, load_artifact

HEADER = "id,keyword,location,text,target\n"


def recipe(tmp_path: Path, name: str, variants: list[str], **train: Any) -> Recipe:
    """A recipe file of a classifier on toy rows, with keywords."""
    rows = [f'{t.id},{t.keyword},,"{t.text}",{t.target}\n' for t in toy_tweets(160)]
    (tmp_path / "rows.csv").write_text(HEADER + "".join(rows), encoding="utf-8")
    if not (tmp_path / "hf").exists():
        save_toy_encoder("bert", tmp_path / "hf")
        write_vectors(tmp_path / "vectors.txt")
    reads_tokens = name in ("transformer", "embeddings", "ensemble")
    settings = toy_settings(name, tmp_path / "vectors.txt")
    return msgspec.convert(
        {
            "name": f"toy-{name}",
            "source": f"path:{tmp_path / 'hf'}" if reads_tokens else "none",
            "export": "onnx",
            "variants": variants,
            "labels": ["calm", "alarm"],
            "max_tokens": MAX_TOKENS,
            "train": {"classifier": name, "rows": f"path:{tmp_path / 'rows.csv'}", "settings": settings, **train},
            "golden": {"dataset": f"path:{tmp_path / 'rows.csv'}", "n": 4},
            "bench": {"rows": f"path:{tmp_path / 'rows.csv'}", "limit": 12},
        },
        Recipe,
    )


@pytest.mark.parametrize(
    "name", ["tfidf", *(pytest.param(name, marks=pytest.mark.slow) for name in ("multi-input", "ensemble"))]
)
def test_a_trained_recipe_builds_runs_and_answers(name: str, tmp_path: Path) -> None:
    places = Places(tmp_path / "home")
    variants = ["FP32"] if name == "tfidf" else ["FP32", "INT8-dynamic"]
    made = recipe(tmp_path, name, variants)
    folders = build(made, places, Progressor(plain=True))
    artifacts = [load_artifact(folder) for folder in folders]
    assert [a.variant for a in artifacts] == variants
    for folder, artifact in zip(folders, artifacts, strict=True):
        files = {f.path for f in artifact.files}
        assert {"model.onnx", "words.json", "golden.npz"} <= files
        assert ("tokenizer.json" in files) == (name == "ensemble")
        assert artifact.lineage[0].action == f"train {name}"
        assert 0 < artifact.lineage[0].settings["threshold"] < 1
        assert any("expected calibration error" in note for note in artifact.notes)
        report = deploy.bench("local", folder, places, threads=1, overrides={})
        assert {result.status for result in report.results} == {"ok"}
        measured = {m.metric: m for result in report.results for m in result.measurements}
        assert measured["accuracy"].mean >= 0.8
        assert max(measured["kl_divergence"].samples) < 1e-6
    texts = [Text("flood fire smoke", "fire"), Text("tea garden cat", "calm")]
    assert [p.label for p in classify(LOCAL, folders[0], texts, places)] == ["alarm", "calm"]
    lines: list[str] = []
    progress = Progressor(plain=True)
    progress.say = lines.append  # type: ignore[method-assign]
    assert build(made, places, progress) == folders
    assert all("unchanged" in line for line in lines)


def test_other_vectors_are_another_artifact(tmp_path: Path) -> None:
    places = Places(tmp_path / "home")
    made = recipe(tmp_path, "mlp", ["FP32"])
    (first,) = build(made, places, Progressor(plain=True))
    write_vectors(tmp_path / "vectors.txt", seed=1)
    (second,) = build(made, places, Progressor(plain=True))
    assert first != second
    before, after = (onnx.load(folder / "model.onnx").graph.initializer for folder in (first, second))
    tables = [next(t for t in part if t.name == "embedding.weight") for part in (before, after)]
    assert not np.array_equal(*(numpy_helper.to_array(table) for table in tables))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier": "svm"}, "unknown classifier 'svm'"),
        ({"settings": {"hidden": 3}}, "settings of classifier mlp"),
        ({"text_column": "tweet"}, "no column `tweet`"),
        ({"validation_share": 0.5, "settings": {"vectors": ["nowhere.txt"]}}, "nowhere.txt"),
    ],
)
def test_what_cannot_be_trained_is_told_and_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    places = Places(tmp_path / "home")
    with pytest.raises(SlimpiError, match=message):
        build(recipe(tmp_path, "mlp", ["FP32"], **changes), places, Progressor(plain=True))
    assert not [p for p in places.artifacts.rglob("*") if p.is_file() and p.suffix in (".onnx", ".json")]


def test_rows_with_other_labels_are_refused(tmp_path: Path) -> None:
    made = recipe(tmp_path, "tfidf", ["FP32"])
    with (tmp_path / "rows.csv").open("a", encoding="utf-8") as handle:
        handle.write("x,,,what,2\n")
    with pytest.raises(SlimpiError, match="target '2' is neither 0 nor 1"):
        build(made, Places(tmp_path / "home"), Progressor(plain=True))


def test_the_demo_rows_train_a_recipe_without_a_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIMPI_DATA", raising=False)
    made = read_recipe(Path(__file__).parent.parent / "models" / "tweets-tfidf.toml")
    (folder,) = build(made, Places(tmp_path), Progressor(plain=True))
    report = deploy.bench("local", folder, Places(tmp_path), threads=1, overrides={})
    measured = {m.metric: m for result in report.results for m in result.measurements}
    assert measured["accuracy"].mean > 0.6

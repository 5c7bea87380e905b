"""Recipes with calibrated INT8: artifacts the agent runs, whose manifest names the calibration text and the shares."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from test_train_recipe import recipe
from tiny_encoders import MAX_TOKENS, save_encoder

from device.records import SlimpiError, sha256_file
from pipeline import deploy
from pipeline.build import build
from pipeline.progress import Progressor
from pipeline.recipes import Recipe
from pipeline.store import Places, load_artifact

PASSAGES = Path(__file__).resolve().parent.parent / "pipeline" / "data" / "prose_calibration.txt"
VARIANTS = ["FP32", "INT8-static-S8S8", "INT8-lossless"]


def test_calibrated_artifacts_run_and_say_what_they_are(tmp_path: Path) -> None:
    save_encoder("bert", tmp_path / "hf")
    made = msgspec.convert(
        {
            "name": "tiny",
            "source": f"path:{tmp_path / 'hf'}",
            "export": "onnx",
            "variants": VARIANTS,
            "labels": ["calm", "alarm"],
            "max_tokens": MAX_TOKENS,
            "calibration": {"text": f"path:{PASSAGES}", "n_chunks": 16},
            "golden": {"dataset": "demo:tweets_test.csv", "n": 6},
            "bench": {"limit": 12},
        },
        Recipe,
    )
    places = Places(tmp_path / "home")
    folders = build(made, places, Progressor(plain=True))
    for folder, variant in zip(folders, VARIANTS, strict=True):
        artifact = load_artifact(folder)
        report = deploy.bench("local", folder, places, threads=1, overrides={})
        measured = {m.metric: m for result in report.results for m in result.measurements}
        assert max(measured["kl_divergence"].samples) < 1e-6  # the same file computes the same again
        steps = {step.action: step for step in artifact.lineage}
        assert ("calibrate" in steps) == (variant != "FP32")
        if variant == "FP32":
            continue
        assert steps["calibrate"].source == f"path:{PASSAGES}"
        assert steps["calibrate"].settings == {
            "n_passages": 16,
            "max_tokens": MAX_TOKENS,
            "text_sha256": sha256_file(PASSAGES),
        }
        settings = steps["onnx variant"].settings
        assert min(settings["int8_weights"], settings["int8_activations"]) >= 0.95
        assert ("sensitivity_kl" in settings) == (variant == "INT8-lossless")
        assert any(note.startswith("INT8: ") for note in artifact.notes)
        assert artifact.bits_per_linear_weight < 16


@pytest.mark.parametrize(
    ("name", "message"), [("mlp", "only encoders are calibrated"), ("ensemble", "unknown inputs.*only encoders")]
)
def test_classifiers_of_words_are_not_calibrated(tmp_path: Path, name: str, message: str) -> None:
    places = Places(tmp_path / "home")
    with pytest.raises(SlimpiError, match=message):
        build(recipe(tmp_path, name, ["FP32", "INT8-static"]), places, Progressor(plain=True))
    assert not list(places.artifacts.glob("*int8*"))

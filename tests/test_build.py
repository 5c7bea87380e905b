"""The whole story on tiny models: the shipped recipes' families build, run through the agent and are compared."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from tiny_models import save_tiny

from device.records import SlimpiError
from device.schema import Artifact
from pipeline import deploy
from pipeline.build import build
from pipeline.compare import rows
from pipeline.progress import Progressor
from pipeline.recipes import Calibration, Golden, Recipe, read_recipe
from pipeline.store import Places, load_artifact

MODELS = Path(__file__).parent.parent / "models"
FAMILIES = {"llama-3.1-8b": "llama", "qwen2.5-7b": "qwen2", "gemma-2-9b": "gemma2"}
SMALL = {"n_ctx": 64, "n_chunks": 3, "n_prompt": 16, "n_gen": 4, "repetitions": 3}


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "home")


def tiny_recipe(name: str, folder: Path, variants: list[str]) -> Recipe:
    """A shipped recipe with its checkpoint replaced by a tiny random one of the same family, in bf16 like the real."""
    save_tiny(FAMILIES[name], folder, torch.bfloat16)
    return msgspec.structs.replace(
        read_recipe(MODELS / f"{name}.toml"),
        source=f"path:{folder}",
        variants=variants,
        calibration=Calibration(n_ctx=64, n_chunks=4),
        golden=Golden(n=4, n_tokens=16),
    )


def every_variant(name: str) -> list[str]:
    return read_recipe(MODELS / f"{name}.toml").variants


@pytest.mark.parametrize(
    ("name", "all_variants"),
    [("llama-3.1-8b", False), *(pytest.param(name, True, marks=pytest.mark.slow) for name in sorted(FAMILIES))],
)
def test_hub_recipe_builds_and_runs(name: str, all_variants: bool, tmp_path: Path, places: Places) -> None:
    variants = every_variant(name) if all_variants else ["BF16", "Q4_0", "Q2_K", "IQ2_XXS"]
    assert set(variants) <= set(every_variant(name))
    recipe = tiny_recipe(name, tmp_path / "hf", variants)
    folders = build(recipe, places, Progressor(plain=True))
    artifacts = [load_artifact(folder) for folder in folders]
    assert [a.variant for a in artifacts] == variants
    assert [a.reference for a in artifacts] == [True] + [False] * (len(variants) - 1)
    for artifact in artifacts:
        check_manifest(artifact)
    chosen = [f for f, a in zip(folders, artifacts, strict=True) if a.variant in ("BF16", "Q4_0")]
    reports = [
        deploy.bench("local", f, places, threads=1, overrides={"text": "demo:prose_test.txt", **SMALL}) for f in chosen
    ]
    reference, pressed = rows(reports)
    assert not reference.failures
    assert not pressed.failures
    assert pressed.loss is not None
    assert pressed.parity_kl is not None
    assert max(pressed.parity_kl.samples) < 1e-6  # same machine, same runtime: the golden outputs come back


def check_manifest(artifact: Artifact) -> None:
    assert artifact.golden is not None
    assert artifact.entry in {f.path for f in artifact.files}
    assert artifact.plan
    assert artifact.n_linear_weights < artifact.n_weights
    assert artifact.lineage[0].action == "convert"
    assert artifact.tools["llama-cpp-python"] != "absent"
    asked_of = {"Q8_0": 8.5, "Q4_0": 4.5, "BF16": 16.0}
    if artifact.variant in asked_of:
        assert artifact.bits_per_linear_weight == pytest.approx(asked_of[artifact.variant])
    if artifact.variant.endswith(("K", "K_M", "K_S")) or artifact.variant.startswith(("IQ2", "IQ3")):
        assert artifact.fallbacks, "width 64 cannot hold a 256-wide super-block"
        for fallback in artifact.fallbacks:
            assert artifact.plan[fallback.tensor] == fallback.got != fallback.asked


def test_second_build_reuses_and_a_damaged_file_is_built_again(
    tmp_path: Path, places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe("llama-3.1-8b", tmp_path / "hf", ["BF16", "Q4_0"])
    first = build(recipe, places, Progressor(plain=True))
    stamps = [f.stat().st_mtime_ns for f in first]
    capsys.readouterr()
    assert build(recipe, places, Progressor(plain=True)) == first
    assert [f.stat().st_mtime_ns for f in first] == stamps
    assert capsys.readouterr().err.count("unchanged") == 2
    damaged = first[1] / load_artifact(first[1]).entry
    data = bytearray(damaged.read_bytes())
    data[-7] ^= 1
    damaged.write_bytes(data)
    build(recipe, places, Progressor(plain=True))
    assert "Building it again" in capsys.readouterr().err
    assert damaged.read_bytes() != bytes(data)


def test_what_no_asked_variant_needs_is_not_made(tmp_path: Path, places: Places) -> None:
    """The importance matrix of a real model takes minutes; neither the reference nor Q8_0 reads it."""
    recipe = tiny_recipe("llama-3.1-8b", tmp_path / "hf", ["BF16", "Q8_0", "Q4_0"])
    build(recipe, places, Progressor(plain=True), only=["Q8_0"])
    assert not list(places.stages.glob("*-importance-*"))
    build(recipe, places, Progressor(plain=True))
    assert len(list(places.stages.glob("*-importance-*"))) == 1


def test_measured_jobs_are_replayed_and_again_measures_anew(tmp_path: Path, places: Places) -> None:
    recipe = tiny_recipe("qwen2.5-7b", tmp_path / "hf", ["BF16"])
    (folder,) = build(recipe, places, Progressor(plain=True))

    def bench(again: bool = False) -> tuple[list[float], str]:
        report = deploy.bench("local", folder, places, threads=1, overrides=SMALL, wanted=["throughput"], again=again)
        return report.results[0].measurements[0].samples, report.job_id

    first, job = bench()
    assert bench() == (first, job)
    second, other = bench(again=True)
    assert other != job
    assert second != first
    assert bench() == (second, other)


def test_new_input_new_recipe_new_code_new_id(tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe("llama-3.1-8b", tmp_path / "hf", ["BF16"])
    names = {build(recipe, places, Progressor(plain=True))[0].name}
    names.add(
        build(msgspec.structs.replace(recipe, golden=Golden(n=5, n_tokens=16)), places, Progressor(plain=True))[0].name
    )
    save_tiny("llama", tmp_path / "hf", torch.float32)
    names.add(build(recipe, places, Progressor(plain=True))[0].name)
    assert len(names) == 3
    only_bench_changed = msgspec.structs.replace(recipe, note="another note")
    assert build(only_bench_changed, places, Progressor(plain=True))[0].name in names


def test_failure_leaves_no_artifact(tmp_path: Path, places: Places) -> None:
    recipe = tiny_recipe("llama-3.1-8b", tmp_path / "hf", ["BF16"])
    broken = msgspec.structs.replace(recipe, golden=Golden(n=200, n_tokens=100))
    with pytest.raises(SlimpiError):
        build(broken, places, Progressor(plain=True))
    assert list(places.artifacts.glob("*/manifest.json")) == []
    assert [p for p in places.artifacts.iterdir() if p.name.endswith(".partial")] == []

"""Recordings on the host's side: made once, found again, and what the comparison says of them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fakes import TEXT, artifact, write_llama

from device.records import SlimpiError, sha256_file
from device.results import Report, TaskResult
from device.schema import Artifact, Perplexity
from pipeline import compare, deploy, fit, jobs, recordings
from pipeline.hosts import LOCAL
from pipeline.progress import Progressor
from pipeline.recordings import Recording, record, tasks_of
from pipeline.store import Places, write_manifest
from pipeline.table import show

SMALL = {"n_ctx": 32, "n_chunks": 3, "n_prompt": 8, "n_gen": 4, "repetitions": 3}


@pytest.fixture
def places(tmp_path: Path) -> Places:
    where = Places(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT * 4, encoding="utf-8")
    return where


def model(places: Places, variant: str, seed: int) -> tuple[Path, Artifact]:
    """An artifact as a build would leave it; F32 is the reference."""
    folder = places.artifacts / f"fake-{variant}"
    folder.mkdir(parents=True)
    write_llama(folder / "model.gguf", seed=seed)
    made = artifact(
        folder, "gguf", id=f"fake-{variant}", name=f"fake-{variant}", variant=variant, reference=variant == "F32"
    )
    write_manifest(folder, made)
    return folder, made


def record_here(folder: Path, places: Places, n_chunks: int = 3) -> Recording:
    text = jobs.describe_dataset(f"path:{places.root / 'text.txt'}", places)
    return record(folder, text, 32, n_chunks, places, threads=1)


def test_a_recording_is_made_once_and_addressed_by_its_content(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = model(places, "F32", 0)
    made = record_here(folder, places)
    path = places.datasets / made.dataset.file.path
    assert path.parent.name == sha256_file(path)[:16]
    assert (made.n_ctx, made.n_chunks, made.reference, len(made.nll)) == (32, 3, "fake-F32", 3)
    assert list(places.stages.iterdir()) == []
    monkeypatch.setattr(recordings, "run_job", None)
    assert record_here(folder, places) == made
    with pytest.raises(TypeError, match="not callable"):
        record_here(folder, places, n_chunks=2)


def test_a_recording_that_is_gone_is_made_again(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = model(places, "F32", 0)
    made = record_here(folder, places)
    path = places.datasets / made.dataset.file.path
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    monkeypatch.setattr(recordings.shutil, "rmtree", lambda folder: None)  # killed before it tidied up
    assert record_here(folder, places) == made
    assert path.read_bytes() == whole
    path.unlink()
    monkeypatch.undo()
    assert record_here(folder, places) == made  # the journal replays, but its file is not there any more
    assert path.read_bytes() == whole


def test_a_reference_that_does_not_run_is_an_error(places: Places) -> None:
    folder, made = model(places, "F32", 0)
    (folder / "model.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    write_manifest(folder, artifact(folder, "gguf", id=made.id, name=made.name))
    with pytest.raises(SlimpiError, match=r"recording fake-F32 failed: llama\.cpp cannot load"):
        record_here(folder, places)


def test_divergence_is_a_task_like_the_others_and_a_column_of_the_table(
    places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [model(places, variant, seed)[0] for variant, seed in (("F32", 0), ("Q4_0", 1))]
    overrides = {**SMALL, "text": f"path:{places.root / 'text.txt'}"}
    tasks = tasks_of(folders, overrides, places, 1, Progressor(plain=True))
    settings = deploy.Settings(threads=1, overrides=overrides, wanted=["perplexity", "divergence"], divergence=tasks)
    reports, errors = deploy.bench_all(
        [LOCAL], folders, places, settings, Progressor(plain=True), lambda name: nullcontext()
    )
    assert errors == []
    reference, other = compare.rows(reports["local"])
    assert reference.kld is not None
    assert other.kld is not None
    assert abs(reference.kld.mean) < 1e-5
    assert other.kld.mean > 0.1
    found = {m.metric: m for m in other.report.results[1].measurements}
    chunks = np.reshape(found["kld"].samples, (3, -1)).mean(axis=1)
    assert other.kld.mean == pytest.approx(chunks.mean())
    assert other.kld.high - other.kld.mean == pytest.approx(4.302653 * chunks.std(ddof=1) / math.sqrt(3), rel=1e-5)
    show([reference, other])
    said = capsys.readouterr().out
    assert "KL divergence" in said
    assert f"{other.kld.mean:.5f} [" in said
    show([replace(row, kld=None) for row in (reference, other)])
    assert "KL divergence" not in capsys.readouterr().out
    with pytest.raises(SlimpiError, match="reference_sha256"):
        compare.rows([reports["local"][0], _against_another_recording(reports["local"][1])])


def _against_another_recording(report: Report) -> Report:
    def changed(result: TaskResult) -> TaskResult:
        elsewhere = [
            msgspec.structs.replace(m, conditions={**m.conditions, "reference_sha256": "f" * 64})
            if "reference_sha256" in m.conditions
            else m
            for m in result.measurements
        ]
        return msgspec.structs.replace(result, measurements=elsewhere)

    return msgspec.structs.replace(report, results=[changed(result) for result in report.results])


def test_a_model_without_its_reference_is_refused(places: Places) -> None:
    folder, _ = model(places, "Q4_0", 1)
    with pytest.raises(SlimpiError, match="fake-Q4_0 has no reference here"):
        tasks_of([folder], SMALL, places, 1, Progressor(plain=True))


def test_its_memory_is_predicted_as_perplexitys(places: Places) -> None:
    folder, made = model(places, "F32", 0)
    task = record_here(folder, places).task()
    text = jobs.describe_dataset(f"path:{places.root / 'text.txt'}", places)
    ours, plain = fit.footprints(made, folder, [task, Perplexity(dataset=text, n_ctx=32)])
    assert ours.total_bytes == plain.total_bytes

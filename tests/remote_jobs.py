"""Artifacts of tiny models in a home of slimpi's, and how tests run them on a device reached by ssh."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes import TEXT, LlamaShape, artifact, write_llama

from device.records import SlimpiError
from device.results import Event, Report
from pipeline import deploy, remote
from pipeline.hosts import Host
from pipeline.progress import Progressor
from pipeline.store import Places, write_manifest

SHORT = {"n_ctx": 32, "n_chunks": 3}


def make_artifact(places: Places, variant: str = "F32", seed: int = 0, shape: LlamaShape | None = None) -> Path:
    folder = places.artifacts / f"tiny-{variant.lower()}"
    folder.mkdir(parents=True)
    write_llama(folder / "model.gguf", shape, seed)
    made = artifact(folder, "gguf", id=folder.name, name=folder.name, model="tiny", variant=variant)
    size = (folder / "model.gguf").stat().st_size
    write_manifest(folder, msgspec.structs.replace(made, size_bytes=size, reference=variant == "F32"))
    return folder


def text_file(folder: Path, repeats: int = 4) -> str:
    path = folder / f"text{repeats}.txt"
    path.write_text(TEXT * repeats, encoding="utf-8")
    return f"path:{path}"


@contextmanager
def _taking(events: list[Event]) -> Any:
    yield events.append


def run_on(
    hosts: list[Host],
    folders: list[Path],
    places: Places,
    text: str,
    events: list[Event] | None = None,
    wanted: tuple[str, ...] = ("perplexity",),
    **settings: Any,
) -> dict[str, list[Report]]:
    """bench_all that must succeed on every host."""
    reports, errors = try_on(hosts, folders, places, text, events, wanted, **settings)
    if errors:
        raise errors[0]
    return reports


def try_on(
    hosts: list[Host],
    folders: list[Path],
    places: Places,
    text: str,
    events: list[Event] | None = None,
    wanted: tuple[str, ...] = ("perplexity",),
    **settings: Any,
) -> tuple[dict[str, list[Report]], list[SlimpiError]]:
    overrides = {**SHORT, "text": text, "n_prompt": 16, "n_gen": 4, **settings.pop("overrides", {})}
    chosen = deploy.Settings(threads=1, overrides=overrides, wanted=list(wanted), **settings)
    watch = (lambda name: nullcontext()) if events is None else (lambda name: _taking(events))
    return deploy.bench_all(hosts, folders, places, chosen, Progressor(plain=True), watch)


def samples(report: Report, metric: str = "nll") -> list[float]:
    return next(m.samples for r in report.results for m in r.measurements if m.metric == metric)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnect at once."""
    monkeypatch.setattr(remote, "BACKOFF_S", (0.05, 0.1, 0.2, 0.5))

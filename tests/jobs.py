"""Jobs on the tiny models, and the ways tests run them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fakes import TEXT, World, artifact

from device import agent
from device.records import encode
from device.results import Event, Report
from device.schema import (
    Choices,
    Divergence,
    Golden,
    Job,
    Parity,
    Perplexity,
    Product,
    Profile,
    RecordGolden,
    RecordLogits,
    Throughput,
    Tweets,
)

REPO = Path(__file__).resolve().parent.parent


def run(job: Job) -> tuple[Report, list[Event]]:
    events: list[Event] = []
    return agent.run(job, events.append), events


def long_perplexity(world: World) -> Perplexity:
    """Thousands of chunks of a few hundred microseconds: long enough to be hit in the middle."""
    (world.root / "data" / "long.txt").write_text(TEXT * 150, encoding="utf-8")
    return Perplexity(dataset=world.dataset("long.txt"), n_ctx=8)


def golden_job(world: World, kind: str) -> Job:
    """A job whose artifact carries golden outputs, recorded by a first run of the agent."""
    dataset = world.dataset("text.txt" if kind == "gguf" else "tweets.csv")
    record = RecordGolden(dataset=dataset, n=5, n_tokens=24)
    recorded = world.job(kind, [record], work_dir=str(world.root / "recording"))
    report, _ = run(recorded)
    assert report.results[0].status == "ok", report.results[0].error
    folder = Path(recorded.artifact_dir)
    (folder / "golden.npz").write_bytes((world.root / "recording" / "golden.npz").read_bytes())
    golden = Golden(file="golden.npz", n=5, machine="x86_64", runtime="test")
    return world.job(kind, [Parity()], artifact=artifact(folder, kind, golden=golden))


def divergence_job(world: World) -> Job:
    """A job that scores the fake model against its own recording, made by a first run of the agent."""
    record = RecordLogits(dataset=world.dataset("text.txt"), n_ctx=32, n_chunks=2)
    recorded = world.job("gguf", [record], work_dir=str(world.root / "recording"))
    report, _ = run(recorded)
    assert report.results[0].status == "ok", report.results[0].error
    (world.root / "recording" / "reference.logits").rename(world.root / "data" / "reference.logits")
    task = Divergence(
        dataset=world.dataset("reference.logits"),
        n_ctx=32,
        n_chunks=2,
        corpus="text.txt",
        corpus_sha256=record.dataset.file.sha256,
        reference=recorded.artifact.id,
    )
    return world.job("gguf", [task])


def profile(**changes: Any) -> Profile:
    """Two formats and two shapes, a working set of a few matrices."""
    shapes = [(24, 32), (512, 256)]
    products = [Product(format=kind, rows=rows, columns=n) for rows, n in shapes for kind in ("Q4_0", "F16")]
    return Profile(**{"products": products, "working_set_mib": 1, "repetitions": 3} | changes)


def choices(world: World, questions: list[dict[str, Any]] | None = None, **settings: Any) -> Choices:
    """A file of questions in the world's data folder: three plain ones, and one of WinoGrande's kind."""
    lines = questions or [
        {"context": "The kettle sang before the", "choices": ["house", "rain was up"], "answer": 0},
        {"context": "Rain had come in the", "choices": ["night.", "yard", "a small sky"], "answer": 0},
        {"context": "The cat walked ", "choices": ["round each of them", "gone"], "answer": 0},
        {"context": ["The house", "The puddle"], "choices": ["held the small skies."] * 2, "answer": 1},
    ]
    path = world.root / "data" / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return Choices(dataset=world.dataset(path.name), **settings)


FAKES: dict[type, list[Callable[[World], Job]]] = {
    Perplexity: [lambda w: w.job("gguf", [Perplexity(dataset=w.dataset("text.txt"), n_ctx=32, n_chunks=3)])],
    Throughput: [lambda w: w.job("gguf", [Throughput(n_prompt=16, n_gen=8, repetitions=3)])],
    Profile: [lambda w: w.job("gguf", [profile()])],
    Tweets: [lambda w: w.job("onnx", [Tweets(dataset=w.dataset("tweets.csv"), batch_size=2)])],
    Parity: [lambda w: golden_job(w, "gguf"), lambda w: golden_job(w, "onnx")],
    RecordGolden: [
        lambda w: w.job("gguf", [RecordGolden(dataset=w.dataset("text.txt"), n=4, n_tokens=16)]),
        lambda w: w.job("onnx", [RecordGolden(dataset=w.dataset("tweets.csv"), n=3)]),
    ],
    RecordLogits: [lambda w: w.job("gguf", [RecordLogits(dataset=w.dataset("text.txt"), n_ctx=32, n_chunks=2)])],
    Divergence: [divergence_job],
    Choices: [lambda w: w.job("gguf", [choices(w)])],
}


def start_agent(job: Job, *arguments: str) -> subprocess.Popen[bytes]:
    path = Path(job.work_dir).with_suffix(".job.json")
    path.write_bytes(encode(job))
    return subprocess.Popen(
        [sys.executable, "-m", "device", *(arguments or (str(path),))],
        cwd=REPO,
        stdin=path.open("rb"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_interruptible,
    )


def _interruptible() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

"""What a reference expects of a text, recorded on this machine once and kept where the datasets are."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from device.records import Record, SlimpiError, encode, read_record, write_atomic
from device.results import Event, Report, Sample, TaskStarted
from device.schema import Dataset, Divergence, File, Job, RecordLogits, describe_file
from pipeline.deploy import OnEvent, run_job
from pipeline.jobs import bench_settings, describe_dataset
from pipeline.progress import Progressor, Tick
from pipeline.store import Places, digest, load_artifact, tool_versions

LOGITS_NAME = "reference.logits"


class Recording(Record, frozen=True, kw_only=True):
    """A file of log-probabilities, and what it holds: n_chunks chunks of n_ctx tokens of `text` under the artifact
    `reference`, and each chunk's mean negative log-likelihood (nats/token), exact."""

    dataset: Dataset
    text: Dataset
    n_ctx: int
    n_chunks: int
    reference: str
    nll: list[float]

    def task(self, n_chunks: int = 0) -> Divergence:
        """The task that scores an artifact against the first n_chunks of it, 0 = all."""
        return Divergence(
            dataset=self.dataset,
            n_ctx=self.n_ctx,
            n_chunks=n_chunks or self.n_chunks,
            corpus=self.text.name,
            corpus_sha256=self.text.file.sha256,
            reference=self.reference,
        )


def record(
    folder: Path,
    text: Dataset,
    n_ctx: int,
    n_chunks: int,
    places: Places,
    threads: int,
    on_event: OnEvent | None = None,
) -> Recording:
    """The recording of an artifact (its folder) on a text; n_chunks 0 = all. Made if there is none, resumed if killed.

    It depends on the model's file, the text and llama.cpp, not on slimpi's code. SlimpiError if the agent fails.
    """
    artifact = load_artifact(folder)
    (entry,) = (f for f in artifact.files if f.path == artifact.entry)
    runtime = tool_versions()["llama-cpp-python"]
    key = digest([entry.sha256, artifact.tokenizer_sha256, text.file.sha256, n_ctx, n_chunks, runtime])[:16]
    listing = places.datasets / f"logits-{key}.json"
    if listing.exists():
        known = read_record(listing, Recording)
        path = places.datasets / known.dataset.file.path
        if path.is_file() and path.stat().st_size == known.dataset.file.size_bytes:
            return known
    job = Job(
        id=f"logits-{key}",
        artifact=artifact,
        artifact_dir=str(folder),
        data_dir=str(places.datasets),
        work_dir=str(places.stages / f"{artifact.id[:100]}-logits-{key}"),
        tasks=[RecordLogits(dataset=text, n_ctx=n_ctx, n_chunks=n_chunks)],
        threads=threads,
        provenance="host",
        timeout_s=7 * 24 * 3600,
    )
    report = _run(job, on_event)
    file = describe_file(Path(job.work_dir), LOGITS_NAME)
    (nll,) = report.results[0].measurements
    found = Recording(
        dataset=Dataset(
            name=f"{artifact.name} on {text.name}",
            file=File(path=f"{file.sha256[:16]}/{LOGITS_NAME}", sha256=file.sha256, size_bytes=file.size_bytes),
        ),
        text=text,
        n_ctx=n_ctx,
        n_chunks=nll.n,
        reference=artifact.id,
        nll=nll.samples,
    )
    target = places.datasets / found.dataset.file.path
    write_atomic(listing, encode(found))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        (Path(job.work_dir) / LOGITS_NAME).replace(target)
    except OSError as error:
        raise SlimpiError(f"cannot write {target}: {error.strerror}. Free some space or fix permissions.") from error
    shutil.rmtree(job.work_dir)
    return found


def _run(job: Job, on_event: OnEvent | None) -> Report:
    """A journal without its file replays a run whose product is gone: then it is made anew."""
    work = Path(job.work_dir)
    report = run_job("local", job, on_event)
    if report.results[0].status == "ok" and not (work / LOGITS_NAME).is_file():
        shutil.rmtree(work)
        report = run_job("local", job, on_event)
    result = report.results[0]
    if result.status != "ok":
        raise SlimpiError(f"recording {job.artifact.name} failed: {result.error}")
    return report


def tasks_of(
    folders: Sequence[Path], overrides: dict[str, Any], places: Places, threads: int, progress: Progressor
) -> dict[str, Divergence]:
    """The divergence task of every language model among the artifacts, by model, its reference recorded on the text
    that its perplexity task reads. SlimpiError for a model whose reference is not among them."""
    artifacts = [(folder, load_artifact(folder)) for folder in folders]
    tasks: dict[str, Divergence] = {}
    for folder, artifact in artifacts:
        if artifact.task == "lm" and artifact.reference:
            bench = bench_settings(artifact, overrides)
            text = describe_dataset(bench.text, places)
            with progress.step(f"record {artifact.name} on {bench.text}") as tick:
                made = record(folder, text, bench.n_ctx, bench.n_chunks, places, threads, sample_ticker(tick))
            tasks[artifact.model] = made.task()
    lacking = [a for _, a in artifacts if a.task == "lm" and a.model not in tasks]
    if lacking:
        raise SlimpiError(f"{lacking[0].name} has no reference here to diverge from. Name its reference artifact, too.")
    return tasks


def sample_ticker(tick: Tick) -> OnEvent:
    """An agent's samples as the progress of one step."""
    done = total = 0

    def take(event: Event) -> None:
        nonlocal done, total
        if isinstance(event, TaskStarted):
            total = event.total
        elif isinstance(event, Sample):
            done += 1
            tick(done, total, event.series)

    return take

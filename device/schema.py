"""The contract between host and device: manifest.json and job.json go out, report.json comes back.

History of SCHEMA_VERSION (a reader refuses versions it does not know):
  1  2026-11  first version. Tasks added since: record_logits, divergence, profile, choices; fields added since:
              keyword_column of tweets and record_golden (an older agent refuses a job with them).

Units are part of every name. Raw samples are stored; means and errors are computed when read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

SCHEMA_VERSION = 1

# Files of a classifier, by name: what reads its texts.
TOKENIZER, WORDS = "tokenizer.json", "words.json"

# Its graph's output of how far a text is from those it learned from, if it has one: (texts,) float32.
DISTANCE = "distance"

Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Provenance = Literal["measured", "emulated", "predicted", "host"]
Kind = Literal["gguf", "onnx"]
ModelTask = Literal["lm", "classifier"]
Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]

_SAFE_ID = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


class SlimpiError(Exception):
    """The one user-facing error: what was wrong, with which value, and what to do. Exit code 1, no traceback."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything on the wire: immutable, keyword-only, unknown fields rejected."""


class File(Record, frozen=True, kw_only=True):
    """A file of an artifact or job: relative POSIX path inside its folder, and its content's hash."""

    path: str
    sha256: Sha256
    size_bytes: Count

    def __post_init__(self) -> None:
        check_relative(self.path)


class Fallback(Record, frozen=True, kw_only=True):
    """A tensor that did not get the type its plan asked for; never silent."""

    tensor: str
    asked: str
    got: str
    reason: str


class Step(Record, frozen=True, kw_only=True):
    """One step of an artifact's lineage: what was done, from what, with which settings."""

    action: str
    source: str
    settings: dict[str, Any] = {}


class Golden(Record, frozen=True, kw_only=True):
    """Outputs recorded on the host at build time, in an .npz (read without pickle).

    lm: `tokens` (n_tokens,) int32 and `logits` (n, n_vocab) float32 of the last n positions.
    classifier: `texts` (n,) unicode, `logits` (n, n_labels) float32 and, where the texts have them, `keywords` (n,)
    unicode.
    """

    file: str
    n: Positive
    machine: str
    runtime: str


class Artifact(Record, frozen=True, kw_only=True):
    """manifest.json: what an artifact is, where it came from, and how to check it."""

    schema: Literal[1] = 1
    id: str
    name: str
    model: str
    variant: str
    kind: Kind
    task: ModelTask
    entry: str
    files: list[File]
    reference: bool
    tokenizer_sha256: Sha256
    n_weights: Count
    n_linear_weights: Count
    bits_per_weight: float
    bits_per_linear_weight: float
    size_bytes: Count
    plan: dict[str, str]
    fallbacks: list[Fallback] = []
    labels: list[str] = []
    max_tokens: int = 0
    lineage: list[Step] = []
    recipe: dict[str, Any] = {}
    tools: dict[str, str] = {}
    golden: Golden | None = None
    notes: list[str] = []

    def __post_init__(self) -> None:
        check_id(self.id)
        paths = {f.path for f in self.files}
        if len(paths) != len(self.files):
            raise ValueError("the same file is listed twice")
        for path in (self.entry, *([self.golden.file] if self.golden else [])):
            if path not in paths:
                raise ValueError(f"`{path}` is not among the files")


class Dataset(Record, frozen=True, kw_only=True):
    """A text or table a task reads; `path` is relative to the job's data folder."""

    name: str
    file: File


class Perplexity(Record, frozen=True, kw_only=True, tag="perplexity", tag_field="task"):
    """llama.cpp's definition: chunks of n_ctx tokens, second half scored. n_chunks 0 = all."""

    dataset: Dataset
    n_ctx: Annotated[int, Meta(ge=8, le=131072)] = 512
    n_chunks: Count = 0


class Throughput(Record, frozen=True, kw_only=True, tag="throughput", tag_field="task"):
    """Prefill of n_prompt tokens, decode of n_gen tokens, time to first token, load time."""

    n_prompt: Positive = 512
    n_gen: Positive = 128
    repetitions: Positive = 5
    warmup: Count = 1


class Tweets(Record, frozen=True, kw_only=True, tag="tweets", tag_field="task"):
    """Classify every row of a CSV: quality, latency of single texts, and texts a second in batches.

    keyword_column is read only for an artifact whose graph asks for keywords; "" = none.
    """

    dataset: Dataset
    text_column: str = "text"
    label_column: str = "target"
    keyword_column: str = ""
    limit: Count = 0
    batch_size: Positive = 32
    warmup: Count = 8


class Parity(Record, frozen=True, kw_only=True, tag="parity", tag_field="task"):
    """The device's logits against the golden ones recorded when the artifact was built."""


class RecordGolden(Record, frozen=True, kw_only=True, tag="record_golden", tag_field="task"):
    """Record golden outputs: the host runs this once at build time; writes golden.npz to the work folder.

    keyword_column is of a table, and as in Tweets.
    """

    dataset: Dataset
    n: Positive = 32
    n_tokens: Positive = 128
    keyword_column: str = ""


class RecordLogits(Record, frozen=True, kw_only=True, tag="record_logits", tag_field="task"):
    """Record the reference's log-probabilities of a text, chunked as in Perplexity; writes reference.logits (the format
    is device/logits_file.py's) to the work folder: 2 * n_vocab bytes a scored token."""

    dataset: Dataset
    n_ctx: Annotated[int, Meta(ge=8, le=131072)] = 512
    n_chunks: Count = 0


class Divergence(Record, frozen=True, kw_only=True, tag="divergence", tag_field="task"):
    """KL divergence to a reference, as llama-perplexity --kl-divergence: `dataset` is a file that record_logits wrote.

    The other fields say what it must hold: chunks of n_ctx tokens of the text `corpus`, at least n_chunks of them (the
    first n_chunks are scored), computed by the artifact whose id is `reference`.
    """

    dataset: Dataset
    n_ctx: Annotated[int, Meta(ge=8, le=131072)]
    n_chunks: Positive
    corpus: str
    corpus_sha256: Sha256
    reference: str


class Product(Record, frozen=True, kw_only=True):
    """A weight matrix in a format (ggml's name, such as Q4_K), rows = outputs, columns = inputs, times activations."""

    format: str
    rows: Annotated[int, Meta(ge=1, le=2**24)]
    columns: Annotated[int, Meta(ge=1, le=2**24)]


class Profile(Record, frozen=True, kw_only=True, tag="profile", tag_field="task"):
    """Time each of these products, a weight; n_tokens 1 = decoding.

    working_set_mib: bytes of weights a sample goes through, several times the last level of cache.
    """

    products: Annotated[list[Product], Meta(min_length=1)]
    n_tokens: Annotated[int, Meta(ge=1, le=4096)] = 1
    working_set_mib: Annotated[int, Meta(ge=1, le=4096)] = 64
    repetitions: Positive = 5
    warmup: Count = 1


class Choices(Record, frozen=True, kw_only=True, tag="choices", tag_field="task"):
    """Zero-shot multiple choice, as EleutherAI's lm-evaluation-harness has it: `dataset` holds a Question a line.

    limit: at most the first so many questions, 0 = all. n_ctx: longer ones lose the beginning of their context.
    """

    dataset: Dataset
    limit: Count = 0
    n_ctx: Annotated[int, Meta(ge=8, le=131072)] = 2048


class Question(Record, frozen=True, kw_only=True):
    """A line of a file of questions (JSON). What is scored is a space and a choice, given its context.

    context: one for all choices, or one each (WinoGrande: the sentence up to and with the option; the choices are then
    all its rest). answer: the right choice, from 0.
    """

    context: str | list[str]
    choices: Annotated[list[str], Meta(min_length=2)]
    answer: Count

    def __post_init__(self) -> None:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} is not one of {len(self.choices)} choices, counted from 0")
        if len(self.contexts) != len(self.choices):
            raise ValueError(f"{len(self.contexts)} contexts do not go with {len(self.choices)} choices")
        if not all(text.strip() for text in (*self.contexts, *self.choices)):
            raise ValueError("a context or a choice is blank")

    @property
    def contexts(self) -> list[str]:
        """Of every choice."""
        return [self.context] * len(self.choices) if isinstance(self.context, str) else self.context


Task = Perplexity | Throughput | Tweets | Parity | RecordGolden | RecordLogits | Divergence | Profile | Choices


class Job(Record, frozen=True, kw_only=True):
    """job.json: one artifact, what to run on it, where things are on the device, and the limits of each task.

    memory_limit_bytes: of a worker's private writable memory, resident or not (RLIMIT_DATA); a mapped GGUF does not
    count. 0 = none.
    wait_cool_c: before each timed task, wait until the CPU is below this temperature, at most wait_cool_max_s.
    """

    schema: Literal[1] = 1
    id: str
    artifact: Artifact
    artifact_dir: str
    data_dir: str
    work_dir: str
    tasks: list[Task]
    threads: Positive
    provenance: Provenance
    timeout_s: Positive = 3600
    memory_limit_bytes: Count = 0
    wait_cool_c: Annotated[float, Meta(gt=0, le=120)] | None = None
    wait_cool_max_s: Count = 600

    def __post_init__(self) -> None:
        check_id(self.id)
        for folder in (self.artifact_dir, self.data_dir, self.work_dir):
            if not folder or "\0" in folder:
                raise ValueError(f"{folder[:120]!r} is not a folder's path")


class Stream(Record, frozen=True, kw_only=True):
    """The first line that `python -m device.classify` reads; each further one is a words.Text."""

    artifact: Artifact
    artifact_dir: str
    threads: Positive


class Ready(Record, frozen=True, kw_only=True):
    """The first line it says: the model is loaded. Then a Prediction for every text, in order."""

    labels: list[str]


class Prediction(Record, frozen=True, kw_only=True, omit_defaults=True):
    """The most likely label of the index-th text (from 0), and each label's probability: softmax of the logits.

    distance: how far the text is from those that the classifier learned from, where it tells: 1 is the 95 % quantile of
    texts like them, above it the label means little.
    """

    index: Count
    label: str
    probabilities: dict[str, float]
    distance: float | None = None


class Measurement(Record, frozen=True, kw_only=True):
    """One metric's raw samples, warm-ups apart, with the conditions they hold under."""

    metric: str
    unit: str
    samples: list[float]
    warmup: list[float] = []
    higher_is_better: bool
    conditions: dict[str, Any] = {}
    provenance: Provenance

    @property
    def n(self) -> int:
        return len(self.samples)

    @property
    def mean(self) -> float:
        return math.fsum(self.samples) / len(self.samples)

    @property
    def stderr(self) -> float:
        """Standard error of the mean; NaN for fewer than two samples."""
        if self.n < 2:
            return math.nan
        centre = self.mean
        return math.sqrt(math.fsum((x - centre) ** 2 for x in self.samples) / (self.n - 1) / self.n)


class Memory(Record, frozen=True, kw_only=True):
    """Peak memory of one task's process. Anonymous and file-backed apart: a mapped GGUF inflates RSS."""

    peak_rss_bytes: Count
    peak_pss_bytes: Count
    rss_anon_bytes: Count
    rss_file_bytes: Count
    swap_bytes: Count
    major_faults: Count


class Facts(Record, frozen=True, kw_only=True):
    """What the machine said of itself at one moment. None = the machine does not tell."""

    time_unix_s: float
    machine: str
    board: str
    cpu: str
    cores: Positive
    os: str
    kernel: str
    python: str
    page_size_bytes: Positive
    mem_total_bytes: Count
    mem_available_bytes: Count
    swap_used_bytes: Count
    load_1min: float
    cpu_busy_percent: float
    clock_mhz: float | None = None
    governor: str | None = None
    temperature_c: float | None = None
    throttled_bits: int | None = None
    runtimes: dict[str, str] = {}
    board_revision: str | None = None
    firmware: str | None = None
    storage: str | None = None
    swap_total_bytes: Count = 0
    under_voltage_alarm: bool | None = None


class TracePoint(Record, frozen=True, kw_only=True):
    """What the machine said while a task ran, time_s after its worker started; about one a second."""

    time_s: float
    clock_mhz: float | None = None
    temperature_c: float | None = None
    throttled_bits: int | None = None
    cpu_busy_percent: float | None = None
    mem_available_bytes: Count = 0
    worker_rss_bytes: Count = 0
    worker_rss_anon_bytes: Count = 0
    power_w: float | None = None


class TaskResult(Record, frozen=True, kw_only=True):
    """What one task gave: measurements, or the error that ended it, and what it was run in.

    duration_s counts from started_unix_s; waiting to cool (cool_wait_s) comes before. worker_peak_rss_bytes is known
    even of a worker that was killed. trace_cpu_s: CPU time that taking the trace cost, on any core.
    """

    task: Task
    status: Literal["ok", "failed"]
    error: str = ""
    measurements: list[Measurement] = []
    memory: Memory | None = None
    facts_before: Facts
    facts_after: Facts
    duration_s: float
    resumed: bool = False
    warnings: list[str] = []
    started_unix_s: float = 0.0
    cool_wait_s: float = 0.0
    worker_peak_rss_bytes: Count = 0
    trace: list[TracePoint] = []
    trace_cpu_s: float = 0.0


class Report(Record, frozen=True, kw_only=True):
    """report.json: the answer to one job."""

    schema: Literal[1] = 1
    job_id: str
    artifact: Artifact
    threads: Positive
    provenance: Provenance
    results: list[TaskResult]


class Sample(Record, frozen=True, kw_only=True, tag="sample", tag_field="event"):
    """One value as it is taken. `index` counts within (task, series); a resumed task starts at the next one."""

    task: Count
    series: str
    index: Count
    value: float
    warmup: bool = False


class TaskStarted(Record, frozen=True, kw_only=True, tag="task_started", tag_field="event"):
    task: Count
    name: str
    total: Count
    facts: Facts


class TaskEnded(Record, frozen=True, kw_only=True, tag="task_ended", tag_field="event"):
    task: Count
    result: TaskResult


class Note(Record, frozen=True, kw_only=True, tag="note", tag_field="event"):
    """Something worth saying while a job runs; no measurement hangs on it."""

    message: str


class Done(Record, frozen=True, kw_only=True, tag="done", tag_field="event"):
    report: Report


Event = Sample | TaskStarted | TaskEnded | Note | Done

R = TypeVar("R")


def check_id(value: str) -> None:
    """Ids become folder names: letters, digits, dot, dash, underscore; no separators, no leading dot."""
    if not _SAFE_ID.match(value):
        raise ValueError(f"id {value[:80]!r} is not a plain name")


def check_relative(value: str) -> None:
    """Refuse paths that could leave their folder (absolute, `..`, backslash, NUL, empty)."""
    path = PurePosixPath(value)
    bad = not value or path.is_absolute() or ".." in path.parts or "\\" in value or "\0" in value
    if bad or str(path) != value or value == ".":
        raise ValueError(f"path {value[:120]!r} must be relative and stay inside its folder")


def decode(data: bytes | str, kind: type[R], origin: str) -> R:
    """JSON to a record; SlimpiError names the origin and the offending field."""
    try:
        return msgspec.json.decode(data, type=kind, strict=True)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise SlimpiError(
            f"{origin} is not a valid {_name(kind)}: {error}. "
            f"It must be written by slimpi with schema version {SCHEMA_VERSION}."
        ) from error


def encode(record: Record) -> bytes:
    """A record as indented JSON with a final newline, for files people read."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def encode_line(record: Record) -> bytes:
    """A record as one JSON line, for streams."""
    return msgspec.json.encode(record) + b"\n"


def read_record(path: Path, kind: type[R]) -> R:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SlimpiError(f"cannot read {path}: {error.strerror}. Check the path.") from error
    return decode(data, kind, str(path))


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise SlimpiError(f"cannot write {path}: {error.strerror}. {write_remedy(error)}") from error


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_remedy(error: OSError) -> str:
    """What to do about a file that cannot be written."""
    if error.errno in (errno.EIO, errno.EROFS):
        return "The disk is failing or mounted read-only: check it (dmesg), replace the card if need be."
    return "Free some space or fix permissions."


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def describe_file(folder: Path, relative: str) -> File:
    path = folder / relative
    return File(path=relative, sha256=sha256_file(path), size_bytes=path.stat().st_size)


def verify_file(folder: Path, file: File) -> Path:
    """The file's path inside `folder` if its size and hash are as said; SlimpiError otherwise."""
    path = folder / file.path
    if not path.resolve().is_relative_to(folder.resolve()):
        raise SlimpiError(f"{file.path} leaves {folder} through a link. Remove the link.")
    if not path.is_file():
        raise SlimpiError(f"{path} is missing. Build or send the artifact again.")
    size = path.stat().st_size
    if size != file.size_bytes:
        raise SlimpiError(f"{path} has {size} bytes, expected {file.size_bytes}. Build or send it again.")
    digest = sha256_file(path)
    if digest != file.sha256:
        raise SlimpiError(
            f"{path} has sha256 {digest[:16]}..., expected {file.sha256[:16]}.... Build or send it again."
        )
    return path


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", "event")

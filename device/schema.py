"""The contract between host and device: manifest.json and job.json go out, report.json comes back (device/results.py).

History of SCHEMA_VERSION (a reader refuses versions it does not know):
  1  2026-11  first version. Tasks added since: record_logits, divergence, profile, choices; fields added since:
              keyword_column of tweets and record_golden (an older agent refuses a job with them).

Units are part of every name. Raw samples are stored; means and errors are computed when read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from device.records import Count, Positive, Record, Sha256, SlimpiError, check_id, check_relative, sha256_file

# Files of a classifier, by name: what reads its texts.
TOKENIZER, WORDS = "tokenizer.json", "words.json"

# Its graph's output of how far a text is from those it learned from, if it has one: (texts,) float32.
DISTANCE = "distance"

Provenance = Literal["measured", "emulated", "predicted", "host"]
Kind = Literal["gguf", "onnx"]
ModelTask = Literal["lm", "classifier"]


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

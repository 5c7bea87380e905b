"""What a job runs: the tasks that fit an artifact, and the data they read."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from device.records import SlimpiError, sha256_file, write_atomic
from device.schema import (
    Artifact,
    Choices,
    Dataset,
    Divergence,
    File,
    Parity,
    Perplexity,
    Profile,
    Task,
    Throughput,
    Tweets,
)
from pipeline import questions, sources
from pipeline.recipes import Bench
from pipeline.store import Places


def describe_dataset(spec: str, places: Places) -> Dataset:
    """The dataset copied into the content-addressed folder that jobs read from."""
    path = sources.dataset(spec, places.sources)
    sha256 = sha256_file(path)
    relative = f"{sha256[:16]}/{path.name}"
    target = places.datasets / relative
    if not target.exists() or sha256_file(target) != sha256:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            shutil.copyfile(path, partial)
            partial.replace(target)
        except OSError as error:
            raise SlimpiError(f"cannot write {target}: {error.strerror}. Free some space.") from error
        finally:
            partial.unlink(missing_ok=True)
    return Dataset(name=spec, file=File(path=relative, sha256=sha256, size_bytes=target.stat().st_size))


def describe_questions(spec: str, places: Places) -> Dataset:
    """A set of questions as the device reads it, in the folder that jobs read from."""
    data = questions.encode_lines(questions.read(spec, places.sources))
    sha256 = hashlib.sha256(data).hexdigest()
    relative = f"{sha256[:16]}/questions.jsonl"
    target = places.datasets / relative
    if not target.exists() or sha256_file(target) != sha256:
        write_atomic(target, data)
    return Dataset(name=spec, file=File(path=relative, sha256=sha256, size_bytes=len(data)))


def bench_settings(artifact: Artifact, overrides: dict[str, Any]) -> Bench:
    """The recipe's bench table as recorded in the manifest, with the command line's changes."""
    try:
        return msgspec.convert({**artifact.recipe.get("bench", {}), **overrides}, Bench)
    except msgspec.ValidationError as error:
        raise SlimpiError(f"bench settings of {artifact.name}: {error}. See `slimpi bench --help`.") from error


def tasks_for(
    artifact: Artifact,
    bench: Bench,
    places: Places,
    wanted: list[str] | None = None,
    divergence: Divergence | None = None,
    profile: Profile | None = None,
) -> list[Task]:
    """The tasks that fit the artifact, in the order they run; `wanted` narrows them by name.

    `divergence` comes ready, since its reference must have been recorded before (recordings.record); so does `profile`,
    which is about the model's shapes, not the artifact, and runs only where it is wanted by name. `choices` is a task
    for each set; wanted by name without any it asks the project's own few questions.
    """
    tasks: dict[str, Callable[[], Task]]
    sets = list(dict.fromkeys(bench.choices)) or ([questions.DEMO] if "choices" in (wanted or ()) else [])
    if artifact.task == "lm":
        tasks = {
            "parity": Parity,
            "throughput": lambda: Throughput(n_prompt=bench.n_prompt, n_gen=bench.n_gen, repetitions=bench.repetitions),
            "perplexity": lambda: Perplexity(
                dataset=describe_dataset(bench.text, places), n_ctx=bench.n_ctx, n_chunks=bench.n_chunks
            ),
        }
        for spec in sets:
            tasks[f"choices {spec}"] = partial(_choices, spec, bench.limit, places)
        if divergence:
            tasks["divergence"] = lambda: divergence
        if profile:
            tasks["profile"] = lambda: profile
    else:
        tasks = {
            "parity": Parity,
            "tweets": lambda: Tweets(
                dataset=describe_dataset(bench.rows, places),
                text_column=bench.text_column,
                label_column=bench.label_column,
                keyword_column=bench.keyword_column,
                limit=bench.limit,
            ),
        }
    chosen = [name for name in tasks if not wanted or name.split()[0] in wanted]
    if not chosen:
        raise SlimpiError(f"none of {wanted} fits {artifact.name}. Its tasks: {', '.join(tasks)}.")
    return [tasks[name]() for name in chosen]


def _choices(spec: str, limit: int, places: Places) -> Choices:
    return Choices(dataset=describe_questions(spec, places), limit=limit)

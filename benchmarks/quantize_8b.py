"""How much memory does quantizing a model of Llama-3.1-8B's shape take, stage by stage?

    python benchmarks/quantize_8b.py [--layers 32] [--variant GPTQ-4.25bpw] [--scratch FOLDER]

Writes stream_8b's synthetic checkpoint with so many layers and builds the variant from it as `slimpi build` does:
conversion, Hessians, the sensitivity of the output, a plan under a budget, codes, golden outputs. A thread sums the
memory of this process and those it starts, ten times a second, apart from mapped files, which the kernel takes back
when it needs to. Real sizes, made-up weights: what it says of quality is nothing. Writes
benchmarks/results/<machine>/quantize_8b.json; exit code 1 where more than 24 GiB were needed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import psutil
from bench_common import at_least, command, cpu_model, now, output_options, result_path
from stream_8b import write_checkpoint

from device.memory import parse_kib_fields
from device.records import Record, encode, write_atomic
from device.schema import Provenance
from pipeline.build import build
from pipeline.progress import Progressor, Tick
from pipeline.recipes import Calibration, Golden, PlanTable, Recipe
from pipeline.store import Places, load_artifact, places

LIMIT_BYTES = 24 << 30
INTERVAL_S = 0.1
_BETWEEN = "between steps"


class Stage(Record, frozen=True, kw_only=True):
    """Steps of one name. Memory: of all processes at its worst moment, without mapped files, and with those."""

    title: str
    wall_s: float
    peak_anon_bytes: int
    peak_rss_bytes: int


class Result(Record, frozen=True, kw_only=True):
    """quantize_8b.json. stored_bytes: of everything that the build had on disk beside the checkpoint, at most."""

    machine: str
    cpu: str
    threads: int
    start_time: str
    n_layers: int
    n_weights: int
    checkpoint_bytes: int
    variant: str
    n_calibration_tokens: int
    artifact_bytes: int
    stored_bytes: int
    provenance: Provenance
    stages: list[Stage]

    @property
    def peak_anon_bytes(self) -> int:
        return max(stage.peak_anon_bytes for stage in self.stages)


class Watch(Progressor):
    """A Progressor that measures the memory of each step it announces, and what `folder` holds at most."""

    def __init__(self, folder: Path) -> None:
        super().__init__(plain=True)
        self.folder, self.stored_bytes = folder, 0
        self.stages: dict[str, Stage] = {}
        self._title = _BETWEEN
        self._last = time.monotonic()
        self._stop, self._one_at_a_time = threading.Event(), threading.Lock()
        self._sampler = threading.Thread(target=self._sample)

    def __enter__(self) -> Watch:
        self._sampler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._stop.set()
        self._sampler.join()

    @contextmanager
    def step(self, title: str) -> Iterator[Tick]:
        self._look()
        before, self._title = self._title, title
        try:
            with super().step(title) as tick:
                yield tick
        finally:
            self._look()  # however short the step was
            self._title = before

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        """Count the time since the last look, and the memory of now, to the step that runs."""
        with self._one_at_a_time:
            title, (anon, rss), moment = self._title, tree_bytes(), time.monotonic()
            known = self.stages.get(title, Stage(title=title, wall_s=0.0, peak_anon_bytes=0, peak_rss_bytes=0))
            self.stages[title] = Stage(
                title=title,
                wall_s=known.wall_s + moment - self._last,
                peak_anon_bytes=max(known.peak_anon_bytes, anon),
                peak_rss_bytes=max(known.peak_rss_bytes, rss),
            )
            self._last = moment
            self.stored_bytes = max(self.stored_bytes, bytes_in(self.folder))


def bytes_in(folder: Path) -> int:
    """Of its files, links counted once."""
    found: dict[int, int] = {}
    for place, _, names in os.walk(folder):  # which passes over folders that are gone by then
        for name in names:
            try:
                about = Path(place, name).stat()
            except OSError:  # it has been renamed or removed
                continue
            found[about.st_ino] = about.st_size
    return sum(found.values())


def tree_bytes() -> tuple[int, int]:
    """(anonymous, resident) memory of this process and all below it, now."""
    me = psutil.Process()
    anon = rss = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            status = parse_kib_fields(Path(f"/proc/{process.pid}/status").read_text())
        except OSError:  # it has ended
            continue
        anon += status.get("RssAnon", 0)
        rss += status.get("VmRSS", 0)
    return anon, rss


def recipe_of(folder: Path, variant: str, n_chunks: int) -> Recipe:
    return Recipe(
        name="shape-8b",
        source=f"path:{folder}",
        export="gguf",
        variants=["BF16", variant],
        calibration=Calibration(n_chunks=n_chunks),
        plan=PlanTable(types=["Q3_K", "Q4_K", "Q6_K"]),
        golden=Golden(n=2, n_tokens=16),
    )


def run(options: argparse.Namespace) -> Result:
    """Write, build, measure, and delete all of it."""
    with tempfile.TemporaryDirectory(prefix="quantize-8b-", dir=options.scratch) as scratch:
        return _in(Path(scratch), options)


def _in(scratch: Path, options: argparse.Namespace) -> Result:
    folder, home = scratch / "checkpoint", scratch / "home"
    folder.mkdir()
    with Watch(home) as watch:
        with watch.step("write the checkpoint"):
            checkpoint_bytes = write_checkpoint(folder, options.layers)
        mine = Places(home)
        recipe = recipe_of(folder, options.variant, options.chunks)
        _, made = build(recipe, mine, watch, options.threads)
        artifact = load_artifact(made)
    return Result(
        machine=options.machine,
        cpu=cpu_model(),
        threads=options.threads,
        start_time=now(),
        n_layers=options.layers,
        n_weights=artifact.n_weights,
        checkpoint_bytes=checkpoint_bytes,
        variant=options.variant,
        n_calibration_tokens=options.chunks * recipe.calibration.n_ctx,
        artifact_bytes=artifact.size_bytes,
        stored_bytes=watch.stored_bytes,
        provenance="host",
        stages=[stage for title, stage in watch.stages.items() if title != "write the checkpoint"],
    )


def lines_of(result: Result) -> list[str]:
    gib = 2**30
    lines = ["| step | s | GiB, anonymous | GiB, with mapped files |", "|---|---|---|---|"]
    lines += [
        f"| {s.title} | {s.wall_s:.0f} | {s.peak_anon_bytes / gib:.2f} | {s.peak_rss_bytes / gib:.2f} |"
        for s in result.stages
    ]
    word = "met" if result.peak_anon_bytes <= LIMIT_BYTES else "missed"
    return [
        *lines,
        "",
        f"{result.n_weights / 1e9:.2f} billion weights in {result.n_layers} layers, {result.variant}: "
        f"{result.peak_anon_bytes / gib:.2f} GiB at most, asked {LIMIT_BYTES / gib:.0f}: {word}; "
        f"{result.stored_bytes / gib:.1f} GiB on disk",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=at_least(1), default=32, help="decoder blocks (default %(default)s: 70 GB of disk)")
    add("--variant", default="GPTQ-4.25bpw", help="what is built (default %(default)s)")
    add("--chunks", type=at_least(1), default=2, help="of calibration text, 512 tokens each (default %(default)s)")
    add("--threads", type=at_least(1), default=os.cpu_count() or 1, help="default %(default)s")
    add("--scratch", type=Path, help="where the files go (default: the system's own place)")
    output_options(parser, "quantize_8b.json")
    return parser


@command("quantize_8b", "Nothing is kept of a run that was stopped.")
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    where = places()
    out = result_path(options, where, "quantize_8b.json")
    result = run(options)
    write_atomic(out, encode(result))
    print("\n".join(lines_of(result)))
    return 0 if result.peak_anon_bytes <= LIMIT_BYTES else 1


if __name__ == "__main__":
    raise SystemExit(main())

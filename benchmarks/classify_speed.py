"""A tweet's latency in slimpi's agent against optimum's default dynamic INT8 padded to 128, and raw ONNX Runtime.

`python benchmarks/classify_speed.py` writes benchmarks/results/<machine>/classify_speed.json, prints a table, and exits
1 if a target is missed. All sides classify the same tweets one by one, each run a fresh process; the runs of a pair
follow each other, the next pair in reverse order, so that drift cancels; CPU time is told beside the clock's. slimpi's
figures are its tweets task's own. The peers use the artifact's tokenizer in the same library, without what
transformers' pipelines add, which is in the peers' favour. optimum's file is made from our FP32 one by ORTQuantizer
with AutoQuantizationConfig's dynamic settings.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import msgspec
from bench_common import at_least, command, here, now, output_options, result_path
from classify_peer import Asked, Timed
from classify_rows import (
    MIN_PAIRS,
    OPTIMUM_FILE,
    ClassifySpeed,
    Conditions,
    LatencyRow,
    Tool,
    Verdict,
    verdicts_of,
)

from device.records import SlimpiError, encode_line, sha256_file, write_atomic
from device.schema import Artifact, Dataset, Job, Provenance, Tweets
from pipeline.deploy import run_job
from pipeline.jobs import describe_dataset
from pipeline.store import Places, find_artifact, load_artifact, places

ARTIFACTS = ("tweets-minilm:FP32", "tweets-minilm:INT8-dynamic")
HOST: Provenance = "host"
PEER = Path(__file__).with_name("classify_peer.py")
WARMUP = 8


@dataclass(frozen=True)
class Entrant:
    """One side of the comparison: a tool on a model's file. `artifact` is what slimpi runs, and whose tokenizer all
    read with."""

    tool: Tool
    variant: str
    folder: Path
    artifact: Artifact
    model: Path
    pad_to: int = 0


@dataclass(frozen=True)
class Table:
    """The tweets: as slimpi's task reads them, and as texts for the peers."""

    dataset: Dataset
    texts: list[str]
    label_column: str
    limit: int


def entrants(folders: Sequence[Path], scratch: Path, pad_to: int) -> list[Entrant]:
    """Ours and raw ONNX Runtime on each artifact's file, then optimum's file made from the FP32 one."""
    found: list[Entrant] = []
    reference: Entrant | None = None
    for folder in folders:
        artifact = load_artifact(folder)
        if artifact.task != "classifier":
            raise SlimpiError(f"{artifact.name} is no classifier. Name classifiers with --artifact.")
        if not {"tokenizer.json"} <= {file.path for file in artifact.files}:
            raise SlimpiError(f"{artifact.name} has no tokenizer.json to pad with. Name a transformer.")
        tools: tuple[Tool, ...] = ("slimpi", "onnxruntime")
        mine = [Entrant(tool, artifact.variant, folder, artifact, folder / artifact.entry) for tool in tools]
        found += mine
        reference = mine[0] if artifact.reference else reference
    if reference is None:
        raise SlimpiError("none of the artifacts is the FP32 reference that optimum quantizes. Name it, too.")
    made = quantize_with_optimum(reference.model, scratch)
    return [*found, Entrant("optimum", OPTIMUM_FILE, reference.folder, reference.artifact, made, pad_to)]


def quantize_with_optimum(fp32: Path, scratch: Path) -> Path:
    from optimum.onnxruntime import ORTQuantizer

    ORTQuantizer.from_pretrained(fp32.parent, file_name=fp32.name).quantize(
        quantization_config=optimum_settings(), save_dir=scratch
    )
    (made,) = scratch.glob("*.onnx")
    return made


def optimum_settings() -> object:
    """The dynamic settings of optimum's own table for this kind of CPU, nothing changed."""
    from optimum.onnxruntime import AutoQuantizationConfig

    make = AutoQuantizationConfig.arm64 if platform.machine() == "aarch64" else AutoQuantizationConfig.avx2
    return make(is_static=False)


def time_slimpi(entrant: Entrant, table: Table, threads: int, data_dir: Path) -> tuple[list[int], list[int]]:
    """Through the agent, in a fresh work folder: an old journal must never answer for a new run."""
    task = Tweets(dataset=table.dataset, label_column=table.label_column, limit=table.limit, warmup=WARMUP)
    with tempfile.TemporaryDirectory(prefix="slimpi-classify-") as work:
        job = Job(
            id="classify-speed",
            artifact=entrant.artifact,
            artifact_dir=str(entrant.folder),
            data_dir=str(data_dir),
            work_dir=work,
            tasks=[task],
            threads=threads,
            provenance=HOST,
        )
        result = run_job("local", job).results[0]
    if result.status != "ok":
        raise SlimpiError(f"slimpi's tweets task failed on {entrant.variant}: {result.error}")
    found = {m.metric: [round(ms * 1e6) for ms in m.samples] for m in result.measurements if m.unit == "ms"}
    return found["latency_ms"], found["cpu_ms"]


def time_peer(entrant: Entrant, table: Table, threads: int, data_dir: Path) -> tuple[list[int], list[int]]:
    asked = Asked(
        model=str(entrant.model),
        tokenizer=str(entrant.folder / "tokenizer.json"),
        texts=table.texts,
        threads=threads,
        max_tokens=entrant.pad_to or entrant.artifact.max_tokens,
        pad_to=entrant.pad_to,
        warmup=WARMUP,
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, str(PEER)], input=msgspec.json.encode(asked), capture_output=True, check=False, env=environment
    )
    if done.returncode:
        raise SlimpiError(f"{entrant.tool} failed on {entrant.model.name}: {done.stderr.decode()[-300:]}")
    timed = msgspec.json.decode(done.stdout, type=Timed)
    return timed.samples_ns, timed.cpu_ns


RUNNERS = {"slimpi": time_slimpi, "onnxruntime": time_peer, "optimum": time_peer}


def measure(sides: Sequence[Entrant], table: Table, pairs: int, threads: int, data_dir: Path) -> list[LatencyRow]:
    rows: list[LatencyRow] = []
    hashes = {side.model: sha256_file(side.model) for side in sides}
    for pair in range(pairs):
        for place, side in enumerate(sides if pair % 2 == 0 else sides[::-1]):
            load, stamp = os.getloadavg()[0], now()
            samples_ns, cpu_ns = RUNNERS[side.tool](side, table, threads, data_dir)
            rows.append(
                LatencyRow(
                    tool=side.tool,
                    variant=side.variant,
                    model_sha256=hashes[side.model],
                    pair=pair,
                    order=place,
                    n_threads=threads,
                    pad_to=side.pad_to,
                    test_time=stamp,
                    load_1min_before=load,
                    samples_ns=samples_ns,
                    cpu_ns=cpu_ns,
                    provenance=HOST,
                )
            )
            print(
                f"pair {pair + 1}/{pairs} {side.tool:11} {side.variant:20} median {median(samples_ns) / 1e6:7.2f} ms "
                f"({min(samples_ns) / 1e6:.2f} to {max(samples_ns) / 1e6:.2f}), CPU {median(cpu_ns) / 1e6:6.2f} ms, "
                f"n {len(samples_ns)}, load {load:.2f}",
                flush=True,
            )
    return rows


def read_table(options: argparse.Namespace, where: Places) -> Table:
    dataset = describe_dataset(options.rows, where)
    with (where.datasets / dataset.file.path).open(encoding="utf-8", newline="") as handle:
        texts = [row["text"] for row in csv.DictReader(handle)][: options.limit or None]
    return Table(dataset, texts, options.label_column, options.limit)


def compare(options: argparse.Namespace, where: Places) -> ClassifySpeed:
    start, load_before = now(), list(os.getloadavg())
    folders = [find_artifact(where.artifacts, name) for name in options.artifact or ARTIFACTS]
    table = read_table(options, where)
    with tempfile.TemporaryDirectory(prefix="slimpi-optimum-") as scratch:
        sides = entrants(folders, Path(scratch), options.pad_to)
        rows = measure(sides, table, options.pairs, options.threads, where.datasets)
    packages = ("onnxruntime", "optimum", "optimum-onnx", "tokenizers", "numpy")
    return ClassifySpeed(
        conditions=Conditions(
            **here(options.machine, start),
            packages={name: version(name) for name in packages},
            rows=table.dataset.name,
            rows_sha256=table.dataset.file.sha256,
            n_rows=len(table.texts),
            max_tokens=sides[0].artifact.max_tokens,
            optimum_settings=" ".join(str(optimum_settings()).split()),
            load_avg_before=load_before,
            load_avg_after=list(os.getloadavg()),
            note=options.note,
        ),
        rows=rows,
        verdicts=verdicts_of(rows),
    )


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    head = ("slimpi / peer", "lowest", "highest", "totals", "CPU time", "n")
    print(f"\n{'variant':16} {'peer':12} {' '.join(f'{name:>13}' for name in head)}  target")
    for v in verdicts:
        ratios = (v.ratio, v.ratio_min, v.ratio_max, v.ratio_of_totals, v.ratio_of_cpu)
        figures = " ".join(f"{ratio:13.3f}" for ratio in ratios)
        print(f"{v.variant:16} {v.peer:12} {figures} {v.n:13d}  {v.target}: {'ok' if v.ok else 'MISSED'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--artifact", action="append", default=[], help=f"an artifact of ours; default: {', '.join(ARTIFACTS)}")
    add("--rows", default="data:tweets/train.csv", help="labelled tweets, as in `slimpi bench --rows`")
    add("--label-column", default="target", help="column of the labels (default %(default)s)")
    add("--limit", type=at_least(0), default=200, help="tweets, 0 = all (default %(default)s)")
    add("--pairs", type=at_least(1), default=MIN_PAIRS, help="rounds over all sides (default %(default)s)")
    add("--pad-to", type=at_least(1), default=128, help="length optimum's side pads to (default %(default)s)")
    add("--threads", type=at_least(1), default=1, help="inference threads of all (default %(default)s)")
    output_options(parser, "classify_speed.json")
    add("--note", default="", help="kept with the results, such as what else the machine did")
    return parser


@command("classify_speed", "Nothing was written. Run it again.")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if something failed or a target is missed; the results are written either way."""
    options = _parser().parse_args(argv)
    where = places()
    out = result_path(options, where, "classify_speed.json")
    found = compare(options, where)
    write_atomic(out, encode_line(found))  # compact: thousands of samples
    print_verdicts(found.verdicts)
    print(f"\nwritten to {out}")
    return 0 if all(verdict.ok for verdict in found.verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())

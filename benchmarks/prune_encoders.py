"""Pruned classifiers against the whole one on tweets that nothing was trained on: accuracy, flips, size, latency here.

    SLIMPI_DATA=FOLDER python benchmarks/prune_encoders.py [--seeds 1] [--variant LAYERS-33-FP32 ...]

models/tweets-minilm.toml is trained on four fifths of the rows, near-duplicates kept on one side, every variant is
built as a user would build it, pruned by open text (--calibration) or by tweets without labels (--unlabelled), and the
agent's own task classifies the other fifth. Rows are kept in benchmarks/results/<machine>/prune_encoders.json; a
stopped run goes on. Latencies are the host's: they say nothing of a Pi.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, NamedTuple

import msgspec
from bench_common import at_least, command, cpu_model, now, output_options, result_path

from device.records import Record, SlimpiError, encode, read_record, write_atomic
from device.schema import Job, Tweets, describe_file
from pipeline.build import build
from pipeline.deploy import run_job
from pipeline.jobs import describe_dataset
from pipeline.paired import Difference, accuracy_difference
from pipeline.progress import Progressor
from pipeline.prune.encoder import told
from pipeline.recipes import Recipe, read_recipe
from pipeline.recordings import sample_ticker
from pipeline.store import Places, digest, load_artifact, places
from pipeline.tweets.data import Tweet, find_table, read_tweets, split

RECIPE = Path(__file__).resolve().parent.parent / "models" / "tweets-minilm.toml"
WHOLE = "FP32"
PRUNERS = ("LAYERS", "HEADS", "CHANNELS")
PERCENTS = (17, 33)
"""One and two of MiniLM's six layers."""
REPAIRS = ("", "+REPAIR")
PLAIN = "INT8-dynamic"
VARIANTS = (
    WHOLE,
    PLAIN,
    *(f"{pruner}{repair}-{percent}-{WHOLE}" for percent in PERCENTS for pruner in PRUNERS for repair in REPAIRS),
    *(f"{pruner}+REPAIR-{percent}-{PLAIN}" for percent in PERCENTS for pruner in PRUNERS),
    *(f"{pruner}+TRAIN-{percent}-{WHOLE}" for percent in (33, 50) for pruner in PRUNERS),
    *(f"LAYERS+TRAIN-{percent}-{PLAIN}" for percent in (33, 50)),
)


class EncoderRow(Record, frozen=True, kw_only=True):
    """One variant of the classifier of one training seed.

    calibration: what it was pruned by, "" = nothing. correct: a 1 or a 0 for each test tweet, in order. Latency of a
    tweet alone, tokenization and inference, one thread. key: what it was made of; pruned: what stayed.
    """

    variant: str
    seed: int
    calibration: str
    key: str
    size_bytes: int
    correct: Annotated[str, msgspec.Meta(pattern="^[01]+$")]
    latency_ms_p50: float
    peak_rss_bytes: int
    pruned: list[str]


class Name(NamedTuple):
    variant: str
    seed: int
    calibration: str


class PrunedEncoders(Record, frozen=True, kw_only=True):
    """prune_encoders.json. History of `schema`: 1 (2026-11) first version."""

    schema: int = 1
    provenance: str = "host"
    cpu: str
    time: str
    rows_name: str
    n_train: int
    n_test: int
    rows: list[EncoderRow]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", type=Path, default=RECIPE, help="of the classifier (default models/tweets-minilm.toml)")
    add("--rows", default="tweets-train", help="labelled table, or a dataset's name (default %(default)s)")
    add("--variant", action="append", default=[], help="only this one (repeatable)")
    add("--seeds", type=at_least(1), default=1, help="trainings (default %(default)s)")
    add("--calibration", default="data:books/bookcorpus_passages.txt", help="text to prune by (default %(default)s)")
    add("--unlabelled", metavar="ROWS", help="prune by the texts of this table instead: tweets-test")
    output_options(parser, "prune_encoders.json")
    return parser


@command("prune_encoders", "Run it again to go on.")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if something failed; finished rows are kept."""
    options = _parser().parse_args(argv)
    where = places()
    out = result_path(options, where, "prune_encoders.json")
    found = run(options, where, out)
    print("\n".join(table(found.rows)))
    print(f"written to {out}")
    return 0


def run(options: argparse.Namespace, where: Places, out: Path) -> PrunedEncoders:
    """Measure what `out` lacks, writing it after every row."""
    progress = Progressor()
    tweets = read_tweets(find_table(options.rows, where.sources))
    parts = split(tweets)
    found = PrunedEncoders(
        cpu=cpu_model(),
        time=now(),
        rows_name=options.rows,
        n_train=len(parts.train),
        n_test=len(parts.test),
        rows=read_record(out, PrunedEncoders).rows if out.is_file() else [],
    )
    tables = where.artifacts / ".prune-encoders"  # at a fixed path, which a build's stages are known by
    train, test = (
        _write_table(tables / f"{name}.csv", [tweets[i] for i in indices])
        for name, indices in (("train", parts.train), ("test", parts.test))
    )
    calibration = options.unlabelled or options.calibration
    if options.unlabelled:
        texts = [t.text for t in read_tweets(find_table(options.unlabelled, where.sources))]
        path = tables / "unlabelled.txt"
        write_atomic(path, "".join(f"{' '.join(text.split())}\n" for text in texts).encode())
        options.calibration = f"path:{path}"
    for seed in range(options.seeds):
        recipe = _recipe(options, train, test, seed)
        for variant in recipe.variants:
            folder = build(recipe, where, progress, 1, [variant])[-1]
            # What reads no text is the same row whatever text there was.
            plain = variant in (WHOLE, PLAIN)
            name = Name(variant, seed, "" if plain else calibration)
            row = measure(folder, name, recipe, where, found.rows, progress)
            rows = {named(r): r for r in found.rows} | {name: row}
            found = msgspec.structs.replace(found, rows=list(rows.values()), time=now())
            write_atomic(out, encode(found))
    return found


def _write_table(path: Path, tweets: Sequence[Tweet]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id", "keyword", "location", "text", "target"])
        writer.writerows([t.id, t.keyword, t.location, t.text, t.target] for t in tweets)
    return path


def _recipe(options: argparse.Namespace, train: Path, test: Path, seed: int) -> Recipe:
    recipe = read_recipe(options.recipe)
    if recipe.train is None or recipe.export != "onnx":
        raise SlimpiError(f"{options.recipe} trains no classifier. Take a recipe with [train], such as tweets-minilm.")
    return msgspec.structs.replace(
        recipe,
        name=f"{recipe.name}-pruned-{seed}",
        train=msgspec.structs.replace(recipe.train, rows=f"path:{train}", seed=seed),
        variants=list(dict.fromkeys((WHOLE, *(options.variant or VARIANTS)))),
        calibration=msgspec.structs.replace(recipe.calibration, text=options.calibration),
        bench=msgspec.structs.replace(recipe.bench, rows=f"path:{test}"),
    )


def named(row: EncoderRow) -> Name:
    return Name(row.variant, row.seed, row.calibration)


def measure(
    folder: Path,
    name: Name,
    recipe: Recipe,
    where: Places,
    known: Sequence[EncoderRow],
    progress: Progressor,
) -> EncoderRow:
    """The artifact's row: the one known of the same model on the same tweets, or what the agent's task says."""
    artifact = load_artifact(folder)
    dataset = describe_dataset(recipe.bench.rows, where)
    file = describe_file(folder, artifact.entry)
    key = digest([file.sha256, dataset.file.sha256])[:16]
    for row in known:
        if (named(row), row.key) == (name, key):
            return row
    work = Path(tempfile.mkdtemp(prefix="slimpi-prune-encoders-"))
    try:
        job = Job(
            id="prune-encoders",
            artifact=artifact,
            artifact_dir=str(folder),
            data_dir=str(where.datasets),
            work_dir=str(work),
            tasks=[Tweets(dataset=msgspec.structs.replace(dataset, name="test"), keyword_column="keyword")],
            threads=1,
            provenance="host",
        )
        with progress.step(f"classify with {artifact.name}") as tick:
            result = run_job("local", job, sample_ticker(tick)).results[0]
    finally:
        shutil.rmtree(work)
    if result.status != "ok":
        raise SlimpiError(f"{artifact.name} does not run on this machine: {result.error}")
    measured = {m.metric: m for m in result.measurements}
    return EncoderRow(
        **name._asdict(),
        key=key,
        size_bytes=file.size_bytes,
        correct="".join(str(int(hit)) for hit in measured["accuracy"].samples),
        latency_ms_p50=median(measured["latency_ms"].samples),
        peak_rss_bytes=result.worker_peak_rss_bytes,
        pruned=[told(step.settings) for step in artifact.lineage if step.action == "prune"],
    )


def loss(rows: Sequence[EncoderRow], wholes: Sequence[EncoderRow]) -> Difference:
    """Accuracy against the whole model's, points, over the pairs of all seeds."""
    whole = {row.seed: row.correct for row in wholes}
    ours = [int(hit) for row in rows for hit in row.correct]
    return accuracy_difference(ours, [int(hit) for row in rows for hit in whole[row.seed]])


def table(rows: Sequence[EncoderRow]) -> list[str]:
    """Markdown, one line a variant over its seeds; [95 %] is McNemar's interval by Agresti and Min."""
    wholes = [row for row in rows if row.variant == WHOLE]
    lines = [
        "| variant | pruned by | seeds | MiB | accuracy | points lost [95 %] | gained, lost tweets "
        "| latency p50, ms (host) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant, calibration in dict.fromkeys((row.variant, row.calibration) for row in rows):
        same = [row for row in rows if (row.variant, row.calibration) == (variant, calibration)]
        mine = [row for row in same if row.seed in {whole.seed for whole in wholes}]
        if not mine:
            continue
        accuracy = 100 * fmean(int(hit) for row in mine for hit in row.correct)
        found = loss(mine, wholes)
        told = f"{-found.mean:+.2f} [{-found.high:+.2f}, {-found.low:+.2f}] | {found.flips_better}, {found.flips_worse}"
        lines.append(
            f"| {variant} | {calibration} | {len(mine)} | {mine[0].size_bytes / 2**20:.1f} | {accuracy:.2f} | "
            f"{' | ' if variant == WHOLE else told} | {median(row.latency_ms_p50 for row in mine):.2f} |"
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())

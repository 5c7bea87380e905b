"""Quality at equal bytes: KL divergence to the reference and perplexity, our files against llama-quantize's.

`python benchmarks/bench_quality.py` builds every type and mix of llama-quantize (importance matrix on the recipe's
calibration text) and our METHOD-PLAN variants of each recipe, measures them with the agent's own tasks, and writes
benchmarks/results/<machine>/quality.json, a table and a page with plots. Near each target size our best file must have
at most 0.80 of the KL divergence that llama-quantize's hull has at the same bytes; exit code 1 if one has not.

It may be stopped at any time: what was measured for the same file and settings is not measured again, and files of
llama-quantize that are done are not even built again.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_tools
import msgspec
import numpy as np
import quality_plot
from bench_common import at_least, command, here, now, output_options, result_path
from quality_rows import Conditions, Maker, Quality, QualityRow, Score, Verdict, mean_interval, merged, verdicts_of

from device.records import SlimpiError, encode, read_record, write_atomic
from device.results import Measurement
from device.schema import Dataset, Job, Provenance
from pipeline import sources
from pipeline.build import build
from pipeline.deploy import run_job
from pipeline.export.llama_quantize import VARIANTS
from pipeline.gguf_file import read_gguf
from pipeline.jobs import describe_dataset
from pipeline.planning import source_types
from pipeline.progress import Progressor
from pipeline.recipes import Recipe, read_recipe
from pipeline.recordings import Recording, record, sample_ticker
from pipeline.store import Places, digest, load_artifact, places
from pipeline.variants import parse_variant

RECIPES = ("qwen2.5-coder-1.5b", "smollm2-135m-methods", "gemma-3-270m")
TEXTS = ("wikitext2-test", "ptb-test")
# Bits per linear weight. Widths of SmolLM2 and Gemma are no multiples of 256: K types fall back, so from 4.25 on.
TARGETS = {
    "qwen2.5-coder-1.5b": (2.7, 3.1, 3.8),
    "smollm2-135m-methods": (4.25, 4.5, 5.0),
    "gemma-3-270m": (4.25, 4.5, 5.0),
}
PEERS = tuple(name for name in VARIANTS if name not in ("F32", "F16", "BF16"))
HOST: Provenance = "host"
LEGEND = "~ some tensors fell back to another type    = most weights in a type that holds the source's: not compared"
A_WEEK_S = 7 * 24 * 3600


@dataclass(frozen=True)
class Bench:
    """One model: what its files are compared with, and on which recordings of its reference."""

    recipe: Recipe
    recordings: list[Recording]
    source: sources.Source
    calibration: Dataset
    where: Places
    threads: int
    discard: bool
    progress: Progressor


def open_bench(path: Path, options: argparse.Namespace, where: Places, progress: Progressor) -> Bench:
    """Build the reference and record it on every text."""
    recipe = read_recipe(path)
    if recipe.export != "gguf":
        raise SlimpiError(f"recipe {recipe.name} exports {recipe.export}; only gguf has a KL divergence. Leave it out.")
    source = sources.fetch(recipe.source, recipe.sha256, where.sources, progress.say)
    (folder,) = build(recipe, where, progress, options.threads, [recipe.reference])
    recordings = []
    for name in options.text or TEXTS:
        text = describe_dataset(name, where)
        with progress.step(f"record {recipe.name} {recipe.reference} on {name}") as tick:
            recordings.append(
                record(folder, text, options.n_ctx, options.chunks, where, options.threads, sample_ticker(tick))
            )
    calibration = describe_dataset(recipe.calibration.text, where)
    return Bench(recipe, recordings, source, calibration, where, options.threads, options.discard, progress)


def candidates(recipe: Recipe, options: argparse.Namespace) -> list[tuple[str, Maker]]:
    """(variant, maker): llama-quantize's, then ours, which are the recipe's METHOD-PLAN variants and --ours."""
    peers = [v for v in PEERS if v != recipe.reference] if options.peer is None else options.peer
    ours = [v for v in [*recipe.variants, *options.ours] if parse_variant(v).method]
    wrong = [v for v in options.ours if not parse_variant(v).method] + [v for v in peers if v not in PEERS]
    if wrong:
        raise SlimpiError(f"{wrong[0]} is on the wrong side: --peer takes {', '.join(PEERS)}, --ours METHOD-PLAN.")
    return [(v, "llama-quantize") for v in dict.fromkeys(peers)] + [(v, "slimpi") for v in dict.fromkeys(ours)]


def row_of(bench: Bench, variant: str, maker: Maker, known: QualityRow | None) -> QualityRow:
    """The variant's row: `known` where nothing changed, else built, and measured where its file or settings did."""
    key = _peer_key(bench, variant) if maker == "llama-quantize" else ""
    if known and key and known.key == key and not _missing(bench, known.scores):
        return known
    before = set(bench.where.artifacts.glob("*"))
    begin_s = time.monotonic()
    folder = build(bench.recipe, bench.where, bench.progress, os.cpu_count() or 1, [bench.recipe.reference, variant])[1]
    build_s = None if folder in before else time.monotonic() - begin_s
    artifact = load_artifact(folder)
    (entry,) = (f for f in artifact.files if f.path == artifact.entry)
    same = known if known and known.file_sha256 == entry.sha256 else None
    scores = []
    for recording in bench.recordings:
        done = same and next((s for s in same.scores if fits(s, recording)), None)
        scores.append(done or measure(bench, folder, recording))
    row = QualityRow(
        model=bench.recipe.name,
        variant=variant,
        maker=maker,
        key=key or artifact.id,
        file_sha256=entry.sha256,
        size_bytes=entry.size_bytes,
        bits_per_weight=artifact.bits_per_weight,
        bits_per_linear_weight=artifact.bits_per_linear_weight,
        n_fallbacks=len(artifact.fallbacks),
        source_share=source_share(bench.source.path, artifact.plan),
        build_s=build_s if build_s is not None else same.build_s if same else None,
        scores=[*scores, *_of_other_texts(bench, same)],
    )
    if bench.discard and folder not in before:
        shutil.rmtree(folder)
    return row


def _peer_key(bench: Bench, variant: str) -> str:
    """What a file of llama-quantize depends on; not slimpi's own code, which only carries the weights to it."""
    calibration = [bench.recipe.calibration, bench.calibration.file.sha256]
    return digest([bench.source.sha256, calibration, variant, llama_tools.version(llama_tools.PACKAGE)])


def fits(score: Score, recording: Recording) -> bool:
    """Whether it was measured against what the recording holds; see `quality_rows.check_alike`."""
    return score.measured_against == (recording.text.file.sha256, recording.n_ctx, recording.nll)


def _missing(bench: Bench, scores: Sequence[Score]) -> list[Recording]:
    return [r for r in bench.recordings if not any(fits(s, r) for s in scores)]


def _of_other_texts(bench: Bench, known: QualityRow | None) -> list[Score]:
    """What was measured on texts that this run leaves out stays."""
    texts = {recording.text.name for recording in bench.recordings}
    return [score for score in known.scores if score.corpus not in texts] if known else []


def measure(bench: Bench, folder: Path, recording: Recording) -> Score:
    """The divergence task through the agent; its work folder stays until it is done, so that it can be resumed."""
    artifact = load_artifact(folder)
    task = recording.task()
    job_id = f"quality-{digest([artifact, task, bench.threads])[:24]}"
    job = Job(
        id=job_id,
        artifact=artifact,
        artifact_dir=str(folder),
        data_dir=str(bench.where.datasets),
        work_dir=str(bench.where.stages / job_id),
        tasks=[task],
        threads=bench.threads,
        provenance=HOST,
        timeout_s=A_WEEK_S,
    )
    with bench.progress.step(f"measure {artifact.name} on {recording.text.name}") as tick:
        result = run_job("local", job, sample_ticker(tick)).results[0]
    if result.status != "ok":
        raise SlimpiError(f"the divergence of {artifact.name} on {recording.text.name} failed: {result.error}")
    score = score_of({m.metric: m for m in result.measurements}, recording, bench.threads, result.duration_s)
    shutil.rmtree(job.work_dir)
    return score


def score_of(found: dict[str, Measurement], recording: Recording, threads: int, measured_s: float) -> Score:
    """The task's raw samples by chunk and in their order statistics."""
    kld, difference = np.array(found["kld"].samples), found["nll_difference"]
    return Score(
        corpus=recording.text.name,
        corpus_sha256=recording.text.file.sha256,
        reference_sha256=recording.dataset.file.sha256,
        n_ctx=recording.n_ctx,
        n_threads=threads,
        n_tokens=len(kld),
        kld_chunks=kld.reshape(found["same_top"].n, -1).mean(axis=1).tolist(),
        same_top_chunks=found["same_top"].samples,
        nll_chunks=found["divergence_nll"].samples,
        reference_nll_chunks=recording.nll,
        kld_stderr=found["kld"].stderr,
        kld_median=float(np.median(kld)),
        kld_p99=float(np.percentile(kld, 99)),
        kld_max=float(kld.max()),
        ln_ppl_ratio=difference.mean,
        ln_ppl_ratio_stderr=difference.stderr,
        measured_s=measured_s,
        provenance=found["kld"].provenance,
    )


def source_share(source: Path, plan: dict[str, str]) -> float:
    """Part of the decoder blocks' weights whose type in `plan` holds what a GGUF source already had them in."""
    held = source_types(source)
    if not held:
        return 0.0
    tensors = {n: t for n, t in read_gguf(source).tensors.items() if n.startswith("blk.") and len(t.shape) == 2}
    same = sum(t.n_elements for name, t in tensors.items() if plan.get(name) in held[name])
    return same / sum(t.n_elements for t in tensors.values())


def run(options: argparse.Namespace, where: Places, out: Path) -> tuple[Quality, list[str]]:
    """Measure what `out` lacks, writing it after every file. (results, variants that failed and why)."""
    progress, failures = Progressor(), []
    quality = read_quality(out, options.machine)
    for path in options.recipes or [where.root / "models" / f"{name}.toml" for name in RECIPES]:
        bench = open_bench(path, options, where, progress)
        for variant, maker in candidates(bench.recipe, options):
            known = next((r for r in quality.rows if (r.model, r.variant) == (bench.recipe.name, variant)), None)
            try:
                row = row_of(bench, variant, maker, known)
            except SlimpiError as error:
                progress.say(f"  {bench.recipe.name} {variant} FAILED: {error}")
                failures.append(f"{bench.recipe.name} {variant}: {error}")
                continue
            if row != known:
                quality = msgspec.structs.replace(quality, rows=merged(quality.rows, row))
                write_atomic(out, encode(quality))
            progress.say("\n".join(table([row])[1:]))
    quality = msgspec.structs.replace(quality, verdicts=verdicts_of(quality.rows, TARGETS))
    write_atomic(out, encode(quality))
    return quality, failures


def conditions_of(machine: str) -> Conditions:
    """This machine, now."""
    wheel = llama_tools.probe_wheel()
    return Conditions(
        **here(machine, now()),
        llama_cpp_python=wheel.version,
        wheel_commit=wheel.commit,
    )


def read_quality(out: Path, machine: str) -> Quality:
    """What was measured before, or nothing yet. SlimpiError for results of another llama.cpp."""
    conditions = conditions_of(machine)
    if not out.exists():
        return Quality(conditions=conditions, rows=[], verdicts=[])
    known = read_record(out, Quality)
    if known.conditions.wheel_commit != conditions.wheel_commit:
        raise SlimpiError(
            f"{out} holds results of llama.cpp {known.conditions.wheel_commit}, this is {conditions.wheel_commit}. "
            "Move that file away."
        )
    return msgspec.structs.replace(known, verdicts=[])


def table(rows: Sequence[QualityRow]) -> list[str]:
    """One line a file and text, smallest first within a model."""
    lines = [
        f"{'model':20} {'variant':18} {'MiB':>8} {'bits/w':>6} {'text':15} {'KLD [95% over chunks]':>30} {'median':>9} "
        f"{'99%':>8} {'max':>7} {'top-1 %':>15} {'perplexity':>10} {'ln PPL ratio':>18} {'n':>3} {'build s':>8}"
    ]
    order = list(dict.fromkeys(r.model for r in rows))
    for row in sorted(rows, key=lambda r: (order.index(r.model), r.size_bytes)):
        marks = (" ~" if row.n_fallbacks else "") + (" =" if row.free else "")
        for s in row.scores:
            low, high = mean_interval(s.kld_chunks) or (math.nan, math.nan)
            build_s = f"{row.build_s:8.1f}" if row.build_s is not None else f"{'-':>8}"
            lines.append(
                f"{row.model:20} {row.variant + marks:18} {row.size_bytes / 2**20:8.1f} "
                f"{row.bits_per_linear_weight:6.3f} {s.corpus:15} {s.kld:10.6f} [{low:.6f}, {high:.6f}] "
                f"{s.kld_median:9.6f} {s.kld_p99:8.4f} {s.kld_max:7.3f} "
                f"{100 * s.same_top:7.3f} ±{100 * s.same_top_stderr:6.3f} {s.perplexity:10.4f} "
                f"{s.ln_ppl_ratio:9.5f} ±{s.ln_ppl_ratio_stderr:.5f} {s.n_chunks:3d} {build_s}"
            )
    return lines


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    lines = [f"{'model':20} {'text':15} {'bits':>5} {'our best':18} {'MiB':>8} {'KLD':>9} {'llama':>9} ratio [95%]"]
    for v in verdicts:
        head = f"{v.model:20} {v.corpus:15} {v.target_bits:5.2f} {v.variant or '-':18}"
        if v.ratio is None or v.peer_kld is None:
            lines.append(f"{head} {v.why}: {'ok' if v.ok else 'MISSED'}")
            continue
        low, high = ("?", "?") if v.ratio_low is None else (f"{v.ratio_low:.3f}", f"{v.ratio_high:.3f}")
        lines.append(
            f"{head} {v.size_bytes / 2**20:8.1f} {v.kld:9.6f} {v.peer_kld:9.6f} {v.ratio:.3f} [{low}, {high}] "
            f"{v.target}: {'ok' if v.ok else 'MISSED'} (between {' and '.join(v.peers)})"
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipes", type=Path, nargs="*", help=f"recipe files; default: {', '.join(RECIPES)}")
    add("--peer", action="append", metavar="TYPE", help="a type or mix of llama-quantize (repeatable); default: all")
    add("--ours", action="append", default=[], metavar="METHOD-PLAN", help="a variant besides the recipe's own")
    add("--text", action="append", help=f"dataset, named as in `slimpi bench --text`; default: {', '.join(TEXTS)}")
    add("--n-ctx", type=at_least(8), default=512, help="tokens in a chunk (default %(default)s)")
    add("--chunks", type=at_least(0), default=20, help="chunks to score, 0 = all (default %(default)s)")
    add("--threads", type=at_least(1), default=1, help="inference threads (default %(default)s)")
    add("--discard", action="store_true", help="remove each artifact that this run built once it is measured")
    add("--show", action="store_true", help="print what was measured before and write the page; run nothing")
    output_options(parser, "quality.json")
    return parser


@command("bench_quality", "Run it again: it goes on from the last file measured.")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if something failed or a target is missed; what was measured is kept either way."""
    options = _parser().parse_args(argv)
    where = places()
    out = result_path(options, where, "quality.json")
    if options.show:
        quality, failures = read_record(out, Quality), list[str]()
    else:
        quality, failures = run(options, where, out)
    print("\n".join([*table(quality.rows), LEGEND]))
    print("\n".join(["", *verdict_lines(quality.verdicts), "", *failures]))
    page = out.with_suffix(".html")
    write_atomic(page, quality_plot.page(quality).encode())
    print(f"written to {out} and {page}")
    return 0 if not failures and all(verdict.ok for verdict in quality.verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())

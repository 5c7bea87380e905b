"""Pruning at equal bytes: our pruners, with and without repair, against llama-quantize --prune-layers.

`python benchmarks/prune_table.py` prunes each model by 10, 20 and 30 % of its decoder blocks' weights in the ways of
prune_subjects.py and by llama-quantize (which drops the layers it is told: those of least block influence, and the best
run of neighbours by measured divergence, so that it has both of the usual choices), quantizes some and the whole model
alike, measures each file's perplexity and divergence on WikiText-2 test and its zero-shot answers with the agent's own
tasks, then the decode speed of some against the whole model, and writes benchmarks/results/<machine>/prune.json and a
table. Exit code 1 if at some share no repaired file of ours of at most llama-quantize's bytes has a lower perplexity,
or decoding gains less than 0.9 of the share of weights removed.

A day or more on two slow cores; --percent, --pruner, --ours and `--choices none` take parts of it. It may be stopped at
any time: what was measured is neither built nor measured again. --discard keeps on disk what is still to be used.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import bench_quality
import llama_tools
import msgspec
import peers
import prune_rows
from bench_common import at_least, command, output_options, result_path
from prune_rows import Accuracy, PruneRow, Pruning, SpeedPair
from prune_subjects import NO_QUESTIONS, PERCENTS, QUESTIONS, SUBJECTS, Subject

from device.records import SlimpiError, encode, read_record, write_atomic
from device.schema import Choices, Job, Provenance, Throughput, describe_file
from pipeline import checkpoint
from pipeline.build import build, id_of
from pipeline.deploy import run_job
from pipeline.exporter import Context
from pipeline.exporter_gguf import lossless
from pipeline.jobs import describe_questions
from pipeline.progress import Progressor
from pipeline.prune import PruneSpec
from pipeline.pruning import chosen, pruned_name
from pipeline.recipes import read_recipe
from pipeline.recordings import sample_ticker
from pipeline.store import Places, build_lock, digest, load_artifact, places, whole_folder, write_manifest
from pipeline.variants import parse_variant

HOST: Provenance = "host"
CHOICES = {"influence": "layers_influence", "run": "layers_run"}
"""Whose layers llama-quantize is told to drop: what those of PRUNERS choose."""


def subject_of(model: str, options: argparse.Namespace) -> Subject:
    """What is measured of a model, with what options say otherwise."""
    found = SUBJECTS.get(model, Subject())
    said = {"type": options.type, "n_chunks": options.chunks, "n_questions": options.limit}
    if options.choices:
        said["questions"] = tuple(name for name in options.choices if name != NO_QUESTIONS)
    return replace(found, **{name: value for name, value in said.items() if value is not None})


def candidates(subject: Subject, options: argparse.Namespace) -> list[str]:
    """Variants of ours in the order they are measured."""
    if options.ours:
        return list(options.ours)
    ways = tuple(name.lower() for name in options.pruner)
    return list(dict.fromkeys(subject.variants(tuple(options.percent or ()), ways)))


def peer_files(bench: bench_quality.Bench, percent: int, kind: str, options: argparse.Namespace) -> dict[str, Path]:
    """{variant: artifact folder} of llama-quantize's pruned files of type `kind`; SlimpiError if its tool fails."""
    reference = build(bench.recipe, bench.where, bench.progress, options.threads, [bench.recipe.reference])[0]
    artifact = load_artifact(reference)
    tools = llama_tools.find_or_build(options.peers_dir)
    context = Context(bench.recipe, bench.source, bench.where, options.threads, bench.progress)
    found = {}
    for choice, pruner in CHOICES.items():
        name = f"prune-layers-{choice}-{percent}-{kind}"
        folder = bench.where.stages / f"{bench.recipe.name}-{name}-{digest([artifact.files, bench.recipe.prune])[:12]}"
        if not (folder / "manifest.json").is_file():
            with build_lock(bench.where.artifacts):  # a build of our own pruner would choose beside it
                (pruned,) = chosen(context, lossless(context)[0], [PruneSpec(pruner, "", percent)])
            gone = [str(index) for index, layer in enumerate(pruned.cut.layers) if layer.gone]
            with whole_folder(folder) as scratch:
                argv = [str(tools / "llama-quantize"), "--prune-layers", ",".join(gone)]
                llama_tools.run_tool([*argv, str(reference / artifact.entry), str(scratch / "pruned.gguf"), kind])
                file = describe_file(scratch, "pruned.gguf")
                changed = {"id": folder.name.lower(), "name": folder.name.lower(), "variant": name, "entry": file.path}
                described = msgspec.structs.replace(
                    artifact, **changed, files=[file], reference=False, golden=None, size_bytes=file.size_bytes
                )
                write_manifest(scratch, described)
        found[name] = folder
    return found


def choose_together(bench: bench_quality.Bench, pruner: str, variants: Sequence[str]) -> None:
    """What goes by a pruner at each of the variants' shares, from one evidence. What fails here fails again, and is
    told, where the variant is built."""
    context = Context(bench.recipe, bench.source, bench.where, os.cpu_count() or 1, bench.progress)
    specs = {spec.percent: spec for v in variants if (spec := _spec(v)) and spec.pruner == pruner and spec.percent}
    with contextlib.suppress(SlimpiError), build_lock(bench.where.artifacts):
        chosen(context, lossless(context)[0], list(specs.values()))


def _spec(variant: str) -> PruneSpec | None:
    """None of what is not pruned, and of what is no variant, which is told where it is built."""
    with contextlib.suppress(SlimpiError):
        return parse_variant(variant).prune
    return None


def row_of(
    bench: bench_quality.Bench, variant: str, folder: Path, maker: prune_rows.Maker, known: PruneRow | None
) -> PruneRow:
    """The file's row: `known` where it is the same file and was measured on this recording, else measured. Answers and
    speeds are a file's own."""
    artifact = load_artifact(folder)
    (entry,) = (f for f in artifact.files if f.path == artifact.entry)
    built_as = artifact.id if maker == "slimpi" else ""
    (recording,) = bench.recordings
    same = known if known and known.file_sha256 == entry.sha256 else None
    if same and bench_quality.fits(same.score, recording):
        return msgspec.structs.replace(same, artifact_id=built_as)
    model = checkpoint.load(folder / artifact.entry)
    n_weights = sum(_n(t.shape) for t in model.tensors.values())
    n_linear = sum(_n(t.shape) for n, t in model.tensors.items() if n.startswith("model.layers.") and len(t.shape) == 2)
    return PruneRow(
        model=bench.recipe.name,
        variant=variant,
        maker=maker,
        artifact_id=built_as,
        file_sha256=entry.sha256,
        size_bytes=entry.size_bytes,
        n_weights=n_weights,
        n_linear_weights=n_linear,
        score=bench_quality.measure(bench, folder, recording),
        notes=[note for note in artifact.notes if note.startswith("pruned:")],
        speed=same.speed if same else [],
        accuracy=same.accuracy if same else [],
    )


def accuracy_of(bench: bench_quality.Bench, folder: Path, name: str, limit: int) -> Accuracy:
    """Zero-shot answers to the first questions of a set, by the agent's own task."""
    artifact = load_artifact(folder)
    questions = describe_questions(name, bench.where)
    with tempfile.TemporaryDirectory(prefix="slimpi-prune-") as work:
        job = Job(
            id="prune-choices",
            artifact=artifact,
            artifact_dir=str(folder),
            data_dir=str(bench.where.datasets),
            work_dir=work,
            tasks=[Choices(dataset=questions, limit=limit)],
            threads=bench.threads,
            provenance=HOST,
        )
        with bench.progress.step(f"ask {artifact.name} {name}") as tick:
            result = run_job("local", job, sample_ticker(tick)).results[0]
    if result.status != "ok":
        raise SlimpiError(f"{name} failed on {artifact.name}: {result.error}")
    found = {m.metric: m for m in result.measurements}
    return Accuracy(
        questions=name,
        questions_sha256=questions.file.sha256,
        correct=found["acc"].samples,
        correct_norm=found["acc_norm"].samples,
        peak_rss_bytes=result.worker_peak_rss_bytes,
    )


def _asked(bench: bench_quality.Bench, folder: Path, row: PruneRow, subject: Subject) -> PruneRow:
    """The row with the answers to the sets that it lacks, or has of another number of questions."""
    missing = _unasked(row, subject)
    if not missing:
        return row
    asked = {name: accuracy_of(bench, folder, name, subject.n_questions) for name in missing}
    kept = {answers.questions: answers for answers in row.accuracy}
    return msgspec.structs.replace(row, accuracy=list({**kept, **asked}.values()))


def _unasked(row: PruneRow, subject: Subject) -> list[str]:
    limit = subject.n_questions
    known = {a.questions for a in row.accuracy if not limit or len(a.correct) == limit}
    return [name for name in subject.questions if name not in known]


def _n(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def speed_of(bench: bench_quality.Bench, variant: str, options: argparse.Namespace) -> list[SpeedPair]:
    """Decode speed of a variant and of the whole model in the same type, in pairs of runs, first places alternating."""
    inner = parse_variant(variant).name
    folders = build(
        bench.recipe, bench.where, bench.progress, os.cpu_count() or 1, [bench.recipe.reference, inner, variant]
    )
    whole, pruned = (bench_model(folder) for folder in folders[-2:])
    task = Throughput(n_prompt=16, n_gen=128, repetitions=3)
    pairs = []
    for pair in range(options.pairs):
        speeds = {}
        for model in (whole, pruned) if pair % 2 == 0 else (pruned, whole):
            report = peers.run_slimpi(model, task, model.path.parent, options.threads)
            samples = sorted(peers.measurement(report, "decode_tokens_per_s").samples)
            speeds[model.variant] = samples[len(samples) // 2]
        pairs.append(SpeedPair(whole_tps=speeds[whole.variant], pruned_tps=speeds[pruned.variant]))
        bench.progress.say(
            f"  {variant} pair {pair + 1}: {pairs[-1].pruned_tps:.1f} against {pairs[-1].whole_tps:.1f} t/s"
        )
    return pairs


def bench_model(folder: Path) -> peers.Model:
    artifact = load_artifact(folder)
    return peers.Model(artifact.variant, folder / artifact.entry, artifact)


def run(options: argparse.Namespace, where: Places, out: Path) -> Pruning:
    """Measure what `out` lacks, writing it after every file."""
    progress = Progressor()
    for name in subject_of("", options).questions:  # a set that is not there is told now, not after minutes
        describe_questions(name, where)
    found = (
        read_record(out, Pruning)
        if out.exists()
        else Pruning(conditions=bench_quality.conditions_of(options.machine), rows=[], verdicts=[])
    )
    for path in options.recipes or [where.root / "models" / f"{name}.toml" for name in SUBJECTS]:
        subject = subject_of(read_recipe(path).name, options)
        said = argparse.Namespace(**{**vars(options), "text": [options.text], "chunks": subject.n_chunks})
        bench = bench_quality.open_bench(path, said, where, progress)
        found = _measured(found, out, bench, subject, options)
        found = _timed(found, out, bench, subject, options)
    return msgspec.structs.replace(found, verdicts=prune_rows.verdicts_of(found.rows))


def _measured(
    found: Pruning, out: Path, bench: bench_quality.Bench, subject: Subject, options: argparse.Namespace
) -> Pruning:
    """With the rows of a model. A variant that fails is told and left out; one whose row is complete is not built.
    A pruner chooses for all its shares when the first of its variants comes."""
    for percent in () if options.ours else options.percent or PERCENTS:
        for variant, folder in peer_files(bench, percent, subject.type, options).items():
            found = _add(found, out, bench, variant, folder, "llama-quantize", subject)
    reference, n_cores = bench.recipe.reference, os.cpu_count() or 1
    done, missing = [], []
    for variant in [reference, *candidates(subject, options)]:
        row = _row(found, bench, variant)
        if row and _complete(row, bench, subject):
            done.append(row)
        else:
            missing.append(variant)
    to_time = _to_time(found, bench, subject, options)
    for row in done:
        bench.progress.say(prune_rows.line(row))
        if options.discard and row.variant != reference:  # it is there if a run was killed before it went
            _discard(bench, row.variant, [*missing, *to_time])
    chosen_by = set()
    for position, variant in enumerate(missing):
        spec = _spec(variant)
        if spec and spec.pruner not in chosen_by:
            chosen_by.add(spec.pruner)
            choose_together(bench, spec.pruner, missing[position:])
        try:
            folder = build(bench.recipe, bench.where, bench.progress, n_cores, [reference, variant])[-1]
            found = _add(found, out, bench, variant, folder, "slimpi", subject)
        except SlimpiError as error:
            bench.progress.say(f"  {bench.recipe.name} {variant} FAILED: {error}")
            continue
        if options.discard and variant != reference:
            _discard(bench, variant, [*missing[position + 1 :], *_to_time(found, bench, subject, options)])
    return found


def _complete(row: PruneRow, bench: bench_quality.Bench, subject: Subject) -> bool:
    """Whether it is of what would be built now, on this run's recording, with all answers."""
    (recording,) = bench.recordings
    current = row.artifact_id == _folder(bench, row.variant).name
    return current and bench_quality.fits(row.score, recording) and not _unasked(row, subject)


def _row(found: Pruning, bench: bench_quality.Bench, variant: str) -> PruneRow | None:
    return next((r for r in found.rows if (r.model, r.variant) == (bench.recipe.name, variant)), None)


def _folder(bench: bench_quality.Bench, variant: str) -> Path:
    """Where the variant's artifact is once it is built."""
    return bench.where.artifacts / id_of(bench.recipe, variant, bench.source.sha256, bench.where)


def _discard(bench: bench_quality.Bench, variant: str, coming: Sequence[str]) -> None:
    """Remove an artifact, and the pruned model it was made of, with what was learned of that, unless one that is coming
    needs them. What was chosen stays: it is small and took longest."""
    if variant in coming:
        return
    if (folder := _folder(bench, variant)).exists():
        shutil.rmtree(folder)
    spec = parse_variant(variant).prune
    if spec and not any(other.startswith(f"{spec.name}-") for other in coming):
        for stage in bench.where.stages.glob(f"{pruned_name(bench.recipe, spec)}-*"):
            shutil.rmtree(stage)


def _to_time(found: Pruning, bench: bench_quality.Bench, subject: Subject, options: argparse.Namespace) -> list[str]:
    """Whose decoding is still to be timed: what options ask for; in a whole run the subject's that were not."""
    if options.ours or options.pruner or options.speed:
        return list(options.speed)
    timed = subject.timed_variants(tuple(options.percent or PERCENTS))
    return [variant for variant in timed if not ((row := _row(found, bench, variant)) and row.speed)]


def _timed(
    found: Pruning, out: Path, bench: bench_quality.Bench, subject: Subject, options: argparse.Namespace
) -> Pruning:
    """With the speeds asked for, taken anew; in a whole run with those of the subject that are not there yet."""
    missing = _to_time(found, bench, subject, options)
    for position, variant in enumerate(missing):
        row = _row(found, bench, variant)
        if row is None and options.speed:
            raise SlimpiError(f"--speed {variant}: no such row. Measure it first (--ours {variant}).")
        if row is None:
            continue
        timed = msgspec.structs.replace(row, speed=speed_of(bench, variant, options))
        found = msgspec.structs.replace(found, rows=prune_rows.merged(found.rows, timed))
        write_atomic(out, encode(found))
        if options.discard:
            _discard(bench, variant, missing[position + 1 :])
    return found


def _add(
    found: Pruning,
    out: Path,
    bench: bench_quality.Bench,
    variant: str,
    folder: Path,
    maker: prune_rows.Maker,
    subject: Subject,
) -> Pruning:
    known = _row(found, bench, variant)
    row = _asked(bench, folder, row_of(bench, variant, folder, maker, known), subject)
    if row != known:
        found = msgspec.structs.replace(found, rows=prune_rows.merged(found.rows, row))
        write_atomic(out, encode(found))
    bench.progress.say(prune_rows.line(row))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipes", type=Path, nargs="*", help=f"recipe files; default: {', '.join(SUBJECTS)}")
    add("--ours", action="append", default=[], metavar="VARIANT", help="measure these variants alone (repeatable)")
    add("--pruner", action="append", default=[], metavar="PRUNER", help="measure these ways alone (repeatable)")
    add("--speed", action="append", default=[], metavar="VARIANT", help="time decoding of these beside the whole model")
    add("--percent", type=at_least(1), action="append", help="of the blocks' weights to remove; default: 10, 20, 30")
    add("--type", help="llama-quantize's type of the files; default: the model's in prune_subjects.py")
    add("--text", default="wikitext2-test", help="what perplexity and divergence are of (default %(default)s)")
    add(
        "--choices",
        action="append",
        default=[],
        metavar="SET",
        help=f"questions to ask zero-shot (repeatable), or {NO_QUESTIONS}; default: {', '.join(QUESTIONS)}",
    )
    add("--limit", type=at_least(0), help="questions of each set, 0 = all; default: prune_subjects.py's")
    add("--n-ctx", type=at_least(8), default=512, help="tokens in a chunk (default %(default)s)")
    add("--chunks", type=at_least(0), help="chunks to score, 0 = all; default: prune_subjects.py's")
    add("--pairs", type=at_least(1), default=8, help="timed pairs of runs (default %(default)s)")
    add("--threads", type=at_least(1), default=1, help="inference threads (default %(default)s)")
    add("--discard", action="store_true", help="remove artifacts and pruned models once nothing needs them")
    add("--peers-dir", type=Path, default=Path(__file__).parent / "peers", help="where the tools are, or are built")
    output_options(parser, "prune.json")
    return parser


@command("prune_table", "Run it again: it goes on from the last file measured.")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if a target is missed; what was measured is kept either way."""
    options = _parser().parse_args(argv)
    where = places()
    out = result_path(options, where, "prune.json")
    found = run(options, where, out)
    write_atomic(out, encode(found))
    print("\n".join([*prune_rows.table(found.rows), "", *map(prune_rows.verdict_line, found.verdicts)]))
    print(f"written to {out}")
    return 0 if all(verdict.ok for verdict in found.verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())

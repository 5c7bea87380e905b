"""build(recipe) -> artifacts: fetch, prepare what the variants share, make each variant, record its golden outputs."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import msgspec

from device.records import SlimpiError, sha256_file
from device.schema import Artifact, Golden, Job, RecordGolden, describe_file
from pipeline import sources
from pipeline.deploy import run_job
from pipeline.exporter import Context, Exporter, Made, Prepared
from pipeline.exporters import EXPORTERS
from pipeline.jobs import describe_dataset
from pipeline.progress import Progressor
from pipeline.recipes import Recipe, artifact_name, as_dict
from pipeline.store import (
    Places,
    artifact_id,
    build_lock,
    damage,
    load_artifact,
    tool_versions,
    whole_folder,
    write_manifest,
)
from pipeline.tweets.classifiers import vector_files


def build(
    recipe: Recipe, places: Places, progress: Progressor, threads: int = 1, only: list[str] | None = None
) -> list[Path]:
    """Folders of the recipe's artifacts, in the recipe's order; what is already built and intact is reused.

    `only` narrows the variants; the reference is always built, since losses are counted against it.
    """
    exporter = EXPORTERS[recipe.export]
    variants = chosen_variants(recipe, exporter, only)
    with build_lock(places.artifacts):
        source = sources.fetch(recipe.source, recipe.sha256, places.sources)
        for note in source.notes:
            progress.say(f"  {recipe.name}: {note}")
        ids = {variant: id_of(recipe, variant, source.sha256, places) for variant in variants}
        missing = [v for v in variants if not _intact(places.artifacts / ids[v], progress)]
        for variant in variants:
            if variant not in missing:
                progress.say(f"  {recipe.name} {variant}: unchanged")
        if missing:
            context = Context(recipe, source, places, threads, progress, tuple(missing))
            prepared = exporter.prepare(context)
            for note in prepared.notes:
                progress.say(f"  {recipe.name}: {note}")
            spent: set[Path] = set()
            for variant in missing:
                spent |= set(_build_variant(context, exporter, prepared, variant, ids[variant]))
            for folder in spent:  # only now: variants share stages
                shutil.rmtree(folder)
    return [places.artifacts / ids[v] for v in variants]


def chosen_variants(recipe: Recipe, exporter: Exporter, only: list[str] | None) -> list[str]:
    """The recipe's variants, or the reference and `only`. SlimpiError for one that the exporter does not know."""
    for variant in [*recipe.variants, *(only or [])]:
        try:
            exporter.check(variant)
        except SlimpiError as error:
            raise SlimpiError(f"recipe {recipe.name}: {error}") from error
    if not only:
        return recipe.variants
    return [recipe.reference, *(v for v in only if v != recipe.reference)]


def id_of(recipe: Recipe, variant: str, source_sha256: str, places: Places) -> str:
    """The artifact's id, which its folder is named by: of input, the parts of the recipe that reach the file, and code
    version (through artifact_id). Nothing is built."""
    parts = as_dict(recipe)
    for key in ("variants", "bench", "note"):
        parts.pop(key)
    trained_on = [table.rows for table in (recipe.head, recipe.train) if table]
    texts = [recipe.calibration.text, recipe.golden.dataset, *trained_on]
    contents = [describe_dataset(name, places).file.sha256 for name in texts]
    if recipe.train:
        contents += [sources.hash_path(path) for path in vector_files(recipe.train.settings)]
    if profile := recipe.plan.profile:
        if not Path(profile).is_file():
            raise SlimpiError(f"recipe {recipe.name}: [plan] profile {profile} is no file. Run `bench --task profile`.")
        contents.append(sha256_file(Path(profile)))
    reference = variant == recipe.reference
    return artifact_id(artifact_name(recipe, variant.lower()), [parts, variant, reference, source_sha256, contents])


def _intact(folder: Path, progress: Progressor) -> bool:
    if not (folder / "manifest.json").exists():
        return False
    problem = damage(folder, load_artifact(folder).files)
    if problem:
        progress.say(f"{problem} Building it again.")
    return not problem


def _build_variant(context: Context, exporter: Exporter, prepared: Prepared, variant: str, id_: str) -> list[Path]:
    """Build one artifact; the stages that are not needed any more."""
    recipe, progress = context.recipe, context.progress
    with whole_folder(context.places.artifacts / id_) as scratch:
        made = exporter.make(context, prepared, variant, scratch)
        artifact = _describe(context, exporter, prepared, variant, id_, made, scratch)
        with progress.step(f"record golden outputs of {variant}"):
            artifact = _with_golden(context, artifact, scratch)
        write_manifest(scratch, artifact)
    size_mib = artifact.size_bytes / 2**20
    progress.say(f"  {recipe.name} {variant}: {size_mib:.1f} MiB, {artifact.bits_per_weight:.2f} bits per weight")
    if artifact.fallbacks:
        progress.say(_fallback_line(artifact))
    return made.spent


def _describe(
    context: Context, exporter: Exporter, prepared: Prepared, variant: str, id_: str, made: Made, folder: Path
) -> Artifact:
    recipe = context.recipe
    files = [describe_file(folder, p.relative_to(folder).as_posix()) for p in sorted(folder.rglob("*")) if p.is_file()]
    return Artifact(
        id=id_,
        name=f"{recipe.name}-{variant.lower()}",
        model=recipe.name,
        variant=variant,
        kind=exporter.kind,
        task=exporter.task,
        entry=made.entry,
        files=files,
        reference=variant == recipe.reference,
        tokenizer_sha256=prepared.tokenizer_sha256,
        n_weights=made.n_weights,
        n_linear_weights=made.n_linear_weights,
        bits_per_weight=made.bits_per_weight,
        bits_per_linear_weight=made.bits_per_linear_weight,
        size_bytes=next(f.size_bytes for f in files if f.path == made.entry),
        plan=made.types,
        fallbacks=made.fallbacks,
        labels=recipe.labels,
        max_tokens=recipe.max_tokens if exporter.task == "classifier" else 0,
        lineage=[*prepared.lineage, *made.lineage],
        recipe=as_dict(recipe),
        tools=tool_versions(),
        notes=[*prepared.notes, *made.notes],
    )


def _with_golden(context: Context, artifact: Artifact, folder: Path) -> Artifact:
    """Run the agent's `record_golden` on this machine and add its file to the artifact."""
    golden = context.recipe.golden
    task = RecordGolden(
        dataset=describe_dataset(golden.dataset, context.places),
        n=golden.n,
        n_tokens=golden.n_tokens,
        keyword_column=context.recipe.bench.keyword_column,
    )
    work = folder / ".golden"
    job = Job(
        id=f"golden-{artifact.id}"[:120],
        artifact=artifact,
        artifact_dir=str(folder),
        data_dir=str(context.places.datasets),
        work_dir=str(work),
        tasks=[task],
        threads=context.threads,
        provenance="host",
    )
    report = run_job("local", job)
    result = report.results[0]
    if result.status != "ok":
        raise SlimpiError(f"{artifact.name} does not run on this machine: {result.error}")
    (work / "golden.npz").rename(folder / "golden.npz")
    shutil.rmtree(work)
    runtimes = result.facts_before.runtimes
    runtime = "llama-cpp-python" if artifact.kind == "gguf" else "onnxruntime"
    return msgspec.structs.replace(
        artifact,
        files=[*artifact.files, describe_file(folder, "golden.npz")],
        golden=Golden(
            file="golden.npz",
            n=golden.n,
            machine=platform.machine(),
            runtime=f"{runtime} {runtimes.get(runtime, '?')}",
        ),
    )


def _fallback_line(artifact: Artifact) -> str:
    kinds: dict[tuple[str, str], int] = {}
    for f in artifact.fallbacks:
        kinds[f.asked, f.got] = kinds.get((f.asked, f.got), 0) + 1
    shown = ", ".join(f"{n} x {asked} -> {got}" for (asked, got), n in sorted(kinds.items()))
    return (
        f"    {len(artifact.fallbacks)} of {len(artifact.plan)} tensors fell back (width not divisible by 256): {shown}"
    )

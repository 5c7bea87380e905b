"""EXPORTERS: from a source to variants a stock runtime loads. One entry a file format."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from device.schema import Fallback, Kind, ModelTask, Report, SlimpiError, Step, read_record, sha256_file
from pipeline import calibrate, checkpoint, hessians, plan_costs, predicted_costs, quantize, sensitivity, sources
from pipeline import plan as plans
from pipeline.export import gguf as gguf_export
from pipeline.export import llama_quantize, onnx
from pipeline.formats import FORMATS, bits_per_weight
from pipeline.layers import Stats
from pipeline.methods import METHODS, llama_codes
from pipeline.plan_budgets import Budget, best_plan
from pipeline.progress import Progressor
from pipeline.recipes import Recipe, artifact_name
from pipeline.store import Places, digest, stage, tool_versions
from pipeline.tweets import head
from pipeline.variants import TYPES, VariantSpec, parse_variant

_NOTES_SHOWN = 3


@dataclass(frozen=True)
class Context:
    """What every exporter needs to know of the run it is part of."""

    recipe: Recipe
    source: sources.Source
    places: Places
    threads: int
    progress: Progressor


@dataclass(frozen=True)
class Prepared:
    """What the variants of a recipe share: the lossless base, and what led to it."""

    base: Path
    tokenizer_sha256: str
    lineage: list[Step]
    notes: list[str]


@dataclass(frozen=True)
class Made:
    """One variant's files, written into its folder, and what their bits mean. spent: stages it alone needed, which may
    go once the artifact stands."""

    entry: str
    types: dict[str, str]
    n_weights: int
    n_linear_weights: int
    bits_per_weight: float
    bits_per_linear_weight: float
    lineage: list[Step]
    fallbacks: list[Fallback] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spent: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Exporter:
    """kind and task of what it makes, the shared part, and one variant. check: SlimpiError if it knows no such variant
    (it may know more than can be listed)."""

    kind: Kind
    task: ModelTask
    check: Callable[[str], object]
    prepare: Callable[[Context], Prepared]
    make: Callable[[Context, Prepared, str, Path], Made]


def _prepare_gguf(context: Context) -> Prepared:
    recipe, progress = context.recipe, context.progress
    known = (*TYPES, *llama_codes.TYPES)
    if unknown := [t for t in recipe.plan.types if t not in known]:
        raise SlimpiError(
            f"recipe {recipe.name}: [plan] types has {unknown[0]!r}; a budget chooses from {', '.join(known)}."
        )
    model = checkpoint.load(context.source.path)

    def convert(folder: Path) -> None:
        with progress.step("convert to GGUF, lossless") as tick:
            gguf_export.export_gguf(
                model, folder / "base.gguf", "auto", progress=lambda name, done, total: tick(done, total, name)
            )

    base = stage(
        context.places.stages, f"{recipe.name}-base", ["gguf-base", context.source.sha256], convert, progress.say
    )
    lineage = [Step(action="convert", source=context.source.spec, settings={"dtype": "auto (lossless)"})]
    if any(v in _WITH_IMPORTANCE for v in recipe.variants):
        _importance(context, base / "base.gguf")  # before any variant: a text that is no good is told at once
    notes = [f"the reference: {note}" for note in model.notes]
    return Prepared(base / "base.gguf", model.vocab.sha256(), lineage, notes)


# K-quants and IQ types use the importance matrix in their scale search; the legacy Q4_0..Q8_0 take it too.
_WITH_IMPORTANCE = frozenset(v for v in llama_quantize.VARIANTS if v not in ("F32", "F16", "BF16", "Q8_0"))


def _importance(context: Context, base: Path) -> tuple[Path, Step]:
    settings = context.recipe.calibration
    text = sources.dataset(settings.text, context.places.sources)
    key = ["importance", context.source.sha256, sha256_file(text), settings.n_ctx, settings.n_chunks]

    def collect(folder: Path) -> None:
        with context.progress.step(f"importance matrix on {settings.text}") as tick:
            calibrate.collect_importance(
                base, text, folder / "importance.npz", settings.n_ctx, settings.n_chunks, context.threads, tick
            )

    folder = stage(context.places.stages, f"{context.recipe.name}-importance", key, collect, context.progress.say)
    step = Step(
        action="importance",
        source=settings.text,
        settings={"n_ctx": settings.n_ctx, "n_chunks": settings.n_chunks, "text_sha256": sha256_file(text)},
    )
    return folder / "importance.npz", step


def _make_gguf(context: Context, prepared: Prepared, variant: str, folder: Path) -> Made:
    out = folder / f"{artifact_name(context.recipe, variant)}.gguf"
    spec = parse_variant(variant)
    if spec.method:
        return _quantize_by_method(context, prepared, spec, out)
    importance, lineage = None, list[Step]()
    if variant in _WITH_IMPORTANCE:
        importance, step = _importance(context, prepared.base)
        lineage.append(step)
    with context.progress.step(f"quantize {variant}") as tick:
        # Quantizing shares no barrier between its threads, so all cores help even on a busy machine.
        result = llama_quantize.quantize_gguf(prepared.base, out, variant, importance, os.cpu_count() or 1, tick)
    settings = {"variant": variant, "importance": importance is not None}
    uncovered = f"importance matrix does not cover: {', '.join(result.without_importance)}"
    return Made(
        **_measured(out, result.types),
        lineage=[*lineage, Step(action="llama_model_quantize", source="base.gguf", settings=settings)],
        fallbacks=result.fallbacks,
        notes=[uncovered] if result.without_importance else [],
    )


def _measured(out: Path, types: dict[str, str]) -> dict[str, Any]:
    tensors = gguf_export.read_gguf_types(out)
    linear = [t for t in tensors if _is_block_matrix(t[0])]
    return {
        "entry": out.name,
        "types": types,
        "n_weights": sum(n_elements for _, _, n_elements, _ in tensors),
        "n_linear_weights": sum(n_elements for _, _, n_elements, _ in linear),
        "bits_per_weight": bits_per_weight(tensors),
        "bits_per_linear_weight": bits_per_weight(linear),
    }


def _quantize_by_method(context: Context, prepared: Prepared, spec: VariantSpec, out: Path) -> Made:
    """One of METHODS, layer by layer, into the types of a plan."""
    model = checkpoint.load(prepared.base)
    budget = _budget(context, prepared.base, spec)
    needed = METHODS[spec.method].needs != "nothing" or budget is not None
    stats, lineage = _stats(context, prepared.base) if needed else ({}, [])
    shop = quantize.Workshop(
        context.places.stages,
        context.recipe.name,
        weights_key=context.source.sha256,
        stats_key=[step.settings for step in lineage],
        device=quantize.compute_device(),
        say=context.progress.say,
    )
    plan, planning = _plan(context, prepared, spec, budget, model, stats, shop)
    if spec.mib:
        felt, step = _sensitivity(context, model)
        stats |= sensitivity.outer_stats(felt)
        shop = replace(shop, outer_key=step.settings)
    with context.progress.step(f"quantize {spec.name}") as tick:
        parts = quantize.quantize_model(model, spec.method, plan, stats, shop, tick)
    _show(context, parts.notes)
    with context.progress.step(f"write {spec.name}") as tick:
        encode = quantize.encoder(parts, plan)
        types = gguf_export.export_gguf(
            model, out, "auto", encode, progress=lambda name, done, total: tick(done, total, name)
        )
    settings = {"method": spec.method, "plan": spec.name.partition("-")[2], "device": shop.device.type}
    return Made(
        **_measured(out, types),
        lineage=[*lineage, *planning, Step(action="quantize", source="base.gguf", settings=settings)],
        fallbacks=list(plan.fallbacks),
        notes=parts.notes,
        spent=parts.blocks,
    )


def _show(context: Context, notes: list[str]) -> None:
    for note in notes[:_NOTES_SHOWN]:
        context.progress.say(f"    {note}")
    if len(notes) > _NOTES_SHOWN:
        context.progress.say(f"    and {len(notes) - _NOTES_SHOWN} more such notes, in its manifest.json")


def _stats(context: Context, base: Path) -> tuple[dict[str, Stats], list[Step]]:
    """Statistics of every block matrix's input on the calibration text, and the step that made them."""
    settings = context.recipe.calibration
    text = sources.dataset(settings.text, context.places.sources)
    facts = {"n_ctx": settings.n_ctx, "n_chunks": settings.n_chunks, "text_sha256": sha256_file(text)}
    # Not a `stage`: a killed collection keeps the layers it has.
    name = f"{context.recipe.name}-stats-{digest([context.source.sha256, facts, tool_versions()])[:16]}"
    with context.progress.step(f"statistics of the inputs on {settings.text}") as tick:
        folder = hessians.collect_stats(
            base,
            text,
            context.places.stages / name,
            settings.n_ctx,
            settings.n_chunks,
            context.threads,
            progress=tick,
        )
    return hessians.load_stats(folder), [Step(action="calibrate", source=settings.text, settings=facts)]


def _plan(
    context: Context,
    prepared: Prepared,
    spec: VariantSpec,
    budget: Budget | None,
    model: checkpoint.Checkpoint,
    stats: dict[str, Stats],
    shop: quantize.Workshop,
) -> tuple[plans.Plan, list[Step]]:
    """The spec's plan, resolved to exact tensors, and the steps that led to it."""
    if spec.mix:
        # Some mixes have other types with an importance matrix; llama-quantize's own variants have one.
        importance, step = _importance(context, prepared.base)
        return plans.mix(prepared.base, spec.mix, importance), [step]
    base = plans.read_base(prepared.base)
    kind = FORMATS[spec.uniform or _EMBEDDINGS_BESIDE_A_BUDGET]
    output = "Q6_K" if kind.bits_per_weight < FORMATS["Q6_K"].bits_per_weight else kind.name
    fixed = plans.uniform(base, kind.name, embeddings=kind.name, output=output)
    if budget is None:
        return fixed, []
    felt, step = _sensitivity(context, model)
    types = _types(context, spec)
    with context.progress.step("predict each matrix's divergence in each type") as tick:
        costs = predicted_costs.predicted_divergence(model, base, stats, felt, types, shop, tick)
    gains = predicted_costs.gains(model, base, stats, spec.method, types, shop)
    costs = predicted_costs.scaled(costs, gains)
    if spec.mib:  # of a budget in bits per linear weight the others are no part
        outer = predicted_costs.outer_costs(model, base, felt, types, replace(shop, outer_key=step.settings))
        costs |= predicted_costs.scaled(outer, gains) if METHODS[spec.method].outside else outer
    found, choice = best_plan(base, fixed, costs, budget, latency=_latency(context, base, costs))
    if choice.latency_ns is not None:
        context.progress.say(f"    products of a token: {choice.latency_ns / 1e6:.2f} ms predicted")
    return found, [step]


def _latency(context: Context, base: plans.Base, costs: plan_costs.Costs) -> plan_costs.Costs | None:
    path = context.recipe.plan.profile
    return plan_costs.latencies(read_record(Path(path), Report), base, costs) if path else None


def _budget(context: Context, base: Path, spec: VariantSpec) -> Budget | None:
    """SlimpiError if a context alone takes the memory."""
    tokens_per_s = context.recipe.plan.tokens_per_s
    latency_ns = 1e9 / tokens_per_s if tokens_per_s else math.inf
    if not spec.mib:
        return Budget(linear_bits=spec.bits, latency_ns=latency_ns) if spec.bits else None
    limit = int(spec.mib * 2**20)
    return Budget(
        file_bytes=plans.memory_limit(base, spec.n_ctx, limit) if spec.n_ctx else limit, latency_ns=latency_ns
    )


def _types(context: Context, spec: VariantSpec) -> list[str]:
    """What a budget chooses from: of the recipe's types those that the method takes."""
    types = context.recipe.plan.types or predicted_costs.CANDIDATES
    lattices = METHODS[spec.method].lattices
    found = [t for t in types if FORMATS[t].codes is not None or lattices]
    if not found:
        raise SlimpiError(f"{spec.method} chooses codes for none of {', '.join(types)}. Name other types in [plan].")
    return found


_EMBEDDINGS_BESIDE_A_BUDGET = "Q4_K"


def _sensitivity(context: Context, model: checkpoint.Checkpoint) -> tuple[sensitivity.Sensitivity, Step]:
    """How much the output feels each row of the matrices, on the start of the calibration text."""
    settings = context.recipe.calibration
    text = sources.dataset(settings.text, context.places.sources)
    n_ctx = min(settings.n_ctx, _FELT_CTX)
    facts = {"n_ctx": n_ctx, "n_chunks": _FELT_CHUNKS, "text_sha256": sha256_file(text)}
    key = ["sensitivity", context.source.sha256, facts]

    def collect(folder: Path) -> None:
        with context.progress.step(f"sensitivity of the output on {settings.text}") as tick:
            chunks = sensitivity.cut(model, text, n_ctx, _FELT_CHUNKS)
            found = sensitivity.collect(model, chunks, quantize.compute_device(), tick=tick)
            sensitivity.save(folder / "sensitivity.npz", found)

    folder = stage(context.places.stages, f"{context.recipe.name}-sensitivity", key, collect, context.progress.say)
    step = Step(action="sensitivity", source=settings.text, settings=facts)
    return sensitivity.load(folder / "sensitivity.npz"), step


_FELT_CTX, _FELT_CHUNKS = 256, 8


def _is_block_matrix(tensor: str) -> bool:
    """A weight matrix inside a transformer block: what "linear layers" means in bits per weight."""
    return tensor.startswith("blk.") and tensor.endswith(".weight") and "norm" not in tensor


def _prepare_onnx(context: Context) -> Prepared:
    recipe, progress = context.recipe, context.progress
    labels = recipe.labels
    notes: list[str] = []
    lineage: list[Step] = []
    model_dir = context.source.path
    if recipe.head:
        model_dir, step = _trained_head(context)
        lineage.append(step)
        notes.append(f"classification head trained on {recipe.head.rows}")

    def export(folder: Path) -> None:
        with progress.step("export encoder to ONNX FP32"):
            onnx.export_encoder(model_dir, folder, labels, recipe.max_tokens)

    key = ["onnx-base", context.source.sha256, labels, recipe.max_tokens, [s.settings for s in lineage]]
    base = stage(context.places.stages, f"{recipe.name}-base", key, export, progress.say)
    lineage.append(Step(action="export", source=context.source.spec, settings={"max_tokens": recipe.max_tokens}))
    return Prepared(base / "model.onnx", sha256_file(base / "tokenizer.json"), lineage, notes)


def _trained_head(context: Context) -> tuple[Path, Step]:
    recipe = context.recipe
    assert recipe.head is not None
    if len(recipe.labels) < 2:
        raise SlimpiError(
            f"recipe {recipe.name} trains a head but `labels` has {len(recipe.labels)}: name at least two."
        )
    settings = recipe.head
    rows = sources.dataset(settings.rows, context.places.sources)
    key = ["head", context.source.sha256, sha256_file(rows), settings, recipe.labels, recipe.max_tokens]

    def train(folder: Path) -> None:
        with context.progress.step(f"train classification head on {settings.rows}") as tick:
            head.train_head(
                context.source.path,
                rows,
                folder,
                text_column=settings.text_column,
                label_column=settings.label_column,
                labels=recipe.labels,
                max_tokens=recipe.max_tokens,
                seed=settings.seed,
                progress=tick,
            )

    folder = stage(context.places.stages, f"{recipe.name}-head", key, train, context.progress.say)
    return folder, Step(
        action="train head", source=settings.rows, settings={"key": digest(key)[:16], "seed": settings.seed}
    )


def _make_onnx(context: Context, prepared: Prepared, variant: str, folder: Path) -> Made:
    with context.progress.step(f"write {variant}"):
        summary = onnx.make_variant(prepared.base, folder, variant)
    return Made(
        entry="model.onnx",
        types=summary.types,
        n_weights=summary.n_weights,
        n_linear_weights=summary.n_linear_weights,
        bits_per_weight=summary.bits_per_weight,
        bits_per_linear_weight=summary.bits_per_linear_weight,
        lineage=[Step(action="onnx variant", source="model.onnx", settings={"variant": variant})],
    )


EXPORTERS: dict[str, Exporter] = {
    "gguf": Exporter("gguf", "lm", parse_variant, _prepare_gguf, _make_gguf),
    "onnx": Exporter("onnx", "classifier", onnx.check_variant, _prepare_onnx, _make_onnx),
}


def knows(recipe: Recipe, variant: str) -> bool:
    """Whether the recipe's exporter makes a variant of this name."""
    try:
        EXPORTERS[recipe.export].check(variant)
    except SlimpiError:
        return False
    return True

"""GGUF: llama-quantize's own types, and METHODS in the types of a plan; of the whole model, or of a pruned one."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from device.records import SlimpiError
from device.schema import Step
from pipeline import checkpoint, quantize
from pipeline.calibration_stages import WITH_IMPORTANCE, importance_matrix, stats_for
from pipeline.export import gguf as gguf_export
from pipeline.export import llama_quantize
from pipeline.exporter import Context, Exporter, Made, Prepared
from pipeline.formats import bits_per_weight
from pipeline.layers import Stats
from pipeline.methods import METHODS, llama_codes
from pipeline.planning import Planned, budget_of, chosen_plan
from pipeline.prune import PruneSpec
from pipeline.pruning import chosen, pruned_base, told
from pipeline.recipes import artifact_name
from pipeline.store import stage
from pipeline.variants import TYPES, VariantSpec, parse_variant

_NOTES_SHOWN = 3
AUTO_PERCENTS = (0, 10, 20, 30)
"""Shares among which AUTO chooses."""


def _prepare_gguf(context: Context) -> Prepared:
    recipe = context.recipe
    known = (*TYPES, *llama_codes.TYPES)
    if unknown := [t for t in recipe.plan.types if t not in known]:
        raise SlimpiError(
            f"recipe {recipe.name}: [plan] types has {unknown[0]!r}; a budget chooses from {', '.join(known)}."
        )
    base, model = lossless(context)
    lineage = [Step(action="convert", source=context.source.spec, settings={"dtype": "auto (lossless)"})]
    if any(v in WITH_IMPORTANCE for v in context.variants):
        importance_matrix(context, base)  # before any variant: a text that is no good is told at once
    notes = [f"the reference: {note}" for note in model.notes]
    return Prepared(base, model.vocab.sha256(), lineage, notes)


def lossless(context: Context) -> tuple[Path, checkpoint.Checkpoint]:
    """The source as a GGUF of its own values, and what it was read from."""
    model = checkpoint.load(context.source.path)

    def convert(folder: Path) -> None:
        with context.progress.step("convert to GGUF, lossless") as tick:
            gguf_export.export_gguf(
                model, folder / "base.gguf", "auto", progress=lambda name, done, total: tick(done, total, name)
            )

    key = ["gguf-base", context.source.sha256]
    folder = stage(context.places.stages, f"{context.recipe.name}-base", key, convert, context.progress.say)
    return folder / "base.gguf", model


def _make_gguf(context: Context, prepared: Prepared, variant: str, folder: Path) -> Made:
    out = folder / f"{artifact_name(context.recipe, variant)}.gguf"
    spec = parse_variant(variant)
    steps = list[Step]()
    if spec.prune:
        context, prepared, steps = pruned_base(context, prepared, _share_chosen(context, prepared, spec))
    made = _quantize_by_method(context, prepared, spec, out) if spec.method else _by_llama(context, prepared, spec, out)
    pruned = [f"pruned: {told(step.settings)}" for step in steps]
    return replace(made, lineage=[*steps, *made.lineage], notes=[*pruned, *made.notes])


def _share_chosen(context: Context, prepared: Prepared, spec: VariantSpec) -> PruneSpec:
    """The spec's pruning; of one with AUTO, with the share whose pruning as measured and quantizing as predicted lose
    least under the budget, in memory and, with a profile, in time. They are added as if they were independent.

    SlimpiError if no share fits.
    """
    assert spec.prune is not None
    if spec.prune.percent is not None:
        return spec.prune
    losses: dict[float, float] = {}
    shares = {percent: replace(spec.prune, percent=percent) for percent in AUTO_PERCENTS}
    chosen(context, prepared.base, [share for percent, share in shares.items() if percent])  # from the same evidence
    for percent, tried in shares.items():
        inner, base, steps = pruned_base(context, prepared, tried)
        try:
            plan = _plan(inner, base, spec)
        except SlimpiError as error:
            context.progress.say(f"    {tried.name}: {error}")
            continue
        losses[percent] = steps[0].settings["kld"] + plan.planned.predicted
        context.progress.say(f"    {tried.name}: {losses[percent]:.4f} nats a token, pruned and quantized, predicted")
    if not losses:
        raise SlimpiError(f"{spec.name} fits with no share of {AUTO_PERCENTS} %. Allow more, or prune more by hand.")
    return replace(spec.prune, percent=min(losses, key=losses.__getitem__))


def _by_llama(context: Context, prepared: Prepared, spec: VariantSpec, out: Path) -> Made:
    """llama-quantize's own types and codes."""
    variant = spec.name
    importance, lineage = None, list[Step]()
    if variant in WITH_IMPORTANCE:
        importance, step = importance_matrix(context, prepared.base)
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


@dataclass(frozen=True)
class _Plan:
    """What a method needs to make a model's parts."""

    model: checkpoint.Checkpoint
    stats: dict[str, Stats]
    lineage: list[Step]
    shop: quantize.Workshop
    planned: Planned


def _plan(context: Context, prepared: Prepared, spec: VariantSpec) -> _Plan:
    model = checkpoint.load(prepared.base)
    budget = budget_of(context, prepared.base, spec)
    stats, lineage = stats_for(context, prepared.base, "hessian" if budget else METHODS[spec.method].needs)
    shop = quantize.Workshop(
        context.places.stages,
        context.recipe.name,
        weights_key=context.source.sha256,
        stats_key=[step.settings for step in lineage],
        device=quantize.compute_device(),
        say=context.progress.say,
    )
    planned = chosen_plan(context, prepared, spec, budget, model, stats, shop)
    return _Plan(model, stats, lineage, replace(shop, outer_key=planned.outer_key), planned)


def _quantize_by_method(context: Context, prepared: Prepared, spec: VariantSpec, out: Path) -> Made:
    """One of METHODS, layer by layer, into the types of a plan."""
    made = _plan(context, prepared, spec)
    model, stats, shop, planned, plan = made.model, made.stats, made.shop, made.planned, made.planned.plan
    with context.progress.step(f"quantize {spec.name}") as tick:
        parts = quantize.quantize_model(model, spec.method, plan, stats | planned.outer, shop, tick)
    _show(context, parts.notes)
    with context.progress.step(f"write {spec.name}") as tick:
        encode = quantize.encoder(parts, plan)
        types = gguf_export.export_gguf(
            model, out, "auto", encode, progress=lambda name, done, total: tick(done, total, name)
        )
    settings = {"method": spec.method, "plan": spec.name.partition("-")[2], "device": shop.device.type}
    step = Step(action="quantize", source="base.gguf", settings=settings)
    new = [found for found in planned.steps if found not in made.lineage]
    return Made(
        **_measured(out, types),
        lineage=[*made.lineage, *new, step],
        fallbacks=list(plan.fallbacks),
        notes=parts.notes,
        spent=parts.blocks,
    )


def _show(context: Context, notes: list[str]) -> None:
    for note in notes[:_NOTES_SHOWN]:
        context.progress.say(f"    {note}")
    if len(notes) > _NOTES_SHOWN:
        context.progress.say(f"    and {len(notes) - _NOTES_SHOWN} more such notes, in its manifest.json")


def _is_block_matrix(tensor: str) -> bool:
    """A weight matrix inside a transformer block: what "linear layers" means in bits per weight."""
    return tensor.startswith("blk.") and tensor.endswith(".weight") and "norm" not in tensor


GGUF = Exporter("gguf", "lm", parse_variant, _prepare_gguf, _make_gguf)

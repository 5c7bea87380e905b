"""The pruned base of a variant: a stage like the lossless one, from which everything after it is made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from device.records import sha256_file
from device.schema import Step
from pipeline import checkpoint, quantize, sensitivity, sources
from pipeline.export import gguf as gguf_export
from pipeline.exporter import Context, Prepared
from pipeline.progress import Tick
from pipeline.prune import PruneSpec, Subject, choose, finish
from pipeline.prune.choice import load_pruned, save_pruned
from pipeline.prune.widths import Pruned
from pipeline.recipes import Recipe
from pipeline.store import digest, stage

_MEASURED_CTX = 256
_FACTS, _CHOICE = "prune.json", "choice.npz"
_COSTS = {"repair_s": "least squares", "distill_s": "distillation"}


def chosen(context: Context, base: Path, specs: Sequence[PruneSpec]) -> list[Pruned]:
    """What goes of a lossless base, from stages: the same with every repair, and the longer part. What several shares
    are chosen from is made once."""
    subject: Subject | None = None
    found = []
    for spec in specs:
        plain = replace(spec, repair="")

        def make(folder: Path, plain: PruneSpec = plain) -> None:
            nonlocal subject
            with context.progress.step(f"choose what goes by {plain.name}") as tick:
                subject = subject or _subject(context, base, tick)
                subject.tick = tick
                save_pruned(folder / _CHOICE, choose(subject, plain))

        key = [*_key(context, _settings(context)), plain.name]
        folder = stage(context.places.stages, f"{context.recipe.name}-choice", key, make, context.progress.say)
        found.append(load_pruned(folder / _CHOICE))
    return found


def pruned_base(context: Context, prepared: Prepared, spec: PruneSpec) -> tuple[Context, Prepared, list[Step]]:
    """The context and the base that the rest of the variant is built from: its statistics, importance and parts are the
    pruned model's own, since the source's hash in it is the pruned file's. The step tells what stayed."""
    if spec.percent == 0:
        return context, prepared, [Step(action="prune", source="base.gguf", settings={"percent": 0, "kld": 0.0})]
    recipe, settings = context.recipe, _settings(context)
    key = _key(context, settings)
    name = pruned_name(recipe, spec)

    def make(folder: Path) -> None:
        (choice,) = chosen(context, prepared.base, [spec])
        with context.progress.step(f"prune {spec.name}") as tick:
            pruned, facts = finish(_subject(context, prepared.base, tick), spec, choice)
            gguf_export.export_gguf(pruned, folder / "base.gguf", "auto")
            (folder / _FACTS).write_text(json.dumps(facts))

    folder = stage(context.places.stages, name, [*key, spec.name], make, context.progress.say)
    facts = json.loads((folder / _FACTS).read_text())
    context.progress.say(f"    {told(facts)}")
    base = folder / "base.gguf"
    source = replace(context.source, path=base, sha256=digest([*key, spec.name]))
    steps = [Step(action="prune", source="base.gguf", settings={**facts, **settings, "text": recipe.calibration.text})]
    named = msgspec.structs.replace(recipe, name=name)
    return replace(context, recipe=named, source=source), replace(prepared, base=base), steps


def pruned_name(recipe: Recipe, spec: PruneSpec) -> str:
    """What the pruned model is called: the stage that holds it begins with it, and all stages made of it do."""
    return f"{recipe.name}-{spec.name.lower().replace('+', '_')}"


def _text(context: Context) -> Path:
    return sources.dataset(context.recipe.calibration.text, context.places.sources)


def _settings(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    return {
        **msgspec.to_builtins(recipe.prune),
        "n_ctx": recipe.calibration.n_ctx,
        "text_sha256": sha256_file(_text(context)),
    }


def _key(context: Context, settings: dict[str, Any]) -> list[Any]:
    return ["prune", context.source.sha256, settings]


def _subject(context: Context, base: Path, tick: Tick) -> Subject:
    recipe, text = context.recipe, _text(context)
    n_ctx = recipe.calibration.n_ctx
    model = checkpoint.load(base)
    chunks, unseen = apart(sensitivity.cut(model, text, n_ctx, 0), recipe.prune.measured)
    return Subject(
        model,
        measured=sensitivity.cut(model, text, min(_MEASURED_CTX, n_ctx), 0)[: recipe.prune.measured],
        fitted=chunks[: recipe.prune.fitted],
        device=quantize.compute_device(),
        tick=tick,
        taught=chunks[: 2 * recipe.prune.distill_steps],
        distill_steps=recipe.prune.distill_steps,
        unseen=unseen,
        scratch=context.places.stages,
    )


def apart(chunks: torch.Tensor, n_judged: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The chunks to fit on, and the last of them to judge by, an eighth at most; None of fewer than eight."""
    n_judged = min(n_judged, len(chunks) // 8)
    return (chunks[:-n_judged], chunks[-n_judged:]) if n_judged else (chunks, None)


def told(facts: dict[str, Any]) -> str:
    """A line on what a cut left: "25 % asked, 24.9 % of the blocks' weights removed: 30 layers, ..."."""

    def span(name: str) -> str:
        values = [value for value in facts[name] if value] or [0]
        return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"

    if not facts["percent"]:
        return "nothing: fewer bits lose less"
    if "share_of_zeros" in facts:
        return f"{100 * facts['share_of_zeros']:.1f} % of the blocks' weights are zeros: nothing gets smaller or faster"
    cost = "".join(f", {facts[key]:.0f} s of {what}" for key, what in _COSTS.items() if key in facts)
    return (
        f"{facts['percent']:g} % asked, {100 * facts['share_removed']:.1f} % of the blocks' weights removed: "
        f"{facts['layers']} of {facts['layers_before']} layers, {sum(map(bool, facts['kv_groups']))} attentions with "
        f"{span('kv_groups')} KV groups, {sum(map(bool, facts['channels']))} MLPs with {span('channels')} channels"
        + cost
    )

"""The pruned base of an ONNX variant: PRUNER-PERCENT- or PRUNER+REPAIR-PERCENT- before the name of any other.

    LAYERS-33-FP32    HEADS-25-INT8-dynamic    CHANNELS+REPAIR-25-INT8-smooth    LAYERS+TRAIN-50-INT8-dynamic

PERCENT is the share of what the pruner removes, in the encoder's own layers: of the layers, of the attention heads in
every layer, or of the MLP channels in every layer (to the nearest multiple of 32 that stays). Embeddings and head stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from device.records import SlimpiError, sha256_file
from device.schema import Step
from pipeline import encoder_parts, quantize
from pipeline.encoders import load_encoder, save_encoder
from pipeline.export import onnx
from pipeline.export.onnx_observe import Calibration
from pipeline.exporter import Context, Prepared
from pipeline.prune import PRUNERS, PruneSpec, parse_prune
from pipeline.prune.encoder import (
    ENCODER_PRUNERS,
    ENCODER_REPAIRS,
    TRAIN,
    Pruning,
    TrainOn,
    n_kept,
    prune_encoder,
    told,
)
from pipeline.store import stage

ENCODER = "encoder"
"""Name of a stage's Hugging Face folder."""

_FACTS = "prune.json"

Export = Callable[[Path, Path], str]
"""(Hugging Face folder, folder for model.onnx and its reader) -> what a note says of it, mostly nothing."""


def parse_variant(name: str) -> tuple[PruneSpec | None, str]:
    """How a variant is pruned first, if it is, and the plain variant behind it. SlimpiError says which part is unknown
    and what is known."""
    method, _, plan = name.partition("-")
    percent, _, rest = plan.partition("-")
    pruner = method.partition("+")[0]
    if not (method.isupper() and pruner.lower() in ENCODER_PRUNERS):
        if pruner.lower() in {*PRUNERS, *ENCODER_PRUNERS} or _is_plain(rest):
            raise SlimpiError(f"unknown pruner {pruner!r} in the variant {name!r}. {help_text()}")
        try:
            onnx.check_variant(name)
        except SlimpiError as error:
            raise SlimpiError(f"{error} {help_text()}") from error
        return None, name
    spec = parse_prune(
        method, percent, tuple(ENCODER_PRUNERS), tuple(ENCODER_REPAIRS), f"the {pruner.lower()}", auto=False
    )
    if not rest:
        raise SlimpiError(f"{name!r} says how to prune, not what to write. Name it after that: {name}-INT8-dynamic.")
    if rest.partition("-")[0].partition("+")[0].lower() in ENCODER_PRUNERS:
        raise SlimpiError(f"{name!r} prunes twice. Prune once, by more.")
    onnx.check_variant(rest)
    return spec, rest


def help_text() -> str:
    """What may come before a variant's name."""
    return (
        "Encoders are pruned by PRUNER-PERCENT- or PRUNER+REPAIR-PERCENT- before it (LAYERS-33-FP32), with PERCENT of "
        f"the encoder's own {', '.join(ENCODER_PRUNERS)} and a pruner among {', '.join(ENCODER_PRUNERS).upper()}."
    )


def _is_plain(variant: str) -> bool:
    try:
        onnx.check_variant(variant)
    except SlimpiError:
        return False
    return True


def check_prunable(context: Context) -> None:
    """SlimpiError before anything is trained if a pruned variant cannot be made of this recipe and source."""
    specs = [spec for name in context.variants if (spec := parse_variant(name)[0])]
    if not specs:
        return
    train = context.recipe.train
    if train and train.classifier != "transformer":
        raise SlimpiError(
            f"{specs[0].name}: a trained {train.classifier} has no layers of an encoder to prune. "
            'Take variants without pruning, or [train] classifier = "transformer".'
        )
    sizes = encoder_parts.sizes_in(context.source.path)
    for spec in specs:
        if spec.repair == TRAIN and train is None:
            raise SlimpiError(
                f"{spec.name}: the recipe has no [train] rows to train on. Take +REPAIR, which reads no labels."
            )
        n_kept(spec, sizes)


def pruned_base(
    context: Context,
    prepared: Prepared,
    spec: PruneSpec,
    passages: tuple[Calibration, Step],
    export: Export,
    train: TrainOn | None = None,
) -> tuple[Prepared, Step, list[str]]:
    """The base that the rest of the variant is made from, the lineage's step and notes. The stage keeps the pruned
    Hugging Face folder as `encoder/` beside model.onnx.

    passages: the calibration text and its step, of which [prune] passages are used. train: for +TRAIN.
    """
    recipe = context.recipe
    assert prepared.encoder is not None
    source = prepared.encoder
    found, read = passages
    text = found.first(recipe.prune.passages)
    settings: dict[str, Any] = {**read.settings, "text": read.source}
    key = ["prune-encoder", sha256_file(prepared.base), spec.name, settings, recipe.labels, text.sha256()]

    def make(folder: Path) -> None:
        with context.progress.step(f"prune {spec.name}") as tick:
            encoder = load_encoder(source, recipe.labels, recipe.max_tokens)
            subject = Pruning(encoder, text, quantize.compute_device(), tick, train)
            made, facts = prune_encoder(subject, spec)
            save_encoder(made, folder / ENCODER)
        with context.progress.step(f"export {spec.name} to ONNX FP32"):
            note = export(folder / ENCODER, folder)
        (folder / _FACTS).write_text(json.dumps({"facts": facts, "note": note}))

    name = f"{recipe.name}-{spec.name.lower().replace('+', '_')}"
    folder = stage(context.places.stages, name, key, make, context.progress.say)
    written = json.loads((folder / _FACTS).read_text())
    facts, note = written["facts"], written["note"]
    line = told(facts)
    context.progress.say(f"    {line}")
    step = Step(action="prune", source="model.onnx", settings={**settings, **facts})
    base = replace(prepared, base=folder / "model.onnx", encoder=folder / ENCODER)
    return base, step, [line, *([note] if note else [])]

"""ONNX: an encoder with a classification head, trained first where the recipe says so."""

from __future__ import annotations

from pathlib import Path

from device.schema import SlimpiError, Step, sha256_file
from pipeline import sources
from pipeline.export import onnx, onnx_observe
from pipeline.exporter import Context, Exporter, Made, Prepared
from pipeline.store import digest, stage
from pipeline.tweets import head


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
    lineage, calibration = list[Step](), None
    if onnx.needs_calibration(variant):
        calibration, step = _passages(context, prepared)
        lineage.append(step)
    with context.progress.step(f"write {variant}") as tick:
        summary = onnx.make_variant(prepared.base, folder, variant, calibration, tick)
    return Made(
        entry="model.onnx",
        types=summary.types,
        n_weights=summary.n_weights,
        n_linear_weights=summary.n_linear_weights,
        bits_per_weight=summary.bits_per_weight,
        bits_per_linear_weight=summary.bits_per_linear_weight,
        lineage=[
            *lineage,
            Step(action="onnx variant", source="model.onnx", settings={"variant": variant, **summary.facts}),
        ],
        notes=summary.notes,
    )


def _passages(context: Context, prepared: Prepared) -> tuple[onnx_observe.Calibration, Step]:
    """Lines of the calibration text as the encoder's tokens; [calibration] n_ctx and n_chunks cut them."""
    settings = context.recipe.calibration
    text = sources.dataset(settings.text, context.places.sources)
    max_tokens = min(settings.n_ctx, context.recipe.max_tokens)
    reader = prepared.base.with_name("tokenizer.json")
    found = onnx_observe.read_calibration(text, settings.text, reader, max_tokens, settings.n_chunks)
    facts = {"n_passages": len(found.encodings), "max_tokens": max_tokens, "text_sha256": sha256_file(text)}
    return found, Step(action="calibrate", source=settings.text, settings=facts)


ONNX = Exporter("onnx", "classifier", onnx.check_variant, _prepare_onnx, _make_onnx)

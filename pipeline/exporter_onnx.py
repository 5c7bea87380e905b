"""ONNX: an encoder with a classification head, trained first where the recipe says so."""

from __future__ import annotations

from pathlib import Path

from device.schema import SlimpiError, Step, sha256_file
from pipeline import sources
from pipeline.export import onnx
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


ONNX = Exporter("onnx", "classifier", onnx.check_variant, _prepare_onnx, _make_onnx)

"""ONNX: an encoder with a classification head, trained first where the recipe says so, or a classifier of tweets.

Variants are named as pipeline/export/onnx.py says; encoders may be pruned first (pipeline/pruning_onnx.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from device.records import SlimpiError, encode, read_record, sha256_file, write_atomic
from device.schema import Step
from pipeline import pruning_onnx, sources
from pipeline.encoders import load_encoder, save_encoder
from pipeline.export import onnx, onnx_observe
from pipeline.exporter import Context, Exporter, Made, Prepared
from pipeline.recipes import Train
from pipeline.store import digest, stage
from pipeline.tweets import data, head
from pipeline.tweets.calibration import Calibration
from pipeline.tweets.classifiers import on_this_machine, vector_files, with_max_tokens
from pipeline.tweets.classifiers.encoder import EncoderModel, train_again
from pipeline.tweets.data import Tweet
from pipeline.tweets.decide import decide, train_decider


def _prepare_onnx(context: Context) -> Prepared:
    recipe, progress = context.recipe, context.progress
    pruning_onnx.check_prunable(context)
    if recipe.train:
        return _trained_classifier(context, recipe.train)
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
    return Prepared(base / "model.onnx", sha256_file(base / "tokenizer.json"), lineage, notes, model_dir)


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


def _trained_classifier(context: Context, train: Train) -> Prepared:
    """[train]: a classifier trained, calibrated and exported in one stage."""
    recipe, places = context.recipe, context.places
    rows = sources.dataset(train.rows, places.sources)
    settings = with_max_tokens(train.classifier, train.settings, recipe.max_tokens)
    known_by = on_this_machine(train.classifier, settings)  # and a bad table is told before anything is read
    tweets = _tweets(rows, train)

    def make(folder: Path) -> None:
        with context.progress.step(f"train {train.classifier} on {train.rows}") as tick:
            decider = train_decider(
                train.classifier,
                settings,
                tweets,
                context.source.path if context.source.spec != sources.NO_SOURCE else None,
                places.sources,
                places.stages / f"{recipe.name}-searches",
                train.seed,
                train.validation_share,
                train.threshold,
                train.outliers,
                tick,
            )
        with context.progress.step("export classifier to ONNX FP32"):
            decider.export(folder)
            write_atomic(folder / "calibration.json", encode(decider.calibration))
            if isinstance(decider.model, EncoderModel):  # variants may prune it
                save_encoder(decider.model.encoder, folder / pruning_onnx.ENCODER)

    vectors = [sources.hash_path(path) for path in vector_files(settings)]
    key = ["train", context.source.sha256, sha256_file(rows), train, known_by, vectors]
    base = stage(places.stages, f"{recipe.name}-base", key, make, context.progress.say)
    fitted = read_record(base / "calibration.json", Calibration)
    step = Step(
        action=f"train {train.classifier}",
        source=train.rows,
        settings={"key": digest(key)[:16], "seed": train.seed, **msgspec.structs.asdict(fitted), "settings": known_by},
    )
    notes = [f"{train.classifier} trained on {train.rows}, {fitted}"]
    encoder = base / pruning_onnx.ENCODER
    return Prepared(base / "model.onnx", _reader_sha256(base), [step], notes, encoder if encoder.is_dir() else None)


def _tweets(rows: Path, train: Train) -> Sequence[Tweet]:
    return data.read_tweets(
        rows, data.Columns(text=train.text_column, target=train.label_column, keyword=train.keyword_column)
    )


def _reader_sha256(folder: Path) -> str:
    """Of what turns texts into inputs: one file's own hash, or that of both."""
    files = onnx.input_files(folder)
    return sha256_file(files[0]) if len(files) == 1 else sources.hash_path(folder, files)


def _make_onnx(context: Context, prepared: Prepared, variant: str, folder: Path) -> Made:
    lineage, notes, calibration = list[Step](), list[str](), None
    pruning, plain = pruning_onnx.parse_variant(variant)
    passages = _passages(context, prepared) if pruning or onnx.needs_calibration(plain) else None
    if pruning and passages:
        export = _pruned_export(context)
        train = _training(context, recipe.train) if (recipe := context.recipe).train else None
        prepared, step, notes = pruning_onnx.pruned_base(context, prepared, pruning, passages, export, train)
        lineage.append(step)
    if onnx.needs_calibration(plain) and passages:
        calibration = passages[0]
        lineage.append(passages[1])
    with context.progress.step(f"write {variant}") as tick:
        summary = onnx.make_variant(prepared.base, folder, plain, calibration, tick)
    return Made(
        entry="model.onnx",
        types=summary.types,
        n_weights=summary.n_weights,
        n_linear_weights=summary.n_linear_weights,
        bits_per_weight=summary.bits_per_weight,
        bits_per_linear_weight=summary.bits_per_linear_weight,
        lineage=[
            *lineage,
            Step(action="onnx variant", source="model.onnx", settings={"variant": plain, **summary.facts}),
        ],
        notes=[*notes, *summary.notes],
    )


def _pruned_export(context: Context) -> pruning_onnx.Export:
    """How a pruned folder becomes ONNX, as the whole one did. A trained classifier is calibrated anew, on the same
    validation rows: pruning shifts what its probabilities mean."""
    recipe = context.recipe

    def export(encoder: Path, folder: Path) -> str:
        if recipe.train:
            return _decided(context, recipe.train, encoder, folder)
        onnx.export_encoder(encoder, folder, recipe.labels, recipe.max_tokens)
        return ""

    return export


def _parts(context: Context, train: Train) -> tuple[list[Tweet], list[Tweet]]:
    """The rows that the classifier learned from, and those that were held out, as `train_decider` splits them."""
    tweets = _tweets(sources.dataset(train.rows, context.places.sources), train)
    parts = data.split(tweets, train.validation_share, train.seed)
    return [tweets[i] for i in parts.train], [tweets[i] for i in parts.test]


def _training(context: Context, train: Train) -> pruning_onnx.TrainOn:
    """How a pruned encoder is trained on: [train] again, on the same rows, all of its components."""
    table = with_max_tokens(train.classifier, train.settings, context.recipe.max_tokens)
    return lambda encoder, tick: train_again(encoder, *_parts(context, train), table, train.seed, tick)


def _decided(context: Context, train: Train, encoder: Path, folder: Path) -> str:
    recipe = context.recipe
    learned_from, held = _parts(context, train)
    model = EncoderModel(load_encoder(encoder, recipe.labels, recipe.max_tokens), recipe.max_tokens)
    decider = decide(model, held, train.threshold, learned_from if train.outliers else ())
    decider.export(folder)
    return f"calibrated again after pruning: {decider.calibration}"


def _passages(context: Context, prepared: Prepared) -> tuple[onnx_observe.Calibration, Step]:
    """Lines of the calibration text as the encoder's tokens; [calibration] n_ctx and n_chunks cut them."""
    settings = context.recipe.calibration
    text = sources.dataset(settings.text, context.places.sources)
    max_tokens = min(settings.n_ctx, context.recipe.max_tokens)
    reader = prepared.base.with_name("tokenizer.json")
    found = onnx_observe.read_calibration(text, settings.text, reader, max_tokens, settings.n_chunks)
    facts = {"n_passages": len(found.encodings), "max_tokens": max_tokens, "text_sha256": sha256_file(text)}
    return found, Step(action="calibrate", source=settings.text, settings=facts)


ONNX = Exporter("onnx", "classifier", pruning_onnx.parse_variant, _prepare_onnx, _make_onnx)

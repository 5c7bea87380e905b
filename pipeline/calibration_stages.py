"""What a recipe's calibration text is read for: the importance matrix, statistics of inputs, sensitivity of the output.

Each is a stage on disk and comes with the step that stands in a manifest.
"""

from __future__ import annotations

from pathlib import Path

import torch

from device.records import sha256_file
from device.schema import Step
from pipeline import calibrate, checkpoint, hessians, quantize, sensitivity, sources
from pipeline.export import llama_quantize
from pipeline.exporter import Context
from pipeline.layers import Stats
from pipeline.store import digest, stage, tool_versions

_FELT_CTX, _FELT_CHUNKS = 256, 8

# K-quants and IQ types use the importance matrix in their scale search; the legacy Q4_0..Q8_0 take it too.
WITH_IMPORTANCE = frozenset(v for v in llama_quantize.VARIANTS if v not in ("F32", "F16", "BF16", "Q8_0"))


def importance_matrix(context: Context, base: Path) -> tuple[Path, Step]:
    """(importance.npz, lineage) of the recipe's calibration text: mean x² by input channel, as llama-imatrix has it."""
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


def input_stats(context: Context, base: Path) -> tuple[dict[str, Stats], list[Step]]:
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


def stats_for(context: Context, base: Path, needs: str) -> tuple[dict[str, Stats], list[Step]]:
    """What a method with such `needs` has to know of the inputs. Means are the importance matrix: a fraction of the
    time that Hessians take."""
    if needs == "nothing":
        return {}, []
    if needs == "means":
        path, step = importance_matrix(context, base)
        return stats_of_importance(path), [step]
    return input_stats(context, base)


def stats_of_importance(path: Path) -> dict[str, Stats]:
    """Stats by tensor name that know mean x^2; mean |x| is NaN, and asking for a Hessian a bug."""
    found = calibrate.load_importance(path)

    def no_hessian() -> torch.Tensor:
        raise ValueError(f"{path} holds no Hessian; a method that reads one must say that it needs it")

    return {
        name: Stats(torch.from_numpy(mean_x2), torch.full((len(mean_x2),), torch.nan), found.n_tokens, no_hessian)
        for name, mean_x2 in found.mean_x2.items()
    }


def output_sensitivity(context: Context, model: checkpoint.Checkpoint) -> tuple[sensitivity.Sensitivity, Step]:
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

"""What an exporter is: the shared part of a recipe's variants, and one variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from device.schema import Fallback, Kind, ModelTask, Step
from pipeline import sources
from pipeline.progress import Progressor
from pipeline.recipes import Recipe
from pipeline.store import Places


@dataclass(frozen=True)
class Context:
    """What every exporter needs to know of the run it is part of. variants: those that will be made."""

    recipe: Recipe
    source: sources.Source
    places: Places
    threads: int
    progress: Progressor
    variants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """What the variants of a recipe share: the lossless base, and what led to it. encoder: the Hugging Face folder that
    an ONNX base was exported from, if it is an encoder with a head."""

    base: Path
    tokenizer_sha256: str
    lineage: list[Step]
    notes: list[str]
    encoder: Path | None = None


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

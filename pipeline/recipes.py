"""Recipes: what to build, read from models/*.toml. Unknown keys fail."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from device.records import SlimpiError, check_id

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]


class _Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every recipe table: immutable, unknown keys rejected."""


class Calibration(_Config, frozen=True, kw_only=True):
    """Text for importance matrices; n_chunks 0 = all of it."""

    text: str = "demo:prose_calibration.txt"
    n_ctx: Positive = 512
    n_chunks: Count = 0


class PlanTable(_Config, frozen=True, kw_only=True):
    """What a variant with a budget (GPTQ-700MiB) chooses from: types, none = a list of slimpi's own.

    profile: report.json of the task `profile` on the device; with it a decoded token's products take at most
    1 / tokens_per_s seconds there, by what the device measured.
    avoid_source_types: of a source that was quantized already, no matrix gets a type that holds it as it was: almost
    free there and nowhere else, it would prove nothing.
    """

    types: list[str] = []
    avoid_source_types: bool = False
    profile: str = ""
    tokens_per_s: Annotated[float, Meta(ge=0)] = 0.0

    def __post_init__(self) -> None:
        if bool(self.profile) != bool(self.tokens_per_s):
            raise ValueError("[plan] profile and tokens_per_s go together: name both or neither")


class Prune(_Config, frozen=True, kw_only=True):
    """What a pruned variant (LAYERS-25-Q4_K_M) is chosen by: chunks of the calibration text by which cuts are measured,
    and chunks by which moments are taken and repairs fit. distill_steps: of +DISTILL and +DISTILL_ENDS, two chunks
    each. passages: of an encoder (LAYERS-33-FP32) the first passages of that text, by which all of it is done."""

    measured: Positive = 8
    fitted: Positive = 64
    distill_steps: Positive = 64
    passages: Positive = 512


class Head(_Config, frozen=True, kw_only=True):
    """Train a classification head on labelled rows before export."""

    rows: str
    text_column: str = "text"
    label_column: str = "target"
    seed: int = 0


class Train(_Config, frozen=True, kw_only=True):
    """Train a classifier of pipeline/tweets/classifiers on labelled rows (0 and 1); settings: its own table.

    A share of the rows is held out to stop, calibrate and choose the threshold by, which maximizes F1 or accuracy there
    or is one half. outliers: also tell how far each text is from those it learned from.
    """

    classifier: str
    rows: str = "demo:tweets_train.csv"
    text_column: str = "text"
    label_column: str = "target"
    keyword_column: str = "keyword"
    seed: int = 0
    validation_share: Annotated[float, Meta(ge=0.05, le=0.5)] = 0.1
    threshold: Literal["f1", "accuracy", "half"] = "f1"
    outliers: bool = False
    settings: dict[str, Any] = {}


class Golden(_Config, frozen=True, kw_only=True):
    """How much of the model's output is recorded at build time for the parity task."""

    dataset: str = "demo:prose_test.txt"
    n: Positive = 32
    n_tokens: Positive = 128


class Bench(_Config, frozen=True, kw_only=True):
    """What the device runs. Dataset names are resolved by `sources.dataset`.

    keyword_column: of `rows` and of the golden dataset, read only for a classifier that asks for keywords; "" = none.
    choices: sets of questions (pipeline/questions.py); none = the task runs only where it is asked for.
    limit: of rows, and of each set of questions.
    """

    text: str = "demo:prose_test.txt"
    n_ctx: Annotated[int, Meta(ge=8, le=131072)] = 512
    n_chunks: Count = 0
    n_prompt: Positive = 512
    n_gen: Positive = 128
    repetitions: Positive = 5
    rows: str = "demo:tweets_test.csv"
    text_column: str = "text"
    label_column: str = "target"
    keyword_column: str = "keyword"
    choices: list[str] = []
    limit: Count = 0


class Recipe(_Config, frozen=True, kw_only=True):
    """One model and its variants. The first variant is the reference that losses are counted against."""

    name: str
    source: str
    export: Literal["gguf", "onnx", "onnx-lm"]
    variants: list[str]
    sha256: str = ""
    note: str = ""
    labels: list[str] = []
    max_tokens: Count = 128
    calibration: Calibration = Calibration()
    plan: PlanTable = PlanTable()
    prune: Prune = Prune()
    head: Head | None = None
    train: Train | None = None
    golden: Golden = Golden()
    bench: Bench = Bench()

    def __post_init__(self) -> None:
        check_id(self.name)
        if not self.variants:
            raise ValueError("`variants` is empty: name at least one")
        if len(set(self.variants)) != len(self.variants):
            raise ValueError(f"`variants` names one twice: {self.variants}")
        if self.train and (self.head or self.export != "onnx" or len(self.labels) != 2):
            raise ValueError('[train] needs export = "onnx", two `labels` and no [head]')

    @property
    def reference(self) -> str:
        return self.variants[0]


def read_recipe(path: Path) -> Recipe:
    """Parse and check one recipe file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SlimpiError(f"cannot read recipe {path}: {error}. See models/*.toml for examples.") from error
    try:
        return msgspec.toml.decode(text, type=Recipe)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise SlimpiError(f"recipe {path}: {error}. See models/*.toml for examples.") from error


def artifact_name(recipe: Recipe, variant: str) -> str:
    """Recipe and variant as ids, folders and files may be called: methods may have a plus sign, names may not."""
    return f"{recipe.name}-{variant.replace('+', '_')}"


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, for hashing and for the manifest."""
    plain: dict[str, Any] = msgspec.to_builtins(recipe)
    return plain

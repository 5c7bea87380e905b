"""Classifiers on a Hugging Face encoder: fine-tuned as a whole or in part, or frozen under a logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from device.records import SlimpiError
from device.words import WordSpec
from pipeline.encoders import Encoder, encode_batch, load_encoder
from pipeline.export import onnx
from pipeline.export.onnx_graph import Graph
from pipeline.progress import Tick, quiet
from pipeline.store import digest
from pipeline.tweets.classifiers.base import Classifier, FloatArray, Job, labels
from pipeline.tweets.data import Tweet
from pipeline.tweets.freezing import Evolution, Evolved, search_components
from pipeline.tweets.settings import Settings
from pipeline.tweets.transformer import (
    FineTuned,
    FineTuning,
    components,
    cross_entropy,
    encoder_logits,
    fine_tune,
    tidy_tokenizer,
    tune_encoder,
)

LABELS = ["not a disaster", "disaster"]
MAX_ITERATIONS = 5000
BATCH_SIZE = 64


class TransformerSettings(FineTuning, frozen=True, kw_only=True):
    """trained: as in FineTuning, or "search": an `evolution` finds the components, each tried on the first search_rows
    rows (0 = all) for search_epochs; then these are trained on all. seed: added to the job's, so that an ensemble can
    have the same encoder twice."""

    max_tokens: int = 64
    evolution: Evolution = Evolution()
    search_rows: int = 1000
    search_epochs: int = 1
    seed: int = 0


class EmbeddingSettings(Settings, frozen=True, kw_only=True):
    """c: inverse strengths of the L2 penalty to choose from, on standardized features."""

    max_tokens: int = 64
    c: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    tidy: bool = True


@dataclass(frozen=True)
class EncoderModel:
    """A fine-tuned sequence classifier of two labels."""

    encoder: Encoder
    max_tokens: int
    spec: WordSpec | None = None

    @cached_property
    def tokenizer(self) -> str:
        return onnx.bare_tokenizer(self.encoder.tokenizer).decode()

    def log_odds(self, tweets: Sequence[Tweet]) -> FloatArray:
        logits = encoder_logits(self.encoder, [tweet.text for tweet in tweets], self.max_tokens)
        return logits[:, 1] - logits[:, 0]

    def add_to(self, graph: Graph) -> str:
        logits = graph.embed(onnx.exported(self.encoder.model), "logits", f"{graph.prefix}encoder.")
        no, yes = (graph.constant(np.array([i], np.int64)) for i in (0, 1))
        columns = [graph.add("Gather", [logits, label], axis=1) for label in (yes, no)]
        return graph.add("Sub", columns)


def train_transformer(job: Job, settings: TransformerSettings) -> EncoderModel:
    """Fine-tune an encoder with a head; `trained = "search"` looks for the components to train first."""
    if settings.trained == "search":
        settings = msgspec.structs.replace(settings, trained=", ".join(find_components(job, settings).trained))
    fit = _tune(job, settings, job.tweets, job.progress)
    return EncoderModel(fit.encoder, settings.max_tokens)


def _tune(job: Job, settings: TransformerSettings, tweets: Sequence[Tweet], progress: Tick) -> FineTuned:
    rows, validation = (([t.text for t in part], labels(part).tolist()) for part in (tweets, job.validation))
    return fine_tune(
        _folder(job), rows, validation, LABELS, settings.max_tokens, settings, job.seed + settings.seed, progress
    )


def train_again(
    encoder: Encoder, tweets: Sequence[Tweet], validation: Sequence[Tweet], table: dict[str, Any], seed: int, tick: Tick
) -> tuple[Encoder, dict[str, Any]]:
    """Train on, in place, a trained encoder that has lost parts since: all that is left of it learns, by the settings
    of `table`. The tokenizer stays as it is. The encoder, and its validation losses."""
    settings = msgspec.convert(table, TransformerSettings)
    settings = msgspec.structs.replace(settings, trained="all", tidy=False)
    rows, held = (([t.text for t in part], labels(part).tolist()) for part in (tweets, validation))
    fit = tune_encoder(encoder, rows, held, settings.max_tokens, settings, seed + settings.seed, tick)
    facts = {"validation_losses": [round(x, 4) for x in fit.validation_losses], "best_evaluation": fit.best_evaluation}
    return fit.encoder, facts


def find_components(job: Job, settings: TransformerSettings) -> Evolved:
    """The components whose training gives the least validation loss, by `freezing.search_components`; resumable."""
    names = list(components(load_encoder(_folder(job), LABELS, settings.max_tokens, job.seed).model))
    tweets = job.tweets[: settings.search_rows or None]
    tried = msgspec.structs.replace(settings, epochs=settings.search_epochs)

    def loss(trained: tuple[str, ...]) -> float:
        fit = _tune(job, msgspec.structs.replace(tried, trained=", ".join(trained)), tweets, quiet)
        return min(fit.validation_losses)

    rows = [[t.text, t.target] for t in (*tweets, *job.validation)]
    key = digest([str(job.source), rows, msgspec.to_builtins(tried), job.seed])[:16]
    journal = job.work / "components.jsonl"
    return search_components(names, loss, settings.evolution, job.seed, journal, key, job.progress)


@dataclass(frozen=True)
class Embedder:
    """The mean of an encoder's last hidden states over a text's own tokens; what was computed is kept (`known`), since
    it is the same in all folds."""

    encoder: Encoder
    max_tokens: int
    known: dict[str, FloatArray] = field(default_factory=dict)

    def features(self, texts: Sequence[str], progress: Tick = quiet) -> FloatArray:
        """(n, hidden)."""
        new = sorted({text for text in texts if text not in self.known}, key=len)
        body = self.encoder.model.base_model.eval()
        with torch.inference_mode():
            for start in range(0, len(new), BATCH_SIZE):
                part = new[start : start + BATCH_SIZE]
                batch = encode_batch(self.encoder, part, self.max_tokens)
                states = body(**batch).last_hidden_state
                mask = batch["attention_mask"][:, :, None].to(states.dtype)
                means = ((states * mask).sum(1) / mask.sum(1)).double().numpy()
                self.known.update(zip(part, means, strict=True))
                progress(start + len(part), len(new), "texts")
        return np.stack([self.known[text] for text in texts])


@lru_cache(maxsize=1)
def _embedder(folder: Path, max_tokens: int, tidy: bool) -> Embedder:
    encoder = load_encoder(folder, LABELS, max_tokens)
    if tidy:
        tidy_tokenizer(encoder)
    return Embedder(encoder, max_tokens)


@dataclass(frozen=True)
class EmbeddingModel:
    """Logistic regression on an encoder's mean states, standardization folded into the weights."""

    embedder: Embedder
    weight: FloatArray
    bias: float
    c: float
    spec: WordSpec | None = None

    @property
    def max_tokens(self) -> int:
        return self.embedder.max_tokens

    @cached_property
    def tokenizer(self) -> str:
        return onnx.bare_tokenizer(self.embedder.encoder.tokenizer).decode()

    def log_odds(self, tweets: Sequence[Tweet]) -> FloatArray:
        return self.embedder.features([tweet.text for tweet in tweets]) @ self.weight + self.bias

    def add_to(self, graph: Graph) -> str:
        encoder = self.embedder.encoder
        body = Encoder(encoder.model.base_model, encoder.tokenizer, ())
        states = graph.embed(
            onnx.exported(body.model, "feature-extraction"), "last_hidden_state", f"{graph.prefix}encoder."
        )
        product = graph.add("MatMul", [graph.token_mean(states), graph.weight(self.weight[:, None], "out.weight")])
        return graph.add("Add", [product, graph.constant(self.bias)])


def train_embedding(job: Job, settings: EmbeddingSettings) -> EmbeddingModel:
    """Logistic regression on a frozen encoder's features; C by cross-entropy on the validation rows."""
    from sklearn.linear_model import LogisticRegression

    embedder = _embedder(_folder(job), settings.max_tokens, settings.tidy)
    features, held = (embedder.features([t.text for t in part], job.progress) for part in (job.tweets, job.validation))
    centre, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale == 0] = 1.0
    best: tuple[float, EmbeddingModel] | None = None
    for c in settings.c:
        fit = LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit((features - centre) / scale, labels(job.tweets))
        weight = fit.coef_[0] / scale
        bias = float(fit.intercept_[0] - weight @ centre)
        z = held @ weight + bias
        loss = cross_entropy(np.stack([-z / 2, z / 2], axis=1), labels(job.validation))
        if best is None or loss < best[0]:
            best = loss, EmbeddingModel(embedder, weight, bias, c)
    if best is None:
        raise SlimpiError("`c` is empty. Name at least one, such as 0.01.")
    return best[1]


def _folder(job: Job) -> Path:
    if job.source is None or not (job.source / "config.json").is_file():
        raise SlimpiError(f"{job.source} is no folder of an encoder. Name one as the source.")
    return job.source


TRANSFORMER = Classifier(TransformerSettings, train_transformer, layered=True)
EMBEDDINGS = Classifier(EmbeddingSettings, train_embedding, layered=True)

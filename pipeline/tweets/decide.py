"""From labelled tweets to a classifier that decides: training, calibration, threshold, and the exported folder.

The threshold is folded into the logits' bias: softmax of the exported logits is 0.5 where the calibrated probability is
the threshold, so that the device's argmax is the decision. The calibrated probability of label 1 is
sigmoid(logits[1] - logits[0] + logit(threshold)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from device.records import SlimpiError, encode, write_atomic
from device.schema import DISTANCE, WORDS
from device.words import INPUTS, Text, WordReader, WordSpec
from pipeline.encoders import load_encoder
from pipeline.export.onnx_graph import Graph, Output
from pipeline.progress import Tick, quiet
from pipeline.tweets.calibration import Calibration, calibrate, logit
from pipeline.tweets.classifiers import CLASSIFIERS, settings_of
from pipeline.tweets.classifiers.base import FloatArray, Job, Trained, labels
from pipeline.tweets.classifiers.encoder import LABELS
from pipeline.tweets.data import Tweet, split
from pipeline.tweets.outliers import MAX_TWEETS, Outliers, add_features, check_layers, fit_outliers

N_COMPARED = 24
BATCH_SIZE = 64
EXPORT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Decider:
    """A trained classifier, its calibration, and the validation tweets that the latter was chosen on. outliers: how its
    graph tells which texts are unlike those it learned from, if it does."""

    model: Trained
    calibration: Calibration
    validation: Sequence[Tweet]
    outliers: Outliers | None = None

    def logits(self, tweets: Sequence[Tweet]) -> FloatArray:
        """(n, 2), as the exported graph gives them."""
        margins = self.calibration.margins(self.model.log_odds(tweets))
        return np.stack([-margins / 2, margins / 2], axis=1)

    def export(self, folder: Path) -> Path:
        """Write folder/model.onnx, and words.json and tokenizer.json where the classifier reads them.

        The file is run on validation tweets and compared. SlimpiError if it computes something else.
        """
        graph = Graph(self.model.spec)
        log_odds = self.model.add_to(graph)
        scaled = graph.add("Div", [log_odds, graph.constant(self.calibration.temperature)])
        shifted = graph.add("Sub", [scaled, graph.constant(float(logit(self.calibration.threshold)))])
        logits = graph.add("Mul", [shifted, graph.constant([[-0.5, 0.5]])])
        others = {}
        if self.outliers:
            distance = self.outliers.add_to(graph, add_features(graph))
            others[DISTANCE] = Output(distance, ("texts",))
        made = graph.finish(logits, others)
        _compare(made, self, self.validation[:N_COMPARED])
        folder.mkdir(parents=True, exist_ok=True)
        if self.model.spec:
            write_atomic(folder / WORDS, encode(self.model.spec))
        if self.model.tokenizer:
            write_atomic(folder / "tokenizer.json", self.model.tokenizer.encode())
        write_atomic(folder / "model.onnx", made.SerializeToString())
        return folder / "model.onnx"


def train_decider(
    name: str,
    table: dict[str, Any],
    tweets: Sequence[Tweet],
    source: Path | None,
    cache: Path,
    work: Path,
    seed: int = 0,
    validation_share: float = 0.1,
    threshold: str = "f1",
    outliers: bool = False,
    progress: Tick = quiet,
) -> Decider:
    """Train a classifier of CLASSIFIERS on tweets, of which a share is held out to stop, calibrate and decide by.

    table: its settings; source: the folder of its encoder, if it has one; cache: where word vectors are kept; work:
    where a search is, to go on from; outliers: whether the graph tells how far a text is from those it learned from.
    The same arguments give the same classifier. SlimpiError for unknown names and settings, tweets that cannot be
    split, and a classifier that has no such distance.
    """
    settings = settings_of(name, table)
    if outliers and not CLASSIFIERS[name].layered:
        known = ", ".join(other for other, entry in CLASSIFIERS.items() if entry.layered)
        raise SlimpiError(f"{name} has no layers of an encoder for `outliers`. Leave it out, or take one of {known}.")
    if outliers and source:
        check_layers(load_encoder(source, LABELS, 3))
    parts = split(tweets, validation_share, seed)
    train, held = ([tweets[i] for i in part] for part in (parts.train, parts.test))
    job = Job(train, held, source, cache, work, seed, progress)
    model = CLASSIFIERS[name].train(job, settings)
    return decide(model, held, threshold, train if outliers else ())


def decide(model: Trained, validation: Sequence[Tweet], threshold: str, learned_from: Sequence[Tweet] = ()) -> Decider:
    """learned_from: tweets from which the graph shall tell distances, none = it tells none."""
    found = None
    if learned_from:
        some = learned_from[:MAX_TWEETS]
        features = _features(model, [*some, *validation])
        found = fit_outliers(features[: len(some)], features[len(some) :])
    return Decider(model, calibrate(model.log_odds(validation), labels(validation), threshold), validation, found)


def _features(model: Trained, tweets: Sequence[Tweet]) -> FloatArray:
    """(n, d) of the middle layer, by the graph that is exported."""
    graph = Graph(model.spec)
    log_odds = model.add_to(graph)
    features = Output(add_features(graph), ("texts", "features"))
    session = _session(graph.finish(graph.add("Concat", [log_odds, log_odds], axis=1), {"features": features}))
    parts = []
    for start in range(0, len(tweets), BATCH_SIZE):
        feeds = feeds_of(model.spec, model.tokenizer, model.max_tokens, tweets[start : start + BATCH_SIZE])
        parts += session.run(["features"], {value.name: feeds[value.name] for value in session.get_inputs()})
    return np.concatenate(parts).astype(np.float64)


def _session(model: Any) -> Any:
    import onnxruntime

    from pipeline.export.onnx import one_thread

    return onnxruntime.InferenceSession(model.SerializeToString(), one_thread(), providers=["CPUExecutionProvider"])


def feeds_of(spec: WordSpec | None, tokenizer: str, max_tokens: int, tweets: Sequence[Tweet]) -> dict[str, Any]:
    """Every input that a graph may ask for, of one batch, as the device makes them."""
    feeds: dict[str, npt.NDArray[Any]] = {}
    if spec:
        feeds |= WordReader(spec).feeds([Text(t.text, t.keyword) for t in tweets], list(INPUTS))
    if tokenizer:
        feeds |= _tokens(tokenizer, max_tokens, [t.text for t in tweets])
    return feeds


def _tokens(tokenizer: str, max_tokens: int, texts: Sequence[str]) -> dict[str, npt.NDArray[np.int64]]:
    from tokenizers import Tokenizer

    ready = Tokenizer.from_str(tokenizer)
    ready.enable_truncation(max_tokens)
    encoded = ready.encode_batch(list(texts))
    length = max(len(e.ids) for e in encoded)
    ids, mask = (np.zeros((len(texts), length), np.int64) for _ in range(2))
    for row, e in enumerate(encoded):  # the padding's id does not matter: the mask hides it
        ids[row, : len(e.ids)], mask[row, : len(e.ids)] = e.ids, 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def _compare(made: Any, decider: Decider, tweets: Sequence[Tweet]) -> None:
    """Run the graph on a batch of mixed lengths and on one tweet alone."""
    session = _session(made)
    names = [entry.name for entry in session.get_inputs()]
    model = decider.model
    for batch in (tweets, tweets[:1]):
        feeds = feeds_of(model.spec, model.tokenizer, model.max_tokens, batch)
        found = session.run(["logits"], {name: feeds[name] for name in names})[0]
        expected = decider.logits(batch)
        worst = float(np.abs(found - expected).max())
        if not worst <= EXPORT_TOLERANCE * max(1.0, float(np.abs(expected).max())):
            raise SlimpiError(f"the exported classifier is off by {worst:.3g}. Report it with your recipe.")

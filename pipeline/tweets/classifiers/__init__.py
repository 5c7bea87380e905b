"""CLASSIFIERS: how labelled tweets become a classifier, one entry a kind."""

from __future__ import annotations

from typing import Any

import msgspec

from device.schema import SlimpiError
from pipeline.tweets.classifiers.base import Classifier
from pipeline.tweets.classifiers.encoder import EMBEDDINGS, TRANSFORMER
from pipeline.tweets.classifiers.ensemble import ENSEMBLE
from pipeline.tweets.classifiers.lstm import LSTM
from pipeline.tweets.classifiers.mlp import MLP
from pipeline.tweets.classifiers.multi_input import MULTI_INPUT
from pipeline.tweets.classifiers.tfidf import TFIDF
from pipeline.tweets.settings import Settings

CLASSIFIERS: dict[str, Classifier] = {
    "lstm": LSTM,
    "multi-input": MULTI_INPUT,
    "mlp": MLP,
    "tfidf": TFIDF,
    "embeddings": EMBEDDINGS,
    "transformer": TRANSFORMER,
    "ensemble": ENSEMBLE,
}


def settings_of(name: str, table: dict[str, Any]) -> Settings:
    """The typed settings of a classifier. SlimpiError for an unknown name, key or value."""
    if name not in CLASSIFIERS:
        raise SlimpiError(f"unknown classifier {name!r}. Known: {', '.join(CLASSIFIERS)}.")
    try:
        return msgspec.convert(table, CLASSIFIERS[name].settings)
    except msgspec.ValidationError as error:
        raise SlimpiError(f"settings of classifier {name}: {error}. See docs/tweets.md.") from error

"""CLASSIFIERS: how labelled tweets become a classifier, one entry a kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from device.records import SlimpiError
from pipeline.tweets.classifiers.base import Classifier
from pipeline.tweets.classifiers.encoder import EMBEDDINGS, TRANSFORMER
from pipeline.tweets.classifiers.ensemble import ENSEMBLE, EnsembleSettings
from pipeline.tweets.classifiers.lstm import LSTM
from pipeline.tweets.classifiers.mlp import MLP
from pipeline.tweets.classifiers.multi_input import MULTI_INPUT
from pipeline.tweets.classifiers.tfidf import TFIDF
from pipeline.tweets.embeddings import NAMED
from pipeline.tweets.settings import Settings
from pipeline.tweets.transformer import FineTuning

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
        raise SlimpiError(f"settings of classifier {name}: {error}. See docs/classifiers.md.") from error


def on_this_machine(name: str, table: dict[str, Any]) -> dict[str, Any]:
    """The settings with what "auto" is here, members' included: what a training is known by."""
    settings = settings_of(name, table)
    found: dict[str, Any] = msgspec.to_builtins(settings)
    if isinstance(settings, FineTuning):
        found["precision"] = settings.products
    if isinstance(settings, EnsembleSettings):
        for member, told in zip(settings.members, found["members"], strict=True):
            told["settings"] = on_this_machine(member.classifier, member.settings)
    return found


def with_max_tokens(name: str, table: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """The table with the recipe's max_tokens, which the device cuts at, for a classifier that reads tokens."""
    if name == "ensemble" and isinstance(members := table.get("members"), list):
        return table | {"members": [_member_with(member, max_tokens) for member in members]}
    known = {field.name for field in msgspec.structs.fields(CLASSIFIERS[name].settings)} if name in CLASSIFIERS else ()
    return table | {"max_tokens": max_tokens} if "max_tokens" in known else table


def _member_with(member: Any, max_tokens: int) -> Any:
    if not isinstance(member, dict):
        return member  # refused by settings_of, which knows how to say it
    name = str(member.get("classifier", ""))
    return member | {"settings": with_max_tokens(name, member.get("settings", {}), max_tokens)}


def vector_files(table: dict[str, Any]) -> list[Path]:
    """Files of word vectors that a settings table names, members' included: their content is part of what is built."""
    members = table.get("members", [])
    inner = [m.get("settings", {}) for m in members if isinstance(m, dict)] if isinstance(members, list) else []
    names = [name for part in (table, *inner) if isinstance(part, dict) for name in part.get("vectors", [])]
    paths = [Path(str(name).removeprefix("path:")).expanduser() for name in names if str(name) not in NAMED]
    return [path for path in paths if path.exists()]

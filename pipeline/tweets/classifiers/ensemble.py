"""Several classifiers on the same tweets: the mean of their calibrated probabilities, as one graph.

Members that read words share the cleaning; their vocabularies are joined and each finds its own rows by a lookup. At
most one tokenizer: members that read tokens must have the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import msgspec
import numpy as np

from device.records import SlimpiError
from device.words import WordSpec
from pipeline.export.onnx_graph import Graph
from pipeline.tweets import calibration
from pipeline.tweets.classifiers.base import Classifier, FloatArray, Job, Trained, labels
from pipeline.tweets.data import Tweet
from pipeline.tweets.settings import Settings


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One of CLASSIFIERS with its settings."""

    classifier: str
    settings: dict[str, Any] = {}
    weight: float = 1.0


class EnsembleSettings(Settings, frozen=True, kw_only=True):
    members: list[Member]

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise ValueError("an ensemble needs two `members` at least")
        if any(not 0 < member.weight < 1e6 for member in self.members):
            raise ValueError("a member's `weight` is greater than 0")


@dataclass(frozen=True)
class EnsembleModel:
    """Trained members with their temperatures and weights (which sum to 1)."""

    members: tuple[Trained, ...]
    temperatures: tuple[float, ...]
    weights: tuple[float, ...]
    spec: WordSpec | None
    tokenizer: str
    max_tokens: int

    def log_odds(self, tweets: Sequence[Tweet]) -> FloatArray:
        return mean_log_odds([m.log_odds(tweets) for m in self.members], self.temperatures, self.weights)

    def add_to(self, graph: Graph) -> str:
        outer, terms = graph.prefix, []
        for i, (member, t, weight) in enumerate(zip(self.members, self.temperatures, self.weights, strict=True)):
            graph.prefix = f"{outer}member{i}."
            scaled = graph.add("Div", [member.add_to(graph), graph.constant(t)])
            terms.append(graph.add("Mul", [graph.add("Sigmoid", [scaled]), graph.constant(weight)]))
        graph.prefix = outer
        p = graph.add("Sum", terms)
        # log p(1) / p(0); the bounds keep it finite and are those of mean_log_odds
        p = graph.add("Clip", [p, graph.constant(BOUND), graph.constant(1 - BOUND)])
        rest = graph.add("Sub", [graph.constant(1.0), p])
        return graph.add("Log", [graph.add("Div", [p, rest])])


BOUND = 1e-6


def mean_log_odds(
    log_odds: Sequence[FloatArray], temperatures: Sequence[float], weights: Sequence[float]
) -> FloatArray:
    """(n,) log-odds of the weighted mean of the calibrated probabilities."""
    p = sum(w * calibration.sigmoid(z / t) for z, t, w in zip(log_odds, temperatures, weights, strict=True))
    return calibration.logit(np.clip(p, BOUND, 1 - BOUND))


def train(job: Job, settings: EnsembleSettings) -> EnsembleModel:
    """Train each member, fit its temperature on the validation rows, and average their log-odds by weight."""
    from pipeline.tweets.classifiers import CLASSIFIERS, settings_of

    members, temperatures = [], []
    for member in settings.members:
        if member.classifier == "ensemble":
            raise SlimpiError("an ensemble's member cannot be an ensemble. Name its members instead.")
        chosen = settings_of(member.classifier, member.settings)
        trained = CLASSIFIERS[member.classifier].train(job, chosen)
        members.append(trained)
        temperatures.append(calibration.fit_temperature(trained.log_odds(job.validation), labels(job.validation)))
    return combine(members, temperatures, [member.weight for member in settings.members])


def combine(members: Sequence[Trained], temperatures: Sequence[float], weights: Sequence[float]) -> EnsembleModel:
    """SlimpiError if the members read texts in ways that do not fit together."""
    specs = [member.spec for member in members if member.spec]
    tokens = {(member.tokenizer, member.max_tokens) for member in members if member.tokenizer}
    if len(tokens) > 1:
        raise SlimpiError("members have different tokenizers or max_tokens. Give them the same encoder and max_tokens.")
    tokenizer, max_tokens = tokens.pop() if tokens else ("", 0)
    total = sum(weights)
    return EnsembleModel(
        tuple(members),
        tuple(temperatures),
        tuple(w / total for w in weights),
        reduce(_join, specs) if specs else None,
        tokenizer,
        max_tokens,
    )


def _join(a: WordSpec, b: WordSpec) -> WordSpec:
    for name in ("steps", "stopwords", "max_words"):
        if getattr(a, name) != getattr(b, name):
            raise SlimpiError(f"members clean texts differently: {name} {getattr(a, name)} and {getattr(b, name)}.")
    return WordSpec(
        steps=a.steps,
        vocabulary=list(dict.fromkeys([*a.vocabulary, *b.vocabulary])),
        max_words=a.max_words,
        stopwords=a.stopwords,
        keywords=tuple(dict.fromkeys([*a.keywords, *b.keywords])),
        numbers=tuple(dict.fromkeys([*a.numbers, *b.numbers])),
        ngrams=max(a.ngrams, b.ngrams),
    )


ENSEMBLE = Classifier(EnsembleSettings, train)

"""TF-IDF of words and word pairs, logistic regression: the baseline that networks have to beat.

A term's weight is (1 + log count) * idf with idf = log((1 + n) / (1 + df)) + 1, and a text's weights have L2 norm 1:
scikit-learn's TfidfVectorizer with sublinear_tf. C is chosen on the validation tweets' loss. Terms of characters are
left out: the device has no inputs for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse

from device.records import SlimpiError
from device.words import UNKNOWN, ReadText, WordReader, WordSpec
from pipeline.export.onnx_graph import Graph
from pipeline.tweets.classifiers.base import (
    PADDING_WORD,
    UNKNOWN_WORD,
    Classifier,
    FloatArray,
    Job,
    WordSettings,
    labels,
    texts,
    vocabulary,
)
from pipeline.tweets.data import Tweet

MAX_ITERATIONS = 2000


class TfidfSettings(WordSettings, frozen=True, kw_only=True):
    """ngrams: longest term in words; min_count: texts a term must occur in; c: inverse strengths of the L2 penalty to
    choose from."""

    min_count: int = 2
    ngrams: int = 2
    c: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class TfidfModel:
    """idf and coefficient (n_vocabulary,) of each term, zero for padding and unknown, and the bias."""

    spec: WordSpec
    idf: FloatArray
    coefficient: FloatArray
    bias: float
    c: float
    tokenizer: str = ""
    max_tokens: int = 0

    @cached_property
    def reader(self) -> WordReader:
        return WordReader(self.spec)

    def log_odds(self, tweets: Sequence[Tweet]) -> FloatArray:
        features = _features(self.reader.read(texts(tweets)), self.idf)
        return np.asarray(features @ self.coefficient + self.bias)

    def add_to(self, graph: Graph) -> str:
        ids = graph.ids("term_ids", self.spec.vocabulary, unknown=0)
        idf, coefficient = (
            graph.add("Gather", [graph.weight(values, name), ids], axis=0)
            for values, name in ((self.idf, "tfidf.idf"), (self.coefficient, "tfidf.coefficient"))
        )
        one, axis = graph.constant(1.0), graph.constant(np.array([1], np.int64))
        # Padding has count 0: at least 1 keeps the logarithm finite, and its idf of zero takes it out.
        count = graph.add("Max", [graph.input("term_counts"), one])
        weight = graph.add("Mul", [graph.add("Add", [graph.add("Log", [count]), one]), idf])
        norm = graph.add("ReduceL2", [weight, axis], keepdims=1)
        total = graph.add("ReduceSum", [graph.add("Mul", [weight, coefficient]), axis], keepdims=1)
        scaled = graph.add("Div", [total, graph.add("Max", [norm, graph.constant(1e-6)])])
        return graph.add("Add", [scaled, graph.constant(self.bias)])


def _features(rows: Sequence[ReadText], idf: FloatArray) -> scipy.sparse.csr_matrix:
    """(n, n_vocabulary) weights of unit norm; a text without known terms is a row of zeros."""
    from sklearn.preprocessing import normalize

    pairs = [(i, term, count) for i, row in enumerate(rows) for term, count in row.terms.items()]
    at, term, count = (np.array(column) for column in zip(*pairs, strict=True)) if pairs else (np.zeros(0, int),) * 3
    values = (1 + np.log(np.maximum(count, 1))) * idf[term]
    matrix = scipy.sparse.csr_matrix((values, (at, term)), shape=(len(rows), len(idf)))
    return normalize(matrix)


def _terms(settings: TfidfSettings, tweets: Sequence[Tweet]) -> Counter[str]:
    """In how many texts each n-gram occurs."""
    reader = WordReader(
        WordSpec(steps=settings.steps, vocabulary=[PADDING_WORD, UNKNOWN_WORD], max_words=settings.max_words)
    )
    found: Counter[str] = Counter()
    for tweet in tweets:
        words = reader.words(tweet.text)
        spans = range(1, settings.ngrams + 1)
        found.update({" ".join(words[i : i + n]) for n in spans for i in range(len(words) - n + 1)})
    return found


def train(job: Job, settings: TfidfSettings) -> TfidfModel:
    """Logistic regression on TF-IDF of words and n-grams. SlimpiError if no term is frequent enough."""
    from sklearn.linear_model import LogisticRegression

    from pipeline.tweets.transformer import cross_entropy

    document_counts = _terms(settings, job.tweets)
    words = vocabulary(document_counts, settings.min_count)
    if len(words) == 2:
        raise SlimpiError(f"no term occurs in {settings.min_count} tweets. Use more rows or a smaller min_count.")
    spec = WordSpec(steps=settings.steps, vocabulary=words, max_words=settings.max_words, ngrams=settings.ngrams)
    idf = np.zeros(len(words))
    known = np.array([document_counts[word] for word in words[UNKNOWN + 1 :]])
    idf[UNKNOWN + 1 :] = np.log((1 + len(job.tweets)) / (1 + known)) + 1
    reader = WordReader(spec)
    rows = _features(reader.read(texts(job.tweets)), idf)
    best: tuple[float, TfidfModel] | None = None
    for done, c in enumerate(settings.c, start=1):
        fit = LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit(rows, labels(job.tweets))
        model = TfidfModel(spec, idf, fit.coef_[0], float(fit.intercept_[0]), c)
        log_odds = model.log_odds(job.validation)
        loss = cross_entropy(np.stack([-log_odds / 2, log_odds / 2], axis=1), labels(job.validation))
        job.progress(done, len(settings.c), f"C, validation loss {loss:.4f}")
        if best is None or loss < best[0]:
            best = loss, model
    if best is None:
        raise SlimpiError("`c` is empty. Name at least one, such as 1.0.")
    return best[1]


TFIDF = Classifier(TfidfSettings, train, needs_source=False)

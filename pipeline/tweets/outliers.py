"""How far a text lies from those that a classifier learned from: a Mahalanobis distance, told beside the logits.

A classifier answers any text, a recipe or a line of code too, and often with confidence. The distance is that of what
its last layer reads, as Lee et al. 2018 (A Simple Unified Framework for Detecting Out-of-Distribution Samples, eq. 2)
define it: squared, to the nearest label's mean, under one covariance within the labels. The covariance is Ledoit and
Wolf's shrunk estimate; the distance is divided by what QUANTILE of the held-out tweets stay within, so that above 1
means farther than 95 % of tweets like those it learned from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from device.schema import SlimpiError
from pipeline.export.onnx_graph import Graph
from pipeline.tweets.classifiers.base import FloatArray, IntArray

QUANTILE = 0.95
MAX_FEATURES = 1024
MAX_TWEETS = 2000
"""Training tweets that the covariance is taken from."""


@dataclass(frozen=True)
class Outliers:
    """means (labels, d); root (d, d): root @ root.T is the inverse covariance; unit: the squared distance that counts
    as 1."""

    means: FloatArray
    root: FloatArray
    unit: float

    def distances(self, features: FloatArray) -> FloatArray:
        """(n,) of features (n, d)."""
        apart = ((features[:, None] - self.means) @ self.root) ** 2
        return np.asarray(apart.sum(-1).min(-1) / self.unit)

    def add_to(self, graph: Graph, features: str) -> str:
        """The same in a graph. Constants, no weights: no INT8 form quantizes them."""
        axis = graph.constant(np.array([1], np.int64))
        white = graph.add("MatMul", [features, graph.constant(self.root)])
        squares = []
        for mean in self.means @ self.root:
            apart = graph.add("Sub", [white, graph.constant(mean)])
            squares.append(graph.add("ReduceSum", [graph.add("Mul", [apart, apart]), axis], keepdims=0))
        return graph.add("Div", [graph.add("Min", squares), graph.constant(self.unit)])


def fit_outliers(features: FloatArray, targets: IntArray, held: FloatArray) -> Outliers:
    """From the features (n, d) of training tweets with their labels, and those of held-out tweets."""
    from sklearn.covariance import LedoitWolf

    means = np.stack([features[targets == label].mean(0) for label in (0, 1)])
    found = LedoitWolf(assume_centered=True).fit(features - means[targets])
    raw = Outliers(means, np.linalg.cholesky(found.precision_), 1.0)
    return Outliers(raw.means, raw.root, float(np.quantile(raw.distances(held), QUANTILE)))


def features_in(graph: Graph, log_odds: str) -> str:
    """The tensor (n, d) that the last layer multiplies; SlimpiError if it is not one layer, or d is large."""
    makers = {name: node for node in graph.nodes for name in node.output}
    found, seen, waiting = set[str](), set[str](), [log_odds]
    while waiting:
        name = waiting.pop()
        node = makers.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in graph.weights:
            weight = graph.weights[node.input[1]]
            found.add(node.input[0] if max(weight.dims) <= MAX_FEATURES else "")
        else:
            waiting.extend(node.input)
    if len(found) != 1 or "" in found:
        raise SlimpiError(f"`outliers` needs one last layer, of at most {MAX_FEATURES} features. Leave it out.")
    return found.pop()

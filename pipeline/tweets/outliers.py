"""How far a text lies from those that a classifier learned from: a Mahalanobis distance, told beside the logits.

A classifier answers any text, a recipe or a line of code too, and often with confidence. The distance (Lee et al. 2018,
A Simple Unified Framework for Detecting Out-of-Distribution Samples, section 2.1) is squared, from the mean of the
training tweets under their covariance as Ledoit and Wolf shrink it, of the mean state behind an encoder's middle layer:
its last layers know little but the two labels, so that a novel is as near to "no disaster" as a tweet is. It is divided
by what QUANTILE of the held-out tweets stay within: above 1 is farther than 95 % of tweets like those it learned from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from device.records import SlimpiError
from pipeline.encoders import Encoder
from pipeline.export.onnx_graph import Graph
from pipeline.tweets.classifiers.base import FloatArray

QUANTILE = 0.95
MAX_TWEETS = 2000
"""Training tweets that the covariance is taken from."""


@dataclass(frozen=True)
class Outliers:
    """mean (d,); root (d, d): root @ root.T is the inverse covariance; unit: the squared distance that counts as 1."""

    mean: FloatArray
    root: FloatArray
    unit: float

    def distances(self, features: FloatArray) -> FloatArray:
        """(n,) of features (n, d)."""
        return np.asarray((((features - self.mean) @ self.root) ** 2).sum(-1) / self.unit)

    def add_to(self, graph: Graph, features: str) -> str:
        """The same in a graph. Constants, no weights: no INT8 form quantizes them."""
        axis = graph.constant(np.array([1], np.int64))
        apart = graph.add("Sub", [features, graph.constant(self.mean)])
        white = graph.add("MatMul", [apart, graph.constant(self.root)])
        squared = graph.add("ReduceSum", [graph.add("Mul", [white, white]), axis], keepdims=0)
        return graph.add("Div", [squared, graph.constant(self.unit)])


def fit_outliers(features: FloatArray, held: FloatArray) -> Outliers:
    """From the features (n, d) of training tweets, and those of held-out ones."""
    from sklearn.covariance import LedoitWolf

    found = LedoitWolf().fit(features)
    raw = Outliers(found.location_, np.linalg.cholesky(found.precision_), 1.0)
    return Outliers(raw.mean, raw.root, float(np.quantile(raw.distances(held), QUANTILE)))


def check_layers(encoder: Encoder) -> None:
    """SlimpiError, before anything is trained, for an encoder whose layers `add_features` will not tell."""
    _middle(sum(isinstance(module, torch.nn.LayerNorm) for module in encoder.model.base_model.modules()))


def add_features(graph: Graph) -> str:
    """The mean over a text's tokens of the states behind the middle layer of the graph's encoder: (n, d).

    Layers are told by their LayerNorms: one behind the embeddings, two in each. SlimpiError if there are others.
    """
    norms = [node.output[0] for node in graph.nodes if node.op_type == "LayerNormalization"]
    return graph.token_mean(norms[_middle(len(norms))])


def _middle(n_norms: int) -> int:
    if n_norms < 3 or n_norms % 2 == 0:
        raise SlimpiError(f"`outliers` cannot tell the layers of an encoder with {n_norms} LayerNorms. Leave it out.")
    return 2 * ((n_norms - 1) // 4)

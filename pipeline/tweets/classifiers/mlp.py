"""Dense 64 -> 32 with dropout on the mean of a tweet's word vectors (the report's third network, on spaCy's)."""

from __future__ import annotations

import numpy as np
import torch

from device.words import WordReader, WordSpec
from pipeline.export.onnx_graph import Graph
from pipeline.tweets.classifiers.base import Classifier, Job, texts
from pipeline.tweets.classifiers.word_nets import (
    Feeds,
    NetSettings,
    WordModel,
    WordNet,
    Words,
    add_lengths,
    train_net,
    vectors_for,
    word_lengths,
)


class MlpSettings(NetSettings, frozen=True, kw_only=True):
    """hidden: units of the two dense layers; l2: of both layers' weights. word_dropout: share of a tweet's words that
    the mean leaves out while it learns (Iyyer et al. 2015, Deep Averaging Networks, section 3)."""

    hidden: tuple[int, int] = (64, 32)
    dropout: float = 0.5
    word_dropout: float = 0.0
    epochs: int = 40
    patience: int = 5


class MlpNet(WordNet):
    """The means are standardized by `scaling`: mean and standard deviation (2, d) over the training tweets."""

    scaling: torch.Tensor

    def __init__(self, table: torch.Tensor, settings: MlpSettings) -> None:
        super().__init__()
        self.words = Words(table, settings.train_vectors)
        sizes = [table.shape[1], *settings.hidden]
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(before, size) for before, size in zip(sizes, settings.hidden, strict=False)
        )
        self.out = torch.nn.Linear(sizes[-1], 1)
        self.dropout = torch.nn.Dropout(settings.dropout)
        self.word_dropout = settings.word_dropout
        self.l2 = settings.l2
        self.register_buffer("scaling", torch.stack([torch.zeros(sizes[0]), torch.ones(sizes[0])]))

    def means(self, ids: torch.Tensor) -> torch.Tensor:
        """(n, d) mean vectors of the words; while it learns of those that word dropout leaves, the first at least."""
        if self.training and self.word_dropout:
            left = torch.rand(ids.shape, device=ids.device) >= self.word_dropout
            left[:, 0] |= ~(left & (ids != 0)).any(1)
            ids = ids * left
        return self.words(ids).sum(1) / word_lengths(ids)[:, None]

    def forward(self, feeds: Feeds) -> torch.Tensor:
        ids = feeds["word_ids"]
        mean, sd = self.scaling
        x = (self.means(ids) - mean) / sd
        for layer in self.layers:
            x = self.dropout(torch.relu(layer(x)))
        return self.out(x).squeeze(1)

    def penalty(self) -> torch.Tensor:
        return self.l2 * torch.stack([p.square().sum() for p in self.layers.parameters() if p.ndim == 2]).sum()

    def add_to(self, graph: Graph, spec: WordSpec) -> str:
        ids = graph.ids("word_ids", spec.vocabulary)
        total = graph.add(
            "ReduceSum", [self.words.add_to(graph, ids), graph.constant(np.array([1], np.int64))], keepdims=0
        )
        means = graph.add("Div", [total, graph.add("Cast", [add_lengths(graph, ids)], to=1)])
        mean, sd = self.scaling.numpy()
        x = graph.add("Div", [graph.add("Sub", [means, graph.constant(mean)]), graph.constant(sd)])
        for i, layer in enumerate(self.layers):
            x = graph.add("Relu", [graph.linear(x, layer, f"layers.{i}")])
        return graph.linear(x, self.out, "out")


def train(job: Job, settings: MlpSettings) -> WordModel:
    words, table = vectors_for(job, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        net = MlpNet(table, settings)
    spec = WordSpec(steps=settings.steps, vocabulary=words, max_words=settings.max_words)
    with torch.inference_mode():
        ids = WordReader(spec).feeds(texts(job.tweets), ["word_ids"])["word_ids"]
        means = net.means(torch.from_numpy(ids))
        net.scaling.copy_(torch.stack([means.mean(0), means.std(0).clamp(min=1e-6)]))
    return train_net(net, spec, job, settings)


MLP = Classifier(MlpSettings, train, needs_source=False)

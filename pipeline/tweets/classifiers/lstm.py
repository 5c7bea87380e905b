"""LSTM 64 -> LSTM 32 -> dense 32 ReLU (L2) -> sigmoid on word vectors (the disaster-tweets report's first network)."""

from __future__ import annotations

import torch

from device.words import WordSpec
from pipeline.export.onnx_graph import Graph
from pipeline.tweets.classifiers.base import Classifier, Job
from pipeline.tweets.classifiers.word_nets import (
    Feeds,
    LstmStack,
    NetSettings,
    WordModel,
    WordNet,
    Words,
    add_lengths,
    train_net,
    vectors_for,
    word_lengths,
)


class LstmSettings(NetSettings, frozen=True, kw_only=True):
    """hidden: units of the two LSTMs, a direction; dense: units of the layer behind them."""

    hidden: tuple[int, int] = (64, 32)
    dense: int = 32
    recurrent_dropout: float = 0.01
    bidirectional: bool = False


class LstmNet(WordNet):
    def __init__(self, table: torch.Tensor, settings: LstmSettings) -> None:
        super().__init__()
        self.words = Words(table, settings.train_vectors)
        self.lstm = LstmStack(
            table.shape[1], settings.hidden, settings.dropout, settings.recurrent_dropout, settings.bidirectional
        )
        self.dense = torch.nn.Linear(self.lstm.out_features, settings.dense)
        self.out = torch.nn.Linear(settings.dense, 1)
        self.l2 = settings.l2

    def forward(self, feeds: Feeds) -> torch.Tensor:
        ids = feeds["word_ids"]
        x = self.lstm(self.words(ids), word_lengths(ids))
        return self.out(torch.relu(self.dense(x))).squeeze(1)

    def penalty(self) -> torch.Tensor:
        return self.l2 * self.dense.weight.square().sum()

    def add_to(self, graph: Graph, spec: WordSpec) -> str:
        ids = graph.ids("word_ids", spec.vocabulary)
        x = self.lstm.add_to(graph, self.words.add_to(graph, ids), add_lengths(graph, ids))
        return graph.linear(graph.add("Relu", [graph.linear(x, self.dense, "dense")]), self.out, "out")


def train(job: Job, settings: LstmSettings) -> WordModel:
    words, table = vectors_for(job, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        net = LstmNet(table, settings)
    return train_net(net, WordSpec(steps=settings.steps, vocabulary=words, max_words=settings.max_words), job, settings)


LSTM = Classifier(LstmSettings, train, needs_source=False)

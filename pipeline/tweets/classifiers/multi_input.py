"""The LSTMs of lstm.py beside a learnable keyword embedding and two numbers, concatenated into a dense layer of 16 (the
report's second network)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from device.text import NUMBERS
from device.words import WordSpec, plain_keyword
from pipeline.export.onnx_graph import Graph
from pipeline.tweets.classifiers.base import Classifier, Job
from pipeline.tweets.classifiers.lstm import LstmSettings
from pipeline.tweets.classifiers.word_nets import (
    Feeds,
    LstmStack,
    WordModel,
    WordNet,
    Words,
    add_lengths,
    train_net,
    vectors_for,
    word_lengths,
)
from pipeline.tweets.data import Tweet


class MultiInputSettings(LstmSettings, frozen=True, kw_only=True):
    """keyword_width: of the keyword embedding; numbers: of device.text.NUMBERS, each a branch of `branch` units."""

    dense: int = 16
    keyword_width: int = 8
    numbers: tuple[str, ...] = ("punctuation_count", "mean_word_length")
    branch: int = 4


class MultiInputNet(WordNet):
    """scaling: mean and standard deviation (2, k) of the numbers over the training tweets; part of the graph."""

    inputs = ("word_ids", "keyword_ids", "numbers")
    scaling: torch.Tensor

    def __init__(
        self, table: torch.Tensor, n_keywords: int, scaling: torch.Tensor, settings: MultiInputSettings
    ) -> None:
        super().__init__()
        self.words = Words(table, settings.train_vectors)
        self.lstm = LstmStack(
            table.shape[1], settings.hidden, settings.dropout, settings.recurrent_dropout, settings.bidirectional
        )
        self.keywords = torch.nn.Embedding(n_keywords + 1, settings.keyword_width)
        self.branches = torch.nn.ModuleList(torch.nn.Linear(1, settings.branch) for _ in settings.numbers)
        width = self.lstm.out_features + settings.keyword_width + settings.branch * len(settings.numbers)
        self.dense = torch.nn.Linear(width, settings.dense)
        self.out = torch.nn.Linear(settings.dense, 1)
        self.dropout = torch.nn.Dropout(settings.dropout)
        self.register_buffer("scaling", scaling)
        self.l2, self.names = settings.l2, settings.numbers

    def forward(self, feeds: Feeds) -> torch.Tensor:
        ids = feeds["word_ids"]
        mean, sd = self.scaling
        numbers = (feeds["numbers"] - mean) / sd
        branches = [torch.relu(branch(numbers[:, i : i + 1])) for i, branch in enumerate(self.branches)]
        keyword = self.dropout(self.keywords(feeds["keyword_ids"]))
        x = torch.cat([self.lstm(self.words(ids), word_lengths(ids)), keyword, *branches], dim=1)
        return self.out(torch.relu(self.dense(x))).squeeze(1)

    def penalty(self) -> torch.Tensor:
        return self.l2 * self.dense.weight.square().sum()

    def add_to(self, graph: Graph, spec: WordSpec) -> str:
        ids = graph.ids("word_ids", spec.vocabulary)
        x = self.lstm.add_to(graph, self.words.add_to(graph, ids), add_lengths(graph, ids))
        table = graph.weight(self.keywords.weight.detach().numpy(), "keywords.weight")
        keyword = graph.add("Gather", [table, graph.keyword_ids(spec.keywords)], axis=0)
        mean, sd = self.scaling.numpy()
        numbers = graph.add("Sub", [graph.numbers(self.names), graph.constant(mean)])
        numbers = graph.add("Div", [numbers, graph.constant(sd)])
        parts = [x, keyword]
        for i, branch in enumerate(self.branches):
            column = graph.add("Gather", [numbers, graph.constant(np.array([i], np.int64))], axis=1)
            parts.append(graph.add("Relu", [graph.linear(column, branch, f"branches.{i}")]))
        joined = graph.add("Concat", parts, axis=1)
        return graph.linear(graph.add("Relu", [graph.linear(joined, self.dense, "dense")]), self.out, "out")


def find_keywords(tweets: Sequence[Tweet]) -> tuple[str, ...]:
    """The distinct keywords, most frequent first."""
    counts = Counter(keyword for tweet in tweets if (keyword := plain_keyword(tweet.keyword)))
    return tuple(sorted(counts, key=lambda word: (-counts[word], word)))


def number_scaling(tweets: Sequence[Tweet], names: Sequence[str]) -> torch.Tensor:
    """(2, k) mean and standard deviation; a number that is always the same keeps its scale."""
    values = np.array([[NUMBERS[name](tweet.text) for name in names] for tweet in tweets]).reshape(-1, len(names))
    sd = values.std(axis=0)
    return torch.from_numpy(np.stack([values.mean(axis=0), np.where(sd > 0, sd, 1.0)]).astype(np.float32))


def train(job: Job, settings: MultiInputSettings) -> WordModel:
    words, table = vectors_for(job, settings)
    keywords = find_keywords(job.tweets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        net = MultiInputNet(table, len(keywords), number_scaling(job.tweets, settings.numbers), settings)
    spec = WordSpec(
        steps=settings.steps,
        vocabulary=words,
        max_words=settings.max_words,
        keywords=keywords,
        numbers=settings.numbers,
    )
    return train_net(net, spec, job, settings)


MULTI_INPUT = Classifier(MultiInputSettings, train, needs_source=False)

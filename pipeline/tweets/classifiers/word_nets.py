"""Training of networks that read words: mini-batches of like length, Adam, early stopping on the validation loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from device.records import SlimpiError
from device.words import ReadText, WordReader, WordSpec
from pipeline.export.onnx_graph import Graph, lstm
from pipeline.tweets.batches import length_batches
from pipeline.tweets.classifiers.base import FloatArray, Job, WordSettings, count_words, labels, texts, vocabulary
from pipeline.tweets.data import Tweet
from pipeline.tweets.embeddings import NAMED, Vectors, embedding_table, read_vectors, train_vectors

EVAL_BATCH = 256
Feeds = dict[str, torch.Tensor]


class NetSettings(WordSettings, frozen=True, kw_only=True):
    """How a network learns.

    vectors: sources of pipeline.tweets.embeddings, or "word2vec-tweets"; several stand side by side. extra_words: how
    many words of the first source, in its order, the vocabulary takes beyond those of the tweets: words that were never
    trained on still have vectors. unknown: what words without a vector get, "random" rows of the vectors' spread or
    "zero". train_vectors: let the vectors learn too. l2: penalty on the dense layer's weights. averaging: what is
    validated and kept is the running mean of the weights that keeps this share of itself at a batch, 0 = the weights
    themselves (Polyak and Juditsky 1992; the exponential form).
    """

    vectors: tuple[str, ...] = ("glove-6b-50d",)
    extra_words: int = 20_000
    unknown: Literal["random", "zero"] = "zero"
    train_vectors: bool = False
    dropout: float = 0.1
    l2: float = 1e-3
    learning_rate: float = 1e-3
    batch_size: int = 64
    epochs: int = 12
    patience: int = 3
    averaging: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.averaging < 1:
            raise ValueError(f"averaging is {self.averaging}; give 0 or a share below 1, such as 0.99")


class WordNet(torch.nn.Module):
    """A network on inputs of device/words.py. inputs: their names; forward: {name: tensor} -> log-odds (n,)."""

    inputs: tuple[str, ...] = ("word_ids",)

    def penalty(self) -> torch.Tensor:
        """What is added to the loss: L2 of some weights."""
        return torch.zeros(())

    def add_to(self, graph: Graph, spec: WordSpec) -> str:
        """The same computation in a graph; the name of the log-odds (n, 1)."""
        raise NotImplementedError


@dataclass(frozen=True)
class WordModel:
    """A trained WordNet and the spec of its inputs."""

    net: WordNet
    spec: WordSpec
    tokenizer: str = ""
    max_tokens: int = 0

    @cached_property
    def reader(self) -> WordReader:
        return WordReader(self.spec)

    def log_odds(self, tweets: Sequence[Tweet]) -> FloatArray:
        return _log_odds(self.net, self.reader, self.reader.read(texts(tweets)))

    def add_to(self, graph: Graph) -> str:
        return self.net.add_to(graph, self.spec)


def vectors_for(job: Job, settings: NetSettings) -> tuple[list[str], torch.Tensor]:
    """(vocabulary, its vectors (n, d)) for the tweets that are trained on; several sources' vectors side by side."""
    if not settings.vectors:
        raise SlimpiError(f"`vectors` is empty. Name some, such as {', '.join(NAMED)} or {OF_TWEETS}.")
    counts = count_words(settings, job.tweets)
    sources = [_source(name, job, settings) for name in settings.vectors]
    extra = [word for word in list(sources[0].rows)[: settings.extra_words] if word == word.lower()]
    words = vocabulary(counts, settings.min_count, extra)
    occurrences = [counts[word] for word in words]
    tables = []
    for vectors in sources:
        table, coverage = embedding_table(vectors, words, job.seed, occurrences)
        job.progress(0, 0, f"{vectors.name}: {coverage}")
        if settings.unknown == "zero":
            table[[vectors.row(word) is None for word in words]] = 0
        tables.append(table)
    return words, torch.from_numpy(np.concatenate(tables, axis=1))


OF_TWEETS = "word2vec-tweets"
"""Vectors of the training tweets' own words, made by skip-gram."""


def _source(name: str, job: Job, settings: NetSettings) -> Vectors:
    if name == OF_TWEETS:
        reader = WordReader(WordSpec(steps=settings.steps, vocabulary=["", ""], max_words=settings.max_words))
        return train_vectors([reader.words(tweet.text) for tweet in job.tweets], seed=job.seed)
    path = Path(name.removeprefix("path:")).expanduser()
    return _read(name, job.cache, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(maxsize=2)
def _read(name: str, cache: Path, changed_ns: int) -> Vectors:
    """Read once for all folds, and again when the file changes."""
    return read_vectors(name, cache)


def train_net(net: WordNet, spec: WordSpec, job: Job, settings: NetSettings) -> WordModel:
    """Train until the validation loss has not fallen for `patience` epochs; the best epoch's weights are kept."""
    reader = WordReader(spec)
    rows, held = (reader.read(texts(part)) for part in (job.tweets, job.validation))
    targets, expected = labels(job.tweets), torch.from_numpy(labels(job.validation)).float()
    rng = np.random.default_rng(job.seed)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(where)
    optimizer = torch.optim.Adam(
        [p for p in net.parameters() if p.requires_grad], lr=settings.learning_rate, fused=True
    )
    mean = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(settings.averaging)) if settings.averaging else None
    kept = cast(WordNet, mean.module) if mean else net
    best, best_loss, since = copy.deepcopy(kept.state_dict()), math.inf, 0
    lengths = [len(row.words) for row in rows]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        for epoch in range(settings.epochs):
            net.train()
            for batch in length_batches(lengths, settings.batch_size, rng):
                _step(net, optimizer, _tensors(net, reader, [rows[i] for i in batch]), targets[batch])
                if mean:
                    mean.update_parameters(net)
            loss = float(
                torch.nn.functional.binary_cross_entropy_with_logits(
                    torch.from_numpy(_log_odds(kept, reader, held)).float(), expected
                )
            )
            job.progress(epoch + 1, settings.epochs, f"epochs, validation loss {loss:.4f}")
            if loss < best_loss:
                best, best_loss, since = copy.deepcopy(kept.state_dict()), loss, 0
            elif (since := since + 1) >= settings.patience:
                break
    net.load_state_dict(best)
    return WordModel(net.to("cpu").eval(), spec)


def _step(net: WordNet, optimizer: torch.optim.Optimizer, feeds: Feeds, targets: Any) -> None:
    log_odds = net(feeds)
    wanted = torch.from_numpy(targets).to(log_odds.device).float()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(log_odds, wanted) + net.penalty().to(log_odds.device)
    if not torch.isfinite(loss):
        raise SlimpiError(f"the loss became {loss.item()}. Take a smaller learning_rate.")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()


def _tensors(net: WordNet, reader: WordReader, rows: Sequence[ReadText]) -> Feeds:
    where = next(net.parameters()).device
    return {name: torch.from_numpy(value).to(where) for name, value in reader.feeds_of(rows, net.inputs).items()}


def _log_odds(net: WordNet, reader: WordReader, rows: Sequence[ReadText]) -> FloatArray:
    net.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].words))
    out = np.zeros(len(rows))
    with torch.inference_mode():
        for start in range(0, len(order), EVAL_BATCH):
            part = order[start : start + EVAL_BATCH]
            out[part] = net(_tensors(net, reader, [rows[i] for i in part])).cpu().numpy()
    return out


# Pieces of networks, each in torch and in ONNX.


class Words(torch.nn.Module):
    """Vectors of word ids; those of padding (row 0) are zero."""

    def __init__(self, table: torch.Tensor, trainable: bool) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding.from_pretrained(table.clone(), freeze=not trainable, padding_idx=0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids)

    def add_to(self, graph: Graph, ids: str) -> str:
        table = graph.weight(self.embedding.weight.detach().numpy(), "embedding.weight")
        return graph.add("Gather", [table, ids], axis=0)


def word_lengths(ids: torch.Tensor) -> torch.Tensor:
    """(n,) words of each text, one at least: an empty text is read as one padding."""
    return (ids != 0).sum(1).clamp(min=1)


def add_lengths(graph: Graph, ids: str) -> str:
    """`word_lengths` as int64 (n, 1) in a graph."""
    zero = graph.constant(np.array(0, np.int64))
    known = graph.add("Not", [graph.add("Equal", [ids, zero])])
    count = graph.add(
        "ReduceSum", [graph.add("Cast", [known], to=7), graph.constant(np.array([1], np.int64))], keepdims=1
    )
    return graph.add("Max", [count, graph.constant(np.array([1], np.int64))])


class LstmStack(torch.nn.Module):
    """Two LSTMs one on the other; padding never enters them (packed sequences, `sequence_lens` in ONNX).

    dropout: on their inputs and on the last state. recurrent_dropout: DropConnect on the hidden-to-hidden weights, one
    mask a batch for all steps (Merity et al. 2017, AWD-LSTM, section 2), in place of Keras' mask on the states.
    """

    def __init__(
        self, width: int, hidden: Sequence[int], dropout: float, recurrent_dropout: float, bidirectional: bool
    ) -> None:
        super().__init__()
        directions = 2 if bidirectional else 1
        sizes = [width, *(size * directions for size in hidden)]
        self.layers = torch.nn.ModuleList(
            torch.nn.LSTM(before, size, batch_first=True, bidirectional=bidirectional)
            for before, size in zip(sizes, hidden, strict=False)
        )
        self.dropout = torch.nn.Dropout(dropout)
        self.recurrent_dropout = recurrent_dropout
        self.out_features = sizes[-1]

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(n, words, width) to the last LSTM's last state (n, out_features)."""
        packing = torch.nn.utils.rnn.pack_padded_sequence
        for layer in self.layers:
            packed = packing(self.dropout(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
            states, (last, _) = torch.func.functional_call(layer, self._weights(layer), (packed,))
            x, _ = torch.nn.utils.rnn.pad_packed_sequence(states, batch_first=True)
        return self.dropout(last.transpose(0, 1).reshape(len(lengths), -1))

    def _weights(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The layer's weights, in training some recurrent ones dropped."""
        drop = torch.nn.functional.dropout
        return {
            name: drop(p, self.recurrent_dropout, self.training) if "_hh_" in name and p.ndim == 2 else p
            for name, p in layer.named_parameters()
        }

    def add_to(self, graph: Graph, x: str, lengths: str) -> str:
        x = graph.add("Transpose", [x], perm=[1, 0, 2])
        flat = graph.add("Reshape", [lengths, graph.constant(np.array([-1], np.int64))])
        counts = graph.add("Cast", [flat], to=6)
        for i, layer in enumerate(self.layers):
            x, last = lstm(graph, x, counts, layer, f"lstm.{i}")
        return last

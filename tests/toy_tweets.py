"""Invented tweets that a few words tell apart, and vectors and settings with which classifiers learn them fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tiny_encoders import MAX_TOKENS, save_encoder
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.tweets.data import Tweet

WORDS = {
    0: ["tea", "garden", "cat", "bread", "music", "smile", "walk", "quiet"],
    1: ["flood", "fire", "smoke", "sirens", "quake", "storm", "rescue", "burning"],
}
OTHERS = ["the", "a", "of", "today", "near", "our", "house", "street", "people", "morning", "again", "we"]
KEYWORDS = {0: ["calm", ""], 1: ["fire", "flood%20alert"]}


def toy_tweets(n: int = 200, seed: int = 0) -> list[Tweet]:
    """Half of each label, all different, of 3 to 12 words."""
    rng = np.random.default_rng(seed)
    tweets = []
    for i in range(n):
        label = i % 2
        words = [*rng.choice(WORDS[label], rng.integers(2, 6)), *rng.choice(OTHERS, rng.integers(1, 8))]
        text = " ".join(rng.permutation(words)) + "!" * int(rng.integers(0, 3))
        tweets.append(Tweet(str(i), str(rng.choice(KEYWORDS[label])), "", text, label))
    return tweets


ODD = [
    Tweet("e", "", "", "", None),
    Tweet("o", "unheard", "", "\N{FIRE} \N{FIRE}", None),
    Tweet("l", "fire", "", "smoke " * 400, None),
    Tweet("u", "", "", "words that nobody knows at all http://t.co/abc &amp; @someone #FloodWarning", None),
]
"""No words, words without vectors, too many words, what cleaning takes away."""


def write_vectors(path: Path, width: int = 12, seed: int = 0) -> Path:
    """A GloVe text file of the words, labels not told apart by it."""
    rng = np.random.default_rng(seed)
    words = [*OTHERS, *WORDS[0], *WORDS[1], "!"]
    lines = [f"{word} " + " ".join(f"{x:.4f}" for x in rng.standard_normal(width)) for word in words]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_toy_encoder(family: str, folder: Path) -> None:
    """A tiny encoder that knows the toy words: a trained vocabulary is another on every run and learns differently."""
    save_encoder(family, folder)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    known = [*special, *OTHERS, *WORDS[0], *WORDS[1], "!"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def toy_settings(name: str, vectors: Path) -> dict[str, Any]:
    """Settings with which each of CLASSIFIERS learns the toy tweets."""
    net = {"vectors": [str(vectors)], "epochs": 12, "learning_rate": 0.02, "max_words": 32, "patience": 12}
    encoder = {"max_tokens": MAX_TOKENS}
    known: dict[str, dict[str, Any]] = {
        "lstm": {**net, "hidden": [8, 6], "dense": 8},
        "multi-input": {**net, "hidden": [8, 6], "dense": 8},
        "mlp": {**net, "hidden": [16, 8], "epochs": 40, "patience": 40},
        "tfidf": {"max_words": 32, "min_count": 1, "c": [1.0, 30.0]},
        "embeddings": {**encoder, "c": [0.1, 1.0]},
        "transformer": {**encoder, "epochs": 12, "learning_rate": 2e-3, "batch_size": 16, "patience": 20},
    }
    members = ["tfidf", "multi-input", "embeddings"]
    known["ensemble"] = {"members": [{"classifier": name, "settings": known[name]} for name in members]}
    return known.get(name, {})

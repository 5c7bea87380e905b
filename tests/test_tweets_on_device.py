"""The device predicts what the host predicts, for every real tweet."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import real_exports
import torch
from fakes import artifact
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from device.words import Text
from pipeline import sources
from pipeline.classify import classify
from pipeline.export.onnx import export_encoder
from pipeline.hosts import LOCAL
from pipeline.store import Places, write_manifest
from pipeline.tweets.head import train_head

LABELS = ["no", "yes"]
MAX_TOKENS = 128


def host_probabilities(folder: Path, texts: list[str]) -> NDArray[np.float64]:
    """Of label 1, by transformers in batches of like length."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = np.empty(len(texts))
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        batch = tokenizer(
            [texts[i] for i in chosen], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        with torch.inference_mode():
            found[chosen] = model(**batch).logits.double().softmax(-1)[:, 1].numpy()
    return found


@pytest.mark.slow
def test_minilm_predicts_every_real_tweet_as_transformers_does(tmp_path: Path, data_dir: Path) -> None:
    rows = sources.dataset("demo:tweets_train.csv", tmp_path)
    source = real_exports.source("minilm-l6-tweets")
    train_head(source, rows, tmp_path / "hf", "text", "target", LABELS, MAX_TOKENS, seed=0)
    folder = tmp_path / "artifact"
    export_encoder(tmp_path / "hf", folder, LABELS, MAX_TOKENS)
    write_manifest(folder, artifact(folder, "onnx", labels=LABELS, max_tokens=MAX_TOKENS))
    with (data_dir / "tweets" / "train.csv").open(encoding="utf-8", newline="") as handle:
        texts = [row["text"] for row in csv.DictReader(handle)]
    said = list(classify(LOCAL, folder, map(Text, texts), Places(tmp_path), threads=1))
    host = host_probabilities(tmp_path / "hf", texts)
    device = np.array([prediction.probabilities["yes"] for prediction in said])
    assert len(texts) == len(said) == 7613
    assert np.abs(host - device).max() < 1e-4
    differing = [i for i, p in enumerate(said) if p.label != LABELS[int(host[i] > 0.5)]]
    assert not differing
    assert 0.1 < (device > 0.5).mean() < 0.9, "one label for all would prove nothing"

"""Classify a table with an artifact, on this machine or a device, and write the submission."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from device.records import SlimpiError
from device.schema import Prediction
from device.words import Text
from pipeline.classify import classify
from pipeline.hosts import Host
from pipeline.progress import Progressor
from pipeline.store import Places, load_artifact
from pipeline.tweets.data import Tweet, write_submission

DISASTER = 1
"""Index of the label that a target of 1 means."""


def predict(
    host: Host, folder: Path, tweets: Sequence[Tweet], out: Path, places: Places, threads: int, progress: Progressor
) -> list[int]:
    """Targets (n,), 0 and 1, of the artifact in `folder`, written to `out` (id,target) once all are known.

    SlimpiError if the artifact has not two labels, and whatever pipeline.classify raises; `out` is then untouched.
    """
    labels = load_artifact(folder).labels
    if len(labels) != 2:
        raise SlimpiError(
            f"{folder.name} tells {len(labels)} labels apart, not disasters from the rest. Choose another."
        )
    texts = [Text(tweet.text, tweet.keyword) for tweet in tweets]
    found: list[Prediction] = []
    with progress.step(f"{host.name} predict") as tick:
        said = classify(host, folder, texts, places, threads=threads, progress=progress)
        with closing(said):  # type: ignore[type-var]
            for prediction in said:
                found.append(prediction)
                tick(len(found), len(texts), "tweets")
    if len(found) != len(tweets):
        raise SlimpiError(f"{host.name} answered {len(found)} of {len(tweets)} tweets. Run it again.")
    targets = [int(prediction.label == labels[DISASTER]) for prediction in found]
    write_submission(out, [tweet.id for tweet in tweets], targets)
    return targets


def scores(tweets: Sequence[Tweet], predicted: Sequence[int]) -> str:
    """One line: accuracy and F1 of a labelled table, or how many disasters an unlabelled one has."""
    from sklearn.metrics import accuracy_score, f1_score

    if any(tweet.target is None for tweet in tweets):
        return f"{sum(predicted):,} of {len(predicted):,} are disasters (the table has no labels)"
    labels = np.array([tweet.target for tweet in tweets])
    f1 = f1_score(labels, predicted, zero_division=0)
    return f"accuracy {accuracy_score(labels, predicted):.4f}, F1 {f1:.4f} over {len(labels):,} labelled tweets"

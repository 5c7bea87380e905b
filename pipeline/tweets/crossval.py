"""Seeds x folds of a classifier on labelled tweets: each fold's predictions are kept, so that a stopped run goes on.

Nothing of a test fold is seen before it is scored: words, vectors of the tweets, stopping, calibration and threshold
come from the other folds. Predictions are kept rather than scores, so that an ensemble of classifiers that were
cross-validated on the same folds needs no training of its own.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from device.records import SlimpiError, write_atomic
from pipeline.progress import Tick, quiet
from pipeline.sources import hash_path
from pipeline.store import digest
from pipeline.tweets.calibration import Calibration, calibrate, fit_temperature
from pipeline.tweets.classifiers import CLASSIFIERS, on_this_machine, settings_of, vector_files
from pipeline.tweets.classifiers.base import FloatArray, IntArray, Job, labels
from pipeline.tweets.classifiers.ensemble import EnsembleSettings, mean_log_odds
from pipeline.tweets.data import Split, Tweet, folds, split

VALIDATION_SHARE = 0.1
VERSION = 2
"""Part of the key of kept predictions: raise it when training changes."""


@dataclass(frozen=True)
class Setup:
    """What the folds have in common. source: the encoder's folder; folder: where predictions are kept; grouped: whether
    near-duplicates stay on one side. Without it scores are flattered, but comparable with those that others publish."""

    tweets: Sequence[Tweet]
    source: Path | None
    cache: Path
    folder: Path
    n_folds: int = 5
    grouped: bool = True


@dataclass(frozen=True)
class Predictions:
    """Log-odds of the validation tweets (indices `validation`) and the test tweets of one fold."""

    validation: IntArray
    validation_log_odds: FloatArray
    test: IntArray
    test_log_odds: FloatArray


class FoldScore(msgspec.Struct, frozen=True, kw_only=True):
    """Of one test fold. accuracy and f1 at probability 0.5; tuned: at the threshold of the best validation F1."""

    seed: int
    fold: int
    n_test: int
    accuracy: float
    f1: float
    accuracy_tuned: float
    f1_tuned: float
    threshold: float
    temperature: float
    ece_before: float
    ece_after: float


def predict_fold(
    setup: Setup, name: str, table: dict[str, Any], seed: int, fold: int, progress: Tick = quiet
) -> Predictions:
    """Predictions of one fold, from the folder if they are there. The seed draws the folds and the training."""
    if name == "ensemble":
        return _ensemble_fold(setup, table, seed, fold, progress)
    settings = settings_of(name, table)
    path = kept_at(setup, name, table, seed, fold)
    if path.exists():
        return _load(path)
    rows, of_test = _rows(tuple(setup.tweets), setup.n_folds, seed, fold, setup.grouped)
    train, held, test = ([setup.tweets[i] for i in index] for index in (rows.train, rows.test, of_test))
    source = _source(setup, name)
    model = CLASSIFIERS[name].train(Job(train, held, source, setup.cache, setup.folder, seed, progress), settings)
    found = Predictions(rows.test, model.log_odds(held), of_test, model.log_odds(test))
    _save(path, found)
    return found


def kept_at(setup: Setup, name: str, table: dict[str, Any], seed: int, fold: int) -> Path:
    """Where one fold's predictions are kept: by what was trained, how and on what, so that a change trains anew."""
    rows = digest([[t.id, t.text, t.keyword, t.target] for t in setup.tweets])
    source = _source(setup, name)
    settings = on_this_machine(name, table)
    weights = [_hash(path) for path in (*([source] if source else []), *vector_files(table))]
    key = [VERSION, name, settings, rows, setup.n_folds, setup.grouped, seed, fold, weights]
    return setup.folder / f"{name}-seed{seed}-fold{fold}-{digest(key)[:16]}.npz"


def _source(setup: Setup, name: str) -> Path | None:
    return setup.source if CLASSIFIERS[name].needs_source else None


@lru_cache(maxsize=8)
def _hash(path: Path) -> str:
    return hash_path(path)


@lru_cache(maxsize=16)
def _rows(
    tweets: tuple[Tweet, ...], n_folds: int, seed: int, fold: int, grouped: bool = True
) -> tuple[Split, IntArray]:
    """A fold's (rows to train on and to validate on, rows to test on); found once for all classifiers."""
    if not grouped:
        return _ungrouped_rows(tweets, n_folds, seed, fold)
    part = folds(tweets, n_folds, seed)[fold]
    inner = split([tweets[i] for i in part.train], VALIDATION_SHARE, seed)
    return Split(part.train[inner.train], part.train[inner.test]), part.test


def _ungrouped_rows(tweets: tuple[Tweet, ...], n_folds: int, seed: int, fold: int) -> tuple[Split, IntArray]:
    from sklearn.model_selection import StratifiedKFold, train_test_split

    targets = labels(tweets)
    train, test = list(StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(targets, targets))[fold]
    fit, held = train_test_split(train, test_size=VALIDATION_SHARE, random_state=seed, stratify=targets[train])
    return Split(np.sort(fit), np.sort(held)), test


def _ensemble_fold(setup: Setup, table: dict[str, Any], seed: int, fold: int, progress: Tick) -> Predictions:
    """As the ensemble's training does it: the members on the same rows and seed, each with its own temperature."""
    settings = settings_of("ensemble", table)
    assert isinstance(settings, EnsembleSettings)
    parts = [predict_fold(setup, m.classifier, m.settings, seed, fold, progress) for m in settings.members]
    first = parts[0]
    targets = labels(setup.tweets)[first.validation]
    temperatures = [fit_temperature(part.validation_log_odds, targets) for part in parts]
    weights = np.array([member.weight for member in settings.members])
    weights /= weights.sum()
    held, test = (
        mean_log_odds([getattr(part, name) for part in parts], temperatures, weights.tolist())
        for name in ("validation_log_odds", "test_log_odds")
    )
    return Predictions(first.validation, held, first.test, test)


def score_fold(tweets: Sequence[Tweet], found: Predictions, seed: int, fold: int) -> FoldScore:
    """Calibrated and decided on the validation tweets, scored on the test tweets."""
    targets = labels(tweets)
    tuned = calibrate(found.validation_log_odds, targets[found.validation], "f1")
    expected = targets[found.test]
    half = (found.test_log_odds >= 0).astype(np.int64)  # the temperature does not move 0.5
    chosen = (tuned.margins(found.test_log_odds) >= 0).astype(np.int64)
    before, after = _test_ece(tuned, found.test_log_odds, expected)
    return FoldScore(
        seed=seed,
        fold=fold,
        n_test=len(expected),
        accuracy=float((half == expected).mean()),
        f1=f1_score(expected, half),
        accuracy_tuned=float((chosen == expected).mean()),
        f1_tuned=f1_score(expected, chosen),
        threshold=tuned.threshold,
        temperature=tuned.temperature,
        ece_before=before,
        ece_after=after,
    )


def f1_score(targets: IntArray, chosen: IntArray) -> float:
    """Of label 1; 0 over nothing."""
    hits = int(((targets == 1) & (chosen == 1)).sum())
    return 2 * hits / max(1, int((targets == 1).sum()) + int((chosen == 1).sum()))


def _test_ece(calibration: Calibration, log_odds: FloatArray, targets: IntArray) -> tuple[float, float]:
    from pipeline.tweets.calibration import ece, sigmoid

    return ece(sigmoid(log_odds), targets), ece(calibration.probabilities(log_odds), targets)


_FIELDS = tuple(Predictions.__dataclass_fields__)


def _save(path: Path, found: Predictions) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: getattr(found, name) for name in _FIELDS})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def _load(path: Path) -> Predictions:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return Predictions(**{name: archive[name] for name in _FIELDS})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SlimpiError(f"{path} does not hold a fold's predictions: {error}. Delete it to train again.") from error

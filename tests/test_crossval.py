"""Folds of classifiers: kept and gone on with, an ensemble from its members' folds, calibration and its scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from toy_tweets import toy_settings, toy_tweets, write_vectors

from device.records import SlimpiError
from pipeline.progress import quiet
from pipeline.tweets import crossval
from pipeline.tweets.calibration import (
    best_threshold,
    calibrate,
    ece,
    fit_temperature,
    logit,
    sigmoid,
)
from pipeline.tweets.classifiers import CLASSIFIERS, settings_of
from pipeline.tweets.classifiers.base import Job
from pipeline.tweets.crossval import Setup, predict_fold, score_fold
from pipeline.tweets.decide import decide


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    write_vectors(tmp_path / "vectors.txt")
    return Setup(tuple(toy_tweets(160)), None, tmp_path / "cache", tmp_path / "kept", n_folds=3)


def test_folds_are_kept_and_not_trained_again(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [predict_fold(setup, "tfidf", {}, 0, fold) for fold in range(3)]
    tested = np.sort(np.concatenate([f.test for f in found]))
    assert np.array_equal(tested, np.arange(160))
    for part in found:
        assert not set(part.test) & set(part.validation)
    untrained = replace(CLASSIFIERS["tfidf"], train=None)
    monkeypatch.setitem(CLASSIFIERS, "tfidf", untrained)
    again = predict_fold(setup, "tfidf", {}, 0, 1)
    assert np.array_equal(again.test_log_odds, found[1].test_log_odds)
    for other in (("tfidf", {"ngrams": 1}, 0, 1), ("tfidf", {}, 1, 1)):  # other settings or seed: trained anew
        with pytest.raises(TypeError):
            predict_fold(setup, *other)
    next(setup.folder.iterdir()).write_bytes(b"cut")
    with pytest.raises(SlimpiError, match="does not hold a fold's predictions"):
        for fold in range(3):
            predict_fold(setup, "tfidf", {}, 0, fold)


def test_an_ensembles_fold_equals_training_it(setup: Setup) -> None:
    members = [
        {"classifier": name, "settings": toy_settings(name, setup.folder.parent / "vectors.txt"), "weight": weight}
        for name, weight in (("tfidf", 1.0), ("mlp", 2.0))
    ]
    table = {"members": members}
    found = predict_fold(setup, "ensemble", table, 0, 2)
    rows, test = crossval._rows(tuple(setup.tweets), 3, 0, 2)
    train, held, tested = ([setup.tweets[i] for i in part] for part in (rows.train, rows.test, test))
    job = Job(train, held, None, setup.cache, setup.folder, 0, quiet)
    model = CLASSIFIERS["ensemble"].train(job, settings_of("ensemble", table))
    assert np.abs(model.log_odds(tested) - found.test_log_odds).max() < 1e-6
    assert np.abs(model.log_odds(held) - found.validation_log_odds).max() < 1e-6


def test_scores_of_a_fold_are_scikit_learns(setup: Setup) -> None:
    found = predict_fold(setup, "tfidf", {}, 0, 0)
    rng = np.random.default_rng(0)
    noisy = replace(
        found,
        test_log_odds=found.test_log_odds + rng.normal(0, 2, len(found.test)),
        validation_log_odds=found.validation_log_odds + rng.normal(0, 2, len(found.validation)),
    )
    score = score_fold(setup.tweets, noisy, 0, 0)
    targets = np.array([t.target for t in setup.tweets])
    half = noisy.test_log_odds >= 0
    assert score.accuracy == (half == targets[noisy.test]).mean()
    assert score.f1 == pytest.approx(f1_score(targets[noisy.test], half))
    chosen = sigmoid(noisy.test_log_odds / score.temperature) >= score.threshold
    assert score.f1_tuned == pytest.approx(f1_score(targets[noisy.test], chosen))
    assert 0 < score.accuracy_tuned < 1


def test_labels_drawn_at_random_score_as_chance(setup: Setup) -> None:
    """An accuracy far from one half would mean that test rows leak."""
    rng = np.random.default_rng(0)
    tweets = tuple(replace(t, target=int(rng.integers(2))) for t in setup.tweets)
    scores = [
        score_fold(tweets, predict_fold(replace(setup, tweets=tweets), "tfidf", {}, 0, fold), 0, fold)
        for fold in range(3)
    ]
    assert 0.35 < np.mean([s.accuracy for s in scores]) < 0.65


# Calibration.


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 5.0))
@hypothesis_settings(max_examples=25, deadline=None)
def test_temperature_undoes_a_scale(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, 4000)
    targets = (rng.random(4000) < sigmoid(z)).astype(int)
    assert fit_temperature(scale * z, targets) == pytest.approx(scale, rel=0.25)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["f1", "accuracy"]))
@hypothesis_settings(max_examples=25, deadline=None)
def test_threshold_is_as_good_as_any(seed: int, measure: str) -> None:
    """Against every threshold between two probabilities, tried one by one."""
    rng = np.random.default_rng(seed)
    targets = np.array([0, 1, *rng.integers(0, 2, 28)])
    p = np.round(np.clip(0.3 * targets + rng.random(30) * 0.6, 0.01, 0.99), 1)  # many ties

    def value(threshold: float) -> float:
        chosen = p >= threshold
        return f1_score(targets, chosen, zero_division=0) if measure == "f1" else float((chosen == targets).mean())

    found = best_threshold(p, targets, measure)
    assert 0 < found < 1
    # One above all probabilities chooses no row at all: no rule that is of use, so it is not looked for.
    assert value(found) >= max(value(t) for t in np.arange(0.05, p.max(), 0.05)) - 1e-12


def test_ece_of_known_probabilities() -> None:
    p, targets = np.array([0.95, 0.95, 0.95, 0.95, 0.35, 0.35]), np.array([1, 1, 1, 0, 0, 1])
    # bin .9-1: confidence .95, right 3 of 4; bin .6-.7: confidence .65, right 1 of 2
    assert ece(p, targets) == pytest.approx(4 / 6 * 0.2 + 2 / 6 * 0.15)


def test_calibration_is_folded_into_the_logits(setup: Setup) -> None:
    found = predict_fold(setup, "tfidf", {}, 0, 0)
    targets = np.array([t.target for t in setup.tweets])[found.validation]
    fitted = calibrate(found.validation_log_odds, targets, "f1")
    margins = fitted.margins(found.test_log_odds)
    p = fitted.probabilities(found.test_log_odds)
    assert np.array_equal(margins >= 0, p >= fitted.threshold)
    assert np.abs(sigmoid(margins + logit(fitted.threshold)) - p).max() < 1e-9
    assert calibrate(found.validation_log_odds, targets, "half").threshold == 0.5
    for threshold, rows in (("best", targets), ("f1", np.zeros(4, int))):
        with pytest.raises(SlimpiError, match=r"unknown threshold|not both"):
            calibrate(found.validation_log_odds[: len(rows)], rows, threshold)


def test_ungrouped_folds_let_near_duplicates_straddle(setup: Setup) -> None:
    """Every text twice, with a link that differs: grouped folds keep the two on one side, the others do not."""
    twice = [replace(t, id=f"{t.id}-{i}", text=f"{t.text} https://t.co/{i}") for t in setup.tweets for i in (0, 1)]
    straddling = []
    for grouped in (True, False):
        both = replace(setup, tweets=tuple(twice), grouped=grouped)
        found = [predict_fold(both, "tfidf", {}, 0, fold) for fold in range(3)]
        assert np.array_equal(np.sort(np.concatenate([f.test for f in found])), np.arange(len(twice)))
        assert all(not set(f.test) & set(f.validation) for f in found)
        straddling.append(sum(i ^ 1 not in set(f.test) for f in found for i in f.test.tolist()))
    assert straddling[0] == 0
    assert straddling[1] > 100


def test_decide_uses_validation_only(setup: Setup) -> None:
    rows, test = crossval._rows(tuple(setup.tweets), 3, 0, 0)
    train, held = ([setup.tweets[i] for i in part] for part in (rows.train, rows.test))
    model = CLASSIFIERS["tfidf"].train(
        Job(train, held, None, setup.cache, setup.folder, 0, quiet), settings_of("tfidf", {})
    )
    decider = decide(model, held, "accuracy")
    expected = calibrate(model.log_odds(held), np.array([t.target for t in held]), "accuracy")
    assert decider.calibration == expected
    assert len(decider.logits([setup.tweets[i] for i in test])) == len(test)

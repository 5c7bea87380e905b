"""What benchmarks/tweets.py keeps and concludes; its training is that of test_crossval and test_train_recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import tweets
from toy_tweets import toy_tweets

from device.records import SlimpiError, read_record
from pipeline.progress import Progressor
from pipeline.recipes import Recipe
from pipeline.store import Places
from pipeline.tweets.crossval import FoldScore, Setup


def score(accuracy: float, fold: int = 0, seed: int = 0) -> FoldScore:
    return FoldScore(
        seed=seed, fold=fold, n_test=10, accuracy=accuracy, f1=0.7, accuracy_tuned=0.75, f1_tuned=0.72, threshold=0.4,
        temperature=1.1, ece_before=0.05, ece_after=0.02,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> tweets.Run:
    setup = Setup(tuple(toy_tweets(20)), None, tmp_path, tmp_path / "folds")
    return tweets.Run(setup, Places(tmp_path), Progressor(plain=True), tmp_path / "tweets.json", "rows", "test")


def recipe(name: str) -> Recipe:
    return next(r for r in tweets.find_recipes([name]))


def test_a_fold_scored_again_replaces_its_score(run: tweets.Run) -> None:
    for fold, accuracy in ((1, 0.8), (0, 0.7), (1, 0.9)):
        tweets.keep(run, recipe("tweets-tfidf"), score(accuracy, fold))
    study = read_record(run.out, tweets.Study)
    assert [(f.fold, f.accuracy) for f in study.rows[0].folds] == [(0, 0.7), (1, 0.9)]
    built = tweets.Built(
        artifact="a", size_bytes=2**20, latency_ms_p50=0.5, latency_ms_p90=0.75, n_latency=9, submission="s.csv"
    )
    tweets.keep(run, recipe("tweets-tfidf"), built)
    table = tweets.as_markdown(read_record(run.out, tweets.Study))
    assert "| tweets-tfidf (2 folds) |" in table
    assert "| 80.00% ± 14.14% |" in table
    assert "| 1.0 | 0.50 / 0.75 |" in table


def test_bars_are_judged_by_grouped_folds(run: tweets.Run) -> None:
    tweets.keep(run, recipe("tweets-minilm"), score(0.8199))
    tweets.keep(run, recipe("tweets-lstm-glove"), score(0.7919))
    loose = tweets.Run(
        Setup(run.setup.tweets, None, run.setup.cache, run.setup.folder, grouped=False),
        run.places, run.progress, run.out, run.rows, run.test,
    )  # fmt: skip
    tweets.keep(loose, recipe("tweets-minilm"), score(0.83))
    found = "\n".join(tweets.verdicts(read_record(run.out, tweets.Study)))
    assert "tweets-minilm 81.99%, asked 82.00%: missed (ungrouped 83.00%: met)" in found
    assert "tweets-lstm-glove 79.19%, asked 79.19%: met" in found
    assert "best, tweets-minilm, 81.99%, asked 83.50%: missed" in found


def test_results_of_other_rows_are_not_mixed(run: tweets.Run) -> None:
    tweets.keep(run, recipe("tweets-tfidf"), score(0.8))
    other = tweets.Run(
        Setup(run.setup.tweets[:9], None, run.setup.cache, run.setup.folder),
        run.places, run.progress, run.out, run.rows, run.test,
    )  # fmt: skip
    with pytest.raises(SlimpiError, match="is about 20 rows of rows"):
        tweets.keep(other, recipe("tweets-tfidf"), score(0.8))


def test_an_unknown_recipe_is_told() -> None:
    with pytest.raises(SlimpiError, match=r"no recipe 'tweets-x'\. Known: tweets-"):
        tweets.find_recipes(["tweets-x"])

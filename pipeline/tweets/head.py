"""Train only an encoder's classification head: L2 logistic regression on the features its last Linear sees."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from device.records import SlimpiError
from pipeline.encoders import Encoder, encode_batch, head_linear, load_encoder, save_encoder

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Tick = Callable[[int, int, str], None]

N_FOLDS = 5
C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
MAX_ITERATIONS = 5000
BATCH_SIZE = 32


@dataclass(frozen=True)
class HeadFit:
    """How the head was trained. The accuracy is the chosen C's over the folds: slightly optimistic, see a test set.

    `fresh`: parameters the checkpoint lacked; those other than the last Linear stay random (seeded).
    """

    n_rows: int
    n_folds: int
    c: float
    cv_accuracy_mean: float
    cv_accuracy_sd: float
    fresh: tuple[str, ...]


def train_head(
    model_dir: Path,
    train_csv: Path,
    out_dir: Path,
    text_column: str,
    label_column: str,
    labels: list[str],
    max_tokens: int,
    seed: int,
    progress: Tick | None = None,
) -> HeadFit:
    """Fit the head of the encoder in `model_dir` on `train_csv` and save the model as a folder `out_dir`.

    The label column holds integers, an index into `labels`. C is chosen by stratified k-fold cross-validation
    within these rows. `out_dir` must be absent or empty. Raises SlimpiError for a bad table or encoder.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise SlimpiError(f"{out_dir} already exists. Delete it or choose another folder.")
    texts, targets = read_rows(train_csv, text_column, label_column, len(labels))
    encoder = load_encoder(model_dir, labels, max_tokens, seed)
    features = extract_features(encoder, texts, max_tokens, progress)
    weight, bias, fit = _fit(features, targets, seed, encoder.fresh)
    _write_head(head_linear(encoder.model), weight, bias)
    save_encoder(encoder, out_dir)
    return fit


def read_rows(path: Path, text_column: str, label_column: str, n_labels: int) -> tuple[list[str], IntArray]:
    """Texts and their label indices from a CSV with a header; SlimpiError says what was found instead."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, strict=True)
            columns = list(reader.fieldnames or [])
            for column in (text_column, label_column):
                if column not in columns:
                    raise SlimpiError(f"{path} has no column `{column}`; it has {columns}. Name one of these.")
            rows = [(row[text_column], row[label_column]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SlimpiError(f"cannot read {path} as a CSV table: {error}. Check the file.") from error
    if not rows:
        raise SlimpiError(f"{path} has no rows under its header. Use a table with labelled rows.")
    found = Counter(label for _, label in rows)
    accepted = {str(i) for i in range(n_labels)}
    if wrong := sorted(repr(label) for label in found if label not in accepted):
        raise SlimpiError(
            f"{path}: column `{label_column}` has {len(wrong)} values that are no label: {', '.join(wrong[:5])}. "
            f"Use integers from 0 to {n_labels - 1}."
        )
    if too_few := {label: found[label] for label in sorted(accepted) if found[label] < N_FOLDS}:
        raise SlimpiError(
            f"{path}: column `{label_column}` has too few rows of label {too_few} among {dict(found)}. "
            f"Every label needs at least {N_FOLDS}."
        )
    return [text for text, _ in rows], np.array([int(label) for _, label in rows])


def extract_features(encoder: Encoder, texts: list[str], max_tokens: int, progress: Tick | None = None) -> FloatArray:
    """(n_texts, n_features): the input of the model's last Linear for each text."""
    seen: list[torch.Tensor] = []
    hook = head_linear(encoder.model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together: little padding
    features: dict[int, npt.NDArray[np.float32]] = {}
    try:
        with torch.inference_mode():
            for start in range(0, len(order), BATCH_SIZE):
                batch = order[start : start + BATCH_SIZE]
                encoder.model(**encode_batch(encoder, [texts[i] for i in batch], max_tokens))
                features.update(zip(batch, seen.pop().numpy(), strict=True))
                if progress:
                    progress(start + len(batch), len(order), "texts")
    finally:
        hook.remove()
    stacked = np.array([features[i] for i in range(len(texts))], dtype=np.float64)
    if stacked.ndim != 2 or not np.isfinite(stacked).all():
        raise SlimpiError(
            f"{encoder.model.config.model_type}'s head sees features of shape {stacked.shape}, expected finite "
            "(texts, features). Use an encoder such as BERT or RoBERTa."
        )
    return stacked


def _fit(
    features: FloatArray, targets: IntArray, seed: int, fresh: tuple[str, ...]
) -> tuple[FloatArray, FloatArray, HeadFit]:
    """Weights (n_labels, n_features) and bias (n_labels,) with the best C of C_GRID; ties go to the smaller."""
    from sklearn.model_selection import StratifiedKFold

    folds = list(StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed).split(features, targets))
    accuracies = {}
    for c in C_GRID:
        scores = []
        for train, test in folds:
            weight, bias = _solve(features[train], targets[train], c)
            guesses = (features[test] @ weight.T + bias).argmax(axis=1)
            scores.append(float(np.mean(guesses == targets[test])))
        accuracies[c] = scores
    best = max(C_GRID, key=lambda c: (float(np.mean(accuracies[c])), -c))
    weight, bias = _solve(features, targets, best)
    mean, sd = float(np.mean(accuracies[best])), float(np.std(accuracies[best], ddof=1))
    return weight, bias, HeadFit(len(targets), N_FOLDS, best, mean, sd, fresh)


def _solve(features: FloatArray, targets: IntArray, c: float) -> tuple[FloatArray, FloatArray]:
    """Logistic regression on standardized features, the standardization folded back into the weights."""
    from sklearn.linear_model import LogisticRegression

    centre, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale == 0] = 1.0
    model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit((features - centre) / scale, targets)
    if model.n_iter_.max() >= MAX_ITERATIONS:
        raise SlimpiError(f"logistic regression did not settle in {MAX_ITERATIONS} steps (C = {c}). Use more rows.")
    weight, bias = model.coef_ / scale, model.intercept_
    if len(weight) == 1:  # two labels: one row of log-odds, split over both outputs
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias - weight @ centre


def _write_head(linear: torch.nn.Linear, weight: FloatArray, bias: FloatArray) -> None:
    if linear.bias is None:
        raise SlimpiError("the encoder's last Linear has no bias to train. Use another encoder.")
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
        linear.bias.copy_(torch.from_numpy(bias))

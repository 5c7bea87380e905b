"""Training a classification head: the features, the fit, the saved model, and tables that cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_encoders import HEADS, MAX_TOKENS, TINY, save_encoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from device.records import SlimpiError
from pipeline.encoders import head_linear, load_encoder
from pipeline.tweets import head
from pipeline.tweets.head import C_GRID, extract_features, read_rows, train_head

WORDS = {0: ["tea", "garden", "cat", "bread"], 1: ["flood", "fire", "smoke", "sirens"], 2: ["goal", "match", "team"]}


def write_rows(path: Path, n_labels: int, n_each: int = 30, seed: int = 0) -> list[tuple[str, int]]:
    """Texts of words that mostly tell the label."""
    rng = np.random.default_rng(seed)
    everything = [word for words in WORDS.values() for word in words]
    rows = []
    for label in range(n_labels):
        for _ in range(n_each):
            own, other = rng.choice(WORDS[label], 4), rng.choice(everything, 2)
            rows.append((" ".join(rng.permutation([*own, *other])), label))
    lines = [f'"{text}",{label}' for text, label in rows]
    path.write_text("\n".join(["text,target", *lines]) + "\n", encoding="utf-8")
    return rows


def train(model_dir: Path, rows: Path, out: Path, labels: list[str], seed: int = 0) -> head.HeadFit:
    return train_head(
        model_dir, rows, out, text_column="text", label_column="target", labels=labels, max_tokens=MAX_TOKENS, seed=seed
    )


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("n_labels", [2, 3])
def test_saved_model_decides_as_scikit_learn(family: str, n_labels: int, tmp_path: Path) -> None:
    save_encoder(family, tmp_path / "hf", n_labels)
    rows = write_rows(tmp_path / "rows.csv", n_labels)
    labels = ["calm", "alarm", "sport"][:n_labels]
    fit = train(tmp_path / "hf", tmp_path / "rows.csv", tmp_path / "out", labels)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.id2label == dict(enumerate(labels))
    assert model.config.label2id == {label: i for i, label in enumerate(labels)}
    texts, targets = [text for text, _ in rows], np.array([label for _, label in rows])
    features, logits = [], []
    model.get_submodule(HEADS[family]).register_forward_pre_hook(lambda _, x: features.append(x[0][0].numpy()))
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", padding=False)["input_ids"]
        with torch.inference_mode():
            logits.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].numpy())
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=fit.c, max_iter=5000))
    expected = oracle.fit(np.array(features, dtype=np.float64), targets).predict_proba(np.array(features))
    found = torch.softmax(torch.tensor(np.array(logits)), dim=1).numpy()
    assert np.abs(found - expected).max() < 0.02 * np.ptp(expected)
    assert (found.argmax(axis=1) == targets).mean() > 1.2 / n_labels
    assert fit.n_rows == len(rows)
    assert fit.c in C_GRID
    assert fit.fresh == ()
    body = {k: v for k, v in model.state_dict().items() if not k.startswith(HEADS[family] + ".")}
    before = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(value, before[name]) for name, value in body.items())


def test_features_keep_the_order_of_the_rows_and_ignore_padding(tmp_path: Path) -> None:
    save_encoder("bert", tmp_path)
    encoder = load_encoder(tmp_path, ["no", "yes"], MAX_TOKENS)
    texts = ["a", "rain " * 60, "the cat walked", "x y", *(f"word {i}" for i in range(40))]
    ticks: list[tuple[int, int, str]] = []
    together = extract_features(encoder, texts, MAX_TOKENS, lambda *tick: ticks.append(tick))
    alone = np.concatenate([extract_features(encoder, [text], MAX_TOKENS) for text in texts])
    assert np.abs(together - alone).max() < 1e-5
    assert np.median(np.ptp(alone, axis=0)) > 0.1
    assert ticks == [(32, 44, "texts"), (44, 44, "texts")]


def test_same_seed_same_weights_other_seed_other_folds(tmp_path: Path) -> None:
    save_encoder("distilbert", tmp_path / "hf")
    write_rows(tmp_path / "rows.csv", 2, n_each=12)
    fits = [train(tmp_path / "hf", tmp_path / "rows.csv", tmp_path / f"out{i}", ["no", "yes"], 0) for i in range(2)]
    weights = [(tmp_path / f"out{i}" / "model.safetensors").read_bytes() for i in range(2)]
    assert fits[0] == fits[1]
    assert weights[0] == weights[1]
    rng = np.random.default_rng(0)
    noise, targets = rng.standard_normal((60, 4)), rng.integers(0, 2, 60)
    assert head._fit(noise, targets, 0, ())[2] != head._fit(noise, targets, 1, ())[2]


def test_cross_validation_is_honest_on_noise(tmp_path: Path) -> None:
    """Labels drawn at random: an accuracy far above one half would mean that folds leak."""
    rng = np.random.default_rng(0)
    _, _, fit = head._fit(rng.standard_normal((200, 16)), rng.integers(0, 2, 200), 0, ())
    assert fit.cv_accuracy_mean < 0.62
    assert fit.c == min(C_GRID) or fit.cv_accuracy_mean > 0.5


def test_a_head_absent_from_the_checkpoint_is_drawn_from_the_seed(tmp_path: Path) -> None:
    save_encoder("roberta", tmp_path / "hf").roberta.save_pretrained(tmp_path / "body")
    (tmp_path / "body" / "tokenizer.json").write_bytes((tmp_path / "hf" / "tokenizer.json").read_bytes())
    (tmp_path / "body" / "tokenizer_config.json").write_bytes((tmp_path / "hf" / "tokenizer_config.json").read_bytes())
    write_rows(tmp_path / "rows.csv", 2, n_each=12)
    state = torch.random.get_rng_state()
    fits = [train(tmp_path / "body", tmp_path / "rows.csv", tmp_path / f"out{i}", ["no", "yes"], 3) for i in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [name for name in fits[0].fresh if "dense" in name] == ["classifier.dense.bias", "classifier.dense.weight"]
    first, second = ((tmp_path / f"out{i}" / "model.safetensors").read_bytes() for i in range(2))
    assert first == second
    model = load_encoder(tmp_path / "out0", ["no", "yes"], MAX_TOKENS)
    assert model.fresh == ()
    assert head_linear(model.model) is model.model.classifier.out_proj


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,1\n", r"has no column `target`; it has \['text', 'label'\]"),
        ("text,target\n", "has no rows under its header"),
        ("", r"has no column `text`; it has \[\]"),
        ("text,target\n" + "a,1\n" * 9, r"too few rows of label \{'0': 0\}"),
        ("text,target\n" + "a,1\nb,0\n" * 9 + "c,yes\n", "values that are no label: 'yes'. Use integers from 0 to 1"),
        ("text,target\n" + "a,1\nb,0\n" * 9 + "c,2\n", "no label: '2'"),
        ("text,target\n" + "a,1\nb,0\n" * 9 + "c\n", "no label: None"),
        ("text,target\n" + "a,1\nb,0\n" * 4, "Every label needs at least 5"),
        ('text,target\n"a,1\n', "as a CSV table"),
        (b"text,target\ncaf\xe9,1\n", "as a CSV table"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SlimpiError, match=message):
        read_rows(path, "text", "target", 2)


def test_absent_table_and_taken_folder_leave_nothing(tmp_path: Path) -> None:
    save_encoder("bert", tmp_path / "hf")
    with pytest.raises(SlimpiError, match="cannot read"):
        train(tmp_path / "hf", tmp_path / "absent.csv", tmp_path / "out", ["no", "yes"])
    write_rows(tmp_path / "rows.csv", 2, n_each=6)
    with pytest.raises(SlimpiError, match="already exists"):
        train(tmp_path / "hf", tmp_path / "rows.csv", tmp_path / "hf", ["no", "yes"])
    (tmp_path / "out").mkdir()
    train(tmp_path / "hf", tmp_path / "rows.csv", tmp_path / "out", ["no", "yes"])  # an empty folder is fine
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out", "rows.csv"]

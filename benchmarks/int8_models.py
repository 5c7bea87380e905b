"""The fine-tuned classifiers that benchmarks/int8_table.py compares: MiniLM-L6's last layers, several seeds a task.

The embeddings and the first layers are frozen, so that their outputs are computed once for all seeds; the last
TRAINED_LAYERS, the pooler and the head learn. That is what a CPU does in minutes. Another classifier's folder put in
the place of one of these is used as it is.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.encoders import Encoder, load_encoder
from pipeline.progress import Progressor
from pipeline.store import whole_folder

TRAINED_LAYERS, EPOCHS, BATCH, PEAK_LR, WARM_UP = 2, 3, 32, 1e-4, 0.1
HOW = f"MiniLM-L6's last {TRAINED_LAYERS} layers, pooler and head, {EPOCHS} epochs"
LABELS = ["0", "1"]
MAX_TOKENS = 96


@dataclass(frozen=True)
class Rows:
    """Texts with their labels 0/1."""

    texts: list[str]
    targets: list[int]


def read_sst2(path: Path) -> Rows:
    """A GLUE table: sentence, tab, label; one header line, no quoting."""
    with path.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return Rows([row[0].strip() for row in rows], [int(row[1]) for row in rows])


def train_seeds(
    source: Path, read_rows: Callable[[], Rows], out: Path, seeds: range, progress: Progressor
) -> list[Path]:
    """Classifier folders out-SEED fine-tuned on the rows from the BERT encoder in `source`; those that exist stay."""
    folders = {seed: out.with_name(f"{out.name}-{seed}") for seed in seeds}
    missing = [seed for seed, folder in folders.items() if not (folder / "config.json").is_file()]
    if missing:
        rows = read_rows()
        with progress.step(f"{out.name}: outputs of the frozen layers") as tick:
            hidden = []
            encoder = load_encoder(source, LABELS, MAX_TOKENS)
            for done, text in enumerate(rows.texts, 1):
                hidden.append(_frozen_output(encoder, text))
                tick(done, len(rows.texts), "texts")
    for seed in missing:
        encoder = load_encoder(source, LABELS, MAX_TOKENS, seed)
        _train(encoder, hidden, rows.targets, seed, progress, out.name)
        with whole_folder(folders[seed]) as folder:
            encoder.model.eval().save_pretrained(folder, safe_serialization=True)
            encoder.tokenizer.save_pretrained(folder)
    return list(folders.values())


def _frozen_output(encoder: Encoder, text: str) -> torch.Tensor:
    """(n_tokens, hidden) of one text after the frozen layers."""
    batch = encoder.tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        found = encoder.model.bert(**batch, output_hidden_states=True).hidden_states
    return found[-1 - TRAINED_LAYERS][0].clone()


def _train(
    encoder: Encoder, hidden: list[torch.Tensor], targets: list[int], seed: int, progress: Progressor, name: str
) -> None:
    model = encoder.model.train()
    learned = [
        p
        for part in (*model.bert.encoder.layer[-TRAINED_LAYERS:], model.bert.pooler, model.classifier)
        for p in part.parameters()
    ]
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    n_steps = EPOCHS * -(-len(hidden) // BATCH)
    optimizer = torch.optim.AdamW(learned, lr=PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, n_steps, pct_start=WARM_UP, anneal_strategy="linear"
    )
    batches = (batch for _ in range(EPOCHS) for batch in _batches(hidden, rng))
    with progress.step(f"{name}: fine-tune seed {seed}") as tick:
        for done, batch in enumerate(batches, 1):
            logits = _rest(model, [hidden[i] for i in batch])
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([targets[i] for i in batch]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            schedule.step()
            tick(done, n_steps, f"steps, loss {loss.item():.2f}")


def _batches(hidden: list[torch.Tensor], rng: np.random.Generator) -> Iterator[list[int]]:
    """Each text once, like lengths together, the batches in random order."""
    order = sorted(rng.permutation(len(hidden)).tolist(), key=lambda i: len(hidden[i]))
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    yield from (batches[i] for i in rng.permutation(len(batches)))


def _rest(model: Any, hidden: list[torch.Tensor]) -> torch.Tensor:
    """Logits (n, 2) from the frozen layers' outputs, padded to the longest."""
    padded = torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True)
    mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
    for row, states in enumerate(hidden):
        mask[row, : len(states)] = True
    x = padded
    for layer in model.bert.encoder.layer[-TRAINED_LAYERS:]:
        x = layer(x, attention_mask=mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1))[0]
    logits: torch.Tensor = model.classifier(model.dropout(model.bert.pooler(x)))
    return logits

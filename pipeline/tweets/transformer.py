"""Fine-tuning an encoder's components for classification: AdamW, warm-up and linear decay, early stopping.

It stops by the validation loss of calibrated probabilities: a temperature is fit afterwards anyway, and without it
confidence that grows hides what the encoder still learns.

Texts are batched by length, so that little is padded (the tweets here have 8 to 60 tokens). What is frozen is told
by component: the embeddings, each layer, and the head (everything behind the last layer).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from device.records import SlimpiError
from pipeline.encoders import Encoder, encode_batch, load_encoder
from pipeline.pooling import MEAN, pool_mean
from pipeline.progress import Tick, quiet
from pipeline.tweets.batches import length_batches
from pipeline.tweets.calibration import best_temperature
from pipeline.tweets.settings import Settings

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
EVAL_BATCH = 64


class FineTuning(Settings, frozen=True, kw_only=True):
    """trained: "all", "head", or components such as "layer.4, layer.5, head" (see `components`).

    patience: evaluations without a better validation loss before stopping; evaluations_per_epoch of them an epoch.
    layer_decay: a layer learns at this factor of the rate of the layer above (Sun et al. 2019, section 5.3.4).
    tidy: the tokenizer takes URLs for one word and mends broken characters (TIDY).
    pooling: whether the head reads the "first" token's state or the "mean" over tokens (see pipeline.pooling).
    precision: of the products while it learns; weights, validation and what is exported are fp32 in either. "auto" is
    "bf16" where the processor multiplies it, at twice the speed, else "fp32".
    """

    trained: str = "all"
    epochs: int = 3
    learning_rate: float = 5e-5
    batch_size: int = 32
    weight_decay: float = 0.01
    warmup_share: float = 0.1
    layer_decay: float = 0.9
    label_smoothing: float = 0.0
    evaluations_per_epoch: int = 2
    patience: int = 3
    tidy: bool = True
    pooling: Literal["first", "mean"] = "first"
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    @property
    def products(self) -> Literal["fp32", "bf16"]:
        """What "auto" is on this machine."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if _multiplies_bf16() else "fp32"


BF16_FLAGS = {"amx_bf16", "avx512_bf16"}


@lru_cache(maxsize=1)
def _multiplies_bf16() -> bool:
    """Whether the GPU, or else the processor by Linux's list of what it can, has products of bfloat16."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return bool(BF16_FLAGS & set(flags.split()))


@dataclass(frozen=True)
class FineTuned:
    """The encoder as it was at its best validation loss (calibrated), and how it got there."""

    encoder: Encoder
    validation_losses: tuple[float, ...]
    best_evaluation: int
    trained: tuple[str, ...]


def fine_tune(
    model_dir: Path,
    rows: tuple[Sequence[str], Sequence[int]],
    validation: tuple[Sequence[str], Sequence[int]],
    labels: list[str],
    max_tokens: int,
    settings: FineTuning,
    seed: int,
    progress: Tick = quiet,
    device: str = "",
) -> FineTuned:
    """Train the encoder in `model_dir` on (texts, label indices), stop by the loss on `validation`.

    Seeded: the same folder, rows and seed give the same weights on one machine and thread count. SlimpiError for
    what `load_encoder` refuses, unknown components, no rows, or a loss that is not finite.
    """
    encoder = load_encoder(model_dir, labels, max_tokens, seed)
    return tune_encoder(encoder, rows, validation, max_tokens, settings, seed, progress, device)


def tune_encoder(
    encoder: Encoder,
    rows: tuple[Sequence[str], Sequence[int]],
    validation: tuple[Sequence[str], Sequence[int]],
    max_tokens: int,
    settings: FineTuning,
    seed: int,
    progress: Tick = quiet,
    device: str = "",
) -> FineTuned:
    """`fine_tune` of an encoder that is loaded; it is changed in place."""
    texts, targets = list(rows[0]), np.asarray(rows[1])
    if not texts or not len(validation[0]):
        raise SlimpiError(f"{len(texts)} training and {len(validation[0])} validation rows: give some of each.")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = encoder.model.to(where)
    if settings.pooling == MEAN:
        pool_mean(model)
    chosen = choose_components(model, settings.trained)
    if settings.tidy:
        tidy_tokenizer(encoder)
    ids = [encoder.tokenizer(t, truncation=True, max_length=max_tokens)["input_ids"] for t in texts]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        losses, best = _loop(
            encoder,
            texts,
            targets,
            [len(i) for i in ids],
            validation,
            max_tokens,
            settings,
            chosen,
            np.random.default_rng(seed),
            progress,
        )
    model.load_state_dict(best[1])
    return FineTuned(Encoder(model.to("cpu").eval(), encoder.tokenizer, ()), tuple(losses), best[0], tuple(chosen))


def _loop(
    encoder: Encoder,
    texts: list[str],
    targets: IntArray,
    lengths: list[int],
    validation: tuple[Sequence[str], Sequence[int]],
    max_tokens: int,
    settings: FineTuning,
    chosen: dict[str, list[torch.nn.Parameter]],
    rng: np.random.Generator,
    progress: Tick,
) -> tuple[list[float], tuple[int, dict[str, torch.Tensor]]]:
    """Validation losses, and (index, state) of the best."""
    model = encoder.model
    groups = _groups(model, chosen, settings)
    # Fused: one pass over the weights, of which the embeddings that no text of the batch holds are most.
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    per_epoch = math.ceil(len(texts) / settings.batch_size)
    total = per_epoch * settings.epochs
    warmup = max(1, int(total * settings.warmup_share))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, (total - step) / max(1, total - warmup)))
    )
    check_at = {
        round(per_epoch * (i + 1) / settings.evaluations_per_epoch) for i in range(settings.evaluations_per_epoch)
    }
    losses: list[float] = []
    best: tuple[int, dict[str, torch.Tensor]] = (0, {})
    done = 0
    for _ in range(settings.epochs):
        for number, batch in enumerate(length_batches(lengths, settings.batch_size, rng), start=1):
            _set_mode(model, chosen)
            _step(encoder, [texts[i] for i in batch], targets[batch], max_tokens, settings, optimizer)
            schedule.step()
            done += 1
            progress(done, total, f"batches, validation loss {losses[-1]:.4f}" if losses else "batches")
            if number in check_at:
                losses.append(calibrated_loss(encoder_logits(encoder, validation[0], max_tokens), validation[1]))
                if losses[-1] == min(losses):
                    best = len(losses) - 1, copy.deepcopy(model.state_dict())
                elif len(losses) - 1 - best[0] >= settings.patience:
                    return losses, best
    return losses, best


def _step(
    encoder: Encoder,
    texts: list[str],
    targets: IntArray,
    max_tokens: int,
    settings: FineTuning,
    optimizer: torch.optim.Optimizer,
) -> None:
    where = next(encoder.model.parameters()).device
    batch = {name: value.to(where) for name, value in encode_batch(encoder, texts, max_tokens).items()}
    with torch.autocast(where.type, torch.bfloat16, enabled=settings.products == "bf16"):
        logits = encoder.model(**batch).logits.float()
    loss = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(targets).to(where), label_smoothing=settings.label_smoothing
    )
    if not torch.isfinite(loss):
        raise SlimpiError(f"the loss became {loss.item()}. Take a smaller learning_rate than {settings.learning_rate}.")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def encoder_logits(encoder: Encoder, texts: Sequence[str], max_tokens: int) -> FloatArray:
    """(n_texts, n_labels), batched by length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    encoder.model.eval()
    where = next(encoder.model.parameters()).device
    out = np.zeros((len(texts), encoder.model.num_labels))
    with torch.inference_mode():
        for start in range(0, len(order), EVAL_BATCH):
            part = order[start : start + EVAL_BATCH]
            batch = encode_batch(encoder, [texts[i] for i in part], max_tokens)
            out[part] = encoder.model(**{name: value.to(where) for name, value in batch.items()}).logits.cpu().numpy()
    return out


def cross_entropy(logits: FloatArray, targets: Sequence[int] | IntArray) -> float:
    """Mean negative log likelihood, nats."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-log_p[np.arange(len(log_p)), np.asarray(targets)].mean())


def calibrated_loss(logits: FloatArray, targets: Sequence[int] | IntArray) -> float:
    """The least cross-entropy, nats, of the logits over any temperature within [0.05, 20] (Guo et al. 2017)."""
    return cross_entropy(logits / best_temperature(lambda t: cross_entropy(logits / t, targets)), targets)


# Components.


def components(model: Any) -> dict[str, list[torch.nn.Parameter]]:
    """The model's parameters by component, from the input to the output: "embeddings", "layer.0" ..., "head".

    The layers are the longest list of modules in the model's body; what the body registers before them belongs to
    the embeddings, everything else to the head. Shared parameters belong to their first component.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    if not lists:
        raise SlimpiError(f"{model.config.model_type} has no list of layers. Use an encoder such as BERT or RoBERTa.")
    prefix, layers = max(lists, key=lambda pair: len(pair[1]))
    found: dict[str, list[torch.nn.Parameter]] = {"embeddings": []}
    found |= {f"layer.{i}": [] for i in range(len(layers))} | {"head": []}
    behind = False
    for name, parameter in model.named_parameters():
        if name.startswith(prefix + "."):
            behind = True
            found[f"layer.{name[len(prefix) + 1 :].split('.')[0]}"].append(parameter)
        else:
            found["head" if behind else "embeddings"].append(parameter)
    return found


def choose_components(model: Any, trained: str) -> dict[str, list[torch.nn.Parameter]]:
    """The named components, their parameters set to learn and all others not to. SlimpiError for an unknown name."""
    known = components(model)
    names = list(known) if trained == "all" else [name.strip() for name in trained.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise SlimpiError(f'no component {unknown[0]!r}; train "all" or of {", ".join(known)}.')
    for name, parameters in known.items():
        for parameter in parameters:
            parameter.requires_grad_(name in names)
    return {name: known[name] for name in known if name in names}


def _groups(model: Any, chosen: dict[str, list[torch.nn.Parameter]], settings: FineTuning) -> list[dict[str, Any]]:
    """Optimizer groups: rates fall towards the input, biases and norms (vectors) do not decay."""
    depth = {name: i for i, name in enumerate(reversed(components(model)))}
    return [
        {
            "params": [p for p in parameters if (p.ndim > 1) == matrices],
            "lr": settings.learning_rate * settings.layer_decay ** depth[name],
            "weight_decay": settings.weight_decay if matrices else 0.0,
        }
        for name, parameters in chosen.items()
        for matrices in (True, False)
    ]


def _set_mode(model: Any, chosen: dict[str, list[torch.nn.Parameter]]) -> None:
    """Dropout is on; a model whose head alone learns keeps its body still, so that the features are the device's."""
    model.train()
    if list(chosen) == ["head"]:
        model.base_model.eval()


# What tweets hold that costs an encoder many tokens and tells it little: (pattern, replacement), in this order.
TIDY = (
    (r"https?://\S+|www\.\S+", " http "),
    ("&amp;(amp;)?", "&"),
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("\u0089..", " "),  # Windows-1252 quotes and dashes that the tables' source broke
)


def tidy_tokenizer(encoder: Encoder) -> None:
    """Put TIDY before the tokenizer's own normalizer, so that it is part of tokenizer.json and the device does it."""
    from tokenizers import Regex, normalizers

    backend = encoder.tokenizer.backend_tokenizer
    steps = [normalizers.Replace(Regex(pattern), to) for pattern, to in TIDY]
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])

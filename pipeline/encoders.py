"""Encoders with a classification head, loaded from local Hugging Face folders."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from device.records import SlimpiError
from pipeline.encoder_parts import attach_kept_heads
from pipeline.pooling import attach_pooling


@dataclass(frozen=True)
class Encoder:
    """A sequence classifier in eval mode, fp32, its fast tokenizer, and the parameters its checkpoint lacked."""

    model: Any
    tokenizer: Any
    fresh: tuple[str, ...]


def load_encoder(model_dir: Path, labels: list[str], max_tokens: int, seed: int = 0) -> Encoder:
    """Load `model_dir` as a classifier of `labels`; head parameters it lacks are drawn from `seed`.

    Raises SlimpiError for a folder that is no encoder, weights that are not safetensors, a tokenizer without
    tokenizer.json, an encoder body that is incomplete, fewer than two labels, or a max_tokens beyond its positions.
    """
    import transformers

    if not (model_dir / "config.json").is_file():
        raise SlimpiError(f"{model_dir} has no config.json. Name a Hugging Face model folder.")
    _check_tokenizer(model_dir / "tokenizer.json")
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise SlimpiError(f"labels are {labels}: name at least two, each once.")
    id2label = dict(enumerate(labels))
    options = {"local_files_only": True, "trust_remote_code": False}
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, use_fast=True, **options)
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                model_dir,
                num_labels=len(labels),
                id2label=id2label,
                label2id={label: i for i, label in id2label.items()},
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise SlimpiError(
                f"{model_dir} does not load as a sequence classifier: {reason} "
                "It needs config.json, model.safetensors and tokenizer.json of an encoder."
            ) from error
    if tokenizer.pad_token is None:
        raise SlimpiError(f"{model_dir}'s tokenizer names no padding token. Add `pad_token` to tokenizer_config.json.")
    fresh = tuple(sorted({*info["missing_keys"], *info["mismatched_keys"]}))
    _check_body(model, fresh, model_dir)
    _check_positions(model, max_tokens, model_dir)
    attach_kept_heads(model)
    attach_pooling(model)
    kept = {name for name, _ in model.named_parameters()}
    return Encoder(model.eval(), tokenizer, tuple(name for name in fresh if name in kept))


def head_linear(model: Any) -> torch.nn.Linear:
    """The last Linear with one output a label: the classifier proper, after any pooler or dense layer."""
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == model.num_labels]
    if not linears:
        raise SlimpiError(f"{model.config.model_type} ends in no linear layer. Use an encoder such as BERT or RoBERTa.")
    return linears[-1]


def encode_batch(encoder: Encoder, texts: list[str], max_tokens: int) -> dict[str, torch.Tensor]:
    """A padded batch of the inputs the model takes: not all know token types."""
    batch = encoder.tokenizer(texts, truncation=True, max_length=max_tokens, padding=True, return_tensors="pt")
    known = inspect.signature(encoder.model.forward).parameters
    return {name: tensor for name, tensor in batch.items() if name in known}


def save_encoder(encoder: Encoder, out_dir: Path) -> None:
    """A Hugging Face folder; SlimpiError if it cannot be written, and then nothing is left of it."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.partial")
    try:
        encoder.model.save_pretrained(partial, safe_serialization=True)
        encoder.tokenizer.save_pretrained(partial)
        partial.replace(out_dir)
    except OSError as error:
        raise SlimpiError(f"cannot write {out_dir}: {error.strerror or error}. Free some space.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings and bars off the terminal: what they would say is checked and raised here."""
    import transformers

    verbosity, bars = transformers.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _check_tokenizer(path: Path) -> None:
    """The tokenizers library raises bare exceptions on such files: look first."""
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["model"]["type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SlimpiError(f"{path} is not a fast tokenizer ({error!r}). Save the model with one.") from error
    if not isinstance(kind, str):
        raise SlimpiError(f"{path} has a model of type {kind!r}. Save the tokenizer again.")


def _check_body(model: Any, fresh: tuple[str, ...], model_dir: Path) -> None:
    body = [key for key in fresh if key.startswith(model.base_model_prefix + ".") and ".pooler." not in key]
    if body:
        raise SlimpiError(
            f"{model_dir} lacks {len(body)} encoder weights, `{body[0]}` first. "
            "Take a whole checkpoint whose config.json names the right architecture."
        )


def _check_positions(model: Any, max_tokens: int, model_dir: Path) -> None:
    """Learned absolute positions end somewhere; RoBERTa's start after its padding index."""
    limit = None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            taken = 0 if module.padding_idx is None else module.padding_idx + 1
            limit = module.num_embeddings - taken
    if max_tokens < 3 or (limit is not None and max_tokens > limit):
        raise SlimpiError(f"max_tokens is {max_tokens}; {model_dir.name} takes from 3 to {limit or 'any number'}.")

"""Forward passes of an encoder over passages: probabilities, parts looked at, layers left out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.encoder_parts import parts_of
from pipeline.export.onnx_observe import Calibration, batches
from pipeline.progress import Tick, quiet

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

See = Callable[[tuple[torch.Tensor, ...], torch.Tensor], None]
"""Of a module's (positional arguments, output)."""


@torch.no_grad()
def fed(model: Any, passages: Calibration, tick: Tick = quiet) -> Iterator[torch.Tensor]:
    """Logits (n, labels) of one batch after another, in the order of `onnx_observe.in_batches`."""
    known = inspect.signature(model.forward).parameters
    feeds = batches(passages, [name for name in _INPUTS if name in known])
    where = next(model.parameters()).device
    for done, feed in enumerate(feeds, 1):
        yield model(**{name: torch.from_numpy(value).to(where) for name, value in feed.items()}).logits
        tick(done, len(feeds), "batches")


def log_p(model: Any, passages: Calibration) -> torch.Tensor:
    """(n_passages, n_labels) log-probabilities, float64, on the CPU."""
    return torch.cat([torch.log_softmax(logits.cpu().double(), -1) for logits in fed(model, passages)])


def divergence(whole: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(whole || other) in nats a passage, of two results of `log_p`."""
    return float((whole.exp() * (whole - other)).sum(-1).mean())


@contextmanager
def with_layers(model: Any, kept: Sequence[int]) -> Iterator[None]:
    """The model without its other layers, for as long as the block runs."""
    parent, _, leaf = parts_of(model.config.model_type).layers.rpartition(".")
    owner = model.base_model.get_submodule(parent)
    whole = getattr(owner, leaf)
    setattr(owner, leaf, torch.nn.ModuleList(whole[i] for i in kept))
    try:
        yield
    finally:
        setattr(owner, leaf, whole)


@contextmanager
def look(seen: Mapping[torch.nn.Module, See]) -> Iterator[None]:
    """Call these with what their modules get and give, for as long as the block runs."""
    handles = [
        module.register_forward_hook(lambda _, args, out, see=see: see(args, out)) for module, see in seen.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

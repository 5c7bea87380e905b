"""Repair with gradients: a short distillation of the pruned model from the whole one (Hinton et al. 2015; after pruning
Minitron, Muralidharan et al. 2024, section 3): KL divergence of the next token, on the recipe's own text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.checkpoint import Checkpoint, held
from pipeline.progress import Tick, quiet
from pipeline.torch_model import in_transformers

_WARM_UP = 0.1
_CLIP = 1.0


@dataclass(frozen=True)
class Schedule:
    """Steps of `batch` chunks each, learning rate of Adam: up over a tenth of the steps, down again as a cosine."""

    steps: int
    batch: int = 2
    rate: float = 1e-4

    def rate_at(self, step: int) -> float:
        warm = max(1, round(self.steps * _WARM_UP))
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def distill(
    whole: Checkpoint,
    pruned: Checkpoint,
    chunks: torch.Tensor,
    judged: torch.Tensor,
    schedule: Schedule,
    device: torch.device,
    tick: Tick = quiet,
) -> tuple[Checkpoint, dict[str, Any]]:
    """The pruned model with its decoder blocks trained, and what that cost and brought.

    chunks, judged: int64 (n, n_ctx); training goes through `chunks` in a fixed order, as often as the steps take;
    `judged` only decide whether the result is kept. In memory: both models, the pruned one's gradients and Adam's two
    moments, float32.
    """
    begin_s = time.monotonic()
    teacher, student = in_transformers(whole).to(device), in_transformers(pruned).to(device)
    trained = {name: p for name, p in student.named_parameters() if name.startswith("model.layers.")}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    before = _divergence(teacher, student, judged, device)
    optimizer = torch.optim.Adam(trained.values(), lr=schedule.rate)
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(0))
    for step in range(schedule.steps):
        places = [(step * schedule.batch + k) % len(chunks) for k in range(schedule.batch)]
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        _train(teacher, student, chunks[order[places]].to(device))
        torch.nn.utils.clip_grad_norm_(trained.values(), _CLIP)
        optimizer.step()
        optimizer.zero_grad()
        tick(step + 1, schedule.steps, "steps of distillation")
    after = _divergence(teacher, student, judged, device)
    facts = {
        "distill_steps": schedule.steps,
        "distill_tokens": schedule.steps * schedule.batch * chunks.shape[1],
        "distill_s": round(time.monotonic() - begin_s, 1),
        "kld_before": before,
        "kld_after": after,
    }
    if after >= before:
        return pruned, facts
    values = {name: held(name, p.detach().cpu().to(pruned.tensors[name].dtype)) for name, p in trained.items()}
    return replace(pruned, tensors={**pruned.tensors, **values}), facts


def _train(teacher: Any, student: Any, tokens: torch.Tensor) -> None:
    """Add the gradients of the batch's mean divergence, a chunk at a time."""
    for chunk in tokens:
        with torch.no_grad():
            log_p = _log_p(teacher, chunk)
        (_kld(log_p, _log_p(student, chunk)) / len(tokens)).backward()


@torch.no_grad()
def _divergence(teacher: Any, student: Any, chunks: torch.Tensor, device: torch.device) -> float:
    found = [float(_kld(_log_p(teacher, c), _log_p(student, c))) for c in chunks.to(device)]
    return sum(found) / len(found)


def _log_p(model: Callable[..., Any], chunk: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(model(chunk[None], use_cache=False).logits[0].float(), -1)


def _kld(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Mean KL(p || q) in nats a token."""
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

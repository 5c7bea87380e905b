"""Repair with gradients: a short distillation of the pruned model from the whole one (Hinton et al. 2015; after pruning
Minitron, Muralidharan et al. 2024, section 3): KL divergence of the next token, on the recipe's own text."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.checkpoint import Checkpoint, held
from pipeline.progress import Tick, quiet
from pipeline.prune.cut import ATTENTION, MLP
from pipeline.torch_model import in_transformers, logits_of

_WARM_UP = 0.1
_CLIP = 1.0
_SMALLEST = 1e-3  # Shazeer and Stern's: what is all zeros moves, too


@dataclass(frozen=True)
class Schedule:
    """Steps of `batch` chunks each. rate: of Adam, as a share of a tensor's root mean square (Shazeer and Stern 2018,
    section 8): one model's weights are fourteen times another's. Up over a tenth of the steps, down again as a cosine.
    ends_only: train no matrices but those that end a layer's parts, as least squares do, and the norms."""

    steps: int
    batch: int = 2
    rate: float = 5e-4
    ends_only: bool = False

    def rate_at(self, step: int) -> float:
        warm = max(1, round(self.steps * _WARM_UP))
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def trains(self, name: str, parameter: torch.Tensor) -> bool:
        """Whether a parameter of the model is changed: those of the decoder blocks are, or the ends of their parts."""
        if not name.startswith("model.layers."):
            return False
        return not self.ends_only or parameter.ndim == 1 or name.endswith((ATTENTION, MLP))


class _Teacher:
    """What the whole model says of chunks, its layers no longer in memory: the hidden states behind its last norm,
    float32 (n_ctx, d) of each chunk, and its output matrix."""

    @torch.no_grad()
    def __init__(self, whole: Checkpoint, chunks: list[torch.Tensor], device: torch.device, tick: Tick) -> None:
        model = in_transformers(whole).to(device)
        self.states: list[torch.Tensor] = []
        for index, chunk in enumerate(chunks):
            self.states.append(model.model(chunk[None].to(device), use_cache=False).last_hidden_state[0].cpu())
            tick(index + 1, len(chunks), "chunks through the whole model")
        model.model.layers = torch.nn.ModuleList()  # its memory is free before the pruned model takes some
        self.head, self.config, self.device = model.lm_head, model.config, device

    @torch.no_grad()
    def log_p(self, index: int) -> torch.Tensor:
        """Log-probabilities of a chunk: (n_ctx, vocabulary)."""
        return torch.log_softmax(logits_of(self.head, self.config, self.states[index].to(self.device)).float(), -1)


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
    `judged` only decide whether the result is kept. In memory: the whole model first, alone; then its output matrix and
    the pruned model, with gradients and Adam's two moments of what is trained; all float32.
    """
    begin_s = time.monotonic()
    n = len(chunks)
    every = [*chunks, *judged]
    teacher = _Teacher(whole, every, device, tick)
    student = in_transformers(pruned).to(device)
    trained = {name: p for name, p in student.named_parameters() if schedule.trains(name, p)}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    before = _divergence(teacher, student, every, n)
    sizes = [max(_SMALLEST, float(p.detach().square().mean().sqrt())) for p in trained.values()]
    optimizer = torch.optim.Adam([{"params": [parameter]} for parameter in trained.values()])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(schedule.steps):
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = schedule.rate_at(step) * size
        for k in range(schedule.batch):
            place = order[(step * schedule.batch + k) % n]
            (_kld(teacher, student, every, place) / schedule.batch).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), _CLIP)
        optimizer.step()
        optimizer.zero_grad()
        tick(step + 1, schedule.steps, "steps of distillation")
    after = _divergence(teacher, student, every, n)
    better = after < before  # not of a model that overflowed
    facts = {
        "distill_steps": schedule.steps,
        "distill_tokens": schedule.steps * schedule.batch * chunks.shape[1],
        "distill_s": round(time.monotonic() - begin_s, 1),
        "kld_before": before,
        "kld_after": after,
        "kld": after if better else before,
    }
    if not better:
        return pruned, facts
    values = {name: held(name, p.detach().cpu().to(pruned.tensors[name].dtype)) for name, p in trained.items()}
    return replace(pruned, tensors={**pruned.tensors, **values}), facts


@torch.no_grad()
def _divergence(teacher: _Teacher, student: Any, chunks: list[torch.Tensor], start: int) -> float:
    """Mean over the chunks from `start` on."""
    found = [float(_kld(teacher, student, chunks, place)) for place in range(start, len(chunks))]
    return sum(found) / len(found)


def _kld(teacher: _Teacher, student: Any, chunks: list[torch.Tensor], place: int) -> torch.Tensor:
    """Mean KL(whole || pruned) in nats a token of one chunk."""
    logits = student(chunks[place][None].to(teacher.device), use_cache=False).logits[0]
    log_q = torch.log_softmax(logits.float(), -1)
    return torch.nn.functional.kl_div(log_q, teacher.log_p(place), reduction="batchmean", log_target=True)

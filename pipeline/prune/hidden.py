"""Narrower hidden states, by Minitron's importance; the norms' gains make good for the shorter sums of squares."""

from __future__ import annotations

from dataclasses import replace

import torch

from device.records import SlimpiError
from pipeline.architectures import norm_offset
from pipeline.progress import Tick, quiet
from pipeline.prune.stream import BATCH, Judge
from pipeline.prune.widths import Pruned, top


@torch.no_grad()
def hidden(judge: Judge, share: float, tick: Tick = quiet) -> Pruned:
    """Keep the hidden channels with the largest mean magnitude after the layers' norms (Minitron, Muralidharan et al.
    2024, section 2.2). A norm over fewer channels divides by another root mean square: its gain is scaled by the
    ratio."""
    stream, dims = judge.stream, judge.stream.dims
    multiple = next((block for block in (256, 32) if dims.hidden % block == 0), 1)
    count = round(dims.hidden * (1 - share) / multiple) * multiple
    if not 0 < count < dims.hidden:
        raise SlimpiError(f"{share:.0%} of {dims.hidden} hidden channels, in multiples of {multiple}, is none or all.")
    stream.set(dims.whole)
    norms = {n: m for n, m in stream.model.named_modules() if n.endswith("norm") and _per_channel(m, dims.hidden)}
    seen = {name: _Seen(dims.hidden) for name in norms}
    hooks = [norms[name].register_forward_hook(seen[name]) for name in norms]
    for done, chunks in enumerate(stream.chunks.split(BATCH), 1):
        stream.model(chunks.to(stream.device), use_cache=False)
        tick(done * BATCH, len(stream.chunks), "chunks")
    for hook in hooks:
        hook.remove()
    kept = top(torch.stack([of.after for of in seen.values()]).sum(0).float(), count)
    new = {}
    for name, of in seen.items():
        before = of.before / of.before.sum()
        ratio = float((before[list(kept)].sum() * dims.hidden / count).sqrt())
        offset = norm_offset(stream.checkpoint.architecture, f"{name}.weight")
        gain = norms[name].weight.detach().cpu()[list(kept)] + offset
        new[f"{name}.weight"] = gain * ratio - offset
    return Pruned(replace(dims.whole, hidden=kept), new)


def _per_channel(module: torch.nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and tuple(weight.shape) == (width,)


class _Seen:
    """Sums of a norm's squared inputs and absolute outputs, by channel."""

    def __init__(self, width: int) -> None:
        self.before, self.after = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)

    def __call__(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        x, y = (t.detach().float().cpu().reshape(-1, t.shape[-1]) for t in (args[0], out))
        # As the norm sees it: each token counts by its shape, not by its length.
        self.before += (x.square() / x.square().mean(1, keepdim=True).clamp_min(1e-30)).sum(0, dtype=torch.float64)
        self.after += y.abs().sum(0, dtype=torch.float64)

"""The inputs of the matrices that end a layer's parts: their means and E[x x^T], over a stream's chunks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.progress import Tick, quiet
from pipeline.prune.spill import spilled
from pipeline.prune.stream import BATCH, Stream

GRAM_ROWS = 1024


@dataclass(frozen=True)
class Moments:
    """hessian E[x x^T] (columns, columns), mean (columns,), mean_abs E|x| (columns,), float32."""

    hessian: torch.Tensor
    mean: torch.Tensor
    mean_abs: torch.Tensor

    @property
    def mean_x2(self) -> torch.Tensor:
        return self.hessian.diagonal()


def add_gram(gram: torch.Tensor, x: torch.Tensor) -> None:
    """Add x^T x of x (n, columns) to the lower triangle of gram (columns, columns), block by block of rows: half of the
    work. What is above the blocks stays."""
    for start in range(0, len(gram), GRAM_ROWS):
        stop = min(start + GRAM_ROWS, len(gram))
        gram[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])


class Sums:
    """Running sums of inputs (..., columns): x x^T in float32, x and |x| in float64."""

    def __init__(self) -> None:
        self.n = 0

    def add(self, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        if not self.n:
            self.xx = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            self.x, self.abs_x = (torch.zeros(x.shape[1], dtype=torch.float64, device=x.device) for _ in range(2))
        self.n += len(x)
        add_gram(self.xx, x)
        self.x += x.sum(0, dtype=torch.float64)
        self.abs_x += x.abs().sum(0, dtype=torch.float64)

    def moments(self, scratch: Path | None = None) -> Moments:
        lower = self.xx.cpu().tril() / self.n
        hessian = spilled(lower + lower.tril(-1).T, scratch)
        return Moments(hessian, (self.x / self.n).float().cpu(), (self.abs_x / self.n).float().cpu())


@torch.no_grad()
def collect(stream: Stream, tick: Tick = quiet, scratch: Path | None = None) -> list[tuple[Moments, Moments]]:
    """Of every layer (inputs of o_proj, inputs of down_proj), in the whole model; large ones in files in `scratch`."""
    stream.set(stream.dims.whole)
    hidden, found = stream.embedded, []
    for index in range(len(stream.layers)):
        sums = Sums(), Sums()
        for gate, of in zip(stream.gates[index], sums, strict=True):
            gate.seen = of.add
        parts = [stream.run(index, part.to(stream.device)).cpu() for part in hidden.split(BATCH)]
        for gate in stream.gates[index]:
            gate.seen = None
        hidden = torch.cat(parts)
        found.append((sums[0].moments(scratch), sums[1].moments(scratch)))
        tick(index + 1, len(stream.layers), "layers")
    return found

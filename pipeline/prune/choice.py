"""What a pruner chose, on disk: a cut, and the tensors that got other values."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import torch

from pipeline.prune.cut import Cut
from pipeline.prune.widths import Pruned

_CUT = "cut"


def save_pruned(path: Path, pruned: Pruned) -> None:
    """Cut and refitted matrices in one .npz without pickle; `load_pruned` reads it."""
    tensors = {name: value.numpy() for name, value in pruned.new.items()}
    with path.open("wb") as handle:
        np.savez(handle, allow_pickle=False, **{_CUT: np.array(msgspec.json.encode(pruned.cut).decode())}, **tensors)


def load_pruned(path: Path) -> Pruned:
    """Of a stage, whose hash was checked."""
    with np.load(path, allow_pickle=False) as data:
        cut = msgspec.json.decode(str(data[_CUT]), type=Cut)
        return Pruned(cut, {name: torch.from_numpy(data[name]) for name in data.files if name != _CUT})

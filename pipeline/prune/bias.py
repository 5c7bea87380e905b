"""FLAP's compensation: the mean of what removed MLP channels added, as a bias (An et al. 2023, section 3.4)."""

from __future__ import annotations

from dataclasses import replace

import torch

from device.records import SlimpiError
from pipeline.architectures import ARCHITECTURES
from pipeline.checkpoint import Checkpoint
from pipeline.prune.cut import MLP, apply
from pipeline.prune.scores import Evidence
from pipeline.prune.widths import Pruned

_FLAG = "mlp_bias"


def compensated(checkpoint: Checkpoint, evidence: Evidence, pruned: Pruned) -> Checkpoint:
    """The pruned model with a bias in every MLP that lost channels. Heads are left as they are: llama.cpp's biases of
    attention want all of them. SlimpiError for families without biases in their MLPs."""
    if _FLAG not in ARCHITECTURES[checkpoint.architecture].optional_tensors:
        raise SlimpiError(f"a {checkpoint.architecture} has no bias in its MLPs. Take +REPAIR, which needs none.")
    new, dims = dict(pruned.new), evidence.stream.dims
    ends = zip(pruned.cut.layers, evidence.stream.ends, evidence.moments, strict=True)
    for index, (layer, modules, (_, moments)) in enumerate(ends):
        prefix = f"model.layers.{index}.mlp"
        matrix = modules.mlp.weight.detach().cpu()
        had = modules.mlp.bias
        bias = torch.zeros(len(matrix)) if had is None else had.detach().cpu().clone()
        for name in ("gate_proj", "up_proj"):
            if had is None:
                new[f"{prefix}.{name}.bias"] = torch.zeros(len(layer.channels))
        # What is kept may have moved already; the bias makes up for the means that still are amiss.
        after = new.get(f"model.layers.{index}.{MLP}")
        kept = list(layer.channels)
        full = torch.zeros_like(matrix)
        full[:, kept] = matrix[:, kept] if after is None else after
        if len(kept) < dims.channels:
            bias += (matrix - full) @ moments.mean
        new[f"{prefix}.down_proj.bias"] = bias
    return apply(replace(checkpoint, config={**checkpoint.config, _FLAG: True}), pruned.cut, new)

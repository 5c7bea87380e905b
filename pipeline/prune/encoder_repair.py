"""Repair of pruned encoders without gradients: the matrices that end the parts, refit one after another.

These families add, then normalize: with x the last matrix' input and r the residual in the model repaired so far, its
weights and bias are refit by min E|t - r - W x - b|^2 + penalty |W - W0|^2, t being the whole model's sum before the
LayerNorm. Where layers are gone behind a part, t is the sum before the LayerNorm of the last of them, and the part
takes over that LayerNorm, so that it also stands in for them (the least squares of SliceGPT and LLM-Streamline, but
sequential and towards the whole model). Penalties are chosen on passages that took no part in the fit
(`repair.ridge`); where none helps there, all stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipeline.encoder_parts import parts_of
from pipeline.export.onnx_observe import Calibration, in_batches
from pipeline.progress import Tick, quiet
from pipeline.prune.encoder_passes import fed, look, with_layers
from pipeline.prune.repair import ridge


@torch.no_grad()
def least_squares(
    whole: Any, pruned: Any, layers: Sequence[int], passages: Calibration, tick: Tick = quiet
) -> list[str]:
    """Change `pruned`, which kept these layers of `whole`, in place; the parts that were refit, as `0.attention` by the
    pruned model's own numbers. A part's inputs at all tokens are in memory at once, float32."""
    parts = parts_of(whole.config.model_type)
    before, after = (list(model.base_model.get_submodule(parts.layers)) for model in (whole, pruned))
    order = _by_passage(passages)
    refit = []
    for own, index in enumerate(layers):
        last = layers[own + 1] - 1 if own + 1 < len(layers) else len(before) - 1
        for name, path, norm_path, source in (
            ("attention", parts.attention, parts.attention_norm, index),
            ("mlp", parts.mlp, parts.mlp_norm, last),
        ):
            dense, norm = (after[own].get_submodule(p) for p in (path, norm_path))
            wanted_norm = before[source].get_submodule(norm_path)
            target = _sums(whole, source + 1, wanted_norm, passages)
            if _refit(pruned, own, dense, norm, target, passages, order):
                norm.load_state_dict(wanted_norm.state_dict())
                refit.append(f"{own}.{name}")
        tick(own + 1, len(layers), "layers repaired")
    return refit


def _sums(model: Any, n_layers: int, norm: torch.nn.Module, passages: Calibration) -> torch.Tensor:
    """What a LayerNorm reads at every token (tokens, d); layers behind are not run."""
    seen: list[torch.Tensor] = []
    with with_layers(model, range(n_layers)), look({norm: lambda args, _: seen.append(_rows(args[0]))}):
        for _ in fed(model, passages):
            pass
    return torch.cat(seen)


def _refit(
    model: Any,
    own: int,
    dense: Any,
    norm: torch.nn.Module,
    target: torch.Tensor,
    passages: Calibration,
    order: torch.Tensor,
) -> bool:
    inputs: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    seen = {
        dense: lambda args, _: inputs.append(_rows(args[0])),
        norm: lambda args, _: sums.append(_rows(args[0])),
    }
    with with_layers(model, range(own + 1)), look(seen):
        for _ in fed(model, passages):
            pass
    x = torch.cat(inputs)
    change = ridge(torch.cat([x, torch.ones(len(x), 1)], 1)[order], (target - torch.cat(sums))[order])
    if change is None:
        return False
    dense.weight += change[:, :-1].to(dense.weight.device)
    dense.bias += change[:, -1].to(dense.bias.device)
    return True


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.detach().reshape(-1, x.shape[-1]).float().cpu()


def _by_passage(passages: Calibration) -> torch.Tensor:
    """Rows of tokens in the order of the text: batches go by length, and what is held out must not be the longest."""
    order = in_batches(passages)
    owners = np.repeat(order, [len(passages.encodings[i].ids) for i in order])
    return torch.from_numpy(np.argsort(owners, kind="stable"))

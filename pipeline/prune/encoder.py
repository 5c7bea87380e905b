"""Pruning of encoder classifiers: whole layers, attention heads or MLP channels go; every layer loses the same number.

Everything is measured on unlabelled passages, batched by length so that nothing is padded. What is left is an ordinary
transformers model whose config says its sizes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from device.records import SlimpiError
from pipeline.encoder_parts import EncoderSizes, attach_kept_heads, parts_of, sizes_of
from pipeline.encoders import Encoder
from pipeline.export.onnx_observe import Calibration
from pipeline.progress import Tick, quiet
from pipeline.prune import PruneSpec, encoder_repair
from pipeline.prune.encoder_passes import See, divergence, fed, log_p, look, with_layers

CHANNEL_MULTIPLE = 32
"""What channels that stay are divisible by: the block of the formats downstream, and whole registers of the device."""


@dataclass(frozen=True)
class EncoderCut:
    """What stays, ascending: layers of the whole model, and for each of them its heads and MLP channels."""

    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, ...], ...]


TrainOn = Callable[[Encoder, Tick], tuple[Encoder, dict[str, Any]]]
"""Trains a classifier on as it was trained before; it, and what a manifest says of that."""


@dataclass(frozen=True)
class Pruning:
    """A whole encoder (on `device`, not changed), and the passages by which it is pruned and repaired. train: for the
    repair that trains, None where there is nothing to train on."""

    encoder: Encoder
    passages: Calibration
    device: torch.device
    tick: Tick = quiet
    train: TrainOn | None = None

    @property
    def sizes(self) -> EncoderSizes:
        return sizes_of(self.encoder.model.config.to_dict(), "the encoder")


def n_kept(spec: PruneSpec, sizes: EncoderSizes) -> int:
    """Layers that stay, or heads or channels that stay in every layer; channels to the nearest multiple of
    CHANNEL_MULTIPLE. SlimpiError if that is none or all of them."""
    if spec.percent is None:
        raise ValueError("a share that is still to be chosen")  # names of encoders' variants cannot have it
    n = getattr(sizes, spec.pruner)
    step = CHANNEL_MULTIPLE if spec.pruner == "channels" else 1
    kept = round(n * (1 - spec.percent / 100) / step) * step
    if not 0 < kept < n:
        multiples = f" in multiples of {step}" if step > 1 else ""
        where = "" if spec.pruner == "layers" else " in a layer"
        raise SlimpiError(
            f"{spec.name}: of {n} {spec.pruner}{where}{multiples}, {'none' if kept <= 0 else 'all'} would stay. "
            f"Prune another share, {100 * step / n:.3g} % is one step, or something else than {spec.pruner}."
        )
    return kept


def whole_cut(sizes: EncoderSizes) -> EncoderCut:
    heads, channels = tuple(range(sizes.heads)), tuple(range(sizes.channels))
    return EncoderCut(tuple(range(sizes.layers)), (heads,) * sizes.layers, (channels,) * sizes.layers)


def layers(subject: Pruning, kept: int) -> EncoderCut:
    """Greedily the layer whose loss costs least, by measured KL(whole || pruned) of the labels' probabilities, all that
    are left tried at every step."""
    model = subject.encoder.model
    reference = log_p(model, subject.passages)
    n = subject.sizes.layers
    left = list(range(n))
    total = sum(range(kept + 1, n + 1))
    done = 0
    while len(left) > kept:
        costs = {}
        for index in left:
            rest = [i for i in left if i != index]
            with with_layers(model, rest):
                costs[index] = divergence(reference, log_p(model, subject.passages))
            done += 1
            subject.tick(done, total, "models without a layer measured")
        left.remove(min(left, key=lambda index: costs[index]))
    whole = whole_cut(subject.sizes)
    return EncoderCut(tuple(left), whole.heads[:kept], whole.channels[:kept])


def heads(subject: Pruning, kept: int) -> EncoderCut:
    """In every layer the heads whose columns of the attention's last matrix have the largest `column_scores`."""
    sizes = subject.sizes
    found = column_scores(subject, parts_of(subject.encoder.model.config.model_type).attention)
    per_head = [scores.reshape(sizes.heads, -1).sum(1) for scores in found]
    return replace(whole_cut(sizes), heads=tuple(_top(scores, kept) for scores in per_head))


def channels(subject: Pruning, kept: int) -> EncoderCut:
    """In every layer the channels with the largest `column_scores` of the MLP's last matrix."""
    found = column_scores(subject, parts_of(subject.encoder.model.config.model_type).mlp)
    return replace(whole_cut(subject.sizes), channels=tuple(_top(scores, kept) for scores in found))


ENCODER_PRUNERS: Mapping[str, Callable[[Pruning, int], EncoderCut]] = MappingProxyType(
    {"layers": layers, "heads": heads, "channels": channels}
)
TRAIN = "train"


def refit(subject: Pruning, cut: EncoderCut, made: Any) -> tuple[Any, dict[str, Any]]:
    """Least squares, see `encoder_repair`; no labels."""
    return made, {
        "refit": encoder_repair.least_squares(subject.encoder.model, made, cut.layers, subject.passages, subject.tick)
    }


def train_on(subject: Pruning, cut: EncoderCut, made: Any) -> tuple[Any, dict[str, Any]]:
    """The labelled rows that the whole classifier was trained on, once more."""
    if subject.train is None:
        raise ValueError("nothing to train on")  # check_prunable refuses it
    trained, facts = subject.train(Encoder(made, subject.encoder.tokenizer, ()), subject.tick)
    return trained.model.to(subject.device), facts


ENCODER_REPAIRS: Mapping[str, Callable[[Pruning, EncoderCut, Any], tuple[Any, dict[str, Any]]]] = MappingProxyType(
    {"repair": refit, TRAIN: train_on}
)


def column_scores(subject: Pruning, path: str) -> list[torch.Tensor]:
    """Of each layer's matrix at `path`: |W_:j|^2 E[x_j^2] (columns,), float64, x being its inputs at all tokens: the
    squared form, summed over rows, of |W_ij| |X_j| (Sun et al. 2023, Wanda, eq. 1)."""
    model = subject.encoder.model
    blocks = model.base_model.get_submodule(parts_of(model.config.model_type).layers)
    matrices = [block.get_submodule(path) for block in blocks]
    sums = [torch.zeros(m.weight.shape[1], dtype=torch.float64, device=m.weight.device) for m in matrices]

    def adder(total: torch.Tensor) -> See:
        def add(args: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
            total.add_(args[0].reshape(-1, args[0].shape[-1]).double().square().sum(0))

        return add

    with look({matrix: adder(total) for matrix, total in zip(matrices, sums, strict=True)}):
        for _ in fed(model, subject.passages, subject.tick):
            pass
    n = subject.passages.n_tokens
    return [
        (m.weight.detach().double().square().sum(0) * total / n).cpu() for m, total in zip(matrices, sums, strict=True)
    ]


def _top(scores: torch.Tensor, n: int) -> tuple[int, ...]:
    """The n largest, ascending; of equals the first."""
    return tuple(sorted(torch.sort(scores, descending=True, stable=True).indices[:n].tolist()))


@torch.no_grad()
def apply(model: Any, cut: EncoderCut) -> Any:
    """A copy of the whole model with what `cut` keeps; its config says so (num_hidden_layers, pruned_heads,
    intermediate_size, under the family's own keys)."""
    parts, sizes = parts_of(model.config.model_type), sizes_of(model.config.to_dict(), "the encoder")
    made = copy.deepcopy(model)
    blocks = made.base_model.get_submodule(parts.layers)
    parent, _, leaf = parts.layers.rpartition(".")
    kept = torch.nn.ModuleList(blocks[i] for i in cut.layers)
    setattr(made.base_model.get_submodule(parent), leaf, kept)
    setattr(made.config, parts.n_layers, len(kept))
    gone = {i: sorted(set(range(sizes.heads)) - set(own)) for i, own in enumerate(cut.heads)}
    if gone := {i: lost for i, lost in gone.items() if lost}:
        made.prune_heads(gone)
        attach_kept_heads(made)
    width = len(cut.channels[0])
    if width < sizes.channels:
        for block, own in zip(kept, cut.channels, strict=True):
            index = torch.tensor(own, device=next(block.parameters()).device)
            _narrow(block.get_submodule(parts.up), index, 0)
            _narrow(block.get_submodule(parts.mlp), index, 1)
        setattr(made.config, parts.n_channels, width)
    return made


def _narrow(linear: Any, index: torch.Tensor, dim: int) -> None:
    """Keep these outputs (dim 0, with their biases) or inputs (dim 1) of a Linear."""
    linear.weight = torch.nn.Parameter(linear.weight.index_select(dim, index).contiguous())
    if dim == 0:
        linear.out_features = len(index)
        if linear.bias is not None:
            linear.bias = torch.nn.Parameter(linear.bias.index_select(0, index).contiguous())
    else:
        linear.in_features = len(index)


def prune_encoder(subject: Pruning, spec: PruneSpec) -> tuple[Encoder, dict[str, Any]]:
    """The pruned encoder, on the CPU, and what a manifest says of it: what stayed, and kl_divergence (nats a passage)
    from the whole model on the passages, before a repair too if there was one."""
    kept = n_kept(spec, subject.sizes)
    model = subject.encoder.model.to(subject.device)
    cut = ENCODER_PRUNERS[spec.pruner](subject, kept)
    made = apply(model, cut)
    reference = log_p(model, subject.passages)
    lost = divergence(reference, log_p(made, subject.passages))
    facts = {"pruner": spec.pruner, "percent": spec.percent, "repair": spec.repair, **_described(subject, cut, made)}
    if spec.repair:
        begin_s = time.monotonic()
        facts["kl_divergence_unrepaired"] = float(f"{lost:.4g}")
        made, how = ENCODER_REPAIRS[spec.repair](subject, cut, made)
        facts |= how
        facts["repair_s"] = round(time.monotonic() - begin_s, 1)
        lost = divergence(reference, log_p(made, subject.passages))
    facts["kl_divergence"] = float(f"{lost:.4g}")
    model.to("cpu")
    return Encoder(made.to("cpu").eval(), subject.encoder.tokenizer, ()), facts


def _described(subject: Pruning, cut: EncoderCut, made: Any) -> dict[str, Any]:
    sizes = subject.sizes
    return {
        "layers": list(cut.layers),
        "layers_before": sizes.layers,
        "heads": [list(own) for own in cut.heads],
        "heads_before": sizes.heads,
        "channels": [len(own) for own in cut.channels],
        "channels_before": sizes.channels,
        "share_removed": round(1 - _block_weights(made) / _block_weights(subject.encoder.model), 4),
        "n_passages": len(subject.passages.encodings),
    }


def _block_weights(model: Any) -> int:
    blocks = model.base_model.get_submodule(parts_of(model.config.model_type).layers)
    return sum(p.numel() for p in blocks.parameters())


def told(facts: Mapping[str, Any]) -> str:
    """A line for a manifest's notes, of the facts of `prune_encoder`: what was asked, what went, and what it cost
    on the calibration text."""
    pruner = str(facts["pruner"])
    before = facts[f"{pruner}_before"]
    left = len(facts["layers"]) if pruner == "layers" else _first(facts[pruner])
    rounded = f" (a multiple of {CHANNEL_MULTIPLE})" if pruner == "channels" else ""
    each = "" if pruner == "layers" else " in every layer"
    before_it = "it was trained on" if facts["repair"] == TRAIN else "its repair"
    repaired = f", {facts['kl_divergence_unrepaired']:.3g} before {before_it}" if facts["repair"] else ""
    name = PruneSpec(pruner, facts["repair"], facts["percent"]).name
    return (
        f"{name}, {facts['percent']:g} % of the {pruner} asked: {left} of {before} {pruner}{each} stay{rounded}, "
        f"{100 * (1 - left / before):.1f} % of them and {100 * facts['share_removed']:.1f} % of the blocks' weights "
        f"are gone; divergence {facts['kl_divergence']:.3g} nats a passage{repaired}"
    )


def _first(per_layer: Sequence[Any]) -> int:
    return per_layer[0] if isinstance(per_layer[0], int) else len(per_layer[0])

"""A whole model run layer by layer over the same chunks of tokens, parts of it masked: what a cut would do, measured.

The model is transformers' own, in float32, in memory as a whole (6 GB for 1.5 billion weights). Each layer's call is
taken down once (masks, positions), so that a layer can be run again on any hidden state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.checkpoint import Checkpoint
from pipeline.prune.cut import Cut, Dims, LayerCut, dims_of
from pipeline.torch_model import in_transformers, logits_of

BATCH = 4  # chunks at once: bounds the attention matrices
_ROWS = 512  # rows of logits at once


@dataclass(frozen=True)
class Ends:
    """The two matrices that end a layer's parts: inputs (tokens, columns), outputs (tokens, hidden), if asked for."""

    attention: Any
    mlp: Any


class _Gate:
    """On the matrix that ends a part: its input times `mask` (columns,), its output times 0 if the part is `off`."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.mask: torch.Tensor | None = None
        self.off = False
        self.seen: Callable[[torch.Tensor], None] | None = None
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        x = args[0] if self.mask is None else args[0] * self.mask
        if self.seen is not None:
            self.seen(x)
        return None if self.mask is None else (x,)

    def _after(self, module: torch.nn.Module, args: object, out: torch.Tensor) -> torch.Tensor | None:
        return out * 0 if self.off else None


class _Middle:
    """On the norm behind a layer's attention: it reads the stream between the parts where they add to it unnormed."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.seen: Callable[[torch.Tensor], None] | None = None
        self.stops = False
        module.register_forward_pre_hook(self._before)

    def _before(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self.seen is not None:
            self.seen(args[0].cpu())
        if self.stops:
            raise _StoppedError


class Stream:
    """The model of a checkpoint and `chunks`, int64 (n, n_ctx). Nothing is masked at first."""

    def __init__(self, checkpoint: Checkpoint, chunks: torch.Tensor, device: torch.device | None = None) -> None:
        self.dims: Dims = dims_of(checkpoint)
        self.checkpoint = checkpoint
        self.device = device or torch.device("cpu")
        self.model = in_transformers(checkpoint).to(self.device)
        self.chunks = chunks
        self.layers = list(self.model.model.layers)
        self.ends = [Ends(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in self.layers]
        self.gates = [(_Gate(ends.attention), _Gate(ends.mlp)) for ends in self.ends]
        self.middles = [_Middle(layer.post_attention_layernorm) for layer in self.layers]
        self.gone = [False] * len(self.layers)
        self.calls: list[dict[str, Any]] = []
        self.embedded = self._take_down(chunks)

    @torch.no_grad()
    def _take_down(self, chunks: torch.Tensor) -> torch.Tensor:
        """Every layer's keyword arguments, which no chunk changes, and the first layer's input of all chunks."""
        embedded: list[torch.Tensor] = []

        def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
            if module is self.layers[0]:
                embedded.append(args[0].cpu())
            self.calls.append(kwargs)

        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.layers]
        self.model(chunks[:1].to(self.device), use_cache=False)
        for hook in hooks[1:]:
            hook.remove()
        taken, self.calls = self.calls, []
        inner, stop = self.model.model, _Stop()
        blocker = self.layers[0].register_forward_pre_hook(stop)
        for chunk in chunks[1:].split(BATCH):
            with contextlib.suppress(_StoppedError):
                inner(chunk.to(self.device), use_cache=False)
        blocker.remove()
        hooks[0].remove()
        self.calls = taken
        return torch.cat(embedded)

    def set(self, cut: Cut) -> None:
        """Mask everything that `cut` does not keep."""
        for index, layer in enumerate(cut.layers):
            self.set_layer(index, layer)

    def set_layer(self, index: int, layer: LayerCut) -> None:
        attention, mlp = self.gates[index]
        self.gone[index] = layer.gone
        attention.mask = self._mask(layer.groups, self.dims.groups, self.dims.head * self.dims.queries_per_group)
        mlp.mask = self._mask(layer.channels, self.dims.channels, 1)
        attention.off, mlp.off = not layer.groups, not layer.channels

    def _mask(self, kept: Sequence[int], n: int, width: int) -> torch.Tensor | None:
        if len(kept) == n:
            return None
        mask = torch.zeros(n, device=self.device)
        mask[list(kept)] = 1
        return mask.repeat_interleave(width)

    @torch.no_grad()
    def layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (chunks, n_ctx, d) after a layer; the same ones where it is gone."""
        if self.gone[index]:
            return hidden
        return torch.cat([self.run(index, part.to(self.device)).cpu() for part in hidden.split(BATCH)])

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """One batch through a layer, on the device."""
        out = self.layers[index](hidden, **self.calls[index])
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def between(self, index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (chunks, n_ctx, d) between a layer's parts and behind it, where parts add to them unnormed."""
        middles: list[torch.Tensor] = []
        self.middles[index].seen = middles.append
        outs = [self.run(index, batch.to(self.device)).cpu() for batch in hidden.split(BATCH)]
        self.middles[index].seen = None
        return torch.cat(middles), torch.cat(outs)

    @torch.no_grad()
    def behind(self, index: int, part: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (tokens, columns) of the matrix that ends a part (0 attention, 1 MLP) and the hidden states behind it,
        where parts add to them unnormed. What follows the part is not run."""
        inputs: list[torch.Tensor] = []
        states: list[torch.Tensor] = []
        gate, middle = self.gates[index][part], self.middles[index]
        gate.seen = lambda x: inputs.append(x.reshape(-1, x.shape[-1]).cpu())
        if part == 0:
            middle.seen, middle.stops = states.append, True
        for batch in hidden.split(BATCH):
            with contextlib.suppress(_StoppedError):
                states.append(self.run(index, batch.to(self.device)).cpu())
        gate.seen, middle.seen, middle.stops = None, None, False
        return torch.cat(inputs), torch.cat(states)

    @torch.no_grad()
    def log_p(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Log-probabilities after the last layer, rows of tokens at a time: (rows, vocabulary), float32."""
        for rows in hidden.reshape(-1, hidden.shape[-1]).split(_ROWS):
            states = self.model.model.norm(rows.to(self.device))
            yield torch.log_softmax(logits_of(self.model.lm_head, self.model.config, states).float(), -1)

    def all_states(self) -> list[torch.Tensor]:
        """Hidden states before every layer and after the last, under what is masked now."""
        states = [self.embedded]
        for index in range(len(self.layers)):
            states.append(self.layer(index, states[-1]))
        return states


class _StoppedError(Exception):
    """What was wanted is seen: what comes behind it need not be run."""


class _Stop:
    def __call__(self, *unused: object) -> None:
        raise _StoppedError


class Judge:
    """Mean KL(whole || cut) in nats a token over a stream's chunks; the whole model's log-probabilities are kept."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        stream.set(stream.dims.whole)
        self.whole = stream.all_states()
        self.reference = [rows.cpu() for rows in stream.log_p(self.whole[-1])]

    def divergence(self, cut: Cut, states: Sequence[torch.Tensor] | None = None, start: int = 0) -> float:
        """Of a cut. `states`, of a cut that is the same before layer `start`, save computing those layers again."""
        self.stream.set(cut)
        hidden = (states or self.whole)[start] if start else self.stream.embedded
        for index in range(start, len(self.stream.layers)):
            hidden = self.stream.layer(index, hidden)
        return self.divergence_of(hidden)

    @torch.no_grad()
    def divergence_of_model(self, model: Any) -> float:
        """Of another model of transformers, on the same chunks."""
        total, reference = 0.0, iter(torch.cat(self.reference).split(self.stream.chunks.shape[1]))
        for chunk, whole in zip(self.stream.chunks, reference, strict=True):
            mine = torch.log_softmax(model(chunk[None].to(self.stream.device), use_cache=False).logits[0].float(), -1)
            theirs = whole.to(mine.device)
            total += float((theirs.exp() * (theirs - mine)).sum(dtype=torch.float64))
        return total / self.stream.chunks.numel()

    def divergence_of(self, hidden: torch.Tensor) -> float:
        """Of the hidden states after the last layer."""
        total = 0.0
        for mine, whole in zip(self.stream.log_p(hidden), self.reference, strict=True):
            theirs = whole.to(mine.device)
            total += float((theirs.exp() * (theirs - mine)).sum(dtype=torch.float64))
        return total / sum(len(rows) for rows in self.reference)

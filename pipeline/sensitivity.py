"""How much the model's output feels an error in each row of each linear layer: one backward pass, in transformers.

A change D of a weight matrix raises the KL divergence of the next-token distribution p over a text, to second order,
by 1/2 E[<D, G>^2], G = sum over tokens of g x^T the gradient of log p(tokens) for tokens drawn from p: the Fisher
information (Amari 1998, eq. 3.1; HAWQ and SqueezeLLM plan by it). What quantizing knows is each row's E[(D_r x)^2];
`collect` gives the factor between them, E|G_r|^2 / E[sum over tokens of |x|^2]. For tokens whose errors do not add up
it is E[g_r^2]; those of keys and values do, since attention averages over tokens.

For the embeddings and the output matrix, whose rows are tokens, the same expectation is a sum of terms
1/2 sum over rows of weight_r D_r H D_r^T. Of the output: the softmax's own curvature, weight p (1 - p) and H of the
last hidden state. Of the embeddings: how often the token comes, and the gradient's second moment after the look-up. A
tied matrix has both.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device.records import SlimpiError
from pipeline.architectures import gguf_names, row_order
from pipeline.checkpoint import Checkpoint
from pipeline.layers import Stats
from pipeline.plan import EMBEDDINGS, OUTPUT
from pipeline.progress import Tick, quiet
from pipeline.torch_model import streamed

_TINY = 1e-30


@dataclass(frozen=True)
class Term:
    """1/2 sum over rows of weights_r D_r H D_r^T nats a token: weights float32 (rows,), hessian (columns, columns)."""

    weights: torch.Tensor
    hessian: torch.Tensor


@dataclass(frozen=True)
class Sensitivity:
    """rows: {block matrix: factors (rows,)}. outer: {embeddings or output matrix: its terms}. By GGUF name."""

    rows: dict[str, torch.Tensor]
    outer: dict[str, list[Term]]


def outer_stats(felt: Sensitivity) -> dict[str, Stats]:
    """What methods take as statistics of the input, for matrices outside the blocks: one H for all rows, each counted
    by its weight. Where H is a gradient's moment it is no input's, but the loss is the same quadratic form."""
    found = {}
    for name, terms in felt.outer.items():
        hessian = sum((term.hessian * term.weights.sum() for term in terms), torch.zeros(()))
        diagonal = hessian.diagonal().contiguous()
        found[name] = Stats(diagonal, diagonal.sqrt(), 0, lambda hessian=hessian: hessian)  # type: ignore[misc]
    return found


def predicted(error: torch.Tensor, hessian: torch.Tensor, rows: torch.Tensor) -> float:
    """Nats a token that W - W^ = error (rows, columns) is predicted to cost, with E[x x^T] and a matrix's factors."""
    return float(0.5 * (rows * ((error @ hessian) * error).sum(1)).sum())


def cut(checkpoint: Checkpoint, text: Path, n_ctx: int, n_chunks: int) -> torch.Tensor:
    """int64 (n_chunks, n_ctx) tokens of the text's start, BOS first in each if the model adds one; n_chunks 0 = all."""
    vocab = checkpoint.vocab
    ids = vocab.to_tokenizers().encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    available = len(ids) // n_ctx
    if available < max(1, n_chunks):
        raise SlimpiError(f"{text} has {available} chunks of {n_ctx} tokens, {n_chunks} asked. Use more text or fewer.")
    chunks = torch.tensor(ids[: (n_chunks or available) * n_ctx]).reshape(-1, n_ctx)
    if vocab.get("add_bos_token") and vocab.get("bos_token_id") is not None:
        chunks[:, 0] = vocab.get("bos_token_id")
    return chunks


def collect(
    checkpoint: Checkpoint,
    chunks: torch.Tensor,
    device: torch.device,
    seed: int = 0,
    tick: Tick = quiet,
    model: Any = None,
) -> Sensitivity:
    """The factors over `chunks` (n, n_ctx) of tokens, for every matrix.

    1/2 sum over rows of factor * E[(D_r x)^2] is the divergence of a token, in nats. In memory, in float32: embeddings,
    output matrix, one decoder block with the activations of all chunks, their hidden states before every block, and
    their logits. The same seed gives the same tokens. model: the checkpoint's in transformers on the device, where
    there is a whole one already; then chunks go through it one by one.
    """
    batches = list(chunks.split(len(chunks) if model is None else 1))
    if model is None:
        model = streamed(checkpoint, device, tick)
        tick = quiet
    taps = {name: _Tap(module) for name, module in _linears(checkpoint, model).items()}
    ends = _Ends(model)
    generator = torch.Generator(device).manual_seed(seed)
    for done, batch in enumerate(batches, 1):
        _there_and_back(model, batch.to(device), ends, generator)
        tick(done, len(batches), "chunks")
    for hook in [*ends.hooks, *(hook for tap in taps.values() for hook in tap.hooks)]:
        hook.remove()
    found = {}
    for name, tap in taps.items():
        order = row_order(checkpoint.architecture, checkpoint.config, name)
        rows = tap.rows.cpu() if order is None else tap.rows.cpu()[torch.from_numpy(np.ascontiguousarray(order))]
        # Where no input ever came no error is felt, as in an FFN of zeros (pipeline.uneven).
        found[name] = (rows / max(tap.inputs, _TINY)).float()
    names = gguf_names(checkpoint.architecture, list(found), checkpoint.config["num_hidden_layers"])
    terms = ends.terms()
    del model, taps, tap, ends, hook
    gc.collect()  # a streamed model's blocks refer to themselves; of 8 billion weights the last read is 0.9 GB
    return Sensitivity({names[name]: rows for name, rows in found.items()}, terms)


def _there_and_back(model: Any, tokens: torch.Tensor, ends: _Ends, generator: torch.Generator) -> None:
    """The gradient of log p of drawn tokens through the model, for chunks (n, n_ctx) of tokens."""
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    log_p = [torch.log_softmax(of_chunk.float(), -1) for of_chunk in logits]
    drawn = [torch.multinomial(of_chunk.detach().exp(), 1, generator=generator) for of_chunk in log_p]
    torch.stack([of_chunk.gather(1, at).sum() for of_chunk, at in zip(log_p, drawn, strict=True)]).sum().backward()
    assert embedded.grad is not None
    for i, chunk in enumerate(tokens):
        ends.add(chunk, embedded.detach()[i], embedded.grad[i], ends.last[i], log_p[i].detach())


class _Ends:
    """Sums over tokens for the embeddings and the output matrix. Soft-capped logits count as if not capped."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.embed, self.head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
        n_rows, n_columns = self.embed.weight.shape
        device = self.embed.weight.device
        self.n_tokens = 0
        self.counts, self.curvature = torch.zeros(n_rows, device=device), torch.zeros(n_rows, device=device)
        self.gradients, self.hidden = (torch.zeros(n_columns, n_columns, device=device) for _ in range(2))
        self.hooks = [self.head.register_forward_pre_hook(self._keep)]

    def _keep(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.last = args[0].detach().float()

    def add(
        self,
        tokens: torch.Tensor,
        embedded: torch.Tensor,
        gradient: torch.Tensor,
        last: torch.Tensor,
        log_p: torch.Tensor,
    ) -> None:
        """A chunk's: embeddings, their gradients and the last hidden states (n_ctx, columns), log p (n_ctx, rows)."""
        p = log_p.exp()
        self.curvature += (p * (1 - p)).sum(0)
        self.hidden += last.T @ (last * (1 - p.square().sum(1))[:, None])
        # Some architectures' look-up scales the row, so that the row feels that much more.
        gradient = gradient * (embedded.norm() / self.embed.weight[tokens].norm())
        self.gradients += gradient.T @ gradient
        self.counts += torch.bincount(tokens, minlength=len(self.counts))
        self.n_tokens += len(tokens)

    def terms(self) -> dict[str, list[Term]]:
        output = Term(self.curvature.cpu() / self.n_tokens, (self.hidden / self.curvature.sum()).cpu())
        looked_up = Term(self.counts.cpu() / self.n_tokens, (self.gradients / self.n_tokens).cpu())
        if self.head.weight is self.embed.weight:
            return {EMBEDDINGS: [output, looked_up]}
        return {OUTPUT: [output], EMBEDDINGS: [looked_up]}


class _Tap:
    """Sums over chunks of |G_r|^2 and of the inputs' |x|^2, taken while the gradient passes a linear layer."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.rows = torch.zeros(())
        self.inputs = 0.0
        self.hooks = [module.register_forward_pre_hook(self._keep), module.register_full_backward_hook(self._add)]

    def _keep(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():  # not where all is computed once more (torch_model.streamed)
            self.x = args[0].detach()

    def _add(self, module: torch.nn.Module, grad_input: object, grad_output: tuple[torch.Tensor, ...]) -> None:
        for g, x in zip(grad_output[0].double(), self.x.double(), strict=True):
            # |G_r|^2 = g_r^T (x x^T) g_r: over pairs of tokens, of which there are fewer than columns.
            self.rows = self.rows.to(g.device) + (g * ((x @ x.T) @ g)).sum(0)
            self.inputs += float(x.square().sum())
        del self.x


def _linears(checkpoint: Checkpoint, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The decoder blocks' linear layers, by the Hugging Face name of their weight."""
    wanted = {n for n, t in checkpoint.tensors.items() if n.startswith("model.layers.") and len(t.shape) == 2}
    return {f"{n}.weight": module for n, module in model.named_modules() if f"{n}.weight" in wanted}


def save(path: Path, found: Sensitivity) -> None:
    """Write an .npz without pickle; `load` reads it."""
    outer = {
        f"{name}{_TERM}{index}{_TERM}{part}": getattr(term, part).numpy()
        for name, terms in found.outer.items()
        for index, term in enumerate(terms)
        for part in ("weights", "hessian")
    }
    rows = {name: rows.numpy() for name, rows in found.rows.items()}
    np.savez(path, allow_pickle=False, **rows, **outer)


def load(path: Path) -> Sensitivity:
    """What `save` wrote."""
    with np.load(path, allow_pickle=False) as data:
        arrays = {name: torch.from_numpy(data[name]) for name in data.files}
    outer: dict[str, list[Term]] = {}
    for key in arrays:
        name, *rest = key.split(_TERM)
        if rest and rest[1] == "weights":
            outer.setdefault(name, []).append(Term(arrays[key], arrays[f"{name}{_TERM}{rest[0]}{_TERM}hessian"]))
    return Sensitivity({name: rows for name, rows in arrays.items() if _TERM not in name}, outer)


_TERM = "|"

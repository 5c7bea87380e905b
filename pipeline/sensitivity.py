"""How much the model's output feels an error in each row of each linear layer: one backward pass, in transformers.

A change D of a weight matrix raises the KL divergence of the next-token distribution p over a text, to second order,
by 1/2 E[<D, G>^2], G = sum over tokens of g x^T the gradient of log p(tokens) for tokens drawn from p: the Fisher
information (Amari 1998, eq. 3.1; HAWQ and SqueezeLLM plan by it). What quantizing knows is each row's E[(D_r x)^2];
`collect` gives the factor between them, E|G_r|^2 / E[sum over tokens of |x|^2]. For tokens whose errors do not add up
it is E[g_r^2]; those of keys and values do, since attention averages over tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from device.schema import SlimpiError
from pipeline.architectures import gguf_names, row_order
from pipeline.checkpoint import Checkpoint
from pipeline.progress import Tick, quiet


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
    checkpoint: Checkpoint, chunks: torch.Tensor, device: torch.device, seed: int = 0, tick: Tick = quiet
) -> dict[str, torch.Tensor]:
    """The factors over `chunks` (n, n_ctx) of tokens: float32 (rows,) by GGUF name, for every block matrix.

    1/2 sum over rows of factor * E[(D_r x)^2] is the divergence of a token, in nats. The whole model is in memory in
    float32, and one chunk's activations. The same seed gives the same tokens.
    """
    model = _in_transformers(checkpoint).to(device)
    taps = {name: _Tap(module) for name, module in _linears(checkpoint, model).items()}
    embed = model.get_input_embeddings()
    generator = torch.Generator(device).manual_seed(seed)
    for done, chunk in enumerate(chunks, 1):
        embedded = embed(chunk[None].to(device)).detach().requires_grad_()
        log_p = torch.log_softmax(model(inputs_embeds=embedded, use_cache=False).logits[0].float(), -1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, drawn).sum().backward()
        tick(done, len(chunks), "chunks")
    found = {}
    for name, tap in taps.items():
        order = row_order(checkpoint.architecture, checkpoint.config, name)
        rows = tap.rows.cpu() if order is None else tap.rows.cpu()[torch.from_numpy(np.ascontiguousarray(order))]
        found[name] = (rows / tap.inputs).float()
    names = gguf_names(checkpoint.architecture, list(found), checkpoint.config["num_hidden_layers"])
    return {names[name]: rows for name, rows in found.items()}


class _Tap:
    """Sums over chunks of |G_r|^2 and of the inputs' |x|^2, taken while the gradient passes a linear layer."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.rows = torch.zeros(())
        self.inputs = 0.0
        module.register_forward_pre_hook(self._keep)
        module.register_full_backward_hook(self._add)

    def _keep(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.x = args[0].detach()[0]

    def _add(self, module: torch.nn.Module, grad_input: object, grad_output: tuple[torch.Tensor, ...]) -> None:
        self.rows = self.rows.to(self.x.device) + (grad_output[0][0].T @ self.x).double().square().sum(1)
        self.inputs += float(self.x.double().square().sum())
        del self.x


def _linears(checkpoint: Checkpoint, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The decoder blocks' linear layers, by the Hugging Face name of their weight."""
    wanted = {n for n, t in checkpoint.tensors.items() if n.startswith("model.layers.") and len(t.shape) == 2}
    return {f"{n}.weight": module for n, module in model.named_modules() if f"{n}.weight" in wanted}


def _in_transformers(checkpoint: Checkpoint) -> Any:
    """The model in float32 with nothing but activations to differentiate."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    known = {key: value for key, value in checkpoint.config.items() if key not in ("model_type", "architectures")}
    config = AutoConfig.for_model(checkpoint.architecture, **known)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.tie_weights()
    model.requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(checkpoint.tensors[name].read())
    return model


def save(path: Path, found: dict[str, torch.Tensor]) -> None:
    np.savez(path, allow_pickle=False, **{name: rows.numpy() for name, rows in found.items()})


def load(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as data:
        return {name: torch.from_numpy(data[name]) for name in data.files}

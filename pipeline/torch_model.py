"""A checkpoint as a model of transformers: whole in memory, or with one decoder block at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from pipeline.architectures import ARCHITECTURES
from pipeline.checkpoint import Checkpoint
from pipeline.progress import Tick, quiet

_NAMES = ("model_type", "architectures")
_BLOCKS = "model.layers"


def in_transformers(checkpoint: Checkpoint) -> Any:
    """The model in float32, in memory as a whole, with nothing but activations to differentiate."""
    from transformers.modeling_utils import no_init_weights

    with no_init_weights():
        model = _built(checkpoint)
    model.tie_weights()
    model.requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(checkpoint.tensors[name].read())
    return model


def logits_of(head: Any, config: Any, states: torch.Tensor) -> torch.Tensor:
    """Of hidden states (..., d) behind a model's last norm, by its output matrix and config: (..., vocabulary)."""
    cap = getattr(config, "final_logit_softcapping", None)
    logits = head(states)
    return torch.tanh(logits / cap) * cap if cap else logits


def streamed(checkpoint: Checkpoint, device: torch.device, tick: Tick = quiet) -> Any:
    """The model in float32 on the device, without the weights of its decoder blocks: a block reads them when it is
    called, and drops those of the block before.

    What goes backward through it computes every block once more (Chen et al. 2016), so that each is read once forward
    and once backward, and between blocks nothing is kept but the hidden states. Of the blocks' modules, hooks see the
    second computation with gradients enabled, the first without. tick counts the blocks read, of one way and back.
    """
    from accelerate import init_empty_weights
    from accelerate.utils import set_module_tensor_to_device

    with init_empty_weights():
        model = _built(checkpoint)
    model.requires_grad_(False).eval()
    for name, tensor in checkpoint.tensors.items():
        if not name.startswith(f"{_BLOCKS}."):
            set_module_tensor_to_device(model, name, device, tensor.read().float())
    for name, buffer in model.named_buffers():
        set_module_tensor_to_device(model, name, device, buffer)
    model.tie_weights()
    reader = _OneBlock(checkpoint, list(model.get_submodule(_BLOCKS)), device, tick)
    for index, block in enumerate(reader.blocks):
        block.forward = partial(_computed_twice, reader, index, block.forward)
    return model


def _built(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if ARCHITECTURES[checkpoint.architecture].per_layer:
        from pipeline.uneven_model import uneven_model

        return uneven_model(checkpoint.architecture, checkpoint.config)
    known = {key: value for key, value in checkpoint.config.items() if key not in _NAMES}
    config = AutoConfig.for_model(checkpoint.architecture, **known)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)


class _OneBlock:
    """The decoder blocks, of which one has its weights."""

    def __init__(self, checkpoint: Checkpoint, blocks: list[torch.nn.Module], device: torch.device, tick: Tick) -> None:
        self.checkpoint, self.blocks, self.device, self.tick = checkpoint, blocks, device, tick
        self.held: int | None = None
        self.n_read = 0

    def hold(self, index: int) -> None:
        from accelerate.utils import set_module_tensor_to_device

        if index == self.held:
            return
        if self.held is not None:
            for name in self._names(self.held):
                set_module_tensor_to_device(self.blocks[self.held], name, "meta")
        self.held = index
        for name in self._names(index):
            weights = self.checkpoint.tensors[f"{_BLOCKS}.{index}.{name}"].read().float()
            set_module_tensor_to_device(self.blocks[index], name, self.device, weights)
        self.n_read += 1
        self.tick(self.n_read, 2 * len(self.blocks) - 1, "blocks, there and back")

    def _names(self, index: int) -> list[str]:
        return [name for name, _ in self.blocks[index].named_parameters()]


def _computed_twice(reader: _OneBlock, index: int, forward: Any, hidden_states: torch.Tensor, **options: Any) -> Any:
    def compute(states: torch.Tensor) -> Any:
        reader.hold(index)
        return forward(states, **options)

    return torch.utils.checkpoint.checkpoint(compute, hidden_states, use_reentrant=True)

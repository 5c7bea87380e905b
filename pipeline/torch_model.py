"""A checkpoint as a model of transformers."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.architectures import ARCHITECTURES
from pipeline.checkpoint import Checkpoint

_NAMES = ("model_type", "architectures")


def in_transformers(checkpoint: Checkpoint) -> Any:
    """The model in float32, in memory as a whole, with nothing but activations to differentiate."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    with no_init_weights():
        if ARCHITECTURES[checkpoint.architecture].per_layer:
            from pipeline.uneven_model import uneven_model

            model = uneven_model(checkpoint.architecture, checkpoint.config)
        else:
            known = {key: value for key, value in checkpoint.config.items() if key not in _NAMES}
            config = AutoConfig.for_model(checkpoint.architecture, **known)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.tie_weights()
    model.requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(checkpoint.tensors[name].read())
    return model

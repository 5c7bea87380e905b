"""A checkpoint as a model of transformers."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.checkpoint import Checkpoint


def in_transformers(checkpoint: Checkpoint) -> Any:
    """The model in float32, in memory as a whole, with nothing but activations to differentiate."""
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

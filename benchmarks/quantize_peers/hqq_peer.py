"""hqq: data-free. settings: nbits, group_size."""

from __future__ import annotations

from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

from quantize_peers.common import Request, load_model, main


def quantize(request: Request) -> Any:
    model = load_model(request.model)
    config = BaseQuantizeConfig(**request.settings, axis=1)
    layers = [(n, m) for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name, linear in layers:
        parent = model.model.get_submodule(name.rpartition(".")[0])
        made = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", initialize=True)
        setattr(parent, name.rpartition(".")[2], made)
    return model


if __name__ == "__main__":
    main(quantize)

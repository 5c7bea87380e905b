"""auto-round: 4 bits, symmetric. settings: group_size, iters."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoTokenizer

from quantize_peers.common import Request, load_model, main


def quantize(request: Request) -> Any:
    model = load_model(request.model)
    chunks = np.load(request.calibration)
    batches = [torch.from_numpy(chunk)[None] for chunk in chunks]
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(request.model),
        bits=4,
        sym=True,
        dataset=batches,
        nsamples=len(chunks),
        seqlen=chunks.shape[1],
        batch_size=1,
        device_map="cpu",
        enable_torch_compile=False,
        **request.settings,
    )
    return rounder.quantize()[0].float()


if __name__ == "__main__":
    main(quantize)

"""nncf: 4 bits, symmetric. settings: group_size, awq, scale_estimation, gptq."""

from __future__ import annotations

from typing import Any

import nncf
import numpy as np
import torch

from quantize_peers.common import Request, load_model, main


class Logits(torch.nn.Module):
    """The model as a function of input ids alone, which is what nncf follows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def quantize(request: Request) -> Any:
    model = Logits(load_model(request.model, attn_implementation="eager"))
    chunks = [torch.from_numpy(chunk)[None] for chunk in np.load(request.calibration)]
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        ratio=1.0,
        backup_mode=nncf.BackupMode.NONE,
        dataset=nncf.Dataset(chunks),
        subset_size=len(chunks),
        **request.settings,
    )


if __name__ == "__main__":
    main(quantize)

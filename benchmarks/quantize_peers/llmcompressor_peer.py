"""llmcompressor: GPTQ, 4 bits, symmetric. settings: group_size."""

from __future__ import annotations

from typing import Any

import numpy as np
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier

from quantize_peers.common import Request, load_model, main


def quantize(request: Request) -> Any:
    chunks = np.load(request.calibration)
    rows = Dataset.from_dict({"input_ids": chunks.tolist(), "attention_mask": np.ones_like(chunks).tolist()})
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", **request.settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return oneshot(
        model=load_model(request.model),
        dataset=rows,
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=chunks.shape[1],
        num_calibration_samples=len(chunks),
        shuffle_calibration_samples=False,
    )


if __name__ == "__main__":
    main(quantize)

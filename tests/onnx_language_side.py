"""Logits of every model.onnx under a folder, beside it as logits.npy: the same code on any machine.

`python onnx_language_side.py TOKENS.npy FOLDER...`, the repository on the path.
"""

import sys
from pathlib import Path

import numpy as np

from device.onnx_language import Batch, OnnxLanguageModel

tokens = np.load(sys.argv[1])
for folder in map(Path, sys.argv[2:]):
    with OnnxLanguageModel(folder / "model.onnx", 1) as model:
        model.open_context(len(tokens))
        half = len(tokens) // 2
        pieces = [rows.copy() for _, rows in model.logits(tokens[:half], 0)]
        for at in range(half, len(tokens)):
            model.run([Batch(tokens[at : at + 1], 0)])
            pieces.append(model._last[None].copy())
        np.save(folder / "logits.npy", np.concatenate(pieces))

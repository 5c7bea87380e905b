"""Large tensors in files instead of memory: moments of a model of 1.5 billion weights are 9 GB, its surgeries 12."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from device.records import SlimpiError

SMALL_BYTES = 2**24


def spilled(tensor: torch.Tensor, folder: Path | None) -> torch.Tensor:
    """The same values, read from a file in `folder` as they are needed; the tensor itself if it is small or there is no
    folder. The file has no name: it goes with the tensor, however the process ends.

    SlimpiError if the disk is full.
    """
    if folder is None or tensor.nbytes < SMALL_BYTES:
        return tensor
    values = tensor.detach().cpu().contiguous().numpy()
    try:
        with tempfile.TemporaryFile(dir=folder) as handle:
            values.tofile(handle)
            handle.flush()
            return torch.from_numpy(np.memmap(handle, values.dtype, "c", shape=values.shape))
    except OSError as error:
        raise SlimpiError(
            f"cannot put {values.nbytes} bytes aside in {folder}: {error.strerror or error}. Free some space."
        ) from error

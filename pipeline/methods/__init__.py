"""METHODS: how codes are chosen. One file a method, one line here; formats and plans are apart."""

from __future__ import annotations

from pipeline.layers import MethodEntry, each
from pipeline.methods import hqq, rtn, search

METHODS: dict[str, MethodEntry] = {
    # Round to nearest: scales from each group's extremes.
    "rtn": MethodEntry(each(rtn.quantize), "nothing"),
    # Half-quadratic solution of offsets and scales, data-free (Badri & Shaji 2023).
    "hqq": MethodEntry(each(hqq.quantize), "nothing"),
    # Importance-weighted search of the scales.
    "search": MethodEntry(each(search.quantize), "means"),
}

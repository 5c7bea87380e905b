"""METHODS: how codes are chosen. One file a method, one line here; formats and plans are apart."""

from __future__ import annotations

from pipeline.layers import MethodEntry, each
from pipeline.methods import awq, gptq, hqq, omniquant, rtn, search

METHODS: dict[str, MethodEntry] = {
    # Round to nearest: scales from each group's extremes.
    "rtn": MethodEntry(each(rtn.quantize), "nothing"),
    # Half-quadratic solution of offsets and scales, data-free (Badri & Shaji 2023).
    "hqq": MethodEntry(each(hqq.quantize), "nothing"),
    # Importance-weighted search of the scales.
    "search": MethodEntry(each(search.quantize), "means", lattices=True),
    # Input scales from activations' magnitude, folded; then clipped rounding (Lin et al. 2023).
    "awq": MethodEntry(awq.method(each(awq.clipped), rtn.quantize), "hessian"),
    "awq+search": MethodEntry(awq.method(each(search.quantize), search.quantize), "hessian"),
    "awq+gptq": MethodEntry(awq.method(gptq.run, search.quantize), "hessian", gptq.quantize),
    # Clipping and input scales by gradient descent, from AWQ's (Shao et al. 2023).
    "omniquant": MethodEntry(omniquant.quantize, "hessian"),
    # Errors made good by later columns (Frantar et al. 2022), then coordinate descent over codes and scales.
    "gptq": MethodEntry(gptq.run, "hessian", gptq.quantize, lattices=True),
}

"""METHODS: how codes are chosen. One file a method, one line here; formats and plans are apart."""

from __future__ import annotations

from pipeline.layers import MethodEntry, each
from pipeline.methods import rtn

METHODS: dict[str, MethodEntry] = {
    "rtn": MethodEntry(each(rtn.quantize), "nothing"),
}

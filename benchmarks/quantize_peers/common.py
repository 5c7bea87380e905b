"""What the scripts of the peers share. They run in environments of their own: torch, numpy and transformers only.

A script quantizes the model of a request and says when it was done and what it took, counted from the start of its
process; then, untimed, it evaluates the model that came out.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Request:
    """model: a Hugging Face folder, float32. calibration, test: (chunks, n_ctx) int64 .npy. reference: float32 .npy
    (test chunks, scored positions, n_vocab), the unquantized model's logits of the second half of each chunk.
    settings: the row's own."""

    model: str
    calibration: str
    test: str
    reference: str
    threads: int
    evaluate: bool
    settings: dict[str, Any]


def main(quantize: Callable[[Request], Any], by_children: bool = False) -> None:
    """`script REQUEST.json ANSWER.json`; quantize returns the model, as something that takes input ids.

    by_children: the tool is other programs that quantize runs, so that this process's own imports are not its time.
    """
    request = Request(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(request.threads)
    torch.manual_seed(0)
    start = spent() if by_children else {"wall_s": 0.0, "cpu_s": 0.0}
    model = quantize(request)
    answer = spent()
    answer |= {name: answer[name] - start[name] for name in ("wall_s", "cpu_s")}
    if request.evaluate:
        answer["kld_chunks"] = divergences(model, np.load(request.test), np.load(request.reference, mmap_mode="r"))
    Path(sys.argv[2]).write_text(json.dumps(answer))


def spent() -> dict[str, Any]:
    """Wall time since the process began, CPU time, peak resident memory of the process or its largest child."""
    began_s = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    times = os.times()
    # Not getrusage's own peak: a process starts with its parent's (fork), only VmHWM begins anew with exec.
    status = Path("/proc/self/status").read_text()
    own_kib = int(status.partition("VmHWM:")[2].split()[0])
    peak_kib = max(own_kib, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return {
        "wall_s": time.clock_gettime(time.CLOCK_BOOTTIME) - began_s,
        "cpu_s": times.user + times.system + times.children_user + times.children_system,
        "peak_rss_bytes": peak_kib * 1024,
    }


def load_model(path: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()


def of_gguf(gguf: Path) -> Callable[..., Any]:
    """The file's weights as a model that is read when it is first asked, after the clock has stopped."""
    read = functools.cache(lambda: load_model(str(gguf.parent), gguf_file=gguf.name))
    return lambda **inputs: read()(**inputs)


def second_half(model: Any, chunk: np.ndarray) -> torch.Tensor:
    """Logits (n_ctx - n_ctx // 2, n_vocab) of the positions that llama-perplexity scores, and the last."""
    ids = torch.from_numpy(chunk)[None]
    with torch.inference_mode():
        out = model(input_ids=ids)
    logits: torch.Tensor = getattr(out, "logits", out)
    return logits[0, len(chunk) // 2 :].float()


def divergences(model: Any, chunks: np.ndarray, reference: np.ndarray) -> list[float]:
    """Mean KL divergence of the reference's distribution from the model's in each chunk, nats/token."""
    found = []
    for chunk, expected in zip(chunks, reference, strict=True):
        ours = second_half(model, chunk).log_softmax(-1)
        theirs = torch.from_numpy(np.array(expected)).log_softmax(-1)
        found.append(float((theirs.exp() * (theirs - ours)).sum(-1).double().mean()))
    return found

"""How much memory does converting a Llama-3.1-8B checkpoint take?

    python -m benchmarks.stream_8b [--layers 32] [--scratch FOLDER] [--out FILE.json]

Writes a sharded bfloat16 safetensors checkpoint of that shape, converts it to a BF16 GGUF in a fresh process,
compares sampled rows with the source, and deletes both. The weights are one random block repeated with its start
shifted from tensor to tensor: the sizes, types and file layout are the real ones, the values are not. The
vocabulary has the real size and made-up tokens. The full size needs 32 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device.records import SlimpiError
from pipeline.architectures import gguf_names, row_order, tensor_shapes
from pipeline.checkpoint import CHUNK_BYTES, SHARD_BYTES, load, require_space
from pipeline.export.gguf import export_gguf, gguf_tensors
from pipeline.gguf_file import read_gguf
from pipeline.safetensors_file import write_safetensors
from pipeline.vocab import PRE_TOKENIZERS, Vocabulary

LLAMA_3_1_8B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_BLOCK = CHUNK_BYTES // 2
"""Weights in the repeated random block (bfloat16)."""


def write_checkpoint(folder: Path, n_layers: int) -> int:
    """Write the synthetic checkpoint; returns its weights' size in bytes."""
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    config = {**LLAMA_3_1_8B, "num_hidden_layers": n_layers}
    (folder / "config.json").write_text(json.dumps(config))
    n_vocab = config["vocab_size"]
    letters = [*bytes_to_unicode().values(), "th"]  # so that any text has tokens, by the one merge llama.cpp asks for
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*letters, *(f"t{i}" for i in range(len(letters), n_vocab))],
        "tokenizer.ggml.token_type": [1] * n_vocab,
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.add_bos_token": PRE_TOKENIZERS["llama-bpe"].add_bos,
    }
    (folder / "tokenizer.json").write_text(Vocabulary(keys).to_tokenizers().to_str())
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(_BLOCK, generator=generator).mul_(0.02).to(torch.bfloat16)
    shards: list[list[Any]] = [[]]
    filled = total = 0
    for i, (name, shape) in enumerate(tensor_shapes("llama", config).items()):
        size = 2 * int(np.prod(shape))
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape, torch.bfloat16, _repeated(block, size // 2, 7919 * i)))
        filled, total = filled + size, total + size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        weight_map |= {name: file for name, *_ in shard}
        write_safetensors(folder / file, shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _repeated(block: torch.Tensor, count: int, start: int) -> Iterator[torch.Tensor]:
    """`count` weights: the block from `start` on, around and around."""
    while count:
        piece = block[start % len(block) :][:count]
        yield piece
        start, count = start + len(piece), count - len(piece)


def convert(folder: Path, out: Path) -> dict[str, float]:
    """Convert in this process; returns its memory and time. Peaks of the anonymous and the file-backed part are
    sampled every 20 ms, the peak of their sum is the kernel's own (VmHWM)."""
    peaks = {"RssAnon": 0, "RssFile": 0}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            for key in peaks:
                peaks[key] = max(peaks[key], _status_bytes(key))

    baseline = _status_bytes("VmRSS")
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        export_gguf(load(folder), out, "BF16")
    finally:
        stop.set()
        watcher.join()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "baseline_rss_bytes": baseline,
        "peak_rss_bytes": _status_bytes("VmHWM"),
        "peak_rss_anon_bytes": peaks["RssAnon"],
        "peak_rss_file_bytes": peaks["RssFile"],
    }


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SlimpiError(f"/proc/self/status has no {key}: this benchmark needs Linux.")


def convert_apart(folder: Path, out: Path) -> dict[str, float]:
    """`convert` in a fresh process, so that its memory is the conversion's alone."""
    argv = [sys.executable, "-m", "benchmarks.stream_8b", "--convert", str(folder), str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env, cwd=root)
    if done.returncode:
        raise SlimpiError(f"the conversion failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def check_rows(folder: Path, out: Path) -> int:
    """Compare three rows of every tensor of the GGUF with the checkpoint's, bit for bit; returns how many rows."""
    checkpoint, stored = load(folder), read_gguf(out).tensors
    names = gguf_names("llama", list(checkpoint.tensors), checkpoint.config["num_hidden_layers"])
    compared = 0
    for name, tensor in gguf_tensors(checkpoint).items():
        if len(tensor.shape) == 1:
            continue
        source = next(key for key, target in names.items() if target == name)
        order = row_order("llama", checkpoint.config, source)
        for row in (0, tensor.shape[0] // 3, tensor.shape[0] - 1):
            origin = row if order is None else int(order[row])
            expected = checkpoint.tensors[source].read_rows(origin, origin + 1).view(torch.uint8).numpy()
            if not np.array_equal(stored[name].read_rows(row, row + 1), expected):
                raise SlimpiError(f"row {row} of {name} is not the checkpoint's.")
            compared += 1
    return compared


def run(n_layers: int, scratch: Path | None) -> dict[str, Any]:
    """Write, convert, check, delete; returns the record for the results."""
    with tempfile.TemporaryDirectory(prefix="stream-8b-", dir=scratch) as place:
        folder, out = Path(place) / "checkpoint", Path(place) / "model.gguf"
        folder.mkdir()
        config = {**LLAMA_3_1_8B, "num_hidden_layers": n_layers}
        n_weights = sum(int(np.prod(shape)) for shape in tensor_shapes("llama", config).values())
        require_space(out, 4 * n_weights + (1 << 30))
        weight_bytes = write_checkpoint(folder, n_layers)
        measured = convert_apart(folder, out)
        return {
            "benchmark": "stream_8b",
            "provenance": "host",
            "what": "bfloat16 safetensors checkpoint of Llama-3.1-8B's shape (synthetic weights) to BF16 GGUF",
            "n_layers": n_layers,
            "n_weights": n_weights,
            "checkpoint_bytes": weight_bytes,
            "shards": len(list(folder.glob("*.safetensors"))),
            "gguf_bytes": out.stat().st_size,
            "rows_compared": check_rows(folder, out),
            **measured,
            "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--scratch", type=Path, help="where the 32 GB of files go (default: the system's own place)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/host/stream_8b.json"))
    parser.add_argument("--convert", type=Path, nargs=2, metavar=("FOLDER", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.convert:
            print(json.dumps(convert(*options.convert)))
            return
        record = run(options.layers, options.scratch)
    except SlimpiError as error:
        sys.exit(f"error: {error}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

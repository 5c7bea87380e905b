"""Will it fit? The memory a task will need on the device, predicted before anything is sent.

Resident size = weights + KV cache + compute buffers + what Python and the runtime take themselves. Weights are mapped
from the file and count in full: the kernel may drop their pages, but each token reads all of them, so a model that
does not stay resident is read again from the card for every token. No tensor is repacked on a Cortex-A72 (llama.cpp's
repacked kernels for ARM ask for dotprod; ggml-cpu/repack.cpp of 0.3.36), so no weight counts twice.

Calibrated on this project's own Memory figures; tests/test_fit.py holds the errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device.records import SlimpiError
from device.schema import Artifact, Choices, Divergence, Perplexity, Profile, RecordLogits, Task, Throughput, Tweets

MIB = 2**20
MARGIN = 1.05
"""On top of the prediction: its error, and what the system itself needs meanwhile."""

N_UBATCH = 512
CHOICE_OUTPUTS = 64  # device/choices.py
CACHE_PAD = 256
F16_BYTES, F32_BYTES = 2, 4

# llama.cpp's pattern of layers with a sliding window: all but every n-th (src/models/gemma2.cpp, gemma3.cpp).
WINDOW_PERIOD = {"gemma2": 2, "gemma3": 6}

# Measured, a tiny model and SmolLM2-135M: Python, llama.cpp's libraries, and numpy, which throughput does without.
LLAMA_BASE_BYTES, LLAMA_BARE_BYTES = 41 * MIB, 30 * MIB
VOCAB_ENTRY_BYTES = 250
# Measured, MiniLM-L6 in fp32 and INT8: Python, ONNX Runtime and tokenizers; the file and its unpacked copy.
ONNX_BASE_BYTES = 77 * MIB
ONNX_FILE_FACTOR = 1.36
ONNX_TEXT_BYTES = 1_750_000


@dataclass(frozen=True)
class Footprint:
    """Predicted peak resident memory of one task's process, in its parts."""

    task: str
    weights_bytes: int
    cache_bytes: int
    compute_bytes: int
    base_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.compute_bytes + self.base_bytes


def footprints(artifact: Artifact, folder: Path, tasks: Sequence[Task]) -> list[Footprint]:
    """One a task; they run one after the other."""
    entry = folder / artifact.entry
    if artifact.kind == "onnx":
        if artifact.task == "lm":
            from pipeline.export.onnx_language import onnx_shape

            shape = onnx_shape(entry)
            return [_onnx_language(artifact, task, *shape) for task in tasks]
        sizes = [task.batch_size if isinstance(task, Tweets) else 1 for task in tasks]
        return [classifier_footprint(artifact, _name(task), n) for task, n in zip(tasks, sizes, strict=True)]
    from pipeline.gguf_file import read_gguf

    header = read_gguf(entry)
    embedding = header.tensors.get("token_embd.weight")
    n_vocab = embedding.shape[0] if embedding else 0
    n_golden = artifact.golden.n if artifact.golden else 1
    return [
        _profile(task)
        if isinstance(task, Profile)
        else _llama(artifact.size_bytes, task, header.keys, n_vocab, n_golden)
        for task in tasks
    ]


def _profile(task: Profile) -> Footprint:
    """It loads no model: a working set of matrices, and the largest one's bytes that they are filled from."""
    largest = max(p.rows * p.columns * (F32_BYTES if p.format == "F32" else F16_BYTES) for p in task.products)
    results = task.n_tokens * max(p.rows + p.columns for p in task.products) * F32_BYTES
    return Footprint(_name(task), max(task.working_set_mib * MIB, largest) + largest, 0, results, LLAMA_BASE_BYTES)


def check(name: str, artifact: Artifact, wanted: Sequence[Footprint], available_bytes: int) -> None:
    """SlimpiError with the numbers if the largest task will not fit into what the device has available."""
    if not wanted:
        return
    most = max(wanted, key=lambda f: f.total_bytes)
    needed = int(most.total_bytes * MARGIN)
    if needed > available_bytes:
        raise SlimpiError(
            f"{artifact.name} will not fit into the memory of {name}: task {most.task} needs about {needed / 1e6:.0f} "
            f"MB (weights {most.weights_bytes / 1e6:.0f}, KV cache {most.cache_bytes / 1e6:.0f}, compute "
            f"{most.compute_bytes / 1e6:.0f}, runtime {most.base_bytes / 1e6:.0f}, margin "
            f"{(MARGIN - 1) * 100:.0f}%), {available_bytes / 1e6:.0f} MB are available. Take a smaller variant or "
            "n_ctx, free memory there, or use --force."
        )


def largest_file_bytes(keys: dict[str, Any], n_vocab: int, n_ctx: int, available_bytes: int) -> int:
    """The largest GGUF that `check` lets decode with a context of n_ctx tokens in available_bytes.

    SlimpiError if not even an empty one fits.
    """
    rest = _llama(0, Throughput(n_prompt=n_ctx, n_gen=1), keys, n_vocab, 0).total_bytes
    file = int(available_bytes / MARGIN) - rest
    if file <= 0:
        raise SlimpiError(
            f"{available_bytes / 1e6:.0f} MB do not hold the KV cache, buffers and runtime of a context of {n_ctx} "
            f"tokens, {rest * MARGIN / 1e6:.0f} MB. Take a smaller context."
        )
    return file


def classifier_footprint(artifact: Artifact, task: str, n_texts: int) -> Footprint:
    """Of classifying n_texts at once, for a task of this name."""
    weights = int(artifact.size_bytes * ONNX_FILE_FACTOR)
    return Footprint(task, weights, 0, n_texts * ONNX_TEXT_BYTES, ONNX_BASE_BYTES)


def _onnx_language(artifact: Artifact, task: Task, n_vocab: int, cache_values: int) -> Footprint:
    """A cache in float32, twice while it grows; logits of the positions asked for."""
    n_ctx, n_outputs, kept = _shape(task, artifact.golden.n if artifact.golden else 1)
    weights = int(artifact.size_bytes * ONNX_FILE_FACTOR)
    cache = 2 * n_ctx * cache_values * F32_BYTES
    logits = (2 * n_outputs + kept) * n_vocab * F32_BYTES
    return Footprint(_name(task), weights, cache, logits + ONNX_TEXT_BYTES, ONNX_BASE_BYTES)


def _llama(size_bytes: int, task: Task, keys: dict[str, Any], n_vocab: int, n_golden: int) -> Footprint:
    n_ctx, n_outputs, kept = _shape(task, n_golden)
    rows = min(n_ctx, N_UBATCH)
    family = str(keys.get("general.architecture", ""))
    width = _largest(keys.get(f"{family}.embedding_length"))
    inner = _largest(keys.get(f"{family}.feed_forward_length"))
    # Logits of a batch exist twice, in the graph and in the context's output; `kept` are the task's own copies.
    logits = (2 * n_outputs + kept) * n_vocab * F32_BYTES
    activations = rows * (2 * inner + 6 * width) * F32_BYTES
    base = LLAMA_BARE_BYTES if isinstance(task, Throughput) else LLAMA_BASE_BYTES
    return Footprint(
        task=_name(task),
        weights_bytes=size_bytes,
        cache_bytes=cache_bytes(keys, n_ctx, windows=not isinstance(task, Choices)),
        compute_bytes=logits + activations,
        base_bytes=base + n_vocab * VOCAB_ENTRY_BYTES,
    )


def _shape(task: Task, n_golden: int) -> tuple[int, int, int]:
    """(context length, positions of one batch that give logits, rows of logits the task keeps)."""
    if isinstance(task, Perplexity | RecordLogits | Divergence):
        return task.n_ctx, min(task.n_ctx - task.n_ctx // 2, N_UBATCH), 0
    if isinstance(task, Choices):  # of a context as long as its longest question, which only the device knows
        return task.n_ctx, CHOICE_OUTPUTS, 0
    if isinstance(task, Throughput):
        return max(task.n_prompt, task.n_gen), 1, 0
    return CACHE_PAD, n_golden, 2 * n_golden


def cache_bytes(keys: dict[str, Any], n_ctx: int, windows: bool = True) -> int:
    """F16 K and V of every layer; per-layer head counts and sliding windows as the GGUF header tells them.

    windows: layers with one hold no more than it, as everywhere but in the task choices, which goes back.
    """
    family = str(keys.get("general.architecture", ""))

    def key(name: str, default: Any = 0) -> Any:
        return keys.get(f"{family}.{name}", default)

    n_layers = int(key("block_count"))
    heads = _each(key("attention.head_count"), n_layers)
    kv_heads = _each(key("attention.head_count_kv", key("attention.head_count")), n_layers)
    head_size = int(key("embedding_length")) // max(1, *heads) if heads else 0
    per_head = int(key("attention.key_length", head_size)) + int(key("attention.value_length", head_size))
    cells = _padded(n_ctx)
    window = int(_largest(key("attention.sliding_window")))
    period = WINDOW_PERIOD.get(family)
    windowed = min(cells, _padded(window + N_UBATCH)) if windows and window and period else cells
    total = 0
    for layer, count in enumerate(kv_heads):
        whole = not period or (layer + 1) % period == 0
        total += (cells if whole else windowed) * count * per_head * F16_BYTES
    return total


def _padded(n: int) -> int:
    return -(-n // CACHE_PAD) * CACHE_PAD


def _each(value: Any, n: int) -> list[int]:
    return [int(x) for x in value] if isinstance(value, list) else [int(value or 0)] * n


def _largest(value: Any) -> int:
    return max(map(int, value), default=0) if isinstance(value, list) else int(value or 0)


def _name(task: Task) -> str:
    return str(task.__struct_config__.tag)

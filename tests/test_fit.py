"""Predicted memory against arithmetic by hand, and against what real tasks took on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes import LlamaShape, World
from real_models import real_gguf
from test_compare import report

from device import agent
from device.records import SlimpiError
from device.schema import Artifact, Dataset, Job, Parity, Perplexity, Task, Throughput, Tweets, describe_file
from pipeline import fit
from pipeline.fit import Footprint, cache_bytes, footprints

LLAMA = {
    "general.architecture": "llama", "llama.block_count": 32, "llama.embedding_length": 4096,
    "llama.attention.head_count": 32, "llama.attention.head_count_kv": 8, "llama.feed_forward_length": 14336,
}  # fmt: skip


def test_cache_of_llama_3_1_8b() -> None:
    """The well-known 128 KiB a token: 32 layers x (8 K heads + 8 V heads) x 128 x 2 bytes."""
    assert cache_bytes(LLAMA, 8192) == 8192 * 128 * 1024
    assert cache_bytes(LLAMA, 1) == 256 * 128 * 1024, "llama.cpp pads the cache to 256 cells"


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"llama.attention.head_count_kv": 32}, 4.0),
        ({"llama.attention.head_count_kv": [8] * 16 + [4] * 16}, 0.75),
        ({"llama.attention.head_count": [32, 0] * 16, "llama.attention.head_count_kv": [8, 0] * 16}, 0.5),
        ({"llama.attention.key_length": 256, "llama.attention.value_length": 128}, 1.5),
        ({"llama.attention.sliding_window": 512}, 1.0),  # llama has no such layers: the key alone means nothing
    ],
)
def test_cache_follows_the_header(changes: dict[str, Any], factor: float) -> None:
    assert cache_bytes({**LLAMA, **changes}, 4096) == factor * cache_bytes(LLAMA, 4096)


def test_cache_of_layers_with_a_sliding_window() -> None:
    keys = {
        "general.architecture": "gemma3", "gemma3.block_count": 12, "gemma3.embedding_length": 640,
        "gemma3.attention.head_count": 4, "gemma3.attention.head_count_kv": 1, "gemma3.attention.key_length": 256,
        "gemma3.attention.value_length": 256, "gemma3.attention.sliding_window": 512,
    }  # fmt: skip
    row = 2 * 256 * 2  # K and V of one head, two bytes each
    assert cache_bytes(keys, 32768) == 2 * 32768 * row + 10 * 1024 * row  # every sixth layer sees all
    assert cache_bytes(keys, 512) == 12 * 512 * row


def test_too_large_is_refused_with_its_parts() -> None:
    artifact = report("Q4_0", [1.0, 2.0]).artifact
    parts = [Footprint("parity", 1, 1, 1, 1), Footprint("perplexity", 800_000_000, 100_000_000, 60_000_000, 40_000_000)]
    fit.check("pi", artifact, parts, 1_050_000_000)
    with pytest.raises(SlimpiError) as refused:
        fit.check("pi", artifact, parts, 1_049_999_999)
    for figure in ("perplexity", "1050 MB", "800", "100", "60", "40", "--force"):
        assert figure in str(refused.value)


def measured(job: Job) -> list[int]:
    found = agent.run(job, lambda event: None)
    assert [r.status for r in found.results] == ["ok"] * len(job.tasks), [r.error for r in found.results]
    return [r.memory.peak_rss_bytes for r in found.results if r.memory]


def check_errors(artifact: Artifact, folder: Path, tasks: list[Task], rss: list[int], bound: float) -> None:
    for footprint, got in zip(footprints(artifact, folder, tasks), rss, strict=True):
        error = footprint.total_bytes / got - 1
        print(f"{artifact.name} {footprint.task}: predicted {footprint.total_bytes / 1e6:.0f} MB, error {error:+.1%}")
        assert abs(error) < bound, (footprint, got)


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_tiny_models_take_what_the_runtimes_take(tmp_path: Path, kind: str) -> None:
    """Nearly all of it is Python and the runtime: the base figures alone are under test."""
    world = World.make(tmp_path / "world", LlamaShape())
    tasks: list[Task] = [Perplexity(dataset=world.dataset("text.txt"), n_ctx=64, n_chunks=2), Throughput(n_prompt=16)]
    if kind == "onnx":
        tasks = [Tweets(dataset=world.dataset("tweets.csv"), batch_size=1)]
    job = world.job(kind, tasks)
    check_errors(job.artifact, Path(job.artifact_dir), tasks, measured(job), 0.25)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models_fit_as_predicted(name: str, tmp_path: Path) -> None:
    """SmolLM2 is what the constants were measured on; Gemma 3 with its 262,144 tokens was not."""
    path = real_gguf(name, tmp_path)
    world = World.make(tmp_path / "world")
    text = world.root / "data" / "long.txt"
    text.write_text("A wet road under a low sky, and the bus was late again. " * 400)
    dataset = Dataset(name="long", file=describe_file(text.parent, "long.txt"))
    file = describe_file(path.parent, path.name)
    fields = {"files": [file], "entry": path.name, "size_bytes": file.size_bytes, "name": name}
    job = world.job("gguf", [])
    artifact = msgspec.structs.replace(job.artifact, **fields)
    tasks: list[Task] = [
        Perplexity(dataset=dataset, n_ctx=512, n_chunks=2),
        Perplexity(dataset=dataset, n_ctx=2048, n_chunks=1),
        Throughput(n_prompt=256, n_gen=8, repetitions=1),
    ]
    job = world.job("gguf", tasks, artifact=artifact, artifact_dir=str(path.parent), timeout_s=600)
    check_errors(artifact, path.parent, tasks, measured(job), 0.15)


def test_parity_is_counted(tmp_path: Path) -> None:
    world = World.make(tmp_path / "world")
    job = world.job("gguf", [])
    (parity,) = footprints(job.artifact, Path(job.artifact_dir), [Parity()])
    assert parity.task == "parity"
    assert parity.total_bytes > job.artifact.size_bytes

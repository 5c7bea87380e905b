"""Bad input to the agent: one line with the value and the remedy, no traceback, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes import LlamaShape, World, artifact, write_csv
from jobs import FAKES, REPO, golden_job, run

from device import agent
from device.records import SlimpiError, decode, encode
from device.schema import Job, Parity, Perplexity, Throughput, Tweets

pytestmark = pytest.mark.usefixtures("quick_facts")


@pytest.mark.parametrize("arguments", [("missing.json",), ("a", "b"), ("pyproject.toml",)])
def test_bad_command_lines_give_one_line(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", "device", *arguments], cwd=REPO, capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"slimpi agent: ")
    assert done.stderr.count(b"\n") == 1


def refused(job: Job) -> str:
    with pytest.raises(SlimpiError) as caught:
        run(job)
    assert not (Path(job.work_dir) / "report.json").exists()
    return str(caught.value)


def failed(job: Job) -> str:
    result = run(job)[0].results[0]
    assert (result.status, result.measurements, result.memory) == ("failed", [], None)
    return result.error


def test_changed_file_is_refused(world: World) -> None:
    job = FAKES[Throughput][0](world)
    path = Path(job.artifact_dir) / "model.gguf"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "sha256" in refused(job)
    path.write_bytes(data[:-1])
    assert "bytes, expected" in refused(job)
    path.unlink()
    assert "missing" in refused(job)


def test_changed_dataset_is_refused(world: World) -> None:
    job = FAKES[Perplexity][0](world)
    (world.root / "data" / "text.txt").write_text("other")
    assert "text.txt has 5 bytes" in refused(job)


def test_link_out_of_the_folder_is_refused(world: World) -> None:
    job = FAKES[Perplexity][0](world)
    inside = world.root / "data" / "text.txt"
    inside.rename(world.root / "outside.txt")
    inside.symlink_to(world.root / "outside.txt")
    assert "through a link" in refused(job)


@pytest.mark.parametrize("name", ["artifact_dir", "data_dir", "work_dir"])
@pytest.mark.parametrize("value", ["", "a\0b"])
def test_folders_that_are_none_are_refused(world: World, name: str, value: str) -> None:
    job = json.loads(encode(FAKES[Perplexity][0](world))) | {name: value}
    with pytest.raises(SlimpiError, match="is not a folder's path"):
        decode(json.dumps(job), Job, "x")


def test_links_in_a_circle_are_refused(world: World) -> None:
    (world.root / "loop").symlink_to(world.root / "loop")
    job = world.job("gguf", [Throughput()], artifact_dir=str(world.root / "loop"))
    assert "model.gguf" in refused(job)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a\\b", ".", "", "a//b", "./a"])
def test_paths_that_leave_their_folder_are_refused(world: World, path: str) -> None:
    text = encode(FAKES[Perplexity][0](world)).decode().replace('"text.txt"', json.dumps(path), 2)
    done = subprocess.run([sys.executable, "-m", "device"], input=text.encode(), cwd=REPO, capture_output=True)
    assert done.returncode == 1
    assert b"not a valid Job" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_measured_needs_the_board(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.platform, "machine", lambda: "x86_64")
    assert "Use `host` here" in refused(world.job("gguf", [Throughput()], provenance="measured"))


def test_tasks_that_do_not_fit_are_refused_before_anything_runs(world: World) -> None:
    text, table = world.dataset("text.txt"), world.dataset("tweets.csv")
    assert "needs a gguf lm" in refused(world.job("onnx", [Perplexity(dataset=text)]))
    assert "needs a onnx classifier" in refused(world.job("gguf", [Throughput(), Tweets(dataset=table)]))
    assert "golden" in refused(world.job("gguf", [Parity()]))
    assert "no tasks" in refused(world.job("gguf", []))
    folder = world.root / "classifier"
    uncut = world.job("onnx", [Tweets(dataset=table)], artifact=artifact(folder, "onnx", max_tokens=0))
    assert "max_tokens 0" in refused(uncut)
    bare = artifact(folder, "onnx")
    bare = msgspec.structs.replace(bare, files=[f for f in bare.files if f.path != "tokenizer.json"])
    assert "tokenizer.json" in refused(world.job("onnx", [Tweets(dataset=table)], artifact=bare))
    assert not (world.root / "work").exists()


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.999], ids=str)
def test_truncated_gguf_fails_the_task_with_a_reason(world: World, keep: float) -> None:
    path = world.root / "lm" / "model.gguf"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    error = failed(world.job("gguf", [Throughput(n_prompt=8, n_gen=4)]))
    assert "not b'GGUF'" in error or "cannot load" in error


def test_gguf_with_a_broken_tokenizer_costs_only_its_task(world: World) -> None:
    """llama.cpp aborts the process on some of these: the agent must tell, and go on."""
    path = world.root / "lm" / "model.gguf"
    data = path.read_bytes()
    assert data.count(b"tokenizer.ggml.scores") == 1
    path.write_bytes(data.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"))
    error = failed(world.job("gguf", [Throughput(n_prompt=8, n_gen=4)]))
    assert "cannot load" in error or "killed by SIGABRT" in error


@pytest.mark.parametrize("data", [b"", b"garbage" * 100, None], ids=["empty", "garbage", "truncated"])
def test_broken_onnx_fails_the_task_with_a_reason(world: World, data: bytes | None) -> None:
    path = world.root / "classifier" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-200] if data is None else data)
    assert "cannot load" in failed(FAKES[Tweets][0](world))


def test_a_crash_in_the_worker_quotes_its_last_words(world: World) -> None:
    (world.root / "classifier" / "tokenizer.json").write_text('{"model": {"type": "Nonsense"}}')
    error = failed(FAKES[Tweets][0](world))
    assert "the worker ended with exit code 1, peak resident memory" in error
    assert "Exception: " in error
    assert "task-0.log" in error


def test_broken_golden_fails_the_task_with_a_reason(world: World) -> None:
    job = golden_job(world, "gguf")
    folder = Path(job.artifact_dir)
    assert job.artifact.golden
    for i, data in enumerate([b"", b"PK\x03\x04junk", (folder / "golden.npz").read_bytes()[:300]]):
        (folder / "golden.npz").write_bytes(data)
        broken = artifact(folder, "gguf", golden=job.artifact.golden)
        changed = world.job("gguf", [Parity()], artifact=broken, work_dir=str(world.root / f"broken-{i}"))
        assert "golden.npz has no readable" in failed(changed)


BAD_TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "label column": ({"columns": ("text", "label")}, "no column 'target'; it has ['text', 'label']"),
    "text column": ({"columns": ("tweet", "target")}, "no column 'text'"),
    "label value": ({"rows": [("a", 0), ("b", 2)]}, "row 2 has label '2'"),
    "label word": ({"rows": [("a", "maybe")]}, "row 1 has label 'maybe', expected one of ['0', '1', 'no', 'yes']"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_fail_with_what_was_found(world: World, name: str) -> None:
    changes, message = BAD_TABLES[name]
    write_csv(world.root / "data" / "tweets.csv", **changes)
    assert message in failed(FAKES[Tweets][0](world))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no column"),
        (b"text,target\n", "no rows"),
        (b"text,target\nonly\n", "row 1 is too short"),
        (b"text,target\n\xff\xfe,1\n", "cannot read"),
        (b'text,target\n"never closed,1\n', "cannot read"),
    ],
)
def test_broken_tables_fail_with_a_reason(world: World, data: bytes, message: str) -> None:
    (world.root / "data" / "tweets.csv").write_bytes(data)
    assert message in failed(FAKES[Tweets][0](world))


def test_text_shorter_than_a_context_names_both_numbers(world: World) -> None:
    error = failed(world.job("gguf", [Perplexity(dataset=world.dataset("text.txt"), n_ctx=512)]))
    assert "tokens, perplexity at n_ctx 512 needs at least 1024" in error


def test_more_chunks_than_the_text_has_is_an_error(world: World) -> None:
    task = Perplexity(dataset=world.dataset("text.txt"), n_ctx=32, n_chunks=999)
    assert "999 are asked for" in failed(world.job("gguf", [task]))


def test_tokenizer_that_appends_eos_is_refused_for_perplexity(tmp_path: Path) -> None:
    world = World.make(tmp_path, replace(LlamaShape(), add_eos=True))
    assert "end token" in failed(FAKES[Perplexity][0](world))


def test_work_folder_that_cannot_be_made_is_one_line(world: World) -> None:
    (world.root / "file").write_text("")
    job = world.job("gguf", [Throughput()], work_dir=str(world.root / "file" / "w"))
    assert "Choose another work_dir" in refused(job)

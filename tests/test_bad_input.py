"""Bad input through the command line: one line on stderr, exit code 1, no traceback, no half-written artifact."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import save_tiny

from pipeline import cli

REPO = Path(__file__).parent.parent

Run = Callable[..., str]


@pytest.fixture
def slimpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line that must fail; returns the one line it says."""
    home = tmp_path / "home"
    monkeypatch.setenv("SLIMPI_HOME", str(home))
    monkeypatch.delenv("SLIMPI_DATA", raising=False)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["slimpi", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        assert not any("Traceback" in line for line in lines)
        assert [line for line in lines if line.startswith("slimpi: ")] == lines[-1:]
        assert list(home.glob("models/artifacts/*/manifest.json")) == []
        assert list(home.rglob("*.partial")) == []
        return lines[-1]

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "hf"
    save_tiny("llama-tied", folder)
    return folder


def recipe(folder: Path, source: str, extra: str = "", variants: str = '["F16", "Q8_0"]') -> str:
    path = folder / "r.toml"
    path.write_text(f'name = "m"\nsource = "{source}"\nexport = "gguf"\nvariants = {variants}\n{extra}\n')
    return str(path)


GOLDEN = "[golden]\nn = 4\nn_tokens = 16\n[bench]\nn_ctx = 64\nn_chunks = 2\n"


def test_unknown_recipe_key(slimpi: Run, tmp_path: Path) -> None:
    assert "quantizer" in slimpi("build", recipe(tmp_path, "path:x", "quantizer = 1"))


def test_missing_files(slimpi: Run, tmp_path: Path) -> None:
    assert "nowhere.toml" in slimpi("build", str(tmp_path / "nowhere.toml"))
    assert "does not exist" in slimpi("build", recipe(tmp_path, f"path:{tmp_path}/nothing"))
    assert "no artifact" in slimpi("bench", "m:Q4_0")
    assert "cannot read" in slimpi("compare", str(tmp_path / "report.json"))


def test_missing_shard(slimpi: Run, tmp_path: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    assert "safetensors" in slimpi("build", recipe(tmp_path, f"path:{folder}"))


def test_truncated_checkpoint(slimpi: Run, tmp_path: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "hf")
    with (folder / "model.safetensors").open("r+b") as handle:
        handle.truncate(20_000)
    assert "model.safetensors" in slimpi("build", recipe(tmp_path, f"path:{folder}"))


@pytest.mark.parametrize("keep", [0, 3, 30, 3000])
def test_truncated_gguf(slimpi: Run, tmp_path: Path, tiny: Path, keep: int) -> None:
    from pipeline import checkpoint
    from pipeline.export.gguf import export_gguf

    path = tmp_path / "whole.gguf"
    export_gguf(checkpoint.load(tiny), path, "F16")
    path.write_bytes(path.read_bytes()[:keep])
    assert "whole.gguf" in slimpi("build", recipe(tmp_path, f"path:{path}"))


def test_wrong_hash(slimpi: Run, tmp_path: Path, tiny: Path) -> None:
    said = slimpi("build", recipe(tmp_path, f"path:{tiny}", f'sha256 = "{"1" * 64}"'))
    assert "expected " + "1" * 64 in said


def test_unsupported_architecture(slimpi: Run, tmp_path: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    said = slimpi("build", recipe(tmp_path, f"path:{folder}"))
    assert "mamba" in said
    assert "qwen2" in said


def test_unknown_variant(slimpi: Run, tmp_path: Path, tiny: Path) -> None:
    assert "'Q4_9'" in slimpi("build", recipe(tmp_path, f"path:{tiny}"), "--only", "Q4_9")


def test_calibration_text_too_short(slimpi: Run, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    extra = f'[calibration]\ntext = "path:{tmp_path}/short.txt"\n'
    said = slimpi("build", recipe(tmp_path, f"path:{tiny}", extra, '["F16", "Q4_0"]'))
    assert "512" in said


@pytest.mark.parametrize(
    ("head", "rows", "expected"),
    [
        ('label_column = "disaster"', "id,text,target\n1,a,0\n", "disaster"),
        ('text_column = "tweet"', "id,text,target\n1,a,0\n", "tweet"),
        ("", "id,text,target\n", "row"),
        ("", "", "empty"),
        ("", "id,text,target\n1,a,0\n2,b,7\n", "7"),
    ],
)
def test_bad_rows(slimpi: Run, tmp_path: Path, head: str, rows: str, expected: str) -> None:
    from transformers import BertConfig, BertModel

    folder = tmp_path / "bert"
    BertModel(BertConfig(vocab_size=120, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        folder
    )
    (tmp_path / "rows.csv").write_text(rows)
    path = tmp_path / "c.toml"
    path.write_text(
        f'name = "c"\nsource = "path:{folder}"\nexport = "onnx"\nvariants = ["FP32"]\nlabels = ["no", "yes"]\n'
        f'[head]\nrows = "path:{tmp_path}/rows.csv"\n{head}\n'
    )
    assert expected in slimpi("build", str(path))


def test_unlike_or_damaged_reports(slimpi: Run, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema": 99}')
    assert "schema version 1" in slimpi("compare", str(tmp_path))


def test_no_disk_space(slimpi: Run, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.total, 1000))
    said = slimpi("build", recipe(tmp_path, f"path:{tiny}", GOLDEN))
    assert "space" in said


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs root to mount a small tmpfs")
def test_disk_fills_while_building(slimpi: Run, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real full disk (1 MiB tmpfs), with the free-space check blinded so that the write itself fails."""
    small = tmp_path / "home"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(usage.total, 0, usage.total))
        assert "space" in slimpi("build", recipe(tmp_path, f"path:{tiny}", GOLDEN))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_bench_of_a_short_text_keeps_the_other_tasks(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIMPI_HOME", str(tmp_path / "home"))
    (tmp_path / "short.txt").write_text("A text shorter than a context.")
    path = recipe(tmp_path, f"path:{tiny}", GOLDEN, '["F16"]')
    monkeypatch.setattr(sys, "argv", ["slimpi", "build", path])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "slimpi",
            "bench",
            "m:F16",
            "--text",
            f"path:{tmp_path}/short.txt",
            "--task",
            "parity",
            "--task",
            "perplexity",
        ],
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert "tokens, perplexity at n_ctx 64 needs at least 128" in said.out
    assert "KL 0.0e+00" in said.out
    assert "m-f16" in said.err.splitlines()[-1]


def test_ctrl_c_ends_in_one_line_and_leaves_nothing_half_written(tmp_path: Path, tiny: Path) -> None:
    path = recipe(tmp_path, f"path:{tiny}", GOLDEN, '["F16", "Q8_0", "Q6_K", "Q4_0", "IQ4_NL"]')
    home = tmp_path / "home"
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "build", path],
        env={**os.environ, "SLIMPI_HOME": str(home), "PYTHONPATH": str(REPO)},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    deadline = time.monotonic() + 60
    while not list(home.glob("models/artifacts/*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("slimpi: interrupted.")
    assert "Traceback" not in errors
    assert list(home.rglob("*.partial*")) == []
    for manifest in home.glob("models/artifacts/*/manifest.json"):
        assert (manifest.parent / "golden.npz").exists()

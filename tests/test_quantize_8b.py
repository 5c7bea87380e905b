"""benchmarks/quantize_8b: the memory of a build by its steps, on a model of the same form, a thousandth the size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quantize_8b
import stream_8b

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}


def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(stream_8b, "LLAMA_3_1_8B", {**stream_8b.LLAMA_3_1_8B, **SMALL})
    scratch, out = tmp_path / "scratch", tmp_path / "out.json"
    scratch.mkdir()
    argv = ["--layers", "2", "--chunks", "1", "--threads", "1", "--scratch", str(scratch), "--out", str(out)]
    code = quantize_8b.main([*argv, "--machine", "here"])
    assert list(scratch.iterdir()) == []
    return code, json.loads(out.read_bytes())


def test_every_step_of_a_build_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = made(monkeypatch, tmp_path)
    assert code == 0
    titles = " ".join(stage["title"] for stage in result["stages"])
    for step in ("statistics of the inputs", "sensitivity of the output", "quantize GPTQ-4.25bpw"):
        assert step in titles
    assert all(stage["peak_rss_bytes"] >= stage["peak_anon_bytes"] > 50e6 for stage in result["stages"])
    assert result["stored_bytes"] > result["artifact_bytes"] > 0
    assert "asked 24: met" in capsys.readouterr().out


def test_too_much_memory_is_said_and_no_success(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantize_8b, "LIMIT_BYTES", 1 << 20)
    assert made(monkeypatch, tmp_path)[0] == 1
    assert "missed" in capsys.readouterr().out

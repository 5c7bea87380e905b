"""The latency benchmark: its verdicts from rows, and that its peers classify what slimpi classifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import classify_peer
import classify_speed
import msgspec
import pytest
from classify_rows import MIN_PAIRS, OPTIMUM_FILE, LatencyRow, pair_ratios, verdicts_of
from fakes import TWEETS, artifact, write_classifier, write_csv

from device.classifier import OnnxClassifier
from device.records import SlimpiError
from device.words import Text
from pipeline.store import Places, write_manifest


def row(tool: str, pair: int, samples_ns: list[int], **changes: Any) -> LatencyRow:
    fields: dict[str, Any] = {
        "tool": tool,
        "variant": OPTIMUM_FILE if tool == "optimum" else "FP32",
        "model_sha256": "b" * 64 if tool == "optimum" else "a" * 64,
        "pair": pair,
        "order": 0,
        "n_threads": 1,
        "pad_to": 128 if tool == "optimum" else 0,
        "test_time": "2026-11-24T12:00:00Z",
        "load_1min_before": 0.0,
        "samples_ns": samples_ns,
        "cpu_ns": [7 * ns for ns in samples_ns],
        "provenance": "host",
    }
    return LatencyRow(**fields | changes)


def runs(slow: int = 1, pairs: int = MIN_PAIRS) -> list[LatencyRow]:
    """slimpi takes a fifth of optimum's time and as long as ONNX Runtime, each `slow` times that in the first pair."""
    found = []
    for pair in range(pairs):
        factor = slow if pair == 0 else 1
        found += [
            row("slimpi", pair, [10 * factor, 20 * factor, 60 * factor]),
            row("onnxruntime", pair, [10, 20, 60]),
            row("optimum", pair, [100, 100, 100]),
        ]
    return found


def test_a_verdict_is_the_median_pair_of_the_median_tweet() -> None:
    by_peer = {verdict.peer: verdict for verdict in verdicts_of(runs(slow=3))}
    optimum = by_peer["optimum"]
    assert (optimum.ratio, optimum.ratio_min, optimum.ratio_max) == pytest.approx((0.2, 0.2, 0.6))
    assert optimum.ratio_of_totals == pytest.approx((3 * 90 + 4 * 90) / (5 * 300))
    assert optimum.ratio_of_cpu == pytest.approx(0.2)
    assert optimum.ok
    assert by_peer["onnxruntime"].ratio == 1.0


def test_what_is_too_slow_or_too_little_is_missed() -> None:
    slower = [row("slimpi", i, [30, 30, 30]) for i in range(MIN_PAIRS)]
    others = [found for found in runs() if found.tool != "slimpi"]
    assert [verdict.ok for verdict in verdicts_of(slower + others)] == [False, False]
    assert [verdict.ok for verdict in verdicts_of(runs(pairs=MIN_PAIRS - 1))] == [False, False]


def test_only_like_is_compared_with_like() -> None:
    ours = [row("slimpi", 0, [1, 2])]
    for theirs in ([], [row("onnxruntime", 1, [1, 2])], [row("onnxruntime", 0, [1])]):
        with pytest.raises(SlimpiError, match="lacks a like run"):
            pair_ratios(ours, theirs)
    with pytest.raises(SlimpiError, match="lacks a like run"):
        pair_ratios(ours, [row("onnxruntime", 0, [1, 2], n_threads=2)])
    other = [msgspec.structs.replace(r, model_sha256="c" * 64) if r.tool == "onnxruntime" else r for r in runs()]
    with pytest.raises(SlimpiError, match="was another file in onnxruntime"):
        verdicts_of(other)


@pytest.mark.parametrize("pad_to", [0, 16])
def test_a_peer_classifies_as_slimpi_does(tmp_path: Path, pad_to: int) -> None:
    write_classifier(tmp_path)
    texts = [text for text, _ in TWEETS]
    asked = classify_peer.Asked(
        model=str(tmp_path / "model.onnx"),
        tokenizer=str(tmp_path / "tokenizer.json"),
        texts=texts,
        threads=1,
        max_tokens=16,
        pad_to=pad_to,
    )
    timed = classify_peer.run(asked)
    with OnnxClassifier(tmp_path, artifact(tmp_path, "onnx"), 1) as model:
        encoded = model.encode([Text(text) for text in texts])
        assert timed.predicted == model.run(encoded).argmax(axis=1).tolist()
    assert timed.n_positions == (pad_to * len(texts) if pad_to else sum(text.length for text in encoded))


def test_the_whole_comparison_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """On the fake classifier, whose one matrix optimum quantizes; so few pairs that every target is missed."""
    monkeypatch.setenv("SLIMPI_HOME", str(tmp_path / "home"))
    folder = Places(tmp_path / "home").artifacts / "fake-1"
    folder.mkdir(parents=True)
    write_classifier(folder)
    write_manifest(folder, artifact(folder, "onnx"))
    write_csv(tmp_path / "rows.csv")
    out = tmp_path / "out.json"
    arguments = ["--artifact", str(folder), "--rows", f"path:{tmp_path / 'rows.csv'}", "--pairs", "1", "--pad-to", "16"]
    assert classify_speed.main([*arguments, "--limit", "5", "--out", str(out)]) == 1
    assert "MISSED" in capsys.readouterr().out
    found = msgspec.json.decode(out.read_bytes(), type=classify_speed.ClassifySpeed)
    assert {(r.tool, r.pad_to, len(r.samples_ns), len(r.cpu_ns)) for r in found.rows} == {
        ("slimpi", 0, 5, 5),
        ("onnxruntime", 0, 5, 5),
        ("optimum", 16, 5, 5),
    }
    assert found.conditions.n_rows == 5
    assert classify_speed.main(["--artifact", "nothing", "--out", str(tmp_path / "none.json")]) == 1
    assert not (tmp_path / "none.json").exists()

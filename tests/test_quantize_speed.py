"""benchmarks/quantize_speed: what is concluded from times, and how a peer's process is measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import quantize_speed
import torch
from quantize_peers.common import Request, divergences
from quantize_speed import CONTENDERS, Row, Run, Speeds, Tool, lines_of, verdicts

BENCHMARKS = Path(quantize_speed.__file__).parent


def row(label: str, tool: Tool, kld: float, *walls_s: float, calibrated: bool = True) -> Row:
    runs = [Run(wall_s=wall, cpu_s=2 * wall, peak_rss_bytes=1 << 30, load_before=0.1) for wall in walls_s]
    return Row(label=label, tool=tool, calibrated=calibrated, packages=[], settings={}, runs=runs, kld_chunks=[kld])


def speeds(*rows: Row) -> Speeds:
    return Speeds(
        model="m", cpu="c", threads=2, calibration="t", n_calibration_tokens=8, test="t", start_time="now", rows=[*rows]
    )


def test_the_bar_is_held_against_the_fastest_calibrated_peer_by_the_median() -> None:
    found = verdicts(
        speeds(
            row("data-free", "hqq", 0.1, 1.0, calibrated=False),
            row("slow", "auto-round", 0.05, 100.0),
            row("fast", "nncf", 0.2, 29.0, 31.0, 90.0),
            row("ours quick", "slimpi", 0.21, 1.0),
            row("ours", "slimpi", 0.2, 15.0, 14.0, 40.0),
            row("ours best", "slimpi", 0.04, 51.0),
        )
    )
    assert [ok for _, ok in found] == [True, False]
    assert "fast: ours takes 0.48 of its time" in found[0][0]
    assert "slow: ours best takes 0.51 of its time" in found[1][0]


def test_a_worse_file_never_wins_however_quick() -> None:
    ((line, ok),) = verdicts(speeds(row("peer", "nncf", 0.1, 30.0), row("ours", "slimpi", 0.11, 1.0)))
    assert not ok and "none of ours" in line


def test_a_peer_that_does_not_run_is_named_and_not_compared() -> None:
    broken = Row(label="broken", tool="nncf", calibrated=True, packages=[], settings={}, why="it ended with 1")
    lines = lines_of(speeds(broken, row("ours", "slimpi", 0.1, 1.0)))
    assert "- broken does not run here: it ended with 1" in lines
    assert verdicts(speeds(broken)) == []


def test_divergence_equals_a_naive_one() -> None:
    rng = np.random.default_rng(0)
    chunks = rng.integers(0, 11, (3, 6))
    reference, ours = rng.normal(size=(2, 3, 3, 11))

    def model(input_ids: torch.Tensor) -> SimpleNamespace:
        (index,) = [i for i, chunk in enumerate(chunks) if (chunk == input_ids[0].numpy()).all()]
        whole = np.concatenate([np.full((3, 11), np.nan), ours[index]])
        return SimpleNamespace(logits=torch.from_numpy(whole)[None])

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    p, q = softmax(reference), softmax(ours)
    expected = (p * np.log(p / q)).sum(-1).mean(-1)
    assert divergences(model, chunks, reference.astype(np.float32)) == pytest.approx(expected, rel=1e-5)


def test_a_peers_process_tells_what_it_took(tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text(
        "import time\nfrom quantize_peers.common import main\n"
        "def quantize(request):\n    held = bytearray(300 << 20)\n    time.sleep(request.settings['sleep_s'])\n"
        "main(quantize)\n"
    )
    asked = Request("", "", "", "", threads=1, evaluate=False, settings={"sleep_s": 0.5})
    (tmp_path / "asked.json").write_text(json.dumps(asdict(asked)))
    argv = [sys.executable, str(script), str(tmp_path / "asked.json"), str(tmp_path / "answer.json")]
    subprocess.run(argv, check=True, env={"PYTHONPATH": str(BENCHMARKS)})
    found = json.loads((tmp_path / "answer.json").read_text())
    assert found["wall_s"] >= 0.5
    assert found["cpu_s"] > 0
    assert found["peak_rss_bytes"] >= 300 << 20


def test_a_tool_of_other_programs_is_not_charged_for_our_imports(tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text(
        "import subprocess, sys, time\ntime.sleep(0.7)\nfrom quantize_peers.common import main\n"
        "def quantize(request):\n"
        "    subprocess.run([sys.executable, '-c', 'import time; time.sleep(0.3)'], check=True)\n"
        "main(quantize, by_children=True)\n"
    )
    asked = Request("", "", "", "", threads=1, evaluate=False, settings={})
    (tmp_path / "asked.json").write_text(json.dumps(asdict(asked)))
    argv = [sys.executable, str(script), str(tmp_path / "asked.json"), str(tmp_path / "answer.json")]
    begin_s = time.monotonic()
    subprocess.run(argv, check=True, env={"PYTHONPATH": str(BENCHMARKS)})
    whole_s = time.monotonic() - begin_s
    found = json.loads((tmp_path / "answer.json").read_text())
    assert 0.3 <= found["wall_s"] <= whole_s - 0.7
    assert found["cpu_s"] > 0


def test_every_contender_has_a_script_and_a_name_of_its_own() -> None:
    assert len({c.label for c in CONTENDERS}) == len(CONTENDERS)
    assert all((BENCHMARKS / "quantize_peers" / f"{c.script}.py").is_file() for c in CONTENDERS)

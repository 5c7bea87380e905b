"""benchmarks/prune_encoders.py: its variants, one run of it on a toy classifier, and what is concluded from rows."""

from __future__ import annotations

from pathlib import Path

import msgspec
import prune_encoders
import pytest
from prune_encoders import EncoderRow, PrunedEncoders, loss, table
from test_train_recipe import recipe

from device.records import read_record
from pipeline.pruning_onnx import parse_variant


def row(variant: str, correct: str, seed: int = 0) -> EncoderRow:
    return EncoderRow(
        variant=variant, seed=seed, calibration="", key="k", size_bytes=2**20, correct=correct, latency_ms_p50=1.5,
        peak_rss_bytes=1, pruned=[],
    )  # fmt: skip


def test_every_variant_can_be_asked_for() -> None:
    specs = [parse_variant(name)[0] for name in prune_encoders.VARIANTS]
    assert len(set(prune_encoders.VARIANTS)) == len(specs)
    for repair, percents in (("", (17, 33)), ("repair", (17, 33)), ("train", (33, 50))):
        assert {(spec.pruner, spec.percent) for spec in specs if spec and spec.repair == repair} == {
            (pruner.lower(), percent) for pruner in prune_encoders.PRUNERS for percent in percents
        }


def test_losses_are_paired_within_a_seed() -> None:
    wholes = [row("FP32", "1101"), row("FP32", "0111", seed=1)]
    pruned = [row("LAYERS-33-FP32", "1010"), row("LAYERS-33-FP32", "0110", seed=1)]
    found = loss(pruned, wholes)
    assert (found.mean, found.n, found.flips_better, found.flips_worse) == (-25.0, 8, 1, 3)
    lines = table([*wholes, *pruned, row("HEADS-33-FP32", "1111", seed=2)])
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["FP32", "LAYERS-33-FP32"]
    assert "|  | 2 | 1.0 | 50.00 | +25.00 [" in lines[3]


def test_a_run_goes_on_from_the_rows_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMPI_HOME", str(tmp_path / "home"))
    toy = recipe(tmp_path, "transformer", ["FP32"])
    monkeypatch.setattr(prune_encoders, "read_recipe", lambda path: toy)
    out = tmp_path / "out.json"
    arguments = ["--rows", str(tmp_path / "rows.csv"), "--out", str(out)]
    arguments += ["--calibration", "demo:prose_calibration.txt"]
    assert prune_encoders.main([*arguments, "--variant", "HEADS-50-FP32"]) == 0
    first = read_record(out, PrunedEncoders)
    assert [r.variant for r in first.rows] == ["FP32", "HEADS-50-FP32"]
    whole, pruned = first.rows
    assert first.n_test == len(whole.correct) == len(pruned.correct) > 20
    assert whole.correct.count("1") > 0.8 * first.n_test
    assert pruned.size_bytes < whole.size_bytes
    assert not whole.pruned
    assert "2 of 4 heads" in pruned.pruned[0]
    changed = msgspec.structs.replace(first, rows=[msgspec.structs.replace(r, latency_ms_p50=-1.0) for r in first.rows])
    out.write_bytes(msgspec.json.encode(changed))
    arguments += ["--unlabelled", str(tmp_path / "rows.csv")]
    assert prune_encoders.main([*arguments, "--variant", "HEADS+REPAIR-50-FP32"]) == 0
    again = read_record(out, PrunedEncoders).rows
    prose, tweets = "demo:prose_calibration.txt", str(tmp_path / "rows.csv")
    assert [(r.variant, r.calibration, r.latency_ms_p50 < 0) for r in again] == [
        ("FP32", "", True), ("HEADS-50-FP32", prose, True), ("HEADS+REPAIR-50-FP32", tweets, False),
    ]  # fmt: skip
    assert ".prune-encoders" not in str(again)  # rows end in the repository


def test_a_recipe_that_trains_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m.toml"
    rows = Path(prune_encoders.RECIPE).parent.parent / "pipeline" / "data" / "tweets_train.csv"
    code = prune_encoders.main(["--recipe", str(demo), "--rows", str(rows), "--out", str(tmp_path / "out.json")])
    assert code == 1
    assert "trains no classifier" in capsys.readouterr().err

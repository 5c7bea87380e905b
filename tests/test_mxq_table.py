"""benchmarks/mxq_table.py: budgets are kept, the program is optimal, and a whole run on a tiny model."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import mxq_table
import pytest
import torch
from tiny_models import save_tiny

from device.records import read_record
from pipeline.checkpoint import load
from pipeline.export.gguf import gguf_tensors
from pipeline.formats import FORMATS
from pipeline.layers import Stats
from pipeline.methods import hqq
from pipeline.plan_costs import Costs
from pipeline.progress import Progressor


def model_of(n_weights: dict[str, int]) -> mxq_table.Model:
    return mxq_table.Model(None, n_weights, dict.fromkeys(n_weights, 128), {}, {})  # type: ignore[arg-type]


def test_the_program_takes_the_least_error_that_fits_by_trying_all() -> None:
    kinds = ("MXQ_B2_G64", "MXQ_B4_G32", "MXQ_B8_G128")
    generator = torch.Generator().manual_seed(0)
    sizes = {f"blk.{i}.a.weight": 1024 * (i + 1) for i in range(4)}
    errors: Costs = {
        name: dict(zip(kinds, sorted(torch.rand(3, generator=generator).tolist(), reverse=True), strict=True))
        for name in sizes
    }
    for bits in (2.75, 4.0, 5.5):
        chosen = mxq_table.best(model_of(sizes), errors, bits)
        spent = {
            choice: sum(sizes[n] * FORMATS[k].bits_per_weight for n, k in zip(sizes, choice, strict=True))
            for choice in itertools.product(kinds, repeat=len(sizes))
        }
        least = min(
            math.fsum(errors[n][k] for n, k in zip(sizes, choice, strict=True))
            for choice, total in spent.items()
            if total <= bits * sum(sizes.values())
        )
        assert math.fsum(errors[n][k] for n, k in chosen.items()) == pytest.approx(least)
        assert spent[tuple(chosen.values())] <= bits * sum(sizes.values())


def test_every_budget_has_its_rows_once() -> None:
    labels = [entry.label for entry in mxq_table.entries(model_of({}), lambda measure: {})]
    assert len(labels) == len(set(labels)) == 6 + 4 + 4 * len(mxq_table.BUDGETS)


def test_errors_are_those_of_a_naive_sum(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, torch.bfloat16)
    checkpoint = load(tmp_path)
    tensors = {
        n: t.read().float() for n, t in gguf_tensors(checkpoint).items() if n.startswith("blk.") and "norm" not in n
    }
    generator = torch.Generator().manual_seed(0)
    stats, felt = {}, {}
    for name, w in tensors.items():
        x = torch.randn(50, w.shape[1], generator=generator)
        hessian = x.T @ x / 50
        stats[name] = Stats(hessian.diagonal(), x.abs().mean(0), 50, lambda h=hessian: h)  # type: ignore[misc]
        felt[name] = torch.rand(w.shape[0], generator=generator)
    columns = {name: w.shape[1] for name, w in tensors.items()}
    model = mxq_table.Model(checkpoint, {n: w.numel() for n, w in tensors.items()}, columns, stats, felt)
    tables = mxq_table.error_tables(model, Progressor())
    assert tables.keys() == mxq_table.OBJECTIVES.keys()
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight"):
        for kind in ("MXQ_B2_G32", "MXQ_B4_G32"):
            coded = hqq.quantize(tensors[name], None, FORMATS[kind])[0].dequantize()
            error, hessian = (tensors[name] - coded).double().numpy(), stats[name].hessian().double().numpy()
            rows = [float(d @ hessian @ d) for d in error]
            felt_errors = math.fsum(0.5 * f * r for f, r in zip(felt[name].tolist(), rows, strict=True))
            assert tables["predicted"][name][kind] == pytest.approx(felt_errors, rel=1e-6)
            assert tables["frobenius"][name][kind] == pytest.approx(math.sqrt((error**2).sum()), rel=1e-6)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_tiny("llama", tmp_path / "hf", torch.bfloat16)
    (tmp_path / "tiny.toml").write_text(
        f'name = "tiny"\nsource = "path:{tmp_path / "hf"}"\nexport = "gguf"\nvariants = ["F16"]\n'
        "[calibration]\nn_ctx = 64\nn_chunks = 4\n[golden]\nn = 4\nn_tokens = 16\n"
    )
    monkeypatch.setenv("SLIMPI_HOME", str(tmp_path))
    return tmp_path


def bench(home: Path, *labels: str) -> int:
    rows = [word for label in labels for word in ("--only", label)]
    text = ["--text", "demo:prose_test.txt", "--n-ctx", "64", "--chunks", "3"]
    return mxq_table.main([str(home / "tiny.toml"), *rows, *text, "--out", str(home / "mxq.json")])


@pytest.mark.slow
def test_a_whole_run_goes_on_from_the_rows_it_has(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ("HQQ b4g32", "HQQ b3g32", "MXQ 3.50", "predicted divergence + GPTQ 3.50")
    assert bench(home, *labels) == 0
    table = read_record(home / "mxq.json", mxq_table.Table)
    rows = {row.label: row for row in table.rows}
    assert rows.keys() == set(labels)
    n_linear = sum(1 for name in load(home / "hf").tensors if name.endswith("proj.weight"))
    for row in rows.values():
        assert sum(row.formats.values()) == n_linear
        assert [score.n_chunks for score in row.scores] == [3]
        assert 0 < row.scores[0].kld < 5
    assert rows["HQQ b4g32"].bits_per_linear_weight == pytest.approx(FORMATS["MXQ_B4_G32"].bits_per_weight)
    for label in labels[2:]:
        assert 3.2 < rows[label].bits_per_linear_weight <= 3.5
    assert rows["HQQ b4g32"].scores[0].kld < rows["HQQ b3g32"].scores[0].kld
    assert not list(home.glob("models/artifacts/.mxq-*"))

    monkeypatch.setattr(mxq_table, "write_model", None)
    assert bench(home, *labels[:2]) == 0
    assert read_record(home / "mxq.json", mxq_table.Table).rows == table.rows


def test_a_model_of_other_widths_is_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(home, "HQQ b4g128") == 1
    assert "blocks of 128 do not divide" in capsys.readouterr().err
    assert not (home / "mxq.json").exists()


def test_what_awq_folds_into_norms_is_in_the_file_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 8 bits the function is that of the weights before; with norms as they were it would be another."""

    def entries(model: mxq_table.Model, errors: object) -> list[mxq_table.Entry]:
        return [mxq_table.Entry("AWQ b8g32", "awq", lambda: dict.fromkeys(model.linear, "MXQ_B8_G32"))]

    monkeypatch.setattr(mxq_table, "entries", entries)
    assert bench(home, "AWQ") == 0
    (row,) = read_record(home / "mxq.json", mxq_table.Table).rows
    assert 0 < row.scores[0].kld < 0.002

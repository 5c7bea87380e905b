"""Tables of errors and latencies against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from fakes import World
from jobs import run
from test_compare import report

from device.records import SlimpiError
from device.results import Measurement, Report
from device.schema import Profile
from pipeline import plan, plan_costs
from pipeline.formats import FORMATS
from pipeline.layers import Layer, QuantizedLayer, Stats
from pipeline.methods import METHODS
from pipeline.plan_costs import MEASURES, latencies, layer_errors, products

BASE = plan.Base(
    {
        "token_embd.weight": (300, 64),
        "blk.3.a.weight": (32, 64),
        "blk.3.b.weight": (64, 64),
        "output.weight": (300, 64),
    },
    {"token_embd.weight": "F16", "blk.3.a.weight": "F16", "blk.3.b.weight": "F16", "output.weight": "F16"},
    0,
)


def layer_and_stats() -> tuple[Layer, dict[str, Stats]]:
    torch.manual_seed(0)
    matrices = {"a.weight": torch.randn(32, 64), "b.weight": torch.randn(64, 64)}
    stats = {}
    for name in matrices:
        x = torch.randn(200, 64) * torch.linspace(0.1, 3, 64) @ torch.randn(64, 64)
        hessian = x.T @ x / 200
        stats[name] = Stats((x**2).mean(0), x.abs().mean(0), 200, lambda h=hessian: h)  # type: ignore[misc]
    return Layer(3, matrices, {}), stats


@pytest.mark.parametrize("measure", sorted(MEASURES))
def test_errors_equal_sums_by_hand(measure: str) -> None:
    layer, stats = layer_and_stats()
    choices = {"blk.3.a.weight": ["Q4_0", "Q8_0"], "blk.3.b.weight": ["Q4_0"], "blk.4.a.weight": ["Q4_0"]}
    got = layer_errors(layer, stats, choices, METHODS["rtn"].run, MEASURES[measure])
    assert {name: list(row) for name, row in got.items()} == {
        "blk.3.a.weight": ["Q4_0", "Q8_0"],
        "blk.3.b.weight": ["Q4_0"],
    }
    for tensor, row in got.items():
        name = tensor.removeprefix("blk.3.")
        for kind, value in row.items():
            made = METHODS["rtn"].run(layer, stats, {name: FORMATS[kind]}).tensors[name].dequantize()
            diff = (layer.matrices[name] - made).double().numpy()
            h = stats[name].hessian().double().numpy()
            expected = 0.0
            for r in range(diff.shape[0]):
                if measure == "output":
                    expected += diff[r] @ h @ diff[r]
                else:
                    scale = np.diag(h) if measure == "weighted" else np.ones(64)
                    expected += sum(scale[c] * diff[r, c] ** 2 for c in range(64))
            assert value == pytest.approx(expected**0.5 if measure == "frobenius" else expected, rel=1e-4)
    assert got["blk.3.a.weight"]["Q8_0"] < got["blk.3.a.weight"]["Q4_0"] / 5


def test_measures_that_need_statistics_say_so() -> None:
    layer, _ = layer_and_stats()
    for measure in ("weighted", "output"):
        with pytest.raises(SlimpiError, match="Calibrate first"):
            layer_errors(layer, {}, {"blk.3.a.weight": ["Q4_0"]}, METHODS["rtn"].run, MEASURES[measure])


def test_a_method_that_folds_is_refused() -> None:
    layer, _ = layer_and_stats()

    def folding(layer: Layer, stats: Any, formats: Any) -> QuantizedLayer:
        return QuantizedLayer({}, {"attn_norm.weight": torch.ones(64)})

    with pytest.raises(SlimpiError, match=r"changes attn_norm\.weight too"):
        layer_errors(layer, {}, {"blk.3.a.weight": ["Q4_0"]}, folding, MEASURES["frobenius"])


def test_sensitivities_change_one_tensor_at_a_time_and_resume(tmp_path: Any) -> None:
    reference = {"a": "F16", "b": "F16", "c": "Q8_0"}
    choices = {"a": ["Q4_0", "F16"], "b": ["Q4_0", "Q8_0"]}
    seen: list[tuple[dict[str, str], int]] = []

    def kld(formats: dict[str, str], n_samples: int) -> float:
        seen.append((formats, n_samples))
        loss = {"Q4_0": 0.5, "Q8_0": -0.01, "F16": 0.0}
        return 0.25 + 2 * loss[formats["a"]] + loss[formats["b"]]

    def ended(formats: dict[str, str], n_samples: int) -> float:
        if len(seen) == 2:
            raise KeyboardInterrupt
        return kld(formats, n_samples)

    path = tmp_path / "state.json"
    with pytest.raises(KeyboardInterrupt):
        plan_costs.sensitivities(choices, reference, ended, 7, path)
    got = plan_costs.sensitivities(choices, reference, kld, 7, path)
    assert got == {"a": {"Q4_0": 1.0, "F16": 0.0}, "b": {"Q4_0": 0.5, "Q8_0": 0.0}}, "noise below 0 counts as 0"
    assert seen == [
        (reference, 7),
        ({**reference, "a": "Q4_0"}, 7),
        ({**reference, "b": "Q4_0"}, 7),
        ({**reference, "b": "Q8_0"}, 7),
    ]
    with pytest.raises(SlimpiError, match="for other choices, reference or samples"):
        plan_costs.sensitivities(choices, reference, kld, 8, path)
    path.write_text("{")
    with pytest.raises(SlimpiError, match="cannot be read"):
        plan_costs.sensitivities(choices, reference, kld, 7, path)


def profile_report(times: dict[tuple[str, int, int], list[float]], n_tokens: int = 1) -> Report:
    measurements = [
        Measurement(
            metric="ns_per_weight", unit="ns/weight", samples=samples, higher_is_better=False, provenance="host",
            conditions={"format": kind, "rows": rows, "columns": columns, "n_tokens": n_tokens},
        )
        for (kind, rows, columns), samples in times.items()
    ]  # fmt: skip
    found = report("Q4_0", [1.0, 2.0])
    (result, *_) = found.results
    return msgspec.structs.replace(found, results=[msgspec.structs.replace(result, measurements=measurements)])


def test_latencies_are_medians_times_weights() -> None:
    times = {("Q4_0", 32, 64): [0.5, 9.0, 0.25], ("Q8_0", 32, 64): [1.0], ("Q4_0", 300, 64): [2.0]}
    choices = {
        "blk.3.a.weight": ["Q4_0", "Q8_0"],
        "output.weight": ["Q4_0"],
        "token_embd.weight": ["Q4_0", "Q2_K"],
    }
    got = latencies(profile_report(times), BASE, choices)
    assert got == {
        "blk.3.a.weight": {"Q4_0": 0.5 * 32 * 64, "Q8_0": 1.0 * 32 * 64},
        "output.weight": {"Q4_0": 2.0 * 300 * 64},
        "token_embd.weight": {"Q4_0": 0.0, "Q2_K": 0.0},
    }
    with pytest.raises(SlimpiError, match=r"Q4_0 64x64, of blk\.3\.b\.weight, is not among the 3 products"):
        latencies(profile_report(times), BASE, {"blk.3.b.weight": ["Q4_0"]})
    with pytest.raises(SlimpiError, match="not among the 0 products"):
        latencies(profile_report(times, n_tokens=8), BASE, {"blk.3.a.weight": ["Q4_0"]})


def test_tied_embeddings_are_multiplied() -> None:
    shapes = {name: shape for name, shape in BASE.shapes.items() if name != "output.weight"}
    tied = plan.Base(shapes, BASE.formats, 0)
    got = latencies(profile_report({("Q4_0", 300, 64): [2.0]}), tied, {"token_embd.weight": ["Q4_0"]})
    assert got == {"token_embd.weight": {"Q4_0": 2.0 * 300 * 64}}
    assert (300, 64) in {(p.rows, p.columns) for p in products(tied, ["Q4_0"])}


def test_products_are_those_of_a_token_in_formats_that_fit() -> None:
    shapes = [(32, 64), (64, 64), (300, 64)]
    got = [(p.format, p.rows, p.columns) for p in products(BASE, ["Q4_0", "Q4_K", "F16"])]
    assert got == [(kind, *shape) for shape in shapes for kind in ("Q4_0", "F16")], "64 columns: no K-quants"
    untied = plan.Base({**BASE.shapes, "token_embd.weight": (500, 64)}, BASE.formats, 0)
    assert products(untied, ["Q4_0"]) == products(BASE, ["Q4_0"]), "embeddings are looked up"


def test_from_the_agents_report_to_a_table(tmp_path: Any) -> None:
    world = World.make(tmp_path)
    task = Profile(products=products(BASE, ["Q4_0", "Q8_0"])[:4], working_set_mib=1, repetitions=1)
    measured, _ = run(world.job("gguf", [task]))
    choices = {name: ["Q4_0", "Q8_0"] for name in BASE.linear}
    got = latencies(measured, BASE, choices)
    assert {name: sorted(row) for name, row in got.items()} == choices
    assert all(value > 0 for row in got.values() for value in row.values())
    assert plan_costs.MEASURES["frobenius"] is plan_costs.frobenius

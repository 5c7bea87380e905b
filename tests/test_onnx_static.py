"""Calibrated INT8 encoders: every product recomputed in exact integers, shares counted, choices against naive twins."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from scipy.stats import norm
from test_onnx import LABELS, TEXTS, feed, run, session
from tiny_encoders import MAX_TOKENS, PROSE, TINY, save_encoder
from tokenizers import Tokenizer

from device.records import SlimpiError
from pipeline.export import onnx_int8
from pipeline.export.onnx import check_variant, describe_onnx, export_encoder, make_variant
from pipeline.export.onnx_bits import matrices
from pipeline.export.onnx_lossless import divergence, frontier, stay_fp32
from pipeline.export.onnx_observe import Calibration, Observed, observe, open_session, read_calibration
from pipeline.export.onnx_ranges import RANGES
from pipeline.export.onnx_smooth import (
    ALPHAS,
    GELU_MINIMUM,
    Choices,
    emulate,
    fold_divisions,
    gelu_outputs,
    relative_error,
    treat,
)
from pipeline.export.onnx_static import (
    ARITHMETICS,
    Product,
    Treatment,
    products,
    quantize_static,
    quantize_weight,
)

VARIANTS = [
    *(f"INT8-{plan}" for plan in onnx_int8.PLANS),
    *(f"INT8-static-{name}" for name in ARITHMETICS if name != "U8U8"),
    *(f"INT8-static-{name}" for name in RANGES if name != "minmax"),
    "INT8-static-tensor",
    "INT8-smooth-S8S8-tensor-mse",
]
WORST = {"INT8-static-tensor": 0.3}  # of the logits' norm; what is quantized more coarsely may be further off


@pytest.fixture(scope="module", params=[*TINY, "xlnet"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_encoder(request.param, folder / "hf", len(LABELS))
    export_encoder(folder / "hf", folder, LABELS, MAX_TOKENS)
    return folder


@pytest.fixture(scope="module")
def calibration(exported: Path) -> Calibration:
    return read_calibration(PROSE, "demo", exported / "tokenizer.json", MAX_TOKENS, 24)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_run_and_stay_close(exported: Path, calibration: Calibration, tmp_path: Path, variant: str) -> None:
    summary = make_variant(exported / "model.onnx", tmp_path, variant, calibration)
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    fp32 = run(exported / "model.onnx", tokenizer, TEXTS, 1)
    int8 = run_exact(tmp_path / "model.onnx", tokenizer, TEXTS)
    assert np.abs(int8 - fp32).max() > 0
    assert np.linalg.norm(int8 - fp32) < WORST.get(variant, 0.25) * np.linalg.norm(fp32)
    base = describe_onnx(exported / "model.onnx")
    assert (summary.n_weights, summary.n_linear_weights) == (base.n_weights, base.n_linear_weights)
    small = {name for name, kind in summary.types.items() if kind != "FP32"}
    stayed = set(summary.facts.get("fp32", []))
    assert small == set(matrices(onnx.load(exported / "model.onnx"))) - stayed
    assert summary.facts["int8_weights"] >= 0.95
    assert summary.facts["int8_activations"] >= 0.95
    assert summary.notes[0].startswith("INT8: ")


def run_exact(model: Path, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """One text at a time, with integer products that do not saturate."""
    running = open_session(model.read_bytes(), 1)
    names = [entry.name for entry in running.get_inputs()]
    return np.concatenate([running.run(["logits"], feed(tokenizer, [text], names))[0] for text in texts])


@pytest.mark.parametrize("plan", onnx_int8.PLANS)
def test_the_runtime_fuses_every_product_to_an_integer_one(
    exported: Path, calibration: Calibration, tmp_path: Path, plan: str
) -> None:
    summary = make_variant(exported / "model.onnx", tmp_path, f"INT8-{plan}", calibration)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    fused = onnx.load(tmp_path / "fused.onnx").graph
    n_products = len(products(onnx.load(exported / "model.onnx").graph)) - len(summary.facts.get("fp32", []))
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in fused.node) == n_products


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_products_are_exact_integers(
    exported: Path, calibration: Calibration, arithmetic: str, per_channel: bool
) -> None:
    """Every quantized product of the file, recomputed in int64 from the fp32 input of its quantizer."""
    model = onnx.load(exported / "model.onnx")
    found = products(model.graph)
    seen = observe(model, list(dict.fromkeys(p.x for p in found)), calibration)
    choices = Choices(ARITHMETICS[arithmetic], per_channel, alphas=ALPHAS, n_kept=2)
    treatments = treat(model.graph, found, seen, choices)
    quantized = quantize_static(model, treatments, ARITHMETICS[arithmetic], per_channel)
    makers = {output: node for node in quantized.graph.node for output in node.output}
    weights = {t.name: numpy_helper.to_array(t) for t in quantized.graph.initializer}
    integer = [n for n in quantized.graph.node if n.op_type == "MatMul" and is_quantized(n, makers)]
    assert len(integer) == len(found)
    sources = [makers[makers[n.input[0]].input[0]].input[0] for n in integer]
    wanted = list(dict.fromkeys([*sources, *(n.output[0] for n in integer)]))
    known = {value.name for value in quantized.graph.output}
    quantized.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted if name not in known
    )
    running = open_session(quantized, 1)
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    got = dict(
        zip(
            wanted, running.run(wanted, feed(tokenizer, TEXTS[:3], [i.name for i in running.get_inputs()])), strict=True
        )
    )
    for node, source in zip(integer, sources, strict=True):
        x, x_scale = codes_of_input(got[source], makers[makers[node.input[0]].input[0]], weights)
        entry = makers[node.input[1]]
        w = weights[entry.input[0]].astype(np.int64) - weights[entry.input[2]].astype(np.int64)
        expected = (x @ w) * (x_scale * weights[entry.input[1]].astype(np.float64))
        assert np.abs(got[node.output[0]] - expected).max() <= 2e-5 * np.abs(expected).max(), node.output[0]


def is_quantized(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> bool:
    return all(name in makers and makers[name].op_type == "DequantizeLinear" for name in node.input)


def codes_of_input(
    x: np.ndarray, quantizer: onnx.NodeProto, constants: dict[str, np.ndarray]
) -> tuple[np.ndarray, float]:
    """QuantizeLinear as the ONNX standard defines it; codes without the zero point."""
    assert quantizer.op_type == "QuantizeLinear"
    scale, zero = constants[quantizer.input[1]], constants[quantizer.input[2]]
    limits = np.iinfo(zero.dtype)
    codes = np.clip(np.rint(x / scale) + float(zero), limits.min, limits.max)
    return codes.astype(np.int64) - int(zero), float(scale)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_are_the_nearest_codes(arithmetic: str, per_channel: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((7, 5)).astype(np.float32)
    weight[:, 0], weight[:, 1], weight[0, 2] = np.abs(weight[:, 0]) + 3, 0.0, 0.0
    codes, scale, zero = quantize_weight(weight, ARITHMETICS[arithmetic], per_channel)
    kind = ARITHMETICS[arithmetic]
    assert (codes.dtype, zero.dtype) == (kind.weights, kind.weights)
    assert scale.shape == zero.shape == ((5,) if per_channel else ())
    restored = (codes.astype(float) - zero) * scale
    assert (np.abs(restored - weight) <= 0.5001 * scale + 1e-7).all()
    assert (restored[weight == 0] == 0).all()
    if kind.bound:
        assert np.abs(codes.astype(int)).max() <= kind.bound


def integer_product(arithmetic: str, weight: np.ndarray, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """(what ONNX Runtime gives for one quantized product, the same in int64) times the scales."""
    kind = ARITHMETICS[arithmetic]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 64])],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    quantized = quantize_static(model, {"y": Treatment((0.0, 255.0))}, kind)
    x = np.random.default_rng(1).integers(200, 256, (64, 256)).astype(np.float32)
    running = open_session(quantized, 1) if exact else session(quantized)
    codes, scale, zero = quantize_weight(weight.astype(np.float32), kind, True)
    true = (x.astype(np.int64) @ (codes.astype(np.int64) - zero.astype(np.int64))) * scale.astype(np.float64)
    return running.run(["y"], {"x": x})[0], true


WEIGHT = np.random.default_rng(2).integers(100, 127, (256, 64))


def relative(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.abs(found - true).max() / np.abs(true).max())


def saturates() -> bool:
    """x86 with AVX2 and no VNNI: pairs of u8 x s8 products are added in int16."""
    info = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", info.read_text())) if info.is_file() else set()
    return "avx2" in flags and not flags & {"avx_vnni", "avx512_vnni"}


@pytest.mark.skipif(not saturates(), reason="this CPU adds u8 x s8 products in 32 bits (VNNI, or no x86)")
def test_s8s8_saturates_on_this_kind_of_host() -> None:
    assert relative(*integer_product("S8S8", WEIGHT, exact=False)) > 0.01


@pytest.mark.parametrize("arithmetic", ["U8U8", "U8S7"])
def test_what_ships_is_exact_in_a_plain_session(arithmetic: str) -> None:
    """U8U8 is the default; U8S7 leaves a bit. Both on every machine."""
    assert relative(*integer_product(arithmetic, WEIGHT, exact=False)) < 1e-6


def test_s8s8_is_exact_where_it_is_evaluated() -> None:
    assert relative(*integer_product("S8S8", WEIGHT, exact=True)) < 1e-6


@pytest.mark.parametrize("name", RANGES)
def test_ranges_lie_within_what_was_seen_and_hold_most_of_it(name: str) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((512, 16)).astype(np.float32)
    rows[3, 5] = 40.0
    seen = Observed(rows.min(axis=0), rows.max(axis=0), rows)
    low, high = RANGES[name](seen)
    assert rows.min() <= low < 0 < high <= 40.0
    assert ((rows >= low) & (rows <= high)).mean() > 0.99
    assert (high < 40.0) == (name in ("percentile", "entropy"))  # the two that cut single outliers off


def test_mse_range_is_the_best_of_its_grid() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((64, 8)) ** 3).astype(np.float32)
    seen = Observed(rows.min(axis=0), rows.max(axis=0), rows)

    def error(low: float, high: float) -> float:
        step = (high - low) / 255
        return float(sum((round((min(max(v, low), high) - low) / step) * step + low - v) ** 2 for v in rows.ravel()))

    assert error(*RANGES["mse"](seen)) <= error(*RANGES["minmax"](seen))


def test_smoothing_beats_none_on_outlier_channels_and_equals_its_emulation() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, 64)).astype(np.float32)
    rows[:, 7] *= 50
    weight = rng.standard_normal((64, 12)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 12])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    seen = {"x": Observed(rows.min(axis=0), rows.max(axis=0), rows)}
    errors = {}
    for name, alphas, n_kept in (("plain", (None,), 0), ("smooth", ALPHAS, 0), ("kept", ALPHAS, 1)):
        choices = Choices(ARITHMETICS["U8U8"], alphas=alphas, n_kept=n_kept)
        treatment = treat(graph, products(graph), seen, choices)["y"]
        assert treatment.kept == ((7,) if n_kept else ())
        found = open_session(quantize_static(model, {"y": treatment}, choices.arithmetic), 1).run(["y"], {"x": rows})[0]
        assert np.abs(found - emulate(rows, weight, treatment, choices)).max() < 1e-3 * np.abs(found).max()
        errors[name] = relative_error(rows, weight, treatment, choices)
    assert errors["kept"] < errors["smooth"] < 0.25 * errors["plain"]


def test_division_folds_into_a_norm_that_feeds_nothing_else() -> None:
    rng = np.random.default_rng(0)
    constants = {"g": (32,), "b": (32,), "w": (32, 8)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in constants.items()}
    for residual in (False, True):
        nodes = [
            helper.make_node("LayerNormalization", ["x", "g", "b"], ["n"]),
            helper.make_node("MatMul", ["n", "w"], ["y"]),
            helper.make_node("Identity", ["n" if residual else "x"], ["z"]),
        ]
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            nodes,
            "pre-norm",
            [value("x", TensorProto.FLOAT, [None, 32])],
            [value("y", TensorProto.FLOAT, [None, 8]), value("z", TensorProto.FLOAT, [None, 32])],
            [numpy_helper.from_array(array, name) for name, array in arrays.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        divisor = np.exp(rng.standard_normal(32)).astype(np.float32)
        quantized = quantize_static(model, {"y": Treatment((-9.0, 9.0), divisor)}, ARITHMETICS["U8U8"])
        x = rng.standard_normal((5, 32)).astype(np.float32)
        before = open_session(quantized, 1).run(["y", "z"], {"x": x})
        assert fold_divisions(quantized) == (0 if residual else 1)
        onnx.checker.check_model(quantized)
        assert sum(n.op_type == "Mul" for n in quantized.graph.node) == (1 if residual else 0)
        after = open_session(quantized, 1).run(["y", "z"], {"x": x})
        for a, b in zip(after, before, strict=True):
            assert np.abs(a - b).max() < 0.02 * np.abs(b).max()  # a code may tip


def test_the_low_end_after_gelu_is_its_minimum(exported: Path, calibration: Calibration) -> None:
    x = np.linspace(-3, 3, 600001)
    assert (x * norm.cdf(x)).min() == pytest.approx(GELU_MINIMUM, abs=1e-8)
    model = onnx.load(exported / "model.onnx")
    found = products(model.graph)
    after = [p for p in found if p.x in gelu_outputs(model.graph)]
    n_layers = 2
    widest = max(p.shape[0] for p in found)
    assert [p.shape[0] for p in after] == [widest] * n_layers  # the second product of each feed-forward block
    seen = observe(model, list(dict.fromkeys(p.x for p in found)), calibration)
    treatments = treat(model.graph, found, seen, Choices(ARITHMETICS["U8U8"]))
    assert all(treatments[p.y].interval[0] == GELU_MINIMUM for p in after)
    assert all(seen[p.x].low.min() >= GELU_MINIMUM - 1e-6 for p in after)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=12))
def test_frontier_is_what_no_other_beats(points: list[tuple[int, int]]) -> None:
    sensitivity, n_weights = [float(s) for s, _ in points], [n for _, n in points]

    def beaten(i: int) -> bool:
        return any(
            sensitivity[j] >= sensitivity[i]
            and n_weights[j] <= n_weights[i]
            and ((sensitivity[j], -n_weights[j]) != (sensitivity[i], -n_weights[i]) or j < i)
            for j in range(len(points))
            if j != i
        )

    assert sorted(frontier(sensitivity, n_weights)) == [i for i in range(len(points)) if not beaten(i)]


def test_what_stays_fp32_is_the_most_sensitive_within_the_floor() -> None:
    found = [Product(f"w{i}", f"x{i}", f"y{i}", (100, 100), False) for i in range(40)]
    treatments = {p.y: Treatment((-1.0, 1.0)) for p in found}
    felt = {p.y: float(i) for i, p in enumerate(found)}
    chosen = stay_fp32(found, treatments, felt, n_table_weights=0)
    assert [p.name for p in chosen] == ["w39", "w38"]  # 95 % of 40 are 38
    small = [Product("small", "xs", "ys", (10, 10), False), *found]
    felt["ys"] = 0.5
    chosen = stay_fp32(small, treatments | {"ys": Treatment((-1.0, 1.0))}, felt, n_table_weights=0)
    assert [p.name for p in chosen] == ["w39", "small"]  # both on the first frontier; then w38 has no room


def test_divergence_is_the_mean_kl_of_the_softmax() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 6, 3)).astype(np.float32)
    total = 0.0
    for x, y in zip(a, b, strict=True):
        p, q = np.exp(x) / np.exp(x).sum(), np.exp(y) / np.exp(y).sum()
        total += float((p * np.log(p / q)).sum())
    assert divergence(a, b) == pytest.approx(total / 6, rel=1e-5)
    assert divergence(a, a) == 0


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("INT8-static", onnx_int8.Int8Spec("static")),
        ("INT8-smooth-S8S8-tensor-mse", onnx_int8.Int8Spec("smooth", "S8S8", False, "mse")),
        ("INT8-lossless-percentile", onnx_int8.Int8Spec("lossless", ranges="percentile")),
    ],
)
def test_names_are_parsed_by_rule(name: str, spec: onnx_int8.Int8Spec) -> None:
    assert onnx_int8.parse(name) == spec
    check_variant(name)


@pytest.mark.parametrize("name", ["INT8-odd", "INT8-static-mse-S8S8", "INT8-static-U4", "INT8-", "INT8-static-mse-mse"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(SlimpiError, match=f"unknown ONNX variant '{name}'.*INT8-PLAN"):
        check_variant(name)


def test_bad_calibration_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match="needs a calibration text"):
        make_variant(exported / "model.onnx", tmp_path / "a", "INT8-static")
    tokenizer = exported / "tokenizer.json"
    for data, message in ((b"\n \n", "is empty"), (b"\xff\xfe", "cannot read the calibration text")):
        (tmp_path / "text.txt").write_bytes(data)
        with pytest.raises(SlimpiError, match=message):
            read_calibration(tmp_path / "text.txt", "t", tokenizer, MAX_TOKENS)
    assert not (tmp_path / "a" / "model.onnx").exists()


def test_observed_ranges_are_those_of_every_token(exported: Path, calibration: Calibration) -> None:
    """Against one text at a time, which nothing is batched with."""
    model = onnx.load(exported / "model.onnx")
    x = products(model.graph)[0].x
    together = observe(model, [x], calibration)[x]
    alone = [observe(model, [x], Calibration("one", [e]))[x] for e in calibration.encodings]
    assert np.allclose(together.low, np.min([seen.low for seen in alone], axis=0), atol=1e-5)
    assert np.allclose(together.high, np.max([seen.high for seen in alone], axis=0), atol=1e-5)

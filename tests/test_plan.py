"""Plans: every name resolved, nothing dropped, and sizes exact to the byte against files that llama.cpp writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import reference_plan as twin
from fakes import LlamaShape, write_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from device.records import SlimpiError
from device.schema import Fallback
from pipeline import fit, plan, plan_milp
from pipeline.export.gguf import read_gguf_types
from pipeline.export.llama_quantize import quantize_gguf
from pipeline.formats import FORMATS, Format
from pipeline.gguf_file import read_gguf

BASE = plan.Base(
    shapes={
        "token_embd.weight": (300, 256),
        "output_norm.weight": (256,),
        "blk.0.attn_q.weight": (256, 256),
        "blk.0.attn_q.bias": (256,),
        "blk.0.attn_norm.weight": (256,),
        "blk.0.ffn_down.weight": (256, 160),
        "blk.0.ffn_gate_inp.weight": (8, 256),
        "output.weight": (300, 256),
    },
    formats={
        "token_embd.weight": "F16",
        "output_norm.weight": "F32",
        "blk.0.attn_q.weight": "F16",
        "blk.0.attn_q.bias": "F32",
        "blk.0.attn_norm.weight": "F32",
        "blk.0.ffn_down.weight": "F16",
        "blk.0.ffn_gate_inp.weight": "F32",
        "output.weight": "F16",
    },
    metadata_bytes=1024,
)


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """288 columns in ffn_down: K-quants do not fit there."""
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    write_llama(path, LlamaShape(dim=256, ffn=288))
    return path


def test_matrices_are_what_llama_cpp_quantizes() -> None:
    assert BASE.matrices == ["token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "output.weight"]
    assert BASE.linear == ["blk.0.attn_q.weight", "blk.0.ffn_down.weight"]


def test_uniform_names_every_tensor_and_records_what_did_not_fit() -> None:
    made = plan.uniform(BASE, "Q4_K", embeddings="Q8_0", output="Q6_K")
    assert made.formats == {
        **BASE.formats,
        "token_embd.weight": "Q8_0",
        "blk.0.attn_q.weight": "Q4_K",
        "blk.0.ffn_down.weight": "Q5_0",
        "output.weight": "Q6_K",
    }
    reason = "160 columns are not divisible by 256"
    assert made.fallbacks == (Fallback(tensor="blk.0.ffn_down.weight", asked="Q4_K", got="Q5_0", reason=reason),)


def test_tied_embeddings_get_the_outputs_format() -> None:
    shapes = {name: shape for name, shape in BASE.shapes.items() if name != "output.weight"}
    formats = {name: kind for name, kind in BASE.formats.items() if name != "output.weight"}
    tied = plan.Base(shapes, formats, 1024)
    made = plan.uniform(tied, "Q4_0", embeddings="Q4_0", output="Q6_K")
    assert made.formats["token_embd.weight"] == "Q6_K"
    assert made.formats["blk.0.attn_q.weight"] == "Q4_0"


def test_later_rules_override() -> None:
    rules = {"*": "Q4_0", "blk.*": "Q5_0", "blk.0.attn_*": "Q8_0"}
    made = plan.resolve(BASE, rules)
    assert [made.formats[name] for name in BASE.matrices] == ["Q4_0", "Q8_0", "Q5_0", "Q4_0"]
    assert (
        plan.uniform(
            BASE, "Q4_0", embeddings="Q4_0", output="Q4_0", overrides={"blk.*": "Q5_0", "blk.0.attn_*": "Q8_0"}
        )
        == made
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: plan.resolve(BASE, {"*": "Q4_9"}), "unknown format 'Q4_9'"),
        (lambda: plan.resolve(BASE, {"*": "Q4_0", "blk.7.*": "Q8_0"}), r"`blk\.7\.\*` is the name of no matrix"),
        (lambda: plan.resolve(BASE, {"*": "Q4_0", "*norm*": "Q8_0"}), "is the name of no matrix"),
        (lambda: plan.resolve(BASE, {"blk.*": "Q4_0"}), r"which format token_embd\.weight gets \(2 in all\)"),
        (lambda: plan.explicit(BASE, {"blk.9.attn_q.weight": "Q4_0"}), "is no tensor of this model"),
        (lambda: plan.explicit(BASE, {"output_norm.weight": "Q4_0"}), "is no matrix: it stays F32"),
        (lambda: plan.sizes(BASE, {"nowhere": ["Q4_0"]}), "is no tensor of this model"),
        (lambda: plan.sizes(BASE, {"blk.0.ffn_down.weight": ["Q4_K"]}), "160 columns, which Q4_K's blocks of 256"),
        (lambda: plan.choices(BASE, ["blk.0.ffn_down.weight"], ["Q4_K", "Q6_K"]), "none of Q4_K, Q6_K divides"),
        (lambda: plan.file_bytes(BASE, plan.Plan({"output.weight": "Q4_0"})), "the plan is for another model"),
        (lambda: plan.linear_bits_per_weight(BASE, plan.Plan({})), "the plan is for another model"),
        (lambda: plan.file_budget(BASE, plan.Plan(BASE.formats), [], 1500), "1500 bytes do not hold"),
    ],
)
def test_what_is_wrong_raises(make: Any, says: str) -> None:
    with pytest.raises(SlimpiError, match=says):
        make()


def test_every_format_with_blocks_has_a_way_out_or_says_so() -> None:
    """Chains end at a format of one weight a block, so that any number of columns ends somewhere."""
    for start in plan.NARROWER:
        seen = [start]
        while seen[-1] in plan.NARROWER:
            seen.append(plan.NARROWER[seen[-1]])
            assert FORMATS[seen[-1]].block_size <= FORMATS[seen[-2]].block_size
        assert FORMATS[seen[-1]].block_size == 1, seen
    assert plan.fitting("t", 33, "Q6_K")[0] == "F16"
    with pytest.raises(SlimpiError, match="nothing replaces Q8_K"):
        plan.fitting("t", 32, "Q8_K")


@pytest.mark.parametrize("variant", ["Q4_K_M", "Q2_K", "Q3_K_M", "IQ4_XS", "Q8_0", "F16", "F32"])
def test_named_mixes_are_what_llama_cpp_writes_to_the_byte(gguf_path: Path, tmp_path: Path, variant: str) -> None:
    out = tmp_path / "out.gguf"
    written = quantize_gguf(gguf_path, out, variant, None, 1, None)
    made = plan.mix(gguf_path, variant, None)
    assert made.formats == {name: kind for name, kind, _, _ in read_gguf_types(out)} == written.types
    assert list(made.fallbacks) == written.fallbacks
    base = plan.read_base(gguf_path)
    metadata = plan.read_base(out).metadata_bytes  # llama.cpp adds keys of its own
    assert abs(metadata - base.metadata_bytes) < 256
    assert plan.file_bytes(plan.Base(base.shapes, base.formats, metadata), made) == out.stat().st_size
    linear = [(8 * size, n) for name, _, n, size in read_gguf_types(out) if name in base.linear]
    expected = sum(bits for bits, _ in linear) / sum(n for _, n in linear)
    assert plan.linear_bits_per_weight(base, made) == pytest.approx(expected)


def test_our_chains_are_llama_cpps(gguf_path: Path) -> None:
    """Every fallback llama.cpp takes on 288 columns is the one we take."""
    seen = set()
    for variant in ("Q2_K", "Q3_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS", "IQ3_S"):
        for fallback in plan.mix(gguf_path, variant, None).fallbacks:
            assert plan.fitting(fallback.tensor, 288, fallback.asked) == (fallback.got, fallback)
            seen.add(fallback.asked)
    assert seen >= {"Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ3_S", "IQ4_XS"}


def test_a_mix_that_needs_an_importance_matrix_says_so(gguf_path: Path) -> None:
    with pytest.raises(SlimpiError, match="needs an importance matrix"):
        plan.mix(gguf_path, "IQ2_XXS", None)


@given(
    st.lists(
        st.tuples(st.integers(1, 7), st.sampled_from([256, 768]), st.sampled_from(sorted(gguf.GGML_QUANT_SIZES))),
        min_size=1, max_size=5,
    )
)  # fmt: skip
@settings(max_examples=50)
def test_file_size_is_what_laying_the_tensors_out_gives(tensors: list[tuple[int, int, Any]]) -> None:
    shapes = {f"blk.{i}.a.weight": (rows, columns) for i, (rows, columns, _) in enumerate(tensors)}
    formats = {f"blk.{i}.a.weight": kind.name for i, (_, _, kind) in enumerate(tensors)}
    base = plan.Base(shapes, formats, 96)
    layout = [((rows, columns), *gguf.GGML_QUANT_SIZES[kind]) for rows, columns, kind in tensors]
    assert plan.file_bytes(base, plan.Plan(formats)) == twin.file_size(96, layout)


def test_budgets_are_met_exactly() -> None:
    """A file budget of exactly what a plan takes is feasible for that plan, and one byte less is not."""
    names = BASE.linear
    open_to = plan.choices(BASE, names, ["Q4_0", "Q8_0"])
    fixed = plan.uniform(BASE, "Q4_0", embeddings="Q8_0", output="Q6_K")
    sizes = plan.sizes(BASE, open_to)
    exact = plan.file_bytes(BASE, fixed)
    budget = plan.file_budget(BASE, fixed, names, exact)
    assert budget == plan_milp.smallest(sizes)
    errors = {name: {kind: 1 / size for kind, size in row.items()} for name, row in sizes.items()}
    assert plan_milp.solve(errors, sizes, budget).size_bytes == budget
    with pytest.raises(SlimpiError, match=f"the smallest choice takes {budget} bytes"):
        plan_milp.solve(errors, sizes, plan.file_budget(BASE, fixed, names, exact - 1))
    bits = plan.sizes(BASE, open_to, padded=False)
    assert plan_milp.smallest(bits) == plan.bits_budget(BASE, 4.5)
    assert plan_milp.smallest(bits) > plan.bits_budget(BASE, 4.4999)


def test_the_largest_file_that_fits_is_the_one_the_check_lets_pass(gguf_path: Path) -> None:
    keys = read_gguf(gguf_path).keys
    available = 400_000_000
    largest = plan.memory_limit(gguf_path, 512, available)
    for size, fits in [(largest - 1, True), (largest + 2, False)]:
        rest = fit.largest_file_bytes(keys, 272, 512, 10**12)
        needed = (size + int(10**12 / fit.MARGIN) - rest) * fit.MARGIN
        assert (needed <= available) == fits
    cache = fit.cache_bytes(keys, 8192) - fit.cache_bytes(keys, 512)
    assert largest - plan.memory_limit(gguf_path, 8192, available) == cache
    with pytest.raises(SlimpiError, match="do not hold the KV cache"):
        plan.memory_limit(gguf_path, 512, 1_000_000)


def test_formats_no_runtime_stores_become_the_nearest_that_one_does() -> None:
    strange = [
        f for f in FORMATS.values() if f.ggml_type is None and 160 % f.block_size == 0 and 256 % f.block_size == 0
    ]
    assert strange
    for kind in strange:
        made = plan.Plan({**BASE.formats, "blk.0.attn_q.weight": kind.name, "blk.0.ffn_down.weight": kind.name})
        found = plan.loadable(BASE, made)
        for name in BASE.linear:
            got = FORMATS[found.formats[name]]
            rivals = [
                f for f in FORMATS.values() if f.ggml_type and f.codes and BASE.shapes[name][1] % f.block_size == 0
            ]
            distance = abs(got.bits_per_weight - kind.bits_per_weight)
            assert distance == min(abs(f.bits_per_weight - kind.bits_per_weight) for f in rivals)
        assert [f.tensor for f in found.fallbacks] == BASE.linear
        assert found.formats.keys() == made.formats.keys()
    plain = plan.uniform(BASE, "Q4_0", embeddings="Q8_0", output="Q6_K")
    assert plan.loadable(BASE, plain) == plain


def test_of_two_formats_as_near_the_larger_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    midway = Format("ODD", 4.75, 32)  # between Q4_0's 4.5 and Q4_1's 5.0
    monkeypatch.setitem(FORMATS, "ODD", midway)
    made = plan.Plan({**BASE.formats, "blk.0.ffn_down.weight": "ODD"})
    assert FORMATS[plan.loadable(BASE, made).formats["blk.0.ffn_down.weight"]].bits_per_weight == 5.0

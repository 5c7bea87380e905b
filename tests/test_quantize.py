"""Quantizing tiny models block by block: what the file holds, what llama.cpp makes of it, kills, wrong plans."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import tiny_models
import torch
from gguf import GGMLQuantizationType as GgmlType
from llama_cpp_side import llama_logits
from test_convert import TOKENS, agreement

from device.records import SlimpiError
from pipeline import build as build_module
from pipeline import deploy, hessians, plan, progress, quantize
from pipeline.build import build
from pipeline.checkpoint import Tensor, held, load
from pipeline.compare import rows
from pipeline.export.gguf import EncodedTensor, export_gguf, gguf_tensors
from pipeline.export.llama_quantize import quantize_gguf
from pipeline.exporters import EXPORTERS, knows
from pipeline.folds import changed_vectors, fold_in, n_scales
from pipeline.formats import FORMATS, Format, QTensor
from pipeline.layers import Layer, MethodEntry, QuantizedLayer, Stats, each
from pipeline.methods import METHODS, rtn, search
from pipeline.plan import Plan
from pipeline.progress import Progressor, quiet
from pipeline.quantize import Parts, Workshop, encoder, quantize_model
from pipeline.recipes import Calibration, Golden, Recipe
from pipeline.store import Places, load_artifact
from pipeline.variants import VariantSpec, parse_variant

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": "llama",
    "llama-biased": "llama-biased",
    "qwen2": "qwen2",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "llama-wide": "llama",
}
"""Name -> the tiny model it is made from; the wide one has widths that K-quants' super-blocks divide."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model with base.gguf, its own float32, and stats, of a few chunks of prose."""
    root = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            kind = {**tiny_models.TINY[FAMILIES[name]], **(WIDE if name.endswith("wide") else {})}
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(tiny_models.TINY, name, kind)
                tiny_models.save_tiny(name, folder / "hf")
            export_gguf(load(folder / "hf"), folder / "base.gguf", "auto")
            hessians.collect_stats(folder / "base.gguf", tiny_models.PROSE, folder / "stats", n_ctx=128, n_chunks=4)
        return folder

    return get


def workshop(root: Path, stats_key: Any = "stats") -> Workshop:
    return Workshop(root / "stages", "tiny", "weights", stats_key, torch.device("cpu"), say=lambda message: None)


def uniform(base: Path, kind: str) -> Plan:
    return plan.uniform(plan.read_base(base), kind, embeddings=kind, output="Q8_0")


def quantized(folder: Path, method: str, wanted: Plan, root: Path) -> Path:
    checkpoint = load(folder / "base.gguf")
    parts = quantize_model(checkpoint, method, wanted, hessians.load_stats(folder / "stats"), workshop(root), quiet)
    types = export_gguf(checkpoint, root / "q.gguf", "auto", encoder(parts, wanted))
    assert types == wanted.formats
    return root / "q.gguf"


def quantized_and_chosen(folder: Path, method: str, wanted: Plan, root: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file, and what the method said the weights are while it was built, float32 by tensor name. Asked again it may
    say something else: sums of floats depend on how their memory is aligned, and a near tie then tips."""
    entry, results = METHODS[method], dict[int, QuantizedLayer]()

    def run(layer: Layer, stats: Mapping[str, Stats], formats: Mapping[str, Format]) -> QuantizedLayer:
        results[layer.index] = entry.run(layer, stats, formats)
        return results[layer.index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, method, replace(entry, run=run))
        path = quantized(folder, method, wanted, root)
    values = {}
    for index, result in results.items():
        values |= {f"blk.{index}.{name}": q.dequantize() for name, q in result.tensors.items()}
        values |= {f"blk.{index}.{name}": vector for name, vector in result.vectors.items()}
    tensors = gguf_tensors(load(folder / "base.gguf"))
    for name in ("token_embd.weight", "output.weight"):
        if name in tensors:
            w = tensors[name].read().float()
            values[name] = search.quantize(w, None, FORMATS[wanted.formats[name]])[0].dequantize()
    return path, values


def written_in_f32(folder: Path, values: Mapping[str, torch.Tensor], out: Path) -> Path:
    def encode(name: str, tensor: Tensor) -> EncodedTensor | None:
        if name not in values:
            return None
        return EncodedTensor(GgmlType.F32, lambda: values[name].contiguous().numpy().view(np.uint8))

    export_gguf(load(folder / "base.gguf"), out, "F32", encode)
    return out


def kind_for(family: str) -> str:
    return "Q4_K" if family.endswith("wide") else "Q4_1"


def files() -> Iterator[Any]:
    """Rounding into every family, every method into one or two; the rest is slow."""
    for method in METHODS:
        for family in FAMILIES:
            fast = method == "rtn" or (family == "gemma3" and method in ("gptq", "awq", "omniquant"))
            fast |= family == "llama-wide" and method in ("search", "hqq", "gptq")
            yield pytest.param(method, family, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("method", "family"), files())
def test_the_file_holds_what_the_method_chose(
    method: str, family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every tensor of the file, dequantized by the gguf package, is the method's own or the base's, to the bit."""
    folder = models(family)
    wanted = uniform(folder / "base.gguf", kind_for(family))
    path, values = quantized_and_chosen(folder, method, wanted, tmp_path)
    base = {t.name: t for t in gguf.GGUFReader(folder / "base.gguf").tensors}
    for tensor in gguf.GGUFReader(path).tensors:
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = values[tensor.name].numpy() if tensor.name in values else base[tensor.name].data
        assert np.array_equal(found, expected), tensor.name
    assert {t.name for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors} == base.keys()


def cells() -> Iterator[Any]:
    for method in METHODS:
        for family in FAMILIES:
            fast = (method, family) in (("gptq", "llama-wide"), ("awq", "gemma3"))
            yield pytest.param(method, family, kind_for(family), marks=() if fast else pytest.mark.slow)
    for kind in ("Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ4_XS"):
        yield pytest.param("search", "llama-wide", kind, marks=pytest.mark.slow)


@pytest.mark.parametrize(("method", "family", "kind"), cells())
def test_llama_cpp_computes_with_these_weights(
    method: str, family: str, kind: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """What llama.cpp reads in the file are our weights: dequantized by it they give the same logits as dequantized by
    us. Run as it is the file differs by llama.cpp's rounding of activations to 8 bits, which these random models
    amplify: KL 3e-4 to 1.1e-3, whatever the method."""
    folder = models(family)
    wanted = uniform(folder / "base.gguf", kind)
    path, values = quantized_and_chosen(folder, method, wanted, tmp_path)
    same = llama_logits(written_in_f32(folder, values, tmp_path / "f32.gguf"), TOKENS, tmp_path)
    quantize_gguf(path, tmp_path / "theirs.gguf", "F32", None, 1, None)
    assert agreement(same, llama_logits(tmp_path / "theirs.gguf", TOKENS, tmp_path))[1] < 1e-12
    top1, kl = agreement(same, llama_logits(path, TOKENS, tmp_path))
    assert top1 > 0.88
    assert kl < 2e-3


def folding(layer: Layer, stats: Mapping[str, Stats], formats: Mapping[str, Format]) -> QuantizedLayer:
    """RTN after scaling by random factors whatever can be scaled."""
    folded = layer
    for fold in layer.folds:
        generator = torch.Generator().manual_seed(layer.index)
        factors = torch.exp(torch.randn(n_scales(layer, fold), generator=generator) / 2)
        folded = fold_in(folded, fold, factors)
    rounded = METHODS["rtn"].run(folded, stats, formats)
    return replace(rounded, vectors=changed_vectors(layer, folded))


@pytest.mark.parametrize("family", ["llama-biased", "gemma3"])
def test_folded_scales_leave_the_model_as_it_was(
    family: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, biases and matrices that a method changes together reach the file together. Scaled columns and 8-bit
    activations cost KL 3e-3 and 4e-3 here; matrices scaled without their norms cost a hundred times that."""
    monkeypatch.setitem(METHODS, "folding", MethodEntry(folding, "nothing"))
    folder = models(family)
    expected = llama_logits(folder / "base.gguf", TOKENS, tmp_path)
    path = quantized(folder, "folding", uniform(folder / "base.gguf", "Q8_0"), tmp_path)
    assert agreement(expected, llama_logits(path, TOKENS, tmp_path))[1] < 1e-2
    changed = {t.name: t.data for t in gguf.GGUFReader(path).tensors}["blk.0.attn_norm.weight"]
    original = {t.name: t.data for t in gguf.GGUFReader(folder / "base.gguf").tensors}["blk.0.attn_norm.weight"]
    assert np.abs(changed / original - 1).max() > 0.5
    half = MethodEntry(lambda *args: replace(folding(*args), vectors={}), "nothing")
    monkeypatch.setitem(METHODS, "half", half)
    path = quantized(folder, "half", uniform(folder / "base.gguf", "Q8_0"), tmp_path)
    assert agreement(expected, llama_logits(path, TOKENS, tmp_path))[1] > 0.1


class Killed(KeyboardInterrupt):
    """Ctrl-C, or the power, in the middle of a layer."""


@pytest.mark.parametrize("error", [Killed(), SlimpiError("no more memory")], ids=["killed", "failed"])
def test_a_killed_run_goes_on_where_it_was(
    error: BaseException, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models("llama")
    wanted = uniform(folder / "base.gguf", "Q4_0")
    seen: list[int] = []
    failing = {2}

    def run(layer: Layer, stats: Mapping[str, Stats], formats: Mapping[str, Format]) -> QuantizedLayer:
        seen.append(layer.index)
        if layer.index in failing:
            raise error
        return METHODS["search"].run(layer, stats, formats)

    monkeypatch.setitem(METHODS, "fragile", MethodEntry(run, "means"))
    with pytest.raises(type(error)):
        quantized(folder, "fragile", wanted, tmp_path)
    assert seen == [0, 1, 2]
    assert not (tmp_path / "q.gguf").exists()
    failing.clear()
    path = quantized(folder, "fragile", wanted, tmp_path)
    assert seen == [0, 1, 2, 2, 3]
    (tmp_path / "other").mkdir()
    assert path.read_bytes() == quantized(folder, "search", wanted, tmp_path / "other").read_bytes()


def parts_of(folder: Path, method: str, wanted: Plan, shop: Workshop) -> Parts:
    stats = hessians.load_stats(folder / "stats")
    return quantize_model(load(folder / "base.gguf"), method, wanted, stats, shop, quiet)


def test_parts_are_made_again_only_where_something_changed(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = models("llama")
    wanted = uniform(folder / "base.gguf", "Q4_0")
    shop = workshop(tmp_path)
    first = parts_of(folder, "search", wanted, shop)
    assert parts_of(folder, "search", wanted, shop) == first
    changed = Plan({**wanted.formats, "blk.1.ffn_up.weight": "Q5_0"})
    differs = [a != b for a, b in zip(parts_of(folder, "search", changed, shop).blocks, first.blocks, strict=True)]
    assert differs == [False, True, False, False]
    other_text = parts_of(folder, "search", wanted, workshop(tmp_path, "another text"))
    assert not set(other_text.blocks) & set(first.blocks)
    assert other_text.others == first.others, "embeddings and output have no statistics"
    assert (
        parts_of(folder, "rtn", wanted, workshop(tmp_path, "another text")).blocks
        == parts_of(folder, "rtn", wanted, shop).blocks
    ), "nor has rounding"


def test_a_damaged_part_is_made_again(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = models("llama")
    wanted = uniform(folder / "base.gguf", "Q4_0")
    path = quantized(folder, "search", wanted, tmp_path)
    whole = path.read_bytes()
    part = next((tmp_path / "stages").glob("tiny-search-blk.1-*")) / "part.gguf"
    data = bytearray(part.read_bytes())
    data[-40] ^= 1
    part.write_bytes(data)
    said: list[str] = []
    parts_of(folder, "search", wanted, replace(workshop(tmp_path), say=said.append))
    assert any("Making it again" in line for line in said)
    assert quantized(folder, "search", wanted, tmp_path).read_bytes() == whole


def test_only_one_block_is_in_memory(models: Callable[[str], Path], tmp_path: Path) -> None:
    """What a method saw of a block is gone when it sees the next one."""
    held: list[weakref.ref[torch.Tensor]] = []

    def run(layer: Layer, stats: Mapping[str, Stats], formats: Mapping[str, Format]) -> QuantizedLayer:
        gc.collect()
        assert not [ref for ref in held if ref() is not None]
        held.extend(weakref.ref(w) for w in layer.matrices.values())
        return METHODS["rtn"].run(layer, stats, formats)

    folder = models("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "watched", MethodEntry(run, "nothing"))
        quantized(folder, "watched", uniform(folder / "base.gguf", "Q4_0"), tmp_path)
    assert len(held) == 4 * 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Q99", r"unknown GGUF variant 'Q99'. Known: .*Q4_K_M.*METHOD-PLAN.*RTN.*Q4_0"),
        ("GPTX-Q4_0", r"unknown method 'GPTX' in the variant 'GPTX-Q4_0'. Known: RTN, "),
        ("rtn-Q4_0", r"unknown method 'rtn'.*Known: RTN"),
        ("RTN-Q99", r"unknown plan 'Q99' in the variant 'RTN-Q99'. Known: a type \(Q4_0, .*Q4_K_M"),
        ("RTN-", r"unknown plan ''"),
        ("-Q4_0", r"unknown method ''"),
        ("RTN-IQ2_XS", r"unknown plan 'IQ2_XS'"),
        ("RTN-F16", r"unknown plan 'F16'"),
        ("RTN-MXQ_B4_G64", r"unknown plan 'MXQ_B4_G64'"),
        ("RTN-Q4_K-mix", r"unknown plan 'Q4_K-mix'"),
    ],
)
def test_an_unknown_part_of_a_name_is_told_with_what_is_known(name: str, message: str) -> None:
    with pytest.raises(SlimpiError, match=message):
        parse_variant(name)


def test_names_are_taken_apart() -> None:
    assert parse_variant("Q4_K_M") == VariantSpec("Q4_K_M", "", mix="Q4_K_M")
    assert parse_variant("IQ2_XXS") == VariantSpec("IQ2_XXS", "", mix="IQ2_XXS")
    assert parse_variant("RTN-Q4_K") == VariantSpec("RTN-Q4_K", "rtn", uniform="Q4_K")
    assert parse_variant("SEARCH-Q2_K") == VariantSpec("SEARCH-Q2_K", "search", uniform="Q2_K")
    assert parse_variant("SEARCH-Q2_K-mix") == VariantSpec("SEARCH-Q2_K-mix", "search", mix="Q2_K")
    assert parse_variant("RTN-Q4_K_M") == VariantSpec("RTN-Q4_K_M", "rtn", mix="Q4_K_M")


def planned(base: Path, changes: Mapping[str, str]) -> Plan:
    return Plan({**uniform(base, "Q4_0").formats, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blk.2.ffn_up.weight": "Q4_K"}, r"blk\.2\.ffn_up\.weight has 64 columns, which Q4_K's blocks of 256 do not"),
        ({"blk.2.ffn_up.weight": "IQ3_S"}, r"blk\.2\.ffn_up\.weight is planned as IQ3_S, whose codes only llama"),
        ({"output.weight": "MXQ_B4_G64"}, r"output\.weight is planned as MXQ_B4_G64, which GGUF does not hold"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_any_work(
    changes: dict[str, str], message: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = models("llama")
    with pytest.raises(SlimpiError, match=message):
        quantized(folder, "rtn", planned(folder / "base.gguf", changes), tmp_path)
    assert not (tmp_path / "stages").exists()


def test_missing_statistics_are_told(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = models("llama")
    wanted = uniform(folder / "base.gguf", "Q4_0")
    with pytest.raises(SlimpiError, match=r"search needs calibration, there is none for blk\.0\.attn_k\.weight"):
        quantize_model(load(folder / "base.gguf"), "search", wanted, {}, workshop(tmp_path), quiet)


def test_floats_of_a_plan_are_written_as_such(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = models("llama")
    kept = {"token_embd.weight": "F16", "output.weight": "F32", "blk.3.attn_v.weight": "BF16"}
    kept |= {f"blk.1.{name}.weight": "F16" for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    kept |= {f"blk.1.{name}.weight": "F16" for name in ("ffn_up", "ffn_gate", "ffn_down")}
    wanted = planned(folder / "base.gguf", kept)
    parts = parts_of(folder, "search", wanted, workshop(tmp_path))
    assert len(parts.blocks) == 3
    assert parts.others == []
    path = quantized(folder, "search", wanted, tmp_path)
    assert llama_logits(path, TOKENS, tmp_path).shape == (len(TOKENS), 512)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tensors": {}}, ValueError, "asked were"),
        ({"vectors": {"attn_norm.weight": torch.ones(3)}}, ValueError, "a vector attn_norm.weight"),
        ({"vectors": {"attn_norm.weight": torch.full((64,), torch.nan)}}, ValueError, "not finite"),
        ({"vectors": {"norm": torch.ones(64)}}, ValueError, "not this layer's"),
    ],
)
def test_a_wrong_method_is_a_bug_that_is_named(
    change: dict[str, Any],
    error: type[Exception],
    message: str,
    models: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(layer: Layer, stats: Mapping[str, Stats], formats: Mapping[str, Format]) -> QuantizedLayer:
        return replace(METHODS["rtn"].run(layer, stats, formats), **change)

    monkeypatch.setitem(METHODS, "wrong", MethodEntry(run, "nothing"))
    folder = models("llama")
    with pytest.raises(error, match=message):
        quantized(folder, "wrong", uniform(folder / "base.gguf", "Q4_0"), tmp_path)


def test_weights_beyond_float16_scales_are_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = models("llama")
    checkpoint = load(folder / "base.gguf")
    name = "model.layers.1.mlp.up_proj.weight"
    big = held(name, checkpoint.tensors[name].read() * 1e7)
    changed = replace(checkpoint, tensors={**checkpoint.tensors, name: big})
    wanted = uniform(folder / "base.gguf", "Q4_0")
    with pytest.raises(SlimpiError, match=r"blk\.1\.ffn_up\.weight in Q4_0 by rtn needs scales beyond torch.float16"):
        quantize_model(changed, "rtn", wanted, {}, workshop(tmp_path), quiet)


def tiny_recipe(folder: Path, variants: list[str]) -> Recipe:
    tiny_models.save_tiny("qwen2", folder, torch.bfloat16)
    return Recipe(
        name="tiny",
        source=f"path:{folder}",
        export="gguf",
        variants=variants,
        calibration=Calibration(n_ctx=64, n_chunks=4),
        golden=Golden(n=4, n_tokens=16),
    )


def toy(w: torch.Tensor, stats: Stats | None, kind: Format) -> tuple[QTensor, list[str]]:
    """A method as short as they come."""
    scales = rtn.extremes(w * 0.9, kind)
    return QTensor(kind, rtn.nearest(w, scales, kind), scales), ["made by a toy"]


def test_a_build_with_methods_runs_and_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the recipe to the table, with a method that is one function and one line in METHODS."""
    monkeypatch.setitem(METHODS, "toy", MethodEntry(each(toy), "nothing"))
    places = Places(tmp_path / "home")
    recipe = tiny_recipe(tmp_path / "hf", ["BF16", "TOY-Q4_0", "SEARCH-Q4_K_M", "Q4_K_M"])
    folders = build(recipe, places, Progressor(plain=True))
    _, made, mixed, theirs = [load_artifact(folder) for folder in folders]
    assert made.plan["blk.0.attn_q.weight"] == "Q4_0"
    assert [step.action for step in made.lineage] == ["convert", "quantize"]
    assert made.lineage[-1].settings == {"method": "toy", "plan": "Q4_0", "device": quantize.compute_device().type}
    assert made.notes[-1] == "blk.3.ffn_down.weight: made by a toy"
    assert sum(note.endswith("made by a toy") for note in made.notes) == 4 * 7
    assert made.bits_per_linear_weight == pytest.approx(4.5)
    assert [f.got for f in made.fallbacks] == ["Q8_0"]
    assert mixed.plan == theirs.plan
    assert mixed.fallbacks == theirs.fallbacks
    assert mixed.bits_per_weight == theirs.bits_per_weight
    assert [step.action for step in mixed.lineage] == ["convert", "importance", "quantize"]
    assert not list(places.stages.glob("tiny-stats-*")), "SEARCH reads means, for which no Hessian is summed"
    said = capsys.readouterr().err
    assert said.count("made by a toy") == 3
    assert "and 25 more such notes" in said
    assert not list(places.stages.glob("*-blk.*")), "a finished build keeps no blocks"
    small = {"n_ctx": 64, "n_chunks": 3, "n_prompt": 16, "n_gen": 4, "repetitions": 3}
    reports = [deploy.bench("local", f, places, threads=1, overrides=small) for f in folders[:2]]
    first, second = rows(reports)
    assert not first.failures
    assert not second.failures
    assert second.artifact.variant == "TOY-Q4_0"
    assert second.loss is not None


def test_a_build_that_fails_later_keeps_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden outputs come after hours of work: their failure must not cost these."""
    monkeypatch.setitem(METHODS, "toy", MethodEntry(each(toy), "nothing"))
    recipe = tiny_recipe(tmp_path / "hf", ["BF16", "TOY-Q4_0"])
    places = Places(tmp_path / "home")
    build(recipe, places, Progressor(plain=True), only=["BF16"])

    def fail(*args: Any) -> None:
        raise SlimpiError("the power went out")

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "run_job", fail)
        with pytest.raises(SlimpiError, match="power"):
            build(recipe, places, Progressor(plain=True))
    assert len(list(places.stages.glob("tiny-toy-blk.*"))) == 4
    monkeypatch.setitem(METHODS, "toy", MethodEntry(lambda *args: pytest.fail("made again"), "nothing"))
    build(recipe, places, Progressor(plain=True))


def test_only_takes_variants_the_recipe_does_not_list(tmp_path: Path) -> None:
    recipe = Recipe(name="tiny", source="path:x", export="gguf", variants=["BF16"])
    gguf_exporter = EXPORTERS["gguf"]
    assert build_module.chosen_variants(recipe, gguf_exporter, ["RTN-Q4_0"]) == ["BF16", "RTN-Q4_0"]
    wrong = msgspec.structs.replace(recipe, variants=["BF16", "GPTX-Q4_0"])
    with pytest.raises(SlimpiError, match=r"recipe tiny: unknown method 'GPTX'"):
        build_module.chosen_variants(wrong, gguf_exporter, None)
    assert knows(recipe, "RTN-Q4_K_M")
    assert not knows(recipe, "INT8-dynamic")


def test_the_time_left_is_told() -> None:
    assert progress.remaining(10.0, 0, 5) == ""
    assert progress.remaining(10.0, 5, 0) == ""
    assert progress.remaining(10.0, 2, 4) == ", about 20 s left"
    assert progress.remaining(60.0, 1, 10) == ", about 10 min left"

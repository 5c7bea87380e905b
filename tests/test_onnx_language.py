"""Language models in ONNX: the exported graph is the model, blocks are what their codes mean, tasks run on them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from tiny_models import TINY, save_tiny

from device import onnx_language
from device.onnx_language import Habits, OnnxLanguageModel
from device.records import SlimpiError
from device.runtimes import Logits, Tokens
from device.schema import Artifact, Job
from pipeline import checkpoint, hessians, quantize
from pipeline.architectures import gguf_names, norm_offset, row_order
from pipeline.build import build
from pipeline.calibration_stages import stats_of_importance
from pipeline.deploy import run_job
from pipeline.export import onnx_language as export
from pipeline.export.onnx import MAX_PROTOBUF_BYTES
from pipeline.export.onnx_rewrite import quantize_u8
from pipeline.exporter_onnx_lm import OUTPUT_FORMAT, parse
from pipeline.fit import footprints
from pipeline.formats import FORMATS
from pipeline.jobs import bench_settings, tasks_for
from pipeline.methods import METHODS, rtn
from pipeline.progress import Progressor
from pipeline.recipes import Calibration, Golden, Recipe
from pipeline.store import Places, load_artifact
from pipeline.torch_model import in_transformers

TOKENS = np.random.default_rng(0).integers(3, 512, 150, dtype=np.int32)
KINDS = ("INT4_G32", "INT4_G16_ZP", "INT8_G32_ZP")
QUICK = {"rtn", "search", "hqq", "gptq"}


def logits_of(folder: Path, tokens: Tokens = TOKENS, first: int = 0) -> Logits:
    with OnnxLanguageModel(folder / "model.onnx", 1) as model:
        model.open_context(len(tokens))
        return np.concatenate([rows.copy() for _, rows in model.logits(tokens, first)])


def in_torch(model: torch.nn.Module, tokens: Tokens = TOKENS) -> Logits:
    with torch.inference_mode():
        found: Logits = model(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()
    return found


def worst_kl(expected: Logits, found: Logits) -> float:
    p, log_q = (torch.from_numpy(x).double().log_softmax(1) for x in (expected, found))
    return float((p.exp() * (p - log_q)).sum(1).max())


@pytest.fixture(scope="module", params=list(TINY))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Logits]:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, folder / "hf", torch.bfloat16)
    model = checkpoint.load(folder / "hf")
    export.export_language(model, folder)
    return folder, in_torch(in_transformers(model))


def test_logits_are_the_models(exported: tuple[Path, Logits], monkeypatch: pytest.MonkeyPatch) -> None:
    """At once; in pieces through the cache, longer than a sliding window; and from a position on."""
    folder, expected = exported
    assert worst_kl(expected, logits_of(folder)) < 1e-8
    monkeypatch.setattr(onnx_language, "N_UBATCH", 37)
    assert worst_kl(expected, logits_of(folder)) < 1e-8
    part = logits_of(folder, first=75)
    assert part.shape == expected[75:].shape
    assert worst_kl(expected[75:], part) < 1e-8


def test_one_token_after_the_other_is_the_same(exported: tuple[Path, Logits]) -> None:
    folder, expected = exported
    with OnnxLanguageModel(folder / "model.onnx", 1) as model:
        model.open_context(20)
        for at in range(20):
            model.run([onnx_language.Batch(TOKENS[at : at + 1], 0)])
            assert model.next_token() == expected[at].argmax()
        with pytest.raises(SlimpiError, match="21 tokens exceed the context of 20"):
            model.run([onnx_language.Batch(TOKENS[:1], 0)])
        model.reset()
        model.run([onnx_language.Batch(TOKENS[:5], 4)])
        assert model.next_token() == expected[4].argmax()


def test_random_batches_hold_bos_first_and_every_token(exported: tuple[Path, Logits]) -> None:
    with OnnxLanguageModel(exported[0] / "model.onnx", 1) as model:
        batches = model.random_batches(10, 4, seed=0)
        assert [len(batch.tokens) for batch in batches] == [4, 4, 2]
        assert [batch.first for batch in batches] == [3, 3, 1]
        assert not model.add_bos or batches[0].tokens[0] == model.bos


# Methods and types.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def recipe(home: Path, arch: str, variants: list[str], kind: str = "onnx-lm") -> Recipe:
    source = home / arch
    if not source.exists():
        save_tiny(arch, source, torch.bfloat16)
    return Recipe(
        name=f"tiny-{arch}-{kind}",
        source=f"path:{source}",
        export=kind,  # type: ignore[arg-type]
        variants=variants,
        calibration=Calibration(n_ctx=64, n_chunks=4),
        golden=Golden(n=4, n_tokens=16),
    )


def built(home: Path, arch: str, variants: list[str], kind: str = "onnx-lm") -> tuple[Path, Artifact]:
    folder = build(recipe(home, arch, variants, kind), Places(home), Progressor(plain=True))[-1]
    return folder, load_artifact(folder)


def twin(home: Path, arch: str, method: str, kind: str) -> Logits:
    """The model in transformers with every weight replaced by what its codes mean, one matrix at a time."""
    source = checkpoint.load(home / arch)
    model = in_transformers(source)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    config, n_layers = source.config, source.config["num_hidden_layers"]
    names = {of: name for name, of in gguf_names(source.architecture, list(source.tensors), n_layers).items()}
    stats = {}
    if METHODS[method].needs == "hessian":
        (folder,) = Places(home).stages.glob(f"tiny-{arch}-onnx-lm-stats-*")
        stats = hessians.load_stats(folder)
    elif METHODS[method].needs == "means":
        (folder,) = Places(home).stages.glob(f"tiny-{arch}-onnx-lm-importance-*")
        stats = stats_of_importance(folder / "importance.npz")
    formats = {n: FORMATS[kind] for n in names if n.startswith("blk.") and parameters[names[n]].ndim == 2}
    codes, vectors, _ = quantize.quantize_in_memory(source, method, formats, stats, lambda *told: None)
    for name, q in codes.items():
        order, made = row_order(source.architecture, config, names[name]), q.dequantize()
        for row in range(len(made)):
            parameters[names[name]][row if order is None else order[row]] = made[row]
    for name, (before, after) in vectors.items():
        offset = norm_offset(source.architecture, names[name])
        assert torch.allclose(parameters[names[name]] + offset, before)
        parameters[names[name]].copy_(after - offset)
    table = source.tensors[export.EMBEDDINGS].read().float()
    head = (source.tensors[export.OUTPUT].read() if export.OUTPUT in source.tensors else table).float()
    model.lm_head.weight = torch.nn.Parameter(rtn.quantize(head, None, FORMATS[OUTPUT_FORMAT])[0].dequantize(), False)
    rows, scale, zero = quantize_u8(table.numpy(), 0)
    model.get_input_embeddings().weight = torch.nn.Parameter(
        torch.from_numpy((rows.astype(np.float32) - zero) * scale), False
    )
    return in_torch(model)


@pytest.mark.parametrize(
    ("arch", "method", "kind"),
    [
        *(
            # Some methods are slow here, and where their codes go is the same.
            pytest.param("llama", method, KINDS[i % len(KINDS)], marks=[pytest.mark.slow] * (method not in QUICK))
            for i, method in enumerate(METHODS)
        ),
        *(("qwen2-yarn", "rtn", kind) for kind in KINDS),
        pytest.param("gemma3", "awq", "INT4_G16_ZP", marks=pytest.mark.slow),
        ("gemma2", "rtn", "INT8_G16"),
    ],
)
def test_blocks_compute_what_their_codes_mean(home: Path, arch: str, method: str, kind: str) -> None:
    folder, artifact = built(home, arch, ["FP32", f"{method.upper()}-{kind}"])
    assert worst_kl(twin(home, arch, method, kind), logits_of(folder)) < 1e-6
    assert {artifact.plan[n] for n in artifact.plan if n.endswith("proj.weight")} == {kind.removesuffix("_ZP")}
    assert artifact.plan[export.OUTPUT] == OUTPUT_FORMAT
    assert artifact.plan[export.EMBEDDINGS] == "U8"
    assert artifact.bits_per_linear_weight == pytest.approx(FORMATS[kind].bits_per_weight, abs=0.3)
    whole = load_artifact(build(recipe(home, arch, ["FP32"]), Places(home), Progressor(plain=True))[0])
    assert artifact.size_bytes < 0.65 * whole.size_bytes
    assert artifact.tokenizer_sha256 == whole.tokenizer_sha256


def test_rows_that_no_block_divides_stay_and_are_told(home: Path) -> None:
    _, artifact = built(home, "llama", ["FP32", "RTN-INT4_G64"])
    fallen = {f.tensor for f in artifact.fallbacks}
    assert fallen == {name for name in artifact.plan if name.endswith("down_proj.weight")}
    assert {artifact.plan[name] for name in fallen} == {"FP32"}


def test_the_agents_tasks_run_and_agree_with_llama_cpp(home: Path) -> None:
    """Perplexity, parity and the divergence to a GGUF reference: what a device would report."""
    results = {}
    for kind, variants in (("onnx-lm", ["FP32"]), ("gguf", ["F32"]), ("onnx-lm", ["FP32", "SEARCH-INT4_G16_ZP"])):
        folder, artifact = built(home, "llama", variants, kind)
        changes = {"n_ctx": 64, "n_chunks": 3, "n_prompt": 16, "n_gen": 4, "repetitions": 2}
        tasks = tasks_for(artifact, bench_settings(artifact, changes), Places(home))
        assert all(f.total_bytes > artifact.size_bytes for f in footprints(artifact, folder, tasks))
        job = Job(
            id=f"job-{len(results)}",
            artifact=artifact,
            artifact_dir=str(folder),
            data_dir=str(Places(home).datasets),
            work_dir=str(home / f"work-{len(results)}"),
            tasks=tasks,
            threads=1,
            provenance="host",
        )
        report = run_job("local", job)
        assert [r.status for r in report.results] == ["ok"] * 3, [r.error for r in report.results]
        results[artifact.variant] = {m.metric: m for r in report.results for m in r.measurements}
    assert results["FP32"]["nll"].samples == pytest.approx(results["F32"]["nll"].samples, abs=1e-3), (
        "llama.cpp keeps its cache in F16"
    )
    assert results["FP32"]["nll"].samples != pytest.approx(results["SEARCH-INT4_G16_ZP"]["nll"].samples, abs=1e-3)
    for found in results.values():
        assert found["kl_divergence"].mean < 1e-9
        assert min(found["decode_tokens_per_s"].samples) > 0
        assert len(found["ttft_ms"].samples) == 2
    assert results["FP32"]["prefill_tokens_per_s"].conditions["runtime"] == "onnxruntime"


# What is wrong is told.


@pytest.mark.parametrize("variant", ["Q4_K_M", "RTN-Q4_0", "rtn-INT4_G32", "TOY-INT4_G32", "RTN-MXQ_B4_G32", ""])
def test_unknown_variants_are_refused(variant: str) -> None:
    with pytest.raises(SlimpiError, match="unknown ONNX variant"):
        parse(variant)


def test_a_model_too_large_for_the_format_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe(home, "llama", ["FP32"])
    monkeypatch.setattr(export, "MAX_PROTOBUF_BYTES", 1000)
    with pytest.raises(SlimpiError, match="less than 2 GiB"):
        export.export_language(checkpoint.load(home / "llama"), home / "none")
    assert MAX_PROTOBUF_BYTES < 2**31
    assert not (home / "none").exists()


def test_a_graph_of_another_kind_is_refused(home: Path, tmp_path: Path) -> None:
    folder, _ = built(home, "llama", ["FP32"])
    model = onnx.load(folder / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(SlimpiError, match=r"no language model of slimpi's"):
        OnnxLanguageModel(tmp_path / "model.onnx", 1)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(SlimpiError, match="cannot load"):
        OnnxLanguageModel(tmp_path / "model.onnx", 1)


def test_special_tokens_in_a_text_are_text(home: Path) -> None:
    folder, _ = built(home, "llama", ["FP32"])
    with OnnxLanguageModel(folder / "model.onnx", 1) as model:
        text = "a <|endoftext|> of " + checkpoint.load(home / "llama").vocab.special("eos")
        ids = model.tokenize(text.encode())
        assert 1 not in ids
        assert len(ids) > 5


def test_habits_are_read_as_they_were_written(home: Path) -> None:
    recipe(home, "gemma3", ["FP32"])
    source = checkpoint.load(home / "gemma3")
    read = msgspec.convert(export.habits(source), Habits)
    assert read.n_vocab == 512
    assert read.cache == (2, 32)
    assert read.add_bos

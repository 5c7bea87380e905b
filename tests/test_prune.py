"""Pruning: what is measured is what is left, every result runs in llama.cpp, repair mends, wrong requests are told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import msgspec
import numpy as np
import pytest
import reference_prune
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp_side import llama_logits
from test_convert import agreement
from tiny_models import PROSE, save_tiny

from device.records import SlimpiError
from pipeline import sensitivity, sources
from pipeline.build import build
from pipeline.checkpoint import Checkpoint, load
from pipeline.export.gguf import export_gguf
from pipeline.exporter import Context
from pipeline.exporter_gguf import lossless
from pipeline.progress import Progressor, quiet
from pipeline.prune import (
    PRUNERS,
    PruneSpec,
    Subject,
    allocate,
    choose,
    depth,
    distill,
    moments,
    parse_prune,
    prune,
    repair,
    sparse,
    spill,
)
from pipeline.prune.allocate import interpolated
from pipeline.prune.choice import load_pruned, save_pruned
from pipeline.prune.cut import Cut, LayerCut, apply, describe, dims_of
from pipeline.prune.repair import downhill, first_to_fit, least_squares, ridge
from pipeline.prune.scores import SCORES
from pipeline.prune.stream import Judge, Stream
from pipeline.prune.surgery import operate
from pipeline.prune.widths import Pruned, uniform_widths
from pipeline.pruning import apart, chosen
from pipeline.recipes import Calibration, Golden, Prune, Recipe
from pipeline.sensitivity import cut as cut_text
from pipeline.store import Places, load_artifact
from pipeline.torch_model import in_transformers
from pipeline.variants import parse_variant

FAMILIES = ("llama", "llama-biased", "qwen2", "gemma2", "gemma3")
EVEN = ("layers", "width_wanda")
"""Pruners whose results every family takes."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / name
            save_tiny(name, folder)
            made[name] = load(folder)
        return made[name]

    return get


@pytest.fixture(scope="module")
def subjects(models: Callable[[str], Checkpoint]) -> Callable[[str], Subject]:
    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in made:
            chunks = cut_text(models(name), PROSE, 64, 12)
            made[name] = Subject(models(name), chunks[:4], chunks, CPU)
        return made[name]

    return get


def log_p(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(in_transformers(checkpoint)(tokens, use_cache=False).logits.float(), -1)


def divergence(whole: Checkpoint, other: Checkpoint, tokens: torch.Tensor) -> float:
    p, q = log_p(whole, tokens).double(), log_p(other, tokens).double()
    return float((p.exp() * (p - q)).sum(-1).mean())


def random_cut(checkpoint: Checkpoint, seed: int, even: bool) -> Cut:
    rng, dims = np.random.default_rng(seed), dims_of(checkpoint)
    n_groups, n_channels = int(rng.integers(1, dims.groups + 1)), int(rng.integers(1, dims.channels // 32 + 1)) * 32
    layers = []
    for _ in range(dims.n_layers):
        if not even:
            n_groups = int(rng.integers(0, dims.groups + 1))
            n_channels = int(rng.integers(0, dims.channels // 32 + 1)) * 32
        groups = sorted(rng.choice(dims.groups, n_groups, replace=False).tolist())
        layers.append(
            LayerCut(tuple(groups), tuple(sorted(rng.choice(dims.channels, n_channels, replace=False).tolist())))
        )
    layers[int(rng.integers(1, dims.n_layers))] = LayerCut((), ())
    return Cut(tuple(layers))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stream_is_the_model(name: str, subjects: Callable[[str], Subject]) -> None:
    subject = subjects(name)
    got = torch.cat(list(subject.judge.stream.log_p(subject.judge.whole[-1])))
    expected = log_p(subject.checkpoint, subject.measured)
    torch.testing.assert_close(got.reshape(expected.shape), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "even"),
    [*((name, True) for name in FAMILIES), *((name, False) for name in FAMILIES if not name.startswith("gemma"))],
)
def test_what_a_judge_measures_is_what_is_left(name: str, even: bool, subjects: Callable[[str], Subject]) -> None:
    """Masks in the whole model against the checkpoint without the parts; one layer gone, the others even or not
    (Gemma has no form for that: see test_uneven_gemma_is_refused)."""
    subject = subjects(name)
    for seed in range(3):
        cut = random_cut(subject.checkpoint, seed, even)
        expected = divergence(subject.checkpoint, apply(subject.checkpoint, cut), subject.measured)
        assert subject.judge.divergence(cut) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def in_llama_cpp(pruned: Checkpoint, folder: Path) -> tuple[float, float]:
    """(top-1 agreement, KL) of llama.cpp's logits with torch's."""
    tokens = np.arange(3, 99) * 5 % 500
    export_gguf(pruned, folder / "pruned.gguf", "F32")
    with torch.no_grad():
        expected = in_transformers(pruned)(torch.from_numpy(tokens)[None], use_cache=False).logits[0].float().numpy()
    return agreement(expected, llama_logits(folder / "pruned.gguf", tokens, folder))


def cells() -> list[Any]:
    """Every pruner on Llama, and those of all families on them; the scores differ in nothing but the order of units."""
    found = []
    for pruner in (name for name in PRUNERS if not name.startswith("sparse")):
        plain = pruner.partition("_")[2] in (*SCORES, "influence", "run") and pruner not in EVEN
        families = {"layers": FAMILIES, "width_wanda": FAMILIES, "hidden": FAMILIES}
        for name in families.get(pruner, ("llama", "qwen2")):
            slow = plain or name == "llama-biased"
            found.append(pytest.param(pruner, name, marks=[pytest.mark.slow] if slow else []))
    return found


@pytest.mark.parametrize(("pruner", "name"), cells())
def test_every_pruner_removes_what_is_asked_and_runs_in_llama_cpp(
    pruner: str, name: str, subjects: Callable[[str], Subject], tmp_path: Path
) -> None:
    subject = subjects(name)
    share = {"hidden": 50, "blocks": 30}.get(pruner, 40)  # 30 %: one of four layers, and a part
    pruned, facts = prune(subject, PruneSpec(pruner, "", share))
    dims = dims_of(subject.checkpoint)
    step = max(dims.layer_weights(dims.whole.layers[0]) / 2, 32 * dims.channel_weights * dims.n_layers)
    assert abs(facts["share_removed"] - share / 100) <= step / dims.weights(dims.whole)
    assert len(facts["kv_groups"]) == len(facts["channels"]) == dims.n_layers
    top, kl = in_llama_cpp(pruned, tmp_path)
    assert top >= 0.98
    assert kl < 1e-5


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_blocks_are_no_worse_than_whole_layers_where_they_are_measured(
    share: float, subjects: Callable[[str], Subject]
) -> None:
    """The finer choice of the same weights: one part after the other alone ends worse than whole layers here."""
    judge = subjects("llama").judge
    whole, parts = depth.layers(judge, share), depth.blocks(judge, share)
    dims = judge.stream.dims
    assert dims.share_removed(parts) >= share - 1e-9
    assert judge.divergence(parts) <= judge.divergence(whole) + 1e-9


@pytest.mark.parametrize(
    ("pruner", "name"),
    [
        *(
            (pruner, name)
            for pruner in ("layers", "layers_run", "blocks", "width_wanda")
            for name in ("llama", "qwen2")
        ),
        ("hidden", "llama"),
    ],
)
def test_repair_mends_what_it_was_not_fit_on(name: str, pruner: str, subjects: Callable[[str], Subject]) -> None:
    """On tokens that neither the cut nor the fit has seen; random models have no structure, so it is not much."""
    subject = subjects(name)
    spec = PruneSpec(pruner, "", 50)
    unseen = cut_text(subject.checkpoint, PROSE, 64, 20)[12:]
    plain = divergence(subject.checkpoint, prune(subject, spec)[0], unseen)
    repaired = divergence(subject.checkpoint, prune(subject, replace(spec, repair="repair"))[0], unseen)
    assert repaired < plain


def test_moments_are_means_over_all_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed by blocks of rows of the lower triangle, over inputs that come in pieces."""
    monkeypatch.setattr(moments, "GRAM_ROWS", 8)
    x = torch.randn(6, 5, 21, generator=torch.Generator().manual_seed(2)) + 0.5
    sums = moments.Sums()
    for part in x.split(4):
        sums.add(part)
    found, flat = sums.moments(), x.reshape(-1, 21).double().numpy()
    np.testing.assert_allclose(found.hessian, flat.T @ flat / 30, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.mean, flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.mean_abs, np.abs(flat).mean(0), rtol=1e-5)


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize(("tokens", "columns"), [(400, 12), (64, 80), (64, 64)])
def test_ridge_is_the_stacked_least_squares_problem(
    tokens: int, columns: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more and with fewer tokens than columns, by blocks of rows, and with penalties judged in a sketch."""
    monkeypatch.setattr(moments, "GRAM_ROWS", 24)
    monkeypatch.setattr(repair, "_SKETCH", 8)
    generator = torch.Generator().manual_seed(0)
    x, truth = torch.randn(tokens, columns, generator=generator), torch.randn(rows, columns, generator=generator)
    x, noise = x * torch.linspace(0.1, 3, columns), torch.randn(tokens, rows, generator=generator)
    wanted, old = x @ truth.T + 0.01 * noise, truth + 0.3 * torch.randn(rows, columns, generator=generator)
    change = ridge(x, wanted - x @ old.T)
    assert change is not None
    diagonal = float((x.T @ x).diagonal().mean())
    twins = [reference_prune.ridge(x.numpy(), wanted.numpy(), old.numpy(), p * diagonal) for p in repair._PENALTIES]
    assert min(np.abs((old + change).numpy() - twin).max() for twin in twins) < 1e-3
    assert change.shape == old.shape
    assert (wanted - x @ (old + change).T).norm() < 0.2 * (wanted - x @ old.T).norm()


def test_the_penalty_is_the_one_that_all_outputs_want() -> None:
    """A sketch of 256 sums of 600 outputs judges as the outputs do."""
    generator = torch.Generator().manual_seed(4)
    for tokens, columns in ((600, 60), (400, 500)):
        x = torch.randn(tokens, columns, generator=generator) * torch.linspace(0.05, 2, columns)
        residual = 0.2 * x @ torch.randn(columns, 600, generator=generator) + torch.randn(
            tokens, 600, generator=generator
        )
        split = tokens - tokens // 8
        losses = []
        for penalty in repair._PENALTIES:
            scaled = penalty * float((x[:split] ** 2).sum()) / columns
            found = torch.linalg.solve(
                x[:split].T @ x[:split] + scaled * torch.eye(columns), x[:split].T @ residual[:split]
            )
            losses.append(float((residual[split:] - x[split:] @ found).square().sum()))
        best = repair._PENALTIES[int(np.argmin(losses))] * float((x**2).sum()) / columns
        change = ridge(x, residual)
        assert change is not None
        wanted = torch.linalg.solve(x.T @ x + best * torch.eye(columns), x.T @ residual).T
        assert (change - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("count", [1, 2, 6])
def test_downhill_finds_the_least_of_what_falls_and_rises(count: int) -> None:
    for least in range(count):
        losses = [abs(place - least) + 1.0 for place in range(count)]
        asked: list[int] = []

        def loss(place: int, losses: list[float] = losses, asked: list[int] = asked) -> float:
            asked.append(place)
            return losses[place]

        assert downhill(loss, count) == (least, 1.0)
        assert len(asked) == len(set(asked))
    assert downhill(lambda place: float("nan"), 6)[0] == 3


@pytest.mark.parametrize("fails", [False, True])
def test_a_solve_reads_the_lower_triangle(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the factorization and, where rounding made the matrix indefinite, without it."""
    if fails:
        monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda gram: (gram, torch.tensor(1)))
    x, known = torch.randn(30, 20, generator=torch.Generator().manual_seed(5)), torch.ones(20, 3)
    wanted = np.linalg.solve((x.T @ x).numpy() + 0.1 * float((x**2).sum()) / 20 * np.eye(20), known.numpy())
    found = repair._solve((x.T @ x).tril(), known, 0.1, 20)
    assert np.abs(found.numpy() - wanted).max() < 1e-5


@pytest.mark.parametrize("columns", [480, 800])
def test_ridge_leaves_alone_what_it_cannot_better(columns: int) -> None:
    """Where noise is all there is to fit, with more and with fewer tokens than columns."""
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(640, columns, generator=generator), torch.randn(640, 40, generator=generator)
    assert ridge(x, noise) is None
    assert ridge(x, noise + x[:, :40]) is not None


@pytest.mark.parametrize("width", [1, 3])
def test_surgery_is_greedy_and_exact(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    columns = 12 * width
    weight = torch.randn(7, columns, generator=generator)
    x = torch.randn(300, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    hessian = x.T @ x / 300
    damped = hessian.double().clone()
    damped.diagonal().add_(0.01 * hessian.diagonal().mean().double())
    found = operate(weight, hessian, width, range(13))
    assert list(found.order) == reference_prune.greedy_order(weight.numpy(), damped.numpy(), width)
    for count in (3, 7, 11):
        kept = [unit * width + k for unit in found.kept(count) for k in range(width)]
        best, loss = reference_prune.best_columns(weight.double().numpy(), damped.numpy(), kept)
        np.testing.assert_allclose(found.matrices[count][:, kept].numpy(), best, rtol=1e-3, atol=1e-4)
        assert found.losses[count] == pytest.approx(loss, rel=1e-6)
        error = (weight - found.matrices[count]).double().numpy()
        expected = ((error @ hessian.double().numpy()) * error).sum(1)
        np.testing.assert_allclose(found.row_losses[count], expected, rtol=1e-4)
    assert not found.matrices[0].any()
    assert torch.equal(found.matrices[12], weight)


def test_surgery_of_a_hessian_that_rounding_made_indefinite() -> None:
    """Sums in float32 of a few huge inputs: damping is not enough for a Cholesky factor, and order needs none."""
    hessian = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, -0.2]))
    found = operate(torch.ones(3, 5), hessian, 1, (0, 2, 5))
    assert sorted(found.order) == list(range(5))
    assert all(torch.isfinite(matrix).all() for matrix in found.matrices.values())


def test_influence_is_the_mean_cosine(subjects: Callable[[str], Subject]) -> None:
    judge = subjects("llama").judge
    flat = [state.reshape(-1, state.shape[-1]).double().numpy() for state in judge.whole]
    scores = [reference_prune.block_influence(a, b) for a, b in pairwise(flat)]
    cut = depth.influence(judge, 0.5)
    assert [layer.gone for layer in cut.layers] == [score in sorted(scores)[:2] for score in scores]


def test_measured_layers_are_the_best_pair_or_nearly(subjects: Callable[[str], Subject]) -> None:
    judge = subjects("llama").judge
    dims = judge.stream.dims
    pairs = {(a, b): judge.divergence(depth.without(dims, (a, b))) for a in range(4) for b in range(a + 1, 4)}
    runs = {pair: loss for pair, loss in pairs.items() if pair[1] == pair[0] + 1}
    assert judge.divergence(depth.layers(judge, 0.5)) == pytest.approx(min(pairs.values()), rel=0.05)
    assert judge.divergence(depth.contiguous(judge, 0.5)) == pytest.approx(min(runs.values()), rel=1e-6)


class WholeJudge(Judge):
    """Computes every layer for every cut, and holds what was computed from kept states to that."""

    def divergence(self, cut: Cut, states: Sequence[torch.Tensor] | None = None, start: int = 0) -> float:
        whole = super().divergence(cut)
        assert super().divergence(cut, states, start) == whole
        return whole


@pytest.mark.parametrize("part", ["", "mlp"])
def test_exchanges_are_those_of_whole_measurements(part: str, subjects: Callable[[str], Subject]) -> None:
    judge = subjects("llama").judge
    dims = judge.stream.dims
    units = [depth.Unit(index, part) for index in range(dims.n_layers)]
    gains = []
    for start in (*permutations(units, 1), *permutations(units, 2)):
        found = depth.exchanged(judge, units, list(start), quiet)
        assert found == depth.exchanged(WholeJudge(judge.stream), units, list(start), quiet)
        gains.append(judge.divergence(depth.dropped(dims, start)) - judge.divergence(depth.dropped(dims, found)))
    assert min(gains) >= 0
    assert max(gains) > 0


def test_divergence_between_measured_widths_follows_the_loss() -> None:
    """A power of the loss is found again, beyond the known ones a multiple; what is known stays; all kept is free."""
    losses = {0: 16.0, 1: 8.0, 2: 4.0, 3: 2.0, 4: 1.0, 5: 0.0}
    known = {0: 256.0, 2: 16.0, 4: 1.0}
    found = interpolated(known, losses)
    assert found == pytest.approx({0: 256.0, 1: 64.0, 2: 16.0, 3: 4.0, 4: 1.0, 5: 0.0})
    assert interpolated({0: 4.0, 2: 1.0}, {0: 4.0, 1: 2.0, 2: 1.0, 3: 0.5, 4: 0.0})[3] == pytest.approx(0.5)


@pytest.mark.parametrize("pruner", ["widths", "widths_fisher"])
def test_uneven_by_what_the_output_feels_beats_even(pruner: str, subjects: Callable[[str], Subject]) -> None:
    """The same surgery, the same share: what differs is where the width goes."""
    subject = subjects("qwen2")
    even, facts = prune(subject, PruneSpec("width", "", 28))
    uneven, more = prune(subject, PruneSpec(pruner, "", 100 * facts["share_removed"]))
    assert more["share_removed"] >= facts["share_removed"] - 1e-4
    assert divergence(subject.checkpoint, uneven, subject.measured) < divergence(
        subject.checkpoint, even, subject.measured
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), even=st.booleans())
def test_weights_are_counted_as_they_are(seed: int, even: bool, models: Callable[[str], Checkpoint]) -> None:
    """Whatever is cut, the matrices that are left hold as many weights as Dims says; stand-ins apart."""
    checkpoint = models("llama-tied")
    dims, cut = dims_of(checkpoint), random_cut(checkpoint, seed, even)
    whole = all(layer.gone or (layer.groups and layer.channels) for layer in cut.layers)
    if not whole or not cut.layers[0].groups:
        return  # llama.cpp needs stand-ins there
    pruned = apply(checkpoint, cut)
    left = sum(
        int(np.prod(t.shape)) for n, t in pruned.tensors.items() if n.startswith("model.layers.") and len(t.shape) == 2
    )
    assert left == dims.weights(cut)
    assert describe(cut, dims)["share_removed"] == pytest.approx(1 - left / dims.weights(dims.whole), abs=1e-4)


@pytest.mark.parametrize(
    ("method", "percent", "said"),
    [
        ("LAYERS", "0", "above 0, below 100"),
        ("LAYERS", "100", "above 0, below 100"),
        ("LAYERS", "-5", "above 0, below 100"),
        ("LAYERS", "nan", "above 0, below 100"),
        ("LAYERS", "many", "above 0, below 100"),
        ("LAYER", "25", "unknown pruner 'LAYER'. Known: LAYERS_INFLUENCE,"),
        ("LAYERS+MEND", "25", "unknown repair 'MEND' after LAYERS. Known: BIAS, REPAIR, PATCH, DISTILL"),
        ("LAYERS+", "25", "unknown repair ''"),
    ],
)
def test_wrong_requests_are_told(method: str, percent: str, said: str) -> None:
    with pytest.raises(SlimpiError, match=said.replace("(", r"\(")):
        parse_prune(method, percent)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("LAYERS-25", "not in which type"),
        ("LAYERS-25-", "not in which type"),
        ("LAYERS-25-LAYERS-25-Q4_0", "prunes twice"),
        ("LAYERS-25-Q4_9", "unknown GGUF variant 'Q4_9'"),
        ("LAYERZ-25-Q4_0", "pruners, before them: LAYERS_INFLUENCE"),
        ("LAYERS-AUTO-Q4_0", "needs a budget"),
        ("LAYERS-AUTO-GPTQ-4.5bpw", "needs a budget"),
    ],
)
def test_wrong_variants_are_told(name: str, said: str) -> None:
    with pytest.raises(SlimpiError, match=said):
        parse_variant(name)


def test_a_pruned_variant_is_the_plain_one_and_how_it_is_pruned() -> None:
    found = parse_variant("WIDTHS+REPAIR-12.5-GPTQ-Q4_K_M")
    assert found.prune == PruneSpec("widths", "repair", 12.5)
    assert found.prune.name == "WIDTHS+REPAIR-12.5"
    assert replace(found, prune=None) == parse_variant("GPTQ-Q4_K_M")


def test_uneven_gemma_is_refused(subjects: Callable[[str], Subject]) -> None:
    for pruner, percent in (("blocks", 12), ("widths_wanda", 40)):  # 12 %: less than a layer
        with pytest.raises(SlimpiError, match=r"gemma2 with uneven layers does not run: llama\.cpp's deci"):
            prune(subjects("gemma2"), PruneSpec(pruner, "", percent))


def test_repair_of_gemma_is_refused(subjects: Callable[[str], Subject]) -> None:
    with pytest.raises(SlimpiError, match="normalizes what a part adds"):
        prune(subjects("gemma3"), PruneSpec("layers", "repair", 40))


def test_shares_that_round_to_nothing_are_refused(subjects: Callable[[str], Subject]) -> None:
    subject = subjects("llama")
    for pruner, said in (("layers", "from 25% on"), ("width", "no width is 1% less"), ("hidden", "none or all")):
        with pytest.raises(SlimpiError, match=said):
            prune(subject, PruneSpec(pruner, "", 1))
    with pytest.raises(SlimpiError, match="one must stay"):
        prune(subject, PruneSpec("layers", "", 99))


def test_models_that_cannot_be_cut_are_refused(models: Callable[[str], Checkpoint]) -> None:
    checkpoint = models("llama")
    with pytest.raises(SlimpiError, match="has 4 heads, which its 3 key-value groups do not divide"):
        dims_of(replace(checkpoint, config={**checkpoint.config, "num_key_value_heads": 3}))
    gone = Cut((LayerCut((), ()),) * 4)
    with pytest.raises(SlimpiError, match="nothing is left of the model"):
        apply(checkpoint, gone)
    uneven = apply(checkpoint, random_cut(checkpoint, 5, even=False))
    with pytest.raises(SlimpiError, match="uneven layers already"):
        dims_of(uneven)


def test_widths_stay_multiples_of_blocks(models: Callable[[str], Checkpoint]) -> None:
    dims = dims_of(models("llama"))
    assert all(channels % 32 == 0 for _, channels in uniform_widths(dims, 0.3))
    assert replace(dims, channels=1536).multiple == 256
    assert replace(dims, channels=160).multiple == 32


def tiny_recipe(folder: Path, variants: list[str]) -> Recipe:
    return Recipe(
        name="tiny",
        source=f"path:{folder}",
        export="gguf",
        variants=variants,
        calibration=Calibration(n_ctx=64, n_chunks=4),
        prune=Prune(measured=2, fitted=8),
        golden=Golden(n=4, n_tokens=16),
    )


def test_what_is_put_aside_is_what_was(
    subjects: Callable[[str], Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments and surgeries in files give the same cut and weights, and the files are gone by name."""
    held = subjects("llama")
    expected = PRUNERS["widths_fisher"](held, 0.3)
    aside = Subject(held.checkpoint, held.measured, held.fitted, CPU, scratch=tmp_path)
    monkeypatch.setattr(spill, "SMALL_BYTES", 0)
    files: list[Path] = []

    def opened(**options: Any) -> Any:
        files.append(options["dir"])
        return TemporaryFile(**options)

    monkeypatch.setattr(spill.tempfile, "TemporaryFile", opened)
    found = PRUNERS["widths_fisher"](aside, 0.3)
    assert len(files) > 2 * len(held.evidence.moments)  # these, and the matrices of the surgeries
    assert set(files) == {tmp_path}
    assert "judge" not in vars(aside)  # a second model in memory
    assert found.cut == expected.cut
    assert found.new.keys() == expected.new.keys()
    for name, value in expected.new.items():
        assert torch.equal(found.new[name], value), name
    assert not list(tmp_path.iterdir())
    with pytest.raises(SlimpiError, match=r"cannot put \d+ bytes aside"):
        spill.spilled(torch.zeros(8), tmp_path / "missing")


def test_what_looks_at_gradients_leaves_the_model_as_it_was(subjects: Callable[[str], Subject]) -> None:
    stream = subjects("llama").evidence.stream
    hooks = [(len(m._forward_pre_hooks), len(m._backward_hooks)) for m in stream.model.modules()]
    own = sensitivity.collect(stream.checkpoint, stream.chunks[:1], CPU)
    lent = sensitivity.collect(stream.checkpoint, stream.chunks[:1], CPU, model=stream.model)
    assert hooks == [(len(m._forward_pre_hooks), len(m._backward_hooks)) for m in stream.model.modules()]
    for name, rows in own.rows.items():
        assert torch.equal(rows, lent.rows[name]), name


def test_a_choice_is_read_back_as_written(subjects: Callable[[str], Subject], tmp_path: Path) -> None:
    for pruner, share in (("widths", 40), ("hidden", 50), ("layers", 50)):
        whole = choose(subjects("llama"), PruneSpec(pruner, "", share))
        save_pruned(tmp_path / "choice.npz", whole)
        read = load_pruned(tmp_path / "choice.npz")
        assert read.cut == whole.cut
        assert read.new.keys() == whole.new.keys()
        assert all(torch.equal(read.new[name], value) for name, value in whole.new.items())


@pytest.mark.parametrize("pruner", ["widths_fisher", "width_taylor", "widths_taylor"])
def test_several_shares_are_chosen_from_the_same(pruner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order as if each were alone, and the evidence is made once; of shares that are there it is not made."""
    save_tiny("llama-tied", tmp_path / "hf")
    recipe, progress = tiny_recipe(tmp_path / "hf", ["BF16"]), Progressor(plain=True)
    made: list[int] = []
    predicted, taylor = allocate.predicted, SCORES["taylor"]
    monkeypatch.setattr(allocate, "predicted", lambda *args: made.append(1) or predicted(*args))
    monkeypatch.setitem(SCORES, "taylor", lambda *args: made.append(1) or taylor(*args))

    def context(home: str) -> Context:
        where = Places(tmp_path / home)
        return Context(recipe, sources.fetch(recipe.source, "", where.sources), where, 1, progress)

    specs = [PruneSpec(pruner, "repair", percent) for percent in (40, 20)]
    together = context("together")
    found = chosen(together, lossless(together)[0], specs)
    again = chosen(together, lossless(together)[0], specs[::-1])[::-1]
    assert [pruned.cut for pruned in again] == [pruned.cut for pruned in found]
    assert len(made) == 1
    for spec, expected in zip(specs, found, strict=True):
        alone = context(f"alone-{spec.percent}")
        assert chosen(alone, lossless(alone)[0], [spec])[0].cut == expected.cut
    assert found[0].cut != found[1].cut


def test_pruned_variants_are_built_run_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the recipe to artifacts that the agent ran: llama-quantize's types, a method of ours, a budget in bits."""
    save_tiny("llama-tied", tmp_path / "hf")
    variants = ["BF16", "LAYERS+REPAIR-25-Q8_0", "WIDTHS-25-GPTQ-Q4_0", "WIDTHS-25-SEARCH-5.0bpw"]
    places = Places(tmp_path / "home")
    recipe = tiny_recipe(tmp_path / "hf", variants)
    folders = build(recipe, places, Progressor(plain=True))
    whole, layers, widths, budget = [load_artifact(folder) for folder in folders]
    assert layers.variant == "LAYERS+REPAIR-25-Q8_0"
    assert [step.action for step in layers.lineage] == ["convert", "prune", "llama_model_quantize"]
    settings_ = layers.lineage[1].settings
    assert (settings_["layers"], settings_["layers_before"], settings_["share_removed"]) == (3, 4, 0.25)
    assert layers.n_linear_weights * 4 == whole.n_linear_weights * 3
    assert any(note.startswith("pruned: 25 % asked, 25.0 %") for note in layers.notes)
    assert widths.n_linear_weights < 0.78 * whole.n_linear_weights
    assert widths.bits_per_linear_weight == pytest.approx(4.5)
    assert budget.bits_per_linear_weight <= 5.0
    assert widths.golden is not None
    capsys.readouterr()
    assert build(msgspec.structs.replace(recipe, variants=variants[:2]), places, Progressor(plain=True)) == folders[:2]
    assert "prune" not in capsys.readouterr().err


@pytest.mark.parametrize(("mib", "pruned"), [(0.13, True), (0.6, False)])
def test_share_and_bits_are_chosen_together(
    mib: float, pruned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the budget leaves no bits for the whole model parts of it go; where all fits none does."""
    save_tiny("llama-tied", tmp_path / "hf")
    name = f"WIDTHS-AUTO-SEARCH-{mib}MiB"
    places = Places(tmp_path / "home")
    folder = build(tiny_recipe(tmp_path / "hf", ["BF16", name]), places, Progressor(plain=True))[1]
    artifact = load_artifact(folder)
    (step,) = (step for step in artifact.lineage if step.action == "prune")
    assert (step.settings["percent"] > 0) is pruned
    assert artifact.size_bytes <= mib * 2**20
    said = capsys.readouterr().err
    losses = {line.split(":")[0].strip(): float(line.split()[1]) for line in said.splitlines() if "predicted" in line}
    assert min(losses, key=losses.__getitem__) == f"WIDTHS-{step.settings['percent']:g}"


def test_least_squares_on_a_whole_model_changes_nothing_much(
    subjects: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is removed, so each matrix is the best already: no penalty may make it worse on tokens held out."""
    subject = subjects("llama")
    whole = dims_of(subject.checkpoint).whole
    assert least_squares(Stream(subject.checkpoint, subject.fitted), Pruned(whole), quiet).new == {}
    monkeypatch.setattr(repair, "first_to_fit", lambda pruned, dims: 0)
    repaired = least_squares(Stream(subject.checkpoint, subject.fitted), Pruned(whole), quiet)
    assert divergence(subject.checkpoint, apply(subject.checkpoint, whole, repaired.new), subject.measured) < 1e-8


GONE = LayerCut((), ())


@pytest.mark.parametrize(
    ("layer", "left", "start"),
    [
        (2, lambda whole: GONE, 3),  # the MLP before it stands in
        (2, lambda whole: LayerCut((), whole.channels), 3),
        (2, lambda whole: LayerCut(whole.groups, ()), 4),
        (2, lambda whole: LayerCut(whole.groups[:1], whole.channels), 4),
        (2, lambda whole: LayerCut(whole.groups, whole.channels[:32]), 5),
        (2, lambda whole: LayerCut((), (), linear=True), 4),
        (0, lambda whole: GONE, 0),
    ],
)
def test_what_is_before_the_first_change_is_not_fit(
    layer: int,
    left: Callable[[LayerCut], LayerCut],
    start: int,
    subjects: Callable[[str], Subject],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its error is zero: fitting it, too, ends in the same model but for rounding."""
    subject = subjects("llama")
    dims = dims_of(subject.checkpoint)
    cut = dims.whole.replaced(layer, left(dims.whole.layers[0]))
    assert first_to_fit(Pruned(cut), dims) == start
    found = least_squares(Stream(subject.checkpoint, subject.fitted), Pruned(cut), quiet).new
    monkeypatch.setattr(repair, "first_to_fit", lambda pruned, dims: 0)
    all_fit = least_squares(Stream(subject.checkpoint, subject.fitted), Pruned(cut), quiet).new
    assert found
    assert all(2 * int(name.split(".")[2]) + ("mlp" in name) >= start for name in found)
    fast, slow = (
        divergence(subject.checkpoint, apply(subject.checkpoint, cut, new), subject.measured)
        for new in (found, all_fit)
    )
    assert fast == pytest.approx(slow, rel=1e-3)


def test_what_pruning_changed_already_is_behind_the_first_change(subjects: Callable[[str], Subject]) -> None:
    dims = dims_of(subjects("llama").checkpoint)
    changed = {"model.layers.1.mlp.down_proj.weight": torch.zeros(1)}
    assert first_to_fit(Pruned(dims.whole, changed), dims) == 2


def test_sparsegpt_is_column_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_BLOCK", 8)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 20, generator=generator)
    x = torch.randn(200, 20, generator=generator) @ torch.randn(20, 20, generator=generator)
    hessian = x.T @ x / 200
    damped = hessian.double().clone()
    damped.diagonal().add_(0.01 * hessian.diagonal().mean().double())
    found = sparse.sparsegpt(weight, hessian, sparse.Pattern(0.5))
    twin = reference_prune.sparsegpt(weight.numpy(), damped.numpy(), 0.5, 8)
    np.testing.assert_allclose(found.numpy(), twin, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsify", [sparse.magnitude, sparse.wanda, sparse.sparsegpt])
def test_sparse_matrices_have_the_pattern(sparsify: sparse.Sparsify) -> None:
    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(6, 64, generator=generator), torch.randn(500, 64, generator=generator)
    hessian = x.T @ x / 500
    assert ((sparsify(weight, hessian, sparse.Pattern(0.25)) == 0).sum(1) == 16).all()
    two_of_four = sparsify(weight, hessian, sparse.Pattern(0.5, 2, 4))
    assert ((two_of_four.reshape(6, 16, 4) == 0).sum(-1) == 2).all()


def test_sparse_by_what_is_lost() -> None:
    """E|W x - W' x|^2: Wanda's is less than magnitude's where inputs differ in size, SparseGPT's less where they
    correlate."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(16, 64, generator=generator)
    sizes = torch.rand(64, generator=generator) * 2 + 0.1
    shared = torch.randn(800, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    x = (torch.randn(800, 64, generator=generator) + shared) * sizes
    hessian = x.T @ x / 800
    losses = []
    for sparsify in (sparse.magnitude, sparse.wanda, sparse.sparsegpt):
        error = weight - sparsify(weight, hessian, sparse.Pattern(0.5))
        losses.append(float(torch.einsum("ri,ij,rj->", error, hessian, error)))
    assert losses[0] > losses[1] > losses[2]


def test_sparse_files_stay_whole(subjects: Callable[[str], Subject]) -> None:
    subject = subjects("llama")
    pruned, facts = prune(subject, PruneSpec("sparse_gpt", "", 40))
    assert facts["share_removed"] == 0
    assert facts["share_of_zeros"] == pytest.approx(0.4, abs=0.01)
    assert {n: t.shape for n, t in pruned.tensors.items()} == {
        n: t.shape for n, t in subject.checkpoint.tensors.items()
    }
    with pytest.raises(SlimpiError, match="two of four stay, which is 50 %"):
        prune(subject, PruneSpec("sparse24_gpt", "", 40))


def test_a_patch_is_a_linear_layer_over_the_gap(subjects: Callable[[str], Subject], tmp_path: Path) -> None:
    """One matrix for a run of layers; nearer than the refit alone on tokens that neither has seen."""
    subject = subjects("llama")
    unseen = cut_text(subject.checkpoint, PROSE, 64, 20)[12:]
    spec = PruneSpec("layers_run", "patch", 50)
    found, facts = prune(subject, spec)
    dims = dims_of(subject.checkpoint)
    removed = 2 * dims.layer_weights(dims.whole.layers[0]) - dims.hidden**2
    assert facts["share_removed"] == pytest.approx(removed / dims.weights(dims.whole), abs=1e-3)
    assert (facts["layers"], facts["linear_layers"]) == (3, 1)
    assert sum(name.endswith("linear_attn.weight") for name in found.tensors) == 1
    top, kl = in_llama_cpp(found, tmp_path)
    assert top >= 0.98
    assert kl < 1e-5
    plain, refit = (prune(subject, replace(spec, repair=repair))[0] for repair in ("", "repair"))
    losses = [divergence(subject.checkpoint, model, unseen) for model in (found, refit, plain)]
    assert losses[0] < losses[2]
    assert losses[0] < 1.1 * losses[1]
    with pytest.raises(SlimpiError, match="none is gone"):
        prune(subject, PruneSpec("width_wanda", "patch", 40))


def test_a_bias_makes_the_mean_good(subjects: Callable[[str], Subject], tmp_path: Path) -> None:
    """FLAP's: after it each pruned MLP's mean output is the whole one's, and llama.cpp adds the bias as torch does."""
    subject = subjects("llama")
    found, _ = prune(subject, PruneSpec("width_flap", "bias", 40))
    plain, _ = prune(subject, PruneSpec("width_flap", "", 40))
    layer = subject.judge.stream.layers[1]
    mean = subject.evidence.moments[1][1].mean.double()
    whole = layer.mlp.down_proj.weight.double() @ mean
    names = [f"model.layers.1.mlp.down_proj.{kind}" for kind in ("weight", "bias")]
    weight, offset = (found.tensors[name].read().double() for name in names)
    kept = [
        int((subject.checkpoint.tensors["model.layers.1.mlp.up_proj.weight"].read() == row).all(1).nonzero())
        for row in found.tensors["model.layers.1.mlp.up_proj.weight"].read()
    ]
    torch.testing.assert_close(weight @ mean[kept] + offset, whole, rtol=1e-3, atol=1e-4)
    top, kl = in_llama_cpp(found, tmp_path)
    assert top >= 0.98
    assert kl < 1e-5
    assert found.config["mlp_bias"]
    assert not plain.config["mlp_bias"]
    with pytest.raises(SlimpiError, match="gemma2 has no bias in its MLPs"):
        prune(subjects("gemma2"), PruneSpec("width_flap", "bias", 40))


def test_distillation_brings_the_model_closer(models: Callable[[str], Checkpoint]) -> None:
    """On text that it has not seen; Gemma too, which no least squares repair."""
    for name in ("gemma2", "llama"):
        checkpoint = models(name)
        chunks = cut_text(checkpoint, PROSE, 64, 24)
        subject = Subject(checkpoint, chunks[:2], chunks[:8], CPU, taught=chunks[:20], distill_steps=20)
        plain = divergence(checkpoint, prune(subject, PruneSpec("layers", "", 50))[0], chunks[20:])
        found, facts = prune(subject, PruneSpec("layers", "distill", 50))
        assert facts["kld_after"] < facts["kld_before"]
        assert facts["distill_tokens"] == 20 * 2 * 64
        assert divergence(checkpoint, found, chunks[20:]) < plain


@pytest.mark.parametrize("rate", [10.0, math.inf])
def test_distillation_that_does_not_help_is_not_kept(rate: float, models: Callable[[str], Checkpoint]) -> None:
    """Nor what is no number any more."""
    checkpoint = models("llama")
    chunks = cut_text(checkpoint, PROSE, 64, 4)
    pruned = apply(checkpoint, dims_of(checkpoint).whole.replaced(1, LayerCut((), ())))
    found, facts = distill.distill(checkpoint, pruned, chunks, chunks, distill.Schedule(steps=2, rate=rate), CPU)
    assert facts["kld_after"] > facts["kld_before"] or (rate == math.inf and math.isnan(facts["kld_after"]))
    assert facts["kld"] == facts["kld_before"]
    assert found is pruned


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_says_what_the_whole_model_says(family: str, models: Callable[[str], Checkpoint]) -> None:
    """Its layers no longer in memory; Gemma 2 caps its logits."""
    checkpoint = models(family)
    chunks = list(cut_text(checkpoint, PROSE, 32, 3))
    teacher = distill._Teacher(checkpoint, chunks, CPU, lambda *told: None)
    model = in_transformers(checkpoint)
    for index, chunk in enumerate(chunks):
        wanted = torch.log_softmax(model(chunk[None], use_cache=False).logits[0].double(), -1)
        assert torch.allclose(teacher.log_p(index).double(), wanted, atol=1e-5)


@pytest.mark.parametrize("ends_only", [False, True])
def test_a_distillation_changes_what_it_says(ends_only: bool, models: Callable[[str], Checkpoint]) -> None:
    checkpoint = models("qwen2")
    chunks = cut_text(checkpoint, PROSE, 64, 12)
    pruned = apply(checkpoint, dims_of(checkpoint).whole.replaced(1, LayerCut((), ())))
    schedule = distill.Schedule(steps=6, ends_only=ends_only)
    found, facts = distill.distill(checkpoint, pruned, chunks[:10], chunks[10:], schedule, CPU)
    assert facts["kld_after"] < facts["kld_before"]
    changed = {n for n, t in found.tensors.items() if not torch.equal(t.read(), pruned.tensors[n].read())}
    matrices = {n for n in changed if len(found.tensors[n].shape) == 2}
    ends = {n for n in found.tensors if n.endswith(("o_proj.weight", "down_proj.weight"))}
    assert ends <= matrices
    assert (matrices == ends) == ends_only
    assert not changed & {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("repair", ["repair", "distill", "distill_ends"])
def test_results_are_judged_by_what_nothing_was_fit_on(repair: str, models: Callable[[str], Checkpoint]) -> None:
    checkpoint = models("llama")
    chunks, unseen = apart(cut_text(checkpoint, PROSE, 64, 24), 2)
    assert unseen is not None
    subject = Subject(checkpoint, chunks[:2], chunks[:8], CPU, taught=chunks[:8], distill_steps=4, unseen=unseen)
    found, facts = prune(subject, PruneSpec("layers", repair, 50))
    assert facts["kld"] == pytest.approx(divergence(checkpoint, found, unseen), rel=1e-4)
    assert facts["kld_unseen"]
    assert facts.get("kld_after", facts["kld"]) == pytest.approx(facts["kld"], rel=1e-4)
    vars(subject).pop("verdict", None)
    subject.unseen = None
    fit_on, facts = prune(subject, PruneSpec("layers", repair, 50))
    assert facts["kld"] == pytest.approx(divergence(checkpoint, fit_on, chunks[:2]), rel=1e-4)
    assert not facts["kld_unseen"]


@pytest.mark.parametrize(("n", "n_judged"), [(7, 0), (8, 1), (24, 3), (100, 4)])
def test_chunks_to_judge_by_are_the_last(n: int, n_judged: int) -> None:
    """Four are asked."""
    chunks = torch.arange(n)[:, None]
    fit_on, unseen = apart(chunks, 4)
    assert (0 if unseen is None else len(unseen)) == n_judged
    assert torch.equal(torch.cat([fit_on, *([] if unseen is None else [unseen])]), chunks)


def test_a_step_is_a_share_of_what_it_changes(models: Callable[[str], Checkpoint]) -> None:
    """Adam's first step is its rate, whatever the gradient: a model of smaller weights gets smaller steps."""
    checkpoint = models("llama")
    pruned = apply(checkpoint, dims_of(checkpoint).whole.replaced(1, LayerCut((), ())))
    chunks = cut_text(checkpoint, PROSE, 64, 4)
    found, facts = distill.distill(checkpoint, pruned, chunks, chunks, distill.Schedule(steps=1, rate=1e-3), CPU)
    assert facts["kld"] == facts["kld_after"]
    for name in (n for n in found.tensors if n.startswith("model.layers.")):
        old = pruned.tensors[name].read().float()
        step = float((found.tensors[name].read().float() - old).abs().max())
        assert step == pytest.approx(1e-3 * float(old.square().mean().sqrt()), rel=0.05), name


def test_the_rate_rises_and_falls() -> None:
    rates = [distill.Schedule(20, rate=1.0).rate_at(step) for step in range(20)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2] == 1.0
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.01

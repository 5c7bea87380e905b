"""benchmarks/bench_quality.py: hulls, ratios at equal bytes, verdicts, and a whole run on a tiny model."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path

import bench_quality
import gguf
import msgspec
import numpy as np
import pytest
import quality_plot
import reference_divergence as twin
import torch
from fakes import write_llama
from hypothesis import given
from hypothesis import strategies as st
from quality_rows import (
    Conditions,
    Maker,
    Quality,
    QualityRow,
    Score,
    check_alike,
    interpolate,
    log_kld,
    lower_hull,
    mean_interval,
    merged,
    ratio_at_equal_bytes,
    verdicts_of,
)
from tiny_models import save_tiny

from device.records import SlimpiError, decode, encode, read_record
from device.results import Measurement
from device.schema import Dataset, File
from pipeline.recordings import Recording

SHA = "0" * 64


def score(kld: list[float], corpus: str = "wiki", **changes: object) -> Score:
    n = len(kld)
    plain = Score(
        corpus=corpus,
        corpus_sha256=SHA,
        reference_sha256=SHA,
        n_ctx=512,
        n_threads=1,
        n_tokens=255 * n,
        kld_chunks=kld,
        same_top_chunks=[0.9] * n,
        nll_chunks=[3.1] * n,
        reference_nll_chunks=[3.0] * n,
        kld_stderr=0.001,
        kld_median=0.01,
        kld_p99=0.5,
        kld_max=2.0,
        ln_ppl_ratio=0.1,
        ln_ppl_ratio_stderr=0.01,
        measured_s=1.0,
        provenance="host",
    )
    return msgspec.structs.replace(plain, **changes)


def test_the_same_reference_is_known_by_its_likelihoods_whoever_recorded_it() -> None:
    check_alike([score([0.1, 0.2]), score([0.3, 0.4], reference_sha256="1" * 64)])
    for changes in ({"reference_nll_chunks": [3.0, 3.0 + 1e-12]}, {"corpus_sha256": "1" * 64}, {"n_ctx": 256}):
        with pytest.raises(SlimpiError, match=f"not comparable: {next(iter(changes))}"):
            check_alike([score([0.1, 0.2]), score([0.3, 0.4], **changes)])


def row(
    variant: str, size: int, kld: list[float], maker: Maker = "llama-quantize", bits: float = 4.5, share: float = 0.0
) -> QualityRow:
    return QualityRow(
        model="m",
        variant=variant,
        maker=maker,
        key=variant,
        file_sha256=SHA,
        size_bytes=size,
        bits_per_weight=bits,
        bits_per_linear_weight=bits,
        n_fallbacks=0,
        source_share=share,
        build_s=1.5,
        scores=[score(kld)],
    )


CONDITIONS = Conditions(
    machine="m",
    cpu="c",
    cores=2,
    kernel="k",
    python="3.11",
    llama_cpp_python="0.3.36",
    wheel_commit="0c1e570",
    start_time="2026-11-24T10:00:00Z",
)
PEERS = [row("Q2", 100, [0.4] * 3), row("Q3", 200, [0.2] * 3), row("Q4", 300, [0.05] * 3), row("Q8", 600, [0.01] * 3)]

points = st.lists(st.tuples(st.integers(0, 50), st.integers(-50, 50)), min_size=1, max_size=12)


@given(points, st.integers(0, 100))
def test_hull_is_the_lowest_line_between_any_two_points(found: list[tuple[int, int]], at: int) -> None:
    """Naive twin: of all pairs of points around x, the lowest value at x."""
    hull = lower_hull(found)
    lowest = min(found, key=lambda p: (p[1], p[0]))
    left = min(x for x, _ in found)
    assert (hull[0][0], hull[-1]) == (left, lowest)
    x = left + (lowest[0] - left) * at / 100
    values = [
        a[1] if a[0] == b[0] else a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0])
        for a in found
        for b in found
        if a[0] <= x <= b[0] and (a[0] < b[0] or a == b)
    ]
    assert interpolate(hull, x) == pytest.approx(min(values), abs=1e-9)
    assert all(a[1] > b[1] for a, b in pairwise(hull))
    assert interpolate(hull, left - 1) == hull[0][1]
    assert interpolate(hull, lowest[0] + 1) is None


def test_ratio_is_to_the_geometric_mean_half_way() -> None:
    peers = {100: [0.4, 0.2, 0.3], 200: [0.1, 0.1, 0.1]}
    got = ratio_at_equal_bytes(150, [0.12, 0.10, 0.11], peers)
    assert got.value == pytest.approx(0.11 / math.sqrt(0.3 * 0.1))
    assert got.low is not None
    assert got.high is not None
    assert got.low < got.value < got.high


@given(st.lists(st.floats(0.01, 1.0), min_size=3, max_size=8), st.integers(100, 200), st.integers(0, 1000))
def test_ratio_interval_equals_a_jackknife_by_hand(ours: list[float], size: int, seed: int) -> None:
    from scipy import stats

    n = len(ours)
    low, high = (np.sort(np.random.default_rng([seed, k]).uniform(0.1 / (1 + k), 0.2, n)) for k in range(2))
    low = low + 1.0  # always above the other one
    share = (size - 100) / 100

    def theta(keep: list[int]) -> float:
        def logm(values: object) -> float:
            return math.log(sum(float(values[i]) for i in keep) / len(keep))  # type: ignore[index]

        return logm(ours) - (1 - share) * logm(low) - share * logm(high)

    whole = theta(list(range(n)))
    leave = [theta([j for j in range(n) if j != i]) for i in range(n)]
    stderr = math.sqrt((n - 1) / n * sum((x - sum(leave) / n) ** 2 for x in leave))
    half = stats.t.ppf(0.975, n - 1) * stderr
    got = ratio_at_equal_bytes(size, ours, {100: low.tolist(), 200: high.tolist()})
    assert [got.value, got.low, got.high] == pytest.approx([math.exp(x) for x in (whole, whole - half, whole + half)])


def test_hard_chunks_cancel_in_the_ratio() -> None:
    """Every file finds the same chunks hard: the ratio is certain although each mean is not."""
    hard = [0.1, 1.0, 10.0, 0.2]
    got = ratio_at_equal_bytes(150, [0.5 * x for x in hard], {100: hard, 200: [0.9 * x for x in hard]})
    assert got.low == pytest.approx(got.value)
    assert got.high == pytest.approx(got.value)
    one = ratio_at_equal_bytes(150, [0.5], {100: [1.0], 200: [0.5]})
    assert (one.low, one.high) == (None, None)


def test_ratio_needs_a_peer_as_large_and_the_same_chunks() -> None:
    with pytest.raises(SlimpiError, match="has 201 bytes or more"):
        ratio_at_equal_bytes(201, [0.1], {100: [0.4], 200: [0.2]})
    with pytest.raises(SlimpiError, match="cannot pair 1 chunks with 2"):
        ratio_at_equal_bytes(150, [0.1, 0.1], {100: [0.4], 200: [0.2]})


@pytest.mark.parametrize(("kld", "ok"), [(0.0799, True), (0.0801, False)])
def test_the_bar_is_80_percent_at_equal_bytes(kld: float, ok: bool) -> None:
    """At 250 bytes the hull runs from Q2 (100, 0.4) to Q4 (300, 0.05): Q3 lies above it."""
    there = math.exp(math.log(0.4) + 0.75 * (math.log(0.05) - math.log(0.4)))
    ours = row("GPTQ-Q3", 250, [kld / 0.1 * there] * 3, "slimpi")
    (verdict,) = verdicts_of([*PEERS, ours], {"m": (4.5,)})
    assert verdict.peers == ["Q2", "Q4"]
    assert verdict.peer_kld == pytest.approx(there)
    assert verdict.ratio == pytest.approx(kld / 0.1)
    assert (verdict.ok, verdict.variant, verdict.n_chunks) == (ok, "GPTQ-Q3", 3)


def test_the_best_of_ours_near_the_target_counts() -> None:
    """What counts has at most the bytes of a peer with the target's bits, whatever its own bits; without such a peer,
    the target's bits."""
    ours = [
        row("worse", 298, [0.09] * 3, "slimpi", bits=4.5),
        row("best", 300, [0.04] * 3, "slimpi", bits=5.2),
        row("too large", 305, [0.001] * 3, "slimpi", bits=4.5),
        row("small and worse", 200, [0.045] * 3, "slimpi", bits=4.5),
        row("free", 300, [0.0001] * 3, "slimpi", bits=4.5, share=0.51),
    ]
    bits = {"Q2": 2.6, "Q3": 3.4, "Q4": 4.5, "Q8": 8.5}
    peers = [msgspec.structs.replace(peer, bits_per_linear_weight=bits[peer.variant]) for peer in PEERS]
    (verdict,) = verdicts_of([*peers, *ours], {"m": (4.5,)})
    assert verdict.variant == "best"
    (verdict,) = verdicts_of([*peers, *ours], {"m": (5.2,)})
    assert verdict.variant == "best"


@pytest.mark.parametrize("size", [296, 200, 20])
def test_a_smaller_file_of_ours_is_held_against_the_largest_there(size: int) -> None:
    """Against 0.05 at 300 bytes, and not against what the hull has at its own."""
    bits = {"Q2": 2.6, "Q3": 3.4, "Q4": 4.5, "Q8": 8.5}
    peers = [msgspec.structs.replace(peer, bits_per_linear_weight=bits[peer.variant]) for peer in PEERS]
    (verdict,) = verdicts_of([*peers, row("small", size, [0.03] * 3, "slimpi", bits=2.0)], {"m": (4.5,)})
    assert (verdict.variant, verdict.size_bytes) == ("small", size)
    assert (verdict.peers, verdict.ratio) == (["Q4"], pytest.approx(0.6))


def test_a_peer_that_got_its_type_for_free_is_not_on_the_hull() -> None:
    ours = row("ours", 250, [0.05] * 3, "slimpi")
    free = row("Q3_free", 240, [0.001] * 3, share=0.6)
    with_it, without = (verdicts_of(rows, {"m": (4.5,)}) for rows in ([*PEERS, free, ours], [*PEERS, ours]))
    assert with_it == without


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_peers_of_one_size_the_better_counts(order: int) -> None:
    twins = [row("Q4", 300, [0.05] * 3), row("Q4_worse", 300, [0.06] * 3)][::order]
    (verdict,) = verdicts_of([*PEERS[:2], *twins, row("ours", 300, [0.03] * 3, "slimpi")], {"m": (4.5,)})
    assert (verdict.peers, verdict.ratio) == (["Q4"], pytest.approx(0.6))


def test_a_file_smaller_than_every_peer_is_compared_with_the_smallest() -> None:
    (verdict,) = verdicts_of([*PEERS, row("ours", 99, [0.1] * 3, "slimpi")], {"m": (4.5,)})
    assert (verdict.peers, verdict.ratio, verdict.ok) == (["Q2"], pytest.approx(0.25), True)


def test_a_file_of_a_peers_size_is_compared_with_that_peer() -> None:
    (verdict,) = verdicts_of([*PEERS, row("ours", 300, [0.03] * 3, "slimpi")], {"m": (4.5,)})
    assert (verdict.peers, verdict.ratio) == (["Q4"], pytest.approx(0.6))


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (PEERS, "no file of ours of that size"),
        ([row("ours", 250, [0.1] * 3, "slimpi")], "no llama-quantize file"),
        ([*PEERS, row("ours", 601, [0.001] * 3, "slimpi")], "ours is larger than every"),
    ],
)
def test_what_cannot_be_judged_is_missed_and_says_why(rows: list[QualityRow], why: str) -> None:
    (verdict,) = verdicts_of(rows, {"m": (4.5,)})
    assert (verdict.ok, verdict.ratio) == (False, None)
    assert why in verdict.why
    assert why in bench_quality.verdict_lines([verdict])[1]


def test_unlike_scores_are_refused() -> None:
    other = msgspec.structs.replace(PEERS[0], variant="x", size_bytes=150, scores=[score([0.3] * 3, n_ctx=256)])
    with pytest.raises(SlimpiError, match="n_ctx is 512 and 256"):
        verdicts_of([*PEERS, other], {"m": (4.5,)})
    with pytest.raises(ValueError, match="series of"):
        score([0.1, 0.2], nll_chunks=[1.0])


def test_one_verdict_a_text_and_target_and_none_without_targets() -> None:
    both = [msgspec.structs.replace(r, scores=[*r.scores, score([0.1] * 3, corpus="ptb")]) for r in PEERS]
    got = [(v.corpus, v.target_bits) for v in verdicts_of(both, {"m": (3.0, 4.5)})]
    assert got == [("wiki", 3.0), ("wiki", 4.5), ("ptb", 3.0), ("ptb", 4.5)]
    assert verdicts_of(PEERS, {"other": (4.5,)}) == []


def test_interval_of_a_mean() -> None:
    """t(0.975, 2) = 4.302653; stdev 1, n 3."""
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert mean_interval([1.0]) is None
    assert log_kld(-1e-7) == log_kld(0.0) == pytest.approx(math.log(1e-9))


def test_rows_are_replaced_in_place() -> None:
    new = row("Q3", 201, [0.1])
    assert [r.size_bytes for r in merged(PEERS, new)] == [100, 201, 300, 600]
    assert merged(PEERS, row("Q5", 400, [0.03]))[-1].variant == "Q5"


def test_scores_keep_what_single_tokens_tell() -> None:
    rng = np.random.default_rng(0)
    kld, difference = rng.exponential(0.1, 300).tolist(), rng.normal(0.1, 1.0, 300).tolist()

    def measured(metric: str, samples: list[float]) -> Measurement:
        return Measurement(metric=metric, unit="", samples=samples, higher_is_better=False, provenance="host")

    found = {
        "kld": measured("kld", kld),
        "nll_difference": measured("nll_difference", difference),
        "same_top": measured("same_top", [0.8, 0.9, 1.0]),
        "divergence_nll": measured("divergence_nll", [3.0, 3.1, 3.2]),
    }
    dataset = Dataset(name="logits", file=File(path="logits", sha256="1" * 64, size_bytes=1))
    text = Dataset(name="wiki", file=File(path="wiki", sha256="2" * 64, size_bytes=1))
    recording = Recording(dataset=dataset, text=text, n_ctx=202, n_chunks=3, reference="r", nll=[2.9, 3.0, 3.1])
    got = bench_quality.score_of(found, recording, threads=2, measured_s=4.0)
    assert got.kld_chunks == pytest.approx([sum(kld[i : i + 100]) / 100 for i in (0, 100, 200)])
    assert got.kld == pytest.approx(sum(kld) / 300)
    assert got.kld_median == pytest.approx(twin.percentile(kld, 0.5))
    assert got.kld_p99 == pytest.approx(twin.percentile(kld, 0.99))
    assert got.kld_max == max(kld)
    assert got.kld_stderr == pytest.approx(np.std(kld, ddof=1) / math.sqrt(300))
    assert (got.ln_ppl_ratio, got.n_tokens, got.n_chunks) == (pytest.approx(sum(difference) / 300), 300, 3)
    assert got.same_top_stderr == pytest.approx(math.sqrt(0.9 * 0.1 / 299))
    assert got.perplexity / got.reference_perplexity == pytest.approx(math.exp(0.1))


def test_share_of_weights_that_keep_their_sources_type(tmp_path: Path) -> None:
    write_llama(tmp_path / "source.gguf")
    from pipeline.gguf_file import read_gguf

    tensors = read_gguf(tmp_path / "source.gguf").tensors
    linear = [n for n, t in tensors.items() if n.startswith("blk.") and len(t.shape) == 2]
    down = [n for n in linear if "ffn_down" in n]
    plan = dict.fromkeys(tensors, "Q4_0") | dict.fromkeys(down, "F32")
    expected = sum(tensors[n].n_elements for n in down) / sum(tensors[n].n_elements for n in linear)
    assert 0 < expected < 1
    assert bench_quality.source_share(tmp_path / "source.gguf", plan) == pytest.approx(expected)
    assert bench_quality.source_share(tmp_path, plan) == 0.0  # a Hugging Face folder


def test_results_are_read_back_as_written() -> None:
    rows = [*PEERS, row("ours", 250, [0.05] * 3, "slimpi")]
    written = Quality(conditions=CONDITIONS, rows=rows, verdicts=verdicts_of(rows, {"m": (3.0, 4.5)}))
    read = decode(encode(written), Quality, "quality.json")
    assert read == written
    assert verdicts_of(read.rows, {"m": (3.0, 4.5)}) == read.verdicts


def test_panels_hold_every_row_once() -> None:
    rows = [*PEERS, row("GPTQ-Q3_K", 250, [0.05, 0.06, 0.07], "slimpi"), row("Q3_free", 240, [0.001] * 3, share=0.6)]
    (panel,) = quality_plot.panels(rows)
    assert panel.title == "m, wiki"
    points = {t.name: list(zip(t.mib, t.kld, strict=True)) for t in panel.traces}
    assert points["llama-quantize"] == [(r.size_bytes / 2**20, r.scores[0].kld) for r in PEERS]
    assert set(points) == {"llama-quantize", "GPTQ", quality_plot.FREE}
    (gptq,) = (t for t in panel.traces if t.name == "GPTQ")
    low, high = mean_interval([0.05, 0.06, 0.07]) or (0, 0)
    assert (gptq.down[0], gptq.up[0]) == (pytest.approx(0.06 - low), pytest.approx(high - 0.06))
    assert "n = 3 chunks" in gptq.text[0]
    assert panel.hull == [(r.size_bytes / 2**20, pytest.approx(r.scores[0].kld)) for r in PEERS if r.variant != "Q3"]


def test_the_page_is_self_contained() -> None:
    rows = [*PEERS, row("GPTQ-Q3_K", 250, [0.05] * 3, "slimpi")]
    page = quality_plot.page(Quality(conditions=CONDITIONS, rows=rows, verdicts=[]))
    assert len(page) > 1_000_000  # plotly.js is in it
    assert "<script src" not in page
    assert "GPTQ-Q3_K" in page
    with pytest.raises(SlimpiError, match="nothing to plot"):
        quality_plot.page(Quality(conditions=CONDITIONS, rows=[], verdicts=[]))


def test_without_plotly_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(SlimpiError, match="pip install plotly"):
        quality_plot.page(Quality(conditions=CONDITIONS, rows=PEERS, verdicts=[]))


# A whole run on a tiny random llama.

PEER_NAMES = ("Q4_0", "Q8_0")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_tiny("llama", home / "hf", torch.bfloat16)
    (home / "tiny.toml").write_text(
        f'name = "tiny"\nsource = "path:{home / "hf"}"\nexport = "gguf"\nvariants = ["F16", "Q8_0", "RTN-Q4_0"]\n'
        "[calibration]\nn_ctx = 64\nn_chunks = 4\n[golden]\nn = 4\nn_tokens = 16\n"
    )
    return home


def bench(home: Path, *options: str) -> int:
    peers = [word for name in PEER_NAMES for word in ("--peer", name)]
    text = ["--text", "demo:prose_test.txt", "--n-ctx", "64", "--chunks", "3"]
    return bench_quality.main([str(home / "tiny.toml"), *peers, *text, "--out", str(home / "quality.json"), *options])


def test_a_whole_run_and_what_is_reused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIMPI_HOME", str(home))
    monkeypatch.setattr(bench_quality, "TARGETS", {"tiny": (4.5,)})
    code = bench(home)
    said = capsys.readouterr()
    quality = read_record(home / "quality.json", Quality)
    assert [(r.variant, r.maker) for r in quality.rows] == [
        *((name, "llama-quantize") for name in PEER_NAMES),
        ("RTN-Q4_0", "slimpi"),
    ], said.err
    by_name = {r.variant: r for r in quality.rows}
    assert by_name["Q4_0"].scores[0].kld > 2 * by_name["Q8_0"].scores[0].kld > 0
    assert all(r.build_s and r.build_s > 0 and r.scores[0].n_chunks == 3 for r in quality.rows)
    assert by_name["RTN-Q4_0"].bits_per_linear_weight == pytest.approx(4.5)
    (verdict,) = quality.verdicts
    assert verdict.variant == "RTN-Q4_0"
    assert code == (0 if verdict.ok else 1)
    assert "RTN-Q4_0" in said.out
    assert "plotly" in (home / "quality.html").read_text()

    monkeypatch.setattr(bench_quality, "measure", None)  # nothing is measured again
    built: list[str] = []
    build = bench_quality.build
    monkeypatch.setattr(
        bench_quality, "build", lambda r, w, p, t, only: built.append(only[-1]) or build(r, w, p, t, only)
    )
    assert bench(home) == code
    assert built == ["F16", "RTN-Q4_0"]  # ours may have changed, theirs not
    assert read_record(home / "quality.json", Quality).rows == quality.rows
    assert bench(home, "--show") == code
    assert list((home / "models" / "artifacts" / ".stages").glob("quality-*")) == []


def test_one_variant_that_fails_does_not_stop_the_rest(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLIMPI_HOME", str(home))
    out = home / "failing.json"
    build = bench_quality.build

    def failing(recipe: object, where: object, progress: object, threads: int, only: list[str]) -> list[Path]:
        if only[-1] == "Q8_0":
            raise SlimpiError("no such luck")
        return build(recipe, where, progress, threads, only)  # type: ignore[arg-type]

    monkeypatch.setattr(bench_quality, "build", failing)
    monkeypatch.setattr(bench_quality, "measure", lambda *_: score([0.1, 0.2, 0.3], corpus="demo:prose_test.txt"))
    before = set((home / "models" / "artifacts").glob("tiny-*"))
    assert bench(home, "--out", str(out), "--discard") == 1
    assert "tiny Q8_0: no such luck" in capsys.readouterr().out
    assert [r.variant for r in read_record(out, Quality).rows] == ["Q4_0", "RTN-Q4_0"]
    assert set((home / "models" / "artifacts").glob("tiny-*")) >= before  # --discard leaves what was there before


def test_bad_input_is_one_line(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMPI_HOME", str(home))
    assert bench_quality.main(["--machine", "../elsewhere"]) == 1
    assert "'../elsewhere' is not a plain name" in capsys.readouterr().err
    assert bench_quality.main(["--show", "--out", str(home / "nothing.json")]) == 1
    assert "cannot read" in capsys.readouterr().err
    assert bench(home, "--out", str(home / "x.json"), "--ours", "Q4_0") == 1
    assert "Q4_0 is on the wrong side" in capsys.readouterr().err
    assert bench(home, "--out", str(home / "x.json"), "--peer", "GPTQ-Q4_0") == 1
    assert "GPTQ-Q4_0 is on the wrong side" in capsys.readouterr().err
    old = Quality(conditions=msgspec.structs.replace(CONDITIONS, wheel_commit="other"), rows=[], verdicts=[])
    (home / "old.json").write_bytes(encode(old))
    assert bench(home, "--out", str(home / "old.json")) == 1
    assert "results of llama.cpp other" in capsys.readouterr().err


def test_what_holds_the_sources_values_counts_as_its_type(tmp_path: Path) -> None:
    """Of Q4_1 that is Q5_1 too; of two blocks' matrices of like size each is half of the weights."""
    path = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    blocks = np.zeros((4, 64 // 32 * 20), np.uint8)
    for name in ("blk.0.ffn_up.weight", "blk.1.ffn_up.weight", "token_embd.weight"):
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first, second, outer = "blk.0.ffn_up.weight", "blk.1.ffn_up.weight", "token_embd.weight"
    for kind, share in (("Q4_1", 1.0), ("Q5_1", 1.0), ("Q5_0", 0.0), ("Q8_0", 0.0)):
        assert bench_quality.source_share(path, {first: kind, second: kind, outer: "Q4_1"}) == share
    assert bench_quality.source_share(path, {first: "Q5_1", second: "Q4_0", outer: "Q4_1"}) == 0.5
    assert bench_quality.source_share(tmp_path, {first: "Q4_1"}) == 0.0

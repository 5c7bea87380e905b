"""benchmarks/: reading llama.cpp's tools (captured output), pairing runs, and judging them."""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from pathlib import Path

import llama_tools
import msgspec
import peers
import pytest
from peer_rows import (
    Conditions,
    Peers,
    PerplexityRow,
    SpeedRow,
    Tool,
    decided,
    interval_of_median,
    pair_ratios,
    verdicts_of,
)

from device.records import SlimpiError, decode, encode
from device.schema import Throughput

GOLDEN = Path(__file__).parent / "golden"
FEATURES = "SSE3 SSSE3 AVX AVX2 F16C FMA BMI2 AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16 LLAMAFILE OPENMP REPACK"
SHA = "0" * 64


def golden(name: str) -> str:
    return (GOLDEN / name).read_text(encoding="utf-8")


def speed(tool: Tool, pair: int, samples_ns: list[int], variant: str = "Q8_0", n_threads: int = 1) -> SpeedRow:
    return SpeedRow(
        tool=tool,
        variant=variant,
        model_sha256=SHA,
        pair=pair,
        order=0,
        n_prompt=0,
        n_gen=10,
        n_batch=2048,
        n_ubatch=512,
        n_threads=n_threads,
        test_time="2026-11-22T10:00:00Z",
        load_1min_before=0.1,
        samples_ns=samples_ns,
        provenance="host",
    )


def perplexity(nll: list[float], running: list[float]) -> PerplexityRow:
    return PerplexityRow(
        variant="F16",
        model_sha256=SHA,
        corpus="wikitext2-test",
        corpus_sha256=SHA,
        n_ctx=512,
        n_threads=1,
        slimpi_chunk_nll_nats=nll,
        llama_running_ppl=running,
        llama_ppl_stderr=0.1,
        provenance="host",
    )


def test_llama_perplexity_is_read() -> None:
    found = llama_tools.parse_perplexity(golden("llama_perplexity.txt"))
    assert found.running_ppl == [10.2966, 23.1885, 32.3575, 32.5836, 32.9562, 37.8858]
    assert (found.ppl, found.ppl_stderr) == (37.8858, 6.91038)
    assert found.features == FEATURES


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Final estimate", "final"),
        ("system_info", "sysinfo"),
        ("[3]32.3575,", ""),
        ("[6]37.8858,", "[6]37.8859,"),
        ("PPL = 37.8858", "PPL = nan"),
    ],
)
def test_llama_perplexity_in_another_format_is_refused(old: str, new: str) -> None:
    text = golden("llama_perplexity.txt")
    assert old in text
    with pytest.raises(SlimpiError, match="llama-perplexity"):
        llama_tools.parse_perplexity(text.replace(old, new))


def test_llama_bench_is_read() -> None:
    prefill, decode_row = llama_tools.parse_bench(golden("llama_bench.json"))
    raw = msgspec.json.decode(golden("llama_bench.json"))
    assert (prefill.n_prompt, prefill.n_gen, prefill.n_threads) == (16, 0, 1)
    assert (decode_row.n_prompt, decode_row.n_gen) == (0, 8)
    assert (prefill.n_batch, prefill.n_ubatch) == (2048, 512)
    assert prefill.samples_ns == raw[0]["samples_ns"]
    assert len(decode_row.samples_ns) == 3


def test_our_tokens_per_second_are_llama_benchs() -> None:
    """samples_ts computed from samples_ns equals what llama-bench prints, to its six digits."""
    raw = msgspec.json.decode(golden("llama_bench.json"))[1]
    ours = msgspec.structs.replace(speed("llama-bench", 0, raw["samples_ns"]), n_gen=raw["n_gen"])
    assert ours.test == "tg8"
    assert ours.samples_ts == pytest.approx(raw["samples_ts"], rel=1e-5)


@pytest.mark.parametrize("change", ["one row", "no samples", "a field is gone", "cut"])
def test_llama_bench_in_another_format_is_refused(change: str) -> None:
    rows = msgspec.json.decode(golden("llama_bench.json"))
    if change == "one row":
        rows = rows[:1]
    elif change == "no samples":
        rows[0]["samples_ns"] = []
    elif change == "a field is gone":
        del rows[1]["n_ubatch"]
    text = msgspec.json.encode(rows).decode()
    with pytest.raises(SlimpiError, match="llama-bench"):
        llama_tools.parse_bench(text[:-20] if change == "cut" else text)


def test_version_is_read() -> None:
    text = "version: 0.5.0-dev (build 1, commit 0c1e570)\nbuilt with GNU 12.2.0 for Linux x86_64\n"
    assert llama_tools.parse_version(text) == llama_tools.Build(1, "0c1e570")
    with pytest.raises(SlimpiError, match="version"):
        llama_tools.parse_version("no such thing")


def test_other_builds_are_no_peers() -> None:
    wheel = llama_tools.Wheel("0.3.36", "0c1e570-dirty", "AVX AVX2")
    llama_tools.check_same(wheel, "CPU features", wheel.features, "AVX AVX2")
    with pytest.raises(SlimpiError, match=r"CPU features: .* has AVX AVX2, the peers have AVX"):
        llama_tools.check_same(wheel, "CPU features", wheel.features, "AVX")


def test_a_folder_of_built_tools_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for tool in llama_tools.TOOLS:
        (tmp_path / "bin" / tool).touch()
    assert llama_tools.find_or_build(tmp_path) == tmp_path / "bin"


def test_tools_run_on_the_wheel_s_libraries(tmp_path: Path) -> None:
    llama_tools.link_libraries(tmp_path)
    lib = Path(str(importlib.util.find_spec("llama_cpp").submodule_search_locations[0])) / "lib"  # type: ignore[union-attr, index]
    for name in ("libllama.so.0", "libggml.so.0", "libggml-base.so.0", "libggml-cpu.so.0"):
        assert (tmp_path / name).samefile(lib / name)
    assert (tmp_path / "libllama-common.so").is_file()  # it is no part of the Python package, but comes with it


@pytest.mark.parametrize("tool", llama_tools.TOOLS)
def test_a_tool_is_compiled_from_its_own_folder(tool: str, tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match=f"no tools/{llama_tools.TOOLS[tool]}"):
        llama_tools.compiler_line(tool, tmp_path, tmp_path)
    folder = tmp_path / "tools" / llama_tools.TOOLS[tool]
    folder.mkdir(parents=True)
    for name in ("main.cpp", "README.md"):
        (folder / name).write_text("int main() {}")
    line = llama_tools.compiler_line(tool, tmp_path, tmp_path / "out")
    assert str(folder / "main.cpp") in line
    assert str(folder / "README.md") not in line
    assert line[line.index("-o") + 1] == str(tmp_path / "out" / tool)


def test_without_a_compiler_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SlimpiError, match=r"no C\+\+ compiler: no-such-compiler .* Install one"):
        llama_tools.find_or_build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failing_tool_is_one_line() -> None:
    with pytest.raises(SlimpiError, match=r"python.* failed with code 3: first \| second"):
        llama_tools.run_tool(
            [sys.executable, "-c", "import sys; print('first\\nsecond', file=sys.stderr); sys.exit(3)"]
        )
    with pytest.raises(SlimpiError, match="cannot run /nonexistent/tool"):
        llama_tools.run_tool(["/nonexistent/tool"])


def test_perplexity_ratios_are_of_running_estimates() -> None:
    nll, theirs = [1.0, 2.0, 4.5], [2.7, 4.5, 12.3]
    row = perplexity(nll, theirs)
    expected = [math.exp(sum(nll[:n]) / n) / theirs[n - 1] for n in (1, 2, 3)]
    assert row.running_ratios == pytest.approx(expected, rel=1e-14)
    (verdict,) = verdicts_of([row], [])
    assert (verdict.ratio, verdict.n) == (pytest.approx(expected[-1]), 3)
    assert (verdict.ratio_min, verdict.ratio_max) == (pytest.approx(min(expected)), pytest.approx(max(expected)))


@pytest.mark.parametrize(
    ("factor", "ok"), [(1.0, True), (1.0049, True), (0.9951, True), (1.0051, False), (0.99, False)]
)
def test_perplexity_must_agree_within_half_a_percent(factor: float, ok: bool) -> None:
    (verdict,) = verdicts_of([perplexity([3.0], [math.exp(3.0) / factor])], [])
    assert verdict.ok is ok


def test_perplexity_that_is_not_a_number_is_missed() -> None:
    (verdict,) = verdicts_of([perplexity([math.nan], [20.0])], [])
    assert not verdict.ok


def test_perplexity_over_other_chunks_is_refused() -> None:
    with pytest.raises(SlimpiError, match="slimpi scored 2 chunks, llama-perplexity 1"):
        perplexity([1.0, 1.0], [2.7])


def test_speed_ratio_is_of_medians_within_a_pair() -> None:
    """One slow repetition in three moves nothing; a pair is never mixed with another."""
    rows = [
        speed("slimpi", 0, [100, 100, 900]),
        speed("llama-bench", 0, [99, 99, 99]),
        speed("llama-bench", 1, [500, 500, 500]),
        speed("slimpi", 1, [400, 1, 400]),
        speed("slimpi", 0, [1, 1, 1], variant="F16"),
        speed("llama-bench", 0, [1, 1, 1], variant="F16"),
    ]
    assert pair_ratios(rows, "Q8_0", "tg10") == pytest.approx([0.99, 1.25])


def test_unlike_or_lone_runs_are_refused() -> None:
    with pytest.raises(SlimpiError, match="pair 0 has only \\['slimpi'\\]"):
        pair_ratios([speed("slimpi", 0, [1])], "Q8_0", "tg10")
    with pytest.raises(SlimpiError, match="n_threads is 1 in slimpi, 2 in llama-bench"):
        pair_ratios([speed("slimpi", 0, [1]), speed("llama-bench", 0, [1], n_threads=2)], "Q8_0", "tg10")


@pytest.mark.parametrize(("ours_ns", "pairs", "ok"), [(1020, 8, True), (1021, 8, False), (1000, 7, False)])
def test_speed_target(ours_ns: int, pairs: int, ok: bool) -> None:
    """1000/1020 = 0.9804 and 1000/1021 = 0.9794; fewer than eight pairs never pass."""
    rows = [speed(tool, p, [ns]) for p in range(pairs) for tool, ns in (("slimpi", ours_ns), ("llama-bench", 1000))]  # type: ignore[arg-type]
    (verdict,) = verdicts_of([], rows)
    assert (verdict.test, verdict.n, verdict.ok) == ("tg10", pairs, ok)


def test_interval_of_a_median_is_the_sign_tests() -> None:
    """Of n values, the k-th smallest and largest with P(Binomial(n, 1/2) < k) <= 2.5 %: the 1st of 8, the 6th of 20."""
    rng = random.Random(1)
    for n, k in ((8, 1), (20, 6)):
        values = [rng.gauss(1, 0.1) for _ in range(n)]
        assert interval_of_median(values) == (sorted(values)[k - 1], sorted(values)[-k])
    assert interval_of_median([1.0] * 5) == (-math.inf, math.inf)


def paired(ratios: list[float]) -> list[SpeedRow]:
    return [
        row
        for pair, ratio in enumerate(ratios)
        for row in (speed("slimpi", pair, [1_000_000]), speed("llama-bench", pair, [round(1_000_000 * ratio)]))
    ]


@pytest.mark.parametrize(
    ("ratios", "enough"),
    [
        ([1.0] * 8, True),
        ([0.9] * 8, True),
        ([1.0] * 7, False),
        ([1.0] * 7 + [0.97], False),
        ([1.0] * 8 + [0.97], True),
        ([1.0, 0.9] * 20, False),
        ([], False),
    ],
)
def test_pairs_decide_once_the_interval_leaves_the_target(ratios: list[float], enough: bool) -> None:
    assert decided(paired(ratios)) is enough


def test_pairs_end_when_they_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is always slower: eight pairs and no more, though forty are allowed."""

    def run(ns: int) -> object:
        return lambda tools, model, task, threads: [(512, 0, 2048, 512, [ns]), (0, 128, 2048, 512, [ns])]

    monkeypatch.setattr(peers, "RUNNERS", {"slimpi": run(100), "llama-bench": run(120)})
    (model,) = peers.models_from([f"this={__file__}"], peers.places())
    rows = peers.compare_throughput(Path(), model, Throughput(), pairs=40, threads=1)
    assert len(pair_ratios(rows, "this", "pp512")) == 8


def test_runs_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def fake(tool: str) -> object:
        def run(tools: Path, model: peers.Model, task: Throughput, threads: int) -> list[peers.Test]:
            done.append(tool)
            return [(task.n_prompt, 0, 2048, 512, [10, 20]), (0, task.n_gen, 2048, 512, [30, 40])]

        return run

    monkeypatch.setattr(peers, "RUNNERS", {tool: fake(tool) for tool in peers.RUNNERS})
    (model,) = peers.models_from([f"this={__file__}"], peers.places())
    rows = peers.compare_throughput(Path(), model, Throughput(), pairs=3, threads=1)
    assert done == ["slimpi", "llama-bench", "llama-bench", "slimpi", "slimpi", "llama-bench"]
    assert [(r.pair, r.order, r.tool, r.test) for r in rows[4:8]] == [
        (1, 0, "llama-bench", "pp512"),
        (1, 0, "llama-bench", "tg128"),
        (1, 1, "slimpi", "pp512"),
        (1, 1, "slimpi", "tg128"),
    ]
    assert pair_ratios(rows, "this", "pp512") == [1.0, 1.0, 1.0]


def test_results_are_read_back_as_written() -> None:
    conditions = Conditions(
        machine="m",
        cpu="c",
        cores=2,
        kernel="k",
        python="3.11",
        llama_cpp_python="0.3.36",
        wheel_commit="0c1e570-dirty",
        build_commit="0c1e570",
        build_number=1,
        features=FEATURES,
        start_time="2026-11-22T10:00:00Z",
        load_avg_before=[0.0, 0.0, 0.0],
        load_avg_after=[1.0, 1.0, 1.0],
    )
    ppl, rows = [perplexity([1.0], [2.7])], [speed("slimpi", 0, [5, 6]), speed("llama-bench", 0, [6, 7])]
    written = Peers(conditions=conditions, perplexity=ppl, throughput=rows, verdicts=verdicts_of(ppl, rows))
    read = decode(encode(written), Peers, "peers.json")
    assert read == written
    assert verdicts_of(read.perplexity, read.throughput) == read.verdicts


def test_bad_input_is_one_line_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "peers.json"
    assert peers.main(["--gguf", "Q8_0=nowhere.gguf", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert said == "peers: --gguf 'Q8_0=nowhere.gguf' is not NAME=PATH of an existing file.\n"
    assert not out.exists()
    assert peers.main(["--machine", "../elsewhere"]) == 1
    assert "'../elsewhere' is not a plain name" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        peers.main(["--pairs", "-1"])
    assert stop.value.code == 2
    assert "is not a whole number" in capsys.readouterr().err

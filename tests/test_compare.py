"""Differences are paired, unlike reports are refused, and the answer never rests on an invalid run."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.records import SlimpiError
from device.results import Facts, Measurement, Report, TaskResult
from device.schema import Artifact, Dataset, File, Perplexity, Throughput
from pipeline.answer import answer
from pipeline.compare import (
    accuracy_difference,
    loss_percent,
    paired_difference,
    pareto,
    perplexity,
    rows,
)
from pipeline.paired import Difference
from pipeline.table import show

CORPUS = File(path="c/text.txt", sha256="c" * 64, size_bytes=10)


def facts(**changes: object) -> Facts:
    base = Facts(
        time_unix_s=1.7e9, machine="aarch64", board="Raspberry Pi 4 Model B", cpu="Cortex-A72", cores=4, os="Debian",
        kernel="6.6", python="3.11", page_size_bytes=4096, mem_total_bytes=2**33, mem_available_bytes=2**32,
        swap_used_bytes=0, load_1min=0.0, cpu_busy_percent=0.0,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def report(
    variant: str,
    nll: list[float],
    size_mib: int = 100,
    decode: float = 10.0,
    threads: int = 4,
    n_ctx: int = 512,
    warnings: tuple[str, ...] = (),
    model: str = "m",
) -> Report:
    entry = File(path="m.gguf", sha256="a" * 64, size_bytes=size_mib * 2**20)
    artifact = Artifact(
        id=f"{model}-{variant}", name=f"{model}-{variant}", model=model, variant=variant, kind="gguf", task="lm",
        entry="m.gguf", files=[entry], reference=variant == "F16", tokenizer_sha256="b" * 64, n_weights=1,
        n_linear_weights=1, bits_per_weight=4.0, bits_per_linear_weight=4.0, size_bytes=entry.size_bytes, plan={},
    )  # fmt: skip

    def measured(metric: str, unit: str, samples: list[float], up: bool, **conditions: object) -> Measurement:
        return Measurement(
            metric=metric, unit=unit, samples=samples, higher_is_better=up, conditions=conditions, provenance="measured"
        )

    quality = TaskResult(
        task=Perplexity(dataset=Dataset(name="text", file=CORPUS)),
        status="ok",
        measurements=[measured("nll", "nats/token", nll, False, n_ctx=n_ctx, corpus_sha256=CORPUS.sha256)],
        facts_before=facts(),
        facts_after=facts(),
        duration_s=1.0,
    )
    speed = msgspec.structs.replace(
        quality,
        task=Throughput(),
        measurements=[
            measured("prefill_tokens_per_s", "token/s", [20.0] * 3, True, n_prompt=512),
            measured("decode_tokens_per_s", "token/s", [decode] * 3, True, n_gen=128),
        ],
        warnings=list(warnings),
    )
    return Report(job_id="j", artifact=artifact, threads=threads, provenance="measured", results=[quality, speed])


REFERENCE = [3.0, 2.9, 3.2, 3.1, 2.8, 3.05]
WORSE = [x + d for x, d in zip(REFERENCE, [0.20, 0.21, 0.19, 0.2, 0.22, 0.2], strict=True)]
SAME = [x + d for x, d in zip(REFERENCE, [0.01, -0.012, 0.008, -0.009, 0.002, -0.001], strict=True)]


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=40))
def test_paired_interval_equals_its_textbook_twin(pairs: list[tuple[float, float]]) -> None:
    from scipy import stats

    ours, reference = [a for a, _ in pairs], [b for _, b in pairs]
    got = paired_difference(ours, reference, "nats")
    deltas = [a - b for a, b in pairs]
    mean = math.fsum(deltas) / len(deltas)
    variance = math.fsum((d - mean) ** 2 for d in deltas) / (len(deltas) - 1)
    half = stats.t.ppf(0.975, len(deltas) - 1) * math.sqrt(variance / len(deltas))
    assert got.mean == pytest.approx(mean, abs=1e-12)
    assert (got.low, got.high) == pytest.approx((mean - half, mean + half), abs=1e-9)


def test_paired_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        hard = rng.normal(3, 0.5, 8)  # chunks differ far more among themselves than variants do
        got = paired_difference(hard + 0.05 + rng.normal(0, 0.02, 8), hard, "nats")
        hits += got.low <= 0.05 <= got.high
    assert 0.935 <= hits / 2000 <= 0.965


def test_accuracy_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(2000):
        u = rng.random(160)
        reference = (u < 0.8).astype(float)
        ours = np.where(rng.random(160) < 0.03, 1 - reference, reference)
        truth = 100 * (0.03 * 0.2 - 0.03 * 0.8)
        got = accuracy_difference(list(ours), list(reference))
        hits += got.low <= truth <= got.high
    assert hits / 2000 >= 0.93


def test_accuracy_difference_counts_flips_and_keeps_width_without_any() -> None:
    got = accuracy_difference([1, 0, 1, 1], [1, 1, 0, 1])
    assert (got.flips_worse, got.flips_better, got.mean) == (1, 1, 0.0)
    none = accuracy_difference([1.0] * 100, [1.0] * 100)
    assert none.low < 0 < none.high
    assert not none.significant


def test_perplexity_and_its_error() -> None:
    value, error = perplexity(report("F16", REFERENCE).results[0].measurements[0])
    assert value == pytest.approx(np.exp(np.mean(REFERENCE)))
    assert error == pytest.approx(value * np.std(REFERENCE, ddof=1) / np.sqrt(len(REFERENCE)))


def test_loss_in_percent_is_the_ratio_of_perplexities() -> None:
    loss = loss_percent(paired_difference(WORSE, REFERENCE, "nats"))
    assert loss.mean == pytest.approx(100 * (np.exp(np.mean(WORSE)) / np.exp(np.mean(REFERENCE)) - 1))
    assert loss.significant


def test_overlapping_interval_says_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    show(rows([report("F16", REFERENCE), report("Q6_K", SAME, 60), report("Q2_K", WORSE, 30)]))
    lines = capsys.readouterr().out.splitlines()
    (same,) = [line for line in lines if "Q6_K" in line and "│" in line]
    (worse,) = [line for line in lines if "Q2_K" in line and "│" in line]
    assert "no difference" in same
    assert "no difference" not in worse


@pytest.mark.parametrize("change", [{"threads": 2}, {"n_ctx": 1024}])
def test_unlike_reports_are_refused_by_name(change: dict[str, int]) -> None:
    with pytest.raises(SlimpiError, match="not comparable: .*" + next(iter(change))):
        rows([report("F16", REFERENCE), report("Q4_0", WORSE, **change)])


def test_other_tokenizer_board_provenance_and_corpus_are_refused() -> None:
    good = report("F16", REFERENCE)
    other = report("Q4_0", WORSE)
    replace = msgspec.structs.replace
    result = other.results[0]
    elsewhere = replace(result.measurements[0], conditions={"n_ctx": 512, "corpus_sha256": "d" * 64})
    for changed in (
        replace(other, artifact=replace(other.artifact, tokenizer_sha256="e" * 64)),
        replace(other, provenance="emulated"),
        replace(other, results=[replace(result, facts_before=facts(board="Raspberry Pi 5"))]),
        replace(other, results=[replace(result, measurements=[elsewhere])]),
    ):
        with pytest.raises(SlimpiError, match="not comparable"):
            rows([good, changed])


def test_two_models_may_share_a_table() -> None:
    assert len(rows([report("F16", REFERENCE), report("F16", WORSE, n_ctx=256, model="other")])) == 2


def test_unequal_sample_counts_are_refused() -> None:
    with pytest.raises(SlimpiError, match="cannot pair 5 samples with 6"):
        rows([report("F16", REFERENCE), report("Q4_0", WORSE[:5])])


def test_answer_is_the_smallest_without_loss_and_skips_invalid_runs() -> None:
    reports = [report("F16", REFERENCE, 270, 5.0), report("Q6_K", SAME, 110, 9.0), report("Q2_K", WORSE, 60, 12.0)]
    text = "\n".join(answer(rows(reports)))
    assert "smallest without a measurable loss is Q6_K" in text
    assert "fastest is Q2_K" in text
    reports[1] = report("Q6_K", SAME, 110, 99.0, warnings=("throttled",))
    text = "\n".join(answer(rows(reports)))
    assert "fastest is Q2_K" in text
    assert "Q6_K (110.0 MiB, 20 prefill, 99.0 decode token/s (not valid)" in text


def _lossy(percent: float) -> list[float]:
    """Every chunk's perplexity is larger by so much, and a thousandth more or less."""
    return [x + math.log1p(percent / 100) + d for x, d in zip(REFERENCE, [0.001, -0.001] * 3, strict=True)]


def test_what_an_accepted_loss_buys_is_told_once_and_never_beyond_it() -> None:
    reports = [report("F16", REFERENCE, 270, 5.0), report("Q8_0", SAME, 140, 7.0)]
    reports += [report("Q4_K_M", _lossy(4), 100, 9.0), report("Q4_0", _lossy(8), 110, 12.0)]
    reports += [report("IQ3_M", _lossy(9), 80, 6.0), report("Q2_K", _lossy(60), 60, 13.0)]
    said = answer(rows(reports))
    assert said[0].startswith("m: smallest without a measurable loss is Q8_0 (140.0 MiB")
    assert said[1].startswith("m: at most 5 % of perplexity lost: smallest is Q4_K_M (100.0 MiB")
    assert "; fastest is Q4_K_M (" in said[1]
    assert said[2].startswith("m: at most 10 % of perplexity lost: smallest is IQ3_M (80.0 MiB")
    assert "; fastest is Q4_0 (110.0 MiB" in said[2]
    assert said[3].startswith("m: fastest is Q2_K")  # a loss of 60 % is nobody's to accept unasked
    assert len(said) == 4


def test_a_loss_is_accepted_by_the_bad_end_of_its_interval() -> None:
    vague = [x + d for x, d in zip(REFERENCE, [0.03, 0.05, 0.03, 0.05, 0.03, 0.05], strict=True)]
    said = answer(rows([report("F16", REFERENCE, 270), report("Q4_0", vague, 60)]))
    assert "+4.1 % ppl [+2.9, +5.3]" in said[1]
    assert said[1].startswith("m: at most 10 % of perplexity lost")


def test_points_of_accuracy_are_no_percent_of_perplexity() -> None:
    """A row whose perplexity failed has its loss in zero-shot answers."""
    reference, four, other = rows(
        [report("F16", REFERENCE, 270), report("Q4_K_M", _lossy(4), 100), report("Q2_K", _lossy(4), 60)]
    )
    other = replace(other, loss=Difference(-4.5, -4.6, -4.4, 600, "points"))
    said = answer([reference, four, other])
    assert said[1].startswith("m: at most 5 % of perplexity lost: smallest is Q4_K_M")


def test_no_speed_of_an_emulated_machine_or_an_invalid_run_is_bought() -> None:
    slow = [report("F16", REFERENCE, 270, 5.0), report("Q4_0", _lossy(4), 60, 12.0, warnings=("throttled",))]
    assert "fastest is" not in answer(rows(slow))[1]
    guests = [msgspec.structs.replace(r, provenance="emulated") for r in (slow[0], report("Q4_0", _lossy(4), 60, 12.0))]
    said = answer(rows(guests))
    assert said[1].startswith("m: at most 5 % of perplexity lost: smallest is Q4_0")
    assert not any("fastest is Q4_0" in line for line in said)


def test_an_unstable_time_to_load_is_told_and_leaves_the_speed_valid(capsys: pytest.CaptureFixture[str]) -> None:
    loading = "load_ms is unstable: standard deviation 31% of the mean"
    (row,) = rows([report("F16", REFERENCE, 270, 5.0, warnings=(loading,))])
    assert row.speed_valid
    assert "fastest is F16" in "\n".join(answer([row]))
    show([row])
    assert f"throughput: {loading}" in capsys.readouterr().out
    (row,) = rows([report("F16", REFERENCE, 270, 5.0, warnings=(loading, "throttled at the time of the run"))])
    assert not row.speed_valid


def test_of_notes_about_blocks_the_first_is_shown_and_the_rest_counted(capsys: pytest.CaptureFixture[str]) -> None:
    plain, noted = report("F16", REFERENCE), report("Q4", SAME)
    notes = ["dequantized from Q4_1", *(f"blk.{i}: {i + 1} of 4 folds not scaled" for i in range(30))]
    noted = msgspec.structs.replace(noted, artifact=msgspec.structs.replace(noted.artifact, notes=notes))
    show(rows([plain, noted]))
    text = capsys.readouterr().out
    assert "m: dequantized from Q4_1" in text
    assert "m-Q4: blk.0: 1 of 4 folds not scaled (and 29 more such notes, in its manifest.json)" in text
    assert "blk.1:" not in text


def test_answer_says_so_when_nothing_is_usable() -> None:
    assert "nothing can be recommended" in answer(rows([report("Q4_0", WORSE)]))[0]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_pareto_keeps_exactly_the_unbeaten(points: list[tuple[int, int]]) -> None:
    reports = [report("F16", REFERENCE, 1000)]
    reports += [report(f"V{i}", [x + loss / 10 for x in REFERENCE], size) for i, (size, loss) in enumerate(points)]
    front = pareto(rows(reports))
    naive = {
        f"m-V{i}"
        for i, (size, loss) in enumerate(points)
        if not any((s, q) != (size, loss) and s <= size and q <= loss for s, q in points)
    }
    assert front - {"m-F16"} == naive
    assert ("m-F16" in front) == all(loss > 0 for _, loss in points)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(SlimpiError, match="nothing to compare"):
        rows([])


def test_devices_have_their_own_sections_answers_and_losses(capsys: pytest.CaptureFixture[str]) -> None:
    """Two boards may differ in everything; neither's reference serves the other."""
    one = rows([report("F16", REFERENCE, 270, 5.0), report("Q6_K", SAME, 110, 9.0)], "pi@one")
    two = rows([report("Q6_K", WORSE, 110, 3.0, threads=2, n_ctx=256)], "pi@two")
    assert two[0].loss is None
    assert two[0].loss_note == "no reference measured"
    show([*one, *two])
    said = capsys.readouterr().out
    assert said.count("│ pi@one: m") == said.count("│ pi@two: m") == 1
    text = "\n".join(answer([*one, *two]))
    assert "pi@one, m: fastest is Q6_K" in text
    assert "pi@two, m: no loss was measured" in text
    assert "pi@two, m: fastest is Q6_K" in text


def test_provenances_never_share_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    board = report("F16", REFERENCE)
    guest = msgspec.structs.replace(report("F16", REFERENCE, decode=999.0), provenance="emulated")
    show([*rows([board], "pi"), *rows([guest], "emulated")])
    said = capsys.readouterr().out
    assert said.count("┏") == said.count("┃ variant") == 2
    assert "EMULATED" in said
    assert "emulated, m: which is fastest an emulated machine cannot tell" in said


def test_names_with_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    odd = report("F16", REFERENCE)
    odd = msgspec.structs.replace(
        odd, results=[msgspec.structs.replace(r, facts_before=facts(board="[/bold]x[red")) for r in odd.results]
    )
    show(rows([odd], "[/]"))
    assert "[/bold]x[red" in capsys.readouterr().out


def test_a_hopeless_model_has_a_perplexity_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    show(rows([report("F16", REFERENCE), report("Q2_K", [x + 2000 for x in REFERENCE])]))
    assert "Q2_K" in capsys.readouterr().out


def test_a_wide_interval_recommends_nothing() -> None:
    vague = [x + d for x, d in zip(REFERENCE, [0.5, -0.4, 0.3, -0.5, 0.4, 0.0], strict=True)]
    text = "\n".join(answer(rows([report("F16", REFERENCE), report("Q2_K", vague, 30)])))
    assert "smallest without a measurable loss is F16" in text
    assert "too few samples to judge Q2_K" in text

"""benchmarks/prune_table.py: which variants are measured, and what is concluded from rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import bench_quality
import llama_tools
import msgspec
import prune_table
import pytest
from prune_rows import Accuracy, Maker, PruneRow, Pruning, SpeedPair, line, merged, table, verdict_line, verdicts_of
from prune_subjects import SUBJECTS, Subject
from quality_rows import Score
from test_prune import tiny_recipe
from tiny_models import save_tiny

from device.records import read_record
from pipeline import sources
from pipeline.build import build
from pipeline.jobs import describe_dataset
from pipeline.progress import Progressor
from pipeline.recipes import read_recipe
from pipeline.recordings import Recording
from pipeline.store import Places, load_artifact
from pipeline.variants import parse_variant


def row(
    variant: str,
    nll: list[float],
    size: int = 1000,
    maker: Maker = "slimpi",
    speed: tuple[float, ...] = (),
    reference: float = 3.0,
) -> PruneRow:
    score = Score(
        corpus="c",
        corpus_sha256="0" * 64,
        reference_sha256="0" * 64,
        n_ctx=8,
        n_threads=1,
        n_tokens=100,
        kld_chunks=[0.1] * len(nll),
        same_top_chunks=[0.9] * len(nll),
        nll_chunks=nll,
        reference_nll_chunks=[reference] * len(nll),
        kld_stderr=0.0,
        kld_median=0.1,
        kld_p99=0.2,
        kld_max=0.3,
        ln_ppl_ratio=0.0,
        ln_ppl_ratio_stderr=0.0,
        measured_s=1.0,
        provenance="host",
    )
    return PruneRow(
        model="m",
        variant=variant,
        maker=maker,
        file_sha256="0" * 64,
        size_bytes=size,
        n_weights=size,
        n_linear_weights=size,
        score=score,
        notes=[],
        speed=[SpeedPair(whole_tps=10.0, pruned_tps=tps) for tps in speed],
        accuracy=[],
    )


@pytest.mark.parametrize("model", [*SUBJECTS, "another"])
def test_every_candidate_is_a_variant(model: str) -> None:
    """A whole run has every way at every share, repaired and not, and the whole model in what pruned ones are in."""
    options = prune_table._parser().parse_args([])
    subject = prune_table.subject_of(model, options)
    names = prune_table.candidates(subject, options)
    specs = [parse_variant(name) for name in names]
    assert len(names) == len(set(names))
    assert {spec.prune.percent for spec in specs if spec.prune} >= {10, 20, 30}
    assert {spec.name for spec in specs if not spec.prune} == set(subject.crossed)
    for way in subject.ways:
        assert sum(bool(spec.prune and spec.prune.pruner == way and spec.name == subject.type) for spec in specs) >= 6
    assert set(subject.timed_variants()) <= set(names)


def test_options_take_a_part_of_a_whole_run() -> None:
    def of(*argv: str) -> tuple[list[str], prune_table.Subject]:
        options = prune_table._parser().parse_args(argv)
        subject = prune_table.subject_of("qwen2.5-coder-1.5b", options)
        return prune_table.candidates(subject, options), subject

    assert of("--ours", "LAYERS-5-Q8_0")[0] == ["LAYERS-5-Q8_0"]
    names, subject = of("--pruner", "hidden", "--percent", "5", "--type", "F16", "--limit", "0", "--choices", "none")
    assert names == ["HIDDEN-5-F16", "HIDDEN+REPAIR-5-F16"]
    assert (subject.questions, subject.n_questions, subject.n_chunks) == ((), 0, 6)
    assert of("--choices", "boolq")[1].questions == ("boolq",)
    names, subject = of("--percent", "20")
    assert {parse_variant(name).prune.percent for name in names if parse_variant(name).prune} == {20}  # type: ignore[union-attr]


def test_the_best_repaired_file_of_their_bytes_is_compared_with_their_best() -> None:
    rows = [
        row("F16", [2.0, 2.0], size=1200),
        row("prune-layers-run-20-F16", [3.0, 3.2], maker="llama-quantize"),
        row("prune-layers-influence-20-F16", [3.3, 3.5], maker="llama-quantize"),
        row("LAYERS-20-F16", [2.0, 2.1]),  # not repaired
        row("WIDTHS+REPAIR-20-F16", [2.2, 2.4], size=1100),  # larger
        row("WIDTH+REPAIR-20-F16", [2.5, 2.6], size=1000),
        row("LAYERS+REPAIR-20-F16", [2.8, 2.9]),
        row("LAYERS+REPAIR-30-F16", [2.9, 2.9]),  # nothing to compare with
        row("WIDTH+REPAIR-20-Q4_K_M", [2.4, 2.5], size=500),  # another type
        row("HIDDEN+REPAIR-20-F16", [2.4, 2.5], reference=3.001),  # on a machine whose reference differs
    ]
    (verdict,) = verdicts_of(rows)
    assert (verdict.variant, verdict.peer, verdict.percent) == ("WIDTH+REPAIR-20-F16", "prune-layers-run-20-F16", 20)
    assert verdict.ok
    assert verdict.high is not None
    assert verdict.high > -0.55 > (verdict.low or 0)
    assert "ok" in verdict_line(verdict)
    (missed,) = verdicts_of([*rows[:3], row("WIDTH+REPAIR-20-F16", [3.1, 3.2])])
    assert not missed.ok


def test_speed_is_the_gain_over_the_share_that_is_gone() -> None:
    """A fifth less, a quarter faster: 1.25; a fifth less, a tenth faster: 0.5."""
    whole = row("F16", [2.0], size=1000)
    fast, slow = (row("LAYERS-20-F16", [2.0], size=800, speed=tps) for tps in ((12.5, 12.5, 9.0), (11.0, 11.0, 11.0)))
    (verdict,) = verdicts_of([whole, fast])
    assert (verdict.what, verdict.ok, verdict.ratio) == ("speed", True, pytest.approx(1.25))
    (verdict,) = verdicts_of([whole, slow])
    assert (verdict.ok, verdict.ratio) == (False, pytest.approx(0.5))


def test_rows_replace_each_other_and_are_listed() -> None:
    old, new = row("LAYERS-20-GPTQ-Q4_0", [2.0]), row("LAYERS-20-GPTQ-Q4_0", [2.5])
    rows = merged(merged([row("F16", [2.0])], old), new)
    assert [r.score.nll_chunks for r in rows] == [[2.0], [2.5]]
    assert rows[1].percent == 20
    assert len(table(rows)) == 3


def test_questions_that_are_not_there_are_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "prune.json"
    assert prune_table.main(["--choices", "path:nowhere.jsonl", "--out", str(out)]) == 1
    assert "nowhere.jsonl is not a file" in capsys.readouterr().err
    assert not out.exists()


def test_answers_are_averaged_over_what_all_were_asked() -> None:
    def asked(variant: str, **correct: list[float]) -> PruneRow:
        sets = [
            Accuracy(questions=name, questions_sha256="0" * 64, correct=c, correct_norm=c, peak_rss_bytes=2**20)
            for name, c in correct.items()
        ]
        return msgspec.structs.replace(row(variant, [3.0]), accuracy=sets)

    easy, hard = [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]
    rows = [asked("F16", arc=easy, swag=hard), asked("LAYERS-10-F16", arc=easy), row("LAYERS-20-F16", [3.0])]
    lines = table(rows)
    assert ["75.0" in text for text in lines] == [False, True, True, False, False]
    assert lines[-1] == "m: acc_norm is the mean over arc"
    assert "37.5" in line(rows[0])
    (less,) = (text for text in table([rows[0], asked("LAYERS-20-F16", arc=[1.0, 0.0, 1.0, 0.0])]) if "LAYERS" in text)
    assert " 50.0 ±28.9 (-25.0 ±25.0) %" in less  # one of four questions, which the whole model knew
    further = line(asked("LAYERS-20-F16", arc=[1.0, 0.0]), None, rows[0])
    assert " 50.0 ±50.0 (-50.0 ±50.0) %" in further  # of the two that both were asked
    assert "nan" in line(asked("F16", arc=[1.0]))
    assert "acc_norm is" not in "".join(table(rows[2:]))


def test_llama_quantize_drops_the_layers_that_our_pruners_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chosen once: our variants of the same pruner take the choice from its stage, and it is not run for a file that
    is there."""
    save_tiny("llama-tied", tmp_path / "hf")
    recipe = tiny_recipe(tmp_path / "hf", ["BF16", "LAYERS_RUN-50-BF16", "LAYERS_INFLUENCE-50-BF16"])
    where, progress, told = Places(tmp_path / "home"), Progressor(plain=True), list[list[str]]()
    bench = bench_quality.Bench(
        recipe,
        [],
        sources.fetch(recipe.source, "", where.sources),
        describe_dataset(recipe.calibration.text, where),
        where,
        1,
        False,
        progress,
    )

    def run(argv: list[str]) -> None:
        told.append(argv)
        shutil.copyfile(argv[-3], argv[-2])

    monkeypatch.setattr(llama_tools, "find_or_build", lambda folder: tmp_path)
    monkeypatch.setattr(llama_tools, "run_tool", run)
    options = prune_table._parser().parse_args([])
    files = prune_table.peer_files(bench, 50, "BF16", options)
    assert list(files) == ["prune-layers-influence-50-BF16", "prune-layers-run-50-BF16"]
    assert prune_table.peer_files(bench, 50, "BF16", options) == files
    by_influence, by_run = ([int(index) for index in argv[2].split(",")] for argv in told)
    assert by_run == [by_run[0], by_run[0] + 1]
    capsys.readouterr()
    _, run_folder, influence_folder = build(recipe, where, progress)
    assert "choose what goes" not in capsys.readouterr().err
    for folder, gone in ((run_folder, by_run), (influence_folder, by_influence)):
        (step,) = (step for step in load_artifact(folder).lineage if step.action == "prune")
        assert [index for index, groups in enumerate(step.settings["kv_groups"]) if not groups] == gone
    capsys.readouterr()
    others = ["LAYERS_INFLUENCE-25-BF16", "BF16", "nonsense", "LAYERS_RUN-25-BF16", "LAYERS_INFLUENCE+REPAIR-75-BF16"]
    prune_table.choose_together(bench, "layers_influence", others)
    said = capsys.readouterr().err
    assert [f"choose what goes by {name}" in said for name in ("LAYERS_INFLUENCE-25", "LAYERS_INFLUENCE-75")] == [
        True
    ] * 2
    assert "LAYERS_RUN" not in said, "another pruner's turn comes later"


@pytest.fixture
def whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[int]]:
    """Arguments of a run of a tiny model in which llama-quantize drops nothing and all files score and are timed alike;
    and the chunks of each recording that was measured on."""
    save_tiny("llama", tmp_path / "hf")
    (tmp_path / "tiny.toml").write_text(
        f'name = "tiny"\nsource = "path:{tmp_path / "hf"}"\nexport = "gguf"\nvariants = ["BF16"]\n'
        "[calibration]\nn_ctx = 64\nn_chunks = 4\n[prune]\nmeasured = 2\nfitted = 8\n[golden]\nn = 4\nn_tokens = 16\n"
    )
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"context": "A stone", "choices": [" falls", " sings"], "answer": 0}\n' * 3)
    subject = Subject("BF16", ("layers_influence",), ("layers_influence",), ("Q8_0",), timed=("layers_influence",))
    monkeypatch.setitem(SUBJECTS, "tiny", subject)
    monkeypatch.setenv("SLIMPI_HOME", str(tmp_path))
    monkeypatch.setattr(llama_tools, "find_or_build", lambda folder: tmp_path)
    run_tool = llama_tools.run_tool

    def run(argv: list[str]) -> object:
        return shutil.copyfile(argv[-3], argv[-2]) if argv[0].endswith("llama-quantize") else run_tool(argv)

    measured: list[int] = []

    def measure(bench: Any, folder: Path, recording: Recording) -> Score:
        measured.append(recording.n_chunks)
        against = {"corpus_sha256": recording.text.file.sha256, "n_ctx": recording.n_ctx}
        nll = [3.0] * recording.n_chunks
        return msgspec.structs.replace(row("", nll).score, **against, reference_nll_chunks=recording.nll)

    monkeypatch.setattr(llama_tools, "run_tool", run)
    monkeypatch.setattr(prune_table, "speed_of", lambda *_: [SpeedPair(whole_tps=10.0, pruned_tps=30.0)])
    monkeypatch.setattr(bench_quality, "measure", measure)
    argv = [str(tmp_path / "tiny.toml"), "--percent", "50", "--text", "demo:prose_test.txt", "--n-ctx", "64"]
    argv += ["--choices", f"path:{questions}", "--limit", "2", "--out", str(tmp_path / "prune.json"), "--discard"]
    return [*argv, "--chunks", "3"], measured


def test_a_whole_run_and_what_is_not_measured_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    whole_run: tuple[list[str], list[int]],
) -> None:
    """Theirs at every share, ours at every share, the whole model in what ours are in, and speeds; then nothing."""
    argv, measured = whole_run
    out = tmp_path / "prune.json"
    code = prune_table.main(argv)
    said = capsys.readouterr()
    assert out.is_file(), said.err
    found = read_record(out, Pruning)
    assert [r.variant for r in found.rows] == [
        "prune-layers-influence-50-BF16",
        "prune-layers-run-50-BF16",
        "BF16",
        "LAYERS_INFLUENCE-50-BF16",
        "LAYERS_INFLUENCE+REPAIR-50-BF16",
        "Q8_0",
        "LAYERS_INFLUENCE+REPAIR-50-Q8_0",
    ], said.err
    assert [len(r.accuracy[0].correct) for r in found.rows] == [2] * 7
    assert [r.variant for r in found.rows if r.speed] == ["LAYERS_INFLUENCE+REPAIR-50-BF16"]
    assert {v.what for v in found.verdicts} == {"quality", "speed"}
    assert code == (0 if all(v.ok for v in found.verdicts) else 1)
    assert variants_on_disk(tmp_path) == ["BF16"]  # --discard
    stages = tmp_path / "models" / "artifacts" / ".stages"
    assert not list(stages.glob("tiny-layers*")) and list(stages.glob("tiny-choice-*")), "pruned models, not choices"
    for name in ("speed_of", "accuracy_of"):
        monkeypatch.setattr(prune_table, name, None)  # called again, it would fail
    assert measured == [3] * 7
    killed = ["LAYERS_INFLUENCE+REPAIR-50-BF16"]  # before it discarded that
    build(read_recipe(tmp_path / "tiny.toml"), Places(tmp_path), Progressor(plain=True), 1, killed)
    built: list[str] = []

    def build_noted(*args: Any) -> list[Path]:
        built.extend(args[4])
        return build(*args)

    monkeypatch.setattr(prune_table, "build", build_noted)
    assert prune_table.main(argv) == code
    assert read_record(out, Pruning).rows == found.rows
    assert built == ["BF16"], "for llama-quantize's files"
    assert len(measured) == 7
    assert variants_on_disk(tmp_path) == ["BF16"]
    prune_table.main([*argv, "--chunks", "2"])
    assert measured[7:] == [2] * 7, "of another number of chunks no row is known"
    again = read_record(out, Pruning).rows
    assert [len(r.score.nll_chunks) for r in again] == [2] * 7
    assert [(r.speed, r.accuracy) for r in again] == [(r.speed, r.accuracy) for r in found.rows]


def variants_on_disk(home: Path) -> list[str]:
    return [load_artifact(p).variant for p in sorted((home / "models" / "artifacts").glob("tiny-*"))]

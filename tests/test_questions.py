"""Sets of questions on the host: the harness's prompts, where they come from, and their place in jobs and tables."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import msgspec
import pyarrow as pa
import pytest
from fakes import World, artifact
from jobs import choices
from pyarrow import parquet
from test_compare import REFERENCE, facts
from test_compare import report as nll_report

from device.records import SlimpiError
from device.results import Measurement, Report, TaskResult
from device.schema import Choices, Dataset, File, Question
from pipeline import fit, questions
from pipeline.answer import answer
from pipeline.compare import rows
from pipeline.compare_choices import describe_choices
from pipeline.jobs import bench_settings, describe_questions, tasks_for
from pipeline.questions import DEMO, SETS, read
from pipeline.recipes import Bench
from pipeline.store import Places
from pipeline.table import show

LETTERED = {"choices": {"text": ["wool", "sand"], "label": ["A", "B"]}, "answerKey": "B"}
NUMBERED = {"choices": {"text": ["wool", "sand"], "label": ["1", "2"]}, "answerKey": "2"}
ARC = Question(context="Question: What fills a dune?\nAnswer:", choices=["wool", "sand"], answer=1)
OPEN = Question(context="A dune is made of", choices=["wool", "sand"], answer=1)
BOOL = Question(context="Dunes move.\nQuestion: do dunes move?\nAnswer:", choices=["no", "yes"], answer=1)
SENTENCE = "The dune hid the _ as it grew."
BLANK = Question(context=["The dune hid the wool", "The dune hid the tent"], choices=["as it grew."] * 2, answer=1)
SWAG = Question(
    context="Raking sand: A man rakes. The Man", choices=["sleeps. Then he eats.", " stops, at last."], answer=1
)


def stored(context: str, texts: list[str], gold: int) -> dict[str, Any]:
    """A row in the data folder's layout."""
    return {"id": "x-1", "context": context, "choices": texts, "gold": gold, "note": "more"}


LAYOUTS: list[tuple[str, dict[str, Any], Question]] = [
    ("arc_easy", stored("What fills a dune?", ["wool", "sand"], 1), ARC),
    ("arc_easy", {"id": "1", "question": "What fills a dune?", **LETTERED}, ARC),
    ("arc_challenge_val", {"id": "1", "question": "What fills a dune?", **NUMBERED}, ARC),
    ("openbookqa", stored("A dune is made of", ["wool", "sand"], 1), OPEN),
    ("openbookqa", {"question_stem": "A dune is made of", **LETTERED}, OPEN),
    ("boolq", stored("Dunes move.\nQuestion: do dunes move?\nAnswer:", ["no", "yes"], 1), BOOL),
    ("boolq", {"passage": "Dunes move.", "question": "do dunes move", "answer": True}, BOOL),
    ("winogrande", stored(SENTENCE, ["wool", "tent"], 1), BLANK),
    ("winogrande", {"sentence": SENTENCE, "option1": "wool", "option2": "tent", "answer": "2"}, BLANK),
    ("hellaswag_1000", stored(SWAG.contexts[0], SWAG.choices, 1), SWAG),
]  # fmt: skip
SWAG_ROW = {
    "activity_label": "Raking sand",
    "ctx_a": "A man rakes.",
    "ctx_b": "the man",
    "ctx": "A man rakes. the man",
    "endings": ["sleeps [title] Then he  eats.", "[substeps] stops, at last."],
    "label": "1",
}


def parsed(path: Path, name: str) -> list[Question]:
    return list(questions.parse(path, SETS[name]))


@pytest.mark.parametrize(("name", "row", "expected"), LAYOUTS, ids=lambda v: v if isinstance(v, str) else "")
def test_rows_become_the_harness_prompts(tmp_path: Path, name: str, row: dict[str, Any], expected: Question) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    assert parsed(tmp_path / "rows.jsonl", name) == [expected] * 2
    assert parsed(tmp_path / "rows.jsonl.gz", name) == [expected] * 2


def test_hellaswag_loses_its_marks(tmp_path: Path) -> None:
    """The capital of ctx_b is Python's capitalize, the space that [substeps] leaves stays, as in the harness."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(SWAG_ROW), encoding="utf-8")
    (found,) = parsed(tmp_path / "rows.jsonl", "hellaswag")
    assert found.context == "Raking sand: A man rakes. The man"
    assert found.choices == ["sleeps. Then he eats.", " stops, at last."]
    assert found.answer == 1


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("arc_easy", {}),
        ("arc_easy", {"question": "q", **LETTERED, "answerKey": "C"}),
        ("arc_easy", stored("q", ["only one"], 0)),
        ("arc_easy", stored("q", ["a", "b"], 2)),
        ("arc_easy", stored("q", ["a", ""], 0)),
        ("openbookqa", {"question_stem": "q", "choices": None, "answerKey": "A"}),
        ("winogrande", stored("no blank here", ["a", "b"], 0)),
        ("winogrande", stored("nothing after _", ["a", "b"], 0)),
        ("hellaswag", SWAG_ROW | {"label": ""}),
        ("boolq", {"passage": "p", "question": "q", "answer": None}),
    ],
    ids=str,
)
def test_rows_that_are_wrong_are_named(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(SlimpiError, match=r"row 1 of .*rows\.jsonl is no question of its set"):
        parsed(tmp_path / "rows.jsonl", name)


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff\xfe", b'{"id": 1}\n\n'])
def test_raw_files_that_are_no_rows_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(data)
    (tmp_path / "rows.jsonl.gz").write_bytes(data)
    (tmp_path / "rows.parquet").write_bytes(data)
    for path in tmp_path.iterdir():
        with pytest.raises(SlimpiError, match=r"rows\."):
            parsed(path, "arc_easy")


COUNTS = {
    "arc_easy": 2376, "arc_easy_val": 570, "arc_challenge": 1172, "arc_challenge_val": 299, "openbookqa": 500,
    "openbookqa_val": 500, "hellaswag_1000": 1000, "hellaswag_unmarked": 10042, "winogrande": 1267, "boolq": 3270,
}  # fmt: skip


def test_the_real_files_are_read_whole(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as SOURCES.md beside the data says."""
    monkeypatch.setenv("SLIMPI_DATA", str(data_dir))
    assert {name: len(read(name, tmp_path)) for name in SETS if SETS[name].path} == COUNTS
    first = read("winogrande", tmp_path)[0]
    assert first.context == [f"Sarah was a much better surgeon than Maria so {who}" for who in ("Sarah", "Maria")]
    assert all(question.contexts[0].endswith("\nAnswer:") for question in read("boolq", tmp_path))


def test_the_projects_own_questions(tmp_path: Path) -> None:
    own = read(DEMO, tmp_path)
    assert len(own) == 10
    assert len({question.context for question in own}) == 10
    assert {question.answer for question in own} == {0, 1, 2, 3}
    assert all(len(set(question.choices)) == 4 for question in own)


def test_specs_that_name_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMPI_DATA", str(tmp_path))
    with pytest.raises(SlimpiError, match=r"no set of questions 'arc_hard'.*arc_easy"):
        read("arc_hard", tmp_path)
    with pytest.raises(SlimpiError, match=r"hellaswag_1000 are on no hub: put them at choices/hellaswag\.jsonl"):
        read("hellaswag_1000", tmp_path)
    (tmp_path / "choices").mkdir()
    (tmp_path / "choices" / "arc_easy.jsonl").write_text("other")
    with pytest.raises(SlimpiError, match="expected 4d05b103"):
        read("arc_easy", tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(SlimpiError, match="holds no question"):
        read("data:empty.jsonl", tmp_path)
    (tmp_path / "bad.jsonl").write_bytes(questions.encode_lines([ARC]) + b"{}\n")
    with pytest.raises(SlimpiError, match=r"line 2 of .*bad\.jsonl"):
        read(f"path:{tmp_path}/bad.jsonl", tmp_path)


def test_sets_come_from_the_hub_without_a_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In upstream's own layout, as Parquet."""
    monkeypatch.delenv("SLIMPI_DATA", raising=False)
    calls = []

    def download(repo: str, file: str, repo_type: str) -> str:
        calls.append((repo, file, repo_type))
        return str(tmp_path / "rows.parquet")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    arc = {"question": "What fills a dune?", **LETTERED}
    parquet.write_table(pa.Table.from_pylist([arc]), tmp_path / "rows.parquet")
    assert read("arc_challenge", tmp_path) == [ARC]
    parquet.write_table(pa.Table.from_pylist([SWAG_ROW]), tmp_path / "rows.parquet")
    assert read("hellaswag", tmp_path)[0].answer == 1
    assert calls[0] == ("allenai/ai2_arc", "ARC-Challenge/test-00000-of-00001.parquet", "dataset")
    assert calls[1][0] == "Rowan/hellaswag"


# Jobs.


def test_questions_are_stored_by_content(tmp_path: Path) -> None:
    where = Places(tmp_path)
    dataset = describe_questions(DEMO, where)
    assert dataset.name == DEMO
    stored_at = where.datasets / dataset.file.path
    assert stored_at.read_bytes() == questions.encode_lines(read(DEMO, tmp_path))
    stored_at.write_bytes(b"damaged")
    assert describe_questions(DEMO, where) == dataset
    assert stored_at.stat().st_size == dataset.file.size_bytes


def test_sets_are_tasks(tmp_path: Path) -> None:
    world = World.make(tmp_path / "world")
    lm, where = artifact(world.root / "lm", "gguf"), Places(tmp_path)
    other = tmp_path / "own.jsonl"
    other.write_bytes(questions.encode_lines([ARC, BLANK]))
    specs = [DEMO, f"path:{other}", DEMO]
    bench = bench_settings(lm, {"choices": specs, "limit": 7})
    asked = [task for task in tasks_for(lm, bench, where) if isinstance(task, Choices)]
    assert [(task.dataset.name, task.limit) for task in asked] == [(DEMO, 7), (f"path:{other}", 7)]
    assert tasks_for(lm, bench, where, ["choices"]) == asked
    (own,) = tasks_for(lm, Bench(), where, ["choices"])
    assert isinstance(own, Choices)
    assert own.dataset.name == DEMO
    assert not any(isinstance(task, Choices) for task in tasks_for(lm, Bench(), where))
    with pytest.raises(SlimpiError, match="none of"):
        tasks_for(artifact(world.root / "classifier", "onnx"), bench, where, ["choices"])


def test_memory_is_foreseen(tmp_path: Path) -> None:
    """A whole context, and windows that are kept whole."""
    world = World.make(tmp_path)
    lm = artifact(world.root / "lm", "gguf")
    small, large = fit.footprints(lm, world.root / "lm", [choices(world, n_ctx=256), choices(world)])
    assert large.cache_bytes == 8 * small.cache_bytes
    keys = {"general.architecture": "gemma3", "gemma3.block_count": 6, "gemma3.attention.head_count": 1,
            "gemma3.embedding_length": 64, "gemma3.attention.sliding_window": 64}  # fmt: skip
    assert fit.cache_bytes(keys, 2048, windows=False) == 6 * 2048 * 128 * 2 > fit.cache_bytes(keys, 2048)


# Comparison.


def choice_report(variant: str, correct: dict[str, list[float]], sha256: str = "d", ppl: bool = False) -> Report:
    """On each set; acc_norm is acc with the first question right."""
    base = nll_report(variant, REFERENCE)
    results = base.results if ppl else []
    for name, acc in correct.items():
        conditions = {"corpus": name, "corpus_sha256": sha256 + name, "n_questions": len(acc)}
        measured = [
            Measurement(metric=m, unit="fraction", samples=x, higher_is_better=True, conditions=conditions,
                        provenance="measured")
            for m, x in (("acc", acc), ("acc_norm", [1.0, *acc[1:]]))
        ]  # fmt: skip
        file = File(path="q.jsonl", sha256="c" * 64, size_bytes=1)
        task = Choices(dataset=Dataset(name=name, file=file))
        results = [*results, TaskResult(task=task, status="ok", measurements=measured, facts_before=facts(),
                                        facts_after=facts(), duration_s=1.0)]  # fmt: skip
    return msgspec.structs.replace(base, results=results)


def test_accuracies_are_paired_with_the_references(capsys: pytest.CaptureFixture[str]) -> None:
    truth = [1.0] * 60 + [0.0] * 40
    worse = [0.0] * 30 + [1.0] * 30 + [1.0] * 2 + [0.0] * 38
    reports = [
        choice_report("F16", {"easy": truth, "hard": truth}),
        choice_report("Q2_K", {"easy": worse, "hard": truth}),
        choice_report("Q3_K", {"hard": truth[:100]}),
    ]
    _, found, third = rows(reports)
    loss = found.choices["easy"].loss
    assert loss
    assert (loss.mean, loss.flips_worse, loss.flips_better, loss.n) == (pytest.approx(-28.0), 30, 2, 100)
    assert loss.low < -28 < loss.high < 0
    assert found.choices["hard"].loss is not None
    assert not found.choices["hard"].loss.significant
    assert third.choices.keys() == {"hard"}
    show(rows(reports))
    said = capsys.readouterr().out
    assert "easy, zero-shot [95%]" in " ".join(said.split())
    assert "acc 60.0% ±4.9" in said
    assert describe_choices(found.choices["hard"]).splitlines() == [
        "acc 60.0% ±4.9, +0.0 [-1.9, +1.9], 0 worse 0 better no difference",
        "norm 60.0% ±4.9, +0.0 [-1.9, +1.9], 0 worse 0 better no difference (n=100)",
    ]
    assert "30 worse 2 better" in describe_choices(found.choices["easy"])
    assert describe_choices(third.choices.get("easy")) == "-"
    assert rows(reports)[1].loss == loss, "without a perplexity the first set's accuracy is the quality"
    assert "nothing can be recommended" not in "\n".join(answer(rows(reports)))


def test_perplexity_stays_the_quality_where_there_is_one() -> None:
    reports = [choice_report(v, {"easy": [1.0, 0.0]}, ppl=True) for v in ("F16", "Q2_K")]
    found = rows(reports)[1]
    assert found.quality
    assert found.quality.metric == "nll"
    assert found.loss
    assert found.loss.unit == "% ppl"
    assert found.choices["easy"].loss


def test_other_questions_under_the_same_name_are_refused() -> None:
    one = choice_report("F16", {"easy": [1.0, 0.0], "hard": [1.0]})
    with pytest.raises(SlimpiError, match=r"not comparable: easy\.acc(_norm)?\.corpus_sha256"):
        rows([one, choice_report("Q2_K", {"easy": [1.0, 0.0]}, sha256="e")])
    with pytest.raises(SlimpiError, match=r"not comparable: easy\.acc(_norm)?\.n_questions"):
        rows([one, choice_report("Q2_K", {"easy": [1.0, 0.0, 0.0]})])
    assert len(rows([one, choice_report("Q2_K", {"hard": [0.0]})])) == 2

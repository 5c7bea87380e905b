"""The task choices: scores against transformers in float64, cut contexts, resuming, and files that are wrong."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import real_exports
import torch
from fakes import LlamaShape, World, artifact, llama_weights, write_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import choices, run
from tiny_models import save_tiny
from transformers import AutoTokenizer

from device import agent
from device import choices as task_choices
from device.choices import SERIES, log_likelihoods, outcome, tokenize_pair
from device.language_models import LanguageModel
from device.llama import LlamaModel
from device.onnx_language import OnnxLanguageModel
from device.records import SlimpiError, decode, encode_line
from device.results import Event, Measurement, Sample
from device.schema import Choices, Job, Question
from device.tasks import TASKS
from device.wire import Request, Started
from pipeline import questions
from pipeline.checkpoint import load
from pipeline.export.gguf import export_gguf
from pipeline.export.onnx_language import export_language

FAMILIES = ("llama", "gemma3", "qwen2")
QUESTIONS = [
    Question(context="Question: What keeps rain out of a house?\nAnswer:", choices=["the roof", "a song"], answer=0),
    Question(context="The kettle sang before the", choices=["house was up", "yard", "a sky in puddles"], answer=2),
    Question(context="Ends in spaces:  ", choices=["one word", "two more words"], answer=1),
    Question(context=["Rain had come and the cat", "Rain had come and the yard"], choices=["was wet."] * 2, answer=1),
    Question(context=["A", "The long night over the harbour"], choices=["went on and on."] * 2, answer=0),
    Question(context="Größe? Ünïcode", choices=["größer", "kleiner", "ß"], answer=1),
]


pytestmark = pytest.mark.usefixtures("quick_facts")


# Scores, against a naive twin that reads tokens and weights from the Hugging Face folder.


@dataclass(frozen=True)
class Tiny:
    """A random model as transformers has it, in float64, and the folder of its GGUF and ONNX exports."""

    folder: Path
    model: Any
    tokenizer: Any

    def open(self, kind: str) -> LanguageModel:
        if kind == "gguf":
            return LlamaModel(self.folder / "model.gguf", 1)
        return OnnxLanguageModel(self.folder / "model.onnx", 1)

    def encode(self, text: str, bos: int | None) -> list[int]:
        return ([] if bos is None else [bos]) + self.tokenizer.encode(text, add_special_tokens=False)

    def log_likelihood(self, context: str, continuation: str, n_ctx: int, bos: int | None) -> float:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.encode(context, bos)
        targets = self.encode(context + continuation, bos)[len(before) :]
        inputs = (before + targets)[-(n_ctx + 1) :][:-1]
        with torch.inference_mode():
            rows = self.model(torch.tensor([inputs])).logits[0].log_softmax(-1)[-len(targets) :]
        return math.fsum(float(row[target]) for row, target in zip(rows, targets, strict=True))


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny(request.param, folder / "hf").double()
    exported = load(folder / "hf")
    export_gguf(exported, folder / "model.gguf", "F32")
    export_language(exported, folder)
    return Tiny(folder, model, AutoTokenizer.from_pretrained(folder / "hf"))


def scores(model: LanguageModel, question: Question, n_ctx: int, share: bool = True) -> list[float]:
    pairs = zip(question.contexts, question.choices, strict=True)
    return log_likelihoods(model, [tokenize_pair(model, a, f" {b}", n_ctx) for a, b in pairs], share)


@pytest.mark.parametrize("n_ctx", [512, 12])
@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_scores_equal_transformers_in_float64(tiny: Tiny, kind: str, n_ctx: int) -> None:
    """Whole, and cut from the left to 12 tokens. llama.cpp's KV cache is F16, ONNX Runtime's F32."""
    cut = 0
    with tiny.open(kind) as model:
        model.open_context(512, task_choices.N_OUTPUTS, rewinds=True)
        for question in QUESTIONS:
            pairs = list(zip(question.contexts, question.choices, strict=True))
            found = scores(model, question, n_ctx)
            bos = model.bos if model.add_bos else None
            expected = [tiny.log_likelihood(a, f" {b}", n_ctx, bos) for a, b in pairs]
            assert found == pytest.approx(expected, rel=1e-3 if kind == "gguf" else 1e-5)
            assert outcome(question, found)[:2] == outcome(question, expected)[:2]
            cut += sum(tokenize_pair(model, a, f" {b}", n_ctx).cut_tokens > 0 for a, b in pairs)
    assert (cut > 5) == (n_ctx == 12)


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_a_shared_context_gives_what_each_alone_does(tiny: Tiny, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also through a model that cannot go back, and with continuations longer than a batch's outputs.

    Contexts that differ are evaluated in other pieces, which moves what is rounded to a KV cache in F16.
    """
    with tiny.open(kind) as model:
        model.open_context(512, task_choices.N_OUTPUTS, rewinds=True)
        plain = [scores(model, question, 512, share=False) for question in QUESTIONS]
        for rewinds in (True, False):
            with monkeypatch.context() as patch:
                if not rewinds:
                    patch.setattr(type(model), "rewind", lambda self, n_tokens: False)
                for question, expected in zip(QUESTIONS, plain, strict=True):
                    near = {"abs": 1e-4} if kind == "onnx" or isinstance(question.context, str) else {"rel": 1e-4}
                    assert scores(model, question, 512) == pytest.approx(expected, **near)
        monkeypatch.setattr(task_choices, "N_OUTPUTS", 2)
        for question, expected in zip(QUESTIONS, plain, strict=True):
            assert scores(model, question, 512) == pytest.approx(expected, rel=1e-3)


def test_a_shared_context_is_evaluated_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    with tiny.open("onnx") as model:
        model.open_context(512)
        extend = model.extend

        def count(tokens: Any, first: int) -> Any:
            nonlocal seen
            seen += len(tokens)
            return extend(tokens, first)

        monkeypatch.setattr(model, "extend", count)
        scores(model, QUESTIONS[0], 512, share=False)
        apart, seen = seen, 0
        scores(model, QUESTIONS[0], 512)
        n_context = tokenize_pair(model, QUESTIONS[0].contexts[0], " x", 512).first
        assert apart - seen == n_context


def test_outcome_by_hand() -> None:
    """Sums favour the short choice, sums a byte the long one; ß is two bytes."""
    question = Question(context="a", choices=["ß", "four"], answer=1)
    assert outcome(question, [-2.0, -3.0]) == (0.0, 1.0, -1.0)
    assert outcome(question, [-1.4, -3.0])[1] == 0.0, "by characters it would be the other: -1.4 / 1 < -3 / 4"
    assert outcome(question, [-1.6, -3.0])[1] == 1.0
    assert outcome(question, [-3.0, -3.0])[0] == 0.0, "the first of equals"


# The task.


def take(job: Job, done: dict[str, int] | None = None) -> list[Started | Sample]:
    """Run the first task in this process."""
    return list(TASKS[Choices].run(Request(job=job, index=0, done=done or {}, agent_pid=0), job.tasks[0]))


def measured(job: Job) -> dict[str, Measurement]:
    result = run(job)[0].results[0]
    assert result.status == "ok", result.error
    return {m.metric: m for m in result.measurements}


def test_measurements_are_the_scores(world: World) -> None:
    task = choices(world)
    found = measured(world.job("gguf", [task]))
    lines = (world.root / "data" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    with LlamaModel(world.root / "lm" / "model.gguf", 1) as model:
        model.open_context(512, task_choices.N_OUTPUTS, rewinds=True)
        asked = [decode(line, Question, "x") for line in lines]
        expected = [outcome(question, scores(model, question, 512, share=False)) for question in asked]
    acc, acc_norm, margin = zip(*expected, strict=True)
    assert 0 < sum(acc) < len(acc), "a trivial case would prove nothing"
    assert found["acc"].samples == list(acc)
    assert found["acc_norm"].samples == list(acc_norm)
    assert found["margin"].samples == pytest.approx(margin, abs=1e-3)
    p, n = found["acc"].mean, len(acc)
    assert found["acc"].stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    conditions = found["acc"].conditions
    assert (conditions["corpus"], conditions["n_questions"], conditions["n_cut_questions"]) == ("questions.jsonl", 4, 0)


def test_cut_contexts_are_counted(world: World) -> None:
    lines = [{"context": "the cat " * n, "choices": ["a", "the"], "answer": 0} for n in (1, 50, 2, 60)]
    assert measured(world.job("gguf", [choices(world, lines, n_ctx=32)]))["acc"].conditions["n_cut_questions"] == 2


def test_limit_takes_the_first_questions(world: World) -> None:
    whole = measured(world.job("gguf", [choices(world)], work_dir=str(world.root / "whole")))
    part = measured(world.job("gguf", [choices(world, limit=3)]))
    assert part["margin"].samples == whole["margin"].samples[:3]
    many = world.job("gguf", [choices(world, limit=99)], work_dir=str(world.root / "many"))
    assert measured(many)["acc"].n == 4


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_choices_resume_at_the_first_question_that_lacks_a_sample(world: World, done: int) -> None:
    job = world.job("gguf", [choices(world)])
    whole = take(job)
    assert whole[0] == Started(total=4 * len(SERIES))
    again = take(job, {"correct": min(done + 1, 4), "correct_norm": done, "margin": done, "cut_tokens": done})
    assert again == [whole[0], *whole[1 + done * len(SERIES) :]]


def test_a_killed_worker_loses_and_doubles_nothing(world: World) -> None:
    lines = [{"context": f"the cat {i} " * 9, "choices": ["a", "then"], "answer": i % 2} for i in range(600)]
    task = choices(world, lines)
    whole = measured(world.job("gguf", [task], work_dir=str(world.root / "whole")))
    job = world.job("gguf", [task])
    killed: list[int] = []

    def kill_once(event: Event) -> None:
        if isinstance(event, Sample) and event.index >= 3 and not killed:
            (child,) = psutil.Process().children()
            child.kill()
            killed.append(child.pid)

    assert "SIGKILL" in agent.run(job, kill_once).results[0].error
    report, events = run(job)
    assert next(event for event in events if isinstance(event, Sample)).index >= 3
    assert report.results[0].resumed
    assert {m.metric: m.samples for m in report.results[0].measurements} == {n: m.samples for n, m in whole.items()}


# What is refused.

GOOD: dict[str, Any] = {"context": "the", "choices": ["cat", "house"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (GOOD | {"answer": 2}, "answer 2 is not one of 2 choices"),
        (GOOD | {"answer": -1}, "answer"),
        (GOOD | {"answer": "0"}, "answer"),
        (GOOD | {"choices": []}, "length >= 2"),
        (GOOD | {"choices": ["one"]}, "length >= 2"),
        (GOOD | {"choices": ["one", " "]}, "blank"),
        (GOOD | {"context": "\n"}, "blank"),
        (GOOD | {"context": ["a", "b", "c"]}, "3 contexts do not go with 2 choices"),
        (GOOD | {"gold": 0}, "gold"),
        ({"context": "the"}, "choices"),
        ([], "object"),
    ],
    ids=str,
)
def test_lines_that_are_no_question_are_named(world: World, line: Any, said: str) -> None:
    result = run(world.job("gguf", [choices(world, [GOOD, line])]))[0].results[0]
    assert result.status == "failed"
    assert "line 2 of questions.jsonl is not a valid Question" in result.error
    assert said in result.error
    assert "\n" not in result.error


@pytest.mark.parametrize("data", [b"", b"\n", b'{"context": "the', b"\xff\xfe", b'{"context": "a"}\n\n'])
def test_files_that_hold_no_questions_are_refused(world: World, data: bytes) -> None:
    (world.root / "data" / "bad.jsonl").write_bytes(data)
    result = run(world.job("gguf", [Choices(dataset=world.dataset("bad.jsonl"))]))[0].results[0]
    assert result.status == "failed"
    assert "\n" not in result.error
    assert "line 1 of" in result.error or "cannot read" in result.error


def test_a_continuation_longer_than_the_context_is_refused(world: World) -> None:
    task = choices(world, [GOOD, GOOD | {"choices": ["cat", "q" * 40]}], n_ctx=32)
    result = run(world.job("gguf", [task]))[0].results[0]
    assert "question 2 of questions.jsonl" in result.error
    assert "1 to 32 can be scored" in result.error


def test_a_tokenizer_with_an_end_token_is_refused(tmp_path: Path) -> None:
    world = World.make(tmp_path, replace(LlamaShape(), add_eos=True))
    with pytest.raises(SlimpiError, match="multiple choice is not defined for"):
        take(world.job("gguf", [choices(world)]))


def test_logits_that_are_no_numbers_are_an_error(world: World) -> None:
    weights = llama_weights(LlamaShape())
    weights["output_norm.weight"] = np.full(LlamaShape().dim, np.nan, dtype=np.float32)
    write_llama(world.root / "lm" / "model.gguf", weights=weights)
    with pytest.raises(SlimpiError, match="no numbers, or probabilities of 0, in question 1"):
        take(world.job("gguf", [choices(world)]))


@settings(deadline=None)
@given(
    st.one_of(st.text(max_size=8), st.lists(st.text(max_size=8), max_size=4)),
    st.lists(st.text(max_size=8), max_size=4),
    st.integers(-2, 5),
)
def test_a_question_is_whole_or_refused(context: str | list[str], texts: list[str], answer: int) -> None:
    plain = {"context": context, "choices": texts, "answer": answer}
    contexts = context if isinstance(context, list) else [context] * len(texts)
    good = len(texts) >= 2 and 0 <= answer < len(texts) == len(contexts)
    good = good and all(text.strip() for text in [*contexts, *texts])
    if not good:
        with pytest.raises(SlimpiError, match="x is not a valid Question"):
            decode(json.dumps(plain), Question, "x")
        return
    question = decode(json.dumps(plain), Question, "x")
    assert msgspec.to_builtins(question) == plain
    assert encode_line(question).count(b"\n") == 1
    assert decode(encode_line(question), Question, "x") == question
    assert question.contexts == contexts


@pytest.mark.slow
def test_a_real_model_knows_more_than_chance(world: World, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M-Instruct on the first 50 questions of ARC-easy, where chance is 25 %."""
    monkeypatch.setenv("SLIMPI_DATA", str(data_dir))
    model = real_exports.source("smollm2-135m")
    asked = questions.read("arc_easy", world.root)[:50]
    (world.root / "data" / "arc.jsonl").write_bytes(questions.encode_lines(asked))
    (world.root / "lm" / "model.gguf").write_bytes(model.read_bytes())
    folder = world.root / "lm"
    task = Choices(dataset=world.dataset("arc.jsonl"))
    found = measured(world.job("gguf", [task], artifact=artifact(folder, "gguf"), timeout_s=900))
    assert found["acc"].mean > 0.25 + 2 * found["acc"].stderr
    assert found["acc_norm"].mean > 0.25 + 2 * found["acc_norm"].stderr

"""Task choices: zero-shot multiple choice of a language model, as EleutherAI's lm-evaluation-harness defines it.

A choice's score is the log-probability of its continuation (a space and the choice) given its context. acc: how often
the right choice has the largest score; acc_norm: the largest score divided by the choice's length in bytes of UTF-8,
the space not counted. The harness's acc_norm counts characters and its acc_bytes bytes (lm_eval/api/task.py), which is
the same of ASCII.

Two of its habits are the model's here: a start token is put before the context where the vocabulary says so, and a
start token goes, too, when a context is cut from the left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from device.inputs import read_text
from device.language import log_probs, refuse_eos
from device.language_models import LanguageModel, open_language_model
from device.records import SlimpiError, decode
from device.results import Measurement, Sample
from device.runtimes import Tokens
from device.samples import Taken, measurement, values
from device.schema import Choices, Job, Question
from device.wire import Request, Series, Started

N_OUTPUTS = 64  # positions of a batch that give logits; longer continuations go in pieces
SERIES: tuple[Series, ...] = ("correct", "correct_norm", "margin", "cut_tokens")
DEFINITION = "lm-evaluation-harness multiple_choice, zero-shot"


@dataclass(frozen=True)
class Scored:
    """A choice as the model sees it: inputs (n,) whose last rows of logits predict targets (m,), m <= n.

    cut_tokens: of the context, left out since they did not fit.
    """

    inputs: Tokens
    targets: Tokens
    cut_tokens: int

    @property
    def first(self) -> int:
        """The position that predicts the first target: the context's last token."""
        return len(self.inputs) - len(self.targets)


def run_choices(request: Request, task: Choices) -> Iterator[Started | Sample]:
    """Every series of SERIES has one sample a question.

    correct and correct_norm: 1 where the right choice scores best, the first of equals counting as in numpy's argmax.
    margin: nats by which the right choice's score is ahead of the best other one's. cut_tokens: see Scored; of the
    choice that lost most. SlimpiError for a file that is none of questions, and for what fits no context of n_ctx.
    """
    job = request.job
    questions = read_questions(job, task)
    with open_language_model(job.artifact, job.artifact_dir, job.threads) as model:
        refuse_eos(job, model, "multiple choice")
        tokenized = [_tokenize(model, task, number, question) for number, question in enumerate(questions, start=1)]
        yield Started(total=len(SERIES) * len(questions))
        longest = max(len(one.inputs) for choices in tokenized for one in choices)
        model.open_context(longest, N_OUTPUTS, rewinds=True)
        for i in range(request.first_missing(*SERIES), len(questions)):
            scores = log_likelihoods(model, tokenized[i])
            _check_finite(job, i, scores)
            cut_tokens = max(one.cut_tokens for one in tokenized[i])
            for series, value in zip(SERIES, (*outcome(questions[i], scores), cut_tokens), strict=True):
                yield request.sample(series, i, value)


def summarize_choices(task: Choices, taken: Taken, job: Job) -> list[Measurement]:
    """Samples are questions, so that variants can be paired; their standard error is the harness's, with n - 1."""
    cut = values(taken, "cut_tokens")
    conditions = {
        "corpus": task.dataset.name,
        "corpus_sha256": task.dataset.file.sha256,
        "n_questions": len(cut),
        "n_ctx": task.n_ctx,
        "n_cut_questions": sum(tokens > 0 for tokens in cut),
        "tokenizer_sha256": job.artifact.tokenizer_sha256,
        "definition": DEFINITION,
    }
    return [
        measurement(job, "acc", "fraction", taken["correct"], True, conditions),
        measurement(job, "acc_norm", "fraction", taken["correct_norm"], True, conditions),
        measurement(job, "margin", "nats", taken["margin"], True, conditions),
    ]


def read_questions(job: Job, task: Choices) -> list[Question]:
    """At most the first `limit` lines of the file; SlimpiError names the first line that is no Question."""
    name = task.dataset.file.path
    lines = read_text(job, task.dataset).decode("utf-8").removesuffix("\n").split("\n")
    lines = lines[: task.limit or None]
    return [decode(line, Question, f"line {number} of {name}") for number, line in enumerate(lines, start=1)]


def outcome(question: Question, scores: Sequence[float]) -> tuple[float, float, float]:
    """(correct, correct_norm, margin) of one question from the log-likelihoods of its choices, in nats."""
    lengths = [len(choice.encode()) for choice in question.choices]
    normed = [score / length for score, length in zip(scores, lengths, strict=True)]
    others = [score for i, score in enumerate(scores) if i != question.answer]
    return (
        float(scores.index(max(scores)) == question.answer),
        float(normed.index(max(normed)) == question.answer),
        scores[question.answer] - max(others),
    )


def tokenize_pair(model: LanguageModel, context: str, continuation: str, n_ctx: int) -> Scored:
    """Both halves as tokens: those of the whole text from where the context's own end (lm_eval/api/model.py,
    _encode_pair), cut from the left to n_ctx inputs (lm_eval/models/huggingface.py, _loglikelihood_tokens).

    SlimpiError if the continuation has no token of its own or more than n_ctx.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    before = model.tokenize(bare.encode())
    targets = model.tokenize((bare + continuation).encode())[len(before) :]
    if not 0 < len(targets) <= n_ctx:
        raise SlimpiError(
            f"{continuation[:60]!r} is {len(targets)} tokens after its context, 1 to {n_ctx} can be scored. "
            "Change the question or take a larger n_ctx."
        )
    whole = np.concatenate([before, targets])
    cut = max(0, len(whole) - (n_ctx + 1))
    return Scored(whole[cut:-1], targets, cut)


def log_likelihoods(model: LanguageModel, choices: Sequence[Scored], share: bool = True) -> list[float]:
    """Log-probability in nats of each choice's targets. What all of them begin with is evaluated once if `share`."""
    shared = _shared(choices) if share else 0
    model.reset()
    _evaluate(model, choices[0].inputs[:shared])
    scores = []
    for number, choice in enumerate(choices):
        at = shared
        if number and not model.rewind(shared):
            model.reset()
            at = 0
        _evaluate(model, choice.inputs[at : choice.first])
        scores.append(math.fsum(_target_log_probs(model, choice)))
    return scores


def _shared(choices: Sequence[Scored]) -> int:
    """How many first tokens are the same of all and predict no target."""
    most = min(choice.first for choice in choices)
    heads = np.stack([choice.inputs[:most] for choice in choices])
    differs = (heads != heads[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else most


def _evaluate(model: LanguageModel, tokens: Tokens) -> None:
    """Tokens at the sequence's next positions, none of whose logits is needed."""
    for _ in model.extend(tokens, len(tokens)):
        raise AssertionError("no logits were asked for")


def _target_log_probs(model: LanguageModel, choice: Scored) -> Iterator[float]:
    for start in range(0, len(choice.targets), N_OUTPUTS):
        targets = choice.targets[start : start + N_OUTPUTS]
        at = choice.first + start
        for offset, rows in model.extend(choice.inputs[at : at + len(targets)], 0):
            yield from log_probs(rows, targets[offset : offset + len(rows)]).tolist()


def _tokenize(model: LanguageModel, task: Choices, number: int, question: Question) -> list[Scored]:
    try:
        pairs = zip(question.contexts, question.choices, strict=True)
        return [tokenize_pair(model, context, f" {choice}", task.n_ctx) for context, choice in pairs]
    except SlimpiError as error:
        raise SlimpiError(f"question {number} of {task.dataset.name}: {error}") from error


def _check_finite(job: Job, index: int, scores: Sequence[float]) -> None:
    if not all(map(math.isfinite, scores)):
        raise SlimpiError(
            f"{job.artifact.id} gives logits that are no numbers, or probabilities of 0, in question {index + 1}. "
            "Its weights are broken: build it again."
        )

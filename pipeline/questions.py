"""Sets of multiple-choice questions for the task `choices`, as EleutherAI's lm-evaluation-harness asks them.

Specs (`read`): a name in SETS, or demo:, path:, data:, hf: (see sources.dataset) for a file of device.schema.Question
lines. Prompts are those of the harness's lm_eval/tasks (arc, openbookqa, hellaswag, winogrande, super_glue/boolq). Raw
files are read in two layouts: the data folder's (id, context, choices, gold) and upstream's own, as the hub has it.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from device.records import SlimpiError, decode, sha256_file
from device.schema import Question
from pipeline import sources

DEMO = "demo:questions.jsonl"


class Item(msgspec.Struct, frozen=True):
    """A question before it is put into a prompt; gold: the right choice, from 0."""

    context: str
    choices: list[str]
    gold: int


@dataclass(frozen=True)
class QuestionSet:
    """Where a set lies in SLIMPI_DATA, that file's hash, what makes an Item of upstream's row and a prompt of an Item.

    hub: the same set in upstream's own layout, a spec of sources.dataset; its content is not pinned, but the questions'
    hash is part of every report. "" = on no hub. path "" = not in SLIMPI_DATA.
    """

    path: str
    sha256: str
    upstream: Callable[[dict[str, Any]], Item]
    prompt: Callable[[Item], Question]
    hub: str = ""


def _lettered(row: dict[str, Any], question: str) -> Item:
    """ARC and OpenBookQA: choices {text, label}, answerKey one of the labels."""
    choices = row["choices"]
    return Item(row[question], list(choices["text"]), list(choices["label"]).index(row["answerKey"].strip()))


def _arc_row(row: dict[str, Any]) -> Item:
    return _lettered(row, "question")


def _openbook_row(row: dict[str, Any]) -> Item:
    return _lettered(row, "question_stem")


def _hellaswag_row(row: dict[str, Any]) -> Item:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Item(without_marks(context), [without_marks(ending) for ending in row["endings"]], int(row["label"]))


def _winogrande_row(row: dict[str, Any]) -> Item:
    return Item(row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1)


def _boolq_row(row: dict[str, Any]) -> Item:
    return Item(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], int(row["answer"]))


def without_marks(text: str) -> str:
    """HellaSwag's WikiHow part has marks such as [title] and [step] in its texts."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _plain(item: Item) -> Question:
    return Question(context=item.context, choices=item.choices, answer=item.gold)


def _arc(item: Item) -> Question:
    return Question(context=f"Question: {item.context}\nAnswer:", choices=item.choices, answer=item.gold)


def _winogrande(item: Item) -> Question:
    """Partial evaluation: each option in the place of the underscore, the rest of the sentence scored after it."""
    before, blank, rest = item.context.partition("_")
    if not blank:
        raise ValueError("the sentence has no underscore")
    contexts = [before + option for option in item.choices]
    return Question(context=contexts, choices=[rest.strip()] * len(contexts), answer=item.gold)


_ARC = "hf:allenai/ai2_arc/ARC-{}/{}-00000-of-00001.parquet"
_OPENBOOK = "hf:allenai/openbookqa/main/{}-00000-of-00001.parquet"

SETS: Mapping[str, QuestionSet] = {
    "arc_easy": QuestionSet(
        "choices/arc_easy.jsonl",
        "4d05b103f2b426252f9ac6a51a2c4cb57be1497cc88009772deeda80c87fc429",
        _arc_row,
        _arc,
        _ARC.format("Easy", "test"),
    ),
    "arc_easy_val": QuestionSet(
        "choices/arc_easy_val.jsonl",
        "fe81a402ef994b34b326fd338601fcd40828e45f56628a40d9007f5f374cf151",
        _arc_row,
        _arc,
        _ARC.format("Easy", "validation"),
    ),
    "arc_challenge": QuestionSet(
        "choices/arc_challenge.jsonl",
        "c21c0c1581b9d211d0f203db928e1b49cedde03da389580b5702567eae52cf94",
        _arc_row,
        _arc,
        _ARC.format("Challenge", "test"),
    ),
    "arc_challenge_val": QuestionSet(
        "choices/arc_challenge_val.jsonl",
        "0a6aaeb6a1d0ffe868dffe45b30a665b546bdad1e877e2f52402c3f037b32e75",
        _arc_row,
        _arc,
        _ARC.format("Challenge", "validation"),
    ),
    "openbookqa": QuestionSet(
        "choices/openbookqa.jsonl",
        "af73c9e6f9a1e122622642771d2d8cd451b1e08e660ac96b0bc9b86c070b9390",
        _openbook_row,
        _plain,
        _OPENBOOK.format("test"),
    ),
    "openbookqa_val": QuestionSet(
        "choices/openbookqa_val.jsonl",
        "a24c37a11c063678b70bbe9277c2ceb0dfaebffea43f7557dae4fb73f0a2a133",
        _openbook_row,
        _plain,
        _OPENBOOK.format("validation"),
    ),
    # The data folder has two files of it: a sample with the harness's own texts, and one of all items whose source had
    # dropped the marks, a space that they leave in some choices, and the capital after the context's last stop.
    "hellaswag": QuestionSet(
        "", "", _hellaswag_row, _plain, "hf:Rowan/hellaswag/data/validation-00000-of-00001.parquet"
    ),
    "hellaswag_1000": QuestionSet(
        "choices/hellaswag.jsonl",
        "bbdaf6b727aaa58d86027cf807093020d39432a003c4b34837ae8ac30a3ebfcc",
        _hellaswag_row,
        _plain,
    ),
    "hellaswag_unmarked": QuestionSet(
        "choices/hellaswag_full.jsonl.gz",
        "04fbc94084adff98d69ef9211173c0310222e02c2d3076f8ffbc52a4a8fce6f7",
        _hellaswag_row,
        _plain,
    ),
    "winogrande": QuestionSet(
        "choices/winogrande.jsonl",
        "737c197afd79ce90b493a3779b8da7af0d9ac7a273b00da34639c2cabc96e246",
        _winogrande_row,
        _winogrande,
        "hf:allenai/winogrande/winogrande_xl/validation-00000-of-00001.parquet",
    ),
    "boolq": QuestionSet(
        "choices/boolq.jsonl.gz",
        "44ccb30c93a490705a883cf8acc2911d04c2de771ebdc8af71d66838cba483a9",
        _boolq_row,
        _plain,
        "hf:google/boolq/data/validation-00000-of-00001.parquet",
    ),
}
"""Test sets, or validation where upstream keeps the test's answers; those in _val are for choosing settings on."""


def read(spec: str, cache: Path) -> list[Question]:
    """All questions of a set, in its order. SlimpiError for an unknown spec or a file that holds something else."""
    if spec in SETS:
        known = SETS[spec]
        return list(parse(_raw_file(spec, known, cache), known))
    if ":" not in spec:
        raise SlimpiError(f"there is no set of questions {spec!r}. Use path:file, {DEMO} or one of {', '.join(SETS)}.")
    path = sources.dataset(spec, cache)
    found = [decode(line, Question, f"line {number} of {path}") for number, line in enumerate(_lines(path), start=1)]
    if not found:
        raise SlimpiError(f"{path} holds no question. Give it one a line, as {DEMO} has them.")
    return found


def encode_lines(questions: list[Question]) -> bytes:
    """As the device reads them, one JSON object a line."""
    return b"".join(msgspec.json.encode(question) + b"\n" for question in questions)


def parse(path: Path, known: QuestionSet) -> Iterator[Question]:
    """Rows of a raw file in either layout; SlimpiError names the first that is wrong."""
    for number, row in enumerate(_rows(path), start=1):
        try:
            item = msgspec.convert(row, Item) if "gold" in row else known.upstream(row)
            yield msgspec.convert(msgspec.to_builtins(known.prompt(item)), Question)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SlimpiError(
                f"row {number} of {path} is no question of its set: {error!r}. Fetch the file again."
            ) from error


def _raw_file(name: str, known: QuestionSet, cache: Path) -> Path:
    """SLIMPI_DATA first, the hub otherwise; a file there with another content than the known one is refused."""
    folder = os.environ.get("SLIMPI_DATA", "")
    path = Path(folder) / known.path
    if folder and known.path and path.is_file():
        if (digest := sha256_file(path)) != known.sha256:
            raise SlimpiError(
                f"questions {name}: {path} has sha256 {digest}, expected {known.sha256}. Name another file by path:."
            )
        return path
    if not known.hub:
        raise SlimpiError(
            f"questions {name} are on no hub: put them at {known.path} inside the folder that SLIMPI_DATA names."
        )
    return sources.dataset(known.hub, cache)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        try:
            yield from parquet.read_table(path).to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            raise SlimpiError(f"cannot read {path} as Parquet: {error}. Fetch it again.") from error
        return
    for number, line in enumerate(_lines(path), start=1):
        yield decode(line, dict[str, Any], f"line {number} of {path}")


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SlimpiError(f"cannot read {path} as UTF-8 lines: {error}. Fetch it again.") from error
    return text.removesuffix("\n").split("\n") if text else []

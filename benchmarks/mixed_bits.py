"""Genetic mixed bits on a fine-tuned classifier: bits a matrix, accuracy, theoretical and stored size.

`python benchmarks/mixed_bits.py` takes the SST-2 classifier of benchmarks/int8_table.py (seed 0, fine-tuned if it is
not there), searches on training rows that it was not fine-tuned on, and reports on the validation set beside uniform
bits. It goes on where it was stopped; the result is benchmarks/results/<machine>/mixed_bits.json.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import sys
from collections.abc import Sequence
from pathlib import Path

import int8_models
import int8_table
import numpy as np
import onnx
from bench_common import at_least, command, cpu_model, now, output_options, result_path
from int8_models import LABELS, MAX_TOKENS, Rows

from device.records import Record, encode, write_atomic
from pipeline import sources
from pipeline.export.onnx import export_encoder
from pipeline.export.onnx_bits import FULL, Validation, matrices, mean_bits, search, with_bits
from pipeline.plan_search import GeneticSettings
from pipeline.progress import Progressor
from pipeline.recipes import read_recipe
from pipeline.store import places

UNIFORM = (FULL, 8, 6, 4)


class Line(Record, frozen=True, kw_only=True):
    """One choice of bits on the validation set; sizes in MiB."""

    name: str
    mean_bits: float
    accuracy: float
    theoretical_mib: float
    stored_mib: float


class Result(Record, frozen=True, kw_only=True):
    """mixed_bits.json. fitness is on the n_search rows, accuracy on the n_test others."""

    benchmark: str = "mixed_bits"
    provenance: str = "host"
    cpu: str
    time: str
    seed: int
    population: int
    generations: int
    n_search: int
    n_test: int
    n_evaluated: int
    fitness: float
    accuracy_floor: float
    history: list[float]
    bits: dict[str, int]
    lines: list[Line]


def unseen_rows(path: Path, n_rows: int) -> Rows:
    """The first rows of SST-2's larger training part, which int8_models.py does not train on, duplicates left out."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as handle:
        rows = {row[0].strip(): int(row[1]) for row in list(csv.reader(handle, delimiter="\t", quoting=3))[1:]}
    return Rows(list(rows)[:n_rows], list(rows.values())[:n_rows])


def validation_of(tokenizer: Path, rows: Rows) -> Validation:
    return Validation(int8_table.encoded(tokenizer, rows.texts), np.array(rows.targets))


def run(options: argparse.Namespace, progress: Progressor) -> Result:
    where, recipe, task = places(), read_recipe(int8_table.RECIPE), int8_table.TASKS["sst2"]
    folder = sources.data_folder("SST-2's rows")
    source = sources.fetch(recipe.source, recipe.sha256, where.sources, progress.say)
    work = where.artifacts / ".int8"
    work.mkdir(parents=True, exist_ok=True)
    (classifier,) = int8_models.train_seeds(source.path, lambda: task.train(folder), work / "sst2", range(1), progress)
    base = classifier.with_name(f"{classifier.name}-{int8_table.REFERENCE}")
    if not (base / "model.onnx").is_file():
        export_encoder(classifier, base, LABELS, MAX_TOKENS)
    model, tokenizer = onnx.load(base / "model.onnx"), base / "tokenizer.json"
    felt = validation_of(tokenizer, unseen_rows(folder / "glue" / "sst2_train.tsv.gz", options.rows))
    test = validation_of(tokenizer, task.test(folder))
    floor = felt.score(model)[1] - options.loss / 100
    settings = GeneticSettings(options.population, options.generations)
    with progress.step("genetic search of bits") as tick:
        found = search(
            model,
            felt,
            settings,
            seed=options.seed,
            state=work / f"bits-{options.rows}-{options.population}-{options.seed}.json",
            accuracy_floor=floor,
            tick=tick,
        )
    counts = matrices(model)
    choices = {f"uniform {bits}": dict.fromkeys(counts, bits) for bits in UNIFORM} | {"genetic": found.bits}
    lines = []
    for name, bits in choices.items():
        made = with_bits(model, bits)
        stored = len(made.SerializeToString())
        spared = sum(n * (8 - bits[k]) for k, n in counts.items() if bits[k] < 8) / 8
        lines.append(
            Line(
                name=name,
                mean_bits=mean_bits(counts, bits),
                accuracy=test.score(made)[1],
                theoretical_mib=(stored - spared) / 2**20,
                stored_mib=stored / 2**20,
            )
        )
    return Result(
        cpu=cpu_model(),
        time=now(),
        seed=options.seed,
        population=options.population,
        generations=options.generations,
        n_search=len(felt.targets),
        n_test=len(test.targets),
        n_evaluated=found.n_evaluated,
        fitness=found.fitness,
        accuracy_floor=floor,
        history=found.history,
        bits=found.bits,
        lines=lines,
    )


@command("mixed_bits", "Nothing was written. Run it again.")
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=at_least(10), default=400, help="to measure candidates on")
    parser.add_argument("--population", type=at_least(8), default=20)
    parser.add_argument("--generations", type=at_least(1), default=15)
    parser.add_argument("--loss", type=float, default=1.0, help="points of accuracy below fp32 that go unpunished")
    parser.add_argument("--seed", type=at_least(0), default=0)
    output_options(parser, "mixed_bits.json")
    options = parser.parse_args(argv)
    out = result_path(options, places(), "mixed_bits.json")
    result = run(options, Progressor())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, encode(result))
    print("| bits | mean | accuracy | theoretical MiB | stored MiB |\n|---|---|---|---|---|")
    for line in result.lines:
        shown = f"{100 * line.accuracy:.2f} | {line.theoretical_mib:.1f} | {line.stored_mib:.1f}"
        print(f"| {line.name} | {line.mean_bits:.2f} | {shown} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

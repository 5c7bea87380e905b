"""MXQ's table: perplexity and KL divergence at budgets of 4.75 ... 2.75 bits a linear weight, on three texts.

After Zhang et al. 2025 (MXQ): every linear layer in b1 bits, groups of g1, scales and zeros in 8 bits. Rows: HQQ and
GPTQ and AWQ in one format (b4g32 ... b3g128); MXQ, a mixed-integer program that chooses (b1, g1) for each matrix by the
Frobenius error of HQQ's codes; the same program by the KL divergence that those errors predict, which slimpi's own
budgets go by; both plans coded by GPTQ too.

These formats are in no runtime: the weights they stand for are written as F16 and run by llama.cpp, and bits a weight
are counted as in the paper's equation 2. Embeddings and norms stay as they are. Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import bench_quality
import msgspec
import numpy as np
import torch
from bench_common import at_least, command, now, output_options, result_path
from gguf import GGMLQuantizationType
from quality_rows import Score, mean_interval

from device.records import Record, encode, read_record, sha256_file, write_atomic
from device.schema import File
from pipeline import plan as plans
from pipeline import plan_costs, plan_milp, quantize, sensitivity, sources
from pipeline.calibration_stages import input_stats, output_sensitivity
from pipeline.checkpoint import Checkpoint, Tensor, load
from pipeline.export.gguf import EncodedTensor, export_gguf, gguf_tensors
from pipeline.exporter import Context
from pipeline.formats import FORMATS
from pipeline.layers import Stats
from pipeline.methods import METHODS
from pipeline.progress import Progressor
from pipeline.store import Places, digest, load_artifact, places, tool_versions

BUDGETS = (4.75, 4.50, 4.25, 4.00, 3.75, 3.50, 3.25, 3.00, 2.75)
KINDS = tuple(name for name in FORMATS if name.startswith("MXQ_"))
C4_STYLE = "web/c4_guardian.jsonl.gz"
TEXTS = ("wikitext2-test", "ptb-test")
OBJECTIVES = {"frobenius": "MXQ", "predicted": "predicted divergence"}
"""What the program minimises, and how rows call it."""


class Row(Record, frozen=True, kw_only=True):
    """One way to choose codes at one size. key: what it was made of; bits count as in MXQ's equation 2."""

    label: str
    method: str
    key: str
    bits_per_linear_weight: float
    formats: dict[str, int]
    quantize_s: float
    scores: list[Score]


class Table(Record, frozen=True, kw_only=True):
    """mxq.json"""

    model: str
    machine: str
    calibration: str
    start_time: str
    rows: list[Row]


@dataclass(frozen=True)
class Entry:
    """A row to be: which codes, and the plan {matrix: format}, made when it is needed."""

    label: str
    method: str
    plan: Callable[[], dict[str, str]]


@dataclass(frozen=True)
class Model:
    """A checkpoint, its linear layers {name: weights}, the statistics of their inputs, and how much the model's output
    feels an error in each of their rows."""

    checkpoint: Checkpoint
    linear: dict[str, int]
    columns: dict[str, int]
    stats: dict[str, Stats]
    felt: dict[str, torch.Tensor]


def entries(model: Model, errors: Callable[[str], plan_costs.Costs]) -> list[Entry]:
    """The table's rows, largest first. errors: the named measure's, of HQQ's codes."""

    def uniform(kind: str) -> Callable[[], dict[str, str]]:
        return lambda: dict.fromkeys(model.linear, kind)

    def mixed(measure: str, bits: float) -> Callable[[], dict[str, str]]:
        return lambda: best(model, errors(measure), bits)

    found = [Entry(f"HQQ b{b}g{g}", "hqq", uniform(f"MXQ_B{b}_G{g}")) for b in (4, 3) for g in (32, 64, 128)]
    for name, method in (("GPTQ", "gptq"), ("AWQ", "awq")):
        found += [Entry(f"{name} b{b}g128", method, uniform(f"MXQ_B{b}_G128")) for b in (4, 3)]
    for bits in BUDGETS:
        for measure, name in OBJECTIVES.items():
            found.append(Entry(f"{name} {bits:.2f}", "hqq", mixed(measure, bits)))
            found.append(Entry(f"{name} + GPTQ {bits:.2f}", "gptq", mixed(measure, bits)))
    return found


def best(model: Model, errors: plan_costs.Costs, bits: float) -> dict[str, str]:
    """The choice of least total error at so many bits a linear weight."""
    sizes = {
        name: {kind: model.linear[name] * FORMATS[kind].bits_per_weight / 8 for kind in row}
        for name, row in errors.items()
    }
    return plan_milp.solve(errors, sizes, int(sum(model.linear.values()) * bits / 8)).formats


def error_tables(model: Model, progress: Progressor) -> dict[str, plan_costs.Costs]:
    """{measure: {matrix: {format: error}}} of HQQ's codes."""
    tensors = gguf_tensors(model.checkpoint)
    choices = {name: [k for k in KINDS if model.columns[name] % FORMATS[k].block_size == 0] for name in model.linear}
    tables: dict[str, plan_costs.Costs] = {measure: {name: {} for name in model.linear} for measure in OBJECTIVES}
    device = quantize.compute_device()
    n_layers = model.checkpoint.config["num_hidden_layers"]
    with progress.step("errors of HQQ's codes in each format") as tick:
        for index in range(n_layers):
            layer = quantize.read_layer(tensors, index, (), device)
            prefix = f"blk.{index}."
            hessians = {name: model.stats[prefix + name].hessian().double() for name in layer.matrices}
            for kind in KINDS:
                formats = {name: FORMATS[kind] for name in layer.matrices if kind in choices[prefix + name]}
                for name, coded in METHODS["hqq"].run(layer, {}, formats).tensors.items():
                    error = (layer.matrices[name] - coded.dequantize()).double().cpu()
                    tables["frobenius"][prefix + name][kind] = plan_costs.frobenius(error, None)
                    felt = model.felt[prefix + name].double()
                    tables["predicted"][prefix + name][kind] = sensitivity.predicted(error, hessians[name], felt)
            tick(index + 1, n_layers, "layers")
    return tables


def saved_errors(model: Model, path: Path, progress: Progressor) -> Callable[[str], plan_costs.Costs]:
    """The tables, kept at `path`, computed at the first use."""

    def read(measure: str) -> plan_costs.Costs:
        if not path.exists():
            write_atomic(path, json.dumps(error_tables(model, progress)).encode())
        found: plan_costs.Costs = json.loads(path.read_bytes())[measure]
        return found

    return read


def write_model(model: Model, method: str, plan: Mapping[str, str], out: Path, progress: Progressor) -> float:
    """The weights that the codes stand for, as F16; returns the seconds quantizing took."""
    formats = {name: FORMATS[kind] for name, kind in plan.items()}
    began = time.monotonic()
    with progress.step(f"quantize by {method}") as tick:
        codes, vectors, _ = quantize.quantize_in_memory(model.checkpoint, method, formats, model.stats, tick)
    took_s = time.monotonic() - began
    made = {n: _as(GGMLQuantizationType.F16, q.dequantize().half().cpu().numpy()) for n, q in codes.items()}
    made |= {n: _as(GGMLQuantizationType.F32, after.float().numpy()) for n, (_, after) in vectors.items()}

    def encoded(name: str, tensor: Tensor) -> EncodedTensor | None:
        return made.get(name)

    export_gguf(model.checkpoint, out, "auto", encoded)
    return took_s


def _as(kind: GGMLQuantizationType, values: np.ndarray) -> EncodedTensor:
    rows = np.atleast_2d(values).view(np.uint8)
    return EncodedTensor(kind, lambda: rows)


def row_of(bench: bench_quality.Bench, reference: Path, model: Model, entry: Entry, known: Row | None) -> Row:
    """`known` if it was made of the same, else quantized, written, measured and removed."""
    plan = entry.plan()
    recordings = {r.text.name: [r.dataset.file.sha256, r.n_chunks] for r in bench.recordings}
    key = digest([entry.method, dict(plan), bench.source.sha256, bench.calibration.file.sha256, recordings,
                  tool_versions()])  # fmt: skip
    if known and known.key == key:
        return known
    folder = bench.where.artifacts / f".mxq-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        path = folder / "model.gguf"
        quantize_s = write_model(model, entry.method, plan, path, bench.progress)
        artifact = load_artifact(reference)
        described = File(path=path.name, sha256=sha256_file(path), size_bytes=path.stat().st_size)
        artifact = msgspec.structs.replace(
            artifact,
            id=f"mxq-{key[:16]}",
            name=f"{bench.recipe.name}-mxq",
            variant=entry.label,
            entry=path.name,
            files=[described],
            golden=None,
            reference=False,
        )
        write_atomic(folder / "manifest.json", encode(artifact))
        scores = [_named(bench_quality.measure(bench, folder, recording)) for recording in bench.recordings]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    total = sum(model.linear.values())
    bits = math.fsum(model.linear[name] * FORMATS[kind].bits_per_weight for name, kind in plan.items()) / total
    count: dict[str, int] = {}
    for kind in plan.values():
        count[kind] = count.get(kind, 0) + 1
    return Row(
        label=entry.label,
        method=entry.method,
        key=key,
        bits_per_linear_weight=bits,
        formats=dict(sorted(count.items())),
        quantize_s=quantize_s,
        scores=scores,
    )


def _named(score: Score) -> Score:
    """A text of this machine's folders by its own name: results are shared, paths are not."""
    corpus = score.corpus
    return msgspec.structs.replace(score, corpus=Path(corpus).stem) if corpus.startswith("path:") else score


def c4_style(where: Places) -> str:
    """Spec of a plain text of the data folder's C4 documents: small, so "C4-style", not C4."""
    source = sources.dataset(f"data:{C4_STYLE}", where.sources)
    with gzip.open(source, "rt", encoding="utf-8") as handle:
        documents = [json.loads(line)["text"] for line in handle if line.strip()]
    out = where.stages / "c4-style.txt"
    write_atomic(out, "\n\n".join(documents).encode())
    return f"path:{out}"


def lines_of(table: Table) -> list[str]:
    texts = [score.corpus for score in table.rows[0].scores] if table.rows else []
    head = f"{'row':34} {'bits':>6} " + " ".join(f"{text:>16} {'KLD [95%]':>26}" for text in texts)
    lines = [head + f" {'quantize s':>10}"]
    for row in table.rows:
        cells = []
        for s in row.scores:
            low, high = mean_interval(s.kld_chunks) or (math.nan, math.nan)
            cells.append(f"{s.perplexity:16.3f} {s.kld:9.4f} [{low:.4f}, {high:.4f}]".ljust(43))
        lines.append(f"{row.label:34} {row.bits_per_linear_weight:6.3f} {' '.join(cells)} {row.quantize_s:10.1f}")
    if table.rows:
        cells = [f"{s.reference_perplexity:16.3f} {'':26}" for s in table.rows[0].scores]
        lines.insert(1, f"{'reference':34} {'':6} {' '.join(cells)}")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipe", type=Path, help="recipe of a language model whose widths are multiples of 128")
    add("--only", action="append", default=[], metavar="TEXT", help="rows whose label holds TEXT (repeatable)")
    add("--text", action="append", help=f"dataset instead of {', '.join(TEXTS)} and C4-style documents")
    add("--n-ctx", type=at_least(8), default=512, help="tokens in a chunk (default %(default)s)")
    add("--chunks", type=at_least(1), default=10, help="chunks to score (default %(default)s)")
    add("--threads", type=at_least(1), default=1, help="inference threads (default %(default)s)")
    output_options(parser, "mxq.json")
    return parser


def run(options: argparse.Namespace, where: Places, out: Path) -> Table:
    """Make and measure what `out` lacks, writing it after every row."""
    progress = Progressor()
    options.text = options.text or [*TEXTS, c4_style(where)]
    options.discard = False
    bench = bench_quality.open_bench(options.recipe, options, where, progress)
    context = Context(bench.recipe, bench.source, where, options.threads, progress)
    (reference,) = bench_quality.build(bench.recipe, where, progress, options.threads, [bench.recipe.reference])
    base = reference / load_artifact(reference).entry
    shapes = plans.read_base(base)
    checkpoint = load(base)
    stats, _ = input_stats(context, base)
    felt, _ = output_sensitivity(context, checkpoint)
    linear = {name: math.prod(shapes.shapes[name]) for name in shapes.linear}
    model = Model(checkpoint, linear, {name: shapes.shapes[name][-1] for name in shapes.linear}, stats, felt.rows)
    key = digest([bench.source.sha256, bench.calibration.file.sha256, sorted(OBJECTIVES), tool_versions()])
    errors = saved_errors(model, where.stages / f"mxq-errors-{key[:16]}.json", progress)
    rows = {row.label: row for row in read_record(out, Table).rows} if out.exists() else {}
    order = entries(model, errors)
    table = Table(model=bench.recipe.name, machine=options.machine, calibration=bench.recipe.calibration.text,
                  start_time=now(), rows=list(rows.values()))  # fmt: skip
    for entry in order:
        if options.only and not any(text in entry.label for text in options.only):
            continue
        rows[entry.label] = row_of(bench, reference, model, entry, rows.get(entry.label))
        ranked = [rows[e.label] for e in order if e.label in rows]
        table = msgspec.structs.replace(table, rows=ranked)
        write_atomic(out, encode(table))
        progress.say("\n".join(lines_of(msgspec.structs.replace(table, rows=[rows[entry.label]]))))
    return table


@command("mxq_table", "Run it again: it goes on from the last row measured.")
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    where = places()
    out = result_path(options, where, "mxq.json")
    print("\n".join(lines_of(run(options, where, out))))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Who chooses the better plan at one size: integer programs by three measures of error, a genetic algorithm, a search.

Every matrix of SmolLM2's blocks is coded once in each type (SEARCH's codes); plans say which type it gets, and all stay
within the same bits a linear weight. The programs (HiGHS) minimise Frobenius errors, as MXQ does; errors of the output;
predicted KL divergence, which slimpi's own budgets go by. The genetic algorithm chooses by decoder layer, by measured
KL divergence on the calibration text; the evolutionary search by matrix, by the same, from the last program's plan on.
With --profile, what a device measured by `slimpi bench --task profile`, the last program also keeps a budget of time:
half of what plans of that size can save, and all of it; and every plan's predicted time a token is told.
Embeddings stay as they are. All plans are then measured on another text. Weights are swapped in a torch model: no
files, no runtime. Writes benchmarks/results/<machine>/plans.json.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import msgspec
import torch
from bench_common import at_least, command, cpu_model, now, output_options, result_path
from quality_rows import mean_interval

from device.records import Record, encode, read_record, sha256_file, write_atomic
from device.results import Report
from pipeline import checkpoint, plan, plan_costs, plan_milp, predicted_costs, quantize, sensitivity, sources
from pipeline.architectures import gguf_names
from pipeline.build import build
from pipeline.calibration_stages import input_stats, output_sensitivity
from pipeline.exporter import Context
from pipeline.formats import FORMATS
from pipeline.layers import Stats
from pipeline.methods import search
from pipeline.plan_evolve import EvolutionSettings, evolve
from pipeline.plan_search import Formats, GeneticSettings, Space, genetic
from pipeline.progress import Progressor
from pipeline.recipes import read_recipe
from pipeline.store import Places, digest, load_artifact, places, tool_versions
from pipeline.torch_model import in_transformers

RECIPE = "smollm2-135m-methods"
TYPES = ("IQ4_NL", "Q5_0", "Q8_0")
BITS = (4.75, 5.25)
N_CTX, N_TEST = 256, 12
GENETIC = GeneticSettings(population=16, generations=12, elites=2, mutated_elites=2)
N_FITNESS = 4
EVOLUTION = EvolutionSettings(offspring=12, stages=((1, 4), (N_FITNESS, 1)))


class Row(Record, frozen=True, kw_only=True):
    """One plan. target: bits asked for, 0 for a uniform plan. seconds: of choosing it, tables and codes not counted.
    token_us: predicted time of the blocks' products of a decoded token, where a profile was given."""

    label: str
    target: float
    bits_per_linear_weight: float
    counts: dict[str, int]
    fitness: float
    kld_chunks: list[float]
    seconds: float
    n_measured: int
    token_us: float | None = None


class Plans(Record, frozen=True, kw_only=True):
    """plans.json. fitness: KL divergence on n_fitness chunks of the calibration text; profiled: the profile's CPU."""

    model: str
    cpu: str
    calibration: str
    test: str
    n_ctx: int
    n_fitness: int
    start_time: str
    rows: list[Row]
    profiled: str = ""


@dataclass(frozen=True)
class Model:
    """The torch model, each linear layer's module by GGUF name, its codes' weights {name: {type: float16}}."""

    torch_model: torch.nn.Module
    modules: dict[str, torch.nn.Linear]
    coded: dict[str, dict[str, torch.Tensor]]

    def apply(self, formats: Mapping[str, str]) -> None:
        for name, kind in formats.items():
            self.modules[name].weight.copy_(self.coded[name][kind])

    def log_probs(self, chunk: torch.Tensor) -> torch.Tensor:
        """Of the chunk's second half, which is what perplexity scores."""
        with torch.inference_mode():
            logits: torch.Tensor = self.torch_model(input_ids=chunk[None], use_cache=False).logits[0]
            return logits[len(chunk) // 2 :].log_softmax(-1)


@dataclass
class Meter:
    """KL divergences of plans over chunks whose reference is known."""

    model: Model
    chunks: torch.Tensor
    reference: list[torch.Tensor]
    n_measured: int = 0

    def divergences(self, formats: Mapping[str, str], n: int) -> list[float]:
        self.model.apply(formats)
        self.n_measured += 1
        found = []
        for chunk, known in zip(self.chunks[:n], self.reference[:n], strict=True):
            theirs = known.float()
            found.append(float((theirs.exp() * (theirs - self.model.log_probs(chunk))).sum(-1).double().mean()))
        return found

    def fitness(self, formats: Mapping[str, str], n: int = N_FITNESS) -> float:
        return fmean(self.divergences(formats, n))


@dataclass(frozen=True)
class Measures:
    """What every plan is told by: divergences on two texts, and what a device's products take, where it is known."""

    calibration: Meter
    test: Meter
    latency: plan_costs.Costs | None


def meter(model: Model, chunks: torch.Tensor) -> Meter:
    """Call it while the model still has its own weights."""
    return Meter(model, chunks, [model.log_probs(chunk) for chunk in chunks])


def open_model(source: checkpoint.Checkpoint, stats: Mapping[str, Stats], progress: Progressor) -> Model:
    """With every matrix coded in every type; rows do not depend on each other, so their order does not matter."""
    whole = in_transformers(source)
    names = gguf_names(source.architecture, [*source.tensors], source.config["num_hidden_layers"])
    modules = {names[f"{n}.weight"]: m for n, m in whole.named_modules() if f"{n}.weight" in names}
    linear = {name: m for name, m in modules.items() if isinstance(m, torch.nn.Linear) and name.startswith("blk.")}
    coded: dict[str, dict[str, torch.Tensor]] = {}
    with progress.step("code every matrix in every type") as tick:
        for done, (name, module) in enumerate(linear.items(), 1):
            weights = module.weight.detach()
            coded[name] = {
                kind: search.quantize(weights, stats[name], FORMATS[kind])[0].dequantize().half() for kind in TYPES
            }
            tick(done, len(linear), name)
    return Model(whole, linear, coded)


def error_tables(model: Model, stats: Mapping[str, Stats]) -> dict[str, plan_costs.Costs]:
    """{measure: {matrix: {type: error}}} of the same codes."""
    found: dict[str, plan_costs.Costs] = {"frobenius": {}, "output": {}}
    for name, kinds in model.coded.items():
        weights = model.modules[name].weight.detach()
        for measure, table in found.items():
            of = plan_costs.MEASURES[measure]
            table[name] = {kind: of(weights - coded.float(), stats[name]) for kind, coded in kinds.items()}
    return found


@dataclass(frozen=True)
class Chooser:
    """What the ways to choose a plan share, at one size."""

    model: Model
    sizes: plan.Sizes
    costs: dict[str, plan_costs.Costs]
    latency: plan_costs.Costs | None
    calibration: Meter
    budget_bytes: int
    seconds: float
    state: Path

    def by_program(self, measure: str) -> Formats:
        return plan_milp.solve(self.costs[measure], self.sizes, self.budget_bytes).formats

    def in_time(self, share: float) -> Formats:
        """By the last program, in a time from its own plan's (share 0) to the least of any plan of this size (1)."""
        assert self.latency is not None
        own = token_ns(self.by_program("predicted divergence"), self.latency)
        least = plan_milp.solve(self.latency, self.sizes, self.budget_bytes).error
        costs, budget_ns = self.costs["predicted divergence"], own - share * (own - least)
        # A part in a million for what the solver rounds.
        budget_ns *= 1 + 1e-6
        return plan_milp.solve(costs, self.sizes, self.budget_bytes, latency=self.latency, budget_ns=budget_ns).formats

    def by_genetic(self) -> Formats:
        """One gene a decoder layer."""
        layers: dict[str, list[str]] = {}
        for name in self.sizes:
            layers.setdefault(".".join(name.split(".")[:2]), []).append(name)
        sizes = {layer: {k: sum(self.sizes[n][k] for n in names) for k in TYPES} for layer, names in layers.items()}

        def spread(formats: Formats) -> Formats:
            return {name: formats[layer] for layer, names in layers.items() for name in names}

        found = genetic(
            Space(sizes, self.budget_bytes), lambda formats: self.calibration.fitness(spread(formats)), GENETIC, seed=0
        )
        return spread(found.formats)

    def by_search(self) -> Formats:
        start = self.by_program("predicted divergence")
        space = Space(self.sizes, self.budget_bytes)
        return evolve(
            space, start, self.calibration.fitness, EVOLUTION, seed=0, state_path=self.state, budget_s=self.seconds
        ).formats


WAYS: dict[str, Callable[[Chooser], Formats]] = {
    "program, Frobenius error (MXQ)": lambda chooser: chooser.by_program("frobenius"),
    "program, error of the output": lambda chooser: chooser.by_program("output"),
    "program, predicted divergence": lambda chooser: chooser.by_program("predicted divergence"),
    "genetic algorithm by layer": Chooser.by_genetic,
    "evolutionary search from the last program": Chooser.by_search,
}
IN_TIME: dict[str, Callable[[Chooser], Formats]] = {
    "the last program, half of the time it can save": lambda chooser: chooser.in_time(0.5),
    "the last program, all of the time it can save": lambda chooser: chooser.in_time(1.0),
}


def token_ns(formats: Formats, latency: plan_costs.Costs) -> float:
    return math.fsum(latency[name][kind] for name, kind in formats.items())


def row_of(label: str, target: float, choose: Callable[[], Formats], by: Measures) -> Row:
    calibration = by.calibration
    before, began = calibration.n_measured, time.monotonic()
    formats = choose()
    seconds = time.monotonic() - began
    weights = {name: module.weight.numel() for name, module in calibration.model.modules.items()}
    bits = math.fsum(weights[n] * FORMATS[k].bits_per_weight for n, k in formats.items()) / sum(weights.values())
    return Row(
        label=label,
        target=target,
        bits_per_linear_weight=bits,
        counts={kind: list(formats.values()).count(kind) for kind in TYPES},
        n_measured=calibration.n_measured - before,
        fitness=calibration.fitness(formats),
        kld_chunks=by.test.divergences(formats, len(by.test.chunks)),
        seconds=seconds,
        token_us=token_ns(formats, by.latency) / 1e3 if by.latency else None,
    )


def run(options: argparse.Namespace, where: Places, out: Path) -> Plans:
    """Measure the plans at every size, writing the table after each."""
    progress = Progressor()
    recipe = read_recipe(options.recipe or where.root / "models" / f"{RECIPE}.toml")
    (folder,) = build(recipe, where, progress, options.threads, [recipe.reference])
    base_path = folder / load_artifact(folder).entry
    context = Context(
        recipe, sources.fetch(recipe.source, recipe.sha256, where.sources), where, options.threads, progress
    )
    source, base = checkpoint.load(base_path), plan.read_base(base_path)
    stats, steps = input_stats(context, base_path)
    felt, step = output_sensitivity(context, source)
    shop = quantize.Workshop(where.stages, f"{recipe.name}-plans", weights_key=context.source.sha256,
                             stats_key=[s.settings for s in [*steps, step]], device=torch.device("cpu"))  # fmt: skip
    with progress.step("predict each matrix's divergence in each type") as tick:
        predicted = predicted_costs.predicted_divergence(source, base, stats, felt, TYPES, shop, tick)
    model = open_model(source, stats, progress)
    texts = [sources.dataset(spec, where.sources) for spec in (recipe.calibration.text, options.text)]
    cut = [sensitivity.cut(source, text, N_CTX, n) for text, n in zip(texts, (N_FITNESS, options.chunks), strict=True)]
    calibration, test = (meter(model, chunks) for chunks in cut)
    costs = error_tables(model, stats) | {"predicted divergence": predicted}
    sizes = plan.sizes(base, plan.choices(base, base.linear, TYPES), padded=False)
    report = read_record(options.profile, Report) if options.profile else None
    latency = plan_costs.latencies(report, base, sizes) if report else None
    measures = Measures(calibration, test, latency)
    table = Plans(
        model=recipe.name,
        cpu=cpu_model(),
        calibration=recipe.calibration.text,
        test=options.text,
        n_ctx=N_CTX,
        n_fitness=N_FITNESS,
        start_time=now(),
        rows=[],
        profiled=report.results[0].facts_before.cpu if report else "",
    )

    def add(label: str, target: float, choose: Callable[[], Formats]) -> None:
        nonlocal table
        with progress.step(f"{label}, {target} bits" if target else label):
            row = row_of(label, target, choose, measures)
        progress.say(f"    KLD {fmean(row.kld_chunks):.5f}, {row.seconds:.1f} s")
        table = msgspec.structs.replace(table, rows=[*table.rows, row])
        write_atomic(out, encode(table))

    for kind in TYPES[:2]:
        add(f"uniform {kind}", 0.0, partial(dict, dict.fromkeys(sizes, kind)))
    n_weights = sum(math.prod(base.shapes[name]) for name in sizes)
    for bits in options.bits or BITS:
        key = digest([sha256_file(texts[0]), costs["predicted divergence"], bits, tool_versions()])
        state = where.stages / f"plans-{key[:16]}.json"
        chooser = Chooser(model, sizes, costs, latency, calibration, int(n_weights * bits / 8), options.seconds, state)
        for label, choose in (WAYS | (IN_TIME if latency else {})).items():
            add(label, bits, partial(choose, chooser))
    return table


def lines_of(table: Plans) -> list[str]:
    lines = [
        f"| plan | bits | {' / '.join(TYPES)} | KLD, calibration text | KLD, test [95 %] | s | plans measured "
        "| us a token, predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table.rows:
        low, high = mean_interval(row.kld_chunks) or (math.nan, math.nan)
        lines.append(
            f"| {row.label} | {row.bits_per_linear_weight:.3f} | {' / '.join(map(str, row.counts.values()))} "
            f"| {row.fitness:.5f} | {fmean(row.kld_chunks):.5f} [{low:.5f}, {high:.5f}] | {row.seconds:.0f} "
            f"| {row.n_measured} | {'' if row.token_us is None else round(row.token_us)} |"
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipe", type=Path, nargs="?", help=f"recipe of a language model that memory holds; default: {RECIPE}")
    add("--bits", type=float, action="append", help=f"a size (repeatable); default: {BITS}")
    add("--seconds", type=at_least(1), default=400, help="of measuring for the search (default %(default)s)")
    add(
        "--profile",
        type=Path,
        help="report.json of the task `profile` on this model; adds plans that keep a budget of time",
    )
    add("--text", default="wikitext2-test", help="dataset to test on (default %(default)s)")
    add("--chunks", type=at_least(2), default=N_TEST, help="of it (default %(default)s)")
    add("--threads", type=at_least(1), default=os.cpu_count() or 1, help="of calibration (default %(default)s)")
    output_options(parser, "plans.json")
    return parser


@command("plan_table", "The rows that were measured are kept.")
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    where = places()
    out = result_path(options, where, "plans.json")
    print("\n".join(lines_of(run(options, where, out))))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""slimpi's perplexity and throughput tasks against llama.cpp's own tools: same library, same files, same threads.

`python benchmarks/peers.py` writes benchmarks/results/<machine>/peers.json, prints a table, and exits 1 if a target
is missed. Perplexity must agree within 0.5%. Throughput is taken in pairs of runs, slimpi first in one and
llama-bench first in the next, so that drift cancels; the median of the pairs' ratios must reach 0.98. A model's pairs
go on until the 95% interval of each median lies on one side of 0.98, but not beyond --pairs: a noisy machine gets
more of them, and the median decides in the end. A run repeats little: one process differs from the next by more (3 to
5 %, seen on x86) than its repetitions do.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import llama_tools
from bench_common import at_least, command, here, now, output_options, result_path
from llama_tools import Build, Wheel
from peer_rows import MAX_PAIRS, Conditions, Peers, PerplexityRow, SpeedRow, Tool, Verdict, decided, verdicts_of

from device.records import SlimpiError, encode, write_atomic
from device.results import Measurement, Report
from device.schema import Artifact, Job, Perplexity, Provenance, Task, Throughput, describe_file
from pipeline.deploy import run_job
from pipeline.jobs import describe_dataset
from pipeline.store import Places, find_artifact, load_artifact, places

MODEL, VARIANTS = "smollm2-135m", ("F16", "Q8_0", "Q4_K_M")
HOST: Provenance = "host"


@dataclass(frozen=True)
class Model:
    """A GGUF file under its variant's name, and the artifact that hands it to the agent."""

    variant: str
    path: Path
    artifact: Artifact

    @property
    def sha256(self) -> str:
        return next(f.sha256 for f in self.artifact.files if f.path == self.artifact.entry)


def models_from(named: Sequence[str], where: Places) -> list[Model]:
    """The models that `--gguf NAME=PATH` names, else the built SmolLM2 artifacts."""
    if named:
        return [_adopt(name) for name in named]
    folders = [find_artifact(where.artifacts, f"{MODEL}:{variant}") for variant in VARIANTS]
    built = [(folder, load_artifact(folder)) for folder in folders]
    return [Model(artifact.variant, folder / artifact.entry, artifact) for folder, artifact in built]


def _adopt(named: str) -> Model:
    """A loose GGUF file as an artifact; the tasks run here use its entry and hash alone, so the rest stays empty."""
    name, _, file = named.partition("=")
    path = Path(file)
    if not name or not path.is_file():
        raise SlimpiError(f"--gguf {named!r} is not NAME=PATH of an existing file.")
    described = describe_file(path.parent, path.name)
    artifact = Artifact(
        id=f"peers-{described.sha256[:12]}",
        name=name,
        model=name,
        variant=name,
        kind="gguf",
        task="lm",
        entry=path.name,
        files=[described],
        reference=False,
        tokenizer_sha256="0" * 64,
        n_weights=0,
        n_linear_weights=0,
        bits_per_weight=0.0,
        bits_per_linear_weight=0.0,
        size_bytes=described.size_bytes,
        plan={},
        notes=["a loose file, described for one comparison only"],
    )
    return Model(name, path, artifact)


def run_slimpi(model: Model, task: Task, data_dir: Path, threads: int) -> Report:
    """The task through the agent, in a fresh work folder: an old journal must never answer for a new run."""
    with tempfile.TemporaryDirectory(prefix="slimpi-peers-") as work:
        job = Job(
            id="peers",
            artifact=model.artifact,
            artifact_dir=str(model.path.parent.resolve()),
            data_dir=str(data_dir.resolve()),
            work_dir=work,
            tasks=[task],
            threads=threads,
            provenance=HOST,
        )
        report = run_job("local", job)
    result = report.results[0]
    if result.status != "ok":
        raise SlimpiError(f"slimpi's {type(task).__name__.lower()} failed on {model.variant}: {result.error}")
    return report


def measurement(report: Report, metric: str) -> Measurement:
    found = {m.metric: m for m in report.results[0].measurements}
    if metric not in found:
        raise SlimpiError(f"the report has no {metric}, only {sorted(found)}. Do agent and benchmark fit together?")
    return found[metric]


def compare_perplexity(
    tools: Path, wheel: Wheel, model: Model, data_dir: Path, task: Perplexity, threads: int
) -> PerplexityRow:
    report = run_slimpi(model, task, data_dir, threads)
    text = data_dir / task.dataset.file.path
    theirs = llama_tools.run_perplexity(tools, model.path, text, task.n_ctx, task.n_chunks, threads)
    llama_tools.check_same(wheel, "CPU features", wheel.features, theirs.features)
    row = PerplexityRow(
        variant=model.variant,
        model_sha256=model.sha256,
        corpus=task.dataset.name,
        corpus_sha256=task.dataset.file.sha256,
        n_ctx=task.n_ctx,
        n_threads=threads,
        slimpi_chunk_nll_nats=measurement(report, "nll").samples,
        llama_running_ppl=theirs.running_ppl,
        llama_ppl_stderr=theirs.ppl_stderr,
        provenance=HOST,
    )
    ours, peer, error = row.slimpi_running_ppl[-1], row.llama_running_ppl[-1], row.llama_ppl_stderr
    n_chunks = len(row.running_ratios)
    print(
        f"{model.variant} perplexity, {n_chunks} chunks: slimpi {ours:.4f}, llama-perplexity {peer:.4f} +/- {error:.4f}"
    )
    return row


def compare_throughput(tools: Path, model: Model, task: Throughput, pairs: int, threads: int) -> list[SpeedRow]:
    """Pairs of runs until they decide, at most `pairs`, first places alternating; two rows (prefill, decode) a run."""
    rows: list[SpeedRow] = []
    order: tuple[Tool, Tool] = ("slimpi", "llama-bench")
    for pair in range(pairs):
        if decided(rows):
            break
        for place, tool in enumerate(order if pair % 2 == 0 else order[::-1]):
            load, stamp = os.getloadavg()[0], now()
            for n_prompt, n_gen, n_batch, n_ubatch, samples_ns in RUNNERS[tool](tools, model, task, threads):
                row = SpeedRow(
                    tool=tool,
                    variant=model.variant,
                    model_sha256=model.sha256,
                    pair=pair,
                    order=place,
                    n_prompt=n_prompt,
                    n_gen=n_gen,
                    n_batch=n_batch,
                    n_ubatch=n_ubatch,
                    n_threads=threads,
                    test_time=stamp,
                    load_1min_before=load,
                    samples_ns=samples_ns,
                    provenance=HOST,
                )
                rows.append(row)
                ts = row.samples_ts
                print(
                    f"{model.variant} pair {pair + 1}/{pairs} {tool:11} {row.test:6} median {median(ts):8.2f} t/s "
                    f"({min(ts):.2f} to {max(ts):.2f}, n {len(ts)}, load {load:.2f})",
                    flush=True,
                )
    return rows


Test = tuple[int, int, int, int, list[int]]
"""n_prompt, n_gen, n_batch, n_ubatch, samples_ns."""


def _run_slimpi_tests(tools: Path, model: Model, task: Throughput, threads: int) -> list[Test]:
    report = run_slimpi(model, task, model.path.parent, threads)
    tests: list[Test] = []
    for metric, n_prompt, n_gen in (
        ("prefill_tokens_per_s", task.n_prompt, 0),
        ("decode_tokens_per_s", 0, task.n_gen),
    ):
        found = measurement(report, metric)
        samples_ns = [round((n_prompt + n_gen) * 1e9 / ts) for ts in found.samples]
        tests.append((n_prompt, n_gen, found.conditions["n_batch"], found.conditions["n_ubatch"], samples_ns))
    return tests


def _run_peer_tests(tools: Path, model: Model, task: Throughput, threads: int) -> list[Test]:
    rows = llama_tools.run_bench(tools, model.path, task.n_prompt, task.n_gen, task.repetitions, threads)
    return [(row.n_prompt, row.n_gen, row.n_batch, row.n_ubatch, row.samples_ns) for row in rows]


RUNNERS = {"slimpi": _run_slimpi_tests, "llama-bench": _run_peer_tests}


def conditions(machine: str, wheel: Wheel, build: Build, start: str, load_before: Sequence[float]) -> Conditions:
    return Conditions(
        **here(machine, start),
        llama_cpp_python=wheel.version,
        wheel_commit=wheel.commit,
        build_commit=build.commit,
        build_number=build.number,
        features=wheel.features,
        load_avg_before=list(load_before),
        load_avg_after=list(os.getloadavg()),
    )


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    heads = f"{'slimpi / peer':>13} {'95 % interval':>16} {'lowest':>8} {'highest':>8} {'n':>4}"
    print(f"\n{'variant':8} {'test':19} {heads}  target")
    for v in verdicts:
        interval = "-" if v.low is None or v.high is None else f"{v.low:.3f} to {v.high:.3f}"
        figures = f"{v.ratio:13.5f} {interval:>16} {v.ratio_min:8.5f} {v.ratio_max:8.5f} {v.n:4d}"
        print(f"{v.variant:8} {v.test:19} {figures}  {v.target}: {'ok' if v.ok else 'MISSED'}")


def compare(options: argparse.Namespace, where: Places, out: Path) -> Peers:
    """Both comparisons over all models; perplexity first, since it also proves that both are the same build.

    `out` is written after each model, so that a run that is stopped keeps those it had timed.
    """
    start, load_before = now(), os.getloadavg()
    models = models_from(options.gguf, where)
    dataset = describe_dataset(options.text, where)
    wheel = llama_tools.probe_wheel()
    tools = llama_tools.find_or_build(options.peers_dir)
    build = llama_tools.probe_build(tools)
    llama_tools.check_same(wheel, "commit", wheel.commit.removesuffix("-dirty"), build.commit)
    scored = Perplexity(dataset=dataset, n_ctx=options.n_ctx, n_chunks=options.chunks)
    timed = Throughput(n_prompt=options.n_prompt, n_gen=options.n_gen, repetitions=options.repetitions)
    perplexity = [compare_perplexity(tools, wheel, model, where.datasets, scored, options.threads) for model in models]
    throughput: list[SpeedRow] = []
    for model in models:
        throughput += compare_throughput(tools, model, timed, options.pairs, options.threads)
        peers = Peers(
            conditions=conditions(options.machine, wheel, build, start, load_before),
            perplexity=perplexity,
            throughput=throughput,
            verdicts=verdicts_of(perplexity, throughput),
        )
        write_atomic(out, encode(peers))
    return peers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gguf", action="append", default=[], metavar="NAME=PATH", help=f"a model; default: {MODEL} {VARIANTS}")
    add("--text", default="wikitext2-test", help="dataset for perplexity, named as in `slimpi bench --text`")
    add("--n-ctx", type=at_least(8), default=512, help="tokens in a chunk (default %(default)s)")
    add("--chunks", type=at_least(0), default=20, help="chunks to score, 0 = all (default %(default)s)")
    add("--pairs", type=at_least(0), default=MAX_PAIRS, help="timed pairs at most, 0 = none (default %(default)s)")
    add("--n-prompt", type=at_least(1), default=512, help="tokens of prefill (default %(default)s)")
    add("--n-gen", type=at_least(1), default=128, help="tokens of decode (default %(default)s)")
    add("--repetitions", type=at_least(1), default=1, help="repetitions in a run (default %(default)s)")
    add("--threads", type=at_least(1), default=1, help="inference threads of both (default %(default)s)")
    add("--peers-dir", type=Path, default=Path(__file__).parent / "peers", help="where the tools are, or are built")
    output_options(parser, "peers.json")
    return parser


@command("peers", "The models that were timed to the end are written; a new run measures all again.")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if something failed or a target is missed; the results are written either way."""
    options = _parser().parse_args(argv)
    where = places()
    out = result_path(options, where, "peers.json")
    peers = compare(options, where, out)
    print_verdicts(peers.verdicts)
    print(f"\nwritten to {out}")
    return 0 if all(verdict.ok for verdict in peers.verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())

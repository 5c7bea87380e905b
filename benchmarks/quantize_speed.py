"""Seconds, memory and KL divergence of quantizing one model to 4 bits: our methods against the field's tools.

`python benchmarks/quantize_speed.py` quantizes SmolLM2's linear layers to 4.5 bits a weight (groups of 32 with a 16-bit
scale; hqq: of 64 with a scale and an offset), embeddings left alone, with each tool in an environment of its own and
the same calibration tokens; round after round, so that what else the machine does hits all alike. Wall and CPU time
count from the start of the process (of llama.cpp's programs for llama.cpp), imports and loading included. All results
are then evaluated by the same torch code. Writes benchmarks/results/<machine>/quantize_speed.json.

Asked: at equal or better KL divergence, half the time of the fastest calibrated peer; exit code 1 if it is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import llama_tools
import msgspec
import numpy as np
import torch
from bench_common import at_least, command, cpu_model, now, output_options, result_path
from quantize_peers.common import Request, load_model, second_half

from device.llama import LlamaModel
from device.records import Record, SlimpiError, encode, read_record, sha256_file, write_atomic
from pipeline import sources
from pipeline.build import build
from pipeline.progress import Progressor
from pipeline.recipes import read_recipe
from pipeline.store import Places, digest, load_artifact, places, whole_folder

RECIPE = "smollm2-135m-methods"
N_CTX, N_CALIBRATION, N_TEST = 512, 16, 6
MAX_RATIO = 0.5
TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    "hqq": ("hqq==0.2.8", "transformers==5.24.0"),
    "nncf": ("nncf==3.4.0", "transformers==5.24.0"),
    "auto-round": ("auto-round==0.16.1",),
    "llmcompressor": ("llmcompressor==0.14.0",),
}
Tool = Literal["slimpi", "llama.cpp", "hqq", "nncf", "auto-round", "llmcompressor"]


@dataclass(frozen=True)
class Contender:
    """One way to quantize. calibrated: whether it reads the calibration tokens."""

    label: str
    tool: Tool
    script: str
    calibrated: bool
    settings: dict[str, Any] = field(default_factory=dict)


CONTENDERS = (
    Contender("hqq g64", "hqq", "hqq_peer", False, {"nbits": 4, "group_size": 64}),
    Contender("nncf scale estimation", "nncf", "nncf_peer", True, {"group_size": 32, "scale_estimation": True}),
    Contender(
        "nncf AWQ + scale estimation", "nncf", "nncf_peer", True,
        {"group_size": 32, "awq": True, "scale_estimation": True},
    ),
    Contender("auto-round 0 iterations", "auto-round", "auto_round_peer", True, {"group_size": 32, "iters": 0}),
    Contender("auto-round 20 iterations", "auto-round", "auto_round_peer", True, {"group_size": 32, "iters": 20}),
    Contender("llmcompressor GPTQ", "llmcompressor", "llmcompressor_peer", True, {"group_size": 32}),
    Contender("llama-quantize Q4_0", "llama.cpp", "llama_peer", True, {"type": "Q4_0"}),
    Contender("llama-quantize IQ4_NL", "llama.cpp", "llama_peer", True, {"type": "IQ4_NL"}),
    *(
        Contender(f"slimpi {method.upper()}-{kind}", "slimpi", "slimpi_peer", method not in ("rtn", "hqq"),
                  {"method": method, "format": kind})
        for method in ("rtn", "hqq", "search", "gptq")
        for kind in ("Q4_0", "IQ4_NL")
    ),
    # Means are known well from few tokens.
    *(
        contender
        for kind in ("Q4_0", "IQ4_NL")
        for contender in (
            Contender(f"slimpi SEARCH-{kind}, 2 chunks", "slimpi", "slimpi_peer", True,
                      {"method": "search", "format": kind, "n_chunks": 2}),
            Contender(f"llama-quantize {kind}, 2 chunks", "llama.cpp", "llama_peer", True,
                      {"type": kind, "n_chunks": 2}),
        )
    ),
)  # fmt: skip


class Run(Record, frozen=True, kw_only=True):
    """One process. load_before: the machine's 1-minute load average just before it."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    load_before: float


class Row(Record, frozen=True, kw_only=True):
    """One contender. why: why it does not run here, where it does not."""

    label: str
    tool: Tool
    calibrated: bool
    packages: list[str]
    settings: dict[str, Any]
    runs: list[Run] = msgspec.field(default_factory=list)
    kld_chunks: list[float] = msgspec.field(default_factory=list)
    why: str = ""

    @property
    def wall_s(self) -> float:
        return median(run.wall_s for run in self.runs)

    @property
    def kld(self) -> float:
        return fmean(self.kld_chunks)


class Speeds(Record, frozen=True, kw_only=True):
    """quantize_speed.json"""

    model: str
    cpu: str
    threads: int
    calibration: str
    n_calibration_tokens: int
    test: str
    start_time: str
    rows: list[Row]


@dataclass(frozen=True)
class Bench:
    """What every contender gets. base: the model as F16 GGUF; hf: the same as a Hugging Face folder."""

    folder: Path
    base: Path
    text: Path
    tools: Path
    environments: Path
    threads: int

    def request(self, contender: Contender, evaluate: bool) -> Request:
        files = {"gguf": str(self.base), "text": str(self.text), "n_ctx": N_CTX, "n_chunks": N_CALIBRATION}
        mine = self.folder / "out"
        own = files | {"tools": str(self.tools), "out": str(mine / "model.gguf")}
        return Request(
            model=str(self.folder / "hf"),
            calibration=str(self.folder / "calibration.npy"),
            test=str(self.folder / "test.npy"),
            reference=str(self.folder / "reference.npy"),
            threads=self.threads,
            evaluate=evaluate,
            settings=(own if contender.tool in ("slimpi", "llama.cpp") else {}) | contender.settings,
        )


def prepare(options: argparse.Namespace, where: Places, progress: Progressor) -> Bench:
    """Model, tokens, the reference's logits and the tools; the first three are kept between runs."""
    recipe = read_recipe(where.root / "models" / f"{RECIPE}.toml")
    (folder,) = build(recipe, where, progress, options.threads, [recipe.reference])
    base = folder / load_artifact(folder).entry
    texts = {name: sources.dataset(spec, where.sources)
             for name, spec in (("calibration", recipe.calibration.text), ("test", options.text))}  # fmt: skip
    key = digest([load_artifact(folder).id, *(sha256_file(path) for path in texts.values())])
    kept = where.stages / f"quantize-speed-{key[:16]}"
    if not kept.exists():
        with whole_folder(kept) as scratch, progress.step("model, tokens and reference for the peers"):
            _write_inputs(scratch, base, texts)
    peers = options.peers_dir
    return Bench(kept, base, texts["calibration"], llama_tools.find_or_build(peers), peers, options.threads)


def _write_inputs(folder: Path, base: Path, texts: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    model = load_model(str(base.parent), gguf_file=base.name)
    model.save_pretrained(folder / "hf")
    AutoTokenizer.from_pretrained(str(base.parent), gguf_file=base.name).save_pretrained(folder / "hf")
    for name, n_chunks in (("calibration", N_CALIBRATION), ("test", N_TEST)):
        with LlamaModel(base, 1) as reader:
            tokens = reader.tokenize(texts[name].read_bytes())
        np.save(folder / f"{name}.npy", tokens[: n_chunks * N_CTX].reshape(n_chunks, N_CTX).astype(np.int64))
    expected = [second_half(model, chunk).numpy() for chunk in np.load(folder / "test.npy")]
    np.save(folder / "reference.npy", np.stack(expected))


def environment(tool: Tool, folder: Path, progress: Progressor) -> Path:
    """The Python of the tool's own environment, made at the first use; ours and llama.cpp's is this one."""
    if tool not in ENVIRONMENTS:
        return Path(sys.executable)
    packages = [TORCH, *ENVIRONMENTS[tool]]
    home = folder / f"{tool}-{digest(packages)[:8]}"
    if not (home / "installed").exists():
        with progress.step(f"install {' '.join(packages)}"):
            llama_tools.run_tool([sys.executable, "-m", "venv", str(home)])
            llama_tools.run_tool([str(home / "bin/python"), "-m", "pip", "install", "--quiet", *packages])
            (home / "installed").touch()
    return home / "bin/python"


def run_once(bench: Bench, contender: Contender, evaluate: bool, python: Path) -> tuple[Run, list[float]]:
    """The contender's process from start to end. SlimpiError with its last words if it fails."""
    out = bench.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    _link_tokenizer(bench, out)
    asked, answer = out / "request.json", out / "answer.json"
    asked.write_text(json.dumps(asdict(bench.request(contender, evaluate))))
    scripts = Path(__file__).parent / "quantize_peers"
    path = f"{scripts.parent}:{scripts.parent.parent}" if contender.tool == "slimpi" else str(scripts.parent)
    threads = str(bench.threads)
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    load = os.getloadavg()[0]
    done = subprocess.run(
        [str(python), str(scripts / f"{contender.script}.py"), str(asked), str(answer)],
        env=os.environ | settings | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise SlimpiError(f"{contender.label} ended with {done.returncode}: {last[:300]}")
    found = json.loads(answer.read_text())
    klds = found.pop("kld_chunks", [])
    return Run(**found, load_before=load), klds


def _link_tokenizer(bench: Bench, out: Path) -> None:
    """transformers wants a config beside a GGUF."""
    for file in (bench.folder / "hf").glob("*.json"):
        (out / file.name).symlink_to(file)


def measure(bench: Bench, contender: Contender, known: Row | None, progress: Progressor) -> Row:
    """The row with one more run; evaluated in its first."""
    packages = [TORCH, *ENVIRONMENTS[contender.tool]] if contender.tool in ENVIRONMENTS else []
    row = known or Row(label=contender.label, tool=contender.tool, calibrated=contender.calibrated,
                       packages=packages, settings=contender.settings)  # fmt: skip
    if row.why:
        return row
    try:
        with progress.step(f"{contender.label}, run {len(row.runs) + 1}"):
            python = environment(contender.tool, bench.environments, progress)
            run, klds = run_once(bench, contender, not row.runs, python)
    except SlimpiError as error:
        progress.say(f"    {error}")
        return msgspec.structs.replace(row, why=str(error))
    progress.say(f"    {run.wall_s:.1f} s, CPU {run.cpu_s:.1f} s, {run.peak_rss_bytes / 2**20:.0f} MiB")
    return msgspec.structs.replace(row, runs=[*row.runs, run], kld_chunks=klds or row.kld_chunks)


def lines_of(speeds: Speeds) -> list[str]:
    """A line a contender, the quickest first, then the verdicts."""
    lines = ["| tool | calibrated | KL divergence | wall s, median [lowest, highest] | CPU s | peak MiB | n |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in sorted((r for r in speeds.rows if r.runs), key=lambda r: r.wall_s):
        walls = [run.wall_s for run in row.runs]
        lines.append(
            f"| {row.label} | {'yes' if row.calibrated else 'no'} | {row.kld:.4f} "
            f"| {row.wall_s:.1f} [{min(walls):.1f}, {max(walls):.1f}] | {median(r.cpu_s for r in row.runs):.1f} "
            f"| {max(r.peak_rss_bytes for r in row.runs) / 2**20:.0f} | {len(walls)} |"
        )
    lines += [f"- {row.label} does not run here: {row.why}" for row in speeds.rows if row.why]
    return [*lines, "", *(line for line, _ in verdicts(speeds))]


def verdicts(speeds: Speeds) -> list[tuple[str, bool]]:
    """For each calibrated peer, the quickest first: our quickest that is no worse, and the ratio of their times. The
    bar is the first line's."""
    peers = sorted((r for r in speeds.rows if r.runs and r.calibrated and r.tool != "slimpi"), key=lambda r: r.wall_s)
    ours = [r for r in speeds.rows if r.runs and r.tool == "slimpi"]
    found = []
    for peer in peers:
        as_good = [r for r in ours if r.kld <= peer.kld]
        if not as_good:
            found.append((f"- {peer.label}: none of ours has its KL divergence of {peer.kld:.4f}: missed", False))
            continue
        best = min(as_good, key=lambda r: r.wall_s)
        ratio = best.wall_s / peer.wall_s
        word = "met" if ratio <= MAX_RATIO else "missed"
        found.append((f"- {peer.label}: {best.label} takes {ratio:.2f} of its time, asked {MAX_RATIO}: {word}",
                      ratio <= MAX_RATIO))  # fmt: skip
    return found


def run(options: argparse.Namespace, where: Places, out: Path) -> Speeds:
    progress = Progressor()
    bench = prepare(options, where, progress)
    rows = {row.label: row for row in read_record(out, Speeds).rows} if out.exists() else {}
    chosen = [c for c in CONTENDERS if not options.only or any(text in c.label for text in options.only)]
    speeds = Speeds(
        model=RECIPE,
        cpu=cpu_model(),
        threads=options.threads,
        calibration=str(bench.text.name),
        n_calibration_tokens=N_CALIBRATION * N_CTX,
        test=options.text,
        start_time=now(),
        rows=list(rows.values()),
    )
    for _ in range(options.rounds):
        for contender in chosen:
            rows[contender.label] = measure(bench, contender, rows.get(contender.label), progress)
            speeds = msgspec.structs.replace(speeds, rows=[rows[c.label] for c in CONTENDERS if c.label in rows])
            write_atomic(out, encode(speeds))
    return speeds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="TEXT", help="contenders whose label holds TEXT (repeatable)")
    add("--rounds", type=at_least(0), default=3, help="more runs of each; 0: print what there is (default %(default)s)")
    add("--threads", type=at_least(1), default=os.cpu_count() or 1, help="of every tool (default %(default)s)")
    add("--text", default="wikitext2-test", help="dataset to evaluate on (default %(default)s)")
    add("--peers-dir", type=Path, default=Path(__file__).parent / "peers", help="where the tools are, or are installed")
    output_options(parser, "quantize_speed.json")
    return parser


@command("quantize_speed", "Run it again: what was measured is kept.")
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    where = places()
    torch.set_num_threads(options.threads)
    out = result_path(options, where, "quantize_speed.json")
    speeds = run(options, where, out) if options.rounds else read_record(out, Speeds)
    print("\n".join(lines_of(speeds)))
    return 0 if (found := verdicts(speeds)) and found[0][1] else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""llama.cpp's own tools as peers: built from the source of the wheel that slimpi runs on, run, and read.

The sdist of llama-cpp-python carries the whole llama.cpp tree, so the tools come from the very commit; they are linked
to the wheel's own libraries and run on them. A static build of the same code decodes 2 to 3 % faster (seen on x86,
Q8_0), which is a difference between builds and not one between llama-bench and slimpi.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path

import msgspec

from device.records import SlimpiError
from pipeline.store import places, whole_folder

TOOLS = {
    "llama-bench": "llama-bench",
    "llama-perplexity": "perplexity",
    "llama-imatrix": "imatrix",
    "llama-quantize": "quantize",
}
"""{tool: its folder under tools/ of llama.cpp's tree}."""
PACKAGE = "llama-cpp-python"
_INCLUDES = ("common", "include", "ggml/include", "vendor")
_LINKED = ("llama-common", "llama", "ggml", "ggml-base", "ggml-cpu")
_WHEEL_PROBE = """
import ctypes, json
from llama_cpp import llama_cpp as api
commit = api._lib.ggml_commit
commit.restype = ctypes.c_char_p
print(json.dumps({"commit": commit().decode(), "features": api.llama_print_system_info().decode()}))
"""


class BenchRow(msgspec.Struct, frozen=True, kw_only=True):
    """What we read of a row of `llama-bench -o json`; the other fields are llama-bench's business."""

    n_batch: int
    n_ubatch: int
    n_threads: int
    n_prompt: int
    n_gen: int
    samples_ns: list[int]


@dataclass(frozen=True)
class PerplexityOutput:
    """llama-perplexity's answer: running estimates after each chunk, the last with its standard error."""

    running_ppl: list[float]
    ppl: float
    ppl_stderr: float
    features: str


@dataclass(frozen=True)
class Wheel:
    """The llama.cpp inside llama-cpp-python: commit, and the CPU features it was compiled for."""

    version: str
    commit: str
    features: str


@dataclass(frozen=True)
class Build:
    """llama.cpp's own name for what the tools were made from."""

    number: int
    commit: str


def find_or_build(peers_dir: Path) -> Path:
    """Folder of the tools' binaries: `peers_dir/bin` if someone built them there, else our own cached build."""
    given = peers_dir / "bin"
    if all((given / tool).is_file() for tool in TOOLS):
        return given
    target = peers_dir / f"llama.cpp-{version(PACKAGE)}"
    if not target.is_dir():
        print(f"build llama.cpp's tools from {PACKAGE} {version(PACKAGE)}: half a minute, once")
        with whole_folder(target) as scratch:
            _build(scratch)
    return target


def _build(folder: Path) -> None:
    check_compiler()
    link_libraries(folder)
    work = folder / "work"
    pinned = f"{PACKAGE}=={version(PACKAGE)}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
    run_tool([*pip, "--dest", str(work), pinned])
    (sdist,) = work.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    (source,) = work.glob("*/vendor/llama.cpp")
    for tool in TOOLS:
        run_tool(compiler_line(tool, source, folder))
    shutil.rmtree(work)


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def check_compiler() -> None:
    """SlimpiError where there is no C++ compiler; before minutes of download, not after."""
    if shutil.which(_compiler()) is None:
        raise SlimpiError(f"no C++ compiler: {_compiler()} is not on the PATH. Install one (g++, clang) or set CXX.")


def compiler_line(tool: str, source: Path, folder: Path) -> list[str]:
    """Compiles a tool of llama.cpp's tree `source` into `folder`, where the libraries are that it runs on ($ORIGIN)."""
    files = sorted(map(str, (source / "tools" / TOOLS[tool]).glob("*.cpp")))
    if not files:
        raise SlimpiError(f"{PACKAGE} {version(PACKAGE)} has no tools/{TOOLS[tool]}. Has llama.cpp's tree changed?")
    includes = [f"-I{source / part}" for part in _INCLUDES]
    libraries = [f"-L{folder}", *(f"-l{name}" for name in _LINKED), "-pthread"]
    # RPATH and not RUNPATH: libllama-common has neither, so that it finds the others by the tool's.
    where = "-Wl,-rpath,$ORIGIN,--disable-new-dtags"
    compiler = [_compiler(), "-std=c++17", "-O2", "-DNDEBUG"]
    return [*compiler, *includes, *files, "-o", str(folder / tool), *libraries, where]


def link_libraries(folder: Path) -> None:
    """llama.cpp from the installed llama-cpp-python, by links: what Python loads, and what only the tools need."""
    package, beside = (Path(str(distribution(PACKAGE).locate_file(name))) / "lib" for name in ("llama_cpp", "."))
    loaded, common = sorted(package.glob("lib*.so*")), sorted(beside.glob("libllama-common.so*"))
    for place, found in ((package, loaded), (beside / "libllama-common.so", common)):
        if not found:
            raise SlimpiError(
                f"{PACKAGE} has no {place}. Reinstall it from source (pip install --force-reinstall --no-binary "
                f"{PACKAGE} {PACKAGE})."
            )
    for library in (*loaded, *common):
        (folder / library.name).symlink_to(library)


def run_tool(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run argv to its end, output captured; SlimpiError with its last lines if it fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise SlimpiError(f"cannot run {argv[0]}: {error.strerror}. Build the peers again.") from error
    if done.returncode:
        said = " | ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]) or "no output"
        raise SlimpiError(
            f"{Path(argv[0]).name} failed with code {done.returncode}: {said}. See its arguments: {argv[1:]}"
        )
    return done


def probe_wheel() -> Wheel:
    """Ask the installed llama-cpp-python, in its own process, what it was built from and for."""
    answer = json.loads(run_tool([sys.executable, "-c", _WHEEL_PROBE]).stdout.splitlines()[-1])
    return Wheel(version(PACKAGE), answer["commit"], _features(answer["features"]))


def probe_build(tools: Path) -> Build:
    """Commit and build number that llama-bench says it was made from."""
    done = run_tool([str(tools / "llama-bench"), "--version"])
    return parse_version(done.stdout + done.stderr)


def parse_version(output: str) -> Build:
    """`version: ... (build 1, commit 0c1e570)`."""
    found = re.search(r"\(build (\d+), commit (\w+)\)", output)
    if found is None:
        raise SlimpiError(f"cannot read llama-bench's version ({output[:200]!r}). Did its format change?")
    return Build(int(found[1]), found[2])


def check_same(wheel: Wheel, what: str, ours: str, theirs: str) -> None:
    """SlimpiError unless wheel and tools agree: other code or other kernels are no peers."""
    if ours != theirs:
        raise SlimpiError(
            f"{what}: {PACKAGE} {wheel.version} has {ours}, the peers have {theirs}. Reinstall the package from source "
            f"(pip install --force-reinstall --no-binary {PACKAGE}) or delete the peers so that they are rebuilt."
        )


def run_perplexity(tools: Path, model: Path, text: Path, n_ctx: int, n_chunks: int, threads: int) -> PerplexityOutput:
    """llama-perplexity over the first n_chunks chunks (0 = all), at its defaults otherwise.

    By default it evaluates 2048 // n_ctx chunks at once, and its own estimate moves with that: by 0.2% with 3 chunks
    of 512 tokens (Q4_K_M), by nothing with a multiple of 4.
    """
    chunks = ["--chunks", str(n_chunks)] if n_chunks else []
    argv = [str(tools / "llama-perplexity"), "-m", str(model), "-f", str(text), "-c", str(n_ctx), "-t", str(threads)]
    done = run_tool([*argv, *chunks])
    return parse_perplexity(done.stderr + done.stdout)


def parse_perplexity(output: str) -> PerplexityOutput:
    """Read llama-perplexity's output: `[1]4.0,[2]5.0,...`, `Final estimate: PPL = 5.0 +/- 0.3`, `system_info: ...`."""
    pairs = re.findall(r"\[(\d+)\]([-\w.]+),", output)
    final = re.search(r"Final estimate: PPL = (\S+) \+/- (\S+)", output)
    info = re.search(r"system_info: [^|\n]*\|(.*)", output)
    if final is None or info is None or [int(i) for i, _ in pairs] != list(range(1, len(pairs) + 1)):
        raise SlimpiError(f"cannot read llama-perplexity's output (its end: {output[-200:]!r}). Did its format change?")
    running = [float(value) for _, value in pairs]
    ppl, stderr = float(final[1]), float(final[2])
    if not running or running[-1] != ppl:
        raise SlimpiError(
            f"llama-perplexity's last running estimate is {running[-1:]}, its final one {ppl}. Did its format change?"
        )
    return PerplexityOutput(running, ppl, stderr, _features(info[1]))


def run_bench(tools: Path, model: Path, n_prompt: int, n_gen: int, repetitions: int, threads: int) -> list[BenchRow]:
    """llama-bench's two rows, prefill then decode; it warms up once before each by itself."""
    argv = [str(tools / "llama-bench"), "-m", str(model), "-o", "json", "-t", str(threads), "-r", str(repetitions)]
    return parse_bench(run_tool([*argv, "-p", str(n_prompt), "-n", str(n_gen)]).stdout)


def parse_bench(output: str) -> list[BenchRow]:
    """`llama-bench -p P -n N -o json`: the prefill row, then the decode row."""
    try:
        rows = msgspec.json.decode(output, type=list[BenchRow])
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise SlimpiError(f"cannot read llama-bench's JSON: {error}. Did its format change?") from error
    kinds = [(row.n_prompt > 0, row.n_gen > 0) for row in rows]
    if kinds != [(True, False), (False, True)] or not all(row.samples_ns for row in rows):
        raise SlimpiError(f"llama-bench gave {len(rows)} rows, expected prefill and decode. Did its format change?")
    return rows


def _features(system_info: str) -> str:
    """`CPU : AVX = 1 | OPENMP = 1 | ` -> `AVX OPENMP`, order kept."""
    return " ".join(re.findall(r"(\w+) = 1\b", system_info))


if __name__ == "__main__":
    print(find_or_build(places().root / "benchmarks" / "peers"))

"""Will these wheels run on a Raspberry Pi 4, or die with SIGILL? Answered before anything is sent.

Method, in the words of the question "disassembly or a known-good list": disassembly first, a list for the rest.
1. Every word of every executable section of every shared object is classified (pipeline/a64.py).
2. A hit in an out-of-line atomic, right behind its own test of the CPU, is *guarded*.
3. A hit in a function that the loader or `import` runs (.init_array, PyInit_*, and all they call directly) would
   kill the process at once: *runs at load*, refused. onnxruntime 1.21.0 is caught here.
4. A hit in a function whose name says which CPU it is for is *dispatched* (DISPATCHED).
5. Stripped libraries name no functions: those are *reviewed* by version, with the counts seen then (REVIEWED).
6. Everything else is *unknown* and refused.
What no reading of code can show, `import_test` shows by importing the packages on an emulated Cortex-A72. QEMU's
model of that core has AES and SHA, which a Pi 4 lacks: those only the disassembly finds.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from device.records import SlimpiError, check_relative
from pipeline import a64, elf
from pipeline.emulator import host
from pipeline.emulator.rootfs import run_user
from pipeline.progress import Tick, quiet

Verdict = Literal["guarded", "dispatched", "reviewed", "runs at load", "unknown"]
REFUSED: tuple[Verdict, ...] = ("runs at load", "unknown")


@dataclass(frozen=True)
class Dispatched:
    """Functions that are called only after a test of the CPU: `functions` is searched for in their names."""

    package: str
    library: str
    functions: str
    extensions: frozenset[str]
    tested_by: str


@dataclass(frozen=True)
class Reviewed:
    """Words per extension seen in a stripped library of one version that ran on the emulated Pi; more is unknown."""

    package: str
    version: str
    library: str
    words: dict[str, int]
    seen: str


DISPATCHED = (
    Dispatched(
        "llama-cpp-python",
        "*.so*",
        r"libunwind|^_Unwind_|^unw_",
        frozenset({"sve", "sme", "mte"}),
        "LLVM's unwinder, linked in: it reads SVE's vector length, SME's state and memory tags only in frames that "
        "have them, and asks HWCAP before it touches SME",
    ),
    Dispatched(
        "numpy",
        "*openblas*",
        r"_(A64FX|ARMV8SVE|ARMV9SME|NEOVERSE[NV]\d)$|_sme1_"
        # Static helpers of those cores' kernels, whose names carry no core.
        r"|^(tobf16_compute|dot_compute|dot_thread_function|init_parameter)$",
        frozenset({"sve", "sme", "bf16", "fp16"}),
        "OpenBLAS takes its kernel set by core (DYNAMIC_ARCH): a Cortex-A72 gets plain NEON ones",
    ),
    Dispatched(
        "numpy",
        "_multiarray_umath*",
        r"^_ZN3hwy.*float16_t",
        frozenset({"fp16"}),
        "numpy sorts float16 in vectors only where the CPU reports ASIMDHP",
    ),
)

_ORT_SEEN = "import and float, INT8, 4-bit and float16 graphs on the emulated Cortex-A72; MLAS dispatches by HWCAP"
_ORT_WORDS = {"sve": 19701, "fp16": 5082, "dotprod": 4898, "sme": 1539, "i8mm": 910, "bf16": 612, "aes": 64}

REVIEWED = (
    Reviewed("onnxruntime", "1.31.1", "libonnxruntime.so*", _ORT_WORDS, _ORT_SEEN),
    Reviewed("onnxruntime", "1.31.1", "onnxruntime_pybind11_state*", _ORT_WORDS, _ORT_SEEN),
)

KNOWN_TO_WORK = {
    "llama-cpp-python": "0.3.36, built by slimpi",
    "msgspec": "0.22.0",
    "numpy": "2.4.6",
    "onnxruntime": "1.31.1",
    "tokenizers": "0.22.2",
}


@dataclass(frozen=True)
class Finding:
    """Instructions of one extension in one function: `count` words, the first at `address` (within the library)."""

    wheel: str
    library: str
    function: str
    address: int
    instruction: str
    extension: str
    count: int
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class ImportTest:
    """`skipped` holds the reason if nothing was run."""

    imported: tuple[str, ...] = ()
    skipped: str = ""


def preflight(wheels: Sequence[Path], progress: Tick = quiet) -> list[Finding]:
    """Check every shared object of the wheels; SlimpiError if one holds instructions that may reach a Pi 4's core.

    Returns what was found and is accepted, one Finding a function and extension.
    """
    findings: list[Finding] = []
    for index, wheel in enumerate(wheels):
        progress(index, len(wheels), wheel.name)
        findings += inspect(wheel)
    refuse(findings)
    return findings


def refuse(findings: Iterable[Finding]) -> None:
    """SlimpiError naming the first finding that is not accepted, how many more there are, and what to use instead."""
    bad = sorted((f for f in findings if f.verdict in REFUSED), key=lambda f: REFUSED.index(f.verdict))
    if not bad:
        return
    first = bad[0]
    package, version = package_and_version(first.wheel)
    known = KNOWN_TO_WORK.get(package)
    remedy = f"{package} {known} is known to work" if known else "No version is known to work"
    if known == version:
        remedy = f"This is the version known to work, in another build: take the wheel from the registry ({known})"
    certainty = "would" if first.verdict == "runs at load" else "may"
    raise SlimpiError(
        f"{first.wheel} {certainty} die on a Raspberry Pi 4: {first.library}, function {first.function}, has "
        f"`{first.instruction}` ({first.extension}) at {first.address:#x}, which {first.reason}. "
        f"{len(bad) - 1} more such places. {remedy}."
    )


def inspect(wheel: Path) -> list[Finding]:
    """Every finding in one wheel, refused ones included. SlimpiError if the wheel or a library is unreadable."""
    findings: list[Finding] = []
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                with archive.open(member) as handle:
                    head = handle.read(4)
                    if elf.is_elf(head):
                        findings += inspect_library(wheel.name, member.filename, head + handle.read())
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise SlimpiError(f"cannot read {wheel}: {error}. Download it again.") from error
    return findings


@dataclass(frozen=True)
class _Hits:
    """Unexecutable words of a library: their addresses, rows of the table, whether guarded, and their functions."""

    address: NDArray[np.int64]
    row: NDArray[np.int16]
    guarded: NDArray[np.bool_]
    function: NDArray[np.int64]


def inspect_library(wheel: str, member: str, data: bytes) -> list[Finding]:
    """Every finding in one shared object; SlimpiError if it is damaged or for another machine."""
    library = elf.parse(data, f"{wheel}: {member}")
    hits = _find_hits(library)
    at_load = _functions_run_at_load(library) if not hits.guarded.all() else np.zeros(0, dtype=np.int64)
    runs_at_load = np.isin(hits.function, at_load) & (hits.function >= 0)
    groups: dict[tuple[str, str, bool, bool], list[int]] = {}
    for i, row in enumerate(hits.row):
        extension = a64.encodings()[row].extension
        name = function_name(library.functions, int(hits.address[i]))
        groups.setdefault((name, extension, bool(hits.guarded[i]), bool(runs_at_load[i])), []).append(i)
    package, version = package_and_version(wheel)
    reviewed = _review(package, version, Path(member).name, groups)
    findings = []
    for (name, extension, guarded, load), members in groups.items():
        verdict, reason = _judge(package, Path(member).name, name, extension, guarded, load, reviewed)
        first = members[0]
        address, instruction = int(hits.address[first]), a64.encodings()[hits.row[first]].name
        findings.append(Finding(wheel, member, name, address, instruction, extension, len(members), verdict, reason))
    return findings


def _judge(
    package: str, library: str, name: str, extension: str, guarded: bool, load: bool, reviewed: str
) -> tuple[Verdict, str]:
    if guarded:
        return "guarded", "runs only if the test of the CPU before it succeeds"
    if load:
        return "runs at load", "runs when the package is imported, whatever the CPU"
    for rule in DISPATCHED:
        same = rule.package == package and fnmatch(library, rule.library)
        if same and extension in rule.extensions and re.search(rule.functions, name.removeprefix("code after ")):
            return "dispatched", rule.tested_by
    if reviewed:
        return "reviewed", reviewed
    return "unknown", "is not known to run only on CPUs that have it"


def _review(package: str, version: str, library: str, groups: dict[tuple[str, str, bool, bool], list[int]]) -> str:
    """What a review of this very version saw, if the library holds no more than was seen then; else empty."""
    words: dict[str, int] = {}
    for (_, extension, guarded, _), members in groups.items():
        if not guarded:
            words[extension] = words.get(extension, 0) + len(members)
    for review in REVIEWED:
        if (review.package, review.version) == (package, version) and fnmatch(library, review.library):
            return review.seen if all(n <= review.words.get(e, 0) for e, n in words.items()) else ""
    return ""


def _find_hits(library: elf.Library) -> _Hits:
    parts: list[tuple[NDArray[np.int64], NDArray[np.int16], NDArray[np.bool_]]] = []
    for section in library.code:
        words = np.frombuffer(section.data, "<u4", len(section.data) // 4)
        positions, rows = a64.classify(words)
        address = section.address + 4 * positions
        code = ~_inside(address, library.data_ranges)
        parts.append((address[code], rows[code], _guarded(words, positions[code], rows[code])))
    if not parts:
        parts = [(np.zeros(0, np.int64), np.zeros(0, np.int16), np.zeros(0, np.bool_))]
    address, row, guarded = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Hits(address, row, guarded, _function_at(library.functions, address))


def _inside(address: NDArray[np.int64], ranges: NDArray[np.uint64]) -> NDArray[np.bool_]:
    if not len(ranges):
        return np.zeros(len(address), dtype=np.bool_)
    index = np.searchsorted(ranges[:, 0], address.astype(np.uint64), side="right") - 1
    return (index >= 0) & (address.astype(np.uint64) < ranges[np.maximum(index, 0), 1])


def _guarded(words: NDArray[np.uint32], positions: NDArray[np.int64], rows: NDArray[np.int16]) -> NDArray[np.bool_]:
    """Whether each hit is an atomic that follows `ldrb w16, [x16, ...]; cbz w16, ...`.

    That is how the out-of-line atomics of libgcc and compiler-rt read `__aarch64_have_lse_atomics` first.
    """
    atomic = np.array([row.extension == "lse" for row in a64.encodings()])[rows]
    before, earlier = words[np.maximum(positions - 1, 0)], words[np.maximum(positions - 2, 0)]
    tests = (before & np.uint32(0xFF00001F)) == 0x34000010
    loads = (earlier & np.uint32(0xFFC003FF)) == 0x39400210
    return atomic & tests & loads & (positions >= 2)


def _function_at(functions: elf.Functions, address: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the function holding each address, -1 where none does."""
    if not len(functions.start):
        return np.full(len(address), -1, dtype=np.int64)
    index = np.searchsorted(functions.start, address.astype(np.uint64), side="right").astype(np.int64) - 1
    inside = (index >= 0) & (address.astype(np.uint64) < functions.end[np.maximum(index, 0)])
    return np.where(inside, index, -1)


def function_name(functions: elf.Functions, address: int) -> str:
    """The symbol of the function at the address; its bounds or its predecessor where it has no name."""
    index = int(np.searchsorted(functions.start, np.uint64(address), side="right")) - 1
    if index < 0:
        return "(no symbol)"
    inside = address < int(functions.end[index])
    name = functions.name[index]
    if inside:
        return name or f"(stripped, {int(functions.start[index]):#x}-{int(functions.end[index]):#x})"
    return f"code after {name}" if name else "(stripped, no unwind entry)"


def _functions_run_at_load(library: elf.Library) -> NDArray[np.int64]:
    """Indices of .init_array's functions, the modules' PyInit_*, and all functions they reach by direct branches."""
    functions = library.functions
    entries = [int(functions.start[i]) for i, name in enumerate(functions.name) if name.startswith("PyInit_")]
    start = _function_at(functions, np.array([*library.initialisers, *entries], dtype=np.int64))
    reached = np.zeros(len(functions.start), dtype=np.bool_)
    frontier = np.unique(start[start >= 0])
    caller, callee = _direct_calls(library)
    while len(frontier):
        reached[frontier] = True
        called = np.unique(callee[np.isin(caller, frontier)])
        frontier = called[~reached[called]]
    return np.flatnonzero(reached)


def _direct_calls(library: elf.Library) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Caller and callee indices of every B and BL between known functions."""
    callers, callees = [], []
    for section in library.code:
        words = np.frombuffer(section.data, "<u4", len(section.data) // 4)
        positions = np.flatnonzero((words >> np.uint32(26)) & np.uint32(0x1F) == 5)
        offset = (words[positions] & np.uint32(0x03FFFFFF)).astype(np.int64)
        offset = np.where(offset >= 1 << 25, offset - (1 << 26), offset)
        source = section.address + 4 * positions
        callers.append(_function_at(library.functions, source))
        callees.append(_function_at(library.functions, source + 4 * offset))
    caller, callee = np.concatenate(callers), np.concatenate(callees)
    known = (caller >= 0) & (callee >= 0) & (caller != callee)
    edges = np.unique(np.stack([caller[known], callee[known]]), axis=1)
    return edges[0], edges[1]


def package_and_version(wheel: str) -> tuple[str, str]:
    """From a wheel's file name (binary distribution format: name-version-...)."""
    parts = wheel.removesuffix(".whl").split("-")
    if len(parts) < 5:
        raise SlimpiError(f"{wheel} is not named as a wheel (name-version-python-abi-platform.whl). Rename it.")
    return normalize(parts[0]), parts[1]


def normalize(requirement: str) -> str:
    """The package a requirement is about, as the index spells it (PEP 503)."""
    name = re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def unpack(wheel: Path, folder: Path) -> None:
    """Lay a wheel's files out for import; SlimpiError if a member's path leaves the folder."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                check_relative(name.rstrip("/"))
            archive.extractall(folder)
    except ValueError as error:
        raise SlimpiError(f"refusing {wheel.name}: {error}.") from error
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise SlimpiError(f"cannot unpack {wheel}: {error}. Download it again.") from error


def import_test(wheels: Sequence[Path], modules: Sequence[str], root: Path | None, python: str = "3.11") -> ImportTest:
    """Import each module in a fresh Python on an emulated Cortex-A72, from the wheels alone.

    root: an arm64 system made by `emulator.user_rootfs`. SlimpiError naming the module, and SIGILL where that is
    how it died. Skipped, with the reason, where there is no such system with this Python, or no emulator.
    """
    program = f"/usr/bin/python{python}"
    if root is None:
        return ImportTest(skipped="no arm64 system given")
    if not (root / program.lstrip("/")).exists():
        return ImportTest(skipped=f"the arm64 system in {root} has no Python {python}")
    if missing := host.missing_packages(host.USER_TOOLS):
        return ImportTest(skipped=f"the emulator is not installed (apt packages {', '.join(missing)})")
    with laid_out(wheels) as env:
        for module in modules:
            done = run_user(root, [program, "-c", f"import {module}"], env)
            if done.returncode != 0:
                raise SlimpiError(_import_failure(module, done.returncode, done.stderr))
    return ImportTest(imported=tuple(modules))


@contextmanager
def laid_out(wheels: Sequence[Path]) -> Iterator[dict[str, str]]:
    """The wheels unpacked as on the device, each in its own folder, and the environment that lets Python see them."""
    with tempfile.TemporaryDirectory(prefix="slimpi-wheels-") as scratch:
        folders = [Path(scratch) / str(i) for i in range(len(wheels))]
        for wheel, folder in zip(wheels, folders, strict=True):
            unpack(wheel, folder)
        yield {
            "PYTHONPATH": os.pathsep.join(str(folder) for folder in folders),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }


def _import_failure(module: str, code: int, stderr: bytes) -> str:
    died = " of SIGILL, an instruction the Pi lacks" if code == -signal.SIGILL else ""
    known = KNOWN_TO_WORK.get(module.replace("_", "-"), "")
    remedy = f"{module} {known} is known to work." if known else "Use another version."
    return f"`import {module}` died{died} on the emulated Cortex-A72: {host.tail(stderr, 1) or 'no output'}. {remedy}"

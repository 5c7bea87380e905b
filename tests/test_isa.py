"""The ISA preflight: the table of encodings against LLVM, capstone and QEMU's Cortex-A72; the verdicts on libraries."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import capstone
import numpy as np
import pytest
from a64_words import BASELINE, EXTENSIONS
from arm64_system import arm64_root
from elf_twin import NOP, RET, TEXT_ADDRESS, branch_and_link, shared_object, static_program
from hypothesis import given, settings
from hypothesis import strategies as st

from device.records import SlimpiError
from pipeline import a64, elf, isa

SDOT = EXTENSIONS["dotprod"]["sdot v0.4s, v1.16b, v2.16b"]
CASAL = EXTENSIONS["lse"]["casal x0, x1, [sp]"]
FMOV_FP16 = EXTENSIONS["fp16"]["fmov v1.4h, #1.0"]
WHEEL = "{}-1.0-cp311-cp311-manylinux_2_28_aarch64.whl"


def classify(word: int) -> str:
    """The extension a single word belongs to; empty for ARMv8.0."""
    _, rows = a64.classify(np.array([word], dtype=np.uint32))
    return a64.encodings()[rows[0]].extension if len(rows) else ""


# --- the table


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_assembled_instructions_are_recognized(extension: str) -> None:
    assert {name: classify(word) for name, word in EXTENSIONS[extension].items()} == dict.fromkeys(
        EXTENSIONS[extension], extension
    )


def test_what_the_pi_executes_is_not_flagged() -> None:
    assert {name: classify(word) for name, word in BASELINE.items() if classify(word)} == {}


def test_every_row_of_the_table_has_an_assembled_witness() -> None:
    words = np.array([w for group in EXTENSIONS.values() for w in group.values()], dtype=np.uint32)
    _, rows = a64.classify(words)
    assert [a64.TABLE[i] for i in range(len(a64.TABLE)) if i not in set(rows.tolist())] == []


def test_positions_are_those_of_the_words() -> None:
    positions, rows = a64.classify(np.array([NOP, SDOT, RET, CASAL], dtype=np.uint32))
    assert positions.tolist() == [1, 3]
    assert [a64.encodings()[r].extension for r in rows] == ["dotprod", "lse"]


@pytest.mark.parametrize("bits", ["0" * 31, "0" * 31 + "x", "0" * 33])
def test_a_malformed_row_is_refused(bits: str) -> None:
    with pytest.raises(ValueError, match="is not 32"):
        a64.compile_row("x", "y", bits)


# What capstone's text says about a word, independent of bit patterns. `sys`: it prints these as plain mrs/msr/sys.
_BY_MNEMONIC = (
    ("sve|sme", r"\b[zp]\d+\b|\bza\b|\bza\d|\bmul vl\b|\bvl\d|^(cnt[bhwd]|rdvl|addvl|addpl|rdffr|setffr|wrffr)$"),
    ("lse", r"^(casp?a?l?[bh]?|swpa?l?[bh]?|(ld|st)(add|clr|eor|set|smax|smin|umax|umin)a?l?[bh]?) "),
    ("rcpc", r"^ldapr[bh]? "),
    ("rcpc2", r"^(ldapur|stlur)"),
    ("lor", r"^(ldlar|stllr)"),
    ("rdm", r"^sqrdml[as]h "),
    ("dotprod", r"^[su]dot "),
    ("i8mm", r"^(usdot|sudot|[su]mmla|usmmla) "),
    ("bf16", r"^bf(dot|mlal[bt]|mmla|cvtn?2?) "),
    ("fhm", r"^fml[as]l2? "),
    ("fcma", r"^(fcmla|fcadd) "),
    ("jscvt", r"^fjcvtzs "),
    ("frintts", r"^frint(32|64)[xz] "),
    ("flagm", r"^(cfinv|rmif|setf8|setf16)"),
    ("aes", r"^(aes|pmull2? v\d+\.1q)"),
    ("sha1/sha2", r"^sha(1|256)"),
    ("sha512", r"^sha512"),
    ("sha3", r"^(eor3|bcax|xar|rax1) "),
    ("sm3", r"^sm3"),
    ("sm4", r"^sm4"),
    ("mte", r"^(stg|st2g|stz2?g|ldg|stgp|addg|subg|irg|gmi|subps?|cmpp) .*(\[|x)"),
    ("pauth", r"^(pac[di][ab]|paci?z[ab]|pac[di]z[ab]|aut[di]z?[ab]|xpac[di]|pacga|ldra[ab]|bl?ra[ab]z?|e?reta[ab])"),
    ("fp16", r"^f(?!cvt[ln]2? |cvtxn|mlal|mlsl|cmla|cadd).*(\bv\d+\.[248]h|\bh\d+)|^[su]cvtf .*(\.[48]h|\bh\d+)"),
)
_BASE_CONVERSIONS = re.compile(r"^fcvt h\d+, [sd]|^fcvt [sd]\d+, h")


def oracle(text: str) -> str:
    if _BASE_CONVERSIONS.match(text):
        return ""
    return next((name for name, pattern in _BY_MNEMONIC if re.search(pattern, text)), "")


_disassembler = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM)
_near_a_row = st.builds(
    lambda row, fill, flip: ((fill & ~row.mask & 0xFFFFFFFF) | row.value) ^ (1 << flip if flip < 32 else 0),
    st.sampled_from(a64.encodings()),
    st.integers(0, 2**32 - 1),
    st.integers(0, 63),
)
# Extensions newer than capstone, and system instructions whose text does not tell.
_CAPSTONE_CANNOT_TELL = {
    "lse128",
    "rcpc3",
    "ls64",
    "mops",
    "cssc",
    "hbc",
    "tme",
    "wfxt",
    "flagm2",
    "ssbs",
    "dit",
    "ecv",
}
_CAPSTONE_CANNOT_TELL |= {"sb", "dpb", "rng", "mte", "sme", "sve"}


@settings(max_examples=1500, deadline=None)
@given(st.integers(0, 2**32 - 1) | _near_a_row)
def test_random_words_are_classified_as_capstone_disassembles_them(word: int) -> None:
    decoded = next(_disassembler.disasm(struct.pack("<I", word), TEXT_ADDRESS), None)
    found = classify(word)
    if decoded is None or found in _CAPSTONE_CANNOT_TELL:
        return
    expected = oracle(f"{decoded.mnemonic} {decoded.op_str}")
    assert found in expected.split("|"), f"{word:#010x} {decoded.mnemonic} {decoded.op_str}"


LLVM_BASE = "+fp-armv8,+neon,+crc"
LLVM_ALL = (
    f"{LLVM_BASE},+v8.8a,+lse,+lor,+rcpc,+rcpc-immo,+ls64,+mte,+mops,+rdm,+dotprod,+i8mm,+bf16,+fullfp16,+fp16fml,"
    "+complxnum,+jsconv,+fptoint,+flagm,+altnzcv,+sb,+ccpp,+ccdp,+rand,+wfxt,+hbc,+tme,+pauth,+aes,+sha2,+sha3,+sm4,"
    "+sve,+sve2,+sve2-aes,+sve2-bitperm,+sve2-sha3,+sve2-sm4,+sme,+sme-f64,+sme-i64,+f32mm,+f64mm"
)
# LLVM prints these as generic system instructions even where the core lacks them.
LLVM_GENERIC = {"flagm", "flagm2", "sb", "dpb", "rng", "wfxt", "tme", "ssbs", "dit", "ecv", "sme"}
# EL2, EL3 and debug state only: no library has them.
LLVM_PRIVILEGED = ("smc", "hvc", "dcps")


def llvm_disassemble(words: np.ndarray, features: str) -> dict[int, str]:
    """Index of each word that is an instruction under these features -> its text, by llvm-mc."""
    lines = "".join(" ".join(f"{b:#04x}" for b in struct.pack("<I", int(w))) + "\n" for w in words)
    argv = ["llvm-mc", "-arch=aarch64", "-disassemble", f"-mattr={features}"]
    done = subprocess.run(argv, input=lines, text=True, capture_output=True, check=False)
    warned = [(int(n) - 1, kind) for n, kind in re.findall(r"<stdin>:(\d+):\d+: warning: (\w+)", done.stderr)]
    invalid = {n for n, kind in warned if kind == "invalid"}
    text = [line.strip() for line in done.stdout.splitlines() if line.startswith("\t") and ".text" not in line]
    good = [i for i in range(len(words)) if i not in invalid]
    # "potentially undefined": bits that should be one are not; no assembler writes those.
    unpredictable = {n for n, kind in warned if kind == "potentially"}
    return {i: line for i, line in zip(good, text, strict=True) if i not in unpredictable}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("llvm-mc"), reason="llvm-mc is not installed (Debian: llvm)")
def test_the_table_is_the_difference_between_llvm_with_and_without_the_extensions() -> None:
    rng = np.random.default_rng(20261122)
    words = [rng.integers(0, 2**32, 60_000)]
    for row in a64.encodings():
        near = (rng.integers(0, 2**32, 400) & ~row.mask & 0xFFFFFFFF) | row.value
        words += [near, near ^ (1 << rng.integers(0, 32, 400))]
    unique = np.unique(np.concatenate(words).astype(np.uint32))
    positions, rows = a64.classify(unique)
    found = {int(p): a64.encodings()[r].extension for p, r in zip(positions, rows, strict=True)}
    base, every = llvm_disassemble(unique, LLVM_BASE), llvm_disassemble(unique, LLVM_ALL)
    missed = [every[i] for i in every.keys() - base.keys() - found.keys()]
    assert [text for text in missed if not text.startswith(LLVM_PRIVILEGED)] == []
    assert [base[i] for i in base.keys() & found.keys() if found[i] not in LLVM_GENERIC] == []
    assert len(every.keys() - base.keys()) > 20_000


# --- QEMU's Cortex-A72 executes what the table says, and nothing else

QEMU = shutil.which("qemu-aarch64-static")
needs_qemu = pytest.mark.skipif(QEMU is None, reason="qemu-aarch64-static is not installed (Debian: qemu-user-static)")
SIGILL = -4
IN_QEMU_A72 = {"aes", "sha1/sha2"}  # its model has the crypto option that a Pi 4 lacks
NOT_IN_QEMU_MAX = {"lse128", "rcpc3", "ls64", "mops", "ecv", "dpb", "wfxt", "hbc", "tme", "cssc"}
# They end a static program in other ways than running on.
_DO_NOT_RUN_ON = re.compile(r"^(brk|ret|br |blr|b\.?(eq)? |bl |cbz|tbz|udf|dc zva)")


def end_of(folder: Path, word: int, cpu: str) -> int:
    program = folder / "program"
    program.write_bytes(static_program([word]))
    program.chmod(0o755)
    assert QEMU is not None
    return subprocess.run([QEMU, "-cpu", cpu, str(program)], capture_output=True, timeout=60, check=False).returncode


@needs_qemu
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_the_emulated_core_dies_of_one_instruction_of_each_extension(extension: str, tmp_path: Path) -> None:
    word = next(iter(EXTENSIONS[extension].values()))
    assert (end_of(tmp_path, word, "cortex-a72") == SIGILL) == (extension not in IN_QEMU_A72)
    if extension not in NOT_IN_QEMU_MAX:
        assert end_of(tmp_path, word, "max") != SIGILL


@needs_qemu
@pytest.mark.slow
def test_the_emulated_core_dies_of_every_instruction_listed_and_runs_the_baseline(tmp_path: Path) -> None:
    ran = [
        name
        for extension, words in EXTENSIONS.items()
        for name, word in words.items()
        if extension not in IN_QEMU_A72 and end_of(tmp_path, word, "cortex-a72") != SIGILL
    ]
    assert ran == []
    running = {name: word for name, word in BASELINE.items() if not _DO_NOT_RUN_ON.match(name)}
    assert {name: code for name, word in running.items() if (code := end_of(tmp_path, word, "cortex-a72"))} == {}


# --- reading libraries


def wheel_of(folder: Path, package: str, libraries: dict[str, bytes]) -> Path:
    path = folder / WHEEL.format(package)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{package}/__init__.py", "")
        for name, data in libraries.items():
            archive.writestr(f"{package}/{name}", data)
    return path


def verdicts(folder: Path, package: str, library: bytes, name: str = "lib.so") -> dict[str, str]:
    return {f.function: f.verdict for f in isa.inspect(wheel_of(folder, package, {name: library}))}


def test_functions_come_from_symbols_or_from_the_unwind_table() -> None:
    code = {"first": [NOP, RET], "second": [NOP, NOP, RET]}
    for stripped in (False, True):
        functions = elf.parse(shared_object(code, stripped=stripped), "lib").functions
        assert functions.start.tolist() == [TEXT_ADDRESS, TEXT_ADDRESS + 8]
        assert functions.end.tolist() == [TEXT_ADDRESS + 8, TEXT_ADDRESS + 20]
        assert functions.name == (["", ""] if stripped else ["first", "second"])


@pytest.mark.parametrize("stripped", [False, True])
def test_an_instruction_reached_from_an_initialiser_runs_at_load(stripped: bool, tmp_path: Path) -> None:
    code = {"kernel": [FMOV_FP16, RET], "helper": [branch_and_link(2, 0), RET], "init": [branch_and_link(4, 2), RET]}
    called = shared_object(code, ["init"], stripped=stripped)
    assert set(verdicts(tmp_path, "pkg", called).values()) == {"runs at load"}
    assert set(verdicts(tmp_path, "pkg", shared_object(code, stripped=stripped)).values()) == {"unknown"}


def test_a_module_s_init_function_runs_at_load(tmp_path: Path) -> None:
    code = {"kernel": [SDOT, RET], "PyInit_pkg": [branch_and_link(2, 0), RET]}
    assert verdicts(tmp_path, "pkg", shared_object(code)) == {"kernel": "runs at load"}


def test_an_atomic_behind_its_own_test_of_the_cpu_is_guarded(tmp_path: Path) -> None:
    load_flag, skip_if_zero = 0x39400210, 0x34000050
    outlined = {"atomic": [load_flag, skip_if_zero, CASAL, RET], "bare": [NOP, NOP, CASAL, RET]}
    assert verdicts(tmp_path, "pkg", shared_object(outlined)) == {"atomic": "guarded", "bare": "unknown"}


def test_kernels_named_after_a_core_are_dispatched_and_those_of_the_pi_s_are_not(tmp_path: Path) -> None:
    code = {"dgemm_kernel_NEOVERSEV1": [0x04E0E3E0, RET], "dgemm_kernel_CORTEXA57": [0x04E0E3E0, RET]}
    found = verdicts(tmp_path, "numpy", shared_object(code), "libscipy_openblas64_.so")
    assert found == {"dgemm_kernel_NEOVERSEV1": "dispatched", "dgemm_kernel_CORTEXA57": "unknown"}
    # Another package's function of that name is nobody's promise.
    assert set(verdicts(tmp_path, "pkg", shared_object(code), "libopenblas.so").values()) == {"unknown"}


def test_data_that_looks_like_an_instruction_is_passed_over(tmp_path: Path) -> None:
    library = shared_object({"f": [NOP, RET], "g": [RET]}, data_words={"f": [SDOT, CASAL]})
    assert verdicts(tmp_path, "pkg", library) == {}


def test_a_reviewed_library_may_hold_what_was_seen_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    review = isa.Reviewed("pkg", "1.0", "lib*", {"dotprod": 1}, "seen running")
    monkeypatch.setattr(isa, "REVIEWED", (review,))
    assert set(verdicts(tmp_path, "pkg", shared_object({"f": [SDOT]}, stripped=True)).values()) == {"reviewed"}
    more = shared_object({"f": [SDOT, SDOT]}, stripped=True)
    other = shared_object({"f": [SDOT, FMOV_FP16]}, stripped=True)
    assert set(verdicts(tmp_path, "pkg", more).values()) == {"unknown"}
    assert set(verdicts(tmp_path, "pkg", other).values()) == {"unknown"}


def test_a_refusal_names_wheel_library_function_instruction_and_remedy(tmp_path: Path) -> None:
    bad = shared_object({"kernel": [FMOV_FP16, RET], "init": [branch_and_link(2, 0), RET]}, ["init"])
    clean = wheel_of(tmp_path, "psutil", {"lib.so": shared_object({"f": [NOP, RET]})})
    assert isa.preflight([clean]) == []
    with pytest.raises(SlimpiError) as refusal:
        isa.preflight([clean, wheel_of(tmp_path, "onnxruntime", {"lib.so": bad})])
    parts = ["onnxruntime-1.0", "onnxruntime/lib.so", "kernel", "fmov (vector, immediate)", "(fp16)"]
    assert [
        p for p in [*parts, hex(TEXT_ADDRESS), "is imported", "onnxruntime 1.31.1"] if p not in str(refusal.value)
    ] == []


def test_another_machine_s_library_is_refused(tmp_path: Path) -> None:
    wheel = wheel_of(tmp_path, "pkg", {"lib.so": shared_object({"f": [NOP]}, machine=62)})
    with pytest.raises(SlimpiError, match="not code for aarch64"):
        isa.inspect(wheel)


def test_a_file_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    path = tmp_path / WHEEL.format("pkg")
    path.write_bytes(b"not a zip")
    with pytest.raises(SlimpiError, match="cannot read"):
        isa.inspect(path)


_whole = shared_object({"kernel": [SDOT, RET], "init": [branch_and_link(2, 0), RET]}, ["init"])


@settings(max_examples=600, deadline=None)
@given(
    st.integers(4, len(_whole)), st.lists(st.tuples(st.integers(4, len(_whole) - 1), st.integers(0, 255)), max_size=6)
)
def test_a_damaged_library_is_read_or_refused_never_a_traceback(length: int, changes: list[tuple[int, int]]) -> None:
    data = bytearray(_whole)
    for position, value in changes:
        data[position] = value
    try:
        isa.inspect_library(WHEEL.format("pkg"), "lib", bytes(data[:length]))
    except SlimpiError as error:
        assert "lib" in str(error)


# --- importing


def test_unpacking_keeps_inside_its_folder(tmp_path: Path) -> None:
    path = tmp_path / WHEEL.format("pkg")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../escaped.py", "")
    with pytest.raises(SlimpiError, match=r"escaped\.py"):
        isa.unpack(path, tmp_path / "site")
    assert not (tmp_path / "escaped.py").exists()


def test_the_import_test_says_why_it_was_skipped(tmp_path: Path) -> None:
    assert isa.import_test([], ["numpy"], None).skipped == "no arm64 system given"
    assert "no Python 3.13" in isa.import_test([], ["numpy"], tmp_path, "3.13").skipped


REGISTRY_OPTIONS = ("--only-binary", ":all:", "--no-deps", "--implementation", "cp", "--python-version", "3.11")


def downloaded(folder: Path, requirement: str) -> Path:
    """The aarch64 wheel, by pip with this machine's own configuration."""
    platforms = [f"--platform=manylinux_2_{n}_aarch64" for n in (28, 27, 17)]
    argv = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        *REGISTRY_OPTIONS,
        *platforms,
        "-d",
        str(folder),
        requirement,
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"the registry does not serve {requirement}: {done.stderr.splitlines()[-1:]}")
    return next(iter(folder.glob("*.whl")))


@pytest.mark.slow
def test_a_wheel_that_is_known_to_die_on_the_pi_is_caught_by_disassembly(tmp_path: Path) -> None:
    wheel = downloaded(tmp_path, "onnxruntime==1.21.0")
    at_load = [f for f in isa.inspect(wheel) if f.verdict == "runs at load"]
    assert {(f.extension, f.instruction) for f in at_load} == {("fp16", "fmov (vector, immediate)")}
    assert len(at_load) == 2  # the same static initialiser in both of its libraries
    with pytest.raises(SlimpiError, match=r"onnxruntime-1\.21\.0.*would die.*onnxruntime 1\.31\.1"):
        isa.preflight([wheel])


@pytest.mark.slow
def test_the_same_wheel_dies_of_sigill_on_the_emulated_core(tmp_path: Path) -> None:
    root = arm64_root()
    old = downloaded(tmp_path / "old", "onnxruntime==1.21.0")
    wheels = [old, downloaded(tmp_path / "np", "numpy==2.4.6")]
    with pytest.raises(SlimpiError, match="SIGILL"):
        isa.import_test(wheels, ["onnxruntime"], root)
    assert isa.import_test(wheels, ["numpy"], root).imported == ("numpy",)

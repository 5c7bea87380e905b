"""The Pi's wheelhouse: what is in it, that it appears whole or not at all, and that its code runs on the Pi's core."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import psutil
import pytest
from arm64_system import arm64_root
from elf_twin import RET, shared_object
from onnx_graphs import sample_input, write_graphs

from device.records import SlimpiError, read_record, sha256_file
from pipeline import crossbuild, isa, wheelhouse
from pipeline.crossbuild import Build
from pipeline.emulator import host
from pipeline.emulator.rootfs import PYTHON, run_user
from pipeline.progress import quiet
from pipeline.store import places

BOOKWORM, TRIXIE = (2, 36), (2, 41)
GLIBC = {"3.11": BOOKWORM, "3.13": TRIXIE}
SDOT = 0x4E829420


def write_wheel(path: Path, word: int = RET, symbols: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pkg/lib.so", shared_object({"f": [word]}) + symbols)
    return path


class Registry:
    """Stands for pip: writes the wheels it is asked for, and counts."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.words: dict[str, int] = {}
        self.wrong_version = ""

    def pip(self, arguments: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.calls.append(list(arguments))
        folder = Path(arguments[arguments.index("--dest") + 1])
        for requirement in arguments[arguments.index("--") + 1 :]:
            name, _, version = requirement.partition("==")
            version = "0.0.1" if name == self.wrong_version else version
            file = f"{name.replace('-', '_')}-{version}-cp311-cp311-manylinux_2_28_aarch64.whl"
            write_wheel(folder / file, self.words.get(name, RET))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Replaces pip and the cross-build, the two slow doors to the outside."""
    fake = Registry()

    def build(cache: Path, planned: Build, glibc: tuple[int, int], progress: object) -> Path:
        return write_wheel(cache / "built" / f"llama_cpp_python-{planned.version}-py3-none-linux_aarch64.whl")

    monkeypatch.setattr(crossbuild, "pip", fake.pip)
    monkeypatch.setattr(crossbuild, "build", build)
    return fake


def left_in(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if p.name not in (".lock", "built"))


def test_the_wheelhouse_has_the_listed_packages_in_the_host_s_versions(registry: Registry, tmp_path: Path) -> None:
    house = wheelhouse.assemble(tmp_path, "3.11", BOOKWORM)
    assert {w.package for w in house.wheels} == {*wheelhouse.PACKAGES, "slimpi-device"}
    assert {w.package: w.origin for w in house.wheels if w.origin != "registry"} == {
        "llama-cpp-python": "cross-built",
        "slimpi-device": "slimpi",
    }
    from importlib.metadata import version

    assert {w.package: w.version for w in house.wheels if w.origin == "registry"} == {
        name: version(name) for name in wheelhouse.PACKAGES if name != "llama-cpp-python"
    }
    assert [sha256_file(p) for p in house.paths] == [w.sha256 for w in house.wheels]
    assert house.size_bytes == sum(p.stat().st_size for p in house.paths)


def test_pip_is_asked_for_the_target_s_python_and_glibc_without_dependencies(
    registry: Registry, tmp_path: Path
) -> None:
    wheelhouse.assemble(tmp_path, "3.13", TRIXIE)
    (call,) = registry.calls
    assert call[call.index("--python-version") + 1] == "3.13"
    assert {"--no-deps", "--only-binary"} <= set(call)
    tags = [call[i + 1] for i, a in enumerate(call) if a == "--platform"]
    assert tags[0] == "manylinux_2_41_aarch64"
    assert tags[-2:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]


def test_a_second_assembly_asks_nobody(registry: Registry, tmp_path: Path) -> None:
    first = wheelhouse.assemble(tmp_path, "3.11", BOOKWORM)
    assert wheelhouse.assemble(tmp_path, "3.11", BOOKWORM) == first
    assert len(registry.calls) == 1


def test_a_damaged_wheelhouse_is_made_again(registry: Registry, tmp_path: Path) -> None:
    first = wheelhouse.assemble(tmp_path, "3.11", BOOKWORM)
    first.paths[3].write_bytes(b"damage")
    again = wheelhouse.assemble(tmp_path, "3.11", BOOKWORM)
    assert len(registry.calls) == 2
    assert [sha256_file(p) for p in again.paths] == [w.sha256 for w in again.wheels]


def test_a_wheel_that_would_die_leaves_no_wheelhouse(registry: Registry, tmp_path: Path) -> None:
    registry.words["msgspec"] = SDOT
    with pytest.raises(SlimpiError, match=r"msgspec-.*may die on a Raspberry Pi 4.*sdot/udot.*dotprod"):
        wheelhouse.assemble(tmp_path, "3.11", BOOKWORM)
    assert left_in(tmp_path) == []


def test_a_wheel_that_dies_on_the_emulated_core_leaves_no_wheelhouse(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that imports is listed so; without an emulator the listing says that nothing was run."""

    def listed() -> str:
        (folder,) = (tmp_path / "wheels").glob("wheelhouse-*")
        return read_record(folder / "wheelhouse.json", wheelhouse.Listing).import_test

    def assemble() -> None:
        wheelhouse.assemble(tmp_path / "wheels", "3.11", BOOKWORM, emulator_cache=tmp_path / "arm64")

    def die(root: Path, argv: Sequence[str], env: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(argv, -4 if "numpy" in argv[-1] else 0, b"", b"")

    root = tmp_path / "root"
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/python3.11").touch()
    monkeypatch.setattr(wheelhouse, "user_rootfs", lambda *_, **__: root)
    monkeypatch.setattr(isa, "run_user", die)
    monkeypatch.setattr(host, "find_tool", lambda name: None)
    assemble()
    assert listed() == "skipped: mmdebstrap, qemu-user-static not installed on the host"
    shutil.rmtree(tmp_path / "wheels")
    monkeypatch.setattr(host, "find_tool", lambda name: f"/usr/bin/{name}")
    with pytest.raises(SlimpiError, match=r"`import numpy` died of SIGILL.*numpy 2\.4\.6 is known to work"):
        assemble()
    assert left_in(tmp_path / "wheels") == []
    monkeypatch.setattr(isa, "run_user", lambda root, argv, env: subprocess.CompletedProcess(argv, 0, b"", b""))
    assemble()
    assert listed() == f"imported {', '.join(wheelhouse.modules())}"


def test_another_version_than_asked_for_is_refused(registry: Registry, tmp_path: Path) -> None:
    registry.wrong_version = "numpy"
    with pytest.raises(SlimpiError, match=r"numpy-0\.0\.1.*not numpy"):
        wheelhouse.assemble(tmp_path, "3.11", BOOKWORM)
    assert left_in(tmp_path) == []


def test_an_interrupt_leaves_no_wheelhouse(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(isa, "preflight", interrupt)
    with pytest.raises(KeyboardInterrupt):
        wheelhouse.assemble(tmp_path, "3.11", BOOKWORM)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("python", "glibc", "said"),
    [("3.9", BOOKWORM, r"Python 3\.9.*3\.11 and 3\.13"), ("3.11", (2, 27), r"glibc 2\.27.*2\.28 or newer")],
)
def test_a_device_we_cannot_serve_is_refused(python: str, glibc: tuple[int, int], said: str, tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match=said):
        wheelhouse.assemble(tmp_path, python, glibc)


def test_what_is_left_out_is_what_metadata_asks_for_and_nothing_imports() -> None:
    assert not set(wheelhouse.LEFT_OUT) & set(wheelhouse.PACKAGES)
    from importlib.metadata import requires

    asked = {
        isa.normalize(requirement)
        for name in wheelhouse.PACKAGES
        for requirement in requires(name) or ()
        if "extra ==" not in requirement
    }
    assert asked - set(wheelhouse.PACKAGES) == set(wheelhouse.LEFT_OUT)


# --- the agent's code


def test_the_device_wheel_is_the_package_and_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = wheelhouse.write_device_wheel(tmp_path / "a"), wheelhouse.write_device_wheel(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    isa.unpack(first, tmp_path / "site")
    source = Path(wheelhouse.device.__file__).parent
    unpacked = {p.relative_to(tmp_path / "site" / "device") for p in (tmp_path / "site" / "device").rglob("*.py")}
    assert unpacked == {p.relative_to(source) for p in source.rglob("*.py")}
    argv = [
        sys.executable,
        "-I",
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import device.schema",
    ]
    assert subprocess.run(argv, check=False, capture_output=True).returncode == 0


# --- the cross-build


def test_glibc_needed_is_the_newest_version_named(tmp_path: Path) -> None:
    symbols = b"\0GLIBC_2.17\0GLIBC_2.34\0GLIBC_2.4\0GLIBC_PRIVATE\0GLIBCXX_3.4.99\0"
    assert crossbuild.glibc_needed(write_wheel(tmp_path / "a.whl", symbols=symbols)) == (2, 34)
    assert crossbuild.glibc_needed(write_wheel(tmp_path / "b.whl")) == (0, 0)


def cached_build(cache: Path, planned: Build, symbols: bytes) -> None:
    folder = cache / f"llama-{planned.version}-{planned.compiler}-{crossbuild.digest(planned)[:16]}"
    write_wheel(folder / f"llama_cpp_python-{planned.version}-py3-none-linux_aarch64.whl", symbols=symbols)


def test_a_built_wheel_is_taken_from_the_cache_unless_it_needs_a_newer_glibc(tmp_path: Path) -> None:
    planned = crossbuild.plan("0.3.36", "zig")
    cached_build(tmp_path, planned, b"\0GLIBC_2.38\0")
    assert crossbuild.build(tmp_path, planned, TRIXIE).name == "llama_cpp_python-0.3.36-py3-none-linux_aarch64.whl"
    with pytest.raises(SlimpiError, match=r"needs glibc 2\.38, the device has 2\.36"):
        crossbuild.build(tmp_path, planned, BOOKWORM)


def test_other_flags_are_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_build(tmp_path, crossbuild.plan("0.3.36", "zig"), b"")
    monkeypatch.setitem(crossbuild.DEFINES, "GGML_CPU_REPACK", "OFF")

    def no_tools(cache: Path, progress: object) -> Path:
        raise SlimpiError("would build")

    monkeypatch.setattr(crossbuild, "install_tools", no_tools)
    with pytest.raises(SlimpiError, match="would build"):
        crossbuild.build(tmp_path, crossbuild.plan("0.3.36", "zig"), BOOKWORM)


def test_gcc_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SlimpiError, match=r"aarch64-linux-gnu-g\+\+ not found.*or build with zig"):
        crossbuild.plan("0.3.36", "gcc")


def test_gcc_is_called_for_the_pi_s_core_where_it_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gcc", "g++"):
        program = tmp_path / "bin folder" / f"aarch64-linux-gnu-{name}"
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            '#!/bin/sh\n[ "$1" = -dumpfullversion ] && echo 12.2.0 || echo "$0" "$@"\n', encoding="utf-8"
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin folder'}{os.pathsep}{os.environ['PATH']}")
    planned = crossbuild.plan("0.3.36", "gcc")
    assert planned.compiler_version == "gcc 12.2.0"
    assert planned.defines["GGML_CPU_ARM_ARCH"] == "armv8-a+crc"
    toolchain = crossbuild._write_toolchain(planned, tmp_path, tmp_path).read_text(encoding="utf-8")
    assert f'set(CMAKE_CXX_COMPILER "{tmp_path / "pi-c++"}")' in toolchain
    assert "exec aarch64-linux-gnu-ar " in (tmp_path / "pi-ar").read_text(encoding="utf-8")
    called = subprocess.run([tmp_path / "pi-c++", "-c", "a b.cpp"], capture_output=True, text=True, check=True)
    assert called.stdout.strip() == f"{tmp_path}/bin folder/aarch64-linux-gnu-g++ -mtune=cortex-a72 -c a b.cpp"


def test_flags_for_the_host_s_compiler_do_not_reach_the_pi_s_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CMAKE_ARGS", "CFLAGS", "CC", "LDFLAGS", "SKBUILD_CMAKE_DEFINE", "_PYTHON_HOST_PLATFORM"):
        monkeypatch.setenv(name, "-march=native")
    env = crossbuild._environment(tmp_path, {})
    assert [name for name, value in env.items() if value == "-march=native"] == []
    assert env["PATH"].startswith(str(tmp_path / "bin"))


def test_a_failed_build_says_why_and_where_its_log_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tools").mkdir()
    monkeypatch.setattr(crossbuild, "install_tools", lambda cache, progress: tmp_path / "tools")

    def broken_source(planned: Build, tools: Path, folder: Path, progress: object) -> Path:
        folder.mkdir()
        (folder / "llama_cpp_python-0.3.36.tar.gz").write_bytes(b"no archive")
        return folder / "llama_cpp_python-0.3.36.tar.gz"

    monkeypatch.setattr(crossbuild, "_download_sdist", broken_source)
    cache = tmp_path / "cache"
    cache.mkdir()
    with pytest.raises(SlimpiError, match=r"building llama-cpp-python 0\.3\.36 for the Pi failed: .*Log: ") as failure:
        crossbuild.build(cache, crossbuild.plan("0.3.36", "zig"), BOOKWORM)
    log = Path(str(failure.value).rpartition("Log: ")[2])
    assert "no archive" not in str(failure.value)
    assert log.read_text(encoding="utf-8").strip()
    assert [p for p in cache.iterdir() if p != log] == []


def test_an_interrupt_ends_the_compilers_too(tmp_path: Path) -> None:
    marker = tmp_path / "grandchild"
    grandchild = f"import os, time; open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    child = f"import subprocess, sys; print('go', flush=True); subprocess.run([sys.executable, '-c', {grandchild!r}])"

    def interrupt(line: str) -> None:
        deadline = time.monotonic() + 30
        while not (marker.exists() and marker.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crossbuild.run_logged([sys.executable, "-c", child], dict(os.environ), tmp_path / "log", interrupt)
    pid = int(marker.read_text())
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the grandchild outlived the interrupt"
        time.sleep(0.02)


# --- the real thing: minutes the first time, then from the cache


def assembled(python: str) -> wheelhouse.Wheelhouse:
    cache = os.environ.get("SLIMPI_WHEELHOUSE_CACHE") or places().artifacts / ".wheelhouse"
    return wheelhouse.assemble(Path(cache), python, GLIBC[python])


@pytest.fixture(scope="session")
def real_house() -> wheelhouse.Wheelhouse:
    return assembled("3.11")


@pytest.mark.slow
def test_the_real_wheelhouse_is_small_and_safe(real_house: wheelhouse.Wheelhouse) -> None:
    findings = isa.preflight(real_house.paths, quiet)
    assert {f.verdict for f in findings} == {"guarded", "dispatched", "reviewed"}
    llama = [f for f in findings if f.wheel.startswith("llama_cpp_python")]
    # Nothing of llama.cpp itself: only LLVM's unwinder asks the core what it has.
    assert {f.extension for f in llama} <= {"sve", "sme", "mte"}
    assert real_house.size_bytes < 60e6
    (built,) = [w for w in real_house.wheels if w.origin == "cross-built"]
    assert built.file == f"llama_cpp_python-{built.version}-py3-none-linux_aarch64.whl"
    assert crossbuild.glibc_needed(real_house.folder / built.file) <= crossbuild.ZIG_GLIBC


@pytest.mark.slow
@pytest.mark.parametrize("python", wheelhouse.PYTHONS)
def test_the_agent_imports_from_the_wheelhouse_alone_on_the_emulated_pi(python: str) -> None:
    """Of bookworm and of trixie."""
    wanted = wheelhouse.modules()
    assert isa.import_test(assembled(python).paths, wanted, arm64_root(python), python).imported == tuple(wanted)


@pytest.mark.slow
def test_llama_cpp_survives_its_own_exceptions_on_the_emulated_pi(
    real_house: wheelhouse.Wheelhouse, tmp_path: Path
) -> None:
    """The unwinder that is linked in holds SVE and SME instructions: a thrown and caught exception must miss them."""
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 200)
    code = (
        "import llama_cpp as l; l.llama_backend_init(); "
        f"m = l.llama_model_load_from_file({str(tmp_path / 'bad.gguf').encode()!r}, l.llama_model_default_params()); "
        "raise SystemExit(0 if not m else 3)"
    )
    with isa.laid_out(real_house.paths) as env:
        done = run_user(arm64_root(), [PYTHON, "-c", code], env)
    assert (done.returncode, b"error loading model" in done.stderr) == (0, True), done.stderr[-500:]


@pytest.mark.slow
def test_onnx_runtime_s_kernels_run_on_the_emulated_pi_and_agree_with_the_host(
    real_house: wheelhouse.Wheelhouse, tmp_path: Path
) -> None:
    """What REVIEWED says was seen: its stripped library holds newer kernels, and these graphs never reach them."""
    models, x = write_graphs(tmp_path), sample_input()
    np.save(tmp_path / "x.npy", x)
    code = (
        "import numpy as np, onnxruntime as ort\n"
        f"x = np.load({str(tmp_path / 'x.npy')!r})\n"
        f"for path in {[str(p) for p in models]!r}:\n"
        "    session = ort.InferenceSession(path, providers=['CPUExecutionProvider'])\n"
        "    np.save(path + '.npy', session.run(None, {'x': x})[0])\n"
    )
    with isa.laid_out(real_house.paths) as env:
        done = run_user(arm64_root(), [PYTHON, "-c", code], env)
    assert done.returncode == 0, done.stderr[-500:]
    for path in models:
        host = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        error = np.abs(np.load(f"{path}.npy") - host).max() / np.abs(host).max()
        assert error < 1e-5, path.stem

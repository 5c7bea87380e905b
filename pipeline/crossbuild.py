"""llama-cpp-python for the Pi, built on the host: no aarch64 wheel of it is published, and the Pi compiles nothing.

Two toolchains. `zig` (default) is a C++ compiler in a Python package, so it works for every user without root;
its libraries need only glibc 2.28. `gcc` is Debian's g++-aarch64-linux-gnu, if installed: faster builds, but the
result needs a glibc as new as the host's cross libc. The two round differently in the last bits, so the default does
not depend on what happens to be installed, and the choice is part of the cache key and of the record.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from device.records import Record, SlimpiError, sha256_file
from pipeline.progress import Tick, quiet
from pipeline.store import digest, whole_folder

Glibc = tuple[int, int]
CompilerName = Literal["zig", "gcc"]

PACKAGE = "llama-cpp-python"

TOOLS = ("ziglang==0.17.1", "scikit-build-core==1.1.2", "cmake==4.4.4", "ninja==1.13.2")
"""What builds the wheel, from the package registry into the cache (0.5 GB): nothing of it touches the user's system."""

ZIG_GLIBC: Glibc = (2, 28)
_ZIG_TARGET = ("-target", f"aarch64-linux-gnu.{ZIG_GLIBC[0]}.{ZIG_GLIBC[1]}", "-mcpu=cortex_a72-aes-sha2", "-g0")
_GCC_TARGET = ("-mtune=cortex-a72",)
_GCC = {"c": "aarch64-linux-gnu-gcc", "c++": "aarch64-linux-gnu-g++"}

DEFINES = {
    # No -march=native, and no kernels chosen at run time: this build has one target.
    "GGML_NATIVE": "OFF",
    # llama.cpp's own thread pool: OpenMP would add libgomp to what the Pi must have.
    "GGML_OPENMP": "OFF",
    "GGML_CCACHE": "OFF",
    "LLAVA_BUILD": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TOOLS": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
# The host's strip does not know aarch64, so the linker makes it small; symbols stay, for the ISA preflight to read.
# zig strips all or nothing, and links its own C++ runtime with debug information even under -g0.
ZIG_DEFINES = {"CMAKE_SHARED_LINKER_FLAGS": "-Wl,--compress-debug-sections=zlib"}
GCC_DEFINES = {"CMAKE_SHARED_LINKER_FLAGS": "-Wl,--strip-debug", "GGML_CPU_ARM_ARCH": "armv8-a+crc"}

_LIBRARIES = "/llama_cpp/lib"
_NOT_PACKED = (
    # llama.cpp's own installation: a second copy of every library, headers, CMake files.
    *("/lib", "/include", "/bin", "/llama_cpp/include"),
    # A wheel has no links, so each library would come three times. The bindings open libllama.so and libggml.so;
    # those ask for the rest, and for libggml, by soname.
    *(f"{_LIBRARIES}/*.so.*.*", f"{_LIBRARIES}/libggml-base.so", f"{_LIBRARIES}/libggml-cpu.so"),
    f"{_LIBRARIES}/libllama.so.0",
)

# The build is for the Pi: flags meant for the host's own compiler must not leak into it.
_NOT_INHERITED = re.compile(r"\A(CMAKE_|SKBUILD|_PYTHON_|(C|CXX|CPP|LD)FLAGS\Z|(CC|CXX|LD|AR|RANLIB|STRIP)\Z)")
_KEPT_LINES = 8


class Build(Record, kw_only=True, frozen=True):
    """How the cross-built wheel was made; every field is part of its cache key."""

    package: str
    version: str
    compiler: CompilerName
    compiler_version: str
    target: list[str]
    defines: dict[str, str]
    left_out: list[str]
    tools: list[str]


def plan(version: str, compiler: CompilerName) -> Build:
    """What will be built. SlimpiError if the compiler was asked for and is not there."""
    gcc = compiler == "gcc"
    return Build(
        package=PACKAGE,
        version=version,
        compiler=compiler,
        compiler_version=_gcc_version() if gcc else TOOLS[0],
        target=list(_GCC_TARGET if gcc else _ZIG_TARGET),
        defines={**DEFINES, **(GCC_DEFINES if gcc else ZIG_DEFINES)},
        left_out=list(_NOT_PACKED),
        tools=list(TOOLS),
    )


def build(cache: Path, planned: Build, glibc: Glibc, progress: Tick = quiet) -> Path:
    """The wheel, built at most once for a plan (10 minutes of CPU) and then taken from the cache.

    SlimpiError if the build fails (last lines and the log's path) or its libraries want a newer glibc than `glibc`.
    An interrupt ends the compilers and leaves no half wheel.
    """
    folder = cache / f"llama-{planned.version}-{planned.compiler}-{digest(planned)[:16]}"
    if not folder.is_dir():
        tools = install_tools(cache, progress)
        log = cache / f"{folder.name}.log"
        with whole_folder(folder) as scratch:
            sdist = _download_sdist(planned, tools, scratch / "sdist", progress)
            _compile(planned, tools, sdist, scratch, log, progress)
            for leftover in ("sdist", "work"):
                shutil.rmtree(scratch / leftover)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1 or not wheels[0].name.endswith("-py3-none-linux_aarch64.whl"):
        raise SlimpiError(f"{folder} holds {[w.name for w in wheels]}, not one aarch64 wheel. Remove it, build again.")
    needed = glibc_needed(wheels[0])
    if needed > glibc:
        raise SlimpiError(
            f"{wheels[0].name} built with {planned.compiler} needs glibc {needed[0]}.{needed[1]}, the device has "
            f"{glibc[0]}.{glibc[1]}. Build with zig, which needs {ZIG_GLIBC[0]}.{ZIG_GLIBC[1]}."
        )
    return wheels[0]


def glibc_needed(wheel: Path) -> Glibc:
    """The newest glibc symbol version that a shared object of the wheel names; (0, 0) if none does."""
    found: set[Glibc] = {(0, 0)}
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if ".so" in member:
                versions = re.findall(rb"\0GLIBC_(\d+)\.(\d+)(?=[.\0])", archive.read(member))
                found.update((int(major), int(minor)) for major, minor in versions)
    return max(found)


def install_tools(cache: Path, progress: Tick = quiet) -> Path:
    """Folder with TOOLS, importable by and for this Python; downloaded once."""
    folder = cache / f"tools-{digest([TOOLS, sys.version_info[:2], sys.platform])[:16]}"
    if not folder.is_dir():
        progress(0, 0, "downloading the cross-compiler (0.2 GB)")
        with whole_folder(folder) as scratch:
            pip(["install", "--no-compile", "--only-binary", ":all:", "--target", str(scratch), "--", *TOOLS])
    return folder


def pip(arguments: Sequence[str], env: dict[str, str] | None = None) -> None:
    """Run pip with the user's own configuration; SlimpiError with its error line."""
    argv = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run([*argv, *arguments[1:]], capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        wanted = " ".join(arguments[arguments.index("--") + 1 :])
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise SlimpiError(f"pip cannot {arguments[0]} {wanted}: {reason}. Check the network and pip's index.")


def _download_sdist(planned: Build, tools: Path, folder: Path, progress: Tick) -> Path:
    progress(0, 0, f"downloading the source of {planned.package} {planned.version}")
    requirement = f"{planned.package}=={planned.version}"
    # Even a download runs the build's metadata step: with the tools at hand pip need not fetch them again.
    options = ["--no-deps", "--no-build-isolation", "--no-binary", planned.package, "--dest", str(folder)]
    pip(["download", *options, "--", requirement], _environment(tools, {}))
    found = sorted(folder.glob("*.tar.gz"))
    if len(found) != 1:
        raise SlimpiError(f"pip found no source archive of {requirement}: {[p.name for p in folder.iterdir()]}.")
    return found[0]


def _compile(planned: Build, tools: Path, sdist: Path, scratch: Path, log: Path, progress: Tick) -> None:
    """pip builds the wheel from the archive into `scratch`; all output goes to `log`, steps to `progress`."""
    progress(0, 0, "preparing to compile llama.cpp for the Pi: 7 CPU minutes, once")
    work = scratch / "work"
    work.mkdir()
    toolchain = _write_toolchain(planned, tools, work)
    defines = {**planned.defines, "CMAKE_TOOLCHAIN_FILE": str(toolchain)}
    settings = ["install.strip=false", "cmake.build-type=Release", f"build-dir={work / 'build'}"]
    settings.append(f"wheel.exclude={';'.join(planned.left_out)}")
    settings += [f"cmake.define.{name}={value}" for name, value in defines.items()]
    argv = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-input", "--disable-pip-version-check"]
    argv += ["--no-deps", "--no-index", "--no-cache-dir", "--no-build-isolation", "--wheel-dir", str(scratch)]
    for setting in settings:
        argv += ["--config-settings", setting]
    extra = {
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",  # what the wheel's tag is made of
        "ZIG_GLOBAL_CACHE_DIR": str(work / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(work / "zig"),
        "TMPDIR": str(work),
    }
    last: deque[str] = deque(maxlen=_KEPT_LINES)

    def on_line(line: str) -> None:
        last.append(line.strip())
        if step := re.match(r"\s*\[(\d+)/(\d+)\] ", line):
            progress(int(step[1]), int(step[2]), f"compiling llama.cpp for the Pi with {planned.compiler}")

    code = run_logged([*argv, str(sdist)], _environment(tools, extra), log, on_line)
    if code != 0:
        lines = " | ".join(line[-160:] for line in last if line)
        raise SlimpiError(f"building {planned.package} {planned.version} for the Pi failed: {lines}. Log: {log}")
    (scratch / "sdist.sha256").write_text(f"{sha256_file(sdist)}  {sdist.name}\n", encoding="utf-8")


def run_logged(argv: Sequence[str], env: dict[str, str], log: Path, on_line: Callable[[str], None]) -> int:
    """Run argv in its own process group, its output to `log` and line by line to `on_line`; its exit code.

    Whatever interrupts the wait ends the whole group: ninja's compilers do not outlive us.
    """
    with log.open("w", encoding="utf-8", errors="replace") as out:
        child = subprocess.Popen(
            list(argv),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                out.write(line)
                on_line(line)
            return child.wait()
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
            child.wait()
            child.stdout.close()


def _environment(tools: Path, extra: dict[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.match(name)}
    path = f"{tools / 'bin'}{os.pathsep}{inherited.get('PATH', os.defpath)}"
    return {**inherited, "PATH": path, "PYTHONPATH": str(tools), **extra}


def _write_toolchain(planned: Build, tools: Path, folder: Path) -> Path:
    """A CMake toolchain file, with small programs that call the compiler for the Pi's core."""
    programs = _programs(planned, tools)
    for name, argv in programs.items():
        program = folder / f"pi-{name}"
        program.write_text(f'#!/bin/sh\nexec {shlex.join(argv)} "$@"\n', encoding="utf-8")
        program.chmod(0o755)
    lines = ["set(CMAKE_SYSTEM_NAME Linux)", "set(CMAKE_SYSTEM_PROCESSOR aarch64)"]
    variables = {"c": "CMAKE_C_COMPILER", "c++": "CMAKE_CXX_COMPILER", "ar": "CMAKE_AR", "ranlib": "CMAKE_RANLIB"}
    lines += [f'set({variables[name]} "{folder / f"pi-{name}"}")' for name in programs]
    # The bindings force llama.cpp's `common` library on and never load it: half of the compile time. A plain
    # variable hides the cached one they set.
    lines.append("set(LLAMA_BUILD_COMMON OFF)")
    toolchain = folder / "toolchain.cmake"
    toolchain.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return toolchain


def _programs(planned: Build, tools: Path) -> dict[str, list[str]]:
    if planned.compiler == "gcc":
        compilers = {name: [shutil.which(gcc) or gcc, *planned.target] for name, gcc in _GCC.items()}
        return {**compilers, "ar": ["aarch64-linux-gnu-ar"], "ranlib": ["aarch64-linux-gnu-ranlib"]}
    zig = str(tools / "ziglang" / "zig")
    compilers = {"c": [zig, "cc", *planned.target], "c++": [zig, "c++", *planned.target]}
    return {**compilers, "ar": [zig, "ar"], "ranlib": [zig, "ranlib"]}


def _gcc_version() -> str:
    missing = [name for name in _GCC.values() if not shutil.which(name)]
    if missing:
        raise SlimpiError(f"{' and '.join(missing)} not found. Install g++-aarch64-linux-gnu, or build with zig.")
    done = subprocess.run([_GCC["c++"], "-dumpfullversion"], capture_output=True, text=True, check=True)
    return f"gcc {done.stdout.strip()}"

"""What the Pi needs to run jobs, assembled on the host: wheels for its Python, all of them checked, nothing else.

Wheels are laid out by unzipping (none here has an installer's work to do), so the Pi needs neither pip nor venv;
each goes to a folder named after its hash, and PYTHONPATH joins them.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import device
from device.records import Record, SlimpiError, encode, read_record, sha256_file, write_atomic
from pipeline import a64, crossbuild, isa
from pipeline.crossbuild import Build, CompilerName, Glibc
from pipeline.emulator import host as emulator_host
from pipeline.emulator.rootfs import user_rootfs
from pipeline.locks import locked
from pipeline.progress import Progressor, Tick, quiet
from pipeline.store import digest, whole_folder

Origin = Literal["registry", "cross-built", "slimpi"]

PYTHONS = ("3.11", "3.13")
"""Debian and Raspberry Pi OS bookworm and trixie."""

OLDEST_GLIBC: Glibc = (2, 28)
"""What onnxruntime's wheels and the cross-built llama.cpp need."""

PACKAGES = {
    # package: the modules an import test imports, and why it is on the device
    "diskcache": (("diskcache",), "imported by llama_cpp"),
    "jinja2": (("jinja2",), "imported by llama_cpp"),
    "llama-cpp-python": (("llama_cpp",), "runs GGUF"),
    "markupsafe": (("markupsafe",), "imported by jinja2"),
    "msgspec": (("msgspec",), "reads and writes the contract"),
    "numpy": (("numpy", "numpy.linalg", "numpy.random"), "arrays"),
    "onnxruntime": (("onnxruntime",), "runs ONNX"),
    "tokenizers": (("tokenizers",), "tokenizes for ONNX"),
    "typing-extensions": (("typing_extensions",), "imported by llama_cpp"),
}
"""Everything the agent imports, and no more: the wheels are taken without what their metadata asks for."""

LEFT_OUT = {
    "flatbuffers": "onnxruntime: its converters, not inference",
    "huggingface-hub": "tokenizers: Tokenizer.from_pretrained, which downloads; the agent reads files",
    "packaging": "onnxruntime: its transformers tools",
    "protobuf": "onnxruntime: its quantizer and tools",
}
"""Dependencies in the metadata that no import of the agent's reaches, and what they are for."""

DEVICE_PACKAGE = "slimpi-device"
_LISTING = "wheelhouse.json"
# The earliest date a zip archive can hold: the same code gives the same bytes.
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


class Wheel(Record, kw_only=True, frozen=True):
    """One wheel for the device. origin: a package index, built here for the device, or slimpi's own."""

    file: str
    sha256: str
    size_bytes: int
    installed_bytes: int
    package: str
    version: str
    origin: Origin


class Listing(Record, kw_only=True, frozen=True):
    """wheelhouse.json: which wheels, for which Python and glibc, and how the cross-built one was made."""

    python: str
    glibc: list[int]
    wheels: list[Wheel]
    build: Build
    import_test: str = ""


@dataclass(frozen=True)
class Wheelhouse:
    """A folder of wheels that passed the ISA preflight."""

    folder: Path
    python: str
    glibc: Glibc
    wheels: tuple[Wheel, ...]
    build: Build

    @property
    def paths(self) -> list[Path]:
        return [self.folder / wheel.file for wheel in self.wheels]

    @property
    def size_bytes(self) -> int:
        return sum(wheel.size_bytes for wheel in self.wheels)

    @property
    def installed_bytes(self) -> int:
        return sum(wheel.installed_bytes for wheel in self.wheels)


def assemble(
    cache: Path,
    python: str,
    glibc: Glibc,
    progress: Tick = quiet,
    compiler: CompilerName = "zig",
    emulator_cache: Path | None = None,
) -> Wheelhouse:
    """Everything the device with this Python and glibc needs; built once, checked by hash when reused.

    cache: a folder of slimpi's own. emulator_cache: where an arm64 system may be made to import the wheels on an
    emulated Cortex-A72, if this machine has the emulator; the listing says whether that was done. The first call
    downloads 60 MB of wheels and a cross-compiler and compiles llama.cpp. SlimpiError if the Python or glibc is none
    we support, a wheel cannot be had, the build fails, or a wheel would die on the Pi.
    """
    _check_target(python, glibc)
    versions = {name: _host_version(name) for name in PACKAGES}
    planned = crossbuild.plan(versions[crossbuild.PACKAGE], compiler)
    code = device_wheel_name()
    key = [python, glibc, versions, planned, code, a64.TABLE, isa.DISPATCHED, isa.REVIEWED]
    folder = cache / f"wheelhouse-py{python}-{digest(key)[:16]}"
    with locked(cache, lambda: progress(0, 1, "waiting for another slimpi that fills the wheelhouse")):
        if (listing := _read_intact(folder)) is None:
            llama = crossbuild.build(cache, planned, glibc, progress)
            with whole_folder(folder) as scratch:
                shutil.copyfile(llama, scratch / llama.name)
                _download(versions, python, glibc, scratch, progress)
                write_device_wheel(scratch)
                isa.preflight(sorted(scratch.glob("*.whl")), progress)
                tested = _import_test(sorted(scratch.glob("*.whl")), python, emulator_cache, progress)
                listing = _describe(scratch, versions, python, glibc, planned, tested)
                write_atomic(scratch / _LISTING, encode(listing))
    return Wheelhouse(folder, python, glibc, tuple(listing.wheels), listing.build)


def _import_test(wheels: Sequence[Path], python: str, emulator_cache: Path | None, progress: Tick) -> str:
    """What came of importing the wheels on the emulated core, for the listing; SlimpiError if one dies."""
    if emulator_cache is None:
        return "skipped: not asked for"
    if missing := emulator_host.missing_packages(emulator_host.USER_TOOLS):
        return f"skipped: {', '.join(missing)} not installed on the host"
    progress(0, 1, "importing the wheels on an emulated Cortex-A72")
    root = user_rootfs(emulator_cache, Progressor(plain=True), python=python)
    result = isa.import_test(wheels, modules(), root, python)
    return f"skipped: {result.skipped}" if result.skipped else f"imported {', '.join(result.imported)}"


def modules() -> list[str]:
    """What an import test of a whole wheelhouse imports."""
    return ["device.agent", *(module for names, _ in PACKAGES.values() for module in names)]


def platforms(glibc: Glibc) -> list[str]:
    """The platform tags a device with this glibc takes, newest first (PEP 600; manylinux2014 is 2.17)."""
    tags = [f"manylinux_2_{minor}_aarch64" for minor in range(glibc[1], 16, -1)]
    return [*tags, "manylinux2014_aarch64"]


def _check_target(python: str, glibc: Glibc) -> None:
    if python not in PYTHONS:
        raise SlimpiError(f"the device has Python {python}; slimpi runs on {' and '.join(PYTHONS)}. Update its system.")
    if glibc[0] != 2 or glibc < OLDEST_GLIBC:
        wanted = ".".join(map(str, OLDEST_GLIBC))
        raise SlimpiError(
            f"the device has glibc {glibc[0]}.{glibc[1]}; its runtimes need {wanted} or newer. "
            "Use a 64-bit Debian or Raspberry Pi OS from bookworm on."
        )


def _host_version(package: str) -> str:
    """The version on the host: what is compared across machines must be the same code."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError as error:
        raise SlimpiError(f"{package} is not installed on the host. Run `make install`.") from error


def _download(versions: dict[str, str], python: str, glibc: Glibc, folder: Path, progress: Tick) -> None:
    wanted = [f"{name}=={v}" for name, v in versions.items() if name != crossbuild.PACKAGE]
    progress(0, len(wanted), "downloading wheels for the Pi")
    options = ["--only-binary", ":all:", "--no-deps", "--implementation", "cp", "--python-version", python]
    for tag in platforms(glibc):
        options += ["--platform", tag]
    crossbuild.pip(["download", *options, "--dest", str(folder), "--", *wanted])


def _describe(
    folder: Path, versions: dict[str, str], python: str, glibc: Glibc, planned: Build, import_test: str
) -> Listing:
    wheels = []
    for path in sorted(folder.glob("*.whl")):
        package, found = isa.package_and_version(path.name)
        if package != DEVICE_PACKAGE and versions.get(package) != found:
            raise SlimpiError(f"pip brought {path.name}, not {package} {versions.get(package)}. Check pip's index.")
        origin: Origin = "slimpi" if package == DEVICE_PACKAGE else "registry"
        wheels.append(
            Wheel(
                file=path.name,
                sha256=sha256_file(path),
                size_bytes=path.stat().st_size,
                installed_bytes=installed_size_bytes(path),
                package=package,
                version=found,
                origin="cross-built" if package == crossbuild.PACKAGE else origin,
            )
        )
    missing = {*versions, DEVICE_PACKAGE} - {wheel.package for wheel in wheels}
    if missing or len(wheels) != len(versions) + 1:
        raise SlimpiError(f"the wheelhouse has {[w.file for w in wheels]}; missing: {sorted(missing) or 'none'}.")
    return Listing(python=python, glibc=list(glibc), wheels=wheels, build=planned, import_test=import_test)


def _read_intact(folder: Path) -> Listing | None:
    """The listing of a wheelhouse whose files are all as listed, or None: then it is made again."""
    if not (folder / _LISTING).is_file():
        return None
    listing = read_record(folder / _LISTING, Listing)
    for wheel in listing.wheels:
        path = folder / wheel.file
        if not path.is_file() or sha256_file(path) != wheel.sha256:
            return None
    return listing


def installed_size_bytes(wheel: Path) -> int:
    with zipfile.ZipFile(wheel) as archive:
        return sum(member.file_size for member in archive.infolist())


def device_files() -> list[tuple[str, bytes]]:
    """The agent's code as (path, content), sorted: Python and the kernels' sources."""
    root = Path(device.__file__).parent
    found = [path for path in root.rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    return sorted((f"device/{path.relative_to(root).as_posix()}", path.read_bytes()) for path in found)


def device_wheel_name() -> str:
    """Named by content: `slimpi_device-0+<hash>-py3-none-any.whl`."""
    seen = hashlib.sha256()
    for path, content in device_files():
        seen.update(path.encode() + b"\0" + len(content).to_bytes(8, "big") + content)
    return f"slimpi_device-0+{seen.hexdigest()[:16]}-py3-none-any.whl"


def write_device_wheel(folder: Path) -> Path:
    """The `device` package as a pure wheel; the same code gives the same bytes."""
    wheel = folder / device_wheel_name()
    name, found = wheel.name.split("-")[:2]
    info = f"{name}-{found}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {found}\n"
    tags = "Wheel-Version: 1.0\nGenerator: slimpi\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = [*device_files(), (f"{info}/METADATA", metadata.encode()), (f"{info}/WHEEL", tags.encode())]
    record = "".join(f"{path},,\n" for path, _ in files) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in [*files, (f"{info}/RECORD", record.encode())]:
            member = zipfile.ZipInfo(path, _ZIP_DATE)
            member.compress_type = zipfile.ZIP_DEFLATED
            member.external_attr = 0o644 << 16
            archive.writestr(member, content)
    return wheel


def describe_findings(findings: Sequence[isa.Finding]) -> list[str]:
    """One line a wheel and verdict, for people: how many functions, which extensions."""
    groups: dict[tuple[str, str], dict[str, int]] = {}
    for finding in findings:
        words = groups.setdefault((finding.wheel, finding.verdict), {})
        words[finding.extension] = words.get(finding.extension, 0) + finding.count
    return [
        f"{wheel}: {verdict}: {', '.join(f'{e} {n}' for e, n in sorted(words.items()))}"
        for (wheel, verdict), words in groups.items()
    ]

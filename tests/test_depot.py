"""The depot's files: admitted, placed, unzipped, dropped; and requests that are wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import depots
import psutil
import pytest
from depots import DEPOT, Depot
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import REPO

from device import depot, depot_base, records
from device.records import SlimpiError, check_relative


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Depot]:
    yield from depots.in_folder(tmp_path / "home")


def test_status_tells_the_machine_and_what_is_missing(device: Depot) -> None:
    stored = device.send(b"stored")
    partial = device.send(b"part", whole=False)
    device.home.joinpath("store", "0" * 64).write_bytes(b"short")
    said = device("status", want=[stored, ["0" * 64, 6], [partial[0], 9]])
    assert said["missing"] == ["0" * 64, partial[0]]
    assert said["partial"] == {partial[0]: 4}
    assert said["home"] == str(device.home)
    assert 0 < said["mem_available_bytes"] <= said["mem_total_bytes"] == psutil.virtual_memory().total
    assert said["free_bytes"] > 0
    assert said["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (said["machine"], said["running"]) == (os.uname().machine, [])
    assert said["glibc"].startswith("2.")


def test_admit_takes_only_what_is_whole(device: Depot) -> None:
    good = device.send(b"good", whole=False)
    cut = device.send(b"cut off", whole=False)
    (device.home / "incoming" / cut[0]).write_bytes(b"cut")
    flipped = device.send(b"flipped", whole=False)
    (device.home / "incoming" / flipped[0]).write_bytes(b"flippfd")
    long = device.send(b"long", whole=False)
    (device.home / "incoming" / long[0]).write_bytes(b"longer")
    said = device("admit", files=[good, cut, flipped, long, ["f" * 64, 1]])
    assert said["admitted"] == [good[0]]
    assert {digest: why.split(":")[0] for digest, why in said["refused"].items()} == {
        cut[0]: "truncated",
        flipped[0]: "its sha256 is another",
        long[0]: "6 bytes, expected 4",
        "f" * 64: "it is not in incoming",
    }
    assert [path.name for path in (device.home / "incoming").iterdir()] == [cut[0]]
    (device.home / "incoming" / cut[0]).open("ab").write(b" off")
    assert device("admit", files=[cut, good]) == {"admitted": [cut[0], good[0]], "refused": {}}
    device("drop", files=[good[0]])
    assert device("status", want=[good, cut])["missing"] == [good[0]]


def test_incoming_links_are_not_followed(device: Depot, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    digest, size = device.send(b"secret", whole=False)
    (device.home / "incoming" / digest).unlink()
    (device.home / "incoming" / digest).symlink_to(tmp_path / "secret")
    assert device("admit", files=[[digest, size]])["refused"] == {digest: "it is not in incoming"}


def test_placed_files_share_the_store_and_are_replaced_when_it_changed(device: Depot) -> None:
    digest, size = device.send(b"weights")
    file = {"path": "sub/w.bin", "sha256": digest, "size_bytes": size}
    path = Path(device("place", folder="artifacts/a-1", files=[file])["path"]) / "sub" / "w.bin"
    assert path.samefile(device.home / "store" / digest)
    assert path.stat().st_mode & 0o222 == 0
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    device("drop", files=[digest])
    assert "not in the store" in device.refused("place", folder="artifacts/a-1", files=[file])
    device.send(b"weights")
    device("place", folder="artifacts/a-1", files=[file])
    assert path.read_bytes() == b"weights"


def test_place_copies_where_links_are_impossible(device: Depot, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, size = device.send(b"weights")

    def no_links(*arguments: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(depot.os, "link", no_links)
    files = [{"path": "w.bin", "sha256": digest, "size_bytes": size}]
    path = Path(depot.place(device.home, "data", files)["path"]) / "w.bin"
    assert path.read_bytes() == b"weights"
    assert not path.samefile(device.home / "store" / digest)


@pytest.mark.parametrize(
    "folder", ["artifacts", "artifacts/", "artifacts/..", "artifacts/a/b", "../x", "/tmp", "jobs/x"]
)
def test_other_folders_cannot_be_placed_in(device: Depot, folder: str) -> None:
    assert "`data` or `artifacts/<id>`" in device.refused("place", folder=folder, files=[])


def test_place_does_not_follow_links_out(device: Depot, tmp_path: Path) -> None:
    digest, size = device.send(b"x")
    device("place", folder="data", files=[])
    (tmp_path / "outside").mkdir()
    (device.home / "data" / "sub").symlink_to(tmp_path / "outside")
    files = [{"path": "sub/x", "sha256": digest, "size_bytes": size}]
    assert "through a link" in device.refused("place", folder="data", files=files)
    assert list((tmp_path / "outside").iterdir()) == []


def wheel(**files: bytes) -> bytes:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"slimpi-{os.getpid()}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    data = path.read_bytes()
    path.unlink()
    return data


def test_install_unzips_once_and_whole(device: Depot) -> None:
    one, _ = device.send(wheel(**{"a/__init__.py": b"x = 1\n", "a/b.py": b"y = 2\n"}))
    two, _ = device.send(wheel(**{"c.py": b"z = 3\n"}))
    path = Path(device("install", id="site-1", wheels=[one, two])["path"])
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*.py")) == ["a/__init__.py", "a/b.py", "c.py"]
    (path / "c.py").write_bytes(b"")
    assert device("install", id="site-1", wheels=[one, two])["path"] == str(path)
    assert (path / "c.py").read_bytes() == b""


BAD_WHEELS = {
    "up": (wheel(**{"ok.py": b"", "../up.py": b""}), "must be relative"),
    "absolute": (wheel(**{"ok.py": b"", "/tmp/slimpi-absolute.py": b""}), "must be relative"),
    "no zip": (b"PK\x03\x04" + b"x" * 100, "cannot be unzipped"),
    "torn": (wheel(**{"a.py": os.urandom(1000)})[:-10], "cannot be unzipped"),
    "empty": (b"", "cannot be unzipped"),
}


@pytest.mark.parametrize("name", BAD_WHEELS)
def test_bad_wheels_leave_nothing(device: Depot, name: str) -> None:
    data, message = BAD_WHEELS[name]
    digest, _ = device.send(data)
    assert message in device.refused("install", id="site-1", wheels=[digest])
    assert list((device.home / "site").iterdir()) == []
    assert not (device.home / "up.py").exists()


def test_a_link_in_a_wheel_is_refused(device: Depot, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        member = zipfile.ZipInfo("link")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    digest, _ = device.send((tmp_path / "w.whl").read_bytes())
    assert "is a link" in device.refused("install", id="site-1", wheels=[digest])


def test_a_wheel_damaged_in_the_store_is_refused(device: Depot) -> None:
    digest, _ = device.send(wheel(**{"a.py": b"x = 1\n"}))
    path = device.home / "store" / digest
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    assert "damaged in the store" in device.refused("install", id="site-1", wheels=[digest])


@pytest.mark.parametrize(
    ("arguments", "request_", "message"),
    [
        ([], b"{}", "got 0 arguments"),
        (["status", "--force"], b"{}", "got 2 arguments"),
        (["format"], b"{}", "not one of status, admit"),
        (["status"], b"", "not JSON"),
        (["status"], b"[" * 100_000, "not JSON"),
        (["status"], b"[]", "has fields want"),
        (["status"], b'{"wants": []}', "has fields want"),
        (["status"], b'{"want": 1}', "`want` must be list"),
        (["status"], b'{"want": [["x", 1]]}', "not a sha256"),
        (["status"], b'{"want": [["' + b"0" * 64 + b'", true]]}', "a file is [sha256, size]"),
        (["admit"], b"{}", "`files` must be list, got None"),
        (["stop"], b"{}", "`job` must be str or NoneType"),
        (["stop"], b'{"job": "../x"}', "not a job's id"),
        (["follow"], b'{"job": "nobody"}', "no events at offset 0"),
        (["start"], b'{"job": {}, "pythonpath": []}', "not a job's id"),
        (["start"], b'{"job": {"id": "j"}, "pythonpath": []}', "is not inside"),
        (["install"], b'{"id": "..", "wheels": []}', "not a site's id"),
    ],
)
def test_bad_requests_are_one_line(tmp_path: Path, arguments: list[str], request_: bytes, message: str) -> None:
    environment = {**os.environ, "SLIMPI_DEVICE_HOME": str(tmp_path / "home")}
    done = subprocess.run([*DEPOT, *arguments], input=request_, capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (1, b"")
    assert message in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


def test_a_home_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in Depot(tmp_path / "file" / "home").refused("status")


@settings(deadline=None)
@given(st.text(alphabet="ab./\\\0 ~-é", max_size=12))
def test_paths_are_judged_as_the_contract_judges_them(path: str) -> None:
    """The depot runs before msgspec is there, so it has the rule twice; it may only be the stricter one."""
    try:
        depot_base.check_relative(path)
    except depot_base.DepotError:
        return
    check_relative(path)


def test_the_depot_needs_nothing_but_python() -> None:
    code = "import sys; sys.path.insert(0, '.'); import device.depot; print(*sys.modules)"
    python = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(python, cwd=REPO, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded <= set(sys.stdlib_module_names) | {"__main__", "device"}
    ours = {name for name in done.stdout.split() if name.startswith("device.")}
    assert ours == {"device.depot", "device.depot_base", "device.depot_jobs"}


def test_schema_and_depot_share_their_ids() -> None:
    assert depot_base.PLAIN.pattern in records._SAFE_ID.pattern
    with pytest.raises((ValueError, SlimpiError)):
        records.check_id("../x")

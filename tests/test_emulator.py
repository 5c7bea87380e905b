"""The emulated Pi: apt sources against apt's own reading, then (slow) the real machines at both depths."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from device.records import SlimpiError
from pipeline.emulator import ALIAS, Image, apt, host, machine
from pipeline.emulator import image as images
from pipeline.emulator.__main__ import main
from pipeline.emulator.machine import status

CLASSIC = """\
# deb http://commented.example/debian bookworm main
deb [arch=amd64,arm64 signed-by=/usr/share/keyrings/debian.gpg] http://mirror.example/debian bookworm main contrib # x
deb http://mirror.example/debian bookworm-updates main
deb-src http://source.example/debian bookworm main
deb [ trusted=yes ] file:/srv/debian bookworm-security main
deb http://other.example/tool stable-tool nonfree
"""
STANZAS = """\
Types: deb deb-src
# a comment inside
URIs: http://mirror.example/debian http://second.example/debian
Suites: bookworm bookworm-updates
Components: main
 contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mDMEY
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
Enabled: no

Types: deb-src
URIs: http://source.example/debian
Suites: bookworm
Components: main
"""


@pytest.fixture
def some_image(tmp_path: Path) -> Image:
    return Image("0123456789abcdef", tmp_path / "cache, 100% mine")


# ---- apt sources


def test_classic_sources_are_read_with_their_options() -> None:
    assert apt.parse_one_line(CLASSIC) == [
        apt.Source("http://mirror.example/debian", "bookworm", ("main", "contrib"), "/usr/share/keyrings/debian.gpg"),
        apt.Source("http://mirror.example/debian", "bookworm-updates", ("main",)),
        apt.Source("file:/srv/debian", "bookworm-security", ("main",), "", "yes"),
        apt.Source("http://other.example/tool", "stable-tool", ("nonfree",)),
    ]


def test_stanza_sources_are_read_with_an_armoured_key() -> None:
    found = apt.parse_deb822(STANZAS)
    assert [(s.uri, s.suite, s.components) for s in found] == [
        (f"http://{name}.example/debian", suite, ("main", "contrib"))
        for name in ("mirror", "second")
        for suite in ("bookworm", "bookworm-updates")
    ]
    assert found[0].signed_by.splitlines()[1:3] == [" -----BEGIN PGP PUBLIC KEY BLOCK-----", " ."]


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is the oracle and is not here")
@pytest.mark.parametrize(("text", "suffix"), [(CLASSIC, ".list"), (STANZAS, ".sources")])
def test_apt_reads_the_same_sources(text: str, suffix: str, tmp_path: Path) -> None:
    """Oracle: apt-get's own list of index files, for the file itself and for what we render from it."""

    def as_apt_reads(path: Path) -> set[tuple[str, ...]]:
        argv = [
            "apt-get",
            "indextargets",
            "--no-release-info",
            "--format",
            "$(REPO_URI) $(RELEASE) $(COMPONENT)",
            "Created-By: Packages",
        ]
        argv += ["-o", f"Dir::Etc::sourcelist={path}", "-o", "Dir::Etc::sourceparts=/dev/null"]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        return {tuple(line.split()) for line in done.stdout.splitlines()}

    parsed = (apt.parse_one_line if suffix == ".list" else apt.parse_deb822)(text)
    original, rendered = tmp_path / f"original{suffix}", tmp_path / "rendered.sources"
    original.write_text(text)
    rendered.write_text(apt.render(parsed))
    ours = {(s.uri.rstrip("/") + "/", s.suite, c) for s in parsed for c in s.components}
    assert len(ours) == (5 if suffix == ".list" else 8)
    assert as_apt_reads(original) == ours == as_apt_reads(rendered)


def test_sources_move_to_the_guest_release_and_foreign_ones_drop_out() -> None:
    newer = [apt.Source("http://m.example/debian", f"trixie{pocket}", ("main", "non-free")) for pocket in apt.POCKETS]
    foreign = [
        apt.Source("http://u.example/ubuntu", "noble", ("main",)),
        apt.Source("http://m.example/debian", "trixie-backports", ("main",)),
        apt.Source("http://m.example/debian", "trixie", ("contrib",)),
    ]
    moved = apt.for_guest([*newer, *foreign, *newer])
    assert [(s.suite, s.components) for s in moved] == [(f"bookworm{pocket}", ("main",)) for pocket in apt.POCKETS]
    assert [s.suite for s in apt.for_guest(moved, "trixie")] == [f"trixie{pocket}" for pocket in apt.POCKETS]


def test_sources_are_found_in_both_places_and_their_absence_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "off.list.disabled").write_text(CLASSIC)
    with pytest.raises(SlimpiError, match=r"no Debian archive .* --apt-sources"):
        apt.read_sources(tmp_path)
    (tmp_path / "sources.list.d" / "debian.sources").write_text(STANZAS)
    (tmp_path / "sources.list").write_text(CLASSIC)
    assert len(apt.read_sources(tmp_path)) == 7
    with pytest.raises(SlimpiError, match="cannot read the apt sources"):
        apt.read_sources(only=tmp_path / "missing.sources")


def test_only_settings_about_reaching_a_mirror_are_carried_over() -> None:
    dump = """Acquire "";
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::https::Proxy "";
Acquire::Check-Valid-Until "false";
Acquire::Retries "3";
DPkg::Post-Invoke:: "rm -f /var/cache/apt/archives/*.deb";
"""
    assert apt.select_access_options(dump) == [
        'Acquire::http::Proxy "http://proxy.example:3128";',
        'Acquire::Check-Valid-Until "false";',
        'Acquire::Retries "3";',
    ]


# ---- host programs and command lines


def test_missing_packages_are_named_once_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "find_tool", lambda name: "/usr/bin/ssh" if name.startswith("ssh") else None)
    with pytest.raises(SlimpiError) as caught:
        host.need({"qemu-img": "qemu-utils", "mke2fs": "e2fsprogs", "mkfs.ext4": "e2fsprogs", "ssh": "openssh-client"})
    assert str(caught.value).endswith("sudo apt-get install -y --no-install-recommends e2fsprogs qemu-utils")


def test_only_root_installs_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "missing_packages", lambda tools: ["mmdebstrap"])
    monkeypatch.setattr(host.os, "geteuid", lambda: 1000)
    with pytest.raises(SlimpiError, match=r"needs root: sudo apt-get install .* mmdebstrap"):
        host.install_packages()


@pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is the oracle and is not here")
def test_ssh_reads_the_config_as_it_is_meant(some_image: Image, tmp_path: Path) -> None:
    """Oracle: `ssh -G`, which prints the settings ssh would use."""
    config = tmp_path / "ssh_config"
    config.write_text(machine.ssh_config_text(some_image, 40022))
    done = subprocess.run(["ssh", "-G", "-F", str(config), ALIAS], capture_output=True, text=True, check=True)
    used = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert used["hostname"] == "127.0.0.1"
    assert (used["port"], used["user"], used["batchmode"], used["identitiesonly"]) == ("40022", "pi", "yes", "yes")
    assert used["stricthostkeychecking"] in ("true", "yes")
    assert used["hostkeyalias"] == ALIAS
    assert used["identityfile"].replace("%%", "%").strip('"') == str(some_image.identity)
    assert used["userknownhostsfile"].replace("%%", "%").strip('"') == str(some_image.known_hosts)


def test_a_path_ssh_cannot_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match="plain name"):
        machine.ssh_config_text(Image("k", tmp_path / 'a"b'), 22)


def test_qemu_gives_the_guest_loopback_and_nothing_else(some_image: Image, tmp_path: Path) -> None:
    argv = machine.qemu_argv("qemu", some_image, tmp_path / "a,b", 40022, 2048, 3, ["x=1"])
    options = dict(zip(argv[1::2], argv[2::2], strict=False))
    assert (options["-cpu"], options["-smp"], options["-m"]) == ("cortex-a72", "3", "2048M")
    network = argv[argv.index("-netdev") + 1]
    assert network == "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:40022-:22"
    assert "a,,b" in argv[argv.index("-drive") + 1]  # QEMU splits options at single commas
    assert argv[argv.index("-append") + 1].endswith(" x=1")


def test_the_serial_log_is_cut_at_the_panic() -> None:
    trace = [f"[ 2.{n}] trace {n}" for n in range(30)]
    log = "\r\n".join(["[ 1.0] no root device", "[ 2.0] Kernel panic - not syncing", *trace])
    assert machine.serial_excerpt(log) == "[ 1.0] no root device | [ 2.0] Kernel panic - not syncing"
    assert machine.serial_excerpt("\n".join(trace), lines=2) == "[ 2.28] trace 28 | [ 2.29] trace 29"
    assert machine.serial_excerpt("") == ""


# ---- the initial RAM disk


def test_modules_come_after_what_they_depend_on(tmp_path: Path) -> None:
    def module(name: str, depends: str) -> None:
        path = tmp_path / "kernel" / "drivers" / f"{name}.ko"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0")

    module("virtio", "")
    module("virtio_ring", "")
    module("net-failover", "failover")
    module("failover", "")
    module("virtio_net", "virtio,net_failover,virtio_ring")
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    order = [path.stem for path in images.module_files(tmp_path, ["ext4", "virtio_net", "virtio"])]
    assert order == ["virtio", "failover", "net-failover", "virtio_ring", "virtio_net"]
    with pytest.raises(SlimpiError, match="no module virtio_blk"):
        images.module_files(tmp_path, ["virtio_blk"])


def test_the_initrd_is_a_newc_archive(tmp_path: Path) -> None:
    module = tmp_path / "virtio.ko"
    module.write_bytes(b"12345")
    archive, found, at = images.initrd(b"busybox!", [module]), {}, 0
    while at < len(archive):
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        assert archive[at : at + 6] == b"070701"
        name_end = at + 110 + fields[11]
        data_at = (name_end + 3) // 4 * 4
        found[archive[at + 110 : name_end - 1].decode()] = (fields[1], archive[data_at : data_at + fields[6]])
        at = (data_at + fields[6] + 3) // 4 * 4
    assert at == len(archive)
    assert found["bin/busybox"] == (0o100755, b"busybox!")
    assert found["modules/00-virtio.ko"] == (0o100644, b"12345")
    assert found["init"][0] == 0o100755
    assert found["init"][1].startswith(b"#!/bin/busybox sh\n")
    assert list(found)[-1] == "TRAILER!!!"


# ---- the command


def test_the_command_says_what_to_do_when_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["down", "--cache", str(tmp_path)]) == 0
    assert main(["status", "--cache", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out == "not running\n"
    assert "make pi-emulator" in said.err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text("{")
    assert main(["ssh-config", "--cache", str(tmp_path)]) == 1
    assert "state.json" in capsys.readouterr().err


def test_a_recycled_process_number_is_not_taken_for_the_machine(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(f'{{"image_key": "k", "pid": {os.getpid()}, "port": 1}}')
    assert status(tmp_path) is None


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise SlimpiError("no network")

    with pytest.raises(SlimpiError, match="no network"):
        host.cached_folder(tmp_path, "pi-1", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    made = host.cached_folder(tmp_path, "pi-1", lambda folder: (folder / "whole").touch())
    assert host.cached_folder(tmp_path, "pi-1", fail) == made

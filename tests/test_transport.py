"""The seam over a real sshd on loopback: words arrive as they are, copies resume, a dead link is one line of error."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sshd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device.records import SlimpiError
from pipeline import transport
from pipeline.hosts import LOCAL, Host, find, provenance, ssh_host
from pipeline.progress import Progressor
from pipeline.store import Places
from pipeline.transport import LINK_FAILED, Interrupted, Parcel, push, run, shared_link

SHOW = "import sys, json; print(json.dumps([sys.argv[1:], sys.stdin.read()]))"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Server]:
    with sshd.serve(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(scope="module")
def linked(server: sshd.Server) -> Iterator[Host]:
    with shared_link(server.host) as host:
        yield host


def collect(host: Host, argv: list[str], stdin: bytes = b"", **options: object) -> tuple[int, bytes, str]:
    lines: list[bytes] = []
    code, errors = run(host, argv, stdin, lines.append, **options)  # type: ignore[arg-type]
    return code, b"".join(lines), errors


@pytest.mark.parametrize("where", ["local", "ssh"])
def test_run_feeds_stdin_hands_over_lines_and_passes_the_code(where: str, linked: Host) -> None:
    host = LOCAL if where == "local" else linked
    code = "import sys; print(sys.stdin.read()); print('b'); print('oops', file=sys.stderr); sys.exit(3)"
    lines: list[bytes] = []
    assert run(host, [sys.executable, "-c", code], b"a" * 300_000, lines.append) == (3, "oops")
    assert [len(line) for line in lines] == [300_001, 2]


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=5))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_words_reach_the_device_as_they_are(linked: Host, words: list[str]) -> None:
    words = [*words, "$HOME", "a b", "'", '"', "*", ";", "`id`", "\n", "-n", ""]
    code, said, errors = collect(linked, [sys.executable, "-c", SHOW, *words])
    assert (code, errors) == (0, "")
    assert json.loads(said) == [words, ""]


def test_one_connection_serves_many_commands_and_is_closed(server: sshd.Server) -> None:
    before = len(server.sessions())
    with shared_link(server.host) as host:
        for _ in range(3):
            assert collect(host, ["true"])[0] == 0
        # A session is two processes for root's sshd, more for another user's; three would be thrice as many.
        assert 0 < len(server.sessions()) - before <= 3
        folder = Path(next(o.split("=", 1)[1] for o in host.ssh_options if o.startswith("ControlPath="))).parent
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()
    deadline = time.monotonic() + 5
    while len(server.sessions()) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(server.sessions()) == before


def test_the_users_own_control_path_is_respected(server: sshd.Server, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(Path(server.host.ssh_options[1]).read_text() + f"  ControlPath {tmp_path}/mine\n")
    with shared_link(replace(server.host, ssh_options=("-F", str(config)))) as host:
        assert not any("Control" in option for option in host.ssh_options)


@pytest.mark.parametrize(
    ("old", "new", "remedy"),
    [
        ("HostName 127.0.0.1", "HostName no.such.host.invalid", "resolve"),
        ("Port ", "Port 1", "refused"),
        ("/user_key", "/host_key", "ssh-copy-id box"),
        ("/known_hosts", "/nobody_known", "Log in once by hand and check the key: ssh box"),
    ],
)
def test_unreachable_in_one_line_with_a_remedy(
    server: sshd.Server, tmp_path: Path, old: str, new: str, remedy: str
) -> None:
    config = tmp_path / "config"
    text = Path(server.host.ssh_options[1]).read_text()
    port = text.split("Port ")[1].split()[0]
    config.write_text(text.replace(f"Port {port}", "Port 1") if new == "Port 1" else text.replace(old, new))
    with shared_link(replace(server.host, ssh_options=("-F", str(config)))) as host:
        code, errors = transport.open_link(host)
        said = str(transport.unreachable(server.host, errors))
    assert code == LINK_FAILED
    assert remedy in said
    assert "\n" not in said


@pytest.mark.parametrize("name", ["-oProxyCommand=id", "", "a b", "a/b", "pi@", "@pi", "a;b", "$(id)", "../x", "pi@-x"])
def test_names_that_ssh_or_a_folder_would_misread_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match="is no host"):
        find(name, Places(tmp_path), Progressor(plain=True))


def test_usual_names_are_hosts(tmp_path: Path) -> None:
    for name in ("pi@raspberrypi.local", "pi", "pi@192.168.1.7", "pi@fe80::1%eth0"):
        assert find(name, Places(tmp_path), Progressor(plain=True)).destination == name
    assert find("local", Places(tmp_path), Progressor(plain=True)).is_local
    with pytest.raises(SlimpiError, match="no ssh configuration"):
        ssh_host("pi", tmp_path / "none")


@pytest.mark.parametrize(
    ("machine", "board", "expected"),
    [
        ("aarch64", "Raspberry Pi 4 Model B Rev 1.4", "measured"),
        ("aarch64", "Radxa ROCK 5B", "measured"),
        ("aarch64", "linux,dummy-virt", "emulated"),
        ("aarch64", "QEMU Virtual Machine", "emulated"),
        ("aarch64", "Amazon EC2 t4g.small", "emulated"),
        ("aarch64", "", "emulated"),
        ("aarch64", "unknown", "emulated"),
        ("x86_64", "LENOVO 20XW", "host"),
    ],
)
def test_only_a_real_arm_board_is_measured(machine: str, board: str, expected: str) -> None:
    assert provenance(Host("pi", "pi"), machine, board) == expected
    assert provenance(Host("emulated", "x", emulated=True), machine, board) == "emulated"
    assert provenance(LOCAL, machine, board) == "host"


def parcels_of(folder: Path, sizes: list[int]) -> list[Parcel]:
    folder.mkdir()
    made = []
    for i, size in enumerate(sizes):
        path = folder / f"file {i}"
        path.write_bytes(os.urandom(size))
        made.append(Parcel(path, hashlib.sha256(path.read_bytes()).hexdigest(), size))
    return made


def arrived(parcels: list[Parcel], target: Path) -> bool:
    return all((target / p.sha256).read_bytes() == p.path.read_bytes() for p in parcels)


@pytest.mark.parametrize("rsync", [True, False], ids=["rsync", "tar"])
def test_push_sends_whole_files_and_continues_begun_ones(linked: Host, tmp_path: Path, rsync: bool) -> None:
    parcels = parcels_of(tmp_path / "here", [3_000_000, 1, 0, 700_001])
    target = tmp_path / "in coming"
    target.mkdir()
    code, errors, sent = push(linked, parcels, str(target), device_has_rsync=rsync)
    assert (code, errors) == (0, "")
    assert arrived(parcels, target)
    assert sum(sent.values()) == pytest.approx(3_700_002, rel=0.01)

    os.truncate(target / parcels[0].sha256, 2_900_000)
    (target / parcels[3].sha256).unlink()
    begun = [replace(parcels[0], sent_before=2_900_000), parcels[3]]
    code, errors, sent = push(linked, begun, str(target), device_has_rsync=rsync)
    assert code == 0, errors
    assert arrived(parcels, target)
    # rsync's own count holds its checksums too: 20 bytes and more a block.
    assert 100_000 <= sent[parcels[0].sha256] < 150_000


def test_rsync_mends_a_begun_file_that_is_wrong(linked: Host, tmp_path: Path) -> None:
    (parcel,) = parcels_of(tmp_path / "here", [1_000_000])
    target = tmp_path / "there"
    target.mkdir()
    (target / parcel.sha256).write_bytes(bytes(400_000))
    code, errors, _ = push(linked, [replace(parcel, sent_before=400_000)], str(target), device_has_rsync=True)
    assert code == 0, errors
    assert arrived([parcel], target)


@pytest.mark.parametrize("rsync", [True, False], ids=["rsync", "tar"])
def test_a_cut_copy_says_so_and_leaves_what_came(server: sshd.Server, tmp_path: Path, rsync: bool) -> None:
    parcels = parcels_of(tmp_path / "here", [200_000_000])
    target = tmp_path / "there"
    target.mkdir()
    with shared_link(server.host) as host:
        stop = threading.Event()

        def cut() -> None:
            path = target / parcels[0].sha256
            while not stop.wait(0.01):
                # rsync without --inplace would have another name: nothing would be there to go on from.
                if path.exists() and path.stat().st_size > 5_000_000:
                    server.cut()
                    return

        thread = threading.Thread(target=cut)
        thread.start()
        code, _, _ = push(host, parcels, str(target), device_has_rsync=rsync)
        stop.set()
        thread.join()
        assert code == LINK_FAILED
        came = (target / parcels[0].sha256).stat().st_size
        assert 5_000_000 < came < 200_000_000
        before = [replace(parcels[0], sent_before=came)]
        code, errors, sent = push(host, before, str(target), device_has_rsync=rsync)
    assert code == 0, errors
    assert arrived(parcels, target)
    assert sum(sent.values()) < 200_000_000 - came + 5_000_000


@pytest.mark.parametrize("code", [1, 2, 5, 10, 11, 12, 14, 20, 23, 24, 30, 35, 127, 255])
def test_rsyncs_codes_for_a_broken_stream_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Which one a cut gives is a matter of timing: socket I/O, protocol stream, IPC, timeouts, or ssh's own."""
    program = tmp_path / "rsync"
    program.write_text(f"#!/bin/sh\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(transport, "_tool", lambda name: str(program) if name == "rsync" else name)
    monkeypatch.setattr(transport, "rsync_usable", lambda: True)
    said, _, _ = push(LOCAL, parcels_of(tmp_path / "here", [1]), str(tmp_path), device_has_rsync=True)
    assert said == (LINK_FAILED if code in {10, 12, 14, 30, 35, 255} else code)


def test_without_rsync_here_tar_is_taken(linked: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parcels = parcels_of(tmp_path / "here", [1000])
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(transport, "rsync_usable", lambda: False)
    monkeypatch.setattr(transport, "_push_rsync", None)
    assert push(linked, parcels, str(tmp_path / "there"), device_has_rsync=True)[0] == 0
    assert arrived(parcels, tmp_path / "there")


def test_silence_ends_a_program_that_says_nothing() -> None:
    started = time.monotonic()
    code, said, errors = collect(LOCAL, [sys.executable, "-c", "import time; print('a', flush=True); time.sleep(60)"],
                                 silence_s=0.7)  # fmt: skip
    assert (code, said) == (LINK_FAILED, b"a\n")
    assert "no sign of life for 1 s" in errors
    assert time.monotonic() - started < 10


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_LINE_BYTES", 1 << 20)
    with pytest.raises(SlimpiError, match="a line of over 1048576 bytes"):
        collect(LOCAL, ["cat", "/dev/zero"])


def test_cancel_ends_the_child_and_raises(tmp_path: Path) -> None:
    cancel = threading.Event()
    mark = tmp_path / "tidied"
    code = (
        "import signal,sys,time,pathlib\n"
        f"signal.signal(signal.SIGTERM, lambda *a: (pathlib.Path({str(mark)!r}).touch(), sys.exit(0)))\n"
        "print('up', flush=True)\ntime.sleep(60)"
    )
    with pytest.raises(Interrupted):
        run(LOCAL, [sys.executable, "-c", code], b"", lambda line: cancel.set(), cancel=cancel)
    assert mark.exists()


def test_the_terminals_ctrl_c_does_not_reach_the_child() -> None:
    """Else the agent would die before slimpi has told it to stop."""
    code = (
        "import sys; from pipeline.hosts import LOCAL; from pipeline.transport import run\n"
        "run(LOCAL, [sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(1); print(2)'], b'',"
        " lambda l: print(l.decode(), end='', flush=True))"
    )
    code = "import signal; signal.signal(signal.SIGINT, lambda *a: None)\n" + code
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, process_group=0)
    assert process.stdout
    assert process.stdout.readline() == b"1\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.read() == b"2\n"
    assert process.wait() == 0


def test_a_missing_program_is_named() -> None:
    with pytest.raises(SlimpiError, match="no-such-program is not installed"):
        collect(LOCAL, ["no-such-program"])

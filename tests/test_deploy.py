"""From artifact to report over a real sshd: what is sent, what survives a dropped link, what is refused."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest
import remote_jobs
import sshd
from remote_jobs import make_artifact, run_on, samples, text_file, try_on

from device.records import SlimpiError
from device.results import Done, Event, Sample, TaskStarted
from pipeline import deploy, remote, transport
from pipeline.compare import rows
from pipeline.hosts import LOCAL, Host
from pipeline.progress import Progressor
from pipeline.replies import Status
from pipeline.store import Places, load_artifact
from pipeline.table import show

REPO = Path(__file__).resolve().parent.parent
LONG = {"n_ctx": 8, "n_chunks": 0}


both_ways = pytest.mark.parametrize("rsync", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["rsync", "tar"])


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Server]:
    with sshd.serve(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def server(shared_server: sshd.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[sshd.Server]:
    """The server with an empty device; reconnecting does not wait."""
    monkeypatch.setattr(remote, "BACKOFF_S", (0.05, 0.1, 0.2, 0.5))
    shutil.rmtree(shared_server.home)
    shared_server.home.mkdir()
    yield shared_server
    for process in agents(shared_server):
        process.kill()


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "home")


@pytest.fixture
def text(tmp_path: Path) -> str:
    return text_file(tmp_path)


def agents(server: sshd.Server) -> list[psutil.Process]:
    """Agents that run jobs of this server's device."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "device" in words and any(str(server.home) in word for word in words):
            found.append(process)
    return found


def sent(said: str) -> dict[str, int]:
    """The last `bytes sent` line as numbers."""
    line = [line for line in said.splitlines() if "bytes sent: " in line][-1]
    pairs = (part.rsplit(" ", 1) for part in line.split("bytes sent: ")[1].split(", "))
    return {kind: int(count.replace(",", "")) for kind, count in pairs}


def test_second_deploy_sends_nothing_and_a_changed_file_only_itself(
    server: sshd.Server, places: Places, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_artifact(places)
    first = run_on([server.host], [folder], places, text)["box"][0]
    said = sent(capsys.readouterr().err)
    size = load_artifact(folder).size_bytes
    assert said["artifact"] == pytest.approx(size, abs=2000)
    assert 0 < said["data"] < 2000
    assert said["code"] > 10_000
    assert first.provenance == "host"
    assert first.results[0].status == "ok"

    second = run_on([server.host], [folder], places, text)["box"][0]
    assert second == first, "an equal job is replayed"
    assert sent(capsys.readouterr().err) == {"artifact": 0, "wheels": 0, "data": 0, "code": 0}
    kept = places.results / "box" / first.job_id / "report.json"
    assert msgspec.json.decode(kept.read_bytes(), type=type(first)) == first

    local = deploy.bench("local", folder, places, threads=1, overrides={**remote_jobs.SHORT, "text": text},
                         wanted=["perplexity"])  # fmt: skip
    assert samples(local) == pytest.approx(samples(first), abs=1e-9)

    other = make_artifact(places, "Q8_0", seed=1)
    shutil.copy(folder / "model.gguf", other / "same.gguf")
    manifest = load_artifact(other)
    files = [*manifest.files, msgspec.structs.replace(load_artifact(folder).files[0], path="same.gguf")]
    (other / "manifest.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, files=files)))
    run_on([server.host], [other], places, text)
    again = sent(capsys.readouterr().err)
    assert again["artifact"] == pytest.approx(manifest.size_bytes, abs=2000), "the file it has already is not sent"
    assert again["data"] == again["code"] == 0


@pytest.mark.slow
def test_changed_agent_code_sends_only_itself(
    server: sshd.Server, places: Places, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import wheelhouse

    folder = make_artifact(places)
    run_on([server.host], [folder], places, text)
    files = [*wheelhouse.device_files(), ("device/more.py", b"# more\n")]
    monkeypatch.setattr(wheelhouse, "device_files", lambda: files)
    capsys.readouterr()
    run_on([server.host], [folder], places, text)
    said = sent(capsys.readouterr().err)
    assert said["code"] > 10_000
    assert said["artifact"] == said["data"] == 0


@pytest.mark.slow
def test_damaged_code_on_the_device_is_sent_again(server: sshd.Server, places: Places, text: str) -> None:
    folder = make_artifact(places)
    run_on([server.host], [folder], places, text)
    (code,) = (server.home / "code").iterdir()
    (code / "device" / "agent.py").write_text("raise SystemExit('not what was sent')")
    assert run_on([server.host], [folder], places, text, again=True)["box"]


@both_ways
def test_a_begun_upload_is_continued(
    server: sshd.Server,
    places: Places,
    text: str,
    rsync: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "rsync_usable", lambda: rsync)
    folder = make_artifact(places)
    file = load_artifact(folder).files[0]
    (server.home / "incoming").mkdir()
    half = (folder / "model.gguf").read_bytes()[: file.size_bytes // 2]
    (server.home / "incoming" / file.sha256).write_bytes(half)
    run_on([server.host], [folder], places, text)
    assert sent(capsys.readouterr().err)["artifact"] == pytest.approx(file.size_bytes / 2, abs=3000)


@both_ways
def test_a_wrong_beginning_is_sent_anew_and_accepted_only_whole(
    server: sshd.Server, places: Places, text: str, rsync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "rsync_usable", lambda: rsync)
    folder = make_artifact(places)
    file = load_artifact(folder).files[0]
    (server.home / "incoming").mkdir()
    (server.home / "incoming" / file.sha256).write_bytes(b"x" * 5000)
    assert run_on([server.host], [folder], places, text)["box"][0].results[0].status == "ok"
    assert (server.home / "store" / file.sha256).read_bytes() == (folder / "model.gguf").read_bytes()


def test_a_damaged_file_in_the_store_is_sent_again_once(
    server: sshd.Server, places: Places, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_artifact(places)
    run_on([server.host], [folder], places, text)
    stored = server.home / "store" / load_artifact(folder).files[0].sha256
    data = bytearray(stored.read_bytes())
    data[-9] ^= 4
    stored.chmod(0o644)
    stored.write_bytes(data)
    report = run_on([server.host], [folder], places, text, again=True)["box"][0]
    assert report.results[0].status == "ok"
    assert "1 file(s) of tiny-f32 were damaged on the device and are sent again" in capsys.readouterr().err
    assert stored.read_bytes() == (folder / "model.gguf").read_bytes()


def test_dropped_links_lose_and_double_nothing(server: sshd.Server, places: Places, tmp_path: Path) -> None:
    folder = make_artifact(places)
    text = text_file(tmp_path, 400)
    cuts = 0
    events: list[Event] = []

    class Cutting(list):  # type: ignore[type-arg]
        def append(self, event: Event) -> None:
            nonlocal cuts
            super().append(event)
            if isinstance(event, Sample) and event.index % 1000 == 500:
                cuts += server.cut() > 0

    events = Cutting()
    report = run_on([server.host], [folder], places, text, events, overrides=LONG)["box"][0]
    assert cuts >= 5
    taken = [e for e in events if isinstance(e, Sample)]
    assert [e.index for e in taken] == list(range(len(taken)))
    assert [e.value for e in taken] == samples(report)
    assert [type(e) for e in events if not isinstance(e, Sample)].count(Done) == 1
    whole = deploy.bench("local", folder, places, threads=1, overrides={**LONG, "text": text}, wanted=["perplexity"])
    assert samples(whole) == pytest.approx(samples(report), abs=1e-9)
    assert not report.results[0].resumed, "the agent was never told of the link"


@pytest.mark.slow
def test_a_link_that_falls_silent_is_replaced(
    server: sshd.Server,
    places: Places,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No goodbye, as when a router dies: the connection stays open and nothing comes. A new one must be made."""
    monkeypatch.setattr(remote, "SILENCE_S", 8.0)  # above the depot's heartbeat
    monkeypatch.setattr(remote, "PATIENCE_S", 20.0)
    # ssh's own watch over the link would close it some time later.
    host = replace(server.host, ssh_options=(*server.host.ssh_options, "-o", "ServerAliveInterval=1000"))
    frozen: list[psutil.Process] = []

    class Freezing(list):  # type: ignore[type-arg]
        def append(self, event: Event) -> None:
            super().append(event)
            if isinstance(event, Sample) and event.index == 300 and not frozen:
                frozen.extend(server.sessions())
                for process in frozen:
                    process.suspend()

    events = Freezing()
    try:
        folder, text = make_artifact(places), text_file(tmp_path, 600)
        report = run_on([host], [folder], places, text, events, overrides=LONG)
    finally:
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert "no sign of life for 8 s" in capsys.readouterr().err
    taken = [e.value for e in events if isinstance(e, Sample)]
    assert taken == samples(report["box"][0])


DRIVER = """
import signal, sys
sys.path[:0] = ["tests"]
from pathlib import Path
import msgspec
from pipeline import cli, deploy, transport
from pipeline.hosts import Host
from pipeline.progress import Progressor
from pipeline.store import Places

def interrupt(number, frame):
    raise transport.Interrupted

signal.signal(signal.SIGINT, interrupt)
host = msgspec.json.decode(sys.argv[1], type=Host)
chosen = deploy.Settings(threads=1, overrides=msgspec.json.decode(sys.argv[4]), wanted=["perplexity"])
deploy.bench_all([host], [Path(sys.argv[3])], Places(Path(sys.argv[2])), chosen, Progressor(True),
                 lambda name: deploy.nullcontext(lambda event: print(type(event).__name__, flush=True)))
"""


def start_host(server: sshd.Server, places: Places, folder: Path, text: str) -> subprocess.Popen[bytes]:
    """slimpi in a process of its own, returned once the first samples came."""
    settings = msgspec.json.encode({**remote_jobs.SHORT, **LONG, "text": text, "n_prompt": 16, "n_gen": 4}).decode()
    host = msgspec.json.encode(server.host).decode()
    argv = [sys.executable, "-c", DRIVER, host, str(places.root), str(folder), settings]
    process = subprocess.Popen(argv, cwd=REPO, stdout=subprocess.PIPE)
    assert process.stdout
    for line in process.stdout:
        if line == b"Sample\n":
            # A fast machine fills the pipe with more of them: unread, they would block it for ever.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process
    raise AssertionError("the job did not start")


def test_a_host_killed_hard_attaches_again(
    server: sshd.Server, places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text = make_artifact(places), text_file(tmp_path, 1500)
    with start_host(server, places, folder, text) as process:
        process.kill()
    events: list[Event] = []
    report = run_on([server.host], [folder], places, text, events, overrides=LONG)["box"][0]
    assert "is running there already: attached to it" in capsys.readouterr().err
    assert [e.index for e in events if isinstance(e, Sample)] == list(range(len(samples(report))))
    assert not report.results[0].resumed


def test_ctrl_c_stops_the_job_there_and_the_next_run_goes_on(
    server: sshd.Server, places: Places, tmp_path: Path
) -> None:
    folder, text = make_artifact(places), text_file(tmp_path, 600)
    with start_host(server, places, folder, text) as process:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    assert agents(server) == []
    events: list[Event] = []
    report = run_on([server.host], [folder], places, text, events, overrides=LONG)["box"][0]
    assert report.results[0].resumed
    new = [e.index for e in events if isinstance(e, Sample)]
    assert 0 < len(new) < len(samples(report))
    assert new == list(range(new[0], len(samples(report))))


def test_a_killed_agent_is_started_again_and_goes_on(
    server: sshd.Server, places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text = make_artifact(places), text_file(tmp_path, 300)
    killed: list[int] = []

    class Killing(list):  # type: ignore[type-arg]
        def append(self, event: Event) -> None:
            super().append(event)
            if isinstance(event, Sample) and event.index > 200 and not killed:
                for process in agents(server):
                    killed.append(process.pid)
                    process.kill()

    report = run_on([server.host], [folder], places, text, Killing(), overrides=LONG)["box"][0]
    assert killed
    assert "was killed" in capsys.readouterr().err
    assert report.results[0].resumed
    whole = deploy.bench("local", folder, places, threads=1, overrides={**LONG, "text": text}, wanted=["perplexity"])
    assert samples(whole) == pytest.approx(samples(report), abs=1e-9)


def test_a_device_that_measures_something_else_is_left_alone(
    server: sshd.Server, places: Places, tmp_path: Path, text: str
) -> None:
    folder = make_artifact(places)
    process = start_host(server, places, folder, text_file(tmp_path, 600))
    with pytest.raises(SlimpiError, match=r"box is measuring tiny-f32-.*slimpi stop box"):
        run_on([server.host], [folder], places, text)
    with remote.attach(server.host, Progressor(plain=True), threading.Event()) as device:
        assert len(remote.stop(device, None)) == 1
        process.wait(30)
        assert agents(server) == []
        freed = remote.clean(device, everything=True)
    assert freed.freed_bytes > 100_000
    assert not server.home.exists()
    server.home.mkdir()


def test_memory_that_will_not_do_is_refused_with_numbers_before_anything_is_sent(
    server: sshd.Server, places: Places, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_artifact(places)
    real = remote.status

    def small(device: remote.Device, goods: object = ()) -> Status:
        return msgspec.structs.replace(real(device, goods), mem_available_bytes=20_000_000)  # type: ignore[arg-type]

    monkeypatch.setattr(remote, "status", small)
    with pytest.raises(SlimpiError, match=r"tiny-f32 will not fit .* needs about \d+ MB .* 20 MB are .*--force"):
        run_on([server.host], [folder], places, text)
    assert list((server.home / "store").iterdir()) == []
    assert run_on([server.host], [folder], places, text, force=True)["box"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_a_full_disk_is_refused_with_numbers(server: sshd.Server, places: Places, text: str) -> None:
    folder = make_artifact(places)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(server.home)], check=False).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        with pytest.raises(SlimpiError, match=r"box has \d MB free in .*device home, this needs 134 MB .*slimpi clean"):
            run_on([server.host], [folder], places, text)
        shutil.rmtree(server.home / "code")
        fill(server.home)
        with pytest.raises(SlimpiError, match=r"box cannot keep the agent's code in .*No space left"):
            run_on([server.host], [folder], places, text)
    finally:
        subprocess.run(["umount", "-l", str(server.home)], check=True)


def fill(folder: Path) -> None:
    with (folder / "filler").open("ab", buffering=0) as out, contextlib.suppress(OSError):
        while out.write(bytes(4096)):
            continue


def test_devices_side_by_side_and_one_that_fails_alone(
    server: sshd.Server, places: Places, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_artifact(places), make_artifact(places, "Q8_0", seed=1)]
    hosts = [
        replace(server.host, name="one"),
        Host("lost", "no.such.host.invalid", ("-F", "/dev/null")),
        replace(server.host, name="two", home=str(tmp_path / "second home")),
        LOCAL,
    ]
    reports, errors = try_on(hosts, folders, places, text)
    assert [str(error).split(":")[0] for error in errors] == ["cannot log in to lost"]
    assert {name: len(found) for name, found in reports.items()} == {"one": 2, "lost": 0, "two": 2, "local": 2}
    table = [row for name, found in reports.items() if found for row in rows(found, name)]
    capsys.readouterr()
    show(table)
    said = capsys.readouterr().out
    for name in ("one: tiny", "two: tiny", "local: tiny"):
        assert name in said
    assert said.count("smallest without a measurable loss") == 3


def test_local_agent_without_report_is_an_error_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "encode", lambda job: b"")
    monkeypatch.setattr(deploy.sys, "executable", "/bin/false")
    with pytest.raises(SlimpiError, match="ended with code 1 and no report"):
        deploy.run_job("local", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("line", [b"not json\n", b"{}\n", b'{"event":"sample"}\n', b'{"event":"zap"}\n'])
def test_garbage_from_the_local_agent_is_an_error(monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    def fake(host: object, argv: object, stdin: bytes, on_line: transport.OnLine, cancel: object) -> tuple[int, str]:
        on_line(line)
        return 0, ""

    monkeypatch.setattr(deploy, "run", fake)
    monkeypatch.setattr(deploy, "encode", lambda job: b"")
    with pytest.raises(SlimpiError, match=r"an event from local"):
        deploy.run_job("local", None)  # type: ignore[arg-type]


def test_unknown_host_of_bench_is_refused(places: Places) -> None:
    with pytest.raises(SlimpiError, match="'pi@x' is not this machine"):
        deploy.bench("pi@x", Path(), places, threads=1, overrides={})


def test_started_event_names_the_task(server: sshd.Server, places: Places, text: str) -> None:
    events: list[Event] = []
    run_on([server.host], [make_artifact(places)], places, text, events, ("throughput", "perplexity"))
    assert [e.name for e in events if isinstance(e, TaskStarted)] == ["throughput", "perplexity"]

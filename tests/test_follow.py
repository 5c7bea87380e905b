"""What a device says is data from a stranger: whatever it is, it ends in a report that fits the job or one error."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_compare import REFERENCE, report

from device.records import SlimpiError, encode_line
from device.results import Done, Event, Note, Report, Sample
from device.schema import Job
from pipeline import follow, remote, transport
from pipeline.compare import rows
from pipeline.hosts import Host
from pipeline.progress import Progressor
from pipeline.remote import Contact, Device
from pipeline.table import show

Answers = dict[str, Callable[[dict[str, Any]], tuple[int, bytes, str]]]

GOOD = msgspec.structs.replace(report("F16", REFERENCE), job_id="job-1")
JOB = Job(
    id="job-1",
    artifact=GOOD.artifact,
    artifact_dir="/a",
    data_dir="/d",
    work_dir="/w",
    tasks=[result.task for result in GOOD.results],
    threads=GOOD.threads,
    provenance="measured",
)
ENDED = b'{"follow": "ended", "exit": 0, "stderr": ""}\n'
STREAM = b"".join(
    [
        *(encode_line(Sample(task=0, series="nll", index=i, value=x)) for i, x in enumerate(REFERENCE)),
        b'{"follow": "alive"}\n',
        encode_line(Note(message="all is well")),
        encode_line(Done(report=GOOD)),
    ]
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(remote, "BACKOFF_S", (0.0,))
    monkeypatch.setattr(transport, "cut_link", lambda host: None)
    contact = Contact(
        home="/h", code=True, python="3.11.2", glibc="2.36", machine="aarch64", board="b", cores=4, governors={},
        time_unix_s=0.0, error="",
    )  # fmt: skip
    return Device(Host("pi", "pi"), contact, "c", Progressor(plain=True), threading.Event())


def saying(monkeypatch: pytest.MonkeyPatch, answers: Answers) -> None:
    """Replace the seam: each depot command answers as told."""

    def fake(host: Host, argv: Sequence[str], stdin: bytes, on_line: transport.OnLine, **_: object) -> tuple[int, str]:
        code, said, errors = answers[argv[-1]](json.loads(stdin))
        for line in said.splitlines(keepends=True):
            on_line(line)
        return code, errors

    monkeypatch.setattr(transport, "run", fake)


def playing(stream: bytes) -> Answers:
    return {
        "start": lambda request: (0, b'{"state": "started"}', ""),
        "stop": lambda request: (0, b'{"stopped": []}', ""),
        "follow": lambda request: (0, stream[request["offset"] :] if request["offset"] else stream, ""),
    }


def test_a_good_stream_gives_the_report(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    saying(monkeypatch, playing(STREAM + ENDED))
    got, ended = follow.run_job(device, JOB, [], events.append)
    assert (got, ended.exit) == (GOOD, 0)
    assert [e.value for e in events if isinstance(e, Sample)] == REFERENCE


@example(cuts=[len(STREAM) + 5, 0])
@given(cuts=st.lists(st.integers(0, len(STREAM) + len(ENDED)), max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cuts_anywhere_lose_and_double_nothing(device: Device, cuts: list[int]) -> None:
    """The depot's file has no heartbeats; offsets count its bytes; a link may end in the middle of a line."""
    stored = STREAM.replace(b'{"follow": "alive"}\n', b"")
    lengths = iter(cuts)
    events: list[Event] = []

    def follow_once(request: dict[str, Any]) -> tuple[int, bytes, str]:
        rest = b'{"follow": "alive"}\n' + stored[request["offset"] :] + ENDED
        cut = next(lengths, None)
        return (0, rest, "") if cut is None else (transport.LINK_FAILED, rest[:cut], "gone")

    with pytest.MonkeyPatch.context() as patch:
        saying(patch, {**playing(b""), "follow": follow_once})
        got, _ = follow.run_job(device, JOB, [], events.append)
    assert got == GOOD
    assert [(e.index, e.value) for e in events if isinstance(e, Sample)] == list(enumerate(REFERENCE))
    assert sum(isinstance(e, Done) for e in events) == 1


def changed(**changes: Any) -> bytes:
    return encode_line(Done(report=msgspec.structs.replace(GOOD, **changes))) + ENDED


def with_measurement(**changes: Any) -> bytes:
    first, *rest = GOOD.results
    speed = msgspec.structs.replace(rest[0].measurements[0], **changes)
    second = msgspec.structs.replace(rest[0], measurements=[speed, *rest[0].measurements[1:]])
    return changed(results=[first, second])


def with_facts(**changes: Any) -> bytes:
    first, *rest = GOOD.results
    facts = msgspec.structs.replace(first.facts_before, **changes)
    return changed(results=[msgspec.structs.replace(first, facts_before=facts), *rest])


@pytest.mark.parametrize(
    ("stream", "told"),
    [
        (b"\x00\xff garbage\n", "an event from pi"),
        (b"[" * 100_000 + b"\n", "an event from pi"),
        (b'{"event":"done","report":{"schema":2}}\n', "schema"),
        (b'{"event":"exec","code":"1"}\n', "an event from pi"),
        (b'{"follow":"format c:"}\n', "what pi says of job-1"),
        (b'{"follow":"ended","exit":"0","stderr":""}\n', "what pi says of job-1"),
        (STREAM.replace(b'"m.gguf"', b'"../../m.gguf"') + ENDED, "path '../../m.gguf' must be relative"),
        (changed(job_id="job-2"), "its id differ"),
        (changed(threads=1), "its threads differ"),
        (changed(provenance="host"), "its provenance differ"),
        (changed(artifact=msgspec.structs.replace(GOOD.artifact, variant="Q2_K")), "its artifact differ"),
        (changed(results=GOOD.results[:1]), "its tasks differ"),
        (with_measurement(samples=[]), "without samples"),
        (with_measurement(samples=[-1.0, 2.0]), "impossible values"),
        (with_measurement(samples=[1e300]), "impossible values"),
        (with_measurement(provenance="predicted"), "of provenance predicted"),
        (with_measurement(conditions={"a": {"b": []}}), "no plain values"),
        (with_facts(time_unix_s=1e300), "Set its clock"),
        (with_facts(time_unix_s=-1.0), "Set its clock"),
    ],
)
def test_hostile_streams_are_refused(device: Device, monkeypatch: pytest.MonkeyPatch, stream: bytes, told: str) -> None:
    saying(monkeypatch, playing(stream))
    with pytest.raises(SlimpiError) as refused:
        follow.run_job(device, JOB, [], None)
    assert told in str(refused.value)


def test_control_characters_reach_neither_screen_nor_report(
    device: Device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;pwned\x07\x1b[2J[/bold]\u202e"
    first, *rest = GOOD.results
    facts = msgspec.structs.replace(first.facts_before, board=evil)
    results = [msgspec.structs.replace(r, facts_before=facts, warnings=[evil]) for r in (first, *rest)]
    stream = encode_line(Note(message=evil)) + changed(results=results)
    notes: list[Event] = []
    saying(monkeypatch, playing(stream))
    got, _ = follow.run_job(device, JOB, [], notes.append)
    assert got
    show(rows([got], "pi"))
    said = capsys.readouterr().out + str(notes[0])
    assert "[/bold]" in said
    assert not set("\x1b\x07\u202e") & set(said)


def test_an_agent_that_is_killed_over_and_over_is_given_up(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []

    def start(request: dict[str, Any]) -> tuple[int, bytes, str]:
        starts.append(1)
        return 0, b'{"state": "started"}', ""

    saying(monkeypatch, {**playing(b'{"follow": "ended", "exit": null, "stderr": "oom"}\n'), "start": start})
    got, ended = follow.run_job(device, JOB, [], None)
    assert (got, ended.exit, len(starts)) == (None, None, 1 + follow.MAX_RESTARTS)


def test_a_device_that_never_comes_back_is_given_up(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 0.05)
    monkeypatch.setattr(remote, "BACKOFF_S", (0.02,))
    saying(monkeypatch, {**playing(b""), "follow": lambda request: (transport.LINK_FAILED, b"", "no route")})
    with pytest.raises(SlimpiError, match=r"pi has been out of reach .* no route .* run the same command again"):
        follow.run_job(device, JOB, [], None)


def test_endless_events_are_refused(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "MAX_EVENTS_BYTES", 10_000)
    line = encode_line(Note(message="x" * 100))
    saying(monkeypatch, playing(line * 1000))
    with pytest.raises(SlimpiError, match="over 10000 bytes of events"):
        follow.run_job(device, JOB, [], None)


@pytest.mark.parametrize(
    "said",
    [b"", b"[]", b'{"home": 1}', b'{"free_bytes": -1}', b"<html>", b'{"missing": ["../../x"]}', b"\xff" * 99],
)
def test_answers_that_are_none_are_refused(device: Device, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    saying(monkeypatch, {"status": lambda request: (0, said, "")})
    with pytest.raises(SlimpiError, match="the answer of pi to `status`"):
        remote.status(device)


def test_the_depots_own_error_is_passed_on_in_one_line(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    saying(monkeypatch, {"status": lambda request: (1, b"", "Traceback\nslimpi depot: the \x1b[1mcard is full")})
    with pytest.raises(SlimpiError, match=r"^pi: the \s*\[1mcard is full$"):
        remote.status(device)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)  # fmt: skip


def mutate(value: Any, path: Sequence[int], new: Any) -> Any:
    """The value with what lies at `path` (indices taken modulo the length) replaced."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[path[0] % len(keys)]
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[key] = mutate(value[key], path[1:], new)
    return copied


@given(path=st.lists(st.integers(0, 40), min_size=1, max_size=9), new=VALUES)
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mutated_report_is_refused_or_can_be_shown(device: Device, path: list[int], new: Any) -> None:
    plain = mutate(msgspec.to_builtins(GOOD), path, new)
    line = json.dumps({"event": "done", "report": plain}).encode() + b"\n"
    with pytest.MonkeyPatch.context() as patch:
        saying(patch, playing(line + ENDED))
        try:
            got, _ = follow.run_job(device, JOB, [], None)
        except SlimpiError as error:
            assert "\n" not in str(error)
            return
    assert isinstance(got, Report)
    try:
        show(rows([got], "pi"))
    except SlimpiError:
        return


@given(at=st.integers(0, len(STREAM) - 1), byte=st.integers(0, 255))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_is_refused_or_harmless(device: Device, at: int, byte: int) -> None:
    damaged = STREAM[:at] + bytes([byte]) + STREAM[at + 1 :]
    with pytest.MonkeyPatch.context() as patch:
        saying(patch, playing(damaged + ENDED))
        try:
            got, _ = follow.run_job(device, JOB, [], None)
        except SlimpiError:
            return
    if got:
        show(rows([got], "pi"))

"""The fault drill itself: its audit sees what it must see, and a few faults of each kind leave nothing to see."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import fault_drill
import pytest
from drill_runs import Bench, Tally, audit, finish, in_folder, make_bench, read_samples, said_samples
from fault_drill import DRILLS

FEW = {"kills": 2, "cuts": 2, "disks": 2, "jumps": 1, "files": 8, "uploads": 4, "drops": 1}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("drill") / "bench", repeat=4)


def test_the_undisturbed_run_is_audited_clean(bench: Bench, tmp_path: Path) -> None:
    job = in_folder(bench, tmp_path / "work")
    assert finish(job, tmp_path / "events.jsonl") == Tally(runs=1)
    said = said_samples(tmp_path / "events.jsonl")
    assert said.keys() == bench.whole.keys()
    assert audit(bench, job, [said]).is_clean
    assert len(bench.whole) > 60


def event_of(line: bytes) -> dict[str, object]:
    event: dict[str, object] = json.loads(line)["event"]
    return event


def as_line(event: dict[str, object]) -> bytes:
    raw = json.dumps(event, separators=(",", ":")).encode()
    return b'{"crc":%d,"event":%s}\n' % (zlib.crc32(raw), raw)


def damaged(line: bytes) -> bytes:
    return line.replace(b'"value":', b'"value":1')


def raised(line: bytes) -> bytes:
    return as_line(event_of(line) | {"value": 99.0})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda line: b"", Tally(samples_lost=1)),
        (lambda line: line + line, Tally(samples_doubled=1)),
        (raised, Tally(samples_changed=1)),
        (lambda line: line + as_line(event_of(line) | {"series": "nll", "index": 999_999}), Tally(samples_doubled=1)),
    ],
    ids=["lost", "doubled", "changed", "invented"],
)
def test_the_audit_sees_one_wrong_sample(
    bench: Bench, tmp_path: Path, change: Callable[[bytes], bytes], found: Tally
) -> None:
    job = in_folder(bench, tmp_path / "work")
    finish(job, tmp_path / "events.jsonl")
    path = tmp_path / "work" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"nll","index":5,' in line)
    path.write_bytes(b"".join([*lines[:at], change(lines[at]), *lines[at + 1 :]]))
    tally = audit(bench, job)
    assert Tally(0, 0, tally.samples_lost, tally.samples_doubled, tally.samples_changed) == found
    assert not tally.is_clean


def test_what_was_said_but_not_kept_is_lost(bench: Bench, tmp_path: Path) -> None:
    job = in_folder(bench, tmp_path / "work")
    finish(job, tmp_path / "events.jsonl")
    assert audit(bench, job, [{(0, "nll", 5): -1.0}]).samples_changed == 1
    assert audit(bench, job, [{(7, "nll", 0): 1.0}]).samples_lost == 1


def test_samples_after_damage_do_not_count(bench: Bench) -> None:
    lines = bench.journal.splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"nll","index":5,' in line)
    lines[at] = damaged(lines[at])
    samples, _ = read_samples(b"".join(lines))
    assert sorted(index for _, _, index in samples) == [0, 1, 2, 3, 4]


QUICK = ("files", "uploads")


@pytest.mark.parametrize(
    "option",
    [pytest.param(drill.option, marks=() if drill.option in QUICK else pytest.mark.slow) for drill in DRILLS.values()],
)
def test_a_few_faults_of_each_kind(
    bench: Bench, option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_drill, "make_bench", lambda root: bench)
    assert fault_drill.main(["--only", option, f"--{option}", str(FEW[option])]) == 0
    told = capsys.readouterr().out
    assert "Nothing was lost" in told
    row = next(line for line in told.splitlines()[1:] if line.split()[-1].isdigit())
    assert int(row.split()[-7]) == FEW[option]

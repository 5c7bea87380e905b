"""Cut the connection to a device over and over while it measures, and count what was lost or doubled.

    python benchmarks/drill_links.py [DROPS]

The device is a real sshd on loopback with the real depot and agent; a cut kills the server's processes of every open
connection (SIGKILL), at random moments: while files are sent, a job is started, events are followed. Each job's samples
are compared with the same job's on this machine, which nothing interrupts.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import remote_jobs  # type: ignore[import-not-found]  # noqa: E402 - tests/ is no package
import sshd  # type: ignore[import-not-found]  # noqa: E402

from device.results import Event, Report, Sample  # noqa: E402
from pipeline import deploy, remote  # noqa: E402
from pipeline.progress import Progressor  # noqa: E402
from pipeline.store import Places  # noqa: E402

OVERRIDES = {"n_ctx": 8, "n_chunks": 0}
TEXT_REPEATS = 200
UP_S = (0.3, 2.5)
"""A connection lives this long, at random."""


BACKOFF_S = (0.05, 0.1, 0.2, 0.5)  # the drill is about many drops, not long ones


@dataclass(frozen=True)
class LinkDrill:
    """Counts over all jobs: `lost` and `doubled` samples in the reports, the journals and the events told here.

    replayed: jobs that told no sample while they ran, since the link dropped just as they were started and they had
    ended before it was back; their samples came with the report.
    """

    drops: int = 0
    jobs: int = 0
    replayed: int = 0
    samples: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0


def dropped_links(n: int = 50, seed: int = 0) -> LinkDrill:
    """Run jobs until n connections were cut. SlimpiError if one cannot be finished for all that."""
    waited, remote.BACKOFF_S = remote.BACKOFF_S, BACKOFF_S
    try:
        return _drop(n, seed)
    finally:
        remote.BACKOFF_S = waited


def _drop(n: int, seed: int) -> LinkDrill:
    total = LinkDrill()
    with tempfile.TemporaryDirectory(prefix="slimpi-drill-") as name:
        folder, places = Path(name), Places(Path(name) / "home")
        artifact = remote_jobs.make_artifact(places)
        overrides = {**OVERRIDES, "text": remote_jobs.text_file(folder, TEXT_REPEATS)}
        whole = deploy.bench("local", artifact, places, threads=1, overrides=overrides, wanted=["perplexity"])
        with sshd.serve(folder / "server") as server:
            while total.drops < n:
                cutter = Cutter(server, n - total.drops, random.Random(seed + total.jobs))
                events: list[Event] = []
                with cutter:
                    report = _run(server, artifact, places, overrides, events)
                total = _add(total, cutter.drops, whole, report, events, server.home / "jobs" / report.job_id)
    return total


class Cutter:
    """Cuts every connection of a server at random moments, at most `most` times, until the block ends."""

    def __init__(self, server: sshd.Server, most: int, rng: random.Random) -> None:
        self.server, self.most, self.rng = server, most, rng
        self.drops = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Cutter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _work(self) -> None:
        while self.drops < self.most and not self._done.wait(0.02):
            if self.server.sessions() and not self._done.wait(self.rng.uniform(*UP_S)):
                self.drops += self.server.cut() > 0


def _run(server: sshd.Server, artifact: Path, places: Places, overrides: dict[str, Any], events: list[Event]) -> Report:
    settings = deploy.Settings(threads=1, overrides=overrides, wanted=["perplexity"], again=True)
    host = replace(server.host, name="drill")
    while True:
        reports, errors = deploy.bench_all(
            [host], [artifact], places, settings, Progressor(plain=True), lambda _: nullcontext(events.append)
        )
        if not errors:
            return reports["drill"][0]
        # The very first contact does not retry: a user wants to know at once that a name is wrong.
        if "cannot reach" not in str(errors[0]):
            raise errors[0]


def _add(total: LinkDrill, drops: int, whole: Report, report: Report, events: list[Event], folder: Path) -> LinkDrill:
    expected = whole.results[0].measurements[0].samples
    got = report.results[0].measurements[0].samples
    told = [event.index for event in events if isinstance(event, Sample)]
    lines = (folder / "work" / "journal.jsonl").read_bytes().splitlines()
    entries = [json.loads(line)["event"] for line in lines]
    journaled = [entry["index"] for entry in entries if entry["event"] == "sample"]
    lost = max(0, len(expected) - len(got))
    doubled = max(0, len(got) - len(expected))
    for seen in filter(None, (told, journaled)):
        lost += len(set(range(len(expected))) - set(seen))
        doubled += len(seen) - len(set(seen))
    wrong = sum(a != b for a, b in zip(expected, got, strict=False))
    return LinkDrill(
        total.drops + drops,
        total.jobs + 1,
        total.replayed + (not told),
        total.samples + len(got),
        total.lost + lost,
        total.doubled + doubled,
        total.wrong + wrong,
    )


def main() -> int:
    found = dropped_links(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
    jobs = f"{found.jobs} jobs ({found.replayed} replayed)"
    print(
        f"{found.drops} dropped links over {jobs}: {found.samples} samples, {found.lost} lost, "
        f"{found.doubled} doubled, {found.wrong} wrong"
    )
    return 1 if found.lost or found.doubled or found.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

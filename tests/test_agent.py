"""The agent end to end on tiny models: every task, every way a run can break, and what is left after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from fakes import TEXT, TWEETS, World, artifact, write_llama
from jobs import FAKES, golden_job, long_perplexity, run, start_agent

from device import agent, facts
from device.records import read_record
from device.results import Done, Event, Note, Report, Sample, TaskEnded, TaskResult, TaskStarted
from device.schema import Parity, Perplexity, RecordGolden, Throughput, Tweets
from device.tasks import TASKS

pytestmark = pytest.mark.usefixtures("quick_facts")


@pytest.fixture(scope="module")
def whole_nlls(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What long_perplexity gives when nothing interrupts it; the same in every world."""
    world = World.make(tmp_path_factory.mktemp("whole"))
    result = run(world.job("gguf", [long_perplexity(world)]))[0].results[0]
    return result.measurements[0].samples


def assert_resumed_whole(result: TaskResult, whole_nlls: list[float]) -> None:
    assert (result.status, result.resumed) == ("ok", True)
    assert result.measurements[0].samples == whole_nlls


CASES = [(kind, i) for kind in TASKS for i in range(max(1, len(FAKES.get(kind, []))))]


@pytest.mark.parametrize(("kind", "case"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_every_task_end_to_end(world: World, kind: type, case: int) -> None:
    assert kind in FAKES, f"{kind.__name__} has no fake here: add one"
    job = FAKES[kind][case](world)
    report, events = run(job)
    result = report.results[0]
    assert (result.status, result.error, result.resumed) == ("ok", "", False)
    started = next(event for event in events if isinstance(event, TaskStarted))
    samples = [event for event in events if isinstance(event, Sample)]
    assert len(samples) == started.total
    for name in {s.series for s in samples}:
        assert [s.index for s in samples if s.series == name] == list(range(sum(s.series == name for s in samples)))
    assert isinstance(events[-1], Done)
    assert read_record(Path(job.work_dir) / "report.json", Report) == report
    memory = result.memory
    assert memory
    assert memory.peak_rss_bytes >= memory.rss_anon_bytes + memory.rss_file_bytes > 10e6
    assert 5e6 < memory.peak_pss_bytes <= memory.peak_rss_bytes
    assert result.facts_after.time_unix_s > result.facts_before.time_unix_s
    assert all(m.provenance == "host" and np.isfinite(m.samples).all() for m in result.measurements)


def test_parity_with_itself_is_exact_and_with_another_model_is_not(world: World) -> None:
    job = golden_job(world, "gguf")
    same = {m.metric: m for m in run(job)[0].results[0].measurements}
    assert same["max_abs_logit_diff"].samples == [0.0] * 5
    assert same["top1_agreement"].samples == [1.0] * 5
    folder = Path(job.artifact_dir)
    write_llama(folder / "model.gguf", seed=1)
    assert job.artifact.golden
    other = world.job("gguf", [Parity()], artifact=artifact(folder, "gguf", golden=job.artifact.golden), id="job-2")
    other = msgspec.structs.replace(other, work_dir=str(world.root / "work-2"))
    different = {m.metric: m for m in run(other)[0].results[0].measurements}
    assert different["kl_divergence"].mean > 0.1
    assert min(different["max_abs_logit_diff"].samples) > 0.1


def test_golden_files_are_the_same_every_time(world: World) -> None:
    for name in ("one", "two"):
        task = RecordGolden(dataset=world.dataset("text.txt"), n=4, n_tokens=16)
        run(world.job("gguf", [task], work_dir=str(world.root / name)))
    first, second = ((world.root / name / "golden.npz").read_bytes() for name in ("one", "two"))
    assert first == second
    with np.load(world.root / "one" / "golden.npz", allow_pickle=False) as archive:
        assert archive["tokens"].shape == (16,)
        assert archive["tokens"][0] == 1  # BOS, as the vocabulary says
        assert archive["logits"].shape == (4, 272)


def test_finished_job_replays_without_running(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = FAKES[Throughput][0](world)
    first, _ = run(job)
    (Path(job.work_dir) / "report.json").unlink()
    monkeypatch.setattr(agent, "Worker", None)
    second, events = run(job)
    assert second == first
    assert [type(event) for event in events] == [TaskEnded, Done]
    assert read_record(Path(job.work_dir) / "report.json", Report) == first


def test_worker_killed_then_resumed_loses_and_doubles_nothing(world: World, whole_nlls: list[float]) -> None:
    job = world.job("gguf", [long_perplexity(world), Throughput(n_prompt=8, n_gen=4, repetitions=3)])
    killed: list[int] = []

    def kill_once(event: Event) -> None:
        if isinstance(event, Sample) and event.index >= 3 and not killed:
            (child,) = psutil.Process().children()
            child.kill()
            killed.append(child.pid)

    report = agent.run(job, kill_once)
    assert [result.status for result in report.results] == ["failed", "ok"], "the next task must go on"
    assert "SIGKILL" in report.results[0].error
    assert "peak resident memory" in report.results[0].error
    again, events = run(job)
    assert next(event for event in events if isinstance(event, Sample)).index > 3
    assert_resumed_whole(again.results[0], whole_nlls)
    assert again.results[1] == report.results[1]


def test_tweets_resume_in_the_middle_of_a_row(world: World) -> None:
    job = FAKES[Tweets][0](world)
    whole, _ = run(job)
    path = Path(job.work_dir) / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if b'"predicted","index":4' in line)
    path.write_bytes(b"".join(lines[:cut]))  # row 4 has its latency but no prediction
    again, events = run(job)
    taken = [event for event in events if isinstance(event, Sample)]
    assert sum(s.series == "latency_ms" and not s.warmup for s in taken) == len(TWEETS) - 5
    by_metric = {m.metric: m.samples for m in again.results[0].measurements}
    for measurement in whole.results[0].measurements:
        if measurement.unit == "fraction":
            assert by_metric[measurement.metric] == measurement.samples
    assert len(by_metric["latency_ms"]) == len(TWEETS)
    assert again.results[0].resumed


def test_timeout_stops_the_worker_and_says_so(world: World) -> None:
    (world.root / "data" / "long.txt").write_text(TEXT * 6000, encoding="utf-8")
    job = world.job("gguf", [Perplexity(dataset=world.dataset("long.txt"), n_ctx=8)], timeout_s=1)
    error = run(job)[0].results[0].error
    assert "timeout_s = 1" in error
    assert not psutil.Process().children()


def read_until_sample(process: subprocess.Popen[bytes], index: int) -> None:
    assert process.stdout
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "sample" and event["index"] >= index:
            return
    raise AssertionError("the agent ended before the sample was seen")


def wait_gone(pids: list[int], within_s: float = 5) -> bool:
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_agent_killed_then_resumed_leaves_no_orphan_and_loses_nothing(world: World, whole_nlls: list[float]) -> None:
    job = world.job("gguf", [long_perplexity(world)])
    process = start_agent(job)
    read_until_sample(process, 5)
    workers = [child.pid for child in psutil.Process(process.pid).children()]
    process.kill()
    process.wait()
    assert workers
    assert wait_gone(workers), "the worker outlived its agent"
    report, events = run(job)
    assert next(event for event in events if isinstance(event, Sample)).index > 5
    assert_resumed_whole(report.results[0], whole_nlls)


def test_agent_killed_takes_even_a_silent_worker_with_it(world: World) -> None:
    """A worker that writes nothing would never notice the closed pipe: the kernel must end it."""
    process = start_agent(world.job("gguf", [Throughput(n_prompt=8, n_gen=200_000, warmup=0)]))
    assert process.stdout
    while b"ttft_ms" not in process.stdout.readline():
        assert process.poll() is None
    workers = [child.pid for child in psutil.Process(process.pid).children()]
    process.kill()
    process.wait()
    assert wait_gone(workers, within_s=2)


def test_leaving_the_run_leaves_no_worker(world: World) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Sample) and event.series == "ttft_ms":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        agent.run(world.job("gguf", [Throughput(n_prompt=8, n_gen=200_000, warmup=0)]), interrupt)
    assert not psutil.Process().children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_ends_with_130_and_one_line(world: World, number: signal.Signals) -> None:
    job = world.job("gguf", [long_perplexity(world)])
    process = start_agent(job)
    read_until_sample(process, 5)
    workers = [child.pid for child in psutil.Process(process.pid).children()]
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.count(b"\n") == 1
    assert b"run the same job again" in stderr
    assert wait_gone(workers)
    assert run(job)[0].results[0].resumed


def test_reader_that_goes_away_stops_the_agent_quietly(world: World) -> None:
    process = start_agent(world.job("gguf", [long_perplexity(world)]))
    read_until_sample(process, 1)
    assert process.stdout and process.stderr
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=20) == 130
    assert stderr.count(b"\n") == 1


def test_command_line_over_stdin_gives_events_and_exit_codes(world: World) -> None:
    job = world.job("gguf", [Throughput(n_prompt=8, n_gen=4, repetitions=3)])
    process = start_agent(job, "-")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, b"")
    events = [msgspec.json.decode(line, type=Event) for line in stdout.splitlines()]
    assert isinstance(events[-1], Done)
    too_short = Perplexity(dataset=world.dataset("text.txt"))
    short = world.job("gguf", [too_short], id="job-2", work_dir=str(world.root / "b"))
    process = start_agent(short)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert b"needs at least 1024" in stdout


def test_failed_result_is_marked_with_the_facts_it_ran_in(world: World) -> None:
    result = run(world.job("gguf", [Perplexity(dataset=world.dataset("text.txt"))]))[0].results[0]
    assert result.facts_before.runtimes["llama-cpp-python"]
    assert result.facts_after.cores == os.cpu_count()


def test_warnings_come_with_the_result(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = facts.collect
    monkeypatch.setattr(
        facts,
        "collect",
        lambda work: msgspec.structs.replace(collect(work), cpu_busy_percent=50.0, throttled_bits=0x50005),
    )
    result = run(world.job("gguf", [Throughput(n_prompt=8, n_gen=4, repetitions=2)]))[0].results[0]
    assert any("50% busy" in warning for warning in result.warnings)
    assert any("under-voltage at the time" in warning for warning in result.warnings)
    assert any("ttft_ms has 2 sample(s)" in warning for warning in result.warnings)


def test_dropped_journal_lines_are_said(world: World) -> None:
    job = FAKES[Perplexity][0](world)
    run(job)
    path = Path(job.work_dir) / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-50])
    _, events = run(job)
    assert isinstance(events[0], Note)
    assert "is torn" in events[0].message


def test_full_disk_ends_with_one_line_and_keeps_what_was_measured(world: World, whole_nlls: list[float]) -> None:
    small = world.root / "small"
    small.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        job = world.job("gguf", [long_perplexity(world)], work_dir=str(small / "work"))
        process = start_agent(msgspec.structs.replace(job, work_dir=str(small / "work")))
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1
        assert stderr.count(b"\n") == 1
        assert b"journal.jsonl: No space left on device. Free some space" in stderr
        kept = (small / "work" / "journal.jsonl").read_bytes()
        (world.root / "work").mkdir()
        (world.root / "work" / "journal.jsonl").write_bytes(kept)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    moved = world.job("gguf", job.tasks)
    report, events = run(moved)
    assert next(event for event in events if isinstance(event, Sample)).index > 100
    assert_resumed_whole(report.results[0], whole_nlls)

"""slimpi build | bench | compare | deploy | classify | tweets | stop | clean: press a model, run it, know its cost."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from device.records import SlimpiError, read_record
from device.results import Report
from pipeline import cli_tweets
from pipeline.options import (
    Again,
    Artifacts,
    BuildThreads,
    ChoiceSets,
    DeviceName,
    Force,
    Governor,
    KeywordColumn,
    LabelColumn,
    Limit,
    MemoryLimit,
    Meter,
    NChunks,
    NCtx,
    NGen,
    NPrompt,
    On,
    OneArtifact,
    OneOn,
    Only,
    Plain,
    Recipes,
    Repetitions,
    Rows,
    SshConfig,
    Sudo,
    TaskNames,
    Text,
    TextColumn,
    Threads,
    Timeout,
    WaitCool,
    WithDivergence,
)
from pipeline.progress import Progressor
from pipeline.recipes import read_recipe
from pipeline.store import Places, find_artifact, places
from pipeline.transport import Interrupted
from pipeline.watch import watch

if TYPE_CHECKING:
    from pipeline.hosts import Host
    from pipeline.remote import Device

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.add_typer(cli_tweets.app, name="tweets")


def _threads(asked: int) -> int:
    return asked or max(1, (os.cpu_count() or 1) // 2)


@app.command()
def build(
    recipes: Recipes,
    only: Only = None,
    threads: BuildThreads = 0,
    plain: Plain = False,
) -> None:
    """Build the artifacts of one or more recipes; what is unchanged is reused."""
    for folder in _build(recipes, only, threads, plain, places()):
        typer.echo(str(folder))


def _build(recipes: list[Path], only: list[str] | None, threads: int, plain: bool, where: Places) -> list[Path]:
    from pipeline.build import build as build_recipe  # torch loads in seconds; --help should not wait for it
    from pipeline.exporters import knows

    progress = Progressor(plain)
    folders: list[Path] = []
    read = [read_recipe(path) for path in recipes]
    for recipe in read:
        progress.say(f"build {recipe.name}: {recipe.note}".rstrip(": "))
        # A variant of another recipe's format is not meant for this one; one that is nobody's is an error.
        mine = [v for v in only or [] if knows(recipe, v) or not any(knows(other, v) for other in read)]
        chosen = (mine or [recipe.reference]) if only else None
        folders += build_recipe(recipe, where, progress, _threads(threads), chosen)
    return folders


@app.command()
def bench(
    artifacts: Artifacts,
    on: On = ["local"],  # noqa: B006 - typer copies it
    task: TaskNames = None,
    divergence: WithDivergence = False,
    threads: Threads = 0,
    text: Text = None,
    n_ctx: NCtx = None,
    n_chunks: NChunks = None,
    choices: ChoiceSets = None,
    n_prompt: NPrompt = None,
    n_gen: NGen = None,
    repetitions: Repetitions = None,
    rows: Rows = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    keyword_column: KeywordColumn = None,
    limit: Limit = None,
    again: Again = False,
    force: Force = False,
    timeout: Timeout = 3600,
    memory_limit_mib: MemoryLimit = 0,
    wait_cool: WaitCool = None,
    governor: Governor = "",
    sudo: Sudo = False,
    meter: Meter = "",
    ssh_config: SshConfig = None,
    plain: Plain = False,
) -> None:
    """Run artifacts on devices and print the comparison. Equal jobs already measured are replayed."""
    overrides = _given(
        text=text, n_ctx=n_ctx, n_chunks=n_chunks, n_prompt=n_prompt, n_gen=n_gen, repetitions=repetitions,
        rows=rows, text_column=text_column, label_column=label_column, keyword_column=keyword_column, limit=limit,
        choices=choices or None,
    )  # fmt: skip
    limits = _Limits(force, timeout, memory_limit_mib, wait_cool, governor, sudo, meter)
    where = places()
    folders = [find_artifact(where.artifacts, name) for name in artifacts]
    _bench(folders, on, ssh_config, task, divergence, threads, overrides, again, limits, plain, where)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class _Limits:
    """The options of `bench` and `deploy` about the device."""

    force: bool
    timeout_s: int
    memory_limit_mib: int
    wait_cool_c: float | None
    governor: str
    sudo: bool
    meter: str


def _bench(
    folders: list[Path],
    on: list[str],
    ssh_config: Path | None,
    tasks: list[str] | None,
    divergence: bool,
    threads: int,
    overrides: dict[str, Any],
    again: bool,
    limits: _Limits,
    plain: bool,
    where: Places,
) -> None:
    """Measure, print the table; a failed device or task makes the exit code 1 after everything is shown."""
    from pipeline.deploy import Settings, bench_all
    from pipeline.energy import is_csv, readings_of
    from pipeline.recordings import tasks_of

    if limits.governor and not limits.sudo:
        raise SlimpiError(f"--governor {limits.governor} changes the whole device's clock. Add --sudo to allow it.")
    if limits.meter and len(set(on)) > 1:
        raise SlimpiError(f"--meter reads one device's power, --on names {len(set(on))}. Measure them one by one.")
    if limits.meter and is_csv(limits.meter) and not Path(limits.meter).is_file():
        raise SlimpiError(f"--meter {limits.meter} is not a file. Start your logger first, or give a command.")
    progress = Progressor(plain or len(on) > 1)  # one terminal has room for one bar
    hosts = _hosts(on, ssh_config, where, progress)
    diverging = divergence or "divergence" in (tasks or [])
    settings = Settings(
        threads=threads,
        overrides=overrides,
        wanted=tasks,
        again=again,
        force=limits.force,
        timeout_s=limits.timeout_s,
        memory_limit_bytes=limits.memory_limit_mib * 2**20,
        wait_cool_c=limits.wait_cool_c,
        governor=limits.governor,
        meter=limits.meter,
        divergence=tasks_of(folders, overrides, where, _threads(threads), progress) if diverging else {},
    )
    reports, errors = bench_all(hosts, folders, where, settings, progress, lambda name: watch(progress, name))
    _finish(reports, errors, {name: readings_of(where.results / name, limits.meter) for name in reports})


def _hosts(on: list[str], ssh_config: Path | None, where: Places, progress: Progressor) -> list[Host]:
    from pipeline.hosts import find

    return [find(name, where, progress, ssh_config) for name in dict.fromkeys(on)]


@app.command()
def compare(
    reports: Annotated[list[Path], typer.Argument(help="report.json files, or folders holding them.")],
    meter: Meter = "",
) -> None:
    """Compare reports taken under the same conditions; unlike ones are refused."""
    from pipeline.energy import is_csv, readings_of

    found: list[Path] = []
    for path in reports:
        found += sorted(path.rglob("report.json")) if path.is_dir() else [path]
    if not found:
        raise SlimpiError(f"no report.json under {', '.join(map(str, reports))}. Run `slimpi bench` first.")
    if meter and not is_csv(meter):
        raise SlimpiError(f"--meter {meter!r} is no .csv: what is over cannot be measured by a command. Name the file.")
    by_host: dict[str, list[Report]] = {}
    folders: dict[str, Path] = {}
    for path in found:
        host = path.resolve().parent.parent.name  # results/<host>/<job>/report.json
        by_host.setdefault(host, []).append(read_record(path, Report))
        folders[host] = path.resolve().parent.parent
    _finish(by_host, [], {host: readings_of(folder, meter) for host, folder in folders.items()})


@app.command()
def deploy(
    recipes: Recipes,
    on: On = ["local"],  # noqa: B006 - typer copies it
    only: Only = None,
    task: TaskNames = None,
    divergence: WithDivergence = False,
    threads: Threads = 0,
    n_ctx: NCtx = None,
    n_chunks: NChunks = None,
    choices: ChoiceSets = None,
    n_prompt: NPrompt = None,
    n_gen: NGen = None,
    repetitions: Repetitions = None,
    limit: Limit = None,
    again: Again = False,
    force: Force = False,
    timeout: Timeout = 3600,
    memory_limit_mib: MemoryLimit = 0,
    wait_cool: WaitCool = None,
    governor: Governor = "",
    sudo: Sudo = False,
    meter: Meter = "",
    ssh_config: SshConfig = None,
    plain: Plain = False,
) -> None:
    """Build recipes, run every variant's tasks on devices, and print one comparison table."""
    overrides = _given(
        n_ctx=n_ctx, n_chunks=n_chunks, n_prompt=n_prompt, n_gen=n_gen, repetitions=repetitions, limit=limit,
        choices=choices or None,
    )  # fmt: skip
    limits = _Limits(force, timeout, memory_limit_mib, wait_cool, governor, sudo, meter)
    where = places()
    folders = _build(recipes, only, threads, plain, where)
    _bench(folders, on, ssh_config, task, divergence, threads, overrides, again, limits, plain, where)


@app.command()
def classify(
    artifact: OneArtifact,
    on: OneOn = "local",
    threads: Threads = 0,
    force: Force = False,
    ssh_config: SshConfig = None,
    plain: Plain = False,
) -> None:
    """Label texts from stdin, one a line, on a device: one JSON line each on stdout, as they come.

    A line is a text, or a JSON object with `text` and, for classifiers that read one, `keyword`.
    """
    from pipeline.classify import classify_stdin

    where, progress = places(), Progressor(plain)
    (host,) = _hosts([on], ssh_config, where, progress)
    classify_stdin(host, find_artifact(where.artifacts, artifact), where, threads, force, progress)


@app.command()
def stop(host: DeviceName, ssh_config: SshConfig = None) -> None:
    """End what runs on a device; what it measured stays there, and the same command goes on from it."""
    from pipeline import remote

    with _device(host, ssh_config) as device:
        stopped = remote.stop(device, None)
    typer.echo(f"stopped: {', '.join(map(remote.printable, stopped)) or 'nothing was running'}")


@app.command()
def clean(
    host: DeviceName,
    everything: Annotated[
        bool, typer.Option("--all", help="Also what was measured there, and the agent's code.")
    ] = False,
    ssh_config: SshConfig = None,
) -> None:
    """Empty a device's store: artifacts, data, wheels. What was measured stays, unless --all."""
    from pipeline import remote

    with _device(host, ssh_config) as device:
        freed = remote.clean(device, everything)
    left = f"; left alone: {', '.join(map(remote.printable, freed.left))}" if freed.left else ""
    typer.echo(f"{host}: {freed.freed_bytes / 1e6:.1f} MB freed{left}")


@contextmanager
def _device(name: str, ssh_config: Path | None) -> Iterator[Device]:
    from pipeline.remote import attach

    progress = Progressor()
    (host,) = _hosts([name], ssh_config, places(), progress)
    if host.is_local:
        raise SlimpiError("`local` is this machine: it has no store to empty. Remove folders under benchmarks/results.")
    with attach(host, progress, threading.Event()) as device:
        yield device


def _finish(
    reports: Mapping[str, Sequence[Report]],
    errors: Sequence[SlimpiError],
    readings: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Print the table of what there is; then what failed, as one error. readings: of power, by host."""
    from pipeline.compare import rows as compare_rows
    from pipeline.table import show

    measured = {host: found for host, found in reports.items() if found}
    if not measured and len(errors) == 1:
        raise errors[0]
    named = len(measured) > 1 or bool(measured.keys() - {"local"})
    rows = [
        row
        for host, found in measured.items()
        for row in compare_rows(found, host if named else "", readings.get(host, ()))
    ]
    if rows:
        show(rows)
    failed = [f"{r.host} {r.artifact.name}".strip() for r in rows if r.failures]
    problems = [str(error) for error in errors]
    if failed:
        problems.append(
            f"{len(failed)} of {len(rows)} runs had a failing task: {', '.join(failed)}. See the lines above."
        )
    if problems:
        raise SlimpiError(" | ".join(problems))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted


def main() -> None:
    """Entry point: SlimpiError and Ctrl-C become one line and exit code 1."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app()
    except SlimpiError as error:
        _complain(str(error))
    except Interrupted:
        _complain("interrupted. What was finished is kept: run the same command again to go on.")
    except BrokenPipeError:
        sys.exit(1)


def _complain(message: str) -> NoReturn:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"slimpi: {' '.join(message.split())}", markup=False)
    sys.exit(1)


if __name__ == "__main__":
    main()

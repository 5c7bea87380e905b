"""slimpi build | bench | compare | deploy: press a model, run it on a device, read what it cost."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from device.schema import Event, Note, Report, Sample, SlimpiError, TaskEnded, TaskStarted, read_record
from pipeline.progress import Progressor, Tick, quiet
from pipeline.recipes import read_recipe
from pipeline.store import Places, find_artifact, load_artifact, places

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)

Recipes = Annotated[list[Path], typer.Argument(help="Recipe files, such as models/smollm2-135m.toml.")]
Artifacts = Annotated[
    list[str], typer.Argument(help="Artifact folders, ids, or MODEL:VARIANT such as smollm2-135m:Q4_K_M.")
]
On = Annotated[str, typer.Option(help="Device to run on; `local` is this machine.")]
Threads = Annotated[int, typer.Option(min=0, help="Inference threads; 0 = half of this machine's cores.")]
Plain = Annotated[bool, typer.Option("--plain", help="Plain lines instead of progress bars.")]
Only = Annotated[list[str] | None, typer.Option(help="Build only this variant (repeatable); the reference always is.")]
Again = Annotated[bool, typer.Option("--again", help="Measure again instead of replaying an equal job's samples.")]
TaskNames = Annotated[
    list[str] | None,
    typer.Option("--task", help="Run only this task (repeatable): parity, throughput, perplexity, tweets."),
]
Text = Annotated[
    str | None, typer.Option(help="Text for perplexity: demo:NAME, data:PATH, path:FILE, hf:... or a known name.")
]
Rows = Annotated[str | None, typer.Option(help="Labelled rows (CSV) for tweets, named like --text.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of --rows that holds the text.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of --rows that holds the label.")]
NCtx = Annotated[int | None, typer.Option(help="Context length of the perplexity task, in tokens.")]
NChunks = Annotated[int | None, typer.Option(help="Chunks of n_ctx tokens to score; 0 = all.")]
Repetitions = Annotated[int | None, typer.Option(help="Repetitions of the throughput task.")]
Limit = Annotated[int | None, typer.Option(help="Rows of the tweets task to run; 0 = all.")]


def _threads(asked: int) -> int:
    return asked or max(1, (os.cpu_count() or 1) // 2)


@app.command()
def build(
    recipes: Recipes,
    only: Only = None,
    threads: Threads = 0,
    plain: Plain = False,
) -> None:
    """Build the artifacts of one or more recipes; what is unchanged is reused."""
    for folder in _build(recipes, only, threads, plain, places()):
        typer.echo(str(folder))


def _build(recipes: list[Path], only: list[str] | None, threads: int, plain: bool, where: Places) -> list[Path]:
    from pipeline.build import build as build_recipe  # torch loads in seconds; --help should not wait for it

    progress = Progressor(plain)
    folders: list[Path] = []
    for path in recipes:
        recipe = read_recipe(path)
        progress.say(f"build {recipe.name}: {recipe.note}".rstrip(": "))
        folders += build_recipe(recipe, where, progress, _threads(threads), only)
    return folders


@app.command()
def bench(
    artifacts: Artifacts,
    on: On = "local",
    task: TaskNames = None,
    threads: Threads = 0,
    text: Text = None,
    n_ctx: NCtx = None,
    n_chunks: NChunks = None,
    repetitions: Repetitions = None,
    rows: Rows = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    limit: Limit = None,
    again: Again = False,
    plain: Plain = False,
) -> None:
    """Run artifacts on a device and print the comparison. Equal jobs already measured are replayed."""
    settings = {
        "text": text, "n_ctx": n_ctx, "n_chunks": n_chunks, "repetitions": repetitions,
        "rows": rows, "text_column": text_column, "label_column": label_column, "limit": limit,
    }  # fmt: skip
    overrides = {name: value for name, value in settings.items() if value is not None}
    where = places()
    folders = [find_artifact(where.artifacts, name) for name in artifacts]
    reports = _bench(folders, on, task, threads, overrides, again, plain, where)
    _finish(reports)


def _bench(
    folders: list[Path],
    on: str,
    tasks: list[str] | None,
    threads: int,
    overrides: dict[str, Any],
    again: bool,
    plain: bool,
    where: Places,
) -> list[Report]:
    from pipeline.deploy import bench as bench_artifact

    progress = Progressor(plain)
    reports = []
    for folder in folders:
        name = load_artifact(folder).name
        with ExitStack() as stack:
            follower = _Follower(stack, progress, name)
            reports.append(
                bench_artifact(
                    on,
                    folder,
                    where,
                    threads=_threads(threads),
                    overrides=overrides,
                    wanted=tasks,
                    again=again,
                    on_event=follower,
                )
            )
        if not follower.started:
            progress.say(f"  {name}: measured before, replayed from its journal")
    return reports


@app.command()
def compare(
    reports: Annotated[list[Path], typer.Argument(help="report.json files, or folders holding them.")],
) -> None:
    """Compare reports taken under the same conditions; unlike ones are refused."""
    found: list[Path] = []
    for path in reports:
        found += sorted(path.rglob("report.json")) if path.is_dir() else [path]
    if not found:
        raise SlimpiError(f"no report.json under {', '.join(map(str, reports))}. Run `slimpi bench` first.")
    _finish([read_record(path, Report) for path in found])


@app.command()
def deploy(
    recipes: Recipes,
    on: On = "local",
    only: Only = None,
    threads: Threads = 0,
    again: Again = False,
    plain: Plain = False,
) -> None:
    """Build recipes, run every variant's tasks on a device, and print one comparison table."""
    where = places()
    folders = _build(recipes, only, threads, plain, where)
    _finish(_bench(folders, on, None, threads, {}, again, plain, where))


class _Follower:
    """Turns the agent's events into one progress step a task."""

    def __init__(self, stack: ExitStack, progress: Progressor, name: str) -> None:
        self.stack, self.progress, self.name = stack, progress, name
        self.started = False
        self.done = self.total = 0
        self.tick: Tick = quiet

    def __call__(self, event: Event) -> None:
        match event:
            case TaskStarted():
                self.started = True
                self.done, self.total = 0, event.total
                self.tick = self.stack.enter_context(self.progress.step(f"{self.name} {event.name}"))
            case Sample():
                self.done += 1
                self.tick(self.done, self.total, event.series)
            case TaskEnded():
                self.stack.close()
            case Note():
                self.progress.say(f"  {self.name}: {event.message}")


def _finish(reports: list[Report]) -> None:
    """Print the table; a failed task makes the exit code 1 after everything is shown."""
    from pipeline.compare import rows as compare_rows
    from pipeline.table import show

    rows = compare_rows(reports)
    show(rows)
    failed = [r.artifact.name for r in rows if r.failures]
    if failed:
        raise SlimpiError(
            f"{len(failed)} of {len(rows)} runs had a failing task: {', '.join(failed)}. See the lines above."
        )


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Its own class, since the CLI library would turn KeyboardInterrupt into a bare "Aborted"."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted


def main() -> None:
    """Entry point: SlimpiError and Ctrl-C become one line and exit code 1."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app()
    except SlimpiError as error:
        _complain(str(error))
    except _Interrupted:
        _complain("interrupted. What was finished is kept: run the same command again to go on.")
    except BrokenPipeError:
        sys.exit(1)


def _complain(message: str) -> NoReturn:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"slimpi: {' '.join(message.split())}", markup=False)
    sys.exit(1)


if __name__ == "__main__":
    main()

"""slimpi tweets explore | predict: tables of tweets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from device.records import write_atomic
from pipeline.options import (
    ExplorePage,
    OneArtifact,
    OneOn,
    Plain,
    SshConfig,
    Submission,
    Threads,
    TweetId,
    TweetKeyword,
    TweetLocation,
    TweetTable,
    TweetTarget,
    TweetText,
)
from pipeline.progress import Progressor
from pipeline.store import Places, find_artifact, places

if TYPE_CHECKING:
    from pipeline.tweets.data import Tweet

app = typer.Typer(help="Look at tables of tweets, and classify them.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def explore(
    table: TweetTable,
    out: ExplorePage = Path("explore.html"),
    id_column: TweetId = "id",
    keyword_column: TweetKeyword = "keyword",
    location_column: TweetLocation = "location",
    text_column: TweetText = "text",
    target_column: TweetTarget = "target",
    plain: Plain = False,
) -> None:
    """Summarize a table: classes, gaps, keyword and location bias, features, near-duplicates; also as an HTML page."""
    from pipeline.tweets import explore as exploring
    from pipeline.tweets.explore_page import page

    tweets = _read(table, (id_column, keyword_column, location_column, text_column, target_column), places())
    with Progressor(plain).step("explore"):
        found = exploring.explore(Path(table).name, tweets)
        write_atomic(out, page(found).encode())
    typer.echo(exploring.summary(found))
    typer.echo(f"written to {out}")


@app.command()
def predict(
    artifact: OneArtifact,
    table: TweetTable,
    submission: Submission,
    on: OneOn = "local",
    threads: Threads = 0,
    id_column: TweetId = "id",
    keyword_column: TweetKeyword = "keyword",
    text_column: TweetText = "text",
    target_column: TweetTarget = "target",
    ssh_config: SshConfig = None,
    plain: Plain = False,
) -> None:
    """Classify a table with an artifact, here or on a device, and write `id,target` as Kaggle takes it."""
    from pipeline.hosts import find
    from pipeline.tweets import predict as predicting

    where, progress = places(), Progressor(plain)
    tweets = _read(table, (id_column, keyword_column, "location", text_column, target_column), where)
    folder = find_artifact(where.artifacts, artifact)
    host = find(on, where, progress, ssh_config)
    targets = predicting.predict(host, folder, tweets, submission, where, threads, progress)
    typer.echo(f"{predicting.scores(tweets, targets)}; written to {submission}")


def _read(table: str, columns: tuple[str, str, str, str, str], where: Places) -> list[Tweet]:
    from pipeline.tweets.data import Columns, find_table, read_tweets

    return read_tweets(find_table(table, where.sources), Columns(*columns))

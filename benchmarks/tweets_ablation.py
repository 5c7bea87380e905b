"""What is each cleaning step worth on the disaster tweets? TF-IDF and logistic regression, grouped 5-fold.

    python benchmarks/tweets_ablation.py [--rows TABLE] [--seeds 3] [--machine NAME]

Writes benchmarks/results/<machine>/tweets_ablation.json after every row and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench_common import at_least, command, cpu_model, now, output_options, result_path

from pipeline.progress import Progressor
from pipeline.store import places
from pipeline.tweets.ablation import ablate, as_markdown
from pipeline.tweets.data import find_table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", default="tweets-train", help="labelled table, or a dataset's name (default %(default)s)")
    add("--seeds", type=at_least(1), default=3, help="how many ways to make the folds (default %(default)s)")
    output_options(parser, "tweets_ablation.json")
    return parser


@command("tweets_ablation", "Run it again to go on.")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if something failed; finished rows are kept."""
    options = _parser().parse_args(argv)
    where, progress = places(), Progressor()
    out = result_path(options, where, "tweets_ablation.json")
    table = find_table(options.rows, where.sources)
    with progress.step("ablation") as tick:
        result = ablate(table, out, range(options.seeds), cpu=cpu_model(), start_time=now(), tick=tick)
    print(as_markdown(result))
    print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

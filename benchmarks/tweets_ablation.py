"""What is each cleaning step worth on the disaster tweets? TF-IDF and logistic regression, grouped 5-fold.

    python benchmarks/tweets_ablation.py [--rows TABLE] [--seeds 3] [--machine NAME]

Writes benchmarks/results/<machine>/tweets_ablation.json after every row and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench_common import at_least, check_machine, cpu_model, default_machine, now

from device.schema import SlimpiError
from pipeline.progress import Progressor
from pipeline.store import places
from pipeline.tweets.ablation import ablate, as_markdown
from pipeline.tweets.data import find_table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", default="tweets-train", help="labelled table, or a dataset's name (default %(default)s)")
    add("--seeds", type=at_least(1), default=3, help="how many ways to make the folds (default %(default)s)")
    add("--machine", default=default_machine(), help="folder under the results (default %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if something failed; finished rows are kept."""
    options = _parser().parse_args(argv)
    where, progress = places(), Progressor()
    try:
        check_machine(options.machine)
        out = where.results / options.machine / "tweets_ablation.json"
        table = find_table(options.rows, where.sources)
        with progress.step("ablation") as tick:
            result = ablate(table, out, range(options.seeds), cpu=cpu_model(), start_time=now(), tick=tick)
    except SlimpiError as error:
        print(f"tweets_ablation: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tweets_ablation: interrupted. Run it again to go on.", file=sys.stderr)
        return 1
    print(as_markdown(result))
    print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What is each cleaning step worth on the disaster tweets? TF-IDF and logistic regression, grouped 5-fold.

    python benchmarks/tweets_ablation.py [--rows TABLE] [--seeds 3] [--machine NAME]

Writes benchmarks/results/<machine>/tweets_ablation.json after every row and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys

from bench_common import at_least, check_machine, cpu_model, default_machine, now

from device.schema import SlimpiError
from pipeline.progress import Progressor
from pipeline.store import places
from pipeline.tweets.ablation import ablate, as_markdown
from pipeline.tweets.data import find_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="tweets-train", help="labelled table, or a dataset's name")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="how many different folds")
    parser.add_argument("--machine", default=default_machine(), help="folder of the results")
    options = parser.parse_args()
    check_machine(options.machine)
    where, progress = places(), Progressor()
    out = where.results / options.machine / "tweets_ablation.json"
    with progress.step("ablation") as tick:
        table = find_table(options.rows, where.sources)
        result = ablate(table, out, range(options.seeds), cpu=cpu_model(), start_time=now(), tick=tick)
    print(as_markdown(result))


if __name__ == "__main__":
    try:
        main()
    except SlimpiError as error:
        sys.exit(f"tweets_ablation: {error}")

"""How well a classifier tells texts of another kind from its own: by `distance`, and by its confidence alone.

    python benchmarks/outliers.py ARTIFACT --inside data:tweets/test.csv --outside data:books/bookcorpus_passages.txt

The artifact is one of a recipe with `outliers = true`. Inside: a table whose `text` it never saw, with a header;
outside: tables, or texts a line. Prints the share of texts above 1, and the AUROC: how likely a text from outside has
the larger distance, or the smaller probability of its label, than one from inside (0.5 is chance).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bench_common import at_least, command

from device.records import SlimpiError
from device.schema import Prediction
from device.words import Text
from pipeline import sources
from pipeline.classify import classify
from pipeline.hosts import LOCAL
from pipeline.store import Places, find_artifact, places
from pipeline.tweets.data import Columns, read_tweets

TABLES = (".csv", ".tsv", ".parquet")


@command("outliers", "Nothing was written.")
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    where = places()
    folder = find_artifact(where.artifacts, options.artifact)
    inside = _classified(where, folder, options.inside, options)
    rows = [(options.inside, inside, "")]
    for spec in options.outside:
        found = _classified(where, folder, spec, options)
        by_distance = auroc([p.distance or 0.0 for p in found], [p.distance or 0.0 for p in inside])
        by_doubt = auroc(*([doubt(p) for p in side] for side in (found, inside)))
        rows.append((spec, found, f"{by_distance:.3f} | {by_doubt:.3f}"))
    print("| texts | n | median distance | above 1 | AUROC by distance | by confidence |\n|---|---|---|---|---|---|")
    for spec, found, told in rows:
        values = np.array([p.distance for p in found])
        print(f"| {spec} | {len(found)} | {np.median(values):.2f} | {(values > 1).mean():.1%} | {told or ' | '} |")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("artifact", help="its name, as in `slimpi bench`")
    add("--inside", required=True, help="a table of texts like those it learned from, a dataset as in recipes")
    add("--outside", action="append", required=True, help="a table or a text of other ones (repeatable)")
    add("--column", default="text", help="of tables: the texts (default %(default)s)")
    add("--limit", type=at_least(2), default=500, help="texts of each, evenly spread (default %(default)s)")
    return parser


def _classified(where: Places, folder: Path, spec: str, options: argparse.Namespace) -> list[Prediction]:
    path = sources.dataset(spec, where.sources)
    if path.suffix in TABLES:
        texts = [t.text for t in read_tweets(path, Columns(text=options.column))]
    else:
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    step = max(1, len(texts) // options.limit)
    found = list(classify(LOCAL, folder, (Text(text) for text in texts[::step][: options.limit]), where, threads=1))
    if any(p.distance is None for p in found):
        raise SlimpiError(f"{options.artifact} tells no distances. Build it from a recipe with `outliers = true`.")
    return found


def doubt(said: Prediction) -> float:
    """The probability that another label is right, as a sum: 1 less the largest is 0 where that rounds to 1."""
    return sum(sorted(said.probabilities.values())[:-1])


def auroc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """How likely one of `higher` exceeds one of `lower`; ties count half (Mann and Whitney's U)."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(higher, lower).statistic) / (len(higher) * len(lower))


if __name__ == "__main__":
    raise SystemExit(main())

"""Near-duplicate tweets: the same after normalisation, or nearly the same words.

The join over all pairs is exact, not sampled: prefix filtering (Bayardo, Ma and Srikant 2007, "Scaling up all pairs
similarity search", section 4.3; Chaudhuri et al. 2006).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from device.text import clean

MIN_JACCARD = Fraction(3, 5)
"""Of the sets of words. Chosen by reading pairs of the disaster tweets: of 42 drawn at 0.6 and more nearly all were one
text with another source, mention or ending; at 0.5, short texts that share half their words come in."""

NORMALISATION = ("unescape", "urls", "mentions", "punctuation", "lower")


def near_duplicates(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """(n,) the group of each text, numbered by first appearance; groups are transitive.

    Two texts are near-duplicates if, after NORMALISATION, the Jaccard similarity of their sets of words is at least
    MIN_JACCARD. A text without any word after normalisation equals only the same text.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first: dict[str, int] = {}
    distinct = np.array([first.setdefault(normalise(text) or text, len(first)) for text in texts], np.int64)
    pairs = list(similar_pairs([frozenset(key.split()) for key in first], MIN_JACCARD))
    rows, columns = np.array(pairs, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (rows, columns)), shape=(len(first), len(first)))
    _, group = connected_components(graph, directed=False)
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(g, len(numbers)) for g in group[distinct].tolist()], np.int64)


def normalise(text: str) -> str:
    return clean(text, NORMALISATION)


def similar_pairs(sets: Sequence[frozenset[str]], minimum: Fraction) -> Iterator[tuple[int, int]]:
    """Every pair (i, j) of non-empty sets with |a & b| / |a | b| >= minimum, in no order, each once.

    Two such sets share an element among the first |a| - ceil(minimum |a|) + 1 of each, in any common order of the
    elements: with rare ones first, few pairs are left to compare.
    """
    frequency = Counter(element for members in sets for element in members)
    index: dict[str, list[int]] = defaultdict(list)
    for i in sorted(range(len(sets)), key=lambda i: len(sets[i])):
        a = sets[i]
        ordered = sorted(a, key=lambda element: (frequency[element], element))
        prefix = ordered[: len(a) - math.ceil(minimum * len(a)) + 1]
        for j in {j for element in prefix for j in index[element]}:
            b = sets[j]
            both = len(a & b)
            if len(b) >= minimum * len(a) and both >= minimum * (len(a) + len(b) - both):
                yield i, j
        for element in prefix:
            index[element].append(i)

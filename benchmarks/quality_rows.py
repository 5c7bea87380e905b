"""What a comparison of quantized files leaves behind, and what is concluded from it. Pure; nothing runs here.

History of quality.json's schema: 1 (2026-11) first version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Literal

from bench_common import Here
from scipy import stats

from device.records import Record, SlimpiError
from device.schema import Provenance

MAX_RATIO = 0.80
CONFIDENCE = 0.95
BITS_WINDOW = 0.2
SIZE_WINDOW = 0.01
"""A file stands for a target of so many bits per linear weight if it is at most this far from it, in bits; one of ours
if its size is at most this share above those of llama-quantize's files that do."""

MAX_SOURCE_SHARE = 0.5
"""More of the linear weights in types that hold what they were dequantized from: nearly free, so not compared."""

MIN_KLD = 1e-9  # nats/token; what the 16-bit recording cannot tell from zero

Maker = Literal["llama-quantize", "slimpi"]


class Score(Record, frozen=True, kw_only=True):
    """One file on one text: means by chunk, and what only the single tokens tell (order statistics, token errors).

    kld: nats/token. nll: nats/token, of the file and of the reference. The _stderr are over tokens, as
    llama-perplexity's; tokens of a chunk are not independent, so the intervals printed are over chunks.
    """

    corpus: str
    corpus_sha256: str
    reference_sha256: str
    n_ctx: int
    n_threads: int
    n_tokens: int
    kld_chunks: list[float]
    same_top_chunks: list[float]
    nll_chunks: list[float]
    reference_nll_chunks: list[float]
    kld_stderr: float
    kld_median: float
    kld_p99: float
    kld_max: float
    ln_ppl_ratio: float
    ln_ppl_ratio_stderr: float
    measured_s: float
    provenance: Provenance

    def __post_init__(self) -> None:
        n = {len(x) for x in (self.kld_chunks, self.same_top_chunks, self.nll_chunks, self.reference_nll_chunks)}
        if len(n) != 1 or n == {0}:
            raise ValueError(f"{self.corpus}: series of {sorted(n)} chunks, expected as many of each")

    @property
    def n_chunks(self) -> int:
        return len(self.kld_chunks)

    @property
    def measured_against(self) -> tuple[str, int, list[float]]:
        """Text, chunk length, and the reference's likelihood of each chunk, which tells references apart to the last
        bit."""
        return self.corpus_sha256, self.n_ctx, self.reference_nll_chunks

    @property
    def kld(self) -> float:
        return fmean(self.kld_chunks)

    @property
    def same_top(self) -> float:
        return fmean(self.same_top_chunks)

    @property
    def same_top_stderr(self) -> float:
        """Binomial, as llama-perplexity's."""
        return math.sqrt(self.same_top * (1 - self.same_top) / (self.n_tokens - 1))

    @property
    def perplexity(self) -> float:
        return math.exp(fmean(self.nll_chunks))

    @property
    def reference_perplexity(self) -> float:
        return math.exp(fmean(self.reference_nll_chunks))


class QualityRow(Record, frozen=True, kw_only=True):
    """One file. size_bytes: the whole file. key: what it was made from; build_s: wall time of making it, stages shared
    with other variants counting for the first. source_share: part of the linear weights in a type that holds what the
    reference was dequantized from, its own or a wider one (pipeline.planning.source_types)."""

    model: str
    variant: str
    maker: Maker
    key: str
    file_sha256: str
    size_bytes: int
    bits_per_weight: float
    bits_per_linear_weight: float
    n_fallbacks: int
    source_share: float
    build_s: float | None
    scores: list[Score]

    @property
    def free(self) -> bool:
        """Requantized to what holds its source."""
        return self.source_share > MAX_SOURCE_SHARE

    def score(self, corpus: str) -> Score | None:
        return next((s for s in self.scores if s.corpus == corpus), None)


class Verdict(Record, frozen=True, kw_only=True):
    """Our best file near a size against llama-quantize at the same bytes; recomputable from the rows.

    peer_kld lies on the lower hull of llama-quantize's files (log KLD over bytes), between the files `peers`. ratio =
    kld / peer_kld with its 95% interval; None where nothing can be compared, and `why` says why.
    """

    model: str
    corpus: str
    target_bits: float
    variant: str
    size_bytes: int
    bits_per_linear_weight: float
    kld: float
    peers: list[str]
    peer_kld: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    n_chunks: int
    target: str
    ok: bool
    why: str = ""


class Conditions(Here, frozen=True, kw_only=True):
    """What the figures were taken on and with."""

    llama_cpp_python: str
    wheel_commit: str


class Quality(Record, frozen=True, kw_only=True):
    """quality.json."""

    schema: Literal[1] = 1
    conditions: Conditions
    rows: list[QualityRow]
    verdicts: list[Verdict]


@dataclass(frozen=True)
class Ratio:
    value: float
    low: float | None
    high: float | None


Point = tuple[float, float]


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull from the smallest x to the lowest y, strictly falling (Andrew's monotone chain)."""
    hull: list[Point] = []
    for point in sorted(points):
        if hull and point[0] == hull[-1][0]:  # sorted: the lower of the two is there already
            continue
        while len(hull) >= 2 and _cross(hull[-2], hull[-1], point) <= 0:
            hull.pop()
        hull.append(point)
    lowest = min(range(len(hull)), key=lambda i: hull[i][1], default=-1)
    return hull[: lowest + 1]


def _cross(o: Point, a: Point, b: Point) -> float:
    """Positive where o -> a -> b turns left, that is where `a` lies below the line from o to b."""
    return (a[0] - o[0]) * (b[1] - o[1]) - (a[1] - o[1]) * (b[0] - o[0])


def interpolate(hull: Sequence[Point], x: float) -> float | None:
    """The hull's y at x, linear between its points; its first y left of it (it falls, so a smaller file of theirs would
    be no better); None right of it."""
    if hull and x <= hull[0][0]:
        return hull[0][1]
    for left, right in pairwise(hull):
        if left[0] <= x <= right[0]:
            return left[1] + (right[1] - left[1]) * (x - left[0]) / (right[0] - left[0])
    return None


def log_kld(kld: float) -> float:
    return math.log(max(kld, MIN_KLD))


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% Student-t interval of the mean; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    centre = fmean(values)
    stderr = math.sqrt(math.fsum((x - centre) ** 2 for x in values) / (n - 1) / n)
    half = _t(n) * stderr
    return centre - half, centre + half


def _t(n: int) -> float:
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1))


def ratio_at_equal_bytes(size_bytes: int, kld_chunks: Sequence[float], peers: Mapping[int, Sequence[float]]) -> Ratio:
    """Mean KLD over the peers' hull at the same bytes. peers: {bytes: mean KLD of each chunk}, over the same chunks.

    The interval is the delete-one jackknife's over chunks, on the logarithm (Efron and Stein 1981): the chunks are
    paired, so what makes one of them hard for every file cancels. SlimpiError if the hull ends before size_bytes.
    """
    n = len(kld_chunks)
    whole = _log_ratio(size_bytes, kld_chunks, peers, skip=None)
    if n < 2:
        return Ratio(math.exp(whole), None, None)
    left_out = [_log_ratio(size_bytes, kld_chunks, peers, skip=i) for i in range(n)]
    centre = fmean(left_out)
    stderr = math.sqrt((n - 1) / n * math.fsum((x - centre) ** 2 for x in left_out))
    half = min(_t(n) * stderr, 700.0)
    return Ratio(math.exp(whole), math.exp(whole - half), math.exp(whole + half))


def _log_ratio(
    size_bytes: int, kld_chunks: Sequence[float], peers: Mapping[int, Sequence[float]], skip: int | None
) -> float:
    def mean(chunks: Sequence[float]) -> float:
        if len(chunks) != len(kld_chunks):
            raise SlimpiError(f"cannot pair {len(chunks)} chunks with {len(kld_chunks)}. Measure both over the same.")
        return log_kld(fmean(x for i, x in enumerate(chunks) if i != skip))

    there = interpolate(lower_hull([(x, mean(chunks)) for x, chunks in peers.items()]), size_bytes)
    if there is None:
        raise SlimpiError(f"no llama-quantize file has {size_bytes} bytes or more. Measure a larger one.")
    return mean(kld_chunks) - there


def verdicts_of(rows: Sequence[QualityRow], targets: Mapping[str, Sequence[float]]) -> list[Verdict]:
    """One verdict a model, text and target (bits per linear weight); models without targets get none."""
    found = []
    for model in dict.fromkeys(r.model for r in rows):
        mine = [r for r in rows if r.model == model]
        for corpus in dict.fromkeys(s.corpus for r in mine for s in r.scores):
            found += [_verdict(mine, corpus, target) for target in targets.get(model, ())]
    return found


def _verdict(rows: Sequence[QualityRow], corpus: str, target: float) -> Verdict:
    scored = [(r, s) for r in rows if not r.free and (s := r.score(corpus))]
    peers = [(r, s) for r, s in scored if r.maker == "llama-quantize"]
    mine = [(r, s, _compared_at(r, target, [r for r, _ in peers])) for r, s in scored if r.maker == "slimpi"]
    ours = [(r, s, at) for r, s, at in mine if at is not None]
    check_alike([s for _, s in peers] + [s for _, s, _ in ours])
    best = {r.size_bytes: s.kld_chunks for r, s in sorted(peers, key=lambda pair: -pair[1].kld)}
    names = {r.size_bytes: r.variant for r, _ in sorted(peers, key=lambda pair: -pair[1].kld)}
    hull = lower_hull([(size, log_kld(fmean(chunks))) for size, chunks in best.items()])
    judged = []
    for row, score, at in ours:
        there = interpolate(hull, at)
        if there is not None:
            judged.append((row, score, there, at, ratio_at_equal_bytes(at, score.kld_chunks, best)))
    if not judged:
        return _unjudged(rows[0].model, corpus, target, [r for r, _, _ in ours], hull)
    row, score, there, at, ratio = min(judged, key=lambda j: j[4].value)
    return Verdict(
        model=row.model,
        corpus=corpus,
        target_bits=target,
        variant=row.variant,
        size_bytes=row.size_bytes,
        bits_per_linear_weight=row.bits_per_linear_weight,
        kld=score.kld,
        peers=[names[int(size)] for size in _around([x for x, _ in hull], at)],
        peer_kld=math.exp(there),
        ratio=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        n_chunks=score.n_chunks,
        target=f"<= {MAX_RATIO}",
        ok=ratio.value <= MAX_RATIO,
    )


def _compared_at(row: QualityRow, target: float, peers: Sequence[QualityRow]) -> int | None:
    """The bytes at which a file of ours is compared with llama-quantize's files of about `target` bits: its own if they
    have that size (ours may spend fewer bytes on the embeddings and so more bits on linear weights), those of the
    largest of them if it is smaller than all. None if it is larger, or without such peers not of the target's bits."""
    sizes = [r.size_bytes for r in peers if abs(r.bits_per_linear_weight - target) <= BITS_WINDOW]
    if not sizes:
        return row.size_bytes if abs(row.bits_per_linear_weight - target) <= BITS_WINDOW else None
    if row.size_bytes > (1 + SIZE_WINDOW) * max(sizes):
        return None
    return row.size_bytes if row.size_bytes >= (1 - SIZE_WINDOW) * min(sizes) else max(sizes)


def _around(sizes: Sequence[float], x: float) -> list[float]:
    """The one size that is x, or those next to it."""
    return [x] if x in sizes else [*sorted(s for s in sizes if s < x)[-1:], *sorted(s for s in sizes if s > x)[:1]]


def _unjudged(model: str, corpus: str, target: float, ours: Sequence[QualityRow], hull: Sequence[Point]) -> Verdict:
    if not ours:
        why = "no file of ours of that size"
    elif not hull:
        why = "no llama-quantize file was measured"
    else:
        why = f"{ours[0].variant} is larger than every llama-quantize file"
    return Verdict(
        model=model,
        corpus=corpus,
        target_bits=target,
        variant=ours[0].variant if ours else "",
        size_bytes=ours[0].size_bytes if ours else 0,
        bits_per_linear_weight=ours[0].bits_per_linear_weight if ours else 0.0,
        kld=0.0,
        peers=[],
        peer_kld=None,
        ratio=None,
        ratio_low=None,
        ratio_high=None,
        n_chunks=0,
        target=f"<= {MAX_RATIO}",
        ok=False,
        why=why,
    )


def check_alike(scores: Sequence[Score]) -> None:
    """SlimpiError unless all were measured against the same reference, over the same chunks.

    The same reference has the same likelihood of each chunk, to the last bit; the recording's hash covers who recorded
    it too, and so changes with every version of slimpi.
    """
    for score in scores[1:]:
        for name in ("corpus_sha256", "n_ctx", "n_chunks", "reference_nll_chunks"):
            first, other = getattr(scores[0], name), getattr(score, name)
            if first != other:
                raise SlimpiError(
                    f"files on {score.corpus} are not comparable: {name} is {first} and {other}. "
                    "Measure them again under the same conditions."
                )


def merged(rows: Sequence[QualityRow], new: QualityRow) -> list[QualityRow]:
    """`new` in the place of the row of the same model and variant, else at the end."""
    same = [(r.model, r.variant) == (new.model, new.variant) for r in rows]
    return [new if hit else r for r, hit in zip(rows, same, strict=True)] + ([] if any(same) else [new])

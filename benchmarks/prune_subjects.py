"""What a whole run of prune_table.py measures of each model. Data alone."""

from __future__ import annotations

from dataclasses import dataclass

PERCENTS = (10, 20, 30)
REPAIRED = ("", "+repair")
QUESTIONS = ("arc_easy", "openbookqa", "winogrande", "hellaswag_1000")
NO_QUESTIONS = "none"


@dataclass(frozen=True)
class Subject:
    """One model. All names but `others` and `crossed` are keys of PRUNERS.

    type: of the files that are compared with llama-quantize's. ways: at every share, with and without repair, those of
    the bar first. crossed: what the whole model and `pruned`, repaired, are quantized to, at every share; of a size in
    MiB all have the same bytes. others: variants of one share only. timed: whose decoding is timed beside the whole
    model's, repaired, in `type`, at every share. n_chunks: of the text; n_questions: of each set, 0 = all.
    """

    type: str = "F16"
    ways: tuple[str, ...] = ("layers", "widths_fisher")
    pruned: tuple[str, ...] = ("layers", "widths_fisher")
    crossed: tuple[str, ...] = ("Q4_K_M",)
    others: tuple[str, ...] = ()
    timed: tuple[str, ...] = ("layers",)
    n_chunks: int = 20
    questions: tuple[str, ...] = QUESTIONS
    n_questions: int = 100

    def variants(self, percents: tuple[int, ...] = (), ways: tuple[str, ...] = ()) -> list[str]:
        """In the order they are measured: by way and share; unless ways are named, the whole model and the pruned
        quantized further; unless shares are, `others`."""
        names = [
            _variant(way + repair, percent, self.type)
            for way in ways or self.ways
            for percent in percents or PERCENTS
            for repair in REPAIRED
        ]
        if ways:
            return names
        for plan in self.crossed:
            names += [plan, *_repaired(self.pruned, percents or PERCENTS, plan)]
        return names if percents else [*names, *self.others]

    def timed_variants(self, percents: tuple[int, ...] = PERCENTS) -> list[str]:
        return _repaired(self.timed, percents, self.type)


def _repaired(ways: tuple[str, ...], percents: tuple[int, ...], plan: str) -> list[str]:
    return [_variant(f"{way}+repair", percent, plan) for percent in percents for way in ways]


def _variant(way: str, percent: int, plan: str) -> str:
    return f"{way.upper()}-{percent}-{plan}"


SUBJECTS = {
    "smollm2-135m-prune": Subject(
        ways=(
            "layers",
            "widths_fisher",
            "blocks",
            "width",
            "layers_influence",
            "layers_run",
            "width_wanda",
            "width_flap",
            "width_taylor",
            "widths_flap",
            "hidden",
            "widths",
        ),
        # No type of three bits has blocks as small as its widths need: 84.1 MiB is about 4.25 bits.
        crossed=("Q4_K_M", "GPTQ-84.1MiB", "SEARCH-87.5MiB"),
        others=(
            "SPARSE_MAGNITUDE-50-F16",
            "SPARSE_WANDA-50-F16",
            "SPARSE_GPT-50-F16",
            "SPARSE24_WANDA-50-F16",
            "SPARSE24_GPT-50-F16",
            "LAYERS+PATCH-20-F16",
            "LAYERS+DISTILL-20-F16",
            "LAYERS+DISTILL_ENDS-20-F16",
            "WIDTHS_FISHER+DISTILL-20-F16",
        ),
        timed=("layers", "widths_fisher"),
    ),
    # A chunk takes a minute of a slow core: few ways, and no exchanges of layers.
    "qwen2.5-coder-1.5b": Subject(
        type="Q8_0",
        ways=("layers_run", "layers_influence", "widths_fisher"),
        pruned=("layers_run",),
        crossed=("Q4_K_M", "GPTQ-881.6MiB", "GPTQ-733.4MiB"),
        others=("LAYERS_RUN+DISTILL_ENDS-20-Q8_0",),
        timed=("layers_run",),
        n_chunks=6,
        n_questions=50,
    ),
}

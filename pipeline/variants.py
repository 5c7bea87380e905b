"""Names of GGUF variants: llama-quantize's own (Q4_K_M), or METHOD-PLAN (GPTQ-Q4_K): codes chosen by a method of ours.

PLAN is a ggml type, which every matrix of the decoder blocks gets; or the name of one of llama-quantize's mixes, whose
types tensor by tensor it takes over (where a name is both, the type is meant, and `-mix` after it asks for the mix); or
a budget, 3.1bpw over the linear layers, 700MiB for the file, or 700MiB-ctx4096 for the memory that decoding with such a
context takes, under which the types are chosen that lose least.

Before either may stand PRUNER-PERCENT- or PRUNER+REPAIR-PERCENT- (WIDTHS+REPAIR-25-Q4_K_M): the model is pruned first,
by a share of the decoder blocks' weights, or with AUTO and a budget by the one of a few that loses least.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from device.records import SlimpiError
from pipeline.export.llama_quantize import VARIANTS
from pipeline.formats import FORMATS
from pipeline.methods import METHODS
from pipeline.prune import PRUNERS, PruneSpec, parse_prune

TYPES = tuple(name for name, kind in FORMATS.items() if kind.ggml_type and kind.codes)
"""Types whose codes methods choose."""

MIXES = tuple(name for name, mix in VARIANTS.items() if mix.base_type in TYPES)
"""llama-quantize's mixes of these types."""

_MIX = "-mix"
_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?:(?P<bits>bpw)|MiB(?:-ctx(?P<n_ctx>[1-9]\d{0,5}))?)")


@dataclass(frozen=True)
class VariantSpec:
    """A variant's name, taken apart. method: a key of METHODS, "" = llama-quantize chooses codes and types. prune: what
    comes before quantizing; `name` is without it.

    Exactly one of uniform (a type), mix (one of llama-quantize's names), bits (per linear weight) and mib is set; mib
    is the file's size, or with n_ctx the memory with a context of so many tokens.
    """

    name: str
    method: str
    uniform: str = ""
    mix: str = ""
    bits: float = 0.0
    mib: float = 0.0
    n_ctx: int = 0
    prune: PruneSpec | None = None


def parse_variant(name: str) -> VariantSpec:
    """The variant of this name; SlimpiError says which part is unknown and what is known."""
    if name in VARIANTS:
        return VariantSpec(name, method="", mix=name)
    method, dash, plan = name.partition("-")
    if method == method.upper() and method.partition("+")[0].lower() in PRUNERS:
        percent, _, rest = plan.partition("-")
        pruning = parse_prune(method, percent)
        if not rest:
            raise SlimpiError(f"{name!r} says how to prune, not in which type. Name one after it: {name}-Q4_K_M.")
        inner = parse_variant(rest)
        if inner.prune:
            raise SlimpiError(f"{name!r} prunes twice. Prune once, by more.")
        if pruning.percent is None and not inner.mib:
            raise SlimpiError(f"{name!r} chooses how much to prune, which needs a budget: {method}-AUTO-GPTQ-700MiB.")
        return replace(inner, prune=pruning)
    if not dash:
        raise SlimpiError(f"unknown GGUF variant {name!r}. Known: {_known(VARIANTS)}; or METHOD-PLAN: {_help()}")
    if method != method.upper() or method.lower() not in METHODS:
        raise SlimpiError(
            f"unknown method {method!r} in the variant {name!r}. Known: {_known(map(str.upper, METHODS))}; "
            f"pruners, before them: {_known(map(str.upper, PRUNERS))}."
        )
    if plan in TYPES:
        return VariantSpec(name, method.lower(), uniform=plan)
    if (found := _BUDGET.fullmatch(plan)) and (number := float(found["number"])) > 0:
        if found["bits"]:
            return VariantSpec(name, method.lower(), bits=number)
        return VariantSpec(name, method.lower(), mib=number, n_ctx=int(found["n_ctx"] or 0))
    mix = plan.removesuffix(_MIX)
    if mix in MIXES:
        return VariantSpec(name, method.lower(), mix=mix)
    raise SlimpiError(f"unknown plan {plan!r} in the variant {name!r}. Known: {_plans()}.")


def _help() -> str:
    return f"a method ({_known(map(str.upper, METHODS))}) and {_plans()}."


def _plans() -> str:
    mixes = _known(v for v in MIXES if v not in TYPES)
    return f"a type ({_known(TYPES)}), a mix of llama-quantize ({mixes}), or a budget (3.1bpw, 700MiB, 900MiB-ctx4096)"


def _known(names: Iterable[str]) -> str:
    return ", ".join(names)

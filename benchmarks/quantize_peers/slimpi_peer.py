"""slimpi itself. settings: method, format; gguf (the model, F16), text, n_ctx, n_chunks; out, the GGUF to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import checkpoint, hessians, plan, quantize
from pipeline.calibrate import collect_importance
from pipeline.calibration_stages import stats_of_importance
from pipeline.export.gguf import EncodedTensor, export_gguf
from pipeline.formats import FORMATS
from pipeline.layers import Stats
from pipeline.methods import METHODS
from pipeline.packing import pack
from quantize_peers.common import Request, main, of_gguf


def quantize_file(request: Request) -> Any:
    settings = request.settings
    base, out = Path(settings["gguf"]), Path(settings["out"])
    model = checkpoint.load(base)
    kind = FORMATS[settings["format"]]
    formats = dict.fromkeys(plan.read_base(base).linear, kind)
    codes, vectors, _ = quantize.quantize_in_memory(
        model, settings["method"], formats, calibrated(request, base), lambda *_: None
    )
    assert not vectors, "a folded norm would need writing too"
    assert kind.ggml_type is not None
    packed = {name: EncodedTensor(kind.ggml_type, lambda q=q: pack(q)) for name, q in codes.items()}  # type: ignore[misc]
    export_gguf(model, out, "auto", lambda name, tensor: packed.get(name))
    return of_gguf(out)


def calibrated(request: Request, base: Path) -> dict[str, Stats]:
    """What the method needs to know, no more."""
    settings, needs = request.settings, METHODS[request.settings["method"]].needs
    text, folder = Path(settings["text"]), Path(settings["out"]).parent
    sizes = settings["n_ctx"], settings["n_chunks"], request.threads
    if needs == "hessian":
        return hessians.load_stats(hessians.collect_stats(base, text, folder / "stats", *sizes))
    if needs == "means":
        return stats_of_importance(collect_importance(base, text, folder / "importance.npz", *sizes))
    return {}


if __name__ == "__main__":
    main(quantize_file)

"""llama.cpp's own: llama-imatrix, then llama-quantize. settings: tools, type; gguf, text, n_ctx, n_chunks; out."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from quantize_peers.common import Request, main, of_gguf


def quantize(request: Request) -> Any:
    settings = request.settings
    tools, out = Path(settings["tools"]), Path(settings["out"])
    imatrix, threads = out.with_name("imatrix.gguf"), str(request.threads)
    sizes = ["-c", str(settings["n_ctx"]), "--chunks", str(settings["n_chunks"]), "-t", threads]
    text = ["-f", settings["text"], "-o", str(imatrix), "--no-ppl"]
    run([str(tools / "llama-imatrix"), "-m", settings["gguf"], *text, *sizes])
    kept = ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]  # as the others: linear layers alone
    files = [settings["gguf"], str(out), settings["type"], threads]
    run([str(tools / "llama-quantize"), "--imatrix", str(imatrix), *kept, *files])
    return of_gguf(out)


def run(argv: list[str]) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main(quantize, by_children=True)

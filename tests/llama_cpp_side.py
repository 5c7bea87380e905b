"""What llama.cpp says of a GGUF, in a process of its own: a bad file aborts the process it is loaded in.

python llama_cpp_side.py logits MODEL TOKENS.npy OUT.npy      float32 (n_tokens, n_vocab)
python llama_cpp_side.py many TOKENS.npy FOLDER               the same of every .gguf in FOLDER, as NAME.npy; and
                                                              without repacked weights, as NAME.plain.npy
python llama_cpp_side.py tokenize MODEL LINES.json OUT.json   token ids of every line, special tokens parsed
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np


def llama_logits(model: Path, tokens: np.ndarray, scratch: Path) -> np.ndarray:
    """Logits of every position under llama.cpp: float32 weights and KV cache, no flash attention, one thread."""
    np.save(scratch / "tokens.npy", tokens.astype(np.int32))
    _run("logits", model, scratch / "tokens.npy", scratch / "logits.npy")
    return np.load(scratch / "logits.npy")


def llama_tokens(model: Path, lines: list[str], scratch: Path, add_special: bool = False) -> list[list[int]]:
    (scratch / "lines.json").write_text(json.dumps({"lines": lines, "add_special": add_special}))
    _run("tokenize", model, scratch / "lines.json", scratch / "ids.json")
    return json.loads((scratch / "ids.json").read_text())


def _run(*argv: object) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


def _load(path: str, vocab_only: bool, repacked: bool = True) -> object:
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    params.use_extra_bufts = repacked
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    assert model, f"llama.cpp does not load {path}"
    return model


def _many(tokens_path: str, folder: str) -> None:
    for path in sorted(Path(folder).glob("*.gguf")):
        for name, repacked in ((f"{path.stem}.npy", True), (f"{path.stem}.plain.npy", False)):
            _logits(str(path), tokens_path, str(path.with_name(name)), repacked)


def _logits(path: str, tokens_path: str, out: str, repacked: bool = True) -> None:
    import llama_cpp

    model = _load(path, vocab_only=False, repacked=repacked)
    tokens = np.load(tokens_path)
    n = len(tokens)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = n
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    assert context, "llama.cpp makes no context"
    batch = llama_cpp.llama_batch_init(n, 0, 1)
    batch.n_tokens = n
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = int(token), i, 1, 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    np.save(out, np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (n, n_vocab)))
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


def _tokenize(path: str, lines_path: str, out: str) -> None:
    import llama_cpp

    vocab = llama_cpp.llama_model_get_vocab(_load(path, vocab_only=True))
    work = json.loads(Path(lines_path).read_text())
    found = []
    for line in work["lines"]:
        data = line.encode()
        buffer = (ctypes.c_int32 * (len(data) + 8))()
        n = llama_cpp.llama_tokenize(vocab, data, len(data), buffer, len(buffer), work["add_special"], True)
        assert n >= 0, line
        found.append(list(buffer[:n]))
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    {"logits": _logits, "many": _many, "tokenize": _tokenize}[sys.argv[1]](*sys.argv[2:])

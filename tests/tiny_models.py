"""Tiny random Hugging Face models, one a family, with real tokenizers trained on the project's own prose."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.vocab import PRE_TOKENIZERS

PROSE = Path(__file__).resolve().parent.parent / "pipeline" / "data" / "prose_calibration.txt"

_SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_GEMMA = {**_SIZES, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 96, "bos_token_id": 2}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

TINY = {
    "llama": {"model_type": "llama", **_SIZES, "rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING},
    "llama-early-bend": {
        "model_type": "llama",
        **_SIZES,
        "rope_scaling": {**LLAMA3_SCALING, "original_max_position_embeddings": 128},
    },
    "llama-tied": {"model_type": "llama", **_SIZES, "tie_word_embeddings": True},
    "llama-biased": {"model_type": "llama", **_SIZES, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    "llama-linear": {"model_type": "llama", **_SIZES, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen2": {"model_type": "qwen2", **_SIZES, "rope_theta": 1000000.0},
    "qwen2-yarn": {
        "model_type": "qwen2",
        **_SIZES,
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    },
    "gemma2": {"model_type": "gemma2", **_GEMMA},
    "gemma3": {"model_type": "gemma3_text", **_GEMMA, "num_hidden_layers": 7},
    "gemma3-linear": {
        "model_type": "gemma3_text",
        **_GEMMA,
        "num_hidden_layers": 7,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3-pruned": {
        "model_type": "gemma3_text",
        **_GEMMA,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}
"""Configs, one for each thing a converter can get wrong."""


def tiny_model(name: str) -> PreTrainedModel:
    """A random model whose next-token distributions are peaked, so that agreeing on the top token means something."""
    torch.manual_seed(len(name))
    config = AutoConfig.for_model(**TINY[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    shift = 0.0 if name.startswith("gemma") else 1.0
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(shift if parameter_name.endswith("norm.weight") else 0.0, 0.3)
            elif "embed_tokens" in parameter_name:
                parameter.normal_(0.0, 0.35 if shift else 0.2)
            else:
                parameter.normal_(0.0, 1.2 * parameter.shape[1] ** -0.5)
    return model


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> PreTrainedModel:
    """Save a tiny model with its tokenizer as a Hugging Face folder; the model comes back in float32."""
    model = tiny_model(name).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    if name.startswith("gemma"):
        (folder / "tokenizer.model").write_bytes(train_sentencepiece(TINY[name]["vocab_size"] - 10))
        settings = {"tokenizer_class": "GemmaTokenizerFast", "add_bos_token": True, "bos_token": "<bos>"}
    else:
        pre = "qwen2" if name.startswith("qwen2") else "llama-bpe"
        train_bpe(pre, TINY[name]["vocab_size"] - 10).save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model.float()


def train_bpe(pre: str, vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer that splits text as llama.cpp's `pre` should, built from Hugging Face's own parts."""
    known = PRE_TOKENIZERS[pre]
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=known.ignore_merges))
    steps = []
    for kind, *rest in known.steps:
        if kind == "Split":
            steps.append(pre_tokenizers.Split(Regex(rest[0]), rest[1].lower(), rest[2]))
        elif kind == "Digits":
            steps.append(pre_tokenizers.Digits(rest[0]))
        else:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=rest[0], use_regex=rest[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(PROSE)], trainer)
    return tokenizer


def train_sentencepiece(vocab_size: int, prefix: bool = False) -> bytes:
    """A SentencePiece BPE model with byte fallback, laid out like Gemma's (prefix=False) or Llama 2's."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.read_text(encoding="utf-8").splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=[] if prefix else ["\n\n", "▁▁"],
        minloglevel=2,
    )
    return out.getvalue()

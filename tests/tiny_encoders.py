"""Tiny random sequence classifiers of several families, saved as Hugging Face folders with real tokenizers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

PROSE = Path(__file__).resolve().parent.parent / "pipeline" / "data" / "prose_calibration.txt"
N_VOCAB = 320
MAX_TOKENS = 48

_BERT_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": N_VOCAB,
    "pad_token_id": 1,
}
TINY = {
    "bert": {**_BERT_SIZES, "max_position_embeddings": MAX_TOKENS},
    "roberta": {**_BERT_SIZES, "max_position_embeddings": MAX_TOKENS + 2, "type_vocab_size": 1},
    "distilbert": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "vocab_size": N_VOCAB,
        "pad_token_id": 1,
        "max_position_embeddings": MAX_TOKENS,
    },
    "mpnet": {**_BERT_SIZES, "max_position_embeddings": MAX_TOKENS + 2},
}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": N_VOCAB, "pad_token_id": 1}
"""Not among TINY: it has parameters that no classifier uses, weights of three axes, and pads on the left."""
HEADS = {
    "bert": "classifier",
    "roberta": "classifier.out_proj",
    "distilbert": "classifier",
    "mpnet": "classifier.out_proj",
}


def save_encoder(family: str, folder: Path, n_labels: int = 2, seed: int = 0) -> PreTrainedModel:
    """Weights wide enough that texts get different logits, and a tokenizer that cuts and pads unless told not to."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(XLNET if family == "xlnet" else TINY[family]), num_labels=n_labels)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.4 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5
            parameter.add_(torch.randn_like(parameter) * spread)
    model.save_pretrained(folder)
    tokenizer = _byte_bpe() if family == "roberta" else _word_pieces()
    tokenizer.enable_truncation(MAX_TOKENS)
    side = "left" if family == "xlnet" else "right"
    tokenizer.enable_padding(direction=side, length=MAX_TOKENS, pad_id=1, pad_token="<pad>")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=side,
    ).save_pretrained(folder)
    return model


_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
_AROUND = {"single": "<s> $A </s>", "special_tokens": [("<s>", 0), ("</s>", 2)]}


def _word_pieces() -> Tokenizer:
    """Every character, then the commonest words: the library's trainer breaks ties differently in every process."""
    splitter = pre_tokenizers.BertPreTokenizer()
    normalizer = normalizers.BertNormalizer()
    text = normalizer.normalize_str(PROSE.read_text(encoding="utf-8"))
    counts = Counter(word for word, _ in splitter.pre_tokenize_str(text))
    characters = sorted(set("".join(counts)))
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    pieces = [*_SPECIAL, *characters, *(f"##{character}" for character in characters), *words][:N_VOCAB]
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(**_AROUND)
    return tokenizer


def _byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(PROSE)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(**_AROUND)
    return tokenizer

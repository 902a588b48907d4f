"""Models that are no plain transformers: their own `encode` runs them, with its vectors, and the receipt says so."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import BoW, Normalize, Pooling, StaticEmbedding
from tokenizers import Tokenizer as Fast
from tokenizers import processors

from engine.models import local
from engine.models.encoders import Encoder, OwnEncoder
from engine.models.sentence_transformer import SentenceTransformerEmbeddingModel
from tests.tiny_models import (
    BERT,
    MAX_LENGTH,
    bert_tokenizer,
    cosines,
    mixed,
    packed,
    rows,
    save_transformer,
    with_modules,
    word_pieces,
)

LEAST = 0.99999


class Doubled(Transformer):
    """A module of a model's own: what it makes of texts is its own affair."""

    def preprocess(self, inputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().preprocess([f"{text} {text}" for text in inputs], *args, **kwargs)


class ReadsTheRest(torch.nn.Module):
    """A module that goes by more than ids and mask."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        if features["modality"] == "text":
            features["sentence_embedding"] = features["sentence_embedding"].flip(1)
        return features


class OwnForward(SentenceTransformer):
    """A model that does something to its answer."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        features = super().forward(features, **kwargs)
        features["sentence_embedding"] = features["sentence_embedding"].cumsum(1)
        return features


def static(folder: Path) -> SentenceTransformer:
    torch.manual_seed(0)
    return SentenceTransformer(modules=[StaticEmbedding(Fast.from_str(word_pieces()), embedding_dim=16)], device="cpu")


def bag_of_words(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(modules=[BoW(vocab=["you", "the", "a", "and", "is"])], device="cpu")


def router(folder: Path) -> SentenceTransformer:
    torch.manual_seed(0)
    save_transformer(folder, BERT, bert_tokenizer())
    query = [StaticEmbedding(Fast.from_str(word_pieces()), embedding_dim=32)]
    document = [Transformer(str(folder)), Pooling(32)]
    return SentenceTransformer(
        modules=[Router.for_query_document(query, document, default_route="document"), Normalize()], device="cpu"
    )


def own_module(folder: Path) -> SentenceTransformer:
    save_transformer(folder, BERT, bert_tokenizer())
    return SentenceTransformer(modules=[Doubled(str(folder)), Pooling(32)], device="cpu")


def own_forward(folder: Path) -> SentenceTransformer:
    save_transformer(folder, BERT, bert_tokenizer())
    return OwnForward(modules=[Transformer(str(folder)), Pooling(32)], device="cpu")


def prompt_left_out(folder: Path) -> SentenceTransformer:
    """As INSTRUCTOR has it: the prompt is read, and not pooled."""
    save_transformer(folder, BERT, bert_tokenizer())
    return SentenceTransformer(
        modules=[Transformer(str(folder)), Pooling(32, include_prompt=False)],
        device="cpu",
        prompts={"own": "the sea is blue: "},
        default_prompt_name="own",
    )


OWN: dict[str, Callable[[Path], SentenceTransformer]] = {
    "static embeddings": static,
    "bag of words": bag_of_words,
    "router": router,
    "module of its own": own_module,
    "forward of its own": own_forward,
    "prompt that is not pooled": prompt_left_out,
}


def encoder_of(model: SentenceTransformer, backend: str = "torch", **options: Any) -> Encoder:
    settings: dict[str, Any] = {"dtype": "float32", "prompt": None, "max_rows": None, "batch_tokens": None}
    return local.encoder(model, local.chosen("cpu", backend), **settings | options)


def texts_for(kind: str) -> list[str]:
    return [text for text in mixed() if text.isascii()] if kind == "bag of words" else mixed()


@pytest.mark.parametrize("backend", ["torch", "openvino", "auto"])
@pytest.mark.parametrize("kind", OWN)
def test_a_model_that_is_no_plain_transformer_goes_through_its_own_encode(tmp_path, kind, backend):
    """Whatever backend was asked for, the vectors are those that its authors meant."""
    expected = OWN[kind](tmp_path).encode(texts_for(kind))
    encoder = encoder_of(OWN[kind](tmp_path), backend)
    encoded = encoder(texts_for(kind))
    assert (encoder.backend_name, encoder.device, encoded.failed) == ("encode", "cpu", {})
    assert encoded.vectors.dtype == np.float32
    np.testing.assert_allclose(encoded.vectors, expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "backend"), [("module of its own", "openvino"), ("static embeddings", "openvino")])
def test_openvino_that_was_asked_for_by_name_and_is_not_used_is_a_warning(tmp_path, caplog, kind, backend):
    """The log says what runs instead, and why."""
    with caplog.at_level(logging.INFO, "engine"):
        encoder_of(OWN[kind](tmp_path), backend)
    assert "is not a plain transformer; its own encode is used" in caplog.text
    assert "by its own encode: it is not a plain transformer with pooling" in caplog.messages[-1]


def test_a_prompt_is_put_before_texts_by_the_model_itself(tmp_path):
    """One that is asked for, instead of the default."""
    expected = prompt_left_out(tmp_path).encode(mixed(), prompt="query of the sea: ")
    vectors = encoder_of(prompt_left_out(tmp_path), prompt="query of the sea: ")(mixed()).vectors
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    packed_vectors = packed(with_modules(tmp_path), prompt="query of the sea: ")(mixed()).vectors
    assert cosines(vectors, packed_vectors).min() < 0.999, "with the prompt pooled they are others"


def test_tokens_are_counted_as_they_go_into_the_model(tmp_path):
    """With padding where the model pads; static embeddings have none."""
    flat = encoder_of(static(tmp_path))(mixed())
    ids = Fast.from_str(word_pieces()).encode_batch(mixed(), add_special_tokens=False)
    assert flat.num_tokens == flat.num_padded_tokens == sum(len(one.ids) for one in ids)
    padded = encoder_of(own_module(tmp_path), max_rows=4)(mixed())
    own = bert_tokenizer()([f"{text} {text}" for text in mixed()], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    assert padded.num_tokens == sum(map(len, own))
    assert padded.num_tokens < padded.num_padded_tokens
    assert 0 < padded.busy_s <= padded.held_s


@pytest.mark.parametrize(("kind", "is_told"), [(own_forward, True), (prompt_left_out, True), (own_module, False)])
def test_what_is_cut_off_is_counted_where_the_tokenizer_tells(tmp_path, kind, is_told):
    """Text by text, as of plain transformers; not of a module that makes of a text what its tokenizer does not say."""
    texts = ["short", "one two three " * 100, "another", "one two three " * 105]
    encoded = encoder_of(kind(tmp_path))(texts)
    plain = packed(with_modules(save_transformer(tmp_path / "plain", BERT, bert_tokenizer())))(texts)
    if is_told:
        assert encoded.lost.keys() == plain.lost.keys() == {1, 3}
        num_of_prompt = len(bert_tokenizer()("the sea is blue: ")["input_ids"]) - 2 if kind is prompt_left_out else 0
        assert {at: lost - num_of_prompt for at, lost in encoded.lost.items()} == plain.lost
    else:
        assert encoded.lost == {}
    assert (encoded.num_long, encoded.num_lost_tokens) == (len(encoded.lost), sum(encoded.lost.values()))


def test_texts_a_batch_are_limited(tmp_path):
    """By what was asked for."""
    model = own_module(tmp_path)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]["input_ids"])))
    encoder_of(model, max_rows=7)(mixed())
    assert max(sizes) == 7
    assert sum(sizes) == len(mixed())


def test_one_call_at_a_time_is_inside_such_a_model(tmp_path):
    """It may keep anything in itself; each caller has its own vectors and its own count."""
    model = own_module(tmp_path)
    inside: list[int] = []
    most: list[int] = []
    right = model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        answer = right(*args, **kwargs)
        inside.pop()
        return answer

    encoder = encoder_of(model, max_rows=4)
    assert isinstance(encoder, OwnEncoder)
    model.forward = watched
    expected = own_module(tmp_path).encode(mixed())
    starts = (0, 20, 40)
    with ThreadPoolExecutor(len(starts)) as callers:
        answers = list(callers.map(lambda at: encoder(mixed()[at : at + 20]), starts))
    assert max(most) == 1
    for at, answer in zip(starts, answers, strict=True):
        np.testing.assert_allclose(answer.vectors, expected[at : at + 20], atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_is_kept(tmp_path, dtype):
    """The model computes in it; vectors are float32."""
    expected = own_module(tmp_path).encode(mixed())
    vectors = encoder_of(own_module(tmp_path), dtype=dtype)(mixed()).vectors
    assert vectors.dtype == np.float32
    assert cosines(vectors, expected).min() > 0.99
    assert not np.allclose(vectors, expected, atol=1e-6)


# Through the engine


@pytest.fixture
def saved(tmp_path: Path) -> str:
    static(tmp_path).save(str(tmp_path / "static"))
    return str(tmp_path / "static")


def test_no_texts_have_no_vectors(saved):
    """A shard may hold nothing that can be embedded."""
    model = SentenceTransformerEmbeddingModel(saved, device="cpu")
    assert len(rows(model, []).vectors) == 0
    assert rows(model, ["one", "two"]).vectors.shape == (2, 16)


def test_a_bad_text_is_rejected_alone(saved, monkeypatch):
    """By halving, as of every model whose batches nobody sees."""
    model = SentenceTransformerEmbeddingModel(saved, device="cpu")
    expected = static(Path(saved)).encode(["one", "two", "three"])
    own = model._encoder._model
    right = own.encode

    def encode(texts: list[str], **kwargs: Any) -> Any:
        if "poison" in texts:
            raise RuntimeError("it said: poison")
        return right(texts, **kwargs)

    monkeypatch.setattr(own, "encode", encode)
    answer = rows(model, ["one", "two", "poison", "three"])
    assert answer.rejects == {2: "the model fails on it: RuntimeError"}
    rejected = torch.nn.functional.normalize(torch.tensor(answer.vectors))
    np.testing.assert_allclose(rejected, torch.nn.functional.normalize(torch.tensor(expected)), atol=1e-5)


# Without memory


class Small:
    """
    An `encode` on a device with memory for so many texts, and for none that is called giant.

    Args:
        right: The model's own.
        most: Texts of a batch that fit.
    """

    def __init__(self, right: Callable[..., Any], most: int) -> None:
        self.right, self.most = right, most
        self.sizes: list[int] = []
        self.batches: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, texts: list[str], *, batch_size: int, **kwargs: Any) -> Any:
        assert not any(batch() is not None for batch in self.batches), "the batch that did not fit is still there"
        size = min(batch_size, len(texts))
        self.sizes.append(size)
        batch = torch.ones(size)
        self.batches.append(weakref.ref(batch))
        if size > self.most or any("giant" in text for text in texts):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.right(texts, batch_size=batch_size, **kwargs)


@pytest.fixture
def small(saved: str, monkeypatch: pytest.MonkeyPatch) -> tuple[SentenceTransformerEmbeddingModel, Small]:
    """A model on a device with memory for eleven texts."""
    model = SentenceTransformerEmbeddingModel(saved, device="cpu", model_batch_size=32)
    encode = Small(model._encoder._model.encode, most=11)
    monkeypatch.setattr(model._encoder._model, "encode", encode)
    return model, encode


def test_a_device_without_memory_for_a_batch_has_smaller_ones_from_then_on(small, caplog):
    """Halved until they fit; nothing is left on the device of those that did not, and no text is tried alone."""
    model, encode = small
    answer = rows(model, mixed())
    assert (answer.rejects, len(answer.vectors)) == ({}, len(mixed()))
    assert "larger batches do not fit into the device's memory: 8 texts from now on" in caplog.text
    rows(model, mixed()[:40])
    assert encode.sizes == [32, 16, 8, 8]
    expected = static(Path()).encode(mixed())
    np.testing.assert_allclose(answer.vectors, expected, atol=1e-5)


def test_a_text_that_is_too_large_alone_is_rejected_and_leaves_the_batches_as_they_were(small):
    """One of a thousand would else have all others go through the device one by one."""
    model, encode = small
    answer = rows(model, ["one", "two", "a giant", "three"])
    assert answer.rejects == {2: "the model fails on it: OutOfMemoryError"}
    assert len(answer.vectors) == 3
    encode.sizes.clear()
    rows(model, mixed()[:11])
    assert encode.sizes == [11]


# Plain at first sight


def token_types(folder: Path) -> SentenceTransformer:
    """Its tokenizer gives token types, as XLNet's and Funnel's do."""
    tokenizer = bert_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS]:1 $A:1 [SEP]:0", "[CLS]:1 $A:1 [SEP]:0 $B:0 [SEP]:0", [("[CLS]", 2), ("[SEP]", 3)]
    )
    return with_modules(save_transformer(folder, BERT, tokenizer))


def more_features(folder: Path) -> SentenceTransformer:
    return with_modules(save_transformer(folder, BERT, bert_tokenizer()), Pooling(32), ReadsTheRest())


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize("kind", [token_types, more_features])
def test_a_model_that_needs_more_than_ids_and_mask_has_its_own_vectors(tmp_path, kind, backend):
    """Token types, or what a module behind the transformer reads: by whichever way, the vectors are the library's."""
    reference = kind(tmp_path)
    expected = reference.encode(mixed())
    encoded = encoder_of(kind(tmp_path), backend)(mixed())
    assert encoded.failed == {}
    assert cosines(encoded.vectors, expected).min() >= LEAST

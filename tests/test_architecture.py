"""What a model's modules say of it: which tokens and positions it knows, what may be rounded, and when its own `encode` is used."""

from __future__ import annotations

import copy

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from engine.errors import ConfigError
from engine.models.architecture import cast
from tests.test_backends import KINDS, LEAST, Kind, by_engine
from tests.tiny_models import (
    BERT,
    DECODER,
    ROBERTA,
    bert_tokenizer,
    cosines,
    decoder_tokenizer,
    mixed,
    roberta_tokenizer,
    rows,
)

BACKENDS = ("torch", "openvino")


def endless(tokenizer):
    """Return a tokenizer that knows no limit, as transformers says it."""
    tokenizer.model_max_length = int(1e30)
    return tokenizer


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_with_a_token_that_the_model_does_not_know_is_rejected_alone(tmp_path, backend):
    """
    OpenVINO would compute a vector with zeros in the token's place, and CUDA would give up the GPU, for all texts to come.

    That the tokenizer has such a token is no reason to fail as a conversion is checked, whose texts do not hold it.
    """

    def with_one_more():
        tokenizer = bert_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
        return tokenizer

    expected = Kind(BERT, with_one_more, lambda: [Pooling(32)]).save(tmp_path).encode(["one", "four five"])
    model = by_engine(tmp_path, backend)
    assert model.backend == backend
    answer = rows(model, ["one", "two <|endoftext|> three", "four five", "<|endoftext|>"])
    assert list(answer.rejects) == [1, 3]
    assert all("its token 600 is unknown to the model, which has 600" in reason for reason in answer.rejects.values())
    assert cosines(answer.vectors, expected).min() >= LEAST
    alone = rows(model, ["<|endoftext|>"])
    assert (list(alone.rejects), len(alone.vectors)) == ([0], 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mpnet", "xlm-roberta"])
def test_a_text_is_cut_to_the_positions_that_a_model_has(tmp_path, backend, name):
    """RoBERTa and its like have two fewer than their config says; beyond, OpenVINO would compute with zeros, and PyTorch raises."""
    settings = {"model_type": name, **ROBERTA, "max_position_embeddings": 40}
    reference = Kind(settings, lambda: endless(roberta_tokenizer()), lambda: [Pooling(32)]).save(tmp_path)
    reference.max_seq_length = 38
    model = by_engine(tmp_path, backend)
    answer = rows(model, mixed())
    assert (model.backend, answer.rejects) == (backend, {})
    assert cosines(answer.vectors, reference.encode(mixed())).min() >= LEAST
    assert answer.lost, "what is cut off is counted"


def test_a_max_length_beyond_a_model_s_positions_is_refused(tmp_path):
    """Those that stand for padding are none."""
    settings = {"model_type": "mpnet", **ROBERTA, "max_position_embeddings": 40}
    Kind(settings, roberta_tokenizer, lambda: [Pooling(32)]).save(tmp_path)
    with pytest.raises(ConfigError, match="takes 3 to 38 tokens, not 39"):
        by_engine(tmp_path, "torch", max_length=39)
    assert rows(by_engine(tmp_path, "torch", max_length=38), mixed()).rejects == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["BERT", "Qwen3", "ModernBERT", "T5"])
def test_weights_are_rounded_as_transformers_rounds_them_as_it_loads_a_model(tmp_path, kind, dtype):
    """The frequencies of rotary positions stay in float32, as does what T5 would overflow with in float16; a second cast changes nothing."""
    KINDS[kind].save(tmp_path)
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu", model_kwargs={"dtype": torch.float32})
    for own in (cast(model, dtype), cast(copy.deepcopy(loaded), dtype)):
        assert dtypes(own) == dtypes(loaded)
    is_kept = [one == torch.float32 for one in dtypes(loaded).values()]
    assert any(is_kept) == (kind in ("Qwen3", "ModernBERT") or (kind, dtype) == ("T5", "float16"))
    assert not all(is_kept)


def dtypes(model: SentenceTransformer) -> dict[str, torch.dtype]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: weights.dtype for name, weights in named if weights.is_floating_point()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_that_go_by_the_neighbours_are_left_to_the_model_s_own_encode(tmp_path, backend):
    """The longest text of a batch decides how all are turned, and each batch writes that anew: no two may run at once."""
    turned = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    settings = {"model_type": "qwen3", **DECODER, "max_position_embeddings": 64, "rope_parameters": turned}
    Kind(settings, decoder_tokenizer, lambda: [Pooling(32, "lasttoken")]).save(tmp_path)
    model = by_engine(tmp_path, backend)
    assert model.backend == "encode"
    assert rows(model, mixed()).rejects == {}

"""Servers: Azure's, Cohere's, and those of one's own that are like OpenAI's."""

from __future__ import annotations

import asyncio
import traceback

import numpy as np
import pytest

import engine
from engine.errors import AuthenticationFailed, ConfigError, ProviderError
from engine.models.cohere import CohereEmbeddingModel
from engine.models.openai import OpenAIEmbeddingModel
from tests.api_servers import DIMENSION, KEY, OWN, Client, assert_right, closed, numbered
from tests.strict_server import vector

pytest_plugins = ("tests.api_servers",)

TEXTS = numbered(10)
VERSION = "2024-02-01"


# Azure


def test_azure_is_asked_at_the_deployment_s_address(server, connect):
    """With the version and Azure's own header for the key, which the server insists on."""
    server.behave(key=KEY)
    client = connect("my-deployment", base_url=server.root, api_version=VERSION)
    assert_right(client.rows(TEXTS), TEXTS)


def test_azure_s_resource_may_be_in_the_environment(server, connect, monkeypatch):
    """As its own SDK has it; the key goes nowhere else."""
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", server.root)
    client = connect("my-deployment", base_url=None, api_version=VERSION)
    assert_right(client.rows(TEXTS), TEXTS)


def test_azure_without_a_resource_is_refused(key):
    """Azure's key is not for OpenAI."""
    with pytest.raises(ConfigError, match="AZURE_OPENAI_ENDPOINT"):
        OpenAIEmbeddingModel("my-deployment", api_version=VERSION)


def test_azure_s_key_is_azure_s(server, connect, monkeypatch):
    """OpenAI's is none for it."""
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "another")
    server.behave(key=KEY)
    with pytest.raises(AuthenticationFailed):
        connect("my-deployment", base_url=server.root, api_version=VERSION).rows(TEXTS)


def test_azure_knows_the_limits_of_openai_s_models(server, connect):
    """Whatever the deployment is called."""
    client = connect("my-deployment", base_url=server.root, api_version=VERSION, long_texts="reject")
    answer = client.rows(["short", "word " * 9000])
    assert list(answer.rejects) == [1]


# Of one's own


def test_a_server_of_one_s_own_needs_no_key(server, connect, monkeypatch):
    """It asks for none."""
    monkeypatch.delenv("OPENAI_API_KEY")
    assert_right(connect(OWN).rows(TEXTS), TEXTS)


@pytest.mark.parametrize("base_url", [None, "https://api.openai.com/v1", "https://api.openai.com/v1/"])
def test_openai_needs_a_key(key, monkeypatch, base_url):
    """However it is named: without one, the first request would be refused."""
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="set OPENAI_API_KEY"):
        OpenAIEmbeddingModel(base_url=base_url)


def test_the_environment_may_name_the_server(server, connect, monkeypatch):
    """As OpenAI's SDK has it."""
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert_right(connect(base_url=None).rows(TEXTS), TEXTS)


@pytest.mark.parametrize(("variable", "version"), [("OPENAI_BASE_URL", None), ("AZURE_OPENAI_ENDPOINT", VERSION)])
@pytest.mark.parametrize("address", ["https://user:{}@127.0.0.1:1/v1", "https://127.0.0.1:1/v1?key={}", "https://[{}]"])
def test_a_secret_in_the_environment_s_address_is_neither_stored_nor_told(
    key, monkeypatch, tmp_path, variable, version, address
):
    """Of `--base-url` it is refused too; this one would be in job.json, which outlives the run."""
    monkeypatch.setenv(variable, address.format(KEY))
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n')
    given = {"source": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "out"), "api_version": version}
    for verb in (engine.plan, engine.run):
        with pytest.raises(ConfigError, match=f"^{variable}: ") as refused:
            verb(model="openai:a-model", **given)
        assert KEY not in "".join(traceback.format_exception(refused.value))
    assert not (tmp_path / "out" / "_engine").exists()


def test_a_key_may_be_in_a_file(server, connect, tmp_path, monkeypatch):
    """It wins over the environment."""
    (tmp_path / "key").write_text(f"{KEY}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    server.behave(key=KEY)
    assert_right(connect(key_file=str(tmp_path / "key")).rows(TEXTS), TEXTS)


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_key_file_without_a_key_is_refused(tmp_path, content):
    """At once, by its name."""
    if content is not None:
        (tmp_path / "key").write_text(content)
    with pytest.raises(ConfigError, match=r"key_file: .*key"):
        OpenAIEmbeddingModel(key_file=str(tmp_path / "key"))
    with pytest.raises(ConfigError, match="~no-such-user/key: there is no such user's home folder"):
        OpenAIEmbeddingModel(key_file="~no-such-user/key")


def test_llmock_is_a_server_like_any_other(llmock, connect):
    """It answers in floats, with limits in its headers."""
    client = connect(base_url=llmock.url, requests_per_minute=None)
    answer = client.rows(TEXTS)
    assert answer.vectors.shape == (10, 1536)
    assert answer.rejects == {}
    assert answer.num_tokens > 0


def test_a_server_that_speaks_no_base64_has_no_usage_and_no_limits(server, connect):
    """Such as small ones of one's own: nothing of it is needed."""
    server.behave(no_base64=True, no_usage=True, limit_headers=False, compat="tei")
    texts = numbered(300)
    client = connect(OWN, requests_per_minute=None, model_batch_size=50)
    assert_right(client.rows(texts), texts)
    assert sorted(client.books.sizes) == [50] * 6


def test_a_closed_client_leaves_no_connection(server, connect):
    """The server sees it go."""
    client = connect()
    client.rows(TEXTS)
    inner = client.model._client
    asyncio.run(client.model.close())
    assert inner is not None
    assert inner.is_closed()
    client.model.close = _nothing  # closed already


async def _nothing() -> None:
    """Do nothing."""


# Cohere


def test_cohere_is_asked_for_96_texts_at_most(server, cohere):
    """It takes no more."""
    texts = numbered(300)
    client = cohere()
    answer = client.rows(texts)
    assert_right(answer, texts)
    assert sorted(client.books.sizes) == [12, 96, 96, 96]
    assert answer.num_tokens == server.stats()["tokens_paid"]


def test_cohere_takes_no_larger_batches(key):
    """Refused before anything is sent."""
    with pytest.raises(ConfigError, match="1 to 96 texts a request"):
        CohereEmbeddingModel(model_batch_size=97)


def test_cohere_s_input_type_is_sent_and_is_in_the_name(server, cohere):
    """It decides the vectors; the server refuses a request without one."""
    client = cohere(input_type="search_query", dimensions=5)
    assert client.model.slug() == "cohere:embed-v4.0:search_query:5"
    assert_right(client.rows(TEXTS), TEXTS, 5)
    with pytest.raises(ProviderError, match="input_type is required"):
        cohere(input_type="").rows(TEXTS)


LONG = " ".join(f"word{number}" for number in range(200))


def test_cohere_cuts_long_texts_itself(server, cohere):
    """That is what truncate means to it: the text is sent whole."""
    server.behave(max_input_tokens=100)
    client = cohere(long_texts="truncate")
    assert_right(client.rows(["short", LONG]), ["short", LONG])
    assert client.books.sizes == [2]


def test_cohere_s_long_texts_are_rejected(server, cohere):
    """In its words, alone."""
    server.behave(max_input_tokens=100)
    answer = cohere(long_texts="reject").rows(["short", LONG, "another"])
    assert list(answer.rejects) == [1]
    assert "too long" in answer.rejects[1]
    assert_right(answer, ["short", LONG, "another"])


def test_cohere_s_long_texts_are_embedded_in_pieces(server, cohere):
    """Its words say that they are too long; the pieces are made here."""
    server.behave(max_input_tokens=100)
    client = cohere(long_texts="chunk")
    answer = client.rows(["short", LONG, "another"])
    assert (answer.rejects, answer.num_long) == ({}, 1)
    assert np.linalg.norm(answer.vectors[1]) == pytest.approx(1, abs=1e-5)
    assert not np.allclose(answer.vectors[1], vector(LONG, DIMENSION), atol=1e-2)
    np.testing.assert_allclose(answer.vectors[0], vector("short", DIMENSION), atol=1e-6)


def test_cohere_needs_a_key(key, monkeypatch):
    """In the environment of the worker, or a file."""
    monkeypatch.delenv("CO_API_KEY")
    with pytest.raises(ConfigError, match="set CO_API_KEY"):
        CohereEmbeddingModel()


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"status": 401}, AuthenticationFailed),
        ({"status": 404}, ProviderError),
    ],
)
def test_cohere_s_refusals_end_the_run(server, cohere, fault, error):
    """At once."""
    server.behave(faults=[{"kind": "status", "times": -1, **fault}])
    client = cohere()
    with pytest.raises(error):
        client.rows(TEXTS)
    assert len(client.books.sent) == 1


def test_cohere_s_rate_limit_without_a_wait_is_waited_out(server, cohere, monkeypatch):
    """As trial keys have it: no header says how long."""
    monkeypatch.setattr("engine.models.api.budget.DEFAULT_PAUSE_S", 0.5)
    words = "You are using a Trial key, which is limited to 100 API calls / minute."
    server.behave(faults=[{"kind": "status", "status": 429, "message": words}])
    client = cohere()
    assert_right(client.rows(TEXTS), TEXTS)
    refused, passed = client.books.sent
    assert passed.began - refused.ended >= 0.5


def test_two_providers_live_side_by_side(server, connect, cohere):
    """Each with a budget and a client of its own."""
    clients = [Client(OpenAIEmbeddingModel(OWN, base_url=server.url)), cohere(), connect()]
    for client in clients:
        assert_right(client.rows(TEXTS), TEXTS)
    closed(clients[:1])

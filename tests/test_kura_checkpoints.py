"""Kura's checkpoints become sources of the engine and come back with vectors, by way of Kura's own managers."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

os.environ.setdefault("OPENAI_API_KEY", "sk-for-tests")

pytest.importorskip("kura", reason="Kura is not installed: docs/kura.md says how")

from kura.checkpoints import JSONLCheckpointManager, ParquetCheckpointManager
from kura.embedding import embed_summaries
from kura.types import Conversation, ConversationSummary, Message

from engine.errors import ConfigError, Refused, SourceError
from engine.integrations import kura_checkpoints
from engine.integrations.kura_checkpoints import conversations_to_source, summaries_to_source, with_embeddings
from engine.integrations.kura_formats import read_checkpoint
from tests.test_local_long_texts import Job

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC)
FORMS = ["jsonl", "parquet", "datasets"]


class Asked:
    """Keeps what Kura asks to be embedded."""

    async def embed(self, texts: list[str]) -> list[list[float]]:
        self.texts = texts
        return [[1.0, 2.0] for _ in texts]


@pytest.fixture
def summaries() -> list[ConversationSummary]:
    """With and without optional fields and vectors, and with all kinds of metadata that Kura's datasets keep."""
    return [
        ConversationSummary(
            summary=f"It's about {n} \u00e9l\u00e8ves\n", chat_id=f"chat-{n}", metadata={"n": n, "tags": ["a", "b"], "source": "x"},
            languages=["en"] if n % 2 else None, request="why" if n % 3 else None, concerning_score=n % 5 + 1 if n % 2 else None,
            embedding=[0.5, 0.25] if n % 4 == 0 else None,
        )
        for n in range(2500)
    ]  # fmt: skip


@pytest.fixture
def conversations() -> list[Conversation]:
    messages = [
        Message(created_at=NOON, role="user", content="Hello?"),
        Message(created_at=NOON, role="assistant", content="Yes."),
    ]
    return [
        Conversation(chat_id=f"chat-{n}", created_at=NOON, messages=messages, metadata={"n": n, "tags": ["a"]})
        for n in range(3)
    ]


def manager(form: str, folder: Path):
    if form == "datasets":
        pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
        from kura.checkpoints import HFDatasetCheckpointManager

        return HFDatasetCheckpointManager(str(folder))
    return {"jsonl": JSONLCheckpointManager, "parquet": ParquetCheckpointManager}[form](str(folder))


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_each_form_becomes_a_source_of_what_kura_would_embed(form, summaries, tmp_path):
    """Ids, texts and metadata are the summaries'; the file does not depend on the form, and is made once."""
    manager(form, tmp_path / "kura").save_checkpoint("summaries", summaries)
    assert list(read_checkpoint(tmp_path / "kura", "summaries", ConversationSummary)) == summaries
    file = summaries_to_source(tmp_path / "kura", tmp_path / "source")
    assert [path.name for path in (tmp_path / "source").iterdir()] == ["summaries.parquet"]
    bare = [summary.model_copy(update={"embedding": None}) for summary in summaries]
    rows = pq.read_table(file).to_pydict()
    assert rows["id"] == [summary.chat_id for summary in summaries]
    assert rows["text"] == [str(summary) for summary in bare]
    assert rows["metadata"][7] == '{"n": 7, "tags": ["a", "b"], "source": "x"}'
    before = file.stat()
    assert summaries_to_source(iter(summaries), tmp_path / "source") == file  # of a generator, and again
    assert file.stat() == before


async def _asked(summaries: list[ConversationSummary]) -> list[str]:
    model = Asked()
    await embed_summaries(summaries, model)
    return model.texts


def test_the_text_is_the_one_that_kura_asks_for(summaries):
    """What Kura's `embed_summaries` hands to its model is, text for text, what the source holds."""
    import asyncio

    bare = [summary.model_copy(update={"embedding": None}) for summary in summaries[:20]]
    assert asyncio.run(_asked(bare)) == [kura_checkpoints.text_of_summary(summary) for summary in summaries[:20]]


@pytest.mark.parametrize("form", FORMS)
def test_conversations_become_a_source_too(form, conversations, tmp_path):
    """A line for each message; of datasets, as releases before 4 stored them, since Kura cannot write them with later ones."""
    kura = manager(form, tmp_path / "kura")
    if form == "datasets":
        from datasets import Dataset

        rows = [kura._model_to_dict(one, "conversations") for one in conversations]
        names = ("created_at", "role", "content")
        rows = [row | {"messages": {name: [m[name] for m in row["messages"]] for name in names}} for row in rows]
        Dataset.from_list(rows, features=kura._schemas["conversations"]).save_to_disk(tmp_path / "kura/conversations")
    else:
        kura.save_checkpoint("conversations", conversations)
    found = list(read_checkpoint(tmp_path / "kura", "conversations", Conversation))
    assert [one.messages[1].content for one in found] == ["Yes."] * 3
    assert [one.metadata for one in found] == [one.metadata for one in conversations]
    rows = pq.read_table(conversations_to_source(tmp_path / "kura", tmp_path / "source")).to_pylist()
    assert rows[1] == {"id": "chat-1", "text": "user: Hello?\nassistant: Yes.", "metadata": '{"n": 1, "tags": ["a"]}'}


def test_what_cannot_be_a_source_is_refused_and_leaves_nothing(summaries, tmp_path):
    """Other rows under the same name, two rows with one id, damage, no checkpoint, two of them: each says what to do, quoting no text."""
    kura, source = tmp_path / "kura", tmp_path / "source"
    file = summaries_to_source(summaries, source)
    before = file.read_bytes()
    with pytest.raises(Refused, match="other rows"):
        summaries_to_source(summaries[:-1], source)
    with pytest.raises(SourceError, match="1 of 2501 rows"):
        summaries_to_source([*summaries, summaries[3]], source, name="twice")
    with pytest.raises(SourceError, match="lone surrogate"):
        summaries_to_source([summaries[0].model_copy(update={"chat_id": "\ud800"})], source, name="odd")
    with pytest.raises(ConfigError, match="name"):
        summaries_to_source(summaries, source, name="../up")
    with pytest.raises(SourceError, match="check the path"):
        summaries_to_source(kura, source)
    for form in ("jsonl", "parquet"):
        manager(form, kura).save_checkpoint("summaries", summaries)
    with pytest.raises(SourceError, match="2 forms"):
        summaries_to_source(kura, source)
    (kura / "summaries.jsonl").write_text('{"summary": "a secret", "chat_id": 3}\n')
    with pytest.raises(SourceError, match="cannot be read") as caught:
        summaries_to_source(kura / "summaries.jsonl", source, name="damaged")
    assert "secret" not in str(caught.value)
    with pytest.raises(SourceError, match="no checkpoint 'others'"):
        summaries_to_source(kura, source, name="others")
    assert [path.name for path in source.iterdir()] == ["summaries.parquet"]
    assert file.read_bytes() == before
    with pytest.raises(ConfigError, match=r"no _engine/job\.json"):
        with_embeddings(summaries, kura)


def test_vectors_of_chunks_are_not_taken_for_those_of_summaries(summaries, tmp_path):
    """Each long one would get the vector of its beginning."""
    job = Job(tmp_path)
    job.run()
    with pytest.raises(ConfigError, match="chunk-rows gives a text a vector for each of its chunks"):
        with_embeddings([summaries[0].model_copy(update={"chat_id": "id-1"})], job.out)


@pytest.mark.parametrize("form", FORMS)
def test_vectors_go_into_checkpoints_that_kuras_managers_write(form, summaries, tmp_path):
    """All three managers keep vectors; Kura itself reads them back, but for Parquet with pandas 3, which the engine reads."""
    filled = [one.model_copy(update={"embedding": [n + 0.5, 0.25]}) for n, one in enumerate(summaries[:50])]
    kura = manager(form, tmp_path / "kura")
    kura.save_checkpoint("summaries", filled)
    assert list(read_checkpoint(tmp_path / "kura", "summaries", ConversationSummary)) == filled
    if form != "parquet":
        assert kura.load_checkpoint("summaries", ConversationSummary) == filled

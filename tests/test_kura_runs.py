"""Kura's own class through a whole run, and back into Kura."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

pytest.importorskip("kura", reason="Kura is not installed: docs/kura.md says how")

from tests.test_kura import PACKAGED, TOPICS, Descriptions, embedded  # isort: skip - first, since it sets what Kura reads as it is imported

from kura.embedding import SentenceTransformerEmbeddingModel as KuraSentenceTransformer
from kura.k_means import KmeansClusteringMethod
from kura.types import ConversationSummary

import engine
from engine.integrations.kura_checkpoints import summaries_to_source, with_embeddings
from engine.models.model_files import folder_of

pytestmark = pytest.mark.ray


def test_kuras_own_class_runs_in_the_engines_actors_and_its_vectors_go_back_into_kura(shared_ray, tmp_path):
    """`custom:kura.embedding.…` through a run: summaries to a source, vectors into summaries, and a reject among them."""
    summaries = [
        ConversationSummary(summary=f"try {number} at {TOPICS[number % 3]}", chat_id=f"chat-{number}", metadata={})
        for number in range(12)  # torch is slow where several processes want its cores
    ]
    blank = ConversationSummary(summary="nothing", chat_id="blank", metadata={})
    source = tmp_path / "source"
    summaries_to_source([*summaries, blank], source, text=lambda one: one.summary if one is not blank else " ")
    folder = str(folder_of(PACKAGED))
    result = engine.run(
        source=str(source), output=str(tmp_path / "out"), id_column="id", progress=False, device="cpu", num_actors=1,
        model="custom:kura.embedding.SentenceTransformerEmbeddingModel", model_args={"model_name": folder},
    )  # fmt: skip
    assert (result.num_rows, result.num_rejects) == (12, 1)
    filled = with_embeddings([*summaries, blank, blank.model_copy(update={"chat_id": "new"})], tmp_path / "out")
    assert filled.missing == {"blank": "blank text", "new": "not in the output"}
    assert [one.embedding is None for one in filled.summaries] == [False] * 12 + [True] * 2
    assert all(one.embedding is None for one in summaries)
    own = embedded(KuraSentenceTransformer(folder), [one.summary for one in summaries])
    np.testing.assert_allclose([one.embedding for one in filled.summaries[:12]], own, atol=2e-6)
    items = [{"item": one, "embedding": full.embedding} for one, full in zip(summaries, filled.summaries, strict=False)]
    clusters = asyncio.run(Descriptions().generate_clusters(KmeansClusteringMethod(4).cluster(items)))
    assert sorted(chat_id for cluster in clusters for chat_id in cluster.chat_ids) == sorted(
        s.chat_id for s in summaries
    )

"""Usage: what a receipt says of a shard's tokens, padding, seconds and backend, from an actor to the ledger."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pytest

from engine.commits import Receipt, idle_share, padding_share
from engine.ledger import Ledger
from engine.model_config import ModelConfig
from engine.models import registry
from engine.pipeline.parcel import Item, pack, unpack
from engine.pipeline.worker import EmbedWorker, Work
from engine.schema import SOURCE_ROW, TEXT
from engine.sources.rows import Selection
from engine.storage import LocalStorage
from tests.builders import FINGERPRINT, make_shard
from tests.test_own_encode import static
from tests.tiny_models import BERT, MAX_LENGTH, bert_tokenizer, mixed, save_transformer, with_modules

pytestmark = pytest.mark.usefixtures("engine_logger_as_it_was")


@pytest.fixture
def saved(tmp_path: Path) -> str:
    static(tmp_path).save(str(tmp_path / "static"))
    return str(tmp_path / "static")


def receipts(out: Path, model: str, texts: list[list[str]], **options: str) -> list[Receipt]:
    """Embed shards of texts by an actor, as Ray calls it, and commit them."""
    config = ModelConfig(model=f"sentence-transformers:{model}", device="cpu", **options)
    worker = EmbedWorker(Work(config, registry.identity(config), Selection("text"), None, 0, logging.WARNING))
    items = []
    for number, some in enumerate(texts):
        shard = make_shard(len(some), path=f"{number}.parquet")
        table = pa.table({TEXT: some, SOURCE_ROW: pa.array(range(len(some)), pa.int64())})
        items.append(Item(shard, table))
    made = [item for some in unpack(worker(pack(items))) for item in some]
    ledger = Ledger(LocalStorage(str(out)))
    return [
        ledger.publish(item.table, shard=item.shard, fingerprint=FINGERPRINT, rejects=item.rejects, usage=item.usage)
        for item in made
    ]


def test_a_receipt_says_that_the_model_s_own_encode_ran_it(saved, tmp_path):
    """Tokens, no padding, and a device that was busy."""
    (receipt,) = receipts(tmp_path / "out", saved, [mixed()])
    assert (receipt.backend, receipt.device, receipt.num_rows) == ("encode", "cpu", len(mixed()))
    assert receipt.num_tokens == receipt.num_padded_tokens > 0
    assert receipt.padding_share == 0
    assert 0 < receipt.busy_s <= receipt.embed_s
    assert 0 <= receipt.device_idle_share < 1


def test_a_shard_without_texts_is_committed_beside_others(saved, tmp_path):
    """All its rows are rejects; its vectors have the dimension of the others."""
    one, other = receipts(tmp_path / "out", saved, [["", "  "], ["one", "two"]])
    assert (one.num_rejects, other.num_rejects) == (2, 0)
    (alone,) = receipts(tmp_path / "alone", saved, [["", "  "]])
    assert (alone.num_rejects, alone.padding_share) == (2, None)


def test_receipts_of_a_parcel_add_up(tmp_path):
    """Several shards go through the model together; tokens, padding and seconds are shared out among them."""
    model = with_modules(save_transformer(tmp_path / "0", BERT, bert_tokenizer()))
    model.save(str(tmp_path / "bert"))
    found = receipts(tmp_path / "out", str(tmp_path / "bert"), [mixed()[:30], ["", "a"], mixed()[30:]], backend="torch")
    assert {receipt.backend for receipt in found} == {"torch"}
    ids = bert_tokenizer()([*mixed(), "a"], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    assert sum(receipt.num_tokens for receipt in found) == sum(map(len, ids))
    assert 1 < sum(receipt.num_padded_tokens for receipt in found) / sum(map(len, ids)) < 1.5
    for receipt in found:
        padding = 1 - receipt.num_tokens / receipt.num_padded_tokens
        assert receipt.padding_share == pytest.approx(padding, abs=1e-4)
        assert receipt.busy_s > 0
        assert 0 <= receipt.device_idle_share <= 1


@pytest.mark.parametrize(
    ("num_tokens", "num_padded_tokens", "share"),
    [(0, 0, None), (5, 0, None), (90, 100, 0.1), (7, 7, 0), (1, 3, 0.6667)],
)
def test_the_share_of_padding_is_of_what_was_computed(num_tokens, num_padded_tokens, share):
    """Unknown where a model does not say what it pads."""
    assert padding_share(num_tokens, num_padded_tokens) == share


@pytest.mark.parametrize(
    ("busy_s", "embed_s", "share"), [(0, 5, None), (3, 0, None), (9, 10, 0.1), (10, 10, 0), (10.1, 10, 0), (1, 4, 0.75)]
)
def test_the_share_of_idle_time_is_never_below_nothing(busy_s, embed_s, share):
    """A batch may end in another shard's time, so that a device seems busy for longer than it was a shard's."""
    assert idle_share(busy_s, embed_s) == share

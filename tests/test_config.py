"""The config: one set of names for flags, YAML and keyword arguments, and what of it decides the vectors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import engine
from engine.config import JobConfig, load_config, validated
from engine.errors import ConfigError
from engine.model_config import DEFAULT_MODEL, ModelConfig
from engine.models.openai import OpenAIEmbeddingModel
from engine.models.sentence_transformer import SentenceTransformerEmbeddingModel

LOCAL = SentenceTransformerEmbeddingModel.options
OPENAI = OpenAIEmbeddingModel.options
EVERY = frozenset(ModelConfig.model_fields)
DECIDES = {
    "model_args",
    "input_type",
    "long_texts",
    "chunk_overlap",
    "dtype",
    "max_length",
    "dimensions",
    "normalize",
    "prompt",
    "trust_remote_code",
    "text_column",
    "text_rows",
    "output_dtype",
}
"""What may decide the vectors besides the model itself, which is in the fingerprint by its content or commit."""
SPEED_AND_PLACE = {
    "device",
    "backend",
    "batch_size",
    "batch_tokens",
    "reuse",
    "shard_rows",
    "num_actors",
    "min_actors",
    "gpus_per_actor",
    "cpus_per_actor",
    "max_rejects",
    "if_in_use",
    "stall_s",
    "unsafe_single_writer",
    "max_cost",
    "base_url",
    "api_version",
    "organization",
    "key_file",
    "concurrent_requests",
    "requests_per_minute",
    "tokens_per_minute",
    "request_timeout_s",
    "give_up_s",
    "token_price",
    "address",
    "source",
    "output",
    "id_column",
    "keep",
}


def load(path: Path | None = None, **given):
    return load_config(None if path is None else str(path), **{"source": "in", "output": "out"} | given)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_source_and_output_are_all_that_is_needed():
    """Everything else has a default."""
    config = load_config(source="in", output="out")
    assert (config.source, config.output, config.model, config.text_column) == (("in",), "out", DEFAULT_MODEL, "text")


def test_a_file_has_the_names_of_the_keyword_arguments(tmp_path):
    """What is given as an argument wins; None was not given; the rest is the file's."""
    path = write(tmp_path, "source: [a, b]\noutput: o\nkeep: [x]\nprompt: 'é: '\nshard_rows: 7\n")
    config = load_config(str(path), output="p", shard_rows=None)
    assert (config.source, config.output, config.keep, config.prompt, config.shard_rows) == (
        ("a", "b"),
        "p",
        ("x",),
        "é: ",
        7,
    )


def test_every_field_survives_the_way_through_a_file(tmp_path):
    """A config that is dumped and loaded is the same."""
    import yaml

    config = load(model="custom:a.B", model_args={"x": [1]}, id_column="id", keep=["a"], gpus_per_actor=0.5)
    path = write(tmp_path, yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(str(path)) == config


def test_paths_and_single_values_are_taken_as_they_come(tmp_path):
    """A Path is a path, and one source needs no list."""
    config = load_config(source=tmp_path / "in", output=tmp_path / "out", keep="a")
    assert (config.source, config.output, config.keep) == ((str(tmp_path / "in"),), str(tmp_path / "out"), ("a",))
    assert load_config(source=[tmp_path, "b"], output="o").source == (str(tmp_path), "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must be a mapping"),
        ("just text", "must be a mapping"),
        ("1: a\n", "must be a mapping"),
        ("a: [b\n", "is not YAML"),
        ("a: !!python/object:os.system x\n", "is not YAML"),
        ("", "'source' is missing"),
        ("sorce: a\n", "unknown option 'sorce'"),
    ],
)
def test_a_file_that_is_no_config_is_a_message(tmp_path, text, message):
    """It names the file or the key, and no code of it is run."""
    with pytest.raises(ConfigError, match=message):
        load_config(str(write(tmp_path, text)))


def test_a_file_that_cannot_be_read_is_a_message(tmp_path):
    """Missing, a folder, or not UTF-8."""
    (tmp_path / "latin.yaml").write_bytes(b"prompt: \xe9\n")
    for path, message in (
        ("", "config '': Is a directory"),
        (tmp_path / "no.yaml", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "latin.yaml", "YAML"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(str(path))


def test_an_unknown_option_is_named_with_all_that_are_known():
    """A typing mistake is never ignored."""
    with pytest.raises(ConfigError, match="unknown option 'shard_row'; known are: ") as caught:
        load(shard_row=3)
    assert set(re.split(r"[ ,:;]+", caught.value.message)) >= set(JobConfig.model_fields)


def test_all_that_is_wrong_is_said_at_once():
    """One message, one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(sauce="x", shard_rows=0)
    for problem in ("unknown option 'sauce'", "'source' is missing", "'output' is missing", "shard_rows"):
        assert problem in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_rows": 0}, "shard_rows: .*greater than or equal to 1"),
        ({"shard_rows": "many"}, "shard_rows: .*integer"),
        ({"shard_rows": 1.5}, "shard_rows"),
        ({"dtype": "int3"}, "dtype: .*float32.*bfloat16"),
        ({"gpus_per_actor": 0}, "gpus_per_actor"),
        ({"gpus_per_actor": 1.5}, "neither a share of one GPU nor a whole number"),
        ({"max_rejects": -1}, "max_rejects"),
        ({"source": []}, "source"),
        ({"source": 5}, "source"),
        ({"source": [5]}, "source"),
        ({"output": ""}, "output: is empty"),
        ({"source": ""}, "source: is empty"),
        ({"keep": ["a", ""]}, "keep: is empty"),
        ({"reuse": [""]}, "reuse: is empty"),
        ({"id_column": ""}, "id_column: is empty"),
        ({"text_column": ""}, "text_column: is empty"),
        ({"gpus_per_actor": "inf"}, "gpus_per_actor: .*finite"),
        ({"max_cost": float("nan")}, "max_cost: .*finite"),
        ({"keep": {"a": 1}}, "keep"),
        ({"normalize": "perhaps"}, "normalize"),
        ({"model": "all-MiniLM-L6-v2"}, "is not provider:name"),
        ({"model": "custom:"}, "is not provider:name"),
        ({"model": ":x"}, "is not provider:name"),
        ({"num_actors": 1, "min_actors": 2}, "min_actors 2 is more than num_actors 1"),
        ({"keep": ["embedding"]}, "'embedding' cannot be kept"),
        ({"keep": ["_source_row"]}, "'_source_row' cannot be kept"),
        ({"keep": ["_text_hash"]}, "'_text_hash' cannot be kept"),
        ({"keep": ["id"]}, "'id' cannot be kept"),
        ({"id_column": "embedding"}, "'embedding' cannot be kept"),
        ({"id_column": "a", "keep": ["a"]}, "'a' is kept twice"),
        ({"keep": ["a", "a"]}, "'a' is kept twice"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(options, message):
    """The field, and what is wrong with it."""
    with pytest.raises(ConfigError, match=message):
        load(**options)


def test_a_column_named_id_can_be_the_id():
    """Only a made id is in its way."""
    assert load(id_column="id", keep=["year"]).kept_columns == ("id", "year")


@pytest.mark.parametrize(
    "name", ["api_key", "apikey", "openai_api_key", "token", "hf_token", "AUTH", "client_secret", "password"]
)
def test_a_secret_among_the_arguments_is_refused(name):
    """They are stored with the output; the value is in no message."""
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        load(model="custom:a.B", model_args={name: "hunter2"})
    assert "hunter2" not in caught.value.message


KEYS = ("sk-proj-0123456789abcdef", "hf_0123456789abcdef", "0123456789abcdefghijABCDEFGHIJ0123456789")


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_place_of_its_file_is_refused(key):
    """`--key-file "$OPENAI_API_KEY"` would store the key with the output; the message does not have it either."""
    with pytest.raises(ConfigError, match="key_file: looks like a key itself") as caught:
        load(model="openai:x", key_file=key)
    assert key not in caught.value.message


@pytest.mark.parametrize(
    "name", ["key", "openai.key", "./sk-of-the-company", "/run/secrets/hf_token_of_the_team", "~/.key"]
)
def test_the_name_of_a_file_is_no_key(name):
    """Not even that of one that is named after keys, if it has its folder."""
    assert load(model="openai:x", key_file=name).key_file == name


@pytest.mark.parametrize("end", ["/", "/proxy/", "#"])
def test_a_key_in_an_address_is_refused(end):
    """In its path or its fragment; the message does not have it."""
    with pytest.raises(ConfigError, match=r"base_url: an address with .* a key would be stored") as caught:
        load(model="openai:x", base_url=f"http://127.0.0.1/v1{end}{KEYS[0]}")
    assert KEYS[0] not in caught.value.message


@pytest.mark.parametrize("name", ["max_tokens", "tokenizer", "author", "keys", "authority"])
def test_what_only_sounds_like_a_secret_is_taken(name):
    """Tokens are what models eat."""
    assert load(model="custom:a.B", model_args={name: 1}).model_args == {name: 1}


@pytest.mark.parametrize("field", JobConfig.model_fields.items(), ids=lambda field: field[0])
def test_every_option_is_described(field):
    """The description is its help text."""
    assert len(field[1].description) > 10


def test_the_fingerprint_has_what_decides_vectors_and_nothing_else():
    """Whoever adds an option has to say here which it is; the model and its revision are in by identity, and a template in
    place of the text column.
    """
    assert load().settings(EVERY).keys() == DECIDES
    assert JobConfig.model_fields.keys() - DECIDES - {"model", "revision", "text_template"} == SPEED_AND_PLACE
    of_job = {"text_column", "text_rows", "output_dtype"}
    assert validated(ModelConfig, {}).settings(EVERY).keys() == DECIDES - of_job


def test_the_fingerprint_has_only_what_the_model_goes_by():
    """A setting of other models can neither change these vectors nor make an output of them another's."""
    of_job = {"text_column", "text_rows", "output_dtype"}
    local = {
        "dtype",
        "max_length",
        "dimensions",
        "normalize",
        "prompt",
        "trust_remote_code",
        "long_texts",
        "chunk_overlap",
    }
    assert load().settings(LOCAL).keys() == local | of_job
    assert load().settings(OPENAI).keys() == {"model_args", "long_texts", "dimensions", "prompt"} | of_job


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cpu"},
        {"batch_size": 3},
        {"batch_tokens": 300},
        {"backend": "torch"},
        {"shard_rows": 3},
        {"num_actors": 3, "min_actors": 2},
        {"gpus_per_actor": 0.5},
        {"cpus_per_actor": 3},
        {"source": "elsewhere", "output": "elsewhere"},
        {"address": "auto"},
        {"max_rejects": 0},
        {"if_in_use": "wait", "stall_s": 3.0},
        {"max_cost": 1.0},
        {"base_url": "http://127.0.0.1:1/v1"},
        {"concurrent_requests": 3, "requests_per_minute": 3, "tokens_per_minute": 3},
    ],
)
def test_speed_and_place_are_not_in_the_fingerprint(options):
    """They may change from run to run."""
    assert load(**options).settings(EVERY) == load().settings(EVERY)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"max_length": 3},
        {"dimensions": 3},
        {"normalize": True},
        {"prompt": "q: "},
        {"trust_remote_code": True},
        {"text_column": "body"},
        {"output_dtype": "int8"},
        {"model_args": {"a": 1}},
        {"long_texts": "chunk"},
        {"input_type": "clustering"},
    ],
)
def test_what_decides_the_vectors_is_in_the_fingerprint(options):
    """Vectors of two such settings must not mix."""
    assert load(**options).settings(EVERY) == load().settings(EVERY) | options


def test_a_config_cannot_be_changed():
    """It travels, and is the same everywhere."""
    with pytest.raises(Exception, match="frozen"):
        load().output = "other"


def test_an_option_named_path_is_unknown_like_any_other():
    """The name of a parameter of ours is no option."""
    with pytest.raises(ConfigError, match="unknown option 'path'"):
        engine.plan(source="a", output="b", path="x")


def test_a_date_that_is_none_is_a_message(tmp_path):
    """YAML takes it for a date and fails."""
    (tmp_path / "c.yaml").write_text("prompt: 2024-13-45\n")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    "args",
    [
        {"client": {"api_key": 1}},
        {"a": [{"token": 1}]},
        {"private_key": 1},
        {"openai_key": 1},
        {"headers": {"Authorization": 1}},
    ],
)
def test_a_secret_is_refused_at_any_depth(args):
    """Arguments are stored with the output, all of them."""
    with pytest.raises(ConfigError, match="looks like a secret"):
        load_config(source="a", output="b", model="custom:a.B", model_args=args)


def test_an_output_in_a_jobs_copy_of_its_working_directory_is_refused(tmp_path, monkeypatch):
    """Where a relative path of a submitted job leads; Ray deletes it, and the job would say that all is well."""
    folder = tmp_path / "working_dir_files/_ray_pkg_0123456789abcdef"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(
        ConfigError, match=r"output: out is in the copy of the working directory.*give an absolute path"
    ):
        load_config(source="in", output="out")
    for kept in (str(tmp_path / "out"), "s3://bucket/out", "~/out"):
        assert load_config(source="in", output=kept).output == kept

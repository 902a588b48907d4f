"""The command line: what it prints where, its exit codes, and its errors, each one message."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import yaml

from engine.cli import main
from tests.kills import ROOT, Job
from tests.test_verification import Output

HASH = ["--model", "custom:tests.models.HashModel"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(2):
        rows = [f"text {row} of file {number}" for row in range(50)]
        rows[7] = None if number else ""
        pq.write_table(
            pa.table({"name": [f"{number}-{row}" for row in range(50)], "text": rows}), folder / f"{number}.parquet"
        )
    return folder


@pytest.fixture
def job(texts, tmp_path) -> list[str]:
    """The options of a small job."""
    return ["--source", str(texts), "--output", str(tmp_path / "out"), *HASH, "--shard-rows", "20", "--device", "cpu"]


def output(out: str | Path, path: Path) -> str:
    return str(path / out)


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_the_verbs_tell_one_story(job, tmp_path, capfd):
    """Plan, run, run again, status, verify: the counts add up, results are on stdout, progress is on stderr."""
    out = str(tmp_path / "out")
    assert main(["plan", *job]) == 0
    assert "100 rows in 6 shards of 2 files" in capfd.readouterr().out
    assert not Path(out).exists()
    assert main(["run", *job]) == 0
    told = capfd.readouterr()
    assert "embedded  98 rows in 6 shards" in told.out
    assert "rejected  2 rows: 1 x empty text, 1 x null" in told.out
    assert "100%  100/100 rows" in told.err
    assert main(["run", *job]) == 0
    assert "100 rows were done already" in capfd.readouterr().out
    assert main(["status", out]) == 0
    told = capfd.readouterr()
    assert "left      nothing" in told.out
    assert "embedded  98 rows in 6 shards" in told.out
    for level in ("quick", "footers", "full", "sample"):
        assert main(["verify", out, "--level", level]) == 0
        assert f"verdict   good, at level {level}" in capfd.readouterr().out


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_json_is_one_object_on_stdout_whatever_workers_print(job, tmp_path, capfd):
    """What a custom model prints in its actor goes to stderr."""
    model = ["--model", "custom:tests.models.ChattyModel"]
    assert main(["run", *job, *model, "--json"]) == 0
    told = capfd.readouterr()
    result = json.loads(told.out)
    assert (result["num_rows"], result["num_rejects"], result["pending_rows"]) == (98, 2, 0)
    for command in (["plan", *job, *model], ["status", str(tmp_path / "out")], ["verify", str(tmp_path / "out")]):
        assert main([*command, "--json"]) == 0
        assert isinstance(json.loads(capfd.readouterr().out), dict)


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_log_lines_say_what_is_initialised_started_and_done(job, capfd):
    """With --verbose: the lines that Kura's users know, and no text in them."""
    assert main(["run", *job, "--verbose"]) == 0
    told = capfd.readouterr().err
    assert "embedding started: 100 texts in 6 shards" in told
    assert "embedding done: 98 embeddings, 2 rejects" in told
    assert "of file" not in told


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_more_rejects_than_allowed_is_exit_code_5_and_loses_nothing(job, tmp_path, capfd):
    """All that can be embedded is; the count is over all runs of the output."""
    assert main(["run", *job, "--max-rejects", "1"]) == 5
    assert "2 rows are rejected, and --max-rejects is 1" in capfd.readouterr().err
    assert pads.dataset(tmp_path / "out/data").count_rows() == 98
    assert main(["run", *job, "--max-rejects", "1"]) == 5
    assert main(["run", *job, "--max-rejects", "2"]) == 0


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_a_model_that_fails_is_exit_code_4_in_one_message(job, capfd):
    """No traceback of ours, none of Ray's."""
    assert main(["run", *job, "--model", "custom:tests.models.BrokenModel", "--json"]) == 4
    told = capfd.readouterr()
    assert json.loads(told.out)["exit_code"] == 4
    assert "error: the model hash-8 fails on every text" in told.err
    assert "Traceback" not in told.err


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_a_model_that_cannot_be_built_on_its_actor_is_one_message(job, capfd):
    """An error of a constructor arrives as what it is."""
    arguments = ["--model-args", '{"no_such_argument": 1}']
    assert main(["run", *job, *arguments]) == 2
    assert "cannot build tests.models.HashModel from model_args ['no_such_argument']" in capfd.readouterr().err


def harmed(texts: Path) -> dict[str, tuple[Callable[[], None], list[str], int, str]]:
    """What can happen to a job between two runs: what is done to its files, options, the exit code and the message."""
    good = (texts / "0.parquet").read_bytes()
    stat = (texts / "0.parquet").stat()

    def restored(name: str, data: bytes | None) -> None:
        for path in texts.glob("x*"):
            path.unlink()
        (texts / "0.parquet").write_bytes(good)
        os.utime(texts / "0.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        if data is not None:
            (texts / name).write_bytes(data)

    other_type = pa.BufferOutputStream()
    pq.write_table(pa.table({"name": ["a"], "text": [1]}), other_type)
    return {
        "another model": (
            lambda: restored("", None),
            ["--model-args", '{"dimension": 9}'],
            3,
            "model_args: {} in the output",
        ),
        "a corrupt file": (lambda: restored("x.parquet", good[:-9]), [], 2, "cannot be read as Parquet"),
        "an empty file": (lambda: restored("x.parquet", b""), [], 2, "cannot be read as Parquet"),
        "a column of another type": (lambda: restored("x.parquet", other_type.getvalue()), [], 2, "is int64, not text"),
        "a renamed input": (
            lambda: (restored("", None), (texts / "0.parquet").rename(texts / "1.parquet")),
            [],
            3,
            "looks like 0.parquet under another name",
        ),
    }


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_what_goes_wrong_between_two_runs_is_one_message_and_touches_nothing(job, texts, tmp_path, capfd):
    """Each with its exit code; what was committed is still there, byte for byte, and good."""
    assert main(["run", *job]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for name, (harm, options, code, message) in harmed(texts).items():
        harm()
        capfd.readouterr()
        assert main(["run", *job, *options]) == code, name
        assert message in capfd.readouterr().err, name
        assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.soak
def test_a_publisher_that_cannot_write_ends_the_run_and_the_next_one_goes_on(job, tmp_path, capfd):
    """Its message arrives whole, with exit code 1; parts that were written are adopted."""
    (tmp_path / "out/_engine").mkdir(parents=True)
    obstacle = tmp_path / "out/_engine/rejects"
    obstacle.write_text("")
    assert main(["run", *job]) == 1
    told = capfd.readouterr().err
    assert f"{obstacle} is in the way: it must be a folder" in told
    assert "Traceback" not in told
    obstacle.unlink()
    assert main(["run", *job]) == 0
    assert main(["verify", str(tmp_path / "out"), "--level", "full"]) == 0


@pytest.mark.ray
def test_an_interrupt_stops_cleanly_and_the_same_command_resumes(shared_ray, tmp_path):
    """Ctrl-C: exit code 130, what is committed is kept, and how to go on is said. SIGTERM, as clusters send it, is in test_cluster."""
    job = Job(tmp_path, None, delay_s=0.15, num_actors=1)
    process = job.start()
    job.wait_for_commits(4, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    ours = [
        line for line in stderr.splitlines() if b"pid=" not in line
    ]  # a worker may be interrupted in a finalizer, and say so
    assert b"run the same command again to go on" in stderr
    assert not any(b"Traceback" in line for line in ours)
    assert 4 <= job.num_committed() < 60
    job.finish("--address", shared_ray)
    job.check()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--text-column", "body"], 2, "has no column 'body'; it has: name, text"),
        (["--source", "/no/such/folder"], 2, "there is no file or folder '/no/such/folder'"),
        (["--model", "nobody:x"], 2, "unknown provider 'nobody'"),
        (["--model", "MiniLM"], 2, "is not provider:name"),
        (["--shard-rows", "many"], 2, "shard_rows: Input should be a valid integer"),
        (["--dtype", "float8"], 2, "dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
        (["--no-such-option"], 2, "No such option"),
        (["--model-args", "{"], 2, "model_args: not JSON"),
        (["--device", "cuda", "--keep", "embedding"], 2, "the column 'embedding' cannot be kept"),
    ],
)
def test_bad_input_is_one_message_with_exit_code_2_and_writes_nothing(job, tmp_path, capfd, change, code, message):
    """Each says what is wrong and what to do, on stderr, before anything is written."""
    assert main(["run", *job, *change]) == code
    told = capfd.readouterr()
    assert message in told.err
    assert told.err.startswith("error: ")
    assert "Traceback" not in told.err
    assert not told.out
    assert not (tmp_path / "out").exists()


def test_an_option_that_is_missing_is_named(texts, capfd):
    """No output: which option is missing is said."""
    assert main(["plan", "--source", str(texts)]) == 2
    assert "'output' is missing" in capfd.readouterr().err


def test_a_file_of_options_and_flags_that_win(texts, tmp_path, capfd):
    """The same names as the flags'; an unknown key is an error that names the known ones."""
    path = tmp_path / "job.yaml"
    options = {"source": str(texts), "output": str(tmp_path / "out"), "model": HASH[1], "shard_rows": 20}
    path.write_text(yaml.safe_dump(options))
    assert main(["plan", "--config", str(path), "--shard-rows", "50", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["num_shards"] == 2
    path.write_text(yaml.safe_dump(options | {"shard_row": 20}))
    assert main(["plan", "--config", str(path)]) == 2
    assert "unknown option 'shard_row'; known are: address," in capfd.readouterr().err


@pytest.mark.parametrize("command", ["status", "verify"])
def test_a_folder_that_is_no_output_is_said_to_be_none(tmp_path, capfd, command):
    """Exit code 2, and the path to check."""
    assert main([command, str(tmp_path)]) == 2
    assert "is not an output of the engine" in capfd.readouterr().err


def test_help_fits_80_columns_and_names_every_option():
    """Every field of the config is an option with a help text."""
    from engine.config import JobConfig

    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1"}
    told = subprocess.run(
        [sys.executable, "-m", "engine", "run", "--help"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert max(len(line) for line in told.splitlines()) <= 80
    for name in JobConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in told


def said_to(stdout: int, *arguments: str, **environment: str) -> tuple[int, str]:
    """Return the exit code and stderr of a command whose stdout is a descriptor."""
    command = [sys.executable, "-m", "engine", *arguments]
    told = subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(stdout)
    return told.returncode, told.stderr


def unread() -> int:
    """Return the end of a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_stdout_that_is_full_is_a_message_and_one_that_nobody_reads_is_none(tmp_path, form):
    """The exit code stays that of what was found: scripts go by it."""
    made = Output(tmp_path)
    made.parts()[0].unlink()
    command = ["verify", str(made.out), *form]
    assert said_to(unread(), *command) == (6, "")
    code, stderr = said_to(os.open("/dev/full", os.O_WRONLY), *command)
    assert code == 6
    assert stderr.startswith("error: cannot write the result to stdout (No space left on device)")
    assert stderr.count("\n") == 1
    code, stderr = said_to(os.open("/dev/full", os.O_WRONLY), "status", str(made.out), *form)
    assert (code, stderr.count("\n")) == (1, 1)


def test_an_error_that_cannot_be_printed_as_json_is_still_one_message(tmp_path):
    """With its exit code."""
    code, stderr = said_to(os.open("/dev/full", os.O_WRONLY), "status", str(tmp_path), "--json")
    assert code == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path):
    """An ASCII terminal, and a folder with an umlaut in its name."""
    (tmp_path / "ö").mkdir()
    made = Output(tmp_path / "ö")
    with (tmp_path / "stdout").open("wb") as file:
        assert said_to(os.dup(file.fileno()), "status", str(made.out), PYTHONIOENCODING="ascii") == (0, "")
    assert rb"/\xf6/out" in (tmp_path / "stdout").read_bytes()


def test_the_name_alone_prints_the_help_and_no_error(capfd):
    """And flags take no value there."""
    assert main([]) == 2
    told = capfd.readouterr()
    assert "plan" in told.out + told.err
    assert "error" not in told.err
    for verb in ("run", "verify", "gc"):
        assert main([verb, "--help"]) == 0
        assert capfd.readouterr().out.count("<bool>") == 1  # typer's own, of --help


def test_the_version_is_printed(capfd):
    """For reports of bugs."""
    from engine.version import __version__

    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"{__version__}\n"


def test_planning_and_helping_load_no_model_library(job):
    """Plan starts in a fraction of a second: neither torch nor ray is imported."""
    code = (
        "import sys; from engine.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or [name for name in ('torch', 'ray', 'openai', 'transformers') if name in sys.modules] or 0)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, "plan", *job], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr

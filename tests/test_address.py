"""Which Ray a run joins, and what it says where there is none; and that the one it starts is for this machine alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from ipaddress import ip_address

import psutil
import pytest
from ray._private import ray_constants

import engine
from engine import ray_settings
from engine.errors import ConfigError
from engine.pipeline import cluster
from tests.builders import free_port, write_source
from tests.kills import ROOT


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that needs a Ray, where none is noted but what a test notes."""
    write_source(tmp_path / "in/a.parquet", {"text": ["a text"]})
    job = {"source": tmp_path / "in", "output": tmp_path / "out", "model": "custom:tests.models.HashModel"}
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return lambda **options: engine.run(**job, **options, progress=False)


def after_import(code: str, **environment: str) -> str:
    """Return what a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_an_address_where_nothing_answers_is_named_at_once_with_where_it_is_from(run, tmp_path, monkeypatch):
    """Of --address, of RAY_ADDRESS, or of the file that a Ray leaves that was killed: Ray itself would try for ten minutes."""
    (tmp_path / "ray").mkdir()
    note = tmp_path / "ray/ray_current_cluster"
    note.write_text(f"127.0.0.1:{free_port()}\n")
    with pytest.raises(ConfigError, match=rf"nothing answers at {note.read_text().strip()} .*{note} names it"):
        run()
    gone = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", gone)
    with pytest.raises(ConfigError, match=rf"nothing answers at {gone} .*in RAY_ADDRESS: .*Unset it"):
        run()
    other = f"127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=rf"nothing answers at {other} .*that --address gives"):
        run(address=other)


@pytest.mark.parametrize(
    ("scheme", "variable"), [("ray://127.0.0.1:10001", ""), ("http://127.0.0.1:8265", "RAY_ADDRESS")]
)
def test_an_address_from_which_a_run_cannot_be_driven_is_refused(run, monkeypatch, scheme, variable):
    """Ray Client fails inside the stream, and the address of the Jobs API is not a Ray's."""
    if variable:
        monkeypatch.setenv(variable, scheme)
    with pytest.raises(ConfigError, match=rf"{variable or '--address'} is a {scheme.partition(':')[0]}:// .*submit it"):
        run(**({} if variable else {"address": scheme}))


def test_what_is_not_an_address_is_refused(run):
    """Before Ray is asked."""
    with pytest.raises(ConfigError, match="'head' is not an address: give HOST:PORT"):
        run(address="head")


def test_a_process_that_has_joined_by_ray_client_is_refused(run, monkeypatch):
    """It counts as one that has a Ray."""
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.util.client.ray.is_connected", lambda: True)
    with pytest.raises(ConfigError, match=r"Ray Client \(ray://\).*submit it as a job"):
        run()


def test_a_cluster_that_asks_for_a_token_is_not_called_absent(tmp_path):
    """Ray's own words about tokens come through: something answers there, and the way in is missing."""
    code = (
        "from engine.errors import ConfigError\nfrom engine.pipeline import cluster\nimport sys\n"
        "try:\n    cluster.connected(sys.argv[1]).__enter__()\nexcept ConfigError as error:\n    print(error.message)"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        told = after_import(
            code.replace("sys.argv[1]", repr(address)),
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN="",
            RAY_AUTH_TOKEN_PATH="",
            HOME=str(tmp_path),
        )
    assert told.startswith(f"cannot join the Ray at {address}, by --address (AuthenticationError: ")
    assert "ray get-auth-token --generate" in told


def test_a_home_where_ray_cannot_keep_its_token_is_named(tmp_path):
    """A Ray that is started here asks for a token, which it makes."""
    (tmp_path / "file").touch()
    code = (
        "from engine.errors import ConfigError\nfrom engine.pipeline import cluster\n"
        "try:\n    cluster.connected('local').__enter__()\nexcept ConfigError as error:\n    print(error.message)"
    )
    home = str(tmp_path / "file")
    told = after_import(code, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH="", HOME=home)
    assert told.startswith("cannot start a Ray on this machine (")
    assert home in told


def test_ray_has_the_engines_settings_if_the_engine_is_imported_first(monkeypatch):
    """Ray reads them as it is imported; too late is known, and what the user has set is left."""
    unset = dict.fromkeys(ray_settings.SETTINGS, "")
    clear = f"import os\nfor name in {list(unset)}: del os.environ[name]\n"
    late = "from engine.ray_settings import came_too_late, SETTINGS\nprint(came_too_late, SETTINGS.items() <= os.environ.items())"
    assert after_import(f"{clear}import engine, ray\n{late}") == "False True"
    assert after_import(f"{clear}import ray, engine\n{late}") == "True True"
    monkeypatch.setenv("RAY_task_oom_retries", "7")
    monkeypatch.setenv("RAY_timeout_ms_task_wait_for_death_info", "8")
    assert after_import(f"import os, ray, engine\n{late}") == "False False"


@pytest.mark.ray
def test_a_ray_that_the_engine_starts_listens_for_this_machine_alone(monkeypatch, caplog):
    """All its processes: by default Ray's listen on every interface. A Ray that is there already is told if settings came too late."""
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)  # the tests' own setting is what is undone here
    monkeypatch.setattr(ray_settings, "came_too_late", True)
    with cluster.connected("local"):
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        listening = {
            (process.name(), connection.laddr.ip.removeprefix("::ffff:"))
            for process in processes
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert "settings" not in caplog.text
        with cluster.connected(None):
            assert "`import engine` before `import ray`" in caplog.text
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}
    assert [name for name, ip in listening if not ip_address(ip).is_loopback] == []
    assert ray_constants.ENABLE_RAY_CLUSTER

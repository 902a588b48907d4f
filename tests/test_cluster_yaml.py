"""cluster.yaml, against Ray's own schema, and against what that lets through."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
EC2_PARAMETERS = {
    "BlockDeviceMappings",
    "IamInstanceProfile",
    "ImageId",
    "InstanceMarketOptions",
    "InstanceType",
    "KeyName",
    "MetadataOptions",
    "NetworkInterfaces",
    "Placement",
    "SecurityGroupIds",
    "SubnetId",
    "SubnetIds",  # Ray's own: it takes one of them
    "TagSpecifications",
    "UserData",
}
"""Of EC2's RunInstances, those that a cluster like this has a use for."""
RESOURCES = {"m6i.xlarge": (4, 0), "g6.xlarge": (4, 1)}
"""CPUs and GPUs of the instance types; Ray believes what the file says."""
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|\bsk-[A-Za-z0-9]{8,}|hf_[A-Za-z0-9]{8,}|BEGIN [A-Z ]*PRIVATE KEY|aws_secret|RAY_AUTH_TOKEN="
)


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def accepted_by_ray(config: dict[str, Any]) -> bool:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))
    return True


def problems(config: dict[str, Any]) -> list[str]:
    """Find what Ray's schema does not: it takes any node_config, any counts and any commands."""
    found = []
    nodes = config["available_node_types"]
    for name, node in nodes.items():
        settings, resources = node["node_config"], node.get("resources", {})
        found += [f"{name}: unknown {key}" for key in settings.keys() - EC2_PARAMETERS]
        found += [
            f"{name}: no {key}"
            for key in ("IamInstanceProfile", "ImageId", "SecurityGroupIds", "SubnetIds")
            if key not in settings
        ]
        cpus, gpus = RESOURCES[settings["InstanceType"]]
        if resources.get("CPU", 0) > cpus or resources.get("GPU", 0) != gpus:
            found.append(f"{name}: an {settings['InstanceType']} has not {resources}")
        if settings.get("InstanceMarketOptions") not in (None, {"MarketType": "spot"}):
            found.append(f"{name}: InstanceMarketOptions")
        if not node.get("min_workers", 0) <= node.get("max_workers", 0) <= config["max_workers"]:
            found.append(f"{name}: min_workers, max_workers")
    if "InstanceMarketOptions" in nodes[config["head_node_type"]]["node_config"]:
        found.append("the head is on spot, and the cluster fails with it")
    if node_type := nodes.get("cpu_api"):
        found += [f"cpu_api: {problem}" for problem in problems_of_key(config, node_type)]
    for start in ("head_start_ray_commands", "worker_start_ray_commands"):
        if not any("RAY_AUTH_MODE=token ray start" in command for command in config[start]):
            found.append(f"{start}: no token is asked for")
    if SECRET.search(yaml.safe_dump(config)):
        found.append("a key")
    return found


def problems_of_key(config: dict[str, Any], node: dict[str, Any]) -> Iterator[str]:
    """A key comes by the node's own rights, into a file that only its user reads and its container sees; other nodes have none."""
    commands = node.get("initialization_commands", [])
    if commands[:2] != config["initialization_commands"]:
        yield "its own commands come instead of the common ones, which it has not"
    fetching = [command for command in commands if "get-parameter" in command]
    if not fetching or any(not command.startswith("umask 077 && ") for command in fetching):
        yield "a key that others can read"
    folders = {str(Path(command.rpartition("> ")[2]).parent) for command in fetching}
    mounted = node.get("docker", {}).get("worker_run_options", [])
    if mounted != [f"--volume {folder}:{folder}:ro" for folder in folders]:
        yield "its container does not see the file of the key"
    profile = node["node_config"]["IamInstanceProfile"]
    others = [other for other in config["available_node_types"].values() if other is not node]
    if profile in [other["node_config"]["IamInstanceProfile"] for other in others]:
        yield "others have the rights to its key"
    if any("get-parameter" in str(other) for other in [*others, config["initialization_commands"]]):
        yield "others fetch its key"


def test_ray_accepts_the_file(config):
    """`ray up` validates and fills in the file as the released Ray does, without an account."""
    assert accepted_by_ray(config)


def test_our_stricter_check_accepts_the_file(config):
    """Names, counts, rights and tokens are in order, and no key is in it."""
    assert problems(config) == []


def test_the_file_holds_no_key_and_no_account_in_comments_either():
    """Nothing in the file, comments included, looks like a secret or an account number."""
    text = (ROOT / "cluster.yaml").read_text()
    assert not SECRET.search(text)
    assert not re.search(r"\b\d{12}\b", text)


def test_workers_are_on_spot_and_can_fall_back_to_on_demand(config):
    """The spot type runs, and a type of the same machine without spot stands by."""
    nodes = config["available_node_types"]
    spot = [node for node in nodes.values() if "InstanceMarketOptions" in node["node_config"]]
    assert spot
    assert spot[0]["max_workers"] > 0
    standing_by = nodes["gpu_on_demand"]
    assert "InstanceMarketOptions" not in standing_by["node_config"]
    assert standing_by["resources"] == spot[0]["resources"]


def test_api_jobs_have_cpu_workers_from_zero_with_the_key_where_the_comment_says(config):
    """They come with the work and have no GPU; the path in the comment's --key-file is the one that the key is written to."""
    node = config["available_node_types"]["cpu_api"]
    assert (node["min_workers"], node["resources"]) == (0, {"CPU": 4})
    assert node["max_workers"] > 0
    (file,) = re.findall(r"--key-file (\S+)", (ROOT / "cluster.yaml").read_text())
    assert node["initialization_commands"][-1].endswith(f"> {file}")


def test_commands_are_words_that_a_shell_takes(config):
    """Every command of every list parses."""
    lists = [value for name, value in config.items() if name.endswith("_commands")]
    lists.append(config["available_node_types"]["cpu_api"]["initialization_commands"])
    commands = [command for commands in lists for command in commands]
    assert len(commands) > 10
    for command in commands:
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0, command


def test_versions_are_those_of_the_constraints(config):
    """The image's Ray and the installed torch are the tested ones, and everything else goes through constraints.txt."""
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    assert config["docker"]["image"].startswith(f"rayproject/ray:{pins['ray']}-py311")
    installs = [part for command in config["setup_commands"] for part in command.split("&&") if "pip install" in part]
    assert f"torch=={pins['torch']}" in installs[0]
    assert all("--constraint constraints.txt" in install for install in installs)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["available_node_types"]["gpu_spot"]["node_config"].update(InstanceMarketOption={}), "unknown"),
        (lambda c: c["available_node_types"]["gpu_on_demand"]["node_config"].pop("ImageId"), "no ImageId"),
        (lambda c: c["available_node_types"]["gpu_spot"].update(resources={"CPU": 4, "GPU": 8}), "has not"),
        (lambda c: c["available_node_types"]["gpu_spot"].update(max_workers=9), "max_workers"),
        (lambda c: c.update(worker_start_ray_commands=["ray start --address=$RAY_HEAD_IP:6379"]), "token"),
        (lambda c: c["available_node_types"]["cpu_api"].update(resources={"CPU": 4, "GPU": 1}), "has not"),
        (lambda c: c["available_node_types"]["cpu_api"]["initialization_commands"].pop(0), "common ones"),
        (lambda c: c["available_node_types"]["cpu_api"]["initialization_commands"].pop(), "others can read"),
        (lambda c: c["available_node_types"]["cpu_api"].pop("docker"), "does not see"),
        (
            lambda c: c["available_node_types"]["cpu_api"]["node_config"].update(
                IamInstanceProfile=c["available_node_types"]["gpu_spot"]["node_config"]["IamInstanceProfile"]
            ),
            "rights to its key",
        ),
        (
            lambda c: c["initialization_commands"].append(
                c["available_node_types"]["cpu_api"]["initialization_commands"][-1]
            ),
            "others fetch",
        ),
        (lambda c: c["setup_commands"].append("export OPENAI_API_KEY=sk-abcdefgh12345678"), "key"),
    ],
)
def test_mistakes_that_ray_lets_through_are_found(config, change, problem):
    """Each of these passes Ray's validator and fails ours."""
    change(config)
    assert accepted_by_ray(config)
    assert any(problem in found for found in problems(config))


def test_a_misspelt_key_of_the_file_itself_is_refused_by_ray(config):
    """Ray's schema is closed where it is Ray's own."""
    with pytest.raises(Exception, match="max_worker_count"):
        accepted_by_ray(config | {"max_worker_count": 3})

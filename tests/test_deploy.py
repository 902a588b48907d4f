"""
deploy/rayjob.yaml, held against the schema of KubeRay's RayJob, and against what that lets through.

The schema is that of the CRD, which a cluster's API server goes by; it describes the pods to the last field. tests/data/README.md says
where it comes from. A server drops fields that it does not know: here they are errors.
"""

from __future__ import annotations

import copy
import gzip
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from engine.cli import main
from engine.errors import ConfigError
from tests.test_cluster_yaml import SECRET

ROOT = Path(__file__).parent.parent
MANIFEST = ROOT / "deploy" / "rayjob.yaml"
SECRET_NAME = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


@pytest.fixture
def job() -> dict[str, Any]:
    """The RayJob, with nothing shared between its pods, so that one of them can be broken alone."""
    (found,) = [document for document in documents() if document["kind"] == "RayJob"]
    return unshared(found)


@cache
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFEST.read_text()))


def unshared(value: Any) -> Any:
    """Copy without the identities that YAML's anchors make, which copy.deepcopy keeps."""
    if isinstance(value, dict):
        return {key: unshared(inner) for key, inner in value.items()}
    return [unshared(inner) for inner in value] if isinstance(value, list) else value


@cache
def schema() -> dict[str, Any]:
    """Return the schema of a RayJob, closed: what it does not name is an error."""
    found = json.loads(gzip.decompress((ROOT / "tests" / "data" / "kuberay-rayjob-v1.json.gz").read_bytes()))
    close(found)
    return found


def close(part: dict[str, Any]) -> None:
    if "properties" in part:
        part.setdefault("additionalProperties", False)
    inner = [*part.get("properties", {}).values(), part.get("items"), part.get("additionalProperties")]
    for one in inner:
        if isinstance(one, dict):
            close(one)


def misfits(document: dict[str, Any], *steps: str) -> list[str]:
    """List unknown fields, missing fields and wrong types, by the schema, or by what is below `steps` in it."""
    part = schema()
    for step in steps:
        part = part["items"] if step == "[]" else part["properties"][step]
    errors = Draft7Validator(part).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def pods(job: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    cluster = job["spec"]["rayClusterSpec"]
    yield "submitter", job["spec"]["submitterPodTemplate"]["spec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


def problems(job: dict[str, Any]) -> list[str]:
    """Find what the fields and types let through."""
    found = []
    cluster = job["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]
    if cluster.get("authOptions", {}).get("mode") != "token":
        found.append("no token is asked for")
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress") or "headService" in head:
        found.append("head: a service that is open to the outside")
    if (head["rayStartParams"].get("num-cpus"), head["rayStartParams"].get("num-gpus")) != ("0", "0"):
        found.append("head: work is sent to it")
    for name, pod in pods(job):
        found += [f"{name}: {problem}" for problem in problems_of_pod(pod)]
    for group in cluster["workerGroupSpecs"]:
        low, now, high = (group[key] for key in ("minReplicas", "replicas", "maxReplicas"))
        if not low <= now <= high:
            found.append(f"{group['groupName']}: minReplicas, replicas, maxReplicas")
    if SECRET.search(yaml.safe_dump(job)):
        found.append("a key")
    return found


def problems_of_pod(pod: dict[str, Any]) -> Iterator[str]:
    if pod.get("securityContext", {}).get("runAsNonRoot") is not True:
        yield "may run as root"
    if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "is not kept from its host"
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        rights = container.get("securityContext", {})
        if rights.get("allowPrivilegeEscalation") is not False or rights.get("privileged"):
            yield "may get more rights"
        if rights.get("capabilities") != {"drop": ["ALL"]}:
            yield "has capabilities"
        mounts = container.get("volumeMounts", [])
        if missing := {mount["name"] for mount in mounts} - volumes:
            yield f"no volume {missing}"
        if any(SECRET_NAME.search(variable["name"]) for variable in container.get("env", [])):
            yield "a key in a variable"
        asked, most = (container["resources"].get(kind, {}) for kind in ("requests", "limits"))
        drain = [int(variable["value"]) for variable in container.get("env", []) if variable["name"] == DRAIN]
        if drain and drain[0] >= pod.get("terminationGracePeriodSeconds", 30):
            yield "is killed while Ray still waits for what is in flight"
        if asked.get("nvidia.com/gpu") != most.get("nvidia.com/gpu"):
            yield "GPUs asked for and GPUs allowed differ"


def test_every_field_is_one_of_kuberays_or_kubernetes_and_of_its_type(job):
    """The whole file, the disk's claim too, with unknown fields as errors."""
    assert misfits(job) == []
    (claim,) = [document for document in documents() if document["kind"] == "PersistentVolumeClaim"]
    below = "spec rayClusterSpec headGroupSpec template spec volumes [] ephemeral volumeClaimTemplate spec"
    assert misfits(claim["spec"], *below.split()) == []
    assert claim.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert len(documents()) == 2


def test_our_stricter_check_accepts_the_file(job):
    """Token, rights, services, counts and keys are in order."""
    assert problems(job) == []


def test_the_job_runs_the_entry_point_with_options_that_the_engine_has(job, capsys):
    """The command is the README's, and all that the engine misses here is the shared disk, whatever the kind of job."""
    python, script, *flags = job["spec"]["entrypoint"].split()
    assert (python, script) == ("python", "jobs/embed.py")
    (options_of_an_api_job,) = re.findall(r"(--model openai:\S+ --key-file \S+)", MANIFEST.read_text())
    for arguments in (flags, [*flags[:4], *options_of_an_api_job.split()]):
        assert main(["run", *arguments]) == ConfigError.exit_code
        assert "/shared/texts" in capsys.readouterr().err
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {"working_dir": "/home/ray/embedding-engine"}


def test_workers_come_and_go_on_spot_with_a_fall_back_and_cpus_for_apis(job):
    """The cluster scales and ends with the job; both kinds of GPU workers ask for the same; API workers ask for no GPU and begin at 0."""
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"]
    assert job["spec"]["shutdownAfterJobFinishes"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    pod = {name: group["template"]["spec"] for name, group in groups.items()}
    asked = {name: pod[name]["containers"][0]["resources"]["requests"] for name in groups}
    assert list(groups) == ["gpu-spot", "gpu-on-demand", "cpu-api"]
    assert pod["gpu-spot"]["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    assert pod["gpu-on-demand"]["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
    assert asked["gpu-spot"] == asked["gpu-on-demand"]
    assert (groups["gpu-on-demand"]["maxReplicas"], groups["cpu-api"]["minReplicas"]) == (0, 0)
    assert asked["gpu-spot"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in asked["cpu-api"]


def test_every_ray_pod_sees_the_shared_disk_and_the_key_file(job):
    """The same claim at the same path, and the key at the path that the comment gives to --key-file."""
    claim = documents()[0]["metadata"]["name"]
    key_files = re.findall(r"--key-file (\S+)", MANIFEST.read_text())
    assert key_files
    for name, pod in pods(job):
        if name == "submitter":
            continue
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
        assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": claim}
        assert mounts["shared"]["mountPath"] == "/shared"
        assert volumes["keys"]["secret"]["secretName"] == "embedding-keys"
        assert volumes["keys"]["secret"]["defaultMode"] == 0o440
        assert mounts["keys"]["readOnly"]
        assert {str(Path(file).parent) for file in key_files} == {mounts["keys"]["mountPath"]}


def test_the_ray_is_that_of_the_constraints(job):
    """KubeRay is told the Ray that the tests ran with."""
    assert f"ray=={job['spec']['rayClusterSpec']['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()


def _worker(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def _container(job: dict[str, Any]) -> dict[str, Any]:
    return _worker(job)["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda job: job["spec"].update(shutdownAfterJobFinish=True), "shutdownAfterJobFinish"),
        (lambda job: job["spec"].update(shutdown_after_job_finishes=True), "shutdown_after_job_finishes"),
        (lambda job: job["spec"].update(backoffLimit="2"), "spec.backoffLimit"),
        (lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(mode="tokens"), "authOptions.mode"),
        (lambda job: job["spec"]["rayClusterSpec"].pop("headGroupSpec"), "headGroupSpec"),
        (lambda job: _worker(job)["rayStartParams"].update({"num-cpus": 4}), "rayStartParams.num-cpus"),
        (lambda job: _worker(job).pop("maxReplicas"), "maxReplicas"),
        (lambda job: _container(job).update(imag="x"), "'imag'"),
        (lambda job: _container(job).update(image_pull_policy="Always"), "image_pull_policy"),
        (lambda job: _container(job)["resources"]["limits"].update(cpu=[4]), "limits.cpu"),
        (lambda job: _container(job)["securityContext"].update(runAsNonRoot="yes"), "runAsNonRoot"),
    ],
)
def test_a_field_that_is_misspelt_missing_or_of_another_type_is_found(job, change: Callable[[Any], Any], problem):
    """The API server would drop or refuse each of these."""
    change(job)
    assert any(problem in found for found in misfits(job))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"].update(serviceType="LoadBalancer"), "open"),
        (lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"].update(serviceType="NodePort"), "open"),
        (lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"].update(enableIngress=True), "open"),
        (lambda job: job["spec"]["rayClusterSpec"].pop("authOptions"), "token"),
        (lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"].update(rayStartParams={}), "work is sent"),
        (lambda job: _container(job).update(env=[{"name": "OPENAI_API_KEY", "value": "x"}]), "a key in a variable"),
        (lambda job: _container(job).update(args=["--key", "sk-abcdefgh12345678"]), "a key"),
        (lambda job: _container(job).pop("securityContext"), "more rights"),
        (lambda job: _container(job)["securityContext"].update(privileged=True), "more rights"),
        (lambda job: _worker(job)["template"]["spec"].update(hostNetwork=True), "host"),
        (lambda job: _worker(job)["template"]["spec"].update(securityContext={"runAsUser": 0}), "root"),
        (lambda job: _worker(job)["template"]["spec"].update(volumes=[]), "no volume"),
        (lambda job: _container(job)["resources"]["limits"].pop("nvidia.com/gpu"), "GPUs"),
        (lambda job: _worker(job).update(maxReplicas=0), "maxReplicas"),
        (lambda job: _worker(job)["template"]["spec"].update(terminationGracePeriodSeconds=10), "in flight"),
    ],
)
def test_mistakes_that_are_fields_of_the_right_type_are_found(job, change: Callable[[Any], Any], problem):
    """Each of these passes the check of fields and fails ours, and breaks nothing else."""
    before = copy.deepcopy(job)
    change(job)
    assert job != before
    assert misfits(job) == []
    assert any(problem in found for found in problems(job))


@pytest.mark.parametrize("name", ["Makefile", "examples/quickstart.ipynb", "examples/scale_out.ipynb", "cluster.yaml"])
def test_what_a_user_runs_leaves_rays_token_on(name):
    """Ray asks for one by itself; without it whoever reaches a port runs code. Tests and benchmarks turn it off, on loopback."""
    assert not re.search(r"RAY_AUTH_MODE\W+disabled", (ROOT / name).read_text())

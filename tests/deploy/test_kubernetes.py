"""The resources for Kubernetes: valid by the schemas, and of one piece.

No cluster runs here. Core kinds are checked against the published OpenAPI schemas of Kubernetes;
PodMonitor and PrometheusRule against the fields that are used of them, as in the resource
definitions of prometheus-operator 0.91 (example/prometheus-operator-crd), with no others allowed.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from gradwatch.dashboards import prometheus_rule
from gradwatch.ends import LINGER_SECONDS
from gradwatch.export.addresses import PORTS_TRIED

Resource = dict[str, Any]
HERE = "deploy/kubernetes"
VERSIONS = ("1.28", "1.37")
"""The first with the label that the job reads its name from for certain, and the newest known."""

DURATION = {"type": "string", "pattern": r"^(0|(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?)$"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def strictly(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": properties,
    }


def several(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


def of_the_operator(spec: dict[str, Any]) -> dict[str, Any]:
    return strictly(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "monitoring.coreos.com/v1"},
        kind={"type": "string"},
        metadata=strictly(["name"], name={"type": "string"}, labels=TEXTS),
        spec=spec,
    )


OPERATOR = {
    "PodMonitor": of_the_operator(
        strictly(
            ["selector", "podMetricsEndpoints"],
            selector=strictly([], matchLabels=TEXTS),
            podMetricsEndpoints=several(
                strictly(
                    [], port={"type": "string"}, interval=DURATION, honorLabels={"type": "boolean"}
                )
            ),
        )
    ),
    "PrometheusRule": of_the_operator(
        strictly(
            ["groups"],
            groups=several(
                strictly(
                    ["name", "rules"],
                    name={"type": "string", "minLength": 1},
                    rules=several(
                        {
                            **strictly(
                                ["expr"],
                                alert={"type": "string"},
                                record={"type": "string"},
                                expr={"type": "string"},
                                labels=TEXTS,
                                annotations=TEXTS,
                                keep_firing_for=DURATION,
                                **{"for": DURATION},
                            ),
                            "oneOf": [{"required": ["alert"]}, {"required": ["record"]}],
                        }
                    ),
                )
            ),
        )
    ),
}


def resources_of(folder: Path) -> list[Resource]:
    """What the kustomization of a folder is made of, without what it changes of it."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found: list[Resource] = []
    for name in kustomization.get("resources", []):
        path = (folder / name).resolve()
        if path.is_dir():
            found += resources_of(path)
        else:
            found += list(yaml.safe_load_all(path.read_text()))
    for one in kustomization.get("configMapGenerator", []):
        found.append(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {
                    "name": one["name"],
                    "labels": kustomization["generatorOptions"]["labels"],
                },
                "data": {file: (folder / file).read_text() for file in one["files"]},
            }
        )
    return found


@pytest.fixture(scope="module")
def resources(repository: Path) -> list[Resource]:
    return resources_of(repository / HERE / "example")


@pytest.fixture
def the(resources: list[Resource]) -> Callable[[str], Resource]:
    """The one resource of a kind, to be changed as one likes."""

    def of(kind: str) -> Resource:
        (one,) = (one for one in resources if one["kind"] == kind)
        return copy.deepcopy(one)

    return of


@pytest.fixture
def pod(the: Callable[[str], Resource]) -> Resource:
    return dict(the("Job")["spec"]["template"])


def test_every_resource_is_one_that_is_checked_here(resources: list[Resource]) -> None:
    kinds = [one["kind"] for one in resources if one["kind"] != "ConfigMap"]
    assert sorted(kinds) == ["Job", "NetworkPolicy", "PodMonitor", "PrometheusRule"]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field_of_its_own_kinds(
    resources: list[Resource], version: str
) -> None:
    for one in resources:
        if one["kind"] not in OPERATOR:
            kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        ("Job", ["spec", "template", "spec", "securityContext", "runAsNonRoots"], True),
        ("Job", ["spec", "template", "spec", "restartPolicy"], 3),
        ("Job", ["spec", "template", "spec", "volumes", 0, "emptydir"], {}),
        ("NetworkPolicy", ["spec", "ingress", 0, "ports", 0, "endport"], 9479),
        ("NetworkPolicy", ["spec", "podSelector", "matchLabels", "gradwatch/scrape"], True),
    ],
)
def test_a_mistake_in_them_is_refused(
    the: Callable[[str], Resource], kind: str, path: list[Any], wrong: Any
) -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(changed(the(kind), path, wrong), VERSIONS[-1], strict=True)


@pytest.mark.parametrize("kind", OPERATOR)
def test_the_operator_knows_every_field_of_its_kinds(
    the: Callable[[str], Resource], kind: str
) -> None:
    jsonschema.validate(the(kind), OPERATOR[kind])


@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        ("PodMonitor", ["spec", "podMetricsEndpoints", 0, "honorLabel"], True),
        ("PodMonitor", ["spec", "podMetricsEndpoints", 0, "interval"], "15 seconds"),
        ("PodMonitor", ["spec", "podMetricsEndpoints"], []),
        ("PodMonitor", ["apiVersion"], "monitoring.coreos.com/v2"),
        ("PrometheusRule", ["spec", "groups", 1, "rules", 0, "for"], "two minutes"),
        ("PrometheusRule", ["spec", "groups", 1, "rules", 0, "record"], "also:a:record"),
        ("PrometheusRule", ["spec", "groups", 1, "rules", 0, "labels", "severity"], 1),
    ],
)
def test_a_mistake_in_those_is_refused_too(
    the: Callable[[str], Resource], kind: str, path: list[Any], wrong: Any
) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(the(kind), path, wrong), OPERATOR[kind])


def changed(resource: Resource, path: list[Any], value: Any) -> Resource:
    inner: Any = resource
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return resource


def test_the_rules_are_those_of_prometheus(the: Callable[[str], Resource]) -> None:
    assert the("PrometheusRule") == yaml.safe_load(prometheus_rule())


@pytest.mark.servers
def test_promtool_accepts_the_rules_of_the_resource(
    the: Callable[[str], Resource], call: Callable[..., str], tmp_path: Path
) -> None:
    rules = the("PrometheusRule")["spec"]
    count = sum(len(group["rules"]) for group in rules["groups"])
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    assert f"SUCCESS: {count} rules found" in call(
        "promtool", "check", "rules", tmp_path / "rules.yml"
    )


def test_every_dashboard_is_in_a_config_map_of_its_own(
    resources: list[Resource], repository: Path
) -> None:
    maps = [one for one in resources if one["kind"] == "ConfigMap"]
    files = {path.name: path.read_text() for path in (repository / "dashboards").glob("*.json")}
    assert [len(one["data"]) for one in maps] == [1] * len(files)
    assert {name: text for one in maps for name, text in one["data"].items()} == files
    for one in maps:
        assert one["metadata"]["labels"] == {"grafana_dashboard": "1"}
        assert len(json.dumps(one)) < 2**20


def test_prometheus_is_let_in_and_finds_the_ports_of_the_job(
    the: Callable[[str], Resource], pod: Resource
) -> None:
    monitor, policy = the("PodMonitor")["spec"], the("NetworkPolicy")["spec"]
    (container,) = pod["spec"]["containers"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    scraped = [one["port"] for one in monitor["podMetricsEndpoints"]]
    assert len(scraped) == len(set(scraped))
    assert set(ports) <= set(scraped)
    assert all(re.fullmatch(r"[a-z0-9-]{1,15}", name) for name in scraped)
    assert all(one["honorLabels"] for one in monitor["podMetricsEndpoints"])
    (opened,) = policy["ingress"][0]["ports"]
    assert (opened["port"], opened["endPort"]) == (9464, 9464 + PORTS_TRIED - 1)
    for chosen in (monitor["selector"], policy["podSelector"]):
        assert chosen["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_the_processes_of_a_run_may_talk_to_one_another(the: Callable[[str], Resource]) -> None:
    policy = the("NetworkPolicy")["spec"]
    (among,) = (rule for rule in policy["ingress"] if "ports" not in rule)
    assert among["from"] == [{"podSelector": policy["podSelector"]}]


def test_the_job_has_a_port_for_each_process(pod: Resource) -> None:
    (container,) = pod["spec"]["containers"]
    (processes,) = (
        int(word.partition("=")[2])
        for word in container["command"]
        if word.startswith("--nproc-per-node=")
    )
    ports = [one["containerPort"] for one in container["ports"]]
    assert ports == list(range(9464, 9464 + processes))
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(processes)


def test_the_job_keeps_to_the_restricted_pod_security_standard(pod: Resource) -> None:
    """kubernetes.io/docs/concepts/security/pod-security-standards"""
    spec = pod["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all(set(volume) == {"name", "emptyDir"} for volume in spec["volumes"])
    assert {"hostNetwork", "hostPID", "hostIPC"}.isdisjoint(spec)
    assert spec["automountServiceAccountToken"] is False


def test_what_the_job_writes_to_is_mounted(pod: Resource) -> None:
    (container,) = pod["spec"]["containers"]
    mounted = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {container["workingDir"], "/tmp", "/dev/shm"} == set(mounted.values())


def test_an_ending_run_has_the_time_to_be_scraped_once_more(
    the: Callable[[str], Resource], pod: Resource
) -> None:
    interval = int(
        the("PodMonitor")["spec"]["podMetricsEndpoints"][0]["interval"].removesuffix("s")
    )
    assert interval < LINGER_SECONDS < pod["spec"]["terminationGracePeriodSeconds"]


def test_kustomize_puts_the_same_resources_together(
    repository: Path, resources: list[Resource]
) -> None:
    """With the namespace and the label of the example on each."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    command = [kubectl, "kustomize", repository / HERE / "example"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    built = list(yaml.safe_load_all(done.stdout))
    for one in built:
        assert one["metadata"].pop("namespace") == "training"
        assert one["metadata"]["labels"].pop("release") == "kube-prometheus-stack"
        if not one["metadata"]["labels"]:
            del one["metadata"]["labels"]

    def named(one: Resource) -> tuple[str, str]:
        return one["kind"], one["metadata"]["name"]

    assert sorted(built, key=named) == sorted(resources, key=named)

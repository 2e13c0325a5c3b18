"""docker-compose.yml and the Dockerfile: valid, closed to the network, complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from compose_spec import PyCompose

Compose = dict[str, Any]

PINNED = re.compile(r"^[a-z0-9./-]+:v?\d+\.\d+\.\d+(-[a-z-]+)?$")


@pytest.fixture(scope="module")
def text(repository: Path) -> str:
    return (repository / "docker-compose.yml").read_text()


def test_a_strict_parser_of_the_format_accepts_it(text: str) -> None:
    services = PyCompose.from_yaml(text).to_spec().services or {}
    assert set(services) == {"trainer", "prometheus", "alertmanager", "pager", "grafana"}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("    ports:", "    portz:"),
        ("127.0.0.1:9090:9090", "127.0.0.1:http:9090"),
        ("condition: service_healthy", "condition: service_hale"),
        ("restart: unless-stopped", "restart: unless-stoped"),
        ("rules:ro", "rules:readonly"),
    ],
)
def test_that_parser_refuses_a_mistake(text: str, right: str, wrong: str) -> None:
    assert right in text
    with pytest.raises(ValueError, match="services"):
        PyCompose.from_yaml(text.replace(right, wrong, 1))


def test_every_port_is_published_on_loopback_only(compose: Compose) -> None:
    published = [port for s in compose["services"].values() for port in s.get("ports", [])]
    assert published
    for port in published:
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)


def test_no_service_escapes_its_network(compose: Compose) -> None:
    for service in compose["services"].values():
        assert {"network_mode", "privileged", "cap_add", "pid", "ipc"}.isdisjoint(service)


def test_grafana_does_not_start_without_a_password_and_there_is_no_default(
    compose: Compose,
) -> None:
    environment = compose["services"]["grafana"]["environment"]
    password = environment["GF_SECURITY_ADMIN_PASSWORD"]
    assert re.fullmatch(r"\$\{GRAFANA_ADMIN_PASSWORD:\?.+\}", password)
    assert "GF_AUTH_ANONYMOUS_ENABLED" not in environment


def test_every_image_is_pinned_to_a_version(compose: Compose) -> None:
    for name, service in compose["services"].items():
        assert "build" in service or PINNED.match(service["image"]), name


def test_the_image_of_the_trainer_is_pinned_too(repository: Path) -> None:
    bases = re.findall(r"^FROM (\S+)", (repository / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert bases
    assert all(PINNED.match(base) for base in bases)


def test_everything_that_is_mounted_is_in_the_repository_and_read_only(
    compose: Compose, mounts: dict[str, dict[str, Path]]
) -> None:
    for name, service in compose["services"].items():
        for inside, source in mounts[name].items():
            assert source.exists(), source
            assert any(volume.endswith(f":{inside}:ro") for volume in service["volumes"])


def test_every_other_volume_is_declared(compose: Compose) -> None:
    used = {
        volume.split(":")[0]
        for service in compose["services"].values()
        for volume in service.get("volumes", [])
        if not volume.startswith("./")
    }
    assert used == set(compose["volumes"])


def test_every_service_that_something_waits_for_has_a_health_check(compose: Compose) -> None:
    services = compose["services"]
    for service in services.values():
        for awaited, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy"
            assert "healthcheck" in services[awaited]


def test_every_service_has_a_health_check(repository: Path, compose: Compose) -> None:
    built = (repository / "deploy/Dockerfile").read_text()
    for name, service in compose["services"].items():
        assert "healthcheck" in service or ("build" in service and "HEALTHCHECK" in built), name


def test_what_the_image_copies_exists_and_is_not_ignored(repository: Path) -> None:
    lines = (repository / "deploy/Dockerfile").read_text().splitlines()
    copied = [word for ln in lines if ln.startswith("COPY ") for word in ln.split()[1:-1]]
    kept = {
        line[1:]
        for line in (repository / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert set(copied) == kept
    for source in copied:
        assert (repository / source).exists(), source


def test_the_trainer_runs_as_nobody_in_particular_and_serves_its_network(repository: Path) -> None:
    lines = (repository / "deploy/Dockerfile").read_text().splitlines()
    assert "USER 10001" in lines
    assert lines[-1] == 'CMD ["gradwatch", "demo", "--host", "0.0.0.0", "--loop"]'
    assert lines.index("USER 10001") > max(
        n for n, line in enumerate(lines) if line.startswith(("RUN", "COPY"))
    )


def test_the_index_of_the_torch_build_is_one_argument_from_compose_to_pip(
    repository: Path, compose: Compose
) -> None:
    assert compose["services"]["trainer"]["build"]["args"] == {"TORCH_INDEX": "${TORCH_INDEX:-}"}
    built = (repository / "deploy/Dockerfile").read_text()
    assert 'ARG TORCH_INDEX=""' in built
    assert '${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}' in built

"""docker-compose.yml and the Dockerfile: valid, closed to the network, complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from gradwatch.export.scrapes import PATIENCE

Compose = dict[str, Any]

PINNED = re.compile(r"^[a-z0-9./-]+:v?\d+\.\d+\.\d+(-[a-z-]+)?$")


@pytest.fixture(scope="module")
def text(compose: Compose) -> str:
    """Without anchors, which the strict parser does not know."""
    return yaml.dump(compose, Dumper=_WithoutAnchors)


class _WithoutAnchors(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def test_a_strict_parser_of_the_format_accepts_it(text: str) -> None:
    services = PyCompose.from_yaml(text).to_spec().services or {}
    assert set(services) == {"trainer", "page", "prometheus", "alertmanager", "pager", "grafana"}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("    ports:", "    portz:"),
        ("127.0.0.1:9090:9090", "127.0.0.1:http:9090"),
        ("condition: service_healthy", "condition: service_hale"),
        ("restart: unless-stopped", "restart: unless-stoped"),
        ("rules:ro", "rules:readonly"),
        ("read_only: true", "readonly: true"),
        ("mem_limit: 2g", "mem_limit: two"),
        ("cap_drop:", "cap_drops:"),
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


def test_no_service_may_do_more_than_it_needs(repository: Path, compose: Compose) -> None:
    built = (repository / "deploy/Dockerfile").read_text()
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        (user,) = re.findall(r"^USER (\d+)", built, re.MULTILINE) if "build" in service else (
            service["user"].partition(":")[0],
        )  # fmt: skip
        assert int(user) > 0, name


def test_no_service_can_fill_the_machine(compose: Compose) -> None:
    """Memory, processes, and the disk with what it says."""
    for name, service in compose["services"].items():
        assert service["mem_limit"], name
        assert service["pids_limit"], name
        assert {"max-size", "max-file"} <= set(service["logging"]["options"]), name
    kept = compose["services"]["prometheus"]["command"]
    assert any(word.startswith("--storage.tsdb.retention.size=") for word in kept)


def test_the_page_reads_what_the_trainer_records_and_cannot_change_it(compose: Compose) -> None:
    trainer, page = compose["services"]["trainer"], compose["services"]["page"]
    (recordings,) = trainer["volumes"]
    assert page["volumes"] == [f"{recordings}:ro"]
    assert recordings.partition(":")[2] in page["command"]
    assert page["build"] == trainer["build"]
    assert page["image"] == trainer["image"]


def test_a_run_that_ends_has_the_time_to_be_scraped_once_more(
    compose: Compose, repository: Path
) -> None:
    prometheus = yaml.safe_load((repository / "deploy/prometheus/prometheus.yml").read_text())
    interval = int(prometheus["global"]["scrape_interval"].removesuffix("s"))
    grace = int(compose["services"]["trainer"]["stop_grace_period"].removesuffix("s"))
    assert PATIENCE * interval < grace


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


def test_hadolint_has_nothing_to_say_of_the_dockerfile(repository: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, repository / "deploy/Dockerfile"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("right", "wrong", "rule"),
    [
        (":3.11.13-slim-bookworm", ":latest", "DL3007"),
        ("WORKDIR /src", "WORKDIR src", "DL3000"),
        ("USER 10001", "USER root", "DL3002"),
    ],
)
def test_hadolint_would_see_a_mistake(
    repository: Path, tmp_path: Path, right: str, wrong: str, rule: str
) -> None:
    text = (repository / "deploy/Dockerfile").read_text()
    assert right in text
    (tmp_path / "Dockerfile").write_text(text.replace(right, wrong, 1))
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode != 0
    assert rule in done.stdout


YAMLLINT = """
extends: default
rules:
  braces: {max-spaces-inside: 0}
  document-start: disable
  line-length: {max: 120}
"""


def test_yamllint_has_nothing_to_say_of_the_files_of_the_deployment(
    repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "yamllint.yml").write_text(YAMLLINT)
    written = sorted((repository / "deploy").rglob("*.yml")) + sorted(
        path
        for path in (repository / "deploy").rglob("*.yaml")
        if not path.read_text().startswith("# Written by")
    )
    command = [sys.executable, "-m", "yamllint", "--strict", "-c", tmp_path / "yamllint.yml"]
    files = [repository / "docker-compose.yml", *written]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")

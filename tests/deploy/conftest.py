"""The deployment's files, parsed, and the real promtool and amtool."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
PACKAGES = {
    "promtool": "prometheus",
    "prometheus": "prometheus",
    "amtool": "prometheus-alertmanager",
}


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text()))


@pytest.fixture(scope="session")
def mounts(compose: dict[str, Any]) -> dict[str, dict[str, Path]]:
    """Service -> path in its container -> file or folder of the repository."""
    found: dict[str, dict[str, Path]] = {}
    for name, service in compose["services"].items():
        bound = [volume.split(":") for volume in service.get("volumes", [])]
        found[name] = {
            parts[1]: REPOSITORY / parts[0] for parts in bound if parts[0].startswith("./")
        }
    return found


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """The path of a program; without it, a test is skipped, and fails in CI."""

    def path_of(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            missing = (
                f"{name} is missing: apt-get install -y --no-install-recommends {PACKAGES[name]}"
            )
            if os.environ.get("CI") == "true":
                pytest.fail(missing)
            pytest.skip(missing)
        return path

    return path_of


@pytest.fixture(scope="session")
def call(program: Callable[[str], str]) -> Callable[..., str]:
    """Runs promtool or amtool, gives its output, and fails with its words if it is not content."""

    def run(name: str, *arguments: object) -> str:
        done = subprocess.run(
            [program(name), *map(str, arguments)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run

"""Runs of the demo, each a process of its own, as a shell starts it."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import gradwatch


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


NEXT = ("top", "serve", "report", "export", "-c")
"""What tells a command that the end screen names."""


@dataclass(frozen=True)
class Run:
    """A demo that ended."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def recording_path(self) -> Path:
        """As the end screen names it."""
        found = re.search(r"^  (\S+\.sqlite)  \d+ steps", self.out, re.MULTILINE)
        assert found, self.out
        return self.folder / found[1]

    @property
    def recording(self) -> gradwatch.Recording:
        return gradwatch.open_recording(self.recording_path)

    @property
    def commands(self) -> list[str]:
        """What it says to type next."""
        after = self.out.partition("Look further")[2].splitlines()
        return [line.strip() for line in after if any(f" {word} " in line for word in NEXT)]


class Demo:
    """Starts demos; one that was run before is not run again."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._done: dict[tuple[str, ...], Run] = {}

    def __call__(self, *arguments: str) -> Run:
        if arguments not in self._done:
            self._done[arguments] = self._run(arguments)
        return self._done[arguments]

    def _run(self, arguments: tuple[str, ...]) -> Run:
        folder = self._root / str(len(self._done))
        folder.mkdir()
        done = subprocess.run(
            [
                sys.executable, "-W", "error", "-m", "gradwatch", "demo", "--plain",
                "--port", str(unused_port()), *arguments,
            ],
            cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        return Run(done.returncode, done.stdout, done.stderr, folder)


@pytest.fixture
def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    return unused_port()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return Demo(tmp_path_factory.mktemp("demo"))

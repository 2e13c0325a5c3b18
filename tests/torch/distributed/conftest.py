"""Real gloo processes on this machine, each running one function of a test module."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def forks() -> Iterator[subprocess.Popen[str]]:
    """Forks ranks when told; begun once, since importing torch takes longer than most cases."""
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("forks.py")],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    yield server
    server.stdin.close()
    server.stdout.close()
    assert server.wait(timeout=30) == 0


@pytest.fixture
def on_ranks(forks, tmp_path) -> Callable[..., list[Any]]:
    """Runs `function(rank, size, *arguments)` on some processes; what each of them returns.

    With `check=False` the exit code of each, and what it said.
    """

    def run(function, *arguments, size: int = 4, check: bool = True) -> list[Any]:
        directory = Path(tempfile.mkdtemp(dir=tmp_path))
        case = {
            "module": sys.modules[function.__module__].__file__,
            "function": function.__name__,
            "directory": str(directory),
            "arguments": pickle.dumps(arguments).hex(),
            "size": size,
        }
        print(json.dumps(case), file=forks.stdin, flush=True)
        codes = json.loads(forks.stdout.readline())
        said = [(directory / f"{rank}.txt").read_text() for rank in range(size)]
        if not check:
            return list(zip(codes, said, strict=True))
        assert codes == [0] * size, "\n".join(f"rank {r}:\n{text}" for r, text in enumerate(said))
        return [pickle.loads((directory / f"{r}.pickle").read_bytes()) for r in range(size)]

    return run

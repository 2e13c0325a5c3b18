"""The ports of several processes on one machine, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("until_told.py")
RANKS = 2


def free_ports() -> int:
    """The first of as many as there are ranks, in a row."""
    for first in range(20_000, 30_000, RANKS):
        with ExitStack() as held, suppress(OSError):
            for port in range(first, first + RANKS):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError("no free ports")


def scraped(port: int) -> str:
    """The metrics of a process that is starting."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                return str(answer.read().decode())
        except OSError:
            assert time.monotonic() < deadline, f"nobody serves port {port}"
            time.sleep(0.2)


@pytest.mark.slow
def test_each_rank_of_a_machine_serves_its_own_port_and_none_warns(tmp_path: Path) -> None:
    first, stop = free_ports(), tmp_path / "stop"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}",
        PROGRAM, stop, str(first),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADWATCH_LINGER": "0"}
    log = tmp_path / "log"
    with log.open("w") as out:
        job = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path
        )
        try:
            for rank in range(RANKS):
                assert f'rank="{rank}",state="running"' + "} 1" in scraped(first + rank)
        finally:
            stop.touch()
            code = job.wait(120)
    assert code == 0, log.read_text()
    assert "is taken" not in log.read_text()

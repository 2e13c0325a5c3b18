"""Accelerate's own test of gradient synchronisation passes with gradwatch attached."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("attached_sync.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "tests", "watched"),
    [
        ([], "**Test NOOP `no_sync`", ["gradwatch: 2 models, windows [2, 2, 1]"]),
        (TORCHRUN, "**Test Distributed `no_sync`", ["gradwatch: 3 models, windows [2, 1]"] * 2),
    ],
    ids=["one process", "two gloo processes"],
)
def test_accelerates_own_test_passes_while_its_models_are_watched(launcher, tests, watched):
    done = subprocess.run(
        [sys.executable, *launcher, str(PROGRAM)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert tests in done.stdout
    assert "with optimizer and scheduler" in done.stdout
    assert [line for line in done.stdout.splitlines() if "gradwatch" in line] == watched
    assert "gradwatch failed" not in done.stderr

"""Real gloo processes on this machine, each running one function of a test module."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
RUNNER = """
import os, pickle, sys, importlib.util
spec = importlib.util.spec_from_file_location("case", sys.argv[1])
case = importlib.util.module_from_spec(spec)
spec.loader.exec_module(case)
import torch, torch.distributed as dist
from datetime import timedelta
torch.set_num_threads(1)
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group(
    "gloo", init_method=sys.argv[3], rank=rank, world_size=size, timeout=timedelta(seconds=20)
)
result = getattr(case, sys.argv[2])(rank, size, *pickle.loads(bytes.fromhex(sys.argv[5])))
with open(f"{sys.argv[4]}/{rank}.pickle", "wb") as file:
    pickle.dump(result, file)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def on_ranks(tmp_path) -> Callable[..., list[Any]]:
    """Runs `function(rank, size, *arguments)` on some processes; what each of them returns."""

    def run(function, *arguments, size: int = 4, check: bool = True) -> list[Any]:
        module = sys.modules[function.__module__].__file__
        meeting = f"file://{tmp_path}/meeting-{os.urandom(4).hex()}"
        given = pickle.dumps(arguments).hex()
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", RUNNER, module, function.__name__, meeting,
                 str(tmp_path), given],
                cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size),
                     "PYTHONPATH": str(ROOT)},
            )
            for rank in range(size)
        ]  # fmt: skip
        said = [process.communicate(timeout=180)[0] for process in processes]
        if not check:
            return list(zip([p.returncode for p in processes], said, strict=True))
        for rank, process in enumerate(processes):
            assert process.returncode == 0, f"rank {rank}:\n{said[rank]}"
        return [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(size)]

    return run

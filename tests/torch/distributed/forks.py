"""Forks the ranks of a case from one process that has imported torch, which takes seconds.

A line of JSON a case on stdin, a line with the exit codes of its ranks on stdout.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import pickle
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest  # noqa: F401
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor.debug
import torch.distributed.tensor.parallel

import gradwatch.torch.watch  # noqa: F401

PATIENCE = 180
"""Seconds that a case may take."""


def run(case: dict, rank: int) -> None:
    directory = Path(case["directory"])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case["size"])}
    signal.alarm(PATIENCE)
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("case", case["module"])
    module = sys.modules["case"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=case["size"],
        timeout=timedelta(seconds=20),
    )  # fmt: skip
    arguments = pickle.loads(bytes.fromhex(case["arguments"]))
    result = getattr(module, case["function"])(rank, case["size"], *arguments)
    (directory / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def forked(case: dict, rank: int) -> int:
    """The process id of a rank; in that process this does not return."""
    pid = os.fork()
    if pid:
        return pid
    said = os.open(f"{case['directory']}/{rank}.txt", os.O_WRONLY | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, said, said)):
        os.dup2(file, number)
    code = 0
    try:
        run(case, rank)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking all modules down again takes seconds


def main() -> None:
    for line in iter(sys.stdin.readline, ""):
        case = json.loads(line)
        pids = [forked(case, rank) for rank in range(case["size"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


main()

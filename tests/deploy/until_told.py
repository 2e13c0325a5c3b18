"""A data-parallel run, attached as a user would, that ends when the file STOP appears.

torchrun ... until_told.py STOP [PORT]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import gradwatch


def main(stop: Path, port: int = 9464) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.attach(model, optimizer, port=port, recording=None):
        ended = torch.zeros(1)
        while not ended:
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            time.sleep(0.05)
            ended.fill_(stop.exists())
            dist.all_reduce(ended, op=dist.ReduceOp.MAX)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

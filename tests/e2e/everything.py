"""Runs that have what the demo has not, so that every panel has something to show.

    everything.py WAY TARGETS RECORDINGS PUSHGATEWAY     until it is terminated

WAY is `ranks` (two under DistributedDataParallel, scraped by their own ports), `accumulating`
(four micro-batches a step and a loss scaler, followed by a node agent) or `ending` (a few steps,
whose summary goes to the Pushgateway).
"""

from __future__ import annotations

import os
import socket
import sys
import time

import torch

import gradwatch

STEP_SECONDS = 0.05
POLICY = {
    "version": 1,
    "mode": "enforce",
    "clip": [{"name": "global", "per": "all", "limit": 1.0}],
    "guard": {"nonfinite": "skip"},
}


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))


def batches():
    while True:
        time.sleep(STEP_SECONDS)
        yield torch.randn(8, 16)


def one_rank(rank: int, port: int, targets: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    model = torch.nn.parallel.DistributedDataParallel(network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gradwatch.attach(
        model, optimizer, POLICY, run="ranks", port=0, recording=None, discovery=targets
    ) as watch:
        for batch in batches():
            loss = model(batch).square().mean()
            loss.backward()
            watch.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()


def ranks(targets: str, recordings: str, pushgateway: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    one_rank(0 if os.fork() else 1, port, targets)


def accumulating(targets: str, recordings: str, pushgateway: str) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    policy = {**POLICY, "accumulate": {"steps": 4}}
    with gradwatch.attach(
        model, optimizer, policy, run="accumulating", port=None, recording=recordings, scaler=scaler
    ) as watch:
        for micro in watch.micro_batches(batches()):
            with micro:
                loss = model(micro.batch).square().mean()
                scaler.scale(micro.scale(loss)).backward()
            if micro.last:
                watch.log(loss=loss)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()


def ending(targets: str, recordings: str, pushgateway: str) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gradwatch.attach(
        model, optimizer, POLICY, run="ending", port=None, recording=None, pushgateway=pushgateway
    ) as watch:
        for batch, _ in zip(batches(), range(20), strict=False):
            loss = model(batch).square().mean()
            loss.backward()
            watch.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    ways = {"ranks": ranks, "accumulating": accumulating, "ending": ending}
    ways[sys.argv[1]](*sys.argv[2:])

"""How a watched process ends: servers that are down, hang or refuse cost it nothing but seconds."""

from __future__ import annotations

import http.server
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch


def trained(
    watched: Callable[[torch.nn.Module, torch.optim.Optimizer], object],
) -> list[torch.Tensor]:
    """The weights after 60 steps, the last of which explode."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    watched(model, optimizer)
    for step in range(60):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 8)).square().mean() * (1e6 if step > 50 else 1.0)
        loss.backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@contextmanager
def server(kind: str) -> Iterator[str]:
    if kind == "down":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))  # and never listens
            yield f"http://me:secret@127.0.0.1:{probe.getsockname()[1]}"
    elif kind == "hangs":
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield f"http://me:secret@127.0.0.1:{silent.getsockname()[1]}"
    else:
        with refusing(kind) as port:
            yield f"http://me:secret@127.0.0.1:{port}"


@contextmanager
def refusing(kind: str) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if kind == "drips":  # a byte a second, for ever: no timeout of a socket ends that
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                while not over.wait(1.0):
                    self.wfile.write(b"X: y\r\n")
            else:
                self.send_error(500)

        do_PUT = do_GET = do_POST

        def log_message(self, *args: object) -> None:
            pass

    over = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        listening.handle_error = lambda *_: None  # the client may be gone
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening.server_port
        over.set()
        listening.shutdown()


@pytest.mark.parametrize("kind", ["down", "hangs", "answers 500", "drips"])
def test_training_is_bit_identical_and_the_end_waits_seconds_only(kind, attach, caplog):
    watches = []
    with server(kind) as address:
        weights = trained(
            lambda model, optimizer: watches.append(
                attach(model, optimizer, alertmanager=address, pushgateway=address)
            )
        )
        (watch,) = watches
        watch.flush()
        found = {one.kind for record in watch.history(60) for one in record.anomalies}
        began = time.monotonic()
        watch.close()
        seconds = time.monotonic() - began
    assert "exploding" in found
    unwatched = trained(lambda model, optimizer: None)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, unwatched, strict=True))
    assert seconds < 10  # 3 for alerts, 3 for the push
    assert watch.pipeline.tally.status().hook_errors["export"] >= 1
    said = caplog.text
    assert "secret" not in said
    assert said.count("cannot be told of alerts") <= 1
    assert said.count("could not be pushed") == 1
    print(f"\n{kind}: the end took {seconds:.1f} s")


LINGERING = """
import signal, sys, time
import torch, gradwatch

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's `&`
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
watch = gradwatch.attach(model, optimizer, run="r", recording=None, port=0, linger=60)
def step(factor):
    optimizer.zero_grad()
    (model(torch.ones(2, 4)).mean() * factor).backward()
    optimizer.step()
step(1.0)
step(float("nan"))
print(watch.url, flush=True)
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def trainer() -> Iterator[subprocess.Popen]:
    """Has seen a NaN, which nobody has scraped, and is told to wait a minute for that."""
    command = [sys.executable, "-c", LINGERING]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def scrape(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def wait_until_it_waits(trainer: subprocess.Popen) -> None:
    assert any("waits for one last scrape" in line for line in trainer.stderr)


def test_ctrl_c_ends_the_training_and_a_second_one_the_wait(trainer):
    assert trainer.stdout.readline()
    trainer.send_signal(signal.SIGINT)
    wait_until_it_waits(trainer)
    trainer.send_signal(signal.SIGINT)
    trainer.wait(30)


def test_the_last_scrape_before_death_by_sigterm_shows_the_event_and_ends_the_wait(trainer):
    url = trainer.stdout.readline().strip()
    trainer.send_signal(signal.SIGTERM)
    wait_until_it_waits(trainer)
    text = scrape(url)
    assert 'gradwatch_events_total{run="r",rank="0",event="nonfinite",level="alert"} 1' in text
    trainer.wait(20)
    assert trainer.returncode == -signal.SIGTERM


def test_a_sigterm_that_comes_while_it_waits_does_not_cut_the_wait_short(trainer):
    url = trainer.stdout.readline().strip()
    trainer.send_signal(signal.SIGINT)
    wait_until_it_waits(trainer)
    trainer.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        trainer.wait(2)
    assert 'event="nonfinite",level="alert"} 1' in scrape(url)
    trainer.wait(20)

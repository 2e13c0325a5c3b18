"""SIGTERM: runs end first, the process dies of it all the same, and nobody else's handler is hurt.

Each in a process of its own, since it is about how that one ends.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PRELUDE = """
import os, signal, sys, threading, time
from gradwatch.termination import end_before_sigterm, forget

class Run:
    is_ending = False
    seconds = 0.0
    def terminate(self):
        print("ending", flush=True)
        time.sleep(self.seconds)
        print("ended", flush=True)

run = Run()
def ready():
    print("ready", flush=True)
"""


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen]:
    """Runs until it says that it is ready."""
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code], stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None
        try:
            assert started.stdout.readline() == "ready\n"
            yield started
        finally:
            started.kill()


def said(process: subprocess.Popen) -> list[str]:
    return process.communicate(timeout=60)[0].split()


def test_a_run_ends_before_the_process_dies_of_sigterm_as_it_would_have():
    with process("end_before_sigterm(run); ready(); time.sleep(60); print('survived')") as trainer:
        trainer.terminate()
        assert said(trainer) == ["ending", "ended"]
    assert trainer.returncode == -signal.SIGTERM


def test_the_loop_does_not_go_on_meanwhile():
    code = """
run.seconds = 1.0
end_before_sigterm(run)
ready()
while True:
    print("step", flush=True)
    time.sleep(0.01)
"""
    with process(code) as trainer:
        trainer.terminate()
        lines = said(trainer)
    assert "step" not in lines[lines.index("ending") + 5 :]
    assert lines[-1] == "ended"


def test_a_process_that_hangs_in_native_code_dies_too():
    pytest.importorskip("torch")
    code = """
import torch
torch.set_num_threads(1)
large = torch.ones(9000, 9000)
end_before_sigterm(run)
threading.Timer(0.2, ready).start()
for _ in range(1):
    large @ large @ large @ large
print("computed")
"""
    with process(code) as trainer:
        trainer.terminate()
        assert said(trainer) == ["ending", "ended"]
    assert trainer.returncode == -signal.SIGTERM


def test_a_second_sigterm_ends_it_at_once():
    code = "run.seconds = 60; end_before_sigterm(run); ready(); time.sleep(60)"
    with process(code) as trainer:
        trainer.terminate()
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "ending\n"
        trainer.terminate()
        assert said(trainer) == []
    assert trainer.returncode == -signal.SIGTERM


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handler_of_the_users_stays_the_only_one(when):
    install = "signal.signal(signal.SIGTERM, lambda *_: (print('mine', flush=True), sys.exit(5)))"
    ours = "end_before_sigterm(run)"
    lines = [install, ours] if when == "before" else [ours, install]
    with process("\n".join([*lines, "ready()", "time.sleep(60)"])) as trainer:
        trainer.terminate()
        assert said(trainer) == ["mine"]
    assert trainer.returncode == 5


def test_whoever_calls_the_handler_that_was_there_before_theirs_gets_nothing():
    code = """
end_before_sigterm(run)
before = signal.getsignal(signal.SIGTERM)
def mine(number, frame):
    before(number, frame)
    print("mine", flush=True)
    os._exit(5)
signal.signal(signal.SIGTERM, mine)
ready()
time.sleep(60)
"""
    with process(code) as trainer:
        trainer.terminate()
        assert said(trainer) == ["mine"]


def test_an_event_loop_that_listens_to_signals_is_left_alone_and_one_that_comes_later_as_well():
    code = """
import asyncio
async def main():
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    end_before_sigterm(run)
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    ready()
    await stopped.wait()
    print("theirs")
asyncio.run(main())
"""
    with process(code) as trainer:
        trainer.terminate()
        assert said(trainer) == ["theirs"]
    assert trainer.returncode == 0


def test_after_the_last_run_everything_is_as_it_was():
    code = """
other = Run()
end_before_sigterm(run); end_before_sigterm(other)
forget(run)
assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
forget(other)
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
assert signal.set_wakeup_fd(-1) == -1
while any(thread.name == "gradwatch-sigterm" for thread in threading.enumerate()):
    time.sleep(0.01)
end_before_sigterm(run)  # and again
ready()
time.sleep(60)
"""
    with process(code) as trainer:
        trainer.terminate()
        assert said(trainer) == ["ending", "ended"]


def test_a_forked_child_has_its_sigterm_to_itself_and_its_parent_hears_nothing_of_it():
    code = """
end_before_sigterm(run)
dies = os.fork()
if dies == 0:
    time.sleep(60)
    os._exit(1)
has_its_own = os.fork()
if has_its_own == 0:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(6))
    open("/dev/null").close()
    while True:
        time.sleep(0.01)
time.sleep(0.5)
os.kill(dies, signal.SIGTERM)
os.kill(has_its_own, signal.SIGTERM)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in (dies, has_its_own)]
assert codes == [-15, 6], codes
time.sleep(0.5)
ready()
time.sleep(60)
"""
    with process(code) as trainer:
        trainer.terminate()
        assert said(trainer) == ["ending", "ended"]


def test_off_the_main_thread_nothing_is_handled():
    code = """
thread = threading.Thread(target=end_before_sigterm, args=(run,))
thread.start(); thread.join()
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
ready()
time.sleep(60)
"""
    with process(code) as trainer:
        trainer.terminate()
        assert said(trainer) == []
    assert trainer.returncode == -signal.SIGTERM

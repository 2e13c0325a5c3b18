"""Each component broken in turn: training goes on, to the bit where gradwatch only looks."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import gradwatch

STEPS = 40
CLIP = {"version": 1, "clip": [{"limit": 1.0}], "guard": {"patience": 1000}}


def sgd(task):
    return torch.optim.SGD(task.model.parameters(), lr=0.1, momentum=0.9)


def train(task, optimizer, steps: range = range(STEPS)) -> None:
    for step in steps:
        task.gradient(step)
        optimizer.step()


@pytest.fixture
def unwatched(task):
    """The parameters that training without gradwatch ends with."""
    other = task.copy()
    train(other, sgd(other))
    return other.parameters()


def assert_same(task, unwatched) -> None:
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), unwatched, strict=True))


def errors(watch, component: str) -> float:
    return watch.pipeline.tally.snapshot().labelled["hook_errors_total"][component,]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A directory with room for 300 kB, of which the ring takes a part; needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        # Where nothing can be mounted: a file system that refuses, as a full one does.
        shutil.rmtree(folder)
        folder.symlink_to("/dev/full")
        yield folder
        return
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up(task, attach, unwatched, small_disk, caplog):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, recording=small_disk)
    train(task, optimizer)
    watch.flush()
    if small_disk.is_mount():
        (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bfree * 4096))
    assert_same(task, unwatched)
    for step in range(3000):
        watch.log(loss=step)
        optimizer.step()
    watch.flush()
    assert errors(watch, "recording") > 0
    assert caplog.text.count("failed to do its recording") >= 1
    assert watch.latest.step == STEPS + 2999


def test_a_directory_that_cannot_be_made(task, attach, unwatched):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, recording="/proc/gradwatch-runs")
    train(task, optimizer)
    assert_same(task, unwatched)
    assert watch.recording is None
    assert errors(watch, "recording") == 1


def test_every_port_taken(task, attach, unwatched, caplog):
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    optimizer = sgd(task)
    # The 15 above it end at 65535.
    with contextlib.ExitStack() as stack:
        for port in range(65520, 65536):
            other = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                other.bind(("127.0.0.1", port))
                other.listen()
        watch = attach(task.model, optimizer, port=65520)
        train(task, optimizer)
    taken.close()
    assert_same(task, unwatched)
    assert watch.url is None
    assert "are all taken; choose one with port=" in caplog.text


def test_a_collector_that_raises(task, attach, unwatched, monkeypatch):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, port=0)

    def broken() -> None:
        raise RuntimeError("no snapshot today")

    monkeypatch.setattr(watch.pipeline.tally, "snapshot", broken)
    for step in range(STEPS):
        train(task, optimizer, range(step, step + 1))
        if step % 10 == 0:
            with pytest.raises(urllib.error.HTTPError, match="500"):
                urllib.request.urlopen(watch.url, timeout=5)
    monkeypatch.undo()
    assert_same(task, unwatched)
    assert errors(watch, "export") == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_consumer_thread_that_dies(task, attach, unwatched, tmp_path, monkeypatch):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, recording=tmp_path)
    thread = watch.pipeline.consumer._thread

    def killed(_: float) -> None:
        raise SystemExit

    monkeypatch.setattr(watch.pipeline.consumer._wakeup, "wait", killed)
    thread.join(5)
    assert not thread.is_alive()
    train(task, optimizer)
    started = time.monotonic()
    watch.close()
    assert time.monotonic() - started < 2
    assert_same(task, unwatched)
    with gradwatch.open_recording(watch.recording) as recording:
        assert [record.step for record in recording] == list(range(STEPS))  # the ring was kept


def test_a_recording_that_somebody_locks(task, attach, unwatched, tmp_path, monkeypatch):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, recording=tmp_path)
    watch.pipeline.consumer._store._connection.execute("PRAGMA busy_timeout = 100")
    with contextlib.closing(sqlite3.connect(watch.recording, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        train(task, optimizer)
        assert time.monotonic() - started < 5
        watch.flush()
        other.execute("ROLLBACK")
    assert_same(task, unwatched)
    assert errors(watch, "recording") > 0
    path = watch.recording
    watch.close()
    with gradwatch.open_recording(path) as recording:
        assert sorted(record.step for record in recording) == list(range(STEPS))


def test_a_recording_that_is_deleted_under_it(task, attach, unwatched, tmp_path):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, recording=tmp_path / "runs")
    train(task, optimizer, range(20))
    watch.flush()
    shutil.rmtree(tmp_path / "runs")
    train(task, optimizer, range(20, STEPS))
    watch.flush()
    watch.close()
    assert_same(task, unwatched)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_a_detector_that_raises(task, attach, unwatched, monkeypatch, error):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer)

    def broken(_: object) -> None:
        raise error("no")

    monkeypatch.setattr(watch.pipeline.consumer.detection, "observe", broken)
    train(task, optimizer)
    watch.flush()
    assert_same(task, unwatched)
    assert errors(watch, "detection") == STEPS
    assert watch.pipeline.tally.snapshot().numbers["steps_total"] == STEPS


class TestCallbacks:
    def watched(self, task, attach, callback, tmp_path):
        optimizer = sgd(task)
        watch = attach(task.model, optimizer, recording=tmp_path)
        watch.on_anomaly(callback)
        for step in range(10):
            task.gradient(step)
            if step == 5:
                task.model.head.bias.grad[0] = np.nan
            optimizer.step()
        watch.flush()
        return watch

    @pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
    def test_one_that_raises_reaches_nobody(self, task, attach, tmp_path, error):
        def broken(_: gradwatch.Anomaly) -> None:
            raise error

        watch = self.watched(task, attach, broken, tmp_path)
        assert errors(watch, "callback") >= 1
        path = watch.recording
        watch.close()
        with gradwatch.open_recording(path) as recording:
            assert (len(recording), recording.state) == (10, "finished")

    def test_one_that_flushes_does_not_wait_for_itself(self, task, attach):
        started = time.monotonic()
        optimizer = sgd(task)
        watch = attach(task.model, optimizer)
        called: list[bool] = []
        watch.on_anomaly(lambda _: (watch.flush(), called.append(True)))
        task.gradient(0)
        task.model.head.bias.grad[0] = np.nan
        optimizer.step()
        watch.flush()
        assert called
        assert time.monotonic() - started < 3

    def test_one_that_never_returns_loses_no_record(self, task, attach, tmp_path, monkeypatch):
        monkeypatch.setattr("gradwatch.pipeline.FLUSH_SECONDS", 0.3)
        hold = threading.Event()
        optimizer = sgd(task)
        watch = attach(task.model, optimizer, recording=tmp_path)
        watch.on_anomaly(lambda _: hold.wait(20))
        for step in range(10):
            task.gradient(step)
            if step == 0:
                task.model.head.bias.grad[0] = np.nan
            optimizer.step()
            time.sleep(0.03)
        path = watch.recording
        watch.close()
        with gradwatch.open_recording(path) as recording:
            assert sorted(record.step for record in recording) == list(range(10))
        hold.set()


def test_a_log_handler_that_raises(task, attach, caplog):
    import logging

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("no space for logs")

    handler = Broken()
    logging.getLogger("gradwatch").addHandler(handler)
    try:
        optimizer = sgd(task)
        rules = [{"limit": 0.01, "then": "warn", "name": "told"}, {"limit": 1.0}]
        watch = attach(task.model, optimizer, {"version": 1, "clip": rules})
        watch.log(loss="none")
        task.gradient(0, 100.0)
        optimizer.step()
        assert watch.latest.clipped
    finally:
        logging.getLogger("gradwatch").removeHandler(handler)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("trains", [False, True])
def test_a_forked_child_does_no_harm_to_the_run_of_its_parent(task, attach, tmp_path, trains):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, recording=tmp_path, port=0, linger=0)
    train(task, optimizer, range(5))
    child = os.fork()
    if child == 0:
        try:
            if trains:
                for _ in range(10):  # autograd itself does not work in a forked child
                    for parameter in task.model.parameters():
                        parameter.grad = torch.full_like(parameter, 1e20)
                    optimizer.step()
                    watch.log(loss=666.0)
            watch.close()
            atexit._run_exitfuncs()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    train(task, optimizer, range(5, 10))
    assert urllib.request.urlopen(watch.url, timeout=5).status == 200
    path = watch.recording
    assert path.with_suffix(".ring").exists()
    watch.close()
    with gradwatch.open_recording(path) as recording:
        assert [record.step for record in recording] == list(range(10))
        assert all("loss" not in record.scalars for record in recording)


SCRIPT = """
import signal, sys, torch, gradwatch
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's `&`
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
watch = gradwatch.attach(model, optimizer, port=None, recording=sys.argv[1], run="script")
for step in range(int(sys.argv[2])):
    optimizer.zero_grad()
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    print(step, flush=True)
{end}
"""


def run_script(folder: Path, steps: int, end: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT.replace("{end}", end), str(folder), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("end", "state", "code"),
    [
        ("", "finished", 0),
        ("sys.exit(0)", "finished", 0),
        ("raise RuntimeError('of the user')", "crashed", 1),
    ],
)
def test_a_script_that_never_closes_has_all_of_its_recording(tmp_path, end, state, code):
    script = run_script(tmp_path, 300, end)
    _, said = script.communicate(timeout=60)
    assert script.returncode == code, said
    with gradwatch.open_recording(tmp_path) as recording:
        assert len(recording) == 300
        assert recording.state == state
    assert not list(tmp_path.glob("*.ring"))


def test_ctrl_c_ends_a_script_at_once_and_the_recording_is_whole(tmp_path):
    script = run_script(tmp_path, 10**9, "")
    for line in script.stdout:
        if int(line) == 50:
            break
    started = time.monotonic()
    script.send_signal(signal.SIGINT)
    rest, said = script.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert "\nKeyboardInterrupt\n" in said
    last = int(rest.split()[-1]) if rest.split() else 50
    with gradwatch.open_recording(tmp_path) as recording:
        assert len(recording) >= last + 1
        assert recording.state == "stopped", "whoever presses Ctrl-C is not to be told of a crash"


def test_a_stop_that_is_caught_is_still_how_the_run_ended(task, attach, tmp_path):
    optimizer = sgd(task)
    policy = {"version": 1, "guard": {"nonfinite": "stop"}}
    watch = attach(task.model, optimizer, policy, recording=tmp_path)
    task.gradient(0)
    task.model.head.bias.grad[0] = np.nan
    with pytest.raises(gradwatch.TrainingStopped):
        optimizer.step()
    path = watch.recording
    watch.close()
    with gradwatch.open_recording(path) as recording:
        assert recording.state == "stopped"


def test_an_update_that_could_not_be_made_is_not_recorded_as_one(task, attach):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer, CLIP)
    task.gradient(0, 100.0)
    task.model.head.weight.grad = torch.full((1, 1), 5.0).expand(5, 16)  # cannot be written to
    optimizer.step()
    assert not watch.latest.clipped
    assert watch.latest.total_norm_clipped == watch.latest.total_norm
    assert errors(watch, "apply") == 1


class TestReadingAlong:
    def test_a_recording_that_is_read_while_it_is_written_has_each_step_once(
        self, task, attach, tmp_path
    ):
        optimizer = sgd(task)
        watch = attach(task.model, optimizer, recording=tmp_path)
        train(task, optimizer, range(20))
        with gradwatch.open_recording(watch.recording) as recording:
            for _ in range(2):
                steps = [record.step for record in recording]
                assert steps == list(range(20))
                assert len(recording) == 20
                assert [record.step for record in recording.last(25)] == list(range(20))
                assert recording.series("total_norm")[0].tolist() == list(range(20))
                watch.flush()

    def test_a_clock_that_is_set_back_hides_no_step(self, task, attach, tmp_path, monkeypatch):
        optimizer = sgd(task)
        watch = attach(task.model, optimizer, recording=tmp_path)
        train(task, optimizer, range(10))
        watch.flush()
        now = time.time
        monkeypatch.setattr("gradwatch.engine.time.time", lambda: now() - 3600)
        train(task, optimizer, range(10, 20))
        monkeypatch.undo()
        with gradwatch.open_recording(watch.recording) as recording:
            assert [record.step for record in recording] == list(range(20))
        assert all(record.duration_seconds > 0 for record in watch.history(15))

    def test_runs_of_one_name_that_start_together_are_all_recorded(self, tmp_path):
        scripts = [run_script(tmp_path, 3, "") for _ in range(4)]
        for script in scripts:
            assert script.communicate(timeout=60)[1] == ""
        assert len(list(tmp_path.glob("*.sqlite"))) == 4


def test_bad_news_does_not_wait_for_the_next_step(task, attach):
    optimizer = sgd(task)
    watch = attach(task.model, optimizer)
    found: list[gradwatch.Anomaly] = []
    watch.on_anomaly(found.append)
    train(task, optimizer, range(3))
    task.gradient(3)
    task.model.head.bias.grad[0] = np.nan
    optimizer.step()
    deadline = time.monotonic() + 5
    while not found and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [anomaly.kind for anomaly in found] == ["nonfinite"]
    assert watch.pipeline.tally.snapshot().numbers["step"] == 3
    watch.log(loss=0.5)  # the step is still open
    assert watch.latest.scalars == {"loss": 0.5}
    assert len(watch.latest.anomalies) == 1
    train(task, optimizer, range(4, 6))
    watch.flush()
    assert watch.history(9)[3].scalars == {"loss": 0.5}
    assert len(watch.history(9)[3].anomalies) == 1
    assert watch.pipeline.tally.snapshot().numbers["steps_total"] == 6
    assert len(found) == 1


def resources() -> tuple[int, int, int]:
    """Resident kB, threads, descriptors of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (
        int(status["VmRSS"].split()[0]),
        threading.active_count(),
        len(os.listdir("/proc/self/fd")),
    )


@pytest.mark.slow
def test_ten_thousand_steps_grow_nothing(task, attach, tmp_path):
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    rules = [{"per": "layer", "limit": 0.5}, {"per": "element", "limit": 0.05}, {"limit": 0.2}]
    policy = {"version": 1, "clip": rules}
    watch = attach(task.model, optimizer, policy, recording=tmp_path, port=0, linger=0)
    seen = []
    for step in range(10_000):
        task.gradient(step % 50)
        if step % 97 == 0:
            task.model.head.bias.grad[0] = np.nan
        if step % 5 == 0:
            task.model.embed.weight.grad = None
        watch.log(loss=step % 7)
        optimizer.step()
        if step % 500 == 0:
            urllib.request.urlopen(watch.url, timeout=5).read()
        if step in (3000, 9999):
            watch.flush()
            seen.append(resources())
    (memory, threads, files), (memory_after, threads_after, files_after) = seen
    assert memory_after - memory < 4096
    assert threads_after <= threads
    assert files_after <= files
    assert errors(watch, "apply") == errors(watch, "measure") == errors(watch, "recording") == 0

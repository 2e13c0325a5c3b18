"""SIGTERM in, every open run ended first, and then the death that it would have been.

    interpreter -> a byte on a socket -> our thread: ends the runs, then the process by SIGTERM

Nothing is handled where anybody else handles SIGTERM, before us or after. A process that hangs in
native code runs no Python handler and is to die of SIGTERM all the same, so the work is done by a
thread, which the interpreter itself tells (`signal.set_wakeup_fd`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Protocol

__all__ = ["Ending", "end_before_sigterm", "forget"]

MOST_SECONDS = 28.0
"""For all runs together: schedulers kill 30 s after SIGTERM."""

DEATH_SECONDS = 5.0


class Ending(Protocol):
    """A run that wants to be ended before its process is."""

    @property
    def is_ending(self) -> bool:
        """Whether the thread that trains is ending it already."""

    def terminate(self) -> None:
        """Ends it, or waits until it has ended; on a thread of its own, while the one that trains
        is held at any place or hangs."""


class _Guard:
    """Of one process; SIGTERM is its own from the first run on until the last one has ended."""

    def __init__(self) -> None:
        self._runs: list[Ending] = []
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        """What our thread reads from, and what the interpreter writes to."""

        self._is_over = False

    def add(self, run: Ending) -> None:
        if (
            run not in self._runs
            and _is_main_thread()
            and (self._sockets is not None or self._install())
        ):
            self._runs.append(run)

    def forget(self, run: Ending) -> None:
        if run in self._runs:
            self._runs.remove(run)
        if not self._runs and _is_main_thread() and not self._is_over:
            self._uninstall()

    def forget_all(self) -> None:
        """In a forked child: its SIGTERM is none of ours."""
        self._runs.clear()
        if self._sockets is not None:
            reader, _ = self._sockets
            with contextlib.suppress(ValueError):
                self._uninstall()
            reader.close()

    def _install(self) -> bool:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return False
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        others = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        if others != -1:  # an event loop's
            signal.set_wakeup_fd(others)
            reader.close()
            writer.close()
            return False
        self._sockets = reader, writer
        signal.signal(signal.SIGTERM, self._hold)
        listening = threading.Thread(
            target=self._listen, args=(reader,), name="gradwatch-sigterm", daemon=True
        )
        listening.start()
        return True

    def _uninstall(self) -> None:
        if self._sockets is None:
            return
        writer = self._sockets[1]
        self._sockets = None
        if self._is_in_force():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._is_told(writer):
            signal.set_wakeup_fd(-1)
        writer.close()  # which ends our thread

    def _is_told(self, writer: socket.socket) -> bool:
        """Whether the interpreter writes to us, and not to an event loop that has come since."""
        number = signal.set_wakeup_fd(-1)  # asking is setting
        ours = number == writer.fileno()
        signal.set_wakeup_fd(number, warn_on_full_buffer=not ours)
        return ours

    def _is_in_force(self) -> bool:
        return signal.getsignal(signal.SIGTERM) == self._hold

    def _hold(self, number: int, frame: FrameType | None) -> None:
        """Holds the thread that trains until the end, unless it is ending a run itself.

        Whoever puts a handler of their own in place of this one and calls it gets nothing.
        """
        if not self._is_in_force() or self._sockets is None:
            return
        if not self._is_told(writer := self._sockets[1]):
            writer.send(bytes([number]))
        deadline = time.monotonic() + MOST_SECONDS + DEATH_SECONDS
        try:
            while not any(run.is_ending for run in self._runs) and time.monotonic() < deadline:
                time.sleep(0.1)
        except KeyboardInterrupt:
            _die()

    def _listen(self, reader: socket.socket) -> None:
        with reader:
            while number := reader.recv(1):
                if number[0] == signal.SIGTERM and self._is_in_force():
                    self._end(reader)

    def _end(self, reader: socket.socket) -> None:
        """Ends every run at the same time, and then the process; a second SIGTERM does so now."""
        self._is_over = True
        runs = [threading.Thread(target=run.terminate, daemon=True) for run in tuple(self._runs)]
        for run in runs:
            run.start()
        deadline = time.monotonic() + MOST_SECONDS
        reader.settimeout(0.05)
        while time.monotonic() < deadline and any(run.is_alive() for run in runs):
            with contextlib.suppress(TimeoutError):
                if (again := reader.recv(1)) and again[0] == signal.SIGTERM:
                    break
        _die()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _die() -> None:
    """By SIGTERM, as if nobody had handled it. `signal.signal` is for the main thread alone, which
    may hang; what it calls is not."""
    restore = ctypes.pythonapi.PyOS_setsig
    restore.argtypes, restore.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    restore(signal.SIGTERM, None)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(DEATH_SECONDS)
    os._exit(128 + signal.SIGTERM)


_guard = _Guard()


def end_before_sigterm(run: Ending) -> None:
    """Has a run ended before SIGTERM ends the process.

    Nothing happens where SIGTERM has not its default action, or on any thread but the main one.
    """
    _guard.add(run)


def forget(run: Ending) -> None:
    """The run has ended. After the last one SIGTERM is as it was."""
    _guard.forget(run)


os.register_at_fork(after_in_child=_guard.forget_all)

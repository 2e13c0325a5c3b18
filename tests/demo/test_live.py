"""The live view in a real terminal of a given size."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from itertools import groupby
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
UP = "\x1b[1A"


class Terminal:
    """A child in a pseudo-terminal."""

    def __init__(self, size: tuple[int, int], folder: Path, *arguments: str) -> None:
        self._main, side = pty.openpty()
        columns, rows = size
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.child = subprocess.Popen(
            [
                sys.executable, "-m", "gradwatch", "demo", "--steps", "240", "--step-seconds",
                "0.01", *arguments,
            ],
            stdin=side, stdout=side, stderr=side, cwd=folder,
            env=environment | {"TERM": "xterm-256color", "PYTHONUTF8": "1"},
        )  # fmt: skip
        os.close(side)
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def read_until(self, wanted: str) -> None:
        deadline = time.monotonic() + 90
        while wanted not in self.text:
            assert self._read_some(), self.text
            assert time.monotonic() < deadline, self.text

    def read_all(self) -> str:
        while self._read_some():
            pass
        os.close(self._main)
        self.child.wait(30)
        return self.text

    def _read_some(self) -> bool:
        try:
            more = os.read(self._main, 65536)
        except OSError:  # how a pseudo-terminal says that its other side is closed
            return False
        self.text += self._decoder.decode(more)
        return bool(more)


def tallest_redraw(text: str) -> int:
    """How many lines the view went up at once, at most."""
    moves = re.findall(r"\x1b\[1A|\x1b\[2K|\r|[^\x1b\r]+", text)
    ups = [move == UP for move in moves if move not in ("\x1b[2K", "\r")]
    return max((len(list(run)) for up, run in groupby(ups) if up), default=0)


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (40, 10), (200, 60)])
def test_the_view_fits_its_terminal_and_ends_in_the_summary(tmp_path, free_port, columns, rows):
    terminal = Terminal((columns, rows), tmp_path, "--port", str(free_port))
    text = terminal.read_all()
    assert terminal.child.returncode == 0, text
    assert "Traceback" not in text
    assert "step 240/240" in text
    assert 3 < tallest_redraw(text) < rows
    drawn = ESCAPE.sub("", text.partition("What happened")[0])
    for line in re.split(r"[\r\n]+", drawn):
        assert len(line) <= columns or "WARNING" in line, line


def test_ctrl_c_ends_the_run_in_order(tmp_path, free_port):
    terminal = Terminal(
        (80, 24), tmp_path, "--steps", "100000", "--fault", "none", "--port", str(free_port)
    )
    terminal.read_until("step 2")
    terminal.child.send_signal(signal.SIGINT)
    text = terminal.read_all()
    assert terminal.child.returncode == 130
    assert "Traceback" not in text
    assert "Look further" in text
    assert text.endswith(("\r\n", "\x1b[?25h"))  # and the cursor is back
    assert text.rfind("\x1b[?25l") < text.rfind("\x1b[?25h")


def test_a_loop_goes_on_until_it_is_told_to_stop(tmp_path, free_port):
    terminal = Terminal(
        (80, 24), tmp_path, "--loop", "--plain", "--step-seconds", "0", "--port", str(free_port)
    )
    terminal.read_until("; exploding at step")
    terminal.child.send_signal(signal.SIGTERM)
    text = terminal.read_all()
    assert terminal.child.returncode == 0, text
    assert "nothing broken; no alert" in text
    assert len(list((tmp_path / "gradwatch-runs").glob("*.sqlite"))) >= 2

"""Whether a pid in a recording is that of a process which still writes it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gradwatch.recording.writer import process_table, writer_lives

BOOTED = 1_000_000.0


@pytest.fixture
def proc(tmp_path: Path) -> Callable[..., Path]:
    """A /proc with one process, 123, which began some seconds after the boot."""

    def make(
        boot: str = "b1", namespace: str = "pid:[1]", state: str = "S", began: int = 100
    ) -> Path:
        (tmp_path / "sys/kernel/random").mkdir(parents=True)
        (tmp_path / "sys/kernel/random/boot_id").write_text(f"{boot}\n")
        (tmp_path / "self/ns").mkdir(parents=True)
        (tmp_path / "self/ns/pid").symlink_to(namespace)
        (tmp_path / "stat").write_text(f"cpu 1 2\nbtime {BOOTED:.0f}\n")
        (tmp_path / "123").mkdir()
        ticks = began * os.sysconf("SC_CLK_TCK")
        fields = [state, *["0"] * 18, str(ticks), "0"]
        (tmp_path / "123/stat").write_text(f"123 (py) thon) {' '.join(fields)}\n")
        return tmp_path

    return make


@pytest.fixture
def writer(info):
    return replace(info, started=BOOTED + 130, process_table="b1 pid:[1]")


def test_a_process_that_is_there_lives(writer, proc):
    assert writer_lives(writer, proc()) is True


@pytest.mark.parametrize(
    ("changed", "why"),
    [({"state": "Z"}, "killed and not reaped"), ({"began": 4000}, "the number was given again")],
    ids=["zombie", "reused"],
)
def test_a_process_is_dead_that_is_not_the_one_that_wrote(writer, proc, changed, why):
    assert writer_lives(writer, proc(**changed)) is False, why


def test_a_process_that_is_not_there_is_dead(writer, proc):
    assert writer_lives(replace(writer, pid=124), proc()) is False


@pytest.mark.parametrize(
    "changed", [{"boot": "b2"}, {"namespace": "pid:[2]"}], ids=["other boot", "other container"]
)
def test_a_number_of_another_process_table_says_nothing(writer, proc, changed):
    assert writer_lives(writer, proc(**changed)) is None


def test_without_a_process_table_nobody_knows(writer, tmp_path):
    assert process_table(tmp_path) == ""
    assert writer_lives(replace(writer, process_table=""), tmp_path) is None


def test_this_process_and_one_that_has_ended(info):
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
        mine = replace(info, process_table=process_table(), started=4e9)
        assert writer_lives(replace(mine, pid=os.getpid())) is True
        assert writer_lives(replace(mine, pid=child.pid)) is False

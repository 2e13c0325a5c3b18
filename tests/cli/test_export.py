"""`gradwatch export` on a recording of a real run."""

from __future__ import annotations

import csv
import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradwatch

STEPS = 12


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.attach(
        model, optimizer, policy={"version": 1, "clip": [{"limit": 0.1}]}, run="small",
        port=None, recording=tmp_path / "runs",
    ) as watch:  # fmt: skip
        for step in range(STEPS):
            model(torch.randn(5, 4)).square().mean().backward()
            watch.log(loss=float(step))
            optimizer.step()
            optimizer.zero_grad()
    assert watch.recording is not None
    return watch.recording


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_on_stdout_is_the_recording_a_row_a_step(cli, recorded):
    done = cli("export", recorded)
    assert done.returncode == 0
    assert done.stderr == ""
    records = list(gradwatch.open_recording(recorded).records())
    rows = rows_of(done.stdout)
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    for row, record in zip(rows, records, strict=True):
        assert float(row["total_norm"]) == record.total_norm
        assert float(row["scalar/loss"]) == record.step
        assert [float(row[f"grad_norm/{layer}"]) for layer in record.layers] == (
            record.grad_norms.tolist()
        )


def test_a_directory_means_its_newest_recording(cli, recorded):
    assert cli("export", recorded.parent).stdout == cli("export", recorded).stdout


def test_without_layers_there_is_no_column_of_a_layer(cli, recorded):
    header = cli("export", recorded, "--no-layers").stdout.splitlines()[0]
    assert "total_norm" in header
    assert "grad_norm/" not in header


def test_csv_in_a_file_is_the_same_table(cli, recorded, tmp_path):
    done = cli("export", recorded, "--format", "csv", "-o", "steps.csv")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert rows_of((tmp_path / "steps.csv").read_text()) == rows_of(cli("export", recorded).stdout)


def test_parquet_is_the_same_table(cli, recorded, tmp_path):
    import pandas

    assert cli("export", recorded, "--format", "parquet", "-o", "steps.parquet").returncode == 0
    frame = pandas.read_parquet(tmp_path / "steps.parquet")
    assert frame["step"].tolist() == list(range(STEPS))
    assert frame["scalar/loss"].tolist() == list(range(STEPS))


def test_parquet_without_a_file_says_what_to_do(cli, recorded):
    done = cli("export", recorded, "--format", "parquet")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["Parquet is a binary format: give a file with -o FILE"]


def test_a_file_that_cannot_be_written_is_one_line(cli, recorded):
    done = cli("export", recorded, "-o", "no/such/folder/steps.csv")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["no/such/folder/steps.csv: No such file or directory"]


def test_what_is_no_recording_is_refused_by_name(cli, tmp_path):
    (tmp_path / "notes.sqlite").write_text("these are notes")
    done = cli("export", "notes.sqlite")
    assert done.returncode == 2
    assert "notes.sqlite: not a recording of gradwatch" in done.stderr


def test_a_terminal_on_stderr_sees_progress_and_stdout_stays_clean(recorded, tmp_path):
    main, side = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "gradwatch", "export", str(recorded)],
        stdout=subprocess.PIPE, stderr=side, text=True, cwd=tmp_path, check=True,
        env=os.environ | {"TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(side)
    shown = os.read(main, 65536).decode()
    os.close(main)
    assert "100%" in shown
    assert len(rows_of(done.stdout)) == STEPS
    assert "\x1b" not in done.stdout


def test_head_ends_an_export_quietly(recorded, tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m gradwatch export {recorded} | head -n 1",
        shell=True, capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1

"""Runs under SLURM: the batch script, the file of targets and the real Prometheus that reads it.

`srun` and `scontrol` are two lines that stand in for those of a node of one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
FOLDER = "/shared/gradwatch/targets"
STAND_INS = {
    "srun": '#!/bin/sh\nexec "$@"\n',
    "scontrol": '#!/bin/sh\n[ "$1 $2 $3" = "show hostnames 127.0.0.1" ] && echo 127.0.0.1\n',
    "torchrun": f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n',
}


@pytest.fixture
def script(repository: Path) -> str:
    return (repository / "deploy/slurm/train.sbatch").read_text()


@pytest.fixture
def configuration(repository: Path) -> str:
    return (repository / "deploy/slurm/prometheus.yml").read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} took more than {seconds} s"
        time.sleep(0.2)
    return found


@contextmanager
def running(command: list[object], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Ends it with what it has started, such as the programs of a script."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [*map(str, command)],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def test_the_script_and_the_configuration_name_the_same_folder_and_ports(
    script: str, configuration: str
) -> None:
    assert f"GRADWATCH_DISCOVERY:-{FOLDER}}}" in script
    (runs,) = (
        job
        for job in yaml.safe_load(configuration)["scrape_configs"]
        if job["job_name"] == "gradwatch"
    )
    assert runs["file_sd_configs"][0]["files"] == [f"{FOLDER}/*.json"]
    kept = re.compile(runs["relabel_configs"][0]["regex"])
    ports = [port for port in range(9400, 9600) if kept.fullmatch(f"node7:{port}")]
    assert ports == list(range(9464, 9464 + 16))
    assert kept.fullmatch("[fe80::1]:9464")
    assert not kept.fullmatch("node7:19464")


def test_bash_finds_no_mistake_in_the_script(repository: Path) -> None:
    subprocess.run(["bash", "-n", repository / "deploy/slurm/train.sbatch"], check=True)


@pytest.mark.servers
def test_promtool_accepts_the_configuration(
    repository: Path, configuration: str, tmp_path: Path, call: Callable[..., str]
) -> None:
    (tmp_path / "prometheus.yml").write_text(configuration)
    (tmp_path / "rules").symlink_to(repository / "dashboards/rules")
    said = call("promtool", "check", "config", tmp_path / "prometheus.yml")
    assert "SUCCESS: 1 rule files found" in said


class Prometheus:
    """The real one, reading `folder`."""

    def __init__(self, port: int, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.folder = folder

    def targets(self) -> list[dict[str, Any]]:
        found = self._asked("/api/v1/targets")["activeTargets"]
        return [one for one in found if one["labels"]["job"] == "gradwatch"]

    def up(self) -> list[dict[str, str]]:
        """The labels of targets that answer."""
        return [one["labels"] for one in self.targets() if one["health"] == "up"]

    def value(self, query: str) -> list[dict[str, Any]]:
        return list(self._asked(f"/api/v1/query?query={urllib.parse.quote(query)}")["result"])

    def _asked(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)["data"]


@pytest.fixture
def prometheus(
    repository: Path, configuration: str, tmp_path: Path, program: Callable[[str], str]
) -> Iterator[Prometheus]:
    """With the configuration for SLURM, but for its folder, its pace and its own address."""
    port, folder = free_port(), tmp_path / "targets"
    folder.mkdir()
    text = configuration.replace(FOLDER, str(folder)).replace("15s", "1s")
    (tmp_path / "prometheus.yml").write_text(text.replace("127.0.0.1:9090", f"127.0.0.1:{port}"))
    (tmp_path / "rules").symlink_to(repository / "dashboards/rules")
    command = [
        program("prometheus"),
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/tsdb",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with running(command, tmp_path / "prometheus.log"):
        started = Prometheus(port, folder)

        def is_ready() -> bool:
            try:
                return bool(urllib.request.urlopen(f"{started.url}/-/ready", timeout=5))
            except OSError:
                return False

        wait_for("Prometheus", is_ready)
        yield started


def environment_of(prometheus: Prometheus, tmp_path: Path, ranks: int) -> dict[str, str]:
    """What SLURM sets for a job, and where this test keeps its programs and its folder."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_USER": "ada",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": str(ranks),
        "GRADWATCH_DISCOVERY": str(prometheus.folder),
        "GRADWATCH_HOST": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.servers
@pytest.mark.slow
def test_the_ranks_of_a_job_come_and_go_by_themselves(
    repository: Path, prometheus: Prometheus, tmp_path: Path
) -> None:
    script, stop = repository / "deploy/slurm/train.sbatch", tmp_path / "stop"
    text = script.read_text().replace(":29500", f":{free_port()}")
    (tmp_path / "train.sbatch").write_text(text)
    command = ["bash", tmp_path / "train.sbatch", HERE / "until_told.py", stop]
    environment = environment_of(prometheus, tmp_path, ranks=2)
    with running(command, tmp_path / "job.log", env=environment, cwd=tmp_path) as job:
        up = wait_for("two targets", lambda: len(prometheus.up()) == 2 and prometheus.up())
        stop.touch()
        assert job.wait(120) == 0, (tmp_path / "job.log").read_text()
    for labels in up:
        instance, rank = labels.pop("instance"), labels.pop("rank")
        assert re.fullmatch(r"127\.0\.0\.1:94\d\d", instance)
        assert rank in ("0", "1")
        assert labels == {
            "job": "gradwatch", "run": "train-4711", "slurm_job_id": "4711", "slurm_user": "ada",
        }  # fmt: skip
    assert list(prometheus.folder.iterdir()) == []
    wait_for("the end of both targets", lambda: not prometheus.targets())
    finished = prometheus.value('last_over_time(gradwatch_run_state{state="finished"}[5m]) == 1')
    assert {one["metric"]["rank"] for one in finished} == {"0", "1"}


@pytest.mark.servers
@pytest.mark.slow
def test_a_job_that_is_killed_is_seen_to_be_down_until_it_runs_again(
    prometheus: Prometheus, tmp_path: Path
) -> None:
    stop = tmp_path / "stop"
    command = [sys.executable, HERE / "until_told.py", stop]
    environment = {
        **environment_of(prometheus, tmp_path, ranks=1),
        "GRADWATCH_RUN": "train-4711",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with running(command, tmp_path / "job.log", env=environment) as attempt:
        wait_for("the target", prometheus.up)
        attempt.kill()
    (down,) = wait_for(
        "its end", lambda: [one for one in prometheus.targets() if one["health"] == "down"]
    )
    assert down["labels"]["slurm_job_id"] == "4711"
    with running(command, tmp_path / "again.log", env=environment) as attempt:
        wait_for("the next attempt", prometheus.up)
        assert len(prometheus.targets()) == 1
        stop.touch()
        attempt.wait(60)
    wait_for("its end", lambda: not prometheus.targets())

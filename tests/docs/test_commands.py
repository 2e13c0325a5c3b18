"""Every command of the documents is run as it stands, in a folder like that of a reader."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "deploy/README.md", *(ROOT / "docs").glob("*.md")])
PROGRAMS = Path(sys.executable).parent

STAY = ("gradwatch serve",)
"""These go on until they are told to stop."""

ELSEWHERE = {
    "gradwatch demo": "tests/demo/test_run.py",
    "gradwatch dashboards check": "tests/e2e/test_dashboards.py",
    "gradwatch rules check": "tests/e2e/test_dashboards.py",
    "gradwatch dashboards push": "tests/grafana",
    "gradwatch forget": "tests/export",
}
"""What needs a server, or a minute of training: the test that runs it with one."""

INLINE = re.compile(r"(?<!`)`(gradwatch [a-z][^`]* [^`]+)`(?!`)")
A_COMMAND = re.compile(r"gradwatch [a-z]+(?: |$)")


def _commands(text: str) -> Iterator[str]:
    language: str | None = None
    for line in map(str.strip, text.replace("\\\n", " ").splitlines()):
        if line.startswith("```"):
            language = line[3:] if language is None else None
        elif language in ("", "sh", "bash") and A_COMMAND.match(line):
            yield line
    for command in INLINE.findall(text):
        if A_COMMAND.match(command):
            yield " ".join(command.split())


def _bare(command: str) -> str:
    """Without the comment behind it."""
    return re.sub(r"\s{2,}# .*$", "", command).strip()


COMMANDS = sorted({_bare(command) for path in DOCUMENTS for command in _commands(path.read_text())})
TO_RUN = [one for one in COMMANDS if not one.startswith((*STAY, *ELSEWHERE))]


@pytest.fixture(scope="module")
def start() -> str:
    return (ROOT / "docs/start.md").read_text()


@pytest.fixture(scope="module")
def folder(start: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader of docs/start.md has after its third step, under the names of all documents."""
    folder = tmp_path_factory.mktemp("reader")
    (script,) = re.findall(r"^```python\n(.*?)^```", start, re.MULTILINE | re.DOTALL)
    (policy,) = re.findall(r"^```yaml\n(.*?)^```", start, re.MULTILINE | re.DOTALL)
    (folder / "train.py").write_text(script)
    (folder / "policy.yaml").write_text(policy)
    done = _run("python train.py", folder)
    assert done.returncode == 0, done.stderr
    (recording,) = (folder / "gradwatch-runs").glob("*.sqlite")
    for name in ("RECORDING", "PATH"):
        (folder / name).symlink_to(recording)
    for name in ("POLICY", "FILE"):
        (folder / name).symlink_to(folder / "policy.yaml")
    shutil.copytree(ROOT / "dashboards", folder / "dashboards")
    (folder / "deploy/kubernetes/base").mkdir(parents=True)
    return folder


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def _run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=folder, env=_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_documents_have_commands() -> None:
    assert len(TO_RUN) > 12
    assert any(command.startswith(STAY) for command in COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", TO_RUN)
def test_a_command_of_the_documents_runs(folder: Path, command: str) -> None:
    done = _run(command.replace("...", ""), folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [one for one in COMMANDS if one.startswith(STAY)])
def test_what_stays_says_where_it_serves_and_ends_when_told(folder: Path, command: str) -> None:
    """On a free port of the loopback interface, whatever the document says."""
    words = shlex.split(command)
    if "--host" in words:
        words[words.index("--host") + 1] = "127.0.0.1"
    log = folder / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*words, "--port", "0"], cwd=folder, env=_environment(), stdout=out, stderr=out
        )
        try:
            deadline = time.monotonic() + 60
            while "http://127.0.0.1:" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0, log.read_text()


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.startswith(tuple(ELSEWHERE))])
def test_what_needs_a_server_is_run_by_the_test_that_has_one(command: str) -> None:
    begins = next(begins for begins in ELSEWHERE if command.startswith(begins))
    place = ROOT / ELSEWHERE[begins]
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    words = begins.split()[1:]
    assert any(all(f'"{word}"' in file.read_text() for word in words) for file in files), place


def test_the_run_of_the_first_page_is_told_as_it_says(folder: Path) -> None:
    done = _run("gradwatch report", folder)
    assert "Healthy" in done.stdout
    assert "event" in done.stdout
    assert "spike" in _run("gradwatch top", folder).stdout


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_extras_and_benchmarks_that_a_document_names_exist(path: Path) -> None:
    text = path.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    extras = (ROOT / "pyproject.toml").read_text()
    for named in re.findall(r"pip install '[^'\[]*\[([a-z,]+)\]'", text):
        for extra in named.split(","):
            assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), extra
    for script in re.findall(r"python ((?:benchmarks|examples)/\w+\.py)", text):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]+)?\)", path.read_text()):
        file = path.parent / target if target else path
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            slugs = {
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
            }
            assert anchor[1:] in slugs, f"{target}{anchor}"

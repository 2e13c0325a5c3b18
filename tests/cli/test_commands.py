"""Each command, from its arguments to its output and exit code."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from gradwatch.dashboards import build_dashboards, build_rules
from gradwatch.demo.command import POLICY
from gradwatch.policy import load_policy

ROOT = Path(__file__).parents[2]


def one_line(text: str) -> str:
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=["nothing", "--help"])
def test_help_names_every_command(cli, arguments):
    done = cli(*arguments)
    assert done.returncode == 0
    for command in ("demo", "check", "explain", "export", "schema", "serve", "dashboards", "rules"):
        assert command in done.stdout


def test_help_of_the_demo_says_what_each_fault_is(cli):
    done = cli("demo", "--help")
    assert done.returncode == 0
    for option in ("--fault", "--steps", "--seed", "--policy", "--port", "--loop", "--plain"):
        assert option in done.stdout


def test_help_is_quick_because_it_imports_no_framework():
    code = "import sys, gradwatch.cli; print({'torch', 'sklearn', 'pandas'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"


def test_version_is_that_of_the_installed_package(cli):
    assert cli("--version").stdout.strip() == importlib.metadata.version("gradwatch")


def test_the_schema_accepts_the_policy_of_the_readme(cli):
    schema = json.loads(cli("schema").stdout)
    jsonschema.validate(yaml.safe_load(POLICY.read_text()), schema)


def test_check_says_each_rule_in_a_sentence(cli):
    done = cli("check", POLICY)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "guard: A step with NaN or inf in a gradient is skipped." in done.stdout
    assert "guard: 10 skipped steps in a row stop the run." in done.stdout
    assert (
        "clip global: on all parameters, as one vector, where the L2 norm exceeds 1, it is scaled "
        "down to that." in done.stdout
    )


def test_explain_prints_a_policy_that_means_the_same(cli, tmp_path):
    (tmp_path / "used.yaml").write_text("version: 1\nclip:\n  - use: skipstep\n  - use: agc\n")
    explained = cli("explain", "used.yaml")
    assert (explained.returncode, explained.stderr) == (0, "")
    (tmp_path / "plain.yaml").write_text(explained.stdout)
    again = cli("explain", "plain.yaml")
    assert "use" not in yaml.safe_load(explained.stdout)["clip"][0]
    assert yaml.safe_load(again.stdout) == yaml.safe_load(explained.stdout)
    assert load_policy(tmp_path / "plain.yaml").sha256 == load_policy(tmp_path / "used.yaml").sha256
    assert "#   clip agc: on all parameters with ndim >=2, each output unit" in explained.stdout


def test_check_names_every_mistake_with_its_place_on_a_line_of_its_own(cli, tmp_path):
    (tmp_path / "bad.yaml").write_text("version: 1\nclips: []\nclip:\n  - limit: -1\n")
    done = cli("check", "bad.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.split(":")[:2] for line in lines] == [["bad.yaml", "2"], ["bad.yaml", "4"]]
    assert "clip[0].limit must be > 0. Received: -1" in lines[1]


def test_a_missing_policy_is_one_line_and_exit_code_2(cli):
    done = cli("check", "nowhere.yaml")
    assert done.returncode == 2
    assert "nowhere.yaml" in one_line(done.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--fault", "hiccup"],
        ["demo", "--steps", "3"],
        ["demo", "--steps", "many"],
        ["demo", "--port", "99999"],
        ["demo", "--policy", "nowhere.yaml"],
        ["demo", "--stepz", "3"],
        ["check"],
        ["frobnicate"],
        ["export", "nowhere.sqlite", "--format", "csv"],
        ["export", "nowhere.sqlite", "--format", "xml"],
        ["dashboards"],
        ["rules", "render", "--output", "no/such/folder/rules.yml"],
    ],
    ids=" ".join,
)
def test_bad_arguments_are_one_line_and_exit_code_2(cli, arguments):
    done = cli(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert one_line(done.stderr)


def test_dashboards_are_written_where_asked_and_named(cli, tmp_path):
    done = cli("dashboards", "build", "boards/deep")
    assert done.returncode == 0
    for line, (name, text) in zip(
        done.stdout.splitlines(), build_dashboards().items(), strict=True
    ):
        assert Path(line).name == name
        assert (tmp_path / line).read_text() == text


def test_rules_are_printed_or_written_with_the_runbook_of_your_own(cli, tmp_path):
    printed = cli("rules", "render", "--runbook-url", "https://wiki.example/runbook").stdout
    expected = build_rules(runbook_url="https://wiki.example/runbook")
    assert printed == "".join(expected.values())
    assert cli("rules", "render", "-o", "rules.yml").returncode == 0
    assert (tmp_path / "rules.yml").read_text() == "".join(build_rules().values())


def test_a_reader_that_goes_away_is_met_with_silence():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "gradwatch", "schema"],
        stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1


def test_the_policy_of_the_package_and_of_the_examples_are_the_same():
    assert (ROOT / "examples/policy.yaml").read_bytes() == POLICY.read_bytes()

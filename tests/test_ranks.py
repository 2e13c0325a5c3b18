"""Imports point downward, and the core imports no framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gradwatch"

RANKS = {
    "errors": 0,
    "chart": 0,
    "stopping": 0,
    "keys": 0,
    "saying": 0,
    "records": 1,
    "policy": 2,
    "rules": 3,
    "recording": 4,
    "tally": 5,
    "follower": 5,
    "cards": 5,
    "investigation": 5,
    "rule_notes": 5,
    "run_info": 5,
    "recorder": 5,
    "reloading": 5,
    "samples": 5,
    "failures": 5,
    "consumer": 5,
    "pipeline": 5,
    "progress": 5,
    "describing": 5,
    "due_step": 5,
    "engine": 5,
    "backend": 5,
    "accumulation": 5,
    "watch": 5,
    "contradictions": 5,
    "termination": 5,
    "urgency": 5,
    "torch": 6,
    "tensorflow": 6,
    "whatif": 6,
    "report": 6,
    "export": 6,
    "alerting": 7,
    "ends": 7,
    "attaching": 7,
    "trainers": 7,
    "lightning": 7,
    "keras": 7,
    "transformers": 7,
    "dashboards": 7,
    "page": 7,
    "__init__": 7,
    "serve": 8,
    "grafana": 8,
    "demo": 8,
    "top": 8,
    "cli": 8,
    "__main__": 8,
}
FRAMEWORKS = {"torch", "tensorflow", "keras", "lightning", "transformers", "accelerate"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Every module named in an import statement, at any depth of the file."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            named.add(node.module or "")
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
    return named


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_is_below_it(path):
    part = part_of(path)
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "gradwatch":
            continue
        target = parts[1] if len(parts) > 1 and parts[1] in RANKS else "__init__"
        if target == part:
            continue
        assert RANKS[target] <= RANKS[part], f"{part} must not import {name}"
        # Two halves of one rank may know each other; two packages of one rank may not.
        packages = (PACKAGE / target).is_dir() and (PACKAGE / part).is_dir()
        assert RANKS[target] < RANKS[part] or not packages, f"{part} must not import {name}"


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if RANKS[part_of(path)] <= 5],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_the_core_imports_no_framework(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & FRAMEWORKS


def test_importing_gradwatch_imports_no_framework():
    code = f"import sys, gradwatch; print({FRAMEWORKS!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_no_file_is_longer_than_400_lines():
    long = {str(path): n for path in MODULES if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_a_circle_of_imports_within_one_rank_is_an_error():
    """Every module can be the first one imported."""
    names = [
        ".".join(("gradwatch", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in MODULES
        if RANKS[part_of(path)] <= 5 and path.name != "__init__.py"
    ]
    code = """
import importlib, sys
for name in sys.argv[1:]:
    for loaded in [module for module in sys.modules if module.split(".")[0] == "gradwatch"]:
        del sys.modules[loaded]
    importlib.import_module(name)
"""
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

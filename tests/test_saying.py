"""Log lines, as they come out in a training of which nobody has set up logging, and in another."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = (
    "import logging\nfrom gradwatch.saying import say\n{}\nsay(logging.WARNING, 'step %d: x', 7)"
)


@pytest.mark.parametrize(
    ("set_up", "line"),
    [
        ("", "gradwatch warning: step 7: x"),
        ("logging.basicConfig()", "WARNING:gradwatch:step 7: x"),
        ("logging.getLogger('gradwatch').addHandler(logging.StreamHandler())", "step 7: x"),
    ],
    ids=["bare", "basic", "own"],
)
def test_a_line_says_once_who_speaks(set_up, line):
    script = [sys.executable, "-c", SCRIPT.format(set_up)]
    done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.splitlines() == [line]

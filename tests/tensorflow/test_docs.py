"""Each snippet of docs/keras.md runs, and what it sets up is recorded."""

from __future__ import annotations

import os
import re
from pathlib import Path

import keras
import pytest
import tensorflow as tf

import gradwatch
from tests.tensorflow.conftest import BATCH, examples, network

TEXT = (Path(__file__).parents[2] / "docs" / "keras.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
STEPS = 5


@pytest.mark.parametrize(("number", "steps"), [(0, 48), (1, 48), (2, STEPS), (3, 2)])
def test_a_snippet_trains_and_is_recorded(number, steps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("policy.yaml").write_text("version: 1\nclip:\n  - limit: 1.0\n")
    x, y = examples()
    names = {
        "gradwatch": gradwatch, "keras": keras, "tf": tf, "model": network(),
        "x": x[: 24 * 32], "y": y[: 24 * 32],
        "batches": [(x[i * BATCH :][:BATCH], y[i * BATCH :][:BATCH]) for i in range(STEPS)],
    }  # fmt: skip
    exec(compile(SNIPPETS[number], f"snippet {number}", "exec"), names)
    watch = names["watching"].watch if "watching" in names else names["watch"]
    watch.close()
    records = watch.history(100)
    assert len(records) == (12 if steps == 48 else steps)
    assert all(record.clipped for record in records)
    assert any(path.endswith(".sqlite") for path in os.listdir("gradwatch-runs"))


def test_all_snippets_are_run():
    assert len(SNIPPETS) == 4

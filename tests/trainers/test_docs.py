"""Each snippet of docs/trainers.md runs, and what it sets up is recorded."""

from __future__ import annotations

import os
import re
from pathlib import Path

import accelerate
import lightning
import pytest
import transformers

import gradwatch

TEXT = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
SNIPPETS = dict(re.findall(r"^## ([^\n]+)\n\n```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))
POLICY = "version: 1\nclip:\n  - limit: 1.0\n"


def test_there_is_a_snippet_for_each_trainer():
    assert list(SNIPPETS) == ["Accelerate", "Hugging Face Trainer", "Lightning"]


@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_trains_and_is_recorded(kit, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("policy.yaml").write_text(POLICY)
    net = kit.Net()
    optimizer = kit.make_optimizer("AdamW", net)
    fitted = name == "Lightning"
    names = {
        "accelerate": accelerate,
        "gradwatch": gradwatch,
        "lightning": lightning,
        "transformers": transformers,
        "model": net,
        "optimizer": optimizer,
        "module": kit.OfLightning(net, optimizer),
        "loader": kit.loader(named=not fitted),
        "dataset": [
            {"x": x.tolist(), "labels": int(label)} for x, label in kit.dataset()
        ],
        "settings": {
            "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "others": {
            "output_dir": "out", "use_cpu": True, "report_to": "none", "save_strategy": "no",
            "per_device_train_batch_size": kit.SIZE, "num_train_epochs": 1,
        },
    }  # fmt: skip
    exec(compile(SNIPPETS[name], name, "exec"), names)
    watch = names["watch"] if name == "Accelerate" else names["watching"].watch
    watch.close()
    assert [record.micro_batches for record in watch.history(9)] == [2, 2, 2, 2]
    assert all(record.clipped for record in watch.history(9))
    assert any(path.endswith(".sqlite") for path in os.listdir("gradwatch-runs"))

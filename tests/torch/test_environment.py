"""What a machine rather than a script says: GRADWATCH_RUN, GRADWATCH_HOST, GRADWATCH_DISCOVERY."""

from __future__ import annotations

import json

import pytest
import torch


@pytest.fixture
def attached(task, attach):
    def of(**arguments):
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
        return attach(task.model, optimizer, port=0, **arguments)

    return of


@pytest.fixture
def told(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADWATCH_RUN", "train-4711")
    monkeypatch.setenv("GRADWATCH_HOST", "127.0.0.2")
    monkeypatch.setenv("GRADWATCH_DISCOVERY", str(tmp_path / "targets"))
    return tmp_path / "targets"


def test_the_environment_says_what_the_script_leaves_open(told, attached):
    watch = attached()
    (path,) = told.iterdir()
    (entry,) = json.loads(path.read_text())
    assert entry["labels"]["run"] == "train-4711"
    assert entry["targets"][0].startswith("127.0.0.2:")
    assert watch.url == f"http://{entry['targets'][0]}/metrics"
    watch.close()
    assert list(told.iterdir()) == []


def test_the_script_has_the_last_word(told, attached, tmp_path):
    watch = attached(run="mine", host="127.0.0.1", discovery=tmp_path / "elsewhere")
    (path,) = (tmp_path / "elsewhere").iterdir()
    (entry,) = json.loads(path.read_text())
    assert entry["labels"]["run"] == "mine"
    assert watch.url.startswith("http://127.0.0.1:")
    assert not told.exists()


@pytest.mark.parametrize("value", [None, ""])
def test_without_it_metrics_stay_on_this_machine_and_no_file_is_written(
    attached, monkeypatch, tmp_path, value
):
    for name in ("GRADWATCH_RUN", "GRADWATCH_HOST", "GRADWATCH_DISCOVERY"):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    watch = attached()
    assert watch.url.startswith("http://127.0.0.1:")
    assert list(tmp_path.rglob("*.json")) == []

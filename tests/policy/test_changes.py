"""Numbers of a running policy may change, and nothing else."""

from __future__ import annotations

import os

import pytest

from gradwatch.errors import PolicyError
from gradwatch.policy import PolicyFile, load_policy, number_changes, parse_policy

RUNNING = """\
version: 1
accumulate: {steps: 4}
guard: {patience: 10}
clip:
  - {params: "a*", limit: 1.0, name: global}
  - {per: layer, limit: {z: 4, warmup: 100}}
  - {per: unit, measure: weight, limit: 0.01, ndim: ">=2"}
detect: {exploding: {z: 6}, spike: none}
"""


def changed(*pairs: tuple[str, str]) -> tuple[str, ...]:
    text = RUNNING
    for before, after in pairs:
        assert before in text
        text = text.replace(before, after)
    return number_changes(parse_policy(RUNNING, "policy.yaml"), parse_policy(text, "policy.yaml"))


NUMBERS = {
    "a limit": (("limit: 1.0", "limit: 0.5"), "clip[0].limit 1.0 -> 0.5"),
    "a schedule": (("limit: 1.0", "limit: {0: 1, 9: 2}"), "clip[0].limit 1.0 -> {0: 1.0, 9: 2.0}"),
    "a statistic": (("z: 4", "z: 3"), "clip[1].limit.z 4.0 -> 3.0"),
    "a bound given": (("z: 4", "z: 4, max: 9"), "clip[1].limit.max null -> 9.0"),
    "a warm-up": (("warmup: 100", "warmup: 5"), "clip[1].limit.warmup 100 -> 5"),
    "eps": (("limit: 1.0", "limit: 1.0, eps: 0"), "clip[0].eps 1e-06 -> 0.0"),
    "patience": (("patience: 10", "patience: 3"), "guard.patience 10 -> 3"),
    "a budget": (("patience: 10", "patience: 10, budget: 5/100"), "guard.budget null -> 5/100"),
    "micro-batches": (("steps: 4", "steps: 8"), "accumulate.steps 4 -> 8"),
    "a detector's number": (("z: 6", "z: 5"), "detect.exploding.z 6.0 -> 5.0"),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_a_number_may_change_and_is_named(what):
    pair, said = NUMBERS[what]
    assert changed(pair) == (said,)


def test_a_file_that_means_the_same_changes_nothing():
    assert changed(("limit: 1.0", "limit: 1")) == ()


def test_every_number_is_named():
    assert len(changed(("limit: 1.0", "limit: 2"), ("z: 4", "z: 5"), ("steps: 4", "steps: 2"))) == 3


OTHERS = {
    "mode": (("version: 1", "version: 1\nmode: shadow"), "2:1: mode cannot change"),
    "layers": (("version: 1", "version: 1\nlayers: {depth: 2}"), "2:1: layers cannot change"),
    "a scope": (("per: layer", "per: tensor"), "6:6: clip[1].per cannot change"),
    "an action": (("name: global", "name: global, then: skip"), "5:46: clip[0].then cannot"),
    "a name": (("name: global", "name: whole"), "5:32: clip[0].name cannot change"),
    "a selection": (('"a*"', '"b*"'), "5:6: clip[0].params cannot change"),
    "dimensions": (('">=2"', "2"), "7:47: clip[2].ndim cannot change"),
    "another kind of limit": (("limit: 1.0", "limit: {z: 4}"), "5:20: clip[0].limit cannot change"),
    "another statistic": (("z: 4", "ratio: 4"), "6:18: clip[1].limit.z cannot change"),
    "a window of everything": (
        ("z: 4, warmup: 100", "quantile: 0.9, window: all"),
        "6:18: clip[1].limit.z cannot change",
    ),
    "a detector switched on": (("spike: none", "spike: {z: 5}"), "8:29: detect.spike cannot"),
    "a target": (("steps: 4", "steps: {target: 64}"), "2:14: accumulate.steps cannot change"),
    "no accumulation": (("accumulate: {steps: 4}\n", ""), "1:1: accumulate cannot change"),
    "a rule less": (
        ("  - {per: layer, limit: {z: 4, warmup: 100}}\n", ""),
        "4:1: clip cannot change while the run goes on, only numbers can. "
        "In force: 3 entries. Received: 2 entries. Attach again to change it",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_anything_else_is_refused_by_its_line(what):
    pair, said = OTHERS[what]
    with pytest.raises(PolicyError) as caught:
        changed(pair)
    lines = str(caught.value).splitlines()
    assert any(line.startswith(f"policy.yaml:{said}") for line in lines), lines


def test_a_preset_may_change_its_numbers():
    running = load_policy({"version": 1, "clip": [{"use": "zclip"}]})
    after = load_policy({"version": 1, "clip": [{"use": "zclip", "limit": {"z": 3}}]})
    assert number_changes(running, after) == ("clip[0].limit.z 2.5 -> 3.0",)


def written(path, text):
    path.write_text(text)
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1_000_000))


class TestAFile:
    def test_it_is_read_again_once_it_rests(self, tmp_path):
        path = tmp_path / "policy.yaml"
        path.write_text(RUNNING)
        file = PolicyFile(path)
        assert file.poll() is None
        written(path, RUNNING.replace("1.0", "0.5"))
        assert file.poll() is None, "an editor may be in the middle of it"
        found = file.poll()
        assert found is not None
        assert found.clip[0].limit == 0.5
        assert file.poll() is None

    def test_a_bad_one_is_refused_once_for_each_time_that_it_is_written(self, tmp_path):
        path = tmp_path / "policy.yaml"
        path.write_text(RUNNING)
        file = PolicyFile(path)
        for _ in range(2):
            written(path, "version: 1\nclips: []\n")
            file.poll()
            with pytest.raises(PolicyError, match="clips is not a key"):
                file.poll()
            assert file.poll() is None
            path.touch()

    def test_one_that_is_replaced_is_seen_and_one_that_is_gone_is_no_news(self, tmp_path):
        path, other = tmp_path / "policy.yaml", tmp_path / "other.yaml"
        path.write_text(RUNNING)
        file = PolicyFile(path)
        path.unlink()
        assert file.poll() is None
        assert file.poll() is None
        other.write_text(RUNNING.replace("1.0", "0.5"))
        other.replace(path)
        file.poll()
        assert file.poll() is not None

    def test_it_is_found_again_from_another_directory(self, tmp_path, monkeypatch):
        (tmp_path / "policy.yaml").write_text(RUNNING)
        monkeypatch.chdir(tmp_path)
        file = PolicyFile("policy.yaml")
        monkeypatch.chdir("/")
        written(tmp_path / "policy.yaml", RUNNING.replace("1.0", "0.5"))
        file.poll()
        assert file.poll() is not None

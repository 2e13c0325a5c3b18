"""When a finding begins, lasts and ends, against a model that is too slow to use."""

from __future__ import annotations

from collections import deque

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.rules.episodes import SPREAD, Episodes

steps = st.lists(st.sampled_from("HHHmcc-"), max_size=80)
"""hit, miss that is not calm, calm, not judged"""


def step(episodes: Episodes, now: int, what: list[str]) -> list[int]:
    letters = np.array(what)
    judged = letters != "-"
    return episodes.update(now, letters == "H", letters == "c", judged).tolist()


class Model:
    """One layer, word for word as in the docstring."""

    def __init__(self, need: int, of: int, clear_after: int) -> None:
        self.need, self.clear_after = need, clear_after
        self.recent: deque[str] = deque(maxlen=of)
        self.open = False
        self.calm = 0

    def step(self, what: str) -> None:
        if what == "-":
            return
        self.recent.append(what)
        if not self.open:
            if self.recent.count("H") >= self.need:
                self.open, self.calm = True, 0
            return
        self.calm = self.calm + 1 if what == "c" else 0
        if self.calm >= self.clear_after:
            self.open = False
            self.recent.clear()


@given(runs=st.lists(steps, min_size=1, max_size=4), need=st.integers(1, 4), more=st.integers(0, 3))
def test_episodes_open_and_close_as_the_model_does(runs, need, more):
    of, clear_after = need + more, need + more
    episodes = Episodes(len(runs), need=need, of=of, clear_after=clear_after)
    models = [Model(need, of, clear_after) for _ in runs]
    for now in range(max(map(len, runs))):
        letters = [letters[now] if now < len(letters) else "-" for letters in runs]
        step(episodes, now, letters)
        for model, letter in zip(models, letters, strict=True):
            model.step(letter)
        assert episodes.open_L.tolist() == [model.open for model in models]


def test_an_episode_is_reported_once_and_since_its_first_hit():
    episodes = Episodes(1, need=3, of=5, clear_after=5)
    reports = [step(episodes, now, [letter]) for now, letter in enumerate("ccHmHHHHHH")]
    assert [now for now, layers in enumerate(reports) if layers] == [5]
    assert episodes.since_L[0] == 2


def test_a_layer_between_abnormal_and_calm_stays_in_its_episode():
    episodes = Episodes(1, need=1, of=1, clear_after=3)
    for now, letter in enumerate("Hccmccmccm"):
        step(episodes, now, [letter])
    assert episodes.open_L[0]
    for now, letter in enumerate("ccc", start=10):
        step(episodes, now, [letter])
    assert not episodes.open_L[0]


def test_steps_without_a_verdict_neither_end_nor_begin_anything():
    episodes = Episodes(1, need=3, of=5, clear_after=5)
    reports = [step(episodes, now, [letter]) for now, letter in enumerate("H----H----H" + "-" * 50)]
    assert [now for now, layers in enumerate(reports) if layers] == [10]
    assert episodes.open_L[0]


def test_layers_that_follow_at_once_belong_to_the_same_report_and_later_ones_do_not():
    episodes = Episodes(3, need=1, of=1, clear_after=5)
    reports = {}
    for now in range(40):
        letters = ["H", "H" if now >= SPREAD else "c", "H" if now >= SPREAD + 1 else "c"]
        reports[now] = step(episodes, now, letters)
    assert {now: layers for now, layers in reports.items() if layers} == {0: [0], SPREAD + 1: [2]}
    assert episodes.open_L.all()


def test_a_new_episode_after_a_closed_one_is_reported_however_soon():
    episodes = Episodes(1, need=1, of=1, clear_after=1)
    reports = [step(episodes, now, [letter]) for now, letter in enumerate("HcHcH")]
    assert reports == [[0], [], [0], [], [0]]


def test_age_counts_the_judged_steps_of_an_open_episode():
    episodes = Episodes(1, need=1, of=1, clear_after=9)
    for now, letter in enumerate("HHm--cH"):
        step(episodes, now, [letter])
    assert episodes.age_L[0] == 4

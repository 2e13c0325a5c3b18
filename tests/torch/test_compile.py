"""torch.compile: the model's graphs stay whole, and training is what it is without a watch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters

CLIP = {"version": 1, "clip": [{"limit": 0.5}]}
POLICIES = {
    "clips": CLIP,
    "looks for culprits": {**CLIP, "detect": {"culprit": "replay"}},
    "samples each step": {**CLIP, "detect": {"every": 1}},
    "accumulates": {**CLIP, "accumulate": {"steps": 2}},
}


@pytest.fixture(autouse=True)
def _afresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    counters.clear()


def train(task, optimizer, model, step, steps: int = 5, limit: float | None = None):
    """Norms and what the compiler did, by kind."""
    for index in range(steps):
        draw = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, 20, (8, 6), generator=draw)
        target = torch.randint(0, 5, (8,), generator=draw)
        torch.nn.functional.cross_entropy(model(tokens), target).mul(10).backward()
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(task.model.parameters(), limit)
        step()
        optimizer.zero_grad()
    return Counter(
        {
            "breaks": sum(counters["graph_break"].values()),
            "graphs": counters["stats"]["unique_graphs"],
        }
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_no_graph_break_and_no_graph_is_added_to_the_model(task, attach, policy):
    plain = task.copy()
    found = []
    for one, watched in ((plain, False), (task, True)):
        torch.compiler.reset()
        counters.clear()
        optimizer = torch.optim.AdamW(one.model.parameters(), lr=1e-2)
        model = torch.compile(one.model, backend="aot_eager", fullgraph=True)
        if watched:
            attach(model, optimizer, POLICIES[policy])
        found.append(train(one, optimizer, model, optimizer.step))
    assert found[1] == found[0] == Counter({"graphs": 1})


def test_attached_before_it_is_compiled_the_model_is_one_graph_too(task, attach):
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-2)
    attach(task.model, optimizer, CLIP)
    explained = torch._dynamo.explain(task.model)(torch.randint(0, 20, (8, 6)))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_a_compiled_model_is_clipped_as_torch_clips_it(task, attach):
    plain = task.copy()
    for one, limit in ((plain, 0.5), (task, None)):
        optimizer = torch.optim.AdamW(one.model.parameters(), lr=1e-2)
        model = torch.compile(one.model, backend="aot_eager")
        if limit is None:
            watch = attach(model, optimizer, CLIP)
        train(one, optimizer, model, optimizer.step, limit=limit)
    assert all(record.clipped for record in watch.history(5))
    pairs = zip(plain.parameters(), task.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what torch imports to compile an optimizer
@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_step_is_watched_each_time_and_compiled_as_often_as_without(task, attach, fused):
    """Nothing of a hook is traced: no graph more, and no break but those of torch itself."""
    plain = task.copy()
    found = []
    for one, watched in ((plain, False), (task, True)):
        torch.compiler.reset()
        counters.clear()
        optimizer = torch.optim.AdamW(one.model.parameters(), lr=1e-2, fused=fused)
        if watched:
            watch = attach(one.model, optimizer, CLIP)
        step = torch.compile(optimizer.step, backend="aot_eager")
        limit = None if watched else 0.5
        found.append(train(one, optimizer, one.model, step, limit=limit))
    assert [record.step for record in watch.history(9)] == list(range(5))
    assert all(record.clipped for record in watch.history(9))
    assert found[1]["graphs"] == found[0]["graphs"]
    assert found[1]["breaks"] <= found[0]["breaks"]
    pairs = zip(plain.parameters(), task.parameters(), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) <= (1e-6 if fused else 0.0)

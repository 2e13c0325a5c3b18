"""One process that is not like the others: it made a step bad, has other weights, or odd data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.torch import ranks

SKIP = {"nonfinite": "skip", "patience": 1000}


class Run:
    """A model of all processes that each of them trains on data of its own."""

    def __init__(self, rank, size, *, shards=False, recording=None, **detect):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
        self.called = self.model
        if shards:
            fully_shard(self.model, mesh=init_device_mesh("cpu", (size,)))
        else:
            self.called = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        policy = {"version": 1, "guard": SKIP, "detect": detect}
        self.watch = gradwatch.attach(
            self.called, self.optimizer, policy, port=None, recording=recording
        )
        self.found = []
        self.watch.on_anomaly(self.found.append)
        torch.manual_seed(1 + rank)

    def step(self, batch=None, factor=1.0, times=1):
        for _ in range(times):
            self.optimizer.zero_grad()
            out = self.called(torch.randn(8, 6) if batch is None else batch)
            loss = out.square().mean() * factor
            loss.backward()
            self.watch.log(loss=loss)
            self.optimizer.step()

    @property
    def culprit(self):
        self.watch.flush()
        culprit = self.watch.latest.culprit
        return culprit.origin, culprit.module, culprit.ranks, culprit.message


def makes_nan(rank, size, how):
    run = Run(rank, size, culprit=how)
    found = []
    run.step(times=3)
    run.step(factor=math.nan if rank == 2 else 1.0)
    found.append(run.culprit)
    run.step(torch.full((8, 6), math.nan) if rank == 1 else None)
    found.append(run.culprit)
    with torch.no_grad():
        run.model[2].weight[0, 0] = math.nan
    run.step()
    found.append(run.culprit)
    run.watch.close()
    return found


def test_the_rank_that_made_a_step_bad_is_known_on_all_of_them(on_ranks):
    results = on_ranks(makes_nan, "replay")
    assert all(found == results[0] for found in results)
    loss, batch, weight = results[0]
    assert loss[:3] == ("loss", None, (2,))
    assert loss[3].startswith("on rank 2 of 4: the loss is nan")
    assert batch[:3] == ("input", None, (1,))
    assert weight[:3] == ("weight", "2", (0, 1, 2, 3))
    assert weight[3].startswith("on every rank: weights of 2")


def test_flags_alone_tell_the_rank_and_no_wrong_module(on_ranks):
    results = on_ranks(makes_nan, "flags")
    loss, batch, weight = results[3]
    assert (loss[:2], loss[2]) == ((None, None), (2,))
    assert (batch[:2], batch[2]) == ((None, None), (1,))
    assert weight[:3] == ("weight", "2", (0, 1, 2, 3))


def makes_nan_of_shards(rank, size):
    run = Run(rank, size, shards=True, culprit="always")
    run.step(times=3)
    run.step(factor=math.nan if rank == 1 else 1.0)
    found = run.culprit
    run.watch.close()
    return found


def test_of_sharded_parameters_the_loss_tells_the_rank(on_ranks):
    for origin, module, of, _ in on_ranks(makes_nan_of_shards):
        assert (origin, module, of) == ("loss", None, (1,))


def leaves_one_alone(rank, size):
    ranks.CONFER_SECONDS = 0.5
    run = Run(rank, size, culprit="replay")
    run.step(times=3)
    if rank == 1:
        run.watch._backend.confer = lambda *_: ()  # it hangs elsewhere
    run.step(factor=math.nan if rank == 1 else 1.0)
    found = run.culprit
    run.watch.close()
    return found


def test_a_rank_that_does_not_answer_holds_nobody_up(on_ranks):
    told, _ = on_ranks(leaves_one_alone, size=2)
    assert told[:3] == (None, None, ())
    assert "rank 1 did not answer" in told[3]


def diverges(rank, size, shards):
    run = Run(rank, size, shards=shards, rank_divergence={"every": 5})
    run.step(times=23)
    run.watch.flush()
    before = len(run.found)
    if rank == 1 and not shards:
        with torch.no_grad():
            run.model[2].bias[0] += 1e-6
    run.step(times=17)
    run.watch.flush()  # all have posted their samples
    torch.distributed.barrier()
    for _ in range(3):
        run.watch.flush()
    active = run.watch.pipeline.consumer.open_anomalies()
    run.watch.close()
    return before, [(a.kind, a.step, a.layers, a.message) for a in run.found], active


def test_weights_that_differ_are_found_at_the_next_comparison_with_layer_and_rank(on_ranks):
    first, *others = on_ranks(diverges, False)
    before, found, active = first
    assert before == 0
    ((kind, step, layers, message),) = [one for one in found if one[0] == "rank_divergence"]
    assert (step, layers) == (25, ("2",))
    assert "rank 1 differs from the others" in message
    assert kind in active
    assert all(found == [] for _, found, _ in others)


def test_shards_that_nobody_else_has_are_not_compared(on_ranks):
    for _, found, active in on_ranks(diverges, True, size=2):
        assert found == []
        assert active == {}


def is_odd(rank, size, directory):
    detect = {"every": 2, "exploding": "none", "loss_spike": "none", "spike": "none"}
    run = Run(rank, size, recording=directory, **detect)
    run.step(times=60)
    run.watch.flush()
    before = len(run.found)
    run.step(factor=100.0 if rank == 3 else 1.0, times=12)
    run.watch.flush()  # all have posted their samples
    torch.distributed.barrier()
    for _ in range(3):
        run.watch.flush()
    run.watch.close()
    return before, [(a.kind, a.step, a.message) for a in run.found]


def test_a_rank_whose_own_gradient_is_odd_is_found_and_its_norm_recorded(on_ranks, tmp_path):
    (before, found), *_ = on_ranks(is_odd, str(tmp_path / "runs"))
    assert before == 0
    ((kind, step, message),) = [one for one in found if one[0] == "rank_outlier"]
    assert (kind, step) == ("rank_outlier", 64)
    assert "the gradient of rank 3, before it is averaged" in message
    assert "since step 60" in message
    for path in (tmp_path / "runs").glob("*.sqlite"):
        with gradwatch.open_recording(path) as recording:
            steps, norms = recording.series("local_norm")
            known = steps[~(norms != norms)]
            assert known.tolist() == list(range(2, 72, 2))
            odd = recording.info.rank == 3
            late = norms[steps == 68] / norms[steps == 50]
            assert (late > 20) == odd


def own_norms(rank, size):
    run = Run(rank, size, every=1)
    run.step(times=2)
    batch = torch.randn(8, 6)
    alone = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    alone.load_state_dict(run.model.state_dict())
    alone(batch.double()).square().mean().backward()
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in alone.parameters()))
    run.step(batch)
    run.watch.flush()
    norm = run.watch.latest.local_norm
    run.watch.close()
    return norm, expected


def test_the_own_norm_is_that_of_the_process_by_itself(on_ranks):
    for norm, expected in on_ranks(own_norms, size=2):
        assert norm == pytest.approx(expected, rel=5e-7)

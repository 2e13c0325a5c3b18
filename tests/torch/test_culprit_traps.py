"""What went bad first, where a simple reading of the clues would name the wrong one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from tests.torch.odd_models import Tied

EACH = pytest.mark.parametrize("how", ["flags", "replay", "always"])
LOOKING = pytest.mark.parametrize("how", ["replay", "always"])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.middle(self.first(x).tanh()).tanh())


class Run:
    """A model and its optimizer under a policy that skips what is not finite."""

    def __init__(self, attach, how, model=None, optimizer=None, **given) -> None:
        torch.manual_seed(0)
        self.model = Small() if model is None else model
        if optimizer is None:
            optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.optimizer = optimizer
        policy = {
            "version": 1,
            "guard": {"nonfinite": "skip", "patience": 1000},
            "detect": {"culprit": how},
        }
        self.watch = attach(self.model, self.optimizer, policy, **given)

    def batch(self):
        return torch.randn(5, 6)

    def step(self, batch=None, loss=lambda out: out.square().mean(), times=1):
        for _ in range(times):
            self.optimizer.zero_grad()
            value = loss(self.model(self.batch() if batch is None else batch))
            value.backward()
            self.watch.log(loss=value)
            self.optimizer.step()

    @property
    def culprit(self):
        self.watch.flush()
        return self.watch.latest.culprit

    @property
    def named(self):
        return self.culprit.origin, self.culprit.module


def spoilt(out):
    """Finite forward, NaN on the way back."""
    return out.mean() + (out - out).abs().sum().sqrt()


@EACH
def test_a_shared_weight_whose_bad_row_is_not_looked_up_is_found_at_the_head(how, attach):
    run = Run(attach, how, Tied())
    codes = torch.arange(10)  # of 12
    run.step(codes)
    with torch.no_grad():
        run.model.embed.weight[11] = math.nan
    run.step(codes)
    assert run.named == ("weight", "embed")
    assert "shared with head" in run.culprit.message


@EACH
def test_a_bad_row_that_is_not_looked_up_is_not_blamed_for_a_bad_loss(how, attach):
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 3))
    run = Run(attach, how, model)
    codes = torch.arange(10)
    with torch.no_grad():
        model[0].weight[11] = math.nan
    run.step(codes, loss=lambda out: out.mean() * math.nan)
    assert run.named == (None, None)


@EACH
@pytest.mark.parametrize("used", [False, True])
def test_a_bad_frozen_weight_is_named_only_where_it_is_seen_to_spoil_something(how, used, attach):
    model = Small()
    model.spare = nn.Linear(8, 8).requires_grad_(False)
    if used:
        model.middle = nn.Sequential(model.spare, model.middle)
    run = Run(attach, how, model)
    run.step(times=3)
    with torch.no_grad():
        model.spare.weight[0, 0] = math.nan
    if used:
        run.step()
        expected = (None, None) if how == "flags" else ("weight", "middle.0")
        assert run.named == expected
    else:
        run.step(loss=spoilt)
        assert run.culprit.origin != "weight"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, given):
        x, mask = given
        x = self.embed(x)
        return self.attend(x, x, x, attn_mask=mask, need_weights=True)[0]


@LOOKING
def test_a_mask_that_leaves_nothing_of_a_row_is_not_told_as_the_attention(how, attach):
    run = Run(attach, how, Attention())
    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf)
    run.step((torch.randn(2, 4, 6), mask), times=2)
    assert run.culprit is None
    mask = mask.clone()
    mask[0] = -math.inf
    run.step((torch.randn(2, 4, 6), mask))
    assert run.named == (None, None)
    assert "a mask that leaves nothing of a row" in run.culprit.message


class Branches(nn.Module):
    """Runs its blocks in another order each time."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.orders = itertools.cycle(itertools.permutations(range(3)))
        self.bad_behind = None

    def forward(self, x):
        for i in next(self.orders):
            x = self.blocks[i](x).tanh()
            if i == self.bad_behind:
                x = x + (x - x).abs().sum().sqrt()
        return x


@EACH
def test_a_graph_that_changes_has_no_order_to_name_anything_by(how, attach):
    run = Run(attach, how, Branches())
    run.step(times=6)
    for block in range(3):
        run.model.bad_behind = block
        run.step()
        assert run.culprit.module is None


@LOOKING
def test_a_hook_of_the_model_that_spoils_its_input_is_not_told_as_the_input(how, attach):
    run = Run(attach, how)
    run.model.register_forward_pre_hook(lambda module, args: (args[0] * math.nan,))
    run.step()
    assert run.named == ("forward", "(model)")


@LOOKING
def test_a_pass_that_the_loop_left_alone_is_no_pass_of_the_step(how, attach):
    run = Run(attach, how)
    run.step(times=2)
    loss = run.model(torch.full((5, 6), math.nan)).mean()
    assert not loss.isfinite()  # so that the loop goes on with the next batch
    run.step(loss=lambda out: out.mean() * math.nan)
    assert run.named == ("loss", None)


@LOOKING
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_pass_whose_gradients_the_loop_threw_away_is_no_pass_of_the_step(
    how, set_to_none, attach
):
    run = Run(attach, how)
    run.step(times=2)
    run.model(torch.full((5, 6), math.nan)).mean().backward()
    run.optimizer.zero_grad(set_to_none=set_to_none)
    value = run.model(run.batch()).mean() * math.nan
    value.backward()
    run.watch.log(loss=value)
    run.optimizer.step()
    assert run.named == ("loss", None)


@LOOKING
def test_passes_that_are_summed_by_the_loop_are_all_of_the_step(how, attach):
    run = Run(attach, how)
    run.step(times=2)
    run.optimizer.zero_grad()
    for batch in (run.batch(), torch.full((5, 6), math.nan), run.batch()):
        run.model(batch).mean().backward()
    run.optimizer.step()
    assert run.named == ("input", None)
    assert "forward pass 2 of 3" in run.culprit.message


@LOOKING
def test_the_passes_of_another_optimizers_step_are_not_those_of_this_one(how, attach):
    model = Small()
    run = Run(attach, how, model, torch.optim.SGD(model.first.parameters(), lr=0.01))
    other = Run(attach, how, model, torch.optim.SGD(model.last.parameters(), lr=0.01))
    run.step(times=2)
    other.step(torch.full((5, 6), math.nan))
    assert other.named == ("input", None)
    run.step(loss=lambda out: out.mean() * math.nan)
    assert run.named == ("loss", None)


@LOOKING
def test_steps_that_a_scaler_drops_unseen_leave_no_passes_behind(how, attach):
    """Only a fused optimizer is called in a step that overflowed."""
    model = Small()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run = Run(attach, how, model, scaler=scaler)
    passes = run.watch._backend.finder._passes

    def step(loss_is_bad=False):
        run.optimizer.zero_grad()
        value = model(run.batch()).square().mean() * (math.nan if loss_is_bad else 1.0)
        scaler.scale(value).backward()
        scaler.step(run.optimizer)
        scaler.update()

    step()
    for _ in range(20):
        step(loss_is_bad=True)
    assert len(passes._seen.passes) == 1
    step()
    assert run.culprit is None


def test_a_call_under_vmap_costs_its_own_step_at_most(attach):
    run = Run(attach, "always")
    run.step(times=2)
    torch.vmap(lambda row: run.model(row))(run.batch())
    for origin in (None, "loss"):
        run.step(loss=lambda out: out.mean() * math.nan)
        assert run.named == (origin, None)
    errors = run.watch.pipeline.tally.snapshot().labelled["hook_errors_total"]
    assert errors["measure",] == 0


@LOOKING
def test_a_value_that_holds_itself_is_looked_through_once(how, attach):
    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x, around):
            return self.linear(x)

    model = Holding()
    around: list = []
    around += [around] * 20
    run = Run(attach, how, model)
    for factor in (1.0, math.nan):
        run.optimizer.zero_grad()
        value = model(run.batch(), around).mean() * factor
        value.backward()
        run.watch.log(loss=value)
        run.optimizer.step()
    assert run.named == ("loss", None)


@LOOKING
def test_outputs_that_are_not_looked_into_exclude_nothing(how, attach):

    class Hidden:
        def __init__(self, value) -> None:
            self.value = value

    class Opaque(Small):
        def forward(self, x):
            return Hidden(super().forward(x))

    run = Run(attach, how, Opaque())
    run.step(loss=lambda out: out.value.mean() * math.nan)
    assert run.named == (None, None)
    assert "could not be looked into" in run.culprit.message


@LOOKING
def test_of_several_passes_before_one_backward_pass_the_bad_one_is_found(how, attach):
    """As in contrastive training, where a batch goes through the model twice."""
    run = Run(attach, how)
    run.step(times=2)
    run.optimizer.zero_grad()
    outs = [run.model(run.batch()), run.model(torch.full((5, 6), math.nan)), run.model(run.batch())]
    loss = sum(out.square().mean() for out in outs)
    loss.backward()
    run.watch.log(loss=loss)
    run.optimizer.step()
    assert run.named == ("input", None)
    assert "forward pass 2 of 3" in run.culprit.message


class Scaled(Small):
    """Puts a weight of its own out, too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x), self.scale


def test_a_weight_that_is_put_out_gathers_no_hooks(attach):
    run = Run(attach, "replay", Scaled())
    run.step(loss=lambda out: (out[0] * out[1]).mean(), times=20)
    assert not run.model.scale._backward_hooks


class Momentum(Small):
    """Moves a copy of its weights in each forward pass."""

    def __init__(self, how) -> None:
        super().__init__()
        self.how = how
        self.slow = nn.Parameter(torch.zeros(8, 6), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            moved = 0.9 * self.slow + 0.1 * self.first.weight
            if self.how == "in place":
                self.slow.copy_(moved)
            else:
                self.slow.data = moved
        return super().forward(x) + (x @ self.slow.T).mean()


@pytest.mark.parametrize("how", ["in place", "data"])
def test_a_pass_that_moves_weights_moves_them_once(how, attach):
    models = []
    for culprit in ("replay", "none"):
        torch.manual_seed(2)
        run = Run(attach, culprit, Momentum(how))
        torch.manual_seed(3)
        run.step(times=2)
        run.step(loss=lambda out: out.mean() * math.nan)
        run.step()
        models.append(run.model)
    pairs = zip(*(model.parameters() for model in models), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Missing(Small):
    def forward(self, x):
        return super().forward(torch.where(torch.isnan(x), 0.0, x))


@LOOKING
def test_missing_values_that_are_always_there_are_not_blamed(how, attach):
    run = Run(attach, how, Missing())
    batch = run.batch()
    batch[0, 0] = math.nan
    run.step(batch, times=3)
    run.step(batch, loss=lambda out: out.mean() * math.nan)
    assert run.named in (("loss", None), (None, None))
    with torch.no_grad():
        run.model.middle.weight[0, 0] = math.nan
    run.step(batch)
    assert run.named == ("weight", "middle")


@EACH
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_weight_that_was_bad_in_a_finite_step_is_not_blamed(how, value, attach):
    model = Small()
    model.spare = nn.Linear(2, 2).requires_grad_(False)
    with torch.no_grad():
        model.spare.weight[0, 0] = value
    run = Run(attach, how, model)
    run.step(times=2)
    with torch.no_grad():
        model.middle.bias[0] = math.nan
    run.step()
    assert run.named == ("weight", "middle")


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.main, self.aux = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.stem(x).tanh()
        return self.main(hidden), self.aux(hidden)


@LOOKING
def test_a_loss_that_was_not_logged_is_not_told_as_a_backward_pass(how, attach):
    run = Run(attach, how, Auxiliary())
    run.step(loss=lambda out: out[0].mean() + out[1].mean(), times=3)
    run.optimizer.zero_grad()
    main, aux = run.model(run.batch())
    (main.mean() + aux.mean() * math.nan).backward()
    run.watch.log(loss=main.mean())
    run.optimizer.step()
    assert run.named == (None, None)


@LOOKING
@pytest.mark.parametrize("logs_each", [True, False])
def test_an_early_micro_batch_whose_loss_is_bad_is_not_hidden_by_a_later_one(
    how, logs_each, attach
):
    run = Run(attach, how)
    run.step(times=3)
    run.optimizer.zero_grad()
    for factor in (math.nan, 1.0):
        loss = run.model(run.batch()).mean() * factor
        loss.backward()
        if logs_each or factor == 1.0:
            run.watch.log(loss=loss)
    run.optimizer.step()
    assert run.named == (("loss", None) if logs_each else (None, None))


@LOOKING
def test_what_a_loop_does_to_gradients_is_not_told_as_a_backward_pass(how, attach):
    run = Run(attach, how)
    run.step(times=3)
    run.optimizer.zero_grad()
    loss = run.model(run.batch()).mean()
    loss.backward()
    for parameter in run.model.parameters():
        parameter.grad.div_(0.0).mul_(0.0)
    run.watch.log(loss=loss)
    run.optimizer.step()
    assert run.named == (None, None)
    assert "the backward pass left gradients that are finite" in run.culprit.message


@LOOKING
def test_a_teacher_of_the_same_model_forbids_to_blame_the_loss(how, attach):
    run = Run(attach, how)
    run.step(times=3)
    with torch.no_grad():
        target = run.model(torch.full((5, 6), math.nan))
    run.step(loss=lambda out: (out - target).square().mean())
    assert run.named == (None, None)


class Talking(Small):
    def forward(self, x):
        torch.distributed.all_reduce(x.mean())
        return super().forward(x)


def test_a_pass_that_talks_to_other_processes_is_not_run_again(attach):
    """The others would not be there to answer."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        run = Run(attach, "replay", Talking())
        run.step(times=2)
        run.model.middle.register_forward_hook(lambda m, a, out: out * math.nan)
        run.step()
    finally:
        dist.destroy_process_group()
    assert run.named == (None, None)
    assert "takes part in a collective" in run.culprit.message


@LOOKING
def test_evaluation_with_gradients_on_does_not_crowd_the_step_out(how, attach):
    run = Run(attach, how)
    run.step(times=2)
    for _ in range(300):
        run.model(run.batch())
    run.step(loss=lambda out: out.mean() * math.nan)
    assert run.named == ("loss", None)


@LOOKING
def test_a_checkpointed_pass_counts_once(how, attach):
    run = Run(attach, how)
    checkpoint = torch.utils.checkpoint.checkpoint
    for factor in (1.0, 1.0, math.nan):
        run.optimizer.zero_grad()
        loss = checkpoint(run.model, run.batch(), use_reentrant=False).mean() * factor
        loss.backward()
        run.watch.log(loss=loss)
        run.optimizer.step()
    assert run.named == ("loss", None)

"""A run under a trainer: resumed, crashed, stopped, with several optimizers, with its losses."""

from __future__ import annotations

import math
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch

import gradwatch
import gradwatch.lightning
import gradwatch.transformers

LEARNS = {"version": 1, "clip": [{"name": "level", "limit": {"ratio": 1.05, "warmup": 2}}]}
SKIPS = {"version": 1, "guard": {"nonfinite": "skip"}}


def recorded(folder):
    with gradwatch.open_recording(folder) as recording:
        return recording.state, list(recording)


class TestResumed:
    """Two epochs of four steps, and the second one alone, from the checkpoint between them."""

    def by_lightning(self, kit, folder, checkpoint=None):
        net = kit.Net()
        callback = gradwatch.lightning.GradWatch(LEARNS, **kit.QUIET)
        kept = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)
        kit.fit(
            kit.OfLightning(net, kit.make_optimizer("AdamW", net)), callback, callbacks=[kept],
            accumulate_grad_batches=2, max_epochs=2, enable_checkpointing=True,
            checkpoint=checkpoint,
        )  # fmt: skip
        return callback, net

    def by_transformers(self, kit, folder, checkpoint=None):
        net = kit.Net()
        callback = gradwatch.transformers.GradWatch(LEARNS, **kit.QUIET)
        trainer = kit.hf_trainer(
            net, kit.make_optimizer("AdamW", net), callback, folder,
            num_train_epochs=2, save_strategy="steps", save_steps=4,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        return callback, net

    @pytest.mark.parametrize(
        ("train", "pattern"),
        [("by_lightning", "*step=4.ckpt"), ("by_transformers", "checkpoint-4")],
    )
    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    def test_a_resumed_run_goes_on_where_it_was(self, kit, tmp_path, train, pattern):
        whole, net = getattr(self, train)(kit, tmp_path / "whole")
        (checkpoint,) = (tmp_path / "whole").glob(pattern)
        part, resumed = getattr(self, train)(kit, tmp_path / "part", str(checkpoint))
        expected, found = whole.watch.history(9)[4:], part.watch.history(9)
        assert [record.step for record in found] == [4, 5, 6, 7]
        assert [record.limits for record in found] == [record.limits for record in expected]
        assert [r.total_norm for r in found] == [r.total_norm for r in expected]
        assert any(record.clipped for record in found)
        assert kit.same(net, resumed)

    def test_a_checkpoint_without_its_file_is_a_run_that_begins_anew(self, kit, tmp_path):
        self.by_transformers(kit, tmp_path / "whole")
        checkpoint = tmp_path / "whole" / "checkpoint-4"
        (checkpoint / gradwatch.transformers.STATE_FILE).unlink()
        callback, _ = self.by_transformers(kit, tmp_path / "part", str(checkpoint))
        assert [record.step for record in callback.watch.history(9)] == [0, 1, 2, 3]

    @pytest.mark.parametrize("content", [b"no state", b""])
    def test_a_damaged_file_is_a_failure_of_ours_and_not_of_the_run(self, kit, tmp_path, content):
        self.by_transformers(kit, tmp_path / "whole")
        checkpoint = tmp_path / "whole" / "checkpoint-4"
        (checkpoint / gradwatch.transformers.STATE_FILE).write_bytes(content)
        callback, _ = self.by_transformers(kit, tmp_path / "part", str(checkpoint))
        assert [record.step for record in callback.watch.history(9)] == [0, 1, 2, 3]

    def test_the_state_of_another_model_is_said_to_begin_anew(self, kit, caplog):
        callback = gradwatch.lightning.GradWatch(LEARNS, **kit.QUIET)
        callback.load_state_dict({"watches": [{"version": 99}]})
        net = kit.Net()
        kit.fit(kit.OfLightning(net, kit.make_optimizer("SGD", net)), callback)
        assert "the state must be of version 1. Received: 99" in caplog.text
        assert "statistics and detection begin anew" in caplog.text
        assert len(callback.watch.history(9)) == 8

    def test_a_checkpoint_behind_the_last_step_holds_the_state_too(self, kit, tmp_path):
        net = kit.Net()
        callback = gradwatch.lightning.GradWatch(LEARNS, **kit.QUIET)
        module = kit.OfLightning(net, kit.make_optimizer("SGD", net))
        trainer = kit.fit(module, callback)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        (state,) = saved["callbacks"][callback.state_key]["watches"]
        assert state["version"] == 1


class TestEnds:
    def train(self, kit, trainer, folder, fail_at, policy=SKIPS):
        net = kit.Net()
        settings = {"port": None, "recording": folder / "runs", "run": "ends"}
        seen = []

        def fail(grad):
            seen.append(grad)
            if len(seen) == fail_at:
                raise ArithmeticError("the loop's own")
            return grad

        net.head.bias.register_hook(fail)
        optimizer = kit.make_optimizer("SGD", net)
        if trainer == "Lightning":
            callback = gradwatch.lightning.GradWatch(policy, **settings)
            kit.fit(kit.OfLightning(net, optimizer), callback)
        else:
            callback = gradwatch.transformers.GradWatch(policy, **settings)
            one = kit.hf_trainer(net, optimizer, callback, folder, gradient_accumulation_steps=1)
            try:
                one.train()
            except ArithmeticError:
                one.train()  # the callback ends the first run when the second one begins
        return callback

    @pytest.mark.parametrize("trainer", ["Lightning", "Hugging Face"])
    def test_a_run_that_ends_is_finished(self, kit, trainer, tmp_path):
        self.train(kit, trainer, tmp_path, fail_at=None)
        state, records = recorded(tmp_path / "runs")
        assert (state, len(records)) == ("finished", 8)

    def test_a_run_that_lightning_sees_fail_has_crashed(self, kit, tmp_path):
        with pytest.raises(ArithmeticError, match="the loop's own"):
            self.train(kit, "Lightning", tmp_path, fail_at=4)
        state, records = recorded(tmp_path / "runs")
        assert (state, len(records)) == ("crashed", 3)

    def test_a_run_that_failed_has_crashed_once_the_next_one_begins(self, kit, tmp_path):
        self.train(kit, "Hugging Face", tmp_path, fail_at=4)
        paths = sorted((tmp_path / "runs").glob("*.sqlite"), key=lambda path: path.stat().st_mtime)
        found = [recorded(path) for path in paths]
        assert sorted((state, len(r)) for state, r in found) == [("crashed", 3), ("finished", 8)]

    @pytest.mark.parametrize("trainer", ["Lightning", "Hugging Face"])
    def test_a_policy_that_stops_ends_the_run_before_the_update(self, kit, trainer, tmp_path):
        stops = {"version": 1, "clip": [{"limit": 0.1, "then": "stop"}]}
        with pytest.raises(gradwatch.TrainingStopped, match="stopped before the update of step 0"):
            self.train(kit, trainer, tmp_path, fail_at=None, policy=stops)
        if trainer == "Lightning":
            assert recorded(tmp_path / "runs")[0] == "stopped"


class Pair(pl.LightningModule):
    """Two networks, each with its optimizer."""

    def __init__(self, kit) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = kit.Net(), kit.Net()
        self.made = [kit.make_optimizer("SGD", net) for net in (self.first, self.second)]

    def training_step(self, batch, batch_idx) -> None:
        for net, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(net(*batch)["loss"])
            optimizer.step()

    def configure_optimizers(self):
        return self.made


def test_each_optimizer_of_a_module_has_a_watch(kit, tmp_path):
    callback = gradwatch.lightning.GradWatch(run="pair", port=None, recording=tmp_path)
    assert callback.watch is None
    kit.fit(Pair(kit), callback)
    first, second = callback.watches
    assert callback.watch is first
    assert first.info.layout.layers == ("first.stem", "first.head")
    assert second.info.layout.layers == ("second.stem", "second.head")
    assert [watch.info.run for watch in callback.watches] == ["pair-0", "pair-1"]
    assert len(first.history(9)) == len(second.history(9)) == 8


class TestLosses:
    def expected(self, kit):
        net, losses = kit.Net(), []
        with torch.no_grad():
            for batch in kit.loader():
                losses.append(float(net(*batch)["loss"]))
        return [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]

    @pytest.mark.parametrize("name", ["Hugging Face", "Lightning automatic", "Lightning manual"])
    def test_the_loss_in_a_record_is_the_mean_over_its_window(self, kit, name, tmp_path):
        net = kit.Net()
        still = torch.optim.SGD(net.parameters(), lr=0.0)
        watch = kit.TRAINERS[name](net, still, None, None, tmp_path)
        found = [record.scalars["loss"] for record in watch.history(9)]
        assert found == pytest.approx(self.expected(kit), rel=1e-5)


@pytest.mark.parametrize(
    "name", ["Accelerate", "Hugging Face", "Lightning automatic", "Lightning manual"]
)
def test_a_step_that_the_trainers_scaler_drops_is_an_overflow(kit, name, tmp_path):
    net = kit.Net()
    passes = []
    net.stem.bias.register_hook(
        lambda grad: grad * math.inf if passes.append(0) or len(passes) == 3 else grad
    )
    scaler = kit.make_scaler()
    watch = kit.TRAINERS[name](net, kit.make_optimizer("AdamW", net), SKIPS, scaler, tmp_path)
    records = watch.history(9)
    assert [record.skipped for record in records] == [None, "overflow", None, None]
    assert records[0].loss_scale == 2.0**8
    assert records[2].loss_scale == 2.0**7


@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_a_framework_that_is_missing_costs_one_helpful_line(framework):
    code = f"import sys; sys.modules[{framework!r}] = None; import gradwatch.{framework}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: gradwatch.{framework} needs ")
    assert "pip install 'gradwatch[" in last


class Scheduled:
    """A learning rate of 1, 1/2, 1/4, ... by step, and one bad gradient in the second window."""

    def by_transformers(self, kit, net, optimizer, scaler, folder):
        callback = gradwatch.transformers.GradWatch(SKIPS, **kit.QUIET)
        trainer = kit.hf_trainer(net, optimizer, callback, folder)
        trainer.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        trainer.accelerator.scaler = scaler
        trainer.train()
        return callback.watch

    def by_lightning(self, kit, net, optimizer, scaler, folder):
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

        class Module(kit.OfLightning):
            def configure_optimizers(self):
                return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        callback = gradwatch.lightning.GradWatch(SKIPS, **kit.QUIET)
        settings = {"accumulate_grad_batches": 2, **kit._plugins(scaler)}
        kit.fit(Module(net, optimizer), callback, **settings)
        return callback.watch


@pytest.mark.parametrize(
    ("train", "dropped_by_scaler", "rates"),
    [
        ("by_transformers", False, [1, 0.5, 0.25, 0.125]),
        ("by_lightning", False, [1, 0.5, 0.25, 0.125]),
        ("by_transformers", True, [1, 0.5, 0.25]),
        ("by_lightning", True, [1, 0.25, 0.125]),
    ],
)
def test_a_schedule_waits_for_the_scaler_where_documented_and_for_the_policy_never(
    kit, train, dropped_by_scaler, rates, tmp_path
):
    net = kit.Net()
    passes = []
    net.stem.bias.register_hook(
        lambda grad: grad * math.inf if passes.append(0) or len(passes) == 3 else grad
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = kit.make_scaler() if dropped_by_scaler else None
    watch = getattr(Scheduled(), train)(kit, net, optimizer, scaler, tmp_path)
    records = watch.history(9)
    assert records[1].skipped == ("overflow" if dropped_by_scaler else "nonfinite")
    taken = [r.learning_rate for r in records if r.skipped != "overflow"]
    assert taken == rates

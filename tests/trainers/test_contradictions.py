"""Where a trainer clips or accumulates too: refused with the mend, or measured before it."""

from __future__ import annotations

import copy
import logging

import accelerate
import lightning.pytorch as pl
import pytest

import gradwatch
import gradwatch.lightning
import gradwatch.transformers

CLIP = {"version": 1, "clip": [{"limit": 1.0}]}
SHADOW = {**CLIP, "mode": "shadow"}
GUARD = {"version": 1, "guard": {"nonfinite": "skip"}}


@pytest.fixture
def run(kit, tmp_path):
    """Trains by `trainer` with its settings; the watch and the model."""

    def train(trainer, policy, scaler=None, **settings):
        net = kit.Net()
        optimizer = kit.make_optimizer("SGD", net)
        if trainer == "Hugging Face":
            callback = gradwatch.transformers.GradWatch(policy, **kit.QUIET)
            one = kit.hf_trainer(net, optimizer, callback, tmp_path, **settings)
            one.accelerator.scaler = scaler
            one.train()
        else:
            callback = gradwatch.lightning.GradWatch(policy, **kit.QUIET)
            settings = {"accumulate_grad_batches": 2, **kit._plugins(scaler), **settings}
            kit.fit(kit.OfLightning(net, optimizer), callback, **settings)
        return callback.watch, net

    return train


CLIPPING = [("Hugging Face", {"max_grad_norm": 0.5}), ("Lightning", {"gradient_clip_val": 0.5})]


class TestTwoClippers:
    @pytest.mark.parametrize(
        ("trainer", "settings", "said"),
        [
            ("Hugging Face", {"max_grad_norm": 1.0},
             r"TrainingArguments\(max_grad_norm=1.0\) would clip before the rules of <dict> "
             r"\(global\) see the gradient. Set max_grad_norm=0 and let the policy clip"),
            ("Lightning", {"gradient_clip_val": 0.5},
             r"Trainer\(gradient_clip_val=0.5\) would clip .* Set gradient_clip_val=None"),
            ("Lightning", {"gradient_clip_val": 2, "gradient_clip_algorithm": "value"},
             r"Trainer\(gradient_clip_val=2, gradient_clip_algorithm='value'\) would clip"),
        ],
    )  # fmt: skip
    def test_a_policy_that_clips_is_refused_beside_a_trainer_that_clips(
        self, run, trainer, settings, said
    ):
        with pytest.raises(gradwatch.TwoClippersError, match=said):
            run(trainer, CLIP, **settings)

    @pytest.mark.parametrize(("trainer", "settings"), CLIPPING)
    @pytest.mark.parametrize("policy", [None, SHADOW, GUARD], ids=["none", "shadow", "guard"])
    def test_where_nothing_contradicts_the_norms_are_those_before_the_trainer_clips(
        self, run, kit, trainer, settings, policy, caplog
    ):
        watch, net = run(trainer, policy, **settings)
        plain = kit.Net()
        norms = kit.by_hand(plain, kit.make_optimizer("SGD", plain), 0.5)
        assert [r.total_norm for r in watch.history(9)] == pytest.approx(norms, rel=1e-6)
        assert [r.micro_batches for r in watch.history(9)] == [2, 2, 2, 2]
        assert kit.same(net, plain)
        assert "gradwatch" not in {record.name for record in caplog.records}

    @pytest.mark.parametrize(("trainer", "settings"), CLIPPING)
    def test_under_a_scaler_the_norms_are_clipped_ones_and_that_is_said(
        self, run, kit, trainer, settings, caplog
    ):
        watch, _ = run(trainer, None, kit.make_scaler(), **settings)
        (said,) = [r.getMessage() for r in caplog.records if r.name == "gradwatch"]
        assert "clips before gradwatch can measure (under a GradScaler" in said
        assert len(watch.history(9)) == 4

    def test_a_module_that_clips_by_itself_finds_the_gradients_measured(self, kit, caplog):
        class Clipping(kit.OfLightning):
            def configure_gradient_clipping(self, optimizer, *_, **__):
                self.clip_gradients(optimizer, 0.25, "norm")

        net = kit.Net()
        plain = copy.deepcopy(net)
        callback = gradwatch.lightning.GradWatch(CLIP, **kit.QUIET)
        module = Clipping(net, kit.make_optimizer("SGD", net))
        kit.fit(module, callback, accumulate_grad_batches=2)
        norms = kit.by_hand(plain, kit.make_optimizer("SGD", plain), 0.25)
        assert [r.total_norm for r in callback.watch.history(9)] == pytest.approx(norms, rel=1e-5)
        assert "Clipping.configure_gradient_clipping is its own and runs behind" in caplog.text


def test_the_norm_that_hugging_face_asks_for_is_that_of_the_watch(run, kit, tmp_path):
    """By itself it clips to infinity for it, after which one inf has made every gradient NaN."""
    net = kit.Net()
    callback = gradwatch.transformers.GradWatch(GUARD, **kit.QUIET)
    trainer = kit.hf_trainer(net, kit.make_optimizer("SGD", net), callback, tmp_path)
    net.head.bias.register_hook(lambda grad: grad.abs() * float("inf"))
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    records = callback.watch.history(9)
    assert logged == [record.total_norm for record in records] == [float("inf")] * 4
    assert {record.skipped for record in records} == {"nonfinite"}
    assert [bool(norm < 100) for norm in records[0].grad_norms] == [True, False]
    assert kit.same(net, kit.Net())
    assert "clip_grad_norm_" not in vars(trainer.accelerator)


class TestAccumulation:
    @pytest.mark.parametrize(
        ("trainer", "settings", "accumulate", "said"),
        [
            ("Hugging Face", {}, {"steps": 2},
             r"accumulate.drive: hook makes one step of several .* calls it once a window "
             r"\(TrainingArguments\(gradient_accumulation_steps=2\)\). "
             r"Write accumulate: {steps: 2, drive: loop}, or leave it out"),
            ("Hugging Face", {}, {"steps": 4, "drive": "loop"},
             r"accumulate.steps must be the trainer's own under drive: loop .* Received: 4. "
             r"Write accumulate: {steps: 2, drive: loop}"),
            ("Lightning", {}, {"steps": 2},
             r"accumulate.drive: hook .* \(Trainer\(accumulate_grad_batches=2\)\)"),
            ("Lightning", {}, {"steps": {0: 2, 9: 4}, "drive": "loop"},
             r"accumulate.steps must be the trainer's own"),
            ("Lightning", {"accumulate_grad_batches": 1}, {"steps": 4, "drive": "loop"},
             r"accumulate_grad_batches=1.* Received: 4. Leave accumulate: out"),
            ("Lightning",
             {"accumulate_grad_batches": 1,
              "callbacks": [pl.callbacks.GradientAccumulationScheduler({0: 2})]},
             {"steps": 2, "drive": "loop"},
             r"GradientAccumulationScheduler\({0: 2}\).* Leave accumulate: out"),
        ],
    )  # fmt: skip
    def test_other_windows_than_those_of_the_trainer_are_refused(
        self, run, trainer, settings, accumulate, said
    ):
        with pytest.raises(gradwatch.PolicyError, match=said):
            run(trainer, {"version": 1, "accumulate": accumulate}, **settings)

    @pytest.mark.parametrize("accumulate", [{"steps": 2}, {"steps": 3, "drive": "loop"}])
    def test_accelerates_windows_are_known_without_a_callback(self, kit, accumulate):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        net = kit.Net()
        optimizer = accelerator.prepare(kit.make_optimizer("SGD", net))
        policy = {"version": 1, "accumulate": accumulate}
        with pytest.raises(
            gradwatch.PolicyError, match=r"Accelerator\(gradient_accumulation_steps=2\)"
        ):
            gradwatch.attach(net, optimizer, policy, **kit.QUIET)

    @pytest.mark.parametrize("trainer", ["Hugging Face", "Lightning"])
    def test_a_short_last_window_is_the_mean_of_what_came(self, run, kit, monkeypatch, trainer):
        """Lightning divides it by the setting, which the policy repairs; Hugging Face does not."""
        monkeypatch.setattr(kit.InOrder, "num_micro", 5)
        monkeypatch.setattr(kit, "NUM_MICRO", 5)
        policy = {**CLIP, "accumulate": {"steps": 2, "drive": "loop"}}
        settings = {"num_micro": 5} if trainer == "Lightning" else {}
        watch, net = run(trainer, policy, **settings)
        plain = kit.Net()
        windows = (2, 2, 1)
        norms = kit.by_hand(plain, kit.make_optimizer("SGD", plain), 1.0, windows=windows)
        assert [r.total_norm for r in watch.history(9)] == pytest.approx(norms, rel=1e-6)
        assert [r.micro_batches for r in watch.history(9)] == [2, 2, 1]
        assert kit.same(net, plain)

    @pytest.mark.parametrize(
        ("trainer", "off"),
        [("Hugging Face", "gradient_accumulation_steps"), ("Lightning", "accumulate_grad_batches")],
    )
    def test_a_policy_may_accumulate_for_a_trainer_that_does_not(self, run, kit, trainer, off):
        watch, net = run(trainer, {**CLIP, "accumulate": {"steps": 2}}, **{off: 1})
        plain = kit.Net()
        norms = kit.by_hand(plain, kit.make_optimizer("SGD", plain), 1.0)
        assert [r.total_norm for r in watch.history(9)] == pytest.approx(norms, rel=1e-5)
        assert [r.micro_batches for r in watch.history(9)] == [2, 2, 2, 2]
        assert kit.largest_difference(net, plain) < 1e-6
        assert all(record.scalars["loss"] > 0 for record in watch.history(9))


def test_a_mistake_in_the_policy_is_raised_where_the_callback_is_made(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\nclip:\n  - limit: -1\n")
    for kind in (gradwatch.lightning.GradWatch, gradwatch.transformers.GradWatch):
        with pytest.raises(gradwatch.PolicyError, match=r":3:5: clip\[0\].limit"):
            kind(path)


@pytest.fixture(autouse=True)
def _quiet_frameworks(caplog):
    caplog.set_level(logging.WARNING)

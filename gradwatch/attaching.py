"""One line in, a watch out: which framework, which policy, served where.

The only place where a watch and its endpoint meet.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradwatch.contradictions import refuse_other_windows
from gradwatch.ends import Ends, end_well
from gradwatch.errors import AttachError
from gradwatch.export.exporter import Exporter
from gradwatch.pipeline import Pipeline
from gradwatch.policy import Policy, PolicyFile, load_policy
from gradwatch.recording.finding import FOLDER
from gradwatch.saying import say
from gradwatch.watch import Watch

__all__ = ["attach", "clip_grads_", "run_name"]


def attach(
    model: Any,
    optimizer: Any = None,
    policy: str | os.PathLike[str] | Mapping[str, Any] | Policy | None = None,
    *,
    run: str | None = None,
    host: str | None = None,
    port: int | None = 9464,
    recording: str | os.PathLike[str] | None = FOLDER,
    discovery: str | os.PathLike[str] | None = None,
    linger: float | None = None,
    pushgateway: str | None = None,
    alertmanager: str | Sequence[str] | None = None,
    alert_labels: Mapping[str, str] | None = None,
    scaler: Any = None,
    distributed: bool | None = None,
    shard_keys: Mapping[str, Hashable] | None = None,
) -> Watch:
    """Watches the gradients of `model` from the next `optimizer.step()` on.

    What a machine rather than a script knows may come from the environment: GRADWATCH_RUN,
    GRADWATCH_HOST and GRADWATCH_DISCOVERY stand for the arguments `run`, `host` and `discovery`
    where those are None.

    Args:
        model: a `torch.nn.Module`, a model of Keras, a `tf.Module`, or an optimizer of Keras that
            is built.
        optimizer: the optimizer that updates it; without one, call `watch.process()` yourself. A
            model of Keras knows the one it is compiled with.
        policy: a YAML file, a dict or a `Policy`; None only observes. A file that is written while
            the run goes on is read again: its numbers may change, and hold from a step on.
        run: the label of this run in metrics and recordings; by default script and start time.
        host: where metrics are served, by default 127.0.0.1; `0.0.0.0` for containers.
        port: of the metrics; where torchrun or SLURM starts several processes on a machine, that of
            the first, and `port + LOCAL_RANK` of the others. The next free one is taken, with a
            warning, where it is in use. None serves nothing.
        recording: the directory that recordings go to; None records nothing.
        discovery: a directory that Prometheus reads targets from (file_sd); None writes no file.
        linger: how many seconds an ending run waits, at most, for one last scrape; by default 20,
            and only where it was scraped before. Where a number is given it waits for a scraper
            that has never come as well, if there is an anomaly to be seen.
        pushgateway: the address of a Pushgateway, where the run leaves a summary when it ends.
        alertmanager: the address of an Alertmanager, or of several. The run posts an alert there by
            itself at the moment of a finding that the rules have an alert for.
        alert_labels: what Prometheus adds to the alerts of this run, so that its own and those
            posted here are the same: `job` (by default gradwatch), and its external labels.
        scaler: the `torch.amp.GradScaler` of the loop. Without it the steps that it drops are seen
            with a fused optimizer only. That of an optimizer that Accelerate has prepared is known.
        distributed: False watches this process by itself; by default all processes of
            torch.distributed are watched together, and each of them has to attach.
        shard_keys: by glob on names, which piece this process has of parameters that are called
            alike on several processes and are different ones, such as the experts of a mixture:
            `{"*.experts.*": expert_rank}`.

    Raises:
        PolicyError: the policy is wrong or does not fit the model.
        AttachError: the model or the optimizer cannot be watched, or an address is none.

    What is left out of `linger`, `pushgateway`, `alertmanager` and `alert_labels` is taken from the
    environment: `GRADWATCH_LINGER` and so on, several alertmanagers with commas between them,
    labels as `job=gradwatch,cluster=a`.
    """
    ends = Ends.of(linger, pushgateway, alertmanager, alert_labels)
    file = PolicyFile(policy) if isinstance(policy, (str, os.PathLike)) else None
    loaded = load_policy(policy) if file is None else file.policy
    _refuse_windows_of_accelerate(loaded, optimizer)
    started = time.time()
    watch: Watch = _framework_watch(model, optimizer)(
        model,
        optimizer,
        loaded,
        run=run_name(started) if run is None else str(run),
        recording=None if recording is None else Path(recording).absolute(),
        version=importlib.metadata.version("gradwatch"),
        started=started,
        pid=os.getpid(),
        scaler=scaler,
        distributed=distributed,
        shard_keys=shard_keys,
    )
    if file is not None and watch.follows_its_policy:
        watch.pipeline.follow(file)
    end_well(watch.pipeline, ends)
    if port is not None:
        watch.url = _served(watch.pipeline, host, port, discovery, ends)
    _tell(watch)
    return watch


def _tell(watch: Watch) -> None:
    info, path = watch.pipeline.info, watch.pipeline.path
    say(
        logging.INFO,
        "run %s, rank %d: %d layers, policy mode %s; recording %s; metrics %s",
        info.run, info.rank, len(info.layout.layers), info.mode,
        "none" if path is None else path, watch.url or "none of its own",
    )  # fmt: skip


def clip_grads_(
    parameters: Any, policy: str | os.PathLike[str] | Mapping[str, Any] | Policy
) -> Any:
    """Applies a policy to gradients that are there now, once; no watch, no record.

    A step that the policy skips is left without gradients (`.grad` is None). Schedules of limits
    are read at step 0, and patience and budget have no meaning here.

    Args:
        parameters: a module, its `named_parameters()`, or tensors, which are named by number.
        policy: as for `attach`. A `Policy` or a dict is read faster than a file.

    Returns:
        The L2 norm of all gradients before the policy, a 0-d tensor.

    Raises:
        PolicyError: the policy is wrong, does not fit, or accumulates.
        TrainingStopped: the policy says stop.
    """
    from gradwatch.torch.function import clip_grads_ as of_torch

    return of_torch(parameters, load_policy(policy))


def _framework_watch(model: Any, optimizer: Any) -> Any:
    """The watch class for this kind of model; imports only the framework it is made with."""
    torch, keras = sys.modules.get("torch"), sys.modules.get("keras")
    if torch is not None and isinstance(model, torch.nn.Module):
        if keras is not None and isinstance(model, keras.Model) and _is_of_keras(model, optimizer):
            from gradwatch.torch.keras import KerasTorchWatch

            return KerasTorchWatch
        from gradwatch.torch.watch import TorchWatch

        return TorchWatch
    if "tensorflow" in sys.modules:
        from gradwatch.tensorflow.frameworks import is_model, is_optimizer

        if is_model(model) or is_optimizer(model):
            from gradwatch.tensorflow.watch import TFWatch

            return TFWatch
    raise AttachError(
        f"expected a torch.nn.Module or a model of Keras. Received: {type(model).__module__}."
        f"{type(model).__qualname__}. Pass the module whose parameters the optimizer updates."
    )


def _is_of_keras(model: Any, optimizer: Any) -> bool:
    """Whether it is Keras that makes the updates of a model that computes with torch."""
    optimizers = sys.modules["keras"].optimizers
    given = getattr(model, "optimizer", None) if optimizer is None else optimizer
    return isinstance(given, optimizers.Optimizer)


def run_name(started: float | None = None) -> str:
    """What a run is called that the script gives no name: as in GRADWATCH_RUN, else script and
    start time."""
    if given := os.environ.get("GRADWATCH_RUN"):
        return given
    script = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else "run"
    return f"{script}-{time.strftime('%m%d-%H%M%S', time.localtime(started))}"


def _refuse_windows_of_accelerate(policy: Policy, optimizer: Any) -> None:
    """
    Raises:
        PolicyError: the Accelerator that prepared the optimizer accumulates in another way.
    """
    num_steps = getattr(getattr(optimizer, "gradient_state", None), "num_steps", None)
    if isinstance(num_steps, int) and num_steps > 1:
        setting = f"Accelerator(gradient_accumulation_steps={num_steps})"
        refuse_other_windows(policy, setting, num_steps)


def _served(
    pipeline: Pipeline,
    host: str | None,
    port: int,
    discovery: str | os.PathLike[str] | None,
    ends: Ends,
) -> str | None:
    """Serves the metrics and says where; a failure is counted and costs the run nothing else."""
    if host is None:
        host = os.environ.get("GRADWATCH_HOST") or "127.0.0.1"
    if discovery is None:
        discovery = os.environ.get("GRADWATCH_DISCOVERY") or None
    try:
        exporter = Exporter(
            pipeline.tally,
            host=host,
            port=port,
            directory=None if discovery is None else Path(discovery),
        )
    except Exception:
        pipeline.report("export")
        return None
    pipeline.consumer.callbacks.append(exporter.note)
    pipeline.closers.append(
        lambda: exporter.close(
            linger_seconds=0.0 if pipeline.is_interrupted else ends.linger,
            only_for_news=pipeline.is_terminated,
            insists=ends.insists,
        )
    )
    if ends.linger:
        pipeline.end_before_sigterm()
    return exporter.url

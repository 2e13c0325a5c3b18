"""gradwatch: a gradient norm you can trust, beside any training loop.

    watch = gradwatch.attach(model, optimizer, policy="policy.yaml", run="gpt-small")

No framework is imported until a model of it is attached.
"""

from gradwatch.attaching import attach, clip_grads_
from gradwatch.errors import (
    AttachError,
    GradwatchError,
    PolicyError,
    RecordingError,
    TrainingStopped,
    TwoClippersError,
)
from gradwatch.policy import Policy
from gradwatch.recording.reader import Recording, open_recording
from gradwatch.records import Anomaly, Layout, Parameter, StepRecord
from gradwatch.watch import Watch

__all__ = [
    "Anomaly",
    "AttachError",
    "GradwatchError",
    "Layout",
    "Parameter",
    "Policy",
    "PolicyError",
    "Recording",
    "RecordingError",
    "StepRecord",
    "TrainingStopped",
    "TwoClippersError",
    "Watch",
    "attach",
    "clip_grads_",
    "open_recording",
]

"""The callbacks take what `attach` takes."""

from __future__ import annotations

import inspect

import pytest

import gradwatch
import gradwatch.lightning
import gradwatch.transformers


@pytest.mark.parametrize("callback", [gradwatch.lightning, gradwatch.transformers])
def test_the_arguments_of_a_callback_are_those_of_attach_with_the_same_defaults(callback):
    ours = list(inspect.signature(callback.GradWatch).parameters.values())
    known_by_the_trainer = ("model", "optimizer")
    parameters = inspect.signature(gradwatch.attach).parameters.values()
    theirs = [one for one in parameters if one.name not in known_by_the_trainer]
    assert [(one.name, one.kind, one.default) for one in ours] == [
        (one.name, one.kind, one.default) for one in theirs
    ]


@pytest.mark.parametrize("callback", [gradwatch.lightning, gradwatch.transformers])
def test_an_address_that_is_none_is_refused_before_there_is_a_trainer(callback):
    with pytest.raises(gradwatch.AttachError, match="alertmanager must be an address"):
        callback.GradWatch(alertmanager="alerts:9093")

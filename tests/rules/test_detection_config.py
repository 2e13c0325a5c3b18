"""The `detect:` section: what is left out is the default, what is wrong is named."""

from __future__ import annotations

import pytest

from gradwatch.rules.detection import (
    KINDS,
    DetectionConfig,
    ExplodingConfig,
    SpikeConfig,
    VanishingConfig,
    detection_config,
)


def test_an_empty_section_is_every_detector_with_its_defaults():
    config = detection_config({})
    assert config == DetectionConfig()
    assert [config[kind] is not None for kind in KINDS] == [True] * len(KINDS)


def test_the_defaults_are_the_measured_ones():
    config = DetectionConfig()
    for outlier, need, of in ((config.exploding, 3, 5), (config.spike, 1, 1)):
        assert (outlier.z, outlier.times, outlier.floor) == (6, 4, 0.25)
        assert (outlier.warmup, outlier.window) == (50, 128)
        assert (outlier.need, outlier.of) == (need, of)
    assert config.vanishing == VanishingConfig(share=1e-5, need=20, of=25, after=20)


def test_parameters_override_by_kind_and_none_switches_off():
    config = detection_config({"exploding": {"z": 8, "need": 2}, "spike": None, "nonfinite": {}})
    assert config == DetectionConfig(exploding=ExplodingConfig(z=8.0, need=2), spike=None)
    assert isinstance(config.exploding.z, float)


def test_what_a_finding_leads_to_is_left_to_others():
    config = detection_config({kind: {"then": "record"} for kind in KINDS})
    assert config == DetectionConfig()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"explodin": {}}, r"detect\.explodin: no such detector.*nonfinite, exploding"),
        ({"spike": {"Z": 3}}, r"detect\.spike\.Z: no such parameter.*z, times"),
        ({"nonfinite": {"need": 3}}, r"detect\.nonfinite\.need: no such parameter"),
        ({"spike": {"z": "high"}}, r"detect\.spike\.z must be a number. Received: 'high'"),
        ({"spike": {"z": True}}, r"detect\.spike\.z must be a number. Received: True"),
        ({"spike": {"of": 2.5}}, r"detect\.spike\.of must be a whole number. Received: 2\.5"),
        ({"spike": {"z": 0}}, r"detect\.spike: z must be > 0"),
        ({"spike": {"z": float("nan")}}, r"detect\.spike: z must be > 0"),
        ({"spike": {"of": float("inf")}}, r"detect\.spike\.of must be a whole number"),
        ({"exploding": {"need": 6}}, r"detect\.exploding: need must be in 1\.\.of=5"),
        ({"exploding": {"warmup": 200}}, r"warmup must be in 1\.\.window=128. Received: 200"),
        ({"vanishing": {"share": 1}}, r"detect\.vanishing: share must be in \(0, 1\)"),
        ({"vanishing": {"after": -1}}, r"detect\.vanishing: after must be >= 0"),
    ],
)
def test_a_mistake_is_named_by_its_path(section, message):
    with pytest.raises(ValueError, match=message):
        detection_config(section)


def test_a_kind_is_looked_up_by_name_and_a_foreign_one_is_an_error():
    config = DetectionConfig(spike=SpikeConfig(z=9.0))
    assert config["spike"].z == 9.0
    with pytest.raises(KeyError):
        config["state_dict"]

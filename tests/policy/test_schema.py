"""The JSON Schema for editors agrees with the decoder."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml

from gradwatch.errors import PolicyError
from gradwatch.policy import load_policy, policy_schema
from gradwatch.policy.schema import SCHEMA_FILE, schema_text

UPDATE = (
    "run: python -c 'from gradwatch.policy.schema import SCHEMA_FILE, schema_text;"
    " SCHEMA_FILE.write_text(schema_text())'"
)
VALIDATOR = jsonschema.Draft202012Validator(policy_schema())


def as_json(data):
    """The same data with the keys that JSON has."""
    return json.loads(json.dumps(data))


def test_the_checked_in_schema_is_up_to_date():
    assert SCHEMA_FILE.read_text() == schema_text(), UPDATE


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(policy_schema())


def test_every_key_carries_its_sentence():
    schema = policy_schema()
    for section in (schema, *schema["$defs"].values()):
        for key, entry in section["properties"].items():
            assert entry["description"].endswith("."), key


RIGHT = [
    "version: 1",
    "{version: 1, clip: [{limit: {z: 4}}, {limit: {quantile: 0.9, window: all, learn: raw}}]}",
    "{version: 1, accumulate: {steps: 8, weigh: sum}, guard: {nonfinite: zero}}",
    "{version: 1, accumulate: {steps: {0: 1, 1000: 4}, drive: loop, partial: carry}}",
    "{version: 1, clip: [{limit: 1, measure: l3.5, then: zero}, {limit: 1, per: element}]}",
    "{version: 1, clip: [{limit: 1.0}]}",
    "{version: 1, layers: {depth: 2}, clip: [{limit: {0: 10, 2000: 1}, params: [a, b]}]}",
    "{version: 1, accumulate: {steps: 8, sync: boundary}}",
    "{version: 1, detect: {spike: none, exploding: {z: 5}}}",
    "{version: 1, guard: {budget: 50/1000}, clip: [{limit: 1, ndim: 2, groups: 0}]}",
    "{version: 1, clip: [{use: agc}, {use: zclip, limit: {max: 5}, params: a}]}",
    "{version: 1, clip: [{use: skipstep, name: spike}, {use: adagc, limit: {0: 1, 10: 2}}]}",
]
WRONG = [
    "{}",
    "[]",
    "version: 2",
    "{version: 1, clips: []}",
    "{version: 1, mode: observe}",
    "{version: 1, layers: block}",
    "{version: 1, layers: {depth: 0}}",
    "{version: 1, accumulate: {steps: {target: 0}}}",
    "{version: 1, accumulate: {steps: 8, sync: never}}",
    "{version: 1, accumulate: {steps: 0}}",
    "{version: 1, guard: {patience: 0}}",
    "{version: 1, guard: {patience: null}}",
    "{version: 1, guard: {budget: 50}}",
    "{version: 1, clip: {limit: 1}}",
    "{version: 1, clip: [{}]}",
    "{version: 1, clip: [{limit: 0}]}",
    "{version: 1, clip: [{limit: -1}]}",
    "{version: 1, clip: [{limit: yes}]}",
    "{version: 1, clip: [{limit: {}}]}",
    "{version: 1, clip: [{limit: {z: 4, ratio: 2}}]}",
    "{version: 1, clip: [{limit: {window: 128}}]}",
    "{version: 1, clip: [{use: agcc}]}",
    "{version: 1, clip: [{limit: {0: -1}}]}",
    "{version: 1, clip: [{limit: 1, limt: 1}]}",
    "{version: 1, clip: [{limit: 1, per: units}]}",
    "{version: 1, clip: [{limit: 1, measure: weights}]}",
    "{version: 1, clip: [{limit: 1, eps: -1}]}",
    "{version: 1, clip: [{limit: 1, params: []}]}",
    "{version: 1, clip: [{limit: 1, params: ''}]}",
    "{version: 1, clip: [{limit: 1, ndim: small}]}",
    "{version: 1, clip: [{use: zclip, limit: {zz: 3}}]}",
    "{version: 1, detect: {spike: off}}",
    "{version: 1, detect: {rank_outlier: {z: 0}}}",
    "{version: 1, detect: {vanishing: {share: 2}}}",
]


@pytest.mark.parametrize("text", RIGHT)
def test_what_the_decoder_takes_the_schema_takes(text):
    load_policy(yaml.safe_load(text))
    VALIDATOR.validate(as_json(yaml.safe_load(text)))


@pytest.mark.parametrize("text", WRONG)
def test_what_the_decoder_refuses_the_schema_refuses(text):
    data = yaml.safe_load(text)
    with pytest.raises(PolicyError):
        load_policy(data)
    assert not VALIDATOR.is_valid(as_json(data))


def test_the_full_policy_is_valid(full_text):
    data = yaml.safe_load(full_text)
    data["clip"][0]["eps"] = float(data["clip"][0]["eps"])
    data["clip"][0]["limit"][2000] = float(data["clip"][0]["limit"][2000])
    data["detect"]["vanishing"]["share"] = float(data["detect"]["vanishing"]["share"])
    VALIDATOR.validate(as_json(data))

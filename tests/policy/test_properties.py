"""Any text is a policy or a list of located mistakes, and a policy survives being written down."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradwatch.errors import PolicyError
from gradwatch.policy import Policy, load_policy, parse_policy, policy_schema
from gradwatch.policy.locating import SHOWN_MISTAKES

FULL = Path(__file__).with_name("full.yaml").read_bytes()
LINE = re.compile(r"[^:]+:\d+:\d+: \S.*")
PYDANTIC = re.compile(r"Input should|Value error|Field required|\[type=")
TOKENS = [
    " ", "\n", "\n  ", "\t", ": ", "- ", ",", "[", "]", "{", "}", "#", "&", "*", "!", "|", ">",
    "'", '"', "%", "@", "`", "~", "? ", "<<", "\\", "0", "-1", "1e-7", "1e999", ".nan", ".inf",
    "010", "0x1", "yes", "null", "!!python/name:os.system", "&a ", "*a", "...", "---", "{0: 1}",
    "[1]", "limit", "clip", "per", "unit", "then", "zero", "z", "use", "agc", "params", "name",
    "guard", "budget", "5/9", "detect", "none", "spike", "accumulate", "steps", "layers", "depth",
    "é", "\u2028", "\x85", "\x00", "\ud7ff",
]  # fmt: skip

SECTIONS = ("mode", "layers", "accumulate", "guard", "clip", "detect")

scalars = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.sampled_from(TOKENS),
    st.text(max_size=5),
)
words = st.sampled_from([token for token in TOKENS if token.isalpha()])
structures = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(words, st.integers(-1, 9)), inner, max_size=4),
    ),
    max_leaves=12,
)


WORDS = [match.span() for match in re.finditer(rb"[^\s,:\[\]{}]+", FULL)]
values = st.one_of(
    st.sampled_from(TOKENS),
    structures.map(lambda data: yaml.safe_dump(data, default_flow_style=True, width=1000)),
).map(lambda text: text.removesuffix("\n...\n").strip().encode())


@st.composite
def replacements(draw) -> bytes:
    """The full policy with up to three of its words replaced: most still parse as YAML."""
    text = FULL
    for start, end in sorted(draw(st.sets(st.sampled_from(WORDS), max_size=3)), reverse=True):
        text = text[:start] + draw(values) + text[end:]
    return text


@st.composite
def edits(draw) -> bytes:
    """The full policy with bytes gone, put in or changed, and two lines swapped."""
    text = FULL
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        put = draw(st.one_of(st.just(b""), st.binary(max_size=3), values))
        text = text[:start] + put + text[start + draw(st.integers(0, 8)) :]
    lines = text.splitlines(keepends=True)
    i, j = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
    lines[i], lines[j] = lines[j], lines[i]
    return b"".join(lines)


mangled = st.one_of(replacements(), edits())


def outcome(read) -> Policy | list[str]:
    """A policy, or the lines of a PolicyError; whatever else is raised fails the test."""
    try:
        return read()
    except PolicyError as error:
        return str(error).split("\n")


def check_lines(lines: list[str]) -> None:
    for line in lines:
        assert LINE.fullmatch(line), line
        assert not PYDANTIC.search(line), line
        assert len(line) < 1000


@settings(max_examples=200)
@given(content=mangled)
def test_a_mangled_file_gives_a_policy_or_located_mistakes(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "policy.yaml"
    path.write_bytes(content)
    result = outcome(lambda: load_policy(path))
    if isinstance(result, list):
        check_lines(result)
    else:
        assert parse_policy(result.canonical_yaml()) == result


@settings(max_examples=200)
@given(text=st.one_of(st.text(max_size=40), st.lists(st.sampled_from(TOKENS)).map(" ".join)))
def test_any_text_gives_a_policy_or_located_mistakes(text):
    result = outcome(lambda: parse_policy(text))
    if isinstance(result, list):
        check_lines(result)


@settings(max_examples=100)
@given(
    data=st.fixed_dictionaries(
        {"version": st.just(1)},
        optional=dict.fromkeys(
            ("mode", "layers", "accumulate", "guard", "clip", "detect"), structures
        ),
    )
)
def test_a_file_and_a_dict_of_any_structure_agree(data):
    by_dict = outcome(lambda: load_policy(data))
    by_file = outcome(lambda: parse_policy(yaml.safe_dump(data, sort_keys=False)))
    if isinstance(by_file, list):
        check_lines(by_file)
        assert isinstance(by_dict, list)
        assume(len(by_file) <= SHOWN_MISTAKES)
        assert sorted(line.split(": ", 1)[1] for line in by_file) == sorted(
            line.split(": ", 1)[1] for line in by_dict
        )
    else:
        assert by_file == by_dict


@settings(max_examples=100)
@given(content=mangled)
def test_a_file_and_its_safe_load_never_mean_two_things(content):
    try:
        text = content.decode()
        data = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError, ValueError):
        assume(False)
    assume(isinstance(data, dict))
    by_file, by_dict = outcome(lambda: parse_policy(text)), outcome(lambda: load_policy(data))
    if isinstance(by_file, Policy) and isinstance(by_dict, Policy):
        assert by_file == by_dict


limits = st.floats(1e-9, 1e9)
counts = st.integers(1, 10**6)
globs = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1)
names = st.text("abcdefg-_0 é", min_size=1, max_size=8).filter(lambda name: name == name.strip())
rules = st.fixed_dictionaries(
    {"limit": st.one_of(limits, counts, st.dictionaries(counts, limits, min_size=1, max_size=3))},
    optional={
        "params": st.one_of(globs, st.lists(globs, min_size=1, max_size=3)),
        "exclude": globs,
        "types": st.lists(globs, min_size=1, max_size=2),
        "groups": st.one_of(st.integers(0, 5), st.lists(st.integers(0, 5), min_size=1)),
        "ndim": st.one_of(st.integers(0, 9), st.sampled_from(["<2", ">=2", "2", "==1", "> 3"])),
        "per": st.sampled_from(["all", "group", "layer", "tensor"]),
        "then": st.sampled_from(["scale", "skip", "stop", "warn"]),
        "eps": st.floats(0, 1),
        "name": names,
    },
)
outliers = st.fixed_dictionaries(
    {}, optional={"z": limits, "times": st.floats(1, 99), "of": st.integers(5, 9), "floor": limits}
)
policies = st.fixed_dictionaries(
    {"version": st.just(1)},
    optional={
        "mode": st.sampled_from(["enforce", "shadow"]),
        "layers": st.sampled_from(["parameter", "module", {"depth": 3}]),
        "guard": st.fixed_dictionaries(
            {},
            optional={
                "nonfinite": st.sampled_from(["skip", "stop", "none"]),
                "patience": counts,
                "budget": st.sampled_from(["50/1000", "1 / 2"]),
                "on_error": st.sampled_from(["stop", "observe"]),
            },
        ),
        "clip": st.lists(rules, max_size=4, unique_by=lambda rule: rule.get("name", object())),
        "detect": st.fixed_dictionaries(
            {},
            optional={
                "nonfinite": st.just("none"),
                "exploding": st.one_of(outliers, st.just("none")),
                "spike": outliers,
                "vanishing": st.just({"share": 1e-9, "after": 0}),
            },
        ),
    },
)


@settings(max_examples=150)
@given(data=policies)
def test_a_policy_survives_being_written_down(data):
    policy = load_policy(data)
    again = parse_policy(policy.canonical_yaml())
    assert again == policy
    assert again.canonical_yaml() == policy.canonical_yaml()
    assert again.sha256 == policy.sha256
    assert load_policy(yaml.safe_load(policy.canonical_yaml())) == policy
    assert parse_policy(yaml.safe_dump(data)) == policy


@settings(max_examples=100)
@given(data=policies)
def test_a_policy_that_loads_is_valid_by_the_schema_and_has_unique_names(data):
    policy = load_policy(data)
    validator = jsonschema.Draft202012Validator(policy_schema())
    validator.validate(json.loads(json.dumps(data)))
    validator.validate(json.loads(json.dumps(policy.written())))
    assert len({rule.name for rule in policy.clip}) == len(policy.clip)
    assert all(math.isfinite(rule.eps) for rule in policy.clip)


@given(value=st.floats(min_value=1e-300, max_value=1e300))
def test_every_way_to_print_a_float_reads_back(value):
    for text in (repr(value), f"{value:e}", f"{value:.17g}", f"{value:E}"):
        written = f"version: 1\nclip: [{{limit: {text}}}]"
        limit = parse_policy(written).clip[0].limit
        assert limit == pytest.approx(value, rel=1e-6)
        assert (
            load_policy(yaml.safe_load(f"version: 1\nclip: [{{limit: {text}}}]")).clip[0].limit
            == limit
        )

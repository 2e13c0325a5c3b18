"""Files that are not a policy, and texts that would be expensive or dangerous to read."""

from __future__ import annotations

import time

import pytest

from gradwatch.errors import PolicyError
from gradwatch.policy import Schedule, load_policy, parse_policy


def refusal(source) -> str:
    with pytest.raises(PolicyError) as caught:
        load_policy(source)
    return str(caught.value)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes policy.yaml into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes) -> str:
        raw = content.encode() if isinstance(content, str) else content
        (tmp_path / "policy.yaml").write_bytes(raw)
        return "policy.yaml"

    return write


def test_the_smallest_file_is_a_policy(written):
    policy = load_policy(written("version: 1\nclip: [{limit: 1.0}]\n"))
    assert policy.source == "policy.yaml"
    assert policy.clip[0].limit == 1.0


def test_a_path_object_and_a_byte_order_mark_are_welcome(written, tmp_path):
    written(b"\xef\xbb\xbfversion: 1\r\nclip: [{limit: 2}]\r\n")
    assert load_policy(tmp_path / "policy.yaml").clip[0].limit == 2.0


@pytest.mark.parametrize("content", ["", "\n", "# nothing\n", "---\n", "~\n"])
def test_an_empty_file_says_what_the_smallest_policy_is(written, content):
    expected = "policy.yaml:1:1: the file is empty. The smallest policy is `version: 1`"
    assert refusal(written(content)) == expected


def test_a_missing_file_and_a_directory_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert refusal("no.yaml") == (
        "no.yaml: there is no such file. The smallest policy is `version: 1`"
    )
    assert refusal("folder") == "folder: this is a directory, a policy is a YAML file"
    assert refusal("a\0b") == r"'a\x00b': the file cannot be read: embedded null byte"


def test_a_text_in_the_place_of_a_path_is_sent_to_the_right_function():
    assert "for a text use parse_policy" in refusal("version: 1\n")


@pytest.mark.parametrize("source", [5, ["version"], b"policy.yaml"])
def test_other_sources_are_refused(source):
    assert refusal(source).startswith("a policy must be a path, a dict, a Policy or None. Received")


def test_bytes_that_are_not_utf_8_are_located(written):
    path = written("version: 1\nclip: [{limit: 1, name: ä".encode() + b"\xff}]\n")
    assert refusal(path) == "policy.yaml:2:26: the file must be UTF-8. Received: byte 0xff"


def test_a_character_that_yaml_forbids_is_located(written):
    assert refusal(written("version: 1\nmode: \x01\n")) == (
        "policy.yaml:2:7: the text holds a character that YAML does not allow: U+0001"
    )


UNPARSED = {
    "version: [1": (
        "1:12: the YAML does not parse: while parsing a flow sequence "
        "expected ',' or ']', but got '<stream end>'"
    ),
    "version: 1\n\tmode: shadow": (
        "2:1: the YAML does not parse: while scanning for the next token "
        "found character '\\t' that cannot start any token"
    ),
    "version: 1\nclip: *rules": "2:7: the YAML does not parse: found undefined alias 'rules'",
    'version: "\\UFFFFFFFF"': (
        "1:13: the YAML does not parse: a code point or a version is out of range"
    ),
    "version: 1\n--- \nversion: 1": "2:1: a policy is one document, here begins a second one",
    "- version: 1": "1:1: the policy must be a mapping of keys. Received: [{version: 1}]",
    "hello": "1:1: the policy must be a mapping of keys. Received: hello",
}


@pytest.mark.parametrize("text", UNPARSED)
def test_what_does_not_parse_is_located(written, text):
    assert refusal(written(text)) == f"policy.yaml:{UNPARSED[text]}"


def test_half_a_surrogate_pair_is_no_text(written):
    assert refusal(written('version: 1\nclip:\n  - {limit: 1, name: "\\ud800"}\n')) == (
        "policy.yaml:3:16: clip[0].name holds what is not text. Received: '\\ud800'"
    )


def test_no_tag_is_obeyed(written, tmp_path):
    text = "version: !!int 1\nmode: !!python/object/apply:os.mkdir [made]\n"
    lines = refusal(written(text)).splitlines()
    assert lines[0] == (
        "policy.yaml:1:10: tags are not part of the format. Received: tag:yaml.org,2002:int"
    )
    assert lines[2].startswith("policy.yaml:2:7: tags are not part of the format. Received: tag:")
    assert not (tmp_path / "made").exists()


def test_an_alias_means_what_it_stands_for():
    policy = parse_policy("version: 1\nclip: [{limit: &x {0: 2, 9: 1}}, {limit: *x, per: layer}]\n")
    assert policy.clip[0].limit == policy.clip[1].limit == Schedule(((0, 2.0), (9, 1.0)))


def test_merge_keys_are_refused():
    with pytest.raises(PolicyError, match=r"clip\[1\]: merge keys \(<<\) are not part"):
        parse_policy("version: 1\nclip: [&x {limit: 1}, {<<: *x, name: b}]\n")


BOMB = "version: 1\n" + "a0: &a0 [1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)  # fmt: skip

EXPENSIVE = {
    "alias bomb": (BOMB, "must hold at most 10000 values, aliases expanded"),
    "endless alias": ("a: &a [*a]", "nested deeper than 16 levels"),
    "deep flow": ("[" * 900, "nested deeper than 16 levels"),
    "deep block": ("\n".join("  " * i + "a:" for i in range(900)), "nested deeper than 16 levels"),
    "many rules": ("version: 1\nclip:\n" + "- {limit: 1}\n" * 50_000, "at most 10000 values"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(4990)), "and 4966 more"),
    "huge text": ("x" * (2**20 + 1), "must be smaller than 1 MiB"),
    "huge word": (f"version: 1\nmode: {'x' * 2**19}", r"Received: x{57}\.\.\."),
    "huge number": (f"version: {'1' * 2**16}", "version must be 1"),
    "huge directive": (f"%YAML 1.{'1' * 2**16}\n---\nversion: 1", "does not parse"),
}


@pytest.mark.parametrize("case", EXPENSIVE)
def test_nothing_is_expensive_to_refuse(case):
    text, expected = EXPENSIVE[case]
    started = time.process_time()
    with pytest.raises(PolicyError, match=expected) as caught:
        parse_policy(text)
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 10_000


def test_a_huge_file_is_not_read_whole(written):
    assert refusal(written(b"#" * 2**21)) == "policy.yaml:1:1: a policy must be smaller than 1 MiB"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-7", 1e-7),
        ("1E5", 1e5),
        ("1.5e3", 1500.0),
        (".5e-2", 0.005),
        ("1.0e-07", 1e-7),
        ("+3", 3.0),
        ("1_000", 1000.0),
        ("1_000.5", 1000.5),
        (".5", 0.5),
        ("2.", 2.0),
    ],
)
def test_a_number_may_be_written_in_every_common_way(text, value):
    assert parse_policy(f"version: 1\nclip: [{{limit: {text}}}]").clip[0].limit == value


def test_words_that_yaml_takes_for_booleans_are_words():
    assert parse_policy("version: 1\nclip: [{limit: 1, name: on}]").clip[0].name == "on"

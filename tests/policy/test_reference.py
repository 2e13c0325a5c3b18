"""docs/policy.md is what the models say, and its examples are policies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from gradwatch.policy import load_policy, parse_policy, policy_schema
from gradwatch.policy.reference import reference_text

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "policy.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_is_up_to_date():
    assert reference_text() == PAGE, "run: python -m gradwatch.policy.reference > docs/policy.md"


def test_every_key_of_the_format_is_in_it():
    schema = policy_schema()
    told = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    parts = [schema, *schema["$defs"].values()]
    assert {key for part in parts for key in part["properties"]} - {"use"} == told
    assert "`use: NAME`" in PAGE


@pytest.mark.parametrize("text", EXAMPLES)
def test_an_example_is_a_policy_or_the_rules_of_one(text):
    if text.startswith("version"):
        parse_policy(text)
    else:
        load_policy({"version": 1, "clip": yaml.safe_load(text)})


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_a_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else page.parent / name
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^a-z0-9 _-]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{page.name}: {target}"

"""Names of layers where there is little room."""

from __future__ import annotations

import pytest

from gradwatch.page.columns import short


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("head", "head"),
        ("encoder.layers.3.self_attn.out_proj", "e.layers.3.self_attn.out_proj"),
        ("transformer.encoder.layers.11.self_attn.out_proj", "t.e.l.11.self_attn.out_proj"),
        ("a" * 40, "a" * 14 + "…" + "a" * 15),
        ("two\nlines", "two lines"),
        ("bell\a", "bell\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_a_name_that_is_too_long_keeps_its_numbers_and_its_end(name: str, shown: str) -> None:
    assert short(name, 30) == shown


def test_blocks_of_a_deep_model_can_be_told_apart() -> None:
    names = [
        f"encoder.layers.{block}.{part}"
        for block in range(12)
        for part in ("self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1")
    ]
    assert len({short(name, 22) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["." * 10_000, "a." * 5_000, "..a..b..", "x" * 10_000])
def test_a_hostile_name_fits_all_the_same(name: str) -> None:
    assert len(short(name, 30)) <= 30

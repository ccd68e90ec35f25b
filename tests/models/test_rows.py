"""Key rows: names and values between our state dict and other files."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from ssaseg.models.build import FAMILIES, build_outline
from ssaseg.models.official import official_entries
from ssaseg.models.rows import Row, conv_norm, entries


def test_numbers_are_filled_in_and_what_follows_stays() -> None:
    row = Row("sea.{}.{}.query", "trans{+1}.blocks.{}.to_q")
    assert row.name_of("sea.0.12.query.conv.weight") == "trans1.blocks.12.to_q.conv.weight"
    assert row.name_of("sea.0.12.query") == "trans1.blocks.12.to_q"
    for other in ("sea.0.12.query_position", "sea.x.1.query", "sea.0.query", "a.sea.0.1.query"):
        assert row.name_of(other) is None
    assert row.below("a.{}", "b{}").name_of("a.3.sea.0.1.query.bias") == "b3.trans1.blocks.1.to_q.bias"


def test_each_key_fits_one_row() -> None:
    rows = conv_norm("stem", "stem.0")
    assert [entry.theirs for entry in entries(rows, ["stem.conv.weight", "stem.norm.bias"])] == [
        ("stem.0.conv.weight",),
        ("stem.0.bn.bias",),
    ]
    with pytest.raises(ValueError, match=r"stem\.other: 0 rows fit this key"):
        entries(rows, ["stem.other"])
    with pytest.raises(ValueError, match=r"stem\.conv\.weight: 2 rows fit this key"):
        entries([*rows, Row("stem", "trunk")], ["stem.conv.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_rows_means_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = FAMILIES[family]
    name = min(row.variants)
    model = build_outline(name, 3)
    before = official_entries(model)
    shuffled = random.Random(0).sample(list(row.rows), len(row.rows))
    assert shuffled != list(row.rows)
    monkeypatch.setitem(FAMILIES, family, row.__class__(**{**vars(row), "rows": shuffled}))  # type: ignore[index]
    assert [each[:2] for each in official_entries(model)] == [each[:2] for each in before]


def split_rows(joined: Tensor) -> tuple[Tensor, ...]:
    return joined.chunk(3)[0].contiguous(), joined[len(joined) // 3 :].contiguous()


def swap_blocks(weight: Tensor) -> tuple[Tensor, ...]:
    """Columns counted channel by channel, four places each → place by place."""
    return (weight.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1),)


def swap_back(weight: Tensor) -> tuple[Tensor, ...]:
    return (weight.unflatten(1, (4, -1)).transpose(1, 2).flatten(1),)


# As MiT's q and kv against one matrix, one matrix of theirs that is three of ours, a Linear against a 1×1 convolution,
# and Swin's order of merged patches. With our keys, and the shapes of theirs.
VALUES: dict[str, tuple[Row, list[str], dict[str, tuple[int, ...]]]] = {
    "join": (
        Row("attn.{}.joined", ("attn.{}.q", "attn.{}.kv"), lambda q, kv: (torch.cat([q, kv]),), split_rows),
        ["attn.0.joined.weight", "attn.0.joined.bias"],
        {"attn.0.q.weight": (8, 8), "attn.0.kv.weight": (16, 8), "attn.0.q.bias": (8,), "attn.0.kv.bias": (16,)},
    ),
    "split": (
        Row(
            ("attn.{}.query", "attn.{}.key", "attn.{}.value"),
            "attn.{}.qkv",
            lambda qkv: tuple(part.contiguous() for part in qkv.chunk(3)),
            lambda *parts: (torch.cat(parts),),
        ),
        [f"attn.2.{part}.{leaf}" for leaf in ("weight", "bias") for part in ("query", "key", "value")],
        {"attn.2.qkv.weight": (24, 8), "attn.2.qkv.bias": (24,)},
    ),
    "reshape": (
        Row("fc.weight", "fc.weight", lambda w: (w[..., None, None],), lambda w: (w[..., 0, 0],)),
        ["fc.weight"],
        {"fc.weight": (5, 7)},
    ),
    "permute": (
        Row("reduce.weight", "reduce.weight", swap_blocks, swap_back),
        ["reduce.weight"],
        {"reduce.weight": (6, 12)},
    ),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_there_and_back_are_bit_equal(kind: str) -> None:
    row, ours, shapes = VALUES[kind]
    theirs = {key: torch.randn(shape) for key, shape in shapes.items()}
    found: dict[str, Any] = {}
    back: dict[str, Any] = {}
    for entry in entries([row], ours):
        found |= entry.take(theirs)
        back |= entry.give(found)
    assert list(found) == ours
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)

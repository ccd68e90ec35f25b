"""`--tile`, `--overlap` and `--blend`: the options of commands that label large images."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import click

from ssaseg.cli.options import LONGEST, protocol_changes

AUTO = "auto"
SMALLEST = 32  # of a side, as `scoring.inference.SMALLEST`; to import that would import torch
# What tiles change in a test protocol: they have the size of their pixels in the image.
AS_TILES = {"scale": None, "multiple": None, "mode": "whole", "crop": None, "stride": None}


class Tiles(NamedTuple):
    """What the options say. side: (width, height); None: auto. overlap: None: a part of the tile."""

    side: tuple[int, int] | None = None
    overlap: int | None = None
    blend: bool = False


def _side(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | str | None:
    if value in (None, AUTO):
        return value
    sides = str(value).lower().split("x")
    numbers = [int(side) for side in sides if side.isascii() and side.isdecimal() and len(side) < 9]
    if not len(sides) == len(numbers) <= 2 or not all(SMALLEST <= number <= LONGEST for number in numbers):
        expected = f"{AUTO}, a number of pixels from {SMALLEST} to {LONGEST}, or two as in 1024x768"
        raise click.BadParameter(f"{value!r} is not {expected}", context, parameter)
    return numbers[0], numbers[-1]


def tile_options(command: Any) -> Any:
    """Adds the options; `tiles_of` reads them."""
    for option in (
        click.option("--blend", is_flag=True, help="Average the logits of tiles where they overlap."),
        click.option(
            "--overlap",
            type=click.IntRange(0, LONGEST),
            metavar="N",
            help="Of neighbouring tiles [pixels]; default: a quarter of a tile.",
        ),
        click.option(
            "--tile",
            metavar=f"{AUTO}|SIDE|WxH",
            callback=_side,
            help="Cut large images into tiles of this size, without resizing them.",
        ),
    ):
        command = option(command)
    return command


def tiles_of(given: Mapping[str, Any]) -> tuple[Tiles | None, dict[str, Any]]:
    """What the options say; None without --tile. And `protocol_changes`, with those that tiles make.

    Raises click.UsageError for options that contradict each other.
    """
    context = click.get_current_context(silent=True)
    tile, overlap, blend = given["tile"], given["overlap"], given["blend"]
    changes = protocol_changes(given)
    if tile is None:
        if overlap is not None or blend:
            option = "--overlap" if overlap is not None else "--blend"
            raise click.UsageError(f"{option} is an option of --tile: add --tile auto", context)
        return None, changes
    for key, what in {"scale": "--scale and --size", "mode": "--slide and --whole"}.items():
        if key in changes:
            raise click.UsageError(f"--tile takes images at their own size: leave out {what}", context)
    side = None if tile == AUTO else tile
    if side is not None and overlap is not None and overlap >= min(side):
        sizes = f"--overlap {overlap} is not smaller than the tiles of --tile {side[0]}x{side[1]}"
        raise click.UsageError(f"{sizes}; expected at most {min(side) - 1}, for example {min(side) // 4}", context)
    if blend and (changes.get("flip") or len(changes.get("ratios", (1,))) > 1):
        raise click.UsageError("--blend averages tiles of one view: leave out --flip and --ratios", context)
    return Tiles(side, overlap, blend), {**changes, **AS_TILES}

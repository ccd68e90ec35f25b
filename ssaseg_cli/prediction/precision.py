"""`--precision auto`: bfloat16 where it is faster and the labels are nearly those of float32, on the first images."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TypeVar

import numpy as np

from ssaseg.cli.errors import CommandError
from ssaseg.cli.scoring.engines import Engine

CANDIDATE = "bf16"  # not fp16: its narrow range may overflow at an image that comes later
ENOUGH = 0.995  # share of labels that must be equal
FASTER = 1.1  # times as fast: less is not worth other labels
FEWEST = 64  # images of a run, below which trying would take longer than it saves
TRIED, SECONDS = 4, 2.0  # images that are tried; fewer where float32 takes longer

Image = TypeVar("Image")


def choose(
    engine: Engine,
    make: Callable[[str], Engine],
    images: Iterable[Image],
    label: Callable[[Engine, Image], np.ndarray],
) -> tuple[Engine, str]:
    """The engine to use, and one line about it; the line is empty if there is no choice.

    engine: computes in float32; make: the engine of a precision, or CommandError where the device does not compute in
    it; images: the first of the run; label: labels (H,W) of one of them.
    """
    other: Engine | None = None
    with suppress(CommandError):
        other = make(CANDIDATE)
    first = [*images] if other is not None else []
    if other is None or not first:
        return engine, ""
    expected, slow = _timed(engine, first, label)
    try:
        found, quick = _timed(other, first[: len(expected)], label, limit=np.inf)
    except FloatingPointError:
        return engine, f"precision: float32; in {CANDIDATE} the network's output is not finite"
    pixels = sum(labels.size for labels in expected)
    equal = sum(int((one == two).sum()) for one, two in zip(expected, found, strict=True)) / pixels
    faster = slow / max(quick, 1e-9)
    count = f"the first {len(expected)} images" if len(expected) > 1 else "the first image"
    what = f"{faster:.2f} times as fast, {100 * equal:.2f} % of labels as in float32, on {count}"
    if equal >= ENOUGH and faster >= FASTER:
        return other, f"precision: {CANDIDATE}, {what}"
    return engine, f"precision: float32, as {CANDIDATE} is not enough better: {what}"


def _timed(
    engine: Engine, images: Sequence[Image], label: Callable[[Engine, Image], np.ndarray], limit: float = SECONDS
) -> tuple[list[np.ndarray], float]:
    """Labels of the images, and the seconds they took; after `limit` seconds no further image."""
    label(engine, images[0])  # a network's first pass takes longer
    made: list[np.ndarray] = []
    start = time.perf_counter()
    for image in images:
        made.append(label(engine, image))
        if time.perf_counter() - start > limit:
            break
    return made, time.perf_counter() - start

"""Images that a GPU labels in one pass: those that follow one another and have network inputs of equal sizes."""

from collections.abc import Hashable, Iterable, Iterator
from typing import TypeVar

import torch

from ssaseg.cli.scoring.lanes import BYTES, SHARE

MOST = 16  # images of a batch: from here on a larger one is not faster, and stopping takes longer

Item = TypeVar("Item")


def count_batch(device: torch.device, pixels: int) -> int:
    """How many images to label in one pass; 1 on a CPU, where lanes are faster. pixels: of a network's input."""
    if device.type != "cuda":
        return 1
    free = torch.cuda.mem_get_info(device)[0]
    return max(min(MOST, int(SHARE * free / (BYTES * max(pixels, 1)))), 1)


def gathered(items: Iterable[tuple[Hashable | None, Item]], most: int) -> Iterator[list[Item]]:
    """The items in groups of at most `most` that follow one another and have the same key; without a key: alone."""
    group: list[Item] = []
    last: Hashable | None = None
    for key, item in items:
        if group and (key is None or key != last):
            yield group
            group = []
        group.append(item)
        last = key
        if key is None or len(group) == most:
            yield group
            group = []
    if group:
        yield group

"""Which tiles an image is cut into, and how large they can be.

A tile is what the network gets. Neighbours overlap, and the border between their labels runs through the middle of the
overlap: each pixel is labelled by one tile, with a margin of half the overlap around it. The labels of all tiles, put
together, have the size of the image, without gaps.

Tiles begin at multiples of `GRID` pixels, as far as their size lets them: a network's maps then lie on the image as
they do for the whole image. The last tile of an axis ends with the image and is up to `GRID` - 1 pixels longer.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from ssaseg.cli.scoring.inference import SMALLEST, windows
from ssaseg.cli.scoring.lanes import BYTES, SHARE
from ssaseg.cli.scoring.limit import free_memory
from ssaseg.datasets import DataError
from ssaseg.models.build import family_of

GRID = 32  # pixels: the largest stride of the networks
BUDGET = 2**30  # bytes that `auto` takes for an image which does not fit whole, beside the network's weights
HOST = 160 * 2**20  # of these for the library's cache, blocks that are written, and parts of libraries
SIDES = (2048, 1536, 1024, 768, 640, 512, 384, 256, 128, 64)  # that `auto` tries [pixels]
OVERLAP = 4  # part of a tile that overlaps, unless it is given: 1/4


class Cut(NamedTuple):
    """One tile along one axis, in pixels of the image."""

    window: slice  # what the network gets
    core: slice  # the part of it that is labelled


@dataclass(frozen=True)
class Tiling:
    """Sizes of tiles and of their overlap in both directions [pixels]; blend: logits are averaged where they overlap,
    by mmsegmentation's windows.
    """

    height: int
    width: int
    overlap: int
    blend: bool = False

    def cuts(self, length: int, side: int) -> list[Cut]:
        """The tiles of `side` pixels along an axis of `length` pixels."""
        if self.blend:
            starts = [each.start for each in windows(length, side, side - self.overlap)]
            return meet([slice(start, min(start + side, length)) for start in starts])
        step = side - self.overlap
        grid = GRID if step >= GRID else 1
        step = step // grid * grid
        last = max(length - side, 0) // grid * grid
        starts = [*range(0, last, step), last]
        return meet([*(slice(start, start + side) for start in starts[:-1]), slice(last, length)])

    def rows(self, height: int) -> list[Cut]:
        """The tiles of an image of this height, from the top down."""
        return self.cuts(height, self.height)

    def columns(self, width: int) -> list[Cut]:
        """The tiles of an image of this width, from left to right."""
        return self.cuts(width, self.width)

    def count(self, height: int, width: int) -> int:
        """How many tiles an image of this size has."""
        return len(self.rows(height)) * len(self.columns(width))

    def __str__(self) -> str:
        shared = f"overlap {self.overlap} pixels"
        return f"tiles of {self.width}x{self.height}, {shared}{', logits averaged there' * self.blend}"


def meet(spans: list[slice]) -> list[Cut]:
    """Spans that overlap, in order, with borders in the middles of their overlaps."""
    borders = [(after.start + before.stop) // 2 for before, after in pairwise(spans)]
    edges = [spans[0].start, *borders, spans[-1].stop]
    return [Cut(span, slice(*edge)) for span, edge in zip(spans, pairwise(edges), strict=True)]


def choose(
    size: tuple[int, int], side: tuple[int, int] | None, overlap: int | None, blend: bool, memory: "Memory"
) -> Tiling:
    """The tiling of an image of `size` (height, width).

    side: of tiles, (width, height); None: the whole image if it fits into memory, else the largest tiles that do.
    overlap: None: a quarter of the tile's short side, a multiple of `GRID`. Raises DataError where nothing fits.
    """
    if side is None:
        side = memory.largest(size, overlap or 0, blend)
    shared = min(side) // OVERLAP // GRID * GRID if overlap is None else min(overlap, min(side) - 1)
    return Tiling(side[1], side[0], shared, blend)


@dataclass(frozen=True)
class Memory:
    """What is known of the memory that labelling takes: the network's name, classes, channels of images, views' scale
    (the largest ratio of the test protocol), and the device.
    """

    network: str
    classes: int
    channels: int
    ratio: float
    device: torch.device

    def network_bytes(self, pixels: int) -> float:
        """What a pass takes, at most, for an input of so many pixels of the image."""
        pixels = math.ceil(pixels * self.ratio**2)
        try:
            quadratic = family_of(self.network).quadratic
        except ValueError:  # of another program
            quadratic = None
        matrices = quadratic.memory(pixels) if quadratic is not None and quadratic.memory is not None else 0.0
        return BYTES * pixels + matrices

    def host_bytes(self, width: int, rows: int, blend: bool) -> float:
        """What rows of the image and of its results take: pixels twice, labels and colours, and summed logits."""
        return width * rows * (2 * self.channels + 12 + (4 * self.classes + 8) * blend)

    def free(self) -> float:
        """Bytes that a pass may take on the device."""
        if self.device.type == "cuda":
            return SHARE * torch.cuda.mem_get_info(self.device)[0]
        free = free_memory()
        return math.inf if free is None else SHARE * free

    def largest(self, size: tuple[int, int], overlap: int, blend: bool) -> tuple[int, int]:
        """(width, height) of `auto`, see `choose`."""
        height, width = size
        free = self.free()
        host = self.host_bytes(width, height, False)
        if self.network_bytes(height * width) + host <= free:
            return max(width, SMALLEST), max(height, SMALLEST)
        on_gpu = self.device.type == "cuda"
        budget = min(free, BUDGET)
        for side in SIDES:
            if side <= overlap:
                break
            rows = self.host_bytes(width, min(side, height), blend) + HOST
            needed = self.network_bytes(min(side, height) * min(side, width))
            if (needed <= free and rows <= BUDGET) if on_gpu else needed + rows <= budget:
                return side, side
        raise DataError(
            f"an image of {width}x{height} pixels: no tiles of --tile auto fit into {budget / 2**20:,.0f} MiB\n"
            "give their size, such as --tile 512, which takes more memory"
            f"{'; or leave out --blend' * blend}{'; or give a smaller --overlap' * (overlap > 0)}"
        )

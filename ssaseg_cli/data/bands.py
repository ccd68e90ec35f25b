"""How many bands the images of a user's folder have, and what the recipe says about it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ssaseg.datasets import DataError
from ssaseg.datasets.bands.reading import TIFF, count_bands, measure
from ssaseg.datasets.base import Levels
from ssaseg.files.reading import open_file
from ssaseg.recipes.fields import MOST_CHANNELS

LOOKED_AT = 32  # images


@dataclass
class Bands:
    """How many bands all images have, if that is not three. `used`: whether the recipe says so, or only a comment."""

    count: int = 3
    used: bool = True
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def channels(self) -> int:
        """`data.channels` of the recipe."""
        return self.count if self.used else 3

    def lines(self) -> Iterator[str]:
        """Lines of the recipe's `data` section."""
        if self.mean:
            start = "  " if self.used else "  # "
            order = "red, green, blue and the others; " if self.count > 3 else ""
            what = "bands of every image" if self.used else "these three lines use all bands"
            yield f"{start}channels: {self.count} # {what}"
            yield f"{start}mean: {list(self.mean)} # {order}measured on some images"
            yield f"{start}std: {list(self.std)}"


def measured(bands: Bands, files: Sequence[Path], levels: Levels | None) -> Bands:
    """The same with mean and spread, where they are needed. levels: `data.range` of the recipe."""
    if bands.count == 3:
        return bands
    try:
        mean, std = measure(files, bands.count, levels)
    except (DataError, OSError):
        if bands.used:
            raise
        return bands
    return replace(bands, mean=mean, std=std, notes=[f"{note}: see data.channels" for note in bands.notes])


def look_at_bands(files: Sequence[Path]) -> Bands:
    """What some of these images need. Two, five or more bands are all used, as such files cannot be read otherwise.
    Grey and four bands are a comment, as most people have three channels in mind. Alpha of other files is no band. The
    mean and the spread are not measured yet.
    """
    some = files[:: max(len(files) // LOOKED_AT, 1)][:LOOKED_AT]
    found = {count for count in map(count_bands, some) if count is not None}
    if max(found, default=3) > 4 and len(found) > 1:
        counts = " and ".join(str(count) for count in sorted(found))
        return Bands(notes=[f"the images have {counts} bands: only images of at most 4 are read, as three channels"])
    count = found.pop() if len(found) == 1 else 3
    if count == 3 or count > MOST_CHANNELS or (count != 1 and not _start(some[0]).startswith(TIFF)):
        return Bands()
    used = count not in (1, 4)
    said = f"the images have {count} bands, all of which are used"
    if not used:
        said = "the images are grey, which is repeated in three channels"
        said = "the images have 4 bands: the first three are used, as red, green and blue" if count == 4 else said
    return Bands(count, used, notes=[said])


def _start(file: Path) -> bytes:
    with open_file(file) as opened:
        return opened.read(8)

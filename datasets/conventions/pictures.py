"""Masks that are pictures: which image each belongs to, and what a viewer would show of it.

Letters: H, W height and width [pixels].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np

from ssaseg.datasets.base import DataError, evenly
from ssaseg.datasets.conventions.base import Item
from ssaseg.datasets.decoding.formats import MAX_PIXELS, open_image, read_bytes, require_size, unreadable
from ssaseg.datasets.decoding.masks import lossy_method
from ssaseg.datasets.decoding.tiff import tiff_header
from ssaseg.datasets.pairs import first_names
from ssaseg.datasets.survey import Found, find_folders
from ssaseg.datasets.workers import Work, read_ahead
from ssaseg.files.machine import count_cores

Result = TypeVar("Result")

ANY = [str(value) for value in range(255)]  # classes, where the masks are not read as ids
FEW = 64  # files that one process reads as quickly as several
MOST_WORKERS = 8


class Picture(NamedTuple):
    """A mask as a viewer shows it: palettes as their colours, white as 255 whatever the number of bits."""

    pixels: np.ndarray  # uint8: grey (H, W), or RGB (H, W, 3)
    alpha: np.ndarray | None  # uint8 (H, W), 0 = transparent; None: no such channel
    mode: str  # Pillow's: "1", "L", "P", "RGB", …
    lossy: bool  # whether its format may have changed pixels
    bits: int = 8  # of a grey pixel: 1, 8 or 16
    zero: int | None = None  # of a palette: the level of green that the index 0 stands for

    def grey(self, tolerance: int = 0) -> np.ndarray | None:
        """uint8 (H, W); None where the channels differ by more than the tolerance."""
        if self.pixels.ndim == 2:
            return self.pixels
        red, green, blue = cv2.split(self.pixels)
        if np.array_equal(red, green) and np.array_equal(red, blue):
            return red
        if tolerance and max(cv2.absdiff(red, green).max(), cv2.absdiff(blue, green).max()) <= tolerance:
            return green
        return None


def read_picture(file: Path) -> Picture:
    """Raises OSError where the file cannot be read, DataError where it is no picture that a mask may be."""
    data = read_bytes(file, "mask")
    require_size(file, data, MAX_PIXELS)
    lossy = lossy_method(data, tiff_header(data)) is not None
    try:
        with open_image(data) as image:
            mode, alpha, bits = image.mode, None, 8
            zero = (image.getpalette() or [0, 0])[1] if mode == "P" else None
            if (fast := _decode_png(data)) is not None:
                pixels = fast
            elif mode in ("1", "L"):
                bits = 1 if mode == "1" else 8
                pixels = np.array(image.convert("L"))
            elif mode.startswith("I"):
                values = np.array(image)
                low, high = int(values.min(initial=0)), int(values.max(initial=0))
                if low < 0 or high > 65535:
                    raise DataError(f"{file}: values {low}..{high} in a mask\nexpected 8 or 16 bits\nwrite 8-bit PNG")
                bits = 16 if high > 255 else 8
                pixels = (values >> 8 if high > 255 else values).astype(np.uint8)
            elif mode in ("LA", "PA", "RGBA") or (mode == "P" and "transparency" in image.info):
                whole = np.array(image.convert("RGBA"))
                pixels, alpha = np.ascontiguousarray(whole[..., :3]), whole[..., 3]
            elif mode in ("P", "RGB", "RGBX", "CMYK", "YCbCr"):
                pixels = np.array(image if mode == "RGB" else image.convert("RGB"))
            else:
                found = f"a mask of {mode} pixels"
                raise DataError(f"{file}: {found}\nexpected grey, a palette or RGB, 8 bits a channel\nwrite it as PNG")
    except (MemoryError, DataError):
        raise
    except Exception as error:  # Pillow's readers raise ten types for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0].partition("<_io")[0]
        raise unreadable(file, "mask", reason) from None
    return Picture(pixels, alpha, mode, lossy, bits, zero)


def _decode_png(data: bytes) -> np.ndarray | None:
    """Pixels of a PNG file with 8 bits of grey or RGB, by OpenCV: in half the time, and it checks the checksums.

    None for other files, those that it cannot decode, and those with a colour profile: see `decoding`.
    """
    plain = data[:4] == b"\x89PNG" and data[24:26] in (b"\x08\x00", b"\x08\x02")
    if not plain or b"iCCP" in data[: data.find(b"IDAT")]:
        return None
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if pixels is None or (pixels.ndim == 3 and pixels.shape[2] != 3):
        return None
    return pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


# ---- which mask belongs to which image ---------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Images with one mask each, which are pictures."""

    found: Found
    items: list[Item]  # the labels are mask files
    notes: list[str]

    @property
    def masks(self) -> list[Path]:
        return [item.label for item in self.items]

    @property
    def where(self) -> str:
        """The first folder of masks below the root, for messages."""
        folder = next(iter(self.found.mask_folders), ".")
        return "its folder" if folder == "." else f"{folder}/"


def find_pairs(root: Path, jpeg: bool = False) -> Pairs:
    """All images below `root` with one mask each. `jpeg`: masks may be JPEG files. Raises DataError without any."""
    found = find_folders(root, jpeg=jpeg)
    sets = found.datasets(root, ANY)
    items = [
        Item(split, each.name(index), each.image_files[index], each.mask_files[index])
        for split, each in sets.items()
        for index in range(len(each))
    ]
    notes = list(found.notes)
    for split, each in sets.items():
        where = "" if split == "all" else f" of the {split} split"
        notes += [f"left out{where}: {str(error).splitlines()[0]}" for error in each.incomplete]
        if each.unused_masks:
            names = first_names([file.name for file in each.unused_masks])
            notes.append(f"masks{where} without image, not used: {len(each.unused_masks)} ({names})")
    return Pairs(found, items, notes)


# ---- looking through masks ---------------------------------------------------------------------------------------


def look_at_all(files: Sequence[Path], look: Callable[[Path], Result]) -> Iterator[Result | Exception]:
    """`look(file)` of each file in order, or its DataError or OSError; in several processes where there are many."""
    workers = min(count_cores(), MOST_WORKERS) if len(files) > FEW else 0
    stream: Any = read_ahead(_Look(files, look), range(len(files)), workers if workers > 1 else 0)
    with closing(stream):
        for (result,) in stream:
            yield result


def some_of(files: Sequence[Path], most: int) -> list[Path]:
    """At most so many of the files, evenly spaced, the first among them."""
    return [files[at] for at in evenly(len(files), most)]


class _Look(Work):
    """Looks at masks, in the main process or in a worker."""

    def __init__(self, files: Sequence[Path], look: Callable[[Path], Any]) -> None:
        super().__init__(self)  # type: ignore[arg-type]  # only `name` is used
        self.files, self.look = files, look

    def name(self, index: int) -> str:
        return str(self.files[index])

    def __getitem__(self, index: int) -> Any:
        self.note(index)
        try:
            return (self.look(self.files[index]),)
        except (DataError, OSError) as error:
            return (error,)  # as an item: alone it would end the reading
        finally:
            self.note(-1)

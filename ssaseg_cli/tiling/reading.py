"""Reads large images by rows, from the first to the last, so that no more of them is in memory than a band.

rasterio reads TIFF (tiles, strips, BigTIFF), JPEG and PNG in this way; the latter two have no windows, but give their
rows in order. Smaller images are decoded whole, by the decoder of all other commands: their pixels are the same.

Letters: H, W height and width [pixels]; C channels.
"""

import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssaseg.cli.tiling.library import of_rasterio, open_raster
from ssaseg.datasets import DataError
from ssaseg.datasets.bands.reading import read_bands
from ssaseg.datasets.base import Levels
from ssaseg.datasets.decoding.formats import KNOWN, format_of, open_image, require_end
from ssaseg.datasets.decoding.images import HEADER, image_facts, mapped_header, shown_size, to_bytes
from ssaseg.datasets.decoding.tiff import CMYK, COMMON, WHITE_IS_ZERO, TiffHeader
from ssaseg.files.reading import open_file
from ssaseg.files.text import cut, printable

WHOLE = 2**24  # pixels of an image up to which it is decoded at once: 48 MiB of colours
DRIVERS = {"TIFF": "GTiff", "JPEG": "JPEG", "PNG": "PNG"}  # what is read by rows: our name -> that of GDAL
PROGRESSIVE = 2**26  # pixels of a JPEG file with several scans: its decoder keeps them, 4 bytes a pixel
BLOCK_ROWS = 4096  # most rows of a block by which reading is rounded: a file may be one strip


class Georeference(NamedTuple):
    """Where an image lies on the Earth, as rasterio has it; and whether it has pixels without data."""

    crs: Any = None  # coordinate reference system; None: not stated
    transform: Any = None  # from pixels (column, row) to its coordinates; None: not stated
    points: Any = ()  # ground control points, of images without `transform`
    nodata: float | None = None


@dataclass
class LargeImage:
    """An open image; `rows` is to be called from the first row to the last."""

    path: Path
    height: int
    width: int
    channels: int
    block: int  # rows that the file stores together
    place: Georeference
    dataset: Any  # of rasterio; None where it has not opened the file
    pixels: np.ndarray | None  # the whole image, if it is small
    decode: Any = None  # from values of the file (bands,H,W) to uint8 (H,W,C)

    def rows(self, first: int, last: int) -> np.ndarray:
        """The rows of this range, uint8 (last-first,W,C), BGR, see `read_bands`. Raises DataError for damaged ones."""
        if self.pixels is not None:
            return self.pixels[first:last]
        with _damage(self.path, first, last):
            return np.ascontiguousarray(self.decode(self.dataset.read(window=self._window(first, last))))

    def missing(self, first: int, last: int) -> np.ndarray | None:
        """Which pixels of these rows have the file's value of no data in all bands, bool; None: it states none."""
        if self.place.nodata is None:
            return None
        with _damage(self.path, first, last):
            return np.asarray(self.dataset.dataset_mask(window=self._window(first, last)) == 0)

    def _window(self, first: int, last: int) -> Any:
        from rasterio.windows import Window

        return Window(0, first, self.width, last - first)


@contextmanager
def _damage(path: Path, first: int, last: int) -> Iterator[None]:
    """Errors of reading become a DataError."""
    try:
        yield
    except Exception as error:
        if not of_rasterio(error):
            raise
        reason = cut(printable(str(error.__cause__ or error)), 120)
        raise DataError(
            f"{path}: damaged image: rows {first} to {last} cannot be read: {reason}\n"
            "expected a complete file\ncopy it again, or leave it out"
        ) from None


@contextmanager
def open_large(
    path: Path, channels: int, levels: Levels | None = None, whole: int | None = None
) -> Iterator[LargeImage]:
    """Opens an image of `channels` channels; levels: of 16 bits, see `read_bands`. Inside `windows_library`.

    whole: images of so many pixels are decoded at once; None: `WHOLE`. Raises what `read_bands` raises, for images of
    these formats that are larger than `whole` too; DataError for larger ones of other formats.
    """
    with open_file(path) as file:
        name = format_of(file.read(HEADER))
    header = mapped_header(path) if name == "TIFF" else None
    size = shown_size(path)
    usual = header is None or (header.compression in COMMON and header.bits in (8, 16))
    with ExitStack() as stack:
        dataset = stack.enter_context(_opened(path, "GTiff")) if header is not None else None
        if size is None or (usual and size[0] * size[1] <= (WHOLE if whole is None else whole)):
            pixels = read_bands(path, channels, levels=levels)  # raises where the header could not be read
            place = _place(dataset) if header is not None and header.orientation == 1 else Georeference()
            height, width = pixels.shape[:2]
            yield LargeImage(path, height, width, channels, 1, place, dataset, pixels)
            return
        _require_rows(path, name, size, header)
        if dataset is None:
            dataset = stack.enter_context(_opened(path, DRIVERS[str(name)]))
        decode = partial(_decoded, table=_table(path, dataset, channels, header), levels=levels, channels=channels)
        if header is not None and header.photometric == WHITE_IS_ZERO:
            decode = partial(_inverted, decode=decode)
        block = int(dataset.block_shapes[0][0])
        yield LargeImage(
            path,
            dataset.height,
            dataset.width,
            channels,
            block=block if block <= BLOCK_ROWS else 1,
            place=_place(dataset),
            dataset=dataset,
            pixels=None,
            decode=decode,
        )


@contextmanager
def _opened(path: Path, driver: str) -> Iterator[Any]:
    """The file, by this driver alone: others would follow what a text file says."""
    try:
        dataset = open_raster(path, driver=driver)
    except Exception as error:
        if not of_rasterio(error):
            raise
        reason = cut(printable(str(error)), 120)
        raise DataError(
            f"{path}: damaged image: {reason}\nexpected {KNOWN['image']}\ncopy it again, or leave it out"
        ) from None
    with dataset:
        yield dataset


def _place(dataset: Any) -> Georeference:
    points, crs = dataset.gcps
    stated = not dataset.transform.is_identity
    return Georeference(dataset.crs or crs, dataset.transform if stated else None, points, dataset.nodata)


def _require_rows(path: Path, name: str | None, size: tuple[int, int], header: TiffHeader | None) -> None:
    """Raises DataError for what cannot be read by rows, or is not complete."""
    what = f"{path}: {name or 'an image'} of {size[1]}x{size[0]} pixels"
    if name not in DRIVERS:
        kinds = ", ".join(DRIVERS)
        raise DataError(
            f"{what}: too large to be decoded at once, and its format has no rows to read\n"
            f"expected {kinds}, or at most {WHOLE:,} pixels\nsave it as TIFF with tiles"
        )
    turn = header.orientation if header is not None else 1
    if header is None:
        with open_file(path) as file:
            start = file.read(HEADER)
        facts = image_facts(start)
        turn = 1 if facts is None else facts.orientation
        if facts is not None and size[0] * size[1] > PROGRESSIVE:
            _require_one_scan(what, start)
        with open_file(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            require_end(path, content)
    if turn != 1:
        raise DataError(
            f"{what}: its orientation, {turn}, says that it is to be turned, which cannot be done by rows\n"
            "expected orientation 1\nturn its pixels and save it again, for example with: vips autorot IN OUT"
        )


def _require_one_scan(what: str, start: bytes) -> None:
    """Raises DataError for a progressive JPEG file. start: what it begins with, which Pillow can open."""
    with open_image(start) as image:
        if image.info.get("progressive"):
            raise DataError(
                f"{what}: progressive, which its decoder keeps in memory as a whole\n"
                "expected rows one after the other\nsave it as TIFF with tiles, or as JPEG that is not progressive"
            )


def _table(path: Path, dataset: Any, channels: int, header: TiffHeader | None) -> np.ndarray | None:
    """The colours BGR uint8 (256,3) of a palette; None: there is none. Raises DataError for other samples or bands."""
    count, kinds = dataset.count, set(dataset.dtypes)
    try:
        white = header is not None and header.photometric == WHITE_IS_ZERO  # GDAL gives a palette only for 8 bits
        colours = dataset.colormap(1) if count == 1 and not white else {}
    except ValueError:
        colours = {}
    bits = dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS")
    mixed = header is not None and header.photometric == CMYK and header.bits != 8
    if not kinds <= {"uint8", "uint16", "int16"} or len(kinds) > 1 or (bits and not colours) or mixed:
        got = (
            f"samples of {bits} bits" if bits else "CMYK of 16 bits" if mixed else f"{', '.join(sorted(kinds))} values"
        )
        raise DataError(
            f"{path}: {got}\nexpected whole numbers of 8 or 16 bits\n"
            "scale the values of all images in the same way to 0..255 or 0..65535, and save them again"
        )
    fits = count == channels or (channels == 3 and count <= 4) or (channels == 1 and count == 2)
    if not fits or (colours and channels != 3):
        got = "a palette" if colours else f"{count} band{'s' * (count != 1)}"
        raise DataError(
            f"{path}: an image with {got}\nexpected {channels}, as data.channels of the recipe\n"
            "give images with as many bands, or a checkpoint of a network for these"
        )
    if not colours:
        return None
    table = np.zeros((256, 3), np.uint8)
    for value, colour in colours.items():
        if value < 256:
            table[value] = colour[2::-1]
    return table


def _decoded(values: np.ndarray, table: np.ndarray | None, levels: Levels | None, channels: int) -> np.ndarray:
    """Values (bands,H,W) as uint8 (H,W,C), as `read_bands` gives them."""
    if table is not None:
        return table[values[0]]
    values = values if values.dtype == np.uint8 else to_bytes(values, levels)
    if channels == 1:
        return values[0][..., None]
    if channels == 3 and len(values) < 3:
        return np.repeat(values[0][..., None], 3, axis=2)
    first = [2, 1, 0, *range(3, channels)] if channels > 2 else [*range(channels)]
    return np.stack([values[each] for each in first], axis=2)


def _inverted(values: np.ndarray, decode: Any) -> np.ndarray:
    return np.subtract(255, decode(values), dtype=np.uint8)


class Band:
    """The rows of an image that are in memory: a range that moves down.

    Memory: the range that is asked for, and less than a block of the file.
    """

    def __init__(self, image: LargeImage) -> None:
        self.image, self.top, self.bottom = image, 0, 0
        self.rows = np.empty((0, image.width, image.channels), np.uint8)

    def take(self, first: int, last: int) -> np.ndarray:
        """Rows of this range, uint8 (last-first,W,C). Rows before `first` are forgotten."""
        if last > self.bottom:
            block = self.image.block
            stop = min(-(-last // block) * block, self.image.height)
            kept = self.rows[max(first - self.top, 0) :]
            self.rows = np.concatenate([kept, self.image.rows(self.bottom, stop)])
            self.top, self.bottom = stop - len(self.rows), stop
        return self.rows[first - self.top : last - self.top]

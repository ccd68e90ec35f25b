"""Writes results of large images as TIFF files with tiles, row by row; a file gets its name when it is complete.

Files keep the georeference of their image, have smaller copies of themselves (overviews), by which viewers show the
whole quickly, and are BigTIFF where they may become larger than 4 GiB.

Axes: R×W rows that are added.
"""

import errno
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssaseg.cli.tiling.library import Signalled, of_rasterio, open_raster
from ssaseg.cli.tiling.reading import Georeference
from ssaseg.datasets.base import IGNORED
from ssaseg.files.reading import open_file
from ssaseg.files.text import cut, printable
from ssaseg.files.writing import below, make_temporary

BLOCK = 256  # side of the file's tiles [pixels]
SMALLEST = 512  # longest side of an image that gets no further smaller copy [pixels]
FULL = 2**24  # bytes: a disk with less space left counts as full

LOSSLESS: Mapping[str, Any] = {"compress": "deflate"}
PHOTO: Mapping[str, Any] = {"compress": "jpeg", "jpeg_quality": 90, "photometric": "ycbcr"}


class Form(NamedTuple):
    """How one kind of result is stored."""

    bands: int
    smaller: str  # how smaller copies are made: a name in rasterio.enums.Resampling
    storage: Mapping[str, Any] = LOSSLESS
    labels: bool = False  # class numbers, with a palette; `IGNORED` is no data


FORMS: Mapping[str, Form] = {
    "index": Form(1, "mode", labels=True),
    "coarse": Form(1, "mode", labels=True),
    "color": Form(3, "nearest"),
    "overlay": Form(3, "average", PHOTO),
    "confidence": Form(1, "average"),
}


@contextmanager
def new_file(path: Path, root: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place at the end; after an error nothing is left of it.

    root: see `write_atomic`. OSErrors name `path`.
    """
    temporary = None
    try:
        target = below(path, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = make_temporary(target.parent)
        os.close(descriptor)
        yield temporary
        with open_file(temporary) as file:
            os.fsync(file.fileno())  # a full disk may be noticed only now
        os.replace(temporary, target)
    except BaseException as error:  # Ctrl-C too
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        raise


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Errors of rasterio, raised or only logged, become an OSError: that the disk is full, if it is."""
    reason = ""
    with Signalled() as signalled:
        try:
            yield
        except Exception as error:
            if not of_rasterio(error):
                raise
            reason = str(error.__cause__ or error)
    reason = reason or next(iter(signalled.errors), "")
    if reason:
        full = shutil.disk_usage(path.parent).free < FULL
        number = errno.ENOSPC if full else errno.EIO
        text = os.strerror(number) if full else f"cannot be written: {cut(printable(reason), 120)}"
        raise OSError(number, text, str(path))


class Raster:
    """A file that is being written. `add` takes its rows from the first to the last, `finish` completes it."""

    def __init__(self, path: Path, form: Form, size: tuple[int, int], place: Georeference, colours: np.ndarray) -> None:
        """size: (height, width). colours: RGB uint8 (256,3) of class numbers."""
        self.path, self.form, (self.height, self.width) = path, form, size
        self.rows: list[np.ndarray] = []
        self.held = self.top = self.sum = 0
        options = {**form.storage, "interleave": "pixel", "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}
        options |= {"bigtiff": "if_safer", "height": self.height, "width": self.width, "count": form.bands}
        if place.crs is not None:
            options["crs"] = place.crs
        if place.transform is not None:
            options["transform"] = place.transform
        if form.labels and place.nodata is not None:
            options["nodata"] = IGNORED
        with _written(path):
            self.file = open_raster(path, "w", driver="GTiff", dtype="uint8", **options)
            if place.transform is None and place.points:
                self.file.gcps = (place.points, place.crs)
            if form.labels:
                self.file.write_colormap(1, {index: (*map(int, each), 255) for index, each in enumerate(colours)})

    def add(self, rows: np.ndarray) -> None:
        """The next rows, uint8 (R,W), or RGB (R,W,3). They are kept until they fill a row of the file's tiles."""
        self.rows.append(rows)
        self.held += len(rows)
        if self.held >= BLOCK:
            self._write(self.held // BLOCK * BLOCK)

    def _write(self, count: int) -> None:
        from rasterio.windows import Window

        joined = np.concatenate(self.rows) if len(self.rows) > 1 else self.rows[0]
        ready = joined[:count]
        self.rows = [joined[count:].copy()]
        self.held -= count
        planes = ready[None] if ready.ndim == 2 else np.moveaxis(ready, 2, 0)
        with _written(self.path):
            self.file.write(planes, window=Window(0, self.top, self.width, count))
        self.sum = zlib.crc32(ready.tobytes(), self.sum)
        self.top += count

    def finish(self) -> None:
        """Writes what is left, reads all back, and adds smaller copies. Raises OSError for a file that differs."""
        if self.held:
            self._write(self.held)
        with _written(self.path):
            self.file.close()
        self._compare()
        levels = [2**power for power in range(1, 32) if max(self.height, self.width) / 2 ** (power - 1) > SMALLEST]
        if levels:
            from rasterio.enums import Resampling

            with _written(self.path), open_raster(self.path, "r+") as file:
                file.build_overviews(levels, Resampling[self.form.smaller])

    def _compare(self) -> None:
        """What could not be written is noticed only when it is read: rasterio closes such files without an error."""
        from rasterio.windows import Window

        code = 0
        with _written(self.path), open_raster(self.path) as file:
            for top in range(0, self.height, BLOCK):
                planes = file.read(window=Window(0, top, self.width, min(BLOCK, self.height - top)))
                rows = planes[0] if len(planes) == 1 else np.moveaxis(planes, 0, 2)
                code = zlib.crc32(rows.tobytes(), code)
        if code != self.sum and self.form.storage is LOSSLESS:
            raise OSError(errno.EIO, "what was written cannot be read again: is the disk full?", str(self.path))

    def close(self) -> None:
        """Ends it early, too. Raises nothing."""
        with suppress(Exception), Signalled():
            self.file.close()

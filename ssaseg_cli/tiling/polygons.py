"""The regions of a label map as polygons, in a GeoJSON file: one feature a line.

Positions are longitude and latitude (WGS 84), as RFC 7946 wants, where the image states where it lies; else they are
pixels of the image, and the file says so. The image is worked on in stripes of whole rows, each of at most `STRIPE`
pixels, so that memory is bounded; polygons end at a stripe's border and go on in the next.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ssaseg.cli.tiling.reading import Georeference
from ssaseg.datasets.base import IGNORED
from ssaseg.files.writing import open_append

STRIPE = 2**24  # pixels whose polygons are made at a time
TOGETHER = 1000  # polygons that are moved to longitude and latitude at a time
DIGITS = 8  # behind the point: a millimetre
PIXELS = "pixels of the image: x to the right, y down; (0, 0) is the upper left corner of the first pixel"
UNKNOWN = "coordinates of the image's transform; which coordinate reference system they are of is not stated in it"
WORLD = "EPSG:4326"

Ring = list[list[float]]


class Polygons:
    """A GeoJSON file that is being written. `add` takes labels from the first row to the last, `finish` completes it.

    The file exists, and is empty.
    """

    def __init__(self, path: Path, classes: Sequence[str], size: tuple[int, int], place: Georeference) -> None:
        """classes: names. size: (height, width)."""
        self.classes, self.place, self.width = classes, place, size[1]
        self.stripe = max(STRIPE // max(self.width, 1), 1)
        self.rows: list[np.ndarray] = []
        self.held = self.top = self.count = 0
        self.file = open_append(path)
        note = UNKNOWN if place.transform is not None else PIXELS
        world = place.transform is not None and place.crs is not None
        self.file.write('{"type": "FeatureCollection"')
        if not world:
            self.file.write(f', "coordinates": {json.dumps(note)}')
        self.file.write(', "features": [')

    def add(self, rows: np.ndarray) -> None:
        """The next labels, uint8 (R,W)."""
        for start in range(0, len(rows), self.stripe):
            part = rows[start : start + self.stripe]
            if self.held + len(part) > self.stripe:
                self._write()
            self.rows.append(part)
            self.held += len(part)

    def finish(self) -> None:
        """Writes what is left."""
        if self.held:
            self._write()
        self.file.write("\n]}\n")
        self.file.close()

    def close(self) -> None:
        """Ends it early, too."""
        self.file.close()

    def _write(self) -> None:
        labels = np.concatenate(self.rows)
        self.rows, self.held = [], 0
        for label, geometry in self._moved(regions(labels, self.top, self.place.transform)):
            properties = {"class": self.classes[label], "index": label}
            feature = {"type": "Feature", "properties": properties, "geometry": geometry}
            self.file.write(
                ",\n" * bool(self.count) + "\n" * (not self.count) + json.dumps(feature, ensure_ascii=False)
            )
            self.count += 1
        self.top += len(labels)

    def _moved(self, found: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The polygons in longitude and latitude where that is known, with rings in the directions of RFC 7946."""
        from rasterio.warp import transform_geom

        known = self.place.transform is not None and self.place.crs is not None
        while some := list(islice(found, TOGETHER)):
            shapes = [geometry for _, geometry in some]
            if known:
                shapes = transform_geom(self.place.crs, WORLD, shapes, precision=DIGITS)
            for (label, _), geometry in zip(some, shapes, strict=True):
                rings = [[list(position) for position in ring] for ring in geometry["coordinates"]]
                yield label, {"type": "Polygon", "coordinates": [turned(ring, not at) for at, ring in enumerate(rings)]}


def regions(labels: np.ndarray, top: int, transform: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Label and polygon of each region of 4-connected pixels in labels (R,W), whose first row is `top`; in pixels, or
    what `transform` makes of them. Without `IGNORED`.
    """
    from rasterio.features import shapes
    from rasterio.transform import Affine

    a, b, c, d, e, f = (1, 0, 0, 0, 1, 0) if transform is None else tuple(transform)[:6]
    move = Affine(a, b, c + b * top, d, e, f + e * top)
    for geometry, label in shapes(labels, mask=labels != IGNORED, connectivity=4, transform=move):
        yield int(label), geometry


def turned(ring: Ring, outer: bool) -> Ring:
    """A ring, counter-clockwise (x to the right, y up) if it is the outer one, else clockwise."""
    area = sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring))
    return ring if (area > 0) == outer else ring[::-1]

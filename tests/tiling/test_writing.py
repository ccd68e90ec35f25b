"""Files of results: their georeference, smaller copies, polygons; and disks that are full at any moment."""

import json
import os
import resource
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.features import rasterize
from rasterio.transform import from_origin
from rasterio.warp import transform

from ssaseg.cli.tiling import polygons
from ssaseg.cli.tiling.library import windows_library
from ssaseg.cli.tiling.polygons import PIXELS, UNKNOWN, Polygons
from ssaseg.cli.tiling.rasters import FORMS, LOSSLESS, Form, Raster, new_file
from ssaseg.cli.tiling.reading import Georeference
from ssaseg.files.reading import content_sum

COLOURS = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
PLACE = Georeference("EPSG:32633", from_origin(500_000, 5_000_000, 0.5, 0.5), (), 0)
NAMES = ["road", "tree", "sky"]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)


def blocks(height: int, width: int) -> np.ndarray:
    """Labels of three classes in large regions, and some pixels without data."""
    labels = np.kron(
        np.random.default_rng(0).integers(0, 3, (height // 8, width // 8), dtype=np.uint8), np.ones((8, 8))
    )
    labels[:10, :20] = 255
    return labels.astype(np.uint8)


def write(
    path: Path, labels: np.ndarray, kind: str = "index", place: Georeference = PLACE, form: Form | None = None
) -> Path:
    """The labels, in strips of 100 rows."""
    with windows_library(), new_file(path, path.parent) as temporary:
        size = labels.shape[0], labels.shape[1]
        raster = Raster(temporary, form or FORMS[kind], size, place, COLOURS)
        try:
            for top in range(0, len(labels), 100):
                raster.add(labels[top : top + 100])
            raster.finish()
        finally:
            raster.close()
    return path


def test_a_raster_has_all_rows_and_its_place(tmp_path: Path) -> None:
    labels = noise(700, 1100)
    with windows_library(), rasterio.open(write(tmp_path / "a.tif", labels)) as file:
        np.testing.assert_array_equal(file.read(1), labels)
        assert (file.crs.to_epsg(), file.transform, file.nodata) == (32633, PLACE.transform, 255)
        assert file.overviews(1) == [2, 4]
        assert file.block_shapes == [(256, 256)]
        assert file.colormap(1)[7] == (*COLOURS[7].tolist(), 255)
        assert file.read(1, out_shape=(175, 275)).shape == (175, 275)
    content = (tmp_path / "a.tif").read_bytes()
    assert content_sum(tmp_path / "a.tif") == (len(content), zlib.crc32(content))
    assert [each.name for each in tmp_path.iterdir()] == ["a.tif"]


def test_smaller_copies_hold_the_most_common_labels(tmp_path: Path) -> None:
    labels = np.zeros((600, 600), np.uint8)
    labels[::2] = labels[:, ::2] = 3  # three of four
    with windows_library(), rasterio.open(write(tmp_path / "a.tif", labels), overview_level=0) as file:
        assert (file.read(1) == 3).all()


def test_colours_without_a_place(tmp_path: Path) -> None:
    colours = COLOURS[noise(300, 200)]
    for kind, most in (("color", 0), ("overlay", 80)):
        path = write(tmp_path / f"{kind}.tif", colours, kind, Georeference())
        with windows_library(), rasterio.open(path) as file:
            assert (file.crs, file.nodata, file.transform.is_identity, file.overviews(1)) == (None, None, True, [])
            assert np.abs(np.moveaxis(file.read(), 0, 2).astype(int) - colours).mean() <= most


def test_control_points_are_kept(tmp_path: Path) -> None:
    points = [rasterio.control.GroundControlPoint(y, x, 10 + x, 50 - y) for y, x in ((0, 0), (0, 99), (99, 0))]
    place = Georeference(rasterio.crs.CRS.from_epsg(4326), None, points)
    with windows_library(), rasterio.open(write(tmp_path / "a.tif", noise(100, 100), place=place)) as file:
        found, crs = file.gcps
        assert ([(point.row, point.col, point.x) for point in found], crs.to_epsg()) == (
            [(0, 0, 10), (0, 99, 109), (99, 0, 10)],
            4326,
        )


@pytest.mark.parametrize(("side", "version"), [(100_000, 43), (20_000, 42)])
def test_files_that_may_exceed_4_gib_are_big(side: int, version: int, tmp_path: Path) -> None:
    """Of 100,000² labels; sparse, so that nothing is written here."""
    form = Form(1, "mode", {**LOSSLESS, "sparse_ok": True})
    with windows_library():
        Raster(tmp_path / "a.tif", form, (side, side), PLACE, COLOURS).close()
    with (tmp_path / "a.tif").open("rb") as file:
        assert file.read(4)[2] == version


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """No file of this process can be larger: the error of GDAL is that of a full disk."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def test_a_full_disk_at_any_moment_leaves_nothing(tmp_path: Path) -> None:
    """In the middle, in the last row of tiles, at the end, in the smaller copies: some of these rasterio only logs."""
    labels = noise(800, 800)
    complete = write(tmp_path / "a.tif", labels).stat().st_size
    before = (tmp_path / "a.tif").read_bytes()
    base = labels.size  # noise is not compressed
    for size in (1000, base // 2, base - 5000, base + 2000, complete - 90_000, complete - 100):
        with at_most(size), pytest.raises(OSError) as raised:
            write(tmp_path / "a.tif", labels)
        assert str(raised.value.filename) == str(tmp_path / "a.tif")
        assert [each.name for each in tmp_path.iterdir()] == ["a.tif"]
        assert (tmp_path / "a.tif").read_bytes() == before, "an existing file stays"


def test_a_disk_without_space_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssaseg.cli.tiling import rasters

    monkeypatch.setattr(rasters, "FULL", 2**60)
    with at_most(1000), pytest.raises(OSError, match="No space left on device"):
        write(tmp_path / "a.tif", noise(300, 300))


# ---- polygons ----------------------------------------------------------------------------------------------------
def polygons_of(path: Path, labels: np.ndarray, place: Georeference) -> dict[str, Any]:
    with windows_library(), new_file(path, path.parent) as temporary:
        made = Polygons(temporary, NAMES, labels.shape, place)
        for top in range(0, len(labels), 37):
            made.add(labels[top : top + 37])
        made.finish()
    found = json.loads(path.read_text())
    assert found["type"] == "FeatureCollection"
    return found


def painted(features: list[dict[str, Any]], size: tuple[int, int], move: Any = None) -> np.ndarray:
    shapes = [(each["geometry"], each["properties"]["index"]) for each in features]
    with windows_library():
        return rasterize(shapes, size, fill=255, **({} if move is None else {"transform": move}), dtype="uint8")


@pytest.mark.parametrize("stripe", [2**24, 50 * 160, 7 * 160])
def test_polygons_cover_the_labels(stripe: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polygons, "STRIPE", stripe)
    labels = blocks(120, 160)
    found = polygons_of(tmp_path / "a.geojson", labels, Georeference())
    assert found["coordinates"] == PIXELS
    np.testing.assert_array_equal(painted(found["features"], labels.shape), labels)
    for feature in found["features"]:
        assert feature["properties"]["class"] == NAMES[feature["properties"]["index"]]
        heights = [y for ring in feature["geometry"]["coordinates"] for _, y in ring]
        assert max(heights) - min(heights) <= stripe // 160


def area(ring: list[list[float]]) -> float:
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring)) / 2


def test_polygons_lie_on_the_earth(tmp_path: Path) -> None:
    labels = blocks(64, 80)
    found = polygons_of(tmp_path / "a.geojson", labels, PLACE)
    assert "coordinates" not in found
    rings = [each["geometry"]["coordinates"] for each in found["features"]]
    assert all(area(ring) > 0 for ring, *_ in rings), "outer rings: counter-clockwise"
    assert all(area(hole) < 0 for _, *holes in rings for hole in holes)
    # Back to the coordinates of the image: the pixels are those of the labels.
    with windows_library():
        for each in found["features"]:
            for ring in each["geometry"]["coordinates"]:
                back = transform("EPSG:4326", "EPSG:32633", *zip(*ring, strict=True))
                ring[:] = [[float(x), float(y)] for x, y in zip(*back, strict=True)]
    np.testing.assert_array_equal(painted(found["features"], labels.shape, PLACE.transform), labels)
    longitude, latitude = rings[0][0][0]
    assert longitude == pytest.approx(500_000, abs=50)
    assert latitude == pytest.approx(5_000_000, abs=50)


def test_polygons_of_an_unknown_reference_system_say_so(tmp_path: Path) -> None:
    found = polygons_of(tmp_path / "a.geojson", blocks(64, 80), PLACE._replace(crs=None))
    assert found["coordinates"] == UNKNOWN
    assert found["features"][0]["geometry"]["coordinates"][0][0][0] >= 500_000


def test_no_polygons_at_all(tmp_path: Path) -> None:
    labels = np.full((20, 30), 255, np.uint8)
    assert polygons_of(tmp_path / "a.geojson", labels, Georeference())["features"] == []


def test_a_full_disk_leaves_no_polygons(tmp_path: Path) -> None:
    with at_most(2000), pytest.raises(OSError):
        polygons_of(tmp_path / "a.geojson", blocks(120, 160), Georeference())
    assert os.listdir(tmp_path) == []

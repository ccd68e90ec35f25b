"""`ssaseg predict --tile` as a user calls it."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from calling import call
from PIL import Image
from predicting import CLASSES, PALETTE, files, picture, save_checkpoint, write
from rasterio.transform import from_origin

from ssaseg.cli.results.kinds import KINDS
from ssaseg.cli.tiling import rasters
from ssaseg.cli.tiling.library import windows_library

pytestmark = pytest.mark.usefixtures("one_thread", "tiny")
PLACE: dict[str, Any] = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 0.5, 0.5)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny: None) -> Path:
    protocol = {"scale": [512, 256], "multiple": None}
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    contrast = {"std": [2.0, 2.0, 2.0]}  # for labels that are not the same everywhere
    return save_checkpoint(path, "ssa", protocol, "seaformer_y", contrast)


def geotiff(path: Path, **options: Any) -> Path:
    """600x400 pixels, of which the corner has no data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture(400, 600)
    image[:60, :90] = 0
    options = {
        "driver": "GTiff",
        "height": 400,
        "width": 600,
        "count": 3,
        "dtype": "uint8",
        "compress": "deflate",
    } | options
    with windows_library(), rasterio.open(path, "w", **PLACE, nodata=0, **options) as file:
        file.write(np.moveaxis(image[..., ::-1], 2, 0))
    return path


def read(path: Path) -> np.ndarray:
    with windows_library(), rasterio.open(path) as file:
        return np.squeeze(np.moveaxis(file.read(), 0, 2))


@pytest.fixture(scope="module")
def labelled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GeoTIFF and a PNG in `in`, and all results of tiles of 128 pixels in `out`."""
    place = tmp_path_factory.mktemp("labelled")
    geotiff(place / "in/deep/geo.tif")
    write(place / "in/b.png", picture(200, 300, 1))
    kinds = ",".join(kind for kind, each in KINDS.items() if each.tiled)
    words = ("predict", checkpoint, place / "in", "--out", place / "out", "--tile", "128", "--save", kinds)
    result = call(*words)
    assert result.exit_code == 0, result.stderr
    assert "at their own size, in place of the 512x256 that the checkpoint's protocol fits them into" in result.stderr
    assert "geo.tif: 600x400 pixels, 24 tiles of 128x128, overlap 32 pixels" in result.stderr
    assert "not resized; tiles of 128x128, overlap of a quarter, single scale, no flip" in result.stdout
    again = call(*words, "--skip-existing")
    assert "labelled 0 of 2 images" in again.stdout
    assert "2 were there already" in again.stdout
    return place


def test_results_agree_with_one_another(labelled: Path) -> None:
    out = labelled / "out"
    assert files(out) == sorted(
        [
            *(
                f"{kind}/{name}.tif"
                for kind in ("index", "color", "overlay", "confidence", "coarse")
                for name in ("deep/geo", "b")
            ),
            *("polygons/deep/geo.geojson", "polygons/b.geojson", "shares.json"),
        ]
    )
    labels = read(out / "index/deep/geo.tif")
    assert labels.shape == (400, 600)
    missing = labels == 255
    assert missing[:60, :90].all()
    assert not missing[100:].any()
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(PALETTE)] = PALETTE
    np.testing.assert_array_equal(read(out / "color/deep/geo.tif"), colours[labels])
    assert (read(out / "confidence/deep/geo.tif") == 0)[missing].all()
    assert (read(out / "coarse/deep/geo.tif") == 255)[missing].all()
    with windows_library(), rasterio.open(out / "index/deep/geo.tif") as file:
        assert (file.crs.to_epsg(), file.transform, file.nodata) == (32633, PLACE["transform"], 255)
        assert file.overviews(1) == [2]
    row = next(each for each in csv.DictReader((out / "shares.csv").open()) if each["image"] == "deep/geo.tif")
    counts = np.bincount(labels[~missing], minlength=len(CLASSES)) / (~missing).sum()
    np.testing.assert_allclose([float(row[name]) for name in CLASSES], counts, atol=1e-6)
    found = json.loads((out / "polygons/deep/geo.geojson").read_text())["features"]
    assert {each["properties"]["index"] for each in found} == set(np.unique(labels[~missing]).tolist())
    longitude, latitude = found[0]["geometry"]["coordinates"][0][0]
    assert 15 <= longitude < 15.01
    assert 45.1 < latitude < 45.2


def test_another_tiling_is_another_result(labelled: Path, checkpoint: Path) -> None:
    words = ("predict", checkpoint, labelled / "in/b.png", "--out", labelled / "out", "--skip-existing")
    result = call(*words, "--tile", "160", "--save", "index")
    assert "labelled 1 of 1 images" in result.stdout
    assert "existing results of 1 images are made again" in result.stderr


def test_images_of_one_tile_are_labelled_as_without_tiles(labelled: Path, checkpoint: Path, tmp_path: Path) -> None:
    words = ("predict", checkpoint, labelled / "in/b.png", "--out", tmp_path, "--save", "index,confidence")
    assert call(*words, "--size", "own").exit_code == 0
    for tile in ("320", "auto"):
        assert call(*words, "--tile", tile).exit_code == 0
        for kind in ("index", "confidence"):
            expected = np.array(Image.open(tmp_path / f"{kind}/b.png"))
            np.testing.assert_array_equal(read(tmp_path / f"{kind}/b.tif"), expected)
    assert all(len(np.unique(read(tmp_path / f"{kind}/b.tif"))) > 1 for kind in ("index", "confidence"))


def test_tiles_have_no_limit_of_pixels(labelled: Path, checkpoint: Path, tmp_path: Path) -> None:
    words = ("predict", checkpoint, labelled / "in/b.png", "--out", tmp_path, "--max-pixels", "100")
    assert call(*words).exit_code == 1
    assert call(*words, "--tile", "128x96", "--overlap", "40", "--blend").exit_code == 0
    assert read(tmp_path / "index/b.tif").shape == (200, 300)


def test_bad_images_are_skipped_and_leave_nothing(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    geotiff(folder / "good.tif")
    data = bytearray(geotiff(folder / "torn.tif", compress="deflate", blockysize=16).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 300] = b"\x55" * 300
    (folder / "torn.tif").write_bytes(data)
    write(folder / "flat.png", picture(10, 1000))
    (folder / "text.jpg").write_text("no image")
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssaseg.cli.tiling.reading.WHOLE", 0)
        result = call("predict", checkpoint, folder, "--out", out, "--tile", "128", "--save", "index,polygons,shares")
    assert result.exit_code == 1
    assert "labelled 1 of 4 images" in result.stdout
    assert "flat.png: too small: got 128x10 pixels as the network's input, expected 32x32 or more" in result.stderr
    assert "torn.tif: damaged image: rows " in result.stderr
    assert "text.jpg: " in result.stderr
    assert files(out) == ["index/good.tif", "polygons/good.geojson", "shares.json"]
    assert not [*out.rglob("*.partial")]


def test_a_full_disk_ends_the_command(
    labelled: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: rasters.Raster, count: int) -> None:
        raise OSError(28, "No space left on device", str(self.path))

    monkeypatch.setattr(rasters.Raster, "_write", full)
    result = call(
        "predict", checkpoint, labelled / "in", "--out", tmp_path, "--tile", "128", "--save", "index,polygons"
    )
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert lines == [f"error: {tmp_path}/index/b.tif: No space left on device"]
    assert "free some space on that disk" in result.stderr
    assert files(tmp_path) == []
    assert not [*tmp_path.rglob("*.partial")]


def test_a_request_to_stop_leaves_the_image_in_work(
    labelled: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    from ssaseg.cli.tiling import labelling

    def hidden(*given: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return given[0]

    monkeypatch.setattr(labelling, "hidden", hidden)  # called for the image with a value of no data: the second
    result = call("predict", checkpoint, labelled / "in", "--out", tmp_path, "--tile", "128")
    assert result.exit_code == 130
    assert "stopped: 1 of 2 images are done" in result.stderr
    assert files(tmp_path) == ["index/b.tif"]
    assert not [*tmp_path.rglob("*.partial")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tile 16", "'16' is not auto, a number of pixels from 32 to 16384, or two as in 1024x768"),
        ("--tile 512x", "'512x' is not auto"),
        ("--tile 512x512x3", "'512x512x3' is not auto"),
        ("--tile 128 --overlap 128", "--overlap 128 is not smaller than the tiles of --tile 128x128"),
        ("--overlap 32", "--overlap is an option of --tile: add --tile auto"),
        ("--blend", "--blend is an option of --tile"),
        ("--tile auto --slide 512 341", "leave out --slide and --whole"),
        ("--tile auto --size 512", "leave out --scale and --size"),
        ("--tile auto --blend --flip", "--blend averages tiles of one view"),
        ("--tile auto --save probs,index,rle", "--save probs,rle: cannot be made row by row"),
        ("--tile 128 --blend --save coarse", "--blend averages the final logits only"),
        ("--save polygons", "--save polygons: made with tiles only\nadd --tile auto"),
        ("--tile 64 --ratios 0.25", "--tile 64x64 at scale 0.25: the network takes 32x32 pixels or more"),
    ],
)
def test_options_that_do_not_fit(words: str, message: str, labelled: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = call("predict", checkpoint, labelled / "in", "--out", tmp_path / "out", *words.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert files(tmp_path) == []


def test_without_the_extra(labelled: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    result = call("predict", checkpoint, labelled / "in", "--out", tmp_path / "out", "--tile", "auto")
    assert result.exit_code == 2
    assert "--tile: needs rasterio, not installed\npip install rasterio" in result.stderr
    assert not (tmp_path / "out").exists()


def test_only_some_classes_of_a_large_image(checkpoint: Path, labelled: Path, tmp_path: Path) -> None:
    words = ("predict", checkpoint, labelled / "in/b.png", "--tile", "128")
    assert call(*words, "--out", tmp_path / "all").exit_code == 0
    whole = read(tmp_path / "all/index/b.tif")
    kept = int(np.bincount(whole.reshape(-1), minlength=len(CLASSES))[: len(CLASSES)].argmax())
    made = call(*words, "--out", tmp_path, "--only", CLASSES[kept], "--save", "index,shares")
    assert made.exit_code == 0, made.stderr
    assert np.array_equal(read(tmp_path / "index/b.tif"), np.where(whole == kept, whole, 255))
    shares = json.loads((tmp_path / "shares.json").read_text())[0]["shares"]
    assert shares[CLASSES[kept]] == pytest.approx(float((whole == kept).mean()), abs=1e-6)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)


def test_a_condition_on_shares_needs_the_whole_image(checkpoint: Path, labelled: Path, tmp_path: Path) -> None:
    words = (labelled / "in/b.png", "--out", tmp_path / "out", "--tile", "128", "--where", f"{CLASSES[0]}>0")
    result = call("predict", checkpoint, *words)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 2)
    assert "--where: not known before all tiles of an image are written" in result.stderr
    assert not (tmp_path / "out").exists()

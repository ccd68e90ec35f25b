"""Images of other than three channels: how their files are read, changed in training, and refused."""

import io
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiffs import tiff

from ssaseg.datasets.bands.reading import count_bands, measure, read_bands, shown
from ssaseg.datasets.base import DataError
from ssaseg.datasets.colour import distort, from_planes, normalize, to_planes
from ssaseg.datasets.inspection import look_at_image
from ssaseg.datasets.pairs import PairDataset
from ssaseg.datasets.transforms import DRAWS, TrainTransform, resize, test_image

SIZE = (20, 24)


def pixels(bands: int, kind: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(bands).integers(0, np.iinfo(kind).max, (*SIZE, bands), kind, endpoint=True)


def put(path: Path, content: bytes | np.ndarray) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.fromarray(content).save(path)
    return path


def in_memory(bands: np.ndarray) -> np.ndarray:
    """Bands in the order of a file → in the order of images in memory."""
    return np.concatenate([bands[..., 2::-1], bands[..., 3:]], axis=2) if bands.shape[2] > 2 else bands


TIFFS = {
    "RGB and alpha that is not a factor": {"t262": 2, "t338": [2]},
    "RGB and alpha as a factor": {"t262": 2, "t338": [1]},
    "RGB and a band": {"t262": 2, "t338": [0]},
    "four bands": {},
    "one band after the other": {"planar": True},
    "compressed": {"deflate": True},
}


@pytest.mark.parametrize("name", TIFFS)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_four_bands_of_a_tiff_are_its_numbers(name: str, kind: type, tmp_path: Path) -> None:
    """Also where OpenCV and Pillow read colours multiplied with alpha, or the first band alone."""
    bands = pixels(4, kind)
    file = put(tmp_path / "a.tif", tiff(bands, **TIFFS[name]))
    expected = bands if kind is np.uint8 else (bands >> 8).astype(np.uint8)
    assert count_bands(file) == 4
    found = read_bands(file, 4)
    assert found.flags.c_contiguous
    assert np.array_equal(found, in_memory(expected))


@pytest.mark.parametrize("bands", [2, 5, 16])
def test_bands_in_one_page_or_a_page_each(bands: int, tmp_path: Path) -> None:
    values = pixels(bands)
    for content in (tiff(values), tiff(values, planar=True), tiff(*np.moveaxis(values, 2, 0))):
        assert np.array_equal(read_bands(put(tmp_path / "a.tif", content), bands), in_memory(values))
    assert count_bands(tiff(values)) == bands


def test_a_stack_as_tifffile_writes_it(tmp_path: Path) -> None:
    """Without options it makes pages of an array (H,W,5), whose shape stands in a description."""
    tifffile = pytest.importorskip("tifffile")
    values = pixels(5)
    for array in (values, np.moveaxis(values, 2, 0)):
        stream = io.BytesIO()
        tifffile.imwrite(stream, array)
        assert np.array_equal(read_bands(put(tmp_path / "a.tif", stream.getvalue()), 5), in_memory(values))


def test_alpha_of_a_png_is_the_last_band(tmp_path: Path) -> None:
    for bands in (2, 4):
        values = pixels(bands)
        file = put(tmp_path / f"{bands}.png", values)
        assert count_bands(file) == bands
        assert np.array_equal(read_bands(file, bands), in_memory(values))


def test_one_channel_is_grey_however_it_is_stored(tmp_path: Path) -> None:
    grey = pixels(1)
    deep = np.random.default_rng(0).integers(0, 2**16, SIZE, np.uint16)
    cases = {
        "grey": (grey[..., 0], grey),
        "colours": (grey.repeat(3, axis=2), grey),
        "alpha": (np.concatenate([grey, grey // 2], axis=2), grey),
        "deep": (deep, (deep >> 8).astype(np.uint8)[..., None]),
    }
    for name, (stored, expected) in cases.items():
        found = read_bands(put(tmp_path / f"{name}.png", stored), 1)
        assert np.array_equal(found, expected), name


def test_three_channels_are_read_as_ever(tmp_path: Path) -> None:
    file = put(tmp_path / "a.png", pixels(3))
    assert np.array_equal(read_bands(file), cv2.imread(str(file)))


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize(
    ("stored", "suffix", "channels", "text"),
    [
        (pixels(3), "png", 4, "an image of 3 bands\nexpected 4, as data.channels of the recipe\n"),
        (pixels(3), "png", 1, "an image of 3 bands\nexpected 1,"),
        (pixels(4), "png", 5, "an image of 4 bands\nexpected 5,"),
        (pixels(1)[..., 0], "png", 4, "a grey image, of one band\nexpected 4,"),
        (tiff(pixels(3), t262=2), "tif", 4, "an image of 3 bands\nexpected 4,"),
        (tiff(pixels(4)), "tif", 5, "an image of 4 bands\nexpected 5,"),
        (tiff(pixels(4).astype(np.float32)), "tif", 4, "its bands hold float32 values\nexpected whole numbers"),
        (tiff(pixels(4).astype(np.uint32)), "tif", 4, "its bands hold uint32 values\nexpected whole numbers"),
        (tiff(*np.moveaxis(pixels(5), 2, 0)), "tif", 4, "an image of 5 bands\nexpected 4,"),
        (tiff(pixels(4))[:-30], "tif", 4, "cannot be read: "),
        (tiff(pixels(4), deflate=True).replace(b"x\x9c", b"y\x9c"), "tif", 4, "cannot be read: "),
        (b"GIF", "tif", 4, "not an image of a known type"),
    ],
)
def test_what_does_not_fit_is_refused_by_what_it_is(
    stored: bytes | np.ndarray, suffix: str, channels: int, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = put(tmp_path / f"a.{suffix}", stored)
    with pytest.raises(DataError) as error:
        read_bands(file, channels)
    assert text in str(error.value)
    assert str(file) in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
    assert capfd.readouterr() == ("", "")


def test_a_huge_size_in_a_header_takes_no_memory(tmp_path: Path) -> None:
    file = put(tmp_path / "a.tif", tiff(pixels(4)))
    with pytest.raises(DataError, match="expected at most 100 pixels"):
        read_bands(file, 4, max_pixels=100)
    for side in (2**24, 2**30):
        content = tiff(pixels(5)).replace((20).to_bytes(4, "little"), side.to_bytes(4, "little"))
        with pytest.raises(DataError, match=r"at most 268,435,456 pixels|more than 161,061,273 pixels of 5"):
            read_bands(put(file, content), 5)


def test_range_of_16_bits(tmp_path: Path) -> None:
    values = np.zeros((*SIZE, 4), np.int16)
    values[0, :6, 3] = [-300, 100, 200, 1100, 2100, 9000]
    file = put(tmp_path / "a.tif", tiff(values))
    assert read_bands(file, 4)[0, :6, 3].tolist() == [0, 0, 0, 4, 8, 35]
    assert read_bands(file, 4, levels=(100, 2100))[0, :6, 3].tolist() == [0, 0, 13, 128, 255, 255]
    assert read_bands(put(file, tiff(pixels(4))), 4, levels=(100, 200)).max() == pixels(4).max(), "8 bits stay"


def test_without_tifffile_the_fix_is_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "a.tif", tiff(pixels(5)))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match="pip install tifffile"):
        read_bands(file, 5)
    assert count_bands(file) == 5, "the header is read without it"


def test_without_imagecodecs_the_fix_is_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr("tifffile.TiffFile", fails)
    with pytest.raises(DataError, match=r"LZW(.|\n)*\npip install imagecodecs$"):
        read_bands(put(tmp_path / "a.tif", tiff(pixels(5))), 5)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_what_headers_say(tmp_path: Path) -> None:
    palette = Image.fromarray(pixels(1)[..., 0]).convert("P")
    palette.save(tmp_path / "p.png")
    cmyk = Image.fromarray(pixels(3)).convert("CMYK")
    cmyk.save(tmp_path / "c.jpg")
    assert [count_bands(tmp_path / name) for name in ("p.png", "c.jpg", "missing.png")] == [3, 3, None]
    assert count_bands(tiff(pixels(7))[:20]) is None
    assert count_bands(put(tmp_path / "6.tif", tiff(pixels(6)))) == 6


def test_pictures_show_the_first_bands() -> None:
    five = pixels(5)
    assert np.array_equal(shown(five), five[..., :3])
    assert np.array_equal(shown(pixels(2)), pixels(2)[..., :1].repeat(3, axis=2))
    three = pixels(3)
    assert shown(three) is three


def test_mean_and_spread_of_the_bands(tmp_path: Path) -> None:
    values = np.concatenate([np.full((*SIZE, 1), level, np.uint8) for level in (10, 20, 30, 40)], axis=2)
    values[::2, :, 3] = 60
    files = [put(tmp_path / "a.png", values), tmp_path / "missing.png"]
    mean, spread = measure(files, 4)
    assert mean[:3] == [10, 20, 30]
    assert spread[:3] == [1, 1, 1]
    assert mean[3] == pytest.approx(50, abs=1)
    assert spread[3] == pytest.approx(10, abs=0.1)
    with pytest.raises(DataError):
        measure(files[:1], 5)


# ---- what the check knows ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "channels"), [(pixels(5), 5), (pixels(1), 1), (pixels(2), 2)], ids=["five", "grey", "two"]
)
def test_the_largest_value_of_16_bits_is_known_for_any_channels(
    values: np.ndarray, channels: int, tmp_path: Path
) -> None:
    deep = (values.astype(np.uint16) << 4) + 9
    file = tmp_path / "a.tif"
    file.write_bytes(tiff(deep))
    look = look_at_image(file, False, channels)
    assert look.size == values.shape[:2]
    assert look.top is not None
    assert look.top[0] == deep.max()
    file.write_bytes(tiff(values))
    assert look_at_image(file, False, channels).top is None


def test_a_page_for_each_band_is_no_page_left_out(tmp_path: Path) -> None:
    file = tmp_path / "a.tif"
    file.write_bytes(tiff(*np.moveaxis(pixels(5), 2, 0)))
    facts = look_at_image(file, False, 5).facts
    assert facts is not None
    assert not facts.paged
    assert facts.bands == 3


# ---- what happens to the pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 5, 16])
def test_each_channel_is_resized_cropped_and_flipped_by_itself(channels: int) -> None:
    image, label = pixels(channels), np.random.default_rng(0).integers(0, 3, SIZE, np.uint8)
    ids = np.arange(256, dtype=np.uint8)
    transform = TrainTransform((48, 40), crop=(32, 36), flip=0.5, channels=channels)
    for seed in range(4):
        found = transform(image, label, np.random.RandomState(seed), ids)
        assert found.image.shape == (32, 36, channels)
        for channel in range(channels):
            alone = np.ascontiguousarray(image[..., channel : channel + 1])
            one = TrainTransform((48, 40), crop=(32, 36), flip=0.5, channels=1)(
                alone, label, np.random.RandomState(seed), ids
            )
            assert np.array_equal(one.image[..., 0], found.image[..., channel])
            assert np.array_equal(one.label, found.label)
    assert test_image(image, (60, 60), 32).shape == (64, 64, channels)
    assert resize(image, SIZE[::-1]).shape == image.shape


def test_the_first_three_planes_are_red_green_and_blue() -> None:
    for channels, order in ((1, [0]), (2, [0, 1]), (4, [2, 1, 0, 3]), (6, [2, 1, 0, 3, 4, 5])):
        image = pixels(channels)
        planes = to_planes(torch.from_numpy(image)[None])
        assert np.array_equal(planes[0].permute(1, 2, 0).numpy(), image[..., order])
        assert np.array_equal(from_planes(planes[0].byte()), image)
        means = [float(k) for k in range(channels)]
        normal = normalize(torch.from_numpy(image)[None], means, [2.0] * channels)
        assert torch.equal(normal[0, -1], (planes[0, -1] - (channels - 1)) / 2)


def test_distortion_changes_colours_and_nothing_else() -> None:
    draws = torch.tensor([[10.0, 1.2, 0.7, 5.0, torch.nan]])
    planes = to_planes(torch.from_numpy(pixels(5))[None])
    colours, others = planes[:, :3].clone(), planes[:, 3:].clone()
    distort(planes, draws)
    distort(colours, draws)
    assert torch.equal(planes[:, :3], colours)
    assert torch.equal(planes[:, 3:], others)
    # Grey has no hue: it becomes brighter, and gets more contrast.
    kept = draws.clone()
    for grey in (to_planes(torch.from_numpy(pixels(channels))[None]) for channels in (1, 2)):
        expected = ((grey + 10).clamp(0, 255).floor() * torch.tensor(1.2)).clamp(0, 255).floor()
        distort(grey, draws)
        assert torch.equal(grey, expected)
    assert torch.equal(draws.nan_to_num(), kept.nan_to_num()), "the caller's draws stay"
    none = torch.full((1, DRAWS), torch.nan)
    same = others.clone()
    distort(same[:, :1], none)
    assert torch.equal(same, others)


def test_pairs_of_images_with_four_bands(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    put(tmp_path / "images/a.tif", tiff(pixels(4)))
    put(tmp_path / "images/b.png", pixels(3))
    for name in "ab":
        put(tmp_path / f"masks/{name}.png", np.zeros(SIZE, np.uint8))
    pairs = PairDataset(tmp_path / "images", tmp_path / "masks", ["x", "y"], channels=4)
    image, label = pairs.load(0)
    assert image.shape == (*SIZE, 4)
    assert label.shape == SIZE
    facts = [pairs.inspect(index, decode=False) for index in range(2)]
    assert facts[0].problems == []
    assert facts[0].size == SIZE
    assert "an image of 3 bands\nexpected 4" in facts[1].problems[0].text

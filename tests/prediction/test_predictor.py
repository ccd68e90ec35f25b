"""`from ssaseg import Predictor`: the labels of `ssaseg predict`, of any image, from any thread; the page on Python."""

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calling import call
from networks import tiny_networks
from PIL import Image
from places import PROJECT
from predicting import CLASSES, PALETTE, picture, write

import ssaseg
from ssaseg import Predictor, load_model
from ssaseg.models import build_model, save_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def networks() -> Iterator[None]:
    with tiny_networks():
        yield


def save(path: Path, channels: int = 3, **header: Any) -> Path:
    """A checkpoint of random weights whose labels have several classes."""
    torch.manual_seed(0)
    model = build_model("seaformer_y", len(CLASSES), "linear", channels=channels)
    torch.nn.init.normal_(model.classifier.conv_seg.weight, 0.0, 2.0)
    statistics = {"mean": [120.0] * channels, "std": [60.0] * channels}
    save_model(path, model, {"classes": CLASSES, "palette": PALETTE, **statistics, **header})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("predictor") / "best.safetensors")


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return Predictor(checkpoint, "cpu")


def rgb(seed: int = 0) -> np.ndarray:
    return picture(seed=seed)[..., ::-1]


# ---- the package -------------------------------------------------------------------------------------------------
def test_the_package_has_its_names() -> None:
    assert ssaseg.__version__ == version("ssaseg")
    assert set(ssaseg.__all__) <= set(dir(ssaseg))
    assert load_model is ssaseg.models.load_model
    with pytest.raises(AttributeError, match="no attribute 'Predicter'"):
        _ = ssaseg.Predicter  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["1000", str(2**28)]),
        ({"GOMP_SPINCOUNT": "5", "OPENCV_IO_MAX_IMAGE_PIXELS": "9"}, ["5", "9"]),
        ({"OMP_WAIT_POLICY": "active"}, ["None", str(2**28)]),
    ],
)
def test_importing_sets_what_the_user_has_not(given: dict[str, str], expected: list[str]) -> None:
    names = ("GOMP_SPINCOUNT", "OPENCV_IO_MAX_IMAGE_PIXELS")
    code = f"import os, ssaseg; print(*[os.environ.get(name) for name in {names}])"
    env = {key: value for key, value in os.environ.items() if key not in names} | given
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).split() == expected


# ---- labels ------------------------------------------------------------------------------------------------------
def test_labels_are_those_of_the_command(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "plain.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rgb(1)).save(folder / "turned.jpg", exif=turned)
    Image.fromarray(rgb(2)).convert("L").save(folder / "grey.png")
    Image.fromarray(rgb(3)).convert("RGBA").save(folder / "alpha.png")
    assert call("predict", checkpoint, folder, "--out", tmp_path / "out", "--exact", "--device", "cpu").exit_code == 0
    exact = Predictor(checkpoint, "cpu", exact=True)
    files = sorted(folder.iterdir())
    stored = {file.name: np.array(Image.open(tmp_path / "out/index" / f"{file.stem}.png")) for file in files}
    assert stored["turned.jpg"].shape == (56, 40)
    assert all(len(np.unique(labels)) > 1 for labels in stored.values())
    for file, labels in zip(files, exact(files), strict=True):
        assert labels.dtype == np.uint8
        assert np.array_equal(labels, stored[file.name]), file


def test_the_protocol_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    protocol = {"scale": [112, 80], "multiple": None, "ratios": [0.75, 1.0], "flip": True}
    path = save(tmp_path / "x.safetensors", protocol=protocol)
    image = write(tmp_path / "in/a.png")
    assert call("predict", path, image, "--out", tmp_path / "out", "--exact", "--device", "cpu").exit_code == 0
    predictor = Predictor(path, "cpu", exact=True)
    assert np.array_equal(predictor(image), np.array(Image.open(tmp_path / "out/index/a.png")))
    assert {key: predictor.protocol[key] for key in protocol} == protocol
    assert "mean of probabilities" in repr(predictor)


def test_what_it_knows(predictor: Predictor, tmp_path: Path) -> None:
    assert predictor.classes == tuple(CLASSES)
    assert predictor.palette.tolist() == PALETTE
    assert predictor.palette[predictor(rgb())].shape == (40, 56, 3)
    assert "5 classes, torch, folded, float32 on cpu" in repr(predictor)
    bare = Predictor(save(tmp_path / "x.safetensors", palette=None), "cpu")
    assert bare.palette.shape == (5, 3)


def test_equal_images_have_equal_labels_in_any_form(predictor: Predictor, tmp_path: Path) -> None:
    image = rgb()
    labels = predictor(str(write(tmp_path / "a.png")))
    grey = image[..., 0]
    same: list[Any] = [
        tmp_path / "a.png",
        image,
        np.asfortranarray(image),
        np.dstack([image, image[..., :1]]),
        Image.fromarray(image),
        Image.fromarray(np.dstack([image, image[..., :1]]), "RGBA"),
    ]
    assert all(np.array_equal(predictor(each), labels) for each in same)
    assert all(np.array_equal(found, labels) for found in predictor(tuple(same)))
    labels = predictor(np.dstack([grey] * 3))
    palette = Image.fromarray(grey)
    palette.putpalette(np.arange(256, dtype=np.uint8).repeat(3).tobytes())
    greys: list[Any] = [grey, grey[..., None], Image.fromarray(grey), palette, Image.fromarray(grey).convert("LA")]
    assert all(np.array_equal(predictor(each), labels) for each in greys)
    frozen = image.copy()
    frozen.flags.writeable = False
    before = frozen.copy()
    assert np.array_equal(predictor(frozen), predictor(image))
    assert np.array_equal(frozen, before)


def test_a_picture_with_exif_stays_as_it_lies(predictor: Predictor, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb()).save(tmp_path / "a.jpg", exif=exif)
    assert predictor(tmp_path / "a.jpg").shape == (56, 40)
    assert predictor(Image.open(tmp_path / "a.jpg")).shape == (40, 56)


def test_other_channels(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 4), np.uint8)
    Image.fromarray(image, "RGBA").save(tmp_path / "a.png")
    four, one = (Predictor(save(tmp_path / f"{each}.safetensors", each), "cpu") for each in (4, 1))
    labels = four(tmp_path / "a.png")
    assert len(np.unique(labels)) > 1
    assert np.array_equal(four(image), labels)
    assert np.array_equal(four(Image.fromarray(image, "RGBA")), labels)
    grey = image[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    labels = one(tmp_path / "grey.png")
    drawn = Image.fromarray(grey)
    for each in (grey, grey[..., None], np.dstack([grey] * 3), drawn, drawn.convert("RGB")):
        assert np.array_equal(one(each), labels)
    for network, wrong in ((four, image[..., :3]), (four, drawn), (one, image), (one, image[..., :3])):
        with pytest.raises(ValueError, match="image: an array of shape"):
            network(wrong)


def test_sixteen_bits_by_the_levels_of_training(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (32, 40), np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    network = Predictor(save(tmp_path / "x.safetensors", 1, range=[0, 4095]), "cpu")
    labels = network(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        for each in (values, values.astype(">u2"), values.astype(np.int16), opened, opened.convert("I")):
            assert np.array_equal(network(each), labels)


# ---- many images -------------------------------------------------------------------------------------------------
def test_eight_threads_get_equal_labels(predictor: Predictor) -> None:
    images = [rgb(seed) for seed in range(8)]
    expected = [predictor(image) for image in images]
    assert not np.array_equal(expected[0], expected[1])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(predictor, images * 3))
    assert all(map(np.array_equal, found, expected * 3))


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_a_stream_keeps_the_order_and_takes_few(predictor: Predictor, threads: int | None) -> None:
    taken: list[int] = []

    def frames() -> Iterator[np.ndarray]:
        for seed in range(12):
            taken.append(seed)
            yield rgb(seed)

    ahead = []
    for seed, labels in enumerate(predictor.stream(frames(), threads=threads)):
        assert np.array_equal(labels, predictor(rgb(seed)))
        ahead.append(len(taken) - seed - 1)
    assert len(ahead) == 12
    assert max(ahead) <= (8 if threads is None else threads - (threads == 1))
    assert list(predictor.stream([])) == []


def test_an_error_comes_in_its_turn(predictor: Predictor, tmp_path: Path) -> None:
    stream = predictor.stream([rgb(), rgb(1), rgb() / 255, rgb()], threads=2)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(ValueError, match="image 2: an array of float64"):
        next(stream)
    for wrong in (rgb(), "a.png", Path("a.png"), Image.fromarray(rgb())):
        with pytest.raises(TypeError, match="expected several images"):
            predictor.stream(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads is 0"):
        predictor.stream([], threads=0)
    assert len(list(predictor.stream(np.stack([rgb(), rgb(1)])))) == 2


# ---- errors ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("image", "kind", "parts"),
    [
        ("gone.png", FileNotFoundError, ["gone.png"]),
        (Path(__file__).parent, OSError, [Path(__file__).parent.name]),
        (__file__, ValueError, ["not an image of a known type"]),
        (np.zeros((40, 40, 3), np.float32), ValueError, ["float32", "255 * image"]),
        (np.zeros((40, 40, 3), bool), ValueError, ["bool", "astype"]),
        (np.zeros((40, 40, 3), np.int64), ValueError, ["int64", "astype"]),
        (np.zeros((40, 40, 3), object), ValueError, ["object"]),
        (np.zeros((40, 40), np.uint16), ValueError, ["uint16", "data.range"]),
        (Image.new("I;16", (40, 40)), ValueError, ["uint16", "data.range"]),
        (Image.new("I", (40, 40), 2**20), ValueError, ["int32"]),
        (Image.new("F", (40, 40)), ValueError, ["float32"]),
        (np.zeros((3, 40, 50), np.uint8), ValueError, ["(3, 40, 50)", "transpose(1, 2, 0)"]),
        (np.zeros((40, 40, 2), np.uint8), ValueError, ["(40, 40, 2)", "1, 3 or 4 bands"]),
        (np.zeros((2, 40, 40, 3), np.uint8), ValueError, ["(2, 40, 40, 3)", "list"]),
        (np.zeros((40,), np.uint8), ValueError, ["(40,)"]),
        (np.zeros((0, 40, 3), np.uint8), ValueError, ["(0, 40, 3)"]),
        (np.zeros((), np.uint8), ValueError, ["()"]),
        (np.zeros((8, 8, 3), np.uint8), ValueError, ["too small", "32x32"]),
        (Image.new("RGB", (0, 40)), ValueError, ["shape"]),
        (Image.new("I", (0, 40)), ValueError, ["shape"]),
        (torch.zeros(40, 40, 3), TypeError, ["torch.Tensor", "NumPy array"]),
        (b"\x89PNG", TypeError, ["a bytes"]),
        (None, TypeError, ["NoneType"]),
        (7, TypeError, ["a int"]),
    ],
)
def test_what_is_no_image_is_an_exception(
    predictor: Predictor, image: Any, kind: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        predictor(image)
    assert all(part in str(caught.value) for part in parts), caught.value
    with pytest.raises(kind):
        list(predictor.stream(iter([image, image])))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"precision": "int4"}, "precision is 'int4'"),
        ({"device": "cpu", "precision": "fp16"}, "fp16"),
    ],
)
def test_arguments_that_do_not_fit(checkpoint: Path, given: dict[str, str], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        Predictor(checkpoint, **given)  # type: ignore[arg-type]


def test_files_that_hold_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        Predictor(tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: a folder without config.json")):
        Predictor(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        Predictor(tmp_path / "x.safetensors")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda"):
        Predictor(checkpoint, "cuda")


# ---- the page ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", ["docs/python.md", "README.md"])
def test_the_code_of_a_page_runs(page: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (PROJECT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    (tmp_path / "best.safetensors").symlink_to(checkpoint)
    for name in ("photo.jpg", "photos/a.jpg", "photos/b.jpg"):
        write(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile("\n".join(blocks), page, "exec"), {})
    assert Image.open("colours.png").size == (56, 40)
    if page == "docs/python.md":
        assert any(name in out.getvalue() for name in CLASSES)
        assert "expected uint8" in out.getvalue()
        assert Image.open("photos/b.png").size == (56, 40)

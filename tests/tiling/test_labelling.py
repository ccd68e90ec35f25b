"""Labels of tiles against those of the whole image, and blended ones against sliding windows."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from predicting import picture
from torch import Tensor
from torch.nn import functional as F

from ssaseg.cli.scoring.engines import Logits
from ssaseg.cli.scoring.inference import Inference, Prediction
from ssaseg.cli.tiling.labelling import Stopped, Wanted, label_strips
from ssaseg.cli.tiling.library import windows_library
from ssaseg.cli.tiling.planning import Tiling
from ssaseg.cli.tiling.reading import open_large
from ssaseg.datasets import DataError
from ssaseg.recipes import parse_protocol

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, HEIGHT = 608, 416
NAMES = [f"class {index}" for index in range(7)]


class Local:
    """Logits of a pixel are made of the pixels up to 48 away: means of 32x32 blocks, and of 3x3 of these."""

    what, device, channels, num_classes = "local", torch.device("cpu"), 3, len(NAMES)
    has_coarse, gives_scores, takes = False, False, "normalized"

    def __init__(self, whole: bool = False) -> None:
        self.weight = torch.randn(len(NAMES), 3, 3, 3, generator=torch.Generator().manual_seed(0))
        self.whole = whole  # adds what is global: the mean of the image

    def logits(self, pixels: Tensor, coarse: bool = False) -> Logits:
        maps = F.conv2d(F.avg_pool2d(pixels, 8), self.weight, padding=1)
        return Logits(maps - maps.mean((2, 3), keepdim=True) * self.whole, None)


def inference(engine: Any, **protocol: Any) -> Inference:
    return Inference(engine, parse_protocol(protocol, "test"), (120, 120, 120), (60, 60, 60))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "a.png"
    small = np.random.default_rng(0).integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(small, (WIDTH, HEIGHT)))
    return path


def whole_image(file: Path, made: Inference) -> Prediction:
    image = cv2.imread(str(file))
    inputs = [torch.from_numpy(each) for each in made.inputs(image, "a")]
    return made.predict_batch([inputs], [image.shape[:2]], ["a"], False, False, True)[0]


def in_tiles(file: Path, made: Inference, tiling: Tiling, whole: int | None = None) -> Prediction:
    with windows_library(), open_large(file, 3, whole=whole) as image:
        strips = [*label_strips(image, made, tiling, Wanted(False, True), lambda _: nullcontext(), lambda _: None)]
    assert [strip.top for strip in strips[1:]] == np.cumsum([len(each.image) for each in strips]).tolist()[:-1]
    np.testing.assert_array_equal(np.concatenate([strip.image for strip in strips]), cv2.imread(str(file)))
    labels, sure = (np.concatenate([getattr(s.prediction, f) for s in strips]) for f in ("labels", "confidence"))
    return Prediction(labels, None, None, sure)


@pytest.mark.parametrize("tile", [(128, 128), (192, 96), (1000, 160)])
@pytest.mark.parametrize("whole", [None, 0])  # decoded at once, and by rows
def test_no_seam_where_the_network_is_local(file: Path, tile: tuple[int, int], whole: int | None) -> None:
    made = inference(Local())
    expected = whole_image(file, made)
    assert len(np.unique(expected.labels)) == len(NAMES)
    found = in_tiles(file, made, Tiling(tile[1], tile[0], 64), whole)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-5)


def test_seams_without_margin_and_with_what_is_global(file: Path) -> None:
    """The test above can fail; and what a network takes from the whole image is no margin's business."""
    for engine, overlap in ((Local(), 0), (Local(whole=True), 64)):
        made = inference(engine)
        differ = in_tiles(file, made, Tiling(128, 128, overlap)).labels != whole_image(file, made).labels
        assert 0.001 < differ.mean() < 0.5


@pytest.mark.parametrize(("tile", "overlap"), [((128, 128), 43), ((224, 96), 50), ((1000, 1000), 8)])
def test_blended_tiles_are_equal_to_sliding_windows(file: Path, tile: tuple[int, int], overlap: int) -> None:
    crop = [tile[1], tile[0]]
    windows = inference(Local(True), mode="slide", crop=crop, stride=[side - overlap for side in crop])
    expected = whole_image(file, windows)
    found = in_tiles(file, inference(Local(True)), Tiling(tile[1], tile[0], overlap, blend=True), 0)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-6)


def test_several_views_of_each_tile(file: Path) -> None:
    made = inference(Local(), ratios=[1.0, 2.0], flip=True)
    found = in_tiles(file, made, Tiling(192, 192, 96))
    # Scaled tiles are interpolated to their own edges: not bit for bit.
    assert (found.labels != whole_image(file, made).labels).mean() < 0.001


def test_a_request_to_stop_ends_an_image_at_the_next_tile(file: Path) -> None:
    seen: list[int] = []

    def advance(count: int) -> None:
        seen.append(count)
        if len(seen) == 3:
            raise Stopped

    with windows_library(), open_large(file, 3) as image:
        strips = label_strips(
            image, inference(Local()), Tiling(128, 128, 64), Wanted(False, False), lambda _: nullcontext(), advance
        )
        with pytest.raises(Stopped):
            next(strips)
    assert seen == [1, 1, 1]


def test_weights_that_are_not_finite_name_the_image(file: Path) -> None:
    engine = Local()
    engine.weight = engine.weight * torch.inf
    for blend in (False, True):
        with pytest.raises(FloatingPointError, match=r"a\.png: the network's output is not finite"):
            in_tiles(file, inference(engine), Tiling(128, 128, 64, blend))


def test_a_flat_image_is_too_small(tmp_path: Path) -> None:
    file = tmp_path / "flat.png"
    cv2.imwrite(str(file), picture(10, 1000))
    with pytest.raises(DataError, match="too small: got 128x10 pixels as the network's input"):
        in_tiles(file, inference(Local()), Tiling(128, 128, 64))

"""Labels of a large image, strip by strip from the top down: no more than a row of tiles is in memory.

Axes: K classes, H×W pixels of the image, R×W those of a strip.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssaseg.cli.scoring.inference import Inference, Prediction
from ssaseg.cli.tiling.planning import Cut, Tiling
from ssaseg.cli.tiling.reading import Band, LargeImage
from ssaseg.datasets.bands.reading import shown
from ssaseg.datasets.base import IGNORED
from ssaseg.models.labelling import confidence_map, label_map
from ssaseg.models.layers import resize_bilinear

Stage = Callable[[str], AbstractContextManager[None]]  # of `Timings`


class Strip(NamedTuple):
    """Rows of an image and their results, which are `IGNORED` (confidence 0) where the image has no data."""

    top: int  # the first row
    image: np.ndarray  # a picture BGR uint8 (R,W,3)
    prediction: Prediction  # without probabilities


class Wanted(NamedTuple):
    """What is needed beside labels."""

    coarse: bool
    confidence: bool


class Stopped(Exception):
    """A request to stop, in the middle of an image."""


def label_strips(
    image: LargeImage,
    inference: Inference,
    tiling: Tiling,
    wanted: Wanted,
    stage: Stage,
    advance: Callable[[int], object],
) -> Iterator[Strip]:
    """The strips of an image, without gaps. The protocol of `inference` must be of whole images, not resized.

    advance: called for each tile, with 1; it may raise `Stopped`. Raises DataError for rows that cannot be read and for
    tiles that are too small for the networks, FloatingPointError as `Inference`.
    """
    band = Band(image)
    made = _blended if tiling.blend else _cut
    for top, pixels, prediction in made(band, inference.apart(), tiling, wanted, stage, advance):
        missing = image.missing(top, top + len(pixels))
        if missing is not None and inference.engine.num_classes <= IGNORED:
            prediction = hidden(prediction, missing)
        yield Strip(top, shown(pixels), prediction)


def hidden(prediction: Prediction, missing: np.ndarray) -> Prediction:
    """The prediction without the pixels `missing` (R,W)."""
    for labels in (prediction.labels, prediction.coarse):
        if labels is not None:
            labels[missing] = IGNORED
    if prediction.confidence is not None:
        prediction.confidence[missing] = 0
    return prediction


Made = Iterator[tuple[int, np.ndarray, Prediction]]  # the first row, pixels (R,W,C), and the result


def _cut(
    band: Band, inference: Inference, tiling: Tiling, wanted: Wanted, stage: Stage, advance: Callable[[int], object]
) -> Made:
    """Each pixel's label is that of one tile."""
    image, name = band.image, str(band.image.path)
    columns = tiling.columns(image.width)
    for rows in tiling.rows(image.height):
        with stage("reading"):
            pixels = band.take(rows.window.start, rows.window.stop)
        strip = _empty(rows.core.stop - rows.core.start, image.width, wanted)
        for column in columns:
            tile = np.ascontiguousarray(pixels[:, column.window])
            inputs = [torch.from_numpy(each) for each in inference.inputs(tile, name)]
            with stage("labels"):
                (made,) = inference.predict_batch(
                    [inputs], [tile.shape[:2]], [name], wanted.coarse, False, wanted.confidence
                )
            for whole, part in zip(strip, made, strict=True):
                if whole is not None and part is not None:
                    whole[:, column.core] = part[_inside(rows), _inside(column)]
            advance(1)
        yield rows.core.start, pixels[_inside(rows)], strip


def _inside(cut: Cut) -> slice:
    """The core in pixels of the tile."""
    return slice(cut.core.start - cut.window.start, cut.core.stop - cut.window.start)


def _empty(height: int, width: int, wanted: Wanted) -> Prediction:
    labels, coarse = (np.empty((height, width), np.uint8) for _ in range(2))
    confidence = np.empty((height, width), np.float32) if wanted.confidence else None
    return Prediction(labels, coarse if wanted.coarse else None, None, confidence)


def _blended(
    band: Band, inference: Inference, tiling: Tiling, wanted: Wanted, stage: Stage, advance: Callable[[int], object]
) -> Made:
    """Logits of all tiles over a pixel are averaged, added up in the order of `inference.slide`: the same numbers.

    Memory: the logits of a row of tiles, K·R·W float32. Rows that no later tile reaches are labelled and given away.
    """
    image, name, engine = band.image, str(band.image.path), inference.engine
    rows, columns = tiling.rows(image.height), tiling.columns(image.width)
    high = rows[0].window.stop
    sums = torch.zeros(1, engine.num_classes, high, image.width, device=inference.device)
    seen = torch.zeros(high, image.width, device=inference.device)
    for index, row in enumerate(rows):
        top = row.window.start
        with stage("reading"):
            pixels = band.take(top, row.window.stop)
        for column in columns:
            tile = np.ascontiguousarray(pixels[:, column.window])
            (only,) = inference.inputs(tile, name)
            with stage("labels"):
                _add(sums, seen, inference.logits(torch.from_numpy(only), name), column.window)
            advance(1)
        ready = (rows[index + 1].window.start if index + 1 < len(rows) else image.height) - top
        with stage("labels"), torch.inference_mode():
            means = sums[:, :, :ready] / seen[:ready]
            made = _from_means(means, engine.gives_scores, wanted)
            for each in (sums, seen):  # rows that later tiles reach move up
                kept = each[..., ready:, :].clone()
                each.zero_()
                each[..., : high - ready, :] = kept
        yield top, pixels[:ready], made


@torch.inference_mode()
def _add(sums: Tensor, seen: Tensor, logits: Tensor, columns: slice) -> None:
    """Adds the logits (1,K,·,·) of a tile to the sums (1,K,R,W) of a row of tiles."""
    seen[:, columns] += 1
    sums[..., columns] += resize_bilinear(logits, (sums.shape[2], columns.stop - columns.start))


def _from_means(means: Tensor, scores: bool, wanted: Wanted) -> Prediction:
    size = means.shape[2:]
    labels = label_map(means, size, size).cpu().numpy()
    confidence = confidence_map(means, size, size, scores).cpu().numpy() if wanted.confidence else None
    return Prediction(labels, None, None, confidence)

"""Transforms of one image on the CPU, in uint8: resizing, cropping, flipping. The pixels are equal to mmsegmentation's,
bit for bit.

Sources: mmcv 2.1 `image/geometric.py` and `transforms/processing.py`, mmsegmentation 1.2
`datasets/transforms/transforms.py`. Normalisation runs later, for the whole batch: see `colour`. So does the colour
distortion where the device is a GPU; on a CPU it runs here, in the workers: `distort_image`. Its random numbers are
always drawn here, because mmsegmentation draws them from the same sequence.

Letters: H, W source size; h, w size after the resize or crop; images are BGR uint8 (H,W,3), labels uint8 (H,W). Where
images have other channels, see `bands.reading`, there are as many in place of 3; each of them is resized by itself. In
recipes `scale` is (width, height) and `crop` is (height, width), as in mmsegmentation's configurations.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from ssaseg.datasets.base import IGNORED, DataError
from ssaseg.datasets.decoding import MAX_PIXELS

MAX_TRIES = 10

# Columns of a row of draws, in the order in which the steps are applied; NaN: the step is not applied.
BRIGHTNESS, CONTRAST_FIRST, SATURATION, HUE, CONTRAST_LAST = range(5)
DRAWS = 5
LEVELS = np.arange(256, dtype=np.float32)


class Random(Protocol):
    """The part of `numpy.random.RandomState` that is used here."""

    def random_sample(self) -> float: ...
    def uniform(self, low: float, high: float) -> float: ...
    def randint(self, low: int, high: int | None = None) -> int: ...


class Sample(NamedTuple):
    """One image for training. `image` and `label` have the size of the crop; padding is right of and below `size`."""

    image: np.ndarray  # uint8 (crop height, crop width, 3), BGR; padding 0
    label: np.ndarray  # uint8 (crop height, crop width), train ids; ignored pixels and padding 255
    draws: np.ndarray  # float32 (5,), one number for each of BRIGHTNESS … CONTRAST_LAST
    size: tuple[int, int]  # (h, w) of the image without padding


def rescale_size(size: tuple[int, int], scale: Sequence[float]) -> tuple[int, int]:
    """The (width, height) that fits an image of `size` (width, height) into `scale`, smaller or larger, aspect kept.

    The longer side of `scale` limits the longer side of the image, and the shorter side the shorter one, for landscape
    and portrait images alike. No side becomes less than 1 pixel.
    """
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return max(int(size[0] * factor + 0.5), 1), max(int(size[1] * factor + 0.5), 1)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (H,W,C) of any number of channels to `size` (width, height), bilinear without antialiasing."""
    resized = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    return resized if resized.ndim == 3 else resized[..., None]  # OpenCV 4 leaves out the axis of one channel


def resize_keep_ratio(image: np.ndarray, scale: Sequence[float]) -> np.ndarray:
    """Resize an image (H,W,3) to fit `scale` (width, height), bilinear without antialiasing."""
    height, width = image.shape[:2]
    return resize(image, rescale_size((width, height), scale))


def resize_to_multiple(image: np.ndarray, multiple: int) -> np.ndarray:
    """Resize (never pad) an image (H,W,3) so that both sides become the next multiples of `multiple`; this changes the
    aspect a little.
    """
    height, width = (-(-side // multiple) * multiple for side in image.shape[:2])
    return resize(image, (width, height))


def test_image(image: np.ndarray, scale: Sequence[int] | None, multiple: int | None) -> np.ndarray:
    """The network's input at test time, still BGR uint8: `scale` (width, height) or None, then `multiple` or None.

    Two resizes one after the other, as in mmsegmentation: a single resize to the final size gives other pixels.
    """
    if scale is not None:
        image = resize_keep_ratio(image, scale)
    if multiple is not None:
        image = resize_to_multiple(image, multiple)
    return image


# Without this line pytest would collect the function as a test where a test module imports it.
test_image.__test__ = False  # type: ignore[attr-defined]


def scaled_inputs(
    image: np.ndarray,
    scale: Sequence[int] | None,
    multiple: int | None,
    ratios: Sequence[float] = (1.0,),
    name: str = "image",
) -> list[np.ndarray]:
    """`test_image` once for each ratio: a factor of `scale`, or of the image's size where `scale` is None.

    Sizes are rounded down, as in mmsegmentation 0.30 `datasets/pipelines/test_time_aug.py`, whose ratios are factors of
    `scale` too. In the configurations of mmsegmentation 1.x they are factors of the image as it was read, even with
    `scale`. Raises DataError, naming the image, for an input of more than `MAX_PIXELS`.
    """
    height, width = image.shape[:2]
    inputs = []
    for ratio in ratios:
        if scale is None and ratio == 1:
            inputs.append(test_image(image, None, multiple))
            continue
        target = [max(int(side * ratio), 1) for side in scale or (width, height)]
        resized = rescale_size((width, height), target)
        if math.prod(resized) > MAX_PIXELS:
            raise DataError(
                f"{name}: the network's input would have {resized[0]}x{resized[1]} pixels\n"
                f"expected at most {MAX_PIXELS:,}: use a protocol with a smaller scale or smaller ratios"
            )
        inputs.append(test_image(image, target, multiple))
    return inputs


def input_sizes(
    size: tuple[int, int], scale: Sequence[int] | None, multiple: int | None, ratios: Sequence[float] = (1.0,)
) -> list[tuple[int, int]]:
    """Height and width of the inputs that `scaled_inputs` makes of an image of `size` (height, width)."""
    height, width = size
    found = []
    for ratio in ratios:
        wide, high = width, height
        if scale is not None or ratio != 1:
            wide, high = rescale_size((width, height), [max(int(s * ratio), 1) for s in scale or (width, height)])
        step = multiple or 1
        found.append((-(-high // step) * step, -(-wide // step) * step))
    return found


class TrainTransform:
    """Random resize, crop, flip and colour draws, with mmsegmentation's pixels for the same random numbers.

    scale: (width, height) in pixels, multiplied by one factor from U[ratio[0], ratio[1]) before the image is fitted to
    it. crop: (height, width) in pixels. cat_max_ratio: the crop is drawn again, up to ten times, while one class has at
    least this share of its labelled pixels or while it shows only one class; 1 switches this check off. flip:
    probability of a left-right flip. distortion: whether to draw the colour distortion. channels: of the images.
    distort_here: whether to apply it too; the draws of a sample are then NaN, as no step is left to apply.
    """

    def __init__(
        self,
        scale: Sequence[int],
        ratio: Sequence[float] = (0.5, 2.0),
        crop: Sequence[int] = (512, 512),
        cat_max_ratio: float = 0.75,
        flip: float = 0.5,
        distortion: bool = True,
        channels: int = 3,
        distort_here: bool = False,
    ) -> None:
        self.scale, self.ratio, self.crop = tuple(scale), tuple(ratio), (int(crop[0]), int(crop[1]))
        self.cat_max_ratio, self.flip, self.distortion = cat_max_ratio, flip, distortion
        self.channels, self.distort_here = channels, distort_here

    def __call__(
        self,
        image: np.ndarray,
        raw: np.ndarray,
        rng: Random,
        lut: np.ndarray,
        out: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Sample:
        """Draw and apply the transforms to an image (H,W,3) and its raw label map (H,W); both stay unchanged.

        lut: uint8 (256,), raw id to train id. out: an image and a label array of the crop's size to write into, such as
        rows of a batch. Random numbers are drawn in mmsegmentation's order: resize, crop, flip, distortion.
        """
        low, high = self.ratio
        factor = rng.random_sample() * (high - low) + low
        scale = int(self.scale[0] * factor), int(self.scale[1] * factor)
        width, height = rescale_size((image.shape[1], image.shape[0]), scale)
        rows, columns, label = self._choose_crop((height, width), raw, rng, lut)
        # The same draw as numpy's `choice` of two with probabilities (flip, 1 - flip), in a tenth of its time.
        flipped = rng.random_sample() < self.flip
        draws = draw_distortion(rng) if self.distortion else np.full(DRAWS, np.nan, np.float32)

        # OpenCV's rounded coefficients depend on the absolute position: resizing only the crop gives other pixels.
        window = resize(image, (width, height))[rows, columns]
        out_image, out_label = out if out is not None else self.empty(())
        size = label.shape[0], label.shape[1]
        for source, target, padding in ((window, out_image, 0), (label, out_label, IGNORED)):
            inside = target[: size[0], : size[1]]
            cv2.flip(source, 1, dst=inside) if flipped else np.copyto(inside, source)
            target[size[0] :] = padding
            target[: size[0], size[1] :] = padding
        if self.distort_here:
            distort_image(out_image[: size[0], : size[1]], draws)
            draws = np.full(DRAWS, np.nan, np.float32)
        return Sample(out_image, out_label, draws, size)

    def empty(self, lead: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Arrays of the crop's size to write into, images (*lead, h, w, C) and labels (*lead, h, w), uninitialised."""
        return np.empty((*lead, *self.crop, self.channels), np.uint8), np.empty((*lead, *self.crop), np.uint8)

    def _choose_crop(
        self, size: tuple[int, int], raw: np.ndarray, rng: Random, lut: np.ndarray
    ) -> tuple[slice, slice, np.ndarray]:
        """Rows, columns and train ids of a crop of the resized image, whose (height, width) is `size`."""
        for tries in range(MAX_TRIES + 1):
            # A side that is shorter than the crop is used completely.
            rows, columns = (_random_slice(new, crop, rng) for new, crop in zip(size, self.crop, strict=True))
            label = resize_label_window(raw, size, rows, columns, lut)
            # The last crop that is drawn is used without the check.
            if self.cat_max_ratio >= 1 or tries == MAX_TRIES or self._is_mixed(label):
                break
        return rows, columns, label

    def _is_mixed(self, label: np.ndarray) -> bool:
        """Whether `label` holds two classes or more, none with `cat_max_ratio` or more of the labelled pixels."""
        # OpenCV 4 returns a column, OpenCV 5 a vector.
        counts = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()[:IGNORED]
        # float32 counts are exact up to 2^24 pixels of a class, such as a crop of 4096 x 4096.
        total = counts.sum(dtype=np.float64)
        return bool(np.count_nonzero(counts) > 1 and counts.max() / total < self.cat_max_ratio)


def _random_slice(length: int, crop: int, rng: Random) -> slice:
    """`crop` of `length` pixels, or all of them if there are fewer. In both cases a number is drawn, as in
    mmsegmentation.
    """
    start = int(rng.randint(0, max(length - crop, 0) + 1))
    return slice(start, min(start + crop, length))


def nearest_index(new: int, old: int, window: slice) -> np.ndarray:
    """Source positions that `cv2.resize` (INTER_NEAREST, `old` to `new` pixels) reads for the positions in `window`."""
    # OpenCV multiplies by the reciprocal of the ratio, which rounds differently from a division.
    step = 1.0 / (new / old)
    return np.minimum((np.arange(window.start, window.stop) * step).astype(np.intp), old - 1)


def resize_label_window(
    raw: np.ndarray, size: tuple[int, int], rows: slice, columns: slice, lut: np.ndarray
) -> np.ndarray:
    """`lut[cv2.resize(raw, INTER_NEAREST)[rows, columns]]`, computed only from the source pixels that it needs.

    raw: uint8 (H,W). size: (height, width) after the resize. Returns uint8 of the window's size.
    """
    ys = nearest_index(size[0], raw.shape[0], rows)
    xs = nearest_index(size[1], raw.shape[1], columns)
    source = cv2.LUT(raw[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1], lut)
    # Gathering rows is several times faster than gathering columns, hence the two transpositions.
    gathered = cv2.transpose(cv2.transpose(source)[xs - xs[0]])
    return gathered[ys - ys[0]]


def draw_distortion(rng: Random) -> np.ndarray:
    """The random numbers of mmsegmentation's PhotoMetricDistortion, in the same order, as float32 (5,); NaN: the step
    is not applied.

    Brightness in levels from U[-32,32), contrast and saturation as factors from U[0.5,1.5), hue in OpenCV's units of 2
    degrees from the integers -18..17. Each step has probability 1/2; contrast comes early or late with probability 1/2.
    """
    draws = np.full(DRAWS, np.nan, np.float32)
    if rng.randint(2):
        draws[BRIGHTNESS] = rng.uniform(-32, 32)
    early = rng.randint(2) == 1
    if early and rng.randint(2):
        draws[CONTRAST_FIRST] = rng.uniform(0.5, 1.5)
    if rng.randint(2):
        draws[SATURATION] = rng.uniform(0.5, 1.5)
    if rng.randint(2):
        draws[HUE] = rng.randint(-18, 18)
    if not early and rng.randint(2):
        draws[CONTRAST_LAST] = rng.uniform(0.5, 1.5)
    return draws


def distort_image(image: np.ndarray, draws: np.ndarray) -> None:
    """Apply mmsegmentation's PhotoMetricDistortion in place to an image uint8 (H,W,C), BGR first. draws: float32 (5,).

    Its arithmetic and OpenCV's conversions: with the same OpenCV the pixels are equal, bit for bit. `colour.distort`
    does the same for a whole batch on a GPU. Of more than three channels only the first three change. Of one or two,
    which have no colour, all change in brightness and contrast. A step maps each level to a level: in place of float32
    arithmetic it looks the level up in a table.
    """
    channels = image.shape[2]
    pixels = image if channels <= 3 else np.ascontiguousarray(image[..., :3])
    table: np.ndarray | None = None  # of the steps before HSV is needed, or after it: all in one pass
    for step, amount in enumerate(draws):
        if np.isnan(amount) or (step in (SATURATION, HUE) and channels < 3):
            continue
        if step not in (SATURATION, HUE):
            levels = _clipped(LEVELS + amount if step == BRIGHTNESS else LEVELS * amount)
            table = levels if table is None else levels[table]
            continue
        if table is not None:
            cv2.LUT(pixels, table, dst=pixels)
            table = None
        tables = np.repeat(LEVELS.astype(np.uint8)[:, None], 3, 1)
        if step == SATURATION:
            tables[:, 1] = _clipped(LEVELS * amount)
        else:
            tables[:, 0] = (np.arange(256) + int(amount)) % 180
        hsv = cv2.cvtColor(pixels, cv2.COLOR_BGR2HSV)
        cv2.LUT(hsv, tables[None], dst=hsv)
        cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR, dst=pixels)
    if table is not None:
        cv2.LUT(pixels, table, dst=pixels)
    if pixels is not image:
        image[..., :3] = pixels


def _clipped(levels: np.ndarray) -> np.ndarray:
    """As mmsegmentation converts float32 to uint8: clipped to 0..255, then truncated."""
    return np.clip(levels, 0, 255).astype(np.uint8)

"""The kinds of results that `predict` writes, in one table. Slow imports are inside the functions that need them.

Axes: K classes, H×W pixels of an image.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from ssaseg.cli.scoring.inference import Prediction

# zlib's strategy Z_RLE: for label maps a third of the time of Pillow's default, and files a fifth larger.
RUN_LENGTHS = 3


@dataclass(frozen=True)
class Style:
    """Names and colours of K classes; colours: RGB uint8 (256,3), black from index K on."""

    classes: tuple[str, ...]
    colours: "np.ndarray"
    legend: bool = True  # whether overlays have one


def style_of(classes: Sequence[str], palette: Iterable[Sequence[int]], legend: bool = True) -> Style:
    """Style of K class names and at least K colours RGB 0..255."""
    import numpy as np

    colours = np.zeros((256, 3), np.uint8)
    for index, colour in zip(range(len(classes)), palette, strict=False):
        colours[index] = colour
    return Style(tuple(classes), colours, legend)


class Kind(NamedTuple):
    """A kind of result: one file per image; if `encode` is None, entries in a single file for all images."""

    suffix: str
    # Makes the file's content from the image BGR uint8 (H,W,3), the model's prediction, and the style.
    encode: "Callable[[np.ndarray, Prediction, Style], bytes] | None"
    needs: str = "labels"  # the field of `Prediction` that it is made from
    tiled: str | None = None  # the suffix with --tile; None: it cannot be made row by row


def encode_indices(labels: "np.ndarray | None", style: Style) -> bytes:
    """Palette PNG of class numbers uint8 (H,W), one byte per pixel."""
    from PIL import Image

    assert labels is not None
    buffer = io.BytesIO()
    picture = Image.fromarray(labels)
    # A palette of 256 colours makes each pixel a byte. With a smaller one Pillow packs pixels; some readers fail then.
    picture.putpalette(style.colours.tobytes())
    picture.save(buffer, "PNG", compress_type=RUN_LENGTHS)
    return buffer.getvalue()


def encode_colours(image: "np.ndarray", prediction: "Prediction", style: Style) -> bytes:
    """PNG of class colours."""
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.take(style.colours, prediction.labels, axis=0)).save(buffer, "PNG")
    return buffer.getvalue()


def encode_overlay(image: "np.ndarray", prediction: "Prediction", style: Style) -> bytes:
    """JPEG of class colours over the image, with a legend if the style has one."""
    from PIL import Image

    from ssaseg.cli.drawing.legend import with_legend
    from ssaseg.cli.drawing.panels import overlay

    buffer = io.BytesIO()
    colours = style.colours[: len(style.classes)].tolist()
    mixed = overlay(image, prediction.labels, colours)
    if style.legend:
        mixed = with_legend(mixed, prediction.labels, style.classes, colours)
    Image.fromarray(mixed[..., ::-1]).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def encode_probabilities(image: "np.ndarray", prediction: "Prediction", style: Style) -> bytes:
    """Compressed .npz with `probabilities`: float16 (K,H,W), whose sum over K is 1."""
    import numpy as np

    assert prediction.probabilities is not None
    buffer = io.BytesIO()
    np.savez_compressed(buffer, probabilities=prediction.probabilities)
    return buffer.getvalue()


def encode_confidence(image: "np.ndarray", prediction: "Prediction", style: Style) -> bytes:
    """Grey PNG of 8 bits: the label's probability times 255, rounded to the nearest integer."""
    import numpy as np
    from PIL import Image

    assert prediction.confidence is not None
    buffer = io.BytesIO()
    Image.fromarray(np.rint(prediction.confidence * 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def encode_polygons(image: "np.ndarray", prediction: "Prediction", style: Style) -> bytes:
    """Polygons are made with --tile alone, see `prediction.large`: `require_tileable` refuses them before."""
    raise NotImplementedError


# Key: name of the folder below OUT; of "rle" and "shares", of the single files OUT/rle.json and OUT/shares.json.
KINDS: Mapping[str, Kind] = {
    "index": Kind(".png", lambda image, prediction, style: encode_indices(prediction.labels, style), tiled=".tif"),
    "color": Kind(".png", encode_colours, tiled=".tif"),
    "overlay": Kind(".jpg", encode_overlay, tiled=".tif"),
    "probs": Kind(".npz", encode_probabilities, needs="probabilities"),
    "confidence": Kind(".png", encode_confidence, needs="confidence", tiled=".tif"),
    "rle": Kind(".json", None),
    "shares": Kind(".json", None, tiled=".json"),
    "coarse": Kind(
        ".png", lambda image, prediction, style: encode_indices(prediction.coarse, style), needs="coarse", tiled=".tif"
    ),
    "polygons": Kind(".geojson", encode_polygons, tiled=".geojson"),
}


def is_needed(field: str, kinds: Iterable[str]) -> bool:
    """Whether one of the kinds is made from this field of `Prediction`."""
    return any(KINDS[kind].needs == field for kind in kinds)

"""The kinds of results that `predict` writes, in one table. What encodes them is imported when it is called.

Axes: K classes, H×W pixels of an image.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from ssaseg.cli.scoring.inference import Prediction


@dataclass(frozen=True)
class Style:
    """What results look like: K class names, and their colours RGB uint8 (256,3), black from K on."""

    classes: tuple[str, ...]
    colours: "np.ndarray"


def style_of(classes: Sequence[str], palette: Iterable[Sequence[int]]) -> Style:
    """Style of K class names and at least K colours RGB 0..255."""
    import numpy as np

    colours = np.zeros((256, 3), np.uint8)
    for index, colour in zip(range(len(classes)), palette, strict=False):
        colours[index] = colour
    return Style(tuple(classes), colours)


class Kind(NamedTuple):
    """A kind of result: a file an image, or where `encode` is None an entry in one file of all images."""

    suffix: str
    # The file's content, from the image BGR uint8 (H,W,3), what the model says about it, and the style.
    encode: "Callable[[np.ndarray, Prediction, Style], bytes] | None"
    needs: str = "labels"  # the field of `Prediction` that it is made of


def encode_indices(labels: "np.ndarray | None", style: Style) -> bytes:
    """Palette PNG of class numbers uint8 (H,W), one byte a pixel."""
    from PIL import Image

    assert labels is not None
    buffer = io.BytesIO()
    picture = Image.fromarray(labels)
    # A palette of 256 colours keeps a pixel a byte: Pillow packs smaller ones, which some readers cannot take.
    picture.putpalette(style.colours.tobytes())
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def encode_colours(image: "np.ndarray", prediction: "Prediction", style: Style) -> bytes:
    """PNG of class colours."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(style.colours[prediction.labels]).save(buffer, "PNG")
    return buffer.getvalue()


def encode_overlay(image: "np.ndarray", prediction: "Prediction", style: Style) -> bytes:
    """JPEG of class colours over the image."""
    from PIL import Image

    from ssaseg.cli.drawing.panels import overlay

    buffer = io.BytesIO()
    mixed = overlay(image, prediction.labels, style.colours[: len(style.classes)].tolist())
    Image.fromarray(mixed[..., ::-1]).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def encode_probabilities(image: "np.ndarray", prediction: "Prediction", style: Style) -> bytes:
    """Compressed .npz with `probabilities`: float16 (K,H,W), which add up to 1 over K."""
    import numpy as np

    assert prediction.probabilities is not None
    buffer = io.BytesIO()
    np.savez_compressed(buffer, probabilities=prediction.probabilities)
    return buffer.getvalue()


# By the name of the folder below OUT. "rle" is the one file OUT/rle.json.
KINDS: Mapping[str, Kind] = {
    "index": Kind(".png", lambda image, prediction, style: encode_indices(prediction.labels, style)),
    "color": Kind(".png", encode_colours),
    "overlay": Kind(".jpg", encode_overlay),
    "probs": Kind(".npz", encode_probabilities, needs="probabilities"),
    "rle": Kind(".json", None),
    "coarse": Kind(".png", lambda image, prediction, style: encode_indices(prediction.coarse, style), needs="coarse"),
}


def is_needed(field: str, kinds: Iterable[str]) -> bool:
    """Whether one of the kinds is made of that field of a `Prediction`."""
    return any(KINDS[kind].needs == field for kind in kinds)

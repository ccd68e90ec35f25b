"""A legend in a corner of a picture: the classes that are in it, with their shares.

Axes: H×W pixels of an image, K classes. Images are BGR uint8 (H,W,3), as in OpenCV.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ssaseg.cli.drawing.panels import CUT_OFF, font
from ssaseg.files.text import printable

LINES = 44  # of text in the height of an image, or in three quarters of its width if that is less
SMALLEST, LARGEST = 11, 48  # size of letters [pixels]
SHARE = 0.15  # of the image, that the legend covers at most
RAREST = 0.001  # share of a class that is named
OPACITY = 0.75  # of the box behind the text


class Entry(NamedTuple):
    """A line of the legend; without a colour, a remark."""

    text: str
    colour: Sequence[int] | None  # RGB 0..255


def with_legend(
    image: np.ndarray, labels: np.ndarray, classes: Sequence[str], palette: Sequence[Sequence[int]]
) -> np.ndarray:
    """The image with a legend in its lower left corner: the classes in labels (H,W), those with most pixels first.

    Letters grow with the image. Classes that do not fit into `SHARE` of it are counted in a last line; an image that is
    too small for any is returned unchanged.
    """
    from PIL import Image, ImageDraw

    height, width = labels.shape
    size = int(np.clip(min(height, 0.75 * width) / LINES, SMALLEST, LARGEST))
    letters, line, pad = font(size), round(size * 1.35), size // 2
    found = entries(labels, classes, palette)
    present, found = len(found), found[: height // line]
    widths = [letters.getlength(entry.text) for entry in found]
    for count in range(len(found), 0, -1):
        rest = present - count
        shown = [*found[:count], *([Entry(f"and {rest} more", None)] if rest else [])]
        wide = int(max(*widths[:count], letters.getlength(shown[-1].text))) + line + 3 * pad
        high = len(shown) * line + 2 * pad - (line - size) // 2
        if wide * high <= SHARE * height * width and wide <= width and high <= height:
            break
    else:
        return image
    made = image.copy()
    corner = made[height - high :, :wide]
    corner[:] = (corner * (1 - OPACITY)).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(corner))  # in BGR, as the colours below
    draw = ImageDraw.Draw(picture)
    for index, entry in enumerate(shown):
        y = pad + index * line
        if entry.colour is not None:
            box: Any = (pad, y, pad + size, y + size - 1)
            draw.rectangle(box, fill=tuple(entry.colour[::-1]), outline=(255, 255, 255), width=max(size // 16, 1))
        draw.text((2 * pad + line, y + size // 2), entry.text, fill=(255, 255, 255), font=letters, anchor="lm")
    corner[:] = np.asarray(picture)
    return made


def entries(labels: np.ndarray, classes: Sequence[str], palette: Sequence[Sequence[int]]) -> list[Entry]:
    """The classes in labels (H,W) of at least `RAREST` of the pixels, with their shares; those with most first."""
    pixels = np.bincount(labels.reshape(-1), minlength=256)[: len(classes)]
    found = []
    for index in np.argsort(-pixels, kind="stable").tolist():
        share = pixels[index] / labels.size
        if share < RAREST or not pixels[index]:
            break
        name = printable(classes[index])
        name = name if len(name) <= CUT_OFF else name[: CUT_OFF - 1] + "…"
        found.append(Entry(f"{name}  {100 * share:.{0 if share >= 0.1 else 1}f} %", palette[index]))
    return found

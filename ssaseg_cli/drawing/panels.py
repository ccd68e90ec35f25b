"""Pictures of several panels: panels with captions in rows; below them legends of class colours and scales of numbers.

Axes: H×W pixels of an image, K classes. Images are BGR uint8 (H,W,3), as in OpenCV.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ssaseg.datasets import IGNORED
from ssaseg.files.text import printable

WIDTH, TALLEST = 320, 400  # width and largest height of a panel [pixels]

TEXT, LINE = 13, 20  # size of the letters, height of a line [pixels]

INK, PAPER = (40, 40, 40), 255

CUT_OFF = 26  # most letters of a class name in a legend

MOST_NAMES = 48  # most classes in a legend

RIGHTED, WORSENED, STILL_WRONG = (60, 190, 80), (230, 50, 50), (250, 200, 40)  # RGB: green, red, yellow

CHANGES = (
    ("changed: now right", RIGHTED),
    ("changed: no longer right", WORSENED),
    ("changed: wrong both times", STILL_WRONG),
)

Legend = Sequence[tuple[str, Sequence[int]]]  # names and their colours RGB 0..255

NO_COLOUR: Sequence[int] = ()  # for an entry without a patch of colour

BAR = 256  # width of a scale's bar [pixels]


class Panel(NamedTuple):
    """An image and the text above it."""

    caption: str
    image: np.ndarray


class Scale(NamedTuple):
    """What the colours of number maps mean: `low` to `high` in the colours of a colour map of matplotlib."""

    caption: str
    low: float
    high: float
    colours: str


def overlay(image: np.ndarray, labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Half image, half class colours, rounded up; ignored pixels (255) stay unchanged. BGR uint8 (H,W,3), (H,W) → BGR
    uint8.
    """
    colours = np.zeros((256, 1, 3), np.uint8)
    colours[: len(palette), 0] = np.asarray(palette, np.uint8)[:, ::-1]
    flat = cv2.applyColorMap(labels, colours)  # much faster than indexing
    # (a + b + 1) >> 1 without numbers above 255.
    mixed: np.ndarray = (flat | image) - ((flat ^ image) >> 1)
    return cv2.copyTo(image, (labels == IGNORED).view(np.uint8), mixed)


def coloured(image: np.ndarray, labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Class colours over a faint grey image, so that they look as in the legend; ignored pixels are hatched.

    BGR uint8 (H,W,3), (H,W), K colours RGB → BGR uint8 (H,W,3).
    """
    grey = image.mean(axis=2, keepdims=True).astype(np.uint8).repeat(3, axis=2)
    flat = overlay(grey, labels, palette)
    mixed = overlay(flat, labels, palette)  # three quarters colour
    diagonal = np.add.outer(np.arange(labels.shape[0]), np.arange(labels.shape[1]))
    hatch = (diagonal // max(labels.shape[1] // 64, 1)) % 4 == 0
    mixed[(labels == IGNORED) & hatch] = 0
    return mixed


def changes(
    image: np.ndarray, labels: np.ndarray, coarse: np.ndarray, final: np.ndarray, heading: str = "changed"
) -> Panel:
    """What adaptation changed, over the grey image; label maps uint8 (H,W), `coarse` before, `final` after it.

    Green: now right; red: no longer right; yellow: wrong before and after. Ignored pixels are left out. The caption has
    shares of the labelled pixels.
    """
    grey = _faint(image)
    changed = (coarse != final) & (labels != IGNORED)
    marks = {
        "right": (changed & (final == labels), RIGHTED),
        "wrong": (changed & (coarse == labels), WORSENED),
        "other": (changed & (coarse != labels) & (final != labels), STILL_WRONG),
    }
    for pixels, colour in marks.values():
        grey[pixels] = colour[::-1]
    labelled = max(int((labels != IGNORED).sum()), 1)
    shares = {name: pixels.sum() / labelled * 100 for name, (pixels, _) in marks.items()}
    caption = f"{heading}: {shares['right']:.1f} % now right, {shares['wrong']:.1f} % now wrong"
    return Panel(caption, grey)


def marked(image: np.ndarray, pixels: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """`pixels`, bool (H,W), in this colour RGB over the faint grey image. BGR uint8 (H,W,3) → BGR uint8 (H,W,3)."""
    grey = _faint(image)
    grey[pixels] = colour[::-1]
    return grey


def heat(values: np.ndarray, scale: Scale) -> np.ndarray:
    """Numbers (H,W) as colours of the scale; what is below or above it has its end's colour. BGR uint8 (H,W,3)."""
    steps = (values - scale.low) / (scale.high - scale.low) * 255
    return _colours(scale.colours)[np.clip(np.rint(steps), 0, 255).astype(np.uint8)]


def outlined(image: np.ndarray, mask: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """The image with the edge of a mask, bool (H,W), in this colour RGB; as thick as a panel can show."""
    import cv2

    side = 2 * max(round(image.shape[1] / WIDTH), 1) + 1
    inner = cv2.erode(mask.astype(np.uint8), np.ones((side, side), np.uint8))  # beyond the image the mask continues
    return np.where((mask & (inner == 0))[..., None], np.asarray(colour, np.uint8)[::-1], image)


def grid(rows: Iterable[Sequence[Panel]], *legends: "Legend | Scale") -> np.ndarray:
    """Rows of panels, each `WIDTH` wide, with their captions; the legends are below them. BGR uint8.

    Rows without panels and empty legends are left out.
    """
    lines = [np.concatenate([_framed(panel) for panel in _same_height(row)], axis=1) for row in rows if row]
    if not lines:
        return np.full((LINE, WIDTH, 3), PAPER, np.uint8)
    widest = max(line.shape[1] for line in lines)
    rest = [_bar(each, widest) if isinstance(each, Scale) else _legend(each, widest) for each in legends if each]
    padded = [
        np.pad(each, ((0, 0), (0, widest - each.shape[1]), (0, 0)), constant_values=PAPER) for each in [*lines, *rest]
    ]
    return np.concatenate(padded)


def legend_of(label_maps: Iterable[np.ndarray], classes: Sequence[str], palette: Sequence[Sequence[int]]) -> Legend:
    """Names and colours of the classes that occur in the label maps (H,W), those with most pixels first."""
    pixels = sum((np.bincount(each.ravel(), minlength=256) for each in label_maps), np.zeros(256, np.int64))
    seen = [int(index) for index in np.argsort(-pixels[: len(classes)], kind="stable") if pixels[index]]
    shown: list[tuple[str, Sequence[int]]] = [(classes[index], palette[index]) for index in seen[:MOST_NAMES]]
    if len(seen) > MOST_NAMES:
        shown.append((f"and {len(seen) - MOST_NAMES} more", NO_COLOUR))
    if pixels[IGNORED]:
        shown.append(("hatched: not labelled", NO_COLOUR))
    return shown


def encode(image: np.ndarray, suffix: str) -> bytes:
    """The bytes of a .png or .jpg file of a BGR image."""
    import cv2

    return cv2.imencode(suffix, image, [cv2.IMWRITE_JPEG_QUALITY, 85] if suffix == ".jpg" else [])[1].tobytes()


def _faint(image: np.ndarray) -> np.ndarray:
    """The image in grey with little contrast, BGR uint8 (H,W,3), for marks in colour."""
    return (image.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.5 + 100).astype(np.uint8)


# ---- layout ---------------------------------------------------------------------------------------------------------
def _fit(image: np.ndarray) -> np.ndarray:
    """The image, resized to fit into WIDTH × TALLEST with the same aspect, and padded to the full WIDTH."""
    import cv2

    height, width = image.shape[:2]
    scale = min(WIDTH / width, TALLEST / height)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    fitted = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    return np.pad(fitted, ((0, 0), (0, WIDTH - size[0]), (0, 0)), constant_values=PAPER)


def _same_height(row: Sequence[Panel]) -> list[Panel]:
    fitted = [Panel(panel.caption, _fit(panel.image)) for panel in row]
    tallest = max(panel.image.shape[0] for panel in fitted)
    return [
        Panel(name, np.pad(image, ((0, tallest - image.shape[0]), (0, 0), (0, 0)), constant_values=PAPER))
        for name, image in fitted
    ]


def _framed(panel: Panel) -> np.ndarray:
    """The panel under its caption, with four white pixels to the right and below."""
    head = np.full((LINE, panel.image.shape[1], 3), PAPER, np.uint8)
    text = printable(panel.caption)  # before it is measured: of two lines there is no length
    while len(text) > 1 and font().getlength(text) > WIDTH - 4:  # the end of a path is more important than its start
        text = "…" + text.lstrip("…")[1:]
    framed = np.concatenate([_written(head, [(2, 1, text)]), panel.image])
    return np.pad(framed, ((0, 4), (0, 4), (0, 0)), constant_values=PAPER)


def _legend(entries: Legend, width: int) -> np.ndarray:
    """Patches of colour with names, in as many columns as fit."""
    names = [printable(name) for name, _ in entries]
    names = [name if len(name) <= CUT_OFF else name[: CUT_OFF - 1] + "…" for name in names]
    column = int(max(font().getlength(name) for name in names)) + 2 * LINE + 4
    columns = max(width // column, 1)
    rows = -(-len(entries) // columns)
    image = np.full((rows * LINE + 8, width, 3), PAPER, np.uint8)
    texts = []
    for index, (_, colour) in enumerate(entries):
        x, y = index % columns * column + 4, index // columns * LINE + 6
        if colour != NO_COLOUR:
            image[y : y + 14, x : x + 22] = INK
            image[y + 1 : y + 13, x + 1 : x + 21] = np.asarray(colour, np.uint8)[::-1]
        texts.append((x + 27, y - 2, names[index]))
    return _written(image, texts)


def _bar(scale: Scale, width: int) -> np.ndarray:
    """The scale's colours between its two numbers, and what they are."""
    image = np.full((LINE + 8, width, 3), PAPER, np.uint8)
    low, high = f"{scale.low:g}", f"{scale.high:g}"
    start = int(font().getlength(low)) + 10
    image[6 : LINE + 2, start : start + BAR + 2] = INK
    image[7 : LINE + 1, start + 1 : start + BAR + 1] = _colours(scale.colours)
    return _written(image, [(4, 5, low), (start + BAR + 8, 5, f"{high}   {scale.caption}")])


@cache
def _colours(name: str) -> np.ndarray:
    """The colours of a colour map: BGR uint8 (256,3)."""
    import matplotlib

    colours = matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, 2::-1]
    return np.rint(colours * 255).astype(np.uint8)


def _written(image: np.ndarray, texts: Iterable[tuple[int, int, str]]) -> np.ndarray:
    """The image with texts at (x, y). By Pillow, as OpenCV writes only ASCII letters."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for x, y, text in texts:
        draw.text((x, y), printable(text), fill=INK, font=font())
    return np.asarray(picture)


@cache
def font(size: int = TEXT) -> Any:
    """Pillow's font with letters of this size [pixels]."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)

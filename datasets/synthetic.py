"""Procedural scenes: a landscape with objects, drawn when it is requested, with a label for every pixel.

A scene depends only on (seed, split, index). Two pairs of classes are look-alikes: a ball on grass and a buoy on water
are drawn in the same way, and so are a bale on grass and a crate on the road. Only their surroundings differ.

Letters: H, W height and width [pixels]. Sizes of objects are in units of min(H, W) / 160. Colours are BGR, 0..255.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from ssaseg.datasets.base import IGNORED, DataError, PairFacts, Palette
from ssaseg.datasets.inspection import inspect_loaded

CLASSES: tuple[str, ...] = (
    "sky", "mountain", "grass", "water", "road", "tree", "house", "car", "boat", "ball", "buoy", "bale", "crate",
)  # fmt: skip
PALETTE: Palette = (
    (135, 206, 250), (139, 115, 145), (110, 190, 70), (30, 90, 200), (120, 120, 120), (20, 100, 40), (200, 120, 60),
    (230, 30, 60), (245, 245, 220), (255, 220, 0), (255, 110, 220), (150, 90, 20), (0, 220, 210),
)  # fmt: skip
LOOK_ALIKES: tuple[tuple[str, str], ...] = (("ball", "buoy"), ("bale", "crate"))
SPLITS = ("train", "val")

SKY, MOUNTAIN, GRASS, WATER, ROAD, TREE, HOUSE, CAR, BOAT, BALL, BUOY, BALE, CRATE = range(len(CLASSES))
Colour = Sequence[float] | np.ndarray
_STEPS = np.linspace(0, 1, 256).reshape(1, 256, 1)


def mask_palette(from_one: bool) -> bytes:
    """256 RGB triples of masks that hold these scenes; `from_one`: class k has the id k + 1."""
    colours = np.zeros((256, 3), np.uint8)
    colours[int(from_one) : int(from_one) + len(PALETTE)] = PALETTE
    return colours.tobytes()


class SyntheticScenes:
    """`count` scenes of H×W pixels, numbered from 0 within a split; no scene is in both splits.

    Raises DataError for a side below 64.
    """

    classes = CLASSES
    palette = PALETTE
    image_files: Sequence[Path] = ()
    mask_files: Sequence[Path] = ()
    incomplete: Sequence[DataError] = ()
    unused_masks: Sequence[Path] = ()
    zero_ignored = None  # labels are drawn as train ids
    channels, levels = 3, None
    fix = "ssaseg draws these scenes itself: please report this error"

    def __init__(self, count: int, height: int, width: int, seed: int = 0, split: str = "train") -> None:
        if min(height, width) < 64:
            raise DataError(f"data.synthetic: {width}x{height} pixels\nexpected at least 64x64, so that objects fit")
        self.count, self.height, self.width, self.seed, self.split = count, height, width, seed, split
        # Labels are drawn as train ids: every raw id is its own train id.
        self.valid_raw = np.isin(np.arange(256), [*range(len(CLASSES)), IGNORED])
        self.label_lut = np.where(self.valid_raw, np.arange(256), IGNORED).astype(np.uint8)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """A name such as `train_00042`."""
        return f"{self.split}_{index:05d}"

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image BGR uint8 (H, W, 3) and train ids uint8 (H, W), 255 on the outline of objects."""
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        stream = np.random.SeedSequence([self.seed, SPLITS.index(self.split), index])
        return render(self.height, self.width, np.random.Generator(np.random.PCG64(stream)))

    def load_raw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The same as `load`: raw ids are train ids here."""
        return self.load(index)

    def load_image(self, index: int) -> np.ndarray:
        """The image alone, BGR uint8 (H, W, 3)."""
        return self.load(index)[0]

    def label_error(self, index: int) -> DataError:
        """Not expected: the scenes hold only ids of classes."""
        return DataError(
            f"{self.name(index)}: an id that belongs to no class\nexpected ids 0..{len(CLASSES) - 1} or {IGNORED}"
        )

    def inspect(self, index: int, decode: bool) -> PairFacts:
        """See `Dataset.inspect`: the scene is always drawn."""
        return inspect_loaded(self, index)

    def identity(self) -> list[str]:
        """The numbers that the scenes are drawn from, as "name=value"."""
        numbers = {"count": self.count, "height": self.height, "seed": self.seed, "split": self.split}
        return [f"{key}={value}" for key, value in (numbers | {"width": self.width}).items()]


def render(height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image BGR uint8 (H, W, 3), label uint8 (H, W). All randomness comes from `rng`."""
    # Painted from back to front, image and label in the same step, so that they always agree.
    scene = Scene(height, width, rng)
    horizon = int(height * rng.uniform(0.22, 0.42))
    _landscape(scene, horizon)
    for _ in range(rng.integers(0, 3)):
        _house(scene, horizon)
    for _ in range(rng.integers(1, 5)):
        _tree(scene, horizon)
    for _ in range(rng.integers(0, 3)):
        _put(scene, ROAD, CAR, 16, _car)
    for _ in range(rng.integers(0, 3)):
        _put(scene, WATER, BOAT, 16, _boat)
    # Look-alikes come last, so that nothing hides them. Both classes of a pair have the same drawing function and
    # ranges: the class decides where an object is and how many there are, never how it looks.
    for ground, name, most in ((GRASS, BALE, 3), (ROAD, CRATE, 2)):
        for _ in range(rng.integers(1, most + 1)):
            _put(scene, ground, name, 11, _box)
    for ground, name in ((GRASS, BALL), (WATER, BUOY)):
        for _ in range(rng.integers(2, 4)):
            _put(scene, ground, name, 12, _ball)
    return _light(scene.image, rng), scene.label


class Scene:
    """The canvas: image and label, the noise images that make textures, and the unit of length [pixels]."""

    def __init__(self, height: int, width: int, rng: np.random.Generator) -> None:
        self.height, self.width, self.rng = height, width, rng
        self.unit = min(height, width) / 160
        self.image = np.zeros((height, width, 3), np.uint8)
        self.label = np.zeros((height, width), np.uint8)
        self.fine = self.noise(1, 1)
        self.blotches = _blend(self.noise(6, 6), self.fine, 0.375)

    def noise(self, down: int, across: int) -> np.ndarray:
        """Grey noise uint8 (H, W) whose grains are `down` × `across` units."""
        rows = max(2, int(self.height / max(1, down * self.unit)))
        columns = max(2, int(self.width / max(1, across * self.unit)))
        grains = np.frombuffer(self.rng.bytes(rows * columns), np.uint8).reshape(rows, columns)
        # Only this interpolation of OpenCV's gives the same bits on every processor.
        return cv2.resize(grains, (self.width, self.height), interpolation=cv2.INTER_LINEAR_EXACT)

    def fill(self, shape: np.ndarray, name: int, dark: Colour, light: Colour, texture: np.ndarray) -> None:
        """Paint the pixels where `shape` (uint8 (H, W)) is 255; colours go from `dark` (texture 0) to `light` (255)."""
        ramp = (np.asarray(dark) + _STEPS * np.subtract(light, dark)).astype(np.uint8)
        # Most objects are small: painting only inside their box halves the time of a scene.
        x, y, across, down = cv2.boundingRect(shape)
        box = slice(y, y + down), slice(x, x + across)
        cv2.copyTo(cv2.LUT(cv2.merge([texture[box]] * 3), ramp), shape[box], self.image[box])
        self.label[box][shape[box] > 0] = name

    def polygon(self, points: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
        """A mask for `fill`: the polygon through (x, y) points. No horizontal line may cross it more than twice."""
        shape = np.zeros((self.height, self.width), np.uint8)
        # fillPoly would take any polygon, but does not fill the same pixels in OpenCV 4 and 5.
        return cv2.fillConvexPoly(shape, np.rint(points).astype(np.int32), 255)

    def vary(self, colour: Colour, by: float = 18) -> np.ndarray:
        """A random colour near `colour`, float (3,)."""
        return np.clip(np.asarray(colour) + self.rng.uniform(-by, by, 3), 0, 255)


def _landscape(scene: Scene, horizon: int) -> None:
    """Sky, mountains, grass down to the lower edge, a lake and a road on it."""
    height, width, rng = scene.height, scene.width, scene.rng
    everywhere = np.full((height, width), 255, np.uint8)
    clouds = _blend(scene.noise(20, 45), scene.fine, 0.125)
    scene.fill(everywhere, SKY, scene.vary((225, 160, 105)), scene.vary((245, 235, 225), 10), clouds)

    slopes, ridge = np.zeros_like(everywhere), horizon - rng.uniform(0.03, 0.2, 9) * height
    for k in range(8):
        left, right = k * width / 8, (k + 1) * width / 8
        slopes |= scene.polygon([(left, horizon), (left, ridge[k]), (right, ridge[k + 1]), (right, horizon)])
    scene.fill(slopes, MOUNTAIN, scene.vary((95, 70, 75)), scene.vary((150, 125, 130)), scene.blotches)

    everywhere[:horizon] = 0
    scene.fill(everywhere, GRASS, scene.vary((25, 85, 45)), scene.vary((85, 185, 130)), scene.blotches)

    # The lake is on one side and the road on the other, with grass between and around them.
    left = rng.random() < 0.5
    middle = rng.uniform(0.42, 0.58)
    ripples = _blend(scene.noise(2, 14), scene.fine, 0.25)
    lake = _lake(scene, horizon, (0, middle - 0.06) if left else (middle + 0.06, 1))
    scene.fill(lake, WATER, scene.vary((115, 70, 25)), scene.vary((205, 165, 110)), ripples)
    _road(scene, horizon, (middle + 0.1, 1) if left else (0, middle - 0.1))


def _lake(scene: Scene, horizon: int, span: tuple[float, float]) -> np.ndarray:
    """A mask of a smooth blob within `span`, which is given as two fractions of the width."""
    rng = scene.rng
    turn = np.arange(24) * (2 * np.pi / 24)
    wave = 1 + 0.1 * np.sin(2 * turn + rng.uniform(0, 6)) + 0.04 * np.sin(3 * turn + rng.uniform(0, 6))
    x = np.array((span[0] + span[1]) / 2 + rng.uniform(-0.05, 0.05)) * scene.width
    y = horizon + rng.uniform(0.5, 0.62) * (scene.height - horizon)
    across = rng.uniform(0.48, 0.62) * (span[1] - span[0]) * scene.width
    down = rng.uniform(0.29, 0.36) * (scene.height - horizon)
    return scene.polygon(np.stack([x + across * wave * np.cos(turn), y + down * wave * np.sin(turn)], axis=1))


def _road(scene: Scene, horizon: int, span: tuple[float, float]) -> None:
    """A road from the lower edge to the horizon, with a dashed line along its middle."""
    rng, width, height = scene.rng, scene.width, scene.height
    near = rng.uniform(span[0] + 0.15, span[1] - 0.15) * width
    far = rng.uniform(span[0] + 0.1, span[1] - 0.1) * width
    half_near, half_far = rng.uniform(0.19, 0.25) * width, rng.uniform(0.04, 0.08) * width
    left_edge = [(near - half_near, height), (far - half_far, horizon)]
    shape = scene.polygon([*left_edge, (far + half_far, horizon), (near + half_near, height)])
    scene.fill(shape, ROAD, scene.vary((70, 70, 72), 10), scene.vary((125, 122, 120), 10), scene.fine)
    for tenth in range(0, 10, 2):
        ends = (tenth / 10, tenth / 10 + 0.08)  # from the horizon, 0, to the lower edge, 1
        dash = [_pixel(far + (near - far) * t, horizon + (height - horizon) * t) for t in ends]
        cv2.line(scene.image, dash[0], dash[1], (205, 225, 225), max(1, round(scene.unit * (1 + tenth / 5))))


def _house(scene: Scene, horizon: int) -> None:
    """A house at the horizon: wall, roof, windows and door; all of them belong to the class house."""
    rng, unit = scene.rng, scene.unit
    wide, high = rng.uniform(24, 42) * unit, rng.uniform(16, 26) * unit
    x, y = rng.uniform(0, scene.width - wide), horizon + rng.uniform(2, 9) * unit
    eaves = y - high
    wall = scene.polygon([(x, y), (x, eaves), (x + wide, eaves), (x + wide, y)])
    shade = scene.vary((150, 180, 205), 35)
    scene.fill(wall, HOUSE, shade * 0.8, shade, scene.fine)
    roof = scene.polygon([(x - 3 * unit, eaves), (x + wide / 2, eaves - wide / 2), (x + wide + 3 * unit, eaves)])
    shade = scene.vary((45, 55, 135), 25)
    scene.fill(roof, HOUSE, shade * 0.7, shade, scene.fine)
    for left, right, top, bottom, colour in (
        (0.15, 0.35, 0.75, 0.45, (110, 80, 60)),
        (0.65, 0.85, 0.75, 0.45, (110, 80, 60)),
        (0.42, 0.57, 0.5, 0, (40, 60, 90)),
    ):
        corners = _pixel(x + left * wide, y - top * high), _pixel(x + right * wide, y - bottom * high)
        cv2.rectangle(scene.image, *corners, colour, -1)
    _outline(scene, wall | roof)


def _tree(scene: Scene, horizon: int) -> None:
    """A tree that stands on grass: trunk and a crown of three blobs."""
    rng = scene.rng
    foot = _spot(scene, GRASS, 4 * scene.unit, bottom=0.75)
    if foot is None:
        return
    x, y = foot
    size = rng.uniform(9, 16) * scene.unit * (0.7 + 0.6 * (y - horizon) / (scene.height - horizon))
    trunk = scene.polygon(
        [(x + dx * size, y - dy * size) for dx, dy in ((-0.16, 0), (-0.12, 1.5), (0.12, 1.5), (0.16, 0))]
    )
    scene.fill(trunk, TREE, (20, 40, 60), (50, 80, 110), scene.fine)
    crown = np.zeros_like(trunk)
    for dx, dy in ((-0.5, 1.5), (0.5, 1.5), (0, 2.1)):
        cv2.circle(crown, _pixel(x + dx * size, y - dy * size), round(size * rng.uniform(0.65, 0.85)), 255, -1)
    scene.fill(crown, TREE, scene.vary((10, 35, 10), 8), scene.vary((50, 125, 60), 15), scene.blotches)
    _outline(scene, trunk | crown)


def _put(scene: Scene, ground: int, name: int, room: float, draw: Callable[[Scene, float, float, int], None]) -> None:
    """Draw an object of class `name` at a place with only `ground` within `room` units, if there is such a place."""
    spot = _spot(scene, ground, room * scene.unit)
    if spot is not None:
        draw(scene, *spot, name)


def _spot(scene: Scene, ground: int, room: float, bottom: float = 1.0) -> tuple[int, int] | None:
    """A random (x, y) with only class `ground` in the square of half side `room` [pixels] around it, or None."""
    side = 2 * int(np.ceil(room)) + 1
    # Erosion by the square leaves the centres of all squares that fit, so that one draw is enough.
    free = (scene.label[: int(scene.height * bottom)] == ground).astype(np.uint8)
    free = cv2.erode(free, np.ones((side, side), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=(0,))
    places = np.flatnonzero(free)
    if not places.size:
        return None
    y, x = divmod(int(places[scene.rng.integers(places.size)]), scene.width)
    return x, y


def _car(scene: Scene, x: float, y: float, name: int) -> None:
    """A car seen from the side: body, cabin, window, two wheels."""
    unit = scene.unit * scene.rng.uniform(1.15, 1.4)
    outline = [(-11, 4), (-11, -2), (-6, -3), (-3, -8), (5, -8), (8, -3), (11, -2), (11, 4)]
    if scene.rng.random() < 0.5:
        outline = [(-dx, dy) for dx, dy in outline]
    body = scene.polygon([(x + dx * unit, y + dy * unit) for dx, dy in outline])
    paint = np.array([(40, 40, 200), (190, 90, 30), (225, 225, 225), (30, 170, 220)][scene.rng.integers(4)])
    scene.fill(body, name, paint * 0.75, paint, scene.fine)
    cv2.rectangle(scene.image, _pixel(x - 3 * unit, y - 7 * unit), _pixel(x + 4 * unit, y - 4 * unit), (95, 75, 55), -1)
    for dx in (-6, 6):
        centre = _pixel(x + dx * unit, y + 4 * unit)
        for canvas, value in ((scene.image, (25, 25, 25)), (scene.label, (name,)), (body, (255,))):
            cv2.circle(canvas, centre, round(2.6 * unit), value, -1)
    _outline(scene, body)


def _boat(scene: Scene, x: float, y: float, name: int) -> None:
    """A sailing boat: hull and sail."""
    unit = scene.unit * scene.rng.uniform(1.15, 1.4)
    side = 1 if scene.rng.random() < 0.5 else -1
    hull = scene.polygon([(x + dx * unit, y + dy * unit) for dx, dy in ((-11, 3), (11, 3), (8, 9), (-8, 9))])
    sail = scene.polygon([(x + side * dx * unit, y + dy * unit) for dx, dy in ((-2, -11), (-2, 3), (9, 3))])
    shade = scene.vary((30, 50, 110), 30)
    scene.fill(hull, name, shade * 0.75, shade, scene.fine)
    scene.fill(sail, name, (205, 215, 215), (245, 250, 250), scene.fine)
    _outline(scene, hull | sail)


def _ball(scene: Scene, x: float, y: float, name: int) -> None:
    """A round object with a stripe: a ball on grass, a buoy on water."""
    radius = max(5, round(scene.unit * scene.rng.uniform(7.5, 10.5)))
    disc = cv2.circle(np.zeros_like(scene.label), _pixel(x, y), radius, 255, -1)
    paint = np.array([(30, 60, 225), (20, 150, 245), (60, 215, 240)][scene.rng.integers(3)])
    scene.fill(disc, name, paint * 0.8, paint, scene.fine)
    angle = scene.rng.uniform(0, np.pi)
    dx, dy = radius * np.cos(angle), radius * np.sin(angle)
    ends = _pixel(x - dx, y - dy), _pixel(x + dx, y + dy)
    stripe = cv2.line(np.zeros_like(disc), *ends, 255, max(2, round(radius / 2)))
    scene.fill(cv2.bitwise_and(stripe, disc), name, (215, 220, 220), (250, 250, 250), scene.fine)
    cv2.circle(scene.image, _pixel(x - 0.4 * radius, y - 0.4 * radius), max(1, radius // 5), (255, 255, 255), -1)
    _outline(scene, disc)


def _box(scene: Scene, x: float, y: float, name: int) -> None:
    """A box with slats: a bale on grass, a crate on the road."""
    wide, high = (max(5.0, scene.unit * scene.rng.uniform(7, 9.5)) for _ in range(2))
    box = cv2.rectangle(np.zeros_like(scene.label), _pixel(x - wide, y - high), _pixel(x + wide, y + high), 255, -1)
    straw = scene.vary((70, 160, 205), 20)
    scene.fill(box, name, straw * 0.75, straw, scene.fine)
    for share in (-0.35, 0.35):
        ends = _pixel(x - wide, y + share * high), _pixel(x + wide, y + share * high)
        cv2.line(scene.image, *ends, [float(value) for value in straw * 0.5], max(1, round(scene.unit)))
    _outline(scene, box)


def _outline(scene: Scene, shape: np.ndarray) -> None:
    """Ignore the outline of the object, one pixel wide: these pixels belong to the object and to its surroundings."""
    contours, _ = cv2.findContours(shape, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(scene.label, contours, -1, (IGNORED,), 1)


def _light(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Daylight and camera: a gradient of light, a gain for each colour, blur and the noise of the sensor."""
    height, width = image.shape[:2]
    corners = rng.integers(95, 150, (2, 2)).astype(np.uint8)
    light = cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
    image = cv2.multiply(image, cv2.merge([light] * 3), scale=1 / 128)
    gains = rng.uniform(0.75, 1.15) * rng.uniform(0.92, 1.08, 3)
    tones = np.minimum(np.arange(256)[:, None] * gains + rng.uniform(-8, 12), 255)
    image = cv2.LUT(image, np.maximum(tones, 0).astype(np.uint8).reshape(1, 256, 3))
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (3, 3), 0)
    grain = np.frombuffer(rng.bytes(image.size), np.uint8).reshape(image.shape)
    strength = int(rng.integers(2, 12)) / 128
    return cv2.addWeighted(image, 1, grain, strength, -128 * strength)


def _blend(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """`share` of the second image and the rest of the first."""
    # Fractions of n/128, here and for the grain: their float32 sums are exact, and equal on every processor.
    return cv2.addWeighted(first, 1 - share, second, share, 0)


def _pixel(x: float, y: float) -> tuple[int, int]:
    return round(x), round(y)

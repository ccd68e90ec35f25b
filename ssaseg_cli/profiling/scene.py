"""The image that is measured on: a file of the user, or a drawn scene, and what the network gets of it."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from ssaseg.cli.engine.opening import Opened
from ssaseg.cli.errors import CommandError
from ssaseg.cli.scoring.inference import require_size
from ssaseg.datasets.bands.reading import read_bands
from ssaseg.datasets.base import Levels
from ssaseg.datasets.colour import normalize, to_planes
from ssaseg.datasets.synthetic import render
from ssaseg.datasets.transforms import test_image
from ssaseg.files.text import printable
from ssaseg.recipes import Test, parse_protocol

SUFFIXES = {1: ".png", 3: ".jpg", 4: ".png"}  # of a scene, by its channels; for others there is no usual format
QUALITY = 95  # of the JPEG file
SMALLEST = 64  # shortest side of a scene that can be drawn [pixels]


@dataclass(frozen=True)
class Picture:
    """An image uint8 (H,W,C), BGR first, and where it was read. `folder`: where results may be written."""

    image: np.ndarray
    path: Path | None  # None: there is no file of such an image
    levels: Levels | None  # of 16-bit images
    protocol: Test  # what one pass takes of it
    what: str  # for people
    folder: Path

    def read(self) -> np.ndarray:
        """Reads the file, if there is one."""
        return self.image if self.path is None else read_bands(self.path, self.image.shape[2], levels=self.levels)

    def prepare(
        self, image: np.ndarray, metadata: Mapping[str, Any], device: torch.device, takes: str = "normalized"
    ) -> Tensor:
        """Pixels (1,C,h,w) on the device, of an image uint8 (H,W,C). takes: see `Engine`. DataError if too small."""
        resized = test_image(image, self.protocol.scale, self.protocol.multiple)
        require_size([resized], str(self.path or "image"))
        given = torch.from_numpy(resized).unsqueeze(0).to(device)
        return to_planes(given).byte() if takes == "rgb" else normalize(given, metadata["mean"], metadata["std"])


@contextmanager
def picture_of(opened: Opened, file: Path | None, size: tuple[int, int]) -> Iterator[Picture]:
    """`file`, prepared as the protocol of the network says, or a scene of `size` (height, width), which is not resized.

    Of a protocol with windows, scales or mirroring, one pass over the whole image is taken. Raises what reading raises.
    """
    metadata = opened.metadata
    levels = metadata.get("range") and tuple(metadata["range"])
    channels = len(metadata["mean"])
    with tempfile.TemporaryDirectory(prefix="ssaseg-") as name:
        folder = Path(name)
        if file is not None:
            protocol = parse_protocol(metadata["protocol"], f"{opened.path}: protocol")
            single = Test(scale=protocol.scale, multiple=protocol.multiple)
            image = read_bands(file, channels, levels=levels)
            what = f"{printable(str(file))}, {image.shape[1]}x{image.shape[0]} pixels (width x height)"
            if single != protocol:
                what += "; the protocol has windows, scales or mirroring: one pass over the whole image is measured"
            yield Picture(image, file, levels, single, what, folder)
            return
        image = drawn(size, channels)
        suffix = SUFFIXES.get(channels)
        path = None if suffix is None else folder / f"scene{suffix}"
        what = f"a drawn scene of {size[1]}x{size[0]} pixels (width x height)"
        if path is None:
            what += f", not read from a file: give --image a file of {channels} bands"
        else:
            options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY] if suffix == ".jpg" else []
            path.write_bytes(cv2.imencode(path.suffix, image, options)[1].tobytes())
            what += f", a JPEG file of quality {QUALITY}" if suffix == ".jpg" else ", a PNG file"
        yield Picture(image, path, None, Test(), what, folder)


def drawn(size: tuple[int, int], channels: int) -> np.ndarray:
    """A scene BGR uint8 (H,W,channels), always the same; channels beyond three are copies of the first three."""
    height, width = (max(side, SMALLEST) for side in size)
    try:
        image = render(height, width, np.random.default_rng(0))[0][: size[0], : size[1]]
    except (MemoryError, cv2.error):
        raise CommandError(
            f"--size {size[0]} {size[1]}: not enough memory to draw an image\nuse a smaller --size"
        ) from None
    return np.ascontiguousarray(image[..., [channel % 3 for channel in range(channels)]])

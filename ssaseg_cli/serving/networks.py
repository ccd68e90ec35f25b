"""Networks that label images in memory, by the code of `ssaseg predict`, and the forms of an answer.

Axes: H×W pixels of an image, h×w pixels of its view on the page, K classes.
"""

import gzip
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import torch

from ssaseg.cli.engine.opening import Opened, make_engine, own_inference
from ssaseg.cli.prediction.labelling import free_gpu
from ssaseg.cli.prediction.skipping import lacks_memory, skip_reason
from ssaseg.cli.results.kinds import Style, encode_indices, style_of
from ssaseg.cli.scoring.inference import Inference, Prediction, state_views
from ssaseg.cli.scoring.trained_size import LARGER, times_larger, trained_scale
from ssaseg.datasets import default_palette
from ssaseg.datasets.bands.reading import read_bands, shown
from ssaseg.datasets.base import Levels
from ssaseg.datasets.decoding.formats import format_of
from ssaseg.files.text import printable

NAME = Path("image")  # of what is sent, in messages
VIEW = 1600  # longest side of what the page gets [pixels]
QUALITY = 90  # of the page's JPEG
KINDS = ("adapted", "coarse")  # of labels: the result, and that of before the classifier adapts


class Unusable(Exception):
    """What was sent cannot be labelled; its text is the reason."""

    def __init__(self, reason: str, known: bool) -> None:
        super().__init__(reason)
        self.known = known  # whether it starts as an image of a known format does


@dataclass(frozen=True)
class Network:
    """An open checkpoint, with all that labels an image."""

    name: str
    inference: Inference
    style: Style
    levels: Levels | None  # of 16-bit images, see `read_bands`
    what: str  # network and classifier, for people
    trained: tuple[int, int] | None = None  # see `trained_scale`

    @classmethod
    def of(
        cls, opened: Opened, device: torch.device, name: str, changes: Mapping[str, Any] = MappingProxyType({})
    ) -> "Network":
        """An opened file on a device; changes: keys of its test protocol to change."""
        found = opened.metadata
        inference = own_inference(opened, make_engine(opened, device), changes)
        style = style_of(found["classes"], found.get("palette") or default_palette(found["classes"]))
        levels = tuple(found["range"]) if found.get("range") else None
        what = f"{found['model']}, {found['classifier']}"
        return cls(name, inference, style, levels, what, trained_scale(found))

    @property
    def adapts(self) -> bool:
        """Whether it has labels from before the classifier adapts."""
        return self.inference.engine.has_coarse

    def facts(self, number: int) -> dict[str, Any]:
        """For clients: what it is, and its classes."""
        colours = self.style.colours.tolist()
        engine = self.inference.engine
        return {
            "number": number,
            "name": printable(self.name),
            "network": self.what,
            "computed_by": f"{engine.what} on {engine.device}",
            "protocol": state_views(self.inference.protocol, engine.gives_scores),
            "adapts": self.adapts,
            "classes": [
                {"id": index, "name": printable(name), "color": colours[index]}
                for index, name in enumerate(self.style.classes)
            ],
        }

    def note(self, size: tuple[int, int]) -> str | None:
        """What a client should know of an image of (height, width): that it is much larger than those in training."""
        if self.trained is None or (times := times_larger(size, self.trained, self.inference.protocol)) <= LARGER:
            return None
        width, height = self.trained
        return (
            f"{times:.1f} times as large as in training ({width}x{height}): labels get worse; "
            f"start the server with --scale {width} {height}"
        )

    def label(
        self, data: bytes, max_pixels: int, coarse: bool = False, confidence: bool = False
    ) -> tuple[np.ndarray, Prediction]:
        """The image BGR uint8 (H,W,3), or of other channels, and its labels, from the content of a file.

        Raises Unusable; FloatingPointError if the network's output is not finite; and CommandError and OSError for what
        would meet other images, too.
        """
        try:
            image = read_bands(NAME, self.inference.engine.channels, max_pixels, self.levels, data)
            inputs = [torch.from_numpy(each) for each in self.inference.inputs(image, str(NAME))]
            wanted = {"coarse": coarse, "confidence": confidence, "coarse_confidence": coarse and confidence}
            made = self.inference.apart().predict_batch([inputs], [image.shape[:2]], [str(NAME)], **wanted)
            return image, made[0]
        except Exception as error:
            reason = str(skip_reason(error, NAME, again="start the server again"))
            if not lacks_memory(error):
                raise Unusable(reason, format_of(data) is not None) from None
        free_gpu(self.inference.device)  # after the error, whose frames hold tensors, is gone
        raise Unusable(reason, known=True)


# ---- answers -----------------------------------------------------------------------------------------------------


def as_png(network: Network, data: bytes, max_pixels: int, kind: str) -> bytes:
    """The same file that `ssaseg predict --save index` writes, or with "coarse" `--save coarse`."""
    coarse = kind == "coarse"
    _, made = network.label(data, max_pixels, coarse)
    return encode_indices(made.coarse if coarse else made.labels, network.style)


def as_json(network: Network, data: bytes, max_pixels: int, kind: str) -> bytes:
    """Size of the image, and the share of each class."""
    coarse = kind == "coarse"
    started = time.perf_counter()
    _, made = network.label(data, max_pixels, coarse)
    labels = made.coarse if coarse else made.labels
    assert labels is not None
    counts = count(labels, len(network.style.classes))
    answer = {
        "checkpoint": printable(network.name),
        "width": labels.shape[1],
        "height": labels.shape[0],
        "labels": kind,
        "seconds": round(time.perf_counter() - started, 3),
        "note": network.note(labels.shape),
        "classes": [
            {"id": index, "name": printable(name), "pixels": pixels, "share": pixels / labels.size}
            for index, (name, pixels) in enumerate(zip(network.style.classes, counts, strict=True))
        ],
    }
    return json.dumps(answer).encode()


def as_view(network: Network, data: bytes, max_pixels: int, kind: str) -> bytes:
    """What the page shows, gzipped: the length of a JSON text (4 bytes, most significant first), the text, and its
    `parts` one after the other: "picture", a JPEG of h×w pixels; "adapted" and "coarse", class numbers uint8 (h,w); and
    for both "..._confidence" uint8 (h,w), 255 for 1.

    Labels of the view are those of the nearest pixels; shares are counted in the whole image.
    """
    started = time.perf_counter()
    image, made = network.label(data, max_pixels, network.adapts, confidence=True)
    height, width = made.labels.shape
    scale = min(VIEW / max(height, width), 1.0)
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    rows, columns = (
        ((np.arange(n) + 0.5) * full / n).astype(int) for n, full in zip(size, (height, width), strict=True)
    )
    picture = shown(image)
    if scale < 1:
        picture = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    parts = {"picture": jpeg.tobytes()}
    shares = {}
    for name, labels, sure in zip(
        KINDS, (made.labels, made.coarse), (made.confidence, made.coarse_confidence), strict=True
    ):
        if labels is None:
            continue
        assert sure is not None
        shares[name] = [pixels / labels.size for pixels in count(labels, len(network.style.classes))]
        parts[name] = labels[rows[:, None], columns].tobytes()
        parts[f"{name}_confidence"] = np.rint(sure[rows[:, None], columns] * 255).astype(np.uint8).tobytes()
    header = {
        "width": width,
        "height": height,
        "view": {"width": size[1], "height": size[0]},
        "shares": shares,
        "seconds": round(time.perf_counter() - started, 3),
        "note": network.note(made.labels.shape),
        "parts": [[name, len(part)] for name, part in parts.items()],
    }
    text = json.dumps(header).encode()
    return gzip.compress(b"".join([len(text).to_bytes(4, "big"), text, *parts.values()]), 1)


def count(labels: np.ndarray, classes: int) -> list[int]:
    """Pixels of each class in labels uint8 (H,W)."""
    counts: list[int] = np.bincount(labels.ravel(), minlength=classes).tolist()
    return counts


def names_of(paths: Sequence[Path]) -> list[str]:
    """The files' names; where two are equal, with their folders."""
    names = [path.name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]

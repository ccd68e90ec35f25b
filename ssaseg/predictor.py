"""`Predictor`: labels of images in Python, by the code of `ssaseg predict`.

Letters: H, W height and width of an image [pixels]; K classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from itertools import chain
from operator import length_hint
from pathlib import Path
from sys import maxsize
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ssaseg.cli.engine.opening import device_for, make_engine, open_file
from ssaseg.cli.errors import CommandError
from ssaseg.cli.scoring.engines import PRECISIONS
from ssaseg.cli.scoring.inference import Inference, state_views
from ssaseg.cli.scoring.lanes import count_lanes, in_order, shared_cores
from ssaseg.datasets import default_palette
from ssaseg.datasets.bands.arrays import array_bands, picture_bands
from ssaseg.datasets.bands.reading import read_bands
from ssaseg.datasets.decoding.images import shown_size
from ssaseg.recipes import parse_protocol

Picture = str | os.PathLike[str] | Image.Image | NDArray[Any]
Labels = NDArray[np.uint8]
OnePicture = TypeVar("OnePicture", bound=Picture)

DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("auto", "torch", "onnxruntime", "openvino")


class Predictor:
    """A trained network and all that decides its labels: classes, preprocessing and test protocol.

    >>> predictor = Predictor("best.safetensors")
    >>> labels = predictor("photo.jpg")  # uint8 (H, W), 0..K-1
    >>> predictor.classes[labels[0, 0]]  # 'road'
    >>> Image.fromarray(predictor.palette[labels]).save("colours.png")

    An image is a file's name, a Pillow image, or a NumPy array with red, green and blue first: uint8 (H, W, 3). Arrays
    may also be grey (H, W), or have alpha as a fourth band, which is dropped; networks with other `data.channels` take
    arrays with as many bands. A file is turned by its EXIF orientation, as `ssaseg predict` does it. Pillow images and
    arrays are not: labels lie on the pixels that were given, so that `PIL.ImageOps.exif_transpose` comes first.

    Several threads may call a predictor at the same time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "auto",
        *,
        precision: str = "float32",
        backend: str = "auto",
        exact: bool = False,
        classes: str | None = None,
        protocol: str | None = None,
    ) -> None:
        """Reads a file that `ssaseg predict` takes.

        Args:
            path: the file.
            device: "auto" (a GPU if there is one, else the CPU), "cpu" or "cuda".
            precision: "float32", "bf16" or "fp16": what the network computes in.
            backend: what runs the file, as `--backend` of `ssaseg predict`; "auto": PyTorch, or the runtime of a graph.
            exact: the arithmetic of training's evaluation, bit for bit, as `--exact` of `ssaseg predict`.
            classes, protocol: what the file does not say itself, as `--classes` and `--protocol` of `ssaseg predict`.

        Raises:
            OSError: the file does not exist or cannot be read.
            ValueError: it holds no network that labels images, or the other arguments do not fit this machine.
        """
        given = (("device", device, DEVICES), ("precision", precision, PRECISIONS), ("backend", backend, BACKENDS))
        for name, value, known in given:
            if value not in known:
                raise ValueError(f"{name} is {value!r}\nexpected {', '.join(known)}")
        try:
            opened = open_file(Path(path), classes, protocol)
            engine = make_engine(opened, device_for(opened, device), precision, backend, exact)
        except CommandError as error:  # which is for the command line
            raise ValueError(str(error)) from None
        found = opened.metadata
        rules = parse_protocol(found["protocol"], f"{path}: protocol")
        self._inference = Inference(engine, rules, found["mean"], found["std"])
        self._levels = tuple(found["range"]) if found.get("range") else None
        self._exact = exact
        self.path = Path(path)
        self.classes: tuple[str, ...] = tuple(found["classes"])
        # RGB, uint8 (K, 3): `palette[labels]` is a picture.
        self.palette: Labels = np.array(found.get("palette") or default_palette(self.classes), np.uint8)
        # Keys and values of a recipe's section `test`.
        self.protocol: dict[str, Any] = rules.model_dump(mode="json")

    def __repr__(self) -> str:
        engine = self._inference.engine
        how = f"{engine.what} on {engine.device}, {state_views(self._inference.protocol, engine.gives_scores)}"
        return f"<Predictor {self.path.name}: {len(self.classes)} classes, {how}>"

    @overload
    def __call__(self, image: Picture) -> Labels: ...

    @overload
    def __call__(self, image: list[OnePicture] | tuple[OnePicture, ...]) -> list[Labels]: ...

    def __call__(self, image: Picture | list[Any] | tuple[Any, ...]) -> Labels | list[Labels]:
        """Labels of an image, uint8 (H, W), 0..K-1; of a list of images, which may differ in size, a list of labels.

        Raises:
            OSError: a file does not exist or cannot be read.
            TypeError: neither a name, nor a Pillow image, nor an array.
            ValueError: an image that is damaged, or not of the size, bands or values that the network takes. Its first
                line names the file, or the image by its number in the list.
            FloatingPointError: the network's output is not finite.
        """
        return list(self.stream(image)) if isinstance(image, list | tuple) else self._label(image, "image")

    def stream(self, images: Iterable[Picture], *, threads: int | None = None) -> Iterator[Labels]:
        """Labels of each image, in order, from any number of images, with those of a few of them in memory.

        Many images are labelled side by side, each by its share of the cores, for which some are taken ahead. Labels
        can then differ from those of single calls in single pixels, by rounding; with `exact` they are equal.

        Args:
            images: any iterable; `images` and labels of a generator's frames stay in step.
            threads: images that are labelled side by side; 1: one after the other, and none is taken ahead, as for a
                camera; None: chosen by the number of cores, of images and of pixels.

        Raises:
            TypeError: `images` is a single image. What a call raises for an image is raised when it is its turn, and
                ends the stream.
        """
        if isinstance(images, str | os.PathLike | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
            raise TypeError(f"images is {_described(images)}\nexpected several images, such as a list or a generator")
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}\nexpected 1 or more")
        return self._stream(iter(images), length_hint(images, maxsize), threads)

    def _stream(self, images: Iterator[Picture], count: int, threads: int | None) -> Iterator[Labels]:
        for first in images:  # once: the others are taken below
            lanes = threads or self._count_lanes(first, count)
            numbered = enumerate(chain([first], images))
            if lanes == 1:
                for index, image in numbered:
                    yield self._label(image, f"image {index}")
                return
            with (
                shared_cores(lanes) if self._inference.device.type == "cpu" else nullcontext() as begin,
                closing(in_order(self._label_numbered, numbered, lanes, first=begin)) as made,
            ):
                yield from made

    def _count_lanes(self, first: Picture, count: int) -> int:
        """How many images to label side by side; 1 where other threads would round otherwise."""
        if self._inference.device.type != "cpu":
            return 2  # the next one is read meanwhile
        if self._exact:
            return 1
        size = _size_of(first)
        return count_lanes(count, self._inference.input_pixels(size) if size and all(size) else 0)

    def _label_numbered(self, numbered: tuple[int, Picture]) -> Labels:
        return self._label(numbered[1], f"image {numbered[0]}")

    def _label(self, image: Picture, name: str) -> Labels:
        if isinstance(image, str | os.PathLike):
            name = os.fspath(image)
        pixels = self._pixels(image, name)
        inputs = [torch.from_numpy(each) for each in self._inference.inputs(pixels, name)]
        return self._inference.apart().predict(inputs, pixels.shape[:2], coarse=False, name=name).labels

    def _pixels(self, image: Picture, name: str) -> np.ndarray:
        """The image as the network takes it: BGR uint8 (H, W, 3), or of other channels."""
        channels = self._inference.engine.channels
        if isinstance(image, str | os.PathLike):
            return read_bands(Path(image), channels, levels=self._levels)
        if isinstance(image, Image.Image):
            return picture_bands(image, channels, self._levels, name)
        if isinstance(image, np.ndarray):
            return array_bands(image, channels, self._levels, name)
        raise TypeError(f"{name} is {_described(image)}\nexpected a file's name, a Pillow image or a NumPy array")


def _size_of(image: Picture) -> tuple[int, int] | None:
    """Height and width [pixels]; None: not known."""
    if isinstance(image, str | os.PathLike):
        return shown_size(Path(image))
    if isinstance(image, np.ndarray):
        return (image.shape[0], image.shape[1]) if image.ndim > 1 else None
    return (image.height, image.width) if isinstance(image, Image.Image) else None


def _described(value: object) -> str:
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    return f"a {kind.__qualname__}" if package == "builtins" else f"a {package}.{kind.__qualname__}"

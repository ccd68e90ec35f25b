"""COCO-format annotations as semantic labels: polygons and run lengths, painted onto one label map an image.

A pixel that several annotations claim goes to the topmost. Within a file the smaller lies on the larger (by the pixels
it covers; of equal ones the later in the file), and crowds lie below all others. Of several files the later lies on
the earlier: `[stuff.json, instances.json]` puts things on stuff. Pixels without annotation are ignored, or belong to
the class that `background` names; so do those whose topmost annotation has a category that `classes` leaves out.

Letters: H, W height and width [pixels].
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ssaseg.datasets.annotations import Region, read_annotations, region_runs
from ssaseg.datasets.base import IGNORED, DataError, Palette, default_palette
from ssaseg.datasets.decoding import read_image
from ssaseg.datasets.pairs import some

Pair = tuple[np.ndarray, np.ndarray]  # image, label


class CocoDataset:
    """Images whose labels COCO-format files describe; `annotations` are the files, painted in this order.

    Classes are the files' categories in the order of their ids, or those that `classes` names, in its order;
    categories of one name are one class. `background` is the class of pixels without annotation: one of `classes`, or
    where these come from the files one more, in front of them. Images are those of all files, sorted by name. Labels
    are painted when they are asked for; what is held is the regions as the files have them. `cache` keeps every
    decoded pair in memory, as read-only arrays.

    Raises DataError for files that are cut off or hold no annotations, for missing keys and images, and for categories
    that nobody declares; `load` raises it for regions that cannot be painted and for images of another size.
    """

    def __init__(
        self,
        images: Path,
        annotations: Sequence[Path],
        classes: Sequence[str] = (),
        palette: Sequence[Sequence[int]] | None = None,
        background: str | None = None,
        cache: bool = False,
    ) -> None:
        self.annotation_files = tuple(annotations)
        categories: list[tuple[int, str]] = []
        sizes: dict[str, tuple[int, int]] = {}
        layers: dict[str, list[bytes]] = {}
        nothing = pickle.dumps([])
        for number, file in enumerate(self.annotation_files):
            content = read_annotations(file)
            categories += content.categories.items()
            for name, regions in content.regions.items():
                if sizes.setdefault(name, content.sizes[name]) != content.sizes[name]:
                    raise _two_sizes(file, name, content.sizes[name], sizes[name])
                # Packed: as objects, regions take many times the room, and every worker would come to copy them.
                layers.setdefault(name, [nothing] * len(annotations))[number] = pickle.dumps(regions)
        self.classes, self.palette = _classes(self.annotation_files, categories, classes, palette, background)
        self._rest = IGNORED if background is None else self.classes.index(background)
        self.valid_raw = np.isin(np.arange(256), [*range(len(self.classes)), IGNORED])
        self.label_lut = np.where(self.valid_raw, np.arange(256), IGNORED).astype(np.uint8)

        files = sorted(layers)
        self.image_files = [Path(images) / file for file in files]
        _require_images(self.image_files, self.annotation_files)
        self._names = [PurePosixPath(file).with_suffix("").as_posix() for file in files]
        self._sizes = np.array([sizes[file] for file in files])
        packed = [b"".join(layers[file]) for file in files]
        self._ends = np.cumsum([0, *map(len, packed)])
        self._packed = b"".join(packed)
        self._cache: dict[int, Pair] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.image_files)

    def name(self, index: int) -> str:
        """Path below the image folder, with / and without suffix."""
        return self._names[index]

    def load(self, index: int) -> Pair:
        """Image BGR uint8 (H, W, 3) and train ids uint8 (H, W). Raises DataError or OSError."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        image, label = self.load_image(index), self.load_label(index)
        if image.shape[:2] != label.shape:
            raise self._size_error(index, image.shape)
        if self._cache is not None:
            image.flags.writeable = label.flags.writeable = False
            self._cache[index] = image, label
        return image, label

    def load_raw(self, index: int) -> Pair:
        """As `load`: labels are painted as train ids."""
        return self.load(index)

    def load_image(self, index: int) -> np.ndarray:
        """The image alone, BGR uint8 (H, W, 3). Raises DataError or OSError."""
        return read_image(self.image_files[index])

    def load_label(self, index: int) -> np.ndarray:
        """The label alone, uint8 (H, W), of the size that the annotation file states. Raises DataError."""
        height, width = map(int, self._sizes[index])
        ids = {name: train_id for train_id, name in enumerate(self.classes)}
        label = np.full(width * height, self._rest, np.uint8)  # one column after the other, as run lengths go
        stream = io.BytesIO(self._packed[self._ends[index] : self._ends[index + 1]])
        for file in self.annotation_files:
            regions: list[Region] = pickle.load(stream)
            runs = [region_runs(file, region, height, width) for region in regions]
            areas = [int(lengths[1::2].sum()) for lengths in runs]
            for at in sorted(range(len(regions)), key=lambda at: (not regions[at].crowd, -areas[at], at)):
                train_id = ids.get(regions[at].category, self._rest)
                ends = np.cumsum(runs[at]).tolist()
                for first, end in zip(ends[::2], ends[1::2], strict=False):
                    label[first:end] = train_id
        return np.ascontiguousarray(label.reshape(width, height).T)

    def preload(self) -> None:
        """Fill the cache, if there is one. Processes forked afterwards share its pages, as nobody writes the arrays."""
        for index in range(len(self) if self._cache is not None else 0):
            self.load(index)

    def label_error(self, index: int) -> DataError:
        """Never needed: only the classes' ids are painted."""
        expected = f"ids 0..{len(self.classes) - 1} or {IGNORED}"
        return DataError(f"{self.image_files[index]}: an id that no class has\nexpected {expected}")

    def _size_error(self, index: int, image: Sequence[int]) -> DataError:
        height, width = map(int, self._sizes[index])
        mend = "correct width and height, or annotate the image as it is; nothing is resized on reading"
        if (height, width) == (image[1], image[0]):
            mend = "the image's EXIF orientation turns it; annotate it as it is shown, or strip the orientation"
        return DataError(
            f"{self.image_files[index]}: image of {image[1]}x{image[0]} pixels (width x height)\n"
            f"expected {width}x{height}, as {some([str(file) for file in self.annotation_files])} says\n{mend}"
        )


def _two_sizes(file: Path, name: str, size: tuple[int, int], other: tuple[int, int]) -> DataError:
    return DataError(
        f"{file}: {name} has {size[1]}x{size[0]} pixels (width x height), {other[1]}x{other[0]} in another file\n"
        "expected one size an image\ncorrect width and height, or leave one of the files out of data.*.annotations"
    )


def _classes(
    files: Sequence[Path],
    categories: Sequence[tuple[int, str]],
    wanted: Sequence[str],
    palette: Sequence[Sequence[int]] | None,
    background: str | None,
) -> tuple[tuple[str, ...], Palette]:
    """Names and colours of the classes. `categories`: (id, name) of all files. Raises DataError."""
    where = some([str(file) for file in files])
    # By id, and of one name the lowest: a dict keeps the first place.
    known = list(dict.fromkeys(name for _, name in sorted(categories)))
    added = [] if background is None or background in known else [background]
    classes = list(wanted) or [*added, *known]
    unknown = [name for name in classes if name not in known and name != background]
    if unknown:
        raise DataError(
            f"data.classes: {len(unknown)} of {len(classes)} are no categories of {where}: {some(unknown)}\n"
            f"expected some of: {some(known, 8)}\nwrite the names as the file does, or leave data.classes out"
        )
    if background is not None and background not in classes:
        raise DataError(
            f"data.background={background}: no such class\nexpected one of data.classes: {some(classes, 8)}"
        )
    if not 2 <= len(classes) <= 255:
        mend = "set data.background, for the pixels without annotation" if len(classes) == 1 else "set data.classes"
        raise DataError(f"{where}: {len(classes)} classes: {some(classes)}\nexpected 2 to 255\n{mend}")
    if palette:
        return tuple(classes), tuple((red, green, blue) for red, green, blue in palette)
    return tuple(classes), default_palette(len(classes))


def _require_images(images: Sequence[Path], files: Sequence[Path]) -> None:
    """Raise DataError where image files are missing."""
    missing = [image for image in images if not image.is_file()]
    if missing:
        where = some([str(file) for file in files])
        raise DataError(
            f"{where}: {len(missing)} of {len(images)} images are missing: {some([image.name for image in missing])}\n"
            f"expected {missing[0]} for the first\ncorrect the folder of images in the recipe, or add the images"
        )

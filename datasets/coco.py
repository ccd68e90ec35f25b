"""COCO-format annotations as semantic labels: polygons and run lengths, painted onto one label map for each image.

Where annotations overlap, the pixel belongs to the top one. Within a file, an annotation of fewer pixels lies on top of
one of more pixels (if equal, the later one in the file is on top), and crowds lie below all others. Of several files,
the later one lies on top: `[stuff.json, instances.json]` paints things over stuff. Pixels without annotation are
ignored, or belong to the class `background`; so do pixels whose top annotation has a category that is not in `classes`.

Letters: H, W height and width [pixels].
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ssaseg.datasets.annotations import Region, read_annotations, region_runs
from ssaseg.datasets.bands.reading import read_bands
from ssaseg.datasets.base import IGNORED, DataError, Levels, PairFacts, Palette, default_palette, file_sizes
from ssaseg.datasets.inspection import inspect_loaded
from ssaseg.datasets.pairs import first_names, read_names

UNCOVERED = 0.01  # share of pixels in no region that may be ignored without a warning
MOST_RUNS = 2**26  # run lengths of all regions of an image: 0.5 GB

Pair = tuple[np.ndarray, np.ndarray]  # image, label


class CocoDataset:
    """Images with labels from COCO-format files; `annotations` are the files, painted in this order.

    Classes are the categories of the files in the order of their ids, or the names in `classes`, in their order;
    categories of the same name are one class. `background` is the class of pixels without annotation: one of `classes`,
    or, without `classes`, one more class before those of the files. Images are those of all files, sorted by name.
    `names` is a file that lists the images to use, one name a line, with or without suffix; without it all are used.
    Labels are painted when they are requested; memory holds the regions as the files have them. `cache` keeps every
    decoded pair in memory, as read-only arrays. `channels`: of the images, in place of 3, and `levels`: see
    `bands.reading`.

    Raises DataError for files that are cut off or hold no annotations, for missing keys and images, and for category
    ids that the file does not declare. `load` raises it for regions that cannot be painted and for images whose size
    differs from the file's.
    """

    mask_files: Sequence[Path] = ()
    incomplete: Sequence[DataError] = ()
    unused_masks: Sequence[Path] = ()
    zero_ignored = None  # labels are painted as train ids
    fix = "check data.classes and data.background"

    def __init__(
        self,
        images: Path,
        annotations: Sequence[Path],
        classes: Sequence[str] = (),
        palette: Sequence[Sequence[int]] | None = None,
        background: str | None = None,
        cache: bool = False,
        names: Path | None = None,
        channels: int = 3,
        levels: Levels | None = None,
    ) -> None:
        self.channels, self.levels = channels, levels
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
                # Pickled: as objects, regions take many times the memory, and every worker would copy them in time.
                layers.setdefault(name, [nothing] * len(annotations))[number] = _packed(file, regions)
        self.classes, self.palette = _classes(self.annotation_files, categories, classes, palette, background)
        self._rest = IGNORED if background is None else self.classes.index(background)
        self.valid_raw = np.isin(np.arange(256), [*range(len(self.classes)), IGNORED])
        self.label_lut = np.where(self.valid_raw, np.arange(256), IGNORED).astype(np.uint8)

        files = sorted(layers) if names is None else _listed(sorted(layers), names, self.annotation_files)
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
        """The same as `load`: labels are painted as train ids."""
        return self.load(index)

    def load_image(self, index: int) -> np.ndarray:
        """The image alone, BGR uint8 (H, W, 3). Raises DataError or OSError."""
        return read_bands(self.image_files[index], self.channels, levels=self.levels)

    def load_label(self, index: int) -> np.ndarray:
        """The label alone, uint8 (H, W), of the size that the annotation file states. Raises DataError."""
        height, width = map(int, self._sizes[index])
        ids = {name: train_id for train_id, name in enumerate(self.classes)}
        label = np.full(width * height, self._rest, np.uint8)  # column after column, as in run lengths
        stream = io.BytesIO(self._packed[self._ends[index] : self._ends[index + 1]])
        for file in self.annotation_files:
            regions: list[Region] = pickle.load(stream)
            runs = self._runs(index, file, regions)
            areas = [int(lengths[1::2].sum()) for lengths in runs]
            for at in sorted(range(len(regions)), key=lambda at: (not regions[at].crowd, -areas[at], at)):
                train_id = ids.get(regions[at].category, self._rest)
                ends = np.cumsum(runs[at]).tolist()
                for first, end in zip(ends[::2], ends[1::2], strict=False):
                    label[first:end] = train_id
        return np.ascontiguousarray(label.reshape(width, height).T)

    def _runs(self, index: int, file: Path, regions: Sequence[Region]) -> list[np.ndarray]:
        """`region_runs` of an image's regions. Raises DataError where they are together too large for memory."""
        height, width = map(int, self._sizes[index])
        runs, left = [], MOST_RUNS
        for region in regions:
            runs.append(region_runs(file, region, height, width))
            left -= len(runs[-1])
            if left < 0:
                raise DataError(
                    f"{file}: {self._names[index]}: its annotations have more than {MOST_RUNS:,} run lengths\n"
                    "expected the annotations of one image\nsplit the image, or simplify the annotations"
                )
        return runs

    def preload(self) -> None:
        """Fill the cache, if there is one. Processes that are forked later use the same memory: it is only read."""
        for index in range(len(self) if self._cache is not None else 0):
            self.load(index)

    def label_error(self, index: int) -> DataError:
        """Not expected: only ids of classes are painted."""
        expected = f"ids 0..{len(self.classes) - 1} or {IGNORED}"
        return DataError(f"{self.image_files[index]}: an id that belongs to no class\nexpected {expected}")

    def inspect(self, index: int, decode: bool) -> PairFacts:
        """See `Dataset.inspect`: the image is always decoded, and only the first error of a pair is found."""
        return inspect_loaded(self, index)

    def uncovered(self, pixels: np.ndarray) -> str | None:
        """A warning where many pixels are in no region and ignored. `pixels`: of each train id, int64 (256,)."""
        share = pixels[IGNORED] / max(pixels.sum(), 1)
        if self._rest != IGNORED or share < UNCOVERED:
            return None
        return f"{share:.0%} of pixels are in no region: ignored; `data.background` makes them a class"

    def identity(self) -> list[str]:
        """Sizes of the image files, then of the annotation files [bytes]. Raises OSError where a file is missing."""
        return file_sizes([*self.image_files, *self.annotation_files])

    def _size_error(self, index: int, image: Sequence[int]) -> DataError:
        height, width = map(int, self._sizes[index])
        fix = "correct width and height in the file, or annotate the image in its own size; images are not resized"
        if (height, width) == (image[1], image[0]):
            fix = "width and height are swapped, as by an EXIF orientation: annotate the image as shown, or remove it"
        return DataError(
            f"{self.image_files[index]}: image of {image[1]}x{image[0]} pixels (width x height)\n"
            f"expected {width}x{height}, as in {first_names([str(file) for file in self.annotation_files])}\n{fix}"
        )


def _packed(file: Path, regions: list[Region]) -> bytes:
    try:
        return pickle.dumps(regions)
    except RecursionError:
        what = "a segmentation is nested too deeply"
        raise DataError(f"{file}: {what}\nexpected polygons or run lengths\nexport the file again") from None


def _two_sizes(file: Path, name: str, size: tuple[int, int], other: tuple[int, int]) -> DataError:
    return DataError(
        f"{file}: {name} has {size[1]}x{size[0]} pixels (width x height), {other[1]}x{other[0]} in another file\n"
        "expected the same size in all files\ncorrect width and height, or remove a file from data.*.annotations"
    )


def _classes(
    files: Sequence[Path],
    categories: Sequence[tuple[int, str]],
    wanted: Sequence[str],
    palette: Sequence[Sequence[int]] | None,
    background: str | None,
) -> tuple[tuple[str, ...], Palette]:
    """Names and colours of the classes. `categories`: (id, name) of all files. Raises DataError."""
    where = first_names([str(file) for file in files])
    # Sorted by id; a name that several ids have comes at its lowest id, as a dict keeps the first place.
    known = list(dict.fromkeys(name for _, name in sorted(categories)))
    added = [] if background is None or background in known else [background]
    classes = list(wanted) or [*added, *known]
    unknown = [name for name in classes if name not in known and name != background]
    if unknown:
        raise DataError(
            f"data.classes: {len(unknown)} of {len(classes)} are not categories of {where}: {first_names(unknown)}\n"
            f"expected some of: {first_names(known, 8)}\nspell the names as in the file, or remove data.classes"
        )
    if background is not None and background not in classes:
        raise DataError(
            f"data.background={background}: no such class\nexpected one of data.classes: {first_names(classes, 8)}"
        )
    if not 2 <= len(classes) <= 255:
        fix = "set data.background, for the pixels without annotation" if len(classes) == 1 else "set data.classes"
        raise DataError(f"{where}: {len(classes)} classes: {first_names(classes)}\nexpected 2 to 255\n{fix}")
    if palette:
        return tuple(classes), tuple((red, green, blue) for red, green, blue in palette)
    return tuple(classes), default_palette(classes)


def _listed(files: Sequence[str], names: Path, annotations: Sequence[Path]) -> list[str]:
    """Those of `files` that the list `names` has. Raises DataError where one of its names is not among them."""
    wanted = {name.strip() for name in read_names(names)}
    chosen = [file for file in files if file in wanted or PurePosixPath(file).with_suffix("").as_posix() in wanted]
    found = {name for file in chosen for name in (file, PurePosixPath(file).with_suffix("").as_posix())}
    if absent := sorted(wanted - found):
        where = first_names([str(file) for file in annotations])
        raise DataError(
            f"{names}: {len(absent)} of {len(wanted)} names have no image in {where}: {first_names(absent)}\n"
            "expected names as in file_name, with or without suffix\ncorrect the list"
        )
    return chosen


def _require_images(images: Sequence[Path], files: Sequence[Path]) -> None:
    """Raise DataError where image files are missing."""
    missing = [image for image in images if not image.is_file()]
    if missing:
        where = first_names([str(file) for file in files])
        names = first_names([image.name for image in missing])
        raise DataError(
            f"{where}: {len(missing)} of {len(images)} images are missing: {names}\n"
            f"expected {missing[0]} for the first\ncorrect the folder of images in the recipe, or add the images"
        )

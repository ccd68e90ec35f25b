"""`rle.json`: the single file with the run lengths of all images.

Axes: K classes, H×W pixels of an image.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from ssaseg.cli.errors import CommandError


def rle_lines(name: str, labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """COCO run lengths of labels (H,W): one JSON object for each class in them.

    Keys: image (path below its INPUT), category_id (0..K-1), category, segmentation {size [H,W], counts}, area
    [pixels], bbox [x, y, width, height].
    """
    from pycocotools import mask

    by_column = np.asfortranarray(labels)  # the order of COCO's run lengths
    lines = []
    for category in np.unique(labels).tolist():
        code = mask.encode((by_column == category).view(np.uint8))
        entry = {
            "image": name,
            "category_id": category,
            "category": classes[category],
            "segmentation": {"size": list(labels.shape), "counts": code["counts"].decode("ascii")},
            "area": int(mask.area(code)),
            "bbox": mask.toBbox(code).tolist(),
        }
        lines.append(json.dumps(entry, ensure_ascii=False))
    return lines


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError: that of a full disk has no name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


class RleFile:
    """Writes `rle.json`: a JSON list with one object per line. The new file replaces the old one at the end.

    The images of this run come first, then the other images of the old file. After Ctrl-C or an error, the new file
    holds the images that were done: always a complete list of complete images. OSErrors name `path`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.partial")
        self.done: set[str] = set()
        self.separator = "[\n"  # before the next object
        self.whole = True  # False while an image is being written, and after that has failed

    def __enter__(self) -> "RleFile":
        with naming(self.path):
            # A file name that is not Unicode is written with JSON's escapes.
            self.file = self.temporary.open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def add(self, name: str, lines: Sequence[str]) -> None:
        """Appends the objects of one image."""
        self.whole = False
        with naming(self.path):
            self._append(lines)
        self.done.add(name)
        self.whole = True

    def _append(self, lines: Sequence[str]) -> None:
        self.file.write(self.separator + ",\n".join(lines))
        self.separator = ",\n"

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            with naming(self.path):
                with self.file:
                    if self.whole and self.done:
                        self._take_over()
                if self.whole and self.done:  # otherwise the old file stays
                    self.temporary.replace(self.path)
        finally:
            with suppress(OSError):
                self.temporary.unlink(missing_ok=True)

    def _take_over(self) -> None:
        """Appends the other images of the old file, and ends the list."""
        if self.path.exists():
            for name, line in read_rle(self.path):
                if name not in self.done:
                    self._append([line])
        self.file.write("\n]\n")


def read_rle(path: Path) -> Iterator[tuple[str, str]]:
    """(image, JSON object) of each line of a file that `RleFile` wrote. Raises CommandError for any other file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            text = line.strip().removesuffix(",")
            if text in ("[", "]", "[]"):
                continue
            try:
                yield json.loads(text)["image"], text
            except (ValueError, KeyError, TypeError):
                fix = "its entries should be kept: move the file away, or choose another --out"
                raise CommandError(f"{path}: not a list that `ssaseg predict` wrote\n{fix}") from None


def labelled_images(path: Path) -> set[str]:
    """Names of the images in an `rle.json`; none if the file does not exist."""
    return {name for name, _ in read_rle(path)} if path.exists() else set()

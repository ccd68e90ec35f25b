"""Label PNGs of any tool as predictions: finds, checks, counts and hashes the files of a folder, one at a time."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation.protocols import Scored
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.metrics import count_pairs
from ssaseg.datasets import IGNORED, DataError, Dataset, default_palette
from ssaseg.datasets.decoding import read_mask
from ssaseg.datasets.ids import palette_error
from ssaseg.datasets.pairs import files_by_name, first_names
from ssaseg.files.download import hash_file
from ssaseg.files.structured import read_json
from ssaseg.files.text import cut, describe, printable

INDEX = "index"  # the folder of class numbers below OUT of `ssaseg predict`
NAMES = "classes.json"


@dataclass(frozen=True)
class Reading:
    """How the files of a folder are read.

    suffix: what follows the image's name in the name of a file. mask_ids: the numbers are those of the data's masks,
    not class numbers. allow_void: a labelled pixel may be predicted as no class, 255; it counts as wrong.
    """

    suffix: str = ".png"
    mask_ids: bool = False
    allow_void: bool = False


@dataclass(frozen=True)
class Predictions:
    """The files of a folder that belong to the images of a data set, in their order."""

    folder: Path
    files: list[Path]
    others: list[str]  # names of files with the suffix that belong to no image, sorted

    def hashes(self) -> dict[str, Any]:
        """SHA-256 of each file, and of all: of lines `HASH  NAME`, as `sha256sum` prints them, in order of names."""
        sums = {os.path.relpath(file, self.folder): hash_file(file) for file in self.files}
        text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
        whole = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
        return {"sha256": whole, "files": [{"name": name, "sha256": sums[name]} for name in sorted(sums)]}


# ---- finding -----------------------------------------------------------------------------------------------------
def find_predictions(folder: Path, dataset: Dataset, count: int, suffix: str = ".png") -> Predictions:
    """The prediction of each of the first `count` images of `dataset`: of image a/b the file a/b.png below `folder`, or
    b.png, as mmsegmentation writes.

    Raises CommandError for images without file, DataError for a folder that is missing or has no such file.
    """
    if not suffix:
        raise CommandError("--suffix: is empty\ngive the end of the files' names after the image's name, such as .png")
    if (folder / INDEX).is_dir():  # what `ssaseg predict --out` was given
        folder = folder / INDEX
    try:
        found = files_by_name(folder, [suffix], "predictions")
    except DataError as error:
        first, expected, _ = str(error).split("\n")
        fix = "give the folder of the PNGs, and --suffix if their names do not end in .png"
        raise DataError(f"{first}\n{expected}\n{fix}") from None
    names = [dataset.name(index) for index in range(len(dataset))]
    if not any(name in found for name in names):  # a flat folder
        last = [name.rpartition("/")[2] for name in names]
        names = last if len(set(last)) == len(last) else names
    wanted = names[:count]
    missing = [name for name in wanted if name not in found]
    if missing:
        near = sorted(name for name in found if name.rpartition("/")[2].startswith(missing[0].rpartition("/")[2]))
        hint = f"; found {printable(cut(near[0] + suffix))}: give --suffix" if near else ""
        raise CommandError(
            f"{printable(str(folder))}: {len(missing)} of {len(wanted)} images have no prediction: "
            f"{printable(first_names(missing))}\n"
            f"expected {printable(missing[0] + suffix)} for the first{hint}\n"
            "predict the missing images, or score another --split; --limit N scores only the first N"
        )
    others = sorted(name + suffix for name in found.keys() - set(names))
    return Predictions(folder, [Path(found[name]) for name in wanted], others)


def require_same_names(folder: Path, classes: Sequence[str]) -> None:
    """Raises CommandError if a `classes.json` in the folder, or beside it, names other classes than the data's."""
    for file in (folder / NAMES, folder.parent / NAMES):
        try:
            content = read_json(file)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            if file.parent != folder:  # of something else
                continue
            raise CommandError(f"{printable(str(file))}: cannot be read ({printable(describe(error))})") from None
        names = content.get("classes") if isinstance(content, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            if file.parent != folder:
                continue
            expected = 'expected a JSON object with "classes": a list of names'
            raise CommandError(f"{printable(str(file))}: holds no class names\n{expected}\ncorrect or remove it")
        pairs = zip(names, classes, strict=False)
        differ = next((f"class {k} is {a!r}; in the data {b!r}" for k, (a, b) in enumerate(pairs) if a != b), "")
        if not differ and len(names) != len(classes):
            differ = f"{len(names)} classes; the data have {len(classes)}"
        if differ:
            raise CommandError(
                f"{printable(str(file))}: {printable(differ)}\n"
                "expected predictions with the data's classes, in the same order\n"
                "give --data a recipe with the classes of the predictions"
            )
        return


# ---- counting ----------------------------------------------------------------------------------------------------
def count_predicted(
    found: Predictions, dataset: Dataset, reading: Reading, progress: Callable[[int], object] | None = None
) -> Scored:
    """Counts the predictions of a folder, one image in memory at a time.

    Raises DataError for a file that cannot be read, or that has another size or ids that are not classes; what the data
    set raises. Pixels whose label is ignored may have any prediction.
    """
    classes = len(dataset.classes)
    table, valid = _meaning(dataset, reading)
    matrix = np.zeros((classes, classes + 1), np.int64)
    rows = np.zeros((len(found.files), 2, classes), np.int64)
    for index, file in enumerate(found.files):
        label = dataset.load(index)[1]
        pairs = count_pairs(label, _read(file, label, dataset, reading))[:classes]
        if (pairs * ~valid).any():
            raise _wrong_ids(file, pairs.sum(axis=0), valid, dataset, reading)
        counts = np.zeros_like(matrix)
        np.add.at(counts.T, table, pairs.T)
        hits = counts.diagonal()
        rows[index] = hits, counts.sum(axis=1) + counts[:, :classes].sum(axis=0) - hits
        matrix += counts
        if progress is not None:
            progress(1)
    void, total = int(matrix[:, classes].sum()), int(matrix.sum())
    if void:
        what = f"{void} labelled pixels ({100 * void / total:.2f} %) are predicted as no class; they count as wrong"
        echo(f"{found.folder}: {what}", err=True)
    return Scored(matrix, rows)


def _meaning(dataset: Dataset, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """The class of each of the 256 ids, K for none, int (256); and whether the id may be predicted, bool (256)."""
    classes = len(dataset.classes)
    ids = dataset.label_lut if reading.mask_ids else np.arange(256)
    table = np.where(ids < classes, ids, classes)
    known = dataset.valid_raw if reading.mask_ids else (ids < classes) | (ids == IGNORED)
    return table, known & ((table < classes) | reading.allow_void)


def _read(file: Path, label: np.ndarray, dataset: Dataset, reading: Reading) -> np.ndarray:
    """The ids uint8 (H,W) in one file."""
    ids, colours, *_ = read_mask(file)
    if ids.shape != label.shape:
        got, expected = (f"{each.shape[1]}x{each.shape[0]}" for each in (ids, label))
        fix = "resize the logits to the size of the image before the arg-max; labels only with nearest neighbours"
        if ids.shape == label.shape[::-1]:
            fix = "width and height are swapped: rotate the predictions"
        raise DataError(f"{file}: a prediction of {got} pixels (width x height)\nexpected {expected}\n{fix}")
    # Colours that are not given, which are PASCAL VOC's, prove nothing.
    coloured = not reading.mask_ids and dataset.palette != default_palette(dataset.classes)
    if coloured and (error := palette_error(file, ids, colours, dataset.palette, dataset.classes)):
        first, *_ = str(error).split("\n")
        fix = "write class numbers as indices"
        raise DataError(f"{first}\nexpected indices that are class numbers of the data\n{fix}")
    return ids


def _wrong_ids(file: Path, counts: np.ndarray, valid: np.ndarray, dataset: Dataset, reading: Reading) -> DataError:
    """counts: labelled pixels that are predicted as each id (256)."""
    classes = len(dataset.classes)
    values = [int(value) for value in np.flatnonzero(counts * ~valid)]
    found = "; ".join(f"id {value} in {counts[value]} labelled pixels" for value in values[:3])
    more = f"; {len(values) - 3} more ids" if len(values) > 3 else ""
    expected = "an id of the data's masks" if reading.mask_ids else f"class numbers 0..{classes - 1}"
    fix = "ids of the data's masks, as mmsegmentation writes those of ADE20K? Then give --mask-ids"
    if all(dataset.label_lut[value] == IGNORED if reading.mask_ids else value == IGNORED for value in values):
        fix = "if these pixels are predicted as no class: --allow-void counts them as wrong"
    elif reading.mask_ids:
        fix = "class numbers? Then leave out --mask-ids"
    elif values == [classes] and not counts[0]:
        fix = "numbered from 1? Subtract 1; if the data's masks are numbered so too, give --mask-ids"
    return DataError(f"{file}: {found}{more}\nexpected {expected} wherever a pixel is labelled\n{fix}")

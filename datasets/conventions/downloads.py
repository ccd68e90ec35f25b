"""From the download of a published data set to the layout that is read: the files it needs, and the pixels of masks.

`DOWNLOADS` has one row for each data set: the layout of its download, and how its raw ids are changed. Both are as in
mmsegmentation's converters (`tools/dataset_converters`, 1.2.2), which made the masks that the published scores were
measured on.

Letters: H, W height and width [pixels].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssaseg.datasets.base import IGNORED, DataError
from ssaseg.datasets.context import CONTEXT_FILE, CONTEXT_IDS, Drawing, draw, drawings
from ssaseg.datasets.decoding import MAX_PIXELS, read_mask
from ssaseg.datasets.pairs import files_by_name, first_names, read_names
from ssaseg.datasets.prepare import Plan
from ssaseg.datasets.published import LAYOUTS, Layout
from ssaseg.files.reading import read_file

# COCO has 91 ids for things and 91 for stuff. These ids of things have no pixels and no class. 0 is unlabelled.
COCO_ABSENT = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
# The ids (0..33) of Cityscapes' train ids 0..18 (cityscapesscripts/helpers/labels.py); the other ids are ignored.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
UNKNOWN = -1  # in a table: an id that has no meaning
LARGEST_MAT = 2**28  # bytes of a mask of COCO-Stuff-10K


class Pair(NamedTuple):
    """One image and its mask in a download. Both files may be missing."""

    split: str
    name: str  # below the image folder, with / and without suffix
    image: Path
    mask: Path | Drawing


@dataclass(frozen=True)
class Download:
    """A data set as it is downloaded."""

    pairs: Callable[[Path], Iterator[Pair]]  # in the folder that holds the download
    read: Callable[[Any], np.ndarray]  # `Pair.mask` -> raw ids, whole numbers (H, W)
    table: np.ndarray  # int16: raw id -> id in the mask that is written, or UNKNOWN
    ids: str  # the known raw ids, for messages


def _coco_table(lower: int) -> np.ndarray:
    """Masks number the ids that have a class without gaps. `lower`: how much all ids are below COCO-Stuff-10K's."""
    known = [value for value in range(183) if value not in COCO_ABSENT]
    return _table({value - lower: place - lower for place, value in enumerate(known) if value >= lower})


def _table(ids: dict[int, int]) -> np.ndarray:
    table = np.full(max(*ids, IGNORED) + 1, UNKNOWN, np.int16)
    table[list(ids)] = list(ids.values())
    return table


COCO_164K = _coco_table(1)
COCO_164K[IGNORED] = IGNORED  # unlabelled in COCO-Stuff-164K


# ---- the downloads -----------------------------------------------------------------------------------------------


def _coco_stuff10k(source: Path) -> Iterator[Pair]:
    try:
        import scipy.io  # noqa: F401 (an optional package: if it is missing, say so before any work is done)
    except ImportError:
        message = "coco_stuff10k: its masks are .mat files\nexpected scipy, which reads them; it is not installed"
        raise DataError(f"{message}\npip install 'ssaseg[mat]'") from None
    lists = _folder(source, "imageLists")
    images, masks = _folder(source, "images"), _folder(source, "annotations")
    for split, file in (("train", "train.txt"), ("val", "test.txt")):
        for name in read_names(lists / file):
            yield Pair(split, name, images / f"{name}.jpg", masks / f"{name}.mat")


def _coco_stuff164k(source: Path) -> Iterator[Pair]:
    for split, folder in (("train", "train2017"), ("val", "val2017")):
        # All archives unpack to train2017 and val2017. Below images/ and annotations/ are the files that an earlier
        # preparation in the same folder made. They come last, as they may be only a part of the data set.
        images = _folder(source, folder, f"images/{folder}", holding="*.jpg")
        maps = _folder(source, f"stuffthingmaps/{folder}", folder, f"annotations/{folder}", holding="*.png")
        for name, image in sorted(files_by_name(images, [".jpg"], "images").items()):
            yield Pair(split, name, Path(image), maps / f"{name}.png")


def _pascal_context(source: Path) -> Iterator[Pair]:
    place = _voc2010(source)
    images = _folder(source, f"{place}/JPEGImages")
    for drawing in drawings(_folder(source, place, ".", holding=CONTEXT_FILE) / CONTEXT_FILE):
        yield Pair(drawing.split, drawing.name, images / f"{drawing.name}.jpg", drawing)


def _voc2010(source: Path) -> str:
    """The folder of VOC 2010 below `source`: its archive unpacks to VOCdevkit/VOC2010."""
    return next((place for place in ("VOC2010", "VOCdevkit/VOC2010") if (source / place).is_dir()), ".")


def _cityscapes(source: Path) -> Iterator[Pair]:
    for split in ("train", "val"):
        images, masks = _folder(source, f"leftImg8bit/{split}"), _folder(source, f"gtFine/{split}")
        for name, image in sorted(files_by_name(images, ["_leftImg8bit.png"], "images").items()):
            mask = masks / f"{name}_gtFine_labelIds.png"
            if not mask.is_file() and mask.with_name(mask.name.replace("_labelIds.png", "_polygons.json")).is_file():
                raise DataError(
                    f"{mask}: does not exist, only its polygons do\nexpected masks beside polygons, as in the archive\n"
                    "unpack all of gtFine_trainvaltest.zip: ssaseg does not draw masks from polygons"
                )
            yield Pair(split, name, Path(image), mask)


def _segnet_camvid(source: Path) -> Iterator[Pair]:
    """SegNet's files of CamVid: the ids are those of the classes, and 11 is void."""
    for split in ("train", "val"):
        masks = files_by_name(_folder(source, f"{split}annot"), [".png"], "masks")
        for name, image in sorted(files_by_name(_folder(source, split), [".png"], "images").items()):
            mask = masks.get(name, f"{source}/{split}annot/{name}.png")
            yield Pair(split, name, Path(image), Path(mask))


def _folder(source: Path, *places: str, holding: str = "") -> Path:
    """The first of `places` below `source` that is a folder and holds a file that matches the pattern `holding`."""
    for place in places:
        if (source / place).is_dir() and (not holding or any((source / place).glob(holding))):
            return source / place
    wanted = " or ".join(f"{Path(place) / holding}" for place in places)
    fix = "set --source to the folder that the downloads are unpacked in, see `ssaseg data prepare --help`"
    raise DataError(f"{source}: the files of the download are not in this folder\nexpected {wanted} in it\n{fix}")


def _read_mat(file: Path) -> np.ndarray:
    """Raw ids (H, W): the array S of a COCO-Stuff-10K file, which also holds names, captions and superpixels."""
    from scipy.io import loadmat, whosmat

    content = BytesIO(read_file(file, LARGEST_MAT))
    try:
        shapes = {name: shape for name, shape, _ in whosmat(content)}
        keys, pixels = list(shapes), prod(shapes.get("S", ()))
        if pixels > MAX_PIXELS:
            raise ValueError(f"S has {pixels:,} values, expected at most {MAX_PIXELS:,}")  # before it is decompressed
        ids = loadmat(content, variable_names=["S"]).get("S")
    except Exception as error:  # for damaged files scipy's parser raises errors of any type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        expected = "expected a complete MATLAB 5 file\nunpack the download again"
        raise DataError(f"{file}: damaged .mat file: {reason}\n{expected}") from None
    if not isinstance(ids, np.ndarray):
        raise DataError(
            f"{file}: no key S; it has {first_names(keys, 5) or 'none'}\n"
            "expected the label map under S, as in COCO-Stuff-10K 1.1\nunpack cocostuff-10k-v1.1.zip again"
        )
    return ids


def _read_map(file: Path) -> np.ndarray:
    return read_mask(file).ids


DOWNLOADS: dict[str, Download] = {
    "coco_stuff10k": Download(_coco_stuff10k, _read_mat, _coco_table(0), "0..182 except the eleven without a class"),
    "coco_stuff164k": Download(
        _coco_stuff164k, _read_map, COCO_164K, "0..181 except the eleven without a class, or 255"
    ),
    # PASCAL-Context numbers 459 classes. All that are not among the 59 used ones become background: 0.
    "pascal_context_60": Download(
        _pascal_context,
        draw,
        _table(dict.fromkeys(range(460), 0) | {k: i for i, k in enumerate(CONTEXT_IDS)}),
        "0..459",
    ),
    "cityscapes": Download(
        _cityscapes,
        _read_map,
        _table(dict.fromkeys([*range(34), IGNORED], IGNORED) | {k: i for i, k in enumerate(CITYSCAPES_IDS)}),
        "0..33, or 255",
    ),
}
DOWNLOADS["pascal_context_59"] = DOWNLOADS["pascal_context_60"]  # the same files; only the meaning of 0 differs

# Data sets that are read as they are downloaded, but that others offer in other folders, one of which is named here.
# SegNet's images of CamVid are PNG files. They are linked as .jpg: files are read by their content.
REPACKED = {
    "camvid": (
        "trainannot",
        Download(_segnet_camvid, _read_map, _table({**{k: k for k in range(11)}, 11: IGNORED}), "0..11"),
    )
}


# ---- what is to be done ------------------------------------------------------------------------------------------


def find_layout(name: str) -> Layout:
    """The layout of a published data set. Raises DataError for an unknown name."""
    if name not in LAYOUTS:
        raise DataError(f"data set {name!r} is not known\nexpected one of: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def usual_root(name: str, source: Path) -> Path:
    """Where to write without --root: the folder of the download that already has the images."""
    return source / _voc2010(source) if DOWNLOADS.get(name) is DOWNLOADS["pascal_context_60"] else source


def is_to_prepare(name: str, source: Path) -> bool:
    """Whether the files in `source` have to be made or moved before they are read."""
    return name in DOWNLOADS or (name in REPACKED and (source / REPACKED[name][0]).is_dir())


def plan_preparation(name: str, source: Path, root: Path) -> Plan:
    """What to make below `root` from the download in `source`, where `is_to_prepare` is true.

    Lists come first, then images, then masks. A preparation that is interrupted leaves images without masks, which are
    an error when they are read; so it never leaves a smaller data set that looks complete. Raises DataError where the
    folder does not hold the download, or its files cannot be read.
    """
    layout, download = find_layout(name), DOWNLOADS[name] if name in DOWNLOADS else REPACKED[name][1]
    plan = Plan(partial(_read_ids, download), "unpack both downloads again")
    listed: dict[str, list[str]] = {split: [] for split in layout.lists or ()}
    for pair in download.pairs(source):
        if layout.lists is not None:
            listed[pair.split].append(pair.name)
        if pair.image.is_file():
            target = root / layout.images[pair.split] / f"{pair.name}{layout.image_suffix}"
            plan.images.append((pair.image, target))
        else:
            plan.absent.append(pair.image)
        if isinstance(pair.mask, Path) and not pair.mask.is_file():
            plan.absent.append(pair.mask)
        else:
            target = root / layout.masks[pair.split] / f"{pair.name}{layout.mask_suffix}"
            plan.masks.append((pair.mask, target, pair.image))
    plan.lists = {root / (layout.lists or {})[split]: sorted(names) for split, names in listed.items()}
    return plan


def _read_ids(download: Download, source: Path | Drawing) -> np.ndarray:
    return to_mask(download.read(source), download, source)


def to_mask(raw: np.ndarray, download: Download, source: Path | Drawing) -> np.ndarray:
    """The ids to write, uint8 (H, W). Raises DataError, which names `source`, for ids without a meaning."""
    table = download.table
    if raw.ndim != 2 or not raw.size or raw.dtype.kind not in "iu":
        found = f"an array of {raw.dtype} with shape {raw.shape}"
        expected = "expected an array of whole numbers, height x width"
        raise DataError(f"{source}: {found}\n{expected}\nunpack the download again")
    if 0 <= int(raw.min()) <= int(raw.max()) < len(table) and (ids := table[raw]).min() > UNKNOWN:
        return ids.astype(np.uint8)
    values, counts = np.unique(raw, return_counts=True)
    bad = [
        f"id {value} in {count} pixels"
        for value, count in zip(values.tolist(), counts.tolist(), strict=True)
        if not 0 <= value < len(table) or table[value] == UNKNOWN
    ]
    raise DataError(
        f"{source}: {'; '.join(bad[:3])}{f'; {len(bad) - 3} more ids' if len(bad) > 3 else ''}\n"
        f"expected ids {download.ids}\n"
        "check that --source holds this data set, in the version that `ssaseg data prepare --help` names"
    )

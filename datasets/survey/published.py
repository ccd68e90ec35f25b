"""Folders that hold a published data set, prepared or as it is downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from ssaseg.datasets.base import DataError
from ssaseg.datasets.prepare import count_pairs
from ssaseg.datasets.published import LAYOUTS

# Files that show that a folder is the download of a published data set, which `ssaseg data prepare` reads.
RAW = {
    "cityscapes": "gtFine/*/*/*_gtFine_labelIds.png",
    "coco_stuff10k": "annotations/COCO_*.mat",
    "coco_stuff164k": "stuffthingmaps/train2017/*.png",
    "pascal_context_59": "trainval_merged.json",
}
CITIES = (
    *("aachen", "bochum", "bremen", "cologne", "darmstadt", "dusseldorf", "erfurt", "hamburg", "hanover", "jena"),
    *("krefeld", "monchengladbach", "strasbourg", "stuttgart", "tubingen", "ulm", "weimar", "zurich"),
    *("frankfurt", "lindau", "munster", "berlin", "bielefeld", "bonn", "leverkusen", "mainz", "munich"),
)
# Published data sets whose folders have common names: they are recognised by their number of pairs too.
COMMON_FOLDERS = ("camvid", "voc2012")
# SegNet's files of CamVid: its folders of masks, the names of the frames, and the frames of each split.
SEGNET_FOLDERS = {"trainannot", "valannot", "testannot"}
SEGNET_FRAME = re.compile(r"(0001TP|0006R0|0016E5|Seq05VD)_f?\d+")
SEGNET_COUNTS = {"train": 367, "val": 101, "test": 233}


def find_published(root: Path) -> tuple[str | None, list[str]]:
    """The published data set that is complete in `root`, or None; and notes about folders that only look like one."""
    notes = []
    for name, layout in LAYOUTS.items():
        folders = [root / each[split] for each in (layout.images, layout.masks) for split in layout.counts]
        if not all(folder.is_dir() for folder in folders):
            continue
        counts = count_pairs(layout, root)
        if all(count.pairs == count.published for count in counts.values()):
            return name, []
        if name in COMMON_FOLDERS or not any(count.pairs for count in counts.values()):
            continue
        found, published = ("+".join(str(count[key]) for count in counts.values()) for key in (2, 3))
        notes.append(
            f"not read as {name}, although the folders have its names: they hold {found} pairs, not {published}; "
            f"if these are a part of {name}, write data: {{dataset: {name}, root: ...}}"
        )
    return None, notes


def require_prepared(root: Path) -> None:
    """Raises DataError where `root` is the download of a data set that has to be prepared before it is read."""
    for name, pattern in RAW.items():
        file = next(root.glob(pattern), None)
        if file and name == "cityscapes" and (file.parent.name not in CITIES or (root / "label_colors.txt").exists()):
            continue  # a user's own data and classes in Cityscapes' layout, as CVAT and datumaro write it
        if file:
            raise DataError(
                f"{root}: this is the download of {name}: it holds {file.relative_to(root)}\n"
                f"expected the prepared layout, with all of its files\n"
                f"run `ssaseg data prepare {name} --source {root}`"
            )


def is_segnet_camvid(pairs: Mapping[str | None, Iterable[tuple[str, str]]]) -> bool:
    """Whether these are SegNet's files of CamVid, with 11 classes and 11 = void. pairs: images and masks by split."""
    both = {split: list(each) for split, each in pairs.items()}
    if not both.keys() >= {"train", "val"} or both.keys() - SEGNET_COUNTS.keys():
        return False
    files = [(PurePosixPath(image), PurePosixPath(mask)) for each in both.values() for image, mask in each]
    if {mask.parent.name for _, mask in files} - SEGNET_FOLDERS:
        return False
    counted = all(len(each) == SEGNET_COUNTS[str(split)] for split, each in both.items())
    return counted or all(SEGNET_FRAME.fullmatch(image.stem) for image, _ in files)

"""The layouts of published data sets on disk, one row for each data set.

Folders, suffixes and `reduce_zero_label` are those of mmsegmentation's configurations (`configs/_base_/datasets`, 0.30
and 1.2.2). The counts are those of the publications of the data sets. CamVid is SegNet's split of 11 classes.
`ssaseg data prepare` makes these layouts from the downloads.
"""

from collections.abc import Mapping
from dataclasses import dataclass

TRAIN_IDS = "_labelTrainIds.png"  # the converters of COCO-Stuff and Cityscapes add this to the image's name


@dataclass(frozen=True)
class Layout:
    """Where the pairs of a data set are, below its root, and how their ids are read. A split is "train" or "val"."""

    labels: str  # name for `label_space`
    root: str  # the usual folder
    images: Mapping[str, str]  # split -> folder
    masks: Mapping[str, str]  # split -> folder
    counts: Mapping[str, int]  # split -> published number of pairs
    image_suffix: str = ".jpg"
    mask_suffix: str = ".png"
    reduce_zero_label: bool = False
    lists: Mapping[str, str] | None = None  # split -> file of names, one a line; None: all files in the folders
    prepared: bool = True  # made by `ssaseg data prepare`; False: the download already has this layout


def _split(folders: str, train: str = "train", val: str = "val") -> dict[str, str]:
    """`folders` with * replaced by the folder of each split."""
    return {"train": folders.replace("*", train), "val": folders.replace("*", val)}


def _context(labels: str, reduce_zero_label: bool) -> Layout:
    """PASCAL-Context: the files are the same for 59 and 60 classes; only the meaning of 0, background, differs."""
    return Layout(
        labels,
        root="data/VOCdevkit/VOC2010",
        images=_split("JPEGImages"),
        masks=_split("SegmentationClassContext"),
        lists=_split("ImageSets/SegmentationContext/*.txt"),
        reduce_zero_label=reduce_zero_label,
        counts={"train": 4998, "val": 5105},
    )


LAYOUTS: dict[str, Layout] = {
    "ade20k": Layout(
        "ade20k",
        root="data/ade/ADEChallengeData2016",
        images=_split("images/*", "training", "validation"),
        masks=_split("annotations/*", "training", "validation"),
        reduce_zero_label=True,
        counts={"train": 20210, "val": 2000},
        prepared=False,
    ),
    "coco_stuff10k": Layout(
        "coco_stuff",
        root="data/coco_stuff10k",
        images=_split("images/*", "train2014", "test2014"),
        masks=_split("annotations/*", "train2014", "test2014"),
        mask_suffix=TRAIN_IDS,
        reduce_zero_label=True,
        counts={"train": 9000, "val": 1000},
    ),
    "coco_stuff164k": Layout(
        "coco_stuff",
        root="data/coco_stuff164k",
        images=_split("images/*", "train2017", "val2017"),
        masks=_split("annotations/*", "train2017", "val2017"),
        mask_suffix=TRAIN_IDS,
        counts={"train": 118287, "val": 5000},
    ),
    "pascal_context_59": _context("pascal_context_59", reduce_zero_label=True),
    "pascal_context_60": _context("pascal_context_60", reduce_zero_label=False),
    "cityscapes": Layout(
        "cityscapes",
        root="data/cityscapes",
        images=_split("leftImg8bit/*"),
        masks=_split("gtFine/*"),
        image_suffix="_leftImg8bit.png",
        mask_suffix=f"_gtFine{TRAIN_IDS}",
        counts={"train": 2975, "val": 500},
    ),
    "voc2012": Layout(
        "voc2012",
        root="data/VOCdevkit/VOC2012",
        images=_split("JPEGImages"),
        masks=_split("SegmentationClass"),
        lists=_split("ImageSets/Segmentation/*.txt"),
        counts={"train": 1464, "val": 1449},
        prepared=False,
    ),
    "camvid": Layout(
        "camvid",
        root="data/camvid",
        images=_split("images/*"),
        masks=_split("annotations/*"),
        counts={"train": 367, "val": 101},
        prepared=False,
    ),
}

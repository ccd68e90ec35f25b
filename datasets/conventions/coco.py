"""Finding COCO-format annotations, which training reads without conversion: files, folders of images, splits, classes.

Roboflow writes `_annotations.coco.json` beside the images of each split; COCO has `annotations/instances_*.json` and
folders such as `train2017`; CVAT has `annotations/instances_default.json` and `images/`; Label Studio `result.json`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ssaseg.datasets.annotations import read_annotations
from ssaseg.datasets.base import DataError, brief
from ssaseg.datasets.conventions.base import Tree
from ssaseg.datasets.conventions.hints import keys_of
from ssaseg.datasets.pairlist import choose_splits, split_of_path
from ssaseg.datasets.pairs import first_names
from ssaseg.files.text import printable

MOST_FILES = 1000  # JSON files that are looked at
SAMPLE = 200  # names of images that choose their folder


@dataclass(frozen=True)
class CocoSplit:
    """Where one split is, below the root."""

    images: str  # folder, "." for the root
    annotations: tuple[str, ...]  # files, painted in this order


@dataclass
class FoundCoco:
    """COCO-format annotations below a root. `splits` has "train" and "val", or only "all", which is split later."""

    splits: dict[str, CocoSplit]
    classes: list[str]  # without a background, in the order of the ids
    background: str | None  # a category that already means this
    images: frozenset[str] = frozenset()  # all annotated images, below the root
    notes: list[str] = field(default_factory=list)


def find_coco(tree: Tree) -> FoundCoco | None:
    """The COCO-format annotations below a root; None where there are none with segmentations.

    Raises DataError where files are not valid, their images are missing, or several files annotate the same images.
    """
    summaries = {file: _summary(tree.root / file) for file in coco_files(tree)}
    if not summaries:
        return None
    splits, notes = _splits(tree, summaries)
    used = [summaries[PurePosixPath(file)] for split in splits.values() for file in split.annotations]
    classes, dropped = _classes(used)
    if dropped:
        notes.append(
            f"category {first_names([printable(name) for name in dropped])}: only the name of a group of categories, "
            "without annotation: not a class"
        )
    background = next((name for name in classes if name.lower() in ("background", "_background_")), None)
    images = frozenset(
        (PurePosixPath(split.images) / name).as_posix()
        for split in splits.values()
        for file in split.annotations
        for name in summaries[PurePosixPath(file)].images
    )
    return FoundCoco(splits, classes, background, images, notes)


def coco_files(tree: Tree) -> list[PurePosixPath]:
    """Files that have the keys of COCO's annotations with a segmentation; key points are left out."""
    files = sorted(tree.by_suffix.get(".json", []), key=lambda file: (not _is_usual(file), len(file.parts), file))
    found = []
    for file in files[:MOST_FILES]:
        keys = keys_of(tree.root / file)
        if "segments_info" in keys or "person_keypoints" in file.name or not keys & {"segmentation", "categories"}:
            continue
        if "segmentation" in keys and keys & {"images", "annotations", "categories"}:
            found.append(file)
    return sorted(found)


def _is_usual(file: PurePosixPath) -> bool:
    return any(word in file.name.lower() for word in ("coco", "instances", "stuff", "annotation", "result", "labels"))


@dataclass(frozen=True)
class Summary:
    """What the choice needs of one file; regions are not kept."""

    categories: dict[int, str]
    groups: dict[int, str | None]
    annotated: frozenset[str]  # names of categories that have a region
    images: frozenset[str]  # file names


def _summary(file: Path) -> Summary:
    content = read_annotations(file)
    annotated = frozenset(region.category for regions in content.regions.values() for region in regions)
    return Summary(content.categories, content.groups, annotated, frozenset(content.sizes))


# ---- splits ------------------------------------------------------------------------------------------------------
def _splits(tree: Tree, summaries: Mapping[PurePosixPath, Summary]) -> tuple[dict[str, CocoSplit], list[str]]:
    groups: dict[str | None, list[PurePosixPath]] = defaultdict(list)
    for file in summaries:
        groups[split_of_path(file)].append(file)
    notes: list[str] = []
    chosen = {"all": list(summaries)}
    if found := choose_splits(groups):
        names, notes = found
        chosen = {split: groups.pop(name) for split, name in names.items()}
        if others := [str(file) for files in groups.values() for file in files]:
            notes.append(f"annotation files not used: {first_names(sorted(others), 6)}")
    by_name: dict[str, list[PurePosixPath]] = defaultdict(list)
    for path in tree.files:
        by_name[path.name].append(path)
    splits = {}
    for split, files in chosen.items():
        files = _order(tree.root, files, summaries)
        folder = _image_folder(tree, files, summaries, by_name)
        splits[split] = CocoSplit(str(folder), tuple(map(str, files)))
        shown = f" for {'training' if split == 'train' else 'validation'}" if split != "all" else ""
        notes.append(f"COCO-format annotations{shown}: {first_names(list(map(str, files)))}; images in {folder}")
    return splits, notes


def _order(
    root: Path, files: Sequence[PurePosixPath], summaries: Mapping[PurePosixPath, Summary]
) -> list[PurePosixPath]:
    """The files of a split in the order of painting. Things lie on stuff; other files must not share images."""
    order = sorted(files, key=lambda file: ("stuff" not in file.name, file))
    for number, file in enumerate(order):
        for other in order[number + 1 :]:
            shared = summaries[file].images & summaries[other].images
            if shared and ("stuff" in file.name) == ("stuff" in other.name):
                raise DataError(
                    f"{root / file} and {root / other}: both annotate {printable(min(shared))}\n"
                    "expected one annotation file for each image, or one of stuff and one of things\n"
                    "remove one of them, or write a recipe with data.dataset: coco_json and both in `annotations`"
                )
    return order


def _image_folder(
    tree: Tree,
    files: Sequence[PurePosixPath],
    summaries: Mapping[PurePosixPath, Summary],
    by_name: Mapping[str, Sequence[PurePosixPath]],
) -> PurePosixPath:
    """The folder below which the images of a split are. Of several, the one named as the file, then the nearest."""
    names = sorted({name for file in files for name in summaries[file].images})
    sample = names[:: max(len(names) // SAMPLE, 1)]
    votes: Counter[PurePosixPath] = Counter()
    for name in sample:
        parts = PurePosixPath(name).parts
        for path in by_name.get(parts[-1], ()):
            if path.parts[-len(parts) :] == parts:
                votes[PurePosixPath(*path.parts[: -len(parts)])] += 1
    most = max(votes.values(), default=0)
    if most == 0:
        raise DataError(
            f"{tree.root / files[0]}: none of its images was found, such as {brief(sample[0])}\n"
            f"expected them below {tree.root}\nadd the images, or correct file_name"
        )

    def fit(folder: PurePosixPath) -> tuple[bool, bool, int, str]:
        file = files[0]
        named = folder.name != "" and file.stem.endswith(folder.name)
        return named, folder == file.parent, -len(folder.parts), str(folder)

    return max((folder for folder, count in votes.items() if count == most), key=fit)


# ---- classes -----------------------------------------------------------------------------------------------------
def _classes(files: Sequence[Summary]) -> tuple[list[str], list[str]]:
    """Class names in the order of their ids, and names of categories that are only groups of others."""
    annotated = frozenset().union(*(each.annotated for each in files))
    groups = {group for each in files for number, group in each.groups.items() if group != each.categories[number]}
    classes, dropped = list[str](), list[str]()
    for number, name in sorted({item for each in files for item in each.categories.items()}):
        outermost = all(each.groups.get(number) in ("none", "", None) for each in files)
        (dropped if outermost and name in groups and name not in annotated else classes).append(name)
    # A category of the group's name may be a class at the same time.
    return list(dict.fromkeys(classes)), [name for name in dict.fromkeys(dropped) if name not in classes]

"""Building data sets by name.

Nothing heavy is imported here: OpenCV and NumPy are imported with the data set that is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ssaseg.datasets.base import DataError, Dataset
from ssaseg.datasets.published import LAYOUTS


def build_dataset(dataset: str, split: str, *, root: Path, options: Mapping[str, Any]) -> Dataset:
    """Build the data set called `dataset` for `split` ("train" or "val").

    `options` are the keys of a recipe's `data` section; folders in them are below `root`. One key is not for recipes:
    with `partial`, images without mask are left out, see `PairDataset`. Raises DataError for an unknown name or split,
    and for data that is missing or does not fit together.
    """
    if dataset not in BUILDERS:
        raise DataError(f"data.dataset={dataset}: no such data set\nexpected one of: {', '.join(BUILDERS)}")
    if split not in ("train", "val"):
        raise DataError(f"split {split!r}: no such split\nexpected one of: train, val")
    return BUILDERS[dataset](split, root, options)


def list_datasets() -> list[str]:
    """Names that `build_dataset` knows."""
    return list(BUILDERS)


def stated_classes(dataset: str, options: Mapping[str, Any]) -> tuple[list[str], list[list[int]] | None]:
    """Names and RGB colours (None: none are given) of the classes of a recipe's `data` section.

    No data is read: for `coco_json` only the classes in `options` are known, and the list may be empty.
    """
    if dataset in LAYOUTS:
        from ssaseg.datasets.labels import label_space

        labels = label_space(LAYOUTS[dataset].labels)
        return labels.classes, labels.palette
    if dataset == "synthetic":
        from ssaseg.datasets.synthetic import CLASSES, PALETTE

        return list(CLASSES), [list(colour) for colour in PALETTE]
    palette = options.get("palette")
    return list(options["classes"]), [list(colour) for colour in palette] if palette else None


def _folder(split: str, root: Path, options: Mapping[str, Any]) -> Dataset:
    from ssaseg.datasets.pairlist import read_pairs
    from ssaseg.datasets.pairs import PairDataset

    folders = options.get(split)
    if not folders:
        raise DataError(f"data.{split}: not given\nexpected two folders, such as {{images: a, masks: b}}")
    keys = ("image_suffixes", "mask_suffix", "ignore_index", "reduce_zero_label", "raw_to_train", "cache", "channels")
    incomplete: list[DataError] = []
    partial = options.get("partial", False)
    listed, notes = None, list[str]()
    if file := folders.get("pairs"):
        listed, notes = read_pairs(Path(root) / file, Path(root), split, incomplete if partial else None)
    pairs = PairDataset(
        Path(root) / (folders.get("images") or ""),
        Path(root) / (folders.get("masks") or ""),
        options["classes"],
        options.get("palette"),
        **{key: options[key] for key in keys if key in options},
        names=Path(root) / folders["names"] if folders.get("names") else None,
        partial=partial,
        pairs=listed,
        levels=_levels(options),
    )
    pairs.incomplete += incomplete
    pairs.notes += notes
    pairs.preload()  # if there is a cache: now, so that the loader's workers use the same memory
    return pairs


def _coco(split: str, root: Path, options: Mapping[str, Any]) -> Dataset:
    from ssaseg.datasets.coco import CocoDataset

    folders = options.get(split)
    if not folders:
        raise DataError(f"data.{split}: not given\nexpected such as {{images: val2017, annotations: [instances.json]}}")
    regions = CocoDataset(
        Path(root) / folders["images"],
        [Path(root) / file for file in folders["annotations"]],
        options.get("classes", ()),
        options.get("palette"),
        options.get("background"),
        options.get("cache", False),
        Path(root) / folders["names"] if folders.get("names") else None,
        options.get("channels", 3),
        _levels(options),
    )
    regions.preload()
    return regions


def _levels(options: Mapping[str, Any]) -> tuple[int, int] | None:
    low_high = options.get("range")
    return (int(low_high[0]), int(low_high[1])) if low_high else None


def _published(name: str, split: str, root: Path, options: Mapping[str, Any]) -> Dataset:
    from ssaseg.datasets.labels import label_space
    from ssaseg.datasets.pairs import PairDataset

    layout = LAYOUTS[name]
    labels = label_space(layout.labels)
    try:
        pairs = PairDataset(
            Path(root) / layout.images[split],
            Path(root) / layout.masks[split],
            labels.classes,
            labels.palette,
            image_suffixes=(layout.image_suffix,),
            mask_suffix=layout.mask_suffix,
            reduce_zero_label=layout.reduce_zero_label,
            cache=options.get("cache", False),
            names=Path(root) / layout.lists[split] if layout.lists else None,
            partial=options.get("partial", False),
        )
    except DataError as error:
        raise _as_published(error, name, split, Path(root)) from None
    pairs.incomplete = [_as_published(error, name, split, Path(root)) for error in pairs.incomplete]
    first = int(layout.reduce_zero_label)
    ids = f"{'0 ignored, ' * first}classes {first}..{first + len(labels.classes) - 1}"
    again = f"remove them and run `ssaseg data prepare {name}`" if layout.prepared else "unpack the download again"
    pairs.fix = f"these are not the masks of {name} as published ({ids}): {again}"
    pairs.preload()
    return pairs


def _as_published(error: DataError, name: str, split: str, root: Path) -> DataError:
    """The error with another fix: the recipe cannot change the folders and suffixes of a published data set."""
    found, expected, *_ = str(error).split("\n")
    expected = expected.partition(": set data.mask_suffix")[0]
    return DataError(f"{found}\n{expected}\n{_layout_fix(name, split, root)}")


def _layout_fix(name: str, split: str, root: Path) -> str:
    layout = LAYOUTS[name]
    files = [f"{layout.images[split]}/*{layout.image_suffix}", f"{layout.masks[split]}/*{layout.mask_suffix}"]
    files += [layout.lists[split]] if layout.lists else []
    get = f"download {Path(layout.root).name} from its official site"
    if layout.prepared:
        get = f"run `ssaseg data prepare {name} --source DIR --root {root}` on its download"
    usual = "" if root == Path(layout.root) else f" (often {layout.root})"
    return f"{name} needs {', '.join(files)} below data.root={root}: {get}, or set its folder: data.root=DIR{usual}"


def _synthetic(split: str, _root: Path, options: Mapping[str, Any]) -> Dataset:
    from ssaseg.datasets.synthetic import SyntheticScenes

    scenes = options["synthetic"]
    return SyntheticScenes(scenes[split], scenes["height"], scenes["width"], scenes["seed"], split)


BUILDERS: dict[str, Callable[[str, Path, Mapping[str, Any]], Dataset]] = {
    **{name: partial(_published, name) for name in LAYOUTS},
    "folder": _folder,
    "coco_json": _coco,
    "synthetic": _synthetic,
}

"""`ssaseg data check`: read a whole data set, and report everything that is wrong with it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssaseg.cli.console import json_target, print_table, write_json
from ssaseg.cli.data.init_coco import look_at_own
from ssaseg.cli.data.reading import read_through, small_images
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.datasets import IGNORED, DataError, Dataset, build_dataset
from ssaseg.datasets.check import (
    DRAWN,
    Findings,
    Problem,
    compare_images,
    compare_masks,
    is_published,
    require_same_classes,
)
from ssaseg.datasets.checking.images import in_no_list
from ssaseg.datasets.pairs import first_names
from ssaseg.datasets.published import LAYOUTS
from ssaseg.datasets.survey import COMMON_FOLDERS
from ssaseg.files.text import describe
from ssaseg.recipes import Recipe, RecipeError, Test, list_recipes, load_recipe

SPLITS = ("train", "val")

MOST_FILES = 30  # YAML files of a folder that are read to find its recipe


class Target(NamedTuple):
    """A data set to check, not yet opened."""

    title: str
    splits: Mapping[str, Callable[[], Dataset]]
    counts: Mapping[str, int]  # split -> published number of pairs
    test: Test | None = None  # of the recipe


def run_check(target: str, overrides: Sequence[str], split: str | None, json_out: str | None) -> int:
    """Checks a recipe's data or a folder, and prints a table of classes and the problems of each split. Returns 0 where
    no problem was found, 1 for warnings, 2 for errors.

    target: a recipe's name or file, or a folder: with a recipe in it, of a published layout, or of images and masks.
    overrides: `key=value` arguments for a recipe. split: check only this one. json_out: a file for the report, "-" for
    stdout without the tables. Raises CommandError, RecipeError or DataError where there is nothing to check; SystemExit
    after Ctrl-C (130) and SIGTERM (143).
    """
    json_out = json_target(json_out)
    started = time.perf_counter()
    chosen = open_target(target, overrides)
    if split is not None and split not in chosen.splits:
        raise CommandError(f"--split {split}: {chosen.title} has only {', '.join(chosen.splits)}")
    names = [split] if split is not None else list(chosen.splits)
    splits, found = check_splits(names, chosen)
    counted = {
        severity: sum(problem["severity"] == severity for report in splits for problem in report["problems"])
        for severity in ("error", "warning")
    }
    seconds = time.perf_counter() - started
    report = {"target": target, "checked": chosen.title, "splits": splits, "errors": counted["error"]}
    report |= {"warnings": counted["warning"], "seconds": round(seconds, 2)}
    write_json(json_out, report)  # before printing, which may fail
    if json_out != "-":
        echo(chosen.title)
        for each, findings in zip(splits, found, strict=True):
            print_split(each, findings)
        counts = [_count(count, severity) for severity, count in counted.items() if count]
        echo(f"{', '.join(counts) or 'no problems found'}; read in {seconds:.1f} s")
    return 2 if counted["error"] else 1 if counted["warning"] else 0


def check_splits(names: Sequence[str], target: Target) -> tuple[list[dict[str, Any]], list[Findings]]:
    """The report and the findings of each split, with what is seen only when splits are compared."""
    opened = {name: open_split(name, target) for name in names}
    found = [check_split(name, dataset, target) for name, dataset in opened.items()]
    datasets = [each for each in opened.values() if not isinstance(each, Findings)]
    if len(datasets) == len(names):
        first, last = datasets[0], datasets[-1]
        found[0].problems += compare_masks(datasets, found)
        if len(datasets) > 1:
            found[-1].problems += compare_images(first, last, content=True)
            found[-1].problems += _other_classes(first, last)
            if not is_published(first):
                found[0].problems += in_no_list(datasets)
        if target.test is not None and names[-1] == "val":
            found[-1].problems += small_images(last, found[-1], target.test)
    return [report_of(name, opened[name], findings) for name, findings in zip(names, found, strict=True)], found


# ---- what to check -----------------------------------------------------------------------------------------------
def open_target(target: str, overrides: Sequence[str]) -> Target:
    """The data of a recipe or of a folder. Raises CommandError or RecipeError where `target` is neither."""
    folder = Path(target)
    if folder.is_dir() and target not in list_recipes():
        recipe = _recipe_in(folder)
        if recipe is not None:
            return _of_recipe(load_recipe(str(recipe), overrides), str(recipe))
        if overrides:
            raise CommandError(
                f"{overrides[0]}: {target} is a folder without recipe, so there are no keys to set\nremove the argument"
            )
        return _of_layout(folder) or _of_folder(folder)
    if folder.suffix not in (".yaml", ".yml") and target not in list_recipes() and len(folder.parts) > 1:
        what = "a file that is no recipe" if folder.exists() else "no such folder"
        raise CommandError(f"{target}: {what}\nexpected a recipe's name, a .yaml file or a folder of data")
    return _of_recipe(load_recipe(target, overrides), target)


def _recipe_in(folder: Path) -> Path | None:
    """The only recipe among the YAML files of a folder."""
    recipes = []
    files = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    if len(files) > MOST_FILES:
        raise CommandError(
            f"{folder}: {len(files)} YAML files\nexpected at most {MOST_FILES}, of which one is a recipe\n"
            "give the file of the recipe"
        )
    for file in files:
        try:
            load_recipe(f"{folder}/{file.name}")
        except RecipeError:  # a YAML file of another program
            continue
        recipes.append(Path(folder, file.name))
    if len(recipes) > 1:
        raise CommandError(
            f"{folder}: {len(recipes)} recipes: {first_names([file.name for file in recipes])}\ngive one of these files"
        )
    return recipes[0] if recipes else None


def _of_recipe(recipe: Recipe, name: str) -> Target:
    data = recipe.data
    # Each pair is read only once: no cache. `partial`: images without mask are reported, and all other pairs are read.
    options = data.model_dump() | {"cache": False, "partial": True}
    build = partial(build_dataset, data.dataset, root=Path(data.root), options=options)
    where = "" if data.dataset == "synthetic" else f" below {data.root}"
    counts = LAYOUTS[data.dataset].counts if data.dataset in LAYOUTS else {}
    title = f"recipe {name}: data set {data.dataset}{where}"
    return Target(title, {split: partial(build, split) for split in SPLITS}, counts, recipe.test)


def _of_layout(root: Path) -> Target | None:
    """The published data set whose folders are below `root`, or None."""
    for name, layout in LAYOUTS.items():
        splits = [
            split
            for split in SPLITS
            if all((root / folders[split]).is_dir() for folders in (layout.images, layout.masks))
        ]
        if layout.lists:
            splits = [split for split in splits if (root / layout.lists[split]).is_file()]
        build = partial(build_dataset, name, root=root, options={"partial": True})
        if splits and (name not in COMMON_FOLDERS or _is_whole(build, layout.counts)):
            title = f"{root}: the layout of data set {name}"
            return Target(title, {split: partial(build, split) for split in splits}, layout.counts)
    return None


def _is_whole(build: Callable[[str], Dataset], counts: Mapping[str, int]) -> bool:
    """Whether every split has the published number of pairs."""
    try:
        return all(len(build(split)) == count for split, count in counts.items())
    except (DataError, OSError):
        return False


def _of_folder(root: Path) -> Target:
    """Image and mask folders as `data init` finds them, with the classes that it would write."""
    own = look_at_own(root)
    labels = own.labels
    notes = "".join(f"\n- {note}" for note in own.all_notes())
    title = f"{root}: images and {'annotations' if own.coco else 'masks'} as `ssaseg data init` finds them{notes}"
    if own.coco:
        return Target(title, {split: partial(dict.__getitem__, own.pairs, split) for split in own.pairs}, {})

    meaning: dict[str, Any] = {"reduce_zero_label": labels.reduce_zero_label, "raw_to_train": labels.raw_to_train}
    meaning |= {"channels": own.bands.channels, "levels": own.findings.headers.fitting}

    def build(split: str) -> Dataset:
        return own.found.datasets(root, labels.classes, labels.palette, **meaning)[split]

    splits: dict[str, Callable[[], Dataset]] = {split: partial(build, split) for split in own.pairs}
    return Target(title, splits, {})


# ---- one split ---------------------------------------------------------------------------------------------------
def open_split(split: str, target: Target) -> Dataset | Findings:
    """The data of a split. If it cannot be opened, findings with this as the problem."""
    try:
        return target.splits[split]()
    except (DataError, OSError) as error:
        return Findings(0, problems=[Problem("error", describe(error), "cannot be opened")])


def check_split(split: str, dataset: Dataset | Findings, target: Target) -> Findings:
    """What is wrong with one split by itself."""
    if isinstance(dataset, Findings):
        return dataset
    for note in getattr(dataset, "notes", ()):  # how a list of pairs was read
        echo(f"note, {split} split: {note}", err=True)
    findings = read_through(dataset, f"checked {split}")
    expected = target.counts.get(split)
    drawn = any(problem.kind == DRAWN for problem in findings.problems)
    if expected is not None and len(dataset) != expected and not drawn:
        text = f"{_count(len(dataset), 'pair')}; the published {split} split has {expected}"
        findings.problems.append(Problem("warning", text, "number of pairs"))
    return findings


def report_of(split: str, dataset: Dataset | Findings, findings: Findings) -> dict[str, Any]:
    """The report of one split for JSON."""
    if isinstance(dataset, Findings):
        return {"split": split, "pairs": 0, "classes": [], "raw_ids": [], **_problems(findings)}
    return {
        "split": split,
        "pairs": len(dataset),
        "palette_masks": sum(findings.palettes.values()),
        "smallest": _size(min(findings.sizes, key=_area, default=None)),
        "largest": _size(max(findings.sizes, key=_area, default=None)),
        "classes": list(_classes(dataset, findings)),
        "raw_ids": list(_raw_ids(dataset, findings)),
        **_problems(findings),
    }


def _other_classes(train: Dataset, val: Dataset) -> list[Problem]:
    try:
        require_same_classes(train.classes, val.classes)
    except DataError as error:
        return [Problem("error", str(error), "other classes")]
    return []


def _problems(findings: Findings) -> dict[str, Any]:
    return {"problems": [asdict(problem) for problem in findings.problems]}


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _size(size: tuple[int, int] | None) -> str | None:
    return None if size is None else f"{size[1]}x{size[0]}"


def _classes(dataset: Dataset, findings: Findings) -> Iterator[dict[str, Any]]:
    per_class = np.zeros(256, np.int64)
    np.add.at(per_class, dataset.label_lut, findings.pixels)
    total = max(int(per_class[: len(dataset.classes)].sum()), 1)
    for index, name in enumerate(dataset.classes):
        pixels, images = int(per_class[index]), int(findings.images[index])
        yield {"id": index, "name": name, "pixels": pixels, "share": pixels / total * 100, "images": images}


def _raw_ids(dataset: Dataset, findings: Findings) -> Iterator[dict[str, Any]]:
    """The raw ids in the files with their pixels, masks, and meaning: a class, "ignored" or "out of range"."""
    for raw in map(int, np.flatnonzero(findings.pixels)):
        train_id = int(dataset.label_lut[raw])
        meaning = "ignored" if train_id == IGNORED else dataset.classes[train_id]
        meaning = meaning if dataset.valid_raw[raw] else "out of range"
        yield {"id": raw, "is": meaning, "pixels": int(findings.pixels[raw]), "masks": int(findings.masks[raw])}


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def print_split(report: Mapping[str, Any], findings: Findings) -> None:
    """Prints the table of classes and the problems on stdout; of each severity the first ten in full."""
    if report["pairs"]:
        rows = [
            (row["name"], str(row["id"]), f"{row['pixels']:,}", f"{row['share']:.2f}", str(row["images"]))
            for row in report["classes"]
        ]
        low, high = report["smallest"], report["largest"]
        size = f", images of {low}" + (f" to {high}" if low != high else "") + " pixels" if low else ""
        masks = f", {report['palette_masks']} masks with a palette" if report["palette_masks"] else ""
        title = f"{report['split']} split: {_count(report['pairs'], 'pair')}{size}{masks}"
        print_table(("class", "id", "pixels", "share [%]", "images"), rows, title)
        total = max(sum(row["pixels"] for row in report["raw_ids"]), 1)
        for meaning in ("ignored", "out of range"):
            found = [row for row in report["raw_ids"] if row["is"] == meaning]
            if found:
                ids = [f"id {row['id']} ({row['pixels']:,} pixels in {_count(row['masks'], 'mask')})" for row in found]
                share = sum(row["pixels"] for row in found) / total
                echo(f"{meaning}: {share:.2%} of the pixels: {first_names(ids, 8)}")
    for severity, colour in (("error", "red"), ("warning", "yellow"), ("note", None)):
        for text in findings.messages(severity):
            echo(text, label=f"{severity}, {report['split']} split:", colour=colour)

"""Reading a whole data set, or a user's folder, in several processes with progress on stderr."""

import sys
from collections import Counter
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import numpy as np

from ssaseg.cli.console import progress_bar
from ssaseg.cli.data.recipe_text import OwnData
from ssaseg.cli.device import count_cores
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.signals import Interrupted, StopSignal
from ssaseg.datasets import DataError, Dataset, build_dataset
from ssaseg.datasets.check import Findings, look_through
from ssaseg.datasets.classnames import Labels, guess_labels, read_class_names
from ssaseg.datasets.decoding import open_image
from ssaseg.datasets.pairs import PairDataset, first_names
from ssaseg.datasets.published import LAYOUTS
from ssaseg.datasets.survey import Found, find_folders, require_prepared
from ssaseg.files.reading import read_file
from ssaseg.recipes import list_recipes

# More processes help little where the disk is the limit, and each of them holds an image in memory.
MOST_WORKERS = 8

# Pairs that are read of each split of a published data set.
SAMPLE = 512


def look_at(root: Path) -> OwnData:
    """Finds the folders below `root` and reads every mask, with progress on stderr.

    Raises CommandError and DataError where there are no pairs, or their masks hold no class ids.
    """
    if not root.is_dir():
        raise CommandError(f"{root}: no such folder\nexpected the folder that holds images and masks")
    require_prepared(root)
    found = find_folders(root)
    ids = [str(value) for value in range(255)]
    pairs: dict[str, Dataset] = {
        split: PairDataset(
            root / images,
            root / masks,
            ids,
            image_suffixes=found.image_suffixes,
            mask_suffix=found.mask_suffix,
            names=root / found.lists[listed] if listed else None,
            partial=True,
        )
        for split, (images, masks), listed in _splits(found)
    }
    per_split = {split: read_through(each, f"read {split}", decoded=0) for split, each in pairs.items()}
    findings = reduce(join_findings, per_split.values())
    names, notes = read_class_names(root)
    if not findings.pixels.any():
        raise _no_mask(pairs, findings)
    palette, count = findings.palettes.most_common(1)[0] if findings.palettes else (b"", 0)
    common = palette if count == sum(findings.sizes.values()) else None  # the same in all masks
    labels = guess_labels([int(value) for value in np.flatnonzero(findings.pixels)], names, common)
    labels.notes += notes
    for split, each in pairs.items():
        if each.unused_masks:
            files = [file.name for file in each.unused_masks]
            where = "" if split == "all" else f" of the {split} split"
            found.notes.append(f"masks{where} without image, not used: {len(files)} ({first_names(files)})")
    return OwnData(root, found, pairs, findings, labels, per_split)


def look_at_published(name: str, root: Path) -> OwnData:
    """A complete published data set. Only a sample is read, as only the sizes of the images are not known."""
    layout = LAYOUTS[name]
    pairs = {split: build_dataset(name, split, root=root, options={"partial": True}) for split in layout.counts}
    per_split = {split: look_through(each, SAMPLE, 0) for split, each in pairs.items()}
    folders = {split: (layout.images[split], layout.masks[split]) for split in pairs}
    notes = [
        f"this is {name}, according to its folders and number of pairs: data.dataset knows its classes and folders"
    ]
    if name == "pascal_context_59":
        notes.append("the background is ignored; to make it a class: data.dataset: pascal_context_60")
    if ready := [recipe for recipe in list_recipes() if recipe.startswith(f"{name}-")]:
        notes.append(f"ssaseg already has recipes for it, such as {ready[0]}")
    labels = Labels(list(pairs["train"].classes), [])
    found = Found(folders, layout.mask_suffix, (layout.image_suffix,), notes=notes)
    return OwnData(root, found, pairs, reduce(join_findings, per_split.values()), labels, per_split, name)


def read_through(dataset: Dataset, verb: str, decoded: int | None = None) -> Findings:
    """`look_through` in one process per core, at most `MOST_WORKERS`, with progress on stderr.

    Ctrl-C and SIGTERM take effect between two pairs: then SystemExit with 130 or 143.
    """
    cores = count_cores()
    done = 0
    with StopSignal() as stop, progress_bar(len(dataset), verb) as advance:

        def progress(pairs: int) -> None:
            nonlocal done
            done += pairs
            advance(pairs)
            if stop.requested:
                raise KeyboardInterrupt

        try:
            with stop.ending_waits():
                return look_through(dataset, None, decoded, min(cores, MOST_WORKERS), progress)
        except (KeyboardInterrupt, Interrupted, RuntimeError):
            if not stop.requested:  # RuntimeError: the signal came while a worker was starting
                raise
            echo(f"stopped after {done} of {len(dataset)} pairs", err=True)
            sys.exit(stop.exit_code)


def _splits(found: Found) -> Iterator[tuple[str, tuple[str, str], str | None]]:
    """Each split, its folders, and the key of its list of names, or None."""
    for split, folders in found.folders.items():
        if split == "all" and found.lists:
            yield from ((listed, folders, listed) for listed in found.lists)
        else:
            yield split, folders, None


def join_findings(one: Findings, other: Findings) -> Findings:
    return Findings(
        one.read + other.read,
        one.pixels + other.pixels,
        one.masks + other.masks,
        one.images + other.images,
        one.sizes + other.sizes,
        one.palettes + other.palettes,
        one.problems + other.problems,
    )


def _no_mask(pairs: dict[str, Dataset], findings: Findings) -> Exception:
    """The error where no mask could be read. Most often masks are in colours; then it lists the colours."""
    colours: Counter[tuple[int, int, int]] = Counter()
    files = [file for each in pairs.values() for file in each.mask_files]
    for file in files[:20]:
        try:
            with open_image(read_file(file)) as mask:
                listed = mask.convert("RGB").getcolors(2**16) if mask.mode in ("RGB", "RGBA") else None
        except Exception:  # damaged: the findings have its error
            continue
        colours.update({colour: count for count, colour in listed or []})  # type: ignore[misc]
    if not any(len(set(colour)) > 1 for colour in colours):  # damaged, or grey in three channels: see its error
        return DataError(findings.messages("error")[0])
    shown = ", ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour, _ in colours.most_common(16))
    more = f", and {len(colours) - 16} more" if len(colours) > 16 else ""
    return DataError(
        f"{files[0]}: masks in colour (RGB); colours in the first {min(len(files), 20)}: {shown}{more}\n"
        "expected one channel that holds class ids\n"
        "replace each colour by a number 0, 1, 2, …, pixels to ignore by 255, and write 8-bit grey or palette PNG files"
    )

"""Reading a whole data set, and a folder of one's own, in several processes with progress on stderr."""

import sys
from collections import Counter
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import numpy as np
from PIL import Image

from ssaseg.cli.console import progress_bar
from ssaseg.cli.data.recipe_text import Own
from ssaseg.cli.device import count_cores
from ssaseg.cli.errors import CommandError
from ssaseg.cli.signals import StopSignal
from ssaseg.datasets import DataError, Dataset, build_dataset
from ssaseg.datasets.check import Findings, look_through
from ssaseg.datasets.classnames import Labels, guess_labels, read_class_names
from ssaseg.datasets.pairs import PairDataset, some
from ssaseg.datasets.published import LAYOUTS
from ssaseg.datasets.survey import Found, find_folders, require_prepared
from ssaseg.recipes import list_recipes

# Reading more at once helps little where a disk is the limit, and each process holds an image.
MOST_WORKERS = 8

# Pairs of a published data set's split that are read.
SAMPLE = 512


def look_at(root: Path) -> Own:
    """Finds the folders below `root` and reads every mask, with progress on stderr.

    Raises CommandError and DataError where there are no pairs, or their masks hold no class ids.
    """
    if not root.is_dir():
        raise CommandError(f"{root}: no such folder\nexpected the folder that holds images and masks")
    require_prepared(root)
    found = find_folders(root)
    ids = [str(value) for value in range(255)]
    pairs = {
        split: PairDataset(
            root / images,
            root / masks,
            ids,
            image_suffixes=found.image_suffixes,
            mask_suffix=found.mask_suffix,
            names=root / found.lists[part] if part else None,
            partial=True,
        )
        for split, (images, masks), part in _parts(found)
    }
    parts = {split: watch(each, f"read {split}", decoded=0) for split, each in pairs.items()}
    findings = reduce(_join, parts.values())
    names, notes = read_class_names(root)
    if not findings.pixels.any():
        raise _no_mask(pairs, findings)
    whole = findings.palettes.most_common(1)[0] if findings.palettes else (b"", 0)
    shared = whole[0] if whole[1] == sum(findings.sizes.values()) else None
    labels = guess_labels([int(value) for value in np.flatnonzero(findings.pixels)], names, shared)
    labels.notes += notes
    for split, each in pairs.items():
        if each.unused_masks:
            files = [file.name for file in each.unused_masks]
            where = "" if split == "all" else f" of the {split} split"
            found.notes.append(f"masks{where} without image, left out: {len(files)} ({some(files)})")
    return Own(root, found, pairs, findings, labels, parts)


def look_at_published(name: str, root: Path) -> Own:
    """A published data set that is whole, of which a sample is read: it is only the sizes that are not known."""
    layout = LAYOUTS[name]
    pairs = {split: build_dataset(name, split, root=root, options={"partial": True}) for split in layout.counts}
    parts = {split: look_through(each, SAMPLE, 0) for split, each in pairs.items()}
    folders = {split: (layout.images[split], layout.masks[split]) for split in pairs}
    notes = [f"this is {name}, by its folders and its number of pairs: classes and folders come with data.dataset"]
    if name == "pascal_context_59":
        notes.append("the background is ignored; for a class of its own: data.dataset: pascal_context_60")
    if ready := [recipe for recipe in list_recipes() if recipe.startswith(f"{name}-")]:
        notes.append(f"recipes for it are shipped already, such as {ready[0]}")
    labels = Labels(list(pairs["train"].classes), [])
    found = Found(folders, layout.mask_suffix, (layout.image_suffix,), notes=notes)
    whole = {split: each for split, each in pairs.items() if isinstance(each, PairDataset)}
    return Own(root, found, whole, reduce(_join, parts.values()), labels, parts, name)


def watch(dataset: Dataset, verb: str, decoded: int | None = None) -> Findings:
    """`look_through` in as many processes as there are cores, with progress on stderr.

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
            return look_through(dataset, None, decoded, min(cores, MOST_WORKERS), progress)
        except (KeyboardInterrupt, RuntimeError):  # RuntimeError: the signal met a worker that was only starting
            if not stop.requested:
                raise
            print(f"stopped after {done} of {len(dataset)} pairs", file=sys.stderr)
            sys.exit(stop.exit_code)


def _parts(found: Found) -> Iterator[tuple[str, tuple[str, str], str | None]]:
    """Each split, its folders, and the key of its list of names, if it has one."""
    for split, folders in found.folders.items():
        if split == "all" and found.lists:
            yield from ((part, folders, part) for part in found.lists)
        else:
            yield split, folders, None


def _join(one: Findings, other: Findings) -> Findings:
    return Findings(
        one.read + other.read,
        one.pixels + other.pixels,
        one.masks + other.masks,
        one.images + other.images,
        one.sizes + other.sizes,
        one.palettes + other.palettes,
        one.problems + other.problems,
    )


def _no_mask(pairs: dict[str, PairDataset], findings: Findings) -> Exception:
    """Why not one mask could be read: masks in colours above all, then with the colours."""
    colours: Counter[tuple[int, int, int]] = Counter()
    files = [file for each in pairs.values() for file in each.mask_files]
    for file in files[:20]:
        try:
            with Image.open(file) as mask:
                listed = mask.convert("RGB").getcolors(2**16) if mask.mode in ("RGB", "RGBA") else None
        except (OSError, ValueError, SyntaxError):
            continue
        colours.update({colour: count for count, colour in listed or []})  # type: ignore[misc]
    if not any(len(set(colour)) > 1 for colour in colours):  # damaged, or grey in three channels: told by its own error
        return DataError(findings.told("error")[0])
    shown = ", ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour, _ in colours.most_common(16))
    more = f", and {len(colours) - 16} more" if len(colours) > 16 else ""
    return DataError(
        f"{files[0]}: masks in colour (RGB); colours in the first {min(len(files), 20)}: {shown}{more}\n"
        "expected one channel that holds class ids\n"
        "replace each colour by a number 0, 1, 2, … and write 8-bit grey or palette PNG; 255 for pixels to ignore"
    )

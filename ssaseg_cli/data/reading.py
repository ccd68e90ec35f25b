"""Reading a whole data set, or a user's folder, in several processes with progress on stderr."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import numpy as np

from ssaseg.cli.console import progress_bar
from ssaseg.cli.data.bands import Bands, look_at_bands, measured
from ssaseg.cli.data.recipe_text import OwnData
from ssaseg.cli.device import count_cores
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.signals import Interrupted, StopSignal
from ssaseg.datasets import DataError, Dataset, build_dataset
from ssaseg.datasets.base import IGNORED, Problem, grouped
from ssaseg.datasets.check import Findings, is_published, look_through
from ssaseg.datasets.checking.images import Images
from ssaseg.datasets.checking.splits import too_small
from ssaseg.datasets.checking.storage import about_255, is_object, is_soft, soft_text
from ssaseg.datasets.classnames import Labels, Names, guess_labels, known_names, read_class_names
from ssaseg.datasets.coco import CocoDataset
from ssaseg.datasets.conventions import recognise
from ssaseg.datasets.conventions.base import Convention, Tree, beside, prepare_command
from ssaseg.datasets.conventions.binary import BINARY, recognise_mixed
from ssaseg.datasets.conventions.colours import COLOURS, NoTable, count_colours, no_table, table_of_palettes
from ssaseg.datasets.conventions.colours import SAMPLE as COLOUR_SAMPLE
from ssaseg.datasets.conventions.grey import GREY
from ssaseg.datasets.conventions.hints import advise, beside_masks
from ssaseg.datasets.conventions.kitti import KITTI, LAST_ID
from ssaseg.datasets.conventions.layers import LAYERS
from ssaseg.datasets.conventions.pictures import ANY, some_of
from ssaseg.datasets.conventions.tables import Table
from ssaseg.datasets.decoding.images import shown_size
from ssaseg.datasets.ids import label_table
from ssaseg.datasets.pairs import PairDataset, first_names
from ssaseg.datasets.published import LAYOUTS
from ssaseg.datasets.survey import Found, NoMasks, find_folders, require_prepared, several_error
from ssaseg.recipes import Test, list_recipes

# More processes help little where the disk is the limit, and each of them holds an image in memory.
MOST_WORKERS = 8

# Pairs that are read of each split of a published data set.
SAMPLE = 512

# The share of masks that cannot be read as ids from which on all are looked at as pictures.
SEVERAL = 0.1

Pairs = PairDataset | CocoDataset
UNUSABLE = "mask that cannot be used"  # the kind of such a problem, see `PairDataset.inspect`


def look_at(
    root: Path,
    images: str | None = None,
    masks: str | None = None,
    found: Found | None = None,
    tree: Tree | None = None,
) -> OwnData:
    """Finds the folders below `root` and reads every mask, with progress on stderr.

    images, masks: what the user says about them, see `find_folders`. found, tree: where they are known. Raises
    CommandError and DataError where there are no pairs, where their masks hold no class ids, and where an annotation
    tool's convention is found that `ssaseg data prepare` converts: then it names the command.
    """
    if not root.is_dir():
        what = "a file" if root.exists() else "no such folder"
        raise CommandError(f"{root}: {what}\nexpected the folder that holds images and masks")
    require_prepared(root)
    tree, given = tree or Tree(root), images is not None or masks is not None
    others = found is None  # else the caller has looked for other labels
    try:
        found = found or find_folders(root, images, masks)
        pairs = found.datasets(root, ANY)
    except DataError as error:
        seen = None if given else recognise(tree)
        raise (_to_prepare(root, *seen) if seen else _advised(error, tree)) from None
    # Before anything is read: one of several masks of an image must never be taken for all.
    if not given and (layers := LAYERS.recognise(tree)):
        raise _to_prepare(root, LAYERS, layers)
    if found.several:
        raise several_error(root, found)
    bands, per_split = read_values(pairs, decoded=0)
    findings = reduce(Findings.joined, per_split.values())
    files = [file for each in pairs.values() for file in each.mask_files]
    table = table_of_palettes(tree, files) if findings.palettes else None
    known = _misread(tree, len(files), findings, table) if findings.pixels.any() else recognise(tree)
    if known:
        raise _to_prepare(root, *known)
    if not findings.pixels.any():
        raise _no_mask(root, files, findings)
    mixed = _require_alike(root, files, findings)
    if others and not given and (note := beside_masks(tree)):
        found.notes.append(note)
    names, notes = read_class_names(root, (*found.mask_folders, *found.image_folders))
    if found.published and not findings.pixels[len((segnet := known_names(found.published)).names) + 1 : IGNORED].any():
        names, notes = segnet, []
    if names is None and table:
        names = Names(table[0].file, dict(enumerate(table[0].classes)), dict(enumerate(table[0].palette)), False)
    own_ids = names is not None or given or findings.pixels[LAST_ID + 1 : IGNORED].any()
    if not own_ids and (kitti := KITTI.recognise(tree)):
        raise _to_prepare(root, KITTI, kitti)
    palette, count = findings.palettes.most_common(1)[0] if findings.palettes else (b"", 0)
    common = palette if count == sum(findings.sizes.values()) else None  # the same in all masks
    present = [0, 1] if mixed else [int(value) for value in np.flatnonzero(findings.pixels)]
    labels = guess_labels(present, names, common)
    if mixed and labels.raw_to_train is None:
        labels.raw_to_train = {0: 0, 1: 1, IGNORED: 1}
        findings.pixels[1] += findings.pixels[IGNORED]
        findings.masks[1] += findings.masks[IGNORED]
        labels.notes.append("the object is 1 in some masks and 255 in others: both are read as one class")
    labels.notes += notes
    if names is None and not mixed:
        _keep_255(labels, findings.pixels)
    table_of_ids, _ = label_table(len(labels.classes), IGNORED, labels.reduce_zero_label, labels.raw_to_train)
    found.notes += [_on_one_line(problem) for problem in about_255(findings.pixels, table_of_ids)]
    found.notes += notes_on_images(findings)
    for split, each in pairs.items():
        if each.unused_masks:
            unused = [file.name for file in each.unused_masks]
            where = "" if split == "all" else f" of the {split} split"
            found.notes.append(f"masks{where} without image, not used: {len(unused)} ({first_names(unused)})")
    return OwnData(root, found, dict(pairs), findings, labels, per_split, bands=bands)


def _advised(error: DataError, tree: Tree) -> DataError:
    """The error; where there are images without masks, with what is known about other files as the fix."""
    if isinstance(error, NoMasks) and (text := advise(tree)):
        return DataError("\n".join([*str(error).split("\n")[:2], text]))
    return error


def _misread(
    tree: Tree, masks: int, findings: Findings, table: tuple[Table, bool] | None
) -> tuple[Convention, str] | None:
    """The convention of masks that can be read as ids, all or some of them, but mean something else; or None."""
    unread = sum(problem.kind == UNUSABLE for problem in findings.problems)
    many = unread > SEVERAL * masks  # a few are damaged, and reported one by one
    if (many or (table and not table[1])) and (seen := COLOURS.recognise(tree)):
        return COLOURS, seen
    ids = set(np.flatnonzero(findings.pixels).tolist())
    # 0 and 255 alone are read as they are: as two classes.
    mixed = len(findings.palettes) > 1 or (IGNORED in ids and ids != {0, IGNORED} and not findings.storage.two_whites)
    white = ids <= {0, 1, IGNORED} and (unread or mixed)
    if (white or is_soft(findings.pixels)) and (seen := recognise_mixed(tree)):
        return BINARY, seen
    return (GREY, seen) if many and (seen := GREY.recognise(tree)) else None


def _keep_255(labels: Labels, pixels: np.ndarray) -> None:
    """Makes a class of 255 where it has more pixels than any id but 0, and those between are rare: then it is probably
    the object, and to ignore it would leave nothing to learn.
    """
    if IGNORED in labels.raw_ids or not is_object(pixels):
        return
    labels.classes.append("class_255")
    labels.raw_ids.append(IGNORED)
    labels.raw_to_train = {raw: number for number, raw in enumerate(labels.raw_ids)}
    labels.reduce_zero_label, labels.palette = False, None
    share = pixels[IGNORED] / pixels.sum()
    labels.notes = [note for note in labels.notes if "'ignored'" not in note]
    labels.notes.append(
        f"255 has {share:.1%} of the pixels, more than any id but 0: read as a class; if it means 'ignored', remove it "
        "from classes and raw_to_train"
    )


def _to_prepare(root: Path, convention: Convention, seen: str) -> CommandError:
    """The error that names the command for a convention. `seen`: what shows that the folder has it."""
    return CommandError(
        f"{root}: {seen}\n"
        "expected masks of class ids, or COCO-format JSON: training reads these only, others are converted once\n"
        f"run `{prepare_command(convention.kind, root)}`, then `ssaseg data init {shlex.quote(beside(root))}`"
    )


def _require_alike(root: Path, files: Sequence[Path], findings: Findings) -> bool:
    """Whether binary masks store their object as 1 in some files and as 255 in others, so that both are one class.

    Raises DataError where ids differ in their meaning from file to file, or are the levels of soft edges. Of palettes
    that differ a table of colours is printed, to be filled in.
    """
    if problem := next(findings.storage.palette_problems(), None):
        error = no_table(root, files, count_colours(some_of(files, COLOUR_SAMPLE)))
        if not isinstance(error, NoTable):
            raise DataError(problem.text)
        echo(error.table)
        fix = f"{str(error).splitlines()[-1]}; if the ids are right, save the masks as 8-bit grey"
        raise DataError("\n".join([*problem.text.split("\n")[:2], fix]))
    if is_soft(findings.pixels):
        raise DataError(soft_text(findings.pixels))
    return findings.storage.two_whites


def read_values(pairs: Mapping[str, Pairs], decoded: int | None = None) -> tuple[Bands, dict[str, Findings]]:
    """Reads all pairs: how many bands the images have, and the findings of each split. The data sets are set to read
    these bands, and the range of 16 bits that was found. decoded: see `look_through`.
    """
    files = [file for each in pairs.values() for file in each.image_files]
    bands = look_at_bands(files)
    for each in pairs.values():
        each.channels = bands.channels
    per_split = {split: read_through(each, f"read {split}", decoded) for split, each in pairs.items()}
    levels = reduce(Images.joined, (each.headers for each in per_split.values())).fitting
    for each in pairs.values():
        each.levels = levels
    return measured(bands, files, levels), per_split


def _on_one_line(problem: Problem) -> str:
    return problem.text.replace("\n", "; ")


def notes_on_images(findings: Findings) -> list[str]:
    """Doubts about the images, and what was left out, each on one line."""
    problems = [*findings.headers.problems(findings.headers.fitting)]
    problems += [each for each in findings.problems if each.kind in ("other types", "mask of several pages")]
    # Both splits may have one folder.
    notes = list(dict.fromkeys(text.replace("\n", "; ") for _, text in grouped(problems)))
    if levels := findings.headers.fitting:
        largest = f"{findings.headers.deep} images have 16 bits, largest value {findings.headers.largest}"
        notes.append(f"{largest}: data.range {list(levels)} becomes 0..255, in all images alike")
    return notes


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
    return OwnData(root, found, pairs, reduce(Findings.joined, per_split.values()), labels, per_split, name)


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


def small_images(dataset: Dataset, found: Findings, test: Test) -> list[Problem]:
    """An error for each size of validation images that the recipe's test section makes too small for a network.

    The sizes of images that were not read, as of a sample, are taken from their headers.
    """
    from ssaseg.cli.scoring.inference import SMALLEST

    sizes = dict(found.named)
    if found.read < len(dataset) and not is_published(dataset):
        for index, file in enumerate(dataset.image_files):
            size = shown_size(file)
            if size is not None and size not in sizes:
                sizes[size] = dataset.name(index)
    return list(too_small(sizes, SMALLEST, test.scale, test.multiple, test.ratios))


def _no_mask(root: Path, files: Sequence[Path], findings: Findings) -> Exception:
    """The error where no mask could be read. For masks in colours a table is printed, to be filled in."""
    counts = count_colours(some_of(files, COLOUR_SAMPLE))
    if not any(len(set(colour)) > 1 for colour in counts):  # damaged, or grey in three channels: see its error
        return DataError(findings.messages("error")[0])
    error = no_table(root, files, counts)
    if isinstance(error, NoTable):
        echo(error.table)
    return error

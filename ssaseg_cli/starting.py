"""`ssaseg data init`: look at somebody's own folder, and write a recipe that says what was found and guessed."""

import contextlib
import difflib
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import click
import numpy as np
from PIL import Image

from ssaseg.cli.console import CommandError, count_cores
from ssaseg.cli.evaluate import progress_bar
from ssaseg.cli.recipetext import Own, recipe_text
from ssaseg.cli.watch import StopSignal
from ssaseg.datasets import DataError, Dataset, build_dataset
from ssaseg.datasets.check import Findings, count_ids, look_through
from ssaseg.datasets.classnames import Labels, guess_labels, read_class_names
from ssaseg.datasets.decoding import read_mask
from ssaseg.datasets.pairs import PairDataset, some
from ssaseg.datasets.published import LAYOUTS
from ssaseg.datasets.survey import Found, find_folders, find_published, require_prepared, split_names
from ssaseg.models import list_models
from ssaseg.models.checkpoint import write_atomic
from ssaseg.recipes import RecipeError, list_recipes, load_recipe

# Reading more at once helps little where a disk is the limit, and each process holds an image.
MOST_WORKERS = 8
# Pairs of a published data set's split that are read.
SAMPLE = 512


def run_init(root: Path, out: Path | None, model: str, classifier: str) -> int:
    """Writes a recipe for the images and masks below `root` to `out` (None: ROOT's name + .yaml, here), beside it lists
    of names where these are needed, and prints the next commands.

    Returns 0, or 1 where some files cannot be used. Raises CommandError and DataError where there is nothing to train
    on, where a file would be overwritten, and for an unknown model.
    """
    if model not in list_models():
        near = difflib.get_close_matches(model, list_models(), n=1)
        mend = f"did you mean {near[0]}?" if near else "choose one of them"
        raise CommandError(f"--model {model}: no such network\nexpected one of: {', '.join(list_models())}\n{mend}")
    out = _target(root, out)
    name, notes = find_published(root)
    own = look_at(root) if name is None else look_at_published(name, root)
    own.notes += notes
    lists = {split: out.with_name(f"{out.stem}.{split}.txt") for split in ("train", "val")}
    splits = _splits(own)
    if empty := [split for split, names in splits.items() if not names]:
        raise CommandError(f"{root}: no image of the {empty[0]} split has a mask\n{own.findings.told('error')[0]}")
    # Images without mask are left out through lists, too.
    needed = "all" in own.pairs or (name is None and any(each.incomplete for each in own.pairs.values()))
    lists = lists if needed else {}
    for file in lists.values():
        _require_new(file)
    own.notes += _only_for_validation(own, splits)
    text = recipe_text(own, out, {s: len(n) for s, n in splits.items()}, lists, model, classifier)
    _write(out, text, lists, splits)
    for problem in own.findings.told("error"):
        click.echo(f"warning: {problem}", err=True)
    _tell(own, out, splits)
    return 1 if own.findings.count("error") else 0


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


# ---- files -------------------------------------------------------------------------------------------------------


def _target(root: Path, out: Path | None) -> Path:
    """The recipe's file: new, in a folder that is there, and not among the data unless that was asked for."""
    if out is None:
        out = Path(f"{root.resolve().name.lstrip('.') or 'own'}.yaml")
        if Path.cwd().is_relative_to(root.resolve()):
            raise CommandError(
                f"{out}: would be written among the data, in {Path.cwd()}\n"
                f"call from another folder, or say so: --out {shlex.quote(str(out))}"
            )
    if out.suffix not in (".yaml", ".yml"):
        raise CommandError(f"--out {out}: `train` takes only .yaml and .yml for files\nuse {out.with_suffix('.yaml')}")
    if not out.parent.is_dir():
        raise CommandError(f"--out {out}: no folder {out.parent}\nmake it first, or name another")
    _require_new(out)
    return out


def _require_new(file: Path) -> None:
    if file.exists():
        raise CommandError(f"{file}: is there already\ngive another name with --out, or remove it")


def _write(out: Path, text: str, lists: dict[str, Path], splits: dict[str, list[str]]) -> None:
    """The lists, then the recipe, checked by reading the data through it; nothing is left where one of them fails."""
    try:
        for split, file in lists.items():
            write_atomic(file, "".join(f"{name}\n" for name in splits[split]).encode())
        write_atomic(out, text.encode())
        data = load_recipe(str(out if len(out.parts) > 1 else Path(".", out))).data
        for split, names in splits.items():
            pairs = build_dataset(data.dataset, split, root=Path(data.root), options=data.model_dump())
            if [pairs.name(index) for index in range(len(pairs))] != names:
                raise DataError(f"{lists.get(split, out)}: other names are read from it than were written")
    except (OSError, RecipeError, DataError, UnicodeEncodeError) as error:
        for file in (*lists.values(), out):
            file.unlink(missing_ok=True)
        if isinstance(error, UnicodeEncodeError):
            raise CommandError("a file's name is not text in UTF-8\nrename the files whose names look broken") from None
        if odd := next((name for names in splits.values() for name in names if _is_no_line(name)), None):
            told = f"{odd!r}: a name that cannot stand on one line of a list"
            raise CommandError(f"{told}\nexpected letters, and no line feed\nrename the image and its mask") from None
        raise


def _is_no_line(name: str) -> bool:
    return "\n" in name or name.endswith("\r") or not name.strip()


def _only_for_validation(own: Own, splits: dict[str, list[str]]) -> list[str]:
    """A note where classes have no pixel in the training split, though they have in the other."""
    if own.published:
        return []
    if "train" in own.parts:
        unseen = own.parts["train"].masks == 0
    elif not set(splits["train"]).isdisjoint(splits["val"]):
        return []
    else:  # of the masks only the sum is known: those of validation are read again, if any class may be there alone
        pairs, chosen = own.pairs["all"], set(splits["val"])
        rare = (own.findings.masks > 0) & (own.findings.masks <= len(chosen))
        masks = np.zeros(256, np.int64)
        for index in range(len(pairs) if rare.any() else 0):
            if pairs.name(index) in chosen:
                with contextlib.suppress(DataError, OSError):  # told before
                    masks += count_ids(read_mask(pairs.mask_files[index])[0]) > 0
        unseen = rare & (masks == own.findings.masks)
    names = [
        name
        for raw, name in zip(own.labels.raw_ids, own.labels.classes, strict=True)
        if unseen[raw] and own.findings.masks[raw]
    ]
    return [f"classes with pixels only for validation, none for training: {some(names, 6)}"] if names else []


def _splits(own: Own) -> dict[str, list[str]]:
    """Names of the training and the validation pairs."""
    names = {split: [each.name(index) for index in range(len(each))] for split, each in own.pairs.items()}
    return split_names(names["all"]) if "all" in names else names


def _tell(own: Own, out: Path, splits: dict[str, list[str]]) -> None:
    click.echo(f"found {len(splits['train'])} training and {len(splits['val'])} validation pairs below {own.root}")
    for note in own.told():
        click.echo(f"- {note}")
    images, masks = next(iter(own.found.folders.values()))
    # Where masks lie among the images, these are not named by their folder.
    example = own.root / images if images != masks else next(iter(own.pairs.values())).image_files[0]
    recipe, folder = shlex.quote(str(out)), f"runs/{out.stem}"
    click.echo(
        f"wrote {out}: read it, and correct what is guessed wrongly; then\n"
        f"  ssaseg data check {recipe}\n"
        f"  ssaseg train {recipe}\n"
        f"  ssaseg predict {shlex.quote(f'{folder}/best.safetensors')} {shlex.quote(str(example))} "
        f"--out labels --save index,overlay"
    )

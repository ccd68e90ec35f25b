"""`ssaseg data init`: look at a user's folder, and write a recipe that says what was found and guessed."""

import contextlib
import difflib
import os
import shlex
from pathlib import Path

import numpy as np

from ssaseg.cli.data.init_coco import look_at_own
from ssaseg.cli.data.machine import has_start
from ssaseg.cli.data.reading import look_at, look_at_published
from ssaseg.cli.data.recipe_text import OwnData, recipe_text
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.datasets import DataError, build_dataset
from ssaseg.datasets.decoding import read_mask
from ssaseg.datasets.inspection import count_ids
from ssaseg.datasets.pairs import first_names
from ssaseg.datasets.survey import find_published, split_names
from ssaseg.files.writing import write_atomic
from ssaseg.models import list_models
from ssaseg.recipes import RecipeError, load_recipe


def run_init(
    root: Path,
    out: Path | None,
    model: str | None,
    classifier: str,
    images: str | None = None,
    masks: str | None = None,
) -> int:
    """Writes a recipe for the images and masks below `root` to `out` (None: the name of `root` + .yaml, in the current
    folder), writes lists of names or of pairs beside it where they are needed, and prints the next commands. images,
    masks: the folder that holds them, or of masks the ending of their names, where the user chooses.

    Returns 0, or 1 where some files cannot be used. Raises CommandError and DataError where there is nothing to train
    on, where a file would be overwritten, and for an unknown model. model: None: one that fits the machine.
    """
    if model is not None and model not in list_models():
        near = difflib.get_close_matches(model, list_models(), n=1)
        fix = f"did you mean {near[0]}?" if near else "choose one of them"
        raise CommandError(f"--model {model}: no such network\nexpected one of: {', '.join(list_models())}\n{fix}")
    out = _target(root, out)
    given = images is not None or masks is not None
    name, notes = (None, []) if given else find_published(root)
    if given:
        own = look_at(root, images, masks)
    else:
        own = look_at_own(root) if name is None else look_at_published(name, root)
    own.notes += notes
    if "all" in own.pairs and len(own.pairs["all"]) == 1:
        own.notes.append("there is one pair, for training and validation: its score says nothing about new images")
    lists = {split: out.with_name(f"{out.stem}.{split}.txt") for split in ("train", "val")}
    splits = _splits(own)
    if empty := [split for split, names in splits.items() if not names]:
        raise CommandError(f"{root}: no image of the {empty[0]} split has a mask\n{own.findings.messages('error')[0]}")
    # Lists are also written where images have no mask: they leave these images out.
    needed = "all" in own.pairs or (name is None and any(each.incomplete for each in own.pairs.values()))
    lists = lists if needed or (own.found.pairs and not own.found.lists) else {}
    for file in lists.values():
        _require_new(file)
    own.notes += _only_for_validation(own, splits)
    text = recipe_text(own, out, {s: len(n) for s, n in splits.items()}, lists, model, classifier)
    lines = _paired_lines(own, splits) if own.found.pairs else splits
    _write(out, text, lists, splits, lines)
    for problem in own.findings.messages("error"):
        echo(f"warning: {problem}", err=True)
    _print_summary(own, out, splits)
    if model is None and not has_start():
        echo("few images? a start from ImageNet helps: pip install 'ssaseg[imagenet]', and write the recipe again")
    return 1 if own.findings.count("error") else 0


# ---- files -------------------------------------------------------------------------------------------------------
def _target(root: Path, out: Path | None) -> Path:
    """The recipe's file. It must be new, in a folder that exists, and not among the data unless `out` says so."""
    if out is None:
        out = Path(f"{Path(os.path.realpath(root)).name.lstrip('.') or 'own'}.yaml")
        if Path.cwd().is_relative_to(os.path.realpath(root)):
            raise CommandError(
                f"{out}: would be written among the data, in {Path.cwd()}\n"
                f"run the command in another folder, or request this file: --out {shlex.quote(str(out))}"
            )
    if out.suffix not in (".yaml", ".yml"):
        raise CommandError(f"--out {out}: `train` reads only .yaml and .yml files\nuse {out.with_suffix('.yaml')}")
    if not out.parent.is_dir():
        raise CommandError(f"--out {out}: no folder {out.parent}\ncreate it first, or choose another folder")
    _require_new(out)
    return out


def _require_new(file: Path) -> None:
    if file.exists():
        raise CommandError(f"{file}: already exists\ngive another name with --out, or remove the file")


def _paired_lines(own: OwnData, splits: dict[str, list[str]]) -> dict[str, list[str]]:
    """For each split the lines of its list of pairs: image and mask with a tab between them."""
    lines = {}
    for split, names in splits.items():
        each = own.pairs[split if split in own.pairs else "all"]
        files = zip(each.image_files, each.mask_files, strict=True)
        paths = ["\t".join(file.relative_to(own.root).as_posix() for file in pair) for pair in files]
        by_name = {each.name(index): path for index, path in enumerate(paths)}
        lines[split] = [by_name[name] for name in names]
    return lines


def _write(
    out: Path, text: str, lists: dict[str, Path], splits: dict[str, list[str]], lines: dict[str, list[str]]
) -> None:
    """Writes `lines` as lists, then the recipe, and checks them by reading the data through the recipe. If one of these
    steps fails, all files are removed again.
    """
    try:
        for split, file in lists.items():
            write_atomic(file, "".join(f"{line}\n" for line in lines[split]).encode())
        write_atomic(out, text.encode())
        data = load_recipe(str(out if len(out.parts) > 1 else Path(".", out))).data
        for split, names in splits.items():
            pairs = build_dataset(data.dataset, split, root=Path(data.root), options=data.model_dump())
            if [pairs.name(index) for index in range(len(pairs))] != names:
                raise DataError(f"{lists.get(split, out)}: the names that are read differ from those that were written")
    except (OSError, RecipeError, DataError, UnicodeEncodeError) as error:
        for file in (*lists.values(), out):
            file.unlink(missing_ok=True)
        if isinstance(error, UnicodeEncodeError):
            raise CommandError("a file name is not UTF-8 text\nrename the files whose names look broken") from None
        tabs = 0 if lines is splits else 1
        if odd := next((line for each in lines.values() for line in each if _is_no_line(line, tabs)), None):
            got = f"{odd!r}: a name that cannot be written as one line of a list"
            raise CommandError(f"{got}\nexpected letters, and no line feed\nrename the image and its mask") from None
        raise


def _is_no_line(line: str, tabs: int) -> bool:
    return "\n" in line or line.endswith("\r") or not line.strip() or (tabs > 0 and line.count("\t") > tabs)


def _only_for_validation(own: OwnData, splits: dict[str, list[str]]) -> list[str]:
    """A note where classes have pixels in the validation split, but none in the training split."""
    if own.published or (own.coco and "train" not in own.per_split):
        return []
    if "train" in own.per_split:
        unseen = own.per_split["train"].masks == 0
    elif not set(splits["train"]).isdisjoint(splits["val"]):
        return []
    else:  # only the counts of all masks are known: those of validation are read again, if a class may be only in them
        pairs, chosen = own.pairs["all"], set(splits["val"])
        rare = (own.findings.masks > 0) & (own.findings.masks <= len(chosen))
        masks = np.zeros(256, np.int64)
        for index in range(len(pairs) if rare.any() else 0):
            if pairs.name(index) in chosen:
                with contextlib.suppress(DataError, OSError):  # already reported
                    masks += count_ids(read_mask(pairs.mask_files[index]).ids) > 0
        unseen = rare & (masks == own.findings.masks)
    names = [
        name
        for raw, name in zip(own.labels.raw_ids, own.labels.classes, strict=True)
        if unseen[raw] and own.findings.masks[raw]
    ]
    return [f"classes with pixels only for validation, none for training: {first_names(names, 6)}"] if names else []


def _splits(own: OwnData) -> dict[str, list[str]]:
    """Names of the training and the validation pairs."""
    names = {split: [each.name(index) for index in range(len(each))] for split, each in own.pairs.items()}
    return split_names(names["all"]) if "all" in names else names


def _print_summary(own: OwnData, out: Path, splits: dict[str, list[str]]) -> None:
    echo(f"found {len(splits['train'])} training and {len(splits['val'])} validation pairs below {own.root}")
    for note in own.all_notes():
        echo(f"- {note}")
    folders = own.found.folders.values() or [(own.found.image_folders[0], own.found.mask_folders[0])]
    images, masks = next(iter(folders))
    # Where images and masks are in the same folder, the example for `predict` is one image, not the folder.
    example = own.root / images if images != masks else next(iter(own.pairs.values())).image_files[0]
    recipe, folder = shlex.quote(str(out)), f"runs/{out.stem}"
    echo(
        f"wrote {out}: read it, and correct wrong guesses; then run\n"
        f"  ssaseg data check {recipe}\n"
        f"  ssaseg train {recipe}\n"
        f"  ssaseg predict {shlex.quote(f'{folder}/best.safetensors')} {shlex.quote(str(example))} "
        f"--out labels --save index,overlay"
    )

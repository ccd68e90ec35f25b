"""`ssaseg data init`: look at somebody's own folder, and write a recipe that says what was found and guessed."""

import difflib
import json
import os
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import click
import numpy as np
from PIL import Image

from ssaseg.cli.console import CommandError
from ssaseg.cli.evaluate import progress_bar
from ssaseg.cli.watch import StopSignal
from ssaseg.datasets import DataError, Dataset, default_palette
from ssaseg.datasets.check import Findings, look_through
from ssaseg.datasets.pairs import PairDataset
from ssaseg.datasets.survey import Found, Labels, find_folders, guess_labels, read_class_names, split_names
from ssaseg.models import list_models
from ssaseg.models.checkpoint import write_atomic
from ssaseg.recipes import RecipeError, load_recipe, recipe_file

# Reading more at once helps little where a disk is the limit, and each process holds an image.
MOST_WORKERS = 8
# Passes over the training images; and bounds on steps, so that few images are not learnt too shortly or many too long.
PASSES, FEWEST_STEPS, MOST_STEPS = 200, 2000, 80000


@dataclass
class Own:
    """A folder of one's own, read: where its pairs are, what is in them, what their ids are taken to mean."""

    root: Path
    found: Found
    pairs: dict[str, PairDataset]  # split -> the complete pairs, with all 255 ids as classes
    findings: Findings  # of all of them together
    labels: Labels


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
    own = look_at(root)
    lists = {split: out.with_name(f"{out.stem}.{split}.txt") for split in ("train", "val")}
    splits = _splits(own)
    if empty := [split for split, names in splits.items() if not names]:
        raise CommandError(f"{root}: no image of the {empty[0]} split has a mask\n{own.findings.told('error')[0]}")
    # Images without mask are left out through lists, too.
    needed = "all" in own.pairs or any(each.incomplete for each in own.pairs.values())
    written = {lists[split]: names for split, names in splits.items() if needed}
    for file in written:
        _require_new(file)
    text = recipe_text(own, out, {s: len(n) for s, n in splits.items()}, lists if needed else {}, model, classifier)
    _write(out, text, written)
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
    found = find_folders(root)
    ids = [str(value) for value in range(255)]
    pairs = {
        split: PairDataset(
            root / images,
            root / masks,
            ids,
            mask_suffix=found.mask_suffix,
            names=root / found.lists[part] if part else None,
            partial=True,
        )
        for split, (images, masks), part in _parts(found)
    }
    findings = reduce(_join, (watch(each, f"read {split}", decoded=0) for split, each in pairs.items()))
    names = read_class_names(root)
    if not findings.pixels.any():
        raise _no_mask(pairs, findings)
    whole = findings.palettes.most_common(1)[0] if findings.palettes else (b"", 0)
    shared = whole[0] if whole[1] == sum(findings.sizes.values()) else None
    labels = guess_labels([int(value) for value in np.flatnonzero(findings.pixels)], names, shared)
    return Own(root, found, pairs, findings, labels)


def watch(dataset: Dataset, verb: str, decoded: int | None = None) -> Findings:
    """`look_through` in as many processes as there are cores, with progress on stderr.

    Ctrl-C and SIGTERM take effect between two pairs: then SystemExit with 130 or 143.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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
        one.total + other.total,
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
        raise CommandError(f"--out {out}: `train` takes only .yaml and .yml for files\nuse {out}.yaml")
    if not out.parent.is_dir():
        raise CommandError(f"--out {out}: no folder {out.parent}\nmake it first, or name another")
    _require_new(out)
    return out


def _require_new(file: Path) -> None:
    if file.exists():
        raise CommandError(f"{file}: is there already\ngive another name with --out, or remove it")


def _write(out: Path, text: str, lists: dict[Path, list[str]]) -> None:
    """The lists, then the recipe, checked by reading it; nothing is left where one of them fails."""
    try:
        for file, names in lists.items():
            write_atomic(file, "".join(f"{name}\n" for name in names).encode())
        write_atomic(out, text.encode())
        load_recipe(str(out if len(out.parts) > 1 else Path(".", out)))
    except (OSError, RecipeError, UnicodeEncodeError) as error:
        for file in (*lists, out):
            file.unlink(missing_ok=True)
        if isinstance(error, UnicodeEncodeError):
            raise CommandError("a file's name is not text in UTF-8\nrename the files whose names look broken") from None
        raise


def _splits(own: Own) -> dict[str, list[str]]:
    """Names of the training and the validation pairs."""
    names = {split: [each.name(index) for index in range(len(each))] for split, each in own.pairs.items()}
    return split_names(names["all"]) if "all" in names else names


def _tell(own: Own, out: Path, splits: dict[str, list[str]]) -> None:
    click.echo(f"found {len(splits['train'])} training and {len(splits['val'])} validation pairs below {own.root}")
    for note in (*own.found.notes, *own.labels.notes):
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


# ---- the recipe's text -------------------------------------------------------------------------------------------


def recipe_text(
    own: Own, out: Path, counts: dict[str, int], lists: dict[str, Path], model: str, classifier: str
) -> str:
    """A recipe with comments. `counts`: pairs a split; `lists`: files of names, where there are any."""
    scale, crop, test = sizes(own.findings.sizes)
    batch = 16 if counts["train"] >= 16 else 8
    steps = min(max(PASSES * counts["train"] // batch // 100 * 100, FEWEST_STEPS), MOST_STEPS)
    family = model.partition("_")[0]
    base = next((name for name in (f"_{model}", f"_{family}", f"_{family}_b") if _is_shipped(name)), None)
    text = [
        *_header(own, out, counts, steps, batch, model, classifier),
        *([f"extends: {base} # learning rate and its rules", ""] if base else []),
        "model:",
        f"  name: {model}",
        f"  classifier: {classifier}",
        "  pretrained: null # or a checkpoint to start from; ImageNet weights, made by `ssaseg convert`, help a lot",
        "",
        "data:",
        f"  root: {_quote(own.root)}",
        *_folders(own, lists),
        f"  mask_suffix: {_quote(own.found.mask_suffix)}",
        *_classes(own),
        "",
        "augment:",
        f"  scale: {scale} # [width, height] [pixels], from the images' sizes",
        f"  crop: {crop} # [height, width]",
        "",
        "test:",
        f"  scale: {'null # as they are' if test is None else test}",
        "",
        "optim:",
        *([] if base else ["  lr: 2.5e-4"]),
        f"  warmup: {min(1500, steps // 10)}",
        "",
        "train:",
        f"  steps: {steps} # {steps * batch // counts['train']} passes over the training images",
        f"  batch: {batch}",
        "  amp: bf16 # for a CUDA GPU; on a CPU: off",
        f"  workers: {min(os.cpu_count() or 1, 4)}",
        f"  eval_every: {steps // 10}",
        f"  save_every: {min(steps // 10, 1000)}",
    ]
    return "\n".join(text) + "\n"


def _header(
    own: Own, out: Path, counts: dict[str, int], steps: int, batch: int, model: str, classifier: str
) -> Iterator[str]:
    (low, _), (high, _) = (
        pick(own.findings.sizes.items(), key=lambda item: item[0][0] * item[0][1]) for pick in (min, max)
    )
    size = f"{low[1]}x{low[0]}" + (f" to {high[1]}x{high[0]}" if low != high else "")
    yield f"# {out.stem}: {model} with the {classifier} classifier on one's own images. Written by `ssaseg data init`."
    yield "#"
    yield f"# Command: ssaseg train {shlex.quote(str(out))}"
    yield f"# Cost:    {steps} steps of {batch} images; made for one CUDA GPU, time not measured."
    yield "# Score:   not measured."
    yield f"# Found:   {counts['train']} training and {counts['val']} validation pairs; images of {size} pixels."
    yield "#"
    yield "# Guessed; correct what is wrong:"
    notes = [*own.found.notes, *own.labels.notes]
    if "all" in own.pairs:
        notes.append("no splits were there: a fifth of the pairs, chosen by a hash of the names, is for validation")
    for note in notes:
        yield from textwrap.wrap(note, 112, initial_indent="# - ", subsequent_indent="#   ")
    yield ""


def _folders(own: Own, lists: dict[str, Path]) -> Iterator[str]:
    for split in ("train", "val"):
        images, masks = own.found.folders.get(split) or own.found.folders["all"]
        words = f"images: {_quote(images)}, masks: {_quote(masks)}"
        names = None
        if lists:  # relative to the root, which may be anywhere
            names = os.path.relpath(lists[split].resolve(), own.root.resolve())
        elif own.found.lists:
            names = own.found.lists[split]
        yield f"  {split}: {{{words}{f', names: {_quote(names)}' if names else ''}}}"


def _classes(own: Own) -> Iterator[str]:
    """Classes with what was seen of each, and the keys that say what ids mean."""
    labels, findings = own.labels, own.findings
    total = max(int(findings.pixels.sum()), 1)
    yield "  classes:"
    for raw, name in zip(labels.raw_ids, labels.classes, strict=True):
        share = findings.pixels[raw] / total
        yield f"    - {_quote(name)} # id {raw}: {share:.2%} of the pixels, in {findings.masks[raw]} masks"
    if labels.palette and tuple(labels.palette) != default_palette(len(labels.palette)):
        yield "  palette:"
        yield from (f"    - {list(colour)}" for colour in labels.palette)
    if labels.reduce_zero_label:
        yield "  reduce_zero_label: true"
    if labels.raw_to_train:
        yield f"  raw_to_train: {{{', '.join(f'{raw}: {train}' for raw, train in labels.raw_to_train.items())}}}"


def sizes(found: Counter[tuple[int, int]]) -> tuple[list[int], list[int], list[int] | None]:
    """`augment.scale` (width, height), `augment.crop` (height, width) and `test.scale` for images of these sizes.

    Images of one size keep it, up to a short side of 512; images of many are fitted to their median short side.
    """
    shorts = sorted(min(size) for size in found.elements())
    short = min(max(shorts[len(shorts) // 2], 32), 512)
    if len(found) == 1:
        ((height, width),) = found
        factor = short / min(height, width)
        scale = [max(round(width * factor), 32), max(round(height * factor), 32)]
        crop = [max(min(side, 512) // 32 * 32, 32) for side in reversed(scale)]
        return scale, crop, None if factor == 1 else scale
    side = max(short // 32 * 32, 32)
    return [4 * short, short], [side, side], [4 * short, short]


def _is_shipped(name: str) -> bool:
    try:
        return recipe_file(name).exists()
    except RecipeError:
        return False


def _quote(value: object) -> str:
    """As YAML: JSON's text is, and needs no care about what it holds."""
    return json.dumps(str(value), ensure_ascii=False)

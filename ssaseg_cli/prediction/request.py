"""What `ssaseg predict` is to do, and which options do not fit together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssaseg.cli.engine.opening import checkpoint_sum
from ssaseg.cli.errors import CommandError
from ssaseg.cli.sharding import WHOLE, Shard
from ssaseg.cli.tiling.options import Tiles
from ssaseg.recipes import Test


@dataclass(frozen=True)
class Request:
    """What is to be labelled, and how; see the help of the command.

    save: kinds of results, see `KINDS`. resume: skip images whose results of all these kinds exist, made from the same
    image by the same checkpoint. max_pixels: of an image; larger ones are skipped. exact: the arithmetic of
    training's evaluation, bit for bit. precision: float32, bf16, fp16, or auto, see `precision.choose`. changes: keys
    of the test protocol to change. timings: print where the time went. backend, classes, recipe: as `make_engine` and
    `open_file` take them. legend: whether overlays have one. keep_suffix: see `find_sources`. annotations: a
    COCO-format file with the ids for `rle.json`. shard: label its images only, see `shards.py`. engine: None: this
    process; or an address of Ray, as `require_ray` returns it, whose `actors` label images, see `Opening`. out: a
    folder, or as text an address or a tar. listing: a file with more inputs, one a line, see `read_list`. tiles: of
    large images, see `large.py`; None: images are labelled whole. where, only: see `selection.py`.
    """

    checkpoint: Path
    inputs: Sequence[str]
    out: Path | str
    save: Sequence[str]
    resume: bool
    device: str
    max_pixels: int = 100_000_000
    exact: bool = False
    precision: str = "auto"
    changes: Mapping[str, Any] = field(default_factory=dict)
    timings: bool = False
    backend: str = "auto"
    classes: str | None = None
    recipe: str | None = None
    legend: bool = True
    keep_suffix: bool = False
    annotations: Path | None = None
    shard: Shard = WHOLE
    engine: str | None = None
    actors: int | None = None
    listing: str | None = None
    tiles: Tiles | None = None
    where: str | None = None
    only: str | None = None

    @property
    def places(self) -> list[str]:
        """All that inputs are taken from."""
        return [*self.inputs, *([] if self.listing is None else ["--list", self.listing])]


def require_together(request: Request) -> None:
    """Raises CommandError for options of which one does not know the other."""
    if request.engine is not None and request.timings:
        raise CommandError("--timings: times the stages of one process, not of actors\nleave it out, or --engine")
    if request.tiles is None:
        return
    if request.engine is not None:
        raise CommandError("--tile: an image is labelled by one process, from top to bottom\nleave it out, or --engine")
    if request.where is not None:
        raise CommandError("--where: not known before all tiles of an image are written\nleave it out, or --tile")


def what_else(request: Request, metadata: Mapping[str, Any], protocol: Test) -> str:
    """What decides results besides checkpoint and image; empty for the options' defaults."""
    text = ""
    if request.changes or request.classes or request.recipe:
        text += str((protocol, metadata["mean"], metadata["std"], metadata["classes"]))
    if request.tiles is not None:
        text += str(request.tiles)
    if not request.legend:
        text += "no legend"
    return text if request.annotations is None else text + checkpoint_sum(request.annotations)

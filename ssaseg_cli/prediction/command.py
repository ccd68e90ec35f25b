"""`ssaseg predict`: its arguments and help. PyTorch is imported inside the function, so that `--help` is quick."""

from pathlib import Path
from typing import Any

import click

from ssaseg.cli.cluster import parse_engine, require_ray
from ssaseg.cli.completion import in_list
from ssaseg.cli.importing import quick_imports
from ssaseg.cli.options import (
    backend_option,
    device_option,
    network_file,
    opening_options,
    precision_option,
    protocol_options,
)
from ssaseg.cli.places.addresses import is_address, local_path
from ssaseg.cli.places.names import is_tar
from ssaseg.cli.results.kinds import KINDS
from ssaseg.cli.sharding import chosen_shard, shard_option
from ssaseg.cli.tiling.options import tile_options, tiles_of


def _kinds(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(kind.strip() for kind in value.split(",")))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(KINDS)}", context, parameter)
    return kinds


def _engine(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    try:
        return None if value is None else parse_engine(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}.", context, parameter) from None


# Options that change the test protocol, which `tiles_of` reads.
VIEWS = ("scale", "size", "ratios", "flip", "slide", "whole", "tile", "overlap", "blend")


class _Out(click.Path):
    """A folder; or, as text, an address or the name of a tar."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        text = local_path(str(value))
        elsewhere = is_address(text) or (is_tar(text) and not Path(text).is_dir())
        return text if elsewhere else super().convert(text, parameter, context)


@click.command()
@click.argument("checkpoint", type=network_file)
@click.argument("inputs", metavar="INPUT...", nargs=-1)
@click.option("--list", "listing", metavar="FILE", help="File with more INPUTs, one a line; - is stdin.")
@click.option(
    "--out",
    required=True,
    type=_Out(file_okay=False, path_type=Path),
    help="Folder, address (s3://…) or .tar to write to.",
)
@click.option(
    "--save",
    default="index",
    show_default=True,
    callback=_kinds,
    shell_complete=in_list(KINDS),
    help=f"Results to save: {', '.join(KINDS)}.",
)
@click.option("--legend/--no-legend", default=True, show_default=True, help="Whether overlays name their classes.")
@click.option("--keep-suffix", is_flag=True, help="Name results by the whole name of the image: a.jpg.png.")
@click.option(
    "--annotations",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="COCO-format file with the ids of images and categories for rle.json.",
)
@click.option(
    "--where", metavar="CONDITION", help="Write results only of images for which this holds, such as 'car>0.01'."
)
@click.option("--only", metavar="CLASS,…", help="Only these classes in results; other pixels: 255, black, no colour.")
@click.option(
    "--resume", "--skip-existing", "resume", is_flag=True, help="Skip images that CHECKPOINT has labelled already."
)
@shard_option
@click.option(
    "--max-pixels",
    default=100_000_000,
    show_default=True,
    type=click.IntRange(1, 2**28),  # what the decoder takes: `ssaseg.datasets.decoding.MAX_PIXELS`
    help="Skip larger images; not with --tile.",
)
@click.option("--exact", is_flag=True, help="The arithmetic of training's evaluation, bit for bit; slower.")
@precision_option("auto: bf16 if it is faster and keeps 99.5 % of labels")
@protocol_options
@click.option(
    "--engine",
    metavar="ray[://HOST:PORT]",
    callback=_engine,
    help="Label in actors of Ray: on this machine, or a cluster.  [default: in this process]",
)
@click.option("--actors", type=click.IntRange(1), help="Actors of --engine.  [default: as many as there is room for]")
@tile_options
@click.option("--timings", is_flag=True, help="Print where the time went.")
@backend_option
@opening_options
@device_option
@click.pass_context
def predict(context: click.Context, **given: Any) -> int:
    """Label images.

    Each INPUT is a file, a folder (searched recursively; its structure is kept), a glob pattern in quotes, a tar as
    WebDataset has them, or an address such as s3://bucket/photos; see docs/places.md. Results are written to OUT/KIND/,
    under the image's name without suffix; OUT/classes.json has names and colours of the classes. An image that cannot
    be read or labelled is reported and skipped; the exit code is then 1. Results of earlier runs stay, also in
    OUT/rle.json and OUT/shares.json, unless the same image is labelled again. Several commands may write different
    images to one OUT at the same time. OUT/manifest.jsonl has a line for each image.

    --shard I/N labels the images of one shard of N; `ssaseg merge OUT` then joins them. See docs/shards.md.
    --engine ray shares the images out among actors of Ray (extra ray); results are the same. See docs/clusters.md.

    \b
    index    palette PNG of class numbers      color    PNG of class colours
    overlay  colours over the image            probs    .npz of probabilities
    rle      COCO results, OUT/rle.json        coarse   palette PNG, before SSA adapts
    confidence   grey PNG of the labels' probabilities: 255 is 1
    polygons     GeoJSON of the regions of each class, with --tile
    shares   share of each class in an image, OUT/shares.json and OUT/shares.csv

    Images that are too large for memory: --tile labels them tile by tile, at their own size, and writes TIFF files with
    their georeference and overviews. It needs the extra `large`.

    The test protocol is that of the checkpoint; --scale, --size, --ratios, --flip, --slide and --whole change it.
    Photos that are much larger than the images in training get worse labels; a warning says how to resize them.
    --where compares shares of classes in an image, 0 to 1 or with %, by < <= > >= == !=, with `and`, `or`, `not` and
    brackets; names with spaces are in quotes. Shares in shares.json are those of all classes, also with --only.
    pycocotools reads OUT/rle.json by COCO("rle.images.json").loadRes("rle.json"), or beside the file of --annotations.

    \b
    Example:
      ssaseg predict best.safetensors photos 'more/**/*.jpg' --out labels --save index,overlay
      ssaseg predict best.safetensors photos --out labels --size 512 --save overlay,shares
      ssaseg predict best.safetensors photos --out cars --where 'car>0.01 and person==0' --only car
      ssaseg predict best.safetensors 'photos-{000..003}.tar' --out 'labels-%06d.tar'
    """
    tiles, changes = tiles_of(given)
    if not given["inputs"] and given["listing"] is None:
        (missing,) = (each for each in context.command.params if each.name == "inputs")
        raise click.MissingParameter(ctx=context, param=missing)
    if given["actors"] is not None and given["engine"] is None:
        raise click.UsageError(f"--actors {given['actors']}: only with --engine ray")
    if given["engine"] is not None:  # an address that does not answer is an error before anything else is done
        given["engine"] = require_ray(given["engine"])
    given["shard"] = chosen_shard(given["shard"])
    given["recipe"] = given.pop("protocol")
    with quick_imports():
        from ssaseg.cli.prediction.predict import run_predict

    return run_predict(**{key: each for key, each in given.items() if key not in VIEWS}, changes=changes, tiles=tiles)

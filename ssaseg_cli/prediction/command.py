"""`ssaseg predict`: its arguments and help. PyTorch is imported inside the function, so that `--help` is quick."""

from pathlib import Path
from typing import Any

import click

from ssaseg.cli.completion import in_list
from ssaseg.cli.importing import quick_imports
from ssaseg.cli.options import (
    backend_option,
    device_option,
    network_file,
    opening_options,
    precision_option,
    protocol_changes,
    protocol_options,
)
from ssaseg.cli.prediction.kinds import KINDS


def _kinds(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(kind.strip() for kind in value.split(",")))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(KINDS)}", context, parameter)
    return kinds


@click.command()
@click.argument("checkpoint", type=network_file)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write to.")
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
@click.option("--skip-existing", is_flag=True, help="Skip images that CHECKPOINT has labelled already.")
@click.option(
    "--max-pixels",
    default=100_000_000,
    show_default=True,
    type=click.IntRange(1, 2**28),  # what the decoder takes: `ssaseg.datasets.decoding.MAX_PIXELS`
    help="Skip larger images.",
)
@click.option("--exact", is_flag=True, help="The arithmetic of training's evaluation, bit for bit; slower.")
@precision_option("auto: bf16 if it is faster and keeps 99.5 % of labels")
@protocol_options
@click.option("--timings", is_flag=True, help="Print where the time went.")
@backend_option
@opening_options
@device_option
def predict(
    checkpoint: Path,
    inputs: tuple[str, ...],
    out: Path,
    save: tuple[str, ...],
    skip_existing: bool,
    max_pixels: int,
    exact: bool,
    precision: str,
    timings: bool,
    backend: str,
    classes: str | None,
    protocol: str | None,
    device: str,
    legend: bool,
    keep_suffix: bool,
    annotations: Path | None,
    **changes: Any,
) -> int:
    """Label images.

    Each INPUT is a file, a folder (searched recursively; its structure is kept) or a glob pattern in quotes. Results
    are written to OUT/KIND/, under the image's name without suffix; OUT/classes.json has names and colours of the
    classes. An image that cannot be read or labelled is reported and skipped; the exit code is then 1. Results of
    earlier runs stay, also in OUT/rle.json and OUT/shares.json, unless the same image is labelled again. Several
    commands may write different images to one OUT at the same time.

    \b
    index    palette PNG of class numbers      color    PNG of class colours
    overlay  colours over the image            probs    .npz of probabilities
    rle      COCO results, OUT/rle.json        coarse   palette PNG, before SSA adapts
    confidence   grey PNG of the labels' probabilities: 255 is 1
    shares   share of each class in an image, OUT/shares.json and OUT/shares.csv

    The test protocol is that of the checkpoint; --scale, --size, --ratios, --flip, --slide and --whole change it.
    Photos that are much larger than the images in training get worse labels; a warning says how to resize them.
    pycocotools reads OUT/rle.json by COCO("rle.images.json").loadRes("rle.json"), or beside the file of --annotations.

    \b
    Example:
      ssaseg predict best.safetensors photos 'more/**/*.jpg' --out labels --save index,overlay
      ssaseg predict best.safetensors photos --out labels --size 512 --save overlay,shares
    """
    with quick_imports():
        from ssaseg.cli.prediction.predict import run_predict

    return run_predict(
        checkpoint=checkpoint,
        inputs=inputs,
        out=out,
        save=save,
        skip_existing=skip_existing,
        device=device,
        max_pixels=max_pixels,
        exact=exact,
        precision=precision,
        changes=protocol_changes(changes),
        timings=timings,
        backend=backend,
        classes=classes,
        recipe=protocol,
        legend=legend,
        keep_suffix=keep_suffix,
        annotations=annotations,
    )

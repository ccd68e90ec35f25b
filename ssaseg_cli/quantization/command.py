"""`ssaseg quantize`: its arguments and help. PyTorch is imported inside the function, so that `--help` is quick."""

from pathlib import Path

import click

from ssaseg.cli.completion import names_of
from ssaseg.cli.options import existing_file, json_option


@click.command()
@click.argument("checkpoint", type=existing_file)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--data",
    metavar="RECIPE",
    shell_complete=names_of("recipes", files=True),
    help="Recipe with the data.  [default: the checkpoint's]",
)
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the data, in place of data.root.")
@click.option(
    "--images", type=click.IntRange(min=1), default=32, show_default=True, help="Training images to calibrate on."
)
@click.option(
    "--method",
    type=click.Choice(["minmax", "percentile", "entropy"]),
    default="minmax",
    show_default=True,
    help="How the range of each tensor is chosen.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    metavar="POINTS",
    help="Largest drop of the mIoU [points].",
)
@click.option(
    "--max-class-drop",
    type=click.FloatRange(min=0),
    default=2.0,
    show_default=True,
    metavar="POINTS",
    help="Largest drop of one class's IoU [points].",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Time for the search of layers to leave in float32, if it is needed.",
)
@click.option("--opset", type=click.IntRange(min=18), help="Version of ONNX's operators.  [default: 18]")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Score only the first N validation images.")
@json_option
def quantize(
    checkpoint: Path,
    out: Path,
    data: str | None,
    root: Path | None,
    images: int,
    method: str,
    max_drop: float,
    max_class_drop: float,
    minutes: float,
    opset: int | None,
    limit: int | None,
    json_out: str | None,
) -> int:
    """Write an int8 ONNX file of a checkpoint, unless it costs too much accuracy.

    The ranges of int8 come from training images, chosen so that all classes are in them. The float32 and the int8
    network are then scored on the validation split: mIoU with the paired 95 % interval of its change, IoU per class,
    speed on this CPU and size are printed. If the mIoU or the IoU of a class drops too much, the layers that cost most
    are left in float32, until it no longer does. If that does not help, nothing is written and the exit code is 3.
    Needs the extra `onnx`.

    \b
    Example:
      ssaseg quantize best.safetensors int8.onnx
      ssaseg quantize best.safetensors int8.onnx --data camvid-seaformer_s-ssa --root data/camvid --max-drop 0.3
    """
    from ssaseg.cli.quantization.quantize import Limits, Request, run_quantize

    request = Request(checkpoint, out, data, root, images, method, minutes, opset, limit, json_out)
    return run_quantize(request, Limits(max_drop, max_class_drop))

"""`ssaseg eval`: its arguments and help. PyTorch is imported inside the function, so that `--help` is quick."""

from pathlib import Path
from typing import Any

import click

from ssaseg.cli.options import (
    backend_option,
    device_option,
    gpus_option,
    in_windows,
    json_option,
    network_file,
    opening_options,
    precision_option,
    slide_option,
)
from ssaseg.cli.ranks.launcher import needs_ranks, run_launch


def _ratios(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    try:
        return None if value is None else [float(ratio) for ratio in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0.5,1,1.5", context, parameter) from None


@click.command("eval")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=network_file)
@click.option("--data", metavar="RECIPE", help="Recipe with the data.  [default: the first FILE's]")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the data, in place of data.root.")
@click.option("--split", type=click.Choice(["train", "val"]), default="val", show_default=True, help="Images to score.")
@json_option
@device_option
@gpus_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Score only the first N images.")
@click.option(
    "--ratios", metavar="A,B,...", callback=_ratios, help="Average over scales: factors of the protocol's scale."
)
@click.option("--flip/--no-flip", default=None, help="Whether to average with the mirrored image.")
@slide_option
@click.option("--whole", is_flag=True, help="The whole image in one pass, without windows.")
@click.option("--boundary", is_flag=True, help="Also compute the boundary IoU (Cheng et al. 2021).")
@precision_option("auto is float32")
@backend_option
@opening_options
@click.option("--exact", is_flag=True, help="The network as it was trained, not folded: its own bits; slower.")
def evaluate(
    files: tuple[Path, ...],
    data: str | None,
    root: Path | None,
    split: str,
    json_out: str | None,
    device: str,
    gpus: int | None,
    limit: int | None,
    boundary: bool,
    precision: str,
    backend: str,
    classes: str | None,
    protocol: str | None,
    exact: bool,
    slide: tuple[int, int] | None,
    whole: bool,
    **changes: Any,
) -> int:
    """Score files on labelled images.

    Prints IoU and accuracy per class, mIoU with its 95 % interval over images, fwIoU, aAcc and mAcc [%], and the
    protocol that they were measured with. The protocol is that of the first FILE, or of --data; --ratios, --flip,
    --slide and --whole change it. Each ratio takes one forward pass per image; --flip doubles the number of passes.

    Several FILEs of the same classes are scored on the same pixels in one pass, side by side: their mIoUs, the
    difference to the first with its interval, and the share of labels that are equal.

    \b
    Example:
      ssaseg eval runs/demo/best.safetensors
      ssaseg eval best.safetensors --data camvid-seaformer_b-ssa --root data/camvid --json scores.json
      ssaseg eval best.safetensors --ratios 0.5,0.75,1,1.25,1.5,1.75 --flip
      ssaseg eval linear.safetensors ssa.safetensors ssa.onnx
    """
    if slide and whole:
        raise click.UsageError("give either --slide or --whole", click.get_current_context())
    if exact and precision not in ("auto", "float32"):
        raise click.UsageError("--exact computes in float32; leave out --precision", click.get_current_context())
    if needs_ranks(gpus):
        return run_launch(gpus or 1)
    from ssaseg.cli.evaluation.report import Request, run_eval

    changes = {key: value for key, value in changes.items() if value is not None}
    if slide:
        changes |= in_windows(slide)
    if whole:
        changes |= {"mode": "whole", "crop": None, "stride": None}
    request = Request(data, root, split, limit, changes, boundary, precision, exact, backend, classes, protocol)
    return run_eval(files=files, request=request, json_out=json_out, device=device)

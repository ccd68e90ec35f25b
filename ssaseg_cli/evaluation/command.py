"""`ssaseg eval`: its arguments and help. PyTorch is imported inside the function, so that `--help` is quick."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ssaseg.cli.completion import names_of
from ssaseg.cli.options import (
    backend_option,
    device_option,
    given,
    gpus_option,
    json_option,
    network_file,
    opening_options,
    precision_option,
    prediction_options,
    protocol_changes,
    protocol_options,
)
from ssaseg.cli.ranks.launcher import needs_ranks, run_launch
from ssaseg.cli.sharding import Shard, chosen_shard, shard_option

# Options that change what a network computes, or how.
OF_NETWORKS = (
    *("device", "gpus", "scale", "size", "ratios", "flip", "slide", "whole", "boundary", "calibration", "report"),
    *("precision", "backend", "classes", "protocol", "exact", "shard", "out"),
)


def _require_fitting(context: click.Context) -> None:
    """Raises UsageError for options, without --predictions, that do not fit together."""
    got = context.params
    if not got["files"]:
        files = next(each for each in context.command.params if each.name == "files")
        raise click.MissingParameter("Or give --predictions DIR.", context, files)
    if unused := given(context, "suffix", "mask_ids", "allow_void"):
        raise click.UsageError(f"{unused[0]}: only with --predictions", context)
    if got["exact"] and got["precision"] not in ("auto", "float32"):
        raise click.UsageError("--exact computes in float32; leave out --precision", context)
    if got["report"] is not None and len(got["files"]) > 1:
        raise click.UsageError("--report is of one FILE; run the command once for each", context)
    if got["out"] is not None and (unused := given(context, "report", "json_out")):
        raise click.UsageError(f"{unused[0]}: not with --out; `ssaseg merge` writes the scores of all shards", context)
    if got["shard"] is not None and got["shard"].total > 1 and got["out"] is None:
        raise click.UsageError("--shard: give --out DIR too, for what the shard counts", context)


@click.command("eval")
@click.argument("files", metavar="FILE...", nargs=-1, type=network_file)
@click.option(
    "--predictions",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Score the label PNGs of any tool in this folder, in place of FILEs.",
)
@click.option(
    "--data",
    metavar="RECIPE",
    shell_complete=names_of("recipes", files=True),
    help="Recipe with the data.  [default: the first FILE's]",
)
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the data, in place of data.root.")
@click.option("--split", type=click.Choice(["train", "val"]), default="val", show_default=True, help="Images to score.")
@json_option
@device_option
@gpus_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Score only the first N images.")
@protocol_options
@click.option("--boundary", is_flag=True, help="Also compute the boundary IoU (Cheng et al. 2021).")
@click.option("--calibration", is_flag=True, help="Also compute the calibration error (Guo et al. 2017).")
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write a page with all scores, and the best and worst images, to a new folder.",
)
@precision_option("auto is float32")
@backend_option
@opening_options
@prediction_options
@click.option("--exact", is_flag=True, help="The network as it was trained, not folded: its own bits; slower.")
@shard_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write the counts of the shard below DIR, for `ssaseg merge`; no scores.",
)
def evaluate(
    files: tuple[Path, ...],
    predictions: Path | None,
    data: str | None,
    root: Path | None,
    split: str,
    json_out: str | None,
    device: str,
    gpus: int | None,
    limit: int | None,
    boundary: bool,
    calibration: bool,
    report: Path | None,
    precision: str,
    backend: str,
    classes: str | None,
    protocol: str | None,
    exact: bool,
    suffix: str,
    mask_ids: bool,
    allow_void: bool,
    shard: Shard | None,
    out: Path | None,
    **changes: Any,
) -> int:
    """Score files on labelled images.

    Prints IoU and accuracy per class, mIoU with its 95 % interval over images, fwIoU, aAcc and mAcc [%], and the
    protocol that they were measured with. The protocol is that of the first FILE, or of --data; --scale, --size,
    --ratios, --flip, --slide and --whole change it. Each ratio takes one forward pass per image; --flip doubles the
    number of passes.

    Several FILEs of the same classes are scored on the same pixels in one pass, side by side: their mIoUs, the
    difference to the first with its interval, and the share of labels that are equal.

    DIR/report.html is one file, which needs no network: scores with intervals, confusion matrix, boundary IoU, coarse
    labels against adapted ones, calibration, the best and the worst images. DIR/report.json has its figures.

    --shard I/N --out DIR counts the images of one shard of N; `ssaseg merge DIR` then prints the scores of all, equal
    to the last digit. See docs/shards.md.

    --predictions scores label PNGs that any tool wrote, one for each image, under the protocols of several tools side
    by side, see docs/compare.md. Of the other options it takes --data, which is needed, --root, --split, --limit,
    --json, --suffix, --mask-ids and --allow-void.

    \b
    Example:
      ssaseg eval runs/demo/best.safetensors
      ssaseg eval best.safetensors --data camvid-seaformer_b-ssa --root data/camvid --json scores.json
      ssaseg eval best.safetensors --ratios 0.5,0.75,1,1.25,1.5,1.75 --flip
      ssaseg eval linear.safetensors ssa.safetensors ssa.onnx
      ssaseg eval best.safetensors --report report
      ssaseg eval --predictions labels/index --data camvid-seaformer_s-ssa
    """
    context = click.get_current_context()
    if predictions is not None:
        if files:
            raise click.UsageError(f"give either FILEs or --predictions; got {files[0]}", context)
        if unused := given(context, *OF_NETWORKS):
            raise click.UsageError(f"{unused[0]}: not with --predictions, which are labels already", context)
        from ssaseg.cli.evaluation.folder import run_predictions
        from ssaseg.cli.evaluation.predictions import Reading

        return run_predictions(predictions, data, root, split, limit, Reading(suffix, mask_ids, allow_void), json_out)
    _require_fitting(context)
    changes = protocol_changes(changes)
    if needs_ranks(gpus):
        return run_launch(gpus or 1)
    from ssaseg.cli.evaluation.report import Request, run_eval

    how = (boundary, precision, exact, backend, classes, protocol, calibration, report)
    request = Request(data, root, split, limit, changes, *how)
    if out is not None:
        from ssaseg.cli.evaluation.shard import run_shard

        request = replace(request, shard=chosen_shard(shard, alone=False))
        return run_shard(files, request, out, device)
    return run_eval(files=files, request=request, json_out=json_out, device=device)

"""`ssaseg compare`: the signature. What is slow to import is imported in the function, so that `--help` is fast."""

from pathlib import Path

import click

from ssaseg.cli.options import device_option, given, json_option, prediction_options


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Picture of the curves of runs to write.  [default: compare.png]"
)
@json_option
@click.option("--no-test", is_flag=True, help="Of two runs, only curves and tables: score nothing.")
@click.option("--data", metavar="RECIPE", help="Recipe with images and protocol of the test.  [default: the first's]")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the data, in place of data.root.")
@click.option("--split", type=click.Choice(["train", "val"]), default="val", show_default=True, help="Images to score.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Score only the first N images.")
@click.option(
    "--blocks",
    metavar="sequence|N|REGEX",
    help="Frames of videos: images that are drawn and swapped as a whole.  [default: each image]",
)
@device_option
@prediction_options
def compare(
    paths: tuple[Path, ...],
    out: Path | None,
    json_out: str | None,
    no_test: bool,
    data: str | None,
    root: Path | None,
    split: str,
    limit: int | None,
    blocks: str | None,
    device: str,
    suffix: str,
    mask_ids: bool,
    allow_void: bool,
) -> int:
    """Compare runs, files of networks, or folders of label PNGs.

    Two PATHs, A and B, are scored on the same images, and a test says whether they differ: a permutation test and a
    paired bootstrap over images, for the mIoU and, with Holm's correction, for the classes. It also prints the smallest
    difference that these images can show. See docs/compare.md.

    Runs, folders that `ssaseg train` wrote, may be any number: prints a table of them, the differences between their
    recipes, and the IoU per class if they have it; draws their curves in one picture. Hours are the time of training
    and evaluation, computed from the logged speeds. Two runs are tested too, by best.safetensors, if their data are
    found.

    --blocks: frames of a video are not independent. "sequence": a block is all images whose names are equal up to the
    number at the end; N: N neighbours of a sequence; REGEX: images with the same first group, or match.

    \b
    Example:
      ssaseg compare runs/linear runs/ssa
      ssaseg compare runs/* --out all.png --json all.json
      ssaseg compare linear.safetensors ssa.safetensors --data camvid-seaformer_s-ssa --blocks 10
      ssaseg compare theirs/labels ssa.safetensors --data data/recipe.yaml --json test.json
    """
    context = click.get_current_context()
    options = ("data", "root", "split", "limit", "blocks", "device", "suffix", "mask_ids", "allow_void")
    asked = given(context, *options)
    if no_test and asked:
        raise click.UsageError(f"{asked[0]}: belongs to the test; leave out --no-test", context)
    from ssaseg.cli.comparison.sides import Request
    from ssaseg.cli.comparison.start import run_compare

    reading = {"suffix": suffix, "mask_ids": mask_ids, "allow_void": allow_void}
    request = None if no_test else Request(data, root, split, limit, blocks, device, reading, bool(asked))
    return run_compare(paths, out, json_out, request)

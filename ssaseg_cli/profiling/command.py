"""`ssaseg profile`: its arguments and help. PyTorch is imported inside the function, so that `--help` is quick."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ssaseg.cli.completion import names_of
from ssaseg.cli.options import CLASSIFIERS, backend_option, device_option, json_option, precision_option

SIZE = (512, 512)  # of --scatter [pixels]
IMAGE = click.Path(exists=True, dir_okay=False, path_type=Path)
MOST = 4096  # images of a batch, threads
FEWEST_CLASSES, MOST_CLASSES = 2, 255


def _classes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    """A number of classes, or names as `opening_options` takes them."""
    if value is None or not value.isdecimal():
        return value
    return click.IntRange(FEWEST_CLASSES, MOST_CLASSES)(value, parameter, context)


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in value.split(",")) if value is not None else ()
    except ValueError:
        numbers = (0,)
    if not all(1 <= number <= MOST for number in numbers):
        expected = f"whole numbers from 1 to {MOST} with commas between them, such as 1,2,4"
        raise click.BadParameter(f"{value!r}: expected {expected}", context, parameter)
    return tuple(dict.fromkeys(numbers))


def _refuse(kind: str, given: Mapping[str, Any]) -> None:
    """UsageError for an option, by the name of its parameter, that is not left at its default."""
    for key, value in given.items():
        if value not in (None, False, (), "auto"):
            option = {"NAME|FILE": key, "classifiers": "--classifier", "batches": "--batch"}.get(key, f"--{key}")
            raise click.UsageError(f"{option} does not go with {kind}; leave it out", click.get_current_context())


@click.command()
@click.argument("targets", metavar="[NAME|FILE]", nargs=-1, shell_complete=names_of("networks", "masks", files=True))
@click.option("--paper-table", is_flag=True, help="Measure the paper's networks, beside its figures.")
@click.option(
    "--scatter", is_flag=True, help="Draw latency against mIoU of run folders, checkpoints and reports of eval."
)
@click.option(
    "--classifier",
    "classifiers",
    type=CLASSIFIERS,
    multiple=True,
    help="Classifier, once for each.  [default: linear and ssa, or the checkpoint's]",
)
@click.option(
    "--classes",
    metavar="N|NAMES",
    callback=_classes,
    help="Number of classes, with NAME.  [default: 150]  Or names, for a FILE that has none, as in predict.",
)
@click.option(
    "--protocol",
    metavar="RECIPE",
    shell_complete=names_of("recipes", files=True),
    help="For a FILE that does not say them: sizes, mean and std of a recipe.",
)
@click.option(
    "--size",
    nargs=2,
    type=click.IntRange(min=32),
    metavar="H W",
    help="Height and width of the input [pixels].  [default: 512 512]",
)
@click.option("--image", type=IMAGE, help="Image to measure on, prepared by the protocol of FILE.")
@precision_option("auto is float32")
@backend_option
@click.option("--roofline", is_flag=True, help="Beside the times, the least that this machine allows.")
@click.option("--backends", is_flag=True, help="Compare PyTorch exact, folded and compiled, and other runtimes.")
@click.option("--batch", "batches", metavar="N,N,...", callback=_numbers, help="Batch sizes to measure.")
@click.option("--threads", metavar="N,N,...", callback=_numbers, help="Numbers of CPU threads to measure.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="With --scatter: the picture to write.  [default: scatter.png]",
)
@json_option
@device_option
@click.option("--runs", type=click.IntRange(min=1), default=30, show_default=True, help="Number of timed passes.")
def profile(
    targets: tuple[str, ...],
    paper_table: bool,
    scatter: bool,
    size: tuple[int, int] | None,
    out: Path | None,
    json_out: str | None,
    device: str,
    runs: int,
    **given: Any,
) -> int:
    """Measure parameters, compute, time and memory.

    Prints parameters [M], multiply-accumulates [GMACs], latency [ms] and peak memory of a network, with two or more
    classifiers side by side, and the time, share and memory of each stage from the image file to the file of labels.
    Give the NAME of a network or of a mask method, or a FILE that `predict` takes. It is measured as `predict` runs it,
    and beside it the exact network.

    \b
    Example:
      ssaseg profile seaformer_b --size 512 512
      ssaseg profile seaformer_b --classifier cac --classifier gmmseg
      ssaseg profile runs/demo/best.safetensors --image photo.jpg --roofline --json profile.json
      ssaseg profile runs/demo/best.safetensors --backends --batch 1,2,4 --threads 1,2
      ssaseg profile --scatter runs/* scores.json --out scatter.png
      ssaseg profile --paper-table
    """
    context = click.get_current_context()
    if paper_table:
        _refuse("--paper-table", {"NAME|FILE": targets, "scatter": scatter, "size": size, "out": out, **given})
        from ssaseg.cli.profiling.paper_table import run_paper_table

        return run_paper_table(json_out=json_out, device=device, runs=runs)
    if scatter:
        _refuse("--scatter", given)
        if not targets:
            raise click.UsageError("--scatter: give run folders, checkpoints or reports", context)
        from ssaseg.cli.profiling.scatter import run_scatter

        picture = out or Path("scatter.png")
        return run_scatter(sources=targets, size=size or SIZE, out=picture, json_out=json_out, device=device, runs=runs)
    if len(targets) != 1:
        got = f"got {len(targets)}: {' '.join(targets)}" if targets else "got none"
        fix = "give one NAME or FILE, or --paper-table, or --scatter with several files"
        raise click.UsageError(f"{got}; {fix}", context)
    if out is not None:
        raise click.UsageError("--out is only for --scatter; leave it out", context)
    if given["image"] is not None and size is not None:
        raise click.UsageError("give either --image or --size", context)
    from ssaseg.cli.profiling.profile import run_profile

    given |= {"classifiers": tuple(dict.fromkeys(given["classifiers"]))}
    given |= {"precision": "float32" if given["precision"] == "auto" else given["precision"]}
    return run_profile(target=targets[0], size=size, json_out=json_out, device=device, runs=runs, **given)

"""`ssaseg profile`: its arguments and help. PyTorch is imported inside the function, so that `--help` is quick."""

import click

from ssaseg.cli.options import CLASSIFIERS, device_option, json_option


@click.command()
@click.argument("target", metavar="[NAME|CHECKPOINT]", required=False)
@click.option("--paper-table", is_flag=True, help="Measure the paper's networks, beside its figures.")
@click.option(
    "--classifier",
    "classifiers",
    type=CLASSIFIERS,
    multiple=True,
    help="Classifier, once for each.  [default: linear and ssa, or the checkpoint's]",
)
@click.option("--classes", type=click.IntRange(2, 255), help="Number of classes, with NAME.  [default: 150]")
@click.option(
    "--size",
    nargs=2,
    type=click.IntRange(min=32),
    metavar="H W",
    default=(512, 512),
    help="Height and width of the input [pixels].  [default: 512 512]",
)
@json_option
@device_option
@click.option("--runs", type=click.IntRange(min=1), default=30, show_default=True, help="Number of timed passes.")
def profile(
    target: str | None,
    paper_table: bool,
    classifiers: tuple[str, ...],
    classes: int | None,
    size: tuple[int, int],
    json_out: str | None,
    device: str,
    runs: int,
) -> int:
    """Measure parameters, compute, time and memory.

    Prints parameters [M], multiply-accumulates [GMACs], latency [ms] and peak memory of a network, with two or more
    classifiers side by side. Give the NAME of a network or of a mask method, or a
    CHECKPOINT.

    \b
    Example:
      ssaseg profile seaformer_b --size 512 512
      ssaseg profile seaformer_b --classifier cac --classifier gmmseg
      ssaseg profile runs/demo/best.safetensors --json profile.json
      ssaseg profile --paper-table
    """
    if (target is None) != paper_table:
        raise click.UsageError("give either NAME|CHECKPOINT or --paper-table", click.get_current_context())
    if target is None:
        if classifiers or classes or size != (512, 512):
            raise click.UsageError(
                "--paper-table sets classifiers, classes and size itself; leave out these options",
                click.get_current_context(),
            )
        from ssaseg.cli.profiling.paper_table import run_paper_table

        return run_paper_table(json_out=json_out, device=device, runs=runs)
    from ssaseg.cli.profiling.profile import run_profile

    return run_profile(
        target=target,
        classifiers=tuple(dict.fromkeys(classifiers)),
        classes=classes,
        size=size,
        json_out=json_out,
        device=device,
        runs=runs,
    )

"""`ssaseg profile`: the signature. PyTorch is imported inside, so that `--help` answers at once."""

import click

from ssaseg.cli.options import CLASSIFIERS, device_option, json_option


@click.command()
@click.argument("target", metavar="[NAME|CHECKPOINT]", required=False)
@click.option("--paper-table", is_flag=True, help="The published networks, beside the paper's figures.")
@click.option("--classifier", type=CLASSIFIERS, help="Only this one.  [default: both, or the checkpoint's]")
@click.option("--classes", type=click.IntRange(2, 255), help="For a NAME.  [default: 150]")
@click.option(
    "--size",
    nargs=2,
    type=click.IntRange(min=32),
    metavar="H W",
    default=(512, 512),
    help="Input [pixels].  [default: 512 512]",
)
@json_option
@device_option
@click.option("--runs", type=click.IntRange(min=1), default=30, show_default=True, help="Timed passes.")
def profile(
    target: str | None,
    paper_table: bool,
    classifier: str | None,
    classes: int | None,
    size: tuple[int, int],
    json_out: str | None,
    device: str,
    runs: int,
) -> int:
    """Measure parameters, compute, time, memory.

    Parameters [M], multiply-accumulates [GMACs], latency [ms] and peak memory; linear and ssa side by side.

    \b
    Example:
      ssaseg profile seaformer_b --size 512 512
      ssaseg profile runs/demo/best.safetensors --json profile.json
      ssaseg profile --paper-table
    """
    if (target is None) != paper_table:
        raise click.UsageError("give either NAME|CHECKPOINT or --paper-table", click.get_current_context())
    if target is None:
        if classifier or classes or size != (512, 512):
            raise click.UsageError(
                "--paper-table has its own classifiers, classes and size; leave those options out",
                click.get_current_context(),
            )
        from ssaseg.cli.profiling.paper_table import run_paper_table

        return run_paper_table(json_out=json_out, device=device, runs=runs)
    from ssaseg.cli.profiling.profile import run_profile

    return run_profile(
        target=target,
        classifier=classifier,
        classes=classes,
        size=size,
        json_out=json_out,
        device=device,
        runs=runs,
    )

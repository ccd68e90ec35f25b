"""`ssaseg compare`: the signature. The drawing code is imported in the function, so that `--help` is fast."""

from pathlib import Path

import click

from ssaseg.cli.options import json_option


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default="compare.png", show_default=True, help="Picture to write."
)
@json_option
def compare(runs: tuple[Path, ...], out: Path, json_out: str | None) -> int:
    """Compare training runs.

    Each RUN is a folder that `ssaseg train` wrote. Prints a table of the runs, the differences between their recipes,
    and the IoU per class if the runs have it; draws their curves in one picture. Hours are the time of training and
    evaluation, computed from the logged speeds.

    \b
    Example:
      ssaseg compare runs/linear runs/ssa
      ssaseg compare runs/* --out all.png --json all.json
    """
    from ssaseg.cli.comparison.compare import run_compare

    return run_compare(runs=runs, out=out, json_out=json_out)

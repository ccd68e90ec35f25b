"""Options of several commands, defined once."""

from pathlib import Path

import click

# Written out: to ask `ssaseg.models` for them would make `--help` slow. A test compares.
CLASSIFIERS = click.Choice(["linear", "ssa", "cac", "protoseg", "gmmseg", "dnc"])

existing_file = click.Path(exists=True, dir_okay=False, path_type=Path)
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute.",
)
json_option = click.option("--json", "json_out", metavar="FILE|-", help="Write the results as JSON; - is stdout.")
gpus_option = click.option(
    "--gpus",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of processes: one per GPU, or on the CPU.",
)

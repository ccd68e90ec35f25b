"""Options that several commands have, written once."""

from pathlib import Path

import click

CLASSIFIERS = click.Choice(["ssa", "linear"])

existing_file = click.Path(exists=True, dir_okay=False, path_type=Path)
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
json_option = click.option("--json", "json_out", metavar="FILE|-", help="Write the figures as JSON; - is stdout.")
gpus_option = click.option(
    "--gpus", type=click.IntRange(min=1), metavar="N", help="Processes, one a GPU (with --device cpu: CPU)."
)

"""Options of several commands, defined once."""

from pathlib import Path
from typing import Any

import click

from ssaseg.cli.help_tables import help_tables

CLASSIFIERS = click.Choice(list(help_tables()["classifiers"]))


class CheckpointFile(click.Path):
    """An existing file; for a folder, such as `transformers` writes, the error says to convert it."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """The path."""
        if Path(value).is_dir():
            fix = f"convert a folder of transformers first: ssaseg convert {value} OURS.safetensors"
            self.fail(f"{value} is a folder, expected a file.\n{fix}", parameter, context)
        return super().convert(value, parameter, context)


existing_file = CheckpointFile(exists=True, dir_okay=False, path_type=Path)
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

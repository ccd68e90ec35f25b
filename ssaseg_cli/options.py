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


class NetworkFile(click.Path):
    """An existing file that holds a network, or a folder of transformers; see `ssaseg.cli.engine.opening.open_file`."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """The path."""
        made: Any = super().convert(value, parameter, context)
        path = Path(made)
        if path.is_dir() and not (path / "config.json").is_file():
            self.fail(f"{value} is a folder without config.json, expected a file or a folder of transformers.")
        return path


network_file = NetworkFile(exists=True, path_type=Path)
BACKENDS = click.Choice(["auto", "torch", "onnxruntime", "openvino"])


def opening_options(command: Any) -> Any:
    """Adds `--classes` and `--protocol`: what a file does not say itself; arguments of `open_file`."""
    classes = click.option(
        "--classes",
        metavar="NAME|FILE|A,B,...",
        help="Classes of a file that does not name them: of a data set, a recipe, or a file of names.",
    )
    protocol = click.option(
        "--protocol", metavar="RECIPE", help="Sizes, mean and std for a file that does not say them: a recipe's."
    )
    return classes(protocol(command))


def precision_option(auto: str) -> Any:
    """`--precision` of a command; auto: what "auto" is there, for the help."""
    return click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bf16", "fp16"]),
        default="auto",
        show_default=True,
        help=f"Of the network; {auto}.",
    )


def in_windows(slide: tuple[int, int]) -> dict[str, Any]:
    """What `--slide` changes in a protocol: square windows of a side and a step [pixels]."""
    crop, stride = ([side, side] for side in slide)
    return {"mode": "slide", "crop": crop, "stride": stride}


backend_option = click.option(
    "--backend",
    type=BACKENDS,
    default="auto",
    show_default=True,
    help="What runs a checkpoint; auto: another than torch where it is installed and the run is long.",
)
slide_option = click.option(
    "--slide", nargs=2, type=int, metavar="CROP STRIDE", help="Square sliding windows: side and step [pixels]."
)
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

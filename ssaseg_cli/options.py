"""Options of several commands, defined once."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ssaseg.cli.completion import names_of
from ssaseg.cli.help_tables import help_tables
from ssaseg.cli.printing import echo
from ssaseg.files.text import printable

CLASSIFIERS = click.Choice(list(help_tables()["classifiers"]))


WEIGHTS = ("best.safetensors", "last.safetensors")  # of a run folder; the first from its first evaluation on


def run_checkpoint(path: Path) -> Path:
    """The checkpoint of a run folder: its best, or its last while nothing was evaluated. Any other path stays."""
    if not path.is_dir() or (path / "config.json").is_file():  # a folder of transformers
        return path
    return next((path / name for name in WEIGHTS if (path / name).is_file()), path)


def note_checkpoint(path: Path, given: object) -> None:
    """Says which file of a run folder is used, where a folder was given. Ranks leave it to the process before them."""
    if path != Path(str(given)) and "LOCAL_RANK" not in os.environ:
        echo(f"note: {given} is a run folder: {path.name} is used", err=True)


KEY = re.compile(r"[a-z_]+(\.[a-z_]+)+=")  # of a recipe, with a value


OTHERS = {  # files that are no checkpoints, by their suffix
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"), "an image"),
    **dict.fromkeys((".yaml", ".yml"), "a recipe or another YAML file"),
    **dict.fromkeys((".txt", ".csv", ".md", ".log", ".jsonl"), "a text file"),
}


class NetworkFile(click.Path):
    """An existing file that holds a network, a run folder, whose checkpoint is taken, or a folder of transformers."""

    folders = True  # whether a folder of transformers is taken

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """The path of the file, or of the folder of transformers."""
        try:
            path = run_checkpoint(Path(os.fsdecode(super().convert(value, parameter, context))))
        except click.BadParameter as error:
            fix = "expected a checkpoint such as runs/demo/best.safetensors"
            if KEY.match(str(value)):
                fix = "keys are changed in `ssaseg train` only; for data: --data RECIPE or --root DIR"
            raise click.BadParameter(f"{error.message.rstrip('.')}; {fix}.", context, parameter) from None
        if (what := OTHERS.get(path.suffix.lower())) and path.is_file():
            self.fail(f"{value} is {what}, expected a checkpoint such as runs/demo/best.safetensors.")
        if path.is_dir():
            self._check_folder(path, value, parameter, context)
        note_checkpoint(path, value)
        return path

    def _check_folder(self, path: Path, value: Any, *about: Any) -> None:
        if (path / "config.json").is_file():
            if not self.folders:
                fix = f"convert it first: ssaseg convert {shlex.quote(str(path))} OURS.safetensors"
                self.fail(f"{value} is a folder of transformers, expected a file.\n{fix}", *about)
            return
        if (path / "config.yaml").is_file():
            self.fail(f"{value} is a run folder, but it has no {WEIGHTS[0]} yet: nothing was evaluated.", *about)
        inside = sorted(printable(each.name) for each in path.iterdir() if each.suffix.lower() in SUFFIXES)
        wanted = f"a file{', a run folder or a folder of transformers' if self.folders else ' or a run folder'}"
        found = f"\nin it: {', '.join(inside[:3])}{', …' * (len(inside) > 3)}" if inside else ""
        what = "config.json and " if self.folders else ""
        self.fail(f"{value} is a folder without {what}{WEIGHTS[0]}, expected {wanted}.{found}", *about)


class CheckpointFile(NetworkFile):
    """The same, but no folder of transformers, which is to be converted first."""

    folders = False


SUFFIXES = (".safetensors", ".pth", ".pt", ".onnx", ".pt2", ".xml")  # of files that hold a network
existing_file = CheckpointFile(exists=True, path_type=Path)
network_file = NetworkFile(exists=True, path_type=Path)
BACKENDS = click.Choice(["auto", "torch", "onnxruntime", "openvino"])


def refuse_options(overrides: Sequence[str]) -> None:
    """Raises UsageError for a KEY=VALUE whose key is an option of the command, such as device=cpu."""
    context = click.get_current_context()
    options = {each.name: each.opts[0] for each in context.command.params if isinstance(each, click.Option)}
    for given in overrides:
        key, _, value = given.partition("=")
        if option := options.get(key.replace("-", "_")):
            raise click.UsageError(f"{given}: this is an option: {option} {value}".rstrip(), context)


def opening_options(command: Any) -> Any:
    """Adds `--classes` and `--protocol`: what a file does not say itself; arguments of `open_file`."""
    classes = click.option(
        "--classes",
        metavar="NAME|FILE|A,B,...",
        shell_complete=names_of("label_spaces", "recipes", files=True),
        help="Classes of a file that does not name them: of a data set, a recipe, or a file of names.",
    )
    protocol = click.option(
        "--protocol",
        metavar="RECIPE",
        shell_complete=names_of("recipes", files=True),
        help="Sizes, mean and std for a file that does not say them: a recipe's.",
    )
    return classes(protocol(command))


def prediction_options(command: Any) -> Any:
    """Adds `--suffix`, `--mask-ids` and `--allow-void`: how label files are read; keys of `predictions.Reading`."""
    suffix = click.option(
        "--suffix",
        metavar="END",
        default=".png",
        show_default=True,
        help="Of label files: what follows the image's name.",
    )
    mask_ids = click.option(
        "--mask-ids", is_flag=True, help="Label files hold the ids of the data's masks, not class numbers 0, 1, ..."
    )
    void = click.option(
        "--allow-void", is_flag=True, help="Labelled pixels that are predicted as 255, no class, count as wrong."
    )
    return suffix(mask_ids(void(command)))


def given(context: click.Context, *names: str) -> list[str]:
    """Those of the parameters `names` that are on the command line, as a user writes them."""
    source = click.core.ParameterSource.COMMANDLINE
    flags = {each.name: each.opts[0] for each in context.command.params}
    return [flags[name] for name in names if context.get_parameter_source(name) == source]


def precision_option(auto: str) -> Any:
    """`--precision` of a command; auto: what "auto" is there, for the help."""
    return click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bf16", "fp16"]),
        default="auto",
        show_default=True,
        help=f"Of the network; {auto}.",
    )


OWN_SIZE = "own"  # of `--size`: images are not resized
WIDEST = 4  # times as wide as high, or as high as wide: images up to here get the short side of `--size`
LONGEST = 16_384  # pixels, of a side in a recipe


def _ratios(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    try:
        return None if value is None else [float(ratio) for ratio in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0.5,1,1.5", context, parameter) from None


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    if value in (None, OWN_SIZE):
        return value
    if str(value).isascii() and str(value).isdecimal() and 32 <= int(str(value)[:9]) <= LONGEST:
        return int(str(value))
    expected = f"a number of pixels from 32 to {LONGEST}, or {OWN_SIZE}"
    raise click.BadParameter(f"{value!r} is not {expected}", context, parameter)


def protocol_options(command: Any) -> Any:
    """Adds the options that change the test protocol of a file; `protocol_changes` reads them."""
    size = click.IntRange(min=1)
    for option in (
        click.option("--whole", is_flag=True, help="The whole image in one pass, without windows."),
        click.option(
            "--slide", nargs=2, type=int, metavar="CROP STRIDE", help="Square sliding windows: side and step [pixels]."
        ),
        click.option("--flip/--no-flip", default=None, help="Whether to average with the mirrored image."),
        click.option(
            "--ratios",
            metavar="A,B,...",
            callback=_ratios,
            help="Average over scales: factors of the scale.",
        ),
        click.option(
            "--size",
            metavar=f"SIDE|{OWN_SIZE}",
            callback=_size,
            help=f"Fit images to this short side; {OWN_SIZE}: no resize.",
        ),
        click.option(
            "--scale",
            nargs=2,
            type=size,
            metavar="W H",
            help="Fit images into this size; aspect is kept [pixels].",
        ),
    ):
        command = option(command)
    return command


def protocol_changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the options of `protocol_options` change in a recipe's section `test`; keys that are not given stay.

    Raises click.UsageError for options that contradict each other.
    """
    slide, scale, size = given["slide"], given["scale"], given["size"]
    if slide and given["whole"]:
        raise click.UsageError("give either --slide or --whole", click.get_current_context())
    if scale and size:
        raise click.UsageError("give either --scale or --size", click.get_current_context())
    changes = {key: given[key] for key in ("ratios", "flip") if given[key] is not None}
    if scale or size:
        changes["scale"] = list(scale) if scale else None if size == OWN_SIZE else [min(WIDEST * size, LONGEST), size]
    if slide:
        crop, stride = ([side, side] for side in slide)
        changes |= {"mode": "slide", "crop": crop, "stride": stride}
    if given["whole"]:
        changes |= {"mode": "whole", "crop": None, "stride": None}
    return changes


backend_option = click.option(
    "--backend",
    type=BACKENDS,
    default="auto",
    show_default=True,
    help="What runs a checkpoint; auto: another than torch where it is installed and the run is long.",
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

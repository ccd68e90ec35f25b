"""`ssaseg predict`: the signature. PyTorch is imported inside, so that `--help` answers at once."""

from pathlib import Path

import click

from ssaseg.cli.options import device_option, existing_file
from ssaseg.cli.prediction.kinds import KINDS


def _kinds(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(kind.strip() for kind in value.split(",")))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(KINDS)}", context, parameter)
    return kinds


@click.command()
@click.argument("checkpoint", type=existing_file)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write to.")
@click.option("--save", default="index", show_default=True, callback=_kinds, help=f"Comma list of {', '.join(KINDS)}.")
@click.option("--skip-existing", is_flag=True, help="Leave out images whose results are all there.")
@device_option
def predict(
    checkpoint: Path, inputs: tuple[str, ...], out: Path, save: tuple[str, ...], skip_existing: bool, device: str
) -> int:
    """Label images.

    Each INPUT is a file, a folder (searched recursively, structure kept) or a quoted glob. Results are written to
    OUT/KIND/; an image that cannot be read is reported and left out, and the exit code is 1. Results of earlier runs
    stay unless the same image is labelled again; so do the entries of OUT/rle.json.

    \b
    index    palette PNG of class numbers      color    PNG of class colours
    overlay  colours over the image            probs    .npz of probabilities
    rle      COCO run lengths, OUT/rle.json    coarse   the labels before SSA adapts them

    \b
    Example:
      ssaseg predict best.safetensors photos 'more/**/*.jpg' --out labels --save index,overlay
    """
    from ssaseg.cli.prediction.predict import run_predict

    return run_predict(
        checkpoint=checkpoint, inputs=inputs, out=out, save=save, skip_existing=skip_existing, device=device
    )

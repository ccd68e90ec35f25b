"""Says before the start that a network's attention makes large inputs slow, or takes much memory."""

from collections.abc import Sequence
from pathlib import Path

from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.inference import Inference
from ssaseg.datasets.base import evenly
from ssaseg.datasets.decoding.images import shown_size
from ssaseg.models.build import family_of

LOOKED_AT = 64  # images of a run whose headers are read


def describe_attention(name: str, pixels: int) -> str | None:
    """Why a network is slow for inputs of so many pixels; None if it is not.

    name: of a network or mask method.
    """
    try:
        quadratic = family_of(name).quadratic
    except ValueError:  # of another program
        return None
    if quadratic is None or pixels < quadratic.pixels:
        return None
    memory = ""
    if quadratic.memory is not None:
        memory = f", and its memory: about {quadratic.memory(pixels) / 2**30:.1f} GiB here"
    work = "compares all positions of an image, so that its work grows with the square of the pixels"
    return f"{name} {work}{memory}; an input has {pixels / 1e6:.1f} million pixels"


def warn_of_attention(name: str, inference: Inference, files: Sequence[Path | bytes], fix: str) -> None:
    """Prints `describe_attention` for the largest network input of some of the images, and the fix, on stderr.

    name: of the network. files: the images; their headers are read, and those that cannot be read are left out. fix:
    what the command offers.
    """
    sizes = [shown_size(files[index]) for index in evenly(len(files), LOOKED_AT)]
    known = [inference.input_pixels(size) for size in sizes if size is not None]
    text = describe_attention(name, max(known, default=0))
    if text is not None:
        echo(f"note: {text}\n{fix}", err=True)

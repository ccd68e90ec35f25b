"""Says before the start that images are much larger than those that a network was trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssaseg.cli.printing import echo
from ssaseg.cli.scoring.attention import LOOKED_AT
from ssaseg.datasets.base import evenly
from ssaseg.datasets.decoding.images import shown_size
from ssaseg.datasets.transforms import input_sizes, rescale_size
from ssaseg.recipes import Test

# Times as large as in training. Random scales of training most often end at 2.
LARGER = 2.5


def trained_scale(metadata: Mapping[str, Any]) -> tuple[int, int] | None:
    """The (width, height) that training images were fitted into, before random scales; None: not known.

    metadata: of a checkpoint: it is `augment.scale` of its recipe. Without a recipe, as of official weights, it is the
    scale of its protocol: published networks are tested at the scale of their training.
    """
    found: Any = metadata
    for key in ("recipe", "augment", "scale"):
        found = found.get(key) if isinstance(found, Mapping) else None
    known = found if metadata.get("recipe") else metadata["protocol"].get("scale")
    if not isinstance(known, list | tuple) or len(known) != 2:
        return None
    width, height = known
    return (width, height) if all(type(side) is int and side > 0 for side in known) else None


def times_larger(size: tuple[int, int], trained: tuple[int, int], protocol: Test) -> float:
    """How many times as large as in training the network sees an image of (height, width): a ratio of sides.

    Sliding windows do not change it.
    """
    ((height, width),) = input_sizes(size, protocol.scale, None)
    return min(height, width) / min(rescale_size((size[1], size[0]), trained))


def warn_of_size(metadata: Mapping[str, Any], protocol: Test, files: Sequence[Path | bytes]) -> None:
    """Prints on stderr how many images are more than `LARGER` times as large as in training, and the fix.

    metadata: of the file with the network. protocol: that of this run. files: the images; the headers of some are read,
    and those that cannot be read are left out.
    """
    trained = trained_scale(metadata)
    if trained is None:
        return
    looked_at = [shown_size(files[index]) for index in evenly(len(files), LOOKED_AT)]
    times = [times_larger(size, trained, protocol) for size in looked_at if size is not None]
    large = [each for each in times if each > LARGER]
    if not large:
        return
    of = f"{len(times)} images" + (f" that were looked at, of {len(files)}," if len(files) > len(looked_at) else "")
    width, height = trained
    echo(
        f"warning: {len(large)} of {of} are up to {max(large):.1f} times as large as in training ({width}x{height}): "
        f"labels get worse\nresize them with --scale {width} {height}",
        err=True,
    )

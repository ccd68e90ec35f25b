"""`ssaseg convert --deploy`: a checkpoint of half the size or less, for `eval`, `predict`, `profile` and exports.

Its header says what was changed, under `deploy`. `load_model` converts it to float32. It has nothing that only training
needs.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.models import Segmenter
from ssaseg.models.checkpoint import deploy_tensors, load_strict, save_deploy

TOLERANCE = 0.02  # of logits, relative to the largest: float16 has 11 bits, and a network has about fifty layers

IMAGES = ((1, 64, 64), (2, 96, 160), (1, 131, 97), (2, 256, 256))  # batch, height, width [pixels]


def write_deploy(source: Path, destination: Path, network: Segmenter, metadata: Mapping[str, Any]) -> int:
    """Writes the deploy form of `network`, after a check of its results on random images. Returns 0.

    Raises CommandError with exit code 3, before anything is written, if a weight is too large for float16 or if the
    logits (of a mask method: scores) differ by more than TOLERANCE.
    """
    try:
        tensors = deploy_tensors(network)
    except ValueError as error:
        raise CommandError(f"{source}: {error}\nleave out --deploy: the value fits into float32", 3) from None
    deploy = network.copied()
    deploy.drop_training_only()
    load_strict(deploy, tensors, str(destination))
    largest, highest, same = difference(network, deploy)
    what = "scores" if network.classifier.gives_scores else "logits"
    summary = f"{largest:.1e}, for {what} up to {highest:.1f}; {100 * same:.2f} % of the labels are the same"
    if not largest <= TOLERANCE * highest:  # also if it is not a number
        raise CommandError(
            f"{destination}: not written, because float16 changes the {what} too much: by {summary}\n"
            f"allowed {TOLERANCE * highest:.1e}; keep the float32 file",
            3,
        )
    save_deploy(destination, network, metadata)
    before, after = (path.stat().st_size / 2**20 for path in (source, destination))
    dropped = len(network.state_dict()) - len(tensors)
    echo(f"{source}: {network.name}, {network.classifier_name}, {network.num_classes} classes, {before:.1f} MiB")
    echo(f"largest difference of the {what} on random images: {summary}")
    echo(f"wrote {destination}: {after:.1f} MiB, float16, without {dropped} training-only tensors")
    return 0


@torch.no_grad()
def difference(one: Segmenter, other: Segmenter) -> tuple[float, float, float]:
    """Largest difference of their logits on random images, the largest logit, and the share of equal labels."""
    largest, highest, same, pixels = 0.0, 0.0, 0, 0
    for images in random_images(one.channels):
        first, second = one(images), other(images)
        largest = max(largest, (first - second).abs().max().item(), key=lambda value: (value != value, value))
        highest = max(highest, first.abs().max().item())
        equal = first.argmax(dim=1) == second.argmax(dim=1)
        same, pixels = same + int(equal.sum()), pixels + equal.numel()
    return largest, highest, same / pixels


def random_images(channels: int = 3) -> Iterator[Tensor]:
    """Images of several sizes, float32 (N,channels,H,W), with values as after normalisation. Always the same."""
    seeded = torch.Generator().manual_seed(0)
    for batch, height, width in IMAGES:
        yield torch.randn(batch, channels, height, width, generator=seeded)

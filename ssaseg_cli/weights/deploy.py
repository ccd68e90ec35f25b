"""`ssaseg convert --deploy`: a checkpoint of half the size or less, for `eval`, `predict`, `profile` and exports.

Its header says what was done, under `deploy`; `load_model` makes float32 of it. What only training needs is not in it.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from ssaseg.cli.errors import CommandError
from ssaseg.models import Segmenter
from ssaseg.models.checkpoint import deploy_tensors, load_strict, save_deploy

TOLERANCE = 0.02  # of logits, relative to the largest: float16 has 11 bits, and a network some fifty layers

IMAGES = ((1, 64, 64), (2, 96, 160), (1, 131, 97), (2, 256, 256))  # batch, height, width [pixels]


def write_deploy(source: Path, destination: Path, network: Segmenter, metadata: Mapping[str, Any]) -> int:
    """Writes the deploy form of `network`, once its logits on random images are those of the original; returns 0.

    Raises CommandError with exit code 3, having written nothing, where a weight is too large for float16, or the logits
    differ by more than TOLERANCE.
    """
    try:
        tensors = deploy_tensors(network)
    except ValueError as error:
        raise CommandError(f"{source}: {error}\nleave out --deploy: float32 holds it", 3) from None
    lean = copy.deepcopy(network)
    lean.drop_training_only()
    load_strict(lean, tensors, str(destination))
    apart, largest, same = compare(network, lean)
    told = f"{apart:.1e} of logits up to {largest:.1f}, {100 * same:.2f} % of the labels the same"
    if not apart <= TOLERANCE * largest:  # not a number, too
        raise CommandError(
            f"{destination}: not written, as float16 changes too much: logits differ by {told}\n"
            f"allowed {TOLERANCE * largest:.1e}; keep the float32 file",
            3,
        )
    save_deploy(destination, network, metadata)
    before, after = (path.stat().st_size / 2**20 for path in (source, destination))
    lacking = len(network.state_dict()) - len(tensors)
    click.echo(f"{source}: {network.name}, {network.classifier_name}, {network.num_classes} classes, {before:.1f} MiB")
    click.echo(f"largest difference on random images: {told}")
    click.echo(f"wrote {destination}: {after:.1f} MiB, float16, without {lacking} tensors of training alone")
    return 0


@torch.no_grad()
def compare(one: Segmenter, other: Segmenter) -> tuple[float, float, float]:
    """Largest difference of their logits on random images, the largest logit, and the share of equal labels."""
    apart, largest, same, pixels = 0.0, 0.0, 0, 0
    for images in random_images():
        first, second = one(images), other(images)
        apart = max(apart, (first - second).abs().max().item(), key=lambda value: (value != value, value))
        largest = max(largest, first.abs().max().item())
        equal = first.argmax(dim=1) == second.argmax(dim=1)
        same, pixels = same + int(equal.sum()), pixels + equal.numel()
    return apart, largest, same / pixels


def random_images() -> Iterator[Tensor]:
    """Of several sizes, float32 (N,3,H,W), as if normalised; always the same."""
    seeded = torch.Generator().manual_seed(0)
    for batch, height, width in IMAGES:
        yield torch.randn(batch, 3, height, width, generator=seeded)

"""Deformable convolution, and the upsampling block that PEM and YOSO make of it.

Source: "Deformable ConvNets v2" (Zhu et al., arXiv 1811.11168). Where torchvision is installed, its operator is used;
otherwise one `grid_sample` for each of the nine taps. Both compute the same, in float32 also under autocast.

Axes: N images, C channels, H×W positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models.rows import Row, rows_of

TAPS = 9  # of a 3×3 kernel, row by row
TRANSPARENT = False  # see `countable`


class DeformUp(nn.Module):
    """Deformable 3×3 convolution, then a transposed 4×4 convolution of stride 2; norm and ReLU behind both."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(inputs, 3 * TAPS, 3, padding=1)
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)  # holds the weight; it is not called
        self.norm = nn.BatchNorm2d(outputs)
        self.up = nn.ConvTranspose2d(outputs, outputs, 4, stride=2, padding=1, bias=False)
        self.up_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N,C,H,W) → the convolution's (N,outputs,H,W), and (N,outputs,2H,2W)."""
        offsets, weights = self.offset(x).split((2 * TAPS, TAPS), dim=1)
        same = F.relu(self.norm(deformable(x, offsets, weights.sigmoid(), self.conv.weight)))
        return same, F.relu(self.up_norm(self.up(same)))


def deform_rows(ours: str, theirs: str) -> list[Row]:
    """Rows of a `DeformUp`."""
    names = {"offset": "dcn_offset", "conv": "dcn", "norm": "dcn_bn", "up": "up_sample", "up_norm": "up_bn"}
    return rows_of(ours, theirs, names)


def deformable(x: Tensor, offsets: Tensor, weights: Tensor, kernel: Tensor) -> Tensor:
    """3×3 convolution of x (N,C,H,W) whose taps are moved and weighted at each position: (N,O,H,W), float32.

    offsets (N,18,H,W) [positions]: down and right of the first tap, then of the second, and so on; the official PEM and
    YOSO call their first half x and their second half y, but the operator reads them so. weights (N,9,H,W). kernel
    (O,C,3,3). Between positions x is interpolated bilinearly; outside it is 0.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, offsets, weights, kernel = (each.float() for each in (x, offsets, weights, kernel))
        library = None if TRANSPARENT else operator()
        if library is not None:
            return library(x, offsets, kernel, padding=1, mask=weights)
        return by_sampling(x, offsets, weights, kernel)


def by_sampling(x: Tensor, offsets: Tensor, weights: Tensor, kernel: Tensor) -> Tensor:
    """`deformable` in PyTorch alone; float32."""
    height, width = x.shape[2:]
    rows, columns = (torch.arange(n, device=x.device, dtype=x.dtype) for n in (height, width))
    total: Any = 0
    for tap in range(TAPS):
        y = rows[:, None] + (tap // 3 - 1) + offsets[:, 2 * tap]  # (N,H,W)
        right = columns + (tap % 3 - 1) + offsets[:, 2 * tap + 1]
        # Position p of n is (2p + 1) / n - 1 for grid_sample.
        grid = torch.stack(((2 * right + 1) / width - 1, (2 * y + 1) / height - 1), dim=3)
        sampled = F.grid_sample(x, grid, align_corners=False) * weights[:, tap, None]
        total = total + F.conv2d(sampled, kernel[:, :, tap // 3, tap % 3, None, None])
    return total


@cache
def operator() -> Any:
    """torchvision's `deform_conv2d`; None if it is not installed, or was built for another PyTorch."""
    if find_spec("torchvision") is None:
        return None
    try:
        return import_module("torchvision.ops").deform_conv2d
    except (ImportError, RuntimeError):
        return None


@contextmanager
def countable() -> Iterator[None]:
    """Inside, torchvision's operator is not used: counters of operations do not know it."""
    global TRANSPARENT
    before, TRANSPARENT = TRANSPARENT, True
    try:
        yield
    finally:
        TRANSPARENT = before

"""Boundary IoU of semantic labels: how well the outlines are met, which large regions hide from the IoU.

Source: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021, and its
`boundary_iou/utils/boundary_utils.py`, for one mask; here for all classes of a label map at once:

- The band of class c in a map: its pixels from which a pixel of another class is at most d away, d in the maximum norm
  (a square of 2d+1 pixels, d erosions by 3×3). The image's border counts as another class begun just outside.
- d = max(round(0.02 · diagonal), 1) pixels of the image as it was read.
- Pixels whose label is ignored (255) are taken out of both maps: they count nowhere, and bound no class.
- Boundary IoU of c: pixels in the bands of c of both the label and the prediction, over pixels in either, each summed
  over all images first, as mIoU does; the mean leaves classes out that are in no band.

Axes: K classes, H×W pixels.
"""

from collections.abc import Callable
from math import hypot

import numpy as np
import torch
from torch import Tensor

from ssaseg.cli.scoring.metrics import percent
from ssaseg.datasets import IGNORED

BAND = 0.02  # of the image's diagonal

STATEMENT = (
    "boundary IoU: of each class's pixels within 2 % of the image's diagonal (at least 1 pixel) of another class or of "
    "the image's border; ignored pixels bound nothing"
)


class Boundaries:
    """Pixels of the bands, summed over images; nothing is read back from a GPU while it counts."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        # Rows: in both bands, in the label's, in the prediction's; the last column takes what is in none.
        self.counts = torch.zeros(3, num_classes + 1, dtype=torch.int64, device=device)

    def update(self, prediction: "np.ndarray | Tensor", label: "np.ndarray | Tensor") -> None:
        """Add one image: prediction and label (H,W), integers in [0, K); label 255 leaves the pixel out.

        Ids are not checked here: `Confusion` does.
        """
        device, none = self.counts.device, self.num_classes
        prediction, label = (
            torch.as_tensor(each).to(device, torch.uint8, non_blocking=True) for each in (prediction, label)
        )
        maps = torch.stack([label, torch.where(label == IGNORED, label, prediction)])
        labelled, predicted = torch.where(bands(maps, reach(label.shape)), maps, none)
        both = torch.where(labelled == predicted, labelled, none)
        one = self.counts.new_ones(()).expand(label.numel())
        for counts, cells in zip(self.counts, (both, labelled, predicted), strict=True):
            counts.scatter_add_(0, cells.flatten().long(), one)

    def scores(self) -> np.ndarray:
        """Boundary IoU per class [%], float64 (K,); NaN for a class that is in no band."""
        both, labelled, predicted = self.counts[:, : self.num_classes].cpu().numpy()
        return percent(both, labelled + predicted - both)


def reach(size: tuple[int, ...]) -> int:
    """How far, in pixels, the band of an image of `size` (H, W) reaches into a class."""
    return max(round(BAND * hypot(*size)), 1)


def bands(maps: Tensor, d: int) -> Tensor:
    """Pixels of label maps (N,H,W), uint8 with 255 for none, that have another class or the border within d: bool.

    A pixel has another class in its window where the window's smallest or largest class is not its own: two separable
    filters, whatever the number of classes. Windows that reach over the border need no look.
    """
    height, width = maps.shape[1:]
    near = maps != IGNORED
    if min(height, width) > 2 * d:
        inner = (slice(None), slice(d, height - d), slice(d, width - d))
        smallest = over_windows(torch.minimum, maps, 2 * d + 1)
        largest = over_windows(torch.maximum, torch.where(near, maps, 0), 2 * d + 1)
        near[inner] &= (smallest != maps[inner]) | (largest != maps[inner])
    return near


def over_windows(extreme: Callable[[Tensor, Tensor], Tensor], maps: Tensor, side: int) -> Tensor:
    """`torch.minimum` or `torch.maximum` of each side×side window: (N,H,W) → (N,H-side+1,W-side+1).

    Windows are doubled until they have their length: 12 operations an image instead of 70 for a side of 35.
    """
    for dim in (1, 2):
        length = 1
        while length < side:
            step = min(length, side - length)
            count = maps.shape[dim] - step
            maps = extreme(maps.narrow(dim, 0, count), maps.narrow(dim, step, count))
            length += step
    return maps

"""Boundary IoU of semantic labels: how well the outlines of regions agree. In large regions the IoU hides this.

Source: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021, and its
`boundary_iou/utils/boundary_utils.py`. The source is for one mask; here all classes of a label map are computed in one
pass:

- The band of class c in a map: the pixels of c that are at most d away from a pixel of another class, in the maximum
  norm (a square of 2d+1 pixels, d erosions by 3×3). Outside the image there is another class.
- d = max(round(0.02 · diagonal), 1) pixels of the original image.
- Pixels whose label is ignored (255) are removed from both maps: they do not count, and no band follows from them.
- Boundary IoU of c: the number of pixels that are in the bands of c of both label and prediction, divided by the number
  of pixels in either band. Both numbers are first summed over all images, as for mIoU. The mean is over the classes
  that have a band.

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
    "boundary IoU: IoU of each class's pixels that are within 2 % of the image's diagonal (at least 1 pixel) of "
    "another class or of the image's border; ignored pixels form no boundary"
)


class Boundaries:
    """Numbers of pixels in the bands, summed over images. Counting reads nothing back from a GPU."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        # Rows: in both bands, in the label's, in the prediction's. The last column counts pixels in no band.
        self.counts = torch.zeros(3, num_classes + 1, dtype=torch.int64, device=device)

    def update(self, prediction: "np.ndarray | Tensor", label: "np.ndarray | Tensor") -> None:
        """Add one image, see `count`."""
        self.counts += self.count(prediction, label)

    def count(self, prediction: "np.ndarray | Tensor", label: "np.ndarray | Tensor") -> Tensor:
        """One image's numbers, int64 (3,K+1): prediction and label (H,W), integers in [0, K); pixels with label 255 are
        ignored. Does not check the class numbers: `Confusion` does. Several threads may call it at the same time.
        """
        device, none = self.counts.device, self.num_classes
        prediction, label = (
            torch.as_tensor(each).to(device, torch.uint8, non_blocking=True) for each in (prediction, label)
        )
        maps = torch.stack([label, torch.where(label == IGNORED, label, prediction)])
        labelled, predicted = torch.where(bands(maps, reach(label.shape)), maps, none)
        both = torch.where(labelled == predicted, labelled, none)
        found, one = torch.zeros_like(self.counts), self.counts.new_ones(()).expand(label.numel())
        for counts, cells in zip(found, (both, labelled, predicted), strict=True):
            counts.scatter_add_(0, cells.flatten().long(), one)
        return found

    def scores(self) -> np.ndarray:
        """Boundary IoU per class [%], float64 (K,); NaN for a class without a band."""
        both, labelled, predicted = self.counts[:, : self.num_classes].cpu().numpy()
        return percent(both, labelled + predicted - both)


def reach(size: tuple[int, ...]) -> int:
    """Width of the bands [pixels] in an image of `size` (H, W)."""
    return max(round(BAND * hypot(*size)), 1)


def bands(maps: Tensor, d: int) -> Tensor:
    """Which pixels of label maps (N,H,W), uint8, 255 for no class, are within d of another class or the border: bool.

    A pixel has another class in its window if the window's smallest or largest class differs from its own. These are
    two separable filters; their cost does not depend on the number of classes. Windows that cross the border are near
    it, so they need no filter.
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

    The windows are doubled until they have their full length: for a side of 35, 12 operations instead of 70.
    """
    for dim in (1, 2):
        length = 1
        while length < side:
            step = min(length, side - length)
            count = maps.shape[dim] - step
            maps = extreme(maps.narrow(dim, 0, count), maps.narrow(dim, step, count))
            length += step
    return maps

"""Labels that do not flicker: the exponential average of logits over frames, and how much labels flicker.

Axes: K classes, H×W pixels of a frame, h×w logits.
"""

from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

STILL = 6  # largest change of a colour, 0..255, of a pixel that counts as unchanged
FLOW_SIDE = 240  # short side at which motion is estimated [pixels]


@dataclass
class Smoother:
    """s ← a·s + (1-a)·logits, from frame to frame, where `amount` is a in [0, 1).

    motion: s is first moved along with the image, by dense optical flow (DIS, Kroeger et al., ECCV 2016), so that a
    moving object keeps its own past. Other sizes of frames start again.
    """

    amount: float
    motion: bool = False
    average: Tensor | None = None
    before: np.ndarray | None = None  # grey, uint8

    def __call__(self, logits: Tensor, image: np.ndarray) -> Tensor:
        """Smoothed logits (1,K,h,w) of the next frame, BGR uint8 (H,W,3)."""
        grey = _small_grey(image) if self.motion else None
        if self.average is None or self.average.shape != logits.shape:
            self.average = logits
        else:
            past = self.average
            if grey is not None and self.before is not None and self.before.shape == grey.shape:
                past = _moved(past, _flow(grey, self.before))
            self.average = torch.lerp(logits, past, self.amount)
        self.before = grey
        return self.average


def _small_grey(image: np.ndarray) -> np.ndarray:
    scale = min(FLOW_SIDE / min(image.shape[:2]), 1.0)
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    return grey if scale == 1 else cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def _flow(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Where each pixel was before: float32 (H,W,2) of (x, y), as shares of the width and the height."""
    flow = np.zeros((*now.shape, 2), np.float32)
    found = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST).calc(now, before, flow)
    return found / np.array(now.shape[::-1], np.float32)


def _moved(maps: Tensor, flow: np.ndarray) -> Tensor:
    """Maps (1,K,h,w), read where the flow points to; beyond the border it is repeated."""
    shift = F.interpolate(
        torch.from_numpy(flow).to(maps.device).permute(2, 0, 1)[None], maps.shape[2:], mode="bilinear"
    )
    identity = F.affine_grid(torch.eye(2, 3, device=maps.device)[None], list(maps.shape), align_corners=False)
    return F.grid_sample(maps, identity + 2 * shift.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


@dataclass
class Flicker:
    """Counts pixels whose label changes from a frame to the next one although the image does not."""

    changed: int = 0
    still: int = 0
    labels: np.ndarray | None = None
    image: np.ndarray | None = field(default=None, repr=False)

    def add(self, image: np.ndarray, labels: np.ndarray) -> None:
        """The next frame, BGR uint8 (H,W,3), and its labels (H,W)."""
        blurred = cv2.blur(image, (3, 3))  # noise of the camera and of the codec is no change
        if self.image is not None and self.labels is not None and self.image.shape == blurred.shape:
            same = cv2.inRange(cv2.absdiff(blurred, self.image), (0, 0, 0), (STILL, STILL, STILL))
            self.still += cv2.countNonZero(same)
            self.changed += cv2.countNonZero(cv2.bitwise_and(same, cv2.compare(labels, self.labels, cv2.CMP_NE)))
        self.image, self.labels = blurred, labels

    @property
    def share(self) -> float | None:
        """Changed labels of unchanged pixels, 0 to 1; None if no pixel was unchanged."""
        return self.changed / self.still if self.still else None

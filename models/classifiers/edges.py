"""Edges between labels, for the boundary-aware response loss: OpenCV's Canny, in integers, on the labels' device.

Axes: N images, h×w label pixels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def boundary_map(labels: Tensor) -> Tensor:
    """The same label edges as in the official code: (N,h,w) integer → (N,h,w) bool.

    Equal to `cv2.Canny(label as uint8, 0.1, 0.2)`, then a frame of 6 pixels set to 0, then dilation by a 3×3 square.
    OpenCV rounds both thresholds down to 0, so that hysteresis has no effect: an edge is a local maximum of the L1
    Sobel gradient along its direction, in OpenCV's integer arithmetic. With a side of 12 pixels or fewer there is no
    edge.
    """
    height, width = labels.shape[-2:]
    edges = _local_maxima(*_sobel(labels.int()))
    inside = torch.zeros(height, width, dtype=torch.bool, device=labels.device)
    inside[6 : max(height - 6, 6), 6 : max(width - 6, 6)] = True
    grown = F.max_pool2d((edges & inside).float().unsqueeze(1), 3, stride=1, padding=1)
    return grown.squeeze(1) > 0


def _sobel(image: Tensor) -> tuple[Tensor, Tensor]:
    """3×3 Sobel with the border repeated. (N,h,w) int32 → horizontal and vertical gradients, in grey levels."""
    rows = torch.cat([image[:, :1], image, image[:, -1:]], dim=1)
    padded = torch.cat([rows[:, :, :1], rows, rows[:, :, -1:]], dim=2)
    smooth_rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    smooth_columns = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return smooth_rows[:, :, 2:] - smooth_rows[:, :, :-2], smooth_columns[:, 2:] - smooth_columns[:, :-2]


def _local_maxima(dx: Tensor, dy: Tensor) -> Tensor:
    """Non-maximum suppression along the gradient, in four directions. (N,h,w) int32 twice → bool."""
    magnitude = dx.abs() + dy.abs()
    padded = F.pad(magnitude, (1, 1, 1, 1))
    height, width = magnitude.shape[-2:]

    def neighbour(down: int, right: int) -> Tensor:
        return padded[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    # tan 22.5° in 15-bit fixed point; tan 67.5° = tan 22.5° + 2. All values stay below 2^27.
    x, y = dx.abs(), dy.abs() << 15
    shallow = x * 13573
    steep = shallow + (x << 16)
    # The neighbour before must be lower, the one after not higher, so that two equal neighbours give one edge. On
    # diagonals OpenCV requires lower neighbours on both sides.
    horizontal = (magnitude > neighbour(0, -1)) & (magnitude >= neighbour(0, 1))
    vertical = (magnitude > neighbour(-1, 0)) & (magnitude >= neighbour(1, 0))
    falling = (magnitude > neighbour(-1, -1)) & (magnitude > neighbour(1, 1))
    rising = (magnitude > neighbour(-1, 1)) & (magnitude > neighbour(1, -1))
    diagonal = torch.where((dx ^ dy) < 0, rising, falling)
    maximum = torch.where(y < shallow, horizontal, torch.where(y > steep, vertical, diagonal))
    return (magnitude > 0) & maximum

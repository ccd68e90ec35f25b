"""The label map of a network at full size, without computing the logits of all classes at full size; its confidence.

Bilinear steps are separable and linear. Two of them make each output pixel a convex combination of the few logits
under it: `rows @ logits @ columns.T`, with one row-stochastic matrix per axis. The output is cut into blocks. All
pixels of a block depend on the same logits, its window. If the largest logit of a class in the window is below the
smallest of another class, the first class cannot win in this block. The other classes are the candidates; only they
are interpolated. Trained networks have few candidates per block.

Axes: K classes, h×w logits, H×W pixels; P×Q pixels in a block, T×U logits in a window; n blocks.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ssaseg.models.layers import resize_bilinear

# Numbers processed at a time: on a CPU as many as its cache holds; on a GPU more, for fewer and larger operations.
CPU_ELEMENTS, GPU_ELEMENTS = 2**18, 2**24
# Costs measured on a CPU; the unit is one pixel of one class in `running_maximum`. PIXEL_COST: a pixel that is
# interpolated block by block. BLOCK_COST: added for each block and class. SEARCH_COST: the search, for each logit and
# each logit of a window.
PIXEL_COST, BLOCK_COST, SEARCH_COST = 2.0, 64.0, 1.0


@torch.inference_mode()
def label_map(logits: Tensor, middle: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Arg-max over classes at full size: (1,K,h,w) → uint8 (H,W); of equal logits the lower class wins. K ≤ 256.

    `middle`: size of the network's input, `size`: size of the image (height, width). If they are equal there is one
    bilinear step, else two. Full-size logits of all classes (7 GB for 150 classes and 12 megapixels) are never in
    memory. The labels equal those of `F.interpolate` and `argmax`, except where two classes differ only by float32's
    rounding. Logits that are not finite give an arbitrary label.
    """
    logits = logits.float().contiguous()
    rows, columns = (cut_axis(*each, str(logits.device)) for each in zip(logits.shape[2:], middle, size, strict=True))
    found = find_candidates(logits[0], rows, columns)
    return running_maximum(logits, middle, size) if found is None else label_blocks(logits[0], *found, rows, columns)


def elements(device: torch.device) -> int:
    """Numbers processed at a time on this device."""
    return CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS


def resize_twice(logits: Tensor, middle: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """The protocol's two bilinear steps (align_corners=False). (1,K,h,w) → (1,K,H,W)."""
    return resize_bilinear(resize_bilinear(logits, torch.Size(middle)), torch.Size(size))


# ---- every class -------------------------------------------------------------------------------------------------


def few_classes(logits: Tensor, middle: tuple[int, ...], size: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """All classes of logits (1,K,h,w) at full size, a few at a time: the first class, and its maps with the next ones
    (k,H,W), which must not be changed.

    PyTorch's rounding in the last place depends on how many classes it resizes together.
    """
    step = max(elements(logits.device) // max(size[0] * size[1], middle[0] * middle[1]), 1)
    for first in range(0, logits.shape[1], step):
        yield first, resize_twice(logits[:, first : first + step], middle, size)[0]


@torch.inference_mode()
def confidence_map(logits: Tensor, middle: tuple[int, ...], size: tuple[int, ...], scores: bool = False) -> Tensor:
    """How sure the network is of the labels of `label_map`: the largest softmax over classes, float32 (H,W) in (0, 1].

    Arguments as in `label_map`, and as there, full-size logits of all classes are never in memory. scores: the network
    gives scores, not logits; then the largest score, divided by their sum.
    """
    best = torch.full(tuple(size), 0.0 if scores else -torch.inf, device=logits.device)
    total = torch.zeros_like(best)  # of scores; of logits, the sum of exp(logit - best)
    for _, maps in few_classes(logits.float(), middle, size):
        highest = torch.maximum(best, maps.amax(dim=0))
        if scores:
            total += maps.sum(dim=0)
        else:
            total.mul_((best - highest).exp_()).add_((maps - highest).exp_().sum(dim=0))
        best = highest
    return best / total.clamp(min=1e-12) if scores else total.reciprocal_()


def running_maximum(logits: Tensor, middle: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """`label_map` by interpolating every class, a few classes at a time, and keeping the maximum so far."""
    best = torch.full(tuple(size), -torch.inf, device=logits.device)
    labels = torch.zeros(tuple(size), dtype=torch.uint8, device=logits.device)
    for first, maps in few_classes(logits, middle, size):
        values, classes = (maps[0], None) if len(maps) == 1 else maps.max(dim=0)
        higher = values > best
        if classes is None:
            labels.masked_fill_(higher, first)
        else:
            labels = torch.where(higher, (classes + first).byte(), labels)
        best = torch.maximum(best, values)
    return labels


# ---- candidates only ---------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """One axis of the output cut into B blocks of P pixels, each with a window of T logits."""

    starts: Tensor  # int64 (B): first logit of a block's window
    weights: Tensor  # float32 (T,P,B): weight of each logit of the window in each pixel of the block
    places: Tensor  # int64 (pixels of the axis): block · P + pixel of the block
    windows: int  # number of windows of T logits along the axis


@lru_cache(maxsize=64)
def cut_axis(source: int, middle: int, target: int, device: str) -> Axis:
    """Cuts an axis of `target` pixels that are interpolated from `source` logits by way of `middle` pixels."""
    # The weights are interpolated unit vectors, so that positions are rounded here as in the bilinear steps.
    matrix = resize_twice(torch.eye(source)[None, None], (source, middle), (source, target))[0, 0]
    used = (matrix != 0).byte()
    first, last = used.argmax(dim=0), source - 1 - used.flip(0).argmax(dim=0)
    T = int((last - first).max()) + 1
    start = first.clamp(max=source - T)
    _, run, lengths = start.unique_consecutive(return_inverse=True, return_counts=True)
    # The runs at both ends are longer. They are cut in two, so that the other blocks need not be as wide.
    P = int(lengths.median())
    within = torch.arange(target) - (lengths.cumsum(0) - lengths)[run]
    block = (run * target + within // P).unique_consecutive(return_inverse=True)[1]
    B = int(block[-1]) + 1
    places = block * P + within % P
    weights = torch.zeros(T, B * P).index_copy(1, places, matrix.gather(0, start + torch.arange(T)[:, None]))
    starts = torch.zeros(B, dtype=torch.int64).index_copy(0, block, start)
    weights = weights.unflatten(1, (B, P)).transpose(1, 2).contiguous()
    return Axis(starts.to(device), weights.to(device), places.to(device), source - T + 1)


def find_candidates(logits: Tensor, rows: Axis, columns: Axis) -> tuple[Tensor, Tensor] | None:
    """Window (numbered row by row) and class of each candidate in logits (K,h,w): both int64 (candidates), ascending.

    None if interpolating every class is faster, or if a logit is not finite.
    """
    T, U = len(rows.weights), len(columns.weights)
    left = affordable(len(logits), rows, columns)
    if left < 0 or not logits.sum().isfinite():
        return None
    found = []
    step = max(elements(logits.device) // (len(logits) * columns.windows), 1)
    for top in range(0, rows.windows, step):
        band = logits[:, top : min(top + step, rows.windows) + T - 1]
        smallest = over_windows(torch.minimum, band, T, U)
        reach = over_windows(torch.maximum, band, T, U) >= smallest.amax(dim=0)
        left -= int(reach.count_nonzero())
        if left < 0:
            return None
        pairs = reach.flatten(1).T.nonzero()
        found.append(pairs.add_(torch.tensor([top * columns.windows, 0], device=pairs.device)))
    window, classes = torch.cat(found).unbind(1)
    return window, classes


def affordable(classes: int, rows: Axis, columns: Axis) -> float:
    """Largest number of candidates for which interpolating only them is faster; negative: it never is."""
    (T, P, _), (U, Q, _) = rows.weights.shape, columns.weights.shape
    pixels, windows = len(rows.places) * len(columns.places), rows.windows * columns.windows
    return classes * (pixels - SEARCH_COST * (T + U) * windows) / (PIXEL_COST * P * Q + BLOCK_COST)


def over_windows(extreme: Callable[[Tensor, Tensor], Tensor], maps: Tensor, T: int, U: int) -> Tensor:
    """`torch.minimum` or `torch.maximum` over each window: (K,h,w) → (K,h-T+1,w-U+1)."""
    for dim, length in ((1, T), (2, U)):
        count = maps.shape[dim] - length + 1
        result = maps.narrow(dim, 0, count)
        for offset in range(1, length):
            result = extreme(result, maps.narrow(dim, offset, count))
        maps = result
    return maps


def label_blocks(logits: Tensor, windows: Tensor, classes: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Labels (H,W) from logits (K,h,w), among the candidates only: windows and classes, both (candidates), sorted."""
    (_, P, B), (_, Q, C) = rows.weights.shape, columns.weights.shape
    number = windows.bincount(minlength=rows.windows * columns.windows)
    window = (rows.starts[:, None] * columns.windows + columns.starts).flatten()
    first, number = (number.cumsum(0) - number)[window], number[window]  # of the candidates of each block
    labels = classes[first].byte()[:, None].repeat(1, P * Q)
    # Sorted by number of candidates, most first: for each r, the blocks with more than r come first in the list.
    order = number.argsort(descending=True)
    more = (len(order) - number.bincount().cumsum(0)).tolist()
    step = max(elements(logits.device) // (P * Q), 1)
    for begin in range(0, more[1], step):
        blocks = order[begin : min(begin + step, more[1])]
        down, across = rows.weights[..., blocks // C], columns.weights[..., blocks % C]
        corner = rows.starts[blocks // C] * logits.shape[2] + columns.starts[blocks % C]
        best = torch.full((P, Q, len(blocks)), -torch.inf, device=logits.device)
        label = torch.zeros(best.shape, dtype=torch.uint8, device=logits.device)
        for r, count in enumerate(more):
            n = min(count - begin, len(blocks))
            if n <= 0:
                break
            k = classes[first[blocks[:n]] + r]
            values = interpolate_blocks(logits, k, corner[:n], down[..., :n], across[..., :n])
            label[..., :n] = torch.where(values > best[..., :n], k.byte(), label[..., :n])
            best[..., :n] = torch.maximum(values, best[..., :n])
        labels[blocks] = label.flatten(0, 1).T
    labels = labels.view(B, C, P, Q).transpose(1, 2).reshape(B * P, C * Q)
    return labels[rows.places][:, columns.places]


def interpolate_blocks(logits: Tensor, classes: Tensor, corner: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Pixels (P,Q,n) of n blocks, each for one class (n). A block's window starts at `corner` (n) of the flat (h,w).

    Weights: down (T,P,n), across (U,Q,n).
    """
    height, width = (torch.arange(len(weights), device=logits.device) for weights in (down, across))
    offset = width[:, None, None] + height[:, None] * logits.shape[2]  # (U,T,1)
    window = logits.flatten()[classes * logits[0].numel() + corner + offset]
    lines = weighted_sum(window[:, :, None], across)  # (T,Q,n)
    return weighted_sum(lines, down[:, :, None])


def weighted_sum(terms: Tensor, weights: Tensor) -> Tensor:
    """Sum of terms · weights over the first axis, without storing the products."""
    total = terms[0] * weights[0]
    for term, weight in zip(terms[1:], weights[1:], strict=True):
        total.addcmul_(term, weight)
    return total

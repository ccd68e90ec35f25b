"""From an image to its labels, by the rules of a recipe's `test` section; the same for `eval`, `predict` and `train`.

A view is the image at one of the protocol's scales, mirrored or not. Its logits are resized first to the size of the
network's input, and then to the size of the image. Both bilinear steps are needed: a single step gives other labels.
With one view the labels are the arg-max of the logits; with several views, the arg-max of their mean probabilities.
Mask methods give scores instead, whose mean is taken as it is; divided by their sum over the classes they count as
probabilities.

Sources: mmsegmentation 0.30 `models/segmentors/encoder_decoder.py` (slide_inference, inference, aug_test) and
`datasets/pipelines/test_time_aug.py`.

Axes: K classes, H×W pixels of the original image, h×w pixels of a network's input.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssaseg.cli.scoring.engines import Engine, Logits, TorchEngine
from ssaseg.datasets import DataError
from ssaseg.datasets.colour import normalize, to_planes
from ssaseg.datasets.transforms import input_sizes, scaled_inputs
from ssaseg.files.text import printable
from ssaseg.models import Segmenter
from ssaseg.models.labelling import confidence_map, label_map, resize_twice
from ssaseg.models.layers import resize_bilinear
from ssaseg.recipes import Test, parse_protocol

SMALLEST = 32  # shortest side that a network takes [pixels]


class Prediction(NamedTuple):
    """A model's result for one image, at the size of the original image, on the CPU."""

    labels: np.ndarray  # uint8 (H,W), 0..K-1
    coarse: np.ndarray | None  # labels before adaptation; None unless requested and the classifier adapts
    probabilities: np.ndarray | None  # float16 (K,H,W); None unless requested
    confidence: np.ndarray | None = None  # float32 (H,W), the label's probability; None unless requested
    coarse_confidence: np.ndarray | None = None  # the same of the coarse labels


class Maps(NamedTuple):
    """The same on the device, with probabilities in float32."""

    labels: Tensor
    coarse: Tensor | None
    probabilities: Tensor | None
    confidence: Tensor | None
    coarse_confidence: Tensor | None

    def on_cpu(self) -> Prediction:
        """Copies for other libraries."""
        half = None if self.probabilities is None else self.probabilities.half()
        coarse, shares, sure, coarse_sure = (
            None if each is None else each.cpu().numpy()
            for each in (self.coarse, half, self.confidence, self.coarse_confidence)
        )
        return Prediction(self.labels.cpu().numpy(), coarse, shares, sure, coarse_sure)


@dataclass(frozen=True)
class Inference:
    """An engine, and all that decides its labels; mean and std: RGB, on the scale 0..255.

    Memory besides the network's: with one view, no tensor of K·H·W numbers, unless probabilities are requested; with
    several views, two tensors of K·H·W float32 (the sum and the next summand); with sliding windows, the sum of their
    logits, K·h·w float32.

    Logits that are not finite have no arg-max: they raise FloatingPointError that names the image. `labels` waits for
    nothing on a GPU; it only notes them, and `require_finite` raises.
    """

    engine: Engine
    protocol: Test
    mean: Sequence[float]
    std: Sequence[float]
    # Of the views that `require_finite` has not looked at yet: lowest and highest logit (2), and the image's name.
    ranges: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def apart(self) -> "Inference":
        """The same for another thread, with ranges and names of its own."""
        return replace(self, ranges=[], names=[])

    @property
    def device(self) -> torch.device:
        """Where the engine computes."""
        return self.engine.device

    @property
    def views(self) -> int:
        """Number of views of an image: of forward passes, or with sliding windows, of passes over all windows."""
        return len(self.protocol.ratios) * (2 if self.protocol.flip else 1)

    def inputs(self, image: np.ndarray, name: str) -> list[np.ndarray]:
        """Network inputs BGR uint8 (h,w,3), one per ratio, of an image BGR uint8 (H,W,3). DataError if too small."""
        protocol = self.protocol
        inputs = scaled_inputs(image, protocol.scale, protocol.multiple, protocol.ratios, name)
        require_size(inputs, name)
        return inputs

    def input_pixels(self, size: tuple[int, int]) -> int:
        """Pixels of the largest network input, or window, for an image of (height, width)."""
        if self.protocol.crop is not None:
            return self.protocol.crop[0] * self.protocol.crop[1]
        sizes = input_sizes(size, self.protocol.scale, self.protocol.multiple, self.protocol.ratios)
        return max(height * width for height, width in sizes)

    def labels(self, inputs: Sequence[Tensor], size: tuple[int, ...], name: str = "image") -> Tensor:
        """Labels uint8 (H,W), on the device, of network inputs uint8 (h,w,3) BGR; `size`: the image's (H, W)."""
        return self.maps([inputs], [size], [name])[0].labels

    @torch.inference_mode()
    def maps(
        self,
        inputs: Sequence[Sequence[Tensor]],
        sizes: Sequence[tuple[int, ...]],
        names: Sequence[str],
        coarse: bool = False,
        probabilities: bool = False,
        confidence: bool = False,
        coarse_confidence: bool = False,
    ) -> list[Maps]:
        """Labels of several images, and what else is requested; arguments of each image as in `labels`.

        With one view, they are computed in one pass, and their network inputs must have equal sizes. All is made of the
        same logits. For a single view mmsegmentation takes the arg-max of the softmax. Here it is the arg-max of the
        logits, which rounding cannot make equal.
        """
        wanted = coarse, probabilities, confidence, coarse_confidence
        if self.views > 1:
            made = [self._from_views(*each, *wanted) for each in zip(inputs, sizes, names, strict=True)]
        else:
            batch = torch.stack([only for (only,) in inputs])
            logits = self._logits(self._pixels(batch), coarse)
            self.names.extend(names)
            made = [
                self._from_logits(each, batch.shape[1:3], size, *wanted[1:])
                for each, size in zip(_split(logits), sizes, strict=True)
            ]
        if self.device.type == "cpu":
            self.require_finite()
        return made

    @torch.inference_mode()
    def logits(self, only: Tensor, name: str = "image") -> Tensor:
        """Logits (1,K,·,·) of the single view, a network input uint8 (h,w,3) BGR."""
        logits = self._logits(self._pixels(only[None])).final
        self.names.append(name)
        self.require_finite()
        return logits

    def require_finite(self) -> None:
        """Raises FloatingPointError for the first image since the last call whose logits are not finite."""
        ranges, names = list(self.ranges), list(self.names)
        self.ranges.clear()
        self.names.clear()
        finite = torch.stack(ranges).isfinite().all(dim=1).tolist() if ranges else []
        if not all(finite):
            raise FloatingPointError(
                f"{printable(names[finite.index(False)])}: the network's output is not finite (NaN or infinity)\n"
                "its weights or statistics are too large or damaged: take another checkpoint"
            )

    def predict(
        self,
        inputs: Sequence[Tensor],
        size: tuple[int, ...],
        coarse: bool = True,
        probabilities: bool = False,
        name: str = "image",
    ) -> Prediction:
        """Labels and, if requested, coarse labels and probabilities; arguments as in `labels`."""
        return self.predict_batch([inputs], [size], [name], coarse, probabilities)[0]

    def predict_batch(
        self,
        inputs: Sequence[Sequence[Tensor]],
        sizes: Sequence[tuple[int, ...]],
        names: Sequence[str],
        coarse: bool = True,
        probabilities: bool = False,
        confidence: bool = False,
        coarse_confidence: bool = False,
    ) -> list[Prediction]:
        """`maps`, on the CPU; raises FloatingPointError as `require_finite`."""
        made = self.maps(inputs, sizes, names, coarse, probabilities, confidence, coarse_confidence)
        self.require_finite()
        return [each.on_cpu() for each in made]

    # ---- one view ------------------------------------------------------------------------------------------------

    def _pixels(self, resized: Tensor) -> Tensor:
        """What the engine takes, (N,3,h,w), from uint8 (N,h,w,3)."""
        images = resized.to(self.device, non_blocking=True)
        if self.engine.takes == "rgb":
            return to_planes(images).byte()
        return normalize(images, self.mean, self.std)

    def _logits(self, pixels: Tensor, coarse: bool = False) -> Logits:
        """Logits of views (N,3,h,w): those of the network, or the means (N,K,h,w) over the sliding windows."""
        if self.protocol.mode == "whole":
            logits = self.engine.logits(pixels, coarse)
        else:
            assert self.protocol.crop is not None
            assert self.protocol.stride is not None
            logits = slide(self.engine, pixels, self.protocol.crop, self.protocol.stride, coarse)
        # One pass over the logits, without a second tensor of their size; NaN is both the lowest and the highest.
        self.ranges.extend(torch.stack(each.aminmax()) for each in logits.final)
        return logits

    def _from_logits(
        self, logits: Logits, middle: tuple[int, ...], size: tuple[int, ...], probabilities: bool, *confidence: bool
    ) -> Maps:
        """From the logits (1,K,·,·) of one image; `middle`: size of the network's input."""
        final, before = (None if each is None else label_map(each, middle, size) for each in logits)
        assert final is not None
        shares = self._shares(resize_twice(logits.final, middle, size)[0]) if probabilities else None
        scores = self.engine.gives_scores
        sure = (
            confidence_map(each, middle, size, scores) if wanted and each is not None else None
            for each, wanted in zip(logits, confidence, strict=True)
        )
        return Maps(final, before, shares, *sure)

    # ---- several views -------------------------------------------------------------------------------------------

    def _probabilities(
        self, inputs: Sequence[Tensor], size: tuple[int, ...], coarse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Mean probabilities (K,H,W) over all views: of the logits, and of the coarse logits (None: without)."""
        sums: list[Tensor | None] = [None, None]
        for pixels, mirrored in self._each_view(inputs):
            for index, logits in enumerate(self._logits(pixels, coarse)):
                if logits is None:
                    continue
                # Mirrored back while they are small: at full size this would need a third tensor of K·H·W.
                upright = logits.flip(3) if mirrored else logits
                # The summand has no name: a name would keep its memory while the next one is computed.
                sums[index] = added(sums[index], self._votes(resize_twice(upright, pixels.shape[2:], size)[0]))
        final, before = (None if total is None else total.div_(self.views) for total in sums)
        assert final is not None
        return final, before

    def _votes(self, maps: Tensor) -> Tensor:
        """What is averaged over views, from logits (K,H,W), which it may change: probabilities, or scores unchanged."""
        return maps if self.engine.gives_scores else softmax_(maps)

    def _shares(self, maps: Tensor, votes: bool = False) -> Tensor:
        """Probabilities (K,H,W) from what the network gives, or from the mean of `_votes`."""
        if self.engine.gives_scores:
            return maps / maps.sum(dim=0).clamp(min=1e-12)
        return maps if votes else maps.softmax(dim=0)

    def _from_views(
        self,
        inputs: Sequence[Tensor],
        size: tuple[int, ...],
        name: str,
        coarse: bool,
        probabilities: bool,
        *confidence: bool,
    ) -> Maps:
        """The result for one image from all its views."""
        means = self._probabilities(inputs, size, coarse)
        self.names.extend([name] * (len(self.ranges) - len(self.names)))
        final, before = (None if each is None else each.argmax(dim=0).byte() for each in means)
        assert final is not None
        sure = (
            self._highest(each) if wanted and each is not None else None
            for each, wanted in zip(means, confidence, strict=True)
        )
        return Maps(final, before, self._shares(means[0], votes=True) if probabilities else None, *sure)

    def _highest(self, means: Tensor) -> Tensor:
        """Confidence (H,W) of means (K,H,W); not that of `_shares`: of scores these are another K·H·W."""
        highest = means.amax(dim=0)
        return highest / means.sum(dim=0).clamp(min=1e-12) if self.engine.gives_scores else highest.clamp(max=1)

    def _each_view(self, inputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, bool]]:
        """For each view: normalised pixels (1,3,h,w), and whether they are mirrored."""
        for each in inputs:
            pixels = self._pixels(each[None])
            yield pixels, False
            if self.protocol.flip:
                yield pixels.flip(3), True


def _split(logits: Logits) -> Iterator[Logits]:
    """The logits (1,K,·,·) of each image."""
    befores = [None] * len(logits.final) if logits.coarse is None else logits.coarse.split(1)
    yield from map(Logits, logits.final.split(1), befores)


def predict_labels(
    model: Segmenter,
    image: np.ndarray,
    protocol: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    coarse: bool = True,
    probabilities: bool = False,
) -> Prediction:
    """Labels of one image, BGR uint8 (H,W,3), as `Inference.predict`, of a model in evaluation mode on `device`.

    `protocol`: like a recipe's `test` section.
    """
    inference = Inference(TorchEngine(model, device), parse_protocol(protocol, "test-time protocol"), mean, std)
    inputs = [torch.tensor(each) for each in inference.inputs(image, "image")]  # copied: a cached image is read-only
    return inference.predict(inputs, image.shape[:2], coarse, probabilities)


def require_size(inputs: Sequence[np.ndarray | Tensor], name: str) -> None:
    """Raises DataError, naming the image, if a network input (h,w,3) is too small for the networks."""
    height, width = min((tuple(each.shape[:2]) for each in inputs), key=min)
    if min(height, width) < SMALLEST:
        got = f"got {width}x{height} pixels as the network's input"
        raise DataError(f"{name}: too small: {got}, expected {SMALLEST}x{SMALLEST} or more")


def slide(
    engine: Engine, pixels: Tensor, crop: tuple[int, int], stride: tuple[int, int], coarse: bool = False
) -> Logits:
    """Mean logits (N,K,h,w) of sliding windows over normalised pixels (N,3,h,w); crop and stride are (height, width).

    The logits of each window are resized to the size of the window and added up. A pixel in several windows gets their
    mean.
    """
    height, width = pixels.shape[2:]
    sums: list[Tensor | None] = [None, None]
    times_seen = pixels.new_zeros(height, width, dtype=torch.float32)
    for rows in windows(height, crop[0], stride[0]):
        for columns in windows(width, crop[1], stride[1]):
            window = pixels[..., rows, columns]
            times_seen[rows, columns] += 1
            for index, logits in enumerate(engine.logits(window, coarse)):
                if logits is None:
                    continue
                total = sums[index]
                if total is None:
                    sums[index] = total = logits.new_zeros(len(logits), logits.shape[1], height, width)
                total[..., rows, columns] += resize_bilinear(logits, window.shape[2:])
    final, before = (None if total is None else total.div_(times_seen) for total in sums)
    assert final is not None
    return Logits(final, before)


def windows(length: int, crop: int, stride: int) -> list[slice]:
    """Windows of `crop` pixels, every `stride` pixels, along an axis of `length` pixels.

    The last window is shifted back inside. If the axis is shorter than `crop`, there is one window: the whole axis.
    """
    count = max(length - crop + stride - 1, 0) // stride + 1
    starts = (max(min(index * stride + crop, length) - crop, 0) for index in range(count))
    return [slice(start, min(start + crop, length)) for start in starts]


def added(total: Tensor | None, more: Tensor) -> Tensor:
    """`total` + `more`, in place; `more` itself if there is no total yet."""
    return more if total is None else total.add_(more)


def softmax_(logits: Tensor) -> Tensor:
    """Softmax over the first axis, in place: at full size a second tensor would need the most memory of all."""
    logits.sub_(logits.amax(dim=0)).exp_()
    return logits.div_(logits.sum(dim=0))


def state_views(protocol: Test, scores: bool = False) -> str:
    """The protocol as text, for users who want to know whether two results are comparable.

    `scores`: the network gives scores, not logits, see `Classifier.gives_scores`.
    """
    scale, ratios = protocol.scale, protocol.ratios
    resize = "not resized" if scale is None else f"resized to fit {scale[0]}x{scale[1]}, aspect kept"
    rounding = f", then to multiples of {protocol.multiple}" if protocol.multiple else ""
    how = "whole image"
    if protocol.crop and protocol.stride:
        crop, stride = ("x".join(map(str, sides)) for sides in (protocol.crop, protocol.stride))
        averaged = f"{'scores' if scores else 'logits'} averaged"
        how = f"sliding windows of {crop} every {stride} pixels (height x width), {averaged}"
    scales = "single scale" if ratios == (1.0,) else f"scales {', '.join(f'{ratio:g}' for ratio in ratios)}"
    flip = "with horizontal flip" if protocol.flip else "no flip"
    mean = f", mean of {'scores' if scores else 'probabilities'}" if len(ratios) > 1 or protocol.flip else ""
    return f"{resize}{rounding}; {how}, {scales}, {flip}{mean}"

"""What a network and the training loop rely on in a pixel-level classifier; they know none by name.

- `forward(feature)` → logits; pure: no buffer written, no randomness in evaluation, exportable.
- `training_step(feature, labels, totals)` → `TrainingStep`; owns dropout, upsampling conventions and float32 islands.
- `update(memories, peers, held)`, after the optimiser's step: state that is not learnt by gradient.
- All such state is a buffer. A checkpoint, a resumed run and a deploy form have it; the average of weights does not.
- `training_only()`: names of parameters, buffers and modules that a deploy form drops.

Axes: N images, K classes, C channels, h×w feature pixels, P = h·w.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ssaseg.models.classifiers import losses
from ssaseg.models.rows import Row


@dataclass(frozen=True)
class LossOptions:
    """Changes of the losses; the defaults are what the published results were trained with.

    Class weights and label smoothing are those of `F.cross_entropy` and apply to every cross entropy. What a mean
    divides by follows the code that each comes from: the main one, mmsegmentation 0.30's CrossEntropyLoss, by the
    number of all pixels, whatever they weigh; coarse and teacher, `nn.CrossEntropyLoss`, by the weights of the pixels
    that are not ignored. Hard example mining is of the main one alone, where mmsegmentation's sampler sits, image by
    image, so that it does not depend on how a step is cut: see `losses.Weighing`. Dices and distillation stay as they
    are.
    """

    weights: Mapping[str, float] = field(default_factory=dict)  # of losses by name, where not the default; 0: left out
    class_weights: tuple[float, ...] | None = None  # (K,), 0 or more, not all 0; None: 1 each
    label_smoothing: float = 0.0  # in [0, 1]
    ohem_threshold: float | None = None  # probability in (0, 1]; None: no hard example mining
    ohem_min_kept: int = 100_000  # pixels of an image

    def factors(self, num_classes: int) -> Tensor | None:
        """`class_weights` as a tensor. Raises ValueError where they are not one for each class, 0 or more, or all 0."""
        found = self.class_weights
        if found is None:
            return None
        if len(found) != num_classes or not all(0 <= weight < math.inf for weight in found):
            raise ValueError(f"class_weights are {len(found)} numbers, expected {num_classes}, finite, 0 or more")
        if not any(found):
            raise ValueError("class_weights are all 0, so that no pixel counts; expected one above 0")
        return torch.tensor(found, dtype=torch.float32)


class Loss(NamedTuple):
    """A loss as recipes know it: `loss.weights.NAME`."""

    weight: float  # the default
    meaning: str


class Option(NamedTuple):
    """A number or word that a classifier is built with: a recipe's `model.options.NAME`."""

    default: Any  # its type is the option's: bool, int, float or str
    meaning: str
    least: float | None = None  # of a number
    most: float | None = None
    choices: tuple[Any, ...] = ()  # of a word


class TrainingStep(NamedTuple):
    """What a classifier gives back in training: logits (N,K,h,w), weighted losses by name, and what `update` needs."""

    logits: Tensor
    losses: dict[str, Tensor]
    memory: Any = None


class Peers(Protocol):
    """The ranks that train together, as `update` sees them. Every rank calls a method with a tensor of one shape."""

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of the ranks' tensors."""

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in the order of ranks."""


class Alone:
    """The `Peers` of a process that trains by itself."""

    def total(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor, in a list."""
        return [tensor]


class Classifier(nn.Module):
    """The contract, with the defaults of a classifier that has no state, no options and one stage."""

    # Each loss by name, in the order in which they are logged.
    LOSSES: ClassVar[Mapping[str, Loss]] = {"main_ce": Loss(1.0, "cross entropy of the logits")}
    OPTIONS: ClassVar[Mapping[str, Option]] = {}
    has_coarse: ClassVar[bool] = False  # whether `stages` has logits before adaptation
    uses_groups: ClassVar[bool] = False  # whether images form groups, which a micro-batch may not cut
    needs_totals: ClassVar[bool] = False  # whether a step must know something of all its labels: `step_totals`
    # Names of its tensors that have a row per class; of its official keys.
    CLASS_ROWS: ClassVar[Sequence[str]] = ()
    ROWS: ClassVar[Sequence[Row]] = ()
    LEFT_OUT: ClassVar[Mapping[str, str]] = {}  # official keys that ours lacks, behind the head's prefix → why

    class_weights: Tensor | None

    def __init__(
        self, channels: int, num_classes: int, dropout: float = 0.1, loss: LossOptions | None = None, group: int = 1
    ) -> None:
        """channels: of the feature. dropout in [0, 1): of channels, before the classifier. group: images in one group.

        A classifier with `OPTIONS` takes each as a further keyword.
        """
        super().__init__()
        self.channels, self.num_classes = channels, num_classes
        self.group = group if self.uses_groups else 1
        self.loss = loss or LossOptions()
        self.weights = {name: self.loss.weights.get(name, each.weight) for name, each in self.LOSSES.items()}
        # On the model's device, yet no part of its weights: a checkpoint is the same with and without.
        self.register_buffer("class_weights", self.loss.factors(num_classes), persistent=False)
        self.dropout = nn.Dropout2d(dropout)

    def stages(self, feature: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N,C,h,w) → logits (N,K,h,w), and those before adaptation where the classifier `has_coarse`."""
        return self(feature), None

    def training_step(self, feature: Tensor, labels: Tensor, totals: Tensor | None = None) -> TrainingStep:
        """Logits and weighted losses of a micro-batch; labels (N,H,W) integer in [0, K) or 255.

        `totals`: `step_totals` averaged over the micro-batches of the optimiser's step; None takes this batch for the
        whole step.
        """
        raise NotImplementedError

    def step_totals(self, labels: Tensor) -> Tensor:
        """What a loss must know of the *whole* optimiser step before its first micro-batch, from labels (N,H,W).

        Only asked where the classifier `needs_totals`.
        """
        raise NotImplementedError

    def update(self, memories: list[Any], peers: Peers, held: Tensor) -> None:
        """After the optimiser's step, without gradients: takes in what the step's micro-batches left in `memory`.

        `held` () on the device: 1 where the step is held back because something was not finite; then the state must
        stay as it is. Waits for no device. Every rank must end up with the same buffers. Nothing here.
        """

    def training_only(self) -> tuple[str, ...]:
        """Names, relative to the classifier, of parameters, buffers and modules that inference never reads."""
        return ()

    @property
    def weighing(self) -> losses.Weighing:
        """How pixels count in the main cross entropy."""
        loss = self.loss
        return losses.Weighing(self.class_weights, loss.label_smoothing, loss.ohem_threshold, loss.ohem_min_kept)


def class_convolution(channels: int, num_classes: int) -> nn.Conv2d:
    """The 1×1 convolution from features to logits, as mmsegmentation initialises it: N(0, 0.01²), bias 0."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, 0.0, 0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv

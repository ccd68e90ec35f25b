"""The contract of a pixel-level classifier: all that a network and the training loop know of it.

- `forward(feature)` → logits. It is pure: it writes no buffer, has no randomness in evaluation, and can be exported.
- `training_step(feature, labels, totals)` → `TrainingStep`. It decides about dropout, upsampling of the logits, and
  which operations are float32 under autocast.
- `update(memories, peers, held)`, after the optimiser's step: changes state that is not learnt by gradient.
- All such state is in buffers. Checkpoints, resumed runs and deploy forms have it; the average of weights does not.
- `MEMORY`: buffers that only `update` reads. They may be large; training states have them, checkpoints do not.
- `training_only()`: names of parameters, buffers and modules that a deploy form leaves out.

Axes: N images, K classes, C channels, h×w feature pixels, P = h·w.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ssaseg.models.classifiers.upsampled import Weighing
from ssaseg.models.rows import Row


@dataclass(frozen=True)
class LossOptions:
    """Changes of the losses. The published results were trained with the defaults.

    Class weights and label smoothing are those of `F.cross_entropy`; they apply to every cross entropy. Each mean has
    the denominator of its source. The main cross entropy (mmsegmentation 0.30's CrossEntropyLoss) is divided by the
    number of all pixels, ignored ones too, independent of their weights. Those of coarse and teacher logits
    (`nn.CrossEntropyLoss`) are divided by the sum of the weights of pixels that are not ignored. Hard example mining
    applies to the main cross entropy only, as in mmsegmentation, and to each image separately, so that it does not
    depend on the micro-batches of a step: see `upsampled.Weighing`. Dice and distillation losses do not change.
    """

    weights: Mapping[str, float] = field(default_factory=dict)  # loss → weight, where not the default; 0: left out
    class_weights: tuple[float, ...] | None = None  # (K,), 0 or more, not all 0; None: 1 each
    label_smoothing: float = 0.0  # in [0, 1]
    ohem_threshold: float | None = None  # probability in (0, 1]; None: no hard example mining
    ohem_min_kept: int = 100_000  # pixels per image

    def factors(self, num_classes: int) -> Tensor | None:
        """`class_weights` as a tensor. Raises ValueError unless it is one per class, 0 or more, and not all 0."""
        found = self.class_weights
        if found is None:
            return None
        if len(found) != num_classes or not all(0 <= weight < math.inf for weight in found):
            raise ValueError(f"class_weights has {len(found)} numbers, expected {num_classes}, finite, 0 or more")
        if not any(found):
            raise ValueError("class_weights are all 0, so no pixel counts; expected at least one above 0")
        return torch.tensor(found, dtype=torch.float32)


class Loss(NamedTuple):
    """A loss, for the key `loss.weights.NAME` of a recipe."""

    weight: float  # the default
    meaning: str


class Option(NamedTuple):
    """An option of a classifier, for the key `model.options.NAME` of a recipe: a switch, a number or a text."""

    default: Any  # bool, int, float or str; values must have the same type
    meaning: str
    least: float | None = None  # for a number; None: no limit
    most: float | None = None
    choices: tuple[Any, ...] = ()  # for a text; empty: any

    def expected(self, value: object) -> str:
        """What is expected instead of `value`; "" if it is valid."""
        kind = type(self.default)
        right = isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if not right:
            return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")
        if self.choices and value not in self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        if isinstance(value, int | float) and self.least is not None and not value >= self.least:
            return f"{self.least:g} or more"
        if isinstance(value, int | float) and self.most is not None and value > self.most:
            return f"{self.most:g} or less"
        return ""


class TrainingStep(NamedTuple):
    """The result of a micro-batch in training: logits (N,K,h,w), weighted losses by name, and data for `update`."""

    logits: Tensor
    losses: dict[str, Tensor]
    memory: Any = None


class Peers(Protocol):
    """The ranks that train together, for `update`. All ranks call a method together, with tensors of the same shape."""

    def total(self, tensor: Tensor) -> Tensor:
        """Sum of the ranks' tensors."""

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in the order of ranks."""


class Alone:
    """The `Peers` of a training with a single process."""

    def total(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A list of only this tensor."""
        return [tensor]


class Classifier(nn.Module):
    """The base class. Its defaults are for a classifier with one stage and without state or options."""

    # The losses by name, in the order of the log.
    LOSSES: ClassVar[Mapping[str, Loss]] = {"main_ce": Loss(1.0, "cross entropy of the logits")}
    OPTIONS: ClassVar[Mapping[str, Option]] = {}
    has_coarse: ClassVar[bool] = False  # whether `stages` also returns logits before adaptation
    gives_scores: ClassVar[bool] = False  # whether it returns scores, 0 or more, to which no softmax applies
    uses_groups: ClassVar[bool] = False  # whether images form groups that a micro-batch must not split
    needs_totals: ClassVar[bool] = False  # whether the losses need `step_totals` of the whole step
    # Names of tensors that have one row per class; rows of official names; official keys (without the head's prefix)
    # that the classifier does not have → why.
    CLASS_ROWS: ClassVar[Sequence[str]] = ()
    ROWS: ClassVar[Sequence[Row]] = ()
    LEFT_OUT: ClassVar[Mapping[str, str]] = {}
    MARK: ClassVar[str] = ""  # an official key (without the head's prefix) that only files with this classifier have
    OFFICIAL_FILES: ClassVar[bool] = True  # whether other programs read files with this classifier
    NOTE: ClassVar[str] = ""  # printed wherever the classifier is named
    MEMORY: ClassVar[Sequence[str]] = ()  # buffers that only `update` reads
    WITHOUT_MEMORY: ClassVar[Mapping[str, Any]] = {}  # options with which next to nothing is allocated for `MEMORY`

    class_weights: Tensor | None

    def __init__(
        self, channels: int, num_classes: int, dropout: float = 0.1, loss: LossOptions | None = None, group: int = 1
    ) -> None:
        """channels: of the feature; dropout in [0, 1): fraction of channels dropped before it; group: images per group.

        A classifier with `OPTIONS` takes each option as one more keyword argument.
        """
        super().__init__()
        self.channels, self.num_classes = channels, num_classes
        self.group = group if self.uses_groups else 1
        self.use_loss(loss or LossOptions())
        self.dropout = nn.Dropout2d(dropout)

    def use_loss(self, loss: LossOptions) -> None:
        """Uses these options from now on. Raises ValueError for class weights that do not fit."""
        self.loss = loss
        self.weights = {name: loss.weights.get(name, each.weight) for name, each in self.LOSSES.items()}
        # A buffer, to be on the model's device; not persistent, so that it is in no checkpoint.
        self.register_buffer("class_weights", loss.factors(self.num_classes), persistent=False)

    def stages(self, feature: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N,C,h,w) → logits (N,K,h,w), and the logits before adaptation if `has_coarse`, else None."""
        return self(feature), None

    def training_step(self, feature: Tensor, labels: Tensor, totals: Tensor | None = None) -> TrainingStep:
        """Logits and weighted losses of a micro-batch; labels (N,H,W): integers in [0, K) or 255 = ignored.

        `totals`: `step_totals` averaged over the micro-batches of the optimiser's step; None: this batch is the whole
        step.
        """
        raise NotImplementedError

    def step_totals(self, labels: Tensor) -> Tensor:
        """What the losses must know of all labels of an optimiser step before its first micro-batch. Labels (N,H,W).

        Called only if `needs_totals`.
        """
        raise NotImplementedError

    def update(self, memories: list[Any], peers: Peers, held: Tensor) -> None:
        """After the optimiser's step, without gradients: updates the state from the micro-batches' memories.

        `held`: tensor () on the device. If it is 1, the step's update is left out because a value was not finite: the
        state must then stay unchanged. Must not wait for the device. All ranks must end with equal buffers. By default
        there is no state.
        """

    @classmethod
    def bank_bytes(cls, channels: int, num_classes: int, **options: Any) -> int:
        """Bytes of the memory of pixels that training keeps, with these options; 0 if there is none."""
        return 0

    def restore_memory(self) -> None:
        """After weights without `MEMORY` were loaded: fills it as far as they say what it held. By default not."""

    def training_only(self) -> tuple[str, ...]:
        """Names of parameters, buffers and modules of the classifier that inference never reads."""
        return tuple(self.MEMORY)

    @property
    def weighing(self) -> Weighing:
        """The weights of pixels in the main cross entropy."""
        loss = self.loss
        return Weighing(self.class_weights, loss.label_smoothing, loss.ohem_threshold, loss.ohem_min_kept)


def class_convolution(channels: int, num_classes: int) -> nn.Conv2d:
    """The 1×1 convolution from features to logits, as mmsegmentation initialises it: N(0, 0.01²), bias 0."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, 0.0, 0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv

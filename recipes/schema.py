"""The keys of a recipe: types, defaults and descriptions.

Users read the descriptions, on the page of keys and in error messages. Each says the unit and the order of the numbers.
A check of one key is part of its field; checks across keys are the `model_validator`s. Names of networks, classifiers
and data sets are plain text here: the command that runs the recipe looks them up.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, model_validator

from ssaseg.recipes.data import Data
from ssaseg.recipes.fields import (
    LARGEST_BATCH_AREA,
    MOST_STEPS,
    ClassName,
    Count,
    HeightWidth,
    Images,
    NonEmpty,
    NotNegative,
    Ratio,
    Section,
    Seed,
    Share,
    Switch,
    Text,
    WidthHeight,
    require_area,
    wrong,
)


class Model(Section):
    """The network and its classifier."""

    name: Text = Field(description="network, for example seaformer_b")
    classifier: Text = Field(default="ssa", description="computes classes from the network's features")
    options: dict[NonEmpty, Any] = Field(default={}, description="options of the classifier, by name")
    drop_path: Share | None = Field(
        default=None, description="share of residual branches dropped in training; null: the network's default"
    )
    dropout: Share | None = Field(
        default=None,
        description="share of feature channels dropped before the classifier in training, 0.1 before those of "
        "auxiliary heads; null: the network's default, 0.1, for ocrnet 0",
    )
    compat: Switch = Field(
        default=False,
        description="train as the official code where the default differs: ocrnet updates the statistics of its first "
        "stage's BatchNorm twice a step; an error for other networks",
    )
    pretrained: NonEmpty | None = Field(
        default=None,
        description="checkpoint that the training starts from: a file, or a name of `ssaseg weights list`; null: "
        "random weights",
    )


class Augment(Section):
    """Random changes of training images: resize, crop, flip, colours; the steps are those of mmsegmentation 0.x."""

    scale: WidthHeight = Field(
        description="[width, height] that, multiplied by the ratio, the image is fitted into [pixels]"
    )
    ratio: Annotated[tuple[Ratio, Ratio], Strict(False)] = Field(
        default=(0.5, 2.0), description="[lowest, highest] factor of scale, drawn uniformly for each image"
    )
    crop: HeightWidth = Field(description="[height, width] of the training crop [pixels], each at least 32")
    cat_max_ratio: float = Field(
        default=0.75, gt=0, le=1, description="another crop is drawn if one class has at least this share of it"
    )
    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")
    distortion: Switch = Field(default=True, description="random brightness, contrast, saturation and hue")

    @model_validator(mode="after")
    def _ratio_in_order(self) -> "Augment":
        low, high = self.ratio
        if low > high:
            raise wrong("augment.ratio", [low, high], "[lowest, highest]", "for example [0.5, 2.0]")
        require_area("augment.scale", self.scale, high)
        return self


class Test(Section):
    """The protocol of evaluation and prediction: preparation of the image, windows, scales and averaging."""

    scale: WidthHeight | None = Field(
        default=None, description="[width, height] that the image is fitted into [pixels]; null: not resized"
    )
    multiple: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="then each side is resized up to a multiple of this [pixels]; null: not resized"
    )
    mode: Literal["whole", "slide"] = Field(
        default="whole", description="whole (one pass over the image) or slide (overlapping windows, logits averaged)"
    )
    crop: HeightWidth | None = Field(
        default=None, description="[height, width] of a window [pixels], each at least 32; only for mode slide"
    )
    stride: WidthHeight | None = Field(
        default=None,
        description="[height, width] from one window to the next [pixels], at most crop; only for mode slide",
    )
    ratios: Annotated[tuple[Ratio, ...], Strict(False), Field(min_length=1, max_length=100)] = Field(
        default=(1.0,), description="factors of scale; the probabilities of all are averaged"
    )
    flip: Switch = Field(default=False, description="whether to average with the probabilities of the mirrored image")

    @model_validator(mode="after")
    def _windows(self) -> "Test":
        for key in ("crop", "stride"):
            given = getattr(self, key)
            if self.mode == "slide" and given is None:
                raise wrong(f"test.{key}", None, "[height, width], as mode is slide", "for example [512, 512]")
            if self.mode == "whole" and given is not None:
                raise wrong(f"test.{key}", list(given), "null, as mode is whole", "add test.mode: slide")
        if self.crop and self.stride and (self.stride[0] > self.crop[0] or self.stride[1] > self.crop[1]):
            expected = f"at most test.crop, {list(self.crop)}"
            raise wrong("test.stride", list(self.stride), expected, "larger strides leave pixels between the windows")
        if self.crop and self.stride and any(s * 64 < c for s, c in zip(self.stride, self.crop, strict=True)):
            expected = f"at least 1/64 of test.crop, {list(self.crop)}"
            raise wrong("test.stride", list(self.stride), expected, "2/3 of the crop is usual")
        for key, sides in (("test.scale", self.scale), ("test.crop", self.crop)):
            if sides is not None:
                require_area(key, sides, max(self.ratios) if key == "test.scale" else 1)
        return self


class Rule(Section):
    """Factors for the parameters whose names contain the rule's key."""

    lr: NotNegative = Field(default=1.0, description="factor of the learning rate")
    decay: NotNegative = Field(default=1.0, description="factor of the weight decay")


class Optim(Section):
    """The optimiser and its schedule: base * (1 - step/steps)^power, times a linear warm-up (mmcv 1.x)."""

    kind: Literal["adamw", "sgd"] = Field(default="adamw", description="the optimiser: adamw, or sgd with momentum")
    lr: float = Field(gt=0, description="base learning rate, for train.batch images per step")
    weight_decay: NotNegative = Field(
        default=0.01, description="weight decay: decoupled with adamw, added to the gradient with sgd"
    )
    betas: Annotated[tuple[Share, Share], Strict(False)] = Field(default=(0.9, 0.999), description="betas of adamw")
    momentum: Share = Field(default=0.9, description="momentum of sgd")
    decay_vectors: Switch = Field(
        default=True, description="weight decay also for biases and tensors of one dimension; false: not for these"
    )
    layer_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="factor of the learning rate from each numbered layer of a plain transformer to the one "
        "before it (layer-wise decay, BEiT's rule); null: none",
    )
    rules: dict[NonEmpty, Rule] = Field(
        default={},
        description="part of a parameter's name -> {lr, decay} factors; if several match, the longest decides",
    )
    warmup: int = Field(
        default=1500,
        ge=0,
        le=MOST_STEPS,
        description="steps of linear warm-up, which multiplies the decaying rate; 0: none",
    )
    warmup_ratio: float = Field(
        default=1e-6, ge=0, le=1, description="factor of the learning rate at the first warm-up step"
    )
    power: NotNegative = Field(default=1.0, description="exponent of the polynomial decay; 0: constant")
    min_lr: NotNegative = Field(default=0.0, description="lowest value of the decaying learning rate")
    grad_clip: float | None = Field(
        default=None, gt=0, description="largest norm of the gradient, which is scaled down to it; null: not clipped"
    )
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of a moving average of the weights, which is evaluated and saved as best; null: none",
    )
    freeze: Annotated[tuple[Literal["backbone", "norm"], ...], Strict(False)] = Field(
        default=(),
        description="what is not trained: backbone (all of it), norm (statistics, weights and biases of BatchNorms)",
    )

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> "Optim":
        for key, kind in {"betas": "adamw", "momentum": "sgd"}.items():
            value = getattr(self, key)
            if self.kind != kind and value != type(self).model_fields[key].default:
                raise wrong(
                    f"optim.{key}",
                    value,
                    f"no value, as optim.kind is {self.kind}",
                    f"remove the key, or set optim.kind={kind}",
                )
        return self

    @model_validator(mode="after")
    def _floor_below_base(self) -> "Optim":
        if self.min_lr > self.lr:
            raise wrong("optim.min_lr", self.min_lr, f"at most optim.lr, {self.lr}", "lower it, or raise optim.lr")
        return self


class Train(Section):
    """Steps, batch, precision and intervals."""

    steps: Count | None = Field(default=None, description="optimiser steps")
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="passes over the training images, in place of steps: the run computes its steps from it, rounded "
        "up, and keeps them as train.steps",
    )
    batch: Images = Field(default=16, description="images per optimiser step, of all micro-batches and ranks together")
    micro_batch: Images | Literal["auto"] | None = Field(
        default=None,
        description="images in one pass on one device; BatchNorm takes its statistics over them. A divisor of the "
        "rank's images per step; for classifiers that group images, such as ssa, also a multiple of distill.group. "
        "null: all images of the rank; auto: as many as fit into memory, found at the start",
    )
    amp: Annotated[
        Literal["off", "bf16", "fp16"],
        BeforeValidator(lambda value: "off" if value is False else value),  # YAML 1.1 and JSON know `off` as false
    ] = Field(default="off", description="arithmetic of the network: off (float32), bf16, or fp16 (CUDA only)")
    seed: Seed = Field(default=0, description="seed of initialisation, order and augmentation")
    workers: int = Field(
        default=2, ge=0, le=256, description="processes that load and augment images; 0: the main process does it"
    )
    log_every: Count = Field(default=50, description="steps between lines of the log")
    eval_every: Count = Field(default=4000, description="steps between evaluations; the last step always evaluates")
    save_every: Count = Field(default=1000, description="steps between checkpoints; the last step always saves")
    keep: Count = Field(
        default=2, description="number of newest training states to keep; best.safetensors is always kept"
    )
    patience: Count | None = Field(
        default=None, description="training ends after this number of evaluations without a better mIoU; null: never"
    )
    nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="if a loss or gradient is not finite: stop before its update, or skip this update",
    )
    max_skipped: Count = Field(default=10, description="most updates that one run may skip with nonfinite: skip")
    deterministic: Switch = Field(
        default=False, description="only algorithms that give the same bits in every run; slower on a GPU"
    )
    compile: Switch = Field(
        default=False,
        description="torch.compile for the network in training: takes minutes at the start, then steps are faster",
    )
    checkpointing: Switch = Field(
        default=False,
        description="activation checkpointing: the backbone's blocks compute their activations again in the backward "
        "pass, which needs less memory and more time; only for SegFormer, UPerNet with Swin, and ViT-Adapter",
    )
    prefetch: Switch = Field(
        default=True, description="copy and prepare the next batch on the GPU during the current step"
    )

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if self.steps is None and self.epochs is None:
            raise wrong("train.steps", None, "a whole number", "or set train.epochs: passes over the training images")
        if self.steps is not None and self.epochs is not None:
            expected = f"null, as train.steps is {self.steps}"
            raise wrong("train.epochs", self.epochs, expected, "give one of the two, and remove the other")
        return self


class Distill(Section):
    """Online multi-domain distillation, for classifiers that use groups of images."""

    group: Images = Field(default=4, description="images over which the teacher's class means are taken")


class Ohem(Section):
    """Online hard example mining, as in mmsegmentation: only pixels whose own class is improbable count."""

    threshold: float = Field(
        default=0.7, gt=0, le=1, description="pixels whose own class has at least this probability are left out"
    )
    min_kept: Count = Field(
        default=100_000,
        description="pixels kept per image at least, the least probable first; of fewer pixels, all but one",
    )


class Loss(Section):
    """Weights of the losses and changes of the cross entropies. The defaults are those of the published results."""

    weights: dict[NonEmpty, NotNegative] = Field(
        default={},
        description="name of a loss -> its weight, if not the default; 0 switches the loss off",
    )
    class_weights: dict[ClassName, NotNegative] = Field(
        default={},
        description="class name -> factor of its pixels in every cross entropy; other classes have 1. The main cross "
        "entropy is divided by the number of pixels (mmsegmentation 0.30), the others by the sum of the factors",
    )
    label_smoothing: Share = Field(
        default=0.0, description="share of every cross entropy's target that is spread evenly over all classes"
    )
    ohem: Ohem | None = Field(
        default=None, description="hard example mining in the main cross entropy, for each image separately; null: none"
    )


class Recipe(Section):
    """A training with its evaluation: everything that decides its numbers, except the code."""

    name: Text = Field(
        max_length=200,
        pattern=r"^[^./\\][^/\\]*$",
        description="name of the run's folder; default: the recipe file's name without suffix",
    )
    model: Model = Field(description="the network and its classifier")
    data: Data = Field(description="images, labels and the meaning of label values")
    augment: Augment = Field(description="random changes of training images")
    test: Test = Field(default=Test(), description="preprocessing of evaluation and prediction")
    optim: Optim = Field(description="optimiser and schedule")
    train: Train = Field(description="steps, batch, precision and intervals")
    distill: Distill = Field(default=Distill(), description="distillation over groups of images")
    loss: Loss = Field(default=Loss(), description="weights of the losses, changes of the cross entropies")

    @model_validator(mode="after")
    def _pixels_of_a_step(self) -> "Recipe":
        height, width = self.augment.crop
        most = LARGEST_BATCH_AREA // (height * width)
        if self.train.batch > most:
            expected = f"at most {most} with crops of {height}x{width} ({LARGEST_BATCH_AREA:,} pixels in a step)"
            raise wrong("train.batch", self.train.batch, expected, "use a smaller batch or augment.crop")
        return self

    def with_steps(self, images: int) -> "Recipe":
        """The recipe with train.steps in the place of train.epochs, for this number of training images."""
        train = self.train
        if train.epochs is None:
            return self
        steps = min(math.ceil(train.epochs * images / train.batch), MOST_STEPS)
        return self.model_copy(update={"train": train.model_copy(update={"steps": steps, "epochs": None})})

"""What a recipe may say: every key, its type, its default and its meaning.

The descriptions are what users read (error messages quote them), so each says the unit and the order of the numbers.
Checks that need one key sit on the field; checks across keys are the `model_validator`s. Names of networks,
classifiers and data sets are plain text here: the command that runs the recipe looks them up.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Side = Annotated[int, Field(ge=32)]
Byte = Annotated[int, Field(ge=0, le=255)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
# Strict sections would refuse what YAML gives: lists for tuples, `on` for true, and the text keys of JSON.
Switch = Annotated[bool, Strict(False)]
RawId = Annotated[int, Strict(False), Field(ge=0, le=255)]
WidthHeight = Annotated[tuple[Count, Count], Strict(False)]
HeightWidth = Annotated[tuple[Side, Side], Strict(False)]
Three = Annotated[tuple[float, float, float], Strict(False)]
Colour = Annotated[tuple[Byte, Byte, Byte], Strict(False)]


def wrong(key: str, got: object, expected: str, mend: str) -> PydanticCustomError:
    """An error of several keys, told as one of `key` (dotted, from the recipe's root)."""
    context: dict[str, Any] = {"key": key, "got": got, "expected": expected, "mend": mend}
    return PydanticCustomError("across_keys", "{key}: expected {expected}", context)


def _suffixes(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    for suffix in suffixes:
        if "." not in suffix:
            raise wrong("data.image_suffixes", suffix, "ends of file names with their dot", "write '.jpg', not 'JPG'")
    return suffixes


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Section(BaseModel):
    """A mapping of a recipe: unknown keys are errors, values are not coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    """The network and its classifier."""

    name: str = Field(description="network, for example seaformer_b")
    classifier: str = Field(default="ssa", description="ssa (adaptive prototypes) or linear (plain 1x1 convolution)")
    drop_path: Share | None = Field(
        default=None, description="share of residual branches dropped; null: the network's own"
    )
    dropout: Share = Field(
        default=0.1, description="share of feature channels dropped before the classifier in training"
    )
    pretrained: NonEmpty | None = Field(
        default=None, description="checkpoint whose weights the training starts from, or null"
    )


class Folders(Section):
    """Where one split's images and labels are, below `data.root`."""

    images: str = Field(description="folder of the images, below data.root; searched recursively")
    masks: NonEmpty | None = Field(
        default=None, description="folder of the label masks, below data.root; same structure as images"
    )
    names: NonEmpty | None = Field(
        default=None, description="file that lists the split's images, one name a line, below data.root; null: all"
    )
    annotations: (
        Annotated[tuple[NonEmpty, ...], Strict(False), Field(min_length=1), BeforeValidator(_listed)] | None
    ) = Field(
        default=None, description="COCO-format file or list of them, below data.root; the later lie on the earlier"
    )


class Synthetic(Section):
    """The scenes of the built-in procedural data set."""

    height: int = Field(ge=64, description="height of every scene [pixels], at least 64: objects need room")
    width: int = Field(ge=64, description="width of every scene [pixels], at least 64")
    train: Count = Field(description="number of training scenes")
    val: Count = Field(description="number of validation scenes")
    seed: int = Field(default=0, ge=0, description="seed of the scenes; same seed and index, same picture")


# Where a split's labels are, by data set; and the data sets that heed a key of `data`: the others bring their own.
_LABELS = {"folder": "masks: annotations/*", "coco_json": "annotations: instances_*.json"}
_IN_VAIN = {"folder": ("annotations",), "coco_json": ("masks", "names")}
_HEEDED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("classes", "palette", "train", "val"), ("folder", "coco_json")),
    **dict.fromkeys(
        ("image_suffixes", "mask_suffix", "ignore_index", "reduce_zero_label", "raw_to_train"), ("folder",)
    ),
    "background": ("coco_json",),
}


class Data(Section):
    """Images, labels and what the label values mean."""

    dataset: str = Field(
        default="folder",
        description="folder (image/mask pairs on disk), coco_json (COCO-format annotations), synthetic (drawn on the "
        "fly), or a published data set such as ade20k, whose classes and folders are known",
    )
    root: str = Field(default=".", description="folder that holds everything, relative to the current directory")
    train: Folders | None = Field(default=None, description="where the training split's images and labels are")
    val: Folders | None = Field(default=None, description="where the validation split's images and labels are")
    image_suffixes: Annotated[tuple[str, ...], Strict(False), Field(min_length=1), AfterValidator(_suffixes)] = Field(
        default=(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"),
        description="ends of file names that make a file an image, compared without regard to case",
    )
    mask_suffix: NonEmpty = Field(
        default=".png", description="what replaces the image's suffix in its mask's file name"
    )
    classes: Annotated[tuple[NonEmpty, ...], Strict(False)] = Field(
        default=(),
        description="list of 2 to 255 class names, in the order of the train ids; coco_json may leave it to the files, "
        "synthetic and published data sets bring their own",
    )
    background: NonEmpty | None = Field(
        default=None, description="class of pixels without annotation, for coco_json; null: they are ignored"
    )
    palette: Annotated[tuple[Colour, ...], Strict(False)] | None = Field(
        default=None, description="one [red, green, blue] of 0..255 per class; null: colours are made up"
    )
    ignore_index: Byte = Field(default=255, description="mask value of pixels that count nowhere, beside 255")
    reduce_zero_label: Switch = Field(
        default=False, description="mask value 0 becomes ignored and every other goes down by 1"
    )
    raw_to_train: dict[RawId, Byte] | None = Field(
        default=None,
        description="mask value -> train id (0..K-1, or 255: ignored), applied to every pixel; null: as they are",
    )
    mean: Three = Field(
        default=(123.675, 116.28, 103.53), description="[red, green, blue] subtracted from pixels of 0..255"
    )
    std: Annotated[tuple[Positive, Positive, Positive], Strict(False)] = Field(
        default=(58.395, 57.12, 57.375),
        description="[red, green, blue] the difference is divided by, on the scale 0..255",
    )
    cache: Switch = Field(
        default=False, description="keep decoded images and masks in memory: faster, needs the memory"
    )
    synthetic: Synthetic | None = Field(default=None, description="size and number of scenes, for dataset: synthetic")

    @model_validator(mode="after")
    def _what_the_dataset_needs(self) -> "Data":
        for split in ("train", "val") if self.dataset in _LABELS else ():
            folders, example = getattr(self, split), _LABELS[self.dataset].replace("*", split)
            mend = f"data.{split}: {{images: images/{split}, {example}}}"
            if folders is None:
                raise wrong(f"data.{split}", None, f"the folders of the split, as dataset is {self.dataset}", mend)
            if getattr(folders, example.partition(":")[0]) is None:
                raise wrong(f"data.{split}", folders.model_dump(exclude_none=True), f"{example} in it", mend)
            for key in _IN_VAIN[self.dataset]:
                if getattr(folders, key) is not None:
                    expected = f"none, as dataset is {self.dataset}"
                    raise wrong(f"data.{split}.{key}", getattr(folders, key), expected, mend)
        if self.dataset == "folder" and not self.classes:
            raise wrong("data.classes", [], "2 to 255 names, as dataset is folder", "list them in train id order")
        if self.dataset == "synthetic" and self.synthetic is None:
            mend = "data.synthetic: {height: 160, width: 160, train: 512, val: 64, seed: 0}"
            raise wrong("data.synthetic", None, "the scenes' size and number, as dataset is synthetic", mend)
        return self

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> "Data":
        """A key that the data set would not heed is an error: who writes it expects an effect, of its default too."""
        # A recipe as it is stored has all keys, though those that came later: nobody wrote these.
        stored = _HEEDED.keys() - {"background"} <= self.model_fields_set
        for key, users in _HEEDED.items():
            got, default = getattr(self, key), type(self).model_fields[key].default
            written = got != default or (key in self.model_fields_set and not stored)
            if self.dataset not in users and written:
                mend = f"remove the key (the data set brings its own), or set data.dataset: {users[0]}"
                raise wrong(f"data.{key}", got, f"none, as dataset is {self.dataset}", mend)
        return self

    @model_validator(mode="after")
    def _classes_and_labels(self) -> "Data":
        names = self.classes
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise wrong("data.classes", repeated, "each class name once", "rename one of them")
        if names and not 2 <= len(names) <= 255:
            raise wrong("data.classes", len(names), "2 to 255 names", "labels are bytes, 255 is 'ignored'")
        if self.palette is not None and len(self.palette) != len(names):
            expected = f"{len(names)} colours, one per class"
            raise wrong("data.palette", len(self.palette), expected, "add or remove colours, or use null")
        first = int(self.reduce_zero_label)
        if first <= self.ignore_index < first + len(names):
            expected = f"a value that is no class ({first}..{first + len(names) - 1} are)"
            raise wrong("data.ignore_index", self.ignore_index, expected, "255 is the usual one")
        return self

    @model_validator(mode="after")
    def _raw_ids(self) -> "Data":
        if self.raw_to_train is None or not self.classes:
            return self
        if self.reduce_zero_label:
            mend = "map 0 to 255 in raw_to_train, or leave raw_to_train out"
            raise wrong("data.reduce_zero_label", True, "false where raw_to_train is given", mend)
        for raw, train in self.raw_to_train.items():
            if train >= len(self.classes) and train not in (255, self.ignore_index):
                expected = f"a train id of 0..{len(self.classes) - 1}, or 255 (ignored)"
                raise wrong(f"data.raw_to_train.{raw}", train, expected, "train ids count the classes from 0")
        return self


class Augment(Section):
    """Training images: resized at random, cropped, flipped, colours distorted (mmsegmentation 0.x, step for step)."""

    scale: WidthHeight = Field(description="[width, height] the image is fitted into before the ratio [pixels]")
    ratio: Annotated[tuple[float, float], Strict(False)] = Field(
        default=(0.5, 2.0), description="[lowest, highest] factor of scale, drawn uniformly for each image"
    )
    crop: HeightWidth = Field(description="[height, width] of the training crop [pixels], each at least 32")
    cat_max_ratio: float = Field(
        default=0.75, gt=0, le=1, description="a crop is redrawn when one class has this share of it"
    )
    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")
    distortion: Switch = Field(default=True, description="random brightness, contrast, saturation and hue")

    @model_validator(mode="after")
    def _ratio_in_order(self) -> "Augment":
        low, high = self.ratio
        if not 0 < low <= high:
            raise wrong("augment.ratio", [low, high], "[lowest, highest], both above 0", "for example [0.5, 2.0]")
        return self


class Test(Section):
    """The protocol of evaluation and prediction: what an image becomes before the network, and its logits after it."""

    scale: WidthHeight | None = Field(
        default=None, description="[width, height] the image is fitted into; null: not resized"
    )
    multiple: Count | None = Field(
        default=None, description="sides are then resized up to a multiple of this; null: left"
    )
    mode: Literal["whole", "slide"] = Field(
        default="whole", description="whole (the image at once) or slide (overlapping windows, logits averaged)"
    )
    crop: HeightWidth | None = Field(
        default=None, description="[height, width] of a window [pixels], each at least 32; only for mode slide"
    )
    stride: Annotated[tuple[Count, Count], Strict(False)] | None = Field(
        default=None, description="[height, width] between windows [pixels], at most crop; only for mode slide"
    )
    ratios: Annotated[tuple[Positive, ...], Strict(False), Field(min_length=1)] = Field(
        default=(1.0,), description="factors of scale; the probabilities of several are averaged"
    )
    flip: Switch = Field(default=False, description="average with the probabilities of the mirrored image")

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
            raise wrong("test.stride", list(self.stride), expected, "wider ones leave pixels between the windows")
        return self


class Rule(Section):
    """Factors for the parameters whose name contains the rule's key."""

    lr: NotNegative = Field(default=1.0, description="factor of the learning rate")
    decay: NotNegative = Field(default=1.0, description="factor of the weight decay")


class Optim(Section):
    """AdamW and the schedule: base * (1 - step/steps)^power, times a linear warm-up (mmcv 1.x)."""

    lr: float = Field(gt=0, description="base learning rate, at the recipe's total batch")
    weight_decay: NotNegative = Field(default=0.01, description="decoupled weight decay of AdamW")
    betas: Annotated[tuple[Share, Share], Strict(False)] = Field(default=(0.9, 0.999), description="AdamW's two betas")
    rules: dict[NonEmpty, Rule] = Field(
        default={},
        description="part of a parameter's name -> {lr, decay} factors; of several that match the longest decides",
    )
    warmup: int = Field(
        default=1500, ge=0, description="steps of linear warm-up, multiplied onto the decaying rate; 0: none"
    )
    warmup_ratio: float = Field(
        default=1e-6, ge=0, le=1, description="factor of the learning rate at the first warm-up step"
    )
    power: NotNegative = Field(default=1.0, description="exponent of the polynomial decay; 0: constant")
    min_lr: NotNegative = Field(default=0.0, description="the learning rate never decays below this")
    grad_clip: float | None = Field(default=None, gt=0, description="largest norm of the gradient; null: not clipped")

    @model_validator(mode="after")
    def _floor_below_base(self) -> "Optim":
        if self.min_lr > self.lr:
            raise wrong("optim.min_lr", self.min_lr, f"at most optim.lr, {self.lr}", "lower it, or raise optim.lr")
        return self


class Train(Section):
    """How long, how much at once, how often."""

    steps: int = Field(ge=1, le=100_000_000, description="optimiser steps")
    batch: Count = Field(default=16, description="images per step, whatever the memory: micro-batches add up to it")
    micro_batch: Count | None = Field(
        default=None, description="images at once (BatchNorm sees these); null: the whole batch"
    )
    amp: Annotated[
        Literal["off", "bf16", "fp16"],
        BeforeValidator(lambda value: "off" if value is False else value),  # YAML 1.1 and JSON know `off` as false
    ] = Field(default="off", description="arithmetic of the network: off (float32), bf16, or fp16 (CUDA only)")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of initialisation, order and augmentation")
    workers: int = Field(
        default=2, ge=0, description="processes that load and augment images; 0: none but the main one"
    )
    log_every: Count = Field(default=50, description="steps between lines of the log")
    eval_every: Count = Field(default=4000, description="steps between evaluations; the last step always evaluates")
    save_every: Count = Field(default=1000, description="steps between checkpoints; the last step always saves")


class Weights(Section):
    """Weight of each loss of the SSA classifier; 0 switches a term off."""

    main_ce: NotNegative = Field(default=1.0, description="cross entropy of the final logits")
    coarse_ce: NotNegative = Field(default=1.0, description="cross entropy of the logits before adaptation")
    teacher_ce: NotNegative = Field(default=1.0, description="cross entropy of the teacher's logits")
    main_dice: NotNegative = Field(default=1.0, description="dice of the final logits")
    teacher_dice: NotNegative = Field(default=1.0, description="dice of the teacher's logits")
    response: NotNegative = Field(default=1.0, description="response distillation, boundary and interior apart")
    semantic: NotNegative = Field(default=10.0, description="distillation of the semantic prototypes' relations")
    spatial: NotNegative = Field(default=0.4, description="distillation of the spatial prototypes")


class Distill(Section):
    """Online multi-domain distillation of the SSA classifier."""

    group: Count = Field(default=4, description="images over which the teacher's class means are taken")
    weights: Weights = Field(default=Weights(), description="weight of each loss; 0 switches a term off")


class Recipe(Section):
    """One training, evaluation included: everything that decides its numbers but the code."""

    name: str = Field(pattern=r"^[^./\\][^/\\]*$", description="name of the run's folder; the file's stem unless given")
    model: Model = Field(description="the network and its classifier")
    data: Data = Field(description="images, labels and what the label values mean")
    augment: Augment = Field(description="random changes of training images")
    test: Test = Field(default=Test(), description="preprocessing of evaluation and prediction")
    optim: Optim = Field(description="optimiser and schedule")
    train: Train = Field(description="steps, batch, precision and intervals")
    distill: Distill = Field(default=Distill(), description="distillation of the SSA classifier")

    @model_validator(mode="after")
    def _something_is_learnt(self) -> "Recipe":
        weights = self.distill.weights.model_dump()
        used = {"main_ce": weights["main_ce"]} if self.model.classifier == "linear" else weights
        if not any(used.values()):
            raise wrong(f"distill.weights.{next(iter(used))}", 0, "a loss with a weight above 0", "set it to 1")
        return self

    @model_validator(mode="after")
    def _batch_is_made_of_whole_parts(self) -> "Recipe":
        batch, micro, group = self.train.batch, self.train.micro_batch, self.distill.group
        if micro is None or micro == batch:
            return self
        step = 1 if self.model.classifier == "linear" else group
        fits = [str(part) for part in range(step, batch, step) if batch % part == 0]
        mend = f"with this batch and group: {', '.join([*fits, 'null'])}"
        if not fits:
            mend = "use train.micro_batch=null" + (f", or distill.group={micro}" if batch % micro == 0 else "")
        if batch % micro:
            raise wrong("train.micro_batch", micro, f"a divisor of train.batch, {batch}", mend)
        if micro % group and self.model.classifier != "linear":
            # A class mean over half a group would make the loss depend on how the step was cut.
            raise wrong("train.micro_batch", micro, f"a multiple of distill.group, {group}", mend)
        return self

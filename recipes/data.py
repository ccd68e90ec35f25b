"""What a recipe may say about images, labels and the meaning of label values."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, Strict, model_validator

from ssaseg.recipes.fields import (
    Byte,
    Colour,
    Count,
    NonEmpty,
    Positive,
    RawId,
    Section,
    Switch,
    Three,
    wrong,
)


def _suffixes(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    for suffix in suffixes:
        if "." not in suffix:
            raise wrong("data.image_suffixes", suffix, "ends of file names with their dot", "write '.jpg', not 'JPG'")
    return suffixes


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


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

"""The `data` section of a recipe: images, labels and the meaning of label values."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, Strict, model_validator

from ssaseg.recipes.fields import (
    MOST_CHANNELS,
    MOST_SCENES,
    Byte,
    ClassName,
    Colour,
    NonEmpty,
    Positive,
    RawId,
    Section,
    Seed,
    Switch,
    Text,
    wrong,
)

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, RGB


def _suffixes(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    for suffix in suffixes:
        if "." not in suffix:
            raise wrong("data.image_suffixes", suffix, "ends of file names with a dot", "write '.jpg', not 'JPG'")
    return suffixes


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _rising(levels: tuple[int, int]) -> tuple[int, int]:
    if levels[0] >= levels[1]:
        raise wrong("data.range", list(levels), "two values, the lower one first", "for example [0, 4095] for 12 bits")
    return levels


Level = Annotated[int, Field(ge=-(2**15), le=2**16 - 1)]
LowHigh = Annotated[tuple[Level, Level], Strict(False), AfterValidator(_rising)]
Suffixes = Annotated[tuple[Text, ...], Strict(False), Field(min_length=1, max_length=100), AfterValidator(_suffixes)]
Files = Annotated[tuple[NonEmpty, ...], Strict(False), Field(min_length=1, max_length=100), BeforeValidator(_listed)]


class Folders(Section):
    """Where one split's images and labels are, below `data.root`."""

    images: Text | None = Field(
        default=None, description="folder of the images, below data.root; searched recursively; not with pairs"
    )
    masks: NonEmpty | None = Field(
        default=None, description="folder of the label masks, below data.root; same structure as the images' folder"
    )
    names: NonEmpty | None = Field(
        default=None, description="file with the names of the split's images, one per line, below data.root; null: all"
    )
    pairs: NonEmpty | None = Field(
        default=None,
        description="file with one image and its mask per line, below data.root, in place of images, masks and names; "
        "the two paths are below data.root, with a tab between them",
    )
    annotations: Files | None = Field(
        default=None, description="COCO-format file, or a list of them, below data.root; later ones are drawn on top"
    )


class Synthetic(Section):
    """The scenes that ssaseg draws itself, for dataset: synthetic."""

    height: int = Field(
        ge=64, le=2048, description="height of every scene [pixels], at least 64, to leave room for objects"
    )
    width: int = Field(ge=64, le=2048, description="width of every scene [pixels], at least 64")
    train: int = Field(ge=1, le=MOST_SCENES, description="number of training scenes")
    val: int = Field(ge=1, le=MOST_SCENES, description="number of validation scenes")
    seed: Seed = Field(default=0, description="seed of the scenes; the same seed and index give the same image")


# By data set: the key with a split's labels, and the keys of a split that the data set does not use.
_LABELS = {"folder": "masks: annotations/*", "coco_json": "annotations: instances_*.json"}
_UNUSED = {"folder": ("annotations",), "coco_json": ("masks", "pairs")}
# By key of `data`: the data sets that use it. For the other data sets its value is fixed.
_USERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("classes", "palette", "train", "val"), ("folder", "coco_json")),
    **dict.fromkeys(
        ("image_suffixes", "mask_suffix", "ignore_index", "reduce_zero_label", "raw_to_train"), ("folder",)
    ),
    "background": ("coco_json",),
    **dict.fromkeys(("channels", "range"), ("folder", "coco_json")),
}
_NEWER = {"background", "channels", "range"}  # keys that stored recipes may not have
# Defaults in stored recipes of before.
_EARLIER = {"image_suffixes": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")}


class Data(Section):
    """Images, labels and what the label values mean."""

    dataset: Text = Field(
        default="folder",
        description="folder (image/mask pairs on disk), coco_json (COCO-format annotations), synthetic (scenes that "
        "ssaseg draws itself), or a published data set such as ade20k, whose classes and folders are known",
    )
    root: Text = Field(
        default=".",
        description="folder of the data set, relative to the current directory; in a file, a path that starts with "
        "${recipe_dir} is seen from the folder of the file",
    )
    train: Folders | None = Field(default=None, description="where the training split's images and labels are")
    val: Folders | None = Field(default=None, description="where the validation split's images and labels are")
    image_suffixes: Suffixes = Field(
        default=(
            *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"),
            *(".gif", ".jfif", ".jpe", ".jp2", ".avif"),
        ),
        description="files with these ends of names are images; upper and lower case are the same",
    )
    mask_suffix: NonEmpty = Field(
        default=".png", description="end of a mask's file name, in place of the image's suffix"
    )
    classes: Annotated[tuple[ClassName, ...], Strict(False)] = Field(
        default=(),
        description="list of 2 to 255 class names, in the order of the train ids; for coco_json, the default is the "
        "classes in its files; not for synthetic and published data sets, whose classes are fixed",
    )
    background: ClassName | None = Field(
        default=None, description="class of pixels without annotation, for coco_json; null: these pixels are ignored"
    )
    palette: Annotated[tuple[Colour, ...], Strict(False)] | None = Field(
        default=None, description="one colour [red, green, blue] per class, each 0..255; null: colours are generated"
    )
    ignore_index: Byte = Field(default=255, description="mask value of pixels to ignore; 255 is always ignored, too")
    reduce_zero_label: Switch = Field(
        default=False, description="mask value 0 is ignored, and 1 is subtracted from every other value"
    )
    raw_to_train: dict[RawId, Byte] | None = Field(
        default=None,
        description="mask value -> train id (0..K-1, or 255: ignored), for every value in the masks; several values "
        "may have one train id, which merges classes: {0: 0, 1: 1, 2: 1, 255: 255}; null: values stay unchanged",
    )
    channels: int = Field(
        default=3,
        ge=1,
        le=MOST_CHANNELS,
        description="channels of the images: 3 (colours; grey is repeated), 1 (grey), or the number of bands that each "
        "file has (TIFF, or PNG with alpha as last band); mean and std need as many numbers",
    )
    range: LowHigh | None = Field(
        default=None,
        description="[low, high] of 16-bit images: these values become 0 and 255, those between are mapped linearly; "
        "null: the upper 8 bits are taken, of colour TIFFs rounded as OpenCV does. The same for all images; 8-bit "
        "images stay unchanged",
    )
    mean: Annotated[tuple[float, ...], Strict(False), Field(max_length=MOST_CHANNELS)] = Field(
        default=MEAN, description="[red, green, blue] to subtract from pixel values 0..255; one per channel"
    )
    std: Annotated[tuple[Positive, ...], Strict(False), Field(max_length=MOST_CHANNELS)] = Field(
        default=STD,
        description="[red, green, blue] to divide by after the subtraction, on the scale 0..255; one per channel",
    )
    cache: Switch = Field(
        default=False, description="keep decoded images and masks in memory: faster, but needs memory for all of them"
    )
    synthetic: Synthetic | None = Field(default=None, description="size and number of scenes, for dataset: synthetic")

    @model_validator(mode="after")
    def _what_the_dataset_needs(self) -> "Data":
        for split in ("train", "val") if self.dataset in _LABELS else ():
            folders, example = getattr(self, split), _LABELS[self.dataset].replace("*", split)
            fix = f"for example data.{split}: {{images: images/{split}, {example}}}"
            if folders is None:
                raise wrong(f"data.{split}", None, f"the folders of the split, since dataset is {self.dataset}", fix)
            listed = self.dataset == "folder" and folders.pairs is not None
            for key in () if listed else ("images", example.partition(":")[0]):
                if getattr(folders, key) is None:
                    raise wrong(f"data.{split}", folders.model_dump(exclude_none=True), f"a key {key} in it", fix)
            fix = f"write data.{split}: {{pairs: {folders.pairs}}}" if listed else fix
            for key in (*_UNUSED[self.dataset], *(("images", "masks", "names") if listed else ())):
                if getattr(folders, key) is not None:
                    expected = f"no value, since {'pairs is given' if listed else f'dataset is {self.dataset}'}"
                    raise wrong(f"data.{split}.{key}", getattr(folders, key), expected, fix)
        if self.dataset == "folder" and not self.classes:
            raise wrong(
                "data.classes", [], "2 to 255 names, since dataset is folder", "list them in the order of the train ids"
            )
        if self.dataset == "synthetic" and self.synthetic is None:
            fix = "for example data.synthetic: {height: 160, width: 160, train: 512, val: 64, seed: 0}"
            raise wrong("data.synthetic", None, "the scenes' size and number, since dataset is synthetic", fix)
        if self.dataset == "synthetic" and self.root != type(self).model_fields["root"].default:
            fix = "remove the key; for your own images: `ssaseg data init FOLDER` writes a recipe"
            raise wrong("data.root", self.root, "no folder, since dataset is synthetic: these scenes are drawn", fix)
        return self

    @model_validator(mode="after")
    def _no_unused_key(self) -> "Data":
        """A key that the data set does not use is an error, even with its default value: the user expects an effect."""
        # A stored recipe has all keys, except keys that are newer than the recipe. The user has not written these.
        stored = _USERS.keys() - _NEWER <= self.model_fields_set
        for key, users in _USERS.items():
            got, default = getattr(self, key), type(self).model_fields[key].default
            earlier = stored and got == _EARLIER.get(key)
            written = (got != default and not earlier) or (key in self.model_fields_set and not stored)
            if self.dataset not in users and written:
                fix = f"remove the key (the data set does not use it), or set data.dataset: {users[0]}"
                raise wrong(f"data.{key}", got, f"no value, since dataset is {self.dataset}", fix)
            if written and key.endswith(("_suffix", "_suffixes")) and self._only_lists():
                fix = "remove the key: a list has the whole names of images and masks"
                raise wrong(f"data.{key}", got, "no value, since all pairs are in lists", fix)
        return self

    def uses(self, key: str) -> bool:
        """Whether the data set reads a key of this section; the value of another key is not in force."""
        return self.dataset in _USERS.get(key, (self.dataset,)) and (key != "synthetic" or self.dataset == key)

    def _only_lists(self) -> bool:
        return all(folders is not None and folders.pairs is not None for folders in (self.train, self.val))

    @model_validator(mode="after")
    def _one_number_per_channel(self) -> "Data":
        for key, colours in (("mean", MEAN), ("std", STD)):
            given = getattr(self, key)
            if len(given) == self.channels:
                continue
            middle = round(sum(colours) / 3, 3)
            usual = [*colours, *[middle] * (self.channels - 3)] if self.channels >= 3 else [middle] * self.channels
            expected = f"{self.channels} number{'s' * (self.channels > 1)}, since data.channels is {self.channels}"
            fix = f"take those of your images, or those of ImageNet's colours: {usual}"
            raise wrong(f"data.{key}", list(given), expected, fix)
        return self

    @model_validator(mode="after")
    def _classes_and_labels(self) -> "Data":
        names = self.classes
        if names and not 2 <= len(names) <= 255:
            raise wrong("data.classes", len(names), "2 to 255 names", "a label is one byte, and 255 means 'ignored'")
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise wrong("data.classes", repeated, "each class name once", "rename one of them")
        if self.palette is not None and len(self.palette) != len(names):
            expected = f"{len(names)} colours, one per class"
            raise wrong("data.palette", len(self.palette), expected, "add or remove colours, or use null")
        first = int(self.reduce_zero_label)
        if first <= self.ignore_index < first + len(names):
            expected = f"a value that is not a class ({first}..{first + len(names) - 1} are classes)"
            raise wrong("data.ignore_index", self.ignore_index, expected, "the usual value is 255")
        return self

    @model_validator(mode="after")
    def _scale_of_mean_and_std(self) -> "Data":
        """Constants for pixels 0..1, as torchvision has them, would make inputs of some hundreds."""
        small = all(abs(value) <= 1 for value in self.mean) and any(self.mean) and all(each <= 1 for each in self.std)
        for key, values in (("std", self.std), ("mean", self.mean)):
            if small or (key == "std" and any(value < 1 for value in values)):
                fix = f"multiply by 255: {[round(value * 255, 3) for value in values]}"
                raise wrong(f"data.{key}", list(values), "numbers on the scale 0..255; these are for 0..1", fix)
        return self

    @model_validator(mode="after")
    def _raw_ids(self) -> "Data":
        if self.raw_to_train is None or not self.classes:
            return self
        if self.reduce_zero_label:
            fix = "map 0 to 255 in raw_to_train, or remove raw_to_train"
            raise wrong("data.reduce_zero_label", True, "false, since raw_to_train is given", fix)
        for raw, train in self.raw_to_train.items():
            if train >= len(self.classes) and train not in (255, self.ignore_index):
                expected = f"a train id of 0..{len(self.classes) - 1}, or 255 (ignored)"
                raise wrong(f"data.raw_to_train.{raw}", train, expected, "train ids number the classes from 0")
        return self

"""The building blocks of a recipe's sections: types of values, the base class, and errors about several keys."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict
from pydantic_core import PydanticCustomError

LARGEST_SIDE = 16_384  # pixels
LARGEST_AREA = 2**28  # pixels of one image, as for the images that are read
LARGEST_BATCH_AREA = 2**27  # pixels of the crops of one step: 512 crops of 512x512
MOST_SCENES = 1_000_000
MOST_CHANNELS = 16  # of images, as for the networks
MOST_STEPS = 100_000_000
SEEDS = 2**32

CONTROL = re.compile("[\x00-\x1f\x7f]")


def _one_line(text: str) -> str:
    if CONTROL.search(text):
        raise PydanticCustomError("control", "text of one line, without control characters")
    return text


# What no machine can do is refused, as no limit would otherwise stand between a recipe and all memory.
Count = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Images = Annotated[int, Field(ge=1, le=65_536)]
Length = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Ratio = Annotated[float, Field(ge=0.01, le=100)]
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Side = Annotated[int, Field(ge=32, le=LARGEST_SIDE)]
Byte = Annotated[int, Field(ge=0, le=255)]
Share = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(max_length=4096), AfterValidator(_one_line)]
NonEmpty = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_one_line)]
# As annotation tools and data sets have it: what prints it shows control characters by their codes.
ClassName = Annotated[str, Field(min_length=1, max_length=4096)]
# Not strict: a strict section would refuse lists for tuples, `on` for true, and the text keys of JSON.
Switch = Annotated[bool, Strict(False)]
RawId = Annotated[int, Strict(False), Field(ge=0, le=255)]
WidthHeight = Annotated[tuple[Length, Length], Strict(False)]
HeightWidth = Annotated[tuple[Side, Side], Strict(False)]
Colour = Annotated[tuple[Byte, Byte, Byte], Strict(False)]


def wrong(key: str, got: object, expected: str, fix: str) -> PydanticCustomError:
    """An error about several keys, reported for one of them: `key` (dotted, from the recipe's root)."""
    context: dict[str, Any] = {"key": key, "got": got, "expected": expected, "fix": fix}
    return PydanticCustomError("across_keys", "{key}: expected {expected}", context)


def require_area(key: str, sides: tuple[int, int], ratio: float) -> None:
    """Raises an error for `key` if `sides`, each times `ratio`, have more pixels than one image may have."""
    if sides[0] * sides[1] * ratio**2 > LARGEST_AREA:
        expected = f"at most {LARGEST_AREA:,} pixels, width x height x ratio^2"
        raise wrong(key, list(sides), expected, "use smaller sides or ratios")


class Section(BaseModel):
    """A mapping in a recipe. Unknown keys are errors, values are not converted, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

"""The building blocks of a recipe's sections: types of values, the base class, and errors about several keys."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Side = Annotated[int, Field(ge=32)]
Byte = Annotated[int, Field(ge=0, le=255)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
# Not strict: a strict section would refuse lists for tuples, `on` for true, and the text keys of JSON.
Switch = Annotated[bool, Strict(False)]
RawId = Annotated[int, Strict(False), Field(ge=0, le=255)]
WidthHeight = Annotated[tuple[Count, Count], Strict(False)]
HeightWidth = Annotated[tuple[Side, Side], Strict(False)]
Three = Annotated[tuple[float, float, float], Strict(False)]
Colour = Annotated[tuple[Byte, Byte, Byte], Strict(False)]


def wrong(key: str, got: object, expected: str, fix: str) -> PydanticCustomError:
    """An error about several keys, reported for one of them: `key` (dotted, from the recipe's root)."""
    context: dict[str, Any] = {"key": key, "got": got, "expected": expected, "fix": fix}
    return PydanticCustomError("across_keys", "{key}: expected {expected}", context)


class Section(BaseModel):
    """A mapping in a recipe. Unknown keys are errors, values are not converted, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

"""The header of our checkpoints: its keys, and what each may hold. A file from elsewhere may hold anything."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ssaseg.files.structured import parse_json
from ssaseg.files.text import printable
from ssaseg.models.stem import MOST_CHANNELS

FORMAT = "ssaseg-1"
# What each header has, besides `format, model, classifier, classes`. mean and std: ImageNet's, RGB in [0, 255]. range:
# values of 16-bit images that become 0 and 255.
DEFAULTS: Mapping[str, Any] = {
    "palette": None,
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "range": None,
    "protocol": {"scale": None, "multiple": None},
    "recipe": None,
    "step": 0,
    "scores": {},
}
MOST_CLASSES = 4096
LONGEST_NAME = 1000  # characters
SURROGATES = re.compile("[\ud800-\udfff]")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model. The message names the file and the fix."""


def parse_header(header: Mapping[str, str], source: str) -> dict[str, Any]:
    """The values of a header of ours, whose texts are JSON. Keys that are missing stay missing.

    Raises CheckpointError that names the first key whose value is of another type or out of its range. The keys of
    `protocol` and `recipe` are not checked here: `ssaseg.recipes` does it where they are used.
    """
    metadata: dict[str, Any] = {}
    for key, text in header.items():
        try:
            metadata[key] = parse_json(text)
        except ValueError as error:
            raise _wrong(source, key, f"cannot be read ({printable(str(error)[:100])})", "a JSON value") from None
    for key, (fits, expected) in SCHEMA.items():
        if key in metadata and not fits(metadata[key]):
            raise _wrong(source, key, f"is {described(metadata[key])}", expected)
    channels = metadata.get("channels", 3)
    for key in ("mean", "std"):
        if len(metadata.get(key, DEFAULTS[key])) != channels:
            got = len(metadata.get(key, DEFAULTS[key]))
            raise _wrong(source, key, f"has {got} numbers", f"{channels}, one for each channel of the images")
    classes, palette = metadata.get("classes"), metadata.get("palette")
    if classes is not None and palette is not None and len(palette) != len(classes):
        raise _wrong(source, "palette", f"has {len(palette)} colours", f"{len(classes)}, one for each class")
    return metadata


def _wrong(source: str, key: str, what: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: {printable(key[:60])} in its header {what}\nexpected {expected}\n"
        "the file was changed or damaged: take another copy"
    )


def described(value: object) -> str:
    """A JSON value as short text; containers only by their size, because they may be nested deeply."""
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**18:
        return "a huge number"
    return "null" if value is None else printable(repr(value)[:60])


# ---- what fits -------------------------------------------------------------------------------------------------------


def _is_name(value: object) -> bool:
    """Text of limited length that can be written as UTF-8, which halves of surrogate pairs cannot."""
    return isinstance(value, str) and len(value) <= LONGEST_NAME and not SURROGATES.search(value)


def _is_number(value: object, low: float, high: float) -> bool:
    """A number in [low, high]; NaN is in no range."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _are(fits: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    """A list whose values fit; of `length` values, if given."""
    return lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(fits, value))


def _is_colour(value: object) -> bool:
    return _are(lambda each: isinstance(each, int) and _is_number(each, 0, 255), 3)(value)


def _is_range(value: object) -> bool:
    whole = _are(lambda each: isinstance(each, int) and _is_number(each, -(2**15), 2**16 - 1), 2)
    return whole(value) and value[0] < value[1]  # type: ignore[index]


def _are_options(value: object) -> bool:
    return isinstance(value, dict) and all(
        _is_name(name) and (_is_name(given) or _is_number(given, -1e9, 1e9) or isinstance(given, bool))
        for name, given in value.items()
    )


def _are_sides(value: object) -> bool:
    return _are(lambda each: isinstance(each, int) and _is_number(each, 1, 2**16), 2)(value)


def _is_deploy(value: object) -> bool:
    return isinstance(value, dict) and value.get("weights") == "float16" and _are(_is_name)(value.get("without"))


# Key → (whether a value fits, what is expected). Numbers are such that float32 can hold what is computed with them.
SCHEMA: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "format": (_is_name, "a text"),
    "model": (_is_name, "the name of a network"),
    "classifier": (_is_name, "the name of a classifier"),
    "options": (_are_options, "a mapping of an option's name to a number, a text, true or false"),
    "classes": (
        lambda value: _are(_is_name)(value) and 1 <= len(value) <= MOST_CLASSES,
        f"a list of 1 to {MOST_CLASSES} texts of at most {LONGEST_NAME} letters, without halves of letters",
    ),
    "palette": (lambda value: value is None or _are(_is_colour)(value), "null or a list of [R, G, B], each 0 to 255"),
    "channels": (
        lambda value: isinstance(value, int) and _is_number(value, 1, MOST_CHANNELS),
        f"a whole number from 1 to {MOST_CHANNELS}",
    ),
    "mean": (_are(lambda each: _is_number(each, -1e6, 1e6)), "a list of numbers from -1e6 to 1e6, one per channel"),
    "std": (_are(lambda each: _is_number(each, 1e-6, 1e6)), "a list of numbers from 1e-6 to 1e6, one per channel"),
    "range": (lambda value: value is None or _is_range(value), "null or [low, high], from -32768 to 65535, low first"),
    "protocol": (lambda value: isinstance(value, dict), "a mapping, like a recipe's section test"),
    "recipe": (lambda value: value is None or isinstance(value, dict), "null or a mapping"),
    "step": (lambda value: isinstance(value, int) and _is_number(value, 0, 1e15), "a whole number, 0 or more"),
    "scores": (lambda value: isinstance(value, dict), "a mapping"),
    # Classes that `ssaseg convert` gave new weights, which were never trained.
    "untrained": (_are(_is_name), "a list of names of classes"),
    "reduce_zero_label": (lambda value: isinstance(value, bool), "true or false"),  # of a folder of transformers
    "deploy": (_is_deploy, 'a mapping such as {"weights": "float16", "without": ["classifier.teacher"]}'),
    # Of an exported graph.
    "input": (lambda value: value in ("normalized", "rgb"), "normalized or rgb"),
    "output": (lambda value: value in ("logits", "logits-full", "labels"), "logits, logits-full or labels"),
    "size": (lambda value: value is None or _are_sides(value), "null or [height, width]"),
    "smallest": (_are_sides, "[height, width]"),
}

"""Which class each of several masks of an image has: by a word or number in its name, or by its folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ssaseg.datasets.base import IGNORED, DataError
from ssaseg.datasets.classnames import read_class_names
from ssaseg.datasets.classnames.guessing import BACKGROUND
from ssaseg.datasets.conventions.base import Options, prepare_command
from ssaseg.datasets.conventions.layer_files import Layers
from ssaseg.datasets.conventions.tables import read_names
from ssaseg.datasets.pairs import first_names
from ssaseg.datasets.survey.places import MASKS

# Words before a number that say what it counts.
COUNTED = {"class": re.compile(r"class|cls|cat(egory)?"), "object": re.compile(r"obj(ect)?|inst(ance)?|instances?")}
OBJECT = "object"


def choose_classes(root: Path, found: Layers, options: Options) -> tuple[list[str], dict[str, int], str]:
    """Class names, the train id of each label, and the rule in words. Raises DataError where no rule fits."""
    labels = sorted({label for image in found.images for _, label in image.layers})
    given = read_names(options.table) if options.table else None
    background = options.background or "background"
    if given is not None and len(given) == 1:
        return [background, given[0]], dict.fromkeys(labels, 1), "all masks are objects of one class"
    if all("/" in label for label in labels):
        return _named({label: label.partition("/")[0] for label in labels}, given, background, "folder", options)
    words = {label: _word(label) for label in labels}
    shown = {image.name: {words[label] for _, label in image.layers} for image in found.images}
    # Random letters do not occur twice.
    repeated = len(shown) == 1 or len(set(words.values())) < sum(map(len, shown.values()))
    if all(words.values()) and len(set(words.values())) > 1 and repeated:
        return _named(words, given, background, "word in the name of the mask", options)
    word = set(words.values()).pop() if len(set(words.values())) == 1 else ""
    numbers = {label: int(parts[-1]) for label in labels if (parts := _numbers(label))}
    if len(numbers) == len(labels):
        kind = _kind_of_numbers(found, numbers, word)
        if given is not None or kind == "class":
            return _numbered(root, numbers, given, background)
        if kind == OBJECT:
            name = OBJECT if not word or COUNTED["object"].fullmatch(word) else word
            rule = "the numbers in the names count objects, which are all of one class"
            return [background, name], dict.fromkeys(labels, 1), rule
    if found.nested:
        return [background, OBJECT], dict.fromkeys(labels, 1), "each mask is an object, and all are of one class"
    most = max(found.images, key=lambda image: len(image.layers))
    raise DataError(
        f"{root}: each image has several masks, up to {len(most.layers)}, such as {found.example}\n"
        "expected one mask an image, or names that say which class each shows: 000_car.png, 000_road.png\n"
        "rename them; or write the class names in a file (one name: all are objects of it) and run "
        f"`{prepare_command('layers', root, '--table', 'FILE')}`"
    )


def _named(
    words: Mapping[str, str], given: Sequence[str] | None, background: str, where: str, options: Options
) -> tuple[list[str], dict[str, int], str]:
    """Classes by name. One that is called background is that of the pixels in no mask, too."""
    names = sorted(set(words.values()), key=lambda name: (name.casefold(), name))
    own = next((name for name in names if BACKGROUND.fullmatch(name)), None)
    first = background if own is None or options.background else own
    classes = [first, *(name for name in names if name != own)]
    if given is not None:
        classes = list(given)
        if missing := [name for name in names if name not in classes]:
            raise DataError(
                f"{options.table}: does not have {first_names(missing, 6)}\n"
                f"expected a name for each {where}: {first_names(names, 12)}\nadd them to the file"
            )
        if classes[0] in names and not BACKGROUND.fullmatch(classes[0]):
            classes.insert(0, background)
    if len(classes) > IGNORED:
        raise DataError(f"{len(classes)} classes by the {where}\nexpected at most {IGNORED}\nput them together")
    ids = {label: 0 if word == own and given is None else classes.index(word) for label, word in words.items()}
    return classes, ids, f"the class is the {where}"


def _numbered(
    root: Path, numbers: Mapping[str, int], given: Sequence[str] | None, background: str
) -> tuple[list[str], dict[str, int], str]:
    """Classes by the last number of a name: named by a file, where it has as many."""
    distinct = sorted(set(numbers.values()))
    rule = "the class is the last number in the name of the mask"
    names = dict(enumerate(given)) if given is not None else None
    if names is None:
        found, _ = read_class_names(root)
        names = found.names if found else {}
    known = {number: names.get(number) for number in distinct}
    if len(names) == len(distinct):  # the background is not among them
        known = dict(zip(distinct, (names[key] for key in sorted(names)), strict=True))
    if given is not None and not all(known.values()):
        raise DataError(
            f"{len(names)} names in the file of --table, and {len(distinct)} different numbers in the names of masks\n"
            "expected one name a number, in their order\ncorrect the file"
        )
    if len(distinct) > IGNORED - 1:
        raise DataError(
            f"{root}: {len(distinct)} numbers in names\nexpected at most {IGNORED - 1} classes\nuse --table"
        )
    first = names.get(0, background) if 0 not in distinct and len(names) > len(distinct) else background
    classes = [first, *(known[number] or f"class_{number}" for number in distinct)]
    return classes, {label: distinct.index(number) + 1 for label, number in numbers.items()}, rule


def _kind_of_numbers(found: Layers, numbers: Mapping[str, int], word: str) -> str | None:
    """Whether the last numbers are those of classes ("class"), count objects (`OBJECT`), or may be both (None).

    word: the only one in all names, or "".
    """
    # With two numbers, the objects are counted by the other one.
    if COUNTED["class"].fullmatch(word) or all(len(_counters(label)) > 1 for label in numbers):
        return "class"
    if word:
        return OBJECT
    every = [sorted(numbers[label] for _, label in image.layers) for image in found.images]
    first = min(numbers.values())
    runs = all(each == list(range(first, first + len(each))) for each in every)
    if not runs:
        return "class"
    return OBJECT if len(set(map(len, every))) > 1 else None


def _word(label: str) -> str:
    """The letters in a label, without words for masks: traffic_light of _mask_traffic_light_2."""
    parts = re.findall(r"[^\W_]+", label)
    return "_".join(part for part in parts if part.isalpha() and len(part) > 1 and not MASKS.fullmatch(part.lower()))


def _numbers(label: str) -> list[str]:
    return [part for part in re.findall(r"[^\W_]+", label) if part.isdecimal() and len(part) < 10]


def _counters(label: str) -> list[str]:
    """Parts with digits: m0 and 00000001 of _m0_00000001."""
    return [part for part in re.findall(r"[^\W_]+", label) if any(letter.isdecimal() for letter in part)]

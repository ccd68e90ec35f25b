"""What a file of an annotation tool is, JSON by its keys: for recognition, and for advice where it is not read.

Files are not trusted, and may be huge: small ones are parsed, of large ones only the two ends are searched.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

from ssaseg.datasets.conventions.base import Tree
from ssaseg.datasets.conventions.yolo import without_names
from ssaseg.files.reading import open_file
from ssaseg.files.structured import parse_json
from ssaseg.files.text import printable

WHOLE = 2**20  # bytes of a file that is parsed
PART = 2**18  # bytes at each end of a larger file
KEY = re.compile(rb'"([A-Za-z_]\w{0,40})"\s*:')
MOST_HINTED = 20  # JSON files of a folder that are looked at for a hint
DEEPEST = 6  # levels that are looked at for keys
MOST_VALUES, MOST_OF_EACH = 5000, 50  # lists and objects that are looked at, of a level and of one list


def keys_of(file: Path) -> set[str]:
    """Keys of the JSON objects in a file, of its first levels; an empty set where it is not JSON or cannot be read."""
    try:
        with open_file(file) as stream:
            head = stream.read(WHOLE + 1)
            if len(head) > WHOLE:
                stream.seek(-PART, 2)
                return {found.decode() for found in KEY.findall(head[:PART] + b" " + stream.read(PART))}
        document = parse_json(head)
        return _keys(document) if isinstance(document, dict | list) else set()
    except (OSError, ValueError):
        return set()


def _keys(document: Any) -> set[str]:
    """Breadth first, so that the keys of the file itself are always among them."""
    found: set[str] = set()
    level = [document]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for value in level[:MOST_VALUES]:
            found |= set(islice(value, MOST_OF_EACH)) if isinstance(value, dict) else set()
            inner = value.values() if isinstance(value, dict) else value
            below += [each for each in islice(inner, MOST_OF_EACH) if isinstance(each, dict | list)]
        level = below
    return found


# In this order: keys of which a file must have all, what it is, and what reads it.
KINDS: tuple[tuple[set[str], str, str], ...] = (
    ({"shapes", "imagePath"}, "labelme's shapes", "labelme"),
    ({"annotations", "segments_info"}, "COCO's panoptic segments", "coco_panoptic"),
    ({"regions", "shape_attributes"}, "outlines of the VGG Image Annotator (VIA)", "via"),
    ({"objects", "geometryType"}, "annotations of Supervisely", "supervisely"),
)
OTHERS: tuple[tuple[set[str], str], ...] = (
    (
        {"images", "annotations", "categories", "segmentation"},
        "COCO-format annotations: run `ssaseg data init` on the folder that also holds its images, or write a recipe "
        "with data.dataset: coco_json",
    ),
    (
        {"images", "annotations", "categories"},
        "COCO-format annotations without `segmentation`: boxes do not say which pixels belong to an object",
    ),
    (
        {"imgHeight", "imgWidth", "objects"},
        "polygons of Cityscapes: use the masks *_gtFine_labelIds.png of the same archive, or draw them with "
        "cityscapesscripts (createTrainIdLabelImgs)",
    ),
    (
        {"annotations", "result"},
        "annotations of Label Studio in its own format: export them again as COCO, or as PNG masks",
    ),
    ({"brushlabels"}, "annotations of Label Studio: export them again as COCO, or as PNG masks"),
    ({"shapes"}, "shapes, perhaps labelme's, but without `imagePath`: export it again with labelme"),
    ({"objects"}, "objects, perhaps of Supervisely, but without `geometryType`: export masks as PNG files"),
    ({"regions"}, "regions, perhaps of VIA, but without `shape_attributes`: export them again as VIA JSON or COCO"),
    ({"file", "metadata", "view", "attribute"}, "a project of VIA 3: export its annotations as COCO"),
)
# Keys of files that training or `ssaseg data prepare` can read, and what they are.
READABLE = (
    *((keys, what) for keys, what, _ in KINDS),
    ({"images", "annotations", "categories", "segmentation"}, "COCO-format annotations"),
)
# Other files: suffix, what their beginning holds, and what they are.
TEXTS = (
    (".csv", b"region_shape_attributes", "outlines of VIA as CSV: export them again as JSON"),
    (".xml", b"<bndbox>", "boxes of PASCAL VOC: a box does not say which pixels belong to an object; outline them"),
)


def advise(tree: Tree) -> str | None:
    """What to do about a folder that has images, no masks, and labels that cannot be read as they are: on one line.

    Only some files are looked at. None where nothing is known.
    """
    files = tree.by_suffix.get(".json", [])[:MOST_HINTED]
    for file in files:
        if text := describe_json(tree.root / file):
            return f"{printable(str(file))}: {text}"
    if broken := next((file for file in files if _is_broken(tree.root / file)), None):
        return f"{printable(str(broken))} is not whole JSON: export it again, or copy it again"
    if text := without_names(tree):
        return text
    for suffix, mark, what in TEXTS:
        for file in tree.by_suffix.get(suffix, [])[:MOST_HINTED]:
            if mark in _head(tree.root / file):
                return f"{printable(str(file))}: {what}"
    return None


def beside_masks(tree: Tree) -> str | None:
    """A note about the first JSON file that could be read, where masks are read instead; None without one."""
    for file in tree.by_suffix.get(".json", [])[:MOST_HINTED]:
        keys = keys_of(tree.root / file)
        if what := next((what for wanted, what in READABLE if wanted <= keys), None):
            return f"masks are read; not used: {what} in JSON files, such as {printable(str(file))}"
    return None


def _head(file: Path) -> bytes:
    try:
        with open_file(file) as stream:
            return stream.read(2**16)
    except OSError:
        return b""


def _is_broken(file: Path) -> bool:
    """Whether a JSON file is cut or empty; of a large one only the end is looked at."""
    try:
        with open_file(file) as stream:
            head = stream.read(WHOLE + 1)
            if len(head) > WHOLE:
                stream.seek(-PART, 2)
                return stream.read(PART).rstrip()[-1:] not in (b"}", b"]")
        parse_json(head)
    except OSError:
        return False
    except ValueError:
        return True
    return False


def describe_json(file: Path) -> str | None:
    """What a JSON file holds and what reads it, on one line, by its keys; None where they say nothing."""
    keys = keys_of(file)
    for wanted, what, kind in KINDS:
        if wanted <= keys:
            return f"{what}: run `ssaseg data prepare {kind} --source DIR --root OUT`"
    return next((text for wanted, text in OTHERS if wanted <= keys), None)

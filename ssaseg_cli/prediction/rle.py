"""`rle.json`: the single file with the run lengths of all images, as pycocotools' `loadRes` takes it.

Beside it, `rle.images.json` lists images and categories: `COCO("rle.images.json").loadRes("rle.json")`.

Axes: K classes, H×W pixels of an image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ssaseg.cli.results.objects import read_objects, replacing, to_line

if TYPE_CHECKING:
    from ssaseg.cli.prediction.ids import Ids

IMAGES = "rle.images.json"


def rle_lines(name: str, labels: np.ndarray, classes: Sequence[str], ids: "Ids") -> list[bytes]:
    """COCO run lengths of labels (H,W): one JSON object for each class in them. Other labels, such as 255, have none.

    Keys: image_id and category_id, see `Ids`; segmentation {size [H,W], counts}; score, always 1, as each pixel has one
    class; image (path below its INPUT), category (the class), area [pixels]. There is no `bbox`: `loadRes` would take
    its area for that of the region.
    """
    from pycocotools import mask

    by_column = np.asfortranarray(labels)  # the order of COCO's run lengths
    lines = []
    pixels = np.bincount(labels.reshape(-1))[: len(classes)]  # unique would sort the pixels
    for index in np.flatnonzero(pixels).tolist():
        category = ids.category(index)
        if category is None:
            continue
        code = mask.encode((by_column == index).view(np.uint8))
        entry = {
            "image_id": ids.image(name),
            "category_id": category,
            "segmentation": {"size": list(labels.shape), "counts": code["counts"].decode("ascii")},
            "score": 1.0,
            "image": name,
            "category": classes[index],
            "area": int(mask.area(code)),
        }
        lines.append(to_line(entry))
    return lines


def is_rle(value: object) -> bool:
    """Whether a JSON value has what `rle_lines` writes."""
    match value:
        case {
            "image": str(),
            "image_id": int(),
            "category_id": int(),
            "category": str(),
            "segmentation": {"size": [int(), int()]},
        }:
            return True
    return False


def list_images(path: Path) -> None:
    """Writes the images and categories of an `rle.json` beside it, as a COCO-format file without annotations."""
    categories: dict[int, str] = {}
    last = None
    with replacing(path.with_name(IMAGES)) as file:
        file.write(b'{"images": [')
        separator = b"\n"
        for entry, _ in read_objects(path, is_rle):
            categories.setdefault(entry["category_id"], entry["category"])
            if entry["image"] != last:
                last = entry["image"]
                height, width = entry["segmentation"]["size"]
                image = {"id": entry["image_id"], "file_name": last, "width": width, "height": height}
                file.write(separator + to_line(image))
                separator = b",\n"
        named = [{"id": number, "name": name} for number, name in sorted(categories.items())]
        file.write(b'\n], "annotations": [], "categories": ' + to_line(named) + b"}\n")
